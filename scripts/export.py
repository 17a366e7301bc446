"""A network for use without this project: python scripts/export.py [CONFIG] CHECKPOINT --size HxW --output NAME.pt2.

The program takes images (B, 3, H, W), RGB in 0–255, of exactly this batch and size, and gives class scores
(B, K, H, W). `torch.export.load(NAME.pt2).module()(images)` runs it; PyTorch is all that it needs.
"""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from common import cli
from common.evaluation.adjustment import offsets_of
from common.files import refuse_to_overwrite, replacing
from common.inference import adjusted
from common.models import load_model
from common.models.carried import best_of, open_config

TOLERANCE = 1e-4  # relative L2 difference that the exported program may have


class Scores(nn.Module):
    """A network's class scores as its forward pass, with the offsets (K,) of logit adjustment where there are any."""

    def __init__(self, model: nn.Module, offsets: Tensor | None = None):
        super().__init__()
        self.model, self.offsets = model, offsets

    def forward(self, images: Tensor) -> Tensor:
        scores = self.model.predict(images)
        return adjusted(scores, self.offsets, logits=self.model.scores_are_logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_model(parser)
    parser.add_argument("--size", required=True, metavar="HxW", help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default 1)")
    cli.add_out(parser, "FILE", "ends in .pt2")
    cli.add_force(parser)
    args = cli.parse(parser)
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", args.size)
    if not size or args.batch < 1:
        raise ValueError(f"--size {args.size} --batch {args.batch}: give HEIGHTxWIDTH, such as 512x1024, and 1 or more")
    if Path(args.out).suffix != ".pt2":
        raise ValueError(f"--out {args.out}: the name has to end in .pt2")
    refuse_to_overwrite([args.out], args.force)
    cfg = open_config(args.config, args.checkpoint, args.overrides)
    args.checkpoint = args.checkpoint or best_of(cfg)
    model = load_model(cfg.model, args.checkpoint)
    images = torch.randint(0, 256, (args.batch, 3, int(size[1]), int(size[2])), dtype=torch.uint8)
    scores = Scores(model.eval(), offsets_of(cfg, args.checkpoint))
    apart = export(scores, images, Path(args.out))
    print(f"wrote {args.out}; its scores differ from the network's by {apart:.1e} (relative)")


@torch.no_grad()
def export(model: nn.Module, images: Tensor, out: Path) -> float:
    """Write the program and run what was written; ValueError where it does not give the model's scores."""
    expected = model(images)
    program = torch.export.export(model, (images,))
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as draft:
        torch.export.save(program, draft)
        found = torch.export.load(draft).module()(images)
        apart = float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected).clamp(min=1e-30))
        if not apart <= TOLERANCE:
            raise ValueError(f"{out}: the exported program's scores differ by {apart:.1e} (relative); not written")
    return apart


if __name__ == "__main__":
    cli.run(main)
