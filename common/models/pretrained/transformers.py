"""MiT, Swin, ViT and K-Net under the names of OpenMMLab, of the first releases and of torchvision → our names.

Ours are timm's, so a name that no rule changes passes through. Each function takes (names relative to the backbone →
tensors, backbone module). Constant index and mask tables of window attention are left out.
"""

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from common.models.backbones.vit import resample_positions

Rules = tuple[tuple[str, str], ...]

MIT_RULES: Rules = (
    # OpenMMLab: layers.<stage>.<0 patch embedding, 1 blocks, 2 norm>
    (r"^layers\.0\.0\.projection\.", "patch_embed.proj."),
    (r"^layers\.0\.0\.", "patch_embed."),
    (r"^layers\.(\d)\.0\.projection\.", r"stages.\1.downsample.proj."),
    (r"^layers\.(\d)\.0\.", r"stages.\1.downsample."),
    (r"^layers\.(\d)\.1\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^layers\.(\d)\.2\.", r"stages.\1.norm."),
    (r"\.ffn\.layers\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.dwconv."),
    (r"\.ffn\.layers\.4\.", ".mlp.fc2."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    # SegFormer's and PVTv2's own release: stages count from 1
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
)
SWIN_RULES: Rules = (
    # OpenMMLab
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^stages\.(\d)\.blocks\.", r"layers.\1.blocks."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^norm(\d)\.", r"norms.\1."),
    # torchvision: features.<0 patch embedding, 1 3 5 7 blocks, 2 4 6 merging>
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
VIT_RULES: Rules = (
    # OpenMMLab; timm's `patch_embed.proj` loses its last part too, since ours is the convolution itself
    (r"^patch_embed\.(projection|proj)\.", "patch_embed."),
    (r"^layers\.(\d+)\.ln(\d)\.", r"blocks.\1.norm\2."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    # torchvision
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.ln_(\d)\.", r"blocks.\1.norm\2."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
)


NECK_RULES: Rules = ((r"^(\w+\.\d)\.conv\.", r"\1."),)
DEEPLABV2_RULES: Rules = ((r"^aspp_modules\.(\d+)\.conv\.", r"convs.\1."),)
HRDA_RULES: Rules = (
    (r"^(head|scale_attention)\.aspp_modules\.(\d+)\.conv\.", r"\1.convs.\2."),
)
KNET_RULES: Rules = (
    (r"\.feat_transform\.conv\.", ".feat_transform."),
    (r"\.attention\.attn\.", ".attention."),
    (r"\.ffn\.layers\.0\.0\.", ".ffn.0."),
    (r"\.ffn\.layers\.1\.", ".ffn.2."),
)


def rename(name: str, rules: Rules) -> str:
    """`name` after every rule (pattern, replacement), in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def renamed(rules: Rules) -> Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]]:
    """A function that renames by `rules` and leaves the tensors alone."""
    return lambda state, module: {rename(name, rules): tensor for name, tensor in state.items()}


def mit(state: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Query and key/value are one matrix at OpenMMLab, and the MLP's two linears are 1×1 convolutions."""
    result = {}
    for name, tensor in state.items():
        name = _mit_stages_from_zero(rename(name, MIT_RULES))
        if ".attn.qkv." in name:
            width = len(tensor) // 3
            result[name.replace(".qkv.", ".q.")] = tensor[:width]
            result[name.replace(".qkv.", ".kv.")] = tensor[width:]
        else:
            linear = re.search(r"\.mlp\.fc[12]\.weight$", name) and tensor.ndim == 4
            result[name] = tensor.flatten(1) if linear else tensor

    return result


def _mit_stages_from_zero(name: str) -> str:
    """SegFormer's own names: patch_embed1..4, block1..4.<i>, norm1..4."""
    match = re.match(r"(patch_embed|block|norm)([1-4])\.(.*)", name)
    if match is None:
        return name

    kind = match[1]
    stage = int(match[2]) - 1
    rest = match[3]
    if kind == "patch_embed":
        return f"stages.{stage}.downsample.{rest}" if stage else f"patch_embed.{rest}"

    return f"stages.{stage}.{'blocks' if kind == 'block' else 'norm'}.{rest}"


def swin(state: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """The merging of patches ends a stage in all releases but timm's; OpenMMLab's joins the four neighbours
    channel by channel (as `unfold` does), the others neighbour by neighbour."""
    # first release of Swin, timm before 0.9
    ends_stage = "layers.0.downsample.reduction.weight" in state
    result = {}

    for name, tensor in state.items():
        if name.endswith((".relative_position_index", ".attn_mask")):
            continue

        name = rename(name, SWIN_RULES)
        stage = re.match(r"(stages|features|layers)\.(\d)\.(downsample\.)?(.*)", name)
        if stage is not None:
            name, tensor = _swin_stage(*stage.groups(), tensor, ends_stage)

        result[name] = tensor

    return result


def _swin_stage(
    kind: str, index: str, merging: str | None, rest: str, tensor: Tensor, ends_stage: bool
):
    """Name and tensor of one entry of a stage under our names."""
    number = int(index)
    # torchvision counts stages and mergings together, and blocks have no name of their own
    if kind == "features":
        return (
            f"layers.{number // 2}.{'downsample' if number % 2 == 0 else 'blocks'}.{rest}",
            tensor,
        )
    if kind == "stages":
        return f"layers.{number + 1}.downsample.{rest}", _neighbour_major(tensor)

    if merging and ends_stage:
        number += 1

    return f"layers.{number}.{merging or ''}{rest}", tensor


def _neighbour_major(tensor: Tensor) -> Tensor:
    """Last dimension (C, 4 neighbours in row order) → (4 neighbours in column order, C)."""
    return tensor.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)


def vit(state: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Positions of another (square) grid are resampled; a patch embedding without bias gets a zero one."""
    result = {rename(name, VIT_RULES): tensor for name, tensor in state.items()}
    if "patch_embed.weight" in result:
        result.setdefault("patch_embed.bias", torch.zeros(len(result["patch_embed.weight"])))

    positions = result.get("pos_embed")
    if positions is not None and positions.shape[1] != backbone.pos_embed.shape[1]:
        side = math.isqrt(positions.shape[1] - 1)
        result["pos_embed"] = resample_positions(positions.float(), (side, side), backbone.grid)

    return result
