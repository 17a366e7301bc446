"""Repeat factors and Gini coefficients against reference outputs."""

from pathlib import Path

import numpy as np
import pytest

from common.data.imbalance import gini
from common.data.statistics import image_factors

REFERENCE = np.load(Path(__file__).parent / "data" / "op_repeat_factors_gini.npz")


@pytest.mark.parametrize("level", ["image", "pixel"])
@pytest.mark.parametrize("mode", ["max", "mean", "sum"])
def test_repeat_factors(level, mode):
    presence, area = REFERENCE["presence"], REFERENCE["area_fraction"]
    frequency = (presence if level == "image" else area).mean(0)
    factors = image_factors(presence, frequency, float(REFERENCE[f"threshold_{level}"]), mode)
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors, REFERENCE[f"{level}_{mode}"], rtol=1e-6)


def test_gini():
    assert gini(REFERENCE["presence"].sum(0)) == pytest.approx(float(REFERENCE["gini_image"]), abs=1e-7)
    assert gini(REFERENCE["area_fraction"].sum(0)) == pytest.approx(float(REFERENCE["gini_pixel"]), abs=1e-7)
