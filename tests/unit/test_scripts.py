"""The programs under scripts/: what they write, and that bad input ends in one line and exit code 2."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.config import SourceConfig, load_config
from common.data import DATASETS, SegmentationDataset, make_streams
from common.data.labels import read_index
from common.models import build_model
from fully_sup import test as fully_sup_test
from scripts import (
    benchmark,
    browse,
    class_stats,
    collect,
    convert_checkpoint,
    doctor,
    export,
    make_longtail,
    report,
    shrink_dataset,
)
from tests.unit.data_files import classes, picture, save, save_rgb16

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("unchanged")


# class_stats ------------------------------------------------------------------------------------------------------


def factory(root: Path) -> Path:
    """The worked example of docs/datasets.md on disk; returns its config."""
    text = (ROOT / "docs" / "datasets.md").read_text()
    example = re.search(r"```yaml\n# factory.yaml\n(.*?)```", text, re.S)[1]
    path = root / "factory.yaml"
    path.write_text(example.replace("/data/factory", str(root)))
    values = np.array([0, 1, 7, 8, 99], np.uint8)
    for split, count in (("train", 3), ("val", 1)):
        for k in range(count):
            save(picture(40, 60, k), root / "pictures" / split / f"belt-{k:04d}.jpg")
            save(values[classes(40, 60, 5, k)], root / "masks" / split / f"belt-{k:04d}_mask.png")
    return path


def test_class_stats_of_the_documented_example(tmp_path, call):
    config, out = factory(tmp_path), tmp_path / "stats.json"
    printed = call(class_stats.main, "--config", config, "--json", out, "--workers", 0)
    result = json.loads(out.read_text())
    stored = np.concatenate([classes(40, 60, 5, k).ravel() for k in range(3)])
    counts = np.bincount(stored, minlength=5)
    assert [item["pixels"] for item in result["classes"]] == counts[:4].tolist()
    assert result["ignored_pixels"] == counts[4] and result["images"] == 3
    rarity = np.log(counts[:4].sum() / counts[:4])
    assert [item["blv_weight"] for item in result["classes"]] == pytest.approx(rarity / rarity.max())
    assert [item["tail"] for item in result["classes"]] == [False, False, True, True]
    area = np.sort(counts[:4])
    apart = sum(abs(a - b) for a in area for b in area) / (2 * 4 * area.sum())  # the mean difference form of Gini
    assert result["gini"]["pixel"] == pytest.approx(apart) and result["gini"]["image"] == pytest.approx(0)
    assert "scratch *" in printed and f"{100 * counts[2] / counts[:4].sum():.3f}" in printed


def test_class_stats_of_a_row(scenes, call, fails, config):
    printed = call(class_stats.main, "cityscapes", "--root", scenes, "--split", "val", "--workers", 0)
    assert printed.startswith("cityscapes val: 2 images") and "traffic light *" in printed
    assert "unknown; known:" in fails(class_stats.main, "citscapes")
    assert "name one data set" in fails(class_stats.main, "cityscapes", "--config", config)
    assert "no 'target'; streams: labeled" in fails(class_stats.main, "--config", config, "--stream", "target")


def test_documented_example_trains_on_what_it_says(tmp_path):
    cfg = load_config(factory(tmp_path))
    label = SegmentationDataset(cfg.data.streams["labeled"]).load(0)["label"]
    stored = classes(40, 60, 5, 0).astype(int)
    assert np.array_equal(label, np.where(stored == 4, -1, stored))
    assert len(SegmentationDataset(cfg.data.val)) == 1


# convert_checkpoint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, words",
    [
        (class_stats, ("camvid", "--json")),
        (make_longtail, ("camvid", "--images", "2", "--out")),
        (export, ("config", "weights", "--size", "32x64", "--out")),
        (benchmark, ("metrics", "--quick", "--out")),
        (fully_sup_test, ("config", "weights", "--json")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_tool_writes_over_a_file(program, words, config, weights, tmp_path, fails):
    file = tmp_path / "precious.pt2"
    file.write_text("precious")
    given = {"config": config, "weights": weights}
    line = fails(program.main, *[given.get(word, word) for word in words], file)
    assert "precious.pt2: there already; write elsewhere" in line and file.read_text() == "precious"


def test_predictions_are_not_written_over_labels(config, weights, tmp_path, fails):
    folder = tmp_path / "predictions"
    names = SegmentationDataset(load_config(config).data.val).names
    save(picture(8, 8), folder / f"{names[0]}.png")
    line = fails(fully_sup_test.main, config, weights, "--save-predictions", folder)
    assert f"{names[0]}.png: there already; write elsewhere" in line


@pytest.mark.parametrize("program", [report, browse])
def test_pages_end_in_html(program, config, tmp_path, fails):
    assert "x.json: the name has to end in .html" in fails(program.main, config, "--out", tmp_path / "x.json")


def test_convert_an_official_file(tmp_path, call, fails):
    config = ROOT / "uda" / "configs" / "toy" / "warm_up.yaml"
    model, prototypes = build_model(load_config(config).model), torch.randn(19, 48)
    state = {"model_state": model.state_dict(), "prototypes_ema": prototypes}
    torch.save({"ResNet101": state, "iter": 7}, tmp_path / "official.pkl")
    out = tmp_path / "converted.safetensors"
    words = (config, tmp_path / "official.pkl", "--out", out)
    call(convert_checkpoint.main, *words, "--prototypes", tmp_path / "prototypes.pt")
    written = load_file(out)
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in written.items())
    assert torch.equal(torch.load(tmp_path / "prototypes.pt", weights_only=True), prototypes)
    assert "does not fit" in fails(convert_checkpoint.main, *words, "model.options.width=16", "--force")
    assert "end in .safetensors" in fails(convert_checkpoint.main, *words[:2], "--out", tmp_path / "x.pth")
    before = out.read_bytes()
    assert "there already; write elsewhere" in fails(convert_checkpoint.main, config, out, "--out", out)
    again = (config, out, "--out", tmp_path / "again.safetensors", "--prototypes")
    assert "there already" in fails(convert_checkpoint.main, *again, tmp_path / "prototypes.pt")
    assert "holds no prototypes" in fails(convert_checkpoint.main, *again, tmp_path / "p.pt")
    assert out.read_bytes() == before


# browse, doctor ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The pictures of a page, and whatever it would load from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.pictures, self.outside = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ("src", "href"):
                found = re.match(r"data:image/jpeg;base64,(.*)", value)
                self.pictures.append(base64.b64decode(found[1])) if found else self.outside.append(value)


def test_browse_shows_training_samples(config, tmp_path, call, fails):
    out = tmp_path / "page" / "samples.html"
    call(browse.main, config, "--count", 2, "--out", out)
    text = out.read_text()
    page = Page(text)
    assert len(page.pictures) == 4 and not page.outside  # image and label of two samples
    for data in page.pictures:
        with Image.open(io.BytesIO(data)) as shown:
            assert shown.width / shown.height == 2
    assert text.count("<figcaption>label") == 2 and "draw 1: " in text and "vegetation" in text
    assert "streams: labeled" in fails(browse.main, config, "--stream", "target")
    assert "--count" in fails(browse.main, config, "--count", 0)


def test_browse_shows_what_a_sampler_makes_of_rare_classes(config, tmp_path, call, fails):
    """Only draws that show a pole or a sign, of an epoch; how often by the sampler, against a count of many draws."""
    out, names = tmp_path / "samples.html", "traffic sign,truck"
    sampler = "data.streams.labeled.sampler={order: repeat_factor, level: image, threshold: 0.9}"
    call(browse.main, config, sampler, "--classes", names, "--count", 9, "--out", out)
    text = out.read_text()

    cfg = load_config(config, [sampler])
    stream = make_streams(cfg.data, cfg.seed, tmp_path / ".cache")["labeled"]
    classes = stream.dataset.row.classes
    ids = torch.tensor([classes.index(name) for name in names.split(",")])
    shown = [np.isin(stream.dataset.open(i)["label"], ids).any() for i in range(len(stream.dataset))]
    draws = [stream.order.index(draw) for draw in range(3000)]
    share = 100 * np.mean([shown[index] for index in draws])
    said = re.search(r"traffic sign or truck: in (\d+) of 3 images \(.*?\); ([\d.]+)% of all draws", text)
    assert int(said[1]) == sum(shown) and float(said[2]) == pytest.approx(share, abs=3)

    expected = [draw for draw in range(3) if torch.isin(stream.sample(draw)["label"].long(), ids).any()]
    assert [int(draw) for draw in re.findall(r"draw (\d+): ", text)] == expected
    assert text.count("; image drawn ") == len(expected)
    assert "did you mean 'traffic sign'" in fails(browse.main, config, "--classes", "trafic sign")


def test_browse_names_a_missing_data_set(config, fails):
    assert "/none" in fails(browse.main, config, "data.root=/none")


def test_doctor_has_a_line_for_everything(scenes, tmp_path, call, monkeypatch):
    monkeypatch.setenv("LTS_DATA", str(scenes.parent))
    lines = call(doctor.main, "--output", tmp_path / "runs").splitlines()
    text = {line.split("  ")[0]: line for line in lines}
    assert {"python", "torch", "compiler", "triton", "cpu"} <= text.keys()
    assert "3 training images, 3 with labels" in text["data cityscapes"] and "missing" in text["data voc"]
    assert {f"data {row.folder}" for row in DATASETS.values()} <= text.keys()
    assert "writable" in lines[-1] and not (tmp_path / "runs").exists()
    assert "NOT WRITABLE" in call(doctor.main, "--output", "/proc/none").splitlines()[-1]


# collect ------------------------------------------------------------------------------------------------------------


def test_collect_tabulates_seeds(tmp_path, call, fails):
    def run(name: str, miou: float, rare: float) -> Path:
        (tmp_path / name).mkdir()
        result = {"miou": miou, "miou_tail": rare, "confusion": [], "per_class": [{"name": "pole", "iou": rare}]}
        result["groups"] = {level: {"rare": rare, "common": None, "frequent": miou} for level in ("image", "pixel")}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(result))
        (tmp_path / name / "run.json").write_text(json.dumps({"seed": 0}))
        return tmp_path / name

    runs = run("a0", 0.5, 0.1), run("a1", 0.54, 0.2), run("b0", 0.6, 0.05), run("b1", 0.6, 0.05)
    words = f"base={runs[0]},{runs[1]}", f"new={runs[2]},{runs[3]}", "--out", tmp_path / "table"
    printed = call(collect.main, *words)
    assert "| base | 52.0 ± 2.0 | 15.0 ± 5.0 | 15.0 ± 5.0 |" in printed
    assert "| new | 60.0 ± 0.0 (+8.0) | 5.0 ± 0.0 (-10.0) | 5.0 ± 0.0 (-10.0) |" in printed
    assert json.loads((tmp_path / "table.json").read_text())["new"][1]["run"] == "b1"
    assert "table.json: there already" in fails(collect.main, *words, "--groups")
    assert "| image rare | image common |" in (grouped := call(collect.main, *words, "--groups", "--force"))
    assert "| 5.0 ± 0.0 (-10.0) | – | 60.0 ± 0.0 (+8.0) |" in grouped
    assert "has the run ended?" in fails(collect.main, f"a={tmp_path}", "--out", tmp_path / "other")


def test_collect_compares_equal_evaluations_only(tmp_path, call, fails):
    base = {"dataset": "street", "split": "val", "files": "1234", "labels": "abcd", "convention": "nan_mean"}

    def run(name: str, classes=("pole",), **identity) -> Path:
        (tmp_path / name).mkdir()
        result = {"miou": 0.5, "miou_tail": 0.5, "confusion": [], "groups": {}, "run": name}
        result["per_class"] = [{"name": k, "iou": 0.5} for k in classes]
        result["identity"] = base | {"images": 7, "scales": [1.0]} | identity
        (tmp_path / name / "evaluation.json").write_text(json.dumps(result if identity != {"old": 1} else {
            key: value for key, value in result.items() if key != "identity"}))  # fmt: skip
        (tmp_path / name / "run.json").write_text("{}")
        return tmp_path / name

    a, b, scaled, old = run("a"), run("b"), run("scaled", scales=[2.0]), run("old", old=1)
    elsewhere = run("elsewhere", classes=("car",), files="9", labels="9", dataset="road", images=3)
    out = ("--out", tmp_path / "table")
    lines = call(collect.main, f"a={a}", f"b={b}", f"s={scaled}", f"o={old}", f"e={elsewhere}", *out).splitlines()
    assert lines[3] == "| b | 50.0 ± 0.0 (+0.0) | 50.0 ± 0.0 (+0.0) | 50.0 ± 0.0 (+0.0) |"
    assert lines[4] == "| s | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 |"
    assert "(+0.0)" in lines[5] and lines[6] == "| e | 50.0 ± 0.0 | 50.0 ± 0.0 | – |"
    assert lines[7] == "s does not compare with a: scales [2.0] against [1.0]"
    assert lines[8].startswith("o: identity unknown")
    assert lines[9].startswith("e does not compare with a: other images or label files: road val, 3 images against")
    refused = fails(collect.main, f"a={a},{scaled}", *out, "--force")
    assert "a: scaled does not compare with a: scales [2.0] against [1.0]" in refused


# shrink_dataset -----------------------------------------------------------------------------------------------------


def test_shrink_keeps_layout_and_label_values(tmp_path, call, fails):
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8) % 11
    image = np.repeat(np.arange(48, dtype=np.uint8).reshape(6, 8, 1) * 4, 3, 2)
    save(image, tmp_path / "camvid/images/train/a.png")
    save(labels, tmp_path / "camvid/labels/train/a.png")
    words = "camvid", "--root", tmp_path / "camvid", "--split", "train", "--workers", "1", "--out", tmp_path / "half"
    assert "2 files" in call(shrink_dataset.main, *words)
    sample = SegmentationDataset(SourceConfig(dataset="camvid", root=str(tmp_path / "half"), split="train")).load(0)
    mean = image.reshape(3, 2, 4, 2, 3).astype(float).mean((1, 3))
    assert np.abs(sample["image"] - mean).max() <= 0.5
    assert sample["label"].shape == (3, 4)
    assert all(
        sample["label"][i, j] in labels[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] for i in range(3) for j in range(4)
    )
    assert "(0 new)" in call(shrink_dataset.main, *words)
    other = fails(shrink_dataset.main, *words, "--factor", "3")
    assert "there already with 4×3 pixels, --factor 3 gives 2×2; remove that folder" in other
    assert "does not shrink" in fails(shrink_dataset.main, *words, "--factor", "1")
    assert "is the data set itself" in fails(shrink_dataset.main, *words[:-1], tmp_path / "camvid")


def test_shrink_keeps_the_values_of_deep_labels(tmp_path, call):
    label = np.kron(np.arange(12).reshape(3, 4), np.ones((2, 2), int)).astype(np.uint16)
    save(np.zeros((6, 8, 3), np.uint8), tmp_path / "synthia/RGB/0.png")
    save_rgb16(np.stack((label, label * 900, label), 2), tmp_path / "synthia/GT/LABELS/0.png")
    words = "--root", tmp_path / "synthia", "--split", "train", "--workers", "1", "--out", tmp_path / "half"
    call(shrink_dataset.main, "synthia", *words)
    assert np.array_equal(read_index(tmp_path / "half/GT/LABELS/0.png"), label[::2, ::2])
