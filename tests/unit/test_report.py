"""The HTML report of fabricated runs, its charts, and the pictures in it."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import cli
from common.comparison import head_and_tail
from common.experiment import leave_report
from common.report import Report, RunFolder, write_report
from common.report.charts import Run, Series, heatmap, line_chart, log_ticks, number, ticks
from common.report.class_chart import ClassRow, class_chart
from common.report.curves import running_mean
from common.report.sections import _rescored
from common.visualize import IGNORED, WRONG, WRONG_TAIL, colourise, confidence_map, error_map, overlay
from scripts.report import main
from tests.unit.report_runs import BETTER, MATRIX, PALETTE, make_run


def report_text(tmp_path: Path, *folders: Path, baseline=0) -> str:
    out = write_report(tmp_path / "out" / "report.html", [RunFolder.load(f) for f in folders], baseline)
    return out.read_text()


class Balance(HTMLParser):
    """Fails on tags that are not closed in order."""

    VOID = {"meta", "img", "input", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def check_page(html: str) -> None:
    page = Balance()
    page.feed(html)
    assert not page.open
    assert all(link.startswith(("data:image/", "#")) for link in page.links), "the page points outside itself"
    anchors = [link for link in page.links if link.startswith("#")]
    assert all(f'id="{link[1:]}"' in html for link in anchors)
    assert not re.search(r"https?://|@import|url\(", html)
    for drawing in re.findall(r"<svg.*?</svg>", html, re.S):
        tree = ElementTree.fromstring(drawing)
        left, top, width, height = map(float, tree.get("viewBox").split())
        for mark in tree.iter("rect"):
            assert left <= float(mark.get("x")) and float(mark.get("x")) + float(mark.get("width")) <= width
            assert top <= float(mark.get("y")) <= height
        for mark in tree.iter("circle"):
            assert left <= float(mark.get("cx")) <= width and top <= float(mark.get("cy")) <= height
    assert "nan" not in re.sub(r"<[^>]*>", " ", html).lower().replace("nan_mean", "").split()


def test_a_comparison_has_every_part_and_the_right_changes(tmp_path):
    first, second = make_run(tmp_path / "ours", BETTER), make_run(tmp_path / "plain")
    html = report_text(tmp_path, first, second, baseline=1)
    check_page(html)
    assert "ours against plain" in html and "plain (baseline)" in html
    for anchor in ("scores", "training", "classes", "confusion", "images", "making", "configuration"):
        assert f'<section id="{anchor}" aria-labelledby="{anchor}-title">' in html
    assert '<section class="notes">' not in html
    before, after = (np.diag(m) / (m.sum(0) + m.sum(1) - np.diag(m)) for m in (MATRIX, BETTER))
    table = html[html.index('id="scores"') : html.index('id="training"')]
    for members in ([0, 1, 2, 3], [2, 3], [3]):  # mIoU, tail, rare
        assert f">{100 * after[members].mean():.2f}<" in table
        assert f"{100 * (after[members].mean() - before[members].mean()):+.2f}<" in table
    assert "convention <b>nan_mean</b>" in table
    assert "python train.py a.yaml" in html and "Some CPU, 2 cores, torch 2.15" in html and "7 images, 214 ms" in html
    assert "lamp &amp; &lt;post&gt;" in html and "lamp & <post>" not in html


def test_one_run_alone(tmp_path):
    html = report_text(tmp_path, make_run(tmp_path / "plain"))
    check_page(html)
    assert "against" not in html[: html.index('id="scores"')] and "change against the baseline" not in html


def test_classes_stand_in_the_order_of_their_training_frequency(tmp_path):
    html = report_text(tmp_path, make_run(tmp_path / "plain"))
    chart = html[html.index('id="classes"') : html.index("<details", html.index('id="classes"'))]
    names = re.findall(r'class="name"[^>]*><title>(.*?)</title>', chart)
    assert names == 2 * ["road", "sky", "person", "lamp &amp; &lt;post&gt;"]  # for wide pages, and for phones
    assert "80 %" in chart and "0.1 %" in chart and "share of training pixels" in chart


@pytest.mark.parametrize(
    "part", ["config.yaml", "run.json", "log.jsonl", "evaluation.json", "statistics.json", "panels"]
)
def test_a_missing_part_is_named_and_leaves_the_rest(tmp_path, part):
    folders = make_run(tmp_path / "short", drop=(part,)), make_run(tmp_path / "whole")
    for runs in (folders, folders[:1], folders[::-1]):
        html = report_text(tmp_path, *runs)
        check_page(html)
        if part != "statistics.json":
            assert f"short has no {part}." in html
    if part == "statistics.json":
        assert "No run has statistics.json" in report_text(tmp_path, folders[0])


def test_without_an_evaluation_the_log_speaks(tmp_path):
    html = report_text(tmp_path, make_run(tmp_path / "short", drop=("evaluation.json",)))
    assert ">50.00<" in html and ">30.00<" in html


def test_runs_are_compared_under_one_convention(tmp_path):
    absent = MATRIX.copy()
    absent[3] = 0  # the lamp is predicted, never true
    base = make_run(tmp_path / "base", absent, "detectron2")
    other = make_run(tmp_path / "other", absent, "nan_mean")
    report = Report([RunFolder.load(base), RunFolder.load(other)], 0)
    assert report.convention == "detectron2"
    assert report.results[0]["miou"] == pytest.approx(report.results[1]["miou"])
    assert report.results[1]["groups"] == report.results[0]["groups"]
    html = report_text(tmp_path, base, other)
    check_page(html)
    assert "other was scored by nan_mean; shown here is detectron2." in html
    assert "under every convention" in html


def test_every_convention_is_the_mean_of_the_seeds(tmp_path):
    """As the table of scores above it, not the score of matrices that are added up."""
    second = MATRIX.copy()
    second[3] = [0, 0, 0, 400]
    second[1, 0] = 400
    folders = []
    for seed, matrix in enumerate((MATRIX, second)):
        folders.append(make_run(tmp_path / f"run_{seed}", matrix, "ltss"))
        (folders[-1] / "run.json").write_text(json.dumps({"seed": seed}))
        (folders[-1] / "config.yaml").write_text(f"name: run\nseed: {seed}\n")
    report = Report([RunFolder.load(folder) for folder in folders], 0)
    assert len(report.groups) == 1
    results = [run.evaluation for run in report.groups[0].runs.values()]
    assert _rescored(results, "ltss") == pytest.approx((report.results[0]["miou"], report.results[0]["miou_tail"]))
    pooled = head_and_tail(MATRIX + second, [2, 3], "ltss")
    assert abs(pooled["miou_tail"] - report.results[0]["miou_tail"]) > 0.01


def test_runs_on_other_classes_are_left_out(tmp_path):
    names = tuple(f"class {i}" for i in range(5))
    other = make_run(tmp_path / "other", np.eye(5, dtype=int), classes=names, tail=())
    html = report_text(tmp_path, make_run(tmp_path / "base"), other)
    check_page(html)
    assert "other was evaluated on other classes" in html


def row_of(html: str, name: str) -> str:
    """A run's row of the table of scores."""
    scores = html[html.index('id="scores"') : html.index('id="training"')]
    return next(row for row in re.findall(r"<tr>.*?</tr>", scores, re.S) if re.search(rf"</i> {name}\b", row))


def test_scores_of_other_images_or_settings_are_marked_and_never_compared(tmp_path):
    base, like = make_run(tmp_path / "base"), make_run(tmp_path / "like", BETTER)
    moved = make_run(tmp_path / "moved", BETTER, files="9999", images=5)
    scaled = make_run(tmp_path / "scaled", BETTER, scales=[0.5, 1.0])
    html = report_text(tmp_path, base, like, moved, scaled)
    check_page(html)

    assert "delta" in row_of(html, "like") and "mark" not in row_of(html, "like")
    for name in ("moved", "scaled"):
        row = row_of(html, name)
        assert "not comparable" in row and "delta" not in row and "best" not in row
        after = np.diag(BETTER) / (BETTER.sum(0) + BETTER.sum(1) - np.diag(BETTER))
        assert f">{100 * after.mean():.2f}<" in row, "its own scores are shown"
    notes = html[html.index('class="notes"') : html.index('id="scores"')]
    assert "moved does not compare with base: other images or label files: street val, 5 images against" in notes
    assert "scaled does not compare with base: scales [0.5, 1.0] against [1.0]" in notes
    assert "<h1>like against base</h1>" in html

    tiles = html[html.index('class="tiles"') : html.index("<nav ")]
    assert "like" in tiles and "moved" not in tiles and "scaled" not in tiles
    for anchor in ("classes", "confusion", "images"):
        part = html[html.index(f'<section id="{anchor}"') :].partition("</section>")[0]
        assert "like" in part and "moved" not in part and "scaled" not in part
    assert html.count('alt="prediction for image 00003, ') == 2


def test_means_over_other_classes_have_no_change(tmp_path):
    """Groups follow the training labels: those of a run on fewer of them are others."""
    base, other = make_run(tmp_path / "base"), make_run(tmp_path / "other", BETTER)
    result = json.loads((other / "evaluation.json").read_text())
    result["per_class"][2]["groups"]["image"] = "rare"  # was common, as in `base`
    (other / "evaluation.json").write_text(json.dumps(result))
    html = report_text(tmp_path, base, other)
    check_page(html)
    cells = re.findall(r"<td>(.*?)</td>", row_of(html, "other"))
    changed = ["delta" in cell for cell in cells[1:]]
    assert changed == [*[True] * 5, *[False] * 3, *[True] * 3]  # five scores, image level, pixel level
    assert "other and base group other classes (image)" in html


def test_results_without_an_identity_are_shown_as_such(tmp_path):
    old = make_run(tmp_path / "old", drop=("identity",))
    html = report_text(tmp_path, make_run(tmp_path / "base"), old)
    check_page(html)
    assert "identity unknown" in row_of(html, "old") and "delta" in row_of(html, "old")
    assert "identity unknown" not in row_of(html, "base")
    assert "Identity unknown: old." in html
    assert "dentity unknown" not in report_text(tmp_path, old), "one run is not compared"


def test_a_test_of_a_checkpoint_is_reported_beside_its_run(tmp_path):
    run = make_run(tmp_path / "run")
    made = make_run(tmp_path / "run" / "test" / "step_00000004_tta-12345678", BETTER, drop=("log.jsonl",))
    (made / "statistics.json").unlink()
    (made / "run.json").write_text(json.dumps({"kind": "test", "command": "python test.py"}))
    html = report_text(tmp_path, run, made)
    check_page(html)
    assert "run step_00000004_tta-12345678 against run" in html and "has no" not in html
    assert "share of training pixels" in report_text(tmp_path, made), "the run counted them"


def test_many_classes_without_a_tail(tmp_path):
    names = tuple(f"a thing with a very long name, number {i}" for i in range(300))
    matrix = np.random.default_rng(0).integers(0, 50, (300, 300)) + np.diag(np.arange(300) * 20)
    html = report_text(tmp_path, make_run(tmp_path / "many", matrix, classes=names, tail=(), drop=("panels",)))
    check_page(html)
    assert "rank 1 to 15" in html and "Confusion of the rarest classes" in html
    assert len(html) < 1e6


def test_panels_hold_the_pictures_that_they_name(tmp_path):
    html = report_text(tmp_path, make_run(tmp_path / "plain"))
    pictures = re.findall(r'src="data:image/(\w+);base64,([^"]+)" alt="([^"]+)"', html)
    sizes = {alt: Image.open(io.BytesIO(base64.b64decode(data))).size for _, data, alt in pictures}
    assert set(sizes) == {"image 00003", *(f"{p} image 00003" for p in ("truth of", "prediction for", "errors in"))}
    assert set(sizes.values()) == {(30, 20)}
    with Image.open(tmp_path / "plain" / "panels" / "00003_truth.png") as png:
        truth = np.array(png)
    with Image.open(tmp_path / "plain" / "panels" / "00003_prediction.png") as png:
        right = (np.array(png) == truth)[truth != 255].mean()
    assert f"{100 * right:.1f} % right" in html


def test_a_run_that_is_still_training_is_readable(tmp_path):
    folder = make_run(tmp_path / "plain")
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 600, "lo')
    (folder / "run.json").write_text(json.dumps({"command": "x", "minutes": None}))
    check_page(report_text(tmp_path, folder))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("evaluation.json", "{", "evaluation.json: not valid JSON"),
        ("log.jsonl", '{"step": 1\n{"step": 2}\n', "log.jsonl: line 1 is not valid JSON"),
        ("config.yaml", "a: [1", "config.yaml: not valid YAML"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
    folder = make_run(tmp_path / "plain")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        report_text(tmp_path, folder)
    assert "\n" not in str(caught.value)


def test_the_script_writes_beside_the_runs_and_names_its_errors(tmp_path, capsys, monkeypatch):
    def call(*words) -> int:
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        return end.value.code

    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", BETTER)
    assert call(first) == 0 and (first / "report.html").is_file()
    assert call(first, second, "--baseline", second) == 0
    assert "a against b" in (tmp_path / "report.html").read_text()
    assert call(first, "--baseline", second, "--out", tmp_path / "x.html") == 0
    assert "a against b" in (tmp_path / "x.html").read_text()
    capsys.readouterr()
    assert call(tmp_path / "none") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such run folder\n"
    assert call(tmp_path) == 2 and "not a run folder" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch, capsys):
    """At the end of a training, and nothing at all on other ranks."""
    run = make_run(tmp_path / "a")
    file = run / "report.html"
    leave_report(file, [run])
    assert "report written to" in capsys.readouterr().out
    check_page(file.read_text())

    file.unlink()
    (run / "evaluation.json").write_text("[1,\n")
    with pytest.warns(UserWarning, match="report.html: not written .*evaluation.json.* tries again") as caught:
        leave_report(file, [run])
    assert len(caught) == 1 and "\n" not in str(caught[0].message) and not file.exists()

    monkeypatch.setattr("common.distributed.rank", lambda: 1)
    leave_report(file, [run])
    assert not file.exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.334), (-3, 1200), (0, 1e-4), (99, 101), (1e6, 9e6)])
def test_ticks_are_round_and_inside(low, high):
    marks = ticks(low, high)
    assert 3 <= len(marks) <= 8 and low <= marks[0] and marks[-1] <= high
    assert np.ptp(np.diff(marks)) < 1e-6 * (high - low)
    digits = f"{np.diff(marks)[0]:.3e}".partition("e")[0].rstrip("0")
    assert digits in ("1.", "2.", "2.5", "5.")


def test_tick_labels_and_log_ticks():
    assert [number(v) for v in (0, 0.25, 1e-5, 9.75e-4, 750, 2500, 20000, 1.5e6)] == [
        *("0", "0.25", "1e-5", "9.75e-4", "750", "2.5k", "20k", "1.5M")
    ]
    assert log_ticks(0.001, 1) == pytest.approx([0.001, 0.01, 0.1, 1])
    assert log_ticks(0.1, 1) == pytest.approx([0.1, 0.2, 0.5, 1])


def test_line_chart_places_points_and_skips_what_is_not_finite():
    points = [(0, 0.0), (50, float("nan")), (100, 0.5)]
    drawing = ElementTree.fromstring(line_chart("x", [Series(Run(0, "a"), points)], y_label="y", scale=100))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in drawing.iter("circle")]
    assert len(circles) == 2 and circles[0][0] < circles[1][0] and circles[0][1] > circles[1][1]
    assert line_chart("x", [Series(Run(0, "a"), [])], y_label="y") == ""
    assert "log scale" in line_chart("x", [Series(Run(0, "a"), [(0, 1), (1, 50)])], y_label="y", log=True)
    assert "log scale" not in line_chart("x", [Series(Run(0, "a"), [(0, 0), (1, 50)])], y_label="y", log=True)


def test_class_bars_are_as_long_as_their_values():
    rows = [ClassRow("a", False, 0.9, [0.25, 0.5]), ClassRow("b", True, 0.0, [None, 0.75])]
    drawing = ElementTree.fromstring(class_chart(rows, [Run(0, "x"), Run(1, "y")], "share", "IoU"))
    bars = {b.findtext("title"): float(b.get("width")) for b in drawing.iter("rect") if b.get("class") == "bar"}
    assert bars["a, y: IoU 50.00 %"] == pytest.approx(2 * bars["a, x: IoU 25.00 %"], abs=0.2)
    assert bars["b, y: IoU 75.00 %"] == pytest.approx(3 * bars["a, x: IoU 25.00 %"], abs=0.2)
    assert "a, y: IoU 50.00 % (+25.00 points)" in bars and len(bars) == 4
    assert "undefined" in "".join(drawing.itertext())


def test_heatmap_outlines_the_correct_cell():
    drawing = ElementTree.fromstring(heatmap("x", ["a", "b"], ["a", "b"], [[0.75, 0.25], [None, None]]))
    hits = [r.findtext("title") for r in drawing.iter("rect") if "hit" in r.get("class")]
    assert hits[0] == "true a, predicted a: 75.00 %" and len(hits) == 2


def test_running_mean_is_the_mean_of_the_neighbours():
    values = [(i, float(i * i)) for i in range(9)]
    got = running_mean(values, 3)
    assert got[4] == (4, pytest.approx((9 + 16 + 25) / 3)) and got[0] == (0, pytest.approx(0.5))


def test_pictures():
    label = np.array([[0, 1, -1]])
    assert colourise(label, PALETTE).tolist() == [[list(PALETTE[0]), list(PALETTE[1]), list(IGNORED)]]
    image = np.full((1, 3, 3), 100, np.uint8)
    assert overlay(image, np.full((1, 3, 3), 201, np.uint8), 0.25)[0, 0].tolist() == [125] * 3
    truth, pred = np.array([[0, 1, 2, -1]]), np.array([[0, 0, 0, 0]])
    errors = error_map(np.zeros((1, 4, 3), np.uint8), truth, pred, tail=[2])
    assert errors[0].tolist() == [[110] * 3, list(WRONG), list(WRONG_TAIL), list(IGNORED)]
    heat = confidence_map(np.array([[0.0, 1.0]]))
    assert heat.dtype == np.uint8 and heat.tolist() == [[[68, 1, 84], [253, 231, 37]]]
