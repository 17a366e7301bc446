"""Evaluate a checkpoint: `python fully_sup/test.py [CONFIG] [CHECKPOINT] [--tta] [--save-predictions DIR] [k=v …]`.

CHECKPOINT is one of ours (a run's `checkpoints/best`; its config is inside, so CONFIG may be left out), a .safetensors
file, or an official MMSegmentation file. With CONFIG alone it is the best one of the config's run.
"""

import argparse
from pathlib import Path
from typing import Any

from common import cli, distributed
from common.evaluation.folder import folder_of_test, kept_in, write_test
from common.evaluation.pictures import prediction_files
from common.experiment import Experiment, print_result
from common.files import refuse_to_overwrite, write_json
from common.models import load_model
from common.models.carried import best_of, open_config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_config(parser)
    cli.add_checkpoint(parser)
    cli.add_evaluation(parser)
    parser.add_argument(
        "--json", metavar="FILE", help="scores go here, not into RUN/test/NAME/evaluation.json"
    )
    cli.add_force(parser)
    args = cli.parse(parser)
    cfg = open_config(args.config, args.checkpoint, args.overrides)
    args.checkpoint = args.checkpoint or best_of(cfg)
    if args.tta:
        cfg = cli.with_tta(cfg)

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
