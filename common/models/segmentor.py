"""The base of every network: pixel statistics, padding, upsampling and row-wise decisions, written once.

A family implements `segment`; one whose classes are not the channels of `logits` also overrides `scores`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError
from common.data import IGNORE
from common.models.layers import DecodeHead
from common.ops.resize import resize_rows, source_rows
from common.ops.upsampled_loss import choose_form, upsampled_labels

# scores that a band of `labels` holds: the cache, or 64 MiB
BAND = {"cpu": 1 << 20, "cuda": 1 << 24}


class Extents(NamedTuple):
    """Heights and widths on the way from a net's output to the scores that a user asked for."""

    padded: tuple[int, int]  # what `segment` saw
    inner: tuple[int, int]  # the images without padding
    size: tuple[int, int]  # the scores


class SegmentationModel(nn.Module, ABC):
    """A network that turns images into class scores.

    Args:
        num_classes: number of classes K.
        mean, std: pixel statistics on the 0–255 scale, RGB.
        align_corners: how logits are resized, by the losses too.
        divisor: images are padded at the bottom and right to a multiple of it, with 0 after normalisation.
    """

    heads: tuple[str, ...] = ("decode",)  # what losses train: `logits` (decode), `aux`, …
    classifiers: tuple[str, ...] = ()  # modules (or parameters) with one output per class
    pixel_classifiers: tuple[str, ...] = ()  # 1×1 convolutions, which may be cosine classifiers
    # D of the features that the classifier of `logits` reads, see `segment`
    embedding_channels: int | None = None
    average_softmax = True  # test-time augmentation averages the softmax of the scores; False: the scores themselves
    scores_are_logits = True  # False: probabilities, or sums of them
    mean: Tensor
    std: Tensor

    def __init__(
        self, num_classes: int, mean, std, align_corners: bool = False, divisor: int = 1
    ):
        super().__init__()
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.divisor = divisor
        self.register_buffer(
            "mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False
        )

    @abstractmethod
    def segment(self, x: Tensor) -> dict[str, Any]:
        """Normalised images (B, 3, H, W) to `logits` (B, K, h, w) at the net's own stride, and what losses need: where
        there are `embedding_channels`, `embedding` (B, D, h, w) too, what the classifier made them of."""

    def check_heads(self, trained: Collection[str], where: str) -> None:
        """ConfigError, which begins with `where`, unless losses train exactly the heads that there are.

        A loss without its head would be left out in silence; a head without a loss would stay as it was initialised,
        and end in an error of DDP on several ranks.
        """
        for name in trained:
            if name not in self.heads:
                raise ConfigError(
                    f"{where}.{name}: the network has no such head; remove it ({self._known_heads()})"
                )
        for name in self.heads:
            if name not in trained:
                advice = ", or set model.options.auxiliary=false" if name == "aux" else ""
                raise ConfigError(
                    f"{where}: no loss trains the network's head {name!r}; name it{advice}"
                )

    def _known_heads(self) -> str:
        return f"its heads: {', '.join(self.heads)}"

    def normalise(self, images: Tensor, extent: Tensor | None = None) -> Tensor:
        """RGB in 0–255 (uint8 or float) to what `segment` takes, padded to `divisor`. extent: see `standardise`."""
        x = self.standardise(images, extent)
        (height, width) = images.shape[-2:]
        (padded_height, padded_width) = self._padded(images.shape[-2:])
        if (height, width) == (padded_height, padded_width):
            return x

        return F.pad(x, (0, padded_width - width, 0, padded_height - height))

    def standardise(self, images: Tensor, extent: Tensor | None = None) -> Tensor:
        """RGB (B, 3, H, W) in 0–255 less the mean, over the spread.

        extent: int (B, 2), height and width of each image before it was padded at the bottom and the right. There the
        result is exactly 0, which no 8-bit colour would become.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W)")

        x = (images - self.mean) / self.std
        if extent is None:
            return x

        below = torch.arange(x.shape[2], device=x.device) >= extent[:, :1]
        beside = torch.arange(x.shape[3], device=x.device) >= extent[:, 1:]

        return x.masked_fill_(below[:, None, :, None] | beside[:, None, None, :], 0)

    def pad_label(self, label: Tensor) -> Tensor:
        """Label maps (B, H, W) filled up with −1 to the size that `normalise` pads their images to.

        A loss on logits resized to this size sees each pixel where `predict` puts it.
        """
        height, width = label.shape[-2:]
        padded_height, padded_width = self._padded((height, width))
        if (height, width) == (padded_height, padded_width):
            return label

        return F.pad(label, (0, padded_width - width, 0, padded_height - height), value=IGNORE)

    def forward(self, images: Tensor, extent: Tensor | None = None) -> dict[str, Any]:
        """Images (B, 3, H, W), RGB in 0–255, to the outputs of `segment`. extent: see `standardise`."""
        return self.segment(self.normalise(images, extent))

    def infer(self, images: Tensor) -> dict[str, Any]:
        """The outputs that `scores` needs; heads that only training uses may be left out.

        Not by the call of the network: that is what `train.compile` compiles, anew for each size of image.
        """
        return self.segment(self.normalise(images))

    def predict(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Class scores (B, K, H, W) of images (B, 3, h, w) in 0–255, at `size` or the images' size."""
        return self.scores_of(self.infer(images), images, size)

    def scores_of(
        self, out: dict[str, Any], images: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        """What `predict` makes of the outputs of `infer`."""
        geometry = self._geometry(images, size)
        return self.scores(out, geometry, (0, geometry.size[0]))

    @torch.no_grad()
    def labels(
        self, images: Tensor, size: tuple[int, int] | None = None, offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Label int64 and confidence float32, both (B, H, W), of images (B, 3, h, w) at `size` or the images' size.

        The label is the argmax of `predict`; scores are made for a band of rows at a time. offsets: (K,), see `adjust`.
        """
        return self.labels_of(self.infer(images), images, size, offsets)

    @torch.no_grad()
    def labels_of(
        self,
        out: dict[str, Any],
        images: Tensor,
        size: tuple[int, int] | None = None,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What `labels` makes of the outputs of `infer`."""
        geometry = self._geometry(images, size)
        if self._fuses(out, geometry):
            out = out if offsets is None else self.adjust(out, offsets.to(images.device))
            return self._fused_labels(out, geometry)

        shape = (images.shape[0], *geometry.size)
        label = torch.empty(shape, dtype=torch.int64, device=images.device)
        confidence = torch.empty(shape, dtype=torch.float32, device=images.device)

        for rows, band in self.bands_of(out, images, size, offsets):
            best, label[:, slice(*rows)] = band.max(1)
            confidence[:, slice(*rows)] = self.confidence(band, best)

        return label, confidence

    def bands(
        self, images: Tensor, size: tuple[int, int] | None = None, offsets: Tensor | None = None
    ) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Rows [a, b) after rows, each with its class scores (B, K, b-a, W): what `labels` decides by."""
        return self.bands_of(self.infer(images), images, size, offsets)

    def bands_of(
        self,
        out: dict[str, Any],
        images: Tensor,
        size: tuple[int, int] | None = None,
        offsets: Tensor | None = None,
    ) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """What `bands` makes of the outputs of `infer`."""
        geometry = self._geometry(images, size)
        (height, width) = geometry.size
        if offsets is not None:
            out = self.adjust(out, offsets.to(images.device))

        band = BAND.get(images.device.type, BAND["cuda"])
        step = max(band // (images.shape[0] * self.num_classes * width), 1)

        for start in range(0, height, step):
            rows = (start, min(start + step, height))
            yield rows, self.scores(out, geometry, rows)

    def _fuses(self, out: dict[str, Any], geometry: Extents) -> bool:
        """Whether labels are the argmax of logits that are resized once, on a device with a kernel for it."""
        plain = type(self).scores is SegmentationModel.scores
        if not plain or geometry.inner != geometry.size:
            return False
        return choose_form(out["logits"]) == "triton"

    def _fused_labels(self, out: dict[str, Any], geometry: Extents) -> tuple[Tensor, Tensor]:
        """Label and confidence by that kernel."""
        return upsampled_labels(
            out["logits"],
            geometry.padded,
            align_corners=self.align_corners,
            shown=geometry.inner,
        )

    def scores(self, out: dict[str, Any], geometry: Extents, rows: tuple[int, int]) -> Tensor:
        """Rows [a, b) of the class scores: (B, K, b-a, W). Any split into bands gives the same values."""
        return self.upsample(out["logits"], geometry, rows)

    def adjust(self, out: dict[str, Any], offsets: Tensor) -> dict[str, Any]:
        """`out` of `infer` with offsets (K,) added to the logarithm of the class scores: here to the logits at the
        net's own stride, since resizing leaves a constant as it is."""
        return {**out, "logits": out["logits"] + offsets.view(-1, 1, 1)}

    def confidence(self, scores: Tensor, best: Tensor) -> Tensor:
        """Probability (B, h, w) of the best class, of scores (B, K, h, w) and their maximum; softmax, as for logits."""
        return (best.float() - scores.float().logsumexp(1)).exp_()

    def probabilities(self, scores: Tensor) -> Tensor:
        """Class probabilities, float32, of scores (B, K, h, w); `confidence` is the highest."""
        return scores.float().softmax(1)

    def upsample(self, x: Tensor, geometry: Extents, rows: tuple[int, int]) -> Tensor:
        """Rows [a, b) of a map (B, C, h, w) resized to the net's input, freed of padding, resized to the final size."""
        padded, inner, size = geometry
        if inner == size:
            return resize_rows(x, padded, rows, self.align_corners)[..., : inner[1]]

        band = source_rows(inner[0], size[0], rows, self.align_corners)
        x = resize_rows(x, padded, band, self.align_corners)[..., : inner[1]]

        return resize_rows(x, size, rows, self.align_corners, first=band[0], height=inner[0])

    def _padded(self, size) -> tuple[int, int]:
        return tuple(-(-side // self.divisor) * self.divisor for side in size)

    def _geometry(self, images: Tensor, size: tuple[int, int] | None) -> Extents:
        inner = tuple(images.shape[-2:])
        return Extents(self._padded(inner), inner, inner if size is None else tuple(size))


class EncoderDecoder(SegmentationModel):
    """A network in two parts, for methods that change the maps between them."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Normalised images (B, 3, H, W) to the maps (B, C, h, w) that `decode` reads."""

    @abstractmethod
    def embed(self, maps: Sequence[Tensor]) -> Tensor:
        """What the classifier reads (B, D, h, w), of `encode`'s maps."""

    @abstractmethod
    def classify(self, embedding: Tensor) -> Tensor:
        """The logits (B, K, h, w) of what `embed` gives."""

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """The logits (B, K, h, w) of `encode`'s maps."""
        return self.classify(self.embed(maps))


class Segmentor(SegmentationModel):
    """Backbone, optional neck, decode head and optional auxiliary head, named as in MMSegmentation.

    The backbone (and neck) give a list of maps; a head takes that list and gives logits, or a dict with `logits` and
    more (`aux`: further logits that need a loss, `stages`: the logits of every stage, …).
    """

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: nn.Module,
        *,
        num_classes: int,
        mean,
        std,
        align_corners: bool = False,
        neck: nn.Module | None = None,
        auxiliary_head: nn.Module | None = None,
    ):
        super().__init__(num_classes, mean, std, align_corners)
        self.backbone = backbone
        self.neck = neck
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        if auxiliary_head is not None or getattr(decode_head, "auxiliary", False):
            self.heads = ("decode", "aux")

        self.classifiers = tuple(
            name for name, _ in self.named_modules() if name.endswith("conv_seg")
        )
        self.pixel_classifiers = self.classifiers
        self.embedding_channels = getattr(decode_head, "embedding_channels", None)

    def segment(self, x: Tensor, *, auxiliary: bool = True) -> dict[str, Any]:
        """Normalised images (B, 3, H, W) to a dict: `logits` (B, K, h, w), `aux` (list of logits), `features`
        (the maps that the heads read), and what the decode head gives beside them."""
        features = list(self.backbone(x))
        if self.neck is not None:
            features = list(self.neck(features))

        out = self._decoded(features)
        aux = list(out.get("aux", ()))
        if auxiliary and self.auxiliary_head is not None:
            aux.append(self.auxiliary_head(features))

        return {**out, "aux": aux, "features": features}

    def _decoded(self, features: list[Tensor]) -> dict[str, Any]:
        """What the decode head gives, with `embedding` where it has one."""
        if isinstance(self.decode_head, DecodeHead):
            embedding = self.decode_head.embed(features)
            return {"logits": self.decode_head.conv_seg(embedding), "embedding": embedding}

        out = self.decode_head(features)
        return dict(out) if isinstance(out, dict) else {"logits": out}

    def infer(self, images: Tensor) -> dict[str, Any]:
        """`logits` alone, without the auxiliary head."""
        return {"logits": self.segment(self.normalise(images), auxiliary=False)["logits"]}
