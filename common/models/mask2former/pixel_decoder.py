"""Pixel decoder of Mask2Former (CVPR 2022): six layers of multi-scale deformable attention, then one FPN step.

res5, res4 and res3 become tokens of one sequence, coarse to fine; every token attends to four points a level around its
own place. The finest of the three results is joined with res2 to the per-pixel features that the queries are compared
with. All of it runs in float32, also under autocast: bfloat16 cannot hold sub-pixel locations.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.ops.deform_attn import ms_deform_attn
from common.ops.kept import kept
from common.ops.resize import resize

GROUPS = 32  # of every group norm


class PixelFeatures(NamedTuple):
    """What the transformer decoder reads."""

    mask_features: Tensor  # (B, d, H/4, W/4)
    levels: list[Tensor]  # (B, h·w, d) at strides 32, 16, 8
    shapes: tuple[tuple[int, int], ...]  # (h, w) of each level


@kept
def sine_position(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """(H·W, dim) sine embedding of pixel positions: dim/2 features of y, then dim/2 of x, sine and cosine in turn.

    Feature k of row i is sin or cos of 2π(i + 1) / (H + 1e-6) / 10000^(2⌊k/2⌋ / (dim/2)).
    """
    half = dim // 2
    frequency = 10000 ** (2 * (torch.arange(half, device=device) // 2) / half)

    def axis(length: int) -> Tensor:
        place = (
            torch.arange(1, length + 1, dtype=torch.float32, device=device)
            / (length + 1e-6)
            * (2 * math.pi)
        )
        angle = place[:, None] / frequency
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1)

    y = axis(height)[:, None].expand(height, width, half)
    x = axis(width)[None].expand(height, width, half)

    return torch.cat([y, x], 2).flatten(0, 1)


@kept
def pixel_centres(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(Σ h·w, 2) centres (x, y) in [0, 1]² of the pixels of all levels."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        centres.append(torch.cartesian_prod(y, x).flip(1))

    return torch.cat(centres)


class DeformableAttention(nn.Module):
    """Every query samples `points` places a head and level around its centre (Deformable DETR, section 4.1)."""

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads = heads
        self.levels = levels
        self.points = points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Head m looks in direction 2πm / heads, its p-th point p pixels away; all samples weigh the same."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], 1)
        direction = direction / direction.abs().amax(1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * steps[:, None]  # (heads, 1, points, 2)

        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())

        for zero in (
            self.sampling_offsets.weight,
            self.attention_weights.weight,
            self.attention_weights.bias,
        ):
            nn.init.zeros_(zero)

        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        tokens: Tensor,
        centres: Tensor,
        shapes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """query and tokens (B, S, d), centres (S, 2) → (B, S, d)."""
        batch, count, _ = tokens.shape
        value = self.value_proj(tokens).view(batch, count, self.heads, -1)
        offsets = self.sampling_offsets(query).view(
            batch, count, self.heads, self.levels, self.points, 2
        )
        weights = self.attention_weights(query).view(batch, count, self.heads, -1).softmax(-1)
        scale = _reciprocal_sizes(shapes, centres.device)
        # offsets are in pixels of the level
        locations = torch.addcmul(centres.view(count, 1, 1, 1, 2), offsets, scale)

        return self.output_proj(
            ms_deform_attn(value, shapes, locations, weights.view(offsets.shape[:-1]))
        )


@kept
def _reciprocal_sizes(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(L, 1, 2) of 1 / W, 1 / H, filled on the device so that nothing waits for the host."""
    sizes = [
        torch.full((1,), 1 / side, device=device)
        for height, width in shapes
        for side in (width, height)
    ]
    return torch.cat(sizes).view(len(shapes), 1, 2)


class EncoderLayer(nn.Module):
    """Deformable self-attention and a two-layer perceptron, each added and then normalised."""

    def __init__(self, dim: int, hidden: int, heads: int, levels: int, points: int):
        super().__init__()
        self.self_attn = DeformableAttention(dim, heads, levels, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self, x: Tensor, position: Tensor, centres: Tensor, shapes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        x = self.norm1(x + self.self_attn(x + position, x, centres, shapes))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class ConvNorm(nn.Module):
    """Convolution without bias and group norm."""

    def __init__(self, channels: int, out: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(GROUPS, out)
        nn.init.kaiming_uniform_(self.conv.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class PixelDecoder(nn.Module):
    """Backbone maps (res2 … res5) → PixelFeatures.

    Args:
        channels: widths of the four backbone maps.
        dim: width d of everything here, a multiple of 32.
        layers, hidden, heads, points: of the deformable encoder.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dim: int = 256,
        *,
        layers=6,
        hidden=1024,
        heads=8,
        points=4,
    ):
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, dim, 1), nn.GroupNorm(GROUPS, dim))
            for c in reversed(channels[1:])
        )
        levels = len(self.input_proj)
        self.level_embed = nn.Parameter(torch.empty(levels, dim))
        self.layers = nn.ModuleList(
            EncoderLayer(dim, hidden, heads, levels, points) for _ in range(layers)
        )
        self.lateral = ConvNorm(channels[0], dim, 1)
        self.output = ConvNorm(dim, dim, 3)
        self.mask_features = nn.Conv2d(dim, dim, 1)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.normal_(self.level_embed)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)

        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

        for layer in self.layers[1:]:  # the layers start with the same perceptron biases
            layer.linear1.bias.data.copy_(self.layers[0].linear1.bias.data)
            layer.linear2.bias.data.copy_(self.layers[0].linear2.bias.data)

    def forward(self, maps: Sequence[Tensor]) -> PixelFeatures:
        device = maps[0].device.type
        # the meta device knows no autocast
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            return self._decode([m.float() for m in maps])

    def _decode(self, maps: Sequence[Tensor]) -> PixelFeatures:
        projected = [
            project(m) for project, m in zip(self.input_proj, reversed(maps[1:]), strict=True)
        ]
        shapes = tuple((m.shape[-2], m.shape[-1]) for m in projected)
        device = projected[0].device
        dim = projected[0].shape[1]
        position = torch.cat(
            [
                sine_position(*shape, dim, device) + level
                for shape, level in zip(shapes, self.level_embed, strict=True)
            ]
        )
        centres = pixel_centres(shapes, device)
        x = torch.cat([m.flatten(2) for m in projected], 2).transpose(1, 2)

        for layer in self.layers:
            x = layer(x, position, centres, shapes)

        levels = list(x.split([h * w for h, w in shapes], 1))
        finest = levels[-1].transpose(1, 2).unflatten(2, shapes[-1])
        fused = F.relu(self.output(self.lateral(maps[0]) + resize(finest, maps[0].shape[-2:])))

        return PixelFeatures(self.mask_features(fused), levels, shapes)
