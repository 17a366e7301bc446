"""Colour statistics of the reference images are computed once for all loader processes."""

import pytest
import torch

from common.data import toy
from common.data.colour_transfer import colour_statistics, rgb_to_lab
from common.data.recipes.cpsl import CPSLViews


@pytest.fixture
def recipe(tmp_path):
    root = toy.make("cityscapes", tmp_path, train=2, size=(32, 64))
    return CPSLViews(colour_from={"dataset": "cityscapes", "root": str(root)})


def compute(recipe, index):
    """As in a loader process: after a fork several threads would wait for ever."""
    torch.set_num_threads(1)
    recipe._reference_colours(index)


def test_what_one_process_computes_all_know(recipe):
    assert recipe._colours.isnan().all()
    process = torch.multiprocessing.get_context("fork").Process(target=compute, args=(recipe, 1))
    process.start()
    process.join()
    expected = colour_statistics(rgb_to_lab(recipe.reference.open(1)["image"].pixels()))
    assert recipe._colours[0].isnan().all()
    torch.testing.assert_close(recipe._colours[1], torch.stack(expected), rtol=0, atol=0)


def test_statistics_are_read_from_the_table(recipe):
    recipe._colours[0] = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    mean, std = recipe._reference_colours(0)
    assert mean.tolist() == [1, 2, 3] and std.tolist() == [4, 5, 6]
