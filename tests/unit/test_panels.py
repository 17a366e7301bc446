"""The pictures of a panel beside each other."""

import numpy as np
from PIL import Image

from common.engine.logging import side_by_side


def test_an_image_of_another_size_than_its_labels(tmp_path):
    """As `eval.short_edge` makes it: the network's input is larger or smaller."""
    for name, size in (("image", (144, 96)), ("truth", (96, 64)), ("prediction", (96, 64))):
        Image.fromarray(np.full((size[1], size[0], 3), 7, np.uint8)).save(tmp_path / f"a_{name}.png")
    assert side_by_side(tmp_path, "a").shape == (64, 3 * 96, 3)
