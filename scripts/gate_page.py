"""USRN's gate at work: `python scripts/gate_page.py collect FOLDER`, then `python scripts/gate_page.py page`.

FOLDER holds the runs of scripts/jobs/toy_gate.yaml, seed by seed (semi_sup/saved/gate). `collect` writes what they say
to docs/results/usrn_gate.json, `page` writes docs/usrn_gate.md from that alone.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the other scripts, which are not installed

from common import cli
from common.comparison import Difference, head_and_tail, holm, number, paired, paired_by_seed, verdict
from common.config import read_tree
from common.files import read_json, replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "usrn_gate.json"
PAGE = ROOT / "docs" / "usrn_gate.md"
NAMES = {
    "toy_baseline": "supervised",
    "toy_usrn_nobranch": "self-training (`branch: false`)",
    "toy_usrn_nogate": "USRN, `gate: false`",
    "toy_usrn_rule": "USRN, subclasses by the rule",
    "toy_usrn": "USRN",
}
USRN = "toy_usrn"
RULE = "toy_usrn_rule"  # with other numbers of subclasses
SCORES = {"miou": "mIoU", "miou_tail": "mIoU(tail)", "miou_head": "mIoU(head)", "aacc": "pixel accuracy"}
LOGGED = ("kept", "surer", "vetoed", "kept_right", "kept_wrong", "vetoed_right", "vetoed_wrong")
PARTS = 5  # of a training, a line each
HEAD = """# USRN's gate at work

Made by `python scripts/gate_page.py page` from [its values](results/usrn_gate.json), of the runs of `python
scripts/run_many.py scripts/jobs/toy_gate.yaml` and of `semi_sup/gate.py` on every USRN among them. A toy set in VOC's
layout, 21 classes, images of 64×85, 20 of 160 labelled, a small network from scratch, 600 steps, 23 subclasses (three
of background) unless more are said; in every variant nobody teaches but the network itself. The labels of the other
140 images are looked at to count right and wrong ones, never learned. Shares are percent of all cells of 8×8 pixels;
± is half of a 95 % interval over seeds.
"""
NOTES = ("Commits f76f660 and 9a5ed37 are d81bf2e and this page's before they were put on top of others.",)
THRESHOLDS = """## Why it hardly acts at 0.75

A confident label is taken only where the branch is not the less certain of the two, by normalised entropy, and its
winner's class is another one. Of the trained USRN, in training mode on weak views of the unlabelled images, mean and
range over the seeds:
"""
ACTING = """## What it does at 0.3

So the comparison has a threshold of 0.3, chosen for that by what each would have taken in an earlier run with fewer
labels; the paper's equations hold there as well (below 0.5 the branch could also change a label; such labels count as
kept). A logged step is one batch of 64 cells. Means of them, by fifths of the training, mean and range of {seeds}
seeds:
"""
HELPING = """## What it brings

{images} validation images, convention `absent_zero`, last checkpoint. The tail are the classes whose group by labelled
pixels is rare or common ({tail}). In brackets the change against the supervised run of
the same seed.
"""
FINDINGS = """\
The gate does what it is for: of the labels that it takes far more are wrong than of all confident ones. But it
takes few, a small part of the wrong ones, since both branches learn the same images and mostly err together;
how many, differs from seed to seed by more than a factor of five. No score tells USRN from its variants over
these seeds, and a network that finds a handful of 21 classes says nothing of the tail. All that learn from
pseudo-labels are below the supervised run in mIoU: at 0.3 a third of the labels is wrong.

At 0.75, the paper's threshold, the two conditions do not meet. With 23 subclasses the branch is the surer one
in a few cells, and agrees there. With many, which is what the rule asks for, its winner is often of another
class, but its probability is spread over the subclasses of background, and it is hardly ever the surer one from
0.5 on. The paper's trainings are of some 100,000 steps from ImageNet weights; what the gate does there has not
been seen here.
"""
Values = Mapping[str, Mapping[str, float]]  # name → seed → value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("collect").add_argument("folder", help="of the runs, with a folder for each seed")
    steps.add_parser("page")
    args = parser.parse_args()
    if args.step == "collect":
        results = collect(Path(args.folder))
        with replacing(RESULTS) as draft:
            draft.write_text(json.dumps(results, separators=(",", ":"), ensure_ascii=False))
        print(RESULTS)
        return

    PAGE.write_text(page(read_json(RESULTS, "take the step `collect` first")), encoding="utf-8")
    print(PAGE)


# What the runs say --------------------------------------------------------------------------------------------------


def collect(folder: Path) -> dict[str, Any]:
    """Of every run that has ended its scores, how it was made, and what it logged of its labels."""
    runs: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    first: dict[str, Any] | None = None
    for place in sorted(folder.glob("seed_*")):
        for name in NAMES:
            if (place / name / "evaluation.json").is_file():
                result = read_json(place / name / "evaluation.json")
                first = first or result
                runs[name][place.name.removeprefix("seed_")] = recorded(place / name, result)

    if first is None:
        raise ValueError(f"{folder}: holds no run that has ended; run scripts/jobs/toy_gate.yaml first")

    classes = first["per_class"]
    return {
        "classes": [item["name"] for item in classes],
        "tail": [item["id"] for item in classes if item["groups"]["pixel"] != "frequent"],
        "convention": first["convention"],
        "images": first["images"],
        "runs": runs,
    }


def recorded(run: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    made = read_json(run / "run.json")
    lines = read_log(run / "log.jsonl")
    gate = run / "gate.json"
    options = read_tree(run / "config.yaml")["model"]["options"]
    return {
        "subclasses": options.get("subclasses"),
        "confusion": result["confusion"],
        "made": {key: made.get(key) for key in ("command", "commit", "minutes", "machine")},
        "log": [{key: line[key] for key in ("step", *LOGGED) if key in line} for line in lines],
        "thresholds": read_json(gate) if gate.is_file() else [],
    }


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training's log that say something of pseudo-labels."""
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == "train" and "kept" in line]


# The page -----------------------------------------------------------------------------------------------------------


def page(results: Mapping[str, Any]) -> str:
    runs = {name: seeds for name, seeds in results["runs"].items() if seeds}
    parts = [HEAD, protocol(runs), *closing(runs), *acting(runs), *helping(results, runs)]
    return "\n".join(parts)


def protocol(runs: Mapping[str, Mapping[str, Any]]) -> str:
    made = [run["made"] for seeds in runs.values() for run in seeds.values()]
    machines = {
        f"{item['machine']['threads']} thread(s) of {item['machine']['processor']}, torch {item['machine']['torch']}"
        for item in made
    }
    commits = ", ".join(sorted({item["commit"] for item in made}))
    example = next(iter(runs[USRN].values()))["made"]["command"]
    folder = "/".join(re.findall(r"(?:output|name)=(\S+)", example))
    minutes = "; ".join(f"{NAMES[name]} {minutes_of(seeds.values())}" for name, seeds in runs.items())
    lines = [
        f"Seeds {', '.join(runs[USRN])}; commit {commits}; {'; '.join(sorted(machines))}.",
        f"Minutes of a run, two at a time beside much other work: {minutes}.",
        "Of one of them:",
        "",
        "```sh",
        f"cd semi_sup && {example}",
        f"cd semi_sup && python gate.py {folder}/checkpoints/last",
        "```",
        "",
        *NOTES,
        "",
    ]
    return "\n".join(lines)


def minutes_of(runs: Iterable[Mapping[str, Any]]) -> str:
    """The shortest and the longest run."""
    minutes = [run["made"]["minutes"] for run in runs]
    return f"{min(minutes):.1f} to {max(minutes):.1f}"


def closing(runs: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """What the trained networks' gates would take at every threshold, over the seeds."""
    yield THRESHOLDS
    for name in (USRN, RULE):
        found = [run["thresholds"] for run in runs.get(name, {}).values() if run["thresholds"]]
        if found:
            subclasses = next(iter(runs[name].values()))["subclasses"]
            yield f"{subclasses} subclasses, {len(found)} seed(s):\n"
            yield thresholds(found)


def thresholds(found: Sequence[Sequence[Mapping[str, float | None]]]) -> str:
    """The table of one kind of network. found: for every seed the rows that semi_sup/gate.py leaves."""
    lines = [
        "| threshold | confident | branch surer | other class | both: taken | confident: right | taken: right |",
        "|---" * 7 + "|",
    ]
    keys = ("confident", "surer", "differs", "taken", "confident_right", "taken_right")
    for rows in zip(*found, strict=True):
        cells = [over(row[key] for row in rows) for key in keys]
        lines.append(f"| {rows[0]['threshold']} | " + " | ".join(cells) + " |")

    return "\n".join([*lines, ""])


def over(values: Iterable[float | None]) -> str:
    """Mean and range of shares, in percent, those that are undefined left out."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    return f"{np.mean(known):.1f} ({min(known):.1f}–{max(known):.1f})"


def acting(runs: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """What the gate did in training, by fifths of it, mean and range over the seeds."""
    logs = [fifths(run["log"]) for run in runs[USRN].values()]
    yield ACTING.format(seeds=len(logs))
    yield "| steps | kept | branch surer | vetoed | kept: right | vetoed: right |"
    yield "|---" * 6 + "|"
    for parts in zip(*logs, strict=True):
        shares = [means(part) for part in parts]
        cells = [over(share[key] for share in shares) for key in ("kept", "surer", "vetoed", "kept_of", "vetoed_of")]
        yield f"| to {parts[0][-1]['step']} | " + " | ".join(cells) + " |"

    lines = [line for run in runs[USRN].values() for line in run["log"]]
    above = np.mean([line["vetoed"] > 0.01 for line in lines])
    yield f"\nMore than 1 % is vetoed in {100 * above:.0f} % of the {len(lines)} logged steps of all seeds.\n"


def fifths(log: Sequence[Mapping[str, float]]) -> list[Sequence[Mapping[str, float]]]:
    ends = [round(len(log) * part / PARTS) for part in range(PARTS + 1)]
    return [log[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def means(lines: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Of logged shares their means, and the right ones among the kept and the vetoed whose truth is known."""
    found: dict[str, float | None] = {key: float(np.mean([line[key] for line in lines])) for key in LOGGED}
    for group in ("kept", "vetoed"):
        right, wrong = found[f"{group}_right"], found[f"{group}_wrong"]
        found[f"{group}_of"] = right / (right + wrong) if right + wrong else None

    return found


def helping(results: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Scores, and differences by seed: of everything to the supervised run, of USRN to what it is without a part."""
    baseline, *others = runs
    scored = {key: scores(results, runs, key) for key in SCORES}
    against = {key: paired_by_seed(values, baseline) for key, values in scored.items()}
    yield HELPING.format(images=results["images"], tail=", ".join(results["classes"][k] for k in results["tail"]))
    yield "| | seeds | " + " | ".join(SCORES.values()) + " |"
    yield "|---" * (len(SCORES) + 2) + "|"
    for name, seeds in runs.items():
        cells = []
        for key in SCORES:
            change = against[key].get(name)
            mean = 100 * np.mean(list(scored[key][name].values()))
            cells.append(f"{mean:.1f}" + (f" ({number(change[0])})" if change else ""))
        yield f"| {NAMES[name]} | {len(seeds)} | {' | '.join(cells)} |"

    yield "\nUSRN against each of the others, in words:\n"
    changes = {key: versus(values) for key, values in scored.items()}
    for name in (baseline, *(other for other in others if other != USRN)):
        said = [f"{SCORES[key]} {verdict(*changes[key][name])}" for key in ("miou", "miou_tail", "miou_head")]
        yield f"- **{NAMES[name]}**: {'; '.join(said)}."
    yield ""
    yield FINDINGS


def scores(results: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]], key: str) -> Values:
    """A score by name and seed."""
    tail, convention = results["tail"], results["convention"]
    return {
        name: {seed: head_and_tail(np.array(run["confusion"]), tail, convention)[key] for seed, run in seeds.items()}
        for name, seeds in runs.items()
    }


def versus(values: Values) -> dict[str, tuple[Difference, float | None]]:
    """Name → USRN's difference to it over the seeds that both have, and Holm's p over the names."""
    found = {}
    for name, scored in values.items():
        seeds = [seed for seed in scored if seed in values[USRN]]
        if name != USRN and seeds:
            found[name] = paired([values[USRN][seed] for seed in seeds], [scored[seed] for seed in seeds])

    adjusted = holm({name: difference.p for name, difference in found.items()})
    return {name: (difference, adjusted[name]) for name, difference in found.items()}


if __name__ == "__main__":
    cli.run(main)
