"""The scores of an evaluation as a console table."""

from collections.abc import Mapping
from typing import Any

from common.evaluation.identity import differences, has_identity, other_means


def format_table(result: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> str:
    """The scores as a console table in percent, with the change against `baseline` (another result) in points.

    `*` marks a tail class. A baseline of other images, settings or another convention is refused (ValueError): the
    difference means nothing. Of one that does not say what it evaluated, that is said. Means over other classes than
    the baseline's (tail, groups) have no change.
    """
    if baseline is not None and (parts := differences(result, baseline)):
        raise ValueError(
            f"the baseline does not compare with this run: {'; '.join(parts)}; evaluate both alike"
        )

    others = (
        other_means(result["per_class"], baseline["per_class"])
        if baseline is not None
        else set()
    )
    names = {
        "mIoU": "miou",
        "mIoU(tail)": "miou_tail",
        "mAcc": "macc",
        "aAcc": "aacc",
        "FreqW": "fwiou",
    }
    lines = [(name, result[key], baseline and baseline[key]) for name, key in names.items()]
    if "tail" in others:
        lines[1] = (*lines[1][:2], None)

    for level, means in result["groups"].items():
        before = {} if level in others else (baseline or {}).get("groups", {}).get(level, {})
        lines += [
            (f"mIoU {level}-level {group}", value, before.get(group))
            for group, value in means.items()
        ]

    count = len(lines)
    before = {item["name"]: item["iou"] for item in (baseline or {}).get("per_class", ())}
    lines += [
        (_marked(item), item["iou"], before.get(item["name"])) for item in result["per_class"]
    ]
    wide = max(len(name) for name, *_ in lines)
    text = [_line(wide, *line, compared=baseline is not None) for line in lines]
    rule = "-" * len(text[0])
    title = f"{result['dataset']}: {result['images']} images, convention {result['convention']}, in percent"
    unknown = baseline is not None and not (has_identity(result) and has_identity(baseline))
    by = (
        [f"groups: {result['group_rule']}"]
        if result["groups"] and result.get("group_rule")
        else []
    )
    remark = (
        ["identity unknown: the baseline may be of other images or settings"] if unknown else []
    )

    return "\n".join([title, *by, *remark, rule, *text[:count], rule, *text[count:]])


def _marked(item: Mapping[str, Any]) -> str:
    return item["name"] + (" *" if item["tail"] else "")


def _line(
    wide: int, name: str, value: float | None, before: float | None, compared: bool
) -> str:
    text = f"{name:<{wide}}  {'-' if value is None else f'{100 * value:.2f}':>6}"
    if compared:
        change = "-" if value is None or before is None else f"{100 * (value - before):+.2f}"
        text += f"  {change:>7}"

    return text
