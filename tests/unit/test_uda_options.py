"""Options of CPSL's stages that hold the release's behaviour or an ablation: each changes what it says."""

import pytest
import torch
import torch.nn.functional as F

from common.config import ConfigError
from tests.unit.test_uda_configs import batches, small
from uda.base import onto_grid
from uda.mixing import Box, paste_labels

CLASSES = 5
STAGE1 = "gta5_to_cityscapes/stage1"


def stage1(folder, *words):
    torch.manual_seed(0)
    sizes = [f"model.num_classes={CLASSES}", "method.bank=256", "method.samples=32"]
    return small(STAGE1, folder, *sizes, *(f"method.{word}" for word in words))


@pytest.fixture
def target():
    return batches(CLASSES)["target"]


def test_cutmix_may_leave_the_labels(tmp_path):
    source = batches(CLASSES)["source"]["label"]
    label, box = torch.full((2, 8, 12), 4), Box(4, 28, 8, 40)
    pasted, kept = (
        stage1(tmp_path, f"cutmix_labels={c}").mixed_labels(label, source, box) for c in ("source", "target")
    )
    assert torch.equal(kept, label)
    assert torch.equal(pasted, paste_labels(label, source, box)) and not torch.equal(pasted, label)


def test_cutmix_pixels_are_pasted_with_either_choice(tmp_path, monkeypatch):
    """The student sees the same mixed image; only what it is told about the box differs."""
    streams, seen = batches(CLASSES), []
    for choice in ("source", "target"):
        method = stage1(tmp_path, f"cutmix_labels={choice}", "cutmix=1.0").eval()
        monkeypatch.setattr("uda.cpsl.draw_box", lambda crop, probability: Box(4, 28, 8, 40))
        method.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        _, label, _, sampled = method.label_target(streams["target"])
        seen.append(method.weak_terms(streams["source"], streams["target"], label, sampled, 0.0)["target_sce"].detach())
    (images, first), (others, second) = seen[:2], seen[2:]
    assert torch.equal(images, others) and not torch.equal(images, streams["target"]["weak"])
    assert torch.equal(images[..., 4:28, 8:40], streams["source"]["image"][..., 4:28, 8:40])
    assert first != second


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_teachers_mode(mode, tmp_path, target):
    """In training mode it drops channels, normalises by the batch and moves its statistics."""
    method = stage1(tmp_path, f"teacher_mode={mode}")
    before = {name: b.clone() for name, b in method.teacher.named_buffers() if "running" in name}
    first, second = (method.label_target(target)[0] for _ in range(2))
    assert method.teacher.training == (mode == "train") and torch.equal(first, second) == (mode == "eval")
    moved = [not torch.equal(before[name], b) for name, b in method.teacher.named_buffers() if "running" in name]
    assert len(moved) > 0 and (all(moved) if mode == "train" else not any(moved))


def test_labels_of_the_bank(tmp_path):
    """Each row's own."""
    label = torch.arange(2 * 8 * 12).view(2, 8, 12) % CLASSES
    out = {"features": one_hot_map(label), "logits": one_hot_map(label)}
    rows, _, labels = stage1(tmp_path).sample(label, out, whole(out["features"]))
    assert torch.equal(labels, rows.argmax(2))


FIRST = ("bank_labels=first", "sampling=uniform", "contrastive=0.001")


def test_pixels_and_labels_of_the_bank_as_released(tmp_path, target):
    """One draw of cells of the whole image for both images; labels are the first of the crop's map on that grid."""
    method = stage1(tmp_path, *FIRST)
    label = torch.arange(2 * 8 * 12).view(2, 8, 12) % CLASSES
    angle = torch.arange(2 * 9 * 13).view(2, 1, 9, 13) / 100  # tells each cell of both images from all others
    out = {"features": torch.cat((angle.cos(), angle.sin()), 1), "logits": torch.rand(2, CLASSES, 9, 13)}
    rows, logits, labels = method.sample(label, out, None)

    cells = (100 * torch.atan2(rows[..., 1], rows[..., 0])).round().long()
    assert torch.equal(cells[1], cells[0] + 9 * 13) and len(set(cells[0].tolist())) == 32
    torch.testing.assert_close(logits, F.normalize(out["logits"].flatten(2)[:, :, cells[0]].transpose(1, 2), dim=2))
    rows_of, columns_of = (torch.arange(n) * m // n for n, m in ((9, 8), (13, 12)))  # nearest, to the lower cell
    assert torch.equal(labels, label[:, rows_of][:, :, columns_of].flatten(1)[:, :32])


def test_contrast_as_released(tmp_path, monkeypatch):
    """Against loops over the release's formula and indices: an anchor's label is that of its index in another grid."""
    method = stage1(tmp_path, *FIRST)
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, CLASSES, (2, 8, 12), generator=g)
    features = torch.randn(2, 8, 5, 7, generator=g)
    method.features.push(F.normalize(torch.randn(256, 8, generator=g), dim=1))
    method.bank_labels.push(torch.randint(0, CLASSES, (256,), generator=g))
    draws = torch.stack([torch.randperm(5 * 7, generator=g)[:32] for _ in range(2)])
    monkeypatch.setattr("uda.cpsl.uniform", lambda labels, n: draws[:, :n])
    losses = []
    for image in range(2):
        map_of_image = F.interpolate(label[image][None, None].float(), (9, 13)).long().flatten()
        for cell in draws[image].tolist():
            anchor = F.normalize(features[image].flatten(1)[:, cell], dim=0)
            scores = method.features.rows @ anchor / method.options.temperature
            scores = scores - scores.max()
            same = method.bank_labels.rows == map_of_image[cell]
            against = scores[~same].exp().sum()
            terms = [score - (score.exp() + against).log() for score in scores[same]]
            losses.append(-sum(terms) / (same.sum() + 1e-5))
    ours = method.contrast(features, label, (9, 13), mixed=False)
    torch.testing.assert_close(ours, torch.stack(losses).mean())
    assert method.contrast(features, label, (9, 13), mixed=True) == 0


def test_the_released_pairing_needs_its_sampling(tmp_path):
    with pytest.raises(ConfigError, match="bank_labels: first is for sampling: uniform, not class_balanced; set both"):
        stage1(tmp_path, "bank_labels=first")


def test_a_step_with_the_contrastive_term(tmp_path):
    """Both pairings, past the step in which the bank is full."""
    streams = batches(CLASSES)
    for words in (("contrastive=0.001",), FIRST):
        method = stage1(tmp_path, *words, "cutmix=0.0", "bank=64")
        for step in range(2):
            parts = list(method(streams, step))
        assert parts[1]["contrastive"].isfinite() and parts[1]["contrastive"] > 0


def one_hot_map(label):
    return F.one_hot(label, CLASSES).permute(0, 3, 1, 2).float()


def whole(maps):
    """The resampling that leaves a map as it is."""
    return onto_grid(maps, maps.shape[-2:])


def test_how_pixels_are_sampled(tmp_path):
    """Of a map with 90 % and 10 % of two classes: in that proportion, or by quotas (here equal for all classes)."""
    label = (torch.arange(2 * 40 * 50).view(2, 40, 50) % 10 == 0).long()
    out = {"features": one_hot_map(label), "logits": one_hot_map(label)}
    shares = {}
    for choice in ("class_balanced", "uniform"):
        method = stage1(tmp_path, f"sampling={choice}", "samples=300")
        shares[choice] = (method.sample(label, out, whole(out["features"]))[2] == 1).float().mean(1)
    assert shares["class_balanced"].tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    assert shares["uniform"].tolist() == pytest.approx([0.1, 0.1], abs=0.06)


def test_class_shares_of_the_assignment(tmp_path):
    share = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
    scores = 0.3 * F.normalize(torch.randn(4000, CLASSES, generator=torch.Generator().manual_seed(0)), dim=1)
    for choice, expected in (("pseudo_labels", share), ("uniform", torch.full((CLASSES,), 0.2))):
        method = stage1(tmp_path, f"marginal={choice}", "sinkhorn_iterations=20")
        method.distribution.copy_(share)
        columns = method.assign(method.features.rows, scores).mean(0)
        torch.testing.assert_close(columns, expected, rtol=0.02, atol=1e-3)


def known(folder, *words):
    """A stage 1 of three classes, and a batch whose soft labels are (0.6, 0.3, 0.1) everywhere."""
    method = small(STAGE1, folder, "model.num_classes=3", "method.bank=64", "method.samples=16", *words)
    batch = batches(3)["target"]
    batch["soft"] = torch.tensor([0.6, 0.3, 0.1]).view(1, 3, 1, 1).expand(2, 3, 9, 13).contiguous()
    similarity = torch.tensor([0.52, 0.60, 0.40]).view(1, 3, 1, 1).expand(2, 3, 8, 12).contiguous()
    return method, similarity, batch


@pytest.mark.parametrize("threshold, label", [(0.0, 1), (0.5670, 1), (0.5674, -1)])
def test_rectification_of_known_numbers(threshold, label, tmp_path):
    """Class 1 with the probability 0.567176; the soft labels alone say class 0."""
    method, similarity, batch = known(tmp_path, f"method.threshold={threshold}")
    labels, changed = method.rectify(similarity, batch)
    assert (labels == label).all() and labels.shape == (2, 8, 12) and changed == 1


@pytest.mark.parametrize("threshold, label", [(0.58, 1), (0.62, -1)])
def test_the_threshold_may_ask_the_soft_labels(threshold, label, tmp_path):
    """Their best class has 0.6; what rectification makes of it does not matter."""
    words = (f"method.threshold={threshold}", "method.threshold_on=pseudo", "method.temperature=0.01")
    method, similarity, batch = known(tmp_path, *words)
    assert (method.rectify(similarity, batch)[0] == label).all()


def test_without_rectification_the_soft_labels_decide(tmp_path):
    method, similarity, batch = known(tmp_path, "method.rectify=false")
    labels, changed = method.rectify(similarity, batch)
    assert (labels == 0).all() and changed == 0


def test_forms_of_distillation(tmp_path):
    """A KL, or the release's inner product, with the teacher's answer to the same view; 0 leaves it out."""
    name, terms = "gta5_to_cityscapes/stage2", {}
    streams = batches(CLASSES)
    for form in ("kl", "inner_product"):
        torch.manual_seed(0)
        method = small(name, tmp_path, f"model.num_classes={CLASSES}", f"method.kd_loss={form}").eval()
        for net in (method.model, method.teacher):
            torch.nn.init.normal_(net.layer5.head[1].weight)
        terms[form] = method.target_terms(streams["target"], 0.0)
    student, teacher = (
        F.interpolate(net(streams["target"]["strong"])["logits"], (8, 12), mode="bilinear", align_corners=True)
        for net in (method.model, method.teacher)
    )
    p, t = student.softmax(1), teacher.softmax(1)
    torch.testing.assert_close(terms["kl"]["kd"], (t * (t / p).log()).mean())
    torch.testing.assert_close(terms["inner_product"]["kd"], (t * (t.log() - p)).mean())
    for form in terms.values():
        torch.testing.assert_close(form["loss"], form["target_ce"] + form["kd"])
    alone = small(name, tmp_path, f"model.num_classes={CLASSES}", "method.distillation=0")
    losses = alone.target_terms(streams["target"], 0.0)
    assert "kd" not in losses and losses["loss"] is losses["target_ce"]


def test_a_warm_up_on_the_source_alone(tmp_path):
    """`adversarial: 0`: no discriminator, no target; cross-entropy at full size."""
    source = batches(19)["source"]
    method = small("gta5_to_cityscapes/warm_up", tmp_path, "method.adversarial=0").eval()
    losses = method({"source": source}, 0)
    assert method.discriminator is None and set(losses) == {"loss", "source_ce"}
    assert [group["name"] for group in method.parameter_groups()] == ["backbone", "head"]
    logits = F.interpolate(method.model(source["image"])["logits"], (32, 48), mode="bilinear", align_corners=True)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(logits, source["label"].long(), ignore_index=-1))
