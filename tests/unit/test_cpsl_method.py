"""CPSL's step: who gets a gradient from what, rectification, teacher, bank, counts, the release's files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.config import Config, ConfigError, ModelConfig
from common.losses.blv import variation_weights
from tests.contexts import context
from tests.unit.host_values import HostValues
from uda.base import known_prototypes, read_distribution, read_prototypes, rectified
from uda.cpsl import CPSL
from uda.distill import Distill
from uda.proda import ProDA
from uda.warmup import WarmUp

CLASSES, CROP, FULL = 5, (32, 48), (64, 96)
SMALL = {"blocks": [1, 1, 1, 1], "width": 4, "head_channels": 8, "features": 8}


@pytest.fixture
def cfg(tmp_path):
    np.save(tmp_path / "delta.npy", np.array([0.5, 0.2, 0.15, 0.1, 0.05]))
    torch.save(torch.randn(CLASSES, 8), tmp_path / "prototypes.pt")
    model = ModelConfig(
        name="deeplabv2", num_classes=CLASSES, mean=(0, 0, 0), std=(255, 255, 255), align_corners=True, options=SMALL
    )
    return Config(name="test", output=str(tmp_path), model=model)


@pytest.fixture
def options(tmp_path):
    files = {"prototypes": str(tmp_path / "prototypes.pt"), "class_distribution": str(tmp_path / "delta.npy")}
    return {**files, "bank": 64, "samples": 16, "cutmix": 0.0}


def make(method, cfg, options=(), pixels=(9, 5, 3, 2, 1), **remedies):
    """A stage's method with options of its section and of the section `remedies`."""
    return method(replace(cfg, method=dict(options), remedies=remedies), context(pixels))


def batches(size=2):
    g = torch.Generator().manual_seed(1)
    images = lambda *shape: torch.randint(0, 256, (size, 3, *shape), generator=g, dtype=torch.uint8)  # noqa: E731
    soft = torch.randn(size, CLASSES, 9, 13, generator=g).softmax(1).half()
    geometry = torch.tensor([[*FULL, 72, 108, 16, 24, 1], [*FULL, 60, 90, 4, 8, 0]], dtype=torch.int32)
    geometry = geometry.repeat(-(-size // 2), 1)[:size]
    label = torch.randint(-1, CLASSES, (size, *CROP), generator=g, dtype=torch.int16)
    target = {
        "weak": images(*CROP), "strong": images(*CROP), "full": images(*FULL), "soft": soft, "geometry": geometry,
        "warp": torch.eye(3).repeat(size, 1, 1), "cutout": torch.tensor([[0, 0, 8, 8]] * size, dtype=torch.int32),
        "pseudo": label.clamp(min=0),
        "confidence": torch.randint(0, 255, (size, *CROP), generator=g, dtype=torch.int16),
    }  # fmt: skip
    return {"source": {"image": images(*CROP), "label": label}, "target": target}


def test_parts_train_what_they_should(cfg, options):
    method = make(CPSL, cfg, options)
    parts = method(batches(), 0)
    gradients = []
    for _ in range(3):
        method.zero_grad(set_to_none=True)
        losses = next(parts)
        losses["loss"].backward()
        gradients.append({name: p.grad for name, p in method.named_parameters() if p.requires_grad})
    source, weak, strong = gradients
    assert source["prototypes"] is None and weak["prototypes"].abs().sum() > 0
    assert strong["prototypes"].abs().sum() == 0 and strong["model.conv1.weight"].abs().sum() > 0
    assert all(g is not None for g in strong.values()), "the last part reaches every parameter"
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize("moves", [True, False])
def test_the_strong_view_moves_running_statistics_only_if_it_shall(cfg, options, moves):
    method = make(CPSL, cfg, {**options, "strong_statistics": moves})
    parts = method(batches(), 0)
    next(parts), next(parts)
    before = {name: b.clone() for name, b in method.model.named_buffers() if "running" in name}
    next(parts)["loss"].backward()
    same = [torch.equal(before[name], b) for name, b in method.model.named_buffers() if "running" in name]
    assert len(same) > 0 and (not any(same) if moves else all(same))
    assert all(m.momentum == 0.1 for m in method.model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_no_value_of_the_host_is_copied_in_a_step(cfg, options):
    """Its loss counts pseudo-labels, too."""
    method = make(CPSL, cfg, options, logits={"name": "logit_adjustment"}, counts={"refresh": 2})
    streams = batches()
    with HostValues() as values:
        terms = list(method(streams, 0))
    assert method.loss.counts.running.sum() > 0 and terms[1]["bank_fill"] == method.features.fill > 0
    assert values.count == 0


def test_self_labelling_gives_the_network_no_gradient(cfg, options):
    method = make(CPSL, cfg, options)
    *_, sampled = method.label_target(batches()["target"])
    first, second = method.self_label(*sampled)
    (first + second).backward()
    assert method.prototypes.grad is not None
    assert all(p.grad is None for p in method.model.parameters())


def test_one_hot_soft_labels_survive_rectification_and_equal_similarities_change_nothing(cfg, options):
    method = make(CPSL, cfg, options)
    target = batches()["target"]
    warm = target["soft"]
    similarity = torch.randn(2, CLASSES, 8, 12)
    target["soft"] = F.one_hot(torch.full((2, 9, 13), 3), CLASSES).permute(0, 3, 1, 2).half()
    assert (method.rectify(similarity, target)[0] == 3).all()
    target["soft"] = warm
    label, changed = method.rectify(torch.zeros_like(similarity), target)
    assert changed == 0 and label.shape == (2, 8, 12)


# Classes without a prototype -----------------------------------------------------------------------------------------


def test_a_class_without_a_prototype_keeps_its_probability():
    """Bayes: evidence about some classes moves the probability among them, none to or from the others."""
    warm, evidence, known = torch.randn(2, 5, 3, 4).softmax(1), torch.randn(2, 3, 3, 4), torch.tensor([0, 1, 3])
    ours = rectified(warm, evidence, known)
    assert torch.equal(ours[:, [2, 4]], warm[:, [2, 4]])
    for b, y, x in np.ndindex(2, 3, 4):
        likelihood = evidence[b, :, y, x].double().exp()
        prior = warm[b, known, y, x].double()
        posterior = likelihood * prior / (likelihood * prior).sum() * prior.sum()
        torch.testing.assert_close(ours[b, known, y, x].double(), posterior, rtol=1e-5, atol=1e-7)
    every = rectified(warm, evidence_of_all := torch.randn(2, 5, 3, 4), torch.arange(5))
    torch.testing.assert_close(every, evidence_of_all.softmax(1) * warm)


@pytest.mark.parametrize("kind", [CPSL, ProDA])
def test_missing_prototypes_are_neutral(kind, cfg, options, tmp_path):
    """They are neither learned nor labelled away, and no gradient or loss suffers; files of every class but two."""
    prototypes = torch.load(tmp_path / "prototypes.pt")
    prototypes[[1, 4]] = 0
    torch.save(prototypes, tmp_path / "prototypes.pt")
    torch.manual_seed(0)
    method = make(kind, cfg, options if kind is CPSL else {"prototypes": options["prototypes"]})
    assert method.known.tolist() == [0, 2, 3] and method.prototypes.shape == (3, 8)
    streams = batches()
    sure = F.one_hot(torch.full((2, 9, 13), 4), CLASSES).permute(0, 3, 1, 2).half()
    streams["target"]["soft"] = 0.9 * sure + 0.02
    assert (method.label_target(streams["target"])[1] == 4).all()
    streams = batches()
    for step in range(4):  # the bank is full after two
        for losses in method(streams, step):
            losses["loss"].backward()
            assert losses["loss"].isfinite()
        method.after_step(step)
    gradients = [p.grad for p in method.parameters() if p.requires_grad]
    assert all(g.isfinite().all() and g.abs().max() < 1e4 for g in gradients)


def test_prototypes_that_are_all_missing(tmp_path):
    torch.save(torch.zeros(5, 8), tmp_path / "prototypes.pt")
    with pytest.raises(ValueError, match="no class has a prototype"):
        known_prototypes(tmp_path / "prototypes.pt", 5)


# The teacher ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, mode", [(CPSL, "eval"), (CPSL, "train"), (ProDA, "eval")])
def test_the_teachers_statistics_lag_as_its_weights_do(kind, mode, cfg, options):
    """Closed form after three steps; with a teacher that normalises by its batch they are copied, as in the release."""
    own = options | {"teacher_mode": mode} if kind is CPSL else {"prototypes": options["prototypes"]}
    method = make(kind, cfg, own | {"momentum": 0.75})
    start = method.model.bn1.running_mean.clone()
    seen = [start]
    for step in range(3):
        for losses in method(batches(), step):
            losses["loss"].backward()
        method.after_step(step)
        seen.append(method.model.bn1.running_mean.clone())
    lagging = 0.75**3 * seen[0] + 0.25 * (0.75**2 * seen[1] + 0.75 * seen[2] + seen[3])
    expected = lagging if mode == "eval" else seen[3]
    assert not torch.equal(seen[1], seen[3])
    torch.testing.assert_close(method.teacher.bn1.running_mean, expected)
    assert method.teacher.bn1.num_batches_tracked == method.model.bn1.num_batches_tracked == 9


def test_bank_is_full_after_the_stated_steps_and_resumes(cfg, options):
    method = make(CPSL, cfg, options)
    streams = batches()
    for step in range(2):  # 64 rows, 2 images of 16 samples per step
        assert not method.features.full
        parts = list(method(streams, step))
        method.after_step(step)
    assert method.features.full and all(losses["loss"].isfinite() for losses in parts)
    again = make(CPSL, cfg, options)
    again.load_state_dict(method.state_dict())
    assert again.features.full and again.features.pushed == method.features.pushed
    torch.testing.assert_close(again.prototypes_ema, method.prototypes_ema)


def test_bank_of_normalised_prototypes_scores_like_the_current_rows(cfg, options):
    """With the option of the release, bank scores use raw prototypes: they differ once the norms have drifted."""
    losses = []
    for normalise in (True, False):
        torch.manual_seed(0)
        method = make(CPSL, cfg, options | {"normalise_bank": normalise})
        with torch.no_grad():
            method.prototypes *= torch.tensor([1.0, 4.0, 1.0, 1.0, 1.0])[:, None]
        generator = torch.Generator().manual_seed(3)
        rows = F.normalize(torch.randn(8, 16, 8, generator=generator), dim=2)
        outs = F.normalize(torch.randn(8, 16, CLASSES, generator=generator), dim=2)
        losses.append(method.self_label(rows, outs, torch.zeros(8, 16, dtype=torch.int64))[0].item())
    assert losses[0] != pytest.approx(losses[1], abs=1e-4)


def test_blv_counts_are_refreshed_and_saved(cfg, options):
    """Source pixels, and as many target pixels by the shares of the pseudo-labels."""
    counts = torch.tensor([1000, 500, 200, 100, 50])
    remedies = {"logits": {"name": "blv"}, "counts": {"refresh": 1}}
    method = make(CPSL, cfg, options, counts, **remedies)
    after = method.loss.offsets
    torch.testing.assert_close(after, variation_weights(counts))
    *_, label, _, _ = method.label_target(batches()["target"])
    for _ in method(batches(), 0):
        pass
    method.after_step(0)
    seen = torch.bincount(label.flatten(), minlength=CLASSES).double()
    torch.testing.assert_close(after, variation_weights(counts + counts.sum() * seen / seen.sum()))
    again = make(CPSL, cfg, options, counts, **remedies)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.loss.offsets, after)


def test_blv_in_every_stage(cfg):
    """Preset and `average` reach both losses; the warm-up has no pseudo-labels to refresh counts with."""
    with pytest.raises(ConfigError, match="remedies.counts.refresh: 100, but this method makes no pseudo-labels"):
        WarmUp(replace(cfg, remedies={"counts": {"refresh": 100}}), context(CLASSES))
    label = batches()["source"]["label"]
    logits, valid = torch.randn(2, CLASSES, *CROP), (label != -1).float().mean()
    assert valid < 0.9
    losses = []
    for average in ("valid", "all"):
        method = make(WarmUp, cfg, logits={"name": "blv", "noise": "constant", "average": average})
        losses.append([method.loss(logits, label), method.symmetric_loss(logits, label, (0.1, 1.0), 0.0, {})])
    torch.testing.assert_close(losses[1], [valid * value for value in losses[0]])
    noisy = logits + variation_weights([9, 5, 3, 2, 1]).view(1, -1, 1, 1)
    torch.testing.assert_close(losses[0][0], F.cross_entropy(noisy, label.long(), ignore_index=-1))


def test_warm_up_equals_alternating_updates(cfg):
    """One joint backward gives the gradients of the network's and the discriminator's own losses."""
    torch.manual_seed(0)
    method = make(WarmUp, cfg, {"discriminator_width": 4}).eval()
    streams = batches()
    streams["target"] = {"image": streams["target"]["weak"]}
    method(streams, 0)["loss"].backward()
    joint = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    source, target = (method.upsampled(streams[k]["image"]) for k in ("source", "target"))
    discriminator = method.discriminator
    ce = F.cross_entropy(source, streams["source"]["label"].long(), ignore_index=-1)
    net = ce + 0.01 * discriminator(target.softmax(1)).square().mean()
    for name, gradient in zip(
        dict(method.model.named_parameters()), torch.autograd.grad(net, list(method.model.parameters())), strict=True
    ):
        torch.testing.assert_close(joint[f"model.{name}"], gradient, rtol=1e-4, atol=1e-6)
    on_source, on_target = (discriminator(logits.detach().softmax(1)) for logits in (source, target))
    loss = on_source.square().mean() + (on_target - 1).square().mean()
    for name, gradient in zip(
        dict(discriminator.named_parameters()), torch.autograd.grad(loss, list(discriminator.parameters())), strict=True
    ):
        torch.testing.assert_close(joint[f"discriminator.{name}"], gradient, rtol=1e-4, atol=1e-6)


def test_distillation_threshold_and_frozen_teacher(cfg, tmp_path):
    from safetensors.torch import save_file

    from common.models import build_model

    teacher = build_model(cfg.model)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    method = make(Distill, cfg, {"teacher": str(tmp_path / "teacher.safetensors"), "threshold": 0.5})
    target = batches()["target"]
    label = method.labels_on_grid(target)
    sure = (target["confidence"][:, ::4, ::4].float() / 254 > 0.5) & (label != -1)
    assert ((label != -1) == sure).all() and (label[:, :2, :2] == -1).all()  # the cutout
    for losses in method(batches(), 0):
        losses["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    float_target = target | {"confidence": target["confidence"].half() / 254}
    agreement = (method.labels_on_grid(float_target) == label).float().mean()
    assert agreement > 0.99  # the release stores float16


def test_proda_moves_its_prototypes_towards_class_means(cfg, tmp_path):
    method = make(ProDA, cfg, {"prototypes": str(tmp_path / "prototypes.pt"), "prototype_momentum": 0.5})
    before = method.prototypes.clone()
    streams = batches()
    out = method.teacher.eval()(streams["target"]["full"])
    for losses in method(streams, 0):
        losses["loss"].backward()
    method.after_step(0)
    expected = before
    for logits, features in zip(out["logits"], out["features"], strict=True):
        mask = logits.argmax(0)
        for k in range(CLASSES):
            if (mask == k).any():  # of 9·13 cells one is enough
                expected[k] += 0.5 * (features[:, mask == k].mean(1) - expected[k])
    torch.testing.assert_close(method.prototypes, expected, rtol=1e-4, atol=1e-5)


def test_prodas_prototypes_do_not_depend_on_the_micro_batches(cfg, tmp_path):
    """Four images back-propagated at once, and one by one before the same update."""
    streams = batches(4)
    results = []
    for parts in ([slice(0, 4)], [slice(i, i + 1) for i in range(4)]):
        torch.manual_seed(0)
        method = make(ProDA, cfg, {"prototypes": str(tmp_path / "prototypes.pt"), "prototype_momentum": 0.5})
        for conv in (m for m in method.teacher.modules() if isinstance(m, torch.nn.Conv2d)):
            torch.nn.init.kaiming_normal_(conv.weight)  # else its logits are all but equal, and rounding chooses
        for part in parts:
            micro = {name: {key: value[part] for key, value in batch.items()} for name, batch in streams.items()}
            for _ in method(micro, 0):
                pass
        method.after_step(0)
        results.append(method.prototypes)
        assert not torch.equal(method.prototypes, torch.load(tmp_path / "prototypes.pt"))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_files_of_the_release_are_read(tmp_path):
    prototypes = torch.randn(19, 256)
    torch.save(prototypes, tmp_path / "prototypes_on_cityscapes_from_deeplabv2")
    assert torch.equal(read_prototypes(tmp_path / "prototypes_on_cityscapes_from_deeplabv2", 19), prototypes)
    released = [
        0.379220, 0.049299, 0.226651, 0.015507, 0.017205, 0.014027, 0.002186, 0.002213, 0.133376, 0.024243, 0.043411,
        0.013146, 0.001615, 0.066048, 0.004075, 0.002789, 0.001847, 0.001229, 0.001912,
    ]  # fmt: skip
    np.save(tmp_path / "class_distribution.npy", np.array(released))
    assert read_distribution(tmp_path / "class_distribution.npy", 19).sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda d: read_prototypes(d / "none.pt", 5), "calc_prototype.py makes them"),
        (lambda d: read_distribution(d / "none.npy", 5), "generate_class_distribution.py makes it"),
        (lambda d: read_prototypes(d / "prototypes.pt", 19), r"shape \(5, 8\) for 19 classes"),
        (lambda d: read_distribution(d / "delta.npy", 19), "5 class shares for 19 classes"),
    ],
)
def test_missing_or_wrong_files_name_the_command(cfg, tmp_path, make, words):
    with pytest.raises(ValueError, match=words):
        make(tmp_path)
