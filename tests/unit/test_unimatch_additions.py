"""What UniMatch can be given beyond its paper: USRN's branch and gate, a threshold for each class."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.config import ConfigError
from common.losses.upsampled import upsampled_cross_entropy
from semi_sup.branch import gated_labels
from semi_sup.consistency import ClassThresholds, PseudoLabels, pseudo_labels
from semi_sup.subclasses import offsets, parents
from tests.unit.test_unimatch_method import FIXMATCH, batches, method, run

COUNTS = (3, 1, 2, 1, 2)  # subclasses of five classes
NAMES = ("unimatch", "unimatch_v2")


def streams(size=42):
    found = batches(size)
    label = found["labeled"]["label"].long()
    found["labeled"]["sub_label"] = torch.where(label < 0, -1, offsets(COUNTS)[label.clamp(min=0)]).short()
    return found


def branched(name, **options):
    return method(name, branch=True, subclasses=COUNTS, **options)


def predict_always(net, index: int, score: float) -> None:
    """Let a network give one class this logit, and the others 0, wherever it looks."""
    last = net.predictor if hasattr(net, "predictor") else net.decode_head.conv_seg
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        last.bias[index] = score


# The gate


def by_definition(z, s, owner, threshold):
    """Label of one pixel by the paper's product, −1 where there is none."""
    p, q = z.double().softmax(0), s.double().softmax(0)
    h_p, h_q = (float(-(x * x.log()).sum()) / math.log(len(x)) for x in (p, q))
    if h_q <= h_p:
        p = p * (torch.arange(len(p)) == owner[int(q.argmax())])
    return int(p.argmax()) if float(p.max()) >= threshold else -1


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_gate_is_the_papers(threshold):
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 6, 7, generator=g)
    sub_logits = 4 * torch.randn(2, 9, 6, 7, generator=g)
    shown = torch.ones(2, 6, 7, dtype=torch.bool)
    owner = parents(COUNTS)
    classes, subclasses = gated_labels(logits, sub_logits, owner, shown)
    found = classes.confident(threshold)
    pixels = [(b, y, x) for b in range(2) for y in range(6) for x in range(7)]
    expected = [by_definition(logits[b, :, y, x], sub_logits[b, :, y, x], owner, threshold) for b, y, x in pixels]
    assert found.flatten().tolist() == expected
    plain = pseudo_labels(logits, shown)
    assert 0 < (found != plain.confident(threshold)).sum() < len(pixels)
    assert torch.equal(subclasses.label, sub_logits.argmax(1))

    free, _ = gated_labels(logits, sub_logits, owner, shown, gate=False)
    assert torch.equal(free.label, plain.label) and torch.equal(free.confidence, plain.confidence)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gate", [True, False])
def test_a_sure_branch_takes_labels_from_a_less_sure_network(name, gate):
    m = branched(name, gate=gate, threshold=0.9)
    nets = [m.model] if name == "unimatch" else [m.model, m.teacher]
    branches = [m.branch] if name == "unimatch" else [m.branch, m.teacher_branch]
    for net in nets:
        predict_always(net, 1, 5.0)
    for branch in branches:
        predict_always(branch.net, 8, 9.0)  # a subclass of class 4
    terms = run(m, streams())
    assert (float(terms["kept"]), float(terms["vetoed"])) == ((0.0, 1.0) if gate else (1.0, 0.0))
    assert (terms["Ls"] == 0) == gate and terms["Ls_sub"] > 0


# The branch


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_the_branch_join_with_their_weight(name):
    m = branched(name, threshold=0.0, subclass=0.5)
    terms = run(m, streams())
    strong = terms["Ls"] + 0.5 * terms["Ls_sub"]
    unlabelled = strong if name == "unimatch_v2" else (strong + terms["Lfp"]) / 2
    torch.testing.assert_close(terms["loss"], (terms["Lx"] + 0.5 * terms["Lx_sub"] + unlabelled) / 2)
    assert all(p.grad is not None for p in (*m.model.parameters(), *m.branch.parameters()))


def test_labelled_loss_of_the_branch_is_cross_entropy_of_subclasses():
    m, given = branched("unimatch_v2"), streams()
    maps = m.encode(given["labeled"]["image"])
    sub_label = given["labeled"]["sub_label"]
    terms = next(iter(m(given, 0)))
    expected = upsampled_cross_entropy(m.branch(maps), sub_label, align_corners=True)
    torch.testing.assert_close(terms["Lx_sub"], expected)
    large = F.interpolate(m.branch(maps), sub_label.shape[-2:], mode="bilinear", align_corners=True)
    torch.testing.assert_close(expected, F.cross_entropy(large, sub_label.long(), ignore_index=-1))


def test_teachers_branch_is_the_moving_average():
    m = branched("unimatch_v2")
    parameter, average = next(m.branch.parameters()), next(m.teacher_branch.parameters())
    before = average.clone()
    with torch.no_grad():
        parameter.normal_()
    m.after_step(1)
    torch.testing.assert_close(average, (before + parameter) / 2)


# Thresholds


def test_thresholds_follow_the_confidence_of_their_class():
    thresholds = ClassThresholds(3, 0.8, momentum=0.5)
    label = torch.tensor([[[0, 0, 1, 1]]])
    assert torch.equal(thresholds.of(label), torch.full((1, 1, 4), 0.8))
    confidence = torch.tensor([[[0.9, 0.7, 0.4, 0.1]]])
    shown = torch.tensor([[[True, True, True, False]]])
    thresholds.update(PseudoLabels(label, confidence, shown))
    torch.testing.assert_close(thresholds.confidence, torch.tensor([0.9, 0.7, 1.0]))
    # class 2 was never seen: its 1 is no confidence, so the highest is that of class 0; it has the whole threshold
    expected = 0.8 * torch.tensor([1.0, 0.7 / 0.9, 1.0])
    torch.testing.assert_close(thresholds.of(torch.arange(3)), expected)


def test_thresholds_move_once_a_step():
    """Micro-batches of unequal numbers of pixels as one batch, in two steps, the second after a resume."""
    random = torch.Generator().manual_seed(0)

    def labels(width):
        classes, shown = torch.randint(0, 3, (2, 4, width), generator=random), torch.ones(2, 4, width, dtype=torch.bool)
        return PseudoLabels(classes, torch.rand(2, 4, width, generator=random), shown)

    whole, parts = ClassThresholds(4, 0.8, 0.9), ClassThresholds(4, 0.8, 0.9)
    for widths in ((5,), (2, 7)):
        micro = [labels(width) for width in widths]
        for each in micro:
            parts.update(each)
        whole.update(PseudoLabels(*(torch.cat(both, 2) for both in zip(*micro, strict=True))))
        torch.testing.assert_close(parts.confidence, whole.confidence)
        for thresholds in (whole, parts):
            thresholds.after_step()
        resumed = ClassThresholds(4, 0.8, 0.9)
        resumed.load_state_dict(parts.state_dict())
        parts = resumed
    assert parts.confidence[3] == 1 and (parts.confidence[:3] < 1).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("momentum", [None, 0.0])
def test_a_threshold_for_each_class_keeps_what_one_for_all_does_not(name, momentum):
    """Every pixel is taken for class 1 with a probability of e / (e + 4) = 0.40; class 0 was sure of its pixels."""
    m = method(name, threshold=0.5, class_thresholds=momentum)
    if momentum is not None:
        m.thresholds.seen[0] = True
    for net in [m.model] if name == "unimatch" else [m.model, m.teacher]:
        predict_always(net, 1, 1.0)
    terms = run(m, batches())
    acts = momentum is not None
    assert float(terms["kept"]) == acts and (terms["Ls"] > 0) == acts
    assert ("thresholds.confidence" in m.state_dict()) == acts
    if acts:
        expected = math.e / (math.e + 4)
        torch.testing.assert_close(m.thresholds.confidence, torch.tensor([1.0, expected, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("name", NAMES)
def test_what_the_gate_changes_is_no_confidence_of_a_class(name):
    """The network takes all for class 1; the branch makes them class 4, whose probability is small: it was not seen."""
    m = branched(name, threshold=0.5, class_thresholds=0.0)
    nets = [m.model] if name == "unimatch" else [m.model, m.teacher]
    branches = [m.branch] if name == "unimatch" else [m.branch, m.teacher_branch]
    for net in nets:
        predict_always(net, 1, 5.0)
    for branch in branches:
        predict_always(branch.net, 8, 9.0)
    terms = run(m, streams())
    assert (float(terms["kept"]), float(terms["vetoed"])) == (0.0, 1.0)
    assert m.thresholds.seen.tolist() == [False, True, False, False, False]


# Counts


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_crops_are_those_of_whole_images(name):
    """Pseudo-labels of all that a crop shows count as many pixels as its image has, however large crop and padding."""
    m = method(name, threshold=0.0, remedies={"logits": {"name": "blv"}, "counts": {"refresh": 9}})
    given = batches()
    given["unlabeled"]["geometry"] = torch.tensor([[100, 200, 50, 100, 0, 0, 0], [30, 40, 60, 80, 0, 0, 1]])
    given["unlabeled"]["shown"][0, 30:] = False
    run(m, given)
    torch.testing.assert_close(m.loss.counts.running.sum(), torch.tensor(100 * 200 + 30 * 40.0).double())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gate", [False, True])
def test_counts_are_of_confident_labels_after_the_gate(name, gate):
    """Class by class, by the definition of both, of pixels that show an image."""
    m = branched(name, gate=gate, threshold=0.6, remedies={"logits": {"name": "blv"}, "counts": {"refresh": 9}})
    g = torch.Generator().manual_seed(3)
    logits, sub_logits = 3 * torch.randn(2, 5, 6, 7, generator=g), 4 * torch.randn(2, 9, 6, 7, generator=g)
    shown = torch.ones(2, 6, 7, dtype=torch.bool)
    shown[1, :, 5:] = False
    geometry = torch.tensor([[6, 7, 6, 7, 0, 0, 0], [6, 10, 6, 5, 0, 0, 0]])  # the second: two pixels for each one
    m.count(m.judged(logits, sub_logits, shown), logits, {"geometry": geometry})

    expected = torch.zeros(5, dtype=torch.float64)
    for b, y, x in shown.nonzero().tolist():
        z = logits[b, :, y, x]
        found = by_definition(z, sub_logits[b, :, y, x], parents(COUNTS), 0.6)
        if not gate:
            found = int(z.argmax()) if float(z.softmax(0).max()) >= 0.6 else -1
        if found >= 0:
            expected[found] += 1 + b
    assert expected.count_nonzero() > 2
    torch.testing.assert_close(m.loss.counts.running, expected)


@pytest.mark.parametrize("branch", [False, True])
def test_labels_of_v2_are_the_moving_averages(branch):
    """Not the student's, of the network and of the branch: by hand from what they hold."""
    options = {"threshold": 0.3, "complementary": False, "gate": branch}
    m = branched("unimatch_v2", **options) if branch else method("unimatch_v2", threshold=0.3, complementary=False)
    with torch.no_grad():
        for p in [*m.teacher.parameters(), *(m.teacher_branch.parameters() if branch else [])]:
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    found, _ = m.label(streams()["unlabeled"])

    given = streams()["unlabeled"]

    def by(net, head):
        with torch.no_grad():
            maps = net.eval().encode(given["weak"])
            logits = net.decode(maps)
            if head is None:
                return pseudo_labels(logits, given["shown"])
            return gated_labels(logits, head.eval()(maps), parents(COUNTS), given["shown"])[0]

    expected, student = by(m.teacher, m.teacher_branch), by(m.model, m.branch)
    assert torch.equal(found.classes.label, expected.label)
    torch.testing.assert_close(found.classes.confidence, expected.confidence)
    assert not torch.allclose(expected.confidence, student.confidence, atol=1e-3)


# Off


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fixmatch", [False, True])
def test_what_is_off_leaves_no_trace(name, fixmatch):
    m = method(name, **(FIXMATCH[name] if fixmatch else {}))
    assert not any(key.startswith(("branch", "thresholds", "teacher_branch")) for key in m.state_dict())
    terms = run(m, batches())
    assert set(terms) == {"loss", "Lx", "Ls", "kept"} | ({"Lfp"} if name == "unimatch" and not fixmatch else set())


def test_a_gate_that_changes_labels_is_said():
    """USRN's takes them away: above a half no other class reaches the threshold."""
    with pytest.warns(UserWarning, match="method.gate: with method.threshold: 0.3 a class that is not the likeliest"):
        branched("unimatch", threshold=0.3)


IGNORED = [
    ({"gate": False}, "test: method: gate: ignored where branch is false"),
    ({"subclass": 0.5, "subclasses": COUNTS}, "test: method: subclass, subclasses: ignored where branch is false"),
    (
        {"class_thresholds": 0.9, "threshold": 0.0},
        "method.class_thresholds: parts of method.threshold, which is 0: it changes nothing",
    ),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options, message", IGNORED)
def test_options_without_effect_are_said(name, options, message):
    with pytest.warns(UserWarning, match=message) as said:
        method(name, **options)
    assert len(said) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("error")
def test_options_with_an_effect_are_not_said(name):
    made = branched(name, gate=False, subclass=0.5, class_thresholds=0.9)
    assert made.branch is not None and made.thresholds is not None
    assert method(name, threshold=0.0).branch is None


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="method.subclasses: .*rule.* is no preset"):
        method("unimatch", branch=True)
