"""The programs under scripts/: what they write, and that bad input ends in one line and exit code 2."""

import base64
import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from common import cli
from common.config import load_config
from common.data import DATASETS, SegmentationDataset, toy
from common.models import build_model, load_weights
from scripts import benchmark, browse, class_stats, convert_checkpoint, doctor, export, predict
from scripts.bench import cpsl, cpsl_literal, full_size, measure, workspace
from scripts.bench.families import official
from tests.unit.data_files import classes, picture, save

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """What the programs set for a whole process does not reach other tests."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for name in {row.env for row in DATASETS.values()}:
        monkeypatch.setenv(name, "/nowhere")
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return toy.make("cityscapes", tmp_path_factory.mktemp("scenes") / "cityscapes", train=3, val=2, size=(64, 128))


TREE = {
    "model": {
        "name": "upernet", "backbone": "resnet18", "num_classes": 19, "norm": "bn",
        "options": {"channels": 16, "auxiliary": False},
    },
    "data": {
        "dataset": "cityscapes", "workers": 0,
        "streams": {"labeled": {"batch_size": 2, "augment": {"recipe": "mmseg", "crop": [32, 64]}}},
    },
    "method": {"heads": {"decode": {"loss": "ce"}}},
}  # fmt: skip


@pytest.fixture
def config(scenes, tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(TREE | {"output": str(tmp_path), "data": TREE["data"] | {"root": str(scenes)}}))
    return path


@pytest.fixture
def weights(config, tmp_path) -> Path:
    path = tmp_path / "small.safetensors"
    save_file(build_model(load_config(config).model).state_dict(), path)
    return path


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., str]:
    """Run a program's main with these words; returns what it prints."""

    def run(main, *words) -> str:
        monkeypatch.setattr(sys, "argv", ["program.py", *map(str, words)])
        assert not main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(monkeypatch, capsys) -> Callable[..., str]:
    """Run a program that must end with exit code 2; returns its one line."""

    def run(main, *words) -> str:
        monkeypatch.setattr(sys, "argv", ["program.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        lines = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and lines[-1].startswith("error: "), lines
        assert sum(line.startswith("error") for line in lines) == 1 and "Traceback" not in "".join(lines)
        return lines[-1]

    return run


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


# predict, convert_checkpoint, export ------------------------------------------------------------------------------


def test_predict_writes_what_the_network_says(config, weights, tmp_path, call):
    pictures = tmp_path / "in"
    for name, size in (("a.png", (40, 72)), ("deep/b.jpg", (64, 64))):
        save(picture(*size), pictures / name)
    call(predict.main, config, weights, pictures, "--out", tmp_path / "out", "--device", "cpu")
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert found == ["a.png", "a_overlay.jpg", "deep/b.png", "deep/b_overlay.jpg"]
    model = build_model(load_config(config).model).eval()
    load_weights(model, weights)
    image = torch.from_numpy(np.array(Image.open(pictures / "a.png"))).permute(2, 0, 1)[None]
    with Image.open(tmp_path / "out" / "a.png") as written:
        assert written.mode == "P" and written.getpalette()[:3] == list(DATASETS["cityscapes"].palette[0])
        assert np.array_equal(np.array(written), model.labels(image)[0][0].numpy())
    with Image.open(tmp_path / "out" / "deep" / "b_overlay.jpg") as shown:
        assert shown.size == (64, 64)


def test_predict_refuses(config, weights, tmp_path, fails):
    out, image = ("--out", tmp_path / "out"), save(picture(32, 32), tmp_path / "in" / "a.png")
    assert "no such image" in fails(predict.main, config, weights, tmp_path / "b.png", *out)
    save(picture(32, 32), tmp_path / "in" / "a.jpg")
    assert "written as 'a' too" in fails(predict.main, config, weights, tmp_path / "in", *out)
    assert "no such weight file" in fails(predict.main, config, tmp_path / "none.pth", image, *out)
    wrong = fails(predict.main, config, weights, image, "model.num_classes=11", *out)
    assert "model.num_classes is 11, cityscapes has 19" in wrong
    image.write_bytes(image.read_bytes()[:200])
    assert "a.png: cannot decode the image" in fails(predict.main, config, weights, image, *out)


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
    assert "does not fit" in fails(convert_checkpoint.main, *words, "model.options.width=16")
    assert "end in .safetensors" in fails(convert_checkpoint.main, *words[:2], "--out", tmp_path / "x.pth")
    again = fails(convert_checkpoint.main, config, out, "--out", out, "--prototypes", tmp_path / "p.pt")
    assert "holds no prototypes" in again


def test_export_runs_without_the_project(tmp_path, call, fails):
    out, weights, config = tmp_path / "small.pt2", tmp_path / "w.safetensors", ROOT / "uda/configs/toy/warm_up.yaml"
    model = build_model(load_config(config).model).eval()
    save_file(model.state_dict(), weights)
    call(export.main, config, weights, "--size", "32x64", "--out", out)
    images = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    with torch.no_grad():
        found, expected = torch.export.load(out).module()(images), model.predict(images)
    assert found.shape == (1, 19, 32, 64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "give HEIGHTxWIDTH" in fails(export.main, config, weights, "--size", "32", "--out", out)


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


# benchmark --------------------------------------------------------------------------------------------------------


def test_peak_memory_is_what_a_call_holds_at_once():
    def call(megabytes: int = 64) -> None:
        for _ in range(2):  # one after the other: the peak is one of them
            np.ones(megabytes << 20, np.uint8).sum()

    call(1)
    peak = measure.peak_memory(call)
    if peak is None:
        pytest.skip("the system tells no peak")
    assert 60 << 20 < peak < 80 << 20


def test_forms_are_compared_with_the_first():
    row = measure.compare("x", {"ours": lambda: None, "slow": lambda: sum(range(2000))}, 3, check={}, bar=2.0, items=4)
    assert row["met"] and row["faster"]["slow"] == pytest.approx(row["ms"]["slow"] / row["ms"]["ours"])
    with pytest.raises(ValueError, match="the forms differ by 0.5"):
        measure.require("x", 0.5, 0.1)
    with pytest.raises(ValueError, match="the forms differ by nan"):
        measure.require("x", float("nan"), 0.1)


def bench(*words) -> list[dict]:
    """The rows of a tiny benchmark."""
    out = Path(words[-1])
    assert benchmark.main([*map(str, words[:-1]), "--quick", "--out", str(out)]) == 0
    return json.loads(out.read_text())["rows"]


def test_benchmark_of_the_loader(tmp_path):
    rows = bench("loader", tmp_path / "a.json")
    assert [row["name"] for row in rows][0] == "load and augment"
    assert all(set(row["ms"]) >= {"pillow"} and row["ms"]["pillow"] > 0 for row in rows)
    assert rows[0]["check"]["labels apart from the whole image resized"] == 0


def test_benchmark_of_metrics(config, tmp_path):
    rows = bench("metrics", "--config", config, tmp_path / "a.json")
    assert [row["name"] for row in rows] == ["confusion matrix", "classes from logits", "evaluation"]
    assert rows[0]["check"] == {"pixels apart": 0}


def test_benchmark_of_cpsl(tmp_path):
    rows = {row["name"]: row for row in bench("cpsl", "--images", 1, tmp_path / "a.json")}
    assert len(rows) == 8 and {"bank update", "prototype pass", "similarity"} <= rows.keys()
    own = rows["own work beside the networks"]
    assert set(own["ms"]) == {"ours", "literal"} and max(own["check"].values()) < 1e-3


def test_a_wrong_form_is_not_measured(monkeypatch):
    monkeypatch.setattr(cpsl_literal, "similarity", lambda features, prototypes: torch.zeros(1, 19, 16, 24))
    with pytest.raises(ValueError, match="similarity: the forms differ"):
        cpsl.feature_similarity(cpsl.Sizes(quick=True), 1)


SMALL = ("data.streams.labeled.augment.crop=[64,64]", "data.streams.labeled.augment.box=[64,128]")
SEGFORMER = "segformer/segformer_mit-b0_8x1_1024x1024_160k_cityscapes"


def test_benchmark_of_a_step(tmp_path):
    config = ROOT / "fully_sup" / "configs" / f"{SEGFORMER}.yaml"
    step, alone = bench("step", config, *SMALL, "--size", "64x128", "--against", "blv", tmp_path / "a.json")
    for form, parts in step["parts_ms"].items():
        assert set(parts) == {"data", "forward", "backward", "optimiser"} and min(parts.values()) > 0
        assert sum(parts.values()) == pytest.approx(step["ms"][form], rel=1e-3)
    assert step["first_step"]["blv"]["loss"] != step["first_step"]["ce"]["loss"]
    assert alone["check"] == {"without weights, difference to cross-entropy": 0, "reads back to the host": 0}


def test_zero_gradients_and_state_leave_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = official()["fully_sup/ocrnet/ocrnet_hr18_512x1024_40k_cityscapes"]
    words = [*SMALL, "model.backbone=hrnet_w18_small", "model.options={channels: 32, context_channels: 16}", "output=r"]
    cfg = load_config(path, [*workspace.overrides(load_config(path), 1), *words])
    family = full_size_family()
    trainer, experiment = workspace.trainer(cfg, family, (64, 128), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in trainer.method.state_dict().items()}
    held = workspace.settle(trainer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.method.state_dict().items())
    parameters = sum(p.numel() for p in trainer.parameters)
    assert held >= 3 * 4 * parameters  # weights, gradients and momentum
    first = {name: float(value) for name, value in trainer.step(0, experiment.open(0), []).items()}
    fresh, experiment = workspace.trainer(cfg, family, (64, 128), torch.device("cpu"))
    again = {name: float(value) for name, value in fresh.step(0, experiment.open(0), []).items()}
    assert first == again
    assert all(torch.equal(a, b) for a, b in zip(trainer.parameters, fresh.parameters, strict=True))


def full_size_family():
    from scripts.bench.families import FAMILIES

    return FAMILIES["fully_sup"]


def test_full_size_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    out, measured = tmp_path / "results" / "full.json", []
    good = {"seconds": 1.0, "peak_gib": 2.0, "held_gib": 3.0, "loss": 4.0}

    def measure_all_but(broken: str) -> None:
        def fake(name, *args):
            measured.append(name)
            return {"error": "exit code 2: error: no memory"} if broken and broken in name else good

        monkeypatch.setattr(full_size, "measure", fake)

    words = ["--full-size", "segformer", "--out", str(out)]
    measure_all_but("_blv")
    assert benchmark.main(words) == 1 and "failed: exit code 2: error: no memory" in capsys.readouterr().out
    assert measured == [f"fully_sup/{SEGFORMER}", f"fully_sup/{SEGFORMER}_blv"]
    measure_all_but("")
    assert benchmark.main(words) == 0 and measured[2:] == [f"fully_sup/{SEGFORMER}_blv"]  # what failed, again
    assert benchmark.main(words) == 0 and len(measured) == 3 and "measured already" in capsys.readouterr().out
    assert benchmark.main([*words, "--again"]) == 0 and len(measured) == 5
    assert json.loads(out.read_text())["configs"] == dict.fromkeys(measured, good)


@pytest.mark.slow
def test_full_size_takes_a_real_step(tmp_path):
    out = tmp_path / "full.json"
    words = ["full-size", f"{SEGFORMER}_blv", *SMALL, "--size", "64x128", "--out", str(out)]
    assert benchmark.main(words) == 0
    [(name, result)] = json.loads(out.read_text())["configs"].items()
    assert name == f"fully_sup/{SEGFORMER}_blv" and result["crop"] == {"labeled": "64x64"}
    assert result["seconds"] > 0 and np.isfinite(result["loss"]) and result["batch"] == {"labeled": 1}


def test_full_size_knows_every_official_config():
    names = official()
    assert sum(name.startswith("fully_sup/") for name in names) == 15  # seven pairs, and BLV on the other head
    stages = {"warm_up", "stage1", "stage2", "stage3"}
    for task in ("gta5", "synthia"):
        assert {f"uda/{task}_to_cityscapes/{stage}" for stage in stages} <= names.keys()


@pytest.mark.parametrize(
    "end, reason",
    [
        ("print('error: no memory', file=sys.stderr); sys.exit(2)", "exit code 2: error: no memory"),
        ("os.kill(os.getpid(), 9)", "exit code -9: killed by signal 9"),
    ],
)
def test_a_failing_config_says_why(end, reason, tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(f"import os, sys\n{end}\n")
    monkeypatch.setattr(full_size, "BENCHMARK", tmp_path / "child.py")
    args = SimpleNamespace(device="cpu", size=None, threads=None)
    assert full_size.measure("fully_sup/x", args, [], tmp_path) == {"error": reason}


@pytest.mark.parametrize(
    "words, text",
    [
        (["lodaer"], "'lodaer' is unknown; known: loader"),
        (["full-size", "nothing"], "'nothing' is part of no official config's name"),
        (["full-size", "--out", "{folder}/broken.json"], "not a file of this benchmark"),
        (["loader", "--size", "big"], "'big' is no HEIGHTxWIDTH"),
        (["loader", "--rounds", "0"], "--rounds"),
        (["step", "{folder}/small.yaml"], "not a config of fully_sup"),
        (["step", str(ROOT / "fully_sup/configs/toy/upernet_r18.yaml"), "--against", "what"], "--against 'what'"),
    ],
)
def test_benchmark_refuses(words, text, config, tmp_path, fails):
    (tmp_path / "broken.json").write_text("[]")
    assert text in fails(benchmark.main, *(word.format(folder=tmp_path) for word in words))
