"""Stage 1 where the resized target image is smaller than the crop: its padding teaches nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data import IGNORE, build_transform
from common.losses.distillation import consistency
from common.ops.resize_chain import feature_matrices, reached, resample, resample_labels
from common.ops.warp import warp_maps
from tests.unit.data_files import opened
from tests.unit.test_uda_configs import CROP, FULL, batches, small
from uda.base import onto_grid
from uda.cpsl import out_of_padding
from uda.proda import uniform_pull

CLASSES = 5
GRID = (8, 12)  # of the crop
STAGES = {"cpsl": "gta5_to_cityscapes/stage1", "proda": "gta5_to_cityscapes/stage1_proda"}


def stage1(name, folder, *words):
    torch.manual_seed(0)
    return small(STAGES[name], folder, f"model.num_classes={CLASSES}", *(f"method.{word}" for word in words)).eval()


def target(height=24, width=36):
    """Of two images at this size, the second one mirrored; class 0 is never likely."""
    data = batches(CLASSES)["target"]
    data["soft"] = F.pad(data["soft"][:, 1:], (0, 0, 0, 0, 1, 0))
    data["geometry"] = torch.tensor([[*FULL, height, width, 0, 0, flip] for flip in (0, 1)])
    return data


def shown(rows=6, columns=9):
    """Which cells of the grid show the images of `target`."""
    cells = torch.zeros(2, *GRID, dtype=torch.bool)
    cells[0, :rows, :columns] = True
    cells[1, :rows, GRID[1] - columns :] = True
    return cells


@pytest.mark.parametrize("flip", [0, 1])
def test_soft_labels_and_features_lie_where_the_recipe_puts_the_image(flip):
    """An image of 64×96 pixels with three stripes, in a crop of 96×160."""
    stripes = np.repeat(np.array([0, 1, 2], np.int16), 32)[None].repeat(64, 0)
    options = {"crop": [96, 160], "width": 96, "ratio": [1.0, 1.0], "flip": float(flip)}
    recipe = build_transform({"recipe": "cpsl", **options})
    pixels = np.zeros((64, 96, 3), np.uint8)
    out = recipe(opened(pixels, stripes), np.random.default_rng(0), None, 0)

    soft = F.one_hot(torch.from_numpy(stripes[::4, ::4]).long(), 3).permute(2, 0, 1)[None].float()
    geometry = out["geometry"][None]
    features = resample(soft, *feature_matrices(geometry, (16, 24), (96, 160)))
    for found in (resample_labels(soft, geometry, (96, 160)), features):
        label = found.argmax(1).masked_fill(found.sum(1) == 0, IGNORE)[0]
        middle = label[::4, 2::4]  # away from the stripes' edges
        assert torch.equal(middle, out["label"][::16, 8::16].long())
    assert torch.equal(reached(*feature_matrices(geometry, (1, 1), (96, 160)))[0], out["label"][::4, ::4] != IGNORE)


@pytest.mark.parametrize("kind", STAGES)
def test_padding_has_no_label(kind, tmp_path):
    label = stage1(kind, tmp_path).label_target(target())[1]
    assert torch.equal(label != IGNORE, shown()) and (label != 0).all()


@pytest.mark.parametrize("kind", STAGES)
def test_padding_takes_no_part_in_the_consistency(kind, tmp_path):
    """Of a strong view that is mirrored: it is that of the cells which show the image."""
    method, data = stage1(kind, tmp_path), target()
    data["warp"] = torch.tensor([[-1.0, 0, CROP[1]], [0, 1, 0], [0, 0, 1]]).repeat(2, 1, 1)
    answer = method.label_target(data)[0]
    assert torch.equal((answer != 0).all(1), shown()) and torch.equal((answer != 0).any(1), shown())

    features = method.model(data["strong"])["features"]
    likeness = method.similarity if kind == "cpsl" else method.closeness
    temperature = method.options.temperature if kind == "cpsl" else 1.0
    student = likeness(features, onto_grid(features, GRID))
    teacher, mask = warp_maps(answer, data["warp"], CROP, data["cutout"])
    inside, _ = warp_maps(shown()[:, None], data["warp"], CROP)
    expected = consistency(student, teacher, mask & inside[:, 0], temperature)
    found = method.strong_terms(data, answer)["consistency"]
    torch.testing.assert_close(found, expected)
    assert not torch.isclose(found, consistency(student, teacher, mask, temperature))


def test_padding_is_no_label_that_stays(tmp_path):
    """The share of labels that prototypes change is that of the images' cells."""
    method, data = stage1("cpsl", tmp_path), target()
    grid = resample_labels(data["soft"], data["geometry"], CROP).argmax(1)
    _, label, changed, _ = method.label_target(data)
    expected = (label != grid)[shown()].float().mean()
    assert 0 < expected < 1
    torch.testing.assert_close(changed, expected)


def test_padding_is_not_pulled_to_the_uniform_distribution():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, *GRID, generator=g)
    terms = [-logits[i, :, y, x].log_softmax(0).mean() for i, y, x in shown().nonzero().tolist()]
    torch.testing.assert_close(uniform_pull(logits, shown()), torch.stack(terms).mean())
    every = torch.ones_like(shown())
    torch.testing.assert_close(uniform_pull(logits, every), -logits.log_softmax(1).mean())


@pytest.mark.parametrize("sampling", ["uniform", "class_balanced"])
def test_padding_does_not_enter_the_bank(sampling, tmp_path):
    """Even where more cells are asked for than there are."""
    method = stage1("cpsl", tmp_path, f"sampling={sampling}", "samples=80")
    features, logits, labels = method.label_target(target())[3]
    assert features.shape[:2] == labels.shape == (2, 80) and (labels > 0).all()
    for rows in (features, logits):
        torch.testing.assert_close(rows.norm(dim=2), torch.ones(2, 80))


def test_cells_out_of_padding():
    """Spread evenly over the image; without padding, and in the image, all stays."""
    cells = shown().flatten(1)
    every = torch.arange(cells.shape[1]).expand(2, -1)
    moved = out_of_padding(every, cells)
    assert cells.gather(1, moved).all() and torch.equal(moved[cells], every[cells])
    times = torch.zeros_like(every).scatter_add_(1, moved, torch.ones_like(every))
    assert times[cells].min() == 1 and times[cells].max() == 2 and times.sum() == every.numel()
    assert torch.equal(out_of_padding(every, torch.ones_like(cells)), every)


@pytest.mark.parametrize("kind", STAGES)
def test_a_step_with_padded_crops(kind, tmp_path):
    method = stage1(kind, tmp_path)
    streams = {**batches(CLASSES), "target": target()}
    for part in method(streams, 0):
        part["loss"].backward()
        assert all(value.isfinite() for value in part.values())
