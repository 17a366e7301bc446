"""What a training step starts, counted: operators on the CPU held at the committed numbers, kernels of a profile."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from scripts import benchmark, performance_page
from scripts.bench import gpu, operators
from scripts.bench.systems import SYSTEMS, resident

ROOT = Path(__file__).parents[2]
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


def test_benchmark_of_a_gpu_on_the_cpu(tmp_path):
    out = tmp_path / "a.json"
    words = ["gpu", "--device", "cpu", "--quick", "--systems", "usrn", "--out", str(out)]
    assert benchmark.main(words) == 0
    [row] = json.loads(out.read_text())["rows"]
    assert row["name"] == "usrn" and row["ms"]["step"] > 0 and len(row["top"]) == gpu.TOP
    loader = row["loader"]
    assert loader["processes"] >= loader["needed"] / loader["images_per_second"] > 0


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


def test_the_page_says_what_the_results_say():
    written = performance_page.PAGE.read_text(encoding="utf-8")
    assert written == performance_page.page(), "run scripts/performance_page.py"
