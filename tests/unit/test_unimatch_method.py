"""UniMatch and UniMatch V2: the reference training steps, what each switch does, and what is kept between steps."""

import json
from copy import deepcopy
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.config import Config, ConfigError, ModelConfig, TrainConfig
from common.losses.build import LossContext, build_loss
from common.losses.counts import Counts
from common.models import load_weights
from common.models.pretrained.unimatch import UNUSED, ours
from semi_sup import consistency
from semi_sup.config import build_method
from semi_sup.consistency import (
    PseudoLabels,
    channel_mask,
    complementary_masks,
    confident_loss,
    in_boxes,
    paste,
    paste_labels,
    pseudo_labels,
)
from tests.contexts import context
from tests.golden.fill import image
from tests.golden.rounding import SAME_KERNELS, in_float64, precise
from tests.golden.test_unimatch import V1, V2, filled, save

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
BACKBONE = {"dim": 16, "heads": 2, "taps": (0, 1, 2, 3), "grid": 3}
DPT = {"widths": (4, 6, 8, 8), "channels": 4, "backbone": BACKBONE}
DEEPLAB = {"channels": 8, "lateral_channels": 4}
FIXMATCH = {"unimatch": {"views": 1, "perturb": False}, "unimatch_v2": {"views": 1, "complementary": False}}


def method(name="unimatch", classes=5, small=True, remedies=(), alone=False, **options):
    network = "deeplabv3plus_unimatch" if name == "unimatch" else "dpt"
    backbone = {"unimatch": "resnet18" if small else "resnet50s", "unimatch_v2": "dinov2_small"}[name]
    sizes = {} if not small else DEEPLAB if name == "unimatch" else DPT
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    model = ModelConfig(network, classes, backbone, options=sizes, align_corners=True, **plain)
    sections = {"method": {"name": "baseline" if alone else name, **options}, "remedies": dict(remedies)}
    return build_method(Config(model, **sections, train=TrainConfig(steps=10), name="test"), context(classes))


def run(m, streams, step=0):
    """All parts of a step, back-propagated as the engine does; the terms together."""
    terms, parts, loss = {}, 0, 0.0
    for out in m(streams, step):
        out["loss"].backward()
        loss += out["loss"].detach()
        terms |= {key: value.detach() for key, value in out.items()}
        parts += 1
    assert parts == m.backwards
    return terms | {"loss": loss}


def batches(size=42, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)

    def pixels():
        return torch.randn(2, 3, size, size, generator=g)

    label = torch.randint(-1, classes, (2, size, size), generator=g).short()
    boxes = {f"box{view}": torch.tensor([[3, 5, 20, 30], [0, 0, 0, 0]], dtype=torch.int32) for view in (1, 2)}
    shown = torch.ones(2, size, size, dtype=torch.bool)
    views = {key: pixels() for key in ("weak", "strong1", "strong2")}
    partner = {f"partner_{key}": pixels() for key in views}
    geometry = torch.tensor([[size, size, size, size, 0, 0, 0]] * 2)
    unlabeled = {**views, **partner, **boxes, "shown": shown, "partner_shown": shown.clone(), "geometry": geometry}
    return {"labeled": {"image": pixels(), "label": label}, "unlabeled": unlabeled}


# The releases' steps


def golden_batches(size: int, batch: int) -> dict:
    """The inputs that the files of the releases' steps describe."""
    shape = (batch, 3, size, size)
    label = torch.from_numpy(np.random.RandomState(7).randint(0, 21, (batch, size, size))).long()
    label[:, :5] = -1
    seen, second = torch.ones(batch, size, size, dtype=torch.bool), torch.ones(batch, size, size, dtype=torch.bool)
    seen[0, :, 60:] = False
    second[1, 62:] = False
    boxes = torch.zeros(2, batch, 4, dtype=torch.int32)
    boxes[0, 0] = torch.tensor([10, 20, 50, 70])
    boxes[0, 1] = torch.tensor([40, 5, 65, 45])
    boxes[1, 1] = torch.tensor([3, 30, 60, 66])
    views = ("weak", "strong1", "strong2")
    images = {key: torch.from_numpy(image(seed, shape)) for seed, key in enumerate(views, 2)}
    partner = {f"partner_{key}": torch.from_numpy(image(seed, shape)) for seed, key in enumerate(views, 5)}
    unlabeled = {**images, **partner, "box1": boxes[0], "box2": boxes[1], "shown": seen, "partner_shown": second}
    return {"labeled": {"image": torch.from_numpy(image(1, shape)), "label": label}, "unlabeled": unlabeled}


def given_channel_masks(batch: int):
    """The masks of the release's step, which has two crops more (the labelled ones) than are used."""
    rng = np.random.RandomState(8)
    masks = [2 * (rng.random_sample((2 * batch, channels)) < 0.5) for channels in (256, 2048)]
    masks = cycle([torch.from_numpy(m).float()[..., None, None] for m in masks])
    return lambda x, rate: next(masks)


def given_pair_masks(pairs, channels, like):
    first = torch.from_numpy(2 * (np.random.RandomState(9).random_sample((2, 384)) < 0.5)).float()
    first[1] = 1
    return torch.cat((first, 2 - first))[..., None, None]


def check_losses(terms, expected: dict) -> None:
    losses = {"loss_x": terms["Lx"], "loss": terms["loss"]}
    losses |= {"loss_u_w_fp": terms["Lfp"]} if "Lfp" in terms else {}
    for key, value in losses.items():
        assert float(value) == pytest.approx(expected["losses"][key], rel=1e-5), key
    assert float(terms["Ls"]) == pytest.approx(expected["scalars"]["train/loss_s"], rel=1e-5)
    assert float(terms["kept"]) == pytest.approx(expected["scalars"]["train/mask_ratio"], rel=1e-3)


def check_step(name: str, kind: str, m, size: int, batch: int) -> None:
    expected = json.loads((GOLDEN / f"{name}_step.json").read_text())[kind]
    streams = golden_batches(size, batch)
    if name == "unimatch" and not SAME_KERNELS:  # losses of the float32 step, then both of the exact one
        check_losses(run(deepcopy(m), streams), expected)
        m.model, streams = precise(m.model), in_float64(streams)
    terms = run(m, streams)
    check_losses(terms, expected)

    norms = {key: float(p.grad.norm()) for key, p in m.model.named_parameters()}
    for key, value in expected["grad_norm"].items():
        early = name == "unimatch" and key.startswith(("backbone.conv1", "backbone.layer1"))
        assert norms[ours(key)] == pytest.approx(value, rel=5e-3 if early else 1e-3), key
    together = torch.cat([p.grad.flatten() for p in m.model.parameters()])
    together = together.float()  # and in one float32 sum, as the file's was
    assert float(together.norm()) == pytest.approx(expected["grad_norm_total"], rel=1e-3)
    assert all(key.startswith(UNUSED) for key in expected["without_gradient"])


@pytest.mark.parametrize("kind", ["unimatch", "fixmatch"])
def test_step_of_unimatch(kind, monkeypatch, tmp_path):
    expected = json.loads((GOLDEN / "unimatch_step.json").read_text())[kind]
    switches = FIXMATCH["unimatch"] if kind == "fixmatch" else {}
    m = method("unimatch", 21, small=False, threshold=expected["threshold"], **switches).train()
    load_weights(m.model, save(filled(V1), tmp_path / "v1.pth"))
    monkeypatch.setattr(consistency, "channel_mask", given_channel_masks(4))
    check_step("unimatch", kind, m, 65, 4)
    state = m.model.state_dict()
    for key, value in expected["batch_norm_after"].items():
        assert float(state[ours(key)].double().norm()) == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("kind", ["unimatch_v2", "fixmatch"])
def test_step_of_unimatch_v2(kind, monkeypatch, tmp_path):
    expected = json.loads((GOLDEN / "unimatch_v2_step.json").read_text())[kind]
    switches = FIXMATCH["unimatch_v2"] if kind == "fixmatch" else {}
    m = method("unimatch_v2", 21, small=False, threshold=expected["threshold"], **switches).train()
    for net in (m.model, m.teacher):
        load_weights(net, save(filled(V2), tmp_path / "v2.pth"))
    monkeypatch.setattr(consistency, "complementary_masks", given_pair_masks)
    check_step("unimatch_v2", kind, m, 70, 2)


def test_hard_pixels_are_the_releases():
    """Cityscapes: `focus: {name: hard_pixels, threshold: 0.7, min_kept: 200000}`."""
    expected = json.loads((GOLDEN / "unimatch_step.json").read_text())["ohem"]
    label = torch.from_numpy(np.random.RandomState(12).randint(0, 21, (2, 33, 33))).long()
    logits = 3 * torch.from_numpy(image(11, (2, 21, 33, 33)))
    label[:, :5] = -1
    label[:, 5:25] = logits.argmax(1)[:, 5:25]
    counts = Counts.from_statistics(context(21).statistics)
    for key, value in expected.items():
        if key == "recipe":
            continue
        _, threshold, _, kept = key.split()
        focus = {"name": "hard_pixels", "threshold": float(threshold), "min_kept": int(kept)}
        z = logits.clone().requires_grad_()
        loss = build_loss({"focus": focus}, LossContext(counts))(z, label)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(value["loss"], rel=1e-5), key
        assert float(z.grad.norm()) == pytest.approx(value["grad_norm"], rel=1e-4), key


# The parts


def test_loss_of_constant_logits_is_the_kept_share_of_log_k():
    shown = torch.ones(2, 6, 8, dtype=torch.bool)
    shown[:, 3:] = False
    confidence = torch.full((2, 6, 8), 0.5)
    confidence[:, :, :2] = 0.95
    labels = PseudoLabels(torch.ones(2, 6, 8).long(), confidence, shown)
    loss = confident_loss(torch.zeros(2, 7, 3, 4), labels, 0.95)  # ≥, not >
    torch.testing.assert_close(loss, torch.tensor(7.0).log() / 4)
    torch.testing.assert_close(labels.kept(0.95), torch.tensor(0.25))
    assert confident_loss(torch.zeros(2, 7, 3, 4), labels._replace(shown=shown & False), 0.0) == 0


def test_boxes_paste_image_label_confidence_and_padding():
    boxes = torch.tensor([[1, 2, 4, 9], [0, 0, 0, 0]])  # beyond the crop: clipped
    inside = in_boxes(boxes, (5, 6))
    expected = torch.zeros(2, 5, 6, dtype=torch.bool)
    expected[0, 1:4, 2:6] = True
    assert torch.equal(inside, expected)

    images, other = torch.zeros(2, 3, 5, 6), torch.ones(2, 3, 5, 6)
    assert torch.equal(paste(images, other, inside), expected[:, None].expand(-1, 3, -1, -1).float())
    mine = PseudoLabels(torch.zeros(2, 5, 6).long(), torch.zeros(2, 5, 6), torch.zeros(2, 5, 6, dtype=torch.bool))
    theirs = PseudoLabels(*(torch.ones_like(x) for x in mine))
    assert all(torch.equal(x.bool(), expected) for x in paste_labels(mine, theirs, inside))
    assert all(torch.equal(x, y) for x, y in zip(paste_labels(mine, theirs, inside & False), mine, strict=True))


def test_labels_are_made_at_the_size_of_the_crop():
    logits = torch.randn(2, 4, 3, 5)
    labels = pseudo_labels(logits, torch.ones(2, 9, 13, dtype=torch.bool))
    large = F.interpolate(logits, (9, 13), mode="bilinear", align_corners=True).softmax(1)
    assert torch.equal(labels.label, large.argmax(1)) and torch.equal(labels.confidence, large.amax(1))
    assert torch.equal(labels.flip().label[0], labels.label[1])


def test_channel_masks():
    mask = channel_mask(torch.zeros(4, 500, 2, 2))
    assert mask.shape == (4, 500, 1, 1) and set(mask.unique().tolist()) == {0.0, 2.0}
    assert mask.mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_complementary_masks(pairs):
    first, second = complementary_masks(pairs, 64, torch.zeros(1)).chunk(2)
    assert first.shape == (pairs, 64, 1, 1) and torch.equal(first + second, torch.full_like(first, 2))
    whole = (first == 1).flatten(1).all(1)
    assert int(whole.sum()) == pairs // 2 and set(first[~whole].unique().tolist()) == {0.0, 2.0}


# The methods


@pytest.mark.parametrize("name", ["unimatch", "unimatch_v2"])
@pytest.mark.parametrize("fixmatch", [False, True])
def test_terms_have_the_weights_of_the_paper(name, fixmatch):
    """With every term at 1 the total is 1."""
    m = method(name, threshold=0.0, **(FIXMATCH[name] if fixmatch else {}))
    terms = run(m, batches())
    unlabelled = terms["Ls"] if "Lfp" not in terms else (terms["Ls"] + terms["Lfp"]) / 2
    torch.testing.assert_close(terms["loss"], (terms["Lx"] + unlabelled) / 2)
    assert ("Lfp" in terms) == (name == "unimatch" and not fixmatch) and terms["kept"] == 1
    assert all(p.grad is not None for p in m.model.parameters())


@pytest.mark.parametrize("name", ["unimatch", "unimatch_v2"])
def test_supervised_training_is_the_labelled_term_alone(name):
    """On the same network with the same weights; the loss is torch's on enlarged logits."""
    both, alone = method(name).eval(), method(name, alone=True).eval()
    alone.model.load_state_dict(both.model.state_dict())
    streams = batches()
    (out,) = alone({"labeled": streams["labeled"]}, 0)
    torch.testing.assert_close(out["loss"], run(both, streams)["Lx"])

    image, label = streams["labeled"].values()
    logits = F.interpolate(alone.model(image)["logits"], label.shape[-2:], mode="bilinear", align_corners=True)
    torch.testing.assert_close(out["loss"], F.cross_entropy(logits, label.long(), ignore_index=-1))
    out["loss"].backward()
    assert all(p.grad is not None for p in alone.model.parameters())


def test_batch_norm_moves_twice_a_step():
    m = method().train()
    run(m, batches())
    counters = {int(value) for key, value in m.model.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counters == {2} and m.model.training


@pytest.mark.parametrize("name", ["unimatch", "unimatch_v2"])
def test_partner_of_the_batch_is_in_opposite_order(name):
    """Two equal crops: pasting changes nothing but the order; of one crop, nothing at all."""
    options = {"partner": "batch", "perturb": False} if name == "unimatch" else {"complementary": False}
    m = method(name, threshold=0.0, **options).eval()
    one = batches()
    one["unlabeled"] = {key: value[:1] for key, value in one["unlabeled"].items()}
    pasted = run(m, one)
    bare = {**one["unlabeled"], "box1": torch.zeros(1, 4, dtype=torch.int32), "box2": torch.zeros(1, 4)}
    torch.testing.assert_close(pasted["Ls"], run(m, {**one, "unlabeled": bare})["Ls"])


def test_teacher_is_the_moving_average():
    m = method("unimatch_v2")
    parameter, average = next(m.model.parameters()), next(m.teacher.parameters())
    with torch.no_grad():
        for step, weight in ((0, 0.0), (1, 1 / 2), (2, 2 / 3), (5000, 0.996)):
            before = average.clone()
            parameter.normal_()
            m.after_step(step)
            torch.testing.assert_close(average, weight * before + (1 - weight) * parameter)
    assert m.network is m.teacher and method("unimatch_v2", predicts="student").predict_prefix == "model."


def test_remedies_act_on_both_terms_and_count_pseudo_labels():
    remedies = {"logits": {"name": "logit_adjustment"}, "counts": {"refresh": 1}}
    plain = method("unimatch_v2", threshold=0.0, complementary=False)
    changed = method("unimatch_v2", threshold=0.0, complementary=False, remedies=remedies)
    changed.load_state_dict(plain.state_dict(), strict=False)
    changed.loss.offsets.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
    first, second = run(plain, batches()), run(changed, batches())
    assert first["Lx"] != second["Lx"] and first["Ls"] != second["Ls"]
    assert changed.loss.counts.running.sum() > 0


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="complementary: true needs views: 2"):
        method("unimatch_v2", views=1)
    network = ModelConfig("upernet", 5, "resnet18")
    with pytest.raises(ConfigError, match="set it to deeplabv3plus_unimatch or dpt"):
        build_method(Config(network, method={"name": "unimatch"}, name="test"), context(5))
    with pytest.raises(ConfigError, match="set it to deeplabv3plus, deeplabv3plus_unimatch"):
        build_method(Config(network, method={"name": "baseline"}, name="test"), context(5))
    two_heads = {**DEEPLAB, "auxiliary": True}
    second = ModelConfig("deeplabv3plus_unimatch", 5, "resnet18", options=two_heads, align_corners=True)
    for name in ("baseline", "unimatch"):
        with pytest.raises(ConfigError, match="model.options.auxiliary: the method trains no second head"):
            build_method(Config(second, method={"name": name}, name="test"), context(5))
    resnet = ModelConfig("deeplabv3plus_unimatch", 5, "resnet18", options=DEEPLAB, align_corners=True)
    with pytest.raises(ConfigError, match="maps of several widths"):
        build_method(Config(resnet, method={"name": "unimatch_v2"}, name="test"), context(5))
    streams = batches()
    del streams["unlabeled"]["partner_weak"]
    with pytest.raises(ConfigError, match=r"augment.partner: .* set it to true"):
        run(method(), streams)
