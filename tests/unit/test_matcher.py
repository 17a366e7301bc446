"""Matching of queries to classes, against brute force."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ltss_benchmark import matcher
from ltss_benchmark.matcher import Matcher, MatchWeights, assign, find_targets, queries_per_class

CLASSES = 6


def cheapest(cost: np.ndarray, columns: list[int]) -> float:
    """Lowest total cost of giving each of `columns` (targets, repeated or not) its own query, by trying all."""
    queries = range(len(cost))
    return min(sum(cost[q, t] for q, t in zip(chosen, columns, strict=True)) for chosen in
               itertools.permutations(queries, len(columns)))  # fmt: skip


def predictions(layers=3, queries=8, batch=2, seed=0):
    """Probabilities (L, B, Q, K), embeddings (L, B, Q, d), mask features (B, d, h, w) and label maps (B, 4h, 4w)."""
    generator = torch.Generator().manual_seed(seed)
    probability = torch.randn(layers, batch, queries, CLASSES + 1, generator=generator).softmax(-1)[..., :-1]
    embeddings = torch.randn(layers, batch, queries, 4, generator=generator)
    features = torch.randn(batch, 4, 5, 6, generator=generator)
    label = torch.randint(-1, 4, (batch, 20, 24), generator=generator).to(torch.int16)
    return probability, embeddings, features, label


def pairs(matches, layers, batch, queries) -> list[tuple[int, int, int, int]]:
    """(layer, image, query, class) of every match."""
    layer, rest = matches.place // (batch * queries), matches.place % (batch * queries)
    return list(zip(layer.tolist(), (rest // queries).tolist(), (rest % queries).tolist(), matches.label.tolist(),
                    strict=True))  # fmt: skip


def test_targets_are_the_classes_present():
    label = torch.full((3, 4, 5), -1, dtype=torch.int16)
    label[0, 0, 0], label[0, 3], label[2] = 5, 2, 0
    targets = find_targets(label, CLASSES)
    assert targets.classes == [[2, 5], [], [0]]
    assert targets.padded.tolist() == [[2, 5], [-1, -1], [0, -1]]
    assert targets.number == 3


@pytest.mark.parametrize(("queries", "targets"), [(5, 3), (3, 3), (6, 1)])
def test_assignment_is_the_cheapest(queries, targets):
    cost = np.random.default_rng(queries).normal(size=(queries, targets))
    query, target = assign(cost)
    assert sorted(target) == list(range(targets)) and len(set(query)) == targets
    assert cost[query, target].sum() == pytest.approx(cheapest(cost, list(range(targets))))


def test_copies_get_the_cheapest_queries_together():
    cost = np.random.default_rng(3).normal(size=(6, 3))
    query, target = assign(cost, [2, 1, 2])
    assert sorted(target) == [0, 0, 1, 2, 2] and len(set(query)) == 5
    assert cost[query, target].sum() == pytest.approx(cheapest(cost, [0, 0, 1, 2, 2]))


def test_frequency_matcher_by_hand():
    """Five queries, two targets that ask for two and one: a gets queries 0 and 3, b gets 1."""
    cost = np.array([[0.1, 0.9], [0.3, 0.2], [0.8, 0.7], [0.2, 0.25], [0.9, 0.8]])
    query, target = assign(cost, [2, 1])
    assert {(q, "ab"[t]) for q, t in zip(query, target, strict=True)} == {(0, "a"), (1, "b"), (3, "a")}


def test_more_copies_than_queries_leave_no_target_out():
    cost = np.random.default_rng(4).normal(size=(5, 3))
    cost[:, 0] -= 100  # the release would give this target all five queries
    query, target = assign(cost, [5, 1, 4])
    assert sorted(query) == list(range(5))
    assert np.bincount(target).tolist() == [2, 1, 2]


def test_more_targets_than_queries_serves_the_cheapest():
    cost = np.random.default_rng(5).normal(size=(2, 4))
    query, target = assign(cost)
    best = min(cost[0, a] + cost[1, b] for a, b in itertools.permutations(range(4), 2))
    assert len(query) == 2 and cost[query, target].sum() == pytest.approx(best)
    assert len(assign(cost, [1, 3, 1, 2])[0]) == 2


def test_queries_per_class():
    frequency = [0.5, 0.0012, 0.0003, 1e-5, 0.0]
    expected = [1, 2, 4, 22, 1]  # ⌈2 √(T/f)⌉ with √ of 0.0024, 1, 4, 120; a class never seen asks for one
    assert queries_per_class(frequency, threshold=0.0012).tolist() == expected
    assert queries_per_class([0.0012 / 4.0001], 0.0012, scale=1.0).tolist() == [3]


def test_costs_equal_the_dense_definition():
    """Every pair's cost from full masks, sampled at the same points by torch's own grid_sample."""
    probability, embeddings, features, label = predictions(layers=3)
    points = torch.rand(3, 2, 50, 2)
    targets = find_targets(label, CLASSES)
    weights = MatchWeights(2.0, 5.0, 3.0)
    ours = Matcher(weights, points=50)._costs(probability, embeddings, points, features, targets)
    for layer, (image, classes) in itertools.product(range(3), enumerate(targets.classes)):
        grid = 2 * points[layer, image, None, :, None] - 1
        for q, (t, k) in itertools.product(range(8), enumerate(classes)):
            mask = torch.einsum("d,dhw->hw", embeddings[layer, image, q], features[image])
            x = F.grid_sample(mask[None, None], grid, align_corners=False).flatten()
            y = F.grid_sample((label[image] == k).float()[None, None], grid, align_corners=False).flatten()
            bce = F.binary_cross_entropy_with_logits(x, y)
            dice = 1 - (2 * (x.sigmoid() * y).sum() + 1) / (x.sigmoid().sum() + y.sum() + 1)
            expected = -2 * probability[layer, image, q, k] + 5 * bce + 3 * dice
            torch.testing.assert_close(ours[layer, image, q, t], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 1000, 1 << 22])
def test_layers_matched_together_are_matched_alike(monkeypatch, limit):
    """With the points that each layer would draw after the other, whatever their number at once."""
    probability, embeddings, features, label = predictions(layers=5)
    targets = find_targets(label, CLASSES)
    monkeypatch.setitem(matcher.AT_ONCE, "cpu", limit)
    torch.manual_seed(3)
    found = Matcher(points=64)(probability, embeddings, features, targets)
    torch.manual_seed(3)
    single = zip(probability.split(1), embeddings.split(1), strict=True)
    alone = [Matcher(points=64)(p, e, features, targets) for p, e in single]
    expected = [(la, im, q, k) for la, each in enumerate(alone) for _, im, q, k in pairs(each, 1, 2, 8)]
    assert sorted(pairs(found, 5, 2, 8)) == sorted(expected)


@pytest.mark.parametrize("copies", [None, np.array([1, 2, 1, 3, 1, 1])])
def test_permuted_queries_are_matched_alike(copies):
    probability, embeddings, features, label = predictions()
    targets, order = find_targets(label, CLASSES), torch.randperm(8)
    matcher = Matcher(points=64, copies=copies)
    torch.manual_seed(7)
    first = pairs(matcher(probability, embeddings, features, targets), 3, 2, 8)
    torch.manual_seed(7)
    second = matcher(probability[:, :, order], embeddings[:, :, order], features, targets)
    assert sorted(first) == sorted((la, im, int(order[q]), k) for la, im, q, k in pairs(second, 3, 2, 8))
    asked = sum(1 if copies is None else int(copies[k]) for classes in targets.classes for k in classes)
    assert len(first) == 3 * asked


def test_all_layers_share_one_host_copy(monkeypatch):
    probability, embeddings, features, label = predictions(layers=5)
    targets, copies = find_targets(label, CLASSES), []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or original(self))
    matches = Matcher(points=16)(probability, embeddings, features, targets)
    assert copies == [(5, 2, 8, 4)] and matches.per_layer == [4, 4]


def test_images_without_a_class():
    probability, embeddings, features, label = predictions()
    label[0] = -1
    matches = Matcher(points=16)(probability, embeddings, features, find_targets(label, CLASSES))
    assert matches.per_layer == [0, 4] and {image for _, image, _, _ in pairs(matches, 3, 2, 8)} == {1}
    matches = Matcher(points=16)(probability, embeddings, features, find_targets(torch.full_like(label, -1), CLASSES))
    assert matches.per_layer == [0, 0] and len(matches.place) == len(matches.label) == 0


def test_costs_that_are_not_numbers_are_an_error():
    probability, embeddings, features, label = predictions()
    embeddings[1, 0, 2] = float("nan")
    with pytest.raises(ValueError, match="image 0, prediction 1 is not finite.*learning rate"):
        Matcher(points=16)(probability, embeddings, features, find_targets(label, CLASSES))
