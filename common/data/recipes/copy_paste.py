"""Copy-Paste for long-tailed semantic segmentation (LTSS, TMM 2024): class regions of a second crop over a first."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from common.data.labels import IGNORE


def choose_random(present: Sequence[int], maximum: int, rng: np.random.Generator) -> list[int]:
    """n of the T classes that a crop shows, in random order; n is uniform in 0 … min(maximum, T) − 1, never all."""
    limit = min(maximum, len(present))
    count = int(rng.integers(limit)) if limit else 0
    return [int(k) for k in rng.choice(present, count, replace=False)] if count else []


def choose_rare(present: Sequence[int], rare: Sequence[int]) -> list[int]:
    """All of the rare classes that a crop shows."""
    return [k for k in present if k in set(rare)]


def classes_of(label: torch.Tensor) -> list[int]:
    """The classes of a label (H, W), ascending, without IGNORE."""
    return (
        torch.nonzero(torch.bincount((label.flatten() - IGNORE).long())[1:]).flatten().tolist()
    )


def paste(
    target: Mapping[str, Any],
    source: Mapping[str, Any],
    classes: Sequence[int],
    spared: Sequence[int] = (),
) -> dict[str, Any]:
    """`target` with all pixels of `classes` of `source` copied over it, unblended: the image (3, H, W), the label
    (H, W) and every further map (…, H, W) of both samples. Pixels of the source without a class are never copied, those
    of the classes `spared` in the target never covered."""
    if not classes:
        return dict(target)

    label = source["label"]
    size = label.shape
    chosen = torch.isin(label, torch.tensor(classes, dtype=label.dtype))
    if spared:
        chosen &= ~torch.isin(target["label"], torch.tensor(spared, dtype=label.dtype))

    def pasted(key: str, value: Any) -> Any:
        other = source.get(key)
        fits = (
            isinstance(value, torch.Tensor)
            and isinstance(other, torch.Tensor)
            and value.shape == other.shape
        )
        return torch.where(chosen, other, value) if fits and value.shape[-2:] == size else value

    return {key: pasted(key, value) for key, value in target.items()}
