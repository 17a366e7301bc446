"""Any backbone of timm that gives feature maps: `backbone: timm:NAME`.

Hierarchical networks (ResNets, ConvNeXt, EfficientNet, PVT, Swin, MaxViT, …) give their maps from stride 4 on, plain
transformers (ViT, DINOv2, DINOv3, EVA) the tokens of four evenly spaced blocks as maps of one stride.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError, nearest
from common.config.bounds import AtLeast, AtMost, Length, Rate
from common.lazy import Lazy
from common.models.neck import MultiLevelNeck
from common.models.pretrained.classifiers import classifier_weights
from common.ops.resize import Size

timm = Lazy("timm")

PREFIX = "timm:"
# how timm lets images be of any size
SIZE_OPTIONS = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
FINEST = 4  # stride of the finest map that heads read
PYRAMID = (4, 8, 16, 32)  # strides that the neck makes of a plain transformer's maps

# images that a network of divisor 1 has to take: sides 1, 2 and 3 over a multiple of 4, as strides
# that round down may show at any of them alone
UNEVEN = ((97, 130), (99, 135))

Level = Annotated[int, AtLeast(0), AtMost(1000)]
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


class TimmFeatures(nn.Module):
    """Normalised images (B, 3, H, W) to a list of maps (B, C, ⌈H/stride⌉, ⌈W/stride⌉) (the neck's coarsest: ⌊…⌋).

    A network that takes only multiples of its patch, stride or window sees the image filled up with 0 at the bottom and
    right to a multiple of `divisor`; what its maps show of that alone is cut off.

    channels, strides: of the maps. net: timm's network. name: its name.
    """

    family = "timm"

    def __init__(self, net: nn.Module, divisor: int, name: str):
        super().__init__()
        self.net = net
        self.name = name
        self.divisor = divisor
        self.neck: MultiLevelNeck | None = None
        self.channels = tuple(net.feature_info.channels())
        self.strides = tuple(net.feature_info.reduction())
        self.frozen_norm = False
        self.width_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    @property
    def plain(self) -> bool:
        """Whether all maps have one stride, as those of a plain transformer."""
        return len(set(self.strides)) == 1

    def add_neck(self) -> None:
        """Make maps of strides 4, 8, 16 and 32 of four maps of one stride."""
        stride = self.strides[0]
        if len(self.strides) != len(PYRAMID):
            given = len(self.strides)
            raise ConfigError(
                f"model.options.backbone.taps: {given} blocks of {PREFIX}{self.name}; a pyramid needs 4"
            )

        scales = tuple(stride / wanted for wanted in PYRAMID)
        self.neck = MultiLevelNeck(self.channels, self.channels[-1], scales)
        self.channels = self.neck.channels
        self.strides = PYRAMID
        # else the finest map would end inside a cell
        self.divisor = math.lcm(self.divisor, FINEST)

    def freeze_norm(self, *, untrained: bool) -> None:
        """Batch norms keep their statistics and weights from now on; `untrained`: their scales become 1 (a residual
        block whose last scale began at 0 would stay out of the network for good)."""
        self.frozen_norm = True
        for norm in self._batchnorms():
            norm.requires_grad_(False)
            if untrained and norm.weight is not None:
                nn.init.ones_(norm.weight)

        self.train(self.training)

    def train(self, mode: bool = True) -> "TimmFeatures":
        super().train(mode)
        if self.frozen_norm:
            for norm in self._batchnorms():
                norm.eval()

        return self

    def _batchnorms(self) -> list[nn.Module]:
        return [m for m in self.net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def forward(self, x: Tensor) -> list[Tensor]:
        height, width = x.shape[-2:]
        down = -height % self.divisor
        right = -width % self.divisor
        if down or right:
            x = F.pad(x, (0, right, 0, down))

        maps = self.net(x)
        if self.width_last:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]

        if self.neck is not None:
            maps = self.neck(maps)

        if not down and not right:
            return list(maps)

        return [
            m[..., : -(-height // s), : -(-width // s)]
            for m, s in zip(maps, self.strides, strict=True)
        ]


def timm_features(
    name: str,
    pretrained: bool | str = False,
    *,
    drop_path: Rate | None = None,
    output_stride: Literal[32, 16, 8] | None = None,
    taps: Annotated[tuple[Level, ...], Length(1, 100)] | None = None,
) -> TimmFeatures:
    """The backbone `name` of timm, e.g. `convnext_tiny.fb_in22k`.

    pretrained: True, timm's own weights from the hub; or weights of the classifier, as `classifier_weights` takes them.
    drop_path: rate of stochastic depth. output_stride: 8 or 16 where timm offers dilation. taps: blocks of a plain
    transformer, or levels of another network, whose maps are given.

    Raises ConfigError for an unknown name or an option that it does not have, ValueError for weights that do not fit.
    """
    _require(name)
    options = {"drop_path_rate": drop_path, "output_stride": output_stride}
    options = {key: value for key, value in options.items() if value is not None}
    plan = _plan(name, tuple(options.items()))
    made = {
        **options,
        **plan.sizes,
        "features_only": True,
        "out_indices": _levels(name, plan.strides, taps),
    }

    if pretrained and torch.get_default_device().type != "meta":
        state = classifier_weights(name, pretrained, plan.sizes)
        made |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}

    with _quiet():
        net = timm.create_model(name, **made)

    return TimmFeatures(net, plan.divisor, name)


def own_statistics(name: str) -> Statistics:
    """Mean and deviation of the pixels that a timm model was trained on, on the 0–255 scale."""
    _require(name)
    config = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    return tuple(255 * value for value in config.mean), tuple(
        255 * value for value in config.std
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without timm's warning of the tensors that stand behind the last map: all have been checked before."""
    logger = logging.getLogger("timm.models._builder")
    before = logger.level
    logger.setLevel(logging.ERROR)

    try:
        yield
    finally:
        logger.setLevel(before)


def _require(name: str) -> None:
    """ConfigError unless timm has the model, and the tag that may stand after a dot."""
    architecture, _, tag = name.partition(".")
    known = dict.fromkeys(timm.list_models())
    if architecture not in known:
        hint = nearest(architecture, known)
        hint = hint if len(hint) < 100 else "timm.list_models() names them"
        raise ConfigError(f"model.backbone: timm has no model {architecture!r}; {hint}")

    tags = timm.models.list_pretrained(f"{architecture}.*") if tag else [name]
    if name not in tags:
        hint = ", ".join(tags[:4]) or "it has none"
        raise ConfigError(
            f"model.backbone: timm has no weights {name!r}; those of this model: {hint}"
        )


# What a model can do, asked of a copy that holds no memory ----------------------------------------------------------


class Plan(NamedTuple):
    """How a model is made so that it takes images of any size."""

    sizes: Mapping[str, Any]  # timm's option for that
    strides: tuple[int, ...]  # of every map that it can give
    divisor: int  # of the sides that it takes


@cache
def _plan(name: str, options: tuple[tuple[str, Any], ...]) -> Plan:
    """ConfigError where the model gives no maps, lacks an option, or takes images of one size alone."""
    sizes, draft = _draft(name, dict(options))
    strides = tuple(item["reduction"] for item in draft.feature_info.info)
    asked = dict(options).get("output_stride")
    if asked is not None and max(strides) != asked:
        raise ConfigError(
            f"model.options.backbone.output_stride: {asked}: timm:{name} has stride {max(strides)}; set it to null"
        )

    return Plan(sizes, strides, _divisor(name, draft))


def _draft(name: str, options: Mapping[str, Any]) -> tuple[Mapping[str, Any], nn.Module]:
    """The option that lets the model take images of any size, and the model so made, without memory."""
    problem: Exception | None = None
    for sizes in SIZE_OPTIONS:
        try:
            with torch.device("meta"):
                return sizes, timm.create_model(
                    name, features_only=True, **options, **sizes
                ).eval()
        except (
            TypeError,
            RuntimeError,
            AssertionError,
            NotImplementedError,
            AttributeError,
            ValueError,
        ) as error:
            problem = error

    reason = " ".join(str(problem).split())[:200]
    if not options:
        raise ConfigError(
            f"model.backbone: timm:{name} gives no feature maps ({reason}); choose another"
        )

    given = " and ".join({"drop_path_rate": "drop_path"}.get(key, key) for key in options)
    raise ConfigError(
        f"model.options.backbone: timm:{name} cannot be made with {given} ({reason}); set it to null"
    )


def _levels(
    name: str, strides: tuple[int, ...], taps: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Which of the model's maps are given."""
    if taps is None:
        if len(set(strides)) == 1:  # a plain transformer
            return tuple(len(strides) * part // 4 - 1 for part in (1, 2, 3, 4))
        return tuple(level for level, stride in enumerate(strides) if stride >= FINEST)[-4:]

    last = len(strides) - 1
    if max(taps) > last or list(taps) != sorted(set(taps)):
        raise ConfigError(
            f"model.options.backbone.taps: {list(taps)}: timm:{name} has maps 0 to {last}; name some in ascending order"
        )

    return taps


def _divisor(name: str, draft: nn.Module) -> int:
    """What the sides of an image have to be multiples of: nothing, a patch, a few of the coarsest
    stride or whole windows; the least of them that works.

    Raises ConfigError where none does.
    """
    strides = draft.feature_info.reduction()
    coarsest = max(strides)
    native = timm.get_pretrained_cfg(name)
    window = max(native.input_size[1:]) if native is not None else coarsest
    # maps that are cut into patches of 2 or 4 cells need so many of them
    tried = {1, min(strides), FINEST, coarsest, 2 * coarsest, 4 * coarsest, window}

    misfit = ""
    for divisor in sorted(tried):
        found = _misfit(draft, divisor)
        if found is None:
            return divisor
        misfit = misfit or found

    if misfit:
        raise ConfigError(
            f"model.backbone: timm:{name} has maps of other sides than ⌈side/stride⌉ ({misfit}); "
            "choose another backbone"
        )

    raise ConfigError(
        f"model.backbone: timm:{name} takes images of {window}×{window} alone; "
        "choose one that takes any size"
    )


def _sizes(divisor: int) -> tuple[Size, ...]:
    """Images to try, in pixels: their sides are multiples of `divisor`."""
    if divisor == 1:
        return UNEVEN

    # odd multiples, else they would be multiples of twice the divisor
    return ((divisor * (97 // divisor + 2 | 1), divisor * (131 // divisor + 4 | 1)),)


def _misfit(draft: nn.Module, divisor: int) -> str | None:
    """The first map whose sides are not ⌈side/stride⌉, of images whose sides are multiples of
    `divisor`; "" where the network does not take such an image, None where all is well."""
    features = TimmFeatures(draft, divisor, "")
    for height, width in _sizes(divisor):
        try:
            maps = draft(torch.zeros(1, 3, height, width, device="meta"))
        except (RuntimeError, AssertionError, ValueError):
            return ""

        for made, stride in zip(maps, features.strides, strict=True):
            found = tuple(made.shape[1:3] if features.width_last else made.shape[2:])
            wanted = (-(-height // stride), -(-width // stride))
            if found != wanted:
                return (
                    f"of {height}×{width} pixels {found[0]}×{found[1]} at stride {stride}, "
                    f"not {wanted[0]}×{wanted[1]}"
                )

    return None
