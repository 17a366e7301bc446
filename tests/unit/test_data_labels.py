"""Label files: stored values, tables, and the errors a user meets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data import DATASETS, IGNORE
from common.data.labels import LabelTable, colour_codes, read_index
from tests.unit.data_files import classes, save, save_palette, save_rgb16


def test_palette_files_give_indices(tmp_path):
    label = classes(20, 30, 11)
    assert np.array_equal(read_index(save_palette(label, tmp_path / "a.png")), label)


def test_few_bits_are_not_stretched(tmp_path):
    label = classes(10, 16, 2)
    Image.fromarray(label * 255).convert("1").save(tmp_path / "one.png")
    assert np.array_equal(read_index(tmp_path / "one.png"), label)


def test_sixteen_bits(tmp_path):
    label = classes(20, 30, 200).astype(np.uint16) + 700
    assert np.array_equal(read_index(save(label, tmp_path / "a.png")), label)
    assert np.array_equal(read_index(save(label, tmp_path / "a.tif")), label)


def test_first_of_three_channels(tmp_path):
    label = classes(20, 30, 22)
    eight = np.stack((label, label + 100, label * 0), axis=2)
    assert np.array_equal(read_index(save(eight, tmp_path / "a.png")), label)
    assert np.array_equal(read_index(save_rgb16(eight.astype(np.uint16), tmp_path / "b.png")), label)


def test_table_against_a_loop():
    mapping = {7: 0, 9: 1, 300: 2, 20: IGNORE}
    raw = np.random.default_rng(0).choice([7, 9, 300, 20, 65535], (40, 50)).astype(np.uint16)
    label = LabelTable(3, mapping, ignore=[65535]).decode(raw, Path("x"))
    assert label.dtype == np.int16
    expected = [[mapping.get(int(v), IGNORE) for v in row] for row in raw]
    assert np.array_equal(label, expected)


def test_colour_coded_labels(tmp_path):
    palette = ((128, 64, 128), (0, 0, 142), (70, 70, 70))
    label = classes(20, 30, 3)
    rgb = np.array(palette, np.uint8)[label]
    rgb[0, 0] = (1, 2, 3)
    mapping = {code: k for k, code in enumerate(colour_codes(palette))}
    path = save(rgb, tmp_path / "a.png")
    read = LabelTable(3, mapping, ignore=colour_codes([(1, 2, 3)]), encoding="rgb").read(path)
    assert read[0, 0] == IGNORE and np.array_equal(read[1:], label[1:])
    message = r"a\.png: label colour \(1, 2, 3\) is none of the 3 classes; .*`palette` or `ignore_colours`"
    with pytest.raises(ValueError, match=message):
        LabelTable(3, mapping, encoding="rgb").read(path)


def test_a_value_outside_the_classes_is_named(tmp_path):
    label = classes(20, 30, 4)
    label[3, 4] = 77
    path = save(label, tmp_path / "bad.png")
    table = LabelTable(4, {k: k for k in range(4)}, ignore=[255])
    with pytest.raises(ValueError, match=r"bad\.png: label value 77 is none of the 4 classes.*ignore") as error:
        table.read(path)
    assert "\n" not in str(error.value)
    ignoring = LabelTable(4, {k: k for k in range(4)}, ignore=[255], unlisted="ignore")
    assert ignoring.read(path)[3, 4] == IGNORE


def test_a_truncated_label_is_named(tmp_path):
    path = save(np.random.default_rng(0).integers(0, 4, (64, 64), dtype=np.uint8), tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.png: cannot decode the label"):
        read_index(path)
    with pytest.raises(ValueError, match=r"none\.png: no such file"):
        read_index(tmp_path / "none.png")


def test_a_map_to_a_missing_class_is_refused():
    with pytest.raises(ValueError, match="value 9 to class 4"):
        LabelTable(4, {9: 4})


def test_cityscapes_raw_ids():
    """7, 8, 11, 12, 13, 17, 19–28, 31, 32, 33 are train ids 0–18 in that order; all else is void."""
    listed = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    raw = np.array([[*range(35), 255]], np.uint8)
    label = DATASETS["cityscapes"].label_table(Path("a_gtFine_labelIds.png")).decode(raw, Path("x"))
    assert label[0].tolist() == [listed.index(v) if v in listed else IGNORE for v in [*range(35), 255]]
    train = np.array([[*range(19), 255]], np.uint8)
    table = DATASETS["cityscapes"].label_table(Path("a_gtFine_labelTrainIds.png"))
    assert table.decode(train, Path("x"))[0].tolist() == [*range(19), IGNORE]


# raw id of SYNTHIA, raw id of Cityscapes, class of 16, class of 13
SHARED = {
    "road": (3, 7, 0, 0),
    "sidewalk": (4, 8, 1, 1),
    "building": (2, 11, 2, 2),
    "wall": (21, 12, 3, None),
    "fence": (5, 13, 4, None),
    "pole": (7, 17, 5, None),
    "traffic light": (15, 19, 6, 3),
    "traffic sign": (9, 20, 7, 4),
    "vegetation": (6, 21, 8, 5),
    "sky": (1, 23, 9, 6),
    "person": (10, 24, 10, 7),
    "rider": (17, 25, 11, 8),
    "car": (8, 26, 12, 9),
    "bus": (19, 28, 13, 10),
    "motorcycle": (12, 32, 14, 11),
    "bicycle": (11, 33, 15, 12),
}


@pytest.mark.parametrize("name", SHARED)
def test_synthia_and_cityscapes_share_their_classes(name):
    synthia, cityscapes, of16, of13 = SHARED[name]
    for suffix, expected in (("16", of16), ("13", of13)):
        target = DATASETS["cityscapes" + suffix]
        source = DATASETS["synthia" if suffix == "16" else "synthia13"]
        assert target.classes == source.classes
        a = source.label_table(Path("x.png")).decode(np.array([[synthia]], np.uint16), Path("x"))
        b = target.label_table(Path("x_labelIds.png")).decode(np.array([[cityscapes]], np.uint8), Path("x"))
        assert a.item() == b.item() == (IGNORE if expected is None else expected)
        assert expected is None or target.classes[expected] == name


def test_synthia_ignores_what_has_no_class():
    label = DATASETS["synthia"].label_table(Path("x.png")).decode(np.array([[0, 13, 14, 22, 16]], np.uint16), Path())
    assert label.tolist() == [[IGNORE] * 5]


def test_rows_are_consistent():
    for name, row in DATASETS.items():
        assert name == row.name and len(row.palette) == row.num_classes == len(set(row.classes))
        assert all(0 <= k < row.num_classes for k in row.tail)
        assert row.counts is None or len(row.counts) == row.num_classes


def test_cityscapes_counts_fill_the_training_set():
    counts = DATASETS["cityscapes"].counts
    assert sum(counts) + 715_747_311 == 2975 * 2048 * 1024
    assert set(DATASETS["cityscapes"].tail) == set(np.argsort(counts)[:9].tolist())
