"""Which remedies help, by paired seeds: `python scripts/evidence.py STEP PLAN [--at-once N] [--minutes M] …`.

PLAN is a file such as scripts/evidence_plans/camvid.yaml. The steps, each of which goes on where it stopped:

    tune       every strength of every remedy, trained with one seed and scored on the tuning images
    choose     the strength of each with the highest mIoU there → the file of choices; commit it before the next step
    final      the chosen strengths with every seed, on the final splits
    score      the final runs that are done once more, with the further scores of the plan's `score`
    after      what is changed in trained classifiers (`after` of the plan), in every strength
    collect    the confusion matrix of every image of the final runs that are done → the file of results
    page       the page of what the results say, and the README's table where it has a place for this plan

A remedy with one strength has nothing to choose: it is fixed by the plan. With `branch: STEP` the final runs of
remedies begin at that step of the baseline's run of the same seed, so the remedy is in force from there on, and what
comes before is trained once; with `trunk: NAME` at that step of a run of its own, the baseline too, and in tuning as
in the final runs. Other runs that come before are the plan's `steps`; `--only NAME …` takes some of the rows
and what they come after, `--splits SPLIT …` some of the splits. What `collect` finds joins what the file of results
holds of earlier calls, whatever the machine; runs of a strength that is no longer chosen, or of other settings of their
own than the plan has now, are left out. `pools` of a plan puts splits together, the folds of scripts/prepare_folds.py;
`scenes` tells a split apart.

Runs, logs, exit codes and refusals are those of scripts/run_many.py. The `last` checkpoint counts, never the best.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the other scripts, which are not installed

import numpy as np

from common import cli
from common.comparison import head_and_tail
from common.config import read_tree, typed
from common.data.catalogue.lists import read_list, write_list
from common.files import load_json, read_artifact, read_json, refuse_to_overwrite, replacing, write_json
from common.jobs import Run, refuse_others, run_all, state_of, table
from common.jobs.plan import ROOT
from scripts import model_cards, run_many
from scripts.study import summary
from scripts.study.known import changes, of_plan, said, told
from scripts.study.page import page_of, pictures
from scripts.study.plan import Plan, data_folder, runs_of
from scripts.study.pools import pool_of, read_blocks
from scripts.study.records import begun, changed_after, joined, scored, split_of, trained
from scripts.study.scenes import blocks_of, pieces_of

STEPS = ("tune", "choose", "final", "score", "after", "collect", "page")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("plan")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these remedies, or changes after training, alone")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="these of the plan's `final` alone")
    run_many.add_pool(parser)
    cli.add_force(parser)
    args = parser.parse_args()
    run_many.check_pool(args)
    plan = typed(Plan, read_tree(Path(args.plan)), args.plan)

    check_only(plan, args.step, args.only)
    if args.seeds and args.step in ("final", "score", "after"):
        plan.check_seeds(args.seeds)
    if args.splits:
        check_splits(plan, args.step, args.splits)
    if args.step == "tune" and not plan.tuned():
        print(f"{args.plan}: every remedy has one strength, there is nothing to choose among")
        return 0
    if args.step == "score" and not plan.score:
        raise ValueError(f"{args.plan}: score: names no command")
    if args.step in ("tune", "final", "score", "after"):
        return train(plan, args)
    if args.step == "choose":
        choose(plan, args.force)
    elif args.step == "collect":
        collect(plan, args.splits)
    else:
        page(plan, args.plan)
    return 0


def train(plan: Plan, args: argparse.Namespace) -> int:
    """Run the trainings of a step; its exit code."""
    if args.splits:
        final = {name: own for name, own in plan.final.items() if name in args.splits}
        plan = replace(plan, final=final, pools={}, scenes={})
    write_lists(plan)
    runs = wanted(plan, args)
    ended = run_all(runs, args.at_once, args.minutes)
    print(table(runs))
    return run_many.exit_code(ended)


def check_only(plan: Plan, step: str, only: list[str] | None) -> None:
    """ValueError for a name that a step has no run of."""
    known = {"tune": list(plan.tuned()), "after": list(plan.after)}.get(step, list(plan.remedies))
    for name in only or ():
        if name not in known:
            raise ValueError(f"--only: the plan has no {name!r} for the step `{step}`; it has {', '.join(known)}")


def check_splits(plan: Plan, step: str, names: list[str]) -> None:
    """ValueError for a name that the plan does not have, and for a step that is of no split."""
    if step not in ("final", "score", "after", "collect"):
        raise ValueError(f"--splits: the step `{step}` is of none; leave it out")
    for name in names:
        if name not in plan.final:
            raise ValueError(f"--splits: the plan has no {name!r}; it has {', '.join(plan.final)}")


def wanted(plan: Plan, args: argparse.Namespace) -> list[Run]:
    """The runs of a step."""
    if args.step == "final":
        return missing(plan, args)

    if args.step == "tune":
        runs = runs_of(plan.tuning(), args)
        return with_what_comes_before(runs, [run for run in runs if is_of(run.name.rpartition("-")[0], args.only)])

    return [run for run in after_training(plan, args) if is_of(run.name, args.only)]


def is_of(name: str, only: list[str] | None) -> bool:
    return not only or name in only


def with_what_comes_before(runs: list[Run], chosen: list[Run]) -> list[Run]:
    """Those of `runs` that are chosen, and all that they come after, in order."""
    before = {run.label: run.after for run in runs}
    needed = {run.label for run in chosen}
    for run in chosen:
        label = run.after
        while label:
            needed.add(label)
            label = before[label]

    return [run for run in runs if run.label in needed]


def after_training(plan: Plan, args: argparse.Namespace) -> list[Run]:
    """The runs of the steps `score` and `after` whose networks are trained."""
    finals = plan.finals(read_choices(plan))
    done = {run.title for jobs in finals.values() for run in runs_of(jobs, args) if state_of(run) == "done"}
    if args.step == "score":
        runs = [run for jobs in plan.scorings().values() for run in runs_of(jobs, args)]
        return [run for run in runs if f"{run.output.parent}/{run.label}" in done]

    runs = [run for jobs in plan.afters().values() for run in runs_of(jobs, args)]
    return [run for run in runs if f"{run.output}/{plan.changed(run.name)}_{run.seed}" in done]


def missing(plan: Plan, args: argparse.Namespace) -> list[Run]:
    """The final runs that the file of results does not hold, and those that they begin at."""
    choices = read_choices(plan)
    known = read_results(plan)
    splits = {} if known is None else of_plan(known, plan, choices)[0]
    found = []
    for split, jobs in plan.finals(choices).items():
        runs = runs_of(jobs, args)
        absent = [
            run
            for run in runs
            if run.name in plan.remedies and is_of(run.name, args.only) and not _is_recorded(splits, split, run)
        ]
        found += with_what_comes_before(runs, absent)

    return found


def _is_recorded(splits: Mapping[str, Any], split: str, run: Run) -> bool:
    """Whether the splits of known results hold this run."""
    runs = splits.get(split, {"runs": {}})["runs"]
    return str(run.seed) in runs.get(run.name, {})


def write_lists(plan: Plan) -> None:
    for name, files in plan.lists.items():
        names = [line for file in files for line in read_list(Path(data_folder()) / file)]
        path = plan.place / "lists" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_list(path, names)


# Choices ------------------------------------------------------------------------------------------------------------


def choose(plan: Plan, force: bool) -> None:
    """Write the strength of each remedy that has the highest mIoU on the tuning images."""
    path = ROOT / plan.choices
    refuse_to_overwrite([path], force)
    runs = {run.name: run for run in runs_of(plan.tuning())} if plan.tuned() else {}
    refuse_others(list(runs.values()))
    choices: dict[str, Any] = {}
    for name, strengths in plan.remedies.items():
        if len(strengths) == 1:
            choices[name] = {"chosen": next(iter(strengths)), "tried": {}}
            continue

        tried = {strength: _tuned(runs[f"{name}-{i}"]) for i, strength in enumerate(strengths)}
        choices[name] = {
            "chosen": max(tried, key=lambda strength: tried[strength]["miou"]),
            "by_tail": max(tried, key=lambda strength: tried[strength]["miou_tail"]),
            "tried": tried,
            "trained": trainings(plan, name),
        }

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, choices)
    print("\n".join(f"{name}: {choice['chosen']}" for name, choice in choices.items()))


def trainings(plan: Plan, name: str) -> dict[str, list[str]]:
    """Strength of a remedy → what it is tuned with, beside the command."""
    shared = [plan.config, *plan.settings, *plan.tune]
    if plan.trunk:
        shared += [f"from step {plan.branch} of {plan.trunk}"]

    found = {}
    for strength in plan.remedies[name]:
        before = [word for step in plan.before(name, strength) for word in (step, *said(plan, plan.step(step)))]
        found[strength] = [*shared, *before, *said(plan, plan.entry(name, strength))]

    return found


def _tuned(run: Run) -> dict[str, float]:
    if state_of(run) != "done":
        raise ValueError(f"{run.title}: is {state_of(run)}; end the step `tune` first")
    result = read_json(run.folder / "evaluation.json")
    tail = [item["id"] for item in result["per_class"] if item["tail"]]
    head = head_and_tail(np.array(result["confusion"]), tail, result["convention"])["miou_head"]
    scores = {key: result[key] if result[key] is not None else float("-inf") for key in ("miou", "miou_tail")}
    return {**scores, "miou_head": head if math.isfinite(head) else float("-inf")}


def read_choices(plan: Plan) -> dict[str, Any]:
    """The choices, which fit the plan. ValueError where they do not."""
    path = ROOT / plan.choices

    def parse(path: Path) -> dict[str, Any]:
        choices = load_json(path)
        for name, strengths in plan.remedies.items():
            chosen = choices.get(name, {}).get("chosen")
            if chosen not in strengths:
                raise ValueError(f"{name}: {chosen!r} is no strength of the plan")
            if choices[name].get("trained", trainings(plan, name)) != trainings(plan, name):
                raise ValueError(f"{name}: was chosen among other strengths, or settings, than the plan has now")
        return choices

    return read_artifact(path, parse, "take the steps `tune` and `choose` first")


# Results ------------------------------------------------------------------------------------------------------------


def collect(plan: Plan, only: list[str] | None = None) -> None:
    """Write what the final runs that are done say, compactly: every statistic can be made from it.

    only: read the runs of these splits alone; what the file holds of others stays.
    """
    choices = read_choices(plan)
    known = read_results(plan)
    splits, left = ({}, []) if known is None else of_plan(known, plan, choices)
    print("\n".join(left), end="\n" if left else "")
    for name, jobs in plan.finals(choices).items():
        if only and name not in only:
            continue
        order = list(plan.remedies)
        planned = runs_of(jobs)
        runs = [run for run in planned if run.name in order]
        runs.sort(key=lambda run: order.index(run.name))
        results_of_split = trained(runs, choices, scored(plan, name))
        if plan.after:
            results_of_split += changed_after(runs_of(plan.afters()[name]))

        found = split_of(results_of_split, begun(planned, list(plan.steps)))
        if found is not None:
            found["convention"] = convention_of(plan, found)
            splits[name] = joined(splits.get(name), found, f"{plan.results}: {name}")

    if not splits:
        raise ValueError(f"{plan.output}: no final run is done; take the step `final` first")

    pools = {name: pool_of(splits, pool.splits, read_blocks(ROOT / pool.blocks)) for name, pool in plan.pools.items()}
    results = {
        **told(plan, choices),
        "note": plan.note,
        "against": dict(plan.against),
        "after": changes(plan),
        "splits": splits,
        "pools": pools,
        "scenes": {name: scenes_of(plan, name, splits[name]["images"]) for name in plan.scenes if name in splits},
    }
    path = ROOT / plan.results
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_text(json.dumps(results, separators=(",", ":"), ensure_ascii=False))

    done = {name: sum(len(seeds) for seeds in split["runs"].values()) for name, split in splits.items()}
    print(f"{path}: " + ", ".join(f"{count} runs of {name}" for name, count in done.items()))


def scenes_of(plan: Plan, split: str, images: list[str]) -> dict[str, Any]:
    """What the file of results holds of a split's scenes. ValueError where its images do not fit them."""
    scenes = plan.scenes[split]
    try:
        if scenes.pieces is not None:
            return {"of": "pieces", "parts": pieces_of(images, scenes.pieces)}
        return {"of": "blocks", "parts": blocks_of(images, read_blocks(ROOT / scenes.blocks))}
    except ValueError as error:
        raise ValueError(f"scenes.{split}: {error}") from error


def convention_of(plan: Plan, split: Mapping[str, Any]) -> str:
    """By which the page scores a split. ValueError where further scores are recorded, which are means by another."""
    if plan.convention in (None, split["convention"]):
        return split["convention"]

    for name, seeds in split["runs"].items():
        if any(run["further"] for run in seeds.values()):
            raise ValueError(
                f"{plan.results}: {name}: further scores are means by {split['convention']}, which convention: "
                f"{plan.convention} does not change; take one of them out of the plan"
            )
    return plan.convention


def read_results(plan: Plan) -> dict[str, Any] | None:
    """What earlier calls of `collect` have left, None where there was none."""
    path = ROOT / plan.results
    return read_json(path) if path.is_file() else None


def page(plan: Plan, file: str) -> None:
    """Write the page and its pictures, and what tells of the same results: the README's table, the model cards."""
    path = ROOT / plan.page
    results = read_results(plan)
    path.write_text(page_of(results, file, plan.title), encoding="utf-8")
    for name, picture in pictures(results, file).items() if results else ():
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / name).write_text(picture, encoding="utf-8")

    print(path)
    if results and summary.renew(ROOT / "README.md", file, results):
        print(ROOT / "README.md")
    if (ROOT / plan.results).parent == model_cards.RESULTS:
        model_cards.write()
        print(model_cards.PAGE)


if __name__ == "__main__":
    cli.run(main)
