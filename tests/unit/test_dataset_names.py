"""Names of files: what a list's line names, what our own tools write, and twins that only look alike."""

import codecs
import dataclasses
import sys
import unicodedata

import numpy as np
import pytest
import yaml

from common.config import SourceConfig
from common.data import SegmentationDataset
from common.data.catalogue.lists import listed, pick, read_list, write_list
from scripts import make_longtail, predict, prepare_splits
from tests.unit.data_files import classes, folder_options, picture, save

NFC = unicodedata.normalize("NFC", "Straße_über")
NFD = unicodedata.normalize("NFD", NFC)
ODD = (
    *("plain", "cam", "cam.v1.2", "cam.v1.2.jpg", "two words", "two  blanks", " led", 'quo"ted', "it's", '"whole"'),
    *("back\\slash", "tab\there", "new\nline", "ü" + NFC, NFD, "brace{name}", "a#b", "percent%20", "-dash", "comma,x"),
)


def make(root, names, suffix="png", label_suffix="png"):
    for k, name in enumerate(names):
        save(picture(12, 16, k), root / "images" / "train" / f"{name}.{suffix}")
        save(classes(12, 16, 5, k), root / "labels" / "train" / f"{name}.{label_suffix}")
    return SourceConfig(dataset="folder", root=str(root), folder=folder_options())


def with_list(source, *lines):
    path = f"{source.root}/list.txt"
    with open(path, "w", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
    return dataclasses.replace(source, list=path)


def names_of(source, *lines):
    return SegmentationDataset(with_list(source, *lines)).names


# What our own tools write ------------------------------------------------------------------------------------------


def test_a_written_list_names_the_same_images(tmp_path):
    source = make(tmp_path, ODD)
    dataset = SegmentationDataset(source)
    assert sorted(dataset.names) == sorted(ODD)
    for entries in ([listed(record.image) for record in dataset.records], [r.image.name for r in dataset.records]):
        write_list(tmp_path / "list.txt", entries)
        again = SegmentationDataset(dataclasses.replace(source, list=str(tmp_path / "list.txt")))
        assert again.records == dataset.records

    for record in dataset.records:  # each alone: no other image stands in for a missing one
        write_list(tmp_path / "list.txt", [listed(record.image)])
        others = [r.image for r in dataset.records if r != record]
        with pytest.raises(ValueError, match="no image named"):
            pick(others, read_list(tmp_path / "list.txt"), tmp_path)


def config(tmp_path, source, **lists):
    tree = {
        "model": {"name": "upernet", "num_classes": 5},
        "data": {
            "dataset": "folder",
            "root": source.root,
            "folder": dict(source.folder),
            "streams": {
                name: {"list": path and str(path), "labels": name == "labeled"} for name, path in lists.items()
            },
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def test_tools_write_lists_that_can_be_read(tmp_path, monkeypatch, capsys):
    source = make(tmp_path / "set", ODD)
    lists = {"labeled": tmp_path / "8_labelled.txt", "unlabeled": tmp_path / "rest.txt"}
    path = config(tmp_path, source, **lists)
    monkeypatch.setattr(sys, "argv", ["prepare_splits", path, f"output={tmp_path}", "data.workers=0"])
    prepare_splits.main()
    parts = [SegmentationDataset(dataclasses.replace(source, list=str(file))).names for file in lists.values()]
    assert len(parts[0]) == 8 and sorted(parts[0] + parts[1]) == sorted(ODD)

    lists["unlabeled"].unlink()  # made again from the labelled list that is there
    prepare_splits.main()
    assert SegmentationDataset(dataclasses.replace(source, list=str(lists["unlabeled"]))).names == parts[1]

    out = tmp_path / "long tail.txt"
    words = ["--config", config(tmp_path, source, labeled=None), "--images", "12", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["make_longtail", *words, "--out", str(out)])
    make_longtail.main()
    kept = SegmentationDataset(dataclasses.replace(source, list=str(out))).names
    assert len(kept) == 12 and set(kept) <= set(ODD)


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    with pytest.raises(ValueError, match="list.txt: 'caf'… begins a file name that is not UTF-8"):
        write_list(tmp_path / "list.txt", [b"caf\xe9".decode("utf-8", "surrogateescape")])
    assert not list(tmp_path.iterdir())


# What a line names -------------------------------------------------------------------------------------------------


def test_exact_names_win(tmp_path):
    source = make(tmp_path, ("cam", "cam.v1", "cam.v1.2", "my image", "my"))
    assert names_of(source, "cam.v1.2.png", "cam.v1", "cam", "cam.v1.jpg") == ["cam.v1.2", "cam.v1", "cam", "cam.v1"]
    assert names_of(source, "my image", "my image.png", "my", "my.png masks/my.png") == ["my image"] * 2 + ["my"] * 2
    assert names_of(source, "/there/my image.png", "/there/my.png") == ["my image", "my"]
    unknown = ("cam.v2", "cam.v1.2.3", "cam.v1.2.jpg.gz", "my picture", "my picture.png", "/there/my picture.png")
    for line in (*unknown, "a my/x.png b/my.png"):
        with pytest.raises(ValueError, match=r"no image named .* \(1 of 1 listed are missing\)"):
            names_of(source, line)


def test_paths_and_pairs(tmp_path):
    source = make(tmp_path, ("a", "b"))
    lines = ("images/train/a.png labels/train/b.png", "/abs/b", "images\\train\\a.png", "x/a\ty/a", "b.jpg 1")
    assert names_of(source, *lines) == ["a", "b", "a", "a", "b"]
    assert names_of(source, '"a" and more', '"b.png"') == ["a", "b"]


def test_one_stem_of_two_images(tmp_path):
    source = make(tmp_path, ("x", "y"))
    save(picture(12, 16), tmp_path / "images" / "train" / "x.jpg")
    with pytest.raises(ValueError, match=r"images/train: 'x.jpg' and 'x.png' have one stem; rename one, or choose"):
        SegmentationDataset(source)
    with pytest.raises(ValueError, match=r"the list's 'x' names both 'x.jpg' and 'x.png'; write the file name"):
        names_of(source, "y", "x")
    with pytest.raises(ValueError, match="have one stem"):
        names_of(source, "x.png", "x.jpg")
    chosen = SegmentationDataset(with_list(source, "y", "x.jpg"))
    assert [record.image.name for record in chosen.records] == ["y.png", "x.jpg"]
    only = dataclasses.replace(source, folder={**folder_options(), "image_end": ".png"})
    assert [record.image.name for record in SegmentationDataset(only).records] == ["x.png", "y.png"]


def test_one_stem_of_two_labels(tmp_path):
    source = make(tmp_path, ("x", "y"))
    save(classes(12, 16, 5), tmp_path / "labels" / "train" / "x.tif")
    with pytest.raises(ValueError, match=r"labels/train/x.png: .*x.tif has the same stem; remove .*label_end"):
        SegmentationDataset(source)
    assert len(SegmentationDataset(with_list(source, "y"))) == 1
    ended = dataclasses.replace(source, folder={**folder_options(), "label_end": ".png"})
    assert SegmentationDataset(ended).records[0].label.name == "x.png"


def test_one_stem_in_two_cities(tmp_path):
    for city in ("aachen", "bremen"):
        save(picture(8, 16), tmp_path / "leftImg8bit" / "train" / city / "a_leftImg8bit.png")
    source = SourceConfig(dataset="cityscapes", root=str(tmp_path), labels=False)
    with pytest.raises(ValueError, match=r"aachen/a_leftImg8bit.png and bremen/a_leftImg8bit.png have one stem"):
        SegmentationDataset(source)


def test_images_and_labels_in_one_folder(tmp_path):
    options = {**folder_options(), "images": "data", "labels": "./data"}
    source = SourceConfig(dataset="folder", root=str(tmp_path), folder=options)
    for k in range(3):
        save(picture(12, 16, k), tmp_path / "data" / f"x{k}.jpg")
        save(classes(12, 16, 5, k), tmp_path / "data" / f"x{k}.png")
    with pytest.raises(
        ValueError, match="images and labels are one folder, 'data'; tell their files apart by image_end"
    ):
        SegmentationDataset(source)

    ended = dataclasses.replace(source, folder={**options, "image_end": ".jpg", "label_end": ".png"})
    dataset = SegmentationDataset(ended)
    assert dataset.names == ["x0", "x1", "x2"] and np.array_equal(dataset.label(1), classes(12, 16, 5, 1))

    for k in range(3):
        (tmp_path / "data" / f"x{k}.png").rename(tmp_path / "data" / f"x{k}_mask.png")
    dataset = SegmentationDataset(dataclasses.replace(source, folder={**options, "label_end": "_mask"}))
    assert dataset.names == ["x0", "x1", "x2"] and np.array_equal(dataset.label(2), classes(12, 16, 5, 2))


@pytest.mark.parametrize("image, label, line", [(NFC, NFD, NFC), (NFD, NFC, NFC), (NFC, NFC, NFD), (NFD, NFD, NFC)])
def test_unicode_forms_pair(tmp_path, image, label, line):
    source = make(tmp_path, ("other",))
    save(picture(12, 16), tmp_path / "images" / "train" / f"{image}.png")
    save(classes(12, 16, 5, 7), tmp_path / "labels" / "train" / f"{label}.png")
    dataset = SegmentationDataset(with_list(source, line))
    assert dataset.names == [image] and np.array_equal(dataset.label(0), classes(12, 16, 5, 7))


# Files that are none -----------------------------------------------------------------------------------------------


def test_files_of_macos_are_no_images(tmp_path):
    source = make(tmp_path, ("a", "b"))
    for folder in ("images", "labels"):
        (tmp_path / folder / "train" / "._a.png").write_bytes(b"\0\5\26\7")
    assert SegmentationDataset(source).names == ["a", "b"]
    assert list(predict.images([str(tmp_path / "images")], tmp_path / "out")) == ["train/a", "train/b"]


# Encodings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark, encoding", [
    (b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
])  # fmt: skip
def test_lists_in_other_encodings(tmp_path, mark, encoding, end):
    path = tmp_path / "list.txt"
    path.write_bytes(mark + end.join(("a.png", "", NFC, "")).encode(encoding))
    assert read_list(path) == ["a.png", NFC]


@pytest.mark.parametrize("encoding, reason", [
    ("latin-1", r"is not utf-8 \(byte 4\); save it as UTF-8"), ("utf-16-le", "holds zero bytes"),
])  # fmt: skip
def test_an_unknown_encoding_is_named(tmp_path, encoding, reason):
    path = tmp_path / "list.txt"
    path.write_bytes(("Stra\u00dfe\n" if encoding == "latin-1" else "a\n").encode(encoding))
    with pytest.raises(ValueError, match=rf"list.txt: the list of images {reason}"):
        read_list(path)
