"""A loss at label resolution of logits at the network's stride, without keeping the enlarged logits."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.data import IGNORE
from common.losses.cross_entropy import cross_entropy_sum
from common.ops.resize import size_of
from common.ops.upsampled_loss import fuses, upsampled_loss

Total = Callable[[Tensor, Tensor], Tensor]


def upsampled_cross_entropy(logits: Tensor, label: Tensor, *, align_corners: bool) -> Tensor:
    """Mean cross-entropy over labelled pixels of logits (B, K, h, w) enlarged to the label; 0 without any."""
    total = upsampled_cross_entropy_sum(logits, label, align_corners=align_corners)
    return total / (label != IGNORE).sum().clamp(min=1)


def upsampled_cross_entropy_sum(
    logits: Tensor, label: Tensor, *, align_corners: bool
) -> Tensor:
    """The same summed, fused or one image at a time."""
    if fuses(logits, size_of(label), align_corners):
        return upsampled_loss(logits, label, align_corners=align_corners)
    return upsampled_sum(logits, label, cross_entropy_sum, align_corners=align_corners)


def upsampled_sum(
    logits: Tensor, label: Tensor, total: Total, *, align_corners: bool
) -> Tensor:
    """Sum over images of total(ẑ, y), ẑ the logits resized bilinearly to the label.

    logits: (B, K, h, w); label: integers (B, H, W); total: a scalar of one image's logits (1, K, H, W), float32, and
    label (1, H, W), such as `PixelLoss.total`. Equal to resizing the batch, but one image is enlarged at a time and its
    gradient at the logits' own size is all that is kept: with many classes the enlarged logits, their softmax and both
    gradients are most of what a training step holds. Not differentiable twice.
    """
    return _Sum.apply(logits, label, align_corners, total)


class _Sum(torch.autograd.Function):
    """Sum over images. The gradient is made in the forward pass, while an image's logits are there."""

    @staticmethod
    def forward(ctx, logits, label, align_corners, total):
        wanted = ctx.needs_input_grad[0]
        result = logits.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(logits, dtype=torch.float32) if wanted else None
        label = label.long()  # once, and not for each image

        with torch.autocast(logits.device.type, enabled=False):
            for i in range(len(logits)):
                with torch.set_grad_enabled(wanted):
                    z = logits[i : i + 1].detach().float().requires_grad_(wanted)
                    large = F.interpolate(
                        z, label.shape[-2:], mode="bilinear", align_corners=align_corners
                    )
                    loss = total(large, label[i : i + 1])

                if gradient is not None:
                    gradient[i : i + 1] = torch.autograd.grad(loss, z)[0]

                result += loss.detach()

        ctx.save_for_backward(gradient)
        ctx.kind = logits.dtype

        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.kind), None, None, None
