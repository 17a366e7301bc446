"""Class prototypes of the target from a warmed-up network: `python calc_prototype.py CONFIG [--stage warm_up]`."""

import torch

from common import cli, distributed
from common.files import replacing
from uda.config import PROTOTYPES, stage_config, stage_parser
from uda.pseudo_labels import TargetImages, open_network, prototypes


def main() -> None:
    parser = stage_parser(__doc__, stage="warm_up")
    cli.add_checkpoint(parser, default="the stage's newest")
    args = cli.parse(parser)
    cfg = stage_config(args)
    data = TargetImages(cfg)
    device = distributed.start(args.device)
    result = prototypes(
        open_network(cfg, args.checkpoint, device), data, cfg.data.workers, device
    )
    path = cfg.folder / PROTOTYPES
    path.parent.mkdir(parents=True, exist_ok=True)

    with replacing(path) as draft:
        torch.save(result, draft)

    print(f"prototypes {tuple(result.shape)} of {len(data)} images in {path}")


if __name__ == "__main__":
    cli.run(main)
