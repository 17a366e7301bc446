"""The LTSS evaluator's reference outputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.metrics import ConfusionMatrix, group_scores, scores


@pytest.fixture(scope="module")
def reference() -> dict:
    return dict(np.load(Path(__file__).parent / "data" / "op_longtail_metrics.npz"))


def test_every_metric_of_the_ltss_evaluator(reference):
    expected = json.loads(str(reference["results"]))
    truth = reference["ground_truth"].astype(np.int16)
    truth[truth == int(reference["ignore_label"])] = -1
    k = len(reference["image_group"])
    matrix = ConfusionMatrix(k)
    for label, pred in zip(truth, reference["prediction"], strict=True):
        matrix.update(torch.from_numpy(pred), torch.from_numpy(label))

    got = scores(matrix.reduce(), "ltss")
    groups = {"image": reference["image_group"], "pixel": reference["pixel_group"]}
    means = group_scores(matrix.reduce(), groups, "ltss")
    ours = {"mIoU": got["miou"], "fwIoU": got["fwiou"], "mACC": got["macc"], "pACC": got["aacc"]}
    for c in range(k):
        ours |= {f"IoU-c{c}": got["iou"][c], f"ACC-c{c}": got["acc"][c]}
    ours = {name: 100 * value for name, value in ours.items()}  # the reference gives these in percent,
    for level in means:  # and the groups as fractions
        ours |= {f"mIoU-{level}@{group[0]}": value for group, value in means[level].items()}

    assert ours.keys() == expected.keys()
    np.testing.assert_allclose([ours[name] for name in expected], list(expected.values()), rtol=1e-12)
