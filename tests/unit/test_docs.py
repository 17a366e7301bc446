"""The pages: every link leads somewhere, every file they name is there, every command parses and its config loads."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest

from common.config import load_config, read_tree, typed
from common.jobs import plan
from scripts.evidence import Plan

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "fully_sup/**/*.md", "semi_sup/**/*.md", "uda/**/*.md", "ltss_*/**/*.md")
    for path in ROOT.glob(pattern)
)
LOADERS = {  # of files that are no configs, by their folder
    ROOT / "scripts" / "jobs": plan,
    ROOT / "scripts" / "evidence_plans": lambda path: typed(Plan, read_tree(path), path.name),
}
PROGRAMS = ("python", "sh", "torchrun")
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Names of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def known_files() -> tuple[str, ...]:
    """Every file of the repository that is not ignored, with / around the parts."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return tuple(f"/{name}" for name in listed.stdout.splitlines())
    return tuple(f"/{path.relative_to(ROOT)}" for path in ROOT.rglob("*") if path.is_file())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_are_there(page):
    """Programs, sources and pages between backticks, by their whole path or its end."""
    for name in re.findall(r"`([\w./-]+\.(?:py|sh|md))`", prose(page)):
        end = "/" + name.lstrip("./")
        assert any(file.endswith(end) for file in known_files()), name


def test_the_tree_names_what_is_there():
    """Each line of the README's tree begins with a file or folder; those below common/ stand further in."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(block for _, block in CODE.findall(text) if block.startswith("common/ "))
    folders = [ROOT]
    for line in tree.splitlines():
        match = re.match(r"( {0,4})([\w./]+)  ", line)
        if match:
            depth = len(match[1]) // 2
            path = folders[depth] / match[2]
            assert path.exists(), line
            folders[depth + 1 :] = [path]


# Commands -----------------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    folder: Path
    words: tuple[str, ...]
    whole: bool  # without an ellipsis


def commands(page: Path) -> list[Command]:
    """The commands of a page: lines of its shell blocks, and what begins with a program between backticks.

    Each is meant for the folder that the page went into last, for that of the page, or for the root: the first of them
    that has the program.
    """
    found: list[Command] = []
    folders = [folder for folder in (page.parent, *page.parent.parents) if folder.is_relative_to(ROOT)]
    for kind, block in CODE.findall(page.read_text(encoding="utf-8")):
        if kind in ("sh", "bash"):
            found += block_commands(block, folders)
    for line in re.findall(r"`([^`]+)`", prose(page)):
        found += one_command(line, folders)
    return found


def block_commands(block: str, folders: list[Path]) -> list[Command]:
    variables, found = {}, []
    for line in block.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        change, _, rest = line.rpartition("&&")
        if change:  # `cd` for this line alone
            found += one_command(rest, [ROOT / split(change)[1]])
            continue

        words = split(line)
        if words[:1] == ("cd",):
            folders.insert(0, ROOT / words[1])
        elif len(words) == 1 and re.fullmatch(r"[A-Z]+=.*", words[0]):
            variables |= [words[0].split("=", 1)]
        else:
            found += one_command(line, folders)
    return found


def one_command(line: str, folders: list[Path]) -> list[Command]:
    words = split(line)
    if not words or words[0] not in PROGRAMS:
        return []
    file, _ = program(words)
    folder = next((folder for folder in folders if (folder / file).is_file()), folders[0])
    return [Command(folder, words, "…" not in line.partition(" #")[0])]


def split(line: str) -> tuple[str, ...]:
    """The words of a command as one would type it: settings before it, optional parts' brackets and `…` left out; of
    alternatives in braces the first."""
    plain = re.sub(r"(?<=\s)\[([^\]]*)\]", r"\1", line)
    plain = re.sub(r"(?<=\s)\{([\w]+),[^}]*\}", r"\1", plain).replace("…", " ")
    try:
        words = shlex.split(plain, comments=True)
    except ValueError:  # prose with an apostrophe
        return ()
    while len(words) > 1 and re.match(r"[A-Z]+=", words[0]):
        words = words[1:]
    words = words[1:] if words[:1] == ["srun"] else words
    return tuple(word for word in words if word != "section.key=value")


def program(words: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The file that a command runs, from its folder or (-m) from the root, and its arguments."""
    if words[0] == "torchrun" or words[1] == "-m":
        place = words.index("-m")
        return str(ROOT / words[place + 1].replace(".", "/")) + ".py", words[place + 2 :]
    return words[1], words[2:]


ALL = [(page, command) for page in PAGES for command in commands(page)]


class ParsedError(Exception):
    """A program has understood its arguments."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    def stopped(original):
        def parse(self, *args):
            original(self, *args)
            raise ParsedError

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopped(getattr(argparse.ArgumentParser, name)))


@cache
def main_of(path: Path):
    """The function `main` of a program."""
    before = list(sys.path)
    sys.path.insert(0, str(path.parent))
    try:
        return runpy.run_path(str(path), run_name="a_test")["main"]
    finally:
        sys.path[:] = before


@pytest.mark.parametrize("page, command", ALL, ids=lambda v: " ".join(v.words)[:70] if isinstance(v, Command) else "")
def test_commands_parse(page, command, monkeypatch, stop_after_parsing):
    file, words = program(command.words)
    path = (command.folder / file).resolve()
    assert path.is_file(), file
    if path.suffix == ".sh":
        check_script(path, words, shown_files(page))
    elif command.whole:
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        monkeypatch.chdir(command.folder)
        with pytest.raises(ParsedError):
            main_of(path)()
        check_config(command.folder, [word for word in words if word not in shown_files(page)])


def shown_files(page: Path) -> set[str]:
    """The configs that a page shows whole, each under its name, for the reader to write."""
    return set(re.findall(r"^```yaml\n# (\S+/\S+\.yaml)\n", page.read_text(encoding="utf-8"), re.MULTILINE))


def check_script(path: Path, words: tuple[str, ...], shown: set[str]) -> None:
    """A driver's first two words choose its configs."""
    if path.name != "main.sh" or words[0].isupper() or any(file.startswith(f"{words[0]}/") for file in shown):
        return
    task, variant = (*words, "")[:2]
    if path.parent.name == "uda":
        assert (path.parent / "configs" / task / f"stage1{'_' * bool(variant)}{variant}.yaml").is_file()
    else:
        assert (path.parent / "configs" / f"{task}_{variant or 'usrn'}.json").is_file()


def check_config(folder: Path, words: Sequence[str]) -> None:
    """The config that a command names loads with the values that it changes."""
    changes = [word for word in words if re.match(r"[a-z_.]+=", word)]
    named = [word for word in words if re.search(r"\.(ya?ml|json)$", word) and "<" not in word and "/" in word]
    for name in named:
        files = [path.resolve() for path in folder.glob(name)]
        assert files, name
        for path in files:
            LOADERS.get(path.parent, partial(load_config, overrides=changes))(path)
    if changes and not named and "CONFIG" in words:
        load_config(ROOT / "fully_sup/configs/small/upernet_r18_camvid.yaml", changes)


def test_commands_are_found():
    """The search above finds what it is for."""
    assert len(ALL) > 60
    assert {path.name for path, _ in ALL} >= {"README.md", "datasets.md", "training.md"}
    assert os.path.basename(program(("torchrun", "--nproc-per-node", "8", "-m", "fully_sup.train"))[0]) == "train.py"


def test_every_tool_is_in_the_table_and_has_an_example():
    """A tool is a script with a command line."""
    tools = [path.stem for path in (ROOT / "scripts").glob("*.py") if "ArgumentParser" in path.read_text()]
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/tools.md"))
    assert [name for name in tools if f"`{name}`" not in readme and name != "demo"] == []
    assert [name for name in tools if f"scripts/{name}." not in page] == []
