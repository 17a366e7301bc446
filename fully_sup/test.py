"""Evaluate a checkpoint: `python fully_sup/test.py [CONFIG] [CHECKPOINT] [--tta] [--save-predictions DIR] …`.

CHECKPOINT is one of ours (a run's `checkpoints/best`; its config is inside, so CONFIG may be left out), a .safetensors
file, or an official MMSegmentation file. With CONFIG alone it is the best one of the config's run.
"""

import argparse

from common import cli, distributed
from common.engine.runtime import arranged, use_tf32
from common.evaluation.folder import folder_of_test, kept_in, write_test
from common.evaluation.pictures import prediction_files
from common.experiment import Experiment, print_result
from common.files import refuse_to_overwrite
from common.models import load_model
from common.models.carried import best_of, open_config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_config(parser)
    cli.add_checkpoint(parser)
    cli.add_evaluation(parser)
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
    use_tf32(cfg.train, device)
    model = load_model(cfg.model, args.checkpoint).to(device)
    model = arranged(model, cfg.train.channels_last, device)

    folder = folder_of_test(cfg, experiment.val, args.checkpoint)
    outputs = {"save_predictions": args.save_predictions, **kept_in(folder, args.json)}
    result = experiment.score(model, device, args.checkpoint, **outputs)
    result |= {"checkpoint": args.checkpoint}
    print_result(result)
    write_test(folder, cfg, result, args.json)

    distributed.stop()


if __name__ == "__main__":
    cli.run(main)
