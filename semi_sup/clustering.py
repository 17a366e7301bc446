"""Subclass labels from the baseline's features: `python clustering.py configs/voc_1over32_baseline.json`.

The cells of each class, over all labelled images together, become k_c groups; `balanced_kmeans` (the paper's) makes
them equally large, `normal_kmeans` is the ablation. Writes `<run>/label_subcls_<algorithm>/<image>.png` (8-bit, 255
void) and beside them `subclasses.json`: numbers of subclasses, cluster sizes, and of which images and features.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import cli, console
from common.config import Config, ConfigError, load_config
from common.data import IGNORE, SegmentationDataset, class_statistics
from common.files import replacing, write_json
from common.ops.balanced_kmeans import balanced_kmeans
from common.steps import digest_of
from semi_sup.cells import blocky_subclasses, cell_classes, pixel_subclasses
from semi_sup.config import NUMBERS, digest, labelled_source
from semi_sup.features import Features, adopt, grid, open_features
from semi_sup.subclasses import check_counts, chosen_counts, offsets, subclass_counts

ALGORITHMS = ("balanced_kmeans", "normal_kmeans")
SAMPLE = 2**18  # rows that ordinary k-means is fitted on


@dataclass(frozen=True)
class ClassReport:
    """What became of one class: labelled pixels, cells, subclasses, and the size of the clusters in cells."""

    name: str
    pixels: int
    cells: int
    subclasses: int
    smallest: int
    largest: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_config(parser)
    parser.add_argument(
        "-ca", "--clustering_algorithm", choices=ALGORITHMS, default=ALGORITHMS[0]
    )
    parser.add_argument(
        "--release-labels", action="store_true", help="blocky labels that ignore class borders"
    )
    parser.add_argument(
        "--allow-empty", action="store_true", help="accept classes without labelled pixels"
    )
    args = cli.parse(parser)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cfg = load_config(args.config, args.overrides)
    if cfg.train.threads is not None:
        torch.set_num_threads(cfg.train.threads)

    dataset = SegmentationDataset(labelled_source(cfg))
    folder = cfg.folder / "features"
    adopt(folder, dataset)
    features = open_features(folder, dataset.names)
    cache = Path(cfg.data.cache or Path(cfg.output) / ".cache")
    pixels = class_statistics(dataset, cfg.data.workers, cache).pixel_count
    counts = numbers(cfg, pixels)
    check_classes(pixels, dataset.row.classes, len(dataset), args.allow_empty)
    labels = Clustering(features, dataset, counts, args.release_labels)
    reports = labels.fit(args.clustering_algorithm, cfg.seed, args.device, pixels)
    print(table(reports))
    out = cfg.folder / f"label_subcls_{args.clustering_algorithm}"
    labels.write(out)
    record = {
        "counts": counts, "algorithm": args.clustering_algorithm, "seed": cfg.seed, "images": len(dataset),
        "list": digest(dataset.names), "release_labels": args.release_labels, "features": digest_of(folder),
        "classes": [asdict(report) for report in reports],
    }  # fmt: skip
    write_json(out / NUMBERS, record)
    print(f"{len(dataset)} subclass labels, K = {sum(counts)}, in {out}")


def numbers(cfg: Config, pixels: np.ndarray) -> tuple[int, ...]:
    """Subclasses of each class: those that the config gives, or by the labelled pixels (C,)."""
    choice = cfg.method.get("subclasses", "rule")
    where = f"{cfg.name}: method: subclasses"
    if choice != "rule":
        return chosen_counts(choice, cfg.model.num_classes, where)

    try:
        return check_counts(subclass_counts(pixels), cfg.model.num_classes)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_classes(pixels: np.ndarray, classes: Sequence[str], images: int, allow: bool) -> None:
    """ValueError where a class has no labelled pixel: its subclasses would never be learned."""
    missing = [name for name, n in zip(classes, pixels, strict=True) if n == 0]
    if missing and not allow:
        raise ValueError(
            f"class {missing[0]!r} has no labelled pixel in the {images} labelled images ({len(missing)} of "
            f"{len(classes)} classes have none); take a list that shows it (scripts/prepare_splits.py makes one), or "
            "--allow-empty"
        )


class Clustering:
    """Clusters of the labelled cells, class by class, and the labels that they give."""

    def __init__(
        self,
        features: Features,
        dataset: SegmentationDataset,
        counts: Sequence[int],
        release: bool,
    ):
        self.features = features
        self.dataset = dataset
        self.counts = counts
        self.release = release
        self.offsets = offsets(counts).numpy()
        self.place = {name: i for i, name in enumerate(features.names)}
        self.classes = np.full(len(features.rows), IGNORE, np.int16)  # of every cell
        self.subclasses = np.full(len(features.rows), IGNORE, np.int16)
        self.centres: dict[int, np.ndarray] = {}  # class → (k, D), where k > 1

        for index in range(len(dataset)):
            at, shape = self._cells(index)
            self.classes[at] = cell_classes(self._label(index), shape, release).ravel()

    def _cells(self, index: int) -> tuple[slice, tuple[int, int]]:
        """Rows and grid of the image `index` of the data set."""
        place = self.place[self.dataset.names[index]]
        starts = self.features.starts
        return slice(starts[place], starts[place + 1]), grid(self.features.sizes[place])

    def _label(self, index: int) -> np.ndarray:
        label = self.dataset.label(index)
        name = self.dataset.names[index]
        size = self.features.sizes[self.place[name]]
        if label.shape != size:
            raise ValueError(
                f"{name}: label of {label.shape}, but the features are of an image of {size} pixels"
            )

        return label

    def fit(
        self, algorithm: str, seed: int, device: str, pixels: np.ndarray
    ) -> list[ClassReport]:
        """Cluster every class; `pixels` (C,) are its labelled pixels, for the report."""
        reports = []
        for c, k in enumerate(console.bar(self.counts, what=algorithm, unit="class")):
            rows = np.flatnonzero(self.classes == c)
            if k == 1 or not len(rows):
                cluster = np.zeros(len(rows), np.int64)
            else:
                fit = balanced if algorithm == "balanced_kmeans" else normal
                cluster, self.centres[c] = fit(
                    self.features.rows, rows, min(k, len(rows)), seed, device
                )

            self.subclasses[rows] = self.offsets[c] + cluster
            sizes = np.bincount(cluster, minlength=k)
            name = self.dataset.row.classes[c]
            ends = (int(sizes.min()), int(sizes.max()))
            reports.append(ClassReport(name, int(pixels[c]), len(rows), k, *ends))

        return reports

    def write(self, folder: Path) -> None:
        """One PNG an image, at its size; `subclasses.json` of an earlier run is gone first."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NUMBERS).unlink(missing_ok=True)

        for index, name in enumerate(console.bar(self.dataset.names, what="subclass labels")):
            at, shape = self._cells(index)
            classes = self.classes[at].reshape(shape)
            subclasses = self.subclasses[at].reshape(shape)
            label = self._label(index)
            if self.release:
                values = blocky_subclasses(subclasses, label.shape)
            else:
                features = self.features.image(self.place[name])
                values = pixel_subclasses(
                    label, classes, subclasses, self.offsets, features, self.centres
                )

            with replacing(folder / f"{name}.png", sync=False) as draft:
                Image.fromarray(values).save(draft)


def balanced(
    data: np.ndarray, rows: np.ndarray, k: int, seed: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster (n,) and centres (k, D) of the rows (n,) of `data`; sizes ⌊n/k⌋ to ⌈n/k⌉."""
    found = balanced_kmeans(data, k, rows=rows, seed=seed, device=device)
    return found.labels.numpy(), found.centres.numpy()


def normal(
    data: np.ndarray, rows: np.ndarray, k: int, seed: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """The same by mini-batch k-means, fitted on at most `SAMPLE` of the rows; sizes as they come out."""
    from sklearn.cluster import MiniBatchKMeans  # here, since it takes a second to import

    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:SAMPLE])
    means = MiniBatchKMeans(k, random_state=seed, n_init=3).fit(data[chosen].astype(np.float32))
    blocks = [rows[start : start + SAMPLE] for start in range(0, len(rows), SAMPLE)]

    return np.concatenate(
        [means.predict(data[block].astype(np.float32)) for block in blocks]
    ), means.cluster_centers_


def table(reports: Sequence[ClassReport]) -> str:
    """Classes with their share of labelled pixels, number of subclasses and cluster sizes (cells)."""
    total = max(sum(report.pixels for report in reports), 1)
    wide = max(len(report.name) for report in reports)
    title = "class".ljust(wide)
    lines = [f"{title}   % pixels     cells    k   cluster sizes"]

    for report in reports:
        name = report.name.ljust(wide)
        share = 100 * report.pixels / total
        sizes = f"{report.smallest}–{report.largest}"
        lines.append(f"{name} {share:10.3f} {report.cells:9d} {report.subclasses:4d}   {sizes}")

    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
