"""Helpers of the tests of the LTSS preparation scripts."""

import importlib

import numpy as np
from PIL import Image

from ltss_benchmark.datasets import preparation


def script(name):
    return importlib.import_module(f"ltss_benchmark.datasets.prepare_{name}_sem_seg").main


def expect(monkeypatch, name, train, val):
    monkeypatch.setitem(preparation.EXPECTED, name, {"train": train, "val": val})


def read(path):
    with Image.open(path) as image:
        return np.array(image)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*") if ".cache" not in p.parts}
