"""What would take seconds to import, for those who use it: a program that needs none of it starts in half the time."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class Lazy:
    """A module by its name: `timm = Lazy("timm")` in place of `import timm`, which then is done by its first use."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


def constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result` without importing the compiler, as that does, to set one attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
