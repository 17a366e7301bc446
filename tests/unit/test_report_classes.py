"""The report's tiles, its table of classes, with a browser where there is one, and its colours."""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from common.report import RunFolder, write_report
from common.report.html import STYLE, run_colour
from tests.unit.report_runs import BETTER, make_run


def test_the_tail_comes_first_in_the_tiles(tmp_path):
    html = write_report(tmp_path / "r.html", [RunFolder.load(make_run(tmp_path / "run"))]).read_text()
    tiles = html[html.index('class="tiles"') : html.index("<nav ")]
    assert re.findall(r"<span>([^<]*)</span>", tiles) == ["mIoU(tail)", "mIoU", "mAcc", "aAcc"]


def test_the_table_of_classes_sorts(tmp_path):
    """Every column but the names has a button; cells hold their values, in all their digits."""
    paths = [make_run(tmp_path / "base"), make_run(tmp_path / "new", BETTER)]
    html = write_report(tmp_path / "r.html", [RunFolder.load(path) for path in paths]).read_text()
    table = re.search(r'<table class="sortable">.*?</table>', html, re.DOTALL)[0]
    heads = re.findall(r"<th scope[^>]*>(?:<button[^>]*>)?([^<]*)", table)
    assert table.count("<button") == len(heads) - 1 and {"frequency, %", "change new", "precision base"} < set(heads)
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)[1:]
    rows = [re.findall(r'<td(?: data-v="([^"]*)")?>', row) for row in rows]
    iou, change = heads.index("IoU new"), heads.index("change new")
    evaluated = [RunFolder.load(path).evaluation["per_class"] for path in paths]
    found = sorted((float(row[iou]), float(row[change])) for row in rows)
    expected = sorted((b["iou"], b["iou"] - a["iou"]) for a, b in zip(*evaluated, strict=True))
    assert np.allclose(found, expected, atol=1e-7) and len(rows) == 4


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_click_sorts_in_a_browser(tmp_path):
    """By change, the highest first, and the other way round at the second click."""
    paths = [make_run(tmp_path / "base"), make_run(tmp_path / "new", BETTER)]
    page = write_report(tmp_path / "r.html", [RunFolder.load(path) for path in paths])
    gains = {}
    for clicks in (1, 2):
        script = f"""<script>
        const head = [...document.querySelectorAll('table.sortable button')].find(b => b.textContent === 'change new');
        for (let i = 0; i < {clicks}; i++) head.click();
        const column = [...head.closest('tr').children].indexOf(head.closest('th'));
        const rows = [...document.querySelectorAll('table.sortable tbody tr')];
        const cells = rows.map(row => row.children[column].dataset.v);
        document.title = cells.join(' ') + ' ' + head.closest('th').getAttribute('aria-sort');</script>"""
        clicked = tmp_path / f"clicked{clicks}.html"
        clicked.write_text(page.read_text().replace("</body>", f"{script}</body>"))
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", clicked.as_uri()]
        own = os.environ | {"HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=own)
        *values, how = re.search(r"<title>(.*?)</title>", done.stdout)[1].split()
        gains[how] = [float(value) for value in values]
    assert gains["descending"] == sorted(gains["descending"], reverse=True) == gains["ascending"][::-1]
    assert len(set(gains["ascending"])) == 4


def test_ten_runs_have_ten_colours(tmp_path):
    """Beside the baseline's, in the light and the dark theme."""
    for theme in re.findall(r"--c0:.*?--c10: #\w+", STYLE, re.DOTALL):
        assert len(set(re.findall(r"#\w{6}", theme))) == 11
    assert len({run_colour(run) for run in range(11)}) == 11 and run_colour(11) == 1
