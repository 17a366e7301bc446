"""Where an evaluation was wrong: which classes are taken for which, and on which images each class fares worst."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.evaluation.per_image import Matrices
from common.files import replacing
from common.metrics import Convention, class_counts, score_counts


def write_confusion(path: Path, matrix: np.ndarray, classes: Sequence[str]) -> None:
    """The confusion matrix (K, K) as CSV: pixels, a row for each true class, a column for each predicted one."""
    rows = [[name, *counts] for name, counts in zip(classes, matrix.tolist(), strict=True)]
    _write(path, ["true / predicted", *classes], rows)


def write_image_scores(
    path: Path, images: Matrices, classes: Sequence[str], convention: Convention
) -> None:
    """Scores of every image as CSV: labelled pixels, accuracy, mIoU, IoU of each class; empty where undefined."""
    counts = class_counts(images.matrices)
    got = score_counts(counts, convention)
    pixels = counts[:, 1].sum(1).astype(int)
    rows = []

    for i, name in enumerate(images.names):
        values = [got["aacc"][i], got["miou"][i], *got["iou"][i]]
        shown = ["" if np.isnan(value) else f"{value:.6f}" for value in values]
        rows.append([name, int(pixels[i]), *shown])

    _write(path, ["image", "pixels", "aAcc", "mIoU", *classes], rows)


def _write(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    with replacing(path) as draft:
        draft.write_text(text.getvalue(), encoding="utf-8")


def worst_images(matrices: np.ndarray, k: int, count: int) -> list[int]:
    """At most `count` of the images (N, K, K) that show class k, its lowest IoU first; of equal ones the more pixels
    wrong first. An image on which the class is only predicted is none of them."""
    hits, truth, predicted = class_counts(matrices)[..., k].T
    wrong = truth + predicted - 2 * hits
    union = truth + predicted - hits
    iou = np.divide(hits, union, out=np.zeros_like(hits), where=union > 0)

    order = np.lexsort((-wrong, iou))
    return [int(i) for i in order if truth[i] > 0][:count]


def words(matrix: np.ndarray, k: int, classes: Sequence[str], most: int = 2) -> str:
    """IoU of class k in an image (K, K), what its pixels were taken for, and what was taken for it."""
    hits, truth, predicted = class_counts(matrix)[:, k]
    iou = hits / (truth + predicted - hits)
    parts = [f"IoU {100 * iou:.1f} %"]

    for title, counts, total in (
        ("taken for", matrix[k], truth),
        ("mistaken for it:", matrix[:, k], predicted),
    ):
        others = [j for j in np.argsort(-counts) if j != k and counts[j] > 0][:most]
        if others:
            shares = [f"{classes[j]} {100 * counts[j] / total:.0f} %" for j in others]
            parts.append(f"{title} {', '.join(shares)}")

    return "; ".join(parts)
