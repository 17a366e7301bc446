"""UniMatch, UniMatch V2 and U2PL's base through the command line on a toy set, and a resumed training to the bit."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from common.data.toy.write import make
from scripts import prepare_splits
from semi_sup import main
from tests.integration.conftest import ROOT, assert_equal, weights

CONFIGS = ROOT / "semi_sup" / "configs"
CASES = {  # config: crop, what is logged, further settings
    "unimatch/toy_1over8_unimatch": (32, {"Lx", "Lfp", "Ls", "kept"}, ()),
    "unimatch_v2/toy_1over8_unimatch_v2": (28, {"Lx", "Ls", "kept"}, ("remedies.logits={name: blv}",)),
    "unimatch/toy_1over8_unimatch_usrn": (32, {"Lx_sub", "Ls_sub", "vetoed"}, ("method.class_thresholds=0.9",)),
    "u2pl_base/toy_1over8_u2pl": (33, {"Lx", "Laux", "Lu", "kept"}, ("method.copied_steps=1", "method.cutmix=true")),
}


def here(program, *words) -> None:
    """Run a program in this process, which saves the seconds of importing torch."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program.py", *map(str, words)])
        program.main()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(module_path) -> Path:
    make("voc", module_path / "voc", train=14, val=2, size=(40, 48), seed=0, domain="day")
    return module_path


def one_subclass_each(root: Path) -> Path:
    """A folder of subclass labels in which every class is whole, so they are the labels themselves."""
    folder = root / "sub_label"
    if not folder.is_dir():
        shutil.copytree(root / "voc" / "VOCdevkit" / "VOC2012" / "SegmentationClassAug", folder)
        (folder / "subclasses.json").write_text(json.dumps({"counts": [1] * 21}))
    return folder


def settings(config: str, root: Path, crop: int) -> list[str]:
    streams = []
    for name, prefix in (("labeled", ""), ("unlabeled", "un")):
        streams += [
            f"data.streams.{name}.list={root}/10_train_{prefix}supervised.txt",
            f"data.streams.{name}.augment.crop=[{crop},{crop}]",
            f"data.streams.{name}.batch_size=2",
        ]
    return [
        f"data.root={root}/voc", f"output={root}/saved", *streams, "data.workers=0", "eval.workers=0", "eval.every=100",
        "eval.panels=1", "train.threads=1", "train.log_every=1", "train.steps=4", "train.save_every=2", "train.keep=9",
        "optim.warmup=0", *(() if "u2pl" in config else ("method.threshold=0.0",)),
    ]  # fmt: skip


@pytest.mark.parametrize("config", CASES)
def test_training_resumes_bit_for_bit_and_tests(config, data):
    crop, logged, more = CASES[config]
    path = CONFIGS / f"{config}.yaml"
    words = ["--config", path, "--device", "cpu", *settings(config, data, crop), *more]
    if config.endswith("_usrn"):
        words.append(f"data.streams.labeled.maps.sub_label={one_subclass_each(data)}")
    here(prepare_splits, path, *settings(config, data, crop))
    here(main, *words)
    folder = data / "saved" / path.stem
    whole = weights(folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert logged <= lines[0].keys() and ("u2pl" in config or lines[0]["kept"] == 1)

    shutil.rmtree(folder / "checkpoints" / "step_00000004")  # as if it had been killed after step 3
    here(main, *words, "--resume")
    assert_equal(whole, weights(folder))
    assert f"<h1>{path.stem}</h1>" in (folder / "report.html").read_text()

    here(main, "--test", "--resume", folder, "--device", "cpu")
    tested = json.loads(next((folder / "test").glob("*/evaluation.json")).read_text())
    assert tested["miou"] == json.loads((folder / "evaluation.json").read_text())["miou"]


@pytest.mark.parametrize("config", ["unimatch/toy_1over8_unimatch", "unimatch_v2/toy_1over8_unimatch_v2"])
def test_the_baseline_of_any_config_is_its_name(config, data):
    """Of the unlabelled images and the method's own options nothing is left; the list that is not there is not read."""
    path, words = CONFIGS / f"{config}.yaml", settings(config, data, CASES[config][0])
    here(prepare_splits, path, *words)
    more = ["method.name=baseline", f"data.streams.unlabeled.list={data}/gone.txt", "name=baseline", "train.steps=2"]
    here(main, "--config", path, "--device", "cpu", *words, *more)

    lines = [json.loads(line) for line in (data / "saved" / "baseline" / "log.jsonl").read_text().splitlines()]
    assert {"Ls"} < lines[0].keys() and not {"Lx", "kept"} & lines[0].keys()
    assert json.loads((data / "saved" / "baseline" / "evaluation.json").read_text())["step"] == 2
    shutil.rmtree(data / "saved" / "baseline")


COCO = {  # config: crop, small network
    "unimatch/coco_1_512_r101": (33, ("model.backbone=resnet18", "model.norm=bn", "model.options={channels: 8}")),
    "unimatch_v2/coco_1_512_dinov2_small": (
        28,
        (
            "model.options={widths: [4, 6, 8, 8], channels: 4, "
            "backbone: {dim: 16, heads: 2, taps: [0, 1, 2, 3], grid: 3}}",
        ),
    ),
}


@pytest.mark.parametrize("config", COCO)
def test_coco_trains_from_an_official_list(config, tmp_path):
    """Lines of image and mask; the unlabelled images, which no list names, are the others."""
    root, (crop, network) = tmp_path / "coco", COCO[config]
    make("coco", root, train=8, val=1, size=(40, 48), seed=0, domain="day")
    lists = tmp_path / "1_512"
    lists.mkdir()
    names = [f"train2017/{k:012d}.jpg masks/{k:012d}.png" for k in (1, 4)]
    (lists / "labeled.txt").write_text("\n".join(names))
    streams = [f"data.streams.{key}.list={lists}/{key}.txt" for key in ("labeled", "unlabeled")]
    streams += [f"data.streams.{key}.batch_size=2" for key in ("labeled", "unlabeled")]
    streams += [f"data.streams.{key}.augment.crop=[{crop},{crop}]" for key in ("labeled", "unlabeled")]
    more = ["data.workers=0", "eval.workers=0", "train.threads=1", "train.steps=2", "model.pretrained=false"]
    words = [f"data.root={root}", f"output={tmp_path}/saved", *streams, *more, *network]

    path = CONFIGS / f"{config}.yaml"
    here(prepare_splits, path, *words)
    here(main, "--config", path, *words, "--device", "cpu")
    assert len((lists / "unlabeled.txt").read_text().split()) == 6
    result = json.loads((tmp_path / "saved" / path.stem / "evaluation.json").read_text())
    assert result["step"] == 2 and len(result["per_class"]) == 81
