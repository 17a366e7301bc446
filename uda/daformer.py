"""DAFormer (Hoyer et al., CVPR 2022): self-training on target images with half of the source's classes pasted in.

With θ the student, θ' its moving average and φ the backbone as it was on ImageNet, a step is

    source    CE of the labelled source crop + λ · feature distance of θ and φ where it shows things
    labels    ŷ = argmax of θ' on the target crop, its weight q the batch's share of pixels with a probability ≥ τ
    mixed     CE of the target crop with pasted source classes, jittered and blurred, against both labels; ŷ weighs q

Every cross-entropy is divided by all pixels, ignored ones too. Rare-class sampling is an order of the source stream
(`sampler: {order: rare_class}`). Without it, without the feature distance and with momentum 0.99 it is DACS; with
`adapt: false` the source alone is trained on.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from common.config import Config, ConfigError
from common.config.bounds import NotNegative, Share
from common.data import IGNORE
from common.engine.method import (
    IN_PARTS,
    Batch,
    Losses,
    Method,
    MethodContext,
    move_average,
    pixel_loss,
)
from common.lazy import Lazy
from common.losses.counts import PseudoUnit
from common.losses.feature_distance import cells_of, feature_distance
from common.models import SegmentationModel, Segmentor, build_network
from common.models.frozen import Frozen
from common.ops.class_mix import choose_classes, class_mask, paste
from common.ops.colour import blur, draw_jitter, jitter
from common.ops.resize import size_of
from common.ops.upsampled_loss import upsampled_labels
from uda.confidence import (
    Margins,
    check_image_margins,
    check_margins,
    check_padding,
    confident_share,
    shown_pixels,
    valid_pixels,
)

timm = Lazy("timm")

SIGMA = (0.15, 1.15)  # of the blur, in pixels


@dataclass(frozen=True)
class FeatureDistance:
    """`weight: 0` needs no ImageNet weights. `cells: all` holds every feature, `things` those of some classes."""

    weight: NotNegative = 0.005  # λ
    cells: Literal["things", "all"] = "things"
    classes: tuple[str, ...] = ()  # names; empty: the things that the data set's row names
    share: Share = 0.75  # of a cell's pixels that are of one of the classes
    stage: int = -1  # which of the backbone's maps; the last

    def __post_init__(self):
        if self.cells == "all" and self.classes:
            raise ValueError("classes: cells: all holds every feature; remove one of the two")


@dataclass(frozen=True)
class DAFormerConfig:
    """The `method:` section of DAFormer. Defaults are the paper's."""

    adapt: bool = True  # False: source only
    momentum: Share = 0.999  # of θ', reached at step 1000: (t + 1) / (t + 2) after step t
    threshold: Share = 0.968  # τ
    # train: batch statistics of the target crops, without dropout
    teacher_mode: Literal["train", "eval"] = "train"
    margins: Margins = Margins()
    jitter: Share = 0.8  # probability; the release's 0.2 is that of no jitter
    jitter_strength: Share = 0.2
    blur: Share = 0.5  # probability
    feature_distance: FeatureDistance = FeatureDistance()


class View(NamedTuple):
    """Crops as the network takes them (B, 3, H, W), and their labels (B, H, W)."""

    image: Tensor
    label: Tensor


class Pseudo(NamedTuple):
    """Labels of the teacher (B, H, W) and the weight of each pixel (B, H, W)."""

    label: Tensor
    weight: Tensor


class DAFormer(Method):
    """Batches: `source` (image, label) and, unless `adapt` is false, `target` (image, geometry) of the same size.

    Class counts of remedies are those of the source labels; with `remedies.counts.refresh: N` the class shares of the
    pseudo-labels join them every N steps. On several ranks q is that of each rank's own crops.
    """

    Options: type[DAFormerConfig] = DAFormerConfig
    Network: type[SegmentationModel] = Segmentor
    fitting = "daformer or deeplabv2_reduced"
    backwards = 2
    pseudo_labels: PseudoUnit | None = "shares"
    uncompiled = IN_PARTS

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        check_streams(cfg, self.options)
        self.model = build_network(cfg.model, self.Network, self.fitting, cfg.name)
        self.model.check_heads(("decode",), f"{cfg.name}: model")
        pseudo_labels = self.pseudo_labels if self.options.adapt else None
        self.loss = pixel_loss(
            cfg.remedies,
            cfg,
            context,
            average="all",
            pseudo_labels=pseudo_labels,
            features=self.model.embedding_channels,
            labels_itself=pseudo_labels is not None,
        )

        self.imagenet = (
            self._imagenet_backbone(cfg) if self.options.feature_distance.weight else None
        )
        self.things: Tensor | None
        self.register_buffer("things", self._things(cfg, context), persistent=False)
        self.teacher = (
            deepcopy(self.model).requires_grad_(False) if self.options.adapt else None
        )
        self.margins_fit = (
            self.options.margins.of == "crop"
        )  # else nobody knows before images come
        if not self.options.adapt:
            self.backwards = 1

    def _things(self, cfg: Config, context: MethodContext) -> Tensor | None:
        """Which classes the feature distance holds, bool (K,); None where it does not ask, or nobody knows yet."""
        chosen = self.options.feature_distance
        if context.row is None or chosen.weight == 0 or chosen.cells == "all":
            return None

        classes = context.row.classes
        where = f"{cfg.name}: method.feature_distance.classes"
        unknown = [name for name in chosen.classes if name not in classes]
        if unknown:
            raise ConfigError(
                f"{where}: {unknown[0]!r} is no class of {context.row.name}: {', '.join(classes)}"
            )

        ids = [classes.index(name) for name in chosen.classes] or list(context.row.things)
        if not ids:
            raise ConfigError(
                f"{where}: {context.row.name} names no things; list classes, or set cells: all"
            )

        return torch.tensor([k in ids for k in range(len(classes))])

    def _imagenet_backbone(self, cfg: Config) -> Frozen:
        """The backbone with the weights of `model.pretrained`, whatever checkpoint the student starts from."""
        where = f"{cfg.name}: method.feature_distance"
        if not cfg.model.pretrained:
            raise ConfigError(
                f"{where} needs ImageNet weights; set model.pretrained, or its weight to 0"
            )

        check_maps(self.model, self.options.feature_distance.stage, cfg.model.backbone, where)

        model = self.model
        if cfg.model.checkpoint:
            model = build_network(
                replace(cfg.model, checkpoint=None), self.Network, self.fitting, cfg.name
            )

        return Frozen(deepcopy(model.get_submodule("backbone")))

    # One step ---------------------------------------------------------------------------------------------------

    def forward(self, streams: Mapping[str, Batch], step: int) -> Iterator[Losses]:
        """Two parts, back-propagated one by one: source with feature distance, mixed."""
        progress = step / self.steps
        source = self.opened(streams["source"])
        yield self.source_terms(source, progress)
        if self.teacher is None:
            return

        target = self.normalised(streams["target"])
        if target.shape != source.image.shape:
            raise ValueError(
                f"ClassMix: source crops {tuple(source.image.shape)} and target crops {tuple(target.shape)} "
                "differ; give both streams the same batch_size and crop"
            )

        if not self.margins_fit:
            check_image_margins(streams["target"]["geometry"], self.options.margins)
            self.margins_fit = True

        pseudo = self.look(self.teacher, target, streams["target"])
        yield from self.target_parts(source, target, pseudo, progress)

    def target_parts(
        self, source: View, target: Tensor, pseudo: Pseudo, progress: float
    ) -> Iterator[Losses]:
        """What a step learns from target images (B, 3, H, W)."""
        yield self.mixed_terms(source, target, pseudo, progress)

    def normalised(self, batch: Batch) -> Tensor:
        return self.model.normalise(batch["image"], batch.get("extent"))

    def opened(self, batch: Batch) -> View:
        label = self.model.pad_label(batch["label"])
        return View(self.normalised(batch), label.long())

    def student(
        self, view: View, progress: float, weight: Tensor | None = None
    ) -> tuple[Losses, Tensor]:
        """The loss `ce` of a view, with what it is made of, and the backbone's map that is held. weight: (B, H, W)."""
        out = self.model.segment(view.image)
        embedding = out.get("embedding")
        loss = self.cross_entropy(out["logits"], view.label, progress, weight, embedding)
        return {"ce": loss}, out["features"][self.options.feature_distance.stage]

    def cross_entropy(
        self,
        logits: Tensor,
        label: Tensor,
        progress: float,
        weight: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor:
        """The loss, with its remedies, of logits at the network's stride. embedding: what their classifier read."""
        return self.loss.upsampled(
            logits,
            label,
            align_corners=self.model.align_corners,
            progress=progress,
            pixel_weight=weight,
            features=embedding,
        )

    def seen_by_backbone(self, image: Tensor) -> Tensor:
        """What the feature distance compares features of."""
        return image

    def source_terms(self, source: View, progress: float) -> Losses:
        losses, features = self.student(source, progress)
        terms = named("source", losses)
        if self.imagenet is None:
            return terms

        distance = self.distance(self.imagenet, features, source)
        loss = terms["loss"] + self.options.feature_distance.weight * distance

        return {**terms, "loss": loss, "feature_distance": distance}

    def distance(self, imagenet: Frozen, features: Tensor, source: View) -> Tensor:
        """Feature distance of a map of the backbone (B, C, h, w) and the same of `imagenet`, φ."""
        chosen = self.options.feature_distance
        with torch.no_grad():
            frozen = imagenet(self.seen_by_backbone(source.image))[chosen.stage]
            if chosen.cells == "all":
                where = torch.ones_like(frozen[:, 0], dtype=torch.bool)
            elif self.things is None:
                raise ValueError(
                    "feature distance: no data set row says which classes are things; set cells: all"
                )
            else:
                where = cells_of(source.label, size_of(features), self.things, chosen.share)

        return feature_distance(features, frozen, where)

    @torch.no_grad()
    def look(self, teacher: SegmentationModel, target: Tensor, batch: Batch) -> Pseudo:
        """What the teacher says of target crops (B, 3, H, W)."""
        set_teacher_mode(teacher, self.options.teacher_mode)
        size = size_of(target)
        answer = self.loss.with_prior(teacher.segment(target)["logits"])
        label, probability = upsampled_labels(answer, size, align_corners=teacher.align_corners)

        shown = shown_pixels(batch, size)
        share = confident_share(probability, self.options.threshold, shown)
        valid = valid_pixels(batch, size, self.options.margins, shown).expand_as(label)
        weight = share * valid
        self.loss.count(label.masked_fill(weight == 0, IGNORE))

        return Pseudo(label, weight)

    def mixed_terms(
        self, source: View, target: Tensor, pseudo: Pseudo, progress: float
    ) -> Losses:
        mask = class_mask(source.label, choose_classes(source.label, self.model.num_classes))
        image = self.distorted(paste(mask, source.image, target))
        label = paste(mask, source.label, pseudo.label)
        weight = paste(mask, torch.ones_like(pseudo.weight), pseudo.weight)

        losses, _ = self.student(View(image, label), progress, weight)

        return {**named("mixed", losses), "confident": pseudo.weight.amax()}

    @torch.no_grad()
    def distorted(self, image: Tensor) -> Tensor:
        """Normalised images jittered and blurred, all or none of them by chance, each by factors of its own and all in
        one order of operations (the release draws an order for each mixed image, and one blur for all that are masked).

        Both chances are drawn on the host, so that nothing waits for the device.
        """
        colour, strength = torch.rand(2, dtype=torch.float64, device="cpu").tolist()
        if colour < self.options.jitter:
            order = torch.randperm(4, device="cpu").tolist()
            factors = draw_jitter(len(image), self.options.jitter_strength, image.device)
            rgb = (image * self.model.std + self.model.mean) / 255
            image = (255 * jitter(rgb, factors, order) - self.model.mean) / self.model.std

        if strength < self.options.blur:
            low, high = SIGMA
            image = blur(
                image, low + (high - low) * torch.rand(len(image), device=image.device)
            )

        return image

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.teacher is not None:
            move_average(self.teacher, self.model, ramp(step, self.options.momentum))
        self.loss.after_step(step)


def check_maps(model: SegmentationModel, stage: int, name: str, where: str) -> None:
    """ConfigError, beginning with `where`, unless ImageNet's weights make the map of that stage of the backbone."""
    backbone = model.get_submodule("backbone")
    if any(getattr(module, "neck", None) is not None for module in (model, backbone)):
        raise ConfigError(
            f"{where}: the maps of {name} come through a neck, which ImageNet has not trained; set its weight to 0, or "
            "take a backbone that gives maps of several strides itself"
        )

    maps = len(cast(Sequence[int], backbone.channels))
    if not -maps <= stage < maps:
        raise ConfigError(
            f"{where}.stage: {stage}: {name} gives {maps} maps; set it to {-maps} to {maps - 1}"
        )


def check_streams(cfg: Config, options: DAFormerConfig) -> None:
    """ConfigError where a config's streams are not those of the method, or their crops cannot be mixed."""
    streams = cfg.data.streams
    wanted = ("source", "target") if options.adapt else ("source",)
    missing = [name for name in wanted if name not in streams]
    if streams and missing:
        raise ConfigError(
            f"{cfg.name}: data.streams: {missing[0]} is missing; the method trains on {' and '.join(wanted)}"
        )

    if not streams or not options.adapt:
        return

    source, target = (streams[name] for name in wanted)
    crops = [list(stream.augment.get("crop", ())) for stream in (source, target)]
    pairs = {"batch_size": (source.batch_size, target.batch_size), "augment.crop": crops}
    for key, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ConfigError(
                f"{cfg.name}: data.streams: {key} is {ours} of source and {theirs} of target; make them equal, as "
                "classes of one are pasted into the other"
            )

    check_padding(
        target.augment.get("recipe", "none"), f"{cfg.name}: data.streams.target.augment"
    )
    if crops[1]:
        check_margins(options.margins, tuple(crops[1]), f"{cfg.name}: method.margins")


def ramp(step: int, momentum: float) -> float:
    """The momentum of the teacher's average after 0-based `step`: 1/2, 2/3, 3/4, … up to `momentum`."""
    return min(1 - 1 / (step + 2), momentum)


def set_teacher_mode(teacher: nn.Module, mode: Literal["train", "eval"]) -> None:
    """Evaluation mode, or training mode without what is random in it: batch norm takes the statistics of the batch."""
    teacher.train(mode == "train")
    for module in teacher.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | timm.layers.DropPath):
            module.eval()


def named(kind: str, losses: Losses) -> Losses:
    """The part of a step that learns `ce`, with every term under a name of its own."""
    return {"loss": losses["ce"], **{f"{kind}_{name}": value for name, value in losses.items()}}
