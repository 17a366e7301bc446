"""Train a supervised model, with or without BLV: `python fully_sup/train.py CONFIG [--resume] [key=value …]`."""

from common import cli, distributed
from common.config import load_config
from common.engine import fit, prepare, rehearse
from common.experiment import Experiment, print_result
from fully_sup.supervised import build_method


def main() -> None:
    args = cli.parse(cli.train_parser(__doc__))
    cfg = load_config(args.config, args.overrides)
    rehearse(cfg, build_method)
    experiment = Experiment(cfg, counted="labeled")  # scans labels, so before the ranks join
    device = distributed.start(args.device)
    experiment.begin(args.resume)
    method = prepare(cfg, build_method, experiment.context, device)
    validate = experiment.evaluator(method, device)
    fit(cfg, method, experiment.open, validate, device=device, resume=args.resume)
    print_result(experiment.last_result())
    experiment.finish()
    distributed.stop()


if __name__ == "__main__":
    cli.run(main)
