"""Multi-scale deformable attention (Deformable DETR, eq. 3): each query sums a few bilinear samples of a pyramid.

    out[b,q,m] = Σ_l Σ_p A[b,q,m,l,p] · V_l[b,m] (loc[b,q,m,l,p])

A location (x, y) is in [0, 1]² of the level; pixel centres are at (i + ½) / size, and what lies outside the map is 0,
as in `grid_sample(…, padding_mode="zeros", align_corners=False)`. Three forms give the same numbers:

grid_sample     the definition, in differentiable torch; any device, any transform.
embedding_bag   one weighted row sum over corners × points (deform_attn_bags.py), on the CPU several times faster than
                `grid_sample` at a fraction of its memory. Deterministic on every device.
triton          one fused kernel each way (deform_attn_triton.py); keeps only its inputs for the backward.

`ms_deform_attn` chooses once per device and logs what it chose; without Triton it warns that CUDA is slow.
"""

import logging
import os
import shutil
import sysconfig
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.lazy import constant_result
from common.ops.deform_attn_bags import EmbeddingBagForm, Shapes, in_full

Form = Literal["grid_sample", "embedding_bag", "triton"]
log = logging.getLogger(__name__)


def ms_deform_attn(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, form: Form | None = None
) -> Tensor:
    """Weighted sum of the sampled values.

    Args:
        value: (B, S, M, D): the levels' pixels in row order, one level after the other, M heads of D channels.
        shapes: (H, W) of each of the L levels; Σ H·W = S.
        locations: (B, Q, M, L, P, 2), (x, y) in units of the level's width and height.
        weights: (B, Q, M, L, P).
        form: which implementation; None chooses by device.

    Returns (B, Q, M·D) in the dtype of `value`; the sums are in float32 for half-precision values. ValueError where the
    shapes do not fit together.
    """
    shapes = tuple((int(h), int(w)) for h, w in shapes)
    _check(value, shapes, locations, weights)
    form = form or choose_form(value.device.type, torch.are_deterministic_algorithms_enabled())
    if form == "grid_sample":
        return grid_sample_form(value, shapes, locations, weights)
    if form == "triton" and not torch.compiler.is_compiling():
        return _Kernels.apply(value, shapes, locations, weights)

    sizes = [side for shape in shapes for side in shape]
    return _fused(value, sizes, locations, weights, form)


@constant_result
def choose_form(device: str, deterministic: bool = False) -> Form:
    """The form for a device type; what is chosen is logged once."""
    return _choose(device, deterministic)


@lru_cache
def _choose(device: str, deterministic: bool) -> Form:
    if device == "cpu" or (device == "cuda" and deterministic):
        form, why = "embedding_bag", "fastest on CPUs, deterministic on all devices"
    elif device == "cuda":
        if missing := triton_missing():
            warnings.warn(
                f"deformable attention on cuda: grid_sample, slow and large ({missing})",
                stacklevel=2,
            )
            return "grid_sample"
        form, why = "triton", "fused kernel"
    else:
        form, why = "grid_sample", "any device"
    log.info("deformable attention on %s: %s (%s)", device, form, why)
    return form


def triton_missing() -> str | None:
    """Why the Triton kernel cannot run, or None: it needs Triton and, for its launcher at run time, a C compiler and
    Python's headers."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler (gcc, clang or $CC)"

    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's, for which Triton takes the system's
        scheme = "posix_prefix"
    headers = Path(sysconfig.get_paths(scheme)["include"])
    if not (headers / "Python.h").is_file():
        return f"Triton finds no Python.h in {headers} (Debian: python3-dev)"
    return None


def _check(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    positions = sum(h * w for h, w in shapes)
    if positions != value.shape[1]:
        raise ValueError(
            f"value has {value.shape[1]} positions, the levels {shapes} have {positions}"
        )
    expected = (
        value.shape[0],
        locations.shape[1],
        value.shape[2],
        len(shapes),
        locations.shape[4],
    )
    if locations.shape != (*expected, 2) or weights.shape != expected:
        raise ValueError(
            f"locations {tuple(locations.shape)} and weights {tuple(weights.shape)} do not fit value "
            f"{tuple(value.shape)} with {len(shapes)} levels: (B, Q, M, L, P, 2) and (B, Q, M, L, P) are expected"
        )


def grid_sample_form(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """The definition, level by level; arguments and result as in `ms_deform_attn`."""
    batch, _, heads, channels = value.shape
    queries, kind = locations.shape[1], value.dtype
    value = in_full(value)
    locations, weights = locations.to(value.dtype), weights.to(value.dtype)
    total, start = 0, 0
    for level, (h, w) in enumerate(shapes):
        pixels = (
            value[:, start : start + h * w]
            .permute(0, 2, 3, 1)
            .reshape(batch * heads, channels, h, w)
        )
        grid = (
            (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        )  # (B·M, Q, P, 2)
        # (B·M, D, Q, P)
        samples = F.grid_sample(pixels, grid, padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, -1)
        total = total + (samples * weight).sum(-1)
        start += h * w
    return total.view(batch, heads * channels, queries).transpose(1, 2).to(kind)


# The two fused forms are opaque operators with a hand-written backward: torch.compile takes them as they are, and only
# value, locations and weights stay alive until the backward.


@torch.library.custom_op("longtail::ms_deform_attn", mutates_args=())
def _fused(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, form: str
) -> Tensor:
    value, locations, weights = (t.contiguous() for t in (value, locations, weights))
    return _implementation(form).forward(value, _pairs(sizes), locations, weights)


@torch.library.custom_op("longtail::ms_deform_attn_backward", mutates_args=())
def _fused_backward(
    gradient: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, value, locations, weights = (
        t.contiguous() for t in (gradient, value, locations, weights)
    )
    return _implementation(form).backward(gradient, value, _pairs(sizes), locations, weights)


@_fused.register_fake
def _(value, sizes, locations, weights, form):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@_fused_backward.register_fake
def _(gradient, value, sizes, locations, weights, form):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (value, locations, weights)
    )


def _save(ctx, inputs, output):
    value, ctx.sizes, locations, weights, ctx.form = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx, gradient):
    value, locations, weights = ctx.saved_tensors
    grads = _fused_backward(gradient, value, ctx.sizes, locations, weights, ctx.form)
    return grads[0], None, grads[1], grads[2], None


_fused.register_autograd(_differentiate, setup_context=_save)


class _Kernels(torch.autograd.Function):
    """The triton form where nothing is traced: at small sizes an operator of `torch.library` keeps the host busy for
    longer than its kernels run."""

    @staticmethod
    def forward(ctx, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor):
        tensors = value.contiguous(), locations.contiguous(), weights.contiguous()
        ctx.save_for_backward(*tensors)
        ctx.shapes = shapes
        value, locations, weights = tensors
        return _implementation("triton").forward(value, shapes, locations, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        value, locations, weights = ctx.saved_tensors
        of_value, of_locations, of_weights = _implementation("triton").backward(
            gradient.contiguous(), value, ctx.shapes, locations, weights
        )
        return of_value, None, of_locations, of_weights


def _pairs(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(sizes[::2], sizes[1::2], strict=True))


def _implementation(form: str):
    if form == "embedding_bag":
        return EmbeddingBagForm
    if form == "triton":
        from common.ops import deform_attn_triton  # imported on first use: Triton is optional

        return deform_attn_triton
    raise ValueError(
        f"deformable attention has no form {form!r}: use grid_sample, embedding_bag or triton"
    )
