"""Masks of random blocks, by which MIC (Hoyer et al., CVPR 2023) hides most of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor


def block_noise(images: Tensor, block: int) -> Tensor:
    """U(0, 1) for each block of images (B, C, H, W): (B, 1, h, w), h and w at least 1."""
    height, width = (max(round(side / block), 1) for side in images.shape[-2:])
    return torch.rand(len(images), 1, height, width, device=images.device)


def block_mask(noise: Tensor, size: tuple[int, int], ratio: float) -> Tensor:
    """What stays visible: noise (B, 1, h, w) above `ratio`, as blocks of an image of `size`; bool (B, 1, H, W)."""
    visible = (noise > ratio).float()
    return F.interpolate(visible, tuple(size), mode="nearest").bool()
