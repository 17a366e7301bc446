"""Pseudo-labels of the target training images: `python generate_pseudo_label.py CONFIG --stage STAGE [--soft]`.

--soft writes class probabilities at stride 8 (stage 1 reads them); without it, labels and confidences at full size
(stages 2 and 3). They lie in the stage's run folder; files that are there already are kept.
"""

import argparse

from common import cli, distributed
from uda.config import HARD, SOFT, stage_config, stage_parser
from uda.pseudo_labels import TargetImages, open_network, write_hard, write_soft


def main() -> None:
    parser = stage_parser(__doc__, stage="warm_up")
    parser.add_argument("--soft", action="store_true")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpoint", help="default: the stage's newest")
    args = parser.parse_intermixed_args()
    cfg = stage_config(args)
    folder = cfg.folder / (SOFT if args.soft else HARD)
    ending = ".npy" if args.soft else ".png"
    data = TargetImages(cfg, skip=lambda name: (folder / f"{name}{ending}").exists())
    if len(data):
        device = distributed.start(args.device)
        model = open_network(cfg, args.checkpoint, device)
        if args.soft:
            write_soft(model, data, folder, cfg.data.workers, device)
        else:
            write_hard(model, data, folder, cfg.data.workers, device, args.flip)
    print(f"{len(data.dataset)} pseudo-labels in {folder} ({len(data)} new)")


if __name__ == "__main__":
    cli.run(main)
