"""DINOv2's vision transformers (Oquab et al., TMLR 2024): patches of 14 pixels, LayerScale, no registers.

Blocks are timm's, and names too. Positions are ours: the release resamples its table by a scale factor with an offset,
without antialiasing, which timm does not.
"""

from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from common.config import ConfigError
from common.config.bounds import Ascending, AtLeast, AtMost, Depth, Width
from common.lazy import Lazy
from common.models.backbones.vit import Tap

timm = Lazy("timm")

PATCH = 14  # pixels along a patch's side
OFFSET = 0.1  # what the release adds to a grid's side before it divides by the table's
CUBIC = -0.75  # Keys' parameter of torch's bicubic resizing


def cubic_matrix(size: int, stored: int) -> Tensor:
    """Weights (size, stored) by which a side of `stored` positions is resampled to `size`.

    Row i reads at (i + ½) · stored/(size + 0.1) − ½ with the cubic kernel; borders are repeated.
    """
    position = (torch.arange(size, dtype=torch.float64) + 0.5) * (
        stored / (size + OFFSET)
    ) - 0.5
    low = position.floor()
    matrix = torch.zeros(size, stored, dtype=torch.float64)

    for tap in (-1, 0, 1, 2):
        distance = (position - low - tap).abs()
        index = (low.long() + tap).clamp(0, stored - 1)
        matrix.scatter_add_(1, index[:, None], cubic_kernel(distance)[:, None])

    return matrix.float()


def cubic_kernel(distance: Tensor) -> Tensor:
    """Keys' kernel at distances |x| ≤ 2."""
    a = CUBIC
    x = distance
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return torch.where(x <= 1, near, far)


class DINOv2(nn.Module):
    """Images (B, 3, H, W), normalised, sides multiples of 14 → the tapped blocks' tokens, after the final norm, as four
    maps (B, dim, H/14, W/14)."""

    family = "dinov2"
    strides = (PATCH, PATCH, PATCH, PATCH)

    def __init__(
        self,
        *,
        dim: Width = 384,
        heads: Depth = 6,
        taps: Annotated[tuple[Tap, Tap, Tap, Tap], Ascending()] = (2, 5, 8, 11),
        grid: Annotated[int, AtLeast(1), AtMost(1024)] = 37,
    ):
        super().__init__()
        if dim % heads:
            raise ConfigError(
                f"model.options.backbone.dim: {dim} is no multiple of heads ({heads})"
            )

        self.grid = grid
        self.taps = taps
        self.channels = (dim,) * len(taps)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        norm = partial(nn.LayerNorm, eps=1e-6)
        kind = timm.models.vision_transformer.Block
        block = partial(kind, dim, heads, qkv_bias=True, init_values=1.0, norm_layer=norm)
        self.blocks = nn.ModuleList(block() for _ in range(max(taps) + 1))
        self.norm = norm(dim)
        self._init_weights()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed.proj(x)
        grid = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.positions(*grid)

        maps = []

        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                tokens = self.norm(x)[:, 1:]
                maps.append(tokens.transpose(1, 2).unflatten(2, grid).contiguous())

        return maps

    def positions(self, height: int, width: int) -> Tensor:
        """Class token and positions (1, 1 + height·width, dim) of a grid: the table's, resampled unless it is of the
        table's size and square."""
        if (height, width) == (self.grid, self.grid):
            return self.pos_embed

        token = self.pos_embed[:, :1]
        table = self.pos_embed[:, 1:]
        table = table.unflatten(1, (self.grid, self.grid))
        down, across = (cubic_matrix(side, self.grid).to(table) for side in (height, width))
        resampled = torch.einsum("ih,bhwc,jw->bijc", down, table, across)

        return torch.cat((token, resampled.flatten(1, 2)), dim=1)

    def _init_weights(self) -> None:
        """As the release: linears, positions truncated normal 0.02, class token N(0, 1e-6), biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
