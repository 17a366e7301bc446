"""Copy-Paste against a brute-force form on lists of class masks."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import DataConfig, SourceConfig, StreamConfig
from common.data import IGNORE, SegmentationDataset, Stream, build_transform, make_streams
from common.data.recipes.copy_paste import choose_random, choose_rare, classes_of, paste
from tests.unit.data_files import classes, folder_options, make_folder, picture, save

CROP = {"recipe": "detectron2", "crop": [32, 40], "short_edges": [32, 48], "max_size": 200}


def rng(seed=0):
    return np.random.default_rng(seed)


def sample(seed, count=6):
    label = torch.from_numpy(classes(32, 40, count, seed).astype(np.int16))
    label[:, 30:] = IGNORE
    return {
        "image": torch.from_numpy(picture(32, 40, seed)).permute(2, 0, 1).contiguous(),
        "label": label,
        "name": f"im{seed}",
        "geometry": torch.full((7,), seed, dtype=torch.int32),
    }


def masks_of(label):
    return {int(k): label == k for k in label.unique() if k != IGNORE}


def pasted_by_masks(target, source, chosen):
    """Each mask in turn: off every mask of the target, into the class's own or a new one; empty masks are dropped."""
    image, label = target["image"].clone(), target["label"].clone()
    masks, given = masks_of(target["label"]), masks_of(source["label"])
    union = torch.zeros_like(label, dtype=torch.bool)
    for k in chosen:
        masks = {c: mask & ~given[k] for c, mask in masks.items()}
        masks[k] = masks.get(k, torch.zeros_like(union)) | given[k]
        label[given[k]] = k
        union |= given[k]
    image[:, union] = source["image"][:, union]
    return image, label, {c: mask for c, mask in masks.items() if mask.any()}


@pytest.mark.parametrize("seed", range(8))
def test_pasting_equals_the_mask_by_mask_form(seed):
    target, source = sample(seed), sample(seed + 100)
    source["label"][:, 30:] = IGNORE if seed % 2 else 3
    chosen = choose_random(classes_of(source["label"]), 100, rng(seed))
    image, label, masks = pasted_by_masks(target, source, chosen)
    ours = paste(target, source, chosen)
    assert torch.equal(ours["image"], image) and torch.equal(ours["label"], label)
    ours_masks = masks_of(ours["label"])
    assert ours_masks.keys() == masks.keys() and all(torch.equal(ours_masks[k], masks[k]) for k in masks)
    assert ours["name"] == target["name"] and torch.equal(ours["geometry"], target["geometry"])
    assert ours["label"].dtype == torch.int16 and ours["image"].dtype == torch.uint8


def test_what_has_no_class_is_never_copied_and_may_be_covered():
    target, source = sample(0), sample(1)
    target["label"][:] = IGNORE
    ours = paste(target, source, classes_of(source["label"]))
    assert torch.equal(ours["label"], source["label"])
    assert torch.equal(ours["image"][:, :, 30:], target["image"][:, :, 30:])
    assert torch.equal(ours["image"][:, :, :30], source["image"][:, :, :30])


def test_further_maps_follow_and_inputs_stay():
    target, source = sample(0), sample(1)
    for item in (target, source):
        item["soft"] = item["label"].float().repeat(2, 1, 1)
        item["small"] = item["label"][::4, ::4]
    before = {key: value.clone() for key, value in target.items() if key != "name"}
    ours = paste(target, source, [2, 4])
    assert torch.equal(ours["soft"], ours["label"].float().repeat(2, 1, 1))
    assert torch.equal(ours["small"], target["small"])
    assert all(torch.equal(target[key], value) for key, value in before.items())
    assert paste(target, source, []) == target


def test_random_choice_is_uniform_and_never_all():
    present = [3, 5, 8, 200]
    drawn = [choose_random(present, 100, rng(k)) for k in range(4000)]
    sizes = np.bincount([len(d) for d in drawn], minlength=5)
    assert sizes[4] == 0 and np.abs(sizes[:4] / 4000 - 0.25).max() < 0.03
    assert all(len(set(d)) == len(d) and set(d) <= set(present) for d in drawn)
    hits = np.array([sum(k in d for d in drawn) for k in present]) / 4000
    assert np.abs(hits - 1.5 / 4).max() < 0.03
    assert {len(choose_random(present, 3, rng(k))) for k in range(60)} == {0, 1, 2}
    assert choose_random([], 100, rng()) == choose_random([7], 100, rng()) == []


def test_rare_choice():
    assert choose_rare([1, 4, 6], (6, 2, 1)) == [1, 6]
    assert classes_of(torch.tensor([[-1, 255], [846, 255]], dtype=torch.int16)) == [255, 846]
    assert classes_of(torch.full((2, 2), IGNORE, dtype=torch.int16)) == []


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("set"), images=5)


def dataset(source, **options):
    return SegmentationDataset(source, build_transform({**CROP, **options}))


def test_target_is_the_same_with_and_without_and_the_source_is_another_augmented_image(source):
    """Label and image agree after the paste: wherever the target's label was replaced, the pixels are the source's."""
    plain, mixed = dataset(source, colour=False), dataset(source, colour=False, copy_paste="random")
    pastes, alone = 0, 0
    for k in range(40):
        before, after = plain.sample(k % 5, rng(k)), mixed.sample(k % 5, rng(k))
        changed = (before["image"] != after["image"]).any(0)
        pastes += bool(changed.any())
        alone += torch.equal(before["label"], after["label"])
        assert torch.equal(before["geometry"], after["geometry"]) and before["name"] == after["name"]
        new = (before["label"] != after["label"]) & (after["label"] != IGNORE)
        assert torch.equal(new, before["label"] != after["label"])  # nothing loses its class
    assert pastes > 20 and alone >= 3  # n = 0 has probability 1/5 where all five classes show


def test_a_draw_decides_everything(source):
    streams = [Stream("labeled", dataset(source, copy_paste="random"), 2, seed=3) for _ in range(2)]
    for draw in (0, 7, 4, 7):
        first, again = streams[0].sample(draw, 1), streams[1].sample(draw, 1)
        assert all(torch.equal(first[key], again[key]) for key in ("image", "label"))
    assert not torch.equal(streams[0].sample(0, 1)["image"], streams[0].sample(1, 1)["image"])


def test_sources_are_drawn_uniformly_from_the_whole_set(tmp_path):
    """Image k is all of class k but for one strip, so that pasted classes tell their source."""
    for k in range(4):
        label = np.full((48, 64), 4, np.uint8)
        label[:24] = k
        save(picture(48, 64, k), tmp_path / "images/train" / f"im{k}.png")
        save(label, tmp_path / "labels/train" / f"im{k}.png")
    mixed = dataset(
        SourceConfig(dataset="folder", root=str(tmp_path), folder=folder_options()),
        copy_paste="rare",
        rare_classes=[0, 1, 2, 3],
        short_edges=[32],
    )
    seen = [set(mixed.sample(0, rng(k))["label"].unique().tolist()) for k in range(400)]
    counts = np.array([sum(k in classes for classes in seen) for k in (1, 2, 3)])
    assert np.abs(counts / 400 - 0.25).max() < 0.07


def stream(source, cache=None, **augment):
    """The stream of a config with this source."""
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    config = StreamConfig(**fields, augment={**CROP, **augment})
    return make_streams(DataConfig(streams={"labeled": config}, workers=0), 0, cache)["labeled"]


def test_rare_classes_come_from_the_row(source, monkeypatch):
    rows = {"image": ("frequent",) * 4 + ("rare",), "pixel": ("rare",) * 5}
    with_groups = dataclasses.replace(dataset(source).row, groups=rows)
    monkeypatch.setattr("common.data.dataset.resolve", lambda source: (with_groups, Path(source.root)))
    monkeypatch.setattr("common.data.recipes.detectron2.class_statistics", None)  # nothing is counted
    mixed, listed = stream(source, copy_paste="rare"), dataset(source, copy_paste="rare", rare_classes=[4])
    for k in range(10):
        assert torch.equal(mixed.dataset.sample(k % 5, rng(k))["image"], listed.sample(k % 5, rng(k))["image"])
    assert stream(source, copy_paste="rare", rare_classes=[1, 2]).dataset.transform.rare_classes == (1, 2)


def test_rare_classes_of_a_set_without_groups_are_those_by_its_own_counts(tmp_path):
    """Of ten classes the two with the fewest images are rare; one of these is shown by none."""
    shown = (5, 0, 2, 3, 1, 2, 4, 5, 4, 3)  # images per class
    for k in range(5):
        label = np.repeat([c for c in range(10) if k < shown[c]], 3)[None].repeat(32, 0).astype(np.uint8)
        save(picture(*label.shape, k), tmp_path / "images/train" / f"im{k}.png")
        save(label, tmp_path / "labels/train" / f"im{k}.png")
    made = SourceConfig(dataset="folder", root=str(tmp_path), folder=folder_options(10))
    mixed = stream(made, tmp_path / "cache", copy_paste="rare")
    assert mixed.dataset.transform.rare_classes == (4,)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the counts are kept
    listed = dataset(made, copy_paste="rare", rare_classes=[4])
    for k in range(10):
        assert torch.equal(mixed.dataset.sample(k % 5, rng(k))["label"], listed.sample(k % 5, rng(k))["label"])


@pytest.mark.parametrize(
    ("changes", "augment", "message"),
    [
        (
            {"labels": False},
            {"copy_paste": "random"},
            "copy_paste 'random' needs labels.*`labels: false`; set copy_paste",
        ),
        ({"labels": False}, {"copy_paste": "rare"}, "copy_paste 'rare' needs labels.*`labels: false`; set copy_paste"),
        ({}, {"copy_paste": "rare", "rare_classes": [1, 5]}, "rare_classes: 5 is none of the 5 classes of .*'folder'"),
        ({}, {"copy_paste": "rare"}, "copy_paste 'rare': no class that .*'folder' shows is rare .*; give rare_classes"),
    ],
)
def test_what_cannot_be_pasted_is_said_before_any_sample(source, changes, augment, message, tmp_path):
    """The last set's five classes are shown by the same number of images."""
    for path in (Path(source.root) / "labels" / "train").iterdir():
        save(np.arange(48 * 64).reshape(48, 64).astype(np.uint8) % 5, tmp_path / "labels" / "train" / path.name)
        save(picture(48, 64), tmp_path / "images" / "train" / path.name)
    even = dataclasses.replace(source, root=str(tmp_path), **changes)
    with pytest.raises(ValueError, match=message) as error:
        stream(even, **augment)
    assert "\n" not in str(error.value)
