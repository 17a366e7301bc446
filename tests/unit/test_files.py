"""Drafts that take their name at the end, links without symbolic links, artefacts and sealed folders."""

import errno
import json
import os
import resource

import numpy as np
import pytest
import torch

from common import files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "value.npy"
    np.save(path, np.zeros(3))

    with pytest.raises(RuntimeError, match="half way"), files.replacing(path) as draft:
        draft.write_bytes(b"half")
        raise RuntimeError("half way")
    assert np.load(path).shape == (3,) and list(tmp_path.iterdir()) == [path]

    with files.replacing(path) as draft:
        assert draft.suffix == ".npy"
        np.save(draft, np.ones(4))
        assert np.load(path).shape == (3,)
    assert np.load(path).shape == (4,) and list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    path = tmp_path / "step"
    path.mkdir()
    (path / "old").touch()
    with files.replacing(path) as draft:
        draft.mkdir()
        (draft / "new").write_text("x")
    assert [p.name for p in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named_and_the_clean_up_hides_nothing(tmp_path):
    with pytest.raises(OSError, match=r"gone/a.json: cannot be written: the folder .*gone is not there"):
        files.write_json(tmp_path / "gone" / "a.json", {})


def test_errors_of_other_files_keep_their_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), files.replacing(tmp_path / "a.json"):
        (tmp_path / "other").read_text()


@pytest.fixture
def small_files():
    """No file may grow beyond 64 KiB: what a full disk does to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_says_so_whoever_writes(tmp_path, small_files):
    reason = f"big.pt: cannot be written: {os.strerror(errno.EFBIG)}"
    writers = (
        lambda draft: draft.write_bytes(bytes(1 << 20)),
        lambda draft: torch.save(torch.zeros(1 << 20), draft),  # RuntimeError, without a reason
    )
    for write in writers:
        with pytest.raises(OSError, match=reason), files.replacing(tmp_path / "big.pt") as draft:
            write(draft)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("symlinks", [True, False])
def test_links_with_and_without_symbolic_links(tmp_path, monkeypatch, symlinks):
    if not symlinks:
        monkeypatch.setattr(os, "symlink", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mark").write_text(name)
        files.link(tmp_path / "last", tmp_path / name)
        assert (files.follow(tmp_path / "last") / "mark").read_text() == name
    assert (tmp_path / "last").is_symlink() == symlinks
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "one", "two"]


def test_what_is_no_link_is_not_followed(tmp_path):
    for content in (b"", b"weights", b"\x80\x02}."):
        (tmp_path / "file").write_bytes(content)
        assert files.follow(tmp_path / "file") == tmp_path / "file"
    assert files.follow(tmp_path / "missing") == tmp_path / "missing"


def test_every_failure_of_a_reader_is_one_line_with_the_name(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"a.json: not there; make it$"):
        files.read_json(path, "make it")

    errors = (KeyError("x"), MemoryError(), RecursionError("deep"), OSError(5, "I/O error"), ValueError("a\nb"))
    for error in errors:

        def parse(path, error=error):
            raise error

        path.write_text("{}")
        with pytest.raises(ValueError, match="a.json: ") as caught:
            files.read_artifact(path, parse)
        assert "\n" not in str(caught.value) and caught.value.__cause__ is error


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff\xfe", b"9" * 5000, b""])
def test_damaged_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: ") as caught:
        files.read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_sealed_folder_knows_what_was_written(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"")
    files.seal(tmp_path, {"step": 3})
    assert files.damage(tmp_path) is None
    assert json.loads((tmp_path / files.MANIFEST).read_text())["step"] == 3
    assert files.damage(tmp_path, ["c"]).endswith(f"{tmp_path / 'c'}: not there")

    (tmp_path / "a").write_bytes(b"12346")
    assert files.damage(tmp_path).startswith(f"{tmp_path / 'a'}: size or checksum")
    (tmp_path / "a").unlink()
    assert files.damage(tmp_path)
    (tmp_path / files.MANIFEST).unlink()
    assert "not there" in files.damage(tmp_path)


def test_drafts_of_killed_processes_are_removed(tmp_path):
    for name in ("step_1", "last"):
        (tmp_path / f"{files.DRAFT}0123-{name}").mkdir()
    (tmp_path / "kept").touch()
    files.remove_drafts(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
