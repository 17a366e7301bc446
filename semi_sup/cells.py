"""Between the stride-8 cells that are clustered and the pixels that are labelled.

A cell's place follows from how features come about: padding to a multiple of 8 at the bottom and right, resizing with
aligned corners. So of n cells along a side, cell i lies on pixel i·(8n − 1)/(n − 1) of the padded image. The release
instead resized labels to the grid and back by the nearest rule, as if there were no padding: along every border pixels
then have a subclass of another class. Here a pixel gets the subclass of the nearest cell of its own class.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt

from common.data import IGNORE
from common.data.geometry import nearest_index
from semi_sup.features import STRIDE

VOID = 255


def cell_pixels(size: int, cells: int) -> np.ndarray:
    """The pixel under each cell along a side of `size` pixels, int64 (cells,); −1 in the padding."""
    at = np.rint(np.arange(cells) * ((STRIDE * cells - 1) / max(cells - 1, 1))).astype(np.int64)
    return np.where(at < size, at, -1)


def pixel_cells(size: int, cells: int) -> np.ndarray:
    """The nearest cell of each pixel along a side, int64 (size,)."""
    return np.rint(np.arange(size) * ((cells - 1) / (STRIDE * cells - 1))).astype(np.int64)


def cell_classes(label: np.ndarray, grid: tuple[int, int], release: bool = False) -> np.ndarray:
    """Class of each cell, int16 (h, w), of a label (H, W); IGNORE in void and padding."""
    if release:
        rows, columns = (
            nearest_index(n, size, 0, n) for n, size in zip(grid, label.shape, strict=True)
        )
        return label[np.ix_(rows, columns)]

    rows, columns = (cell_pixels(size, n) for n, size in zip(grid, label.shape, strict=True))
    classes = label[np.ix_(rows, columns)]
    classes[rows < 0] = IGNORE
    classes[:, columns < 0] = IGNORE

    return classes


def pixel_subclasses(
    label: np.ndarray,
    cells: np.ndarray,
    subclasses: np.ndarray,
    offsets: np.ndarray,
    features,
    centres: dict,
) -> np.ndarray:
    """Subclass of every pixel, uint8 (H, W), 255 where `label` (H, W) is void.

    cells, subclasses: class and subclass of each cell, (h, w); offsets: first subclass of each class (C,). A pixel
    takes the subclass of the nearest cell of its class. Where the image has no such cell, its nearest cell's features
    (h, w, D) decide among the cluster centres of the class, (k, D) in `centres`; a class without centres is whole.
    """
    out = np.full(label.shape, VOID, np.uint8)
    to_cell = [pixel_cells(size, n) for size, n in zip(label.shape, cells.shape, strict=True)]

    for c in np.unique(label[label != IGNORE]):
        at = np.nonzero(label == c)
        if c not in centres:
            out[at] = offsets[c]
            continue

        own = cells == c
        where = tuple(index[position] for index, position in zip(to_cell, at, strict=True))
        if own.any():
            nearest = distance_transform_edt(~own, return_distances=False, return_indices=True)
            out[at] = subclasses[tuple(nearest)][where]
        else:
            x = features[where].astype(np.float32)
            distance = np.square(centres[c]).sum(1) - 2 * x @ centres[c].T
            out[at] = offsets[c] + distance.argmin(1)

    return out


def blocky_subclasses(subclasses: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The release's form: cells (h, w) enlarged to `size` by the nearest rule, whatever the class of a pixel is."""
    rows, columns = (
        nearest_index(s, n, 0, s) for s, n in zip(size, subclasses.shape, strict=True)
    )
    values = subclasses[np.ix_(rows, columns)]
    return np.where(values == IGNORE, VOID, values).astype(np.uint8)
