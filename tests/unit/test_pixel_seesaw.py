"""Seesaw loss on pixels whose counts grow with the labels of training: against its equations, and what is kept."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.losses.build import LossContext, build_loss
from common.losses.counts import Counts

PIXELS = [900.0, 90.0, 0.0, 10.0]  # no label of class 2
ONLINE = {"logits": {"name": "seesaw", "counts": "online", "p": 0.7, "q": 1.5}}


def make(average="valid"):
    return build_loss(ONLINE, LossContext(Counts.from_pixels(PIXELS), average))


def example(seed, size=(2, 4, 3, 5), classes=(-1, 0, 1, 3)):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, generator=generator)
    label = torch.tensor(classes)[torch.randint(0, len(classes), (size[0], *size[2:]), generator=generator)]
    return logits, label


def literal(logits, label, counts):
    """The mean over labelled pixels of −log σ_y, by loops; a class without labels counts as the most frequent one."""
    n = [counts[k] if counts[k] else max(counts) for k in range(4)]
    losses = []
    for b, i, j in (label >= 0).nonzero().tolist():
        y, z = int(label[b, i, j]), logits[b, :, i, j]
        p = z.softmax(0).tolist()
        changed = [
            float(z[k])
            + (k != y) * (0.7 * min(0, math.log(n[k] / n[y])) + 1.5 * max(0, math.log(p[k] / max(p[y], 0.01))))
            for k in range(4)
        ]
        losses.append(math.log(sum(math.exp(c) for c in changed)) - changed[y])
    return sum(losses) / len(losses)


def added(counts, label):
    return [n + int((label == k).sum()) for k, n in enumerate(counts)]


def test_counts_grow_before_they_are_used():
    loss, counts = make(), [1, 1, 0, 1]
    for seed, classes in enumerate([(0, 1, -1), (3,), (0, 1, 3)]):
        logits, label = example(seed, classes=classes)
        counts = added(counts, label)
        assert float(loss(logits, label)) == pytest.approx(literal(logits, label, counts), rel=1e-5)
        assert loss.seen.pixels.tolist() == counts


def test_an_evaluation_counts_nothing_and_a_resume_goes_on():
    loss = make()
    loss(*example(0))
    before = loss.seen.pixels.clone()
    expected = float(loss.eval()(*example(1)))
    assert torch.equal(loss.seen.pixels, before)

    resumed = make()
    resumed.load_state_dict(loss.state_dict())
    assert float(resumed.eval()(*example(1))) == expected
    assert float(resumed.train()(*example(2))) == float(loss.train()(*example(2)))


def test_enlarged_one_by_one_an_image_counts_before_it_is_used():
    """Of logits at the network's stride, where one image is enlarged at a time; every pixel counts once."""
    loss, counts = make(), [1, 1, 0, 1]
    logits, label = example(3, (2, 4, 3, 5))
    small = logits.requires_grad_()
    fine = label.repeat_interleave(2, 1).repeat_interleave(2, 2)
    value = loss.upsampled(small, fine, align_corners=False)
    large = F.interpolate(logits, fine.shape[1:], mode="bilinear", align_corners=False).detach()

    total = 0.0
    for image in range(2):
        counts = added(counts, fine[image])
        one = literal(large[image : image + 1], fine[image : image + 1], counts)
        total += one * int((fine[image] >= 0).sum())
    assert float(value.detach()) == pytest.approx(total / int((fine >= 0).sum()), rel=1e-5)
    assert loss.seen.pixels.tolist() == counts
    value.backward()
    assert loss.seen.pixels.tolist() == counts and small.grad.any()


def test_the_data_sets_counts_are_the_default():
    given = {"logits": {"name": "seesaw", "p": 0.7, "q": 1.5}}
    loss = build_loss(given, LossContext(Counts.from_pixels(PIXELS)))
    logits, label = example(4)
    assert loss.seen is None and not any("seen" in name for name in loss.state_dict())
    assert float(loss(logits, label)) == pytest.approx(literal(logits, label, PIXELS), rel=1e-5)


def test_a_refresh_of_other_counts_is_said():
    with pytest.warns(UserWarning, match="counts.refresh: no remedy that is chosen goes by counts"):
        build_loss(
            {**ONLINE, "counts": {"refresh": 5}}, LossContext(Counts.from_pixels(PIXELS), pseudo_labels="pixels")
        )
