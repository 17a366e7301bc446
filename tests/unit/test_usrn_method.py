"""USRN's methods: the reference training step, what each switch does, and what is kept between steps."""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from common.config import Config, ConfigError, ModelConfig, TrainConfig
from common.data.geometry import MEAN_COLOUR
from common.data.images import Picture
from common.data.recipes.usrn import USRNViews as Views
from common.engine import prepare
from common.losses.blv import variation_weights
from common.losses.build import LossContext, build_loss
from common.losses.counts import Counts
from common.losses.cross_entropy import pixel_cross_entropy
from common.losses.upsampled import upsampled_cross_entropy
from common.ops.resize import resize
from semi_sup.config import build_method
from semi_sup.losses import gated_labels
from semi_sup.subclasses import PRESETS, chosen_counts, offsets, parents
from semi_sup.view_cells import inside
from tests.contexts import context
from tests.golden.fill import fill, image
from tests.golden.rounding import SAME_KERNELS, in_float64, precise

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
SMALL = {"blocks": (1, 1, 1, 1), "width": 4, "channels": 8, "low_channels": 4, "dropout": (0.0, 0.0, 0.0)}
COUNTS = (4, 1, 2, 3, 1)  # subclasses of five classes


def method(name="usrn", pixels=(50, 9, 1, 20, 3), blocks=SMALL, classes=5, subclasses=COUNTS, remedies=(), **options):
    """A method on a small network without dropout."""
    model = {"blocks": blocks["blocks"], **blocks} if blocks else {"dropout": (0.0, 0.0, 0.0)}
    branch = name == "usrn" and options.get("branch", True)
    if branch:
        options["subclasses"] = subclasses
        model["subclasses"] = sum(chosen_counts(subclasses, classes, "test"))
    network = ModelConfig("usrn" if branch else "deeplabv3plus", classes, "resnet50", options=model, align_corners=True)
    sections = {"method": {"name": name, **options}, "remedies": dict(remedies)}
    cfg = Config(network, **sections, train=TrainConfig(steps=10), name="test")
    return build_method(cfg, context(pixels))


def batches(size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    geometry = torch.tensor([[size, size, size, size, 0, 0, 0]] * 2, dtype=torch.int32)

    def pixels():
        return torch.randint(0, 256, (2, 3, size, size), generator=g, dtype=torch.uint8)

    label = torch.randint(-1, 5, (2, size, size), generator=g)
    sub = torch.where(label < 0, -1, offsets(COUNTS)[label.clamp(min=0)])
    labeled = {"image": pixels(), "label": label.short(), "sub_label": sub.short()}
    return {"labeled": labeled, "unlabeled": {"weak": pixels(), "strong": pixels(), "geometry": geometry}}


def run(m, streams, step=0):
    """All parts of a step, back-propagated as the engine does; the terms together."""
    terms, parts = {}, 0
    for out in m(streams, step):
        out["loss"].backward()
        terms |= {key: value.detach() for key, value in out.items() if key != "loss"}
        terms["loss"] = terms.get("loss", 0) + out["loss"].detach()
        parts += 1
    assert parts == m.backwards
    return terms


def gradients(m):
    return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])


@pytest.fixture
def two_threads():
    """The batch norm of the image's mean sees two values, and what it passes back is rounding to some 3e-3: the order
    of additions has to be the reference run's."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threshold, draw, halves", [("0.75", 0, 1), ("0.05", 9, 3)])
def test_reference_step(threshold, draw, halves, two_threads):
    """Losses and gradient norms of one whole step of the official network, on the reference's inputs.

    Where rounding differs (see `rounding`), one of the first six draws meets 0.75. At 0.05 two classes of a cell are
    tied to 1e-4 of a logit, and the loss on subclasses is that of one cell: one of the first ten draws meets it.
    """
    reference = json.loads((GOLDEN / f"usrn_train_thr{threshold}.json").read_text())
    assert tuple(reference["split_list"]) == PRESETS["voc_1over32"]
    m = method(blocks=None, classes=21, subclasses="voc_1over32", threshold=float(threshold)).train()
    state = m.model.state_dict()
    m.model.load_state_dict({key: torch.as_tensor(fill(key, tuple(t.shape))) for key, t in state.items()})
    m.model.normalise = lambda x, extent=None: x  # the reference's inputs are normalised,
    m.model.divisor = 1  # and it trains without padding
    random, views = np.random.RandomState(7), torch.from_numpy(image(2, (2, 2, 3, 97, 97)))
    label, sub = (torch.from_numpy(random.randint(0, n, (2, 97, 97))) for n in (21, sum(PRESETS["voc_1over32"])))
    label[:, :5] = sub[:, :5] = -1
    labeled = {"image": torch.from_numpy(image(1, (2, 3, 97, 97))), "label": label.short(), "sub_label": sub.short()}
    geometry = torch.tensor([[97, 97, 97, 97, 0, 0, 0]] * 2)
    streams = {"labeled": labeled, "unlabeled": {"weak": views[:, 0], "strong": views[:, 1], "geometry": geometry}}
    if not SAME_KERNELS:
        terms = run(deepcopy(m), streams)  # in float32, all losses but those of the cells above
        losses = {key: value for key, value in reference["losses"].items() if draw == 0 or not key.startswith("Lu")}
        assert {key: float(terms[key]) for key in losses} == pytest.approx(losses, rel=1e-5)
        m.model, streams = precise(m.model, draw, halves), in_float64(streams)
    terms = run(m, streams)
    assert {key: float(terms[key]) for key in reference["losses"]} == pytest.approx(reference["losses"], rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(reference["total"], rel=1e-5)
    named = dict(m.model.named_parameters())
    norms = {key: float(named[key].grad.norm()) for key in reference["grad_norm"]}
    assert norms == pytest.approx(reference["grad_norm"], rel=1e-3)


def counted(net):
    return int(net.encoder.backbone.bn1.num_batches_tracked)


@pytest.mark.parametrize("passes, times", [(3, 3), (2, 2), (1, 1)])
def test_joint_passes_differ_in_batch_norm_alone(passes, times):
    """With fixed statistics the step is the same however it is batched; without, they move once a pass."""
    separate, joint, streams = method(threshold=0.2), method(threshold=0.2, passes=passes), batches()
    joint.load_state_dict(separate.state_dict())
    expected, found = run(separate.eval(), streams), run(joint.eval(), streams)
    assert expected["Lu_reg"] > 0 and expected["Lu_sub"] > 0
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    torch.testing.assert_close(gradients(joint), gradients(separate), rtol=1e-4, atol=1e-6)
    run(joint.train(), streams)
    assert counted(joint.model) == times


def test_order_of_the_passes():
    """Running statistics as three separate training passes leave them: labelled, strong, weak."""
    m, streams = method(), batches()
    by_hand = method()
    by_hand.load_state_dict(m.state_dict())
    run(m.train(), streams)
    net = by_hand.model.train()
    for images in (streams["labeled"]["image"], streams["unlabeled"]["strong"], streams["unlabeled"]["weak"]):
        net(images)
    assert all(torch.equal(a, b) for a, b in zip(m.model.buffers(), net.buffers(), strict=True))


@pytest.mark.parametrize("passes, graphs", [(3, 3), (1, 1)])
def test_every_training_pass_is_the_networks_call(passes, graphs):
    """So it can be compiled, into one graph for each kind of pass, and in the first step alone; losses are the same."""
    plain, compiled = method(threshold=0.2, passes=passes), method(threshold=0.2, passes=passes)
    compiled.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled.model.compile(backend=counter, dynamic=False)
    for step in range(2):
        expected, found = (run(m.train(), batches(seed=step), step) for m in (plain, compiled))
        assert expected["Lu_reg"] > 0 and counter.frame_count == graphs
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)
    torch.testing.assert_close(gradients(compiled), gradients(plain))


def test_pooled_images_beside_others():
    """Against the network's parts."""
    net, images = method().model.eval(), batches()["labeled"]["image"].repeat(2, 1, 1, 1)
    features, sub_features = net.encode(net.normalise(images))
    out = net(images, subclasses=True, pooled=3)
    torch.testing.assert_close(out["logits"], net.classifier(features[:1]))
    torch.testing.assert_close(out["sub_logits"], net.classifier_SubCls(sub_features[:1]))
    torch.testing.assert_close(out["pooled_logits"], net.classifier(F.avg_pool2d(features[1:], 2)))
    torch.testing.assert_close(out["pooled_sub_logits"], net.classifier_SubCls(F.avg_pool2d(sub_features[1:], 2)))
    assert not {"logits", "sub_logits"} & net(images, subclasses=True, pooled=4).keys()


@pytest.mark.parametrize("predicts", ["student", "teacher"])
def test_what_a_step_calls_is_compiled(predicts, monkeypatch):
    """Student and teacher, whichever of them predicts."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    m = method("self_training", predicts=predicts)
    cfg = Config(ModelConfig("deeplabv3plus", 5), train=TrainConfig(compile=True))
    prepare(cfg, lambda cfg, context: m, context(), torch.device("cpu"))
    assert compiled == [m.model, m.teacher]


def test_total_is_the_weighted_sum():
    streams = batches()
    m = method(threshold=0.2, supervised=2.0, subclass=3.0, unsupervised=5.0).eval()
    t = run(m, streams)
    expected = 2 * (t["Ls"] + 3 * t["Ls_sub"]) + 5 * (t["Lu_reg"] + 3 * t["Lu_sub"])
    torch.testing.assert_close(t["loss"], expected)
    out = m.model(streams["labeled"]["image"])
    large = F.interpolate(out["logits"], (32, 32), mode="bilinear", align_corners=True)
    torch.testing.assert_close(t["Ls"], pixel_cross_entropy(large, streams["labeled"]["label"]))


def test_switches():
    streams = batches()
    full, free, plain = (method(threshold=0.2, **o) for o in ({}, {"gate": False}, {"branch": False}))
    free.load_state_dict(full.state_dict())
    terms = [run(m.eval(), streams) for m in (full, free, plain)]
    assert terms[0]["kept"] + terms[0]["vetoed"] == pytest.approx(float(terms[1]["kept"]))
    assert terms[1]["vetoed"] == 0 and set(terms[2]) == {"Ls", "Lu", "kept", "loss"}
    own = method("self_training", threshold=0.2, teacher="none").eval()
    own.load_state_dict(plain.state_dict())
    assert float(run(own, streams)["loss"]) == float(terms[2]["loss"])
    assert set(run(method("baseline").eval(), streams)) == {"Ls", "loss"}


def test_unlabelled_images_need_no_label_and_borders_do_not_count():
    streams = batches()
    geometry = streams["unlabeled"]["geometry"]
    geometry[0] = torch.tensor([16, 32, 16, 32, 0, 0, 0])  # the lower half is padding
    masked, all_count = method(threshold=0.2), method(threshold=0.2, mask_borders=False)
    all_count.load_state_dict(masked.state_dict())
    a, b = run(masked.eval(), streams), run(all_count.eval(), streams)
    assert a["Ls"] == b["Ls"] and a["Lu_reg"] != b["Lu_reg"]
    streams["unlabeled"]["geometry"] = geometry.clone()
    geometry[0] = torch.tensor([32, 32, 32, 32, 0, 0, 0])
    streams["unlabeled"]["geometry"] = geometry
    torch.testing.assert_close(run(masked, streams)["Lu_reg"], b["Lu_reg"])


@pytest.mark.parametrize("seed", range(6))
def test_inside_is_where_the_image_is(seed):
    """Against the padding colour of a real augmented crop, looked up at the centres of 8 × 8 cells."""
    rng = np.random.default_rng(seed)
    picture = Picture.of(np.zeros((40, 64, 3), np.uint8))
    out = Views(crop=(64, 64), base=64, views=True)({"image": picture, "name": "a", "index": 0}, rng, None, 0)
    shown = (out["weak"] != torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None, None]).any(0)
    found = inside(out["geometry"][None], (64, 64), (8, 8))[0]
    assert torch.equal(found, shown[4::8, 4::8])


# The moving-average teacher and BLV ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["usrn", "self_training"])
def test_teacher_is_the_moving_average(name):
    m, streams = method(name, teacher="ema", momentum=0.75), batches()
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01)
    expected = m.model.classifier[1].weight.detach().clone()
    nets = (m.model, m.teacher)
    norm, teachers_norm = (next(n for n in net.modules() if isinstance(n, torch.nn.BatchNorm2d)) for net in nets)
    statistics = norm.running_var.clone()
    for step in range(6):
        run(m.train(), streams, step)
        optimizer.step()
        m.after_step(step)
        momentum = min(step / (step + 1), 0.75)
        expected = momentum * expected + (1 - momentum) * m.model.classifier[1].weight.detach()
        statistics = momentum * statistics + (1 - momentum) * norm.running_var
    torch.testing.assert_close(m.teacher.classifier[1].weight, expected)
    torch.testing.assert_close(teachers_norm.running_var, statistics)
    assert not torch.equal(teachers_norm.running_var, norm.running_var)
    assert not m.teacher.training and counted(m.model) == counted(m.teacher) == 12  # the weak view is the teacher's
    assert all(not p.requires_grad for p in m.teacher.parameters())


def test_teacher_can_predict():
    m = method("self_training", predicts="teacher")
    assert m.predict_prefix == "teacher." and m.network is m.teacher
    with pytest.raises(ConfigError, match="predicts: teacher needs teacher: ema"):
        method("self_training", predicts="teacher", teacher="none")
    with pytest.raises(ConfigError, match="passes: 1 runs no teacher"):
        method(teacher="ema", passes=1)


def test_blv_perturbs_the_students_class_logits():
    """Constant noise of weight w_k: both class terms equal cross-entropy of logits + w, subclass terms do not move."""
    counts, streams = torch.tensor([50, 9, 1, 20, 3]), batches()
    plain = method(threshold=0.2)
    remedies = {"logits": {"name": "blv", "noise": "constant"}, "counts": {"refresh": 2}}
    noisy = method(pixels=counts, threshold=0.2, remedies=remedies)
    noisy.model.load_state_dict(plain.model.state_dict())
    a, b = run(plain.eval(), streams), run(noisy.eval(), streams)
    assert a["Ls_sub"] == b["Ls_sub"] and a["Lu_sub"] == b["Lu_sub"] and a["kept"] == b["kept"]
    w = variation_weights(counts).view(1, -1, 1, 1)
    net, labeled, unlabeled = plain.model, streams["labeled"], streams["unlabeled"]
    torch.testing.assert_close(b["Ls"], pixel_cross_entropy(resize(net(labeled["image"])["logits"], (32, 32), True) + w,
                                                            labeled["label"]))  # fmt: skip
    maps = [F.avg_pool2d(x, 2) for view in ("strong", "weak") for x in net.encode(net.normalise(unlabeled[view]))]
    label = gated_labels(net.classifier(maps[2]), net.classifier_SubCls(maps[3]), parents(COUNTS), 0.2)
    loss = pixel_cross_entropy(net.classifier(maps[0]) + w, label, average="all")
    torch.testing.assert_close(b["Lu_reg"], loss)


def test_blv_counts_are_refreshed_and_kept():
    counts, streams = torch.tensor([50, 9, 1, 20, 3]), batches()
    remedies = {"logits": {"name": "blv"}, "counts": {"refresh": 2}}
    make = {"pixels": counts, "threshold": 0.2, "remedies": remedies}
    m = method(**make).eval()
    weight = m.loss.offsets
    before = weight.clone()
    shares = [float(run(m, streams, step)["kept"]) for step in range(2) if m.after_step(step - 1) is None]
    pseudo = m.loss.counts.running.clone()
    assert float(pseudo.sum()) == pytest.approx(sum(shares) * 2 * 32 * 32)  # in pixels, as the labels
    assert torch.equal(weight, before)
    m.after_step(1)
    torch.testing.assert_close(weight, variation_weights(counts + pseudo))
    again = method(**make)
    again.load_state_dict(m.state_dict())
    assert torch.equal(again.loss.offsets, weight) and not torch.equal(weight, before)


def test_blvs_average_is_that_of_the_labelled_term():
    """Unlabelled terms are means over all pixels whatever it says."""
    streams, terms = batches(), []
    for average in ("valid", "all"):
        remedies = {"logits": {"name": "blv", "noise": "constant", "average": average}}
        torch.manual_seed(0)
        terms.append(run(method(threshold=0.2, remedies=remedies).eval(), streams))
    share = (streams["labeled"]["label"] != -1).float().mean()
    torch.testing.assert_close(terms[1]["Ls"], share * terms[0]["Ls"])
    assert terms[1]["Lu_reg"] == terms[0]["Lu_reg"] > 0


# Settings that cannot work ------------------------------------------------------------------------------------------


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="model.options.subclasses: 11 for 12 subclasses"):
        network = ModelConfig("usrn", 5, "resnet50", options={**SMALL, "subclasses": 11}, align_corners=True)
        build_method(Config(network, method={"name": "usrn", "subclasses": (5, 1, 2, 3, 1)}, name="test"), context())
    with pytest.raises(ConfigError, match="does not fit the method; set it to deeplabv3plus"):
        build_method(Config(network, method={"name": "self_training"}, name="test"), context())
    with pytest.raises(ConfigError, match="unknown 'usnr'; did you mean 'usrn'"):
        build_method(Config(network, method={"name": "usnr"}, name="test"), context())
    with pytest.raises(ConfigError, match="counts.refresh: 3, but this method makes no pseudo-labels"):
        method("baseline", remedies={"counts": {"refresh": 3}})
    streams = batches()
    streams["unlabeled"]["strong"] = streams["unlabeled"]["strong"][..., :16]
    with pytest.raises(ValueError, match="crops of one size"):
        run(method(passes=2), streams)


@pytest.mark.parametrize(
    "choice, words",
    [
        ("voc_1over23", "did you mean 'voc_1over"),
        ((1, 2), "2 numbers of subclasses for 5"),
        ((251, 1, 1, 1, 1), "255 subclasses in all"),
        ((0, 1, 1, 1, 1), "class 0 has 0"),
    ],
)
def test_numbers_of_subclasses_that_cannot_work(choice, words):
    with pytest.raises(ConfigError, match=words):
        chosen_counts(choice, 5, "method: subclasses")


# Cross-entropy at full size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_upsampled_cross_entropy(corners, ignored):
    """Value and gradient against resizing the whole batch."""
    label = torch.randint(0, 7, (3, 21, 30))
    label[torch.rand(3, 21, 30) < ignored] = -1
    ours = torch.randn(3, 7, 5, 8, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    expected = pixel_cross_entropy(resize(theirs, (21, 30), corners), label)
    found = upsampled_cross_entropy(ours, label.short(), align_corners=corners)
    torch.testing.assert_close(found, expected)
    (3 * found).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        torch.testing.assert_close(upsampled_cross_entropy(ours, label, align_corners=corners), expected)


def test_upsampled_cross_entropy_in_bfloat16_and_with_noise():
    label, z = torch.randint(-1, 7, (2, 16, 16)), torch.randn(2, 7, 4, 4)
    half = z.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = upsampled_cross_entropy(half, label, align_corners=True)
    found.backward()
    expected = pixel_cross_entropy(resize(z.bfloat16().float(), (16, 16), True), label)
    torch.testing.assert_close(found, expected)
    assert half.grad.dtype == torch.bfloat16
    counts = Counts.from_pixels(torch.arange(1, 8))
    blv = build_loss({"logits": {"name": "blv", "noise": "constant"}}, LossContext(counts))
    found = blv.upsampled(z, label, align_corners=True)
    torch.testing.assert_close(found, blv(resize(z, (16, 16), True), label))
