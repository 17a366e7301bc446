"""Sampling maps and label maps at points, as PointRend (CVPR 2020) and Mask2Former (CVPR 2022) train their masks.

A point (x, y) lies in [0, 1]² of its map, whatever the map's size; pixel centres are at (i + ½) / size and what lies
outside counts as 0, so the same points can be read from logits at stride 4 and from labels at full size.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values (N, C, P) of maps (N, C, H, W) at points (N, P, 2); half-precision maps are read in float32."""
    kind = torch.promote_types(maps.dtype, points.dtype)
    grid = (2 * points - 1).unsqueeze(2).to(kind)
    return F.grid_sample(
        maps.to(kind), grid, padding_mode="zeros", align_corners=False
    ).squeeze(3)


def uncertain_points(
    logits: Tensor,
    count: int,
    *,
    oversample: float = 3.0,
    importance: float = 0.75,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Points (N, count, 2) where masks are least decided (PointRend, section 3.1).

    Of `oversample` · count uniform points the `importance` · count with the smallest |logit| are kept; the rest are
    fresh uniform points. Without gradient; draws from torch's global generator.

    Args:
        logits: (N, h, w), one map for each row of points.
        count: points a map.
        groups: numbers of rows, N in all, as if this were called for one group after the other; default: one of all.
    """
    logits = logits.detach().unsqueeze(1)
    kept = int(importance * count)
    rows = [len(logits)] if groups is None else groups
    numbers = int(oversample * count), count - kept
    candidates, fresh = drawn_in_turn(rows, numbers, logits.device)
    distance = point_sample(logits, candidates).squeeze(1).float().abs_()
    best = distance.topk(kept, dim=1, largest=False, sorted=False).indices
    chosen = candidates.gather(1, best.unsqueeze(2).expand(-1, -1, 2))

    return torch.cat([chosen, fresh], 1)


def drawn_in_turn(
    rows: Sequence[int], numbers: Sequence[int], device: torch.device
) -> Iterator[Tensor]:
    """Uniform points (N, number, 2) for each of `numbers`, N the sum of `rows`: those of the first rows come before
    those of the next. They are one draw, which on the CPU gives what a draw for each of them would."""
    sizes = [2 * n * number for n in rows for number in numbers]
    values = torch.rand(sum(sizes), device=device).split(sizes)

    for i, number in enumerate(numbers):
        parts = [
            part.view(n, number, 2)
            for part, n in zip(values[i :: len(numbers)], rows, strict=True)
        ]
        yield parts[0] if len(parts) == 1 else torch.cat(parts)


def class_masks(
    label: Tensor, points: Tensor, classes: Tensor, image: Tensor | None = None
) -> Tensor:
    """Bilinear samples (N, T, P) of the binary masks of `classes`, read from label maps without making a mask.

    The sample of class k is Σ over a point's four neighbours of bilinear weight · [label = k].

    Args:
        label: (B, H, W) integers, negative where ignored.
        points: (N, P, 2).
        classes: (N, T) the classes asked for at row n's points.
        image: (N,) the label map of each row; default: row n reads map n.
    """
    height, width = label.shape[-2:]
    if image is None:
        image = torch.arange(len(points), device=label.device)

    x = points[..., 0] * width - 0.5
    y = points[..., 1] * height - 0.5
    left = x.floor()
    top = y.floor()
    x = x - left
    y = y - top
    left = left.int()
    top = top.int()
    first = (image * height).int()[:, None]
    classes = classes.to(label.dtype).unsqueeze(2)
    masks = torch.zeros(len(points), classes.shape[1], points.shape[1], device=points.device)

    for row, weight_y in ((top, 1 - y), (top + 1, y)):
        for column, weight_x in ((left, 1 - x), (left + 1, x)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = (first + row.clamp(0, height - 1)) * width + column.clamp(0, width - 1)
            corner = label.reshape(-1).index_select(0, index.view(-1)).view_as(index)
            weight = (weight_x * weight_y).masked_fill_(~inside, 0)
            masks += (corner.unsqueeze(1) == classes) * weight.unsqueeze(1)

    return masks
