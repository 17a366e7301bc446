"""Look at what training sees: python scripts/browse.py CONFIG [--stream NAME] [--count 12] [--out FILE] [key=value …].

Draws the first samples of a config's streams, augmented as in training, into one HTML page that needs no other file.
With `--classes pole,sign` they are the first whose labels show one of these classes, of at most an epoch's draws; the
page then says how often the stream's sampler is expected to show such images, and each of them.
"""

import argparse
import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common import cli
from common.config import load_config, nearest
from common.data import Stream, make_streams
from common.data.statistics import class_statistics
from common.visualize import colourise, confidence_map, overlay

WIDTH = 420  # pixels of a picture
IMAGES = ("image", "weak", "strong", "strong1", "strong2", "full")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 24px; background: #f4f5f7; color: #1b2027; }
h1 { font-size: 22px; } h2 { font-size: 18px; margin: 28px 0 8px; }
.sample { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 10px 12px; margin: 10px 0; }
.sample p { margin: 0 0 6px; color: #5b6572; font-size: 13px; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 8px; } figure { margin: 0; } img { max-width: 100%; display: block; }
figcaption { font-size: 12px; color: #5b6572; }
.chips { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; }
.chips i { display: inline-block; width: 13px; height: 13px; border-radius: 3px; margin-right: 5px; }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_words(parser)
    parser.add_argument("--stream", help="only this one")
    parser.add_argument("--count", type=int, default=12, help="samples per stream (default 12)")
    parser.add_argument("--start", type=int, default=0, help="number of the first draw")
    parser.add_argument("--classes", metavar="NAME[,NAME …]", help="only samples whose labels show one of them")
    parser.add_argument("--output", "--out", dest="out", default="samples.html", metavar="FILE")
    args = cli.parse(parser)
    if args.count < 1 or args.start < 0:
        raise ValueError("--count must be at least 1 and --start at least 0")
    if Path(args.out).suffix != ".html":
        raise ValueError(f"--out {args.out}: the name has to end in .html")
    cfg = load_config(args.config, args.overrides)
    cache = Path(cfg.data.cache or Path(cfg.output) / ".cache")
    streams = make_streams(cfg.data, cfg.seed, cache)
    if args.stream is not None and args.stream not in streams:
        raise ValueError(f"{cfg.name}: data.streams has no {args.stream!r}; streams: {', '.join(streams)}")
    chosen = {args.stream: streams[args.stream]} if args.stream else streams
    if args.classes is None:
        body = "".join(section(stream, range(args.start, args.start + args.count)) for stream in chosen.values())
    else:
        shows = [wanted(stream, args.classes, cfg.data.workers, cache) for stream in labelled(chosen)]
        body = "".join(filtered(found, args.start, args.count) for found in shows)
    title = f"Training samples of {escape(cfg.name)}"
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"{page}</head><body><h1>{title}</h1>{body}</body></html>\n")
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


def section(stream: Stream, draws: Sequence[int], note: str = "", notes: Sequence[str] = ()) -> str:
    """One stream: its samples, and the classes that occur in them. note: of all; notes: of each."""
    row, shown, parts = stream.dataset.row, set(), []
    for i, draw in enumerate(draws):
        sample = stream.sample(draw)
        pictures = "".join(figure(title, pixels) for title, pixels in views(sample, row.palette))
        facts = f"draw {draw}: {sample['name']}"
        if "geometry" in sample:
            h0, w0, h, w, y, x, flip = sample["geometry"].tolist()
            facts += f", {w0}×{h0} resized to {w}×{h}, crop at ({x}, {y}){', mirrored' if flip else ''}"
        facts += notes[i] if notes else ""
        parts.append(f'<div class="sample"><p>{escape(facts)}</p><div class="row">{pictures}</div></div>')
        shown |= {int(k) for key in ("label", "pseudo") if key in sample for k in torch.unique(sample[key]) if k >= 0}
    chips = "".join(
        f'<span><i style="background:rgb{tuple(row.palette[k])}"></i>{escape(row.classes[k])}</span>'
        for k in sorted(shown)
    )
    head = f"{escape(stream.name)}: {escape(row.name)}, {len(stream.dataset)} images"
    said = f"<p>{escape(note)}</p>" if note else ""
    return f'<h2>{head}</h2>{said}<div class="chips">{chips}</div>{"".join(parts)}'


# Rare classes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """Classes of a stream; which images show one of them (N,), and the share of the draws of each image (N,)."""

    stream: Stream
    ids: tuple[int, ...]
    shown: np.ndarray
    shares: np.ndarray


def labelled(streams: dict[str, Stream]) -> list[Stream]:
    """The streams whose samples have labels. ValueError where none has."""
    found = [stream for stream in streams.values() if stream.dataset.source.labels]
    if not found:
        raise ValueError(f"--classes: no labels in {', '.join(streams)}; take a stream with labels")

    return found


def wanted(stream: Stream, text: str, workers: int, cache: Path) -> Wanted:
    """ValueError for a name that is no class of the stream's data set."""
    known = stream.dataset.row.classes
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"--classes {name!r} is no class of {stream.dataset.row.name}; {nearest(name, known)}")

    ids = tuple(known.index(name) for name in names)
    shown = class_statistics(stream.dataset, workers, cache).presence[:, ids].any(1)
    return Wanted(stream, ids, shown, stream.order.shares(len(stream.dataset)))


def filtered(found: Wanted, start: int, count: int) -> str:
    """The section of a stream, with samples that show one of the classes alone."""
    stream, images = found.stream, len(found.shown)
    draws, looked_at = [], 0
    for draw in range(start, start + images):
        if len(draws) == count:
            break
        looked_at += 1
        if found.shown[stream.order.index(draw)] and shows(stream.sample(draw), found.ids):
            draws.append(draw)

    names = " or ".join(stream.dataset.row.classes[k] for k in found.ids)
    plain, drawn = found.shown.mean(), found.shares[found.shown].sum()
    note = (
        f"{names}: in {found.shown.sum()} of {images} images ({plain:.1%}); {drawn:.1%} of all draws are of these. "
        f"{len(draws)} of {looked_at} draws from {start} on show some in their crops."
    )
    times = [images * found.shares[stream.order.index(draw)] for draw in draws]
    return section(stream, draws, note, [f"; image drawn {often:.2f} times in {images} draws" for often in times])


def shows(sample: dict[str, Any], ids: Sequence[int]) -> bool:
    return bool(torch.isin(sample["label"], torch.tensor(ids, dtype=sample["label"].dtype)).any())


# Pictures -----------------------------------------------------------------------------------------------------------


def views(sample: dict[str, Any], palette: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Title and picture of everything in a sample that can be shown."""
    base = None
    for key in IMAGES:
        if key in sample:
            pixels = sample[key].permute(1, 2, 0).numpy()
            base = pixels if base is None else base
            yield key, pixels
    for key, value in sample.items():
        if key in (*IMAGES, "geometry") or not isinstance(value, torch.Tensor) or value.ndim not in (2, 3):
            continue
        if value.ndim == 2 and key == "confidence":
            yield key, confidence_map((value.float() / (1 if value.is_floating_point() else 254)).clamp(0, 1).numpy())
        elif value.ndim == 2 and not value.is_floating_point():
            colours = colourise(value.numpy().astype(np.int32).clip(-1, len(palette) - 1), palette)
            same = base is not None and base.shape == colours.shape
            yield key, overlay(base, colours, 0.6) if same else colours
        elif value.ndim == 3 and len(value) == len(palette):  # soft labels, of the whole image
            yield (
                f"{key}, argmax of {len(value)}×{value.shape[1]}×{value.shape[2]}",
                colourise(value.argmax(0).numpy(), palette),
            )


def figure(title: str, pixels: np.ndarray) -> str:
    image, buffer = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
    image.thumbnail((WIDTH, WIDTH))
    grow = max(1, WIDTH // 2 // max(image.size))  # maps of a coarse stride
    image = image.resize((image.width * grow, image.height * grow), Image.Resampling.NEAREST)
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    name = escape(title)
    return f'<figure><img src="data:image/jpeg;base64,{data}" alt="{name}"><figcaption>{name}</figcaption></figure>'


if __name__ == "__main__":
    cli.run(main)
