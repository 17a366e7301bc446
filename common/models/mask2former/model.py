"""Mask2Former (CVPR 2022) for semantic segmentation: backbone, pixel decoder, masked-attention decoder.

Each of Q queries predicts a class distribution p_q and a mask m_q; a pixel's score of class k is Σ_q p_qk · σ(m_q).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError, ModelConfig, typed
from common.config.bounds import AtLeast, AtMost, Depth, Width
from common.models.backbones import build_pyramid, pixel_statistics, require_stride_4
from common.models.backbones.frozen_norm import freeze_batchnorm
from common.models.backbones.timm_features import TimmFeatures
from common.models.mask2former.decoder import MaskedDecoder, masks
from common.models.mask2former.pixel_decoder import PixelDecoder
from common.models.segmentor import Extents, SegmentationModel
from common.ops.query_labels import query_labels
from common.ops.resize import resize_rows, source_rows
from common.ops.upsampled_loss import choose_form

LEVELS = 4  # maps that the pixel decoder reads
Queries = Annotated[int, AtLeast(1), AtMost(10_000)]


@dataclass(frozen=True)
class Mask2FormerOptions:
    """Defaults are the paper's; smaller values give a small network of the same form."""

    hidden_dim: Width = 256  # a multiple of 32 and of `heads`
    num_queries: Queries = 100
    heads: Depth = 8
    points: Depth = 4  # sampled a head and level in the pixel decoder
    encoder_layers: Depth = 6
    encoder_hidden: Width = 1024
    decoder_layers: Depth = 9
    decoder_hidden: Width = 2048
    # K + 1 logits, or K class and 2 objectness logits
    class_head: Literal["softmax", "seesaw"] = "softmax"
    frozen_norm: bool = True  # batch norm of the backbone is constant; False: it is trained
    backbone: Mapping[str, Any] = field(default_factory=dict)  # options of the backbone

    def __post_init__(self):
        if self.hidden_dim % 32 or self.hidden_dim % self.heads:
            raise ValueError(
                f"hidden_dim: {self.hidden_dim} must be a multiple of 32 and of heads ({self.heads})"
            )


def class_probabilities(logits: Tensor, num_classes: int) -> Tensor:
    """Probability (…, K) of each class, "no object" left out, in float32.

    Of K + 1 logits: their softmax without the last. Of K + 2 logits (Seesaw, CVPR 2021): the softmax of the first K
    times the probability of "object", the first of the last two.
    """
    logits = logits.float()
    if logits.shape[-1] == num_classes + 1:
        return logits.softmax(-1)[..., :-1]
    return (
        logits[..., :num_classes].softmax(-1) * logits[..., num_classes:].softmax(-1)[..., :1]
    )


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 on CUDA keep all digits within, whatever `train.tf32` says."""
    if device.type != "cuda":
        yield
        return

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Mask2Former(SegmentationModel):
    """`segment` gives `pred_logits` (B, Q, K + 1 or K + 2) and, in evaluation, `pred_masks` (B, Q, H/4, W/4).

    In training it gives `mask_embed` (B, Q, d) and `mask_features` (B, d, H/4, W/4) instead of the masks, whose product
    the masks are, and in `aux` the `pred_logits` and `mask_embed` of the initial queries and of each layer but the
    last: a loss makes only the masks and the points that it needs.
    """

    heads = ("queries",)
    classifiers = ("decoder.class_embed",)
    average_softmax = False  # scores are sums of probabilities already
    scores_are_logits = False

    def __init__(
        self, backbone: nn.Module, num_classes: int, mean, std, options: Mask2FormerOptions
    ):
        super().__init__(num_classes, mean, std, align_corners=False, divisor=32)
        self.backbone = backbone
        self.class_head = options.class_head
        self.pixel_decoder = PixelDecoder(
            backbone.channels,
            options.hidden_dim,
            layers=options.encoder_layers,
            hidden=options.encoder_hidden,
            heads=options.heads,
            points=options.points,
        )
        self.decoder = MaskedDecoder(
            num_classes + (1 if options.class_head == "softmax" else 2),
            options.num_queries,
            options.hidden_dim,
            layers=options.decoder_layers,
            hidden=options.decoder_hidden,
            heads=options.heads,
        )

    def segment(self, x: Tensor) -> dict[str, Any]:
        pixels = self.pixel_decoder(self.backbone(x))
        predictions = self.decoder(pixels)
        if not self.training:
            pred_masks = masks(predictions.embeddings[-1], pixels.mask_features)
            return {"pred_logits": predictions.logits[-1], "pred_masks": pred_masks, "aux": []}

        layers = [
            {"pred_logits": logits, "mask_embed": embedding}
            for logits, embedding in zip(
                predictions.logits, predictions.embeddings, strict=True
            )
        ]

        return {**layers[-1], "mask_features": pixels.mask_features, "aux": layers[:-1]}

    def infer(self, images: Tensor) -> dict[str, Any]:
        """What scores are made of: `probability` (B, K, Q) and `pred_masks` (B, Q, h, w)."""
        out = self.segment(self.normalise(images))
        probability = (
            class_probabilities(out["pred_logits"], self.num_classes)
            .transpose(1, 2)
            .contiguous()
        )
        pred_masks = (
            masks(out["mask_embed"], out["mask_features"])
            if self.training
            else out["pred_masks"]
        )
        return {"probability": probability, "pred_masks": pred_masks}

    def scores(self, out: dict[str, Any], geometry: Extents, rows: tuple[int, int]) -> Tensor:
        """Rows [a, b) of Σ_q p_qk · σ(m_q).

        The Q masks are resized to the input, cropped, and resized to the final size before the classes are mixed:
        resizing is linear, so this equals resizing the K class maps, without ever having them at any size but a band.
        """
        padded, inner, size = geometry
        band = rows if inner == size else source_rows(inner[0], size[0], rows)
        x = resize_rows(out["pred_masks"].float(), padded, band)[..., : inner[1]].sigmoid()
        if inner != size:
            x = resize_rows(x, size, rows, first=band[0], height=inner[0])

        with exact_products(x.device):  # as the kernel of `labels` has them
            return (out["probability"] @ x.flatten(2)).unflatten(2, x.shape[2:])

    def _fuses(self, out: dict[str, Any], geometry: Extents) -> bool:
        """Whether the device has a kernel for the labels of masks, which takes any sizes."""
        plain = type(self).scores is Mask2Former.scores
        return plain and choose_form(out["pred_masks"]) == "triton"

    def _fused_labels(self, out: dict[str, Any], geometry: Extents) -> tuple[Tensor, Tensor]:
        return query_labels(out["probability"], out["pred_masks"], *geometry)

    def adjust(self, out: dict[str, Any], offsets: Tensor) -> dict[str, Any]:
        """`out` with ln p_qk + offset_k (K,), less a constant, for every query: so the score of class k is multiplied
        by e^offset_k."""
        factors = (offsets - offsets.max()).exp()
        return {**out, "probability": out["probability"] * factors[:, None]}

    def confidence(self, scores: Tensor, best: Tensor) -> Tensor:
        """The best class's share of all scores."""
        return best / scores.sum(1).clamp(min=torch.finfo(scores.dtype).tiny)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Every class's share of all scores."""
        return F.normalize(scores.float(), p=1)


def mask2former(config: ModelConfig) -> Mask2Former:
    """The network of a config: backbone resnet18/50/101, swin_{tiny,small,base,large} or timm:NAME."""
    options = typed(Mask2FormerOptions, config.options, "model.options")
    if config.align_corners:
        raise ConfigError(
            "model.align_corners: Mask2Former resizes without aligned corners; set it to false"
        )

    backbone = build_pyramid(config, **options.backbone)
    require_stride_4(backbone, "Mask2Former")
    if len(backbone.channels) != LEVELS:
        raise ConfigError(
            f"model.backbone: {config.backbone} gives {len(backbone.channels)} maps; Mask2Former needs 4"
        )

    if options.frozen_norm and isinstance(backbone, TimmFeatures):
        backbone.freeze_norm(untrained=not config.pretrained)
    elif options.frozen_norm:
        freeze_batchnorm(backbone, untrained=not config.pretrained)

    return Mask2Former(backbone, config.num_classes, *pixel_statistics(config), options)
