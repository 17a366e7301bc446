"""Tabulate runs that differ by seed: `python scripts/collect.py NAME=RUN,RUN… [NAME=…] --out docs/results/x`.

The first name is the baseline. Writes x.json (every value) and prints a Markdown table of mean ± half the range over
the seeds, with the change of the mean against the baseline.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from common import cli
from common.engine.logging import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN,RUN…")
    parser.add_argument("--out", required=True, help="path of the files without suffix")
    args = parser.parse_intermixed_args()
    named = dict(word.split("=", 1) for word in args.runs if "=" in word)
    if len(named) < len(args.runs):
        raise ValueError(f"{[w for w in args.runs if '=' not in w][0]!r} is not of the form NAME=RUN,RUN")
    rows = {name: [load(Path(folder)) for folder in folders.split(",")] for name, folders in named.items()}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), rows)
    print(table(rows))


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


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: one row a name; mIoU, mIoU(tail) and every class in percent."""
    first = next(iter(rows.values()))
    keys = ["miou", "miou_tail", *first[0]["per_class"]]
    head = ["", "mIoU", "mIoU(tail)", *first[0]["per_class"]]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, runs in rows.items():
        cells = [cell([value(r, key) for r in runs], [value(r, key) for r in first], runs is first) for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def value(run: dict[str, Any], key: str) -> float | None:
    return run[key] if key.startswith("miou") else run["per_class"][key]


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
