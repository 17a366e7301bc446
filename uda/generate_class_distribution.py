"""Class shares of the warmed-up network's predictions: `python generate_class_distribution.py CONFIG`.

Read off the checkpoint's soft pseudo-labels where they are complete, else from a pass over the target images.
"""

import numpy as np

from common import cli, distributed
from common.files import replacing
from uda.config import DISTRIBUTION, SOFT, stage_config, stage_parser
from uda.made_from import made_from, soft_labels_of
from uda.pseudo_labels import (
    TargetImages,
    checkpoint_of,
    class_distribution,
    distribution_of_soft,
    open_network,
)


def main() -> None:
    parser = stage_parser(__doc__, stage="warm_up")
    cli.add_checkpoint(parser, default="the stage's newest")
    args = cli.parse(parser)
    cfg = stage_config(args)
    data = TargetImages(cfg)
    soft = cfg.folder / SOFT
    known = made_from(soft, soft_labels_of(checkpoint_of(cfg, args.checkpoint)))
    if known and all((soft / f"{name}.npy").exists() for name in data.dataset.names):
        shares = distribution_of_soft(soft, data.dataset.names, cfg.model.num_classes)
    else:
        device = distributed.start(args.device)
        shares = class_distribution(
            open_network(cfg, args.checkpoint, device), data, cfg.data.workers, device
        )

    path = cfg.folder / DISTRIBUTION
    path.parent.mkdir(parents=True, exist_ok=True)

    with replacing(path) as draft:
        np.save(draft, shares.numpy())

    for name, share in zip(data.dataset.row.classes, shares.tolist(), strict=True):
        print(f"{name:<16} {share:.6f}")

    print(f"class distribution in {path}")


if __name__ == "__main__":
    cli.run(main)
