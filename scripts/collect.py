"""Tabulate runs that differ by seed: `python scripts/collect.py NAME=RUN,RUN… [NAME=…] --out docs/results/x`.

The first name is the baseline. Writes x.json (every value) and prints a Markdown table of mean ± half the range over
the seeds, with the change of the mean against the baseline: mIoU, mIoU(tail), and every class or, with --groups, rare,
common and frequent classes at image and at pixel level.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from common import cli
from common.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN,RUN…")
    parser.add_argument("--groups", action="store_true", help="columns for class groups in place of classes")
    parser.add_argument("--out", required=True, help="path of the files without suffix")
    args = parser.parse_intermixed_args()
    named = dict(word.split("=", 1) for word in args.runs if "=" in word)
    if len(named) < len(args.runs):
        raise ValueError(f"{[w for w in args.runs if '=' not in w][0]!r} is not of the form NAME=RUN,RUN")
    rows = {name: [load(Path(folder)) for folder in folders.split(",")] for name, folders in named.items()}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), rows)
    print(table(rows, columns(next(iter(rows.values()))[0], args.groups)))


def load(folder: Path) -> dict[str, Any]:
    """What a results file keeps of one run: scores, and how it was made."""
    try:
        result = json.loads((folder / "evaluation.json").read_text())
        made = json.loads((folder / "run.json").read_text())
    except OSError as error:
        raise ValueError(f"{error.filename}: missing; has the run ended?") from error
    result["per_class"] = {item["name"]: item["iou"] for item in result["per_class"]}
    del result["confusion"]
    return {"run": folder.name, **result, "made": made}


def columns(run: dict[str, Any], groups: bool) -> dict[str, tuple[str, ...]]:
    """Heading and path in a run's results of each column."""
    overall = {"mIoU": ("miou",), "mIoU(tail)": ("miou_tail",)}
    if not groups:
        return overall | {name: ("per_class", name) for name in run["per_class"]}
    return overall | {
        f"{level} {name}": ("groups", level, name) for level in run["groups"] for name in run["groups"][level]
    }


def table(rows: dict[str, list[dict[str, Any]]], columns: dict[str, tuple[str, ...]]) -> str:
    """Markdown: one row a name, in percent."""
    first = next(iter(rows.values()))
    lines = ["| " + " | ".join(["", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, runs in rows.items():
        cells = [
            cell([value(r, p) for r in runs], [value(r, p) for r in first], runs is first) for p in columns.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def value(run: dict[str, Any], path: tuple[str, ...]) -> float | None:
    return functools.reduce(lambda found, key: found[key], path, run)


def cell(values: list[float | None], baseline: list[float | None], is_baseline: bool) -> str:
    """Mean ± half the range, and the change of the mean."""
    if None in values:
        return "–"
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    text = f"{100 * mean:.1f} ± {100 * spread:.1f}"
    if is_baseline or None in baseline:
        return text
    return f"{text} ({100 * (mean - sum(baseline) / len(baseline)):+.1f})"


if __name__ == "__main__":
    cli.run(main)
