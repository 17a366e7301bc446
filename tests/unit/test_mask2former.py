"""Mask2Former and detectron2's DeepLabV3+: structure, initial values, training and inference of small variants."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from common.config import ConfigError, ModelConfig
from common.models import build_backbone, build_model, segmentor
from common.models.backbones.frozen_norm import FrozenBatchNorm2d, freeze_batchnorm
from common.models.mask2former import class_probabilities
from common.models.mask2former.decoder import Attention, MaskedDecoder, attention_mask
from common.models.mask2former.pixel_decoder import PixelDecoder, pixel_centres, sine_position
from ltss_benchmark.criterion import CriterionConfig, SetCriterion

SMALL = {
    "hidden_dim": 32,
    "heads": 4,
    "num_queries": 9,
    "encoder_layers": 2,
    "encoder_hidden": 48,
    "decoder_layers": 4,
    "decoder_hidden": 64,
}
CLASSES = 6
pytestmark = pytest.mark.usefixtures("one_thread")


def small(name="mask2former", **options):
    options = {**SMALL, **options} if name == "mask2former" else options
    return build_model(ModelConfig(name, CLASSES, "resnet18" if name == "mask2former" else "resnet50", options=options))


def test_sine_position_of_a_small_map():
    position = sine_position(2, 3, 8, torch.device("cpu"))
    assert position.shape == (6, 8)
    for row, column, k in ((1, 2, 0), (1, 2, 1), (0, 1, 2), (0, 1, 3)):
        frequency = 10000 ** (2 * (k // 2) / 4)
        wave = math.sin if k % 2 == 0 else math.cos
        y = (row + 1) / (2 + 1e-6) * 2 * math.pi
        x = (column + 1) / (3 + 1e-6) * 2 * math.pi
        assert position[row * 3 + column, k].item() == pytest.approx(wave(y / frequency), abs=1e-5)
        assert position[row * 3 + column, 4 + k].item() == pytest.approx(wave(x / frequency), abs=1e-5)


def test_pixel_centres():
    centres = pixel_centres(((1, 2), (2, 1)), torch.device("cpu"))
    assert centres.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]


def test_what_depends_on_sizes_alone_is_made_once():
    with torch.inference_mode():
        made = sine_position(4, 5, 8, torch.device("cpu"))
    assert sine_position(4, 5, 8, torch.device("cpu")) is made and not made.is_inference()

    program = torch.export.export(Positions(), (torch.zeros(6, 7, 8),))
    kept = sine_position(6, 7, 8, torch.device("cpu"))
    assert type(kept) is torch.Tensor and torch.equal(program.module()(torch.zeros(6, 7, 8)), kept)


class Positions(nn.Module):
    def forward(self, x):
        return x.flatten(0, 1) + sine_position(*x.shape, x.device)


def test_packed_weights_are_cast_once():
    """With the numbers of casts of their parts, gradients included."""
    attention, x, dtype = Attention(32, 4), torch.randn(2, 5, 32), torch.bfloat16
    with torch.autocast("cpu", dtype):
        found = attention(x, x, x)
    ours = torch.autograd.grad(found.float().square().sum(), list(attention.parameters()))

    parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    heads = [F.linear(x.to(dtype), w.to(dtype), b.to(dtype)).unflatten(2, (4, 8)).transpose(1, 2) for w, b in parts]
    merged = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    expected = F.linear(merged, *(p.to(dtype) for p in (attention.out_proj.weight, attention.out_proj.bias)))
    theirs = torch.autograd.grad(expected.float().square().sum(), list(attention.parameters()))
    assert torch.equal(found, expected) and all(map(torch.equal, ours, theirs))


def test_initial_values():
    pixel, decoder = PixelDecoder((8, 8, 8, 8)), MaskedDecoder(outputs=12)
    attention = pixel.layers[3].self_attn
    bias = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    for head, point in ((0, 0), (1, 3), (4, 1), (6, 2)):
        angle = 2 * math.pi * head / 8
        scale = (point + 1) / max(abs(math.cos(angle)), abs(math.sin(angle)))
        for level in range(3):
            expected = [scale * math.cos(angle), scale * math.sin(angle)]
            assert bias[head, level, point].tolist() == pytest.approx(expected, abs=1e-5)
    zero = (attention.sampling_offsets.weight, attention.attention_weights.weight, attention.attention_weights.bias)
    assert not any(tensor.any() for tensor in zero)
    packed = decoder.layers[0].cross_attn
    assert packed.in_proj_weight.abs().max().item() == pytest.approx(math.sqrt(6 / 1024), rel=1e-3)
    assert packed.out_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 512), rel=1e-3)
    assert not packed.in_proj_bias.any() and not packed.out_proj.bias.any()
    assert decoder.class_embed.weight.abs().max().item() == pytest.approx(1 / 16, rel=1e-2)
    assert torch.equal(pixel.layers[0].linear1.bias, pixel.layers[5].linear1.bias)
    assert not torch.equal(pixel.layers[0].linear1.weight, pixel.layers[5].linear1.weight)
    assert decoder.query_feat.weight.std().item() == pytest.approx(1, abs=0.05)


def test_attention_equals_torchs_own():
    ours, theirs = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    nn.init.normal_(ours.in_proj_bias)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    allowed = torch.rand(2, 1, 5, 7) > 0.4
    allowed[..., 0] = True
    expected = theirs(query, key, value, attn_mask=~allowed.expand(-1, 4, -1, -1).flatten(0, 1))[0]
    torch.testing.assert_close(ours(query, key, value, allowed), expected)


def test_attention_masks_equal_resized_masks():
    """Resized features give the resized mask's foreground; a query without any looks everywhere."""
    embedding, features = torch.randn(2, 5, 8), torch.randn(2, 8, 12, 16)
    embedding[1, 3] = 0
    features[:, 0], embedding[0, 2] = 1.0, torch.tensor([-50.0] + [0.0] * 7)
    masks = torch.einsum("bqd,bdhw->bqhw", embedding, features)
    blocked = F.interpolate(masks, (3, 4), mode="bilinear", align_corners=False).flatten(2).sigmoid() < 0.5
    blocked[blocked.all(2)] = False
    resized = F.interpolate(features, (3, 4), mode="bilinear", align_corners=False).flatten(2)
    ours = attention_mask(embedding, resized)
    assert ours[0, 0, 2].all() and not ours.all()
    assert torch.equal(ours, ~blocked.unsqueeze(1))


@pytest.mark.parametrize("class_head", ["softmax", "seesaw"])
def test_every_parameter_trains(class_head):
    model = small(class_head=class_head).train()
    for layer in model.pixel_decoder.layers:  # at their zero start, queries and level embeddings have no gradient yet
        nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.01)
        nn.init.normal_(layer.self_attn.attention_weights.weight, std=0.01)
    loss = SetCriterion(CLASSES, CriterionConfig("ce" if class_head == "softmax" else "seesaw", points=64))
    label = torch.randint(-1, CLASSES, (2, 64, 96), dtype=torch.int16)
    result = loss(model(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)), label)
    result["loss"].backward()
    assert len(result) == 1 + 3 * 5
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_training_lowers_the_loss():
    model = small(encoder_layers=1, decoder_layers=2).train()
    loss = SetCriterion(CLASSES, CriterionConfig(points=128))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    label = torch.arange(64).div(16, rounding_mode="floor").expand(1, 64, 64).to(torch.int16)
    values = []
    for _ in range(18):
        optimiser.zero_grad()
        value = loss(model(image), label)["loss"]
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("class_head", ["softmax", "seesaw"])
@pytest.mark.parametrize("size", [None, (50, 71)])
@torch.no_grad()
def test_inference_equals_the_literal_order(monkeypatch, class_head, size):
    """K class maps at the padded size, cropped, resized: the order in which the release works."""
    monkeypatch.setitem(segmentor.BAND, "cpu", 2 * CLASSES * 71 * 7)  # several bands
    model = small(class_head=class_head).eval()
    images = torch.randint(0, 256, (2, 3, 40, 54), dtype=torch.uint8)
    out = model(images)
    masks = F.interpolate(out["pred_masks"], (64, 64), mode="bilinear", align_corners=False).sigmoid()
    probability = out["pred_logits"].softmax(-1)[..., :CLASSES]
    if class_head == "seesaw":
        classes, objectness = out["pred_logits"].split([CLASSES, 2], -1)
        probability = classes.softmax(-1) * objectness.softmax(-1)[..., :1]
    scores = torch.einsum("bqk,bqhw->bkhw", probability, masks)[..., :40, :54]
    if size is not None:
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.predict(images, size), scores, rtol=1e-4, atol=1e-5)
    label, confidence = model.labels(images, size)
    best = scores.topk(2, 1).values
    clear = best[:, 0] - best[:, 1] > 1e-5
    assert torch.equal(label[clear], scores.argmax(1)[clear]) and clear.float().mean() > 0.9
    torch.testing.assert_close(confidence, best[:, 0] / scores.sum(1), rtol=1e-4, atol=1e-5)


def test_class_probabilities():
    logits = torch.randn(4, CLASSES + 1)
    assert torch.allclose(class_probabilities(logits, CLASSES), logits.softmax(1)[:, :CLASSES])


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="hidden_dim: 48"):
        small(hidden_dim=48)
    with pytest.raises(ConfigError, match="num_queries"):
        small(num_query=3)
    for name in ("mask2former", "deeplabv3plus_d2"):
        with pytest.raises(ConfigError, match="model.align_corners: .* set it to false"):
            build_model(ModelConfig(name, CLASSES, "resnet50", align_corners=True))


@pytest.mark.parametrize(
    ("name", "depths", "window"),
    [("swin_tiny", (2, 2, 6, 2), 7), ("swin_small", (2, 2, 18, 2), 7), ("swin_base", (2, 2, 18, 2), 12),
     ("swin_large", (2, 2, 18, 2), 12)],
)  # fmt: skip
def test_swin_sizes(name, depths, window):
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig("mask2former", CLASSES, name))
    assert tuple(len(layer.blocks) for layer in backbone.layers) == depths
    assert backbone.layers[0].blocks[0].attn.relative_position_bias_table.shape[0] == (2 * window - 1) ** 2
    rates = [m.drop_prob for m in backbone.modules() if isinstance(m, DropPath)]
    assert max(rates) == pytest.approx(0.3)


def test_frozen_norm_equals_batch_norm_in_evaluation():
    network = build_backbone(ModelConfig("mask2former", CLASSES, "resnet18")).eval()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.weight.data, norm.running_var):
            tensor.uniform_(0.5, 1.5)
        for tensor in (norm.bias.data, norm.running_mean):
            tensor.normal_()
    frozen = freeze_batchnorm(copy.deepcopy(network)).train()
    x = torch.randn(1, 3, 32, 32)
    before = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
    for ours, expected in zip(frozen(x), network(x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(buffer, before[name]) for name, buffer in frozen.named_buffers())
    counters = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
    assert frozen.state_dict().keys() == network.state_dict().keys() - counters
    norms = {name for name, module in frozen.named_modules() if isinstance(module, FrozenBatchNorm2d)}
    assert not any(name.rpartition(".")[0] in norms for name, _ in frozen.named_parameters())


@torch.no_grad()
def test_deeplab_takes_any_size():
    """Sides that are no multiple of 4: logits are enlarged four times and cropped, not squeezed."""
    model = small("deeplabv3plus_d2", channels=16).eval()
    images = torch.randint(0, 256, (1, 3, 37, 50), dtype=torch.uint8)
    out = model(images)
    assert out["logits"].shape == (1, CLASSES, 10, 13)
    full = F.interpolate(out["logits"], scale_factor=4, mode="bilinear", align_corners=False)[..., :37, :50]
    torch.testing.assert_close(model.predict(images), full)
    resized = F.interpolate(full, (74, 80), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.predict(images, (74, 80)), resized)


def test_deeplab_structure():
    with torch.device("meta"):
        model = build_model(ModelConfig("deeplabv3plus_d2", CLASSES, "resnet50"))
    stage = model.backbone.layer4
    assert [block.conv2.dilation for block in stage] == [(2, 2)] * 3
    assert stage[0].conv2.stride == stage[0].downsample[0].stride == (1, 1)
    assert model.predictor.out_channels == CLASSES and model.aspp.pool.bias is not None
