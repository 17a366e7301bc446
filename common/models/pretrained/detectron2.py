"""detectron2 files of Mask2Former and DeepLabV3+: `.pth` of a training run, `.pkl` of the model zoo (NumPy arrays).

ResNets are timm's here, so detectron2's names (`stem.conv1.norm`, `res2.0.shortcut`) are renamed, and heads likewise,
by the patterns below; Swins have the names of their first release.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from common.models.pretrained.containers import short, state_dict, tensors
from common.models.pretrained.transformers import rename, renamed, swin

HEAD = "sem_seg_head."
# of the loss, and statistics that the model has by itself
UNUSED = ("criterion.", "pixel_mean", "pixel_std")

# Each pattern is searched in the name that the ones before it left.
MASK2FORMER = (
    # MaskFormer's first files lack the segment before the pixel decoder's modules
    (
        r"^sem_seg_head\.(?=(input_proj|transformer|mask_features|adapter_\d|layer_\d)\.)",
        HEAD + "pixel_decoder.",
    ),
    (r"^sem_seg_head\.pixel_decoder\.", "pixel_decoder."),
    (r"^pixel_decoder\.transformer\.(encoder\.)?", "pixel_decoder."),
    (r"^pixel_decoder\.adapter_1\.(weight)", r"pixel_decoder.lateral.conv.\1"),
    (r"^pixel_decoder\.adapter_1\.", "pixel_decoder.lateral."),
    (r"^pixel_decoder\.layer_1\.(weight)", r"pixel_decoder.output.conv.\1"),
    (r"^pixel_decoder\.layer_1\.", "pixel_decoder.output."),
    (r"^sem_seg_head\.predictor\.", "decoder."),
    (r"^decoder\.static_query\.", "decoder.query_feat."),  # the model zoo's name
    (r"^decoder\.decoder_norm\.", "decoder.norm."),
    (
        r"^decoder\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.",
        r"decoder.layers.\1.cross_attn.",
    ),
    (
        r"^decoder\.transformer_cross_attention_layers\.(\d+)\.norm\.",
        r"decoder.layers.\1.cross_norm.",
    ),
    (
        r"^decoder\.transformer_self_attention_layers\.(\d+)\.self_attn\.",
        r"decoder.layers.\1.self_attn.",
    ),
    (
        r"^decoder\.transformer_self_attention_layers\.(\d+)\.norm\.",
        r"decoder.layers.\1.self_norm.",
    ),
    (r"^decoder\.transformer_ffn_layers\.(\d+)\.norm\.", r"decoder.layers.\1.ffn_norm."),
    (r"^decoder\.transformer_ffn_layers\.(\d+)\.", r"decoder.layers.\1."),
)
DEEPLAB = (
    (r"^sem_seg_head\.decoder\.res5\.project_conv\.convs\.4\.1\.", "aspp.pool."),
    (r"^sem_seg_head\.decoder\.res5\.project_conv\.convs\.", "aspp.branches."),
    (r"^sem_seg_head\.decoder\.res5\.project_conv\.project\.", "aspp.project."),
    (r"^sem_seg_head\.decoder\.res2\.project_conv\.", "lateral."),
    (r"^sem_seg_head\.decoder\.res2\.fuse_conv\.", "fuse."),
    (r"^((aspp\.branches|fuse)\.\d|aspp\.project|lateral)\.weight$", r"\1.conv.weight"),
    (r"^sem_seg_head\.predictor\.", "predictor."),
)
RESNET = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.conv1\.", "conv1."),
    (r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)
BACKBONE_NAMES = {"resnet": renamed(RESNET), "swin": swin}  # by the backbone's `family`


def matches(raw: Mapping[str, Any]) -> bool:
    """Whether `raw` (an unpickled file) holds a semantic segmentation model of detectron2."""
    return any(name.startswith(HEAD) for name in state_dict(raw))


def convert(raw: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors under the names of `model`; what belongs to the loss is left out, and logged."""
    state = tensors(state_dict(raw))
    unused = [name for name in state if name.startswith(UNUSED)]
    if unused:
        logging.getLogger(__name__).info(
            "detectron2 checkpoint: not of the network: %s", short(unused)
        )

    inner = {
        name.removeprefix("backbone."): t
        for name, t in state.items()
        if name.startswith("backbone.")
    }
    if hasattr(model, "backbone"):
        inner = BACKBONE_NAMES[model.backbone.family](inner, model.backbone)

    rules = MASK2FORMER if hasattr(model, "pixel_decoder") else DEEPLAB
    rest = {
        rename(n, rules): t
        for n, t in state.items()
        if not n.startswith(("backbone.", *UNUSED))
    }

    return {**{f"backbone.{name}": t for name, t in inner.items()}, **rest}
