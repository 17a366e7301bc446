"""MultiLevelNeck (SETR-style, as in the release's ViT rows): a pyramid from maps that share one stride."""

import torch.nn.functional as F
from torch import Tensor, nn


class MultiLevelNeck(nn.Module):
    """Maps at 1/16 → maps at 1/4, 1/8, 1/16, 1/32: 1×1 conv, bilinear resize by a factor, 3×3 conv.

    No norm and no activation; Xavier-uniform weights, zero biases. The resize keeps the factor for its sampling grid,
    so odd sizes give floor(n · factor).
    """

    family = "mln"  # of its official names

    def __init__(
        self,
        in_channels: tuple[int, ...],
        out_channels: int,
        scales: tuple[float, ...] = (4, 2, 1, 0.5),
    ):
        super().__init__()
        self.scales = scales
        self.channels = (out_channels,) * len(scales)
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in scales
        )

        for conv in (*self.lateral_convs, *self.convs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        outputs = []
        for x, scale, lateral, conv in zip(
            maps, self.scales, self.lateral_convs, self.convs, strict=True
        ):
            x = lateral(x)
            if scale != 1:
                x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)

            outputs.append(conv(x))

        return outputs
