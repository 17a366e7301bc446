"""The benchmarks on tiny sizes: each checks that its forms agree and writes its rows; bad input ends in one line."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.config import load_config
from common.data import SegmentationDataset
from common.losses.build import LOSSES
from scripts import benchmark
from scripts.bench import (
    cpsl,
    cpsl_literal,
    daformer_literal,
    full_size,
    kmeans,
    ltss,
    measure,
    unimatch_literal,
    usrn_literal,
    workspace,
)
from scripts.bench.families import FAMILIES, official
from semi_sup.subclasses import PRESETS, parents

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("unchanged")


def test_peak_memory_is_what_a_call_holds_at_once():
    def call(megabytes: int = 64) -> None:
        for _ in range(2):  # one after the other: the peak is one of them
            np.ones(megabytes << 20, np.uint8).sum()

    call(1)
    peak = measure.peak_memory(call)
    if peak is None:
        pytest.skip("the system tells no peak")
    assert 60 << 20 < peak < 80 << 20


def test_peak_of_tensors_counts_no_holes_of_the_heap():
    """One set of blocks is freed, with what keeps them apart still held, before a set of larger ones is built."""

    def call() -> None:
        blocks, between = [], []
        for _ in range(64):
            blocks.append(torch.ones(1 << 20, dtype=torch.uint8))
            between.append(torch.ones(4 << 10, dtype=torch.uint8))
        blocks.clear()
        blocks += [torch.ones(2 << 20, dtype=torch.uint8) for _ in range(32)]

    assert measure.peak_of_tensors(call) == pytest.approx(64 * (1028 << 10), rel=1e-4)
    assert measure.peak_of_tensors(lambda: None) == 0


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
    assert all(set(row["ms"]) >= {"pillow"} and row["ms"]["pillow"] > 0 for row in rows[:3])
    assert set(rows[3]["ms"]) == {"cached", "decoded"} and rows[3]["check"] == {"levels apart": 0}
    assert rows[0]["check"]["labels apart from the whole image resized"] == 0


def test_benchmark_of_metrics(config, tmp_path):
    rows = bench("metrics", "--config", config, tmp_path / "a.json")
    assert [row["name"] for row in rows] == ["confusion matrix", "classes from logits", "evaluation"]
    assert rows[0]["check"] == {"pixels apart": 0}


def test_benchmark_of_remedies(tmp_path):
    rows = bench("remedies", tmp_path / "a.json")
    assert [row["name"] for row in rows] == ["loss of 2×11, 4×6 → 9×13", "loss of 2×150, 4×6 → 9×13"]
    assert LOSSES.keys() <= rows[0]["ms"].keys() and "lovasz, at: network" in rows[0]["ms"]


def test_benchmark_of_cpsl(tmp_path):
    rows = {row["name"]: row for row in bench("cpsl", "--images", 1, tmp_path / "a.json")}
    assert len(rows) == 8 and {"bank update", "prototype pass", "similarity"} <= rows.keys()
    own = rows["own work beside the networks"]
    assert set(own["ms"]) == {"ours", "literal"} and max(own["check"].values()) < 1e-3


def test_a_wrong_form_is_not_measured(monkeypatch):
    monkeypatch.setattr(cpsl_literal, "similarity", lambda features, prototypes: torch.zeros(1, 19, 16, 24))
    with pytest.raises(ValueError, match="similarity: the forms differ"):
        cpsl.feature_similarity(cpsl.Sizes(quick=True), 1)


def test_benchmark_of_the_loss_at_label_size(tmp_path):
    rows = bench("loss", tmp_path / "a.json")
    assert [row["name"].split(",")[0] for row in rows] == ["loss", "labels"] * 2
    assert set(rows[0]["ms"]) == {"image by image", "plain"} and max(rows[0]["check"].values()) <= 1e-4


def test_benchmark_of_usrn(tmp_path, monkeypatch):
    [row] = bench("usrn", tmp_path / "a.json")
    assert set(row["ms"]) == {"ours", "literal", "channels_last + bf16"} and row["subclasses"] == 177
    assert row["check"]["kept"] > 0 and row["check"]["loss"] <= 1e-5
    monkeypatch.setattr(usrn_literal, "entropy", lambda p: torch.zeros_like(p[:, 0]))  # more is vetoed
    with pytest.raises(ValueError, match="Lu_reg: the forms differ|loss: the forms differ"):
        bench("usrn", tmp_path / "b.json")


@pytest.mark.parametrize("name", ["unimatch", "unimatch_v2"])
def test_benchmark_of_unimatch(name, tmp_path, monkeypatch):
    [row] = bench("unimatch", "--method", name, tmp_path / "a.json")
    assert set(row["ms"]) == {"ours", "literal", "channels_last + bf16"} and row["crop"] == 42
    assert 0 < row["check"]["kept"] < 1 and row["check"]["Ls"] <= 1e-5
    monkeypatch.setattr(unimatch_literal, "mixed", lambda labels, partner, inside: labels)  # labels not pasted
    with pytest.raises(ValueError, match="Ls: the forms differ"):
        bench("unimatch", "--method", name, tmp_path / "b.json")


def test_benchmark_of_daformer(tmp_path, monkeypatch):
    [row] = bench("daformer", tmp_path / "a.json")
    assert set(row["ms"]) == {"ours", "literal", "channels_last + bf16"} and row["crop"] == 64
    assert 0 < row["check"]["confident"] < 1 and row["check"]["mixed_ce"] <= 1e-5
    monkeypatch.setattr(daformer_literal, "gaussian", lambda side, sigma: torch.ones(3) / 3)  # another blur
    with pytest.raises(ValueError, match="mixed_ce: the forms differ"):
        bench("daformer", tmp_path / "b.json")


def test_benchmark_of_kmeans(tmp_path, fails, monkeypatch):
    [row] = bench("kmeans", "--large-only", tmp_path / "a.json")
    assert row["name"] == "4000 x 16 float16 into 11" and row["ms"]["ours"] > 0 and row["peak_gib"] != 0
    assert kmeans.beyond(np.repeat([0, 1, 2], [3, 3, 4]), 3) == 0 and kmeans.beyond(np.repeat([0, 1], [7, 3]), 2) == 2
    x = np.array([[0.0], [2], [10], [14]], np.float32)
    assert kmeans.objective(x, np.array([0, 0, 1, 1]), 2) == 2 + 8
    monkeypatch.setitem(sys.modules, "k_means_constrained", None)
    assert "needs `pip install k-means-constrained`" in fails(benchmark.main, "kmeans", "--quick")


def test_benchmark_of_kmeans_against_the_package(tmp_path):
    pytest.importorskip("k_means_constrained")
    rows = bench("kmeans", tmp_path / "a.json")
    assert [set(row["ms"]) for row in rows] == [{"ours", "k-means-constrained"}] * 2
    assert all(0.9 < ratio < 1.1 for row in rows for ratio in row["objective_ratios"])


def test_benchmark_of_ltss(tmp_path, monkeypatch, fails):
    [row] = bench("ltss", "--only", "inference", tmp_path / "a.json")
    assert set(row["ms"]) == {"bands", "literal"} and row["classes"] == 19
    assert row["check"] == {"pixels of another class that are no ties": 0} and row["shown"] == row["image"]
    [row] = bench("ltss", "--only", "inference", "--shown", 50, 61, tmp_path / "a2.json")
    assert row["check"] == {"pixels of another class that are no ties": 0} and row["shown"] == [50, 61]
    assert "--shown 0 5: of `inference`" in fails(benchmark.main, "ltss", "--quick", "--shown", "0", "5")
    [row] = bench("ltss", "--only", "operation", tmp_path / "b.json")
    assert set(row["ms"]) >= {"grid_sample", "embedding_bag"} and row["tokens"] == 2 * 2 + 4 * 4 + 8 * 8
    assert row["check"].keys() >= {"embedding_bag, relative"} and max(row["check"].values()) <= 1e-4
    assert row["batch"] == 1 and not row.keys() & {"bar", "memory_bar"}
    [row] = bench("ltss", "--only", "operation", "--batch", 2, tmp_path / "b2.json")
    assert row["batch"] == 2
    monkeypatch.setattr(ltss.Given, "labels", lambda self, images: torch.zeros(1, 1, 40, 70, dtype=torch.long))
    with pytest.raises(ValueError, match="labels of the bands against the literal order: the forms differ"):
        bench("ltss", "--only", "inference", tmp_path / "c.json")
    monkeypatch.setattr(ltss, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="the package transformers is not installed"):
        assert bench("ltss", "--only", "step", tmp_path / "d.json") == []
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert bench("ltss", "--only", "host", tmp_path / "e.json") == []


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_benchmark_of_the_attentions_host_time(tmp_path):
    [row] = bench("ltss", "--only", "host", tmp_path / "a.json")
    assert set(row["ms"]) == {"function", "operator"} and row["tokens"] == 20


def test_bars_of_the_attention_on_a_gpu(tmp_path, monkeypatch):
    """3 times the speed in a quarter of the memory, of 16 images; the rows hold bars as on a GPU, measured here."""
    assert ltss.bars_of("cpu", "embedding_bag") == ltss.bars_of("cuda", "grid_sample") == {}
    bars = ltss.bars_of("cuda", "triton")
    assert bars == {"bar": 3.0, "memory_bar": 0.25}
    monkeypatch.setattr(ltss, "bars_of", lambda device, form: bars)
    [row] = bench("ltss", "--only", "operation", tmp_path / "a.json")
    assert row["met"] == (row["ms"]["grid_sample"] >= 3 * row["ms"]["embedding_bag"])
    if row["memory_ratio"] is not None:
        assert row["memory_met"] == (row["peak_mib"]["embedding_bag"] <= 0.25 * row["peak_mib"]["grid_sample"])
    sizes = []
    monkeypatch.setitem(ltss.PARTS, "operation", lambda args, size: sizes.append(size.batch) or [])
    assert bench("ltss", "--only", "operation", "--device", "cuda", tmp_path / "b.json") == [] and sizes == [16]


@pytest.mark.slow
def test_benchmark_of_ltss_against_the_package(tmp_path):
    pytest.importorskip("transformers")
    [row] = bench("ltss", "--only", "step", tmp_path / "a.json")
    assert set(row["ms"]) == {"ours", "transformers"} and row["check"] == {"parameters, difference": 0}


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
    family = FAMILIES["fully_sup"]
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

    assert benchmark.main([*words, "train.precision=bf16", "--again"]) == 0
    known = json.loads(out.read_text())["configs"]
    other = f"fully_sup/{SEGFORMER} train.precision=bf16"
    assert other in known and f"fully_sup/{SEGFORMER}" in known, "changed values are a row of their own"
    before = len(measured)
    assert benchmark.main([*words, "--size", "64x128", "--device", "cuda"]) == 0
    assert len(measured) == before + 2, "nothing of the rows of full size on the CPU"
    assert f"fully_sup/{SEGFORMER} --size 64x128 --device cuda" in json.loads(out.read_text())["configs"]


@pytest.mark.slow
def test_full_size_takes_a_real_step(tmp_path):
    out = tmp_path / "full.json"
    words = ["full-size", f"{SEGFORMER}_blv", *SMALL, "--size", "64x128", "--out", str(out)]
    assert benchmark.main(words) == 0
    [(name, result)] = json.loads(out.read_text())["configs"].items()
    assert name == " ".join([f"fully_sup/{SEGFORMER}_blv", *sorted(SMALL), "--size 64x128"]) and result["crop"] == {
        "labeled": "64x64"
    }
    assert result["seconds"] > 0 and np.isfinite(result["loss"]) and result["batch"] == {"labeled": 1}


@pytest.mark.slow
def test_full_size_of_domain_adaptation(tmp_path):
    """ImageNet's weights are made up, and MIC that masks half of each batch has two images of each domain."""
    name = "uda/mic/cityscapes_to_acdc_blv"
    crops = [f"data.streams.{stream}.augment.crop=[64,64]" for stream in ("source", "target")]
    words = [*crops, "model.backbone=mit_b0", "model.options.channels=8", "method.mask_block=16"]
    words += ["method.margins.bottom=0", "--size", "64x128"]
    assert benchmark.main(["full-size", name, *words, "--out", str(tmp_path / "full.json")]) == 0
    [result] = json.loads((tmp_path / "full.json").read_text())["configs"].values()
    assert result["batch"] == {"source": 2, "target": 2} and np.isfinite(result["loss"])
    assert 0 < result["cpu_seconds"]


def test_full_size_knows_every_official_config():
    names = official()
    assert sum(name.startswith("fully_sup/") for name in names) == 15  # seven pairs, and BLV on the other head
    stages = {"warm_up", "stage1", "stage2", "stage3"}
    for task in ("gta5", "synthia"):
        assert {f"uda/{task}_to_cityscapes/{stage}" for stage in stages} <= names.keys()
    for task in ("gta5_to_cityscapes", "synthia_to_cityscapes", "cityscapes_to_acdc", "cityscapes_to_darkzurich"):
        variants = {f"{method}/{task}{end}" for method in ("daformer", "hrda", "mic") for end in ("", "_blv")}
        assert {f"uda/{name}" for name in variants | {f"mic/{task}_hrda"}} <= names.keys()
    assert not any("camvid" in name or "toy" in name for name in names)
    splits = [f"voc_1over{n}" for n in (64, 32, 16)] + [f"city_1over{n}" for n in (32, 16, 8)]
    semi = {f"semi_sup/{split}_{method}" for split in splits for method in ("baseline", "usrn")}
    unimatch = {name for name in names if name.startswith("semi_sup/uni") or name.startswith("semi_sup/u2pl")}
    assert semi == {name for name in names if name.startswith("semi_sup/")} - unimatch
    networks = [f"unimatch/{data}_r101" for data in ("cityscapes_1_16", "pascal_366", "coco_1_512")]
    networks += [f"unimatch_v2/pascal_92_dinov2_{size}" for size in ("small", "base", "large")]
    assert {f"semi_sup/{name}" for name in [*networks, "u2pl_base/cityscapes_1_16_blv"]} <= unimatch


def test_full_size_takes_whole_names_and_parts():
    names = ["a/stage1", "a/stage1_blv", "b/stage1"]
    assert full_size.choose([], names) == names
    assert full_size.choose(["a/stage1"], names) == ["a/stage1"]
    assert full_size.choose(["stage1_", "b"], names) == ["a/stage1_blv", "b/stage1"]
    with pytest.raises(ValueError, match="'c' is part of no official config's name"):
        full_size.choose(["b", "c"], names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unimatch/pascal_366_r50", "unimatch_v2/coco_1_512_dinov2_small",
                                  "u2pl_base/cityscapes_1_16_blv"])  # fmt: skip
def test_full_size_of_self_training(name, tmp_path):
    crops = [f"data.streams.{stream}.augment.crop=[70,70]" for stream in ("labeled", "unlabeled")]
    words = [f"semi_sup/{name}", *crops, "--size", "80x96", "--out", str(tmp_path / "full.json")]
    assert benchmark.main(["full-size", *words]) == 0
    [result] = json.loads((tmp_path / "full.json").read_text())["configs"].values()
    assert np.isfinite(result["loss"]) and result["machine"]["cores"] > 0


@pytest.mark.parametrize("split", ["voc_1over64", "city_1over32"])
def test_files_of_usrns_earlier_steps(split, tmp_path, monkeypatch):
    """Disjoint lists, and subclass labels whose classes are those of the labels, all accepted by the config."""
    monkeypatch.chdir(tmp_path)
    workspace.use(tmp_path)
    family, path = FAMILIES["semi_sup"], official()[f"semi_sup/{split}_usrn"]
    cfg = load_config(path, workspace.overrides(load_config(path), 2))
    workspace.write_scenes(cfg, tmp_path, (48, 64))
    family.prepare(cfg)
    resolved = family.resolved(cfg)
    assert tuple(resolved.method["subclasses"]) == PRESETS[split]
    labeled, unlabeled = (SegmentationDataset(resolved.data.streams[name]) for name in ("labeled", "unlabeled"))
    assert len(labeled) == len(unlabeled) == 1 and not set(labeled.names) & set(unlabeled.names)
    sample, pi = labeled.load(0), parents(PRESETS[split]).numpy()
    known = sample["label"] >= 0
    assert np.array_equal(known, sample["sub_label"] >= 0)
    assert np.array_equal(pi[sample["sub_label"][known]], sample["label"][known])


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
        (["ltss", "--batch", "0"], "--batch 0: must be at least 1"),
        (["step", "{folder}/small.yaml"], "not a config of fully_sup"),
        (["step", str(ROOT / "fully_sup/configs/toy/upernet_r18.yaml"), "--against", "what"], "--against 'what'"),
    ],
)
def test_benchmark_refuses(words, text, config, tmp_path, fails):
    (tmp_path / "broken.json").write_text("[]")
    assert text in fails(benchmark.main, *(word.format(folder=tmp_path) for word in words))
