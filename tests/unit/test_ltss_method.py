"""The methods of the benchmark on tiny networks, checkpoints of its other backbones, and its test-time augmentation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from common.config import EvalConfig, ModelConfig, load_config
from common.data.statistics import Statistics
from common.engine import checkpoint, runtime
from common.engine.trainer import Trainer
from common.evaluation import mirrored_classes
from common.inference import multi_scale, predict_scores
from common.losses.seesaw import SeesawLoss
from common.models import build_model
from common.models.pretrained import detectron2
from ltss_benchmark.mask2former import restore_counts
from ltss_benchmark.matcher import MatchWeights, find_targets, match_costs
from ltss_benchmark.methods import build_method
from tests.contexts import context

CONFIGS = Path(__file__).parents[2] / "ltss_benchmark" / "configs" / "camvid"
CLASSES = 11
SMALL = (
    "train.threads=1",
    "model.options.hidden_dim=32",
    "model.options.heads=4",
    "model.options.num_queries=9",
    "model.options.encoder_layers=1",
    "model.options.encoder_hidden=32",
    "model.options.decoder_layers=2",
    "model.options.decoder_hidden=32",
    "method.criterion.points=64",
)
pytestmark = pytest.mark.usefixtures("one_thread")


def config(name: str, *changes: str):
    small = SMALL if "maskformer2" in name else ("model.options={channels: 8, lateral_channels: 4, dropout: 0.0}",)
    return load_config(next(CONFIGS.glob(f"*/{name}.yaml")), [*small, *changes])


def statistics() -> Statistics:
    """Class k is in 2^k of 1024 images, with 10 pixels each."""
    presence = np.arange(1024)[:, None] < 2 ** np.arange(CLASSES)
    return Statistics((10 * presence).astype(np.int32), np.zeros(1024, np.int32))


def batch(size=(64, 96), images=2):
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(-1, CLASSES, (images, size[0] // 16, size[1] // 16), generator=generator)
    label = label.repeat_interleave(16, 1).repeat_interleave(16, 2).to(torch.int16)
    image = torch.randint(0, 256, (images, 3, *size), dtype=torch.uint8, generator=generator)
    return {"labeled": {"image": image, "label": label}}


def test_a_step_is_the_criterion_of_the_networks_outputs():
    method, data = build_method(config("maskformer2_R18"), context(statistics())).train(), batch()
    torch.manual_seed(3)
    losses = method(data, 0)
    torch.manual_seed(3)
    out = method.model(data["labeled"]["image"])
    expected = method.criterion(out, data["labeled"]["label"])
    assert losses.keys() == expected.keys() and {"loss_ce", "loss_mask_0", "loss_dice_1"} <= losses.keys()
    terms = sum(v.item() for name, v in losses.items() if name != "loss")
    assert losses["loss"].item() == pytest.approx(terms, rel=1e-5)


def test_targets_are_known_before_the_network_runs(monkeypatch):
    method, seen = build_method(config("maskformer2_R18"), context(statistics())).train(), []
    monkeypatch.setattr("ltss_benchmark.mask2former.find_targets", lambda *a: seen.append("t") or find_targets(*a))
    method.model.register_forward_pre_hook(lambda *a: seen.append("net"))
    method(batch(), 0)
    assert seen == ["t", "net"]


def test_frequency_matcher_counts_the_training_labels():
    cfg = config("matcher-maskformer2_R18", "method.matcher.threshold=0.01")
    copies = build_method(cfg, context(statistics())).criterion.matcher.copies
    expected = [math.ceil(max(1, 2 * math.sqrt(0.01 / (2**k / 1024)))) for k in range(CLASSES)]
    assert copies.tolist() == expected and len(set(expected)) > 3


def test_a_rare_class_is_matched_to_all_its_queries():
    """Through the whole method: the pairs of an image are the queries that its classes ask for."""
    cfg = config("matcher-maskformer2_R18", "method.matcher.threshold=0.01", "model.options.num_queries=60")
    method, data = build_method(cfg, context(statistics())).train(), batch()
    found = []
    matcher = method.criterion.matcher
    method.criterion.matcher = lambda *args: found.append(matcher(*args)) or found[0]
    method(data, 0)
    targets = find_targets(data["labeled"]["label"], CLASSES)
    asked = [int(matcher.copies[classes].sum()) for classes in targets.classes]
    assert found[0].per_layer == asked and sum(asked) > targets.number


def test_seesaw_counts_are_saved_and_other_remedies_have_no_state():
    plain = build_method(config("maskformer2_R18"), context(statistics()))
    every = build_method(config("benchmark-maskformer2_R18"), context(statistics())).train()
    assert every.state_dict().keys() - plain.state_dict().keys() == {"criterion.seesaw.counts"}
    losses = every(batch(), 0)
    assert "loss_seesaw" in losses and every.state_dict()["criterion.seesaw.counts"].sum() > 0
    assert not isinstance(plain.criterion.matcher.copies, np.ndarray)


@pytest.mark.parametrize("kind", ["official", "official with floats", "ours"])
def test_seesaw_goes_on_from_the_counts_of_a_checkpoint(tmp_path, kind):
    """The release has K + 1 places, the last for "no object"."""
    counted = torch.arange(1, CLASSES + 2) ** 3
    names = {"ours": "criterion.seesaw.counts"}
    value = counted[:CLASSES] if kind == "ours" else counted.float() if "floats" in kind else counted
    state = {names.get(kind, "criterion.seesaw_loss.cum_samples"): value, "sem_seg_head.x": torch.zeros(1)}
    torch.save({"model": state, "iteration": 7}, tmp_path / "model_final.pth")
    seesaw = SeesawLoss(CLASSES)
    restore_counts(seesaw, tmp_path / "model_final.pth")
    assert seesaw.counts.tolist() == counted[:CLASSES].tolist() and seesaw.counts.dtype == torch.int64


@pytest.mark.parametrize("state", [{"x": torch.zeros(3)}, {"criterion.seesaw_loss.cum_samples": torch.ones(3)}])
def test_seesaw_starts_anew_without_counts_of_these_classes(tmp_path, state):
    torch.save({"model": state}, tmp_path / "model_final.pth")
    seesaw = SeesawLoss(CLASSES)
    restore_counts(seesaw, tmp_path / "model_final.pth")
    assert not seesaw.counts.any()


def test_a_method_starts_from_the_counts_in_its_checkpoint(tmp_path):
    first = build_method(config("seesaw-maskformer2_R18"), context(statistics())).train()
    first(batch(), 0)
    metadata = {"predict_prefix": first.predict_prefix}
    save_file(first.state_dict(), tmp_path / "first.safetensors", metadata=metadata)
    again = build_method(
        config("seesaw-maskformer2_R18", f"model.checkpoint={tmp_path}/first.safetensors"), context(statistics())
    )
    counts = again.criterion.seesaw.counts
    assert counts.sum() > 0 and torch.equal(counts, first.criterion.seesaw.counts)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("maskformer2_R18", torch.bfloat16),
        ("benchmark-maskformer2_R18", torch.float16),
        ("deeplabv3p_R18", torch.bfloat16),
        ("blv-deeplabv3p_R18", torch.bfloat16),
    ],
)
def test_half_precision_gives_about_the_same_loss(name, precision):
    method, data = build_method(config(name), context(statistics())).train(), batch()
    torch.manual_seed(0)
    expected = method(data, 0)["loss"].item()
    if hasattr(method, "criterion") and method.criterion.seesaw is not None:
        method.criterion.seesaw.counts.zero_()
    torch.manual_seed(0)
    with torch.autocast("cpu", precision):
        half = method(data, 0)["loss"]
    half.backward()
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected, rel=0.03)
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_matching_cost_of_large_logits_does_not_overflow_in_half_precision():
    probability, target = torch.rand(1, 4, 3), torch.ones(1, 2, 12544)
    logits = torch.full((1, 4, 12544), 40.0)
    expected = match_costs(probability, logits, target, torch.tensor([[0, 2]]), MatchWeights())
    with torch.autocast("cpu", torch.float16):
        half = match_costs(probability, logits.half(), target, torch.tensor([[0, 2]]), MatchWeights())
    torch.testing.assert_close(half, expected)


def test_a_trained_step_clips_all_gradients_together(tmp_path):
    """AdamW's two rates, decay off for norms, and the total norm limited to 0.01 before the update."""
    cfg = config("maskformer2_R18", f"output={tmp_path}")
    runtime.configure(cfg.train, torch.device("cpu"))
    trainer = Trainer(cfg, build_method(cfg, context(statistics())).train(), torch.device("cpu"))
    norms, step = [], trainer.optimizers["adamw"].step
    trainer.optimizers["adamw"].step = lambda *a, **k: (
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trainer.parameters if p.grad is not None])),
        step(*a, **k),
    )
    scalars = trainer.step(0, {"labeled": iter([batch()["labeled"]])}, [])
    torch.use_deterministic_algorithms(False)
    assert float(scalars["grad_norm"]) > 0.01 and float(norms[0]) == pytest.approx(0.01, rel=1e-3)


# DeepLabV3+ ---------------------------------------------------------------------------------------------------------


def enlarged(method, data):
    logits = method.model(data["labeled"]["image"])["logits"]
    return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("size", [(64, 96), (62, 94)])
def test_deeplab_trains_the_hardest_fifth(size):
    method = build_method(config("deeplabv3p_R18"), context(statistics())).eval()
    data = batch((64, 96))
    data["labeled"] = {k: v[..., : size[0], : size[1]] for k, v in data["labeled"].items()}
    large, label = enlarged(method, data)[..., : size[0], : size[1]], data["labeled"]["label"].long()
    pixels = F.cross_entropy(large, label, ignore_index=-1, reduction="none").flatten().sort(descending=True).values
    expected = pixels[: int(0.2 * pixels.numel())].mean()
    assert float(method(data, 0)["loss"]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("size", [(64, 96), (61, 94), (33, 35)])
def test_hard_pixels_are_the_same_share_beside_another_remedy(size):
    """Weights that are 1 for every class change nothing, in crops that the network pads neither."""
    even = Statistics(np.full((1, CLASSES), 10, np.int32), np.zeros(1, np.int32))
    alone = build_method(config("deeplabv3p_R18"), context(even)).eval()
    with pytest.warns(UserWarning, match="it changes nothing"):
        weighed = config("deeplabv3p_R18", "remedies.class_weight={name: inverse}")
        beside = build_method(weighed, context(even)).eval()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, -(-size[0] // 4), -(-size[1] // 4), generator=generator)
    label = torch.randint(-1, CLASSES, (2, *size), generator=generator).short()
    found, expected = beside.loss(logits, label, 0.5), alone.loss(logits, label, 0.5)
    torch.testing.assert_close(found, expected)

    sets = config("deeplabv3p_R18", "remedies.sets=[{name: lovasz, at: network}]")
    total = build_method(sets, context(even)).eval().loss(logits, label, 0.5)
    plain = config("deeplabv3p_R18", "remedies={focus: null, sets: [{name: lovasz, at: network}]}")
    term = build_method(plain, context(even)).eval().loss(logits, label, 0.5)
    entropy = build_method(config("deeplabv3p_R18", "remedies={focus: null}"), context(even)).eval()
    torch.testing.assert_close(total - expected, term - entropy.loss(logits, label, 0.5))


@pytest.mark.parametrize("reset", [False, True])
def test_seesaw_counts_of_a_classifier_that_is_reset_are_not_taken_over(reset, tmp_path):
    first = build_method(config("seesaw-maskformer2_R18"), context(statistics()))
    first.criterion.seesaw.counts += 7
    path = checkpoint.save(tmp_path, 1, first, {}, {"predict_prefix": first.predict_prefix})
    words = (f"model.checkpoint={path}", f"model.reset_classifier={str(reset).lower()}")
    again = build_method(config("seesaw-maskformer2_R18", *words), context(statistics()))
    assert again.criterion.seesaw.counts.tolist() == [0 if reset else 7] * CLASSES


@pytest.mark.parametrize("size", [(64, 96), (62, 94)])
def test_blv_of_constant_noise_is_an_offset(size):
    """σ of the limited draw plays no part: each logit grows by its class's weight, known from the counts."""
    cfg = config("blv-deeplabv3p_R18", "remedies.logits.noise=constant")
    plain = build_method(config("deeplabv3p_R18", "remedies={focus: null}"), context(statistics())).eval()
    method = build_method(cfg, context(statistics())).eval()
    method.model.load_state_dict(plain.model.state_dict())
    data = batch((64, 96))
    data["labeled"] = {k: v[..., : size[0], : size[1]] for k, v in data["labeled"].items()}
    large, label = enlarged(method, data)[..., : size[0], : size[1]], data["labeled"]["label"].long()
    counts = torch.from_numpy(statistics().pixel_count).double()
    weight = torch.log(counts.sum() / counts)
    offset = (weight / weight.max()).float().view(1, -1, 1, 1)
    expected = F.cross_entropy(large + offset, label, ignore_index=-1)
    assert float(method(data, 0)["loss"]) == pytest.approx(float(expected), rel=1e-4)
    expected = F.cross_entropy(large, label, ignore_index=-1)
    assert float(plain(data, 0)["loss"]) == pytest.approx(float(expected), rel=1e-4)


# Checkpoints of detectron2 ------------------------------------------------------------------------------------------


def resnet_names(blocks: tuple[int, ...]) -> list[str]:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    convs = ["stem.conv1"]
    for stage, count in enumerate(blocks, 2):
        for block in range(count):
            convs += [f"res{stage}.{block}.conv{k}" for k in (1, 2, 3)]
            convs += [f"res{stage}.{block}.shortcut"] if block == 0 else []
    return [f"{conv}.{part}" for conv in convs for part in ("weight", *(f"norm.{n}" for n in norm))]


def swin_names(depths: tuple[int, ...]) -> list[str]:
    pair, names = ("weight", "bias"), []
    modules = ["patch_embed.proj", "patch_embed.norm", *(f"norm{k}" for k in range(4))]
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            modules += [f"{block}.{m}" for m in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
            names += [f"{block}.attn.relative_position_{kind}" for kind in ("bias_table", "index")]
        if i < 3:
            modules.append(f"layers.{i}.downsample.norm")
            names.append(f"layers.{i}.downsample.reduction.weight")
    return names + [f"{module}.{part}" for module in modules for part in pair]


@pytest.mark.parametrize(
    ("backbone", "names"),
    [
        ("resnet101", resnet_names((3, 4, 23, 3))),
        ("swin_tiny", swin_names((2, 2, 6, 2))),
        ("swin_small", swin_names((2, 2, 18, 2))),
        ("swin_base", swin_names((2, 2, 18, 2))),
        ("swin_large", swin_names((2, 2, 18, 2))),
    ],
)
def test_every_name_of_an_official_backbone_has_its_place(backbone, names):
    """The release's names of ResNet-101 (norms trained) and Swin cover the backbone, and leave nothing over."""
    options = {"frozen_norm": False} if backbone == "resnet101" else {}
    with torch.device("meta"):
        model = build_model(ModelConfig("mask2former", 150, backbone, options=options))
    raw = {f"backbone.{name}": torch.zeros(1) for name in names}
    converted = {name for name in detectron2.convert({"model": raw}, model) if name.startswith("backbone.")}
    assert converted == {name for name in model.state_dict() if name.startswith("backbone.")}


# Test-time augmentation ---------------------------------------------------------------------------------------------


class Means(nn.Module):
    """Scores are the channels' values, wherever they are asked for; remembers the sizes it was given."""

    average_softmax, align_corners = False, False

    def __init__(self):
        super().__init__()
        self.sizes = []

    def predict(self, images, size=None):
        self.sizes.append(tuple(images.shape[-2:]))
        return F.interpolate(images.float(), size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((512, 683), 3584, [(256, 342), (512, 683), (896, 1195)]),
        ((300, 2048), 3584, [(256, 1748), (512, 3495), (525, 3584)]),
    ],
)
def test_augmented_sizes_are_detectron2s(size, longest, expected):
    """Shorter sides 256, 512, 896 of the input that was resized already; the longer side's limit is its own."""
    cfg = EvalConfig(short_edge=512, max_edge=2048, scaled_max_edge=longest, scales=(0.5, 1.0, 1.75), flip=True)
    model = Means()
    predict_scores(model, torch.zeros(1, 3, *size, dtype=torch.uint8), cfg, (8, 8))
    assert model.sizes == [s for s in expected for _ in range(2)]


def test_left_and_right_classes_change_places_in_mirrored_passes():
    class Row:
        classes, flip_pairs = ("left", "right", "middle"), ((0, 1),)

    assert mirrored_classes(Row) == [1, 0, 2]
    images = torch.rand(1, 3, 4, 6)
    got = multi_scale(Means().predict, images, (1.0,), True, (4, 6), softmax=False, mirrored_classes=[1, 0, 2])
    torch.testing.assert_close(got, (images + images[:, [1, 0, 2]]) / 2)


def test_networks_of_the_benchmark_average_scores():
    with torch.device("meta"):
        models = [build_model(ModelConfig(n, 5, "resnet18")) for n in ("mask2former", "deeplabv3plus_d2", "upernet")]
    assert [model.average_softmax for model in models] == [False, False, True]
