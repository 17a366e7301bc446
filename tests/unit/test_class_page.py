"""The page of class statistics: its numbers are those of the counts."""

import re

import numpy as np
import pytest

from common.data.imbalance import gini
from common.report.class_page import class_page

NAMES = ["road", "a & b", "pole", "never"]
PIXELS = np.array([[900, 50, 0, 0], [800, 0, 3, 0], [700, 40, 1, 0], [600, 0, 0, 0]])


@pytest.fixture
def page() -> str:
    presence = PIXELS > 0
    pixels, images = PIXELS.sum(0), presence.sum(0)
    classes = [
        {
            "id": k, "name": name, "images": int(images[k]), "pixels": int(pixels[k]), "tail": name == "pole",
            "share": float(pixels[k] / pixels.sum()), "groups": {"image": "rare"}, "blv_weight": 0.25 * k,
        }
        for k, name in enumerate(NAMES)
    ]  # fmt: skip
    result = {
        "dataset": "made <up>", "root": "here", "split": "train", "images": 4, "labelled_pixels": int(pixels.sum()),
        "ignored_pixels": 0, "gini": {"pixel": gini(pixels), "image": gini(images)}, "warnings": [], "classes": classes,
    }  # fmt: skip
    return class_page(result, presence)


def test_bars_tell_the_shares(page):
    for text in ("road: 97 % of the pixels", "road: 100 % of the images", "a &amp; b: 50 % of the images"):
        assert f"<title>{text}</title>" in page
    assert "never: " not in page and "1 of them never labelled" in page and "Never labelled: never." in page


def test_what_occurs_together_is_counted_by_image(page):
    """Of two images with a pole one shows `a & b`; of two with `a & b` one shows a pole."""
    assert "of pole, a &amp; b: 50.00 %" in page and "of a &amp; b, pole: 50.00 %" in page
    assert "of pole, road: 100.00 %" in page and "of road, pole: 50.00 %" in page and ", never:" not in page


def test_the_area_below_the_diagonal_is_half_of_gini(page):
    line = re.search(r'<polyline class="r0" points="([^"]*)"', page)[1]
    x, y = np.array([[float(v) for v in point.split(",")] for point in line.split()]).T
    across = (x - x[0]) / (x[-1] - x[0])
    up = (y[0] - y) / (y[0] - y[-1])
    below = 0.5 - np.sum((up[1:] + up[:-1]) / 2 * np.diff(across))
    assert 2 * below == pytest.approx(gini(PIXELS.sum(0)), abs=1e-3)


def test_the_page_needs_no_other_file_and_names_are_escaped(page):
    assert not re.search(r"(src|href)=\"?https?:", page)
    assert "<h1>Classes of made &lt;up&gt;, train</h1>" in page
