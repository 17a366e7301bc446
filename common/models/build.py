"""MODELS: the networks by name; `build_model` makes the one that a config describes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import nn

from common.config import ConfigError, ModelConfig, pick, typed
from common.config.bounds import AtLeast, AtMost, Count, Length, Rate, Side, Size, Width
from common.models.backbones import (
    build_backbone,
    build_pyramid,
    is_timm,
    pixel_statistics,
    require_stride_4,
)
from common.models.cosine import split_options, use_cosine
from common.models.deeplabv2_cpsl import deeplabv2
from common.models.deeplabv3plus_detectron2 import (
    deeplabv3plus_d2,
    deeplabv3plus_u2pl,
    deeplabv3plus_unimatch,
)
from common.models.deeplabv3plus_usrn import deeplabv3plus, usrn
from common.models.disalign import align
from common.models.dpt import dpt
from common.models.heads.daformer import DAFormerHead, Fusion
from common.models.heads.deeplabv2 import DeepLabV2Head
from common.models.heads.fcn import FCNHead
from common.models.heads.knet import HEADS, KNetHead
from common.models.heads.ocr import OCRHead
from common.models.heads.psp import PSPHead
from common.models.heads.segformer import SegFormerHead
from common.models.heads.uper import UPerHead
from common.models.hrda import SHRINK, HRDANetwork, MultiScaleHead
from common.models.mask2former import mask2former
from common.models.neck import MultiLevelNeck
from common.models.pretrained import load_weights
from common.models.segmentor import SegmentationModel, Segmentor

Network = TypeVar("Network", bound=SegmentationModel)
Dilation = Annotated[int, AtLeast(1), AtMost(256)]


@dataclass(frozen=True)
class PyramidOptions:
    """Options of UPerNet and PSPNet."""

    channels: Width = 512
    pool_scales: Annotated[tuple[Side, ...], Length(1, 16)] = (1, 2, 3, 6)
    dropout: Rate = 0.1  # of whole channels, before the classifiers
    auxiliary: bool = True  # an FCN head on map `auxiliary_level`
    auxiliary_level: Annotated[int, AtLeast(0), AtMost(3)] = 2
    auxiliary_channels: Width = 256
    backbone: Mapping[str, Any] = field(default_factory=dict)  # options of the backbone


@dataclass(frozen=True)
class UPerNetOptions(PyramidOptions):
    """Options of UPerNet: backbones with one stride need the multi-level neck; those of timm have it in any case."""

    neck: Literal["mln"] | None = None


@dataclass(frozen=True)
class KNetOptions(PyramidOptions):
    """Options of K-Net on UPerNet."""

    stages: Annotated[int, AtLeast(0), AtMost(32)] = 3  # refinements after UPerNet's own logits

    def __post_init__(self):
        if self.channels % HEADS:
            raise ValueError(
                f"channels: {self.channels} is no multiple of K-Net's {HEADS} attention heads"
            )


@dataclass(frozen=True)
class OCRNetOptions:
    """Options of OCRNet."""

    channels: Width = 512
    context_channels: Width = 256  # of query, key and value
    backbone: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SegFormerOptions:
    """Options of SegFormer."""

    channels: Width = 256
    dropout: Rate = 0.1
    backbone: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DAFormerOptions:
    """Options of DAFormer's network."""

    channels: Width = 256
    fusion: Fusion = "sep_aspp"
    dilations: Annotated[tuple[Dilation, ...], Length(1, 16)] = (1, 6, 12, 18)  # of sep_aspp
    dropout: Rate = 0.1
    backbone: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HRDAOptions(DAFormerOptions):
    """Options of HRDA: the head that both scales share, and the detail crops."""

    head: Literal["daformer", "deeplabv2_reduced"] = "daformer"
    # None: the head's own
    dilations: Annotated[tuple[Dilation, ...], Length(1, 16)] | None = None
    crop: Size = (512, 512)  # of the detail: height, width
    overlap: bool = True  # windows of inference step by half a crop
    window_batch: Count = 9  # of them in one batch, in evaluation mode
    inclusive: bool = False  # detail crops of training may end at the border

    def __post_init__(self):
        if self.head != "daformer":
            for name in ("channels", "fusion", "dropout"):
                if getattr(self, name) != getattr(DAFormerOptions, name):
                    raise ValueError(
                        f"{name}: of head: daformer; remove it, or change the head"
                    )
        multiple = 2 * SHRINK * (4 if self.head == "daformer" else 8)
        if any(side % multiple for side in self.crop):
            raise ValueError(
                f"crop: {list(self.crop)}: sides must be multiples of {multiple} for head: {self.head}"
            )


@dataclass(frozen=True)
class DeepLabV2ReducedOptions:
    """Options of DeepLabV2 with few branches."""

    dilations: Annotated[tuple[Dilation, ...], Length(1, 16)] = (6, 12)
    backbone: Mapping[str, Any] = field(default_factory=dict)


def upernet(config: ModelConfig) -> Segmentor:
    """UPerNet: logits at stride 4."""
    options = typed(UPerNetOptions, config.options, "model.options")
    if options.neck == "mln" and is_timm(config):
        raise ConfigError(
            "model.options.neck: backbones timm:NAME have the neck where they need one; set it to null"
        )

    backbone = build_pyramid(config, **options.backbone)
    neck = (
        MultiLevelNeck(backbone.channels, backbone.channels[-1])
        if options.neck == "mln"
        else None
    )
    channels = backbone.channels if neck is None else neck.channels
    head = UPerHead(channels, options.channels, config.num_classes, **_head(config, options))

    return segmentor(
        config, backbone, head, neck=neck, auxiliary_head=_auxiliary(config, options, channels)
    )


def knet(config: ModelConfig) -> Segmentor:
    """K-Net on UPerNet: logits of every stage, at stride 4."""
    options = typed(KNetOptions, config.options, "model.options")
    backbone = build_pyramid(config, **options.backbone)
    generate = UPerHead(
        backbone.channels, options.channels, config.num_classes, **_head(config, options)
    )
    auxiliary = _auxiliary(config, options, backbone.channels)

    model = segmentor(
        config, backbone, KNetHead(generate, stages=options.stages), auxiliary_head=auxiliary
    )
    model.pixel_classifiers = ()  # its weights are kernels, too

    return model


def ocrnet(config: ModelConfig) -> Segmentor:
    """OCRNet: logits at stride 4; `aux` holds those of the coarse stage."""
    options = typed(OCRNetOptions, config.options, "model.options")
    backbone = build_pyramid(config, **options.backbone)
    shared = {
        "context_channels": options.context_channels,
        "align_corners": config.align_corners,
    }
    return segmentor(
        config,
        backbone,
        OCRHead(backbone.channels, options.channels, config.num_classes, **shared),
    )


def segformer(config: ModelConfig) -> Segmentor:
    """SegFormer: logits at stride 4."""
    options = typed(SegFormerOptions, config.options, "model.options")
    backbone = build_pyramid(config, **options.backbone)
    shared = {"dropout": options.dropout, "align_corners": config.align_corners}
    return segmentor(
        config,
        backbone,
        SegFormerHead(backbone.channels, options.channels, config.num_classes, **shared),
    )


def daformer(config: ModelConfig) -> Segmentor:
    """DAFormer's network: logits at the stride of the backbone's first map, 4."""
    options = typed(DAFormerOptions, config.options, "model.options")
    backbone = build_pyramid(config, **options.backbone)
    return segmentor(config, backbone, _daformer_head(config, options, backbone.channels))


def _daformer_head(
    config: ModelConfig, options: DAFormerOptions, channels: tuple[int, ...]
) -> DAFormerHead:
    return DAFormerHead(
        channels,
        options.channels,
        config.num_classes,
        fusion=options.fusion,
        dilations=options.dilations,
        dropout=options.dropout,
        align_corners=config.align_corners,
    )


def hrda(config: ModelConfig) -> HRDANetwork:
    """HRDA on DAFormer's head or the reduced DeepLabV2's: logits at stride 4 or 8 of the image at full size."""
    options = typed(HRDAOptions, config.options, "model.options")
    stride = {"daformer": 4, "deeplabv2_reduced": 8}[options.head]
    if options.head == "daformer":
        backbone = build_pyramid(config, **options.backbone)
        require_stride_4(backbone, "HRDA")
    else:
        chosen = {"output_stride": stride, **options.backbone}
        if chosen["output_stride"] != stride:
            raise ConfigError(
                f"model.options.backbone.output_stride: {chosen['output_stride']}: HRDA's deeplabv2_reduced takes "
                f"{stride}; remove it"
            )
        backbone = build_backbone(config, **chosen)

    if options.head == "daformer":
        options = replace(options, dilations=options.dilations or DAFormerOptions.dilations)
        attention = _daformer_head(config, replace(options, fusion="conv"), backbone.channels)
        heads = MultiScaleHead(_daformer_head(config, options, backbone.channels), attention)
    else:
        dilations = options.dilations or DeepLabV2ReducedOptions.dilations
        both = (
            DeepLabV2Head(backbone.channels, config.num_classes, dilations=dilations)
            for _ in range(2)
        )
        heads = MultiScaleHead(*both)

    mean, std = pixel_statistics(config)
    shared = {"num_classes": config.num_classes, "mean": mean, "std": std}
    details = {
        "crop": options.crop,
        "overlap": options.overlap,
        "window_batch": options.window_batch,
        "inclusive": options.inclusive,
    }

    model = HRDANetwork(
        backbone, heads, align_corners=config.align_corners, stride=stride, **shared, **details
    )
    if options.head == "deeplabv2_reduced":
        model.classifiers = tuple(
            f"decode_head.{part}.convs.{i}"
            for part in ("head", "scale_attention")
            for i in range(len(heads.head.convs))
        )

    return model


def deeplabv2_reduced(config: ModelConfig) -> Segmentor:
    """DeepLabV2 as domain adaptation trains it: logits at the backbone's stride, 8 unless it is told otherwise."""
    options = typed(DeepLabV2ReducedOptions, config.options, "model.options")
    backbone = build_backbone(config, **{"output_stride": 8, **options.backbone})
    head = DeepLabV2Head(backbone.channels, config.num_classes, dilations=options.dilations)
    model = segmentor(config, backbone, head)
    model.classifiers = tuple(f"decode_head.convs.{i}" for i in range(len(head.convs)))

    return model


def pspnet(config: ModelConfig) -> Segmentor:
    """PSPNet: logits at the backbone's stride, 8 unless `options.backbone.output_stride` says otherwise."""
    options = typed(PyramidOptions, config.options, "model.options")
    backbone = build_backbone(config, **{"output_stride": 8, **options.backbone})
    head = PSPHead(
        backbone.channels, options.channels, config.num_classes, **_head(config, options)
    )
    return segmentor(
        config, backbone, head, auxiliary_head=_auxiliary(config, options, backbone.channels)
    )


def _head(config: ModelConfig, options: PyramidOptions) -> dict[str, Any]:
    shared = {"dropout": options.dropout, "align_corners": config.align_corners}
    return {"pool_scales": options.pool_scales, **shared}


def _auxiliary(
    config: ModelConfig, options: PyramidOptions, channels: tuple[int, ...]
) -> FCNHead | None:
    if not options.auxiliary:
        return None

    shared = {"dropout": options.dropout, "align_corners": config.align_corners}
    level = options.auxiliary_level
    if level >= len(channels):
        raise ConfigError(
            f"model.options.auxiliary_level: {level}, but the maps are 0 to {len(channels) - 1}"
        )

    return FCNHead(
        channels, options.auxiliary_channels, config.num_classes, level=level, **shared
    )


def segmentor(
    config: ModelConfig, backbone: nn.Module, decode_head: nn.Module, **parts: nn.Module | None
) -> Segmentor:
    """A Segmentor with the class count, pixel statistics and resizing rule of `config`."""
    mean, std = pixel_statistics(config)
    shared = {"mean": mean, "std": std, "align_corners": config.align_corners}
    return Segmentor(backbone, decode_head, num_classes=config.num_classes, **shared, **parts)


MODELS: dict[str, Callable[[ModelConfig], SegmentationModel]] = {
    "upernet": upernet,
    "pspnet": pspnet,
    "ocrnet": ocrnet,
    "segformer": segformer,
    "knet": knet,
    "daformer": daformer,
    "deeplabv2": deeplabv2,
    "deeplabv2_reduced": deeplabv2_reduced,
    "hrda": hrda,
    "deeplabv3plus": deeplabv3plus,
    "usrn": usrn,
    "deeplabv3plus_d2": deeplabv3plus_d2,
    "deeplabv3plus_unimatch": deeplabv3plus_unimatch,
    "deeplabv3plus_u2pl": deeplabv3plus_u2pl,
    "dpt": dpt,
    "mask2former": mask2former,
}


def build_network(
    config: ModelConfig, kind: type[Network], fitting: str, where: str
) -> Network:
    """`build_model` for a method that uses more of the network than a loss of each head.

    Raises ConfigError, which begins with `where` and names the `fitting` model, for a network of another kind.
    """
    model = build_model(config)
    if not isinstance(model, kind):
        raise ConfigError(
            f"{where}: model.name: {config.name!r} does not fit the method; set it to {fitting}"
        )
    return model


def build_model(config: ModelConfig) -> SegmentationModel:
    """The network that `config` describes, with the weights that it names.

    Under `torch.device("meta")` nothing is allocated or read. Raises ConfigError for an unknown model or option,
    ValueError for weights that do not fit.
    """
    of_classifier, rest = split_options(config)
    model = pick(MODELS, config.name, "model.name")(rest)
    if of_classifier.cosine is not None:
        use_cosine(model, of_classifier.cosine, config.name)
    if config.disalign is not None:
        align(model, config.disalign)

    if config.checkpoint and torch.get_default_device().type != "meta":
        load_weights(model, config.checkpoint, reset_classifier=config.reset_classifier)

    return model


def load_model(
    config: ModelConfig, checkpoint: str | Path, prefix: str | None = None
) -> SegmentationModel:
    """The network of `config` with the weights of `checkpoint` and no others, in evaluation mode.

    checkpoint, prefix: as `load_weights` takes them. Raises what it raises. `reset_classifier` is for the weights that
    training starts from: a classifier that does not fit is an error here, whatever it says.
    """
    model = build_model(replace(config, pretrained=False, checkpoint=None))
    load_weights(model, checkpoint, reset_classifier=None, prefix=prefix)
    return model.eval()
