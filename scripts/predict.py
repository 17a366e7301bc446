"""Segment images and videos.

    python scripts/predict.py [CONFIG] CHECKPOINT IMAGE|FOLDER|LIST|VIDEO … --output DIR [key=value …]

Writes <name>.png with class ids (palette PNG; 16-bit above 254 classes) and <name>_overlay.jpg. No labels and no data
set are needed; the config gives network, class names and colours, and how windows are laid (`eval.mode`, …). A folder's
images below --out are left out: they are what an earlier call wrote. LIST is a .txt file with a path a line, relative
to its own folder. Frames of a VIDEO become <name>/000000.png and so on; PyAV or OpenCV has to be installed.
"""

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from common import cli, console, distributed
from common.config import Config
from common.data import DatasetRow
from common.data.catalogue import registry
from common.data.catalogue.lists import IMAGE_SUFFIXES, read_list
from common.data.images import read_image
from common.engine.runtime import arranged, use_tf32
from common.evaluation import mirrored_classes, network_input, write_label
from common.evaluation.adjustment import offsets_of
from common.files import refuse_to_overwrite
from common.inference import predict_labels
from common.models import load_model
from common.models.carried import best_of, open_config
from common.visualize import colourise, overlay

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
FRAME = "{:06d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_model(parser, "IMAGE|FOLDER|LIST|VIDEO", "folders are searched for images; a .txt file lists them")
    cli.add_out(parser, "DIR", "where labels and overlays go")
    parser.add_argument("--opacity", type=float, default=0.5, help="of the colours in the overlay (default 0.5)")
    cli.add_device(parser)
    cli.add_force(parser)
    args = cli.parse(parser)
    cfg = open_config(args.config, args.checkpoint, args.overrides)
    args.checkpoint = args.checkpoint or best_of(cfg)
    if not 0 <= args.opacity <= 1:
        raise ValueError(f"--opacity {args.opacity} is not in [0, 1]")
    out = Path(args.out)
    row, pictures = row_of(cfg), images(args.rest, out)
    videos = {name: path for name, path in pictures.items() if path.suffix.lower() in VIDEO_SUFFIXES}
    for path in videos.values():
        require_decoder(path)
    refuse_to_overwrite((file for name in pictures for file in expected(out / name, name in videos)), args.force)

    out.mkdir(parents=True, exist_ok=True)
    device = distributed.start(args.device)
    use_tf32(cfg.train, device)
    model = load_model(cfg.model, args.checkpoint).to(device).eval()
    model = arranged(model, cfg.train.channels_last, device)
    offsets = offsets_of(cfg, args.checkpoint)
    count = 0
    for name, path in console.bar(pictures.items(), what="predicting"):
        shots = frames(path, name) if name in videos else [(name, read_image(path))]
        for shot, image in shots:
            segment(model, cfg, row, image, out / shot, args.opacity, device, offsets)
            count += 1
    print(f"{count} images segmented: labels and overlays in {out}")


def row_of(cfg: Config) -> DatasetRow:
    """Class names and colours of the config's validation set, whose files are not looked at."""
    row = registry.row_of(cfg.data.val)
    if row.num_classes != cfg.model.num_classes:
        raise ValueError(f"{cfg.name}: model.num_classes is {cfg.model.num_classes}, {row.name} has {row.num_classes}")
    return row


def written(out: Path) -> tuple[Path, Path]:
    """The files of one image: label and overlay."""
    return out.with_name(f"{out.name}.png"), out.with_name(f"{out.name}_overlay.jpg")


def expected(out: Path, is_video: bool) -> tuple[Path, ...]:
    """What one image leaves, or the first frame of a video."""
    return written(out / FRAME.format(0) if is_video else out)


def images(words: list[str], out: Path) -> dict[str, Path]:
    """Output name (relative, without suffix) → image file. ValueError for what is no image, and for equal names."""
    found: dict[str, Path] = {}
    for word in words:
        for name, file in named(Path(word), out):
            if name in found:
                raise ValueError(f"{file}: {found[name]} would be written as {name!r} too; give each its own --out")
            found[name] = file
    if not found:
        raise ValueError("no image given; name image files, folders or lists")
    return found


def named(path: Path, out: Path) -> list[tuple[str, Path]]:
    """Output name and file of each image that a word of the command line stands for."""
    if path.is_dir():
        return in_folder(path, out)
    if not path.is_file():
        raise ValueError(f"{path}: no such image, folder or list")
    return in_list(path) if path.suffix.lower() == ".txt" else [(path.stem, path)]


def in_folder(path: Path, out: Path) -> list[tuple[str, Path]]:
    """All images below a folder, but for those below `out`."""
    there = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    earlier = out.resolve() if out.resolve() != path.resolve() else None
    inside = [
        p
        for p in there
        if not p.name.startswith(".")  # macOS's ._x is no image
        and (earlier is None or earlier not in p.resolve().parents)
    ]
    if not inside:
        raise ValueError(f"{path}: no images here ({', '.join(IMAGE_SUFFIXES)})")

    return [(str(p.relative_to(path).with_suffix("")), p) for p in inside]


def in_list(path: Path) -> list[tuple[str, Path]]:
    """The images of a list. Paths that lead out of its folder keep nothing but their last part."""
    found = []
    for line in read_list(path):
        file = path.parent / line
        if not file.is_file():
            raise ValueError(f"{path}: no image {line!r}; a line is a path, relative to the list's folder")
        outside = Path(line).is_absolute() or ".." in Path(line).parts
        found.append((file.stem if outside else str(Path(line).with_suffix("")), file))

    return found


# Videos -------------------------------------------------------------------------------------------------------------


def require_decoder(path: Path) -> None:
    if find_spec("av") is None and find_spec("cv2") is None:
        raise ValueError(f"{path}: a video needs PyAV or OpenCV; pip install av, or opencv-python-headless")


def frames(path: Path, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Output name and pixels uint8 (H, W, 3) of each frame, one at a time. ValueError for what is no video."""
    decode = _frames_of_av if find_spec("av") is not None else _frames_of_opencv
    empty = True
    for i, image in enumerate(decode(path)):
        empty = False
        yield f"{name}/{FRAME.format(i)}", image
    if empty:
        raise ValueError(f"{path}: holds no frame that can be decoded")


def _frames_of_av(path: Path) -> Iterator[np.ndarray]:
    import av

    try:
        with av.open(str(path)) as video:
            for frame in video.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: cannot decode the video ({error})") from error


def _frames_of_opencv(path: Path) -> Iterator[np.ndarray]:
    import cv2

    video = cv2.VideoCapture(str(path))
    try:
        while True:
            there, image = video.read()
            if not there:
                return
            yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    finally:
        video.release()


# One image ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def segment(
    model: nn.Module,
    cfg: Config,
    row: DatasetRow,
    image: np.ndarray,
    out: Path,
    opacity: float,
    device: torch.device,
    offsets: torch.Tensor | None = None,
) -> None:
    """`<out>.png` and `<out>_overlay.jpg` of one image."""
    batch = network_input(image, cfg.eval)[None].to(device)
    label = predict_labels(model, batch, cfg.eval, image.shape[:2], mirrored_classes(row), offsets)[0]
    label = label.cpu().numpy().astype(np.int32)
    out.parent.mkdir(parents=True, exist_ok=True)
    of_label, of_overlay = written(out)
    write_label(of_label, label, dict(enumerate(row.palette)))
    shown = Image.fromarray(overlay(image, colourise(label, row.palette), opacity))
    shown.save(of_overlay, quality=90)


if __name__ == "__main__":
    cli.run(main)
