"""Tabulate runs that differ by seed: `python scripts/collect.py NAME=RUN,RUN… [NAME=…] --out docs/results/x`.

RUN is a run's folder, or a test's: RUN/test/NAME. The first name is the baseline. Writes x.json (every value) and
prints a Markdown table of mean ± half the range over the seeds, with the change of the mean against the baseline: mIoU,
mIoU(tail), and every class or, with --groups, rare, common and frequent classes at image and at pixel level. Seeds that
were evaluated on other images or otherwise are refused; a name that was has no changes, and the reason below the table.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

from common import cli
from common.evaluation.identity import differences, has_identity, other_means
from common.files import load_json, read_artifact, read_json, refuse_to_overwrite, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN,RUN…")
    parser.add_argument("--groups", action="store_true", help="columns for class groups in place of classes")
    parser.add_argument("--out", required=True, help="path of the files without suffix")
    cli.add_force(parser)
    args = parser.parse_intermixed_args()
    out = Path(args.out).with_suffix(".json")
    refuse_to_overwrite([out], args.force)
    named = dict(word.split("=", 1) for word in args.runs if "=" in word)
    if len(named) < len(args.runs):
        raise ValueError(f"{[w for w in args.runs if '=' not in w][0]!r} is not of the form NAME=RUN,RUN")
    rows = {name: [load(Path(folder)) for folder in folders.split(",")] for name, folders in named.items()}
    for name, runs in rows.items():
        check_seeds(name, runs)

    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows)
    print(table(rows, columns(next(iter(rows.values()))[0], args.groups)))
    print("\n".join(remarks(rows)))


def load(folder: Path) -> dict[str, Any]:
    """What a results file keeps of one run: scores, and how it was made."""
    result = read_artifact(folder / "evaluation.json", _scores, "has the run ended?")
    made = read_json(folder / "run.json", "has the run ended?")
    return {"run": folder.name, **result, "made": made}


def _scores(path: Path) -> dict[str, Any]:
    result = load_json(path)
    kept = ("name", "tail", "groups")
    result["classes"] = [{key: item[key] for key in kept if key in item} for item in result["per_class"]]
    result["per_class"] = {item["name"]: item["iou"] for item in result["per_class"]}
    del result["confusion"]
    return result


def check_seeds(name: str, runs: list[dict[str, Any]]) -> None:
    """Runs that are averaged were evaluated alike. ValueError names the first that was not."""
    for run in runs[1:]:
        if parts := differences(run, runs[0]):
            raise ValueError(f"{name}: {run['run']} does not compare with {runs[0]['run']}: {'; '.join(parts)}")


def remarks(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The lines below the table: names that do not compare with the first, and those of which it is not known."""
    first = next(iter(rows))
    lines = []
    for name, runs in rows.items():
        parts = differences(runs[0], rows[first][0])
        if parts:
            lines.append(f"{name} does not compare with {first}: {'; '.join(parts)}")
        others = sorted(other_means(runs[0]["classes"], rows[first][0]["classes"]))
        if others and not parts:
            lines.append(f"{name} groups other classes than {first} ({', '.join(others)}): no changes of these means")
        if not parts and not all(has_identity(run) for run in runs):
            lines.append(f"{name}: identity unknown, scored before an evaluation kept it")
    return lines


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
        plain = runs is first or bool(differences(runs[0], first[0]))
        others = other_means(runs[0]["classes"], first[0]["classes"])
        cells = [
            cell([value(r, p) for r in runs], [value(r, p) for r in first], plain or over(p) in others)
            for p in columns.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over(path: tuple[str, ...]) -> str:
    """Over which classes a score is a mean: "tail", a level of groups, or "" for all."""
    return path[1] if path[0] == "groups" else "tail" if path[0] == "miou_tail" else ""


def value(run: dict[str, Any], path: tuple[str, ...]) -> float | None:
    """A run's score; None where it is undefined, or the run's data has no such class."""
    return functools.reduce(lambda found, key: (found or {}).get(key), path, run)


def cell(values: list[float | None], baseline: list[float | None], plain: bool) -> str:
    """Mean ± half the range and, unless `plain`, the change of the mean."""
    if None in values:
        return "–"
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    text = f"{100 * mean:.1f} ± {100 * spread:.1f}"
    if plain or None in baseline:
        return text
    return f"{text} ({100 * (mean - sum(baseline) / len(baseline)):+.1f})"


if __name__ == "__main__":
    cli.run(main)
