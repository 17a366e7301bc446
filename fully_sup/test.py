"""Evaluate a checkpoint: `python fully_sup/test.py CONFIG CHECKPOINT [--tta] [--save-predictions DIR] [key=value …]`.

CHECKPOINT is one of ours (a run's `checkpoints/best`), a .safetensors file, or an official MMSegmentation file.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from common import cli, distributed
from common.config import load_config
from common.evaluation.folder import folder_of_test, kept_in, write_test
from common.evaluation.pictures import prediction_files
from common.experiment import Experiment, print_result
from common.files import refuse_to_overwrite, write_json
from common.models import load_model

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of MMSegmentation's test-time augmentation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument(
        "--tta", action="store_true", help="average six scales, each also mirrored"
    )
    parser.add_argument("--save-predictions", metavar="DIR", help="write one PNG an image")
    parser.add_argument(
        "--json", metavar="FILE", help="scores go here, not into RUN/test/NAME/evaluation.json"
    )
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N; default: a GPU where there is one"
    )
    cli.add_force(parser)
    cli.add_quiet(parser)
    args = parser.parse_intermixed_args()
    cfg = load_config(args.config, args.overrides)
    if args.tta:
        cfg = dataclasses.replace(
            cfg, eval=dataclasses.replace(cfg.eval, scales=SCALES, flip=True)
        )

    experiment = Experiment(cfg, train=False)
    predictions = prediction_files(args.save_predictions, experiment.val, cfg.eval)
    refuse_to_overwrite([*predictions, *filter(None, [args.json])], args.force)
    device = distributed.start(args.device)
    model = load_model(cfg.model, args.checkpoint)

    folder = folder_of_test(cfg, experiment.val, args.checkpoint)
    kept = {} if args.json else kept_in(folder)
    outputs = {"save_predictions": args.save_predictions, **kept}
    result = experiment.score(model.to(device), device, args.checkpoint, **outputs)
    result |= {"checkpoint": args.checkpoint}
    print_result(result)
    if args.json is None:
        write_test(folder, cfg, result)
    elif distributed.rank() == 0:
        write_scores(Path(args.json), result)

    distributed.stop()


def write_scores(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"scores written to {path}")


if __name__ == "__main__":
    cli.run(main)
