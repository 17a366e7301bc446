"""Classes of pixels of a query network (MaskFormer, NeurIPS 2021) as one fused operation, at the size of the image.

    s_k = Σ_q p_kq · m̂_q,   m̂_q = R(C(σ(R(m_q)))),   label argmax_k s_k,   confidence max_k s_k / Σ_k s_k

with m a mask's logits at the network's stride, p the probability of each class for a query, R a bilinear enlargement
and C a crop: masks are enlarged to the network's input, the padding is cut away, and where the image has another size
the probabilities are resized again. Two forms give the same numbers:

torch    the definition, with masks and scores at full size; any device.
triton   one kernel (query_labels_triton.py), which makes a tile of both and forgets it. CUDA.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from common.ops.resize import Size, resize
from common.ops.upsampled_loss import choose_form

Form = Literal["torch", "triton"]


@torch.no_grad()
def query_labels(
    probability: Tensor,
    masks: Tensor,
    padded: Size,
    inner: Size,
    size: Size,
    *,
    form: Form | None = None,
) -> tuple[Tensor, Tensor]:
    """Label int64 and confidence float32, both (B, H, W).

    Args:
        probability: (B, K, Q), not negative.
        masks: logits (B, Q, h, w), any floating type; sums are in float32.
        padded: of the network's input. inner: of its upper left part that shows the image. size: (H, W), the image's.
        form: which implementation; None chooses by device.

    ValueError where the shapes do not fit together.
    """
    batch, queries = masks.shape[:2]
    if probability.ndim != 3 or (len(probability), probability.shape[2]) != (batch, queries):
        raise ValueError(
            f"probability {tuple(probability.shape)} and masks {tuple(masks.shape)}: (B, K, Q) and (B, Q, h, w) are "
            "expected"
        )
    if inner[0] > padded[0] or inner[1] > padded[1]:
        raise ValueError(f"inner {tuple(inner)} is larger than padded {tuple(padded)}")

    if (form or choose_form(masks)) == "triton":
        return _fused(probability, masks, list(padded), list(inner), list(size))

    return definition(probability, masks, padded, inner, size)


def definition(
    probability: Tensor, masks: Tensor, padded: Size, inner: Size, size: Size
) -> tuple[Tensor, Tensor]:
    """The same, step by step at full size."""
    full = masks.dtype if masks.dtype == torch.float64 else torch.float32
    shown = resize(masks.to(full), padded)[..., : inner[0], : inner[1]].sigmoid()
    scores = torch.einsum("bkq,bqhw->bkhw", probability.to(full), resize(shown, size))
    best, label = scores.max(1)

    return label, best / scores.sum(1).clamp(min=torch.finfo(torch.float32).tiny)


@torch.library.custom_op("longtail::query_labels", mutates_args=())
def _fused(
    probability: Tensor,
    masks: Tensor,
    padded: Sequence[int],
    inner: Sequence[int],
    size: Sequence[int],
) -> tuple[Tensor, Tensor]:
    from common.ops import query_labels_triton  # imported on first use: Triton is optional

    (a, b), (c, d), (e, f) = padded, inner, size
    return query_labels_triton.labels(probability, masks, (a, b), (c, d), (e, f))


@_fused.register_fake
def _(probability, masks, padded, inner, size):
    shape = (len(masks), *size)
    return (
        masks.new_empty(shape, dtype=torch.int64),
        masks.new_empty(shape, dtype=torch.float32),
    )
