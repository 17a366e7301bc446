"""Turn any known checkpoint into safetensors: python scripts/convert_checkpoint.py CONFIG FILE --out NAME.safetensors.

Reads what load_weights reads (MMSegmentation, USRN, CPSL, detectron2 and our own files) and checks every tensor against
the config's network. The result holds tensors alone and can be used wherever a checkpoint can.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import cli
from common.files import refuse_to_overwrite, replacing
from common.models import load_model
from common.models.carried import open_config
from common.models.pretrained import cpsl
from common.models.pretrained.containers import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_model(parser)
    cli.add_out(parser, "FILE", "ends in .safetensors")
    parser.add_argument("--prototypes", metavar="FILE", help="also write the prototypes of a CPSL stage-1 file")
    cli.add_force(parser)
    args = cli.parse(parser)
    if args.checkpoint is None:
        parser.error("the following arguments are required: CHECKPOINT")
    if Path(args.out).suffix != ".safetensors":
        raise ValueError(f"--out {args.out}: the name has to end in .safetensors")
    refuse_to_overwrite(filter(None, (args.out, args.prototypes)), args.force)
    cfg = open_config(args.config, args.checkpoint, args.overrides)
    model = load_model(cfg.model, args.checkpoint)
    prototypes = found_prototypes(args.checkpoint)
    if args.prototypes and prototypes is None:
        raise ValueError(f"{args.checkpoint}: holds no prototypes; only stage-1 files of CPSL do")
    write(args.out, model.state_dict(), {"model": cfg.model.name, "source": Path(args.checkpoint).name})
    print(f"{sum(p.numel() for p in model.parameters())} parameters written to {args.out}")
    if args.prototypes:
        Path(args.prototypes).parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.prototypes) as draft:
            torch.save(prototypes, draft)
        print(f"prototypes {tuple(prototypes.shape)} written to {args.prototypes}")
    elif prototypes is not None:
        print(f"the file also holds prototypes {tuple(prototypes.shape)}; --prototypes FILE writes them")


def write(path: str, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A file that appears whole or not at all."""
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as draft:
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, draft, metadata)


def found_prototypes(path: str) -> torch.Tensor | None:
    """Those of an official CPSL checkpoint."""
    raw, _ = read(path)
    return cpsl.read_extras(path).prototypes if cpsl.NETWORK in raw else None


if __name__ == "__main__":
    cli.run(main)
