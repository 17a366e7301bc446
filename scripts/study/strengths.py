"""The strengths of an evidence plan: what was tried on the images that choose, and what was chosen."""

import math
from collections.abc import Mapping
from typing import Any

STRENGTHS = "strengths"  # in the name of their picture, as a split is in its own
UNTUNED = "One strength each, fixed before any result of its own: **no strength was tuned.**"
PICTURE = (
    "Their changes on those images, one seed each, against the chosen strength of {baseline}; dashed, those that no "
    "other beats in both:\n\n![Change of mIoU(tail) against change of mIoU(head), by strength]({picture})"
)


def strengths(results: Mapping[str, Any], picture: str) -> str:
    """The settings of every remedy; where several strengths were tried, which was chosen, and what they scored."""
    lines = ["## Strengths", "", "| remedy | strength | settings |", "|---|---|---|"]
    for name, settings in results.get("steps", {}).items():
        lines.append(f"| {name} | comes before others | `{' '.join(settings)}` |")
    for name, settings in results["remedies"].items():
        lines.append(f"| {name} | {results['choices'][name]['chosen']} | `{' '.join(settings)}` |")

    tuned = {name: choice for name, choice in results["choices"].items() if choice["tried"]}
    if tuned:
        lines += ["", "Chosen on images of their own, with a seed of their own:", "", choices_table(tuned)]
    else:
        lines += ["", UNTUNED]
    if curves_of(results):
        lines += ["", PICTURE.format(baseline=next(iter(results["remedies"])), picture=picture)]

    return "\n".join([*lines, ""])


def choices_table(choices: Mapping[str, Any]) -> str:
    """What was chosen, and among what."""
    keys = ["miou", "miou_tail", "miou_head"] if _have_heads(choices) else ["miou", "miou_tail"]
    words = {"miou": "mIoU", "miou_tail": "mIoU(tail)", "miou_head": "mIoU(head)"}
    lines = [f"| remedy | chosen | best for the tail | tried: {' / '.join(words[key] for key in keys)} |"]
    lines.append("|---|---|---|---|")
    for name, choice in choices.items():
        tried = "; ".join(
            f"{strength}: {' / '.join(f'{100 * scores[key]:.1f}' for key in keys)}"
            for strength, scores in choice["tried"].items()
        )
        lines.append(f"| {name} | {choice['chosen']} | {choice['by_tail']} | {tried} |")

    return "\n".join(lines)


def curves_of(results: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """Remedy → strength → its change of mIoU(head) and of mIoU(tail), in points, on the images that choose, against the
    chosen strength of the baseline. Nothing where that was not tuned, or a strength has no mIoU(head) or mIoU(tail)."""
    tuned = {name: choice for name, choice in results["choices"].items() if choice["tried"]}
    baseline = next(iter(results["remedies"]))
    if baseline not in tuned or not _have_heads(tuned):
        return {}
    every = [scores for choice in tuned.values() for scores in choice["tried"].values()]
    if not all(math.isfinite(scores[key]) for scores in every for key in ("miou_head", "miou_tail")):
        return {}

    start = tuned[baseline]["tried"][tuned[baseline]["chosen"]]
    return {
        name: {
            strength: tuple(100 * (scores[key] - start[key]) for key in ("miou_head", "miou_tail"))
            for strength, scores in choice["tried"].items()
        }
        for name, choice in tuned.items()
    }


def _have_heads(choices: Mapping[str, Any]) -> bool:
    return all("miou_head" in scores for choice in choices.values() for scores in choice["tried"].values())
