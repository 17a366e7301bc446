"""Remedies after training that learn: what they read of the training images, and where they end."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.config import ConfigError, EvalConfig, SourceConfig, TrainConfig
from common.data import SegmentationDataset, Statistics, class_statistics
from common.inference import predict_scores
from common.models import build_model, load_model
from common.models.cosine import CosineClassifier
from common.models.disalign import Aligned, calibrated
from common.rebalance.crt import initialised
from common.rebalance.features import Features, chosen_pixels, per_class, read_features
from common.rebalance.fitting import balanced_batch
from common.rebalance.place import other_classifiers
from common.report.runs import RunFolder
from scripts import rebalance
from tests.unit.test_models import SMALL
from tests.unit.test_rebalance import PIXELS, call, given, remedy, run, untrained  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.usefixtures("unchanged", "one_thread"),
    pytest.mark.filterwarnings("ignore:.*it cannot be learnt"),
]
CPU = torch.device("cpu")


# What is read ---------------------------------------------------------------------------------------------------------


def test_chosen_pixels_are_a_sample_of_each_class():
    rng = np.random.default_rng(0)
    statistics = Statistics(rng.integers(0, 30, (20, 3), np.int32), np.zeros(20, np.int32))
    statistics.pixels[:, 2] = 0
    statistics.pixels[4, 2] = 3
    chosen = chosen_pixels(statistics, 50, seed=1)
    for k, most in enumerate((50, 50, 3)):
        assert sum(map(len, chosen[k])) == most
        for image, numbers in enumerate(chosen[k]):
            assert len(set(numbers)) == len(numbers)
            assert all(0 <= number < statistics.pixels[image, k] for number in numbers)

    again = chosen_pixels(statistics, 50, seed=1)
    assert [[part.tolist() for part in of_images] for of_images in again] == [
        [part.tolist() for part in of_images] for of_images in chosen
    ]


def test_every_pixel_of_a_class_is_as_likely():
    statistics = Statistics(np.array([[9], [1], [0], [10]], np.int32), np.zeros(4, np.int32))
    seen = np.zeros(20)
    for seed in range(400):
        first, second, third, last = chosen_pixels(statistics, 5, seed)[0]
        assert not len(third)
        seen[[*first, *(9 + second), *(10 + last)]] += 1
    assert seen.sum() == 2000 and abs(seen - 100).max() < 40


def test_memory_is_bounded():
    statistics = Statistics(np.array([[100, 0, 7]], np.int32), np.zeros(1, np.int32))
    assert 2 * per_class(statistics, 64, 3) * 64 * 4 <= 3 << 20
    assert per_class(statistics, 1 << 30, 1) == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "slide", "crop": (48, 64), "stride": (16, 64), "window_softmax": True}],
    ids=["whole", "slide"],
)
@pytest.mark.parametrize("name", ["upernet_no_aux", "deeplabv3plus", "deeplabv3plus_unimatch", "dpt"])
@torch.no_grad()
def test_the_classifier_says_of_features_what_the_network_says(name, options, scenes, monkeypatch):
    network = build_model(replace(SMALL[name], num_classes=19)).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
    place = rebalance.find_classifier(replace(SMALL[name], num_classes=19), "x")
    dataset = SegmentationDataset(SourceConfig(dataset="cityscapes", root=str(scenes)))
    statistics = class_statistics(dataset)
    cfg = EvalConfig(workers=0, scales=(0.5, 1.0), **options)
    monkeypatch.setattr("common.rebalance.features.BAND", 3 * 64 * 128)  # a few channels at a time
    features = read_features(network, place, dataset, statistics, cfg, mib=1, seed=0, device=CPU)

    once = replace(cfg, scales=(1.0,), window_softmax=False)
    trained = network.get_submodule(place)
    said = trained(features.values[..., None, None])[..., 0, 0]
    most = per_class(statistics, trained.in_channels, 1)
    assert features.counts.tolist() == np.minimum(statistics.pixel_count, most).tolist()

    everywhere = [scores_and_label(network, dataset.load(i), once) for i in range(len(dataset))]
    chosen = chosen_pixels(statistics, most, seed=0)
    expected = []
    for k, of_images in enumerate(chosen):
        for (scores, label), numbers in zip(everywhere, of_images, strict=True):
            expected.append(scores[:, np.flatnonzero(label == k)[numbers]].T)
    torch.testing.assert_close(said, torch.cat(expected), atol=1e-4, rtol=1e-4)


def scores_and_label(network, sample, cfg):
    """Scores (K, H·W) and label (H·W,) of a sample."""
    image = torch.from_numpy(sample["image"]).permute(2, 0, 1)[None]
    return predict_scores(network, image, cfg, sample["label"].shape)[0].flatten(1), sample["label"].ravel()


def test_a_batch_has_equally_many_pixels_of_each_class():
    features = Features(torch.repeat_interleave(torch.arange(4.0), torch.tensor(PIXELS))[:, None], torch.tensor(PIXELS))
    batch = balanced_batch(features, torch.tensor([0, 1, 3]), 5, torch.Generator().manual_seed(0))
    assert batch.flatten().tolist() == [0.0] * 5 + [1.0] * 5 + [3.0] * 5
    counts = F.one_hot(batch.flatten().long(), 4).sum(0)
    assert counts.tolist() == [5, 5, 0, 5]


# Classifier re-training -----------------------------------------------------------------------------------------------


def some(*values, counts):
    return Features(torch.cat(values), torch.tensor(counts))


def test_a_classifier_that_is_a_bias_alone_ends_uniform():
    features = Features(torch.zeros(sum(PIXELS), 8), torch.tensor(PIXELS))
    made = remedy("crt", "steps=100")(nn.Conv2d(8, 4, 1), given(features))
    share = made.bias.softmax(0)
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=1e-3, rtol=0)


def test_retraining_parts_what_can_be_parted():
    directions = torch.eye(4, 8)
    counts = [600, 60, 6, 1]
    parts = [direction + 0.1 * torch.randn(n, 8) for direction, n in zip(directions, counts, strict=True)]
    made = remedy("crt", "steps=50", "seed=7")(nn.Conv2d(8, 4, 1), given(some(*parts, counts=counts)))
    said = made(directions[..., None, None])[..., 0, 0]
    assert said.argmax(1).tolist() == [0, 1, 2, 3]
    margins = said.diagonal() - said.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf).max(1).values
    assert margins.min() > 0.6 * margins.max()  # of the rarest, too


def test_the_balanced_optimum_of_two_normal_classes():
    """Of N(±1, 1) in one dimension, equally often, ln p₁/p₀ is 2x, whatever the shares."""
    torch.manual_seed(0)
    values = [torch.randn(20000, 1) - 1, torch.randn(200, 1).sort().values]
    values[1] = (values[1] - values[1].mean()) / values[1].std() + 1
    made = remedy("crt", "steps=600", "lr=0.5", "weight_decay=0", "pixels=2000")(
        nn.Conv2d(1, 2, 1), given(some(*values, counts=[20000, 200]))
    )
    slope = made.weight[1, 0, 0, 0] - made.weight[0, 0, 0, 0]
    offset = made.bias[1] - made.bias[0]
    assert slope.item() == pytest.approx(2.0, abs=0.25) and offset.item() == pytest.approx(0.0, abs=0.25)


def test_retraining_follows_from_its_seed_alone():
    features = Features(torch.randn(sum(PIXELS), 8), torch.tensor(PIXELS))
    trained = nn.Conv2d(8, 4, 1)
    first = remedy("crt", "steps=3")(trained, given(features, seed=1))
    torch.rand(5)
    second = remedy("crt", "steps=3", "seed=1")(trained, given(features, seed=9))
    other = remedy("crt", "steps=3", "seed=2")(trained, given(features, seed=1))
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert not torch.equal(first.weight, other.weight)


def test_retraining_takes_a_tenth_of_the_steps_from_new_weights():
    features = Features(torch.randn(sum(PIXELS), 8), torch.tensor(PIXELS))
    trained = nn.Conv2d(8, 4, 1)
    tenth = remedy("crt")(trained, given(features, train=TrainConfig(steps=40)))
    four = remedy("crt", "steps=4")(trained, given(features))
    assert torch.equal(tenth.weight, four.weight)
    fresh = initialised(trained, 0)
    assert not torch.equal(fresh.weight, trained.weight) and not fresh.bias.any()
    assert fresh.weight.abs().max() <= 8**-0.5


def test_a_loss_that_is_not_finite_is_said():
    features = Features(torch.randn(sum(PIXELS), 8) * 1e20, torch.tensor(PIXELS))
    with pytest.raises(ValueError, match="remedy: run: the loss is not finite after 5 steps; lower lr"):
        remedy("crt", "steps=5", "lr=1e30")(nn.Conv2d(8, 4, 1), given(features))


# DisAlign -------------------------------------------------------------------------------------------------------------


def test_calibration_starts_as_the_identity():
    trained, features = nn.Conv2d(8, 4, 1), torch.randn(2, 8, 3, 5)
    aligned = calibrated(trained)
    assert torch.equal(aligned(features), trained(features))
    assert sum(p.numel() for p in aligned.own_parameters()) == 2 * 4 + 8 + 1


@torch.no_grad()
def test_calibration_is_the_papers():
    trained, x = nn.Conv2d(8, 4, 1), torch.randn(2, 8, 3, 5)
    aligned = calibrated(trained)
    for parameter in aligned.own_parameters():
        parameter.normal_()
    z = trained(x)
    gate = torch.sigmoid(torch.einsum("d,bdhw->bhw", aligned.gate.weight[0, :, 0, 0], x) + aligned.gate.bias)[:, None]
    expected = gate * (aligned.alpha[:, None, None] * z + aligned.beta[:, None, None]) + (1 - gate) * z
    torch.testing.assert_close(aligned(x), expected)
    assert gate.min() < 0.5  # no ReLU before it


def test_only_the_calibration_learns():
    features = Features(torch.randn(sum(PIXELS), 8), torch.tensor(PIXELS))
    trained = nn.Conv2d(8, 4, 1)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    made = remedy("disalign", "steps=5")(trained, given(features))
    assert isinstance(made, Aligned)
    assert all(torch.equal(value, before[name]) for name, value in made.classifier.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert all(parameter.grad is None for parameter in made.classifier.parameters())
    assert all(bool(parameter.grad.any()) for parameter in made.own_parameters())


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_a_calibrated_bias_ends_at_the_weighted_prior(rho):
    """Of features that say nothing the best offsets are those of p ∝ π^(1−ρ)."""
    features = Features(torch.zeros(sum(PIXELS), 8), torch.tensor(PIXELS))
    options = (f"rho={rho}", "steps=1000", "lr=2.0", "pixels=1")
    made = remedy("disalign", *options)(nn.Conv2d(8, 4, 1), given(features))
    share = made(torch.zeros(1, 8, 1, 1)).flatten().softmax(0)
    prior = torch.tensor(PIXELS) / sum(PIXELS)
    expected = prior ** (1 - rho) / (prior ** (1 - rho)).sum()
    torch.testing.assert_close(share, expected, atol=5e-3, rtol=0)


def test_calibrating_twice_is_refused():
    for name in ("crt", "disalign"):
        with pytest.raises(ConfigError, match="remedy: run: .*take the one before it"):
            remedy(name)(calibrated(nn.Conv2d(8, 4, 1)), given())
    with pytest.raises(ConfigError, match="^model.disalign: 'decode_head' is no classifier of the network"):
        build_model(replace(SMALL["upernet_no_aux"], disalign="decode_head"))


def test_cosine_classifiers_are_trained_again_or_calibrated():
    features = Features(F.normalize(torch.randn(sum(PIXELS), 8)), torch.tensor(PIXELS))
    trained = CosineClassifier(nn.Conv2d(8, 4, 1))
    fresh = remedy("crt", "steps=2", "lr=0.01")(trained, given(features))
    assert isinstance(fresh, CosineClassifier) and not torch.equal(fresh.directions, trained.directions)
    assert isinstance(remedy("disalign", "steps=2")(trained, given(features)).classifier, CosineClassifier)
    with pytest.raises(ConfigError, match="the classifier is a CosineClassifier, not a 1×1 convolution; "):
        remedy("tau_norm")(trained, given())
    with pytest.raises(ConfigError, match="the classifier has no bias that can hold it; set eval.logit_adjustment: 1,"):
        remedy("logit_adjustment")(trained, given())

    options = {"channels": 8, "auxiliary": False, "classifier": "cosine"}
    config = replace(SMALL["upernet_no_aux"], options=options)
    place = rebalance.find_classifier(config, "x")
    assert isinstance(build_model(replace(config, disalign=place)).get_submodule(place), Aligned)


# GCL's second stage ---------------------------------------------------------------------------------------------------

PLAIN = ("scale=30", "margin=0", "amplitude=0", "gamma=0")
NO_AUX = SMALL["upernet_no_aux"]
COSINE = replace(NO_AUX, options={**NO_AUX.options, "classifier": "cosine"})


def clouds() -> tuple[Features, CosineClassifier]:
    return Features(torch.randn(sum(PIXELS), 8), torch.tensor(PIXELS)), CosineClassifier(nn.Conv2d(8, 4, 1))


def test_without_its_parts_it_is_retraining():
    features, trained = clouds()
    plain = remedy("gcl", "steps=4", "fresh=true", *PLAIN)(trained, given(features, COSINE))
    again = remedy("crt", "steps=4")(trained, given(features, COSINE))
    assert torch.equal(plain.directions, again.directions)
    assert plain.scale == 30 and remedy("gcl", "steps=1")(trained, given(features, COSINE)).scale == 20
    assert trained.scale == 30, "the trained classifier is left as it is"


@pytest.mark.parametrize("option", ["margin=0.1", "amplitude=0.5", "gamma=1", "fresh=true", "scale=20"])
def test_each_part_changes_where_it_ends(option):
    features, trained = clouds()
    name = option.partition("=")[0]
    others = tuple(word for word in PLAIN if not word.startswith(name))
    plain = remedy("gcl", "steps=2", *PLAIN)(trained, given(features, COSINE))
    other = remedy("gcl", "steps=2", *others, option)(trained, given(features, COSINE))
    assert not torch.equal(plain.directions, other.directions)


def test_the_loss_of_a_pixel_is_the_papers():
    """Pixel by pixel; the noise is drawn first, from the same generator. Only −ln p_y has a gradient."""
    logits = (30 * torch.rand(5, 4) - 15).double().float().requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 3])
    made = remedy("gcl").loss(given(), CPU)
    torch.manual_seed(3)
    e = (torch.randn(5, 4) / 3).clamp(-1, 1).abs()
    torch.manual_seed(3)
    losses = made(logits, target)

    logs = [math.log(count) for count in PIXELS]
    w = torch.tensor([(max(logs) - log) / (max(logs) - min(logs)) for log in logs])
    for i, y in enumerate(target.tolist()):
        z = logits[i] - 20 * (0.5 * e[i] * w + 0.1 * F.one_hot(target[i], 4))
        plain = z.logsumexp(0) - z[y]
        factor = 1 - (-plain.detach()).exp()
        torch.testing.assert_close(losses[i], factor * plain)
        expected = torch.autograd.grad(factor * plain, logits, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(losses[i], logits, retain_graph=True)[0], expected)


def test_noise_follows_from_the_seed_alone():
    features, trained = clouds()
    torch.manual_seed(5)
    first = remedy("gcl", "steps=3", "seed=1")(trained, given(features, COSINE))
    after = torch.rand(1)
    torch.manual_seed(6)
    second = remedy("gcl", "steps=3")(trained, given(features, COSINE, seed=1))
    assert torch.equal(first.directions, second.directions)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after), "the generator is left as it was"


def test_a_scale_that_others_would_have_too():
    """OCRNet's coarse head says where its regions are, with a cosine classifier of its own; auxiliary ones are idle."""
    _, trained = clouds()
    options = {"classifier": "cosine"}
    alone = replace(SMALL["upernet"], options={**SMALL["upernet"].options, **options})
    assert other_classifiers(alone) == [] and len(build_model(alone).pixel_classifiers) == 2
    ocrnet = replace(SMALL["ocrnet"], options={**SMALL["ocrnet"].options, **options})
    with pytest.raises(ConfigError, match="remedy: run: scale: 20 would be that of .* as well; give scale=30, that of"):
        remedy("gcl")(trained, given(model=ocrnet))


def test_a_linear_classifier_has_no_angles():
    with pytest.raises(ConfigError, match="remedy: run: the classifier is a Conv2d, .*; train with model.options.cla"):
        remedy("gcl")(nn.Conv2d(8, 4, 1), given())


# The program ----------------------------------------------------------------------------------------------------------


def test_both_stages_of_gcl(config, monkeypatch, tmp_path):
    """A network that was to be trained with `gcl`; the result has the second stage's scale, and is a run as others."""
    first = untrained(config, "model.options.classifier=cosine", "remedies.logits.name=gcl")
    out = tmp_path / "out"
    call(monkeypatch, first, "gcl", "steps=5", "cache_mib=1", "--output", out, "--device", "cpu")
    folder = RunFolder.load(out)
    assert folder.tree["model"]["options"]["scale"] == 20
    assert folder.evaluation["rebalance"]["options"]["margin"] == 0.1

    made = rebalance.config_of_run(out / "checkpoints/last/model.safetensors", [])
    network = load_model(made.model, out)
    cfg = rebalance.config_of_run(first / "checkpoints/last/model.safetensors", [])
    before = load_model(cfg.model, first).state_dict()
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["decode_head.conv_seg.directions"]
    assert network.decode_head.conv_seg.scale == 20
    scored = rebalance.Experiment(made, counted="labeled", train=False).score(network, CPU)
    assert scored["confusion"] == folder.evaluation["confusion"]


def test_a_calibrated_network_is_a_run(run, monkeypatch, tmp_path, fails):  # noqa: F811
    out = tmp_path / "out"
    call(monkeypatch, run, "disalign", "steps=20", "lr=1.0", "cache_mib=1", "--output", out, "--device", "cpu")
    folder = RunFolder.load(out)
    assert folder.tree["model"]["disalign"] == "decode_head.conv_seg"
    options = folder.evaluation["rebalance"]["options"]
    assert (options["steps"], options["rho"], options["cache_mib"]) == (20, 0.2, 1)

    file = out / "checkpoints/last/model.safetensors"
    cfg = rebalance.config_of_run(file, [])
    network = load_model(cfg.model, out)
    trained = load_model(replace(cfg.model, disalign=None), run)
    left = network.state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(value, left[name.replace("conv_seg.", "conv_seg.classifier.")]), name
    assert len(left) == len(trained.state_dict()) + 4

    experiment = rebalance.Experiment(cfg, counted="labeled", train=False)
    assert experiment.score(network, CPU)["confusion"] == folder.evaluation["confusion"]
    assert "calibrated already" in fails(rebalance.main, out, "disalign", "--device", "cpu")


def test_retraining_leaves_all_but_the_classifier(run, monkeypatch, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    call(monkeypatch, run, "crt", "steps=5", "lr=0.1,0.2", "--output", out, "--device", "cpu")
    first, second = (RunFolder.load(out / name).evaluation for name in ("lr_0.1", "lr_0.2"))
    assert first["rebalance"]["options"]["lr"] == 0.1 and first["confusion"] != second["confusion"]

    call(monkeypatch, run, "crt", "steps=5", "lr=0.2", "--output", tmp_path / "one", "--device", "cpu")
    assert RunFolder.load(tmp_path / "one").evaluation["confusion"] == second["confusion"]
    cfg = rebalance.config_of_run(tmp_path / "one/checkpoints/last/model.safetensors", [])
    before, after = (load_model(cfg.model, folder).state_dict() for folder in (run, tmp_path / "one"))
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed == ["decode_head.conv_seg.weight", "decode_head.conv_seg.bias"]
