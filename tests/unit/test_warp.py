"""Maps warped by one matrix against Pillow, which does to an image one operation after the other."""

import math
from functools import reduce
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.data.recipes import cpsl as cpsl_views
from common.data.recipes.cpsl import GEOMETRIC_OPERATIONS, strong_view
from common.ops.warp import warp_labels, warp_maps

H, W, STRIDE = 64, 112, 4
FILL = -1e4
IDENTITY = torch.eye(3)[None]


def matrix(op: str, value: float) -> np.ndarray:
    """Pixel centres of the result → coordinates of the operand."""
    if op == "mirror":
        return np.array([[-1, 0, W], [0, 1, 0], [0, 0, 1]], float)
    m = np.eye(3)
    if op == "rotate":
        c, s = math.cos(math.radians(value)), math.sin(math.radians(value))
        centre = np.array([[1, 0, W / 2], [0, 1, H / 2], [0, 0, 1]])
        return centre @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.linalg.inv(centre)
    m[{"shear_x": (0, 1), "shear_y": (1, 0), "translate_x": (0, 2), "translate_y": (1, 2)}[op]] = value
    return m


def pillow(image: Image.Image, op: str, value: float) -> Image.Image:
    if op == "mirror":
        return ImageOps.mirror(image)
    if op == "rotate":
        return image.rotate(value, Image.Resampling.BILINEAR, fillcolor=FILL)
    data = {
        "shear_x": (1, value, 0, 0, 1, 0), "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, value, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, value),
    }  # fmt: skip
    kind = Image.Transform.AFFINE
    return image.transform((W, H), kind, data[op], Image.Resampling.BILINEAR, fillcolor=FILL)


def coordinates(h: int, w: int) -> np.ndarray:
    """An image whose two channels say where each of its pixels is, in pixels of H × W: (2, h, w)."""
    y, x = np.meshgrid((np.arange(h) + 0.5) * H / h, (np.arange(w) + 0.5) * W / w, indexing="ij")
    return np.stack((x, y)).astype(np.float32)


def at_cells(image: np.ndarray) -> np.ndarray:
    """What an image (H, W) shows at the centres of the grid's cells; fill wherever it touches the centre."""
    corners = [image[1 + i :: STRIDE, 1 + j :: STRIDE] for i in (0, 1) for j in (0, 1)]
    return np.where(np.min(corners, 0) < 0, FILL, np.mean(corners, 0))


OPS = [
    (op, sign * size)
    for op, size in (("shear_x", 0.27), ("shear_y", 0.27), ("translate_x", 30), ("translate_y", 17), ("rotate", 27))
    for sign in (1, -1)
]
CASES = [[op] for op in [("mirror", 0), *OPS]] + [list(pair) for pair in product(OPS, repeat=2)]
CASES += [[("mirror", 0), *pair] for pair in product(OPS[::3], repeat=2)]


def test_every_operation_and_pair_follows_the_image():
    """Within half a cell of the grid, away from the border."""
    where = torch.from_numpy(coordinates(H // STRIDE, W // STRIDE))[None]
    for case in CASES:
        composed = reduce(np.matmul, [matrix(*op) for op in case])
        images = [Image.fromarray(channel) for channel in coordinates(H, W)]
        for op in case:
            images = [pillow(image, *op) for image in images]
        shown = np.stack([at_cells(np.asarray(image)) for image in images])
        moved, mask = warp_maps(where, torch.from_numpy(composed)[None], (H, W))
        content = (shown > 2 * STRIDE).all(0) & (shown[0] < W - 2 * STRIDE) & (shown[1] < H - 2 * STRIDE)
        assert content.sum() > 40, case  # a case that shows nothing tests nothing
        assert mask[0].numpy()[content].all(), case
        apart = np.abs(moved[0].numpy() - shown)[:, content]
        assert apart.max() <= STRIDE / 2 + 0.15, (case, apart.max())


@pytest.mark.parametrize("case", CASES[:11], ids=lambda case: f"{case[0][0]}{case[0][1]:+}")
def test_fill_of_the_image_is_ignored_in_the_label(case):
    shown = at_cells(np.asarray(pillow(Image.new("F", (W, H), 7), *case[0])))
    label = torch.full((1, H // STRIDE, W // STRIDE), 7, dtype=torch.int16)
    ours = warp_labels(label, torch.from_numpy(matrix(*case[0]))[None], (H, W))[0].numpy()
    assert ours.dtype == np.int16 and set(np.unique(ours)) <= {-1, 7}
    differ = (ours == 7) != (shown > 0)
    at_border = np.zeros_like(differ)  # cells half covered may go either way
    for axis, shift in product((0, 1), (1, -1)):
        at_border |= np.roll(shown, shift, axis) != shown
    assert not (differ & ~at_border).any() and differ.mean() < 0.1


def brute_force(label: np.ndarray, warp: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    h, w = label.shape
    out = np.full_like(label, -1)
    for i, j in product(range(h), range(w)):
        x, y, _ = warp @ ((j + 0.5) * crop[1] / w, (i + 0.5) * crop[0] / h, 1)
        column, row = math.floor(x * w / crop[1]), math.floor(y * h / crop[0])
        if 0 <= row < h and 0 <= column < w:
            out[i, j] = label[row, column]
    return out


def random_warps(n: int) -> Tensor:
    warp = torch.eye(3).repeat(n, 1, 1)
    warp[:, :2] += torch.randn(n, 2, 3) * torch.tensor([0.2, 0.2, 9.0])
    return warp


def test_labels_equal_brute_force():
    labels, warps = torch.randint(-1, 9, (5, 12, 20)), random_warps(5)
    ours = warp_labels(labels, warps, (48, 80))
    expected = [brute_force(a.numpy(), m.double().numpy(), (48, 80)) for a, m in zip(labels, warps, strict=True)]
    assert ours.dtype == torch.int64 and (ours.numpy() != np.stack(expected)).mean() < 1e-3  # ties in float32


def test_maps_move_as_labels_do():
    labels, warps = torch.randint(0, 9, (3, 12, 20)), random_warps(3)
    cutout = torch.tensor([[4, 8, 21, 33], [0, 0, 0, 0], [30, 70, 48, 80]], dtype=torch.int32)
    maps, mask = warp_maps(labels[:, None].float() + 1, warps, (48, 80), cutout)
    assert mask.dtype == torch.bool and 0.2 < mask.float().mean() < 0.95
    assert torch.equal(torch.where(mask, maps[:, 0].long() - 1, -1), warp_labels(labels, warps, (48, 80), cutout))


def test_views_of_the_loader_speak_of_the_same_geometry():
    for (name, make), level, sign in product(GEOMETRIC_OPERATIONS.items(), (1, 9), (1, -1)):
        sizes = {"rotate": 3 * level, "translate_x": int(0.03 * level * W), "translate_y": int(0.03 * level * H)}
        expected = matrix(name, sign * sizes.get(name, 0.03 * level))
        assert np.allclose(make(level, sign, W, H), expected, atol=1e-9), name
    rng = np.random.default_rng(0)
    for _ in range(20):
        view = strong_view(torch.randint(0, 100, (3, H, W), dtype=torch.uint8), rng)
        label = torch.zeros(1, H // STRIDE, W // STRIDE, dtype=torch.int16)
        hidden = warp_labels(label, IDENTITY, (H, W), view["cutout"][None])[0] == -1
        y0, x0, y1, x1 = view["cutout"].tolist()
        assert abs(hidden.sum() * STRIDE**2 - (y1 - y0) * (x1 - x0)) < 2 * STRIDE * (y1 - y0 + x1 - x0)
        centres = view["strong"][:, 3::STRIDE, 3::STRIDE][:, hidden]
        assert hidden.any() and (centres == 127).all()


def test_blur_and_jitter_can_be_left_out(monkeypatch):
    """Without them and the random operations the strong view is the weak one or its mirror, but for the cutout."""
    monkeypatch.setattr(cpsl_views, "random_operations", lambda image, rng: (image, np.eye(3)))
    weak = torch.randint(0, 256, (3, H, W), dtype=torch.uint8)

    def untouched(seed: int, **probabilities) -> bool:
        view = strong_view(weak, np.random.default_rng(seed), **probabilities)
        y0, x0, y1, x1 = view["cutout"].tolist()
        seen = torch.ones(H, W, dtype=torch.bool)
        seen[y0 : y1 + 1, x0 : x1 + 1] = False
        return any(torch.equal(view["strong"][:, seen], image[:, seen]) for image in (weak, weak.flip(2)))

    assert all(untouched(seed, blur=0.0, jitter=0.0) for seed in range(40))
    assert not any(untouched(seed, blur=1.0, jitter=0.0) or untouched(seed, blur=0.0, jitter=1.0) for seed in range(40))
    assert 0.1 < np.mean([untouched(seed) for seed in range(80)]) < 0.4  # neither of two of probability ½


def test_cutout_covers_whole_cells():
    label = torch.zeros(2, 12, 20, dtype=torch.int16)
    cutout = torch.tensor([[4, 9, 21, 33], [0, 16, 48, 16]], dtype=torch.int32)
    ours = warp_labels(label, IDENTITY.expand(2, 3, 3), (48, 80), cutout)
    expected = label.clone()
    expected[0, 1:5, 2:8] = -1
    assert torch.equal(ours, expected)


def test_nothing_is_read_back():
    with FakeTensorMode():  # tensors without data: any look at a value raises
        warp, cutout = torch.empty(2, 3, 3, device="cuda"), torch.empty(2, 4, dtype=torch.int32, device="cuda")
        labels = torch.empty(2, 12, 20, dtype=torch.int16, device="cuda")
        assert warp_labels(labels, warp, (48, 80), cutout).dtype == torch.int16
        maps, mask = warp_maps(torch.empty(2, 4, 12, 20, device="cuda"), warp, (48, 80), cutout)
        assert maps.shape == (2, 4, 12, 20) and mask.shape == (2, 12, 20)
