"""The page around a report: styles, the few lines of script, and small pieces of markup."""

import math
from collections.abc import Sequence
from html import escape

from common.comparison import Difference

STYLE = """
:root { color-scheme: light dark;
  --page: #f4f5f7; --card: #ffffff; --ink: #1b2027; --soft: #5b6572; --edge: #dfe3e8; --grid: #e6e9ed; --tint: #f0f3f7;
  --share: #a9b3bf; --heat: #1f5fbf; --up: #0b6e4f; --down: #b3400a;
  --c0: #6b7684; --c1: #2470c8; --c2: #c85a08; --c3: #0f8a66; --c4: #8a4fc4; --c5: #c22f7d;
  --c6: #8a6d00; --c7: #00838f; --c8: #7a3b12; --c9: #4b5d0b; --c10: #30318b; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12151a; --card: #1a1f26; --ink: #e6e9ee; --soft: #9aa5b3; --edge: #2d343e; --grid: #2a313a; --tint: #222933;
  --share: #56616f; --heat: #5a9cf0; --up: #4fc79c; --down: #f2915c;
  --c0: #99a4b2; --c1: #5aa2f0; --c2: #f08c3c; --c3: #34b98f; --c4: #b488ea; --c5: #ee6aaf;
  --c6: #d9b93b; --c7: #3fc7d4; --c8: #c98a63; --c9: #a3bf4a; --c10: #8f95f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", Arial, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -.01em; text-wrap: balance; }
h2 { font-size: 19px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
p { margin: 0 0 12px; max-width: 82ch; }
.soft, .hint { color: var(--soft); } .hint { font-size: 13.5px; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 20px 22px;
  margin-top: 18px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 14px 0 0; font-size: 14px; }
a { color: var(--c1); text-decoration: none; } a:hover { text-decoration: underline; }
.runs { position: sticky; top: 0; z-index: 3; display: flex; flex-wrap: wrap; gap: 6px 20px; padding: 9px 14px;
  margin: 18px 0 0; background: var(--card); border: 1px solid var(--edge); border-radius: 10px; font-size: 14px;
  min-width: 0; max-height: 30vh; overflow-y: auto; }
.runs legend { float: left; padding: 0; color: var(--soft); }
.runs label { display: flex; align-items: center; gap: 7px; cursor: pointer; overflow-wrap: anywhere; }
h1, h2, h3, p, li, summary { overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px; }
.words { margin: 12px 0 0; padding-left: 20px; max-width: 92ch; } .words b { font-weight: 600; }
.words + .hint { margin-top: 6px; }
.swatch { width: 14px; height: 14px; border-radius: 3px; display: inline-block; flex: none; }
.scroll { overflow-x: auto; max-width: 100%; }
.narrow { display: none; margin-top: 14px; }
.wide { margin-top: 14px; }
.ranked { width: 100%; } .ranked td, .ranked th { padding: 4px 5px; font-size: 13px; }
.ranked td:first-child { white-space: normal; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 9px; text-align: right; border-bottom: 1px solid var(--edge); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: 13px; vertical-align: bottom; }
th.group { text-align: center; border-left: 1px solid var(--edge); }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
tbody tr:last-child td { border-bottom: 0; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--c1); }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
td.wrap { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; min-width: 200px; }
.left th { text-align: left; }
.best { font-weight: 700; }
.mark { border: 1px solid var(--c2); border-radius: 9px; padding: 0 7px; font-size: 12px; color: var(--c2); }
.delta { display: block; font-size: 12px; line-height: 1.3; } .up { color: var(--up); } .down { color: var(--down); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 16px; }
.tile { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 12px 18px;
  min-width: 168px; }
.tile b { display: block; font-size: 25px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; } .tile .up, .tile .down { font-size: 14px; font-weight: 600; }
.tile .up { color: var(--up); } .tile .down { color: var(--down); }
.notes { border-left: 4px solid var(--c2); } .notes ul { margin: 6px 0 0; padding-left: 20px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 22px;
  margin-top: 14px; }
.stack { display: flex; flex-wrap: wrap; gap: 18px 28px; } .stack > div { min-width: 0; max-width: 100%; }
.charts > div { min-width: 0; overflow-x: auto; }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, "DejaVu Sans", Arial, sans-serif; }
svg text { fill: var(--ink); } svg .tick { fill: var(--soft); font-size: 11px; }
svg .label { fill: var(--soft); font-size: 12px; } svg .name { font-size: 12.5px; }
svg .value { font-size: 10px; font-variant-numeric: tabular-nums; }
svg .tailmark { fill: var(--c2); font-size: 10px; font-weight: 700; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--soft); } svg .rule { stroke: var(--grid); }
svg .up { fill: var(--up); } svg .down { fill: var(--down); }
svg .share { fill: var(--share); }
svg .line { fill: none; stroke: var(--run); stroke-width: 2; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 7 4; }
svg .raw { fill: none; stroke: var(--run); stroke-width: 1; opacity: .3; }
svg circle, svg .bar { fill: var(--run); }
svg .cell { fill: var(--heat); } svg .cellback { fill: var(--tint); }
svg .hit { stroke: var(--ink); stroke-width: 1.4; }
svg .cellvalue { font-size: 11px; } svg .cellvalue.strong { fill: var(--card); font-weight: 600; }
.panels { display: grid; gap: 10px 14px; align-items: start; margin-top: 6px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.panels .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; min-width: 0; }
.panels .pair h4 { grid-column: 1 / -1; font-size: 13px; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.panels figure { margin: 0; min-width: 0; } .panels figcaption { font-size: 12px; color: var(--soft); }
.panels button { all: unset; display: block; width: 100%; cursor: zoom-in; }
.panels button:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px; }
.panels img { width: 100%; display: block; border-radius: 4px; }
.chips { display: flex; flex-wrap: wrap; gap: 5px 14px; font-size: 12.5px; margin-top: 14px; }
.chips span { display: flex; align-items: center; gap: 6px; }
.chips .swatch { border: 1px solid var(--edge); }
#zoom { border: 0; padding: 0; background: none; max-width: 94vw; max-height: 94vh; cursor: zoom-out; }
#zoom::backdrop { background: rgb(0 0 0 / .82); }
#zoom img { display: block; max-width: 94vw; max-height: 92vh; min-width: min(94vw, 900px); }
details { margin-top: 12px; } summary { cursor: pointer; font-weight: 600; font-size: 14px; }
pre { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; background: var(--tint);
  padding: 12px 14px; border-radius: 6px; overflow-x: auto; margin: 10px 0 0; }
code { font: 12.5px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
footer { margin-top: 24px; color: var(--soft); font-size: 13px; }
@media (max-width: 700px) {
  main { padding: 18px 12px 40px; } section { padding: 14px 12px; } h1 { font-size: 22px; }
  .tiles { gap: 8px; } .tile { min-width: 0; flex: 1 1 130px; padding: 10px 12px; } .tile b { font-size: 21px; }
  .tile span { overflow-wrap: anywhere; }
  .runs { max-height: 18vh; padding: 7px 10px; }
  .wide { display: none; } .narrow { display: block; }
  svg.curve .tick, svg.curve .label { font-size: 20px; }
  th:first-child, td:first-child { min-width: 96px; max-width: 46vw; white-space: normal; overflow-wrap: break-word; }
  td.wrap { min-width: 150px; }
}
@media print { .runs { position: static; } section { break-inside: avoid-page; } }
"""

SCRIPT = """
document.querySelectorAll('.runs input').forEach(box => box.addEventListener('change', () =>
  document.body.classList.toggle('hide-' + box.dataset.run, !box.checked)));
const zoom = document.getElementById('zoom');
document.querySelectorAll('.panels button').forEach(button => button.addEventListener('click', () => {
  zoom.replaceChildren(button.firstChild.cloneNode()); zoom.showModal(); }));
zoom.addEventListener('click', () => zoom.close());
document.querySelectorAll('table.sortable th button').forEach(button => button.addEventListener('click', () => {
  const head = button.closest('th'), body = head.closest('table').tBodies[0];
  const column = [...head.parentNode.children].indexOf(head);
  const down = head.getAttribute('aria-sort') !== 'descending';
  head.parentNode.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const sorted = [...body.rows].sort((one, other) => {
    const a = one.children[column].dataset.v, b = other.children[column].dataset.v;
    return (a === undefined) - (b === undefined) || (down ? b - a : a - b); });
  sorted.forEach(row => body.append(row)); }));
"""
COLOURS = 11


def page(title: str, body: str, runs: int) -> str:
    """A whole document; nothing in it points outside the file."""
    rules = ":root { --c0: var(--c1); }\n" if runs == 1 else ""
    rules += "".join(
        f".r{r} {{ --run: var(--c{run_colour(r)}); }} .hide-r{r} .r{r}:not(.keep) {{ display: none; }}\n"
        for r in range(runs)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{rules}</style></head>"
        f'<body><main>{body}</main><dialog id="zoom" aria-label="Enlarged image"></dialog>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def run_colour(run: int) -> int:
    """The baseline (run 0) has the grey; the others take turns with the rest."""
    return run if run < COLOURS else 1 + (run - 1) % (COLOURS - 1)


def swatch(run: int) -> str:
    return f'<i class="swatch" style="background:var(--c{run_colour(run)})"></i>'


def chip(colour: Sequence[int], name: str) -> str:
    r, g, b = colour
    return (
        f'<span><i class="swatch" style="background:rgb({r},{g},{b})"></i>{escape(name)}</span>'
    )


def section(anchor: str, title: str, body: str, hint: str = "") -> str:
    """`hint` and `body` are markup; an empty body gives no section."""
    if not body:
        return ""
    lead = f'<p class="hint">{hint}</p>' if hint else ""
    heading = f'<h2 id="{anchor}-title">{escape(title)}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title">{heading}{lead}{body}</section>'


def details(title: str, body: str) -> str:
    """A part that opens at a click; nothing without a body."""
    return (
        f"<details><summary>{escape(title)}</summary>{scroll(body)}</details>" if body else ""
    )


def scroll(body: str) -> str:
    """What may be wider than the page: it scrolls by itself, also by the keyboard."""
    return f'<div class="scroll" tabindex="0">{body}</div>'


def table(head: str, rows: Sequence[Sequence[str]], css: str = "") -> str:
    """`head` is the markup of the header rows; cells are markup, or whole `<td …>` elements.

    css: "sortable" makes the buttons of the head sort by the `data-v` of the cells (see `cell`).
    """
    lines = [
        "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return scroll(f'<table class="{css}"><thead>{head}</thead><tbody>{body}</tbody></table>')


def header(names: Sequence[str], css: str = "") -> str:
    return (
        f'<tr class="{css}">'
        + "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
        + "</tr>"
    )


def sorting_header(names: Sequence[str], plain: int = 1) -> str:
    """A header row whose cells sort their column, the first `plain` of them apart."""
    heads = [f'<th scope="col">{escape(name)}</th>' for name in names[:plain]]
    heads += [
        f'<th scope="col"><button type="button">{escape(name)}</button></th>'
        for name in names[plain:]
    ]
    return f"<tr>{''.join(heads)}</tr>"


def cell(value: float | None, text: str) -> str:
    """A cell that is sorted by its value; one without a value comes last."""
    return f"<td>{text}</td>" if value is None else f'<td data-v="{value:.9g}">{text}</td>'


def points(value: float | None) -> str:
    """A score (0..1) in percent."""
    return "–" if value is None else f"{100 * value:.2f}"


def change(difference: Difference | None, css: str = "delta") -> str:
    """A change in points, with half of its interval; marked by sign, arrow and colour, grey where it may be none.

    Empty where there is none to show.
    """
    if difference is None or not math.isfinite(difference.mean):
        return ""

    mean = round(100 * difference.mean, 2) + 0.0  # no negative zero
    kind, arrow = ("up", "▲") if mean > 0 else ("down", "▼") if mean < 0 else ("soft", "=")
    text = f"{arrow} {mean:+.2f}"
    if difference.interval is not None:
        low, high = difference.interval
        kind = "soft" if low <= 0 <= high else kind
        text += f" ± {100 * (high - low) / 2:.2f}"

    return f'<span class="{css} {kind}">{text}</span>'
