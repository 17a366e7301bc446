#!/usr/bin/env python
"""Writes a toy data set in the layout of a real one.

Example: python scripts/make_toy.py cityscapes --root datasets/toy_cityscapes --train 96 --val 32 --size 128x256
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data import toy
from common.data.toy.canvas import DOMAINS


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no HEIGHTxWIDTH, such as 128x256")
    return int(match[1]), int(match[2])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layout", help=", ".join(toy.LAYOUTS))
    parser.add_argument("--root", required=True, help="folder to write")
    parser.add_argument("--train", type=int, help="training images")
    parser.add_argument("--val", type=int, help="validation images")
    parser.add_argument("--size", type=size, help="HEIGHTxWIDTH in pixels, up to the real 1024x2048")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--domain", help=", ".join(DOMAINS))
    parser.add_argument("--train-ids", action="store_true", help="cityscapes: also write labelTrainIds")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = vars(parse(arguments))
    if not given.pop("train_ids"):
        options = {}
    elif given["layout"] == "cityscapes":
        options = {"train_ids": True}
    else:
        print(f"error: --train-ids is for the layout cityscapes, not {given['layout']}", file=sys.stderr)
        return 2
    try:
        root = toy.make(**given, **options)
        for name, share in toy.shares(root).items():
            print(f"{100 * share:8.3f} %  {name}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given['layout']} at {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
