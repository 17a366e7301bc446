"""HRNet, MiT, Swin and ViT against other libraries and plain forms; their weight files; how they start."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.pvt_v2 import checkpoint_filter_fn
from torch import nn

from common.config import ConfigError, ModelConfig
from common.models.backbones import BACKBONES, build_backbone
from common.models.backbones.hrnet import HRNet, fuse
from common.models.backbones.mit import MiT
from common.models.backbones.swin import Block, Swin, shift_mask
from common.models.backbones.vit import ViT, resample_positions
from common.models.heads.knet import KNetHead
from common.models.heads.ocr import OCRHead
from common.models.heads.uper import UPerHead
from common.models.neck import MultiLevelNeck
from common.models.pretrained import load_backbone


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise(module: nn.Module) -> None:
    """Random norms and biases too, so that no two of them can be swapped unseen."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.1 if p.ndim > 1 else 1.0)


def relative_error(ours, expected):
    return float((ours - expected).norm() / expected.norm())


# --- HRNet


def test_hrnet_is_timms_with_bilinear_fusion():
    expected = timm.create_model("hrnet_w18_small", features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
    for module in expected.modules():
        if isinstance(module, nn.Upsample):
            module.mode = "bilinear"
    ours = HRNet("hrnet_w18_small")
    ours.load_state_dict(expected.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(ours.eval()(x), expected.eval()(x), strict=True):
            assert relative_error(a, b) < 1e-5


def interpolate_1d(length: int, out: int, scale: float) -> torch.Tensor:
    """(out, length) matrix of linear interpolation with half-pixel centres; output i samples (i + ½) / scale − ½."""
    matrix = torch.zeros(out, length)
    for i in range(out):
        source = min(max((i + 0.5) / scale - 0.5, 0), length - 1)
        low = math.floor(source)
        matrix[i, low] += 1 - (source - low)
        matrix[i, min(low + 1, length - 1)] += source - low
    return matrix


def test_hrnet_fusion_of_odd_sizes():
    """A branch is enlarged by its factor, and once more where that misses the finer branch's size."""
    layers = HRNet("hrnet_w18_small").eval().stage3[0].fuse_layers
    branches = [torch.randn(2, 16, 9, 13), torch.randn(2, 32, 5, 7), torch.randn(2, 64, 3, 4)]

    def enlarge(x, factor, size):
        for out in ((x.shape[2] * factor, x.shape[3] * factor), size):
            rows = interpolate_1d(x.shape[2], out[0], out[0] / x.shape[2])
            columns = interpolate_1d(x.shape[3], out[1], out[1] / x.shape[3])
            x = rows @ x @ columns.T
        return x

    with torch.no_grad():
        for i, fused in enumerate(fuse(layers, branches)):
            total, size = branches[i].clone(), branches[i].shape[2:]
            for j in range(3):
                if j > i:
                    total += enlarge(layers[i][j][1](layers[i][j][0](branches[j])), 2 ** (j - i), size)
                elif j < i:
                    total += layers[i][j](branches[j])
            torch.testing.assert_close(fused, total.relu(), rtol=1e-4, atol=1e-5)


# --- MiT


def test_mit_reads_the_names_of_its_first_release(tmp_path):
    """timm knows them too (they are those of PVTv2)."""
    backbone, theirs = MiT(), {}
    for name, tensor in backbone.state_dict().items():
        if name.startswith("patch_embed."):
            old = "patch_embed1." + name.removeprefix("patch_embed.")
        else:
            _, stage, kind, rest = name.split(".", 3)
            kind = {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}[kind]
            old = f"{kind}{int(stage) + 1}.{rest}".replace("dwconv.", "dwconv.dwconv.")
        theirs[old] = torch.randn_like(tensor)
    expected = checkpoint_filter_fn(theirs, backbone)
    torch.save({**theirs, "head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}, tmp_path / "mit.pth")
    load_backbone(backbone, "mit_b0", tmp_path / "mit.pth")
    assert backbone.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in backbone.state_dict().items())


def test_mit_b0_has_no_public_weights():
    config = ModelConfig("segformer", 19, "mit_b0", pretrained=True)
    with pytest.raises(ValueError, match="no public weights for mit_b0; set it to a file, or to false") as error:
        build_backbone(config)
    assert "\n" not in str(error.value)


# --- Swin


@pytest.fixture(scope="module")
def torchvision_swin():
    torch.manual_seed(1)
    model = torchvision.models.swin_t(weights=None).eval()
    randomise(model.features)
    return model


@pytest.mark.parametrize("size", [(260, 292), (224, 452)])
def test_swin_is_torchvisions_where_maps_exceed_the_window(torchvision_swin, size, tmp_path):
    """Most stages have sides that are no multiples of 7; torchvision pads first as well."""
    torch.save(torchvision_swin.state_dict(), tmp_path / "swin.pth")
    ours = Swin().eval()
    load_backbone(ours, "swin_tiny", tmp_path / "swin.pth")
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps, y = ours(x), x
        for i, layer in enumerate(torchvision_swin.features):
            y = layer(y)
            if i % 2 and not (i == 7 and size[0] == 224):  # torchvision drops the shift on a map of one window
                expected = F.layer_norm(y, y.shape[-1:]).permute(0, 3, 1, 2)
                assert relative_error(maps[i // 2], expected) < 1e-5


def window_attention_in_loops(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The attention branch of a block on (H, W, C): each pixel attends to its window after padding and shifting."""
    height, width, dim = x.shape
    window, shift, heads = block.window, block.shift, block.attn.heads
    rows, columns = (math.ceil(side / window) * window for side in (height, width))
    padded = torch.zeros(rows, columns, dim)
    padded[:height, :width] = block.norm1(x)
    q, k, v = block.attn.qkv(padded).unflatten(-1, (3, heads, dim // heads)).permute(2, 3, 0, 1, 4)
    table, out = block.attn.relative_position_bias_table, torch.zeros(height, width, dim)
    shifted = {(y, x): ((y - shift) % rows, (x - shift) % columns) for y in range(rows) for x in range(columns)}
    for (y, x), (sy, sx) in shifted.items():
        if y >= height or x >= width:
            continue
        logits, values = [], []
        for (ky, kx), (ty, tx) in shifted.items():
            if (sy // window, sx // window) != (ty // window, tx // window):
                continue
            bias = table[(sy - ty + window - 1) * (2 * window - 1) + sx - tx + window - 1]
            wrapped = (y < shift) != (ky < shift) or (x < shift) != (kx < shift)
            score = (q[:, y, x] * k[:, ky, kx]).sum(-1) * (dim // heads) ** -0.5
            logits.append(score + bias - 100.0 * wrapped)
            values.append(v[:, ky, kx])
        weights = torch.stack(logits).softmax(0)
        out[y, x] = (weights[..., None] * torch.stack(values)).sum(0).flatten()
    return block.attn.proj(out)


@pytest.mark.parametrize("size", [(4, 3), (3, 7), (5, 2), (8, 4)])
@pytest.mark.parametrize("shift", [0, 1])
def test_swin_attention_pads_shifts_and_always_partitions(size, shift):
    """Maps smaller than a window are shifted too, which neither timm nor torchvision does."""
    block = Block(8, heads=2, window=4, shift=shift, drop_path=0.0)
    randomise(block)
    x = torch.randn(2, *size, 8)
    rows, columns = (math.ceil(side / 4) * 4 for side in size)
    with torch.no_grad():
        mask = shift_mask(rows, columns, 4, shift, like=x) if shift else None
        ours = block._attention(block.norm1(x), mask)
        for image, expected in zip(ours, x, strict=True):
            torch.testing.assert_close(image, window_attention_in_loops(block, expected), rtol=1e-4, atol=1e-5)


def test_swin_reads_timm_and_the_first_release(tmp_path):
    """Patch merging begins a stage in timm and ended one in the first release, which also stored its masks."""
    released, timms = {}, timm.create_model("swin_tiny_patch4_window7_224").state_dict()
    for name, tensor in timms.items():
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        released[name.replace("head.fc.", "head.")] = tensor
    released["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    released["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    for state in (timms, {"model": released}):
        backbone = Swin()
        torch.save(state, tmp_path / "swin.pth")
        load_backbone(backbone, "swin_tiny", tmp_path / "swin.pth")
        own = backbone.state_dict()
        assert all(torch.equal(t, timms[name]) for name, t in own.items() if not name.startswith("norms."))
        assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in backbone.norms)


# --- ViT


def small_vit(**options):
    return ViT(dim=32, heads=2, taps=(0, 2), **options)


def test_vit_is_torchvisions(tmp_path):
    theirs = torchvision.models.VisionTransformer(64, 16, 3, 2, 32, 128).eval()
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = small_vit(grid=4).eval()
    load_backbone(ours, "vit_base_patch16", tmp_path / "vit.pth")
    x = torch.randn(2, 3, 64, 64)
    tokens = torch.cat((theirs.class_token.expand(2, -1, -1), theirs._process_input(x)), 1)
    tokens, maps = tokens + theirs.encoder.pos_embedding, []
    with torch.no_grad():
        for layer in theirs.encoder.layers:
            tokens = layer(tokens)
            maps.append(tokens[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4))
        first, last = ours(x)
    assert relative_error(first, maps[0]) < 1e-5
    assert relative_error(last, maps[2]) < 1e-5


def cubic(distance: float) -> float:
    """Keys' kernel with a = −0.75."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def bicubic_1d(length: int, out: int) -> torch.Tensor:
    """(out, length) matrix without antialiasing; the border is repeated."""
    matrix = torch.zeros(out, length)
    for i in range(out):
        source = (i + 0.5) * length / out - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            matrix[i, min(max(tap, 0), length - 1)] += cubic(source - tap)
    return matrix


@pytest.mark.parametrize("target", [(8, 8), (3, 5), (2, 11)])
def test_positions_are_resampled_without_antialiasing(target):
    table = torch.randn(1, 1 + 6 * 6, 4)
    ours = resample_positions(table, (6, 6), target)
    assert torch.equal(ours[:, 0], table[:, 0])
    grid = table[:, 1:].reshape(6, 6, 4).permute(2, 0, 1)
    expected = bicubic_1d(6, target[0]) @ grid @ bicubic_1d(6, target[1]).T
    torch.testing.assert_close(ours[0, 1:], expected.permute(1, 2, 0).flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_vit_positions_go_by_the_number_of_tokens():
    backbone = small_vit(grid=4)
    assert backbone._positions(4, 4) is backbone.pos_embed
    assert backbone._positions(2, 8) is backbone.pos_embed
    assert backbone._positions(4, 5).shape == (1, 21, 32)
    backbone(torch.randn(1, 3, 64, 80))[1].sum().backward()
    assert backbone.pos_embed.grad.any() and backbone.cls_token.grad.any()


def test_vit_pads_to_whole_patches():
    backbone, x = small_vit(grid=4).eval(), torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        for a, b in zip(backbone(x), backbone(F.pad(x, (0, 10, 0, 14))), strict=True):
            assert a.shape == (1, 32, 4, 5) and torch.equal(a, b)


def test_vit_reads_timm_at_another_grid(tmp_path):
    timms = timm.create_model("vit_base_patch16_224", embed_dim=32, num_heads=2, depth=3, img_size=64).state_dict()
    torch.save(timms, tmp_path / "vit.pth")
    backbone = small_vit(grid=8)
    load_backbone(backbone, "vit_base_patch16", tmp_path / "vit.pth")
    assert torch.equal(backbone.patch_embed.weight, timms["patch_embed.proj.weight"])
    assert torch.equal(backbone.blocks[2].attn.qkv.weight, timms["blocks.2.attn.qkv.weight"])
    assert torch.equal(backbone.pos_embed, resample_positions(timms["pos_embed"], (4, 4), (8, 8)))


# --- neck


def test_neck_halves_odd_maps_by_pairs():
    """Factor ½ with half-pixel centres is the mean of 2×2 pixels; an odd last row and column are left out."""
    neck = MultiLevelNeck((1, 1, 1, 1), 1)
    for conv in (*neck.lateral_convs, *neck.convs):
        nn.init.dirac_(conv.weight)
    maps = [torch.randn(1, 1, 5, 7)] * 4
    with torch.no_grad():
        quarter, eighth, same, half = neck(maps)
    assert quarter.shape[2:] == (20, 28) and eighth.shape[2:] == (10, 14)
    torch.testing.assert_close(same, maps[0])
    torch.testing.assert_close(half, F.avg_pool2d(maps[0], 2))
    enlarge = interpolate_1d(5, 20, 4) @ maps[0] @ interpolate_1d(7, 28, 4).T
    torch.testing.assert_close(quarter, enlarge, rtol=1e-4, atol=1e-5)


# --- initialisation and options


def test_stochastic_depth_rises_linearly():
    """The first block has none."""
    blocks = [block for stage in Swin().layers for block in stage.blocks]
    assert [block.drop_path.drop_prob for block in blocks[1:]] == pytest.approx([0.3 * i / 11 for i in range(1, 12)])
    blocks = [block for stage in MiT().stages for block in stage.blocks]
    assert [block.drop_path1.drop_prob for block in blocks[1:]] == pytest.approx([0.1 * i / 7 for i in range(1, 8)])


def spread(value):
    """Within what a sample of thousands allows."""
    return pytest.approx(value, rel=0.05)


def test_initial_weights_of_transformers():
    mit = MiT()
    block = mit.stages[3].blocks[0]
    assert block.mlp.fc1.weight.std().item() == spread(math.sqrt(2 / 1024))
    assert block.mlp.fc2.weight.std().item() == spread(math.sqrt(2 / 256))
    assert block.mlp.dwconv.weight.std().item() == spread(math.sqrt(2 / 9))
    assert block.attn.proj.weight.std().item() == spread(0.02)
    packed = torch.cat((block.attn.q.weight, block.attn.kv.weight))
    assert packed.abs().max().item() == spread(math.sqrt(6 / (4 * 256)))
    assert {m.eps for m in mit.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}

    swin = Swin()
    assert swin.layers[3].blocks[0].attn.qkv.weight.std().item() == spread(0.02)
    assert not any(p.any() for name, p in swin.named_parameters() if name.endswith("bias_table"))

    vit = ViT(dim=192, heads=2, taps=(0, 1), grid=8)
    assert vit.blocks[0].attn.qkv.weight.abs().max().item() == spread(math.sqrt(6 / (4 * 192)))
    assert vit.blocks[0].mlp.fc1.weight.std().item() == spread(0.02)
    assert 0 < vit.blocks[0].mlp.fc1.bias.abs().max().item() < 1e-5
    assert vit.patch_embed.weight.std().item() == spread(math.sqrt(2 / (3 * 256)))
    assert vit.pos_embed.std().item() == spread(0.02)


def test_initial_weights_of_cascades():
    """OCRNet's classifiers and K-Net's refinements keep torch's own start, as in the release."""
    coarse, ocr = OCRHead((18, 36, 72, 144), 512, 19)
    for head, width in ((coarse, 270), (ocr, 512)):
        assert head.conv_seg.weight.abs().max().item() == spread(width**-0.5)
        assert head.conv_seg.bias.any() and head.conv_seg.bias.abs().max() <= width**-0.5
    head = KNetHead(UPerHead((8, 8), 64, 5), stages=2)
    assert head.kernel_generate_head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.15)
    stage = head.kernel_update_head[1]
    assert stage.feat_transform.weight.std().item() == spread(math.sqrt(2 / 64)) and not stage.feat_transform.bias.any()
    assert stage.ffn[0].weight.abs().max().item() == spread(1 / 8) and stage.ffn[0].bias.any()
    assert not stage.attention.in_proj_bias.any()
    assert stage.attention.in_proj_weight.abs().max().item() == spread(math.sqrt(6 / (4 * 64)))


@pytest.mark.parametrize("name", ["hrnet_w18", "mit_b0", "swin_tiny", "vit_base_patch16"])
def test_unknown_options_are_named(name):
    with pytest.raises(ConfigError, match=f"{name}.: unknown key 'depht'"):
        build_backbone(ModelConfig("x", 19, name), depht=3)


@pytest.mark.parametrize(
    "name, parameters", [("mit_b5", 81_443_008), ("swin_tiny", 27_520_698), ("vit_base_patch16", 86_433_024)]
)
def test_parameter_counts(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in BACKBONES[name]().parameters()) == parameters
