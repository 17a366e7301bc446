"""Balance a trained network's classifier: python scripts/rebalance.py RUN NAME [key=value …] [--output DIR].

RUN is a finished run's folder, or a checkpoint of one. NAME and its options are those of docs/remedies.md, e.g.
tau_norm tau=0.7. Words such as eval.per_image=true, with a dot, change the run's config. Everything but the classifier
stays as it is; the result is evaluated as the run was, and DIR (RUN_NAME) is a run's folder itself. logit_adjustment
takes any network: one whose classifier has no bias to hold it keeps its weights, and the result's config has it as
eval.logit_adjustment.

One option may have several values, tau=0.1,0.2,0.5: all are then evaluated with one forward pass an image. DIR holds a
folder for each, with its evaluation and no checkpoint; call this again with the value that is chosen.
"""

import argparse
import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import cli, distributed
from common.config import Config, save_config, to_tree
from common.config.load import config_of
from common.engine import checkpoint, runtime
from common.evaluation.folder import made
from common.evaluation.variants import Repeats, Variants, View, evaluate_variants
from common.experiment import Experiment, counts_of, print_result
from common.files import read_artifact, refuse_to_overwrite, remove, write_json
from common.losses.counts import Counts
from common.losses.logit_adjustment import post_hoc_offsets
from common.models import SegmentationModel, load_model
from common.models.cosine import CosineClassifier, cosine_scale
from common.models.disalign import Aligned
from common.models.pretrained.containers import read_metadata, weight_file
from common.rebalance import STAGE2, Given, build_stage2, find_classifier, read_features, seek_classifier
from common.rebalance.features import Features
from common.rebalance.given import Stage2
from common.rebalance.logit_adjustment import FoldedAdjustment, check_others, folds
from common.steps import digest_of

KIND = "rebalance"  # in the run.json of a result
EARLIER = "rebalanced"  # in the metadata of a checkpoint: what has changed its classifier after training
SCORES = {"mIoU": "miou", "mIoU(tail)": "miou_tail", "mAcc": "macc", "aAcc": "aacc"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run's folder, or a checkpoint of one")
    parser.add_argument("name", help=", ".join(STAGE2))
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


@dataclass(frozen=True)
class Trained:
    """A network that was trained, and its run. place: the name of its classifier, if it has one. file: the weights.
    earlier: the remedies that have changed it after training already."""

    file: Path
    experiment: Experiment
    network: SegmentationModel
    place: str | None
    device: torch.device
    earlier: tuple[str, ...]

    @property
    def cfg(self) -> Config:
        return self.experiment.cfg

    @property
    def step(self) -> int:
        return step_of(self.file)


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
    where = f"{name}: {cfg.name}"
    any_network = all(isinstance(remedy, FoldedAdjustment) for remedy in remedies.values())
    place = seek_classifier(cfg.model) if any_network else find_classifier(cfg.model, where)

    top = Path(output or f"{folder_of(file, cfg)}_{name}")
    folders = {strength: top / strength for strength in remedies}
    earlier = refuse_earlier(folders.values(), file, force)

    experiment = Experiment(cfg, counted=cli.labelled_stream(cfg), train=False)
    target = one_process(device)
    runtime.configure(cfg.train, target)
    before = () if all(map(begins_anew, remedies.values())) else changed_already(file, cfg, name)
    trained = Trained(file, experiment, load_network(cfg, file, target), place, target, before)

    changes = changed(trained, remedies, folders, where)

    for path in earlier:
        remove(path)
    results = score(trained, list(changes.values()))
    facts = {"checkpoint": str(file), "digest": digest_of(file), "name": name}
    found = {}
    for (strength, remedy), result in zip(remedies.items(), results, strict=True):
        found[strength] = {**result, KIND: {**facts, "options": asdict(remedy)}}

    for strength, change in changes.items():
        leave(trained, change, found[strength], started, alone=len(changes) == 1)
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


def begins_anew(remedy: Stage2) -> bool:
    """Whether nothing of the trained classifier is left, so that earlier changes of it are gone."""
    return getattr(remedy, "anew", False)


def changed_already(file: Path, cfg: Config, name: str) -> tuple[str, ...]:
    """What has changed the classifier of a checkpoint after training, which is said, as is what its config adds."""
    earlier = tuple(json.loads(read_metadata(file).get(EARLIER, "[]")))
    tau = cfg.eval.logit_adjustment
    before = [*earlier, *([f"eval.logit_adjustment: {tau:g}"] if tau and name != "logit_adjustment" else [])]
    if before:
        warnings.warn(f"{file}: {', '.join(before)} changed it after training: {name} adds to that", stacklevel=2)
    return earlier


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


def refuse_earlier(folders: Iterable[Path], file: Path, force: bool) -> list[Path]:
    """Refuse to replace an earlier result; with `force`, what is to be removed. The run itself is never touched."""
    folders = list(folders)
    for folder in folders:
        if file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder}: holds the checkpoint that is read; give another --output")

    written = [folder / name for folder in folders for name in ("config.yaml", "evaluation.json", "checkpoints")]
    refuse_to_overwrite(written, force)
    return written


def one_process(device: str | None) -> torch.device:
    if distributed.world_size() > 1:
        raise ValueError(f"{distributed.world_size()} processes: this runs in one; start it without torchrun")
    return distributed.start(device)


def load_network(cfg: Config, file: Path, device: torch.device) -> SegmentationModel:
    """The network that predicts, as the run evaluated it."""
    network = load_model(cfg.model, file).to(device)
    return runtime.arranged(network, cfg.train.channels_last, device)


def given_of(trained: Trained, where: str) -> Given:
    """What a remedy may ask for."""
    cfg = trained.cfg
    counted = trained.experiment.counted
    dataset, statistics = counted.dataset, counted.statistics

    @cache
    def features(mib: int) -> Features:
        options = {"mib": mib, "seed": cfg.seed, "device": trained.device}
        return read_features(trained.network, trained.place, dataset, statistics, cfg.eval, **options)

    return Given(cfg, Counts.from_statistics(statistics), where, features)


# What is changed ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changed:
    """What a remedy makes of the trained network. cfg: of the result, with its folder. classifier: None where nothing
    of the network changes, but `eval.logit_adjustment` of `cfg`."""

    cfg: Config
    classifier: nn.Module | None


def changed(
    trained: Trained, remedies: Mapping[str, Stage2], folders: Mapping[str, Path], where: str
) -> dict[str, Changed]:
    """Strength → what that remedy makes."""
    given = given_of(trained, where)
    classifier = trained.network.get_submodule(trained.place) if trained.place else None
    found = {}

    for strength, remedy in remedies.items():
        if isinstance(remedy, FoldedAdjustment) and not folds(classifier):
            cfg, new = adjusted(given, remedy.tau), None
        else:
            new = remedy(classifier, given)
            cfg = config_with(trained, new)
        folder = folders[strength]
        found[strength] = Changed(replace(cfg, name=folder.name, output=str(folder.parent)), new)

    return found


def adjusted(given: Given, tau: float) -> Config:
    """The run's config with τ in its evaluation."""
    if tau:
        check_others(given, tau)
    together = given.cfg.eval.logit_adjustment + tau
    return replace(given.cfg, eval=replace(given.cfg.eval, logit_adjustment=together))


def config_with(trained: Trained, classifier: nn.Module) -> Config:
    """The run's config, with what the network now has."""
    model = trained.cfg.model
    if isinstance(classifier, Aligned):
        model = replace(model, disalign=trained.place)
    elif isinstance(classifier, CosineClassifier) and classifier.scale != cosine_scale(model):
        model = replace(model, options={**model.options, "scale": classifier.scale})
    return replace(trained.cfg, model=model)


# What is left -------------------------------------------------------------------------------------------------------


def score(trained: Trained, changes: Sequence[Changed]) -> list[dict[str, Any]]:
    """The evaluation of the network with each change on the run's validation set, by the run's settings."""
    experiment, device = trained.experiment, trained.device
    classifiers = [change.classifier for change in changes if change.classifier is not None]
    if classifiers:
        variants: Repeats = Variants(trained.network, trained.place, classifiers)
    else:
        variants = Repeats(trained.network, len(changes))

    pixels = experiment.counted.statistics.pixel_count.tolist()
    views = []
    for change in changes:
        tau = change.cfg.eval.logit_adjustment
        views.append(View(change.cfg.folder, change.cfg.eval, post_hoc_offsets(pixels, tau) if tau else None))

    options = {"device": device, "groups": experiment.levels()}
    results = evaluate_variants(variants.to(device), experiment.val, views, **options)

    rule = {"group_rule": experiment.grouping.rule} if experiment.grouping else {}
    return [{"step": trained.step, **result, **rule} for result in results]


def leave(trained: Trained, change: Changed, result: Mapping[str, Any], started: float, alone: bool) -> None:
    """Write the folder of a result, its evaluation last. alone: it has a checkpoint."""
    cfg, counted = change.cfg, trained.experiment.counted
    cfg.folder.mkdir(parents=True, exist_ok=True)
    if alone:
        save_network(trained, change, result[KIND]["name"])

    save_config(cfg, cfg.folder / "config.yaml")
    write_json(cfg.folder / "statistics.json", counts_of(counted.dataset, counted.statistics))
    write_json(cfg.folder / "run.json", made(cfg, KIND, started, time.time()))
    scalars = {key: value for key, value in result.items() if isinstance(value, int | float | str)}
    (cfg.folder / "log.jsonl").write_text(json.dumps({"kind": "eval", **scalars}) + "\n")
    write_json(cfg.folder / "evaluation.json", result)


def save_network(trained: Trained, change: Changed, name: str) -> None:
    """The checkpoint of a result: the network alone, which everything that reads checkpoints takes as it is."""
    earlier = list(trained.earlier)
    if change.classifier is not None:
        trained.network.set_submodule(trained.place, change.classifier)
        earlier.append(name)
    metadata = {
        EARLIER: json.dumps(earlier),
        "predict_prefix": "",
        "config": json.dumps(to_tree(change.cfg)),
        "class_pixels": json.dumps(trained.experiment.counted.statistics.pixel_count.tolist()),
    }
    checkpoint.save(change.cfg.folder / "checkpoints", trained.step, trained.network, {}, metadata)


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
