"""Mask2Former's criterion, its points, Seesaw and hard pixel mining, against dense or literal forms."""

import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from common.losses import hard_pixel
from common.losses.build import LossContext, build_loss
from common.losses.counts import Counts
from common.losses.hard_pixel import HardPixels, hard_pixel_cross_entropy
from common.losses.seesaw import SeesawLoss
from common.ops.point_sample import class_masks, point_sample, uncertain_points
from ltss_benchmark import criterion as module
from ltss_benchmark.criterion import (
    CriterionConfig,
    SetCriterion,
    adjusted_classes,
    classification_loss,
    pad_label,
)
from scripts.bench.operators import Operators

CLASSES, QUERIES, LAYERS = 5, 7, 3


def outputs(batch=2, extra=1, size=(4, 6), seed=0):
    """Training outputs of a network with K + `extra` logits, and label maps."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    layers = [
        {"pred_logits": leaf(batch, QUERIES, CLASSES + extra), "mask_embed": leaf(batch, QUERIES, 3)}
        for _ in range(LAYERS)
    ]
    out = {**layers[-1], "mask_features": leaf(batch, 3, *size), "aux": layers[:-1]}
    label = torch.randint(-1, 3, (batch, 4 * size[0], 4 * size[1]), generator=generator).to(torch.int16)
    return out, label


def leaves(out):
    tensors = [t for layer in (*out["aux"], out) for t in (layer["pred_logits"], layer["mask_embed"])]
    return [*tensors, out["mask_features"]]


def test_label_map_sampling_equals_dense_masks():
    label = torch.randint(-1, 4, (2, 9, 7))
    points = torch.rand(3, 40, 2) * 1.2 - 0.1
    points[0, 0] = torch.tensor([0.0, 1.0])
    classes, image = torch.tensor([[0, 1], [3, 2], [2, 2]]), torch.tensor([1, 0, 1])
    dense = (label[image].unsqueeze(1) == classes[:, :, None, None]).float()
    torch.testing.assert_close(class_masks(label, points, classes, image), point_sample(dense, points))


def test_uncertain_points_are_the_least_decided():
    logits = torch.randn(2, 8, 8, requires_grad=True)
    torch.manual_seed(3)
    points = uncertain_points(logits, 100, oversample=3.0, importance=0.75)
    torch.manual_seed(3)
    candidates = torch.rand(2, 300, 2)
    distance = point_sample(logits.unsqueeze(1), candidates).squeeze(1).abs()
    kept = point_sample(logits.unsqueeze(1), points[:, :75]).squeeze(1).abs()
    assert points.shape == (2, 100, 2) and not points.requires_grad
    torch.testing.assert_close(kept.sort(1).values, distance.sort(1).values[:, :75])
    torch.testing.assert_close(points[:, 75:], torch.rand(2, 25, 2))


def test_points_of_groups_are_those_of_a_call_for_each():
    maps, groups = torch.randn(9, 8, 8), (4, 0, 2, 3)
    torch.manual_seed(3)
    together = uncertain_points(maps, 40, groups=groups)
    torch.manual_seed(3)
    assert torch.equal(together, torch.cat([uncertain_points(some, 40) for some in maps.split(groups)]))


@pytest.mark.parametrize("normalizer", ["targets", "pairs"])
def test_losses_equal_the_literal_form(monkeypatch, normalizer):
    """Loops over layers, images and pairs, with dense masks; the same matching and points."""
    out, label = outputs()
    options = CriterionConfig(points=30, normalizer=normalizer)
    seen = []
    loss = SetCriterion(CLASSES, options, copies=torch.tensor([1, 2, 1, 1, 1]).numpy())
    matcher = loss.matcher
    loss.matcher = lambda *inputs: seen.append(matcher(*inputs)) or seen[-1]
    points = torch.rand(1, 30, 2)
    monkeypatch.setattr(module, "uncertain_points", lambda maps, count, **_: points.expand(len(maps), -1, -1))
    result = loss(out, label)

    assigned = torch.full((LAYERS, 2, QUERIES), CLASSES)
    assigned.view(-1)[seen[0].place] = seen[0].label
    expected, layers = 0.0, [*out["aux"], out]
    classes = sum(len(image[image >= 0].unique()) for image in label)
    for number, layer in enumerate(layers):
        found = assigned[number]
        weight = torch.tensor([1.0] * CLASSES + [0.1])
        ce = F.cross_entropy(layer["pred_logits"].flatten(0, 1), found.flatten(), weight=weight)
        bce = dice = torch.zeros(())
        for b, q in (found < CLASSES).nonzero().tolist():
            mask = torch.einsum("d,dhw->hw", layer["mask_embed"][b, q], out["mask_features"][b])
            x = point_sample(mask[None, None], points).flatten()
            y = point_sample((label[b] == found[b, q]).float()[None, None], points).flatten()
            bce = bce + F.binary_cross_entropy_with_logits(x, y)
            dice = dice + 1 - (2 * (x.sigmoid() * y).sum() + 1) / (x.sigmoid().sum() + y.sum() + 1)
        divisor = classes if normalizer == "targets" else int((found < CLASSES).sum())
        terms = {"loss_ce": 2 * ce, "loss_mask": 5 * bce / divisor, "loss_dice": 5 * dice / divisor}
        suffix = "" if number == LAYERS - 1 else f"_{number}"
        for name, value in terms.items():
            torch.testing.assert_close(result[name + suffix], value)
            expected = expected + value
    torch.testing.assert_close(result["loss"], expected)
    assert len(result) == 1 + 3 * LAYERS and sum(seen[0].per_layer) > classes
    ours = torch.autograd.grad(result["loss"], leaves(out), retain_graph=True)
    for grad, reference in zip(ours, torch.autograd.grad(expected, leaves(out)), strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-6)


def seeded_losses(out, label):
    """All losses, and the gradients of their sum."""
    torch.manual_seed(0)
    losses = SetCriterion(CLASSES, CriterionConfig(points=64))(out, label)
    return [*losses.values(), *torch.autograd.grad(losses["loss"], leaves(out))]


def test_images_together_are_images_one_by_one(monkeypatch):
    """Bit for bit, whatever fits at once: all, one, two or three of five, of which one shows no class.

    A pair's points are a multiple of what a processor works on at once, so none is rounded as a remainder.
    """
    out, label = outputs(batch=5)
    label[3] = -1
    expected = seeded_losses(out, label)
    pairs, sizes = [], []
    original = SetCriterion._pair_losses

    def counted(self, maps, classes, image, label, counts):
        pairs.append(len(maps))
        sizes.append(len(counts))
        return original(self, maps, classes, image, label, counts)

    monkeypatch.setattr(SetCriterion, "_pair_losses", counted)
    for limit, images in ((1, [1] * 5), (192 * 18, [2, 3]), (192 * 27, [4, 1])):
        monkeypatch.setattr(module, "AT_ONCE", {"cpu": limit, "cuda": 1})
        assert all(map(torch.equal, seeded_losses(out, label), expected))
        assert sizes == images and (limit == 1 or max(pairs) * 192 <= limit)
        pairs.clear(), sizes.clear()


def test_a_further_image_is_a_few_operators():
    """The masks' product forward and backward, and a sum; all else is done for all images together."""
    found = []
    for batch in (2, 4):
        counted = Operators()
        with counted:
            seeded_losses(*outputs(batch))
        found.append(sum(counted.calls.values()))
    assert found[1] - found[0] <= 2 * 12


@pytest.mark.parametrize("class_loss", ["ce", "seesaw"])
def test_no_class_in_the_batch(class_loss):
    """Mask losses are 0 and every output still takes part in the backward."""
    out, label = outputs(extra=1 if class_loss == "ce" else 2)
    result = SetCriterion(CLASSES, CriterionConfig(class_loss=class_loss, points=20))(out, torch.full_like(label, -1))
    result["loss"].backward()
    assert result["loss_mask"] == result["loss_dice_0"] == 0 and result["loss"].isfinite()
    assert all(tensor.grad is not None for tensor in leaves(out))


def test_labels_are_padded_to_the_nets_input():
    label = torch.zeros(1, 15, 20, dtype=torch.int16)
    padded = pad_label(label, (4, 6))
    assert padded.shape == (1, 16, 24) and padded[0, 15].eq(-1).all() and padded[0, :15, 20:].eq(-1).all()
    assert padded[0, :15, :20].eq(0).all()


def test_half_precision_outputs_are_summed_in_float32():
    out, label = outputs()
    half = {k: v.detach().bfloat16() for k, v in out.items() if k != "aux"}
    half["aux"] = [{k: v.detach().bfloat16() for k, v in layer.items()} for layer in out["aux"]]
    rounded = {k: v.float() for k, v in half.items() if k != "aux"}
    rounded["aux"] = [{k: v.float() for k, v in layer.items()} for layer in half["aux"]]
    values = []
    mixed = {**half, "mask_features": rounded["mask_features"]}  # as under autocast: the pixel decoder is in float32
    for chosen in (half, mixed, rounded):
        torch.manual_seed(0)
        values.append(SetCriterion(CLASSES, CriterionConfig(points=200))(chosen, label)["loss"])
    assert values[0].dtype == torch.float32
    torch.testing.assert_close(values[0], values[2], rtol=0.02, atol=0)
    torch.testing.assert_close(values[1], values[2])


def test_seesaw_counts_matched_queries_of_every_prediction():
    out, label = outputs(extra=2)
    loss = SetCriterion(CLASSES, CriterionConfig(class_loss="seesaw", points=20))
    result = loss(out, label)
    present = torch.tensor([sum(bool((image == k).any()) for image in label) for k in range(CLASSES)])
    assert loss.seesaw.counts.tolist() == (LAYERS * present).tolist()
    assert "loss_seesaw_0" in result and "loss_ce" not in result
    counts = loss.seesaw.counts.clone()
    loss.eval()(out, label)
    assert torch.equal(loss.seesaw.counts, counts)


def test_seesaw_sees_the_last_prediction_first():
    out, label = outputs(extra=2)
    loss = SetCriterion(CLASSES, CriterionConfig(class_loss="seesaw", points=20, class_weight=1.0))
    calls = []
    forward = SeesawLoss.forward
    loss.seesaw.forward = lambda x, y: calls.append((x, y)) or forward(loss.seesaw, x, y)
    result = loss(out, label)
    torch.testing.assert_close(calls[0][0][0], out["pred_logits"].flatten(0, 1))
    one_by_one = SeesawLoss(CLASSES)
    for name, x, y in zip(("loss_seesaw", "loss_seesaw_0", "loss_seesaw_1"), *calls[0], strict=True):
        torch.testing.assert_close(result[name], one_by_one(x[None], y[None])[0])


def literal_seesaw(logits, labels, counts, p, q, eps=0.01):
    """The equations, query by query and class by class."""
    total, matched, classes = 0.0, 0, logits.shape[1] - 2
    for row, label in zip(logits, labels.tolist(), strict=True):
        if label == classes:
            continue
        score = row[:classes].detach().softmax(0)
        shifted = []
        for j in range(classes):
            mitigation = min(1.0, (max(counts[j], 1) / max(counts[label], 1)) ** p)
            compensation = max(1.0, (score[j].item() / max(score[label].item(), eps)) ** q)
            shifted.append(row[j] + (math.log(mitigation * compensation) if j != label else 0.0))
        total = total + F.cross_entropy(torch.stack(shifted)[None], torch.tensor([label]))
        matched += 1
    objects = F.cross_entropy(logits[:, classes:], (labels == classes).long())
    return total / max(matched, 1) + objects


@pytest.mark.parametrize(("p", "q"), [(1.2, 1.0), (0.8, 2.0), (0.0, 0.0)])
def test_seesaw_equals_its_equations(p, q):
    logits, labels = 3 * torch.randn(20, CLASSES + 2), torch.randint(0, CLASSES + 1, (20,))
    labels[:8] = 2
    counts = torch.bincount(labels, minlength=CLASSES + 1)[:CLASSES].tolist()
    expected = literal_seesaw(logits, labels, counts, p, q)
    torch.testing.assert_close(SeesawLoss(CLASSES, p, q)(logits[None], labels[None])[0], expected)
    if p == q == 0:
        found = labels < CLASSES
        plain = F.cross_entropy(logits[found, :CLASSES], labels[found])
        torch.testing.assert_close(expected, plain + F.cross_entropy(logits[:, CLASSES:], (~found).long()))


def test_seesaw_counts_are_those_of_all_ranks(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_seesaw_rank, (port, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    logits, labels = _seesaw_inputs()
    for rank, (counts, losses) in enumerate(ranks):
        assert counts.tolist() == torch.bincount(labels.flatten(), minlength=CLASSES + 1)[:CLASSES].tolist()
        so_far = [torch.bincount(labels[:, : n + 1].flatten(), minlength=CLASSES + 1).tolist() for n in range(2)]
        for call in range(2):
            expected = literal_seesaw(logits[rank, call], labels[rank, call], so_far[call], 1.2, 1.0)
            torch.testing.assert_close(losses[call], expected)


def _seesaw_inputs():
    """Logits (ranks, calls, M, K + 2) and labels (ranks, calls, M)."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 2, 9, CLASSES + 2, generator=generator)
    return logits, torch.randint(0, CLASSES + 1, (2, 2, 9), generator=generator)


def _seesaw_rank(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    loss, (logits, labels) = SeesawLoss(CLASSES), _seesaw_inputs()
    losses = loss(logits[rank], labels[rank])
    torch.save((loss.counts, losses), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "align_corners"), [((16, 20), False), ((14, 17), False), ((16, 20), True)])
def test_hard_pixels_equal_full_size_losses(monkeypatch, size, align_corners):
    monkeypatch.setitem(hard_pixel.BAND, "cpu", 300)  # several bands
    logits = torch.randn(2, 6, 4, 5, requires_grad=True)
    label = torch.randint(-1, 6, (2, *size)).to(torch.int16)
    full = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=align_corners)
    full = full[..., : size[0], : size[1]]
    losses = F.cross_entropy(full, label.long(), ignore_index=-1, reduction="none")
    expected = HardPixels(0.3).mean(losses, label >= 0, losses)
    ours = hard_pixel_cross_entropy(logits, label, fraction=0.3, align_corners=align_corners)
    torch.testing.assert_close(ours, expected)
    grads = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("align_corners", [False, True])
def test_pixel_losses_are_those_of_any_band(monkeypatch, align_corners):
    logits, label = torch.randn(2, 6, 4, 5), torch.randint(-1, 6, (2, 15, 18))
    row = 2 * 6 * 20  # logits of one row at full size
    found = []
    for band in (1, 2 * row, 7 * row, 1 << 22):
        monkeypatch.setitem(hard_pixel.BAND, "cpu", band)
        found.append(hard_pixel._pixel_losses(logits, label, 4, align_corners))
    assert found[0].shape == label.shape
    for losses in found:
        torch.testing.assert_close(losses, found[0])


def test_hardest_counts_ignored_pixels():
    losses = torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    assert HardPixels(0.5).mean(losses, losses > 0, losses) == pytest.approx((3 + 2 + 1 + 0) / 4)
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    value = hard_pixel_cross_entropy(logits, torch.full((1, 8, 8), -1))
    value.backward()
    assert value == 0 and logits.grad.abs().sum() == 0


# Remedies of matched queries ----------------------------------------------------------------------------------------


def remedies(**section):
    counts = Counts(torch.ones(CLASSES), torch.tensor([40.0, 30, 20, 8, 2]), 50.0)
    return build_loss(section, LossContext(counts._replace(pixels=counts.images)))


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_logits_of_matched_queries_are_adjusted_and_no_object_is_not(tau):
    """−ln p(object) − ln p'(y | object), written out."""
    logits, label = torch.randn(30, CLASSES + 1), torch.randint(CLASSES, (30,))
    chosen = remedies(logits={"name": "logit_adjustment", "tau": tau})
    adjusted = adjusted_classes(logits, label, chosen, 0.0)
    prior = torch.tensor([0.4, 0.3, 0.2, 0.08, 0.02])
    before, after = logits.log_softmax(1), adjusted.log_softmax(1)
    torch.testing.assert_close(after[:, -1], before[:, -1])
    among = (logits[:, :-1] + tau * prior.log()).log_softmax(1)
    objects = torch.log1p(-before[:, -1].exp())
    torch.testing.assert_close(after[:, :-1], objects[:, None] + among)
    assert tau or torch.equal(adjusted, logits)


def test_class_weights_multiply_the_losses_of_matched_queries():
    logits, labels = torch.randn(2, 7, CLASSES + 1), torch.tensor([[0, 4, 5, 5, 2, 5, 1], [5] * 7])
    weight = remedies(class_weight={"name": "inverse"}).weight(0.0)
    each = -logits.log_softmax(2).gather(2, labels[..., None])[..., 0]
    factor = torch.tensor([*weight.tolist(), 1.0])[labels]
    size = torch.where(labels == CLASSES, 0.1, 1.0)
    expected = (each * factor * size).sum(1) / size.sum(1)
    torch.testing.assert_close(classification_loss(logits, labels, 0.1, weight), expected)


@pytest.mark.parametrize("name", ["logit_adjustment", "blv", "equalization", "seesaw"])
def test_the_criterion_trains_with_each_remedy_of_logits(name):
    out, label = outputs()
    options = CriterionConfig(points=20)
    torch.manual_seed(0)
    plain = SetCriterion(CLASSES, options)(out, label)
    torch.manual_seed(0)
    found = SetCriterion(CLASSES, options, remedies=remedies(logits={"name": name}))(out, label)
    assert found["loss_ce"] != plain["loss_ce"]
    found["loss"].backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves(out))
    nothing = torch.full_like(label, -1)
    assert SetCriterion(CLASSES, options, remedies=remedies(logits={"name": name}))(out, nothing)["loss"].isfinite()
