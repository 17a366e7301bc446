"""Balance a trained network's classifier: python scripts/rebalance.py RUN NAME [key=value …] [--output DIR].

RUN is a finished run's folder, or a checkpoint of one. NAME and its options are those of docs/remedies.md, e.g.
tau_norm tau=0.7. Words such as eval.per_image=true, with a dot, change the run's config. Everything but the classifier
stays as it is; the result is evaluated as the run was, and DIR (RUN_NAME) is a run's folder itself.

One option may have several values, tau=0.1,0.2,0.5: all are then evaluated with one forward pass an image. DIR holds a
folder for each, with its evaluation and no checkpoint; call this again with the value that is chosen.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import cli, distributed
from common.config import Config, save_config, to_tree
from common.config.load import config_of
from common.engine import checkpoint, runtime
from common.evaluation.adjustment import offsets_of
from common.evaluation.folder import made
from common.evaluation.variants import Variants, evaluate_variants
from common.experiment import Experiment, counts_of, print_result
from common.files import read_artifact, refuse_to_overwrite, remove, write_json
from common.losses.counts import Counts
from common.models import SegmentationModel, load_model
from common.models.pretrained.containers import read_metadata, weight_file
from common.rebalance import Given, build_stage2, find_classifier

KIND = "rebalance"  # in the run.json of a result
SCORES = {"mIoU": "miou", "mIoU(tail)": "miou_tail", "mAcc": "macc", "aAcc": "aacc"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run's folder, or a checkpoint of one")
    parser.add_argument("name", help="logit_adjustment or tau_norm")
    parser.add_argument("words", nargs="*", default=[], metavar="key=value", help="options of NAME; section.key=value")
    parser.add_argument("--output", metavar="DIR", help="default: the run's folder with _NAME at its end")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    cli.add_force(parser)
    cli.add_quiet(parser)
    args = parser.parse_intermixed_args()

    results = rebalance(args.run, args.name, args.words, args.output, args.device, args.force)
    if len(results) == 1:
        print_result(next(iter(results.values())))
    else:
        print(curve(results))


def rebalance(
    run: str | Path,
    name: str,
    words: list[str],
    output: str | Path | None = None,
    device: str | None = None,
    force: bool = False,
) -> dict[str, dict[str, Any]]:
    """What `main` does with its arguments: strength → evaluation, and a folder of each. ValueError before any work for
    what cannot be done."""
    started = time.time()
    file = weight_file(run)
    options = [word for word in words if "." not in word.partition("=")[0]]
    cfg = config_of_run(file, [word for word in words if word not in options])
    refuse_unfinished(Path(run), file, cfg)
    remedies = build_stage2(name, options)
    place = find_classifier(cfg.model, f"{name}: {cfg.name}")

    top = Path(output or f"{folder_of(file, cfg)}_{name}")
    folders = {strength: top / strength for strength in remedies}
    make_room(folders.values(), file, force)

    experiment = Experiment(cfg, counted=cli.labelled_stream(cfg), train=False)
    target = one_process(device)
    runtime.configure(cfg.train, target)
    network = load_network(cfg, file, target)

    given = Given(cfg, Counts.from_statistics(experiment.counted.statistics), f"{name}: {cfg.name}")
    trained = network.get_submodule(place)
    classifiers = {strength: remedy(trained, given) for strength, remedy in remedies.items()}
    results = score(experiment, network, place, list(classifiers.values()), list(folders.values()), file, target)

    facts = {"checkpoint": str(file), "name": name}
    found = {}
    for (strength, remedy), result in zip(remedies.items(), results, strict=True):
        found[strength] = {**result, KIND: {**facts, "options": asdict(remedy)}}

    if len(found) == 1:
        save_network(network, place, classifiers[""], top, experiment, file)
    counts = counts_of(*experiment.counted)
    for strength, result in found.items():
        leave(folders[strength], cfg, counts, result, started)

    return found


# What is there ------------------------------------------------------------------------------------------------------


def config_of_run(file: Path, overrides: list[str]) -> Config:
    """The config that a checkpoint carries. ValueError for a file that is none of ours."""
    if not file.is_file():
        raise ValueError(f"{file}: no such checkpoint; give a run's folder or a checkpoint of one")

    stored = read_metadata(file).get("config")
    if stored is None:
        raise ValueError(f"{file}: holds no config; give a run's folder or a checkpoint of one")

    tree = read_artifact(file, lambda _: json.loads(stored))
    return config_of(tree, overrides, str(file))


def step_of(file: Path) -> int:
    return int(read_metadata(file).get("step", 0))


def refuse_unfinished(run: Path, file: Path, cfg: Config) -> None:
    """ValueError for a run's folder whose training has not ended; a checkpoint that is named is taken as it is."""
    step = step_of(file)
    if (run / "checkpoints").is_dir() and step < cfg.train.steps:
        text = f"its training stopped at step {step} of {cfg.train.steps}"
        raise ValueError(f"{run}: {text}; continue it with --resume, or give the checkpoint itself")


def folder_of(file: Path, cfg: Config) -> Path:
    """The folder of the run that a checkpoint lies in."""
    checkpoints = file.absolute().parents[1]
    return checkpoints.parent if checkpoints.name == "checkpoints" else cfg.folder


def make_room(folders: Any, file: Path, force: bool) -> None:
    """Refuse to replace an earlier result, or with `force` remove it; the run itself is never touched."""
    for folder in folders:
        if file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder}: holds the checkpoint that is read; give another --output")

    there = [folder / name for folder in folders for name in ("config.yaml", "evaluation.json", "checkpoints")]
    refuse_to_overwrite(there, force)
    for path in there:
        remove(path)


def one_process(device: str | None) -> torch.device:
    if distributed.world_size() > 1:
        raise ValueError(f"{distributed.world_size()} processes: this runs in one; start it without torchrun")
    return distributed.start(device)


def load_network(cfg: Config, file: Path, device: torch.device) -> SegmentationModel:
    """The network that predicts, as the run evaluated it."""
    network = load_model(cfg.model, file).to(device)
    return network.to(memory_format=torch.channels_last) if cfg.train.channels_last else network


# What is left -------------------------------------------------------------------------------------------------------


def score(
    experiment: Experiment,
    network: SegmentationModel,
    place: str,
    classifiers: list[nn.Module],
    folders: list[Path],
    file: Path,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The evaluation of the network with each classifier on the run's validation set, by the run's settings."""
    cfg = experiment.cfg
    variants = Variants(network, place, classifiers).to(device)
    offsets = offsets_of(cfg, file, experiment.counted.statistics.pixel_count.tolist())
    options = {"device": device, "groups": experiment.levels(), "offsets": offsets}
    results = evaluate_variants(variants, experiment.val, cfg.eval, folders, **options)

    rule = {"group_rule": experiment.grouping.rule} if experiment.grouping else {}
    return [{"step": step_of(file), **result, **rule} for result in results]


def leave(
    folder: Path, cfg: Config, counts: Mapping[str, Any], result: Mapping[str, Any], started: float
) -> None:
    """The files of a run, as far as there was one: no training."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(named(cfg, folder), folder / "config.yaml")
    write_json(folder / "statistics.json", counts)
    write_json(folder / "run.json", made(named(cfg, folder), KIND, started, time.time()))

    scalars = {key: value for key, value in result.items() if isinstance(value, int | float | str)}
    (folder / "log.jsonl").write_text(json.dumps({"kind": "eval", **scalars}) + "\n")
    write_json(folder / "evaluation.json", result)


def named(cfg: Config, folder: Path) -> Config:
    return replace(cfg, name=folder.name, output=str(folder.parent))


def save_network(
    network: SegmentationModel, place: str, classifier: nn.Module, folder: Path, experiment: Experiment, file: Path
) -> None:
    """The checkpoint of a result: the network alone, which everything that reads checkpoints takes as it is."""
    network.set_submodule(place, classifier)
    metadata = {
        "predict_prefix": "",
        "config": json.dumps(to_tree(named(experiment.cfg, folder))),
        "class_pixels": json.dumps(experiment.counted.statistics.pixel_count.tolist()),
    }
    checkpoint.save(folder / "checkpoints", step_of(file), network, {}, metadata)


def curve(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a strength, in percent."""
    wide = max(map(len, results))
    lines = [" " * wide + "".join(f"  {title:>10}" for title in SCORES)]
    for strength, result in results.items():
        values = [result[key] for key in SCORES.values()]
        cells = ["-" if value is None else f"{100 * value:.2f}" for value in values]
        lines.append(f"{strength:<{wide}}" + "".join(f"  {cell:>10}" for cell in cells))

    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
