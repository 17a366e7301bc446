"""Swin Transformer (Liu et al., ICCV 2021), Swin-T: attention in 7×7 windows, shifted in every second block.

Parameters are named as in timm, so its ImageNet weights load directly. The modules are our own because timm shifts
before it pads and drops the shift on maps no larger than a window; the segmentation networks pad first and always
partition, which differs on every map whose sides are no multiples of the window.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.config import ConfigError
from common.config.bounds import Depth, Rate, Width
from common.lazy import Lazy

timm = Lazy("timm")


def drop_path_rates(depths: Sequence[int], last: float) -> list[list[float]]:
    """Stochastic-depth rate of every block, stage by stage: block i of all L blocks has last · i / (L − 1)."""
    total = sum(depths) - 1
    return [
        [last * (sum(depths[:stage]) + i) / total for i in range(n)]
        for stage, n in enumerate(depths)
    ]


def to_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) → (B, windows, window², C), windows in row order; H and W are multiples of `window`."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q) c", p=window, q=window)


def from_windows(x: Tensor, window: int, height: int) -> Tensor:
    """(B, windows, window², C) → (B, H, W, C)."""
    return rearrange(x, "b (h w) (p q) c -> b (h p) (w q) c", h=height // window, p=window)


def relative_index(window: int) -> Tensor:
    """(window², window²) row of the bias table for each pair of positions: offset in y times (2·window − 1) plus x."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y = y.flatten()
    x = x.flatten()
    return (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)


def shift_mask(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """(windows, 1, window², window²): −100 between positions that the cyclic shift made neighbours, else 0."""

    def bands(length: int) -> Tensor:
        position = torch.arange(length, device=like.device)
        last_window = position >= length - window
        wrapped = position >= length - shift
        return last_window.long() + wrapped.long()

    region = 3 * bands(height)[:, None] + bands(width)
    windows = to_windows(region[None, :, :, None], window)[0, :, :, 0]
    here = windows[:, None, :, None]
    there = windows[:, None, None, :]

    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return zero.masked_fill(here != there, -100.0)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows with a learned bias for every relative position."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window - 1) ** 2, heads)
        )
        self.register_buffer(
            "relative_position_index", relative_index(window), persistent=False
        )
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, windows, N, C); mask (windows, 1, N, N) is added to the attention logits."""
        q, k, v = rearrange(
            self.qkv(x), "b w n (three h d) -> three b w h n d", three=3, h=self.heads
        )
        attention = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        attention.add_(
            self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        )
        if mask is not None:
            attention.add_(mask)  # in place: this is the largest tensor of the network

        return self.proj(rearrange(attention.softmax(-1) @ v, "b w h n d -> b w n (h d)"))


class Block(nn.Module):
    """x + attention(LN x) in windows, then x + MLP(LN x), on (B, H, W, C)."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, drop_path: float):
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, 4 * dim)
        self.drop_path = timm.layers.DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.drop_path(self._attention(self.norm1(x), mask if self.shift else None))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Pad bottom and right to whole windows, shift, attend, undo. Padded positions take part, as zeros."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))

        padded = x.shape[1]
        x = from_windows(self.attn(to_windows(x, self.window), mask), self.window, padded)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))

        return x[:, :height, :width]


class PatchMerging(nn.Module):
    """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C): four neighbours joined, LN, linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Patch merging (not in the first stage), then blocks of which every second one is shifted."""

    def __init__(self, dim: int, heads: int, rates: list[float], merge: bool, window: int = 7):
        super().__init__()
        self.window = window
        self.shift = window // 2
        self.downsample = PatchMerging(dim // 2) if merge else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(dim, heads, window, self.shift * (i % 2), rate)
            for i, rate in enumerate(rates)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        height, width = (side + -side % self.window for side in x.shape[1:3])
        mask = shift_mask(height, width, self.window, self.shift, like=x)

        for block in self.blocks:
            x = block(x, mask)

        return x


class PatchEmbed(nn.Module):
    """4×4 patches, LN; (B, 3, H, W), padded to a multiple of 4 → (B, ⌈H/4⌉, ⌈W/4⌉, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """Images (B, 3, H, W), normalised → four maps of `channels` at strides 4, 8, 16, 32, each through its own LN.

    `drop_path` is the rate of the last block; it rises linearly from 0 over all blocks.
    """

    family = "swin"

    def __init__(
        self,
        *,
        dim: Width = 96,
        depths: tuple[Depth, Depth, Depth, Depth] = (2, 2, 6, 2),
        heads: tuple[Depth, Depth, Depth, Depth] = (3, 6, 12, 24),
        window: Depth = 7,
        drop_path: Rate = 0.3,
    ):
        super().__init__()
        self.channels = tuple(dim * 2**i for i in range(len(depths)))

        for width, number in zip(self.channels, heads, strict=True):
            if width % number:
                raise ConfigError(
                    f"model.options.backbone.heads: {number} heads do not divide {width} channels"
                )

        self.patch_embed = PatchEmbed(dim)
        rates = drop_path_rates(depths, drop_path)
        self.layers = nn.ModuleList(
            Stage(c, h, r, merge=i > 0, window=window)
            for i, (c, h, r) in enumerate(zip(self.channels, heads, rates, strict=True))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        self._init_weights()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed(x)
        maps = []

        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer(x)
            maps.append(norm(x).permute(0, 3, 1, 2).contiguous())

        return maps

    def _init_weights(self) -> None:
        """Linears truncated normal 0.02 with zero bias, LN 1/0, bias tables 0; the patch conv keeps torch's default."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.zeros_(module.relative_position_bias_table)
