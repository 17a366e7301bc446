"""Cross-entropy at label size of logits at a network's stride, as one fused operation each way.

    ẑ = bilinear enlargement of z,   z'_k = ẑ_k + v_k · e_k,   L = Σ_pixels ω · w_y · (ln Σ_k exp z'_k − z'_y)

with v an offset for each class, e 1 or a draw for each image, pixel and class, w a weight for each class and ω one for
each pixel. No map of K channels at label size is ever made. Two forms give the same numbers:

torch    the definition, differentiable, at full size; any device.
triton   one kernel each way (upsampled_loss_triton.py), which keeps its inputs and ln Σ exp z' of each pixel. CUDA.

Noise is a function of seed and place (counter_noise.py): the backward draws again what the forward drew.

`upsampled_labels` is the same without a loss: classes and their probabilities.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import IGNORE
from common.distributed import to_device
from common.lazy import constant_result
from common.ops.counter_noise import Noise, draws, new_seed
from common.ops.deform_attn import triton_missing
from common.ops.resize import Size, size_of, taps

Form = Literal["torch", "triton"]
log = logging.getLogger(__name__)


class Change(NamedTuple):
    """What is added to logits: vector (K,), times a draw where there is noise."""

    vector: Tensor
    noise: Noise | None = None


def upsampled_loss(
    logits: Tensor,
    label: Tensor,
    *,
    align_corners: bool,
    change: Change | None = None,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    seed: Tensor | None = None,
    form: Form | None = None,
) -> Tensor:
    """Sum over pixels of the cross-entropy of enlarged logits, a float32 scalar; differentiable once, in the logits.

    Args:
        logits: (B, K, h, w) at the network's stride, any floating type and memory format; sums are in float32.
        label: (B, H, W), integers, −1 where ignored. Any other number that is no class makes the loss NaN.
        change: of the enlarged logits.
        class_weight: (K,). pixel_weight: (B, H, W), a constant.
        seed: int64 (1,) on the device of the logits, of the noise; drawn from torch's generator if it is None.
        form: which implementation; None chooses by device.

    ValueError where the shapes do not fit together.
    """
    _check(logits, label, change, class_weight, pixel_weight)
    noise = None if change is None else change.noise
    if noise is not None and seed is None:
        seed = new_seed(logits.device)

    if form is None:
        form = "triton" if fuses(logits, size_of(label), align_corners) else "torch"
    if form == "torch":
        return definition(
            logits, label, align_corners, change, class_weight, pixel_weight, seed
        )

    total, _ = _fused(
        logits,
        label,
        None if change is None else change.vector,
        class_weight,
        pixel_weight,
        None if noise is None else seed,
        align_corners,
        *_plain(noise),
    )
    return total


@torch.no_grad()
def upsampled_labels(
    logits: Tensor,
    size: Size,
    *,
    align_corners: bool,
    shown: Size | None = None,
    form: Form | None = None,
) -> tuple[Tensor, Tensor]:
    """Argmax int64 and its softmax float32, both (B, H, W), of logits (B, K, h, w) enlarged to `size`.

    shown: height and width of the upper left part that is returned; all by default.
    """
    height, width = shown or size
    if (form or choose_form(logits)) == "triton":
        return _fused_labels(logits, list(size), [height, width], align_corners)

    large = F.interpolate(_float(logits), size, mode="bilinear", align_corners=align_corners)
    confidence, label = large[..., :height, :width].softmax(1).max(1)

    return label, confidence


def choose_form(logits: Tensor) -> Form:
    """The form for logits; what is chosen on CUDA is logged, or warned of, once.

    The kernels sum in float32, and count in 32 bits within an image.
    """
    if logits.device.type != "cuda" or logits.dtype == torch.float64:
        return "torch"
    return _choose_on_cuda() if math.prod(logits.shape[1:]) < 2**31 else "torch"


@constant_result
def _choose_on_cuda() -> Form:
    return _chosen_on_cuda()


@lru_cache
def _chosen_on_cuda() -> Form:
    missing = triton_missing()
    if missing is None:
        log.info("losses and labels at full size on cuda: fused kernels")
        return "triton"

    warnings.warn(
        f"losses and labels at full size on cuda: slow and large ({missing})", stacklevel=2
    )
    return "torch"


def fuses(logits: Tensor, size: Size, align_corners: bool) -> bool:
    """Whether `upsampled_loss` is fused for these logits and a label of this size.

    A program of the backward has to hold all columns that one column of the logits contributes to.
    """
    if choose_form(logits) == "torch":
        return False
    return tile_of(logits.shape[-1], size[1], align_corners) is not None


def _check(
    logits: Tensor,
    label: Tensor,
    change: Change | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
) -> None:
    if logits.ndim != 4 or label.ndim != 3 or len(logits) != len(label):
        raise ValueError(
            f"logits {tuple(logits.shape)} and label {tuple(label.shape)}: (B, K, h, w) and (B, H, W) are expected"
        )

    vector = None if change is None else change.vector
    for name, given in (("change", vector), ("class_weight", class_weight)):
        if given is not None and given.shape != logits.shape[1:2]:
            raise ValueError(f"{name} {tuple(given.shape)}: one number a class is expected")

    if pixel_weight is not None and pixel_weight.shape != label.shape:
        raise ValueError(
            f"pixel_weight {tuple(pixel_weight.shape)} does not fit the label {tuple(label.shape)}"
        )


# The definition -----------------------------------------------------------------------------------------------------


def definition(
    logits: Tensor,
    label: Tensor,
    align_corners: bool,
    change: Change | None = None,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The loss, step by step at full size; arguments and result as in `upsampled_loss`."""
    size = size_of(label)
    z = F.interpolate(_float(logits), size, mode="bilinear", align_corners=align_corners)

    if change is not None:
        offset = change.vector.to(z.dtype).view(1, -1, 1, 1)
        if change.noise is not None:
            if seed is None:
                raise ValueError("noise needs a seed")
            offset = offset * draws(change.noise, seed, z.shape).to(z.dtype)
        z = z + offset

    label = label.long()
    loss = F.cross_entropy(z, label, ignore_index=IGNORE, reduction="none")

    if class_weight is not None:
        loss = loss * class_weight.to(z.dtype)[label.clamp(min=0)]
    if pixel_weight is not None:
        loss = loss * pixel_weight

    return loss.sum()


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# The fused form is an opaque operator with a hand-written backward: torch.compile takes it as it is ------------------


@torch.library.custom_op("longtail::upsampled_loss", mutates_args=())
def _fused(
    logits: Tensor,
    label: Tensor,
    vector: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    seed: Tensor | None,
    align_corners: bool,
    law: str,
    limit: str,
    scale: float,
    shift: float,
) -> tuple[Tensor, Tensor]:
    """The loss, and ln Σ exp z' (B, H, W)."""
    from common.ops import upsampled_loss_triton  # imported on first use: Triton is optional

    pixels = upsampled_loss_triton.Pixels.of(label, vector, class_weight, pixel_weight, seed)
    noise = Noise(law, limit, scale, shift)  # type: ignore[arg-type]
    return upsampled_loss_triton.forward(logits, pixels, noise, align_corners)


@torch.library.custom_op("longtail::upsampled_loss_backward", mutates_args=())
def _fused_backward(
    gradient: Tensor,
    log_sum: Tensor,
    logits: Tensor,
    label: Tensor,
    vector: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    seed: Tensor | None,
    align_corners: bool,
    law: str,
    limit: str,
    scale: float,
    shift: float,
) -> Tensor:
    from common.ops import upsampled_loss_triton

    pixels = upsampled_loss_triton.Pixels.of(label, vector, class_weight, pixel_weight, seed)
    noise = Noise(law, limit, scale, shift)  # type: ignore[arg-type]
    return upsampled_loss_triton.backward(
        gradient, log_sum, logits, pixels, noise, align_corners
    )


@torch.library.custom_op("longtail::upsampled_labels", mutates_args=())
def _fused_labels(
    logits: Tensor, size: Sequence[int], shown: Sequence[int], align_corners: bool
) -> tuple[Tensor, Tensor]:
    from common.ops import upsampled_loss_triton

    height, width = size
    return upsampled_loss_triton.labels(logits, (height, width), tuple(shown), align_corners)


@_fused.register_fake
def _(logits, label, *others):
    full = torch.float32
    return logits.new_empty((), dtype=full), logits.new_empty(label.shape, dtype=full)


@_fused_backward.register_fake
def _(gradient, log_sum, logits, *others):
    return torch.empty_like(logits)


@_fused_labels.register_fake
def _(logits, size, shown, align_corners):
    shape = (len(logits), *shown)
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.float32),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.align_corners, ctx.law, ctx.limit, ctx.scale, ctx.shift = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, gradient, _):
    options = (ctx.align_corners, ctx.law, ctx.limit, ctx.scale, ctx.shift)
    return _fused_backward(gradient, *ctx.saved_tensors, *options), *[None] * 10


def _refuse(ctx, gradient):
    raise RuntimeError("the fused loss at label size can be differentiated once only")


_fused.register_autograd(_differentiate, setup_context=_save)
_fused_backward.register_autograd(_refuse)


def _plain(noise: Noise | None) -> tuple[str, str, float, float]:
    return ("", "", 0.0, 0.0) if noise is None else (*noise[:2], *map(float, noise[2:]))


# Sizes --------------------------------------------------------------------------------------------------------------

TILES = (128, 256, 512)  # columns of the label that a program of the backward works on
CELLS = 32  # columns of the logits that it gives the gradient of, at most


class Axis(NamedTuple):
    """How an axis of n source cells is enlarged to N pixels.

    low: (N,) int32, the first of the two cells that a pixel is made of. share: (N,) float32, the weight of the second;
    0 where there is none. start: (n + 1,) int32, the first pixel whose first cell is at least i.
    """

    low: Tensor
    share: Tensor
    start: Tensor

    def to(self, device: torch.device) -> "Axis":
        return Axis(*(to_device(t, device) for t in self))


@lru_cache(maxsize=64)
def axis(cells: int, pixels: int, align_corners: bool, device: torch.device) -> Axis:
    """Kept per size and device, so that no step waits for a copy from the host."""
    if device.type != "cpu":
        return axis(cells, pixels, align_corners, torch.device("cpu")).to(device)

    like = torch.empty(0, dtype=torch.float32)
    low, _, share = taps(cells, pixels, (0, pixels), align_corners, like)
    start = torch.searchsorted(low, torch.arange(cells + 1))

    return Axis(low.int(), share.flatten(), start.int())


@constant_result
def tile_of(cells: int, pixels: int, align_corners: bool) -> tuple[int, int] | None:
    """Columns of the label and of the logits that a program of the backward takes: the first of TILES into which all
    pixels fit that the cells contribute to, from a multiple of 4 on. None where none is large enough."""
    return _tile_of(cells, pixels, align_corners)


@lru_cache(maxsize=256)
def _tile_of(cells: int, pixels: int, align_corners: bool) -> tuple[int, int] | None:
    start = axis(cells, pixels, align_corners, torch.device("cpu")).start.long()

    for tile in TILES:
        # with fewer cells, most of their pixels are worked on twice
        least = 1 if tile == TILES[-1] else min(4, cells)
        for width in range(min(CELLS, cells), least - 1, -1):
            first = torch.arange(0, cells, width)
            begin = start[(first - 1).clamp(min=0)] // 4 * 4
            end = start[(first + width).clamp(max=cells)]
            if int((end - begin).max()) <= tile:
                return tile, width

    return None
