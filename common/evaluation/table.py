"""The scores of an evaluation as a console table."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from common.evaluation.identity import differences, has_identity, other_means

OVERALL = {
    "mIoU": "miou",
    "mIoU(tail)": "miou_tail",
    "mAcc": "macc",
    "aAcc": "aacc",
    "FreqW": "fwiou",
    "mIoU~": "tolerant_miou",
    "mIoU~(tail)": "tolerant_miou_tail",
    "F~": "boundary_f",
    "F~(tail)": "boundary_f_tail",
    "ECE": "ece",
    "ECE(tail)": "ece_tail",
}
# of single classes, beside IoU
FURTHER = {
    "prec.": "precision",
    "recall": "recall",
    "IoU~": "tolerant_iou",
    "F~": "boundary_f",
    "ECE": "ece",
    "mass": "mass",
}


class _Row(NamedTuple):
    """A line of the table, scores in 0..1. before: the baseline's value."""

    name: str
    value: float | None
    before: float | None = None
    further: tuple[float | None, ...] = ()


def format_table(result: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> str:
    """The scores as a console table in percent, with the change against `baseline` (another result) in points.

    `*` marks a tail class, `~` what forgives the pixels of `eval.boundary`; mass is Σp over the pixels of a class.
    A baseline of other images, settings or another convention is refused (ValueError): the difference means nothing.
    Of one that does not say what it evaluated, that is said. Means over other classes than the baseline's (tail,
    groups) have no change.
    """
    if baseline is not None and (parts := differences(result, baseline)):
        raise ValueError(
            f"the baseline does not compare with this run: {'; '.join(parts)}; evaluate both alike"
        )

    titles = [title for title, key in FURTHER.items() if key in result["per_class"][0]]
    overall = _overall(result, baseline or {})
    classes = _classes(result, baseline or {}, [FURTHER[title] for title in titles])

    compared = baseline is not None
    wide = max(len(row.name) for row in (*overall, *classes))
    heads = [f"{'class':<{wide}}", f"{'IoU':>6}", *([f"{'change':>7}"] if compared else [])]
    head = "  ".join([*heads, *(f"{title:>6}" for title in titles)])
    rule = "-" * len(head)

    above = [_line(wide, row, compared) for row in overall]
    below = [_line(wide, row, compared) for row in classes]
    return "\n".join([*_titles(result, baseline), rule, *above, rule, head, *below])


def _titles(result: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> list[str]:
    """What was evaluated, by what classes are grouped, and what is not known of the baseline."""
    lines = [
        f"{result['dataset']}: {result['images']} images, convention {result['convention']}, in percent"
    ]
    if result["groups"] and result.get("group_rule"):
        lines.append(f"groups: {result['group_rule']}")
    if "boundary" in result:
        lines.append(f"~: within {result['boundary']['pixels']} pixels")
    if baseline is not None and not (has_identity(result) and has_identity(baseline)):
        lines.append("identity unknown: the baseline may be of other images or settings")

    return lines


def _overall(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[_Row]:
    """The means: of all classes, of the tail, of groups."""
    classes = baseline.get("per_class")
    others = other_means(result["per_class"], classes) if classes else set()
    unlike = result.get("boundary") != baseline.get("boundary")
    rows = []

    for name, key in OVERALL.items():
        if key not in result:
            continue
        void = ("(tail)" in name and "tail" in others) or ("~" in name and unlike)
        rows.append(_Row(name, result[key], None if void else baseline.get(key)))

    for level, means in result["groups"].items():
        before = {} if level in others else baseline.get("groups", {}).get(level, {})
        rows += [
            _Row(f"mIoU {level}-level {group}", value, before.get(group))
            for group, value in means.items()
        ]

    return rows


def _classes(
    result: Mapping[str, Any], baseline: Mapping[str, Any], keys: list[str]
) -> list[_Row]:
    before = {item["name"]: item["iou"] for item in baseline.get("per_class", ())}
    return [
        _Row(
            item["name"] + (" *" if item["tail"] else ""),
            item["iou"],
            before.get(item["name"]),
            tuple(_shown(item.get(key), key) for key in keys),
        )
        for item in result["per_class"]
    ]


def _shown(value: float | None, key: str) -> float | None:
    """A value such that percent are right: mass is a ratio."""
    return value / 100 if key == "mass" and value is not None else value


def _line(wide: int, row: _Row, compared: bool) -> str:
    cells = [f"{row.name:<{wide}}", _percent(row.value)]
    if compared:
        unknown = row.value is None or row.before is None
        change = "-" if unknown else f"{100 * (row.value - row.before):+.2f}"
        cells.append(f"{change:>7}")

    return "  ".join([*cells, *map(_percent, row.further)])


def _percent(value: float | None) -> str:
    return f"{'-' if value is None else f'{100 * value:.2f}':>6}"
