"""Tensors that are functions of sizes alone, such as positions: made once, so that no step starts kernels for them."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
LAST = 8  # results: those of two sizes of images, where a network has three or four levels


def kept(make: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """`make`, whose last few results are kept, so nobody may write into them; its arguments have to be hashable.

    A graph that is traced makes its own: there sizes may be symbols, and tensors have no values. Kept ones are made
    outside inference mode, in which no tensor could take part in training later.
    """

    @lru_cache(maxsize=LAST)
    def remembered(*arguments: Arguments.args, **options: Arguments.kwargs) -> Tensor:
        with torch.inference_mode(False):
            return make(*arguments, **options)

    @wraps(make)
    def call(*arguments: Arguments.args, **options: Arguments.kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*arguments, **options)
        return remembered(*arguments, **options)

    return call
