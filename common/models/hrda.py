"""HRDA (Hoyer et al., ECCV 2022): one network at two scales, a wide context and crops of its detail.

The context is the image at half size. In training one detail crop shows a part of the image at full size; in inference
windows show all of it, and their logits are averaged where they overlap.

    logits = U(a) · detail + U((1 − a) · context),   a = sigmoid of the attention on the context, U = enlarging twofold
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.models.segmentor import SegmentationModel
from common.ops.resize import resize

SHRINK = 2  # of the context


class Box(NamedTuple):
    """Pixels [y1, y2) × [x1, x2) of the image."""

    y1: int
    y2: int
    x1: int
    x2: int

    def of(self, maps: Tensor) -> Tensor:
        """This part of maps (…, H, W) at full size."""
        return maps[..., self.y1 : self.y2, self.x1 : self.x2]

    def over(self, stride: int) -> "Box":
        """The same part of a map at a stride that divides the sides."""
        return Box(*(side // stride for side in self))


class MultiScaleHead(nn.Module):
    """The head that both scales share, and that of the attention; both take a list of maps."""

    family = "hrda"  # of its official names

    def __init__(self, head: nn.Module, scale_attention: nn.Module):
        super().__init__()
        self.head = head
        self.scale_attention = scale_attention


class HRDANetwork(SegmentationModel):
    """Backbone and heads on two scales.

    Args:
        stride: of the heads' logits; sides of images, windows and their offsets are multiples of twice as much.
        crop: height and width of a detail crop; `overlap`: whether windows of inference step by half of it.
        inclusive: whether the detail crops of training may end at the bottom and the right.
        window_batch: windows in one batch in evaluation mode. In training mode, where batch norm sees them, all are.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: MultiScaleHead,
        *,
        num_classes: int,
        mean,
        std,
        align_corners: bool = False,
        stride: int = 4,
        crop: tuple[int, int] = (512, 512),
        overlap: bool = True,
        window_batch: int = 9,
        inclusive: bool = False,
    ):
        super().__init__(num_classes, mean, std, align_corners, divisor=SHRINK * stride)
        self.backbone = backbone
        self.decode_head = decode_head
        self.stride = stride
        self.crop = tuple(crop)
        self.overlap = overlap
        self.window_batch = window_batch
        self.inclusive = inclusive
        self.mixes_images = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules()
        )
        self.classifiers = tuple(
            name for name, _ in self.named_modules() if name.endswith("conv_seg")
        )
        self.pixel_classifiers = tuple(
            name for name in self.classifiers if "scale_attention" not in name
        )

    def context(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) at half size."""
        return resize(x, tuple(side // SHRINK for side in x.shape[-2:]))

    def draw_box(self, size: tuple[int, int]) -> Box:
        """The detail crop of one training batch, drawn on the host; as released, the last position is never drawn
        unless it is the only one, or `inclusive`."""
        step = SHRINK * self.stride
        starts = []

        for side, crop in zip(size, self._crop_in(size), strict=True):
            room = side - crop
            places = room // step + 1 if self.inclusive else max((room + 1) // step, 1)
            starts.append(step * int(torch.randint(places, (), device="cpu")))

        height, width = self._crop_in(size)
        y, x = starts

        return Box(y, y + height, x, x + width)

    def segment_crop(self, x: Tensor, box: Box) -> dict[str, Any]:
        """Normalised images (B, 3, H, W) to `logits` (B, K, h, w), fused in the box and of the context elsewhere,
        `detail` (the logits of the box) and `features` (the backbone's maps of the context)."""
        features, detail_features = self._maps(self.context(x), box.of(x))
        context = self.decode_head.head(features)
        detail = self.decode_head.head(detail_features)
        attention = self.decode_head.scale_attention(features).sigmoid()

        inside = torch.zeros_like(attention[:1, :1])
        box.over(SHRINK * self.stride).of(inside).fill_(1)
        placed = detail.new_zeros(
            *detail.shape[:2], *(side // self.stride for side in x.shape[-2:])
        )
        box.over(self.stride).of(placed).copy_(detail)
        logits = self._fused(attention * inside, context, placed)

        return {"logits": logits, "aux": [], "features": features, "detail": detail}

    def _maps(self, context: Tensor, detail: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The backbone's maps of both; one pass where they have one size and no batch norm would see them together."""
        if self.mixes_images or context.shape[-2:] != detail.shape[-2:]:
            return list(self.backbone(context)), list(self.backbone(detail))

        pairs = [maps.chunk(2) for maps in self.backbone(torch.cat((context, detail)))]
        return [first for first, _ in pairs], [second for _, second in pairs]

    def segment(self, x: Tensor) -> dict[str, Any]:
        """The same with detail everywhere: `detail` has the logits' size, `attention` and `context` half of it."""
        features = list(self.backbone(self.context(x)))
        context = self.decode_head.head(features)
        attention = self.decode_head.scale_attention(features).sigmoid()

        detail = self._slide(x)
        logits = self._fused(attention, context, detail)
        extras = {"attention": attention, "context": context, "detail": detail}

        return {"logits": logits, "aux": [], "features": features, **extras}

    def _fused(self, attention: Tensor, context: Tensor, detail: Tensor) -> Tensor:
        size = tuple(detail.shape[-2:])
        outside = resize((1 - attention) * context, size, self.align_corners)
        return resize(attention, size, self.align_corners) * detail + outside

    def windows(self, size: tuple[int, int]) -> list[Box]:
        """The detail windows of an image, row by row; the last of a row or column is shifted back into it."""
        height, width = self._crop_in(size)
        rows, columns = (
            self._starts(*pair) for pair in zip(size, (height, width), strict=True)
        )
        return [Box(y, y + height, x, x + width) for y in rows for x in columns]

    def _starts(self, side: int, crop: int) -> list[int]:
        step = crop // 2 if self.overlap else crop
        count = -(-(side - crop) // step) + 1
        return [min(i * step, side - crop) for i in range(count)]

    def _crop_in(self, size: tuple[int, int]) -> tuple[int, int]:
        return min(self.crop[0], size[0]), min(self.crop[1], size[1])

    def _slide(self, x: Tensor) -> Tensor:
        """Logits (B, K, h, w) of the detail windows, averaged where they overlap."""
        boxes = self.windows(tuple(x.shape[-2:]))
        at_once = len(boxes) if self.training else self.window_batch
        total = seen = None

        for start in range(0, len(boxes), at_once):
            some = boxes[start : start + at_once]
            logits = self.decode_head.head(
                list(self.backbone(torch.cat([box.of(x) for box in some])))
            )
            if total is None:
                size = tuple(side // self.stride for side in x.shape[-2:])
                total = logits.new_zeros(len(x), logits.shape[1], *size)
                seen = logits.new_zeros(size)

            for box, window in zip(some, logits.split(len(x)), strict=True):
                box.over(self.stride).of(total).add_(window)
                box.over(self.stride).of(seen).add_(1)

        return total / seen
