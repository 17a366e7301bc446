"""A class without a pixel in the training labels changes no factor of another class, in any remedy that counts."""

import numpy as np
import pytest
import torch

from common.data.statistics import image_factors
from common.losses.build import LOSSES
from common.losses.counts import Counts
from common.losses.seesaw import SeesawLoss
from ltss_benchmark.matcher import queries_per_class

COUNTED = [name for name, row in LOSSES.items() if row.slot in ("logits", "class_weight")]


@pytest.mark.parametrize("name", COUNTED)
def test_losses(name):
    row = LOSSES[name]
    make = getattr(row.remedy, "from_section", lambda options, where: row.remedy(**options))
    remedy = make(dict(row.fixed), name)
    pixels, images = torch.tensor([900.0, 40.0, 3.0, 57.0]).double(), torch.tensor([9.0, 4.0, 1.0, 7.0]).double()
    wider = (torch.cat((x[:2], torch.zeros(1).double(), x[2:])) for x in (pixels, images))
    expected = remedy.vector(Counts(pixels, images, 9.0))
    found = remedy.vector(Counts(*wider, 9.0))
    torch.testing.assert_close(found[[0, 1, 3, 4]], expected)
    assert found[2].isfinite()


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
