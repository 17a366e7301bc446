"""Class frequencies of a data set: python scripts/class_stats.py camvid [--split train] [--json FILE] [--html FILE].

With --config the data set is the config's (its training stream's, or that of --stream), which is how `folder` data sets
are counted. Prints images and pixels of each class, its group, the weight that BLV gives it, and Gini coefficients; the
page of --html also shows how long the tail is, and which rare classes occur together.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

from common import cli
from common.data import SegmentationDataset, Statistics, class_statistics
from common.data.coverage import coverage_warnings
from common.data.groups import Grouping, by_rank, grouping, groups_config
from common.data.imbalance import gini
from common.files import refuse_to_overwrite, replacing, write_json
from common.losses.blv import variation_weights
from common.report.class_page import class_page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_source(parser)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", metavar="DIR", help="keep the counts there")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--html", metavar="FILE", help="also draw them, as one page that needs no other file")
    cli.add_force(parser)
    args = parser.parse_intermixed_args()
    refuse_to_overwrite(filter(None, [args.json, args.html]), args.force)
    dataset = SegmentationDataset(cli.source(args))
    cfg = cli.source_config(args)
    chosen = groups_config(cfg.data.groups, dataset.row) if cfg else None

    statistics = class_statistics(dataset, args.workers, args.cache)
    by = grouping(chosen, dataset.row, statistics) if chosen else by_rank(statistics)
    result = describe(dataset, statistics, by)
    print(table(result))
    for lack in result["warnings"]:
        warnings.warn(lack, stacklevel=1)
    if args.json:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    if args.html:
        path = Path(args.html)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_text(class_page(result, statistics.presence), encoding="utf-8")


def describe(dataset: SegmentationDataset, statistics: Statistics, by: Grouping | None) -> dict[str, Any]:
    """All figures, as JSON holds them; `by` groups the classes."""
    row, pixels = dataset.row, statistics.pixel_count
    total = int(pixels.sum())
    if not total:
        raise ValueError(f"{dataset.root}: split {dataset.source.split!r} has no labelled pixel")
    levels = by.levels if by else {}
    weights = variation_weights(pixels).tolist()
    return {
        "dataset": row.name,
        "root": str(dataset.root),
        "split": dataset.source.split,
        "images": statistics.num_images,
        "labelled_pixels": total,
        "ignored_pixels": int(statistics.ignored.sum(dtype="int64")),
        "gini": {level: gini(statistics.count(level)) for level in ("image", "pixel")},
        "group_rule": by.rule if by else None,
        "warnings": coverage_warnings(dataset, statistics),
        "classes": [
            {
                "id": k,
                "name": name,
                "images": int(statistics.image_count[k]),
                "pixels": int(pixels[k]),
                "share": int(pixels[k]) / total,
                "groups": {level: names[k] for level, names in levels.items()},
                "tail": k in row.tail,
                "blv_weight": weights[k],
            }
            for k, name in enumerate(row.classes)
        ],
    }


def table(result: dict[str, Any]) -> str:
    """The figures as text; `*` marks the data set's tail classes."""
    names = [item["name"] + (" *" if item["tail"] else "") for item in result["classes"]]
    wide = max(map(len, names))
    ignored = result["ignored_pixels"] / (result["ignored_pixels"] + result["labelled_pixels"])
    levels = list(result["classes"][0]["groups"])
    heads = "".join(f"{level + ' level':<11}  " for level in levels)
    lines = [
        f"{result['dataset']} {result['split']}: {result['images']} images in {result['root']}, "
        f"{100 * ignored:.2f} % of the pixels without a class",
        f"Gini {result['gini']['image']:.4f} at image level, {result['gini']['pixel']:.4f} at pixel level",
        *([f"groups {result['group_rule']}"] if levels else []),
        f"{'id':>3}  {'class':<{wide}}  {'images':>7}  {'pixels':>13}  {'share %':>8}  {heads}BLV weight",
    ]
    for name, item in zip(names, result["classes"], strict=True):
        cells = "".join(f"{item['groups'][level]:<11}  " for level in levels)
        lines.append(
            f"{item['id']:>3}  {name:<{wide}}  {item['images']:>7}  {item['pixels']:>13}  {100 * item['share']:>8.3f}  "
            f"{cells}{item['blv_weight']:.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
