"""From runs that are done to what the file of results holds of them."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.evaluation.identity import differences
from common.evaluation.per_image import FILE, read_per_image
from common.files import read_json
from common.jobs import Run, refuse_others, state_of
from common.models.pretrained.containers import weight_file
from common.steps import digest_of
from scripts.study.further import FURTHER, FURTHER_OF_CLASS
from scripts.study.plan import SCORES, STRENGTHS, Plan, runs_of

EVALUATION = "evaluation.json"  # in the folder of a run
ADJUSTMENT = "logit_adjustment"  # what is changed after training, and the key of τ in an evaluation
SAME = 1e-4  # share of pixels that another order of sums may move


class Result(NamedTuple):
    """A result of a run."""

    run: Run
    folder: Path
    name: str  # under which it is recorded
    strength: str
    scores: Path | None = None  # what the step `score` has left


def scored(plan: Plan, split: str) -> dict[str, Path]:
    """Label of a final run → the file of its further scores, where the step `score` has left one. ValueError where one
    is not what the plan says now."""
    runs = runs_of(plan.scorings()[split]) if plan.score else []
    done = [run for run in runs if state_of(run) == "done"]
    refuse_others(done)
    return {run.label: run.folder / f"{SCORES}.json" for run in done}


def trained(runs: list[Run], choices: Mapping[str, Any], scored: Mapping[str, Path]) -> list[Result]:
    """The results of trainings that are done. ValueError where one is not what the plan says now."""
    done = [run for run in runs if state_of(run) == "done"]
    refuse_others(done)
    return [Result(run, run.folder, run.name, choices[run.name]["chosen"], scored.get(run.label)) for run in done]


def begun(runs: list[Run], steps: Collection[str]) -> list[Result]:
    """The results of those `steps` of the plan that are done and leave an evaluation as trainings do. ValueError where
    one is not what the plan says now."""
    done = [run for run in runs if run.name in steps and state_of(run) == "done" and (run.folder / FILE).is_file()]
    refuse_others(done)
    return [Result(run, run.folder, run.name, "") for run in done]


def changed_after(runs: list[Run]) -> list[Result]:
    """The results of changed classifiers, one a strength. ValueError where one is not what the plan says now, or of a
    network that has been trained anew since."""
    done = [run for run in runs if state_of(run) == "done"]
    refuse_others(done)
    results = [
        Result(run, folder, f"{run.name} {folder.name}", folder.name)
        for run in done
        for folder in sorted((run.folder / STRENGTHS).iterdir(), key=_number)
    ]
    for result in results:
        refuse_stale(result)

    return results


def refuse_stale(result: Result) -> None:
    """ValueError where the weights that were changed are not those that their run has now. Nothing is known of a run
    that is no longer there, or of a result without a digest."""
    change = read_json(result.folder / EVALUATION).get("rebalance", {})
    if change.get("digest") is None:
        return

    read = result.run.cwd / change["checkpoint"]
    trained = read.parents[2]  # RUN/checkpoints/step_N/FILE
    now = weight_file(trained)
    if now.is_file() and digest_of(now) != change["digest"]:
        raise ValueError(
            f"{result.run.folder}: is of weights that {trained} no longer has; "
            "remove it and take the step `after` again"
        )


def _number(folder: Path) -> tuple[float, str]:
    """In the order of the numbers that end their names, tau_0.5 before tau_1."""
    end = folder.name.rpartition("_")[2]
    try:
        return float(end), folder.name
    except ValueError:
        return 0.0, folder.name


def split_of(results: list[Result], starts: list[Result]) -> dict[str, Any] | None:
    """What the results of one split say, and what they begin at; None where there is no result."""
    if not results:
        return None

    first = results[0].folder
    classes = read_json(first / EVALUATION)["per_class"]
    return {
        "classes": [item["name"] for item in classes],
        "tail": [item["id"] for item in classes if item["tail"]],
        "convention": read_json(first / EVALUATION)["convention"],
        "identity": read_json(first / EVALUATION)["identity"],
        "images": read_per_image(first / FILE).names,
        "runs": recorded(results, first),
        "starts": recorded(starts, first),
    }


def recorded(results: list[Result], first: Path) -> dict[str, dict[str, Any]]:
    """Name → seed → what is kept of a run. ValueError where one does not compare with that of the folder `first`."""
    found: dict[str, dict[str, Any]] = {}
    other = read_json(first / EVALUATION)
    for run, folder, name, strength, scores in results:
        result = read_json(folder / EVALUATION)
        if parts := differences(unadjusted(result, other), other):
            raise ValueError(f"{run.title}: does not compare with the other runs: {'; '.join(parts)}")

        made = read_json(folder / "run.json")
        record = {key: made.get(key) for key in ("minutes", "commit", "machine")}
        again = result if scores is None else scored_again(scores, result)
        matrices = packed(read_per_image(folder / FILE).matrices)
        record |= {"strength": strength, "matrices": matrices, "further": further(again)}
        found.setdefault(name, {})[str(run.seed)] = record

    return found


def unadjusted(result: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """A result, to be compared with `other`. One of scripts/rebalance.py may name τ more than that in its evaluation,
    for want of a bias that could hold it: that is its change, and is left out."""
    change = result.get("rebalance", {})
    if change.get("name") != ADJUSTMENT:
        return result

    known = result["identity"]
    before = other["identity"].get(ADJUSTMENT, 0.0)
    if not math.isclose(known.get(ADJUSTMENT, 0.0), before + change["options"]["tau"]):
        return result

    return {**result, "identity": {**known, ADJUSTMENT: before}}


def scored_again(path: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """What the step `score` has left. ValueError where it is of other predictions than the run's own `result`."""
    scores = read_json(path)
    if parts := differences(scores, result):
        raise ValueError(f"{path}: is not of the run's evaluation: {'; '.join(parts)}")

    moved = np.abs(np.subtract(scores["confusion"], result["confusion"])).sum() / 2
    if moved > SAME * np.sum(result["confusion"]):
        raise ValueError(f"{path}: {moved:.0f} pixels are predicted otherwise than in the run's own evaluation")

    return scores


def further(scores: Mapping[str, Any]) -> dict[str, Any]:
    """What scores say of the tail beyond the confusion matrix; nothing where they say nothing."""
    means = {key: scores[key] for key in (*FURTHER, "boundary") if key in scores}
    classes = {
        item["name"]: {key: item[key] for key in FURTHER_OF_CLASS if key in item}
        for item in scores["per_class"]
        if item["tail"]
    }
    return {**means, "classes": classes} if means else {}


def joined(known: Mapping[str, Any] | None, found: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The runs of a split that were known, and those that were found, which replace others of the same seed.

    ValueError, which begins with `where`, where the two are of other images or settings, as far as both say.
    """
    if known is None:
        return found

    parts = differences({"identity": known["identity"]}, {"identity": found["identity"]})
    if known["images"] != found["images"]:
        parts.append("other names of images")
    if parts:
        raise ValueError(
            f"{where}: holds results of other images or settings: {'; '.join(parts)}; give the plan another `results`"
        )

    runs = {}
    for part in ("runs", "starts"):
        old, new = known.get(part, {}), found[part]
        runs[part] = {name: {**old.get(name, {}), **new.get(name, {})} for name in {**old, **new}}

    # what only one of them says goes on being said
    return {**found, **runs, "identity": {**known["identity"], **found["identity"]}}


def packed(matrices: np.ndarray) -> list[list[int]]:
    """Of every image's matrix the numbers that are not 0: place, number, place, number, …"""
    flat = matrices.reshape(len(matrices), -1)
    return [np.stack([row.nonzero()[0], row[row.nonzero()]], 1).ravel().tolist() for row in flat]
