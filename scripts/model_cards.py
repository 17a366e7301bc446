"""Write docs/model_cards.md from the results in docs/results: python scripts/model_cards.py"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from scripts.study.numbers import matrices_of, score

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "model_cards.md"
HEAD = """# Model cards

Made by `python scripts/model_cards.py` from `docs/results/*.json`; a test fails where it is not. There is one card for
each set of networks whose scores are kept there. The checkpoints are not kept: a card says how to make a network again.
Results of toy scenes are in no such file and have no card ([tables](results/README.md)). mIoU and mIoU(tail) are in
percent, mean ± half the range over seeds.

No network here is of a paper's size, and none is fit for use in the world: they are small, were trained briefly, and on
the drives of one city. They are here for what they were measured for.
"""


@dataclass(frozen=True)
class Card:
    """What the results do not say themselves. file: the results' name; folder: where the commands start."""

    file: str
    title: str
    folder: str
    network: str
    split: str
    use: str
    limits: tuple[str, ...]


HALF = "Half size: images are trained on and evaluated at about half their size, where hardly a pole can be drawn."
SCRATCH = "From scratch, without ImageNet weights, for a short schedule: under-trained."
CLIP = "The validation images are one clip of a few seconds, in which bicyclist is far more frequent than in training."
BLV_KEYS = (
    "The commands are of an earlier version: `method.heads.decode.loss=blv` is `remedies.logits.name=blv` today, its "
    "other keys are `remedies.logits.preset`, `.sign` and `remedies.counts`."
)
LTSS_LIMITS = (HALF, SCRATCH, CLIP)
CARDS = (
    Card(
        "camvid_blv",
        "UPerNet with BLV, CamVid",
        ".",
        "UPerNet, ResNet-18",
        "validation split of CamVid",
        "to compare the sign and presets of BLV at its published strength with cross-entropy",
        (HALF, SCRATCH, CLIP, BLV_KEYS),
    ),
    Card(
        "camvid_usrn",
        "USRN with one label in eight, CamVid",
        "semi_sup",
        "DeepLabV3+, small",
        "validation split of CamVid",
        "to see USRN's pipeline run on real images; its gate did not act",
        (HALF, SCRATCH, CLIP),
    ),
    Card(
        "camvid_cpsl",
        "CPSL, CamVid by day to dusk",
        "uda",
        "DeepLabV2, small",
        "frames at dusk of one drive, of CamVid's training split",
        "to see CPSL's pipeline run on real images; no comparison of methods",
        (
            HALF,
            SCRATCH,
            "No network finds the tail, so mIoU(tail) says nothing about any of them.",
            "All but source-only and warm-up are of settings that were replaced since ([why](results/README.md)).",
        ),
    ),
    Card(
        "camvid_ltss_mask2former",
        "Mask2Former of LTSS, CamVid",
        "ltss_benchmark",
        "Mask2Former, ResNet-18",
        "validation split of CamVid",
        "to see RFS, Copy-Paste, Seesaw and the Frequency-based Matcher run on real images",
        LTSS_LIMITS,
    ),
    Card(
        "camvid_ltss_deeplabv3p",
        "DeepLabV3+ of LTSS, CamVid",
        "ltss_benchmark",
        "DeepLabV3+, ResNet-18",
        "validation split of CamVid",
        "to see RFS, Copy-Paste and BLV run on real images",
        LTSS_LIMITS,
    ),
)
EVIDENCE_LIMITS = (
    "A fixed budget: nothing says that these networks had learned what they can.",
    "One small network on one data set; intervals, and what was changed after training, are on the page of the plan "
    "([remedies](evidence.md), [remedies that come late](evidence_deferred.md), [semi-supervised](evidence_semi.md), "
    "[domain adaptation](evidence_uda.md), [Mask2Former](evidence_queries.md)).",
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    write()
    print(f"wrote {PAGE}")


def write() -> None:
    """Make the page anew."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page, from what lies in docs/results."""
    return "\n".join([HEAD, *map(evidence_card, evidence_files()), *map(card, CARDS)])


def evidence_files() -> list[str]:
    """The results of scripts/evidence.py, by name."""
    names = sorted(path.stem for path in RESULTS.glob("evidence_*.json"))
    return [name for name in names if "splits" in read(name)]


def read(name: str) -> Mapping[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# Cards ----------------------------------------------------------------------------------------------------------------


def card(about: Card) -> str:
    """The card of one file of scripts/collect.py."""
    results = read(about.file)
    runs = [run for seeds in results.values() for run in seeds]
    made = [run["made"] for run in runs]
    seeds = sorted({entry["seed"] for entry in made})

    facts = {
        "networks": f"{about.network}: {', '.join(results)}",
        "evaluated on": (
            f"{listed(run['dataset'] for run in runs)}, {listed(run['images'] for run in runs)} images: {about.split}"
        ),
        "convention": listed(run["convention"] for run in runs),
        "configs": listed(f"`{config_of(about.folder, entry['command'])}`" for entry in made),
        "seeds": listed(seeds),
        "steps": listed(run["step"] for run in runs),
        "machine": listed(machine(entry["machine"]) for entry in made),
        "minutes a run": minutes([entry["minutes"] for entry in made]),
        "commit": listed(entry["commit"] for entry in made),
        "values": f"[{about.file}.json](results/{about.file}.json)",
    }
    scores = {
        name: {key: [run[key] for run in members] for key in ("miou", "miou_tail")} for name, members in results.items()
    }
    commands = [members[0]["made"]["command"] for members in results.values()]

    where = f"in `{about.folder}/`; " if about.folder != "." else ""
    return "\n".join(
        [
            f"## {about.title}\n",
            table(facts),
            score_table(scores),
            f"**Intended use**: {about.use}.\n",
            limits(about.limits, seeds),
            f"Commands ({where}of each network the first seed):\n",
            "```text",
            *commands,
            "```\n",
        ]
    )


def evidence_card(name: str) -> str:
    """The card of one file of scripts/evidence.py; of each of its splits the networks that were trained for it."""
    results = read(name)
    branch, trunk = results["branch"], results.get("trunk")
    whose = (
        f"each goes on from step {branch} of {trunk}"
        if trunk
        else f"each but the baseline goes on from step {branch} of it"
    )
    late = f"; {whose}" if branch else ""
    facts = {
        "configs": f"`{results['config']}`, {', '.join(f'`{word}`' for word in results['settings'])}{late}",
        "values": f"[{name}.json](results/{name}.json)",
    }
    parts = [split_part(split, results["remedies"]) for split in results["splits"].values()]
    rows = {**results.get("steps", {}), **results["remedies"]}
    settings = [f"{name}: {' '.join(words)}" for name, words in rows.items()]
    seeds = {
        seed
        for split in results["splits"].values()
        for remedy in results["remedies"]
        for seed in split["runs"].get(remedy, ())
    }

    return "\n".join(
        [
            f"## Remedies, {name.removeprefix('evidence_')}\n",
            table(facts),
            *parts,
            "**Intended use**: to compare remedies for rare classes with what a trained network gains for free.\n",
            limits(EVIDENCE_LIMITS, seeds),
            "Settings, started by `scripts/evidence.py`; of those without scores above none is recorded:\n",
            "```text",
            *settings,
            "```\n",
        ]
    )


def split_part(split: Mapping[str, Any], remedies: Iterable[str]) -> str:
    """Facts and scores of the networks that were trained for one split."""
    trained = [name for name in remedies if name in split["runs"]]
    runs = [run for name in trained for run in split["runs"][name].values()]
    seeds = sorted({int(seed) for name in trained for seed in split["runs"][name]})

    evaluated = split["identity"]
    facts = {
        "evaluated on": (
            f"{evaluated['dataset']}, {evaluated['images']} images of split {evaluated['split']}, scales "
            f"{evaluated['scales']}, {'mirrored' if evaluated['flip'] else 'not mirrored'}"
        ),
        "convention": split["convention"],
        "seeds": listed(seeds),
        "machine": listed(machine(run["machine"]) for run in runs),
        "minutes a run": minutes([run["minutes"] for run in runs]),
        "commit": listed(run["commit"] for run in runs),
    }
    scores = {
        name: {key: [score(matrix, split, key) for matrix in found.values()] for key in ("miou", "miou_tail")}
        for name, found in matrices_of(split, trained).items()
    }
    return "\n".join([table(facts), score_table(scores)])


# Parts ----------------------------------------------------------------------------------------------------------------


def table(facts: Mapping[str, str]) -> str:
    lines = [f"| {name} | {text} |" for name, text in facts.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def score_table(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    lines = [
        f"| {name} | {spread(values['miou'])} | {spread(values['miou_tail'])} |" for name, values in scores.items()
    ]
    return "\n".join(["| network | mIoU | mIoU(tail) |", "|---|---|---|", *lines, ""])


def spread(values: Sequence[float]) -> str:
    """Mean ± half the range, in percent; the value alone of one seed."""
    mean = 100 * sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * (max(values) - min(values)) / 2:.1f}"


def limits(lines: Sequence[str], seeds: Iterable[Any]) -> str:
    count = len(set(seeds))
    told = {1: "One seed: no difference between these networks is a finding."}
    few = told.get(count, f"{count} seeds, which tell only large differences apart.")
    return "\n".join(["**Limits**\n", *(f"- {line}" for line in (*lines, few)), ""])


def config_of(folder: str, command: str) -> str:
    """The config that a command names, from the root; of a task's folder the file of the stage."""
    path = re.search(r"\S*configs/\S+", command)[0]
    stage, variant = (re.search(rf"--{word} (\S+)", command) for word in ("stage", "variant"))
    if stage:
        path += f"/{stage[1]}{f'_{variant[1]}' if variant else ''}.yaml"
    return path if folder == "." else f"{folder}/{path}"


def machine(found: Mapping[str, Any]) -> str:
    chip = found["gpu"] or found["processor"]
    return f"{chip}, {found['cores']} cores, {found['threads']} thread(s) a run, torch {found['torch']}"


def minutes(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def listed(values: Iterable[Any]) -> str:
    """Different values, in order."""
    return ", ".join(dict.fromkeys(map(str, values)))


if __name__ == "__main__":
    cli.run(main)
