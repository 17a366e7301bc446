"""Implementations of other packages in the benchmark of the attention."""

import pytest

from tests.unit.test_benchmark import bench

THEIRS = """
import torch

class Attention:
    @staticmethod
    def apply(value, sizes, starts, locations, weights, images_at_once):
        total = 0
        for level, ((h, w), start) in enumerate(zip(sizes.tolist(), starts.tolist())):
            maps = value[:, start : start + h * w].permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (h, w))
            grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
            found = torch.nn.functional.grid_sample(maps, grid, align_corners=False)
            share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
            total = total + (found * share).sum(-1)
        batch, heads = value.shape[0], value.shape[2]
        return total.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2).contiguous()

def wrong(*arguments):
    return 2 * Attention.apply(*arguments)
"""


def test_other_implementations_of_the_attention_have_rows(tmp_path, monkeypatch):
    """Of any package, once they give the same numbers."""
    (tmp_path / "their_attention.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("ltss", "--only", "operation", "--batch", 2, "--other")
    [row] = bench(*words, "their_attention:Attention.apply", tmp_path / "a.json")
    assert "their_attention:Attention.apply" in row["ms"]
    assert row["check"]["their_attention:Attention.apply, relative"] <= 1e-4
    with pytest.raises(ValueError, match="their_attention:wrong: the forms differ"):
        bench(*words, "their_attention:wrong", tmp_path / "b.json")
    for place in ("their_attention:nothing", "no_such_package:f", "their_attention"):
        with pytest.raises(ValueError, match=f"--other {place}: .*give MODULE:FUNCTION of an installed package"):
            bench(*words, place, tmp_path / "c.json")
    with pytest.raises(ValueError, match="--other: of `operation`, and --only is host"):
        bench("ltss", "--only", "host", "--other", "their_attention:wrong", tmp_path / "d.json")
