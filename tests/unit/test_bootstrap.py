"""The paired bootstrap over images against a loop that scores every resample, scipy's, and a known spread."""

import numpy as np
import pytest
from scipy import stats

from common.comparison import bootstrap, head_and_tail, holm
from common.metrics import CONVENTIONS, class_counts, score_counts, scores

K, TAIL = 4, [2, 3]


def runs(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Matrices of two runs on the same images; class 3 is on few of them."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 60, (images, K))
    truth[:, 3] *= draw.uniform(size=images) < 0.3
    sides = []
    for quality in (0.75, 0.6):
        shares = draw.dirichlet(np.ones(K), (images, K)) * (1 - quality) + quality * np.eye(K)
        sides.append(np.round(truth[..., None] * shares).astype(int))
    return sides[0], sides[1]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_many_matrices_are_scored_as_one_by_one(convention):
    matrices = np.random.default_rng(0).integers(0, 3, (50, 5, 5))
    matrices[:20, 2] = 0
    matrices[:10, :, 2] = 0
    many = score_counts(class_counts(matrices), convention)
    for i, matrix in enumerate(matrices):
        for name, value in scores(matrix, convention).items():
            if name != "convention":
                np.testing.assert_array_equal(many[name][i], value)


@pytest.mark.parametrize("blocks", [None, [0, 0, 1, 1, 1, 2, 5, 5, 5, 6, 6, 6]])
def test_every_resample_is_scored_as_a_whole(blocks):
    """The same draws, image by image, in a loop."""
    ours, base = runs(12)
    overall, classes = bootstrap(ours, base, TAIL, blocks=blocks, resamples=700, seed=3)
    numbers = blocks or list(range(12))
    members = [[i for i in range(12) if numbers[i] == block] for block in sorted(set(numbers))]
    count, draw, changes = len(members), np.random.default_rng(3), []
    for size in (500, 200):
        for weights in draw.multinomial(count, np.full(count, 1 / count), size):
            chosen = [i for images, times in zip(members, weights, strict=True) for i in images * int(times)]
            sides = [head_and_tail(side[chosen].sum(0), TAIL) for side in (ours, base)]
            ious = [scores(side[chosen].sum(0), "nan_mean")["iou"] for side in (ours, base)]
            changes.append([*(sides[0][name] - sides[1][name] for name in overall), *(ious[0] - ious[1])])
    changes = np.array(changes)
    for i, difference in enumerate([*overall.values(), *classes]):
        values = changes[:, i][np.isfinite(changes[:, i])]
        assert difference.interval == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
        assert difference.n == count and difference.sd == pytest.approx(values.std())
        beyond = min((values <= 0).sum(), (values >= 0).sum())
        assert difference.p == pytest.approx(min(1, 2 * (beyond + 1) / (len(values) + 1)))
    whole = [head_and_tail(side.sum(0), TAIL) for side in (ours, base)]
    for name, difference in overall.items():
        assert difference.mean == pytest.approx(whole[0][name] - whole[1][name])


def test_the_interval_is_scipys():
    ours, base = runs(60, 1)

    def change(images):
        return head_and_tail(ours[images].sum(0), TAIL)["miou"] - head_and_tail(base[images].sum(0), TAIL)["miou"]

    found = stats.bootstrap(
        (np.arange(60),), change, vectorized=False, n_resamples=3000, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    got = bootstrap(ours, base, TAIL)[0]["miou"]
    assert got.interval == pytest.approx(tuple(found.confidence_interval), abs=3e-3)
    assert got.sd == pytest.approx(found.standard_error, rel=0.05) and got.p < 0.01


def test_blocks_of_equal_images_count_once():
    """Copies of an image say nothing new: in blocks the interval is that of single images, without it is narrower."""
    ours, base = runs(20, 2)
    copies = [np.repeat(side, 9, 0) for side in (ours, base)]
    single = bootstrap(ours, base, TAIL)[0]["miou_tail"]
    blocked = bootstrap(*copies, TAIL, blocks=np.repeat(np.arange(20), 9))[0]["miou_tail"]
    naive = bootstrap(*copies, TAIL)[0]["miou_tail"]
    assert blocked.interval == pytest.approx(single.interval) and blocked.n == 20
    assert naive.half_width == pytest.approx(single.half_width / 3, rel=0.1)


def test_equal_runs_do_not_differ():
    ours, _ = runs(10)
    overall, classes = bootstrap(ours, ours, TAIL, resamples=200)
    assert all(d.mean == 0 and d.interval == (0, 0) and d.p == 1 for d in (*overall.values(), *classes))


def test_what_cannot_be_resampled():
    ours, base = runs(6)
    absent = ours.copy()
    absent[:, 3] = absent[:, :, 3] = 0
    assert bootstrap(absent, absent, TAIL, resamples=10)[1][3].interval is None
    with pytest.raises(ValueError, match="not of the same images"):
        bootstrap(ours, base[1:], TAIL)
    with pytest.raises(ValueError, match="1 block of images cannot be resampled"):
        bootstrap(ours, base, TAIL, blocks=[0] * 6)


def test_many_classes_can_be_told_apart():
    """Each of 300 classes is better in every image: Holm's correction leaves the smallest p below the level."""
    classes = 300
    base = np.stack([np.diag(np.full(classes, 10 + image)) for image in range(6)])
    base += np.roll(base, 1, 2)
    ours = base + 9 * np.eye(classes, dtype=int)
    changes = bootstrap(ours, base, [0])[1]
    adjusted = holm({str(k): change.p for k, change in enumerate(changes)})
    assert all(change.mean > 0 for change in changes) and max(adjusted.values()) < 0.05
