"""OCRNet (Yuan et al., ECCV 2020): a coarse FCN head whose class regions give every pixel its object context."""

import torch
from torch import Tensor, nn

from common.models.heads.fcn import FCNHead
from common.models.layers import ConvBNAct


def gather(features: Tensor, logits: Tensor) -> Tensor:
    """Mean feature of each class (B, C, K, 1): `features` (B, C, h, w) weighted by the softmax of the class's
    coarse `logits` (B, K, h, w) over all pixels (OCRNet eq. 5)."""
    weights = logits.flatten(2).softmax(-1)
    return (features.flatten(2) @ weights.transpose(1, 2)).unsqueeze(-1)


class ObjectContext(nn.Module):
    """Attention of every pixel to the K class features, joined with the pixel's own (OCRNet eq. 3 and 4)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.scale = width**-0.5
        self.query_project = nn.Sequential(ConvBNAct(channels, width), ConvBNAct(width, width))
        self.key_project = nn.Sequential(ConvBNAct(channels, width), ConvBNAct(width, width))
        self.value_project = ConvBNAct(channels, width)
        self.out_project = ConvBNAct(width, channels)
        self.bottleneck = ConvBNAct(2 * channels, channels)

    def forward(self, features: Tensor, context: Tensor) -> Tensor:
        """`features` (B, C, h, w) and `context` (B, C, K, 1) to (B, C, h, w)."""
        query = self.query_project(features).flatten(2).transpose(1, 2)
        key = self.key_project(context).flatten(2)
        value = self.value_project(context).flatten(2)
        attention = (query @ key * self.scale).softmax(-1)
        out = (value @ attention.transpose(1, 2)).unflatten(2, features.shape[2:])

        return self.bottleneck(torch.cat((self.out_project(out), features), 1))


class OCRStage(nn.Module):
    """The joined maps and the coarse logits to the final logits and what the classifier made them of."""

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, context_channels: int
    ):
        super().__init__()
        self.bottleneck = ConvBNAct(in_channels, channels, 3)
        self.object_context_block = ObjectContext(channels, context_channels)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bottleneck(x)
        embedding = self.object_context_block(x, gather(x, coarse))
        return self.conv_seg(embedding), embedding


class OCRHead(nn.ModuleList):
    """All maps, joined at the stride of map 0, to `logits` of the OCR stage and `aux` = [logits of the coarse stage].

    Gradients of the OCR loss run through the coarse logits too. Both classifiers keep torch's initialisation, as in
    the release, and have no dropout before them.

    The coarse stage runs once. The release runs it a second time in training to make the context from it; values and
    gradients are equal, but its BN statistics then move twice a step: as with a momentum of 1 − 0.9² = 0.19 here.
    """

    auxiliary = True  # it gives logits that need a loss of their own

    def __init__(
        self,
        in_channels: tuple[int, ...],
        channels: int,
        num_classes: int,
        *,
        context_channels: int = 256,
        align_corners: bool = False,
    ):
        joined = sum(in_channels)
        coarse = FCNHead(
            in_channels, joined, num_classes, kernel=1, dropout=0.0, align_corners=align_corners
        )
        coarse.conv_seg.reset_parameters()
        super().__init__((coarse, OCRStage(joined, channels, num_classes, context_channels)))
        self.embedding_channels = channels

    def forward(self, features: list[Tensor]) -> dict[str, Tensor | list[Tensor]]:
        coarse_head, ocr_stage = self
        x = coarse_head.select(features)
        coarse = coarse_head.classify(coarse_head.convs(x))
        logits, embedding = ocr_stage(x, coarse)
        return {"logits": logits, "embedding": embedding, "aux": [coarse]}
