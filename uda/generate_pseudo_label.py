"""Pseudo-labels of the target training images: `python generate_pseudo_label.py CONFIG --stage STAGE [--soft]`.

--soft writes class probabilities at stride 8 (stage 1 reads them); without it, labels and confidences at full size
(stages 2 and 3). They lie in the stage's run folder. Files that are there and were made from the same checkpoint are
kept; those of another one are made anew.
"""

import argparse

from common import cli, distributed
from uda.config import HARD, SOFT, stage_config, stage_parser
from uda.made_from import hard_labels_of, made_from, refuse_unknown, renew, soft_labels_of
from uda.pseudo_labels import TargetImages, checkpoint_of, open_network, write_hard, write_soft


def main() -> None:
    parser = stage_parser(__doc__, stage="warm_up")
    parser.add_argument("--soft", action="store_true")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    cli.add_checkpoint(parser, default="the stage's newest")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace files that do not say what they were made from",
    )
    args = cli.parse(parser)
    cfg = stage_config(args)

    checkpoint = checkpoint_of(cfg, args.checkpoint)
    folder, ending = (cfg.folder / SOFT, ".npy") if args.soft else (cfg.folder / HARD, ".png")
    record = soft_labels_of(checkpoint) if args.soft else hard_labels_of(checkpoint, args.flip)
    keep = made_from(folder, record)
    if not args.force:
        refuse_unknown(folder)

    data = TargetImages(cfg, skip=lambda name: keep and (folder / f"{name}{ending}").exists())
    if len(data):
        device = distributed.start(args.device)
        model = open_network(cfg, args.checkpoint, device)
        if not keep:
            renew(folder, record)

        if args.soft:
            write_soft(model, data, folder, cfg.data.workers, device)
        else:
            write_hard(model, data, folder, cfg.data.workers, device, args.flip)

    print(f"{len(data.dataset)} pseudo-labels in {folder} ({len(data)} new)")


if __name__ == "__main__":
    cli.run(main)
