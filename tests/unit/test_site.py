"""The pages as a static site, and the workflow that mirrors the gate."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_has_every_page_and_no_broken_link(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed (the extra `docs`)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONWARNINGS": "", "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr

    pages = ("index.html", "uda/index.html", "docs/remedies/index.html", "docs/model_cards/index.html")
    for page in (*pages, "docs/images/report.png"):
        assert (tmp_path / "site" / page).is_file()
    remedies = (tmp_path / "site/docs/remedies/index.html").read_text()
    assert 'href="../../#the-sign-of-blv"' in remedies, "links between pages stay"
    style = re.search(r'href="([^"]+/main[^"]*\.css)"', (tmp_path / "site/index.html").read_text())
    assert style and (tmp_path / "site" / style[1]).is_file(), "the theme's files are part of it"
    assert 'href="common/' not in (tmp_path / "site/index.html").read_text(), "links to files become text"


def test_the_workflow_runs_the_gate():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    commands = [step.get("run") for step in workflow["jobs"]["gate"]["steps"]]
    assert "bash .ci/run" in commands
