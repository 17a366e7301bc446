"""U2PL's self-training: the release's loss, the step written out, its recipe and its configs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.config import Config, ConfigError, ModelConfig, TrainConfig, load_config
from common.data import IGNORE, build_transform
from common.losses.cross_entropy import cross_entropy_sum
from common.ops.resize import resize
from semi_sup.config import build_method, single_branch
from semi_sup.u2pl import drop_uncertain, half_box, weighted_mean
from tests.contexts import context
from tests.golden.fill import image
from tests.unit.data_files import classes, opened, picture

CONFIGS = Path(__file__).parents[2] / "semi_sup" / "configs"
OPS = Path(__file__).parents[1] / "golden" / "data" / "u2pl_ops.json"
NETWORK = {"channels": 8, "lateral_channels": 4, "dilations": (1, 2, 3), "channel_dropout": 0.0}
TINY = {**NETWORK, "backbone": {"multi_grid": (2, 2)}}


def method(classes=5, remedies=(), **options):
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    model = ModelConfig("deeplabv3plus_u2pl", classes, "resnet18", options=TINY, align_corners=True, **plain)
    sections = {"method": {"name": "u2pl", **options}, "remedies": dict(remedies)}
    return build_method(Config(model, **sections, train=TrainConfig(steps=10), name="test"), context(classes)).train()


def batches(size=33, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = [torch.randn(2, 3, size, size, generator=g) for _ in range(2)]
    label = torch.randint(-1, classes, (2, size, size), generator=g).short()
    shown = torch.ones(2, size, size, dtype=torch.bool)
    shown[0, :, 25:] = False
    geometry = torch.tensor([[2 * size, size, size, size, 0, 0, 0]] * 2)
    unlabeled = {"image": images[1], "shown": shown, "geometry": geometry}
    return {"labeled": {"image": images[0], "label": label}, "unlabeled": unlabeled}


# The loss


@pytest.mark.parametrize("percent", [80, 90, 100])
def test_unsupervised_loss_is_the_releases(percent):
    """Rows without a label are no part of the percentile, but of "all pixels"."""
    expected = json.loads(OPS.read_text())[f"unsupervised, drop_percent {percent}"]
    student = (2 * torch.from_numpy(image(21, (2, 19, 24, 24)))).requires_grad_()
    teacher = 2 * torch.from_numpy(image(22, (2, 19, 24, 24)))
    label = torch.from_numpy(np.random.RandomState(23).randint(0, 19, (2, 24, 24)))
    labelled = torch.ones(2, 24, 24, dtype=torch.bool)
    labelled[:, :2] = False

    entropy = torch.special.entr(teacher.softmax(1)).sum(1)
    kept = drop_uncertain(label, entropy, labelled, 1 - percent / 100)
    loss = weighted_mean(cross_entropy_sum(student, kept), kept, torch.ones_like(labelled))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected["loss"], rel=1e-5)
    assert float(student.grad.norm()) == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_percentile_is_numpys():
    entropy = torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(1))
    shown = torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    label = torch.zeros(2, 7, 9, dtype=torch.long)
    for part in (0.0, 0.13, 0.5, 1.0):
        limit = np.percentile(entropy[shown].double().numpy(), 100 * (1 - part))
        expected = shown & (entropy < limit)
        assert torch.equal(drop_uncertain(label, entropy, shown, part) != IGNORE, expected), part
    assert (drop_uncertain(label, entropy, shown & False, 0.2) == IGNORE).all()


def test_boxes_have_half_the_area():
    boxes = torch.stack([half_box((40, 40)) for _ in range(500)])
    tall, wide = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all() and (boxes <= 40).all()
    assert int(wide.min()) == 21 and int(wide.max()) == 39
    assert torch.equal(tall, torch.tensor([round(800 / int(w)) for w in wide]))


# The step


def literal(m, streams, progress):
    """The step as section 2.10 has it, of whole maps."""
    labeled, unlabeled = streams["labeled"], streams["unlabeled"]
    size = labeled["label"].shape[-2:]
    with torch.no_grad():
        label = resize(m.teacher.eval()(unlabeled["image"])["logits"], size, True).argmax(1)
        both = torch.cat((labeled["image"], unlabeled["image"]))
        p = resize(m.teacher.train()(both)["logits"], size, True).softmax(1)[2:]
        entropy = -(p * p.log()).sum(1).numpy()
    shown = unlabeled["shown"]
    limit = np.percentile(entropy[shown.numpy()], 100 - 20 * (1 - progress))
    kept = torch.from_numpy(entropy < limit) & shown
    out = m.model.train()(both)
    logits, aux = (resize(z, size, True) for z in (out["logits"], out["aux"][0]))
    y = labeled["label"].long()
    terms = {key: F.cross_entropy(z[:2], y, ignore_index=-1) for key, z in (("Lx", logits), ("Laux", aux))}
    every = F.cross_entropy(logits[2:], label, reduction="none")
    terms["Lu"] = every[kept].mean() * shown.sum() / kept.sum()
    return terms | {"loss": terms["Lx"] + 0.4 * terms["Laux"] + terms["Lu"]}


def test_step_is_the_one_written_out():
    m, other = method(), method()
    with torch.no_grad():
        for p in m.teacher.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4)))
    other.load_state_dict(m.state_dict())
    streams = batches()
    terms, expected = m(streams, 5), literal(other, streams, 0.5)
    for key, value in expected.items():
        torch.testing.assert_close(terms[key], value, rtol=1e-5, atol=1e-6)
    for loss in (terms["loss"], expected["loss"]):
        loss.backward()
    for (key, ours), theirs in zip(m.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=key)
    for (key, ours), theirs in zip(m.state_dict().items(), other.state_dict().values(), strict=True):
        if not key.startswith("teacher.auxiliary_head."):  # which nothing asks
            torch.testing.assert_close(ours, theirs, msg=key)  # batch norm's statistics
    assert int(m.teacher.state_dict()["lateral.norm.num_batches_tracked"]) == 1


def test_cutmix_pastes_image_label_and_mask(monkeypatch):
    m, streams = method(cutmix=True), batches()
    plain = method().mixed(streams["unlabeled"])
    monkeypatch.setattr("semi_sup.u2pl.half_box", lambda size: torch.tensor([0, 0, size[0], 20]))
    draws = []
    for seed in range(20):
        torch.manual_seed(seed)
        draws.append(m.mixed(streams["unlabeled"]))
    images = streams["unlabeled"]["image"]
    mixed = [d for d in draws if not torch.equal(d[0], images)]
    assert 4 <= len(mixed) <= 16 and torch.equal(plain[0], images)
    new, _, shown, _ = mixed[0]
    assert torch.equal(new[..., :20], images.flip(0)[..., :20]) and torch.equal(new[..., 20:], images[..., 20:])
    assert torch.equal(shown, torch.cat((shown[:1], shown[1:]))) and not shown[0, :, 25:].any() and shown[1].all()


def test_boxes_of_cutmix_are_copied_without_waiting(monkeypatch):
    """They are drawn on the host."""
    m, copied = method(cutmix=True), []
    monkeypatch.setattr("semi_sup.u2pl.to_device", lambda boxes, device: copied.append(boxes) or boxes.to(device))
    unlabeled = batches()["unlabeled"]
    for seed in range(20):
        torch.manual_seed(seed)
        m.mixed(unlabeled)
    assert 4 <= len(copied) <= 16 and copied[0].shape == (len(unlabeled["image"]), 4)


def test_the_stages_of_a_training():
    """Labelled crops alone; then the student as teacher, with statistics of its own; then its moving average."""
    m = method(supervised_steps=2, copied_steps=2)
    assert "Lu" not in m(batches(), 1) and "Lu" in m(batches(), 2)
    parameter, average = next(m.model.parameters()), next(m.teacher.parameters())
    ours, theirs = (net.state_dict()["lateral.norm.running_mean"] for net in (m.model, m.teacher))
    with torch.no_grad():
        for step, weight in ((0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0), (4, 1 - 1 / 3), (1000, 0.99)):
            before, statistics = average.clone(), theirs.clone()
            parameter.normal_()
            ours.normal_()
            m.after_step(step)
            torch.testing.assert_close(average, weight * before + (1 - weight) * parameter)
            assert torch.equal(theirs, ours if step < 2 else statistics), step


def test_a_teacher_without_a_pass_of_its_own_predicts_as_the_student():
    """What is evaluated while labelled crops alone are learnt has seen them."""
    m, untrained = method(supervised_steps=3), method()
    assert m.network is m.teacher
    untrained.load_state_dict(m.state_dict())
    optimizer = torch.optim.SGD(m.model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        m(batches(seed=step), step)["loss"].backward()
        optimizer.step()
        m.after_step(step)
    image = batches()["labeled"]["image"]
    found = [net.eval().predict(image) for net in (m.teacher, m.model, untrained.teacher)]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])
    counted = "lateral.norm.num_batches_tracked"
    assert m.teacher.state_dict()[counted] == m.model.state_dict()[counted] == 3


def test_padding_of_unlabelled_crops():
    streams = batches()
    masked, release = method(), method(mask_padding=False)
    release.load_state_dict(masked.state_dict())
    assert masked.mixed(streams["unlabeled"]).counted.sum() == streams["unlabeled"]["shown"].sum()
    assert release.mixed(streams["unlabeled"]).counted.all()


def test_remedies_act_on_both_terms_but_not_on_the_auxiliary_head():
    remedies = {"logits": {"name": "logit_adjustment"}, "counts": {"refresh": 1}}
    plain, changed = method(), method(remedies=remedies)
    changed.load_state_dict(plain.state_dict(), strict=False)
    changed.loss.offsets.copy_(torch.arange(5.0))
    first, second = plain(batches(), 0), changed(batches(), 0)
    assert first["Lx"] != second["Lx"] and first["Lu"] != second["Lu"] and first["Laux"] == second["Laux"]
    # what is kept stands for twice as many pixels of its image as of the crop, or more where that has padding
    kept = float(second["kept"]) * batches()["unlabeled"]["shown"].sum()
    area = (2 * 33 / 33 + 2 * 33 / 25) / 2
    assert float(changed.loss.counts.running.sum()) == pytest.approx(float(kept) * area, rel=1e-5)


def test_padding_is_not_counted_for_a_class():
    """Whether it takes part in the loss or not: all pixels are kept but the least certain one."""
    remedies = {"logits": {"name": "logit_adjustment"}, "counts": {"refresh": 9}}
    streams = batches()
    shown = int(streams["unlabeled"]["shown"].sum())
    area = (2 * 33 / 33 + 2 * 33 / 25) / 2
    for mask_padding in (True, False):
        m = method(remedies=remedies, dropped=0.0, mask_padding=mask_padding)
        m(streams, 0)
        counted = float(m.loss.counts.running.sum()) / area
        assert round(counted) in (shown - 1, shown) and counted == pytest.approx(round(counted), rel=1e-6)


def test_hard_pixels_are_mined_of_both_heads():
    focus = {"name": "hard_pixels", "threshold": 0.2, "min_kept": 50}
    plain, mined = method(), method(remedies={"focus": focus})
    mined.load_state_dict(plain.state_dict())
    first, second = plain(batches(), 0), mined(batches(), 0)
    assert first["Lx"] < second["Lx"] and first["Laux"] < second["Laux"] and first["Lu"] == second["Lu"]


def test_pseudo_labels_are_those_of_float32(monkeypatch):
    """Enlarged in bfloat16, logits tie, and ties would go to the first class, on Cityscapes a frequent one."""
    m = method(cutmix=False)
    logits = (torch.randn(2, 5, 9, 9, generator=torch.Generator().manual_seed(0)) / 8).bfloat16()
    monkeypatch.setattr(m, "answer", lambda net, images: logits)
    _, label, _, _ = m.mixed(batches()["unlabeled"])
    assert torch.equal(label, resize(logits.float(), (33, 33), True).argmax(1))
    assert not torch.equal(label, resize(logits, (33, 33), True).argmax(1))


def test_settings_that_cannot_work():
    network = ModelConfig("deeplabv3plus_unimatch", 5, "resnet18", options={"channels": 8}, align_corners=True)
    with pytest.raises(ConfigError, match="no auxiliary head; set it to deeplabv3plus_u2pl"):
        build_method(Config(network, method={"name": "u2pl"}, name="test"), context(5))
    streams = batches()
    streams["unlabeled"]["image"] = streams["unlabeled"]["image"][..., :20]
    with pytest.raises(ValueError, match="one batch; give one `crop`"):
        streams["unlabeled"]["shown"] = streams["unlabeled"]["shown"][..., :20]
        method()(streams, 0)


# The recipe


def views(**options):
    return build_transform({"recipe": "u2pl", "crop": (40, 40), **options})


def test_small_images_lie_in_the_middle():
    pixels, label = picture(24, 60), classes(24, 60, 9).astype(np.int16)
    for seed in range(20):
        out = views(ratio=(0.5, 1.2))(opened(pixels, label), np.random.default_rng(seed), None, 0)
        height = int(out["geometry"][2])
        top = (40 - height) // 2
        rows = torch.zeros(40, dtype=torch.bool)
        rows[top : top + height] = True
        assert torch.equal(out["shown"].any(1), rows)
        assert (out["label"][~out["shown"]] == IGNORE).all()
        padding = out["image"][:, ~out["shown"]]
        assert torch.equal(padding, torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None].expand_as(padding))
        kept = views(ratio=(0.5, 1.2), padded_label=0)(opened(pixels, label), np.random.default_rng(seed), None, 0)
        assert (kept["label"][~kept["shown"]] == 0).all() and torch.equal(kept["image"], out["image"])


def test_factors_shrink_one_time_in_two():
    recipe = views()
    factors = np.array([recipe.draw((1000, 1000), np.random.default_rng(k))[2] / 1000 for k in range(4000)])
    assert 0.5 <= factors.min() < 0.51 and 1.99 < factors.max() <= 2
    assert (factors < 1).mean() == pytest.approx(0.5, abs=0.03)
    assert factors[factors < 1].mean() == pytest.approx(0.75, abs=0.01)
    assert factors[factors > 1].mean() == pytest.approx(1.5, abs=0.02)
    with pytest.raises(ConfigError, match="does not hold 1"):
        views(ratio=(1.5, 2.0))


# The configs


@pytest.mark.parametrize("name", sorted(path.name for path in (CONFIGS / "u2pl_base").glob("*.yaml")))
def test_shipped_configs_load(name):
    cfg = load_config(CONFIGS / "u2pl_base" / name)
    labeled, unlabeled = (cfg.data.streams[key] for key in ("labeled", "unlabeled"))
    assert labeled.batch_size == unlabeled.batch_size and labeled.augment == unlabeled.augment
    assert not unlabeled.labels and single_branch(cfg) is cfg
    build_transform(labeled.augment, "labeled")
    with torch.device("meta"):
        m = build_method(cfg, context(cfg.model.num_classes))
    assert (m.loss.logits is not None) == name.endswith("_blv.yaml")
    if "toy" not in name:
        on_each = -(-{"16": 2789, "8": 2603, "4": 2231, "2": 1487}[name.split("_")[2].removesuffix(".yaml")] // 8)
        assert cfg.method["copied_steps"] == cfg.eval.every == on_each // 2
        assert cfg.train.steps == 200 * (on_each // 2)
