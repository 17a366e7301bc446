"""Loading and augmenting Cityscapes-size PNG samples by MMSegmentation's recipe, as a loader process does it.

Ours decodes no row below the crop and resizes the crop alone. The plain forms decode everything, resize all, then crop,
mirror and distort, with Pillow and (where cv2 can be imported; it is no dependency) with OpenCV, which is what the
original pipeline uses. All forms draw the same random numbers on the same files, in one thread. Pillow's resize is
another one: it smooths when shrinking. The last rows are what loader processes hand over, with and without the cache of
decoded images (`data.cache_size`), whose making takes `made_seconds`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.config import DataConfig, SourceConfig, StreamConfig, TrainConfig
from common.data import SegmentationDataset, Stream, build_transform, make_loaders, make_streams, toy
from common.data.geometry import draw_offset, fit
from common.data.images import Picture, read_image
from common.data.labels import is_varied
from common.data.recipes.mmseg import MMSeg
from common.data.streams import hold_images
from scripts.bench import measure
from scripts.bench.full_size import parse_size

try:
    import cv2
except ImportError:
    cv2 = None

BAR = 1.5  # times faster than Pillow
READY = 2  # batches that torch's loader processes hold ready
IDLE = 0.1  # seconds in which one of them is surely made
PAD = (124, 116, 104)
Sample = dict[str, Any]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="1024x2048", help="HEIGHTxWIDTH of the images (default 1024x2048)")
    parser.add_argument("--crop", default="512x1024", help="HEIGHTxWIDTH of the crop (default 512x1024)")
    parser.add_argument("--images", type=int, default=4, help="files (default 4)")
    parser.add_argument(
        "--samples",
        type=int,
        default=16,
        help="samples that a form draws in a turn, and each loader process (default 16)",
    )
    parser.add_argument("--cached", action="store_true", help="only the rows of the cache of decoded images")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4, 16], help="of loaders (default 1 4 16)")
    parser.set_defaults(threads=1)


def run(args: argparse.Namespace) -> list[measure.Row]:
    size, crop = ((128, 256), (64, 128)) if args.quick else (parse_size(args.size), parse_size(args.crop))
    if cv2 is not None:
        cv2.setNumThreads(args.threads)
    with tempfile.TemporaryDirectory(prefix="loader_") as folder:
        root = toy.make("cityscapes", Path(folder) / "cityscapes", train=args.images, val=0, size=size)
        augment = {"recipe": "mmseg", "crop": crop, "box": size}
        dataset = SegmentationDataset(SourceConfig(dataset="cityscapes", root=str(root)), build_transform(augment))
        bench = Bench(dataset, 2 if args.quick else args.samples)
        check = bench.check()
        facts = {"size": args.size if not args.quick else "128x256", "crop": list(crop), "samples": bench.samples}
        cached = cached_rows(Path(folder), root, augment, args, facts)
        if args.cached:
            return cached

        return [
            bench.row("load and augment", bench.whole(), args.rounds, check, BAR, facts),
            bench.row("augment alone, already decoded", bench.augment(), args.rounds, check, BAR, facts),
            bench.row("decode the image alone", bench.decode(), args.rounds, {}, None, facts),
            *cached,
        ]


# The cache of decoded images ----------------------------------------------------------------------------------------


def cached_rows(folder: Path, root: Path, augment: Sample, args: argparse.Namespace, facts: Sample) -> list:
    """Samples from loader processes (with --quick from this one), decoded or from the cache.

    A form draws `--samples` of each process. Those that the processes hold ready when its turn begins cost it nothing,
    so they are not counted; and its turn begins when the other form's processes are idle again.
    """
    source = {"dataset": "cityscapes", "root": str(root)}
    stream = StreamConfig(**source, batch_size=1, augment=augment)
    rows = []
    for workers in (0,) if args.quick else dict.fromkeys(args.processes):
        samples = facts["samples"] * max(workers, 1)
        ready = READY * workers
        data = DataConfig(**source, workers=workers, streams={"labeled": stream}, cache_size=1000.0)
        held, plain = (make_streams(data, seed=7) for _ in range(2))
        start = time.perf_counter()
        hold_images(held, data, folder / f"cache_{workers}")
        made = time.perf_counter() - start
        both = {"cached": held, "decoded": plain}
        forms = {name: taken(streams, data, samples) for name, streams in both.items()}
        apart = max(difference(held["labeled"], plain["labeled"], draw) for draw in range(args.images))
        check = {"levels apart": measure.require("cached images", apart, 0)}
        name = f"samples of {workers or 'no'} loader process{'es' if workers != 1 else ''}"
        own = {**facts, "samples": samples}
        pause = ready * IDLE
        row = measure.compare(name, forms, args.rounds, check=check, items=samples - ready, pause=pause, **own)
        rates = {form: 1000 / ms for form, ms in row["ms"].items()}
        rows.append(row | {"images_per_second": rates, "made_seconds": made})

    return rows


def taken(streams: dict[str, Stream], data: DataConfig, samples: int) -> Callable[[], None]:
    """A call that takes so many samples from loader processes, which go on meanwhile."""
    [loader] = make_loaders(data, TrainConfig(), streams=streams).values()

    def call() -> None:
        for _ in range(samples):
            next(loader)

    return call


def difference(ours: Stream, theirs: Stream, draw: int) -> float:
    return float((ours.sample(draw)["image"].int() - theirs.sample(draw)["image"]).abs().max())


# The recipe, written plainly ----------------------------------------------------------------------------------------


class Library(NamedTuple):
    """How a library decodes, resizes (height, width) and changes colour spaces; `hues` is the length of the circle."""

    decode: Callable[[Path], Any]
    decode_label: Callable[[Path], np.ndarray]
    resize: Callable[[Any, int, int], np.ndarray]
    resize_label: Callable[[np.ndarray, int, int], np.ndarray]
    to_hsv: Callable[[np.ndarray], np.ndarray]
    to_rgb: Callable[[np.ndarray], np.ndarray]
    hues: int


def _torch_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    planes = F.interpolate(planes, (height, width), mode="bilinear", align_corners=False)
    return planes[0].permute(1, 2, 0).round().byte().numpy()


def _nearest(label: np.ndarray, height: int, width: int) -> np.ndarray:
    def index(size: int, stored: int) -> np.ndarray:
        return np.floor(np.arange(size) * (1 / (size / stored))).astype(int).clip(max=stored - 1)

    return label[index(height, label.shape[0])][:, index(width, label.shape[1])]


def _pillow(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


PILLOW = Library(
    decode=_pillow,
    decode_label=lambda path: np.array(Image.open(path)),
    resize=lambda image, height, width: np.array(image.resize((width, height), Image.Resampling.BILINEAR)),
    resize_label=lambda label, height, width: np.array(
        Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
    ),
    to_hsv=lambda rgb: np.array(Image.fromarray(rgb).convert("HSV")),
    to_rgb=lambda hsv: np.array(Image.fromarray(hsv, "HSV").convert("RGB")),
    hues=256,
)
WHOLE = PILLOW._replace(decode=read_image, resize=_torch_resize, resize_label=_nearest)  # the check's form


def opencv() -> Library:
    return Library(
        decode=lambda path: cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB),
        decode_label=lambda path: cv2.imread(str(path), cv2.IMREAD_UNCHANGED),
        resize=lambda image, height, width: cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR),
        resize_label=lambda label, height, width: cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST),
        to_hsv=lambda rgb: cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV),
        to_rgb=lambda hsv: cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB),
        hues=180,
    )


def plain(image: Any, label: np.ndarray, recipe: MMSeg, library: Library, rng: np.random.Generator) -> Sample:
    """The recipe on a decoded image and label (uint8 class ids, 255 ignored): resize all, crop, mirror, colour, pad."""
    ratio = rng.uniform(*recipe.ratio)
    height, width = fit(label.shape, (int(recipe.box[0] * ratio), int(recipe.box[1] * ratio)))
    image, label = library.resize(image, height, width), library.resize_label(label, height, width)
    tall, wide = recipe.crop
    y, x = draw_offset((height, width), recipe.crop, rng)
    for _ in range(10):
        if is_varied(label[y : y + tall, x : x + wide].astype(np.int8), recipe.category_limit):  # 255 becomes -1
            break
        y, x = draw_offset((height, width), recipe.crop, rng)
    image, label = image[y : y + tall, x : x + wide], label[y : y + tall, x : x + wide]
    if rng.random() < recipe.flip:
        image, label = image[:, ::-1], label[:, ::-1]
    image = distort(np.ascontiguousarray(image), library, rng) if recipe.photometric else image
    down, right = tall - image.shape[0], wide - image.shape[1]
    if down or right:
        padded = np.empty((tall, wide, 3), np.uint8)
        padded[:] = PAD
        padded[: image.shape[0], : image.shape[1]] = image
        image, label = padded, np.pad(label, ((0, down), (0, right)), constant_values=255)
    image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return {"image": image, "label": torch.from_numpy(label.astype(np.int8).astype(np.int16))}


def distort(image: np.ndarray, library: Library, rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion as MMSegmentation writes it, uint8 (H, W, 3)."""
    if rng.integers(2):
        image = convert(image, 1, rng.uniform(-32, 32))
    contrast_first = rng.integers(2)
    if contrast_first and rng.integers(2):
        image = convert(image, rng.uniform(0.5, 1.5), 0)
    if rng.integers(2):
        hsv = library.to_hsv(image)
        hsv[..., 1] = convert(hsv[..., 1], rng.uniform(0.5, 1.5), 0)
        image = library.to_rgb(hsv)
    if rng.integers(2):
        hsv = library.to_hsv(image)
        shift = round(rng.integers(-18, 18) * library.hues / 180)
        hsv[..., 0] = (hsv[..., 0].astype(int) + shift) % library.hues
        image = library.to_rgb(hsv)
    if not contrast_first and rng.integers(2):
        image = convert(image, rng.uniform(0.5, 1.5), 0)
    return image


def convert(image: np.ndarray, gain: float, offset: float) -> np.ndarray:
    return np.clip(image.astype(np.float32) * gain + offset, 0, 255).astype(np.uint8)


# Measurement --------------------------------------------------------------------------------------------------------


class Bench:
    """The forms on the files of a data set; each form is a function (file, generator) → sample."""

    def __init__(self, dataset: SegmentationDataset, samples: int):
        self.dataset, self.recipe, self.samples = dataset, dataset.transform, samples
        self.table = np.full(256, 255, np.uint8)  # raw ids → class ids
        mapping = dict(dataset.row.label_maps[-1][1])
        self.table[[raw for raw, k in mapping.items() if k >= 0]] = [k for k in mapping.values() if k >= 0]
        self.libraries = {"pillow": PILLOW} | ({"opencv": opencv()} if cv2 is not None else {})

    def plain(self, index: int, rng: np.random.Generator, library: Library, recipe: MMSeg | None = None) -> Sample:
        record = self.dataset.records[index]
        label = self.table[library.decode_label(record.label)]
        return plain(library.decode(record.image), label, recipe or self.recipe, library, rng)

    def whole(self) -> dict[str, Callable[[], None]]:
        """From the files to the sample."""
        forms = {"ours": self.turn(self.dataset.sample)}
        for name, library in self.libraries.items():
            forms[name] = self.turn(lambda index, rng, library=library: self.plain(index, rng, library))
        return forms

    def augment(self) -> dict[str, Callable[[], None]]:
        """From decoded pixels to the sample."""
        records = self.dataset.records
        raw = [self.dataset.load(i) for i in range(len(records))]

        def ours(index: int, rng: np.random.Generator) -> Sample:
            sample = {**raw[index], "image": Picture.of(raw[index]["image"])}
            return self.recipe(sample, rng, self.dataset, index)

        forms = {"ours": self.turn(ours)}
        for name, library in self.libraries.items():
            images = [library.decode(record.image) for record in records]
            labels = [self.table[library.decode_label(record.label)] for record in records]
            forms[name] = self.turn(
                lambda i, rng, library=library, images=images, labels=labels: plain(
                    images[i], labels[i], self.recipe, library, rng
                )
            )
        return forms

    def decode(self) -> dict[str, Callable[[], None]]:
        """The image file to pixels: ours, which is Pillow after a look at the checksums, and the others."""
        decoders = {"ours": read_image} | {name: lib.decode for name, lib in self.libraries.items()}
        paths = [record.image for record in self.dataset.records]
        return {name: self.turn(lambda i, rng, decode=decode: decode(paths[i])) for name, decode in decoders.items()}

    def turn(self, form: Callable[[int, np.random.Generator], Any]) -> Callable[[], None]:
        """A call that draws all samples."""

        def call() -> None:
            for draw, index in zip(range(self.samples), cycle(range(len(self.dataset))), strict=False):
                form(index, np.random.default_rng((7, draw)))

        return call

    def row(self, name: str, forms: dict, rounds: int, check: dict, bar: float | None, facts: dict) -> measure.Row:
        against = "pillow" if bar is not None else None
        row = measure.compare(name, forms, rounds, check=check, bar=bar, against=against, items=self.samples, **facts)
        return row | {"images_per_second": {form: 1000 / ms for form, ms in row["ms"].items()}}

    def check(self) -> dict[str, float]:
        """Labels equal those of the whole-image forms; images within a level without the colours, near with them."""
        geometric = build_transform({"recipe": "mmseg", **_options(self.recipe), "photometric": False})
        still = SegmentationDataset(self.dataset.source, geometric)
        images, labels, near, pillow = 0.0, 0, 0.0, 0.0
        for draw, index in zip(range(self.samples), cycle(range(len(self.dataset))), strict=False):
            seed = (7, draw)
            ours = still.sample(index, np.random.default_rng(seed))
            theirs = self.plain(index, np.random.default_rng(seed), WHOLE, geometric)
            images = max(images, float((ours["image"].int() - theirs["image"]).abs().max()))
            labels += int((ours["label"] != theirs["label"]).sum())
            coloured = self.dataset.sample(index, np.random.default_rng(seed))["image"].float()
            for name, library in self.libraries.items():
                other = self.plain(index, np.random.default_rng(seed), library)["image"]
                apart = float((coloured - other).abs().mean())
                near, pillow = (near, max(pillow, apart)) if name == "pillow" else (max(near, apart), pillow)
        return {
            "levels apart from the whole image resized": measure.require("images", images, 1),
            "labels apart from the whole image resized": measure.require("labels", labels, 0),
            "mean levels apart from opencv": measure.require("coloured images", near, 1),
            "mean levels apart from pillow, which smooths": pillow,
        }


def _options(recipe: MMSeg) -> dict[str, Any]:
    return {key: getattr(recipe, key) for key in ("crop", "ratio", "box", "category_limit", "flip", "photometric")}
