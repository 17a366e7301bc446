"""Operators that a training step dispatches, counted on any device, by the part of the step that they belong to."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.engine.trainer import Streams, Trainer

PARTS = ("forward", "backward", "update")
# Beside views, what starts nothing on a GPU: memory is taken from a pool, an optimiser reads its step number, which is
# on the host, a range of the profiler is opened.
IDLE = (
    "aten.empty",
    "aten.new_empty",
    "aten._unsafe_view",
    "aten.lift_fresh",
    "aten._local_scalar_dense",
    "profiler.",
)


class Operators(TorchDispatchMode):
    """Counts what is dispatched while it is entered, below autograd: its backward operators are counted too.

    calls: by (part, operator) those that work on data, each of which starts one kernel on a GPU or more.
    idle: the number of the others: views, allocations, numbers read on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "update"
        self.calls: Counter[tuple[str, str]] = Counter()
        self.idle = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.is_view or str(operator).startswith(IDLE):
            self.idle += 1
        else:
            self.calls[self.part, str(operator)] += 1

        return operator(*args, **(kwargs or {}))

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What is dispatched meanwhile belongs to this part."""
        outer, self.part = self.part, part
        try:
            yield
        finally:
            self.part = outer

    def during(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with self.within(part):
                return call(*args)

        return run

    def of_part(self, part: str) -> int:
        return sum(number for (where, _), number in self.calls.items() if where == part)

    def most(self, number: int) -> dict[str, int]:
        """The most frequent operators of all parts."""
        total: Counter[str] = Counter()
        for (_, name), calls in self.calls.items():
            total[name.removeprefix("aten.")] += calls

        return dict(total.most_common(number))


def count(trainer: Trainer, streams: Streams, step: int) -> Operators:
    """The operators of optimiser step `step` (0-based), which is taken."""
    operators = Operators()
    parts, backward = trainer.parts, trainer._backward
    trainer.parts, trainer._backward = Counted(operators, parts), operators.during("backward", backward)
    try:
        with operators:
            trainer.step(step, streams, [])
    finally:
        trainer.parts, trainer._backward = parts, backward

    return operators


class Counted(nn.Module):
    """The method as the engine calls it; what it dispatches belongs to the forward."""

    def __init__(self, operators: Operators, parts: nn.Module):
        super().__init__()
        self.operators, self.parts = operators, parts

    def forward(self, *args: Any) -> Any:
        with self.operators.within("forward"):
            return self.parts(*args)
