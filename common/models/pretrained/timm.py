"""ImageNet weights of our backbones: timm's by tag, or a file (names of timm, torchvision, OpenMMLab or detectron2)."""

import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache
from torch import Tensor, nn

from common.lazy import Lazy
from common.models.pretrained import detectron2, mmseg
from common.models.pretrained.containers import find_weights, read_weights, short

timm = Lazy("timm")

TAGS = {  # backbone → timm's pretrained model
    "resnet18": "resnet18.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "resnet50c": "resnet50c.gluon_in1k",
    "resnet101c": "resnet101c.gluon_in1k",
    "resnet50s": "resnet50s.gluon_in1k",
    "resnet101s": "resnet101s.gluon_in1k",
    "hrnet_w18": "hrnet_w18.ms_in1k",
    "hrnet_w18_small": "hrnet_w18_small.gluon_in1k",
    "mit_b5": "pvt_v2_b5.in1k",  # the same network; SegFormer's authors trained their own
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base": "swin_base_patch4_window12_384.ms_in1k",
    "swin_large": "swin_large_patch4_window12_384.ms_in22k",
    "vit_base_patch16": "vit_base_patch16_224.orig_in21k_ft_in1k",
    "dinov2_small": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_base": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_large": "vit_large_patch14_dinov2.lvd142m",
}


@dataclass(frozen=True)
class Family:
    """How the weight files of a backbone family differ from the backbone."""

    unused: tuple[str, ...] = ()  # beginnings of names that the backbone has no use for
    absent: tuple[
        str, ...
    ] = ()  # beginnings of our names that classification weights lack; they keep their start
    # timm's names → ours
    rename: Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]] | None = None


FAMILIES: dict[str, Family] = {
    "resnet": Family(unused=("fc.", "stem.fc.")),
    "hrnet": Family(
        unused=("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.")
    ),
    "mit": Family(unused=("head.",)),
    "swin": Family(unused=("head.", "norm."), absent=("norms.",)),
    "dinov2": Family(unused=("mask_token",)),
    "vit": Family(
        unused=("head.", "heads.", "pre_logits.", "norm.", "fc_norm.", "ln1.", "encoder.ln.")
    ),
}


def load_backbone(backbone: nn.Module, name: str, source: bool | str | Path) -> None:
    """ImageNet weights into `backbone` (with a `family`): timm's for `name` when `source` is True, else those of what
    `find_weights` finds.

    Raises ValueError where timm has none or they cannot be fetched, and where a file does not fit.
    """
    if next(backbone.parameters()).is_meta:
        return

    state = _fetch(name) if source is True else read_weights(find_weights(source))
    where = f"weights of {name}" if source is True else str(source)
    family = FAMILIES[backbone.family]
    attempts = []

    for candidate in _spellings(state, backbone, family):
        problems, dropped = _compare(candidate, backbone, family)
        if not problems:
            logging.getLogger(__name__).info(
                "%s: loaded; unused: %s", where, short(dropped) or "nothing"
            )
            backbone.load_state_dict(candidate, strict=False)
            return

        attempts.append(problems)

    nearest = min(attempts, key=lambda problems: sum(map(len, problems.values())))
    lists = "; ".join(f"{title}: {short(names)}" for title, names in nearest.items())
    raise ValueError(f"{where}: does not fit the backbone {name}. {lists}")


def fits_backbone(state: dict[str, Tensor], backbone: nn.Module) -> bool:
    """Whether `load_backbone` would take weights of these names and shapes."""
    family = FAMILIES.get(getattr(backbone, "family", ""))
    if family is None:
        return False
    return not all(
        _compare(candidate, backbone, family)[0]
        for candidate in _spellings(state, backbone, family)
    )


def _fetch(name: str) -> dict[str, Tensor]:
    if name not in TAGS:
        raise ValueError(
            f"model.pretrained: no public weights for {name}; set it to a file, or to false"
        )
    try:
        check_host(TAGS[name])
        return timm.create_model(TAGS[name], pretrained=True).state_dict()
    except Exception as error:  # whatever the download library of the day raises
        raise ValueError(
            f"model.pretrained: cannot fetch {TAGS[name]} ({type(error).__name__}); without network, set it to a file "
            "with these weights (names of timm, torchvision, OpenMMLab or detectron2), or to false"
        ) from error


def check_host(tag: str) -> None:
    """Raise OSError at once where nothing is cached and the host has no address: the hub retries for a minute."""
    config = timm.get_pretrained_cfg(tag)
    files = ("model.safetensors", "pytorch_model.bin")
    cached = any(
        isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files
    )
    if not cached and not getproxies():  # a proxy resolves names itself
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)


def _spellings(
    state: dict[str, Tensor], backbone: nn.Module, family: Family
) -> Iterator[dict[str, Tensor]]:
    """`state` as it is, and with timm's, OpenMMLab's and detectron2's names made ours."""
    if any(key.startswith("backbone.") for key in state):
        state = {
            key.removeprefix("backbone."): t
            for key, t in state.items()
            if key.startswith("backbone.")
        }

    yield state

    for rename in (
        family.rename,
        mmseg.NAMES.get(backbone.family),
        detectron2.BACKBONE_NAMES.get(backbone.family),
    ):
        if rename is not None:
            try:
                yield rename(state, backbone)
            except (KeyError, ValueError, RuntimeError):  # not that spelling
                continue


def _compare(
    state: dict[str, Tensor], backbone: nn.Module, family: Family
) -> tuple[dict[str, list[str]], list[str]]:
    """What is wrong with `state`, by title, and the names that are dropped."""
    own = backbone.state_dict()
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    missing = [n for n in missing if not n.startswith(family.absent or ("\0",))]
    extra = [n for n in state if n not in own and not n.endswith("num_batches_tracked")]
    dropped = [n for n in extra if n.startswith(family.unused or ("\0",))]
    shapes = [n for n in own if n in state and state[n].shape != own[n].shape]
    found = {
        "missing": missing,
        "unknown": [n for n in extra if n not in dropped],
        "of another shape": shapes,
    }

    return {title: names for title, names in found.items() if names}, dropped
