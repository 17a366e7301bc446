"""Products and norms of resampled features without resampling them, against resampling them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.ops import resampled_products as module
from common.ops.resampled_products import NeighbourProducts, resampled_products
from common.ops.resize_chain import feature_matrices, feature_reach, resample, resize_matrices

GEOMETRY = torch.tensor([[128, 256, 200, 400, 31, 77, 1], [128, 256, 70, 140, 2, 9, 0], [128, 256, 48, 80, 0, 0, 1]])


def banded(batch: int, long: int, short: int, reach: int) -> Tensor:
    """Random matrices whose rows have entries in reach + 1 neighbouring columns."""
    start = torch.arange(long) * (short - 1) // long
    offset = torch.arange(short) - start[:, None]
    return torch.randn(batch, long, short, dtype=torch.float64) * ((offset >= 0) & (offset <= reach))


@pytest.mark.parametrize("reach", [0, 1, 2, 3])
def test_equal_to_resampled_features(reach):
    maps, vectors = torch.randn(2, 150, 6, 7, dtype=torch.float64), torch.randn(4, 150, dtype=torch.float64)
    rows, columns = banded(2, 9, 6, reach), banded(2, 11, 7, reach)
    dots, squares = resampled_products(maps, vectors, rows, columns, reach)
    features = rows[:, None] @ maps @ columns[:, None].transpose(2, 3)
    torch.testing.assert_close(dots, torch.einsum("bdhw,kd->bkhw", features, vectors))
    torch.testing.assert_close(squares, features.square().sum(1))


def test_gradients():
    maps = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    rows, columns = banded(2, 5, 3, 2), banded(2, 4, 4, 2)
    assert torch.autograd.gradcheck(lambda m, v: resampled_products(m, v, rows, columns, 2), (maps, vectors))


def test_any_number_of_channels_is_multiplied_at_a_time(monkeypatch):
    found = []
    for count in (1, 64, 150, 1 << 16):
        monkeypatch.setitem(module.CHANNELS, "cpu", count)
        maps = torch.randn(150, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        pairs = NeighbourProducts.apply(maps, 2)
        found.append((pairs, *torch.autograd.grad(pairs.square().sum(), maps)))
    for values in found:
        torch.testing.assert_close(values, found[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 2)])
def test_neighbours_of_maps_smaller_than_the_reach(size):
    maps, reach = torch.randn(4, *size), 2
    pairs = NeighbourProducts.apply(maps, reach)
    assert pairs.shape == (reach + 1, size[0], 2 * reach + 1, size[1])
    assert torch.allclose(pairs.sum(), maps.sum((1, 2)).square().sum(), atol=1e-4)  # every pair, in both orders


def test_cosines_of_cpsl_features_equal_the_literal_ones():
    """Similarities of teacher features on a drawn crop, and of student features on the quarter grid."""
    maps, vectors = torch.randn(3, 16, 17, 33), F.normalize(torch.randn(5, 16), dim=1)
    how = feature_matrices(GEOMETRY, (17, 33), (64, 96))
    for matrices, reach in ((how, 2), (resize_matrices(maps, (32, 48)), 1)):
        dots, squares = resampled_products(maps, vectors, *matrices, reach)
        features = resample(maps, *matrices)
        expected = torch.einsum("bdhw,kd->bkhw", F.normalize(features, dim=1), vectors)
        cosines = dots / squares.clamp(min=1e-24).sqrt()[:, None]
        torch.testing.assert_close(cosines, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(17, 33), (9, 17), (33, 65), (65, 129), (128, 250), (1, 1)])
def test_reach_covers_what_the_matrices_mix(grid):
    for matrix in feature_matrices(GEOMETRY, grid, (64, 96)):
        cells = torch.arange(matrix.shape[2])
        last = torch.where(matrix > 0, cells, -1).amax(2)
        first = torch.where(matrix > 0, cells, 10**6).amin(2)
        assert (last - first).max() <= feature_reach(grid, (128, 256))


def test_nothing_is_read_back_and_autocast_changes_nothing():
    with FakeTensorMode():  # tensors without data: any look at a value raises
        maps, vectors = torch.empty(2, 8, 17, 33, device="cuda"), torch.empty(5, 8, device="cuda")
        rows, columns = resize_matrices(maps, (16, 24))
        dots, squares = resampled_products(maps, vectors, rows, columns, 1)
        assert dots.shape == (2, 5, 16, 24) and squares.shape == (2, 16, 24)
    maps, vectors = torch.randn(1, 8, 9, 9), torch.randn(5, 8)
    matrices = resize_matrices(maps, (16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        inside = resampled_products(maps, vectors, *matrices, 1)
    assert all(map(torch.equal, inside, resampled_products(maps, vectors, *matrices, 1)))
