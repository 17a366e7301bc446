"""Evaluate a stage: `python test.py configs/gta5_to_cityscapes --stage stage3 [--checkpoint FILE] [--eval teacher]`.

One evaluation gives the means over 19, 16 and 13 Cityscapes classes: mIoU16 and mIoU13 are means over subsets of the
model's own classes, those that neither labels nor predictions show left out. With `--history` nothing is evaluated: it
prints the target mIoU that each stage of the task ended with, and writes the report that compares them.
"""

from dataclasses import replace
from pathlib import Path

from common import cli, distributed
from common.config import Config
from common.data import DATASETS
from common.engine.checkpoint import AVERAGE, MODEL
from common.evaluation.folder import folder_of_test, kept_in, write_test
from common.evaluation.pictures import prediction_files
from common.experiment import Experiment, leave_report, print_result
from common.files import load_json, read_artifact, refuse_to_overwrite
from common.models.pretrained.containers import read_metadata
from uda.config import STAGES, split_name, stage_config, stage_parser
from uda.pseudo_labels import checkpoint_of, open_network

# --eval → where a checkpoint of ours has that network
NETWORKS = {"student": MODEL, "teacher": "teacher.", "average": AVERAGE}
SUBSETS = {"miou16": "cityscapes16", "miou13": "cityscapes13"}


def main() -> None:
    parser = stage_parser(__doc__, stage="stage3")
    cli.add_checkpoint(parser, "--resume_path", "--resume", default="the stage's newest")
    cli.add_evaluation(parser)
    parser.add_argument(
        "--eval",
        choices=tuple(NETWORKS),
        help="which network of the checkpoint; default: the one that predicts in training",
    )
    parser.add_argument(
        "--history",
        action="store_true",
        help="print and report the stored results of all stages",
    )
    cli.add_force(parser)
    args = cli.parse(parser)
    cfg = stage_config(args)
    if args.history:
        show_history(cfg)
        return
    if args.tta:
        cfg = cli.with_tta(cfg)

    experiment = Experiment(cfg, train=False)  # inference needs no source data
    predictions = prediction_files(args.save_predictions, experiment.val, cfg.eval)
    refuse_to_overwrite([*predictions, *filter(None, [args.json])], args.force)
    device = distributed.start(args.device)
    checkpoint = checkpoint_of(cfg, args.checkpoint)
    network, prefix = chosen_network(checkpoint, args.eval)
    model = open_network(cfg, args.checkpoint, device, prefix)

    folder = folder_of_test(cfg, experiment.val, checkpoint, network if prefix else "")
    outputs = {"save_predictions": args.save_predictions, **kept_in(folder, args.json)}
    result = experiment.score(model, device, checkpoint, **outputs)
    result |= subset_means(result) | {"checkpoint": str(checkpoint), "network": network}
    print_result(result)
    print_lines(result)
    write_test(folder, cfg, result, args.json)


def chosen_network(checkpoint: Path, asked: str | None) -> tuple[str, str | None]:
    """Which of NETWORKS is evaluated, and its prefix in the checkpoint; None where it is the one that predicts."""
    names = {prefix: name for name, prefix in NETWORKS.items()}
    predicts = names.get(read_metadata(checkpoint).get("predict_prefix", ""), "student")
    if asked in (None, predicts):
        return predicts, None

    return asked, NETWORKS[asked]


def subset_means(result: dict) -> dict[str, float]:
    """Means over the 16 and 13 classes of the SYNTHIA protocols, where the model has them all.

    Without the classes whose IoU is undefined (None), as in the table's mean.
    """
    iou = {item["name"]: item["iou"] for item in result["per_class"]}
    means = {}

    for key, row in SUBSETS.items():
        names = DATASETS[row].classes
        defined = [iou[name] for name in names if iou.get(name) is not None]
        if set(names) <= iou.keys() and defined:
            means[key] = sum(defined) / len(defined)

    return means


def print_lines(result: dict) -> None:
    """The lines of the release's log, which users' scripts read: fractions."""
    for name, key in (
        ("Overall Acc", "aacc"),
        ("Mean Acc ", "macc"),
        ("FreqW Acc ", "fwiou"),
        ("Mean IoU ", "miou"),
    ):
        print(f"{name}: \t: {result[key]}")
    for key in SUBSETS:
        if key in result:
            print(f"{key}: {100 * result[key]:.2f}")


def show_history(cfg: Config) -> None:
    """Target mIoU of every stage of the task and the variant that has been evaluated in training, and their report:
    `report.html` beside the runs, or `report_VARIANT.html`.

    A stage that the variant does not have is the plain one. ValueError where there is none.
    """
    found = [
        path for path in (evaluation_of(cfg, stage) for stage in STAGES) if path is not None
    ]
    if not found:
        raise ValueError(
            f"{cfg.output}: no stage has been evaluated there; main.sh or train.py runs them"
        )
    for path in found:
        print(
            f"{path.parent.name:<14} target mIoU {100 * read_artifact(path, stored_miou):.2f}"
        )

    variant = split_name(cfg.name)[1]
    name = f"report_{variant}.html" if variant else "report.html"
    leave_report(Path(cfg.output) / name, [path.parent for path in found])


def stored_miou(path: Path) -> float:
    """For `read_artifact`."""
    return float(load_json(path)["miou"])


def evaluation_of(cfg: Config, stage: str) -> Path | None:
    """The stored result of a stage."""
    variant = split_name(cfg.name)[1]
    names = [f"{stage}_{variant}", stage] if variant else [stage]
    paths = (replace(cfg, name=name).folder / "evaluation.json" for name in names)
    return next((path for path in paths if path.is_file()), None)


if __name__ == "__main__":
    cli.run(main)
