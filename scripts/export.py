"""A network for use without this project: python scripts/export.py [CONFIG] CHECKPOINT --size HxW --output NAME.pt2.

The program takes images (B, 3, H, W), RGB in 0–255, of exactly this batch and size, and gives class scores
(B, K, H, W). `torch.export.load(NAME.pt2).module()(images)` runs it; PyTorch is all that it needs. With --dynamic
height and width may change: a second size is tried, and a network that keeps the first one is refused.
NAME.onnx writes ONNX, which needs `pip install .[onnx]`. What was written is run, by onnxruntime there, and its
scores are compared.
"""

import argparse
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
FURTHER = (64, 32)  # pixels by which the second size of --dynamic is higher and wider
ONNX = ("onnx", "onnxruntime", "onnxscript")  # packages
FIXED = ("knet",)  # with the size left open torch.export did not end within minutes (torch 2.14)


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
    parser.add_argument("--dynamic", action="store_true", help="height and width may differ from --size")
    cli.add_out(parser, "FILE", "ends in .pt2 or .onnx")
    cli.add_force(parser)
    args = cli.parse(parser)
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", args.size)
    if not size or args.batch < 1:
        raise ValueError(f"--size {args.size} --batch {args.batch}: give HEIGHTxWIDTH, such as 512x1024, and 1 or more")
    if Path(args.out).suffix not in (".pt2", ".onnx"):
        raise ValueError(f"--out {args.out}: the name has to end in .pt2 or .onnx")
    if Path(args.out).suffix == ".onnx":
        require_onnx()
    refuse_to_overwrite([args.out], args.force)
    cfg = open_config(args.config, args.checkpoint, args.overrides)
    if args.dynamic and cfg.model.name in FIXED:
        raise ValueError(f"--dynamic: model {cfg.model.name} keeps its size; leave it out and export each --size")
    args.checkpoint = args.checkpoint or best_of(cfg)
    model = load_model(cfg.model, args.checkpoint)
    images = torch.randint(0, 256, (args.batch, 3, int(size[1]), int(size[2])), dtype=torch.uint8)
    scores = Scores(model.eval(), offsets_of(cfg, args.checkpoint))
    apart = export(scores, images, Path(args.out), cfg.model.name, args.dynamic)
    print(f"wrote {args.out}; its scores differ from the network's by {apart:.1e} (relative)")


def require_onnx() -> None:
    """ValueError where a package that ONNX needs is not installed."""
    missing = [name for name in ONNX if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install .[onnx], or write a .pt2 file")


@torch.no_grad()
def export(model: nn.Module, images: Tensor, out: Path, name: str, dynamic: bool = False) -> float:
    """Write the program and run what was written; its relative difference from the model.

    name: what the config calls the model. ValueError where it cannot be exported, or does not give the model's scores.
    """
    varying = torch.export.Dim.AUTO
    shapes = ({2: varying, 3: varying},) if dynamic else None
    with refused(f"{out}: model {name} cannot be exported", "choose another network"):
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    out.parent.mkdir(parents=True, exist_ok=True)

    with replacing(out) as draft:
        if out.suffix == ".onnx":
            with refused(f"{out}: model {name} cannot be written in ONNX", "write a .pt2 file"):
                run = write_onnx(program, images, draft)
        else:
            run = write_pt2(program, draft)

        apart = difference(run(images), model(images))
        if dynamic:
            with refused(f"{out}: model {name} keeps its size", "leave --dynamic out and export each --size"):
                apart = max(apart, at_another_size(model, run, images))
        if not apart <= TOLERANCE:
            raise ValueError(f"{out}: the exported program's scores differ by {apart:.1e} (relative); not written")

    return apart


@contextmanager
def refused(what: str, advice: str) -> Iterator[None]:
    """Errors inside become a ValueError of one line: torch's compiler and onnxruntime have classes of their own."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{what} ({type(error).__name__}: {reason}); {advice}") from error


def write_pt2(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
    """Write the program for PyTorch; what runs the file."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


def write_onnx(program: torch.export.ExportedProgram, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    """Write the program in ONNX, weights included; what runs the file."""
    import onnxruntime

    torch.onnx.export(program, (images,), dynamo=True, verbose=False).save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def at_another_size(model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """The difference at a second size. Whatever the program raises that holds on to the first one."""
    height, width = images.shape[-2] + FURTHER[0], images.shape[-1] + FURTHER[1]
    larger = torch.randint(0, 256, (*images.shape[:2], height, width), dtype=torch.uint8)
    return difference(run(larger), model(larger))


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative L2 difference."""
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected).clamp(min=1e-30))


if __name__ == "__main__":
    cli.run(main)
