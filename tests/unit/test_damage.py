"""What earlier steps left, with a flipped bit or cut off: one ValueError that names the file, or what was written.

400 random damages of each kind of file. Formats with checksums give the written value or an error; without one (plain
pickles, .npy, loose safetensors, JSON) a value that passes all checks may be another than was written.
"""

import json
import pickle
import random
import struct
import time
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common import pickles
from common.data.statistics import _parse as parse_statistics
from common.engine import checkpoint
from common.files import read_artifact, read_json, seal
from common.models.pretrained.containers import read, read_weights
from ltss_benchmark.datasets.index_file import read_index
from uda.base import read_distribution, read_prototypes

DAMAGES, SECONDS = 400, 20.0  # of this process, whatever else the machine does
CLASSES = 5
WEIGHTS = {"a.weight": torch.linspace(-1, 1, 12).reshape(3, 4), "a.bias": torch.arange(3.0), "n": torch.tensor(7)}
ROWS = torch.linspace(-2, 2, CLASSES * 8).reshape(CLASSES, 8)
SHARES = np.arange(1.0, CLASSES + 1) / np.arange(1.0, CLASSES + 1).sum()
COUNTS = {"pixels": np.arange(20, dtype=np.int32).reshape(4, 5), "ignored": np.arange(4, dtype=np.int32)}
INDEX = {"folder": ["a/b", "c"], "filename": ["x.jpg", "y.jpg"], "objectnames": ["wall", "sky", "ink"]}


def arrays():
    return {name: tensor.numpy() for name, tensor in WEIGHTS.items()}


def sealed(path):
    path.mkdir()
    save_file(WEIGHTS, path / "model.safetensors")
    torch.save({"step": 3}, path / "state.pt")
    seal(path, {"step": 3})
    return path / "model.safetensors"


def same_weights(found):
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


def write(function):
    """A writer of one file, which the function is given."""

    def run(path):
        function(path)
        return path

    return run


def statistics(path):
    found = read_artifact(path, lambda p: parse_statistics(p, (4, 5)))
    return np.array_equal(found.pixels, COUNTS["pixels"]) and np.array_equal(found.ignored, COUNTS["ignored"])


def is_prototypes(path):
    found = read_prototypes(str(path), CLASSES)
    return found.shape == ROWS.shape and bool(found.isfinite().all())


def is_distribution(path):
    found = read_distribution(str(path), CLASSES)
    return found.shape == (CLASSES,) and found.min() >= 0 and abs(found.sum().item() - 1) < 1e-3


def is_weights(path):
    return all(not t.is_complex() and t.isfinite().all() for t in read_weights(path).values())


def is_index(path):
    return all(isinstance(item, str) for column in read_index(path).values() for item in column)


def pickled(value, protocol):
    return write(lambda path: path.write_bytes(pickle.dumps(value, protocol)))


KINDS = {  # name → (writes the file at a path and returns the one to damage, reads it: whether the value is right)
    "prototypes.pt": (write(lambda p: torch.save(ROWS, p)), lambda p: torch.equal(read_prototypes(p, CLASSES), ROWS)),
    "prototypes.npy": (write(lambda p: np.save(p, ROWS.numpy())), is_prototypes),
    "distribution.npy": (write(lambda p: np.save(p, SHARES)), is_distribution),
    "statistics.npz": (write(lambda p: np.savez_compressed(p, **COUNTS)), statistics),
    "weights.pth": (write(lambda p: torch.save(WEIGHTS, p)), lambda p: same_weights(read_weights(p))),
    "legacy.pth": (write(lambda p: torch.save(WEIGHTS, p, _use_new_zipfile_serialization=False)), is_weights),
    "weights.safetensors": (write(lambda p: save_file(WEIGHTS, p)), is_weights),
    "step_3": (sealed, lambda p: same_weights(read_weights(p))),
    "weights2.pkl": (pickled(arrays(), 2), is_weights),
    "weights5.pkl": (pickled(arrays(), 5), is_weights),
    "index.pkl": (pickled(INDEX, 4), is_index),
    "index_arrays.pkl": (pickled({k: np.array(v, object) for k, v in INDEX.items()}, 2), is_index),
    "result.json": (write(lambda p: p.write_text(json.dumps({"miou": 0.5}))), lambda p: read_json(p) is not p),
    "scores.json": (
        write(lambda p: checkpoint.write_scores(p.parent, {8: 0.5, 16: None}, "miou")),
        lambda p: isinstance(checkpoint.read_scores(p.parent, 100, "miou"), dict),
    ),
}


def damaged(content, rng):
    """The content with a flipped bit, cut off, or with a run of bytes that is something else."""
    content = bytearray(content)
    kind = rng.random()
    if kind < 0.6:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind < 0.8:
        del content[rng.randrange(len(content)) :]
    else:
        start = rng.randrange(len(content))
        content[start : start + 8] = rng.randbytes(min(8, len(content) - start))
    return bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_is_an_error_of_one_line_or_changes_nothing(tmp_path, kind):
    make, right = KINDS[kind]
    path = make(tmp_path / kind)
    whole, rng = path.read_bytes(), random.Random(kind)
    assert right(path)

    for number in range(DAMAGES):
        path.write_bytes(damaged(whole, rng))
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert right(path), f"damage {number}: another value"
            except ValueError as error:
                assert path.name in str(error) or "model.safetensors" in str(error)
                assert "\n" not in str(error) and len(str(error)) < 800
        assert time.process_time() - started < SECONDS


LAUGHS = b"".join(b"]\x94(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60))  # each twice the one before


def deep(opcode):
    return b"\x80\x04" + b")" + opcode * 250_000 + b"."


HOSTILE = {
    "a list that contains itself": b"\x80\x04]\x94h\x00a.",
    "a dict that contains itself": b"\x80\x04}\x94\x8c\x01ah\x00s.",
    "lists of lists": b"\x80\x04" + b"]" * 150_000 + b"a" * 149_999 + b".",
    "tuples of tuples": deep(b"\x85"),
    "a deep tuple as key": b"\x80\x04})" + b"\x85" * 250_000 + b"Ns.",
    "a deep tuple as key, by detours": b"\x80\x04})" + b"N0\x85" * 250_000 + b"Ns.",
    "a deep tuple from the memo": b"\x80\x04})" + b"\x94h\x000h\x00\x85" * 3 + b")" + b"\x85" * 250_000 + b"Ns.",
    "a frozen set of frozen sets": b"\x80\x04(\x91" + b"".join(b"(h\x00\x91" for _ in range(3)) + b".",
    "a memo number of 2 ** 31": b"\x80\x04]r\x00\x00\x00\x80.",
    "a text of 4 GiB": b"\x80\x04X\xff\xff\xff\xff.",
    "bytes of 2 ** 62": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "a frame of 2 ** 63": b"\x80\x04\x95" + struct.pack("<Q", 1 << 63) + b"N.",
    "an integer of 2 GiB": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "laughing lists": b"\x80\x04]\x94" + LAUGHS + b".",
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_end_in_an_error_of_one_line(tmp_path, case):
    path = tmp_path / "w.pkl"
    path.write_bytes(HOSTILE[case])
    started = time.process_time()
    for reader in (read, read_index):
        with pytest.raises(ValueError, match=r"w\.pkl: ") as error:
            reader(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 800
    assert time.process_time() - started < SECONDS


def test_a_deep_tuple_inside_a_torch_file(tmp_path):
    import zipfile

    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, HOSTILE["a deep tuple as key"] if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(ValueError, match=r"b\.pth: .*tuples within each other"):
        read(tmp_path / "b.pth")


def test_torch_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same_weights(read_weights(tmp_path / "w.pth"))


def test_what_is_shared_stays_shared():
    inner = [1, 2]
    found = pickles.plain(pickles.load(pickle.dumps({"a": inner, "b": (inner, inner)})))
    assert found == {"a": [1, 2], "b": ([1, 2], [1, 2])} and found["a"] is found["b"][0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.full((CLASSES, 8), float("nan")), "not real and finite"),
        (torch.zeros(CLASSES, 8, dtype=torch.complex64), "not real and finite"),
        (torch.zeros(8), r"shape \(8,\) for 5 classes"),
        ([1, 2], "list is no tensor"),
        ({"a": torch.zeros(1)}, "dict is no tensor"),
    ],
)
def test_prototypes_of_another_kind(tmp_path, value, words):
    torch.save(value, tmp_path / "p.pt")
    with pytest.raises(ValueError, match=rf"p\.pt: .*{words}.*; run calc_prototype.py again"):
        read_prototypes(str(tmp_path / "p.pt"), CLASSES)


@pytest.mark.parametrize(
    "change",
    [
        {"pixels": COUNTS["pixels"][:3]},
        {"pixels": -COUNTS["pixels"]},
        {"pixels": COUNTS["pixels"].astype(np.float32)},
        {"ignored": COUNTS["ignored"][:, None]},
    ],
)
def test_statistics_of_another_shape_or_kind(tmp_path, change):
    np.savez_compressed(tmp_path / "s.npz", **COUNTS | change)
    with pytest.raises(ValueError, match=r"s\.npz: (pixels|ignored): .*, expected counts int32"):
        statistics(tmp_path / "s.npz")


def test_weights_that_are_not_numbers_name_the_file(tmp_path):
    for value, words in ((torch.tensor([1.0, float("inf")]), "not real and finite: a"), ("text", "a of str is no")):
        torch.save({"a": value}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=rf"w\.pth: .*{words}"):
            read_weights(tmp_path / "w.pth")
