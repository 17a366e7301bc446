"""Seesaw, the Frequency-based Matcher and Mask2Former's losses against reference outputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.losses.seesaw import SeesawLoss
from common.models.mask2former import class_probabilities
from ltss_benchmark.criterion import classification_loss, point_losses
from ltss_benchmark.matcher import MatchWeights, assign, match_costs, queries_per_class

DATA = Path(__file__).parent / "data"


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"op_{name}.npz") as file:
        return {key: file[key] for key in file.files}


def relative(ours: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ours.detach().numpy() - expected) / np.linalg.norm(expected))


def test_seesaw_call_by_call():
    expected = reference("seesaw")
    classes = int(expected["num_classes"])
    loss = SeesawLoss(classes, float(expected["p"]), float(expected["q"]))
    for call in range(2):
        scores = torch.tensor(expected[f"scores{call}"], requires_grad=True)
        value = loss(scores[None], torch.tensor(expected[f"labels{call}"])[None])
        value.sum().backward()
        assert value.item() == pytest.approx(expected[f"loss{call}"].item(), rel=1e-5)
        assert relative(scores.grad, expected[f"grad{call}"]) < 1e-4
        assert relative(class_probabilities(scores, classes), expected[f"activation{call}"][:, :classes]) < 1e-5
    assert loss.counts.tolist() == expected["cum_samples"][:classes].tolist()


def test_seesaw_calls_at_once():
    """Calls that are stacked see the counts that they would have seen one after the other."""
    expected = reference("seesaw")
    loss = SeesawLoss(int(expected["num_classes"]))
    stacked = (torch.tensor(np.stack([expected[f"{key}{call}"] for call in range(2)])) for key in ("scores", "labels"))
    values = loss(*stacked)
    assert values.tolist() == pytest.approx([expected["loss0"].item(), expected["loss1"].item()], rel=1e-5)
    assert loss.counts.tolist() == expected["cum_samples"][:-1].tolist()


def test_frequency_matcher():
    expected = reference("frequency_matcher")
    query, target = assign(expected["cost"], expected["queries_per_target"])
    assert query.tolist() == expected["query_index"].tolist()
    assert target.tolist() == expected["target_index"].tolist()
    for setting, numbers in json.loads(str(expected["query_numbers"])).items():
        threshold, scale = (float(part.split("=")[1]) for part in setting.split(","))
        assert queries_per_class(expected["class_frequency"], threshold, scale).tolist() == numbers


def test_matching_costs_and_losses():
    expected = reference("mask2former_losses")
    names = ("class_logits", "mask_logits_at_points", "target_masks_at_points", "target_labels")
    logits, masks, targets, labels = (torch.tensor(expected[name]) for name in names)
    classes = logits.shape[1] - 1
    weights = MatchWeights(*(float(expected[f"cost_{term}_weight"]) for term in ("class", "mask", "dice")))
    probability = class_probabilities(logits, classes)
    cost = match_costs(probability[None], masks[None], targets[None], labels[None], weights)[0]
    assert relative(cost, expected["cost"]) < 1e-5
    query, target = assign(cost.numpy())
    assert query.tolist() == expected["matched_query"].tolist()
    assert target.tolist() == expected["matched_target"].tolist()

    matched = masks[query].requires_grad_()
    bce, dice = (each.sum() / float(expected["num_masks"]) for each in point_losses(matched, targets[target]))
    (bce + dice).backward()
    assert bce.item() == pytest.approx(expected["loss_mask"].item(), rel=1e-5)
    assert dice.item() == pytest.approx(expected["loss_dice"].item(), rel=1e-5)
    assert relative(matched.grad, expected["grad_of_mask_plus_dice"]) < 1e-4

    assigned = torch.full((len(logits),), classes)
    assigned[query] = labels[target]
    loss = classification_loss(logits[None], assigned[None], float(expected["no_object_weight"]))
    assert loss.item() == pytest.approx(expected["loss_ce"].item(), rel=1e-5)
