"""USRN's unlabelled losses and its numbers of subclasses, against loops and closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.models.deeplabv3plus_usrn import pool
from semi_sup.losses import (
    confident_labels,
    entropy,
    gated_labels,
    gated_labels_by_product,
    pseudo_label_loss,
    right_and_wrong,
    unlabelled_losses,
)
from semi_sup.subclasses import LIMIT, PRESETS, check_counts, offsets, parents, subclass_counts

COUNTS = (4, 1, 2, 3)
PARENTS = parents(COUNTS)
C, K = len(COUNTS), sum(COUNTS)


def views(scale=3.0, size=(2, 9, 11), classes=C, subclasses=K):
    batch, *area = size
    return scale * torch.randn(batch, classes, *area), scale * torch.randn(batch, subclasses, *area)


def normalised_entropy(p: np.ndarray) -> float:
    return -sum(float(x) * math.log2(float(x) + 1e-30) for x in p) / math.log2(len(p))


def softmax(z) -> np.ndarray:
    return torch.as_tensor(z).double().softmax(0).numpy()


def gate_by_loop(z: torch.Tensor, sub: torch.Tensor, parent, threshold: float) -> torch.Tensor:
    """The definition, pixel by pixel in double precision."""
    labels = torch.full((z.shape[0], *z.shape[2:]), -1)
    for b, i, j in np.ndindex(*labels.shape):
        p, q = softmax(z[b, :, i, j]), softmax(sub[b, :, i, j])
        if not normalised_entropy(q) > normalised_entropy(p):
            p = p * (np.arange(len(p)) == int(parent[q.argmax()]))
        if p.max() > threshold:
            labels[b, i, j] = int(p.argmax())
    return labels


@pytest.mark.parametrize("classes", [1, 2, 5, 177])
def test_entropy(classes):
    z = 4 * torch.randn(2, classes, 3)
    expected = [[normalised_entropy(softmax(z[b, :, i])) if classes > 1 else 0.0 for i in range(3)] for b in range(2)]
    torch.testing.assert_close(entropy(z), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert torch.equal(entropy(torch.zeros(1, 2, 1)), torch.ones(1, 1))


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("gate", [gated_labels, gated_labels_by_product])
def test_gate_is_the_definition(threshold, gate):
    for scale in (0.7, 3.0):
        z, sub = views(scale)
        expected = gate_by_loop(z, sub, PARENTS, threshold)
        assert torch.equal(gate(z, sub, PARENTS, threshold), expected) and len(expected.unique()) > 1


@pytest.mark.parametrize("counts", [(1, 1), (3, 1, 1), COUNTS, PRESETS["voc_1over32"], PRESETS["city_1over8"]])
def test_veto_and_product_agree_above_one_half(counts):
    for threshold in (0.5, 0.6, 0.75, 0.95):
        for scale in (0.5, 2.0, 6.0):
            z, sub = views(scale, (2, 40, 40), len(counts), sum(counts))
            ours = gated_labels(z, sub, parents(counts), threshold)
            assert torch.equal(ours, gated_labels_by_product(z, sub, parents(counts), threshold))


def test_below_one_half_another_class_can_win():
    """The subclass branch is certain of a class that is second in p, and above the threshold there."""
    z = torch.tensor([0.5, 0.4, 0.1]).log().view(1, 3, 1)
    sub = torch.tensor([0.01, 0.97, 0.02]).log().view(1, 3, 1)
    assert gated_labels(z, sub, torch.arange(3), 0.3).item() == 1
    assert gated_labels(z, sub, torch.arange(3), 0.45).item() == -1


def test_equal_entropies_restrict():
    z = torch.tensor([4.0, 0.0, 0.0]).view(1, 3, 1)
    assert gated_labels(z, z, torch.tensor([0, 1, 2]), 0.75).item() == 0
    assert gated_labels(z, z, torch.tensor([1, 0, 2]), 0.75).item() == -1
    assert gated_labels(z, 0.99 * z, torch.tensor([1, 0, 2]), 0.75).item() == 0  # the less certain has no say


@pytest.mark.parametrize("threshold", [0.0, 0.75])
def test_class_of_no_probability_is_no_label(threshold):
    z = torch.tensor([100.0, -100.0]).view(1, 2, 1)
    sub = torch.tensor([-1000.0, 1000.0]).view(1, 2, 1)
    assert gated_labels(z, sub, torch.arange(2), threshold).item() == -1


def loss_by_loop(z, labels, valid):
    total = sum(
        -math.log(softmax(z[b, :, i, j])[int(labels[b, i, j])])
        for b, i, j in np.ndindex(*labels.shape)
        if labels[b, i, j] >= 0 and valid[b, i, j]
    )
    return total / int(valid.sum())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("threshold", [0.05, 0.75])
def test_losses_are_means_over_all_pixels(masked, threshold):
    (strong, strong_sub), (weak, weak_sub) = views(2.0), views()
    valid = torch.ones(2, 9, 11, dtype=torch.bool)
    valid[0, 5:] = valid[:, :, 8:] = not masked
    found = unlabelled_losses(strong, strong_sub, weak, weak_sub, PARENTS, threshold, valid=valid if masked else None)
    labels, sub_labels = gate_by_loop(weak, weak_sub, PARENTS, threshold), confident_labels(weak_sub, threshold)
    assert float(found.classes) == pytest.approx(loss_by_loop(strong, labels, valid), rel=1e-5)
    assert float(found.subclasses) == pytest.approx(loss_by_loop(strong_sub, sub_labels, valid), rel=1e-5)
    assert float(found.kept) == pytest.approx(float(((labels >= 0) & valid).sum() / valid.sum()))


def test_without_gate_and_what_it_takes():
    (strong, strong_sub), (weak, weak_sub) = views(), views()
    gated = unlabelled_losses(strong, strong_sub, weak, weak_sub, PARENTS)
    free = unlabelled_losses(strong, strong_sub, weak, weak_sub, PARENTS, gate=False)
    confidence, label = weak.softmax(1).max(1)
    each = F.cross_entropy(strong, label, reduction="none") * (confidence > 0.75)
    torch.testing.assert_close(free.classes, each.mean())
    torch.testing.assert_close(free.kept, (confidence > 0.75).float().mean())
    torch.testing.assert_close(gated.kept + gated.vetoed, free.kept)
    assert gated.vetoed > 0 and free.vetoed == 0 and free.subclasses == gated.subclasses


def test_what_is_vetoed_had_a_surer_branch():
    """Pixel by pixel in double precision, whether or not the gate is shut."""
    (strong, strong_sub), (weak, weak_sub) = views(), views()
    surer, taken = torch.zeros(2, 9, 11, dtype=torch.bool), torch.full((2, 9, 11), -1)
    for b, i, j in np.ndindex(*surer.shape):
        p, q = softmax(weak[b, :, i, j]), softmax(weak_sub[b, :, i, j])
        surer[b, i, j] = bool(p.max() > 0.75 and normalised_entropy(q) <= normalised_entropy(p))
        if surer[b, i, j] and int(PARENTS[q.argmax()]) != p.argmax():
            taken[b, i, j] = int(p.argmax())

    gated, free = (unlabelled_losses(strong, strong_sub, weak, weak_sub, PARENTS, gate=g) for g in (True, False))
    assert torch.equal(gated.taken, taken) and (free.taken == -1).all()
    for found in (gated, free):
        torch.testing.assert_close(found.surer, surer.float().mean())
    torch.testing.assert_close(gated.vetoed, (taken >= 0).float().mean())
    assert gated.surer > gated.vetoed > 0


def test_right_and_wrong():
    label, truth = torch.tensor([[-1, 0, 1, 2, 2, 3]]), torch.tensor([[0, 0, 2, 2, -1, -1]])
    right, wrong = right_and_wrong(label, truth, 8)
    assert (float(right), float(wrong)) == (2 / 8, 1 / 8)


def test_only_the_strong_view_learns():
    tensors = [x.requires_grad_() for x in (*views(), *views())]
    found = unlabelled_losses(*tensors, PARENTS, 0.5)
    (found.classes + found.subclasses).backward()
    assert all(x.grad.abs().sum() > 0 for x in tensors[:2]) and all(x.grad is None for x in tensors[2:])


@pytest.mark.parametrize("valid", [None, torch.zeros(2, 9, 11, dtype=torch.bool)])
def test_nothing_certain_gives_zero(valid):
    z, sub = (x.requires_grad_() for x in views(0.1))
    found = unlabelled_losses(z, sub, z, sub, PARENTS, valid=valid)
    (found.classes + found.subclasses).backward()
    assert found.classes == 0 and not z.grad.any() and not sub.grad.any()
    none = torch.full((2, 9, 11), -1)
    assert pseudo_label_loss(z, none, none.numel()) == 0


def test_pool():
    x = torch.arange(2 * 3 * 5 * 7.0).view(2, 3, 5, 7)
    expected = (x[..., :4:2, :6:2] + x[..., 1:4:2, :6:2] + x[..., :4:2, 1:6:2] + x[..., 1:4:2, 1:6:2]) / 4
    torch.testing.assert_close(pool(x), expected)


@pytest.mark.parametrize(
    ("name", "classes", "total"),
    [
        ("voc_1over64", 21, 201),
        ("voc_1over32", 21, 177),
        ("voc_1over16", 21, 190),
        ("city_1over32", 19, 111),
        ("city_1over16", 19, 130),
        ("city_1over8", 19, 124),
    ],
)
def test_presets_number_each_subclass_once(name, classes, total):
    counts = check_counts(PRESETS[name], classes)
    expected = [c for c, count in enumerate(counts) for _ in range(count)]
    assert parents(counts).tolist() == expected and len(expected) == total
    assert offsets(counts).tolist() == [expected.index(c) for c in range(classes)]


def test_rule():
    assert subclass_counts([900, 100, 50, 0, 101]) == (9, 1, 1, 1, 2)  # the unit is the median of 50, 100, 101, 900
    assert subclass_counts([300, 100, 0]) == (2, 1, 1)  # … the mean of the middle two: 200
    assert subclass_counts([7]) == (1,)


@pytest.mark.parametrize("limit", [12, 40, LIMIT])
def test_limit_takes_the_smallest_unit_that_fits(limit):
    pixels = (10 ** np.random.default_rng(0).uniform(2, 6, 10)).astype(int)
    counts = subclass_counts(pixels, limit)
    total = sum(counts)
    fine = np.geomspace(np.median(pixels), pixels.max(), 200_000)
    totals = np.maximum(np.ceil(pixels[:, None] / fine), 1).sum(0)
    assert total == totals[totals <= limit].max() and total <= limit


def test_numbers_that_cannot_work():
    for counts, message in [((1, 2), "2 numbers of subclasses for 3"), ((1, 0, 2), "class 1 has 0 subclasses")]:
        with pytest.raises(ValueError, match=message):
            check_counts(counts, 3)
    with pytest.raises(ValueError, match="255 subclasses in all; 8-bit labels allow 254"):
        check_counts((200, 54, 1), 3)
    with pytest.raises(ValueError, match="no labelled pixel"):
        subclass_counts([0, 0])
    with pytest.raises(ValueError, match="300 classes"):
        subclass_counts(np.ones(300))
