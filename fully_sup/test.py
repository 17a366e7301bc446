"""Evaluate a checkpoint: `python fully_sup/test.py CONFIG CHECKPOINT [--tta] [--save-predictions DIR] [key=value …]`.

CHECKPOINT is one of ours (a run's `checkpoints/best`), a .safetensors file, or an official MMSegmentation file.
"""

import argparse
import dataclasses
from pathlib import Path

from common import cli, distributed
from common.config import load_config
from common.experiment import Experiment, print_result
from common.files import write_json
from common.models import build_model, load_weights

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of MMSegmentation's test-time augmentation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--tta", action="store_true", help="average six scales, each also mirrored")
    parser.add_argument("--save-predictions", metavar="DIR", help="write one PNG an image")
    parser.add_argument("--json", metavar="FILE", help="where the scores go; default: <run folder>/test.json")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.config, args.overrides)
    if args.tta:
        cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, scales=SCALES, flip=True))
    experiment = Experiment(cfg, train=False)
    device = distributed.start(args.device)
    model = build_model(dataclasses.replace(cfg.model, pretrained=False, checkpoint=None))
    load_weights(model, args.checkpoint)
    result = experiment.score(model.to(device), device, save_predictions=args.save_predictions)
    result |= {"checkpoint": args.checkpoint, "scales": cfg.eval.scales, "flip": cfg.eval.flip}
    print_result(result)
    if distributed.rank() == 0:
        out = Path(args.json) if args.json else cfg.folder / "test.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
        print(f"scores written to {out}")
    distributed.stop()


if __name__ == "__main__":
    cli.run(main)
