"""`backbone: timm:NAME`: ten networks of different kinds in the heads of all systems."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common.config import Config, ConfigError, ModelConfig
from common.distributed import synchronise_batchnorm
from common.models import build_backbone, build_model, load_model
from common.models.backbones import IMAGENET, pixel_statistics
from common.models.backbones.timm_features import timm_features
from ltss_benchmark.criterion import pad_label
from ltss_benchmark.deeplabv3plus import DeepLabV3PlusMethod
from ltss_benchmark.mask2former import Mask2FormerMethod
from scripts.export import Scores, export
from semi_sup.baseline import Baseline
from tests.contexts import context
from tests.unit.test_cpsl_method import CROP, batches
from uda.cpsl import CPSL
from uda.warmup import WarmUp

LIGHT = [
    "resnet18",
    "convnext_atto",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "pvt_v2_b0",
    "vit_tiny_patch16_224",
]
HEAVY = [
    "maxvit_pico_rw_256", "vit_small_patch14_dinov2", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224",
]  # fmt: skip
NAMES = [*LIGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY)]
EXPORTED = [*LIGHT[:-1], *HEAVY]
PLAIN = {"vit_tiny_patch16_224", "vit_small_patch14_dinov2", "eva02_tiny_patch14_224"}
LITE = "tf_efficientnet_lite0"
SMALL = {
    "upernet": {"channels": 16, "auxiliary_channels": 8},
    "pspnet": {"channels": 16, "auxiliary_channels": 8},
    "ocrnet": {"channels": 16, "context_channels": 8},
    "segformer": {"channels": 16},
    "knet": {"channels": 16, "auxiliary_channels": 8},
    "deeplabv3plus_d2": {"channels": 16, "lateral_channels": 8},
    "deeplabv3plus_unimatch": {"channels": 16, "lateral_channels": 8},
    "mask2former": {
        "hidden_dim": 32, "num_queries": 4, "encoder_layers": 1, "encoder_hidden": 16, "decoder_layers": 1,
        "decoder_hidden": 16, "frozen_norm": False,
    },
    "deeplabv3plus": {"channels": 16, "low_channels": 8},
    "usrn": {"channels": 16, "low_channels": 8, "subclasses": 9},
    "daformer": {"channels": 16},
    "deeplabv2": {"head_channels": 8, "features": 8},
}  # fmt: skip
ALIGNED = {"deeplabv3plus", "usrn", "deeplabv2", "deeplabv3plus_unimatch"}


def config(net=LITE, name="upernet", **options):
    options = {**SMALL[name], **options}
    return ModelConfig(name, 5, f"timm:{net}", align_corners=name in ALIGNED, options=options)


def images(height=69, width=91):
    """Sides that no stride, patch or window divides."""
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)


def disturb(model):
    """Weights and statistics unlike any fresh model's, so that a loaded one is known by its scores."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.mul_(1 + 0.1 * torch.rand_like(value))
    return model.eval()


# Every network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_is_trained_saved_and_loaded(name, tmp_path):
    cfg = config(name)
    model = build_model(cfg).train()
    out = model(images())
    assert out["logits"].shape == (2, 5, 18, 23)  # a quarter, rounded up, as of every other backbone
    loss = sum(F.cross_entropy(z, torch.randint(0, 5, (2, *z.shape[2:]))) for z in (out["logits"], *out["aux"]))
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    before = [p.detach().clone() for p in model.backbone.parameters()]
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.backbone.parameters(), strict=True))

    disturb(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again, x = load_model(cfg, tmp_path / "model.safetensors"), images()
    with torch.no_grad():
        assert model.predict(x).shape == (2, 5, 69, 91)
        assert torch.equal(again.predict(x), model.predict(x))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", *(pytest.param(n, marks=pytest.mark.slow) for n in EXPORTED)])
def test_it_is_exported(name, tmp_path):
    model = disturb(build_model(config(name)))
    assert export(Scores(model), images()[:1], tmp_path / "model.pt2", name) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_its_maps_are_those_of_timm(name, tmp_path):
    """Of the whole classifier by its own method, at a size that it takes, with its weights from a file."""
    whole = disturb(timm.create_model(name, **({"dynamic_img_size": True} if name in PLAIN else {})))
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    backbone = timm_features(name, str(tmp_path / "weights.safetensors")).eval()
    side = 256 if name.startswith("maxvit") else 224
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        found = backbone(x)
        wanted = whole.forward_intermediates(x, indices=None, intermediates_only=True, norm=False, output_fmt="NCHW")
    wanted = [wanted[2], wanted[5], wanted[8], wanted[11]] if name in PLAIN else wanted[-4:]
    assert [m.shape[1] for m in found] == list(backbone.channels)
    assert [side // m.shape[2] for m in found] == list(backbone.strides)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_what_is_filled_up_is_cut_off(name):
    """An image of an odd size gives the part of the maps of the image that zeros fill up."""
    backbone = timm_features(name).eval()
    x = torch.randn(1, 3, 69, 91)
    full = F.pad(x, (0, -91 % backbone.divisor, 0, -69 % backbone.divisor))
    with torch.no_grad():
        for part, whole, stride in zip(backbone(x), backbone(full), backbone.strides, strict=True):
            assert part.shape[2:] == (-(-69 // stride), -(-91 // stride))
            assert torch.equal(part, whole[..., : part.shape[2], : part.shape[3]])


# Every head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_every_network_takes_one(name):
    model = build_model(config(name=name)).train()
    out = model(images(70, 93))
    terms = [t for t in (out.get("logits"), out.get("sub_logits"), *out["aux"]) if isinstance(t, torch.Tensor)]
    terms += [*out.get("stages", [])] + [out[key] for key in ("pred_logits", "mask_features") if key in out]
    sum(term.square().sum() for term in terms).backward()
    encoder = [p for n, p in model.named_parameters() if ".net." in n or ".net_aux." in n]
    assert encoder and all(p.grad is not None for p in encoder)
    with torch.no_grad():
        assert model.eval().predict(images(70, 93)).shape == (2, 5, 70, 93)


@pytest.mark.parametrize("name", ["upernet", "ocrnet", "segformer", "knet", "daformer", "mask2former"])
def test_a_plain_transformer_gets_a_pyramid(name):
    model = build_model(config("vit_tiny_patch16_224", name))
    assert model.backbone.strides == (4, 8, 16, 32)
    assert model.eval().predict(images(70, 93)).shape == (2, 5, 70, 93)


@pytest.mark.parametrize("name", ["deeplabv3plus_d2", "deeplabv3plus", "usrn"])
def test_deeplabv3plus_refuses_a_plain_transformer(name):
    cfg = config("vit_tiny_patch16_224", name, backbone={"output_stride": None})
    message = "^model.backbone: timm:vit_tiny_patch16_224 gives maps of strides 16, 16, 16, 16; DeepLabV3\\+ needs one"
    with pytest.raises(ConfigError, match=message):
        build_model(cfg)


def test_the_second_branch_is_a_copy():
    backbone = build_model(config(name="usrn")).encoder.backbone
    pairs = list(zip(backbone.net.parameters(), backbone.net_aux.parameters(), strict=True))
    assert all(torch.equal(one, other) and one is not other for one, other in pairs)


def test_frozen_norms_stay():
    """timm's norms carry their activation, so they are held rather than replaced."""
    backbone = build_model(config(name="mask2former", frozen_norm=True)).train().backbone
    before = {key: value.clone() for key, value in backbone.state_dict().items() if "running" in key}
    backbone(torch.randn(2, 3, 64, 64))[-1].sum().backward()
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.weight.grad is None and not m.training for m in norms)
    assert all(torch.equal(backbone.state_dict()[key], value) for key, value in before.items())


def test_synchronised_norms_keep_their_activation(monkeypatch):
    monkeypatch.setattr("common.distributed.world_size", lambda: 2)
    backbone = disturb(timm_features(LITE))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = backbone(x)
        synchronised = synchronise_batchnorm(backbone, "sync_bn", torch.device("cuda"))
        found = synchronised(x)
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in synchronised.modules())
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# A step of every method ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "backbone"),
    [
        ("deeplabv3plus_d2", DeepLabV3PlusMethod, "convnext_atto"),
        ("mask2former", Mask2FormerMethod, "vit_tiny_patch16_224"),
        ("deeplabv3plus", Baseline, "convnext_atto"),
    ],
)
def test_labels_of_odd_sizes_fit(name, method, backbone):
    """Networks that fill images up have maps for the image alone, so labels need no change."""
    made = method(Config(model=config(backbone, name)), context(5))
    made.train()
    batch = {"image": images(70, 93), "label": torch.randint(-1, 5, (2, 70, 93), dtype=torch.int16)}
    out = made({"labeled": batch}, 0)
    terms = out if isinstance(out, dict) else next(iter(out))
    terms["loss"].backward()
    assert terms["loss"].isfinite()


@pytest.mark.parametrize("backbone", [LITE, "vit_tiny_patch16_224"])
def test_cpsl_takes_a_step(backbone, tmp_path):
    stride = None if backbone in PLAIN else 8
    model = replace(config(backbone, "deeplabv2", backbone={"output_stride": stride}), mean=None)
    warm = WarmUp(Config(name="warm", model=model, method={}), context(5))
    groups = {group["name"]: sum(p.numel() for p in group["params"]) for group in warm.parameter_groups()}
    assert groups["backbone"] == sum(p.numel() for p in warm.model.encoder.parameters())

    torch.save(torch.randn(5, 8), tmp_path / "prototypes.pt")
    torch.save(torch.full((5,), 0.2), tmp_path / "shares.pt")
    files = {"prototypes": str(tmp_path / "prototypes.pt"), "class_distribution": str(tmp_path / "shares.pt")}
    method = CPSL(Config(name="t", model=model, method={**files, "bank": 64, "samples": 16}), context(5))
    for terms in method.train()(batches(), 0):
        terms["loss"].backward()
        assert terms["loss"].isfinite()
    features = method.model(batches()["source"]["image"])["features"]
    assert features.shape[2:] == tuple(-(-side // (stride or 16)) for side in CROP)


# Sizes of images ----------------------------------------------------------------------------------------------------

DIVISORS = {
    "resnet18": 1,
    "mobilevit_xxs": 1,
    "poolformer_s12": 4,  # strides that round down
    "caformer_s18": 4,
    "legacy_seresnet18": 4,
    "swin_tiny_patch4_window7_224": 4,
    "vit_tiny_patch16_224": 16,
    "convnext_atto": 32,
    "mobilevitv2_050": 64,  # patches of 2×2 cells of stride 32
    "maxvit_pico_rw_256": 256,
}
MANY = {"maxvit_pico_rw_256", "caformer_s18", "mobilevit_xxs"}  # layers, so seconds


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in MANY else n for n in DIVISORS])
def test_maps_have_the_sides_over_the_stride(name):
    """Rounded up, whatever is left over a multiple of 4, with no larger divisor than needed."""
    with torch.device("meta"):
        backbone = timm_features(name).eval()
    assert backbone.divisor == DIVISORS[name]

    for left in range(4):
        height, width = 64 + left, 99 - left
        maps = backbone(torch.zeros(1, 3, height, width, device="meta"))
        wanted = [(-(-height // stride), -(-width // stride)) for stride in backbone.strides]
        assert [tuple(m.shape[2:]) for m in maps] == wanted


@pytest.mark.parametrize("left", [1, 2])
def test_deeplabv3plus_takes_a_network_that_rounds_down(left):
    """At sides 1 and 2 over a multiple of 4: a step with plain cross-entropy, scores and labels."""
    model = config("poolformer_s12", "deeplabv3plus_d2", backbone={"output_stride": None})
    made = DeepLabV3PlusMethod(Config(model=model), context(5)).train()
    height, width = 64 + left, 96 + left
    label = torch.randint(0, 5, (2, height, width), dtype=torch.int16)
    made({"labeled": {"image": images(height, width), "label": label}}, 0)["loss"].backward()

    made.eval()
    with torch.no_grad():
        assert made.model.predict(images(height, width)).shape == (2, 5, height, width)
    found, _ = made.model.labels(images(height, width))
    assert found.shape == (2, height, width)


def test_labels_are_not_cut():
    """Features of stride 4 that end before the label does are an error, not negative padding."""
    label = torch.zeros(1, 33, 32, dtype=torch.int16)
    assert pad_label(label, (9, 8)).shape == (1, 36, 32)
    for size in [(8, 9), (9, 7)]:
        with pytest.raises(ValueError) as error:
            pad_label(label, size)
        assert str(error.value) == (
            f"labels of 33×32 pixels reach beyond features of {size[0]}×{size[1]} at "
            "stride 4; the network has to give ⌈side/4⌉ of them"
        )


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        ("hiera_tiny_224", {}, "model.backbone: timm:hiera_tiny_224 takes images of 224×224 alone; choose one that"),
        ("inception_v3", {}, "has maps of other sides than ⌈side/stride⌉ (of 97×130 pixels 46×62 at stride 2, not 49×"),
        ("resnet1", {}, "model.backbone: timm has no model 'resnet1'; did you mean 'resnet18'"),
        ("resnet18.nothing", {}, "model.backbone: timm has no weights 'resnet18.nothing'; those of this model: "),
        ("resnet18", {"output_strid": 8}, "model.options.backbone (timm:resnet18): unknown key 'output_strid'"),
        ("resnet18", {"output_stride": 7}, "output_stride: 7 is not one of 32, 16, 8"),
        ("resnet18", {"drop_path": 2.0}, "drop_path: 2.0 is"),
        ("resnet18", {"taps": [1, 9]}, "taps: [1, 9]: timm:resnet18 has maps 0 to 4; name some"),
        ("resnet18", {"taps": [2, 1]}, "in ascending order"),
        ("pvt_v2_b0", {"output_stride": 8}, "model.options.backbone: timm:pvt_v2_b0 cannot be made with output_stride"),
        ("vit_tiny_patch16_224", {"taps": [3, 5]}, "model.options.backbone.taps: 2 blocks of timm:vit_tiny"),
    ],
)
def test_mistakes_are_one_line(net, options, message):
    with pytest.raises(ConfigError) as error:
        build_model(config(net, backbone=options))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["deeplabv3plus", "deeplabv2"])
def test_options_of_the_resnet_are_refused(name):
    with pytest.raises(ConfigError, match="model.options.blocks: of the ResNet; with backbone timm:NAME set it"):
        build_model(config(name=name, blocks=[1, 1, 1, 1]))
    plain = replace(config(name=name, backbone={"drop_path": 0.1}), backbone="resnet50")
    with pytest.raises(ConfigError, match="model.options.backbone: only a backbone timm:NAME has options here"):
        build_model(plain)


def test_options_reach_timm():
    backbone = build_backbone(config("resnet18"), output_stride=8, drop_path=0.5)
    assert backbone.strides == (4, 8, 8, 8)
    assert [m.shape[2] for m in backbone(torch.zeros(1, 3, 64, 64))] == [16, 8, 8, 8]
    rates = [m.drop_prob for m in backbone.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.5)
    assert build_backbone(config("vit_tiny_patch16_224"), taps=(1, 3)).strides == (16, 16)


def test_pixels_are_normalised_as_the_weights_want():
    half = ((127.5,) * 3, (127.5,) * 3)
    assert pixel_statistics(config(LITE)) == half
    assert pixel_statistics(replace(config(LITE), backbone="resnet18")) == IMAGENET
    stated = replace(config(LITE), mean=(1.0, 2.0, 3.0))
    assert pixel_statistics(stated) == ((1.0, 2.0, 3.0), half[1])
    for name in SMALL:
        model = build_model(config(name=name))
        assert (tuple(model.mean.flatten().tolist()), tuple(model.std.flatten().tolist())) == half
    timm_mean = timm.data.resolve_data_config(model=timm.create_model("resnet18.a1_in1k"))["mean"]
    assert pixel_statistics(config("resnet18.a1_in1k"))[0] == pytest.approx([255 * value for value in timm_mean])
