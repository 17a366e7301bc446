"""`train.compile` covers the training forward of every method that does not refuse it: graphs are captured, and run as
they are, so that no compiler is needed."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.config import Config, ModelConfig, TrainConfig
from common.engine.method import Batch, Method
from common.engine.runtime import called_networks
from common.models import build_model
from fully_sup.supervised import METHODS as SUPERVISED
from fully_sup.supervised import Supervised
from ltss_benchmark.methods import METHODS as LTSS
from ltss_benchmark.methods import build_method as ltss_method
from semi_sup.config import METHODS as SEMI_SUPERVISED
from tests.contexts import context
from tests.unit import test_cpsl_method as stages
from tests.unit import test_ltss_method as benchmark
from tests.unit import test_usrn_method as semi
from uda.cpsl import CPSL
from uda.distill import Distill
from uda.proda import ProDA
from uda.train import METHODS as ADAPTED
from uda.warmup import WarmUp

Streams = Mapping[str, Batch]
SIZES = [(32, 48), (40, 64), (48, 80)]  # of the crops of three steps
LAYERS = ("aten.convolution.default", "aten.native_batch_norm.default")  # nearly all of a step's work
pytestmark = pytest.mark.usefixtures("one_thread")


class Captured:
    """A backend of `torch.compile` that runs what it captures, and knows what has been in it."""

    def __init__(self) -> None:
        self.graphs = 0
        self.parameters: set[int] = set()
        self.running = False

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable[..., Any]:
        self.graphs += 1

        def run(*inputs: Any) -> Any:
            self.parameters |= {id(x) for x in inputs if isinstance(x, nn.Parameter)}
            self.running = True
            try:
                return graph(*inputs)
            finally:
                self.running = False

        return run


class Layers(TorchDispatchMode):
    """Counts layers inside captured graphs and outside them."""

    def __init__(self, captured: Captured):
        super().__init__()
        self.captured = captured
        self.inside: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else nothing runs compiled while it is entered

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if str(operator) in LAYERS:
            (self.inside if self.captured.running else self.outside)[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


# Methods and their batches ------------------------------------------------------------------------------------------


def stage_config(folder: Path) -> Config:
    model = ModelConfig(
        "deeplabv2", stages.CLASSES, mean=(0, 0, 0), std=(255, 255, 255), align_corners=True, options=stages.SMALL
    )
    np.save(folder / "delta.npy", np.full(stages.CLASSES, 1 / stages.CLASSES))
    torch.save(torch.randn(stages.CLASSES, 8), folder / "prototypes.pt")
    save_file(build_model(model).state_dict(), folder / "teacher.safetensors")
    return Config(name="stage", output=str(folder), model=model)


def stage(method: type[Method], folder: Path, **files: str) -> Method:
    options: dict[str, Any] = {key: str(folder / name) for key, name in files.items()}
    if method is CPSL:
        options |= {"bank": 64, "samples": 16, "cutmix": 0.0}
    return method(replace(stage_config(folder), method=options), context(stages.CLASSES))


def supervised(folder: Path) -> Method:
    model = ModelConfig("upernet", 5, "resnet18", norm="bn", options={"channels": 8, "auxiliary_channels": 8})
    heads = {"decode": {}, "aux": {"weight": 0.4}}
    return Supervised(Config(model, method={"heads": heads}, train=TrainConfig(steps=10)), context())


METHODS: dict[str, Callable[[Path], Method]] = {
    "supervised": supervised,
    "deeplabv3plus": lambda folder: ltss_method(benchmark.config("deeplabv3p_R18"), context(benchmark.statistics())),
    "baseline": lambda folder: semi.method("baseline"),
    "self_training": lambda folder: semi.method("self_training"),
    "usrn": lambda folder: semi.method(),
    "warm_up": lambda folder: stage(WarmUp, folder),
    "cpsl": lambda folder: stage(CPSL, folder, prototypes="prototypes.pt", class_distribution="delta.npy"),
    "proda": lambda folder: stage(ProDA, folder, prototypes="prototypes.pt"),
    "distill": lambda folder: stage(Distill, folder, teacher="teacher.safetensors"),
}
FAST = ("supervised", "warm_up", "cpsl")


def batches(method: Method, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Streams:
    if type(method).__module__.startswith("uda."):
        monkeypatch.setattr(stages, "CROP", size)
        streams = stages.batches()
        streams["target"]["image"] = streams["target"]["weak"]
        return streams

    if type(method).__module__.startswith("semi_sup."):
        return semi.batches(size[0])

    height, width = (2 * side for side in size)  # no side of a map is 1: that is compiled apart
    image = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    return {"labeled": {"image": image, "label": torch.randint(-1, 5, (2, height, width), dtype=torch.int16)}}


def take_step(method: Method, streams: Streams, step: int, layers: Layers | None = None) -> None:
    counted = layers or nullcontext()
    with counted:
        parts = method(streams, step)

    parts = parts if isinstance(parts, Iterator) else iter([parts])
    while True:
        with counted:
            losses = next(parts, None)
        if losses is None:
            break
        losses["loss"].backward()

    method.after_step(step)


# Tests --------------------------------------------------------------------------------------------------------------


def test_all_that_do_not_refuse_are_here():
    tables = SUPERVISED | SEMI_SUPERVISED | ADAPTED | LTSS
    assert METHODS.keys() == {name for name, method in tables.items() if method.uncompiled is None}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_a_step_runs_in_captured_graphs(name, tmp_path, monkeypatch):
    """Every layer of every network, but for a discriminator's; a third size of crops captures none anew."""
    torch._dynamo.reset()
    method = METHODS[name](tmp_path).train()
    captured = Captured()
    for network in called_networks(method):
        network.compile(backend=captured)

    take_step(method, batches(method, SIZES[0], monkeypatch), 0)
    first = captured.graphs
    take_step(method, batches(method, SIZES[1], monkeypatch), 1)
    second = captured.graphs
    layers = Layers(captured)
    take_step(method, batches(method, SIZES[2], monkeypatch), 2, layers)
    assert 0 < first <= second == captured.graphs <= 2 * first

    for network in called_networks(method):
        learnt = [p for p in network.parameters() if p.grad is not None]
        assert all(id(p) in captured.parameters for p in learnt)

    assert min(layers.inside[kind] for kind in LAYERS) > 10
    assert layers.outside[LAYERS[1]] == 0
    assert layers.outside[LAYERS[0]] <= (15 if name == "warm_up" else 0)


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_captures_nothing(name, tmp_path):
    """Its images have many sizes, and each would be a graph of its own."""
    torch._dynamo.reset()
    method = METHODS[name](tmp_path).eval()
    captured = Captured()
    for network in called_networks(method):
        network.compile(backend=captured)

    images = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    label, _ = method.labels(images)
    assert label.shape == (1, 40, 56) and captured.graphs == 0
