"""Balanced k-means against exact assignments: linear programming on copies of the clusters, and another library."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from common.ops.balanced_assignment import TIGHT, Matrix, equalise, exact_labels
from common.ops.balanced_kmeans import balanced_kmeans

ROOT = Path(__file__).parents[2]
SHAPES = [(300, 7, 8), (200, 20, 3), (120, 50, 4), (500, 5, 2), (101, 100, 3), (40, 40, 2), (9, 1, 2)]  # n, k, d


def features(kind: str, n: int, d: int, seed: int) -> np.ndarray:
    """Float32 (n,d): normal ones, a mixture of very different weights after a ReLU, or that in whole numbers (ties)."""
    draw = np.random.default_rng(seed)
    if kind == "normal":
        return draw.standard_normal((n, d)).astype(np.float32)
    component = draw.choice(30, n, p=draw.dirichlet(np.full(30, 0.3)))
    spread = draw.gamma(2, 0.3, (30, 1))[component]
    x = 2 * draw.standard_normal((30, d))[component] + 0.5 * draw.standard_normal((n, 1))
    x = np.maximum(x + spread * draw.standard_normal((n, d)), 0).astype(np.float32)
    return np.round(x / 2) if kind == "ties" else x


def distances(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((x[:, None].astype(np.float64) - centres[None]) ** 2).sum(2)


def exact_assignment(cost: np.ndarray) -> np.ndarray:
    """Least cost with sizes ⌊n/k⌋..⌈n/k⌉: every cluster ⌈n/k⌉ times; dummy points may take one copy of each."""
    n, k = cost.shape
    most = -(-n // k)
    dummies = np.zeros((k * most - n, k * most))
    dummies[:, np.arange(k * most) % most < n // k] = 1e6 * (cost.max() + 1)
    return linear_sum_assignment(np.vstack([np.repeat(cost, most, 1), dummies]))[1][:n] // most


def objective(x: np.ndarray, labels: np.ndarray) -> float:
    return sum(((x[labels == j].astype(np.float64) - x[labels == j].mean(0)) ** 2).sum() for j in np.unique(labels))


def exact_kmeans(x: np.ndarray, centres: np.ndarray) -> float:
    """Objective of Lloyd's alternation with exact assignments, until they stop changing."""
    labels, previous = exact_assignment(distances(x, centres)), None
    while not np.array_equal(labels, previous):
        previous = labels
        centres = np.stack([x[labels == j].mean(0) for j in range(len(centres))])
        labels = exact_assignment(distances(x, centres))
    return objective(x, labels)


def start(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    return x[np.random.default_rng(seed).choice(len(x), k, replace=False)]


def balanced_assign(cost: torch.Tensor) -> torch.Tensor:
    """Assignment of the points of `cost` (n, k) to clusters of equal size, as each iteration of k-means makes it."""
    costs, k = Matrix(cost.float()), cost.shape[1]
    scan, prices = equalise(costs, torch.zeros(k), TIGHT, torch.Generator().manual_seed(0))
    return exact_labels(costs, scan, prices)


def assert_balanced(labels: torch.Tensor, k: int):
    sizes = torch.bincount(labels, minlength=k)
    assert len(sizes) == k and sizes.min() >= len(labels) // k and sizes.max() <= -(-len(labels) // k)


@pytest.mark.parametrize("kind", ["normal", "mixture", "ties"])
@pytest.mark.parametrize(("n", "k", "d"), SHAPES)
def test_assignment_is_exact(kind, n, k, d):
    for seed in range(2):
        x = features(kind, n, d, seed)
        cost = distances(x, start(x, k, seed)).astype(np.float32)
        labels = balanced_assign(torch.from_numpy(cost))
        assert_balanced(labels, k)
        least = cost[np.arange(n), exact_assignment(cost)].sum(dtype=np.float64)
        assert cost[np.arange(n), labels].sum(dtype=np.float64) == pytest.approx(least, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("kind", ["normal", "mixture"])
@pytest.mark.parametrize(("n", "k", "d"), [(300, 7, 8), (200, 20, 3), (120, 50, 4), (600, 13, 16)])
def test_objective_is_that_of_exact_assignments(kind, n, k, d):
    for seed in range(2):
        x = features(kind, n, d, seed)
        found = balanced_kmeans(x, k, centres=start(x, k, seed))
        assert_balanced(found.labels, k)
        assert found.objective == pytest.approx(objective(x, found.labels.numpy()), rel=1e-4)
        assert found.objective <= 1.02 * exact_kmeans(x, start(x, k, seed))
        means = np.stack([x[found.labels == j].mean(0) for j in range(k)])
        np.testing.assert_allclose(found.centres, means, rtol=1e-4, atol=1e-5)
        assert found.converged


@pytest.mark.parametrize(("kind", "n", "k"), [("normal", 20_000, 20), ("mixture", 30_001, 37), ("ties", 12_000, 20)])
def test_large_sets_have_exact_sizes_and_a_local_optimum(kind, n, k):
    x = features(kind, n, 12, 0)
    found = balanced_kmeans(x, k)
    assert_balanced(found.labels, k)
    assert found.objective == pytest.approx(objective(x, found.labels.numpy()), rel=1e-4)
    # no exchange of two points gains more than a trifle: checked for random pairs
    cost = distances(x, found.centres.double().numpy())
    first, second = np.random.default_rng(1).integers(n, size=(2, 200_000))
    a, b = found.labels.numpy()[first], found.labels.numpy()[second]
    gain = cost[first, a] + cost[second, b] - cost[first, b] - cost[second, a]
    assert gain.max() <= 0.05 * found.objective / n + (0 if kind != "ties" else np.inf)
    assert gain.clip(0).sum() <= 1e-4 * (cost[first, a] + cost[second, b]).sum() or kind == "ties"


@pytest.mark.parametrize("path", ["sample", "recomputed", "rows"])
def test_large_data_paths(path, tmp_path):
    """A memory map in half precision through the sample, without kept distances, and through row numbers."""
    x = features("mixture", 30_000, 16, 0).astype(np.float16)
    x.tofile(tmp_path / "x")
    data = np.memmap(tmp_path / "x", np.float16, "r", shape=x.shape)
    plain = balanced_kmeans(x, 12)
    if path == "rows":
        rows = np.flatnonzero(np.arange(len(x)) % 3 != 1)
        found, again = balanced_kmeans(data, 12, rows=rows), balanced_kmeans(x[rows], 12)
        assert torch.equal(found.labels, again.labels) and found.objective == again.objective
        return
    settings = {"sample": 8000} if path == "sample" else {"memory": 0}
    found = balanced_kmeans(data, 12, **settings)
    assert_balanced(found.labels, 12)
    assert found.objective == pytest.approx(plain.objective, rel=1e-3 if path == "recomputed" else 0.05)


def test_seed_decides():
    x = features("mixture", 6000, 8, 0)
    first, same, other = (balanced_kmeans(x, 9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.labels, same.labels) and torch.equal(first.centres, same.centres)
    assert not torch.equal(first.labels, other.labels)
    assert torch.equal(balanced_kmeans(torch.from_numpy(x), 9, seed=3).labels, first.labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda():
    x = features("mixture", 50_000, 32, 0)
    ours, cpu = balanced_kmeans(torch.from_numpy(x).cuda(), 20), balanced_kmeans(x, 20)
    assert_balanced(ours.labels, 20)
    assert ours.objective == pytest.approx(cpu.objective, rel=0.05)


def test_few_or_equal_points():
    assert balanced_kmeans(np.zeros((7, 3), np.float32), 3).labels.bincount().sort().values.tolist() == [2, 2, 3]
    assert balanced_kmeans(np.zeros((20_000, 3), np.float32), 7).labels.bincount().max() == 2858
    few = balanced_kmeans(np.eye(4, dtype=np.float32), 9)
    assert sorted(few.labels.tolist()) == [0, 1, 2, 3] and few.objective == pytest.approx(0, abs=1e-6)
    one = balanced_kmeans(np.eye(4, dtype=np.float32), 1)
    assert one.labels.tolist() == [0] * 4 and one.objective == pytest.approx(3)


def test_iterations_end():
    x = features("mixture", 3000, 8, 0)
    capped = balanced_kmeans(x, 20, max_iter=2)
    assert capped.iterations == 2 and not capped.converged
    assert_balanced(capped.labels, 20)


def test_input_that_cannot_work():
    x = np.ones((10, 2), np.float32)
    for k, data in [(0, x), (2, x[:0])]:
        with pytest.raises(ValueError, match="needs k ≥ 1 and at least one row"):
            balanced_kmeans(data, k)
    with pytest.raises(ValueError, match=r"initial centres have shape \(3, 2\), expected \(2, 2\)"):
        balanced_kmeans(x, 2, centres=x[:3])
    with pytest.raises(ValueError, match="NaN or infinity"):
        balanced_kmeans(np.where(x > 0, np.nan, x), 2)


@pytest.mark.slow
def test_against_another_library():
    """20,000 × 64 into 20, the same centres: the median of five objectives is at most 1 % higher."""
    library = pytest.importorskip("k_means_constrained")
    n, k, quality = 20_000, 20, []
    limits = {"size_min": n // k, "size_max": n // k, "n_init": 1, "max_iter": 20, "n_jobs": 1}
    for seed in range(5):
        x = features("mixture", n, 64, seed)
        centres = start(x, k, seed)
        ours = balanced_kmeans(x, k, centres=centres, max_iter=20)
        theirs = library.KMeansConstrained(k, init=centres.astype(np.float64), **limits).fit(x)
        quality.append(objective(x, ours.labels.numpy()) / objective(x, theirs.labels_))
    assert np.median(quality) <= 1.01


FULL_SIZE = """
import resource, sys
import numpy as np
from common.ops.balanced_kmeans import balanced_kmeans
data = np.memmap(sys.argv[1], np.float16, "r", shape=(1_000_000, 256))
found = balanced_kmeans(data, 121)
sizes = np.bincount(found.labels, minlength=121)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(sizes.min(), sizes.max(), found.converged, peak)
"""


@pytest.mark.slow
def test_full_size(tmp_path):
    """A million rows of 256 in half precision into 121: exact sizes, at most 4 GiB."""
    draw = np.random.default_rng(0)
    data = np.memmap(tmp_path / "x", np.float16, "w+", shape=(1_000_000, 256))
    means, weights = np.maximum(draw.standard_normal((200, 256)), 0), draw.dirichlet(np.full(200, 0.5))
    for begin in range(0, len(data), 50_000):
        noise = 0.3 * draw.standard_normal((50_000, 256), dtype=np.float32)
        data[begin : begin + 50_000] = np.maximum(means[draw.choice(200, 50_000, p=weights)] + noise, 0)
    data.flush()
    command = [sys.executable, "-c", FULL_SIZE, str(tmp_path / "x")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    least, most, converged, peak = done.stdout.split()
    assert (least, most, converged) == ("8264", "8265", "True")
    assert float(peak) <= 4
