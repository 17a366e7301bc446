"""Plain ViT-B/16 (Dosovitskiy et al., ICLR 2021) with four tapped blocks, built for 512×512.

Blocks are timm's. Patches and positions are ours: images are padded instead of refused, and positions are resampled
without antialiasing, which in timm also changes the cubic kernel when a grid is enlarged.
"""

from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError
from common.config.bounds import Ascending, AtLeast, AtMost, Depth, Width
from common.lazy import Lazy

timm = Lazy("timm")

Tap = Annotated[int, AtLeast(0), AtMost(63)]  # the number of a block


def resample_positions(
    table: Tensor, source: tuple[int, int], target: tuple[int, int]
) -> Tensor:
    """Position table (1, 1 + h·w, C) of grid `source` → (1, 1 + H·W, C) of grid `target`: bicubic, class token kept."""
    token = table[:, :1]
    grid = table[:, 1:]
    grid = grid.reshape(1, *source, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=target, mode="bicubic", align_corners=False)

    return torch.cat((token, grid.flatten(2).transpose(1, 2)), dim=1)


class ViT(nn.Module):
    """Images (B, 3, H, W), normalised → the tapped blocks' tokens as four maps of 768 channels at stride 16.

    Images are padded with zeros (the mean colour) at the bottom and the right to whole patches. No final norm.
    """

    family = "vit"
    strides = (16, 16, 16, 16)

    def __init__(
        self,
        *,
        dim: Width = 768,
        heads: Depth = 12,
        taps: Annotated[tuple[Tap, Tap, Tap, Tap], Ascending()] = (2, 5, 8, 11),
        grid: Annotated[int, AtLeast(1), AtMost(1024)] = 32,
    ):
        super().__init__()
        if dim % heads:
            raise ConfigError(
                f"model.options.backbone.dim: {dim} is no multiple of heads ({heads})"
            )

        self.grid = (grid, grid)
        self.taps = taps
        self.channels = (dim,) * len(taps)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.patch_embed = nn.Conv2d(3, dim, 16, stride=16)
        norm = partial(nn.LayerNorm, eps=1e-6)
        kind = timm.models.vision_transformer.Block
        block = partial(kind, dim, heads, qkv_bias=True, norm_layer=norm)
        self.blocks = nn.ModuleList(block() for _ in range(max(taps) + 1))
        self._init_weights()

    def forward(self, x: Tensor) -> list[Tensor]:
        patch = self.patch_embed.kernel_size[0]
        x = self.patch_embed(F.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch)))
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self._positions(
            *grid
        )
        maps = []

        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous())

        return maps

    def _positions(self, height: int, width: int) -> Tensor:
        """The table itself, or resampled when the number of tokens differs.

        Only the number counts, as in the release: a 16×64 grid takes the 32×32 table as it is.
        """
        if height * width + 1 == self.pos_embed.shape[1]:
            return self.pos_embed
        return resample_positions(self.pos_embed, self.grid, (height, width))

    def _init_weights(self) -> None:
        """As the release: linears truncated normal 0.02 with zero bias (MLP: N(0, 1e-6)), packed attention projection
        Xavier uniform, patch conv Kaiming normal (fan-in), positions and class token truncated normal 0.02, LN 1/0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith(".qkv"):
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)

                nn.init.normal_(module.bias, std=1e-6 if ".mlp." in name else 0.0)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

        nn.init.kaiming_normal_(self.patch_embed.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
