"""Operations, losses and sampling of self-labelling against published numbers, literal forms and brute force."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.data import IGNORE
from common.losses.contrast import assignment_cross_entropy, pixel_contrast
from common.losses.distillation import consistency, distillation
from common.losses.symmetric_cross_entropy import symmetric_cross_entropy
from common.ops.sinkhorn import sinkhorn
from uda.base import to_grid
from uda.discriminator import SOURCE, TARGET, Discriminator, adversarial_loss
from uda.mixing import Box, draw_box, paste, paste_labels
from uda.pseudo_labels import MEMORY, best_class, class_sums, enough
from uda.sampling import class_balanced

CLASSES = 5
REFERENCE = Path(__file__).parents[1] / "golden" / "data" / "cpsl_ops.npz"
SCORES = torch.tensor([[0.9, 0.2, 0.1], [0.8, 0.3, 0.2], [0.1, 0.7, 0.3], [0.2, 0.1, 0.6], [0.7, 0.6, 0.0]])
SHARES = torch.tensor([0.5, 0.3, 0.2])

# Sinkhorn ----------------------------------------------------------------------------------------------------------


def literal_sinkhorn(scores: Tensor, share: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Linear domain, float64, one row and one column at a time."""
    q = (scores.double() / epsilon).exp()
    q /= q.sum()
    for _ in range(iterations):
        for k in range(q.shape[1]):
            q[:, k] *= share[k].double() / q[:, k].sum()
        for n in range(q.shape[0]):
            q[n] /= q[n].sum() * q.shape[0]
    return q * q.shape[0]


def test_published_assignments():
    expected = [
        [0.999969, 0.000015, 0.000016], [0.998294, 0.000825, 0.000881], [0.000000, 0.997358, 0.002642],
        [0.000002, 0.000006, 0.999992], [0.288817, 0.711149, 0.000035],
    ]  # fmt: skip
    q = sinkhorn(SCORES, SHARES)
    assert torch.allclose(q, torch.tensor(expected), atol=2e-6)
    assert torch.allclose(q.mean(0), torch.tensor([0.457416, 0.341870, 0.200713]), atol=2e-6)
    assert float(assignment_cross_entropy(SCORES, q)) == pytest.approx(0.237037, abs=2e-6)
    uniform = sinkhorn(SCORES)[-1]
    assert torch.allclose(uniform, torch.tensor([0.096703, 0.903134, 0.000163]), atol=2e-6)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_equals_brute_force(iterations):
    scores, share = torch.rand(40, 6) * 2 - 1, torch.rand(6).softmax(0)
    expected = literal_sinkhorn(scores, share, 0.05, iterations)
    assert torch.allclose(sinkhorn(scores.double(), share, 0.05, iterations), expected, rtol=1e-9)
    assert torch.allclose(sinkhorn(scores, share, 0.05, iterations).double(), expected, atol=2e-6)
    last = sinkhorn(scores, share, 0.05, iterations, keep=7)
    assert torch.equal(last, sinkhorn(scores, share, 0.05, iterations)[-7:])


def test_sinkhorn_needs_no_bound_on_the_scores():
    scores, share = torch.randn(200, 5, dtype=torch.float64) * 4, torch.rand(5).softmax(0)
    expected = literal_sinkhorn(scores, share, 0.05, 3)  # float64 still holds e^±400
    assert torch.allclose(sinkhorn(scores.float(), share).double(), expected, atol=1e-4)
    assert sinkhorn(scores.float() * 1000, share).isfinite().all()
    assert sinkhorn(scores.half(), share).dtype == torch.float32


def test_absent_class_is_assigned_nothing():
    scores = torch.randn(100, 3)
    q = sinkhorn(scores, torch.tensor([0.6, 0.0, 0.4]), iterations=20)
    without = sinkhorn(scores[:, ::2], torch.tensor([0.6, 0.4]), iterations=20)
    assert not q[:, 1].any() and torch.allclose(q[:, ::2], without)


def test_shares_are_met_within_a_percent_at_the_bank_size():
    generator = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(65536, 256, generator=generator), dim=1)
    prototypes = F.normalize(torch.randn(19, 256, generator=generator), dim=1)
    share = torch.from_numpy(np.load(REFERENCE)["class_distribution"])
    assert ((sinkhorn(z @ prototypes.T, share).mean(0) / share - 1).abs() < 0.01).all()


def test_sinkhorn_reads_nothing_back():
    with FakeTensorMode():  # tensors without data: any look at a value raises
        scores, share = torch.empty(64, 5, device="cuda"), torch.empty(5, device="cuda")
        assert sinkhorn(scores, share, keep=8).shape == (8, 5)


# Losses ------------------------------------------------------------------------------------------------------------


def test_symmetric_cross_entropy_numbers():
    logits, label = torch.tensor([2.0, 1.0, 0.0]).view(1, 3, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int16)
    assert float(symmetric_cross_entropy(logits, label, 1.0, 0.0)) == pytest.approx(0.407606, abs=1e-6)
    assert float(symmetric_cross_entropy(logits, label, 0.0, 1.0)) == pytest.approx(3.083245, abs=1e-5)
    assert float(symmetric_cross_entropy(logits, label, 0.1, 1.0)) == pytest.approx(3.124005, abs=1e-5)


def test_symmetric_cross_entropy_equals_the_literal_form():
    logits = (torch.randn(2, 5, 6, 7) * 8).requires_grad_()
    label = torch.randint(-1, 5, (2, 6, 7))
    symmetric_cross_entropy(logits, label).backward()
    ours, valid, literal = logits.grad.clone(), label >= 0, logits.detach().clone().requires_grad_()
    p = literal.softmax(1).clamp(1e-7, 1)
    onehot = F.one_hot(label.clamp(min=0), 5).permute(0, 3, 1, 2).float().clamp(1e-4, 1)
    rce = (-(p * onehot.log()).sum(1) * valid).sum() / (valid.sum() + 1e-6)
    loss = 0.1 * F.cross_entropy(literal, label, ignore_index=-1) + rce
    loss.backward()
    assert torch.allclose(symmetric_cross_entropy(logits, label), loss, rtol=1e-6)
    assert torch.allclose(ours, literal.grad, atol=1e-6)


def test_nothing_to_learn_from_is_zero():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = symmetric_cross_entropy(logits, torch.full((1, 4, 4), -1))
    loss = loss + consistency(logits, torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_distillation_numbers():
    student, teacher = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.7, 0.2, 0.1]).log()
    student, teacher = student.view(1, 3, 1, 1), teacher.view(1, 3, 1, 1)
    assert float(distillation(student, teacher, "inner_product")) == pytest.approx(-0.441812, abs=1e-6)
    assert float(distillation(student, teacher, "kl")) == pytest.approx(0.001929, abs=1e-6)


def test_consistency_is_the_masked_divergence_over_classes():
    student, teacher, mask = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.rand(2, 3, 5) < 0.6
    total = 0.0
    for b, y, x in mask.nonzero().tolist():
        t = (teacher[b, :, y, x].double() / 0.08).softmax(0)
        s = (student[b, :, y, x].double() / 0.08).log_softmax(0)
        total += float((torch.special.xlogy(t, t) - t * s).sum())
    assert float(consistency(student, teacher, mask)) == pytest.approx(total / (int(mask.sum()) * 4), rel=1e-5)


def test_what_has_no_label_takes_no_part_in_the_contrast():
    """Neither as an anchor nor as a positive or negative of others."""
    g = torch.Generator().manual_seed(0)
    anchors, bank = (torch.nn.functional.normalize(torch.randn(n, 8, generator=g), dim=1) for n in (20, 50))
    labels, of_bank = (torch.randint(0, 4, (n,), generator=g) for n in (20, 50))
    labels[::3], of_bank[::4] = IGNORE, IGNORE
    expected = pixel_contrast(anchors[labels >= 0], labels[labels >= 0], bank[of_bank >= 0], of_bank[of_bank >= 0])
    torch.testing.assert_close(pixel_contrast(anchors, labels, bank, of_bank), expected)
    assert pixel_contrast(anchors, torch.full_like(labels, IGNORE), bank, of_bank) == 0


def test_contrast_equals_the_double_loop():
    anchors, bank = (F.normalize(torch.randn(n, 8), dim=1) for n in (6, 40))
    labels, bank_labels = torch.randint(0, 3, (6,)), torch.randint(0, 2, (40,))  # class 2 is not in the bank
    total = 0.0
    for a, y in zip(anchors.double(), labels, strict=True):
        logits = bank.double() @ a / 0.08
        logits -= logits.max()
        negatives = sum(math.exp(v) for v, k in zip(logits, bank_labels, strict=True) if k != y)
        positives = [float(v) for v, k in zip(logits, bank_labels, strict=True) if k == y]
        total -= sum(v - math.log(math.exp(v) + negatives) for v in positives) / (len(positives) + 1e-5)
    anchors.requires_grad_()
    loss = pixel_contrast(anchors, labels, bank, bank_labels)
    loss.backward()
    assert loss.item() == pytest.approx(total / 6, rel=1e-5) and anchors.grad.isfinite().all()


# Adversary ---------------------------------------------------------------------------------------------------------


def test_discriminator_size_and_start():
    with torch.device("meta"):
        assert Discriminator(19)(torch.empty(1, 19, 512, 896)).shape == (1, 1, 32, 56)


@pytest.mark.parametrize("criterion", ["LS", "Vanilla"])
def test_one_joint_backward_is_the_alternating_update(criterion):
    network, adversary = torch.nn.Conv2d(3, 4, 1), Discriminator(4, width=4)
    image = torch.randn(1, 3, 32, 32)
    generator_loss = adversarial_loss(adversary(network(image).softmax(1)), SOURCE, criterion)
    expected = torch.autograd.grad(generator_loss, list(network.parameters()))
    discriminator_loss = adversarial_loss(adversary(network(image).softmax(1).detach()), TARGET, criterion)
    expected += torch.autograd.grad(discriminator_loss, list(adversary.parameters()))
    p = network(image).softmax(1)
    generator = adversarial_loss(adversary.constant(p), SOURCE, criterion)
    (generator + adversarial_loss(adversary(p.detach()), TARGET, criterion)).backward()
    ours = [w.grad for w in (*network.parameters(), *adversary.parameters())]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(ours, expected, strict=True))


def test_adversarial_losses():
    scores = torch.tensor([0.5, -1.0])
    assert float(adversarial_loss(scores, TARGET)) == pytest.approx((0.25 + 4) / 2)
    expected = (math.log1p(math.exp(0.5)) + math.log1p(math.exp(-1))) / 2
    assert float(adversarial_loss(scores, SOURCE, "Vanilla")) == pytest.approx(expected)


# Which pixels and classes take part ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quota", [[0.5, 0.2, 0.15, 0.1, 0.05], [0.97, 0.01, 0.01, 0.005, 0.005]])
def test_class_balanced_sampling_follows_the_distribution(quota):
    labels = torch.arange(CLASSES).repeat(2, 400)
    labels[:, ::7] = -1
    index = class_balanced(labels, torch.tensor(quota), 100)
    assert all(len(set(row.tolist())) == 100 for row in index)
    for row in labels.gather(1, index):
        counts = torch.bincount(row, minlength=CLASSES)
        assert (row >= 0).all() and counts.sum() == 100
        assert (counts >= 1).all(), "every class that is present gets a pixel"
        assert all(abs(counts[k] - 100 * quota[k]) <= 5 for k in range(CLASSES))


def test_absent_and_scarce_classes_leave_their_quota_to_the_others():
    labels = torch.full((1, 300), 0)
    labels[0, :3] = 1
    row = labels.gather(1, class_balanced(labels, torch.tensor([0.1, 0.8, 0.1]), 50))
    assert torch.bincount(row[0], minlength=3).tolist() == [47, 3, 0]


def test_cutmix_equals_pasting_at_full_size():
    torch.manual_seed(0)
    for _ in range(50):
        box = draw_box((32, 48), 1.0)
        assert abs((box.y1 - box.y0) * (box.x1 - box.x0) / (32 * 48) - 0.5) < 0.05
        label = torch.randint(0, 5, (2, 8, 12))
        source = torch.randint(-1, 5, (2, 32, 48), dtype=torch.int16)
        full = F.interpolate(label[:, None].float(), scale_factor=4.0, mode="nearest")[:, 0].long()
        full[:, box.y0 : box.y1, box.x0 : box.x1] = source[:, box.y0 : box.y1, box.x0 : box.x1].long()
        assert torch.equal(paste_labels(label, source, box), full[:, ::4, ::4])
    assert draw_box((32, 48), 0.0) is None
    with pytest.raises(ValueError, match="same batch_size and crop"):
        paste(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 9), Box(0, 4, 0, 4))


@pytest.mark.parametrize("cells, fewest", [(129 * 257, 10), (17 * 33, 1), (96 * 161, 5), (257 * 513, 40)])
def test_how_many_cells_a_class_needs_goes_with_the_grid(cells, fewest):
    """Ten on the release's grid of 2048×1024 images."""
    counts = torch.tensor([[fewest - 1, fewest, cells - 2 * fewest + 1], [cells, 0, 0]], dtype=torch.float64)
    assert enough(counts).tolist() == [[False, True, True], [True, False, False]]


def test_prototype_sums_equal_masked_means():
    logits, features = torch.randn(CLASSES, 6, 7), torch.randn(8, 6, 7)
    sums, counts = class_sums(logits, features)
    for k in range(CLASSES):
        mask = logits.argmax(0) == k
        assert counts[k] == mask.sum()
        torch.testing.assert_close(sums[k], features[:, mask].sum(1))
    assert MEMORY == 3000


def test_hard_labels_in_bands_equal_the_whole_resize():
    p = torch.randn(1, CLASSES, 9, 13).softmax(1)
    label, confidence = best_class(p, (64, 96), rows=7)
    whole = to_grid(p, (64, 96))[0].max(0)
    torch.testing.assert_close(confidence, whole.values)
    assert (label == whole.indices).float().mean() > 0.999
