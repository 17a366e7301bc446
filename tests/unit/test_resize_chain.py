"""Chains of resizes as matrices, against the literal chain of `F.interpolate`, crop and flip."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.ops.resize_chain import (
    Taps,
    feature_matrices,
    label_matrices,
    reached,
    resample,
    resample_labels,
    resample_points,
    resize_matrices,
)


def bilinear(x: Tensor, size: tuple[int, int], align_corners: bool = True) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def cut(x: Tensor, y: int, x0: int, crop: tuple[int, int], flip: int) -> Tensor:
    """Crop, pad with 0 where the image is smaller, and mirror."""
    x = x[..., y : y + crop[0], x0 : x0 + crop[1]]
    x = F.pad(x, (0, crop[1] - x.shape[-1], 0, crop[0] - x.shape[-2]))
    return x.flip(-1) if flip else x


def literal_labels(maps: Tensor, geometry: Tensor, crop: tuple[int, int], align_corners: bool = True) -> Tensor:
    out = []
    for one, (height0, width0, height, width, y, x, flip) in zip(maps[:, None], geometry.tolist(), strict=True):
        full = bilinear(bilinear(one, (height0, width0), align_corners), (height, width), align_corners)
        quarter = (crop[0] // 4, crop[1] // 4)
        out.append(bilinear(cut(full, y, x, crop, flip), quarter, align_corners))
    return torch.cat(out)


def literal_features(maps: Tensor, geometry: Tensor, crop: tuple[int, int]) -> Tensor:
    out = []
    for one, (*sizes, flip) in zip(maps[:, None], geometry.tolist(), strict=True):
        height0, width0, height, width, y, x = (size // 4 for size in sizes)
        full = bilinear(bilinear(one, (height0, width0)), (height, width))
        out.append(cut(full, y, x, (crop[0] // 4, crop[1] // 4), flip))
    return torch.cat(out)


def resample_features(maps: Tensor, geometry: Tensor, crop: tuple[int, int]) -> Tensor:
    return resample(maps, *feature_matrices(geometry, tuple(maps.shape[-2:]), crop))


def draw(images: int, size: tuple[int, int], crop: tuple[int, int], seed: int) -> Tensor:
    rng, rows = np.random.default_rng(seed), []
    for i in range(images):
        width = int(size[1] * rng.uniform(0.55, 1.6))
        height = int(width * size[0] / size[1])
        y, x = (int(rng.integers(side - want + 1)) for side, want in zip((height, width), crop, strict=True))
        rows.append((*size, height, width, y, x, i % 2))
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("align_corners", [True, False])
def test_labels_equal_the_literal_chain(align_corners):
    size, crop = (128, 256), (64, 96)
    geometry, maps = draw(6, size, crop, 0), torch.rand(6, 5, 17, 33, dtype=torch.float64).softmax(1)
    rows, columns = label_matrices(geometry, (17, 33), crop, align_corners=align_corners)
    expected = literal_labels(maps, geometry, crop, align_corners)
    assert torch.allclose(resample(maps, rows, columns).double(), expected, atol=2e-6)


def test_features_equal_the_literal_chain():
    size, crop = (130, 254), (64, 96)
    geometry, maps = draw(6, size, crop, 1), torch.randn(6, 7, 17, 32, dtype=torch.float64)
    ours, expected = resample_features(maps, geometry, crop), literal_features(maps, geometry, crop)
    assert torch.linalg.norm(ours - expected) / torch.linalg.norm(expected) <= 1e-6


def test_full_size():
    """At the sizes of CPSL; the literal chain in float64, since its own float32 positions err by 1e-5."""
    crop = (512, 896)
    geometry = torch.tensor([[1024, 2048, 1650, 3300, 1138, 2404, 1], [1024, 2048, 1101, 2203, 331, 777, 0]])
    soft = torch.rand(2, 2, 129, 257).softmax(1).half()
    expected = literal_labels(soft.double(), geometry, crop)
    ours = resample_labels(soft, geometry.int(), crop)
    assert ours.dtype == torch.float32 and (ours - expected).abs().max() <= 1e-6
    maps = torch.randn(2, 4, 129, 257)
    ours, expected = resample_features(maps, geometry, crop), literal_features(maps.double(), geometry, crop)
    assert torch.linalg.norm(ours - expected) / torch.linalg.norm(expected) <= 1e-6


def test_image_smaller_than_the_crop():
    crop = (64, 96)
    geometry = torch.tensor([[128, 256, 48, 80, 0, 0, 1], [128, 256, 60, 120, 0, 7, 1]])
    maps = torch.rand(2, 3, 17, 33, dtype=torch.float64)
    ours = resample_labels(maps, geometry, crop).double()
    assert torch.allclose(ours, literal_labels(maps, geometry, crop), atol=2e-6)
    ours = resample_features(maps, geometry, crop).double()
    assert torch.allclose(ours, literal_features(maps, geometry, crop), atol=2e-6)
    assert not ours[0, :, 12:].any() and not ours[0, :, :, :4].any() and ours[0, :, :12, 4:].all()


@pytest.mark.parametrize("side", [90, 91, 93])
def test_cells_that_the_crop_fills_in_part(side):
    """A crop that is not padded is mirrored about the cells that its floored sizes leave, where they are fewer."""
    geometry = torch.tensor([[96, 96, 96, 96, 0, 96 - side, flip] for flip in (0, 1)])
    plain, mirrored = reached(*feature_matrices(geometry, (1, 1), (side, side)))[:, 0].tolist()
    cells = 96 // 4 - (96 - side) // 4
    assert plain == [i < cells for i in range(-(-side // 4))] == mirrored


@pytest.mark.parametrize("mixed", [torch.float32, torch.bfloat16])
def test_points_equal_the_resampled_map(mixed):
    geometry, maps = draw(3, (128, 256), (64, 96), 3), torch.randn(3, 7, 17, 33).to(mixed)
    matrices, index = feature_matrices(geometry, (17, 33), (64, 96)), torch.randint(16 * 24, (3, 40))
    whole = resample(maps, *matrices).flatten(2).transpose(1, 2)
    expected = whole.gather(1, index[:, :, None].expand(-1, -1, 7))
    torch.testing.assert_close(resample_points(maps, *matrices, 2, index), expected)


def test_a_resize_of_both_sides_is_that_of_interpolate():
    maps = torch.randn(2, 3, 9, 13)
    for align_corners in (True, False):
        matrices = resize_matrices(maps, (16, 20), align_corners=align_corners)
        torch.testing.assert_close(resample(maps, *matrices), bilinear(maps, (16, 20), align_corners))


def test_any_single_resize_is_a_matrix():
    for source, target, align_corners in ((5, 17, True), (17, 5, False), (9, 1, True), (1, 6, False), (8, 8, True)):
        line = torch.rand(1, 1, 1, source)
        matrix = Taps(1, target).resize(source, target, align_corners).matrix(source)
        expected = bilinear(line, (1, target), align_corners)
        assert torch.allclose(matrix[0] @ line[0, 0, 0], expected[0, 0, 0], atol=1e-6)


def test_nothing_is_read_back_and_autocast_changes_nothing():
    with FakeTensorMode():  # tensors without data: any look at a value raises
        geometry = torch.empty(2, 7, dtype=torch.int32, device="cuda")
        maps = torch.empty(2, 3, 17, 33, dtype=torch.float16, device="cuda")
        assert resample_labels(maps, geometry, (64, 96)).shape == (2, 3, 16, 24)
        assert resample_features(maps, geometry, (64, 96)).shape == (2, 3, 16, 24)
    geometry, maps = draw(2, (128, 256), (64, 96), 2), torch.rand(2, 3, 17, 33)
    with torch.autocast("cpu", torch.bfloat16):
        inside = resample_labels(maps, geometry, (64, 96))
    assert torch.equal(inside, resample_labels(maps, geometry, (64, 96)))
