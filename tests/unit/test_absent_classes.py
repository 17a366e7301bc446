"""A class without a pixel in the training labels changes no factor of another class, in any remedy that counts."""

import numpy as np
import pytest
import torch

from common.data.statistics import image_factors
from common.losses.seesaw import SeesawLoss
from ltss_benchmark.matcher import queries_per_class


@pytest.mark.parametrize("mode", ["max", "mean", "sum"])
def test_repeat_factors(mode):
    presence = np.random.default_rng(0).random((40, 5)) < (0.9, 0.5, 0.2, 0.1, 0.05)
    frequency = presence.mean(0)
    wider = np.insert(presence, 2, False, axis=1)
    expected = image_factors(presence, frequency, 0.4, mode)
    np.testing.assert_array_equal(image_factors(wider, np.insert(frequency, 2, 0.0), 0.4, mode), expected)


def test_queries_of_the_matcher():
    frequency = [0.9, 0.02, 0.3]
    queries = queries_per_class(frequency, 0.1)
    assert queries_per_class([0.0, *frequency], 0.1).tolist() == [1, *queries]


def test_seesaw():
    """Its factors are made of pairs of counts: an absent class, which is never scored, leaves the loss as it is."""
    logits, labels = torch.randn(2, 30, 4 + 2), torch.randint(0, 5, (2, 30))  # 4 is no object
    narrow, wide = SeesawLoss(4), SeesawLoss(5)
    absent = torch.full((2, 30, 1), -1e4)
    wider = torch.cat((logits[..., :1], absent, logits[..., 1:]), -1)
    shifted = torch.where(labels > 0, labels + 1, labels)
    torch.testing.assert_close(wide(wider, shifted), narrow(logits, labels))
    assert wide.counts.tolist() == np.insert(narrow.counts.numpy(), 1, 0).tolist()
