"""Cross-entropy at label resolution of logits at the network's stride, without keeping the enlarged logits."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.data import IGNORE


def upsampled_cross_entropy(
    logits: Tensor, label: Tensor, *, align_corners: bool, perturb: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean of −log softmax(ẑ)_y over labelled pixels, ẑ the logits resized bilinearly to the label; 0 without any.

    logits: (B, K, h, w); label: integers (B, H, W), −1 where ignored; perturb: changes ẑ (1, K, H, W) of one image
    first, e.g. `BLVLoss.perturb`. Equal to resizing and `pixel_cross_entropy`, but one image is enlarged at a time and
    its gradient at the logits' own size is all that is kept: with many classes the enlarged logits, their softmax and
    both gradients are most of what a training step holds. Computed in float32; not differentiable twice.
    """
    total = _Sum.apply(logits, label, align_corners, perturb)
    return total / (label != IGNORE).sum().clamp(min=1)


class _Sum(torch.autograd.Function):
    """Sum over pixels. The gradient is made in the forward pass, while an image's logits are there."""

    @staticmethod
    def forward(ctx, logits, label, align_corners, perturb):
        wanted = ctx.needs_input_grad[0]
        total = logits.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(logits, dtype=torch.float32) if wanted else None
        with torch.autocast(logits.device.type, enabled=False):
            for i in range(len(logits)):
                with torch.set_grad_enabled(wanted):
                    z = logits[i : i + 1].detach().float().requires_grad_(wanted)
                    large = F.interpolate(z, label.shape[-2:], mode="bilinear", align_corners=align_corners)
                    large = large if perturb is None else perturb(large)
                    target = label[i : i + 1].long()
                    loss = F.cross_entropy(large, target, ignore_index=IGNORE, reduction="sum")
                if wanted:
                    gradient[i : i + 1] = torch.autograd.grad(loss, z)[0]
                total += loss.detach()
        ctx.save_for_backward(gradient)
        ctx.kind = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.kind), None, None, None
