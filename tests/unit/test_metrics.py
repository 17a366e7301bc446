"""Scores against loops over pixels and against hand-made matrices."""

from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common.comparison import head_and_tail
from common.config import EvalConfig
from common.metrics import CONVENTIONS, ConfusionMatrix, confusion_matrix, group_scores, mean_iou, scores


def counted_by_a_loop(pred, label, k):
    matrix = np.zeros((k, k), np.int64)
    for p, t in zip(pred.flatten().tolist(), label.flatten().tolist(), strict=True):
        if t != -1:
            matrix[t, p] += 1
    return matrix


@pytest.mark.parametrize("pred_type", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("label_type", [torch.int16, torch.int64])
@pytest.mark.parametrize("k", [2, 19, 180, 181, 847])  # 180 classes still fit 16-bit bins
def test_confusion_matrix_counts_like_a_loop(k, pred_type, label_type):
    if k > 256 and pred_type == torch.uint8:
        pytest.skip("uint8 cannot hold these classes")
    pred = torch.randint(k, (3, 17, 23))
    label = torch.randint(-1, k, (3, 17, 23))
    pred[0, 0, :2], label[0, 0, :2] = k - 1, torch.tensor([k - 1, -1])
    matrix = confusion_matrix(pred.to(pred_type), label.to(label_type), k)
    assert matrix.dtype == torch.int64
    np.testing.assert_array_equal(matrix, counted_by_a_loop(pred, label, k))


def test_confusion_matrix_of_uint8_labels_strided_inputs_and_no_pixels():
    pred, label = torch.randint(5, (8, 6)), torch.randint(5, (8, 6), dtype=torch.uint8)
    np.testing.assert_array_equal(confusion_matrix(pred.t(), label.t(), 5), counted_by_a_loop(pred, label, 5))
    np.testing.assert_array_equal(confusion_matrix(pred[::2, 1:], label[::2, 1:], 5).sum(), 20)
    assert confusion_matrix(pred[:0], label[:0], 5).sum() == 0
    assert confusion_matrix(pred, torch.full((8, 6), -1), 5).sum() == 0


@pytest.mark.parametrize(
    ("pred", "label", "message"),
    [
        ([0, 3], [0, 0], "prediction holds the class 3; 3 classes allow 0 to 2"),
        ([0, -1], [0, 0], "prediction holds the class -1"),
        ([0, 0], [0, 255], "label holds the class 255"),
        ([0, 0], [0, -2], "label holds the class -2"),
        ([0, 0], [0], "differ in shape"),
    ],
)
def test_values_outside_the_classes_are_refused(pred, label, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(pred), torch.tensor(label), 3)


# Class 2 is predicted but never true; class 3 is in neither.
#          IoU: 60/(80+70-60), 20/(30+30-20)
MATRIX = np.array([[60, 10, 10, 0], [10, 20, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
IOU = (60 / 90, 20 / 40)


@pytest.mark.parametrize(
    ("convention", "miou", "macc", "undefined"),
    [
        ("nan_mean", sum(IOU) / 3, (3 / 4 + 2 / 3) / 2, [3]),
        ("absent_zero", sum(IOU) / 4, (3 / 4 + 2 / 3) / 4, []),
        ("ltss", sum(IOU) / 3, (3 / 4 + 2 / 3) / 2, [2, 3]),
        ("detectron2", sum(IOU) / 2, (3 / 4 + 2 / 3) / 2, [2, 3]),
    ],
)
def test_conventions_differ_only_in_absent_classes(convention, miou, macc, undefined):
    got = scores(MATRIX, convention)
    assert got["convention"] == convention
    assert got["miou"] == pytest.approx(miou)
    assert got["macc"] == pytest.approx(macc)
    assert got["aacc"] == pytest.approx(80 / 110)
    assert got["fwiou"] == pytest.approx(80 / 110 * IOU[0] + 30 / 110 * IOU[1])
    assert np.flatnonzero(np.isnan(got["iou"])).tolist() == undefined
    assert got["iou"][:2] == pytest.approx(IOU)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_agree_when_every_class_occurs(convention):
    matrix = np.random.default_rng(0).integers(1, 100, (7, 7))
    iou = [matrix[c, c] / (matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]) for c in range(7)]
    got = scores(torch.from_numpy(matrix), convention)
    assert got["iou"] == pytest.approx(iou)
    assert got["miou"] == pytest.approx(np.mean(iou))
    assert mean_iou(matrix, [1, 5], convention) == pytest.approx((iou[1] + iou[5]) / 2)


def test_nothing_counted_gives_nan_without_a_warning():
    got = scores(np.zeros((3, 3), np.int64), "nan_mean")
    assert np.isnan([got["miou"], got["macc"], got["aacc"], got["fwiou"]]).all()
    assert np.isnan(mean_iou(np.zeros((3, 3), np.int64), [0, 1], "nan_mean"))


@pytest.mark.parametrize(
    ("convention", "tail"), [("nan_mean", 0.25), ("absent_zero", 0.25), ("ltss", 0.25), ("detectron2", 0.5)]
)
def test_a_tail_class_that_is_only_predicted_counts_in_the_tail_as_it_does_in_all(convention, tail):
    """And so do groups of the same classes, and the scores that runs are compared by."""
    matrix = np.array([[90, 0, 0, 10], [0, 50, 0, 0], [0, 0, 30, 0], [0, 0, 0, 0]])
    matrix[1, 1], matrix[1, 0] = 25, 25
    ids, groups = [1, 3], {"image": ["frequent", "rare", "frequent", "rare"]}
    assert mean_iou(matrix, ids, convention) == pytest.approx(tail)
    assert group_scores(matrix, groups, convention)["image"]["rare"] == pytest.approx(tail)
    assert head_and_tail(matrix, ids, convention)["miou_tail"] == pytest.approx(tail)
    assert mean_iou(matrix, range(4), convention) == pytest.approx(scores(matrix, convention)["miou"])


def test_group_scores_intersect_both_sets_with_the_group():
    groups = {"image": ["frequent", "rare", "rare", "rare"], "pixel": ["common"] * 4}
    means = group_scores(MATRIX, groups, "ltss")
    assert means["image"]["frequent"] == pytest.approx(IOU[0])
    assert means["image"]["rare"] == pytest.approx(IOU[1] / 2)
    assert np.isnan(means["image"]["common"])
    assert means["pixel"]["common"] == pytest.approx(sum(IOU) / 3)
    assert group_scores(MATRIX, groups, "detectron2")["image"]["rare"] == pytest.approx(IOU[1])
    assert group_scores(MATRIX, groups, "absent_zero")["image"]["rare"] == pytest.approx(IOU[1] / 3)


def test_the_config_offers_these_conventions():
    assert get_args(get_type_hints(EvalConfig)["convention"]) == CONVENTIONS


def test_wrong_groups_and_conventions_are_named():
    with pytest.raises(ValueError, match="image level: 3 groups for 4 classes"):
        group_scores(MATRIX, {"image": ["rare"] * 3}, "ltss")
    with pytest.raises(ValueError, match="'seldom' is not one of rare, common, frequent"):
        group_scores(MATRIX, {"image": ["rare"] * 3 + ["seldom"]}, "ltss")
    with pytest.raises(ValueError, match="'mmseg' is not one of nan_mean"):
        scores(MATRIX, "mmseg")


def images(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(4 + i, 9 - i) for i in range(count)]
    return [(torch.randint(6, s, generator=generator), torch.randint(-1, 6, s, generator=generator)) for s in shapes]


def _rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    matrix = ConfusionMatrix(6)
    for pred, label in images(5)[rank::world]:
        matrix.update(pred, label)
    first, second = matrix.reduce(), matrix.reduce()
    assert torch.equal(first, second), "reducing changed what the rank holds"
    torch.save(first, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_matrix_of_one_for_an_odd_image_count(tmp_path):
    # Forked, as nothing is imported again; the tensors are too small for the threads that a fork loses.
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="fork")
    alone = ConfusionMatrix(6)
    for pred, label in images(5):
        alone.update(pred, label)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone.reduce())
