"""What a training step starts, counted: operators on the CPU held at the committed numbers, kernels of a profile."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from common.config import load_config
from scripts import benchmark, performance_page
from scripts.bench import gpu, measure, operators
from scripts.bench.systems import SYSTEMS, resident

ROOT = Path(__file__).parents[2]
SMALL = "fully_sup/configs/small/upernet_r18_camvid.yaml"
CPU = torch.device("cpu")
BARS = {"usrn": 0.5, "mask2former": 0.6}  # share of the operators that a step had before any were saved
pytestmark = pytest.mark.usefixtures("unchanged", "one_thread")


def committed(name: str) -> tuple[dict[str, dict], str]:
    """The rows of a result by system, and torch's version."""
    result = json.loads((ROOT / "docs" / "results" / name).read_text())
    return {row["name"]: row for row in result["rows"]}, result["machine"]["torch"]


@pytest.mark.parametrize("name", sorted(SYSTEMS.keys() - {"upernet-bf16"}))
def test_operators_of_a_step(name):
    """No more than `docs/results/operators.json` says, whose command writes it anew; another torch may have others."""
    rows, version = committed("operators.json")
    system = resident(SYSTEMS[name], CPU, tiny=True)
    for number in range(gpu.WARM):
        system.step(number)

    found = gpu.on_cpu(system, gpu.WARM)["operators"]
    assert found <= rows[name]["operators"] * (1 if version == torch.__version__ else 1.1)


@pytest.mark.parametrize("name", BARS)
def test_operators_that_were_saved(name):
    before, _ = committed("operators_before.json")
    now, _ = committed("operators.json")
    assert now[name]["operators"] <= BARS[name] * before[name]["operators"]


def test_counted_are_operators_that_work_by_part():
    layer = nn.Linear(3, 3)
    counted = operators.Operators()
    with counted:
        with counted.within("forward"):
            loss = layer(torch.ones(2, 3)).view(-1).sum()
        with counted.within("backward"):
            loss.backward()
        layer.weight.detach().zero_()

    # ones, addmm, sum; ones_like, mm, sum; zero_. Views of all parts are apart.
    assert [counted.of_part(part) for part in operators.PARTS] == [3, 3, 1]
    assert counted.idle > 3 and counted.most(9)["addmm.default"] == 1


def event(name: str, microseconds: float, device=DeviceType.CUDA, **more) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: microseconds), **more
    )


def test_kernels_of_a_profile():
    """Not what ran on the CPU, and not the ranges that a program names."""
    events = [
        event("aten::add", 50, DeviceType.CPU),
        event("add_kernel", 2000),
        event("gemm", 500),
        event("Memcpy HtoD (Pinned -> Device)", 250),
        event("Optimizer.step#SGD.step", 9000, is_user_annotation=True),
    ]
    assert gpu.kernels(events) == {"kernels": 2, "copies": 1, "busy_ms": 2.75}


def average(key: str, microseconds: float, device=DeviceType.CPU, annotation=False) -> SimpleNamespace:
    facts = {"device_type": device, "is_user_annotation": annotation}
    return SimpleNamespace(key=key, self_device_time_total=microseconds, count=2, **facts)


def test_the_time_of_operators_is_counted_once():
    """Of a step operators with their kernels, of a recorded one the kernels; never what a program names."""
    averages = [
        average("Optimizer.step#SGD.step", 9000, annotation=True),
        average("Optimizer.step#SGD.step", 9000, DeviceType.CUDA, annotation=True),
        *(average(f"aten::op{n}", 100 * n) for n in range(7)),
        *(average(f"kernel{n}", 100 * n, DeviceType.CUDA) for n in range(3)),
    ]
    found = gpu.longest(averages, DeviceType.CPU)
    assert list(found) == [f"aten::op{n}" for n in (6, 5, 4, 3, 2)] and len(found) == gpu.TOP
    assert found["aten::op6"] == {"ms": 0.6, "calls": 2}
    assert list(gpu.longest(averages, DeviceType.CUDA)) == ["kernel2", "kernel1"], "and none that took no time"


def test_benchmark_of_a_gpu_on_the_cpu(tmp_path):
    out = tmp_path / "a.json"
    words = ["gpu", "--device", "cpu", "--quick", "--systems", "usrn", "--out", str(out)]
    assert benchmark.main(words) == 0
    result = json.loads(out.read_text())
    [row] = result["rows"]
    assert row["name"] == "usrn" and row["ms"]["step"] > 0 and len(row["top"]) == gpu.TOP
    assert "tf32" not in row and "tf32" not in result["machine"]
    loader = row["loader"]
    assert loader["processes"] >= loader["needed"] / loader["images_per_second"] > 0


def test_forms_of_a_step(monkeypatch):
    """Each in a row of its own, the first steps beside the others; what a method refuses is said in its row."""
    times = iter([5.0, 1.0, 1.0, 0.5, 0.5, 2.0])  # two that warm, a median of three, the peak's
    monkeypatch.setattr(gpu, "timed", lambda step, number: next(times))
    taken: list[int] = []
    trainer = SimpleNamespace(cfg=load_config(ROOT / SMALL, ["train.compile=true"]), parameters=[torch.zeros(3)])
    made = gpu.Resident(trainer, {}, 2, 10.0)
    monkeypatch.setattr(gpu.Resident, "step", lambda self, number: taken.append(number))
    built = []
    monkeypatch.setattr(gpu, "resident", lambda system, device, tiny: built.append(system.words) or made)

    args = SimpleNamespace(quick=True, rounds=3)
    row = gpu.row_of("upernet-bf16", "compiled", torch.device("cpu"), args)
    assert built == [("train.precision=bf16", "train.compile=true")] and row["name"] == "upernet-bf16, compiled"
    assert row["ms"]["step"] == 500.0 and row["warm_seconds"] == 5.0
    assert "operators" not in row, "those of a compiled step are not dispatched one by one"


def test_a_compiler_that_fails_costs_its_row_alone(tmp_path, monkeypatch):
    """The file has each row as soon as it is there; a failure of the step itself is no row."""

    def fake(system, device, args):
        if "train.compile=true" in system.words:
            raise RuntimeError("no kernel\nand more")
        return {"ms": {"step": 1.0}}

    monkeypatch.setattr(gpu, "measured", fake)
    out, words = tmp_path / "a.json", ["gpu", "--device", "cpu", "--quick", "--systems", "usrn", "cpsl"]
    assert benchmark.main([*words, "--forms", "compiled", "eager", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["usrn, compiled", "usrn", "cpsl, compiled", "cpsl"]
    assert rows[0]["error"] == "no kernel" and rows[1]["ms"] == {"step": 1.0}

    def broken(system, device, args):
        if system is SYSTEMS["cpsl"] or system.config == SYSTEMS["cpsl"].config:
            raise RuntimeError("wrong")
        return {"ms": {"step": 1.0}}

    monkeypatch.setattr(gpu, "measured", broken)
    with pytest.raises(RuntimeError, match="wrong"):
        benchmark.main([*words, "--out", str(tmp_path / "b.json")])
    assert [row["name"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]] == ["usrn"]


def test_forms_that_a_method_refuses_are_rows(tmp_path):
    out = tmp_path / "a.json"
    words = ["gpu", "--device", "cpu", "--quick", "--systems", "unimatch", "--forms", "compiled", "--out", str(out)]
    assert benchmark.main(words) == 0
    [row] = json.loads(out.read_text())["rows"]
    assert row["ms"] == {} and "UniMatch runs the network in parts" in row["error"]


@pytest.mark.parametrize(
    "words, text",
    [
        (["gpu", "--systems", "usnr"], "--systems usnr: unknown; known: upernet, "),
        (["gpu", "--device", "cuda"], "gpu: torch finds no GPU here; --device cpu counts operators"),
    ],
)
def test_benchmark_of_a_gpu_refuses(words, text, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert text in fails(benchmark.main, *words)


def test_a_benchmark_runs_on_the_gpu_that_is_named(fails, monkeypatch):
    """What names none, such as a kernel of Triton's, takes the current one."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for device in ("cpu", "cuda:1"):
        assert "unknown" in fails(benchmark.main, "gpu", "--systems", "usnr", "--device", device)
    assert taken == [torch.device("cuda", 1)]
    text = "--device cuda:2: GPU 2 is asked for, and torch finds 2"
    assert text in fails(benchmark.main, "loss", "--device", "cuda:2")
    benchmark.main(["full-size", "--list", "--device", "cuda:1"])
    assert len(taken) == 1, "its steps are processes of their own"


@pytest.mark.parametrize("switch", [True, False])
def test_rows_say_whether_tf32_was_on(switch, monkeypatch):
    """As it is after the step, whose config has switched it; on a CPU there is nothing to say."""
    before = torch.backends.cuda.matmul.allow_tf32
    trainer = SimpleNamespace(cfg=load_config(ROOT / SMALL), parameters=[])
    monkeypatch.setattr(gpu.Resident, "step", lambda self, number: None)
    monkeypatch.setattr(gpu, "found_on", lambda device, system, number: {})
    monkeypatch.setattr(measure, "peak_memory", lambda call, device: 0)

    def resident(system, device, tiny):
        torch.backends.cuda.matmul.allow_tf32 = switch
        return gpu.Resident(trainer, {}, 2, 10.0)

    monkeypatch.setattr(gpu, "resident", resident)
    try:
        rows = [
            gpu.measured(None, torch.device(kind), SimpleNamespace(quick=True, rounds=1)) for kind in ("cuda", "cpu")
        ]
        compared = measure.compare("x", {"ours": lambda: None}, 1, check={}, device="cuda:1")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert [row.get("tf32") for row in (*rows, compared)] == [switch, None, switch] and "tf32" not in rows[1]


def test_the_page_has_what_a_gpu_was_measured_to_do(tmp_path, monkeypatch):
    shutil.copytree(performance_page.RESULTS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(performance_page, "RESULTS", tmp_path)
    (tmp_path / "gpu.json").unlink(missing_ok=True)
    assert "was not measured" in performance_page.page()

    row = {"name": "usrn", "ms": {"step": 80.0}, "busy_ms": 60.0, "kernels": 900, "syncs": 1, "peak_mib": 2048.4}
    row |= {"warm_seconds": 12.345, "loader": {"processes": 3}}
    refused = {"name": "usrn, compiled", "ms": {}, "error": "usrn: train.compile: no"}
    result = {"command": "python x", "commit": "abc", "rounds": 8, "quick": False}
    result["machine"] = {"gpu": "A GPU", "torch": "2"}
    (tmp_path / "gpu.json").write_text(json.dumps({**result, "rows": [row, refused]}))
    text = performance_page.page()
    assert "`python x` on A GPU, torch 2, commit abc" in text and "was not measured" not in text
    assert "| usrn | 80 | 60 | 75% | 900 | 1 | 2048 | 12.3 | 3 |" in text
    assert "| usrn, compiled | usrn: train.compile: no |" in text
    assert "Before these changes, on one H200" in text, "what was before stays"

    (tmp_path / "gpu.json").write_text(json.dumps({**result, "quick": True, "rows": [row]}))
    with pytest.raises(ValueError, match="was made with --quick, or without a GPU"):
        performance_page.page()


def test_the_page_says_what_the_results_say():
    written = performance_page.PAGE.read_text(encoding="utf-8")
    assert written == performance_page.page(), "run scripts/performance_page.py"
