"""The report in a browser: seeds as one method, what fits on a phone, what clicks and keys do."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from common.comparison import paired
from common.report import Report, RunFolder, panels, write_report
from tests.unit.report_runs import BETTER, MATRIX, make_run

needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
RNG = np.random.default_rng(0)


def seeded(folder: Path, name: str, matrix: np.ndarray, seeds, rate=0.01, **options) -> list[Path]:
    """Runs `<name>_s<seed>` of one config, their matrices a little apart."""
    paths = []
    for seed in seeds:
        noise = np.random.default_rng(seed).integers(0, 4, matrix.shape)
        run = make_run(folder / f"{name}_s{seed}", matrix + noise, **options)
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**record, "seed": seed}))
        (run / "config.yaml").write_text(f"name: {run.name}\nseed: {seed}\noptim: {{lr: {rate}}}\n")
        paths.append(run)
    return paths


def write(out: Path, paths: list[Path]) -> str:
    return write_report(out, [RunFolder.load(path) for path in paths]).read_text()


# Seeds ----------------------------------------------------------------------------------------------------------------


def test_runs_of_several_seeds_are_one_method(tmp_path):
    """Means over all seeds, changes over the seeds that both have, with the interval of their pairs."""
    base = seeded(tmp_path, "ce", MATRIX, [0, 1, 2])
    ours = seeded(tmp_path, "blv", BETTER, [1, 2, 3], rate=0.02)
    runs = [RunFolder.load(path) for path in (*ours, *base)]
    report = Report(runs, baseline=3)
    assert report.names == ["ce", "blv"] and [list(group.runs) for group in report.groups] == [[0, 1, 2], [1, 2, 3]]

    tail = [run.evaluation["miou_tail"] for run in runs]
    assert report.results[1]["miou_tail"] == pytest.approx(np.mean(tail[:3]))
    expected = paired(tail[:2], tail[4:])
    found = report.change(1, lambda result: result["miou_tail"], "miou_tail")
    assert (found.mean, found.half_width) == pytest.approx((expected.mean, expected.half_width))

    html = write(tmp_path / "r.html", [*base, *ours])
    shown = f"tail {100 * expected.mean:+.1f} ± {100 * expected.half_width:.1f} over 2 seeds"
    assert shown in html[: html.index('class="tiles"')]
    assert f"{100 * expected.mean:+.2f} ± {100 * expected.half_width:.2f}<" in html
    assert "<h1>blv against ce</h1>" in html and "blv, 3 seeds" in html and html.count('data-run="r') == 2


def test_what_differs_by_more_than_the_seed_stands_alone(tmp_path):
    """Two of one seed, other images, and runs that do not say their seed."""
    twice = [seeded(tmp_path / place, "a", MATRIX, [0])[0] for place in "xy"]
    elsewhere = seeded(tmp_path, "b", MATRIX, [0], 0.1) + seeded(tmp_path, "b", MATRIX, [1], 0.1, files="9")
    unsaid = [make_run(tmp_path / name, drop=("run.json",)) for name in "pq"]
    report = Report([RunFolder.load(path) for path in (*twice, *elsewhere, *unsaid)], 0)
    assert len(report.runs) == 6 and all(len(group.runs) == 1 for group in report.groups)


def test_a_difference_within_noise_is_called_that(tmp_path):
    html = write(tmp_path / "r.html", seeded(tmp_path, "a", MATRIX, [0, 1]) + seeded(tmp_path, "b", MATRIX, [0, 1], 1))
    words = html[html.index('class="words"') : html.index('class="tiles"')]
    assert "(within noise)" in words and "no class beyond noise" in words


# In a browser ---------------------------------------------------------------------------------------------------------


def run_in_browser(page: Path, script: str, width: int = 1200) -> dict:
    """What a script leaves in `found`, and in `errors` what the page's own scripts complain of."""
    listen = "<script>const errors = []; window.onerror = text => { errors.push(text); };</script>"
    end = f"""<script>const found = {{}};
    const frame = () => {{ {script}
      document.title = 'FOUND' + JSON.stringify({{...found, errors}}) + 'END'; }};
    frame();</script>"""
    made = page.with_name(f"{page.stem}_{width}.html")
    text = page.read_text().replace("<head>", f"<head>{listen}").replace("</body>", f"{end}</body>")
    made.write_text(text)
    # a window is never narrower than 500 pixels: the page is opened in a frame
    outer = page.with_name(f"{page.stem}_{width}_outer.html")
    outer.write_text(
        f'<iframe id="f" src="{made.name}" style="width:{width}px;height:900px;border:0"></iframe><script>'
        "document.getElementById('f').onload = event => "
        "{ document.title = event.target.contentDocument.title; };</script>"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
               "--window-size=1500,1000", "--dump-dom", outer.as_uri()]  # fmt: skip
    own = os.environ | {"HOME": str(page.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=own)
    said = re.search(r"<title>FOUND(.*)END</title>", done.stdout, re.DOTALL)
    assert said, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(said[1].replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write(folder / "r.html", seeded(folder, "ce", MATRIX, [0, 1]) + seeded(folder, "blv", BETTER, [0, 1], 0.02))
    return folder / "r.html"


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Ten methods on 150 classes with long names."""
    folder = tmp_path_factory.mktemp("large")
    names = tuple(f"a thing of a longer name, number {i}" for i in range(150))
    paths = []
    for method in range(10):
        matrix = RNG.integers(0, 40, (150, 150)) + np.diag(RNG.integers(100, 4000, 150))
        options = {"classes": names, "tail": tuple(range(120, 150))}
        paths += seeded(folder, f"method_with_a_name_{method}", matrix, [0], 0.01 + method, **options)
    write(folder / "r.html", paths)
    return folder / "r.html"


CLIPPED = """
for (const element of document.querySelectorAll('details')) element.open = true;
found.sideways = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const scrolls = element => element.closest('.scroll, pre') !== null;
const texts = [...document.querySelectorAll('h1,h2,h3,h4,p,li,td,th,summary,label,figcaption,span,b,a,legend')];
found.clipped = texts.filter(t => t.clientWidth && t.scrollWidth > t.clientWidth + 1).map(t => t.textContent.trim());
found.outside = texts.filter(t => !scrolls(t) && t.getClientRects().length
  && (t.getBoundingClientRect().right > innerWidth + 1 || t.getBoundingClientRect().left < -1))
  .map(t => t.textContent.trim());
found.drawn = 0;
found.cut = [];
for (const drawing of document.querySelectorAll('svg')) {
  const frame = drawing.getBoundingClientRect();
  if (!frame.width) continue;
  if (!scrolls(drawing) && frame.right > innerWidth + 1) found.cut.push('drawing ' + drawing.ariaLabel);
  for (const text of drawing.querySelectorAll('text')) {
    const box = text.getBoundingClientRect();
    found.drawn += 1;
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
      || box.bottom > frame.bottom + 1) found.cut.push(text.textContent); } }
"""


@needs_browser
@pytest.mark.parametrize("width", [390, 800, 1400])
@pytest.mark.parametrize("page", ["small", "large"])
def test_no_text_is_clipped_and_the_page_does_not_scroll_sideways(request, page, width):
    found = run_in_browser(request.getfixturevalue(page), CLIPPED, width)
    assert found["sideways"] <= 0 and found["drawn"] > 50
    assert (found["clipped"], found["outside"], found["cut"], found["errors"]) == ([], [], [], [])


@needs_browser
@pytest.mark.parametrize("width", [390, 1400])
def test_the_class_chart_shows_iou_and_change(small, width):
    script = """
    const chart = [...document.querySelectorAll('#classes svg')].find(svg => svg.getBoundingClientRect().width);
    found.values = [...chart.querySelectorAll('.value')].filter(text => {
      const box = text.getBoundingClientRect(); return box.left >= 0 && box.right <= innerWidth; })
      .map(text => text.textContent);
    """
    values = run_in_browser(small, script, width)["values"]
    changes = [value for value in values if value[0] in "+-"]
    assert len(changes) == 4 and len(values) == 12  # of one method against another, four classes


@needs_browser
def test_a_box_hides_a_run_everywhere(small):
    script = """
    const visible = () => [...document.querySelectorAll('.r1')].filter(e => e.getClientRects().length).length;
    const box = document.querySelector('[data-run=r1]');
    found.before = visible(); box.click(); found.hidden = visible(); box.click(); found.again = visible();
    """
    found = run_in_browser(small, script)
    assert found["before"] == found["again"] > 10 and found["hidden"] == 0 and found["errors"] == []


@needs_browser
def test_an_image_is_enlarged_by_a_click_and_closed_by_another(small):
    script = """
    const dialog = document.getElementById('zoom');
    const button = document.querySelector('.panels button');
    button.focus(); found.focus = document.activeElement === button;
    button.click(); found.open = dialog.open;
    found.same = dialog.querySelector('img').src === button.querySelector('img').src;
    dialog.click(); found.closed = !dialog.open;
    """
    found = run_in_browser(small, script)
    assert all(found[key] for key in ("focus", "open", "same", "closed")) and found["errors"] == []


@needs_browser
def test_keys_and_readers_reach_everything(small):
    """Controls have names and take the focus; drawings and images say what they show; links find their places."""
    script = """
    const controls = [...document.querySelectorAll('button, input, a, summary, .scroll')];
    found.unreached = controls.filter(e => e.tabIndex < 0).length;
    found.nameless = [...document.querySelectorAll('button')].filter(
      e => !(e.textContent.trim() || e.querySelector('img[alt]'))).length;
    found.silent = document.querySelectorAll('svg:not([aria-label]), img:not([alt])').length;
    found.lost = [...document.querySelectorAll('nav a')].filter(
      a => !document.querySelector(a.getAttribute('href'))).length;
    """
    found = run_in_browser(small, script)
    assert found == {"unreached": 0, "nameless": 0, "silent": 0, "lost": 0, "errors": []}


def test_a_large_report_stays_small_and_names_the_ends(large):
    html = large.read_text()
    assert len(html.encode()) < 3e6 and "<h1>9 methods against method_with_a_name_0_s0</h1>" in html
    classes = html[html.index('<section id="classes"') : html.index('<section id="confusion"')]
    assert classes.count(">gained and lost most<") == 9 and "rank 1 to 19" in classes


def test_images_stop_where_the_file_would_grow_too_large(tmp_path, monkeypatch):
    paths = seeded(tmp_path, "a", MATRIX, [0])
    for file in list((paths[0] / "panels").iterdir()):
        shutil.copy(file, file.with_name(file.name.replace("00003", "00004")))
    assert "image 00004" in write(tmp_path / "r.html", paths)
    monkeypatch.setattr(panels, "BUDGET", 1000)
    html = write(tmp_path / "r.html", paths)
    assert "image 00003" in html and "image 00004" not in html and "1 of 2 images, to keep this file small" in html


def test_the_settings_that_differ_are_summed_up(tmp_path):
    html = write(tmp_path / "r.html", seeded(tmp_path, "a", MATRIX, [0]) + seeded(tmp_path, "b", BETTER, [0], 0.5))
    part = html[html.index('<section id="configuration"') :]
    assert "<code>optim.lr</code> 0.5 (not 0.01)</li>" in part and part.count("<li") == 1
