"""USRN's five steps through the command line on a toy set, a training resumed bit for bit, and bad input."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import cli
from common.data.toy.write import make
from common.steps import digest_of
from scripts import prepare_splits
from semi_sup import clustering, main
from semi_sup.subclasses import parents
from tests.integration.conftest import ROOT, assert_equal, call, weights

CONFIGS = ROOT / "semi_sup" / "configs"
BASE, USRN = CONFIGS / "toy_1over8_baseline.json", CONFIGS / "toy_1over8_usrn.json"
MAIN = "semi_sup/main.py"
VOC = Path("VOCdevkit") / "VOC2012"
PROGRAMS = {"main": main.main, "clustering": clustering.main, "prepare_splits": prepare_splits.main}


class Workplace:
    """A toy set with 30 training images, of which the lists label 20, and the folder of runs."""

    def __init__(self, root: Path):
        self.data, self.saved, self.lists = root / "voc", root / "saved", root / "lists"
        make("voc", self.data, train=30, val=3, size=(48, 64), seed=0, domain="day")

    def settings(self, folder: Path | None = None) -> list[str]:
        saved = self.saved if folder is None else folder
        lists = [
            f"data.streams.{s}.list={self.lists}/20_train_{t}supervised.txt"
            for s, t in (("labeled", ""), ("unlabeled", "un"))
        ]
        small = ["data.streams.labeled.augment.crop=[32,32]", "data.streams.unlabeled.augment.crop=[32,32]"]
        return [
            f"data.root={self.data}", f"output={saved}", *lists, *small, "data.workers=0", "eval.workers=0",
            "data.streams.labeled.augment.base=64", "data.streams.unlabeled.augment.base=64", "eval.every=100",
            "data.streams.unlabeled.labels=false", "data.streams.labeled.batch_size=2", "eval.panels=1",
            "data.streams.unlabeled.batch_size=2", "train.threads=1", "model.options.width=4", "train.log_every=1",
        ]  # fmt: skip

    def usrn(self) -> list[str]:
        folder = self.saved / "toy_1over8_baseline" / "label_subcls_balanced_kmeans"
        return [*self.settings(), f"data.streams.labeled.maps.sub_label={folder}"]

    def base(self) -> list[str]:
        """Settings of the baseline, which has no unlabelled stream."""
        return [word for word in self.settings() if ".unlabeled." not in word]

    @property
    def baseline(self) -> Path:
        return self.saved / "toy_1over8_baseline"


@pytest.fixture(scope="module")
def place(module_path) -> Workplace:
    """The first three steps done: baseline, features, subclass labels."""
    work = Workplace(module_path)
    here("prepare_splits", USRN, *work.settings())
    call(MAIN, "--config", BASE, *work.base(), "train.steps=2")
    here("main", "--save_feature", "--resume", work.baseline / "checkpoints" / "best", "--device", "cpu")
    here("clustering", "--config", BASE, *work.base(), "--device", "cpu")
    for path in (work.data / VOC / "SegmentationClassAug").glob("*.png"):  # nothing below may need those
        if path.stem in (work.lists / "20_train_unsupervised.txt").read_text().split():
            path.unlink()
    return work


def here(program: str, *words) -> None:
    """Run a program in this process, which saves the seconds of importing torch."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{program}.py", *map(str, words)])
        PROGRAMS[program]()
    torch.set_num_threads(threads)


def run(program: str, monkeypatch, capsys, *words) -> str:
    """The same for a program that has to end with exit code 2; its one line of error."""
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, words)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `cli.run` replaces it for good
    with pytest.raises(SystemExit) as ended:
        cli.run(PROGRAMS[program])
    err = capsys.readouterr().err
    assert ended.value.code == 2
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_subclass_labels_are_complete_and_true(place):
    folder = place.baseline / "label_subcls_balanced_kmeans"
    record = json.loads((folder / "subclasses.json").read_text())
    pi = parents(record["counts"]).numpy()
    names = (place.lists / "20_train_supervised.txt").read_text().split()
    assert len(list(folder.glob("*.png"))) == len(names) == record["images"] == 20
    for name in names:
        label = np.array(Image.open(place.data / VOC / "SegmentationClassAug" / f"{name}.png"))
        sub = np.array(Image.open(folder / f"{name}.png"))
        assert ((sub == 255) == (label == 255)).all() and (pi[sub[label != 255]] == label[label != 255]).all()
    # the same labels again are the same record, of the features that they were made from
    assert record["features"] == digest_of(place.baseline / "features") and "seconds" not in record["classes"][0]
    for c in record["classes"]:
        if c["cells"] >= c["subclasses"]:
            assert (c["smallest"], c["largest"]) == (c["cells"] // c["subclasses"], -(-c["cells"] // c["subclasses"]))


def test_training_resumes_bit_for_bit_and_tests(place):
    """USRN with everything that has a state: a teacher, and BLV's counts, refreshed after five steps."""
    more = [*place.usrn(), "train.steps=8", "train.save_every=3", "train.keep=9", "method.teacher=ema",
            "remedies.logits={name: blv}", "method.threshold=0.1"]  # fmt: skip
    call(MAIN, "-c", USRN, *more)
    folder = place.saved / "toy_1over8_usrn"
    whole = weights(folder)
    assert whole["loss.counts.pseudo"].sum() > 0
    for step in (6, 8):  # as if it had been killed after step 5
        shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
    call(MAIN, "-c", USRN, "--resume", *more)
    assert_equal(whole, weights(folder))
    terms = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"Ls", "Ls_sub", "Lu_sub", "Lu_reg", "kept", "vetoed"} <= terms[0].keys()

    out = call(MAIN, "--test", "True", "--resume", folder)  # the config is in the checkpoint
    result = json.loads(next((folder / "test").glob("*/evaluation.json")).read_text())
    assert result["miou"] == json.loads((folder / "evaluation.json").read_text())["miou"]
    assert "absent_zero" in out and (folder / "report.html").is_file()
    predictions = [Image.open(path) for path in (folder / "preds").glob("*.png")]
    assert len(predictions) == 3 and all(p.mode == "P" and np.array(p).max() < 21 for p in predictions)


def test_baseline_weights_of_the_release_test_without_the_run(place, tmp_path):
    """An official file has no config inside; its folder of results is made."""
    state = {f"module.{k.removeprefix('model.')}": v for k, v in weights(place.baseline).items() if "model." in k}
    torch.save({"epoch": 3, "monitor_best": np.float64(12.5), "state_dict": state}, tmp_path / "best_model.pth")
    here("main", "--test", "True", "-r", tmp_path / "best_model.pth", "-c", BASE, *place.base(), f"output={tmp_path}",
         "--device", "cpu")  # fmt: skip
    folder = tmp_path / "toy_1over8_baseline"
    result = json.loads(next((folder / "test").glob("*/evaluation.json")).read_text())
    assert result["miou"] == json.loads((place.baseline / "evaluation.json").read_text())["miou"]
    assert {path.name for path in folder.iterdir()} == {"preds", "report.html", "test"}


def test_errors_before_a_step_is_ready(place, monkeypatch, capsys):
    def fails(program, *words):
        return run(program, monkeypatch, capsys, *words)

    usrn, base = place.usrn(), place.base()
    elsewhere = f"output={place.saved}/none"
    assert "no features there; main.py --save_feature" in fails("clustering", "-c", BASE, *base, elsewhere)
    missing = "data.streams.labeled.maps.sub_label=none"
    assert "no subclass labels there; clustering.py" in fails("main", "-c", USRN, *usrn, missing)
    three = f"method.subclasses={[3] + [1] * 20}"
    assert "run clustering.py again" in fails("main", "-c", USRN, *usrn, three)
    assert "255 subclasses in all" in fails("clustering", "-c", BASE, *base, f"method.subclasses={[235] + [1] * 20}")
    assert "cannot read the list" in fails("main", "-c", BASE, *base, "data.streams.labeled.list=none.txt")
    assert "no checkpoint there; train toy_1over8_baseline" in fails("main", "--test", "-c", BASE, *base, elsewhere)
    assert "no such checkpoint" in fails("main", "--test", "--resume", "none.safetensors")
    assert "nope: no such checkpoint" in fails("main", "--test", "--resume", "nope")
    official = place.saved / "best_model.pth"
    official.touch()
    assert "give --config" in fails("main", "--test", "--resume", official)
    last = place.baseline / "checkpoints" / "last"
    assert "training resumes from" in fails("main", "-c", BASE, *base, "name=other", "--resume", last)
    assert "--labelled" in fails("prepare_splits", USRN, *usrn, f"data.streams.labeled.list={place.lists}/some.txt")


def test_errors_about_other_lists(place, tmp_path, monkeypatch, capsys):
    names = (place.lists / "20_train_supervised.txt").read_text().split()
    (tmp_path / "19.txt").write_text("\n".join(names[:19]))
    shorter = f"data.streams.labeled.list={tmp_path}/19.txt"
    error = run("main", monkeypatch, capsys, "-c", USRN, *place.usrn(), shorter)
    assert "made for 20 other images than the 19" in error
    error = run("clustering", monkeypatch, capsys, "-c", BASE, *place.base(), shorter)
    assert "features of 20 images, not of the 19" in error
    folder = tmp_path / "toy_1over8_baseline"
    (folder / "features").mkdir(parents=True)
    index = json.loads((place.baseline / "features" / "index.json").read_text())
    starts = np.cumsum([0, *(-(-h // 8) * -(-w // 8) for h, w in index["sizes"])])
    rows = np.load(place.baseline / "features" / "features.npy")
    only = {"names": index["names"][:1], "sizes": index["sizes"][:1]}
    (folder / "features" / "index.json").write_text(json.dumps(only))
    np.save(folder / "features" / "features.npy", rows[: starts[1]])
    (tmp_path / "1.txt").write_text(index["names"][0])
    words = ["-c", BASE, *place.base(), f"output={tmp_path}", f"data.streams.labeled.list={tmp_path}/1.txt"]
    assert "has no labelled pixel in the 1 labelled images" in run("clustering", monkeypatch, capsys, *words)
