"""The same checks for every architecture; a new one is one more row of SMALL."""

import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import common.models.segmentor as segmentor
from common.config import ConfigError, ModelConfig
from common.models import SegmentationModel, build_model, load_weights
from common.models.heads.psp import PSPHead
from common.ops.resize import adaptive_average, resize_rows, source_rows

PYRAMID = {"channels": 16, "auxiliary_channels": 8}
SWIN = {"dim": 16, "depths": (1, 2, 1, 1), "heads": (1, 2, 2, 2)}
USRN = {"blocks": (1, 1, 1, 1), "width": 8, "channels": 16, "low_channels": 8}
VIT = {"neck": "mln", "auxiliary_level": 3, "backbone": {"dim": 32, "heads": 2, "taps": (0, 1, 2, 3), "grid": 4}}
DPT = {"widths": (4, 6, 8, 8), "channels": 4, "backbone": {"dim": 16, "heads": 2, "taps": (0, 1, 2, 3), "grid": 3}}
U2PL = {"channels": 8, "lateral_channels": 4, "channel_dropout": 0.0, "backbone": {"multi_grid": [2, 2]}}
SMALL = {
    "upernet": ModelConfig("upernet", 5, "resnet18", options=PYRAMID),
    "upernet_no_aux": ModelConfig("upernet", 5, "resnet18", options={"channels": 8, "auxiliary": False}),
    "pspnet": ModelConfig("pspnet", 5, "resnet18", options={**PYRAMID, "backbone": {"output_stride": 32}}),
    "ocrnet": ModelConfig("ocrnet", 5, "hrnet_w18_small", options={"channels": 16, "context_channels": 8}),
    "segformer": ModelConfig("segformer", 5, "mit_b0", options={"channels": 16}),
    "daformer": ModelConfig("daformer", 5, "mit_b0", options={"channels": 16}),
    "daformer_conv": ModelConfig("daformer", 5, "resnet18", options={"channels": 16, "fusion": "conv"}),
    "deeplabv2_reduced": ModelConfig("deeplabv2_reduced", 5, "resnet18", options={"backbone": {"output_stride": 32}}),
    "hrda": ModelConfig("hrda", 5, "mit_b0", options={"channels": 16, "crop": (48, 64), "window_batch": 2}),
    "knet": ModelConfig("knet", 5, "swin_tiny", options={**PYRAMID, "backbone": SWIN}),
    "upernet_vit": ModelConfig("upernet", 5, "vit_base_patch16", options={**PYRAMID, **VIT}),
    "deeplabv3plus": ModelConfig("deeplabv3plus", 5, "resnet50", options=USRN, align_corners=True),
    "usrn": ModelConfig("usrn", 5, "resnet50", options={**USRN, "subclasses": 9}, align_corners=True),
    "deeplabv3plus_unimatch": ModelConfig(
        "deeplabv3plus_unimatch", 5, "resnet18", options={"channels": 8, "lateral_channels": 4}, align_corners=True
    ),
    "deeplabv3plus_u2pl": ModelConfig("deeplabv3plus_u2pl", 5, "resnet18", options=U2PL, align_corners=True),
    "dpt": ModelConfig("dpt", 5, "dinov2_small", options=DPT, align_corners=True),
}
# of the logits for `images()`; the others': a quarter
SIZES = {
    "pspnet": (3, 3),
    "hrda": (18, 24),
    "deeplabv2_reduced": (3, 3),
    "upernet_vit": (20, 24),
    "deeplabv3plus": (18, 24),
    "usrn": (18, 24),
    "deeplabv3plus_u2pl": (18, 24),
    "dpt": (40, 56),
}


SLOW_TO_CAPTURE = {"ocrnet", "knet", "upernet_no_aux"}


def images(batch=2, height=69, width=91):
    """Sides that no stride divides."""
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)


def tensors_of(value):
    """Every tensor of nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def heads(out):
    """Logits of every head."""
    sub_logits = [out["sub_logits"]] if "sub_logits" in out else []
    return [out["logits"], *out["aux"], *out.get("stages", []), *sub_logits]


@pytest.fixture(scope="module", params=list(SMALL))
def case(request):
    """A row's name and its model; the checks leave the weights as they are."""
    torch.manual_seed(0)
    return request.param, build_model(SMALL[request.param])


def test_every_parameter_is_trained(case):
    name, model = case
    model.train().zero_grad()
    out = model(images())
    assert out["logits"].shape == (2, 5, *SIZES.get(name, (18, 23)))
    sum(F.cross_entropy(z, torch.randint(0, 5, (2, *z.shape[2:]))) for z in heads(out)).backward()
    idle = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not idle
    model.zero_grad()


def test_round_trip(case, tmp_path):
    name, model = case
    path = tmp_path / "model.safetensors"
    save_file({f"net.{key}": t.contiguous() for key, t in model.state_dict().items()}, path, {"predict_prefix": "net."})
    torch.manual_seed(1)
    other, x = build_model(SMALL[name]).eval(), images()
    with torch.no_grad():
        expected = model.eval().predict(x)
        assert not torch.equal(other.predict(x), expected)
        load_weights(other, path)
        assert torch.equal(other.predict(x), expected)


@pytest.mark.parametrize("size", [None, (133, 47), (31, 160)])
def test_labels_are_the_argmax_of_predict(case, size, monkeypatch):
    name, model = case
    monkeypatch.setitem(segmentor.BAND, "cpu", 4000)  # several bands
    x = images()
    with torch.no_grad():
        scores = model.eval().predict(x, size)
    label, confidence = model.labels(x, size)
    assert scores.shape == (2, 5, *(size or (69, 91)))
    assert label.dtype == torch.int64 and torch.equal(label, scores.argmax(1))
    assert confidence.dtype == torch.float32
    if type(model).confidence is SegmentationModel.confidence:
        torch.testing.assert_close(confidence, scores.softmax(1).amax(1))


def test_auxiliary_heads_do_not_change_the_prediction(case):
    name, model = case
    x = images(1)
    with torch.no_grad():
        logits = model.eval()(x)["logits"]
        torch.testing.assert_close(model.infer(x)["logits"], logits)
        seen = model.normalise(x).shape[-2:]
        upsampled = F.interpolate(logits, seen, mode="bilinear", align_corners=model.align_corners)
        if name == "dpt":  # which sees the image resized
            upsampled = F.interpolate(upsampled, (69, 91), mode="bilinear", align_corners=True)
        torch.testing.assert_close(model.predict(x), upsampled[..., :69, :91], rtol=1e-5, atol=1e-6)


def test_predictions_are_not_made_by_the_call_that_is_compiled(case):
    graphs = []
    model = deepcopy(case[1]).eval()
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    model.labels(images(1))
    assert not graphs


@pytest.fixture
def clean_capture():
    """All models share `forward`; without a reset they count as recompilations of one."""
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_captured_whole_in_training(case, backend, clean_capture):
    """The loss and its gradients are those of the model as it is; dropout draws the same numbers in both."""
    if backend == "inductor" and not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler: Inductor cannot build CPU kernels")
    options = {"fallback_random": True} if backend == "inductor" else None
    name, model = case
    captured = torch.compile(model.train(), backend=backend, fullgraph=True, options=options)
    x, found = images(2, 64, 96), []
    for form in (model, captured):
        torch.manual_seed(0)
        model.zero_grad()
        loss = sum(z.square().mean() for z in heads(form(x)))
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (expected, gradient), (loss, ours) = found
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert (ours - gradient).norm() < 1e-3 * gradient.norm()  # batch norm magnifies another order of summation
    model.zero_grad()


def test_captured_whole(case, clean_capture, request):
    name, model = case
    if name in SLOW_TO_CAPTURE and not request.config.getoption("--slow"):
        pytest.skip("slow: run with --slow")
    x = images(2, 64, 96)
    with torch.no_grad():
        expected = model.eval()(x)
        captured = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    for ours, theirs in zip(tensors_of(captured), tensors_of(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_exported(case):
    name, model = case
    x = images(1, 64, 96)
    program = torch.export.export(model.eval(), (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x)["logits"], model(x)["logits"], rtol=1e-4, atol=1e-4)


def test_built_without_memory(case):
    name, model = case
    with torch.device("meta"):
        empty = build_model(SMALL[name])
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {k: t.shape for k, t in empty.state_dict().items()} == {k: t.shape for k, t in model.state_dict().items()}


class Constant(SegmentationModel):
    """Gives the logits that it was given."""

    def __init__(self, logits, **settings):
        super().__init__(logits.shape[1], (10.0, 20.0, 30.0), (2.0, 4.0, 5.0), **settings)
        self.logits = logits

    def segment(self, x):
        return {"logits": self.logits, "seen": x}


def test_images_are_normalised_and_padded():
    model = Constant(torch.zeros(1, 2, 1, 1), divisor=32)
    x = torch.randint(0, 256, (1, 3, 33, 64), dtype=torch.uint8)
    seen = model(x)["seen"]
    expected = (x.double() - torch.tensor([10, 20, 30]).view(3, 1, 1)) / torch.tensor([2, 4, 5]).view(3, 1, 1)
    assert seen.shape == (1, 3, 64, 64)
    torch.testing.assert_close(seen[..., :33, :].double(), expected)
    assert not seen[..., 33:, :].any()
    assert torch.equal(model(x.float())["seen"], seen)
    assert not model.state_dict()
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        model(x[0])


@pytest.mark.parametrize("align_corners", [False, True])
def test_scores_go_by_the_input_size_to_the_original(align_corners):
    logits = torch.randn(2, 3, 9, 13)
    model = Constant(logits, align_corners=align_corners, divisor=16)
    x = torch.zeros(2, 3, 66, 100)
    whole = F.interpolate(logits, (80, 112), mode="bilinear", align_corners=align_corners)[..., :66, :100]
    torch.testing.assert_close(model.predict(x), whole)
    expected = F.interpolate(whole, (41, 211), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(model.predict(x, (41, 211)), expected)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("height, out", [(7, 50), (50, 7), (9, 9), (1, 8), (8, 1), (16, 64), (97, 769)])
def test_bands_are_the_rows_of_the_whole_resize(height, out, align_corners):
    x = torch.randn(1, 2, height, 5, dtype=torch.float64)
    whole = F.interpolate(x, (out, 11), mode="bilinear", align_corners=align_corners)
    for start in range(0, out, 13):
        rows = (start, min(start + 13, out))
        low, high = source_rows(height, out, rows, align_corners)
        part = x[..., low:high, :]
        band = resize_rows(part, (out, 11), rows, align_corners, first=low, height=height)
        torch.testing.assert_close(band, whole[..., slice(*rows), :], rtol=0, atol=1e-4)  # its weights are float32
        assert torch.equal(band, resize_rows(x, (out, 11), rows, align_corners))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_deterministic_pooling_is_adaptive_pooling(size, monkeypatch):
    x = torch.randn(2, 3, 16, 7)
    monkeypatch.setattr("common.ops.resize.needs_products", lambda x: True)
    torch.testing.assert_close(adaptive_average(x, size), F.adaptive_avg_pool2d(x, size))


def test_one_image_cannot_train_a_pooling_branch():
    head = PSPHead((8,), 8, 3)
    with pytest.raises(ValueError, match="batch of 1 image.*batch_size"):
        head([torch.randn(1, 8, 4, 4)])
    head.eval()([torch.randn(1, 8, 4, 4)])
    PSPHead((8,), 8, 3, pool_scales=(2, 3))([torch.randn(1, 8, 4, 4)])


def test_initial_weights():
    torch.manual_seed(0)
    model = build_model(replace(SMALL["upernet"], options={"channels": 64}))
    conv = model.decode_head.fpn_bottleneck.conv.weight
    assert conv.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert model.decode_head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.15)
    assert not model.decode_head.conv_seg.bias.any()
    last = [p for key, p in model.backbone.named_parameters() if key.endswith("bn2.weight")]
    assert len(last) == 8 and not any(p.any() for p in last)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "upernett"}, "model.name: unknown 'upernett'; did you mean 'upernet'"),
        ({"backbone": "resnet51"}, "model.backbone: unknown 'resnet51'; did you mean 'resnet5"),
        ({"options": {"chanels": 3}}, "model.options: unknown key 'chanels'; did you mean 'channels'"),
        ({"options": {"backbone": {"stride": 8}}}, r"resnet18\): unknown key 'stride'; did you mean 'output_stride'"),
    ],
)
def test_wrong_configs_are_explained(change, message):
    with pytest.raises(ConfigError, match=message):
        build_model(replace(SMALL["upernet"], **change))
