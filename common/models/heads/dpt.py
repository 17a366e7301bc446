"""DPT head (Ranftl et al., ICCV 2021) as UniMatch V2 has it: without batch norm, on four token maps of one size."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from common.ops.resize import resize


class ResidualConv(nn.Module):
    """z + conv(ReLU(conv(ReLU z))), both 3×3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Joins the map from below with a level's own one and resizes the sum; the coarsest level has nothing below it."""

    def __init__(self, channels: int, joins: bool = True):
        super().__init__()
        self.level = ResidualConv(channels) if joins else None
        self.refine = ResidualConv(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, below: Tensor, level: Tensor | None, size: tuple[int, int]) -> Tensor:
        if level is not None:
            below = below + self.level(level)
        return self.project(resize(self.refine(below), size, True))


class DPTHead(nn.Module):
    """Four maps (B, D, h, w) to logits (B, K, 8h, 8w).

    widths: channels of the four levels, which are resized to 4h, 2h, h, ⌈h/2⌉; channels: of the decoder.
    """

    def __init__(self, dim: int, widths: Sequence[int], channels: int, num_classes: int):
        super().__init__()
        first, second, _, last = widths
        self.embedding_channels = channels
        self.projects = nn.ModuleList(nn.Conv2d(dim, width, 1) for width in widths)
        self.resizes = nn.ModuleList(
            (
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(last, last, 3, stride=2, padding=1),
            )
        )
        self.narrow = nn.ModuleList(
            nn.Conv2d(width, channels, 3, padding=1, bias=False) for width in widths
        )
        self.fusions = nn.ModuleList(Fusion(channels, joins=level < 3) for level in range(4))
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.conv_seg(self.embed(maps))

    def embed(self, maps: Sequence[Tensor]) -> Tensor:
        """What the classifier reads (B, channels, 8h, 8w)."""
        levels = []
        for x, project, rescale, narrow in zip(
            maps, self.projects, self.resizes, self.narrow, strict=True
        ):
            levels.append(narrow(rescale(project(x))))

        x = self.fusions[3](levels[3], None, levels[2].shape[-2:])
        x = self.fusions[2](x, levels[2], levels[1].shape[-2:])
        x = self.fusions[1](x, levels[1], levels[0].shape[-2:])
        height, width = levels[0].shape[-2:]
        x = self.fusions[0](x, levels[0], (2 * height, 2 * width))

        return F.relu(self.conv_out(x))
