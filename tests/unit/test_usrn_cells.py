"""Cells and pixels of USRN's subclass labels, exported features, and lists of labelled images."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.config import ModelConfig, SourceConfig
from common.data import SegmentationDataset
from common.data.toy.write import make
from common.models import build_model
from scripts.prepare_splits import order, whole
from semi_sup.cells import blocky_subclasses, cell_classes, cell_pixels, pixel_cells, pixel_subclasses
from semi_sup.clustering import balanced, check_classes, normal
from semi_sup.features import adopt, export, grid, open_features
from semi_sup.subclasses import offsets, parents
from tests.unit.data_files import make_folder

COUNTS = (3, 1, 2, 4)
OFFSETS = offsets(COUNTS).numpy()


@pytest.mark.parametrize("size, cells", [(40, 5), (37, 5), (33, 5), (8, 1), (3, 1), (500, 63)])
def test_cells_lie_where_aligned_corners_put_them(size, cells):
    """Against resizing the padded pixel coordinates themselves."""
    padded = torch.arange(8.0 * cells)[None, None]
    at = F.interpolate(padded, cells, mode="linear", align_corners=True)[0, 0].numpy()
    found = cell_pixels(size, cells)
    assert all(abs(f - a) <= 0.5 if f >= 0 else round(a) >= size for f, a in zip(found, at, strict=True))
    distance = np.abs(np.arange(size)[:, None] - at)
    nearest = pixel_cells(size, cells)
    np.testing.assert_allclose(distance[np.arange(size), nearest], distance.min(1), atol=1e-4)


def scene(size=(37, 45), seed=0):
    """A label with small and large objects, void and an outline; its cells with random subclasses of their class."""
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, 3, (5, 6)), np.ones((8, 8)))[: size[0], : size[1]].astype(np.int16)
    label[10:12, 10:12] = 3  # no cell lies on it
    label[20] = -1
    cells = cell_classes(label, grid(size))
    draws = rng.integers(0, 1 << 20, cells.shape) % np.array(COUNTS)[cells.clip(0)]
    return label, cells, np.where(cells < 0, -1, OFFSETS[cells.clip(0)] + draws).astype(np.int16), rng


@pytest.mark.parametrize("seed", range(4))
def test_subclasses_never_contradict_the_class(seed):
    label, cells, subclasses, rng = scene(seed=seed)
    assert not (cells == 3).any() and (cells[-1] == -1).all()  # the last row of cells is padding
    features = rng.normal(size=(*cells.shape, 6)).astype(np.float16)
    centres = {c: rng.normal(size=(k, 6)).astype(np.float32) for c, k in enumerate(COUNTS) if k > 1}
    found = pixel_subclasses(label, cells, subclasses, OFFSETS, features, centres)
    assert found.dtype == np.uint8 and ((found == 255) == (label < 0)).all()
    assert (parents(COUNTS).numpy()[found[label >= 0]] == label[label >= 0]).all()
    blocky = blocky_subclasses(subclasses, label.shape)
    both = (blocky != 255) & (label >= 0)
    assert (parents(COUNTS).numpy()[blocky[both]] != label[both]).any()  # the release's form does


def test_pixels_take_the_nearest_cell_of_their_class():
    """Brute force over all cells; distances are those between cells."""
    label, cells, subclasses, rng = scene()
    centres = {c: rng.normal(size=(k, 6)).astype(np.float32) for c, k in enumerate(COUNTS) if k > 1}
    features = rng.normal(size=(*cells.shape, 6)).astype(np.float16)
    found = pixel_subclasses(label, cells, subclasses, OFFSETS, features, centres)
    rows, columns = (pixel_cells(n, m) for n, m in zip(label.shape, cells.shape, strict=True))
    for y, x in np.ndindex(*label.shape):
        c, cell = label[y, x], (rows[y], columns[x])
        if c == 3:
            distance = np.square(features[cell].astype(np.float64) - centres[3]).sum(1)
            assert found[y, x] == OFFSETS[3] + distance.argmin()
        elif c >= 0:
            own = np.argwhere(cells == c)
            distance = np.square(own - cell).sum(1)
            assert found[y, x] in {subclasses[tuple(at)] for at in own[distance == distance.min()]}


def test_release_form_is_two_nearest_resizes():
    label = np.arange(35, dtype=np.int16).reshape(5, 7) % 4
    assert (cell_classes(label, (3, 3), release=True) == label[np.ix_([0, 1, 3], [0, 2, 4])]).all()
    up = blocky_subclasses(np.array([[1, -1], [2, 3]], np.int16), (4, 4))
    assert up.tolist() == [[1, 1, 255, 255], [1, 1, 255, 255], [2, 2, 3, 3], [2, 2, 3, 3]]


@pytest.mark.parametrize("fit", [balanced, normal])
def test_clusters_of_chosen_rows(fit):
    """Three groups far apart, a fifth of the rows belonging to another class."""
    rng = np.random.default_rng(0)
    data = (rng.integers(0, 3, 600)[:, None] * 20 + rng.normal(size=(600, 4))).astype(np.float16)
    rows = np.flatnonzero(rng.random(600) < 0.8)
    for group in range(3):  # equally many of each group
        members = rows[np.rint(data[rows, 0] / 20) == group]
        rows = np.setdiff1d(rows, members[120:])
    cluster, centres = fit(data, rows, 3, 0, "cpu")
    assert np.allclose(np.sort(centres.mean(1)), [0, 20, 40], atol=1)
    assert (np.abs(data[rows] - centres[cluster]).max(1) < 8).all()
    again, _ = fit(data, rows, 3, 0, "cpu")
    assert (cluster == again).all()


# Features -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    source = replace(make_folder(tmp_path / "data", images=3, size=(37, 45)), labels=False)
    options = {"blocks": (1, 1, 1, 1), "width": 4, "channels": 8, "low_channels": 4}
    model = build_model(ModelConfig("deeplabv3plus", 5, "resnet50", options=options, align_corners=True)).eval()
    dataset = SegmentationDataset(source)
    return model, dataset, export(model, dataset, tmp_path / "features", torch.device("cpu"), 0, "here")


@torch.no_grad()
def test_features_are_the_maps_at_half_their_size(exported):
    model, dataset, features = exported
    assert features.rows.dtype == np.float16 and features.rows.shape == (3 * 5 * 6, 8)
    for i in range(3):
        x = torch.from_numpy(dataset.load(i)["image"]).permute(2, 0, 1)[None]
        maps = model(x)["features"]
        expected = F.interpolate(maps, scale_factor=0.5, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
        np.testing.assert_allclose(features.image(i), expected.half().numpy(), rtol=2e-3, atol=1e-3)


def test_features_of_another_list_or_torn_are_refused(exported, tmp_path):
    _, dataset, _ = exported
    folder = tmp_path / "features"
    with pytest.raises(ValueError, match="features of 3 images, not of the 2 of"):
        open_features(folder, dataset.names[:2])
    np.save(folder / "features.npy", np.zeros((5, 8), np.float16))
    with pytest.raises(ValueError, match=r"float16 \(5, 8\) for 90 cells; main.py --save_feature"):
        open_features(folder, dataset.names)
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match="no features there; main.py --save_feature"):
        open_features(folder, dataset.names)


def test_features_of_the_release_are_read(exported, tmp_path):
    _, dataset, features = exported
    folder = tmp_path / "official"
    folder.mkdir()
    assert not adopt(folder, dataset)
    for i, name in enumerate(dataset.names):
        np.save(folder / f"{name}.npy", features.image(i).transpose(2, 0, 1))
    assert adopt(folder, dataset)
    assert (open_features(folder, dataset.names).rows == features.rows).all()
    assert json.loads((folder / "index.json").read_text())["names"] == dataset.names


# Lists --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_lists_are_nested_and_show_every_class(seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(1, 5000, (200, 8)) * (rng.random((200, 8)) < [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0])
    ranking, needed = order(pixels, seed)
    assert sorted(ranking) == list(range(200)) and needed <= 8
    shown = (pixels[ranking[:needed]] > 0).any(0)
    assert (shown == (pixels > 0).any(0)).all()
    assert ranking == order(pixels, seed)[0] and ranking != order(pixels, seed + 10)[0]


def test_the_training_set_of_voc_without_a_list_of_it(tmp_path):
    """train_aug is every labelled image that is not in val."""
    make("voc", tmp_path, train=5, val=2, size=(32, 48), seed=0, domain="day")
    source = SourceConfig(dataset="voc", root=str(tmp_path), split="train_aug")
    listed = whole(source).names
    (tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train_aug.txt").unlink()
    assert whole(source).names == listed and len(listed) == 5


def test_flattened_paths_of_official_lists_are_found(tmp_path):
    make("cityscapes", tmp_path, train=3, val=1, size=(32, 64), seed=0, domain="day")
    name = SegmentationDataset(SourceConfig(dataset="cityscapes", root=str(tmp_path))).names[1]
    stem = name.removesuffix("_leftImg8bit")
    line = f"images/train/{name}.png segmentation/train/{stem}_gtFine_labelTrainIds.png"
    (tmp_path / "93_train_supervised.txt").write_text(line)  # some official files lack the final newline
    source = SourceConfig(dataset="cityscapes", root=str(tmp_path), list=str(tmp_path / "93_train_supervised.txt"))
    dataset = SegmentationDataset(source)
    assert dataset.names == [name] and dataset.load(0)["label"].shape == (32, 64)


def test_an_empty_class_is_named():
    with pytest.raises(ValueError, match="class 'bus' has no labelled pixel in the 7 labelled images"):
        check_classes(np.array([4, 0, 3]), ("road", "bus", "car"), 7, allow=False)
    check_classes(np.array([4, 0, 3]), ("road", "bus", "car"), 7, allow=True)
