"""A checkpoint of any method is all that is needed: its network is tested, drawn from, converted and exported by it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.config import load_config
from common.data import toy
from common.engine import prepare
from common.engine.trainer import Trainer
from common.models import build_model, load_model
from common.models.carried import open_config
from fully_sup import test as fully_sup_test
from ltss_benchmark import train_net
from scripts import convert_checkpoint, export, predict
from scripts.systems import system_of
from semi_sup import main as semi_sup_main
from tests.contexts import context
from tests.unit.data_files import picture, save
from uda import test as uda_test

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("unchanged", "one_thread")

UPERNET = "{channels: 8, auxiliary: false}"
CPSL = "{blocks: [1, 1, 1, 1], width: 4, head_channels: 8, features: 8}"
USRN = "{blocks: [1, 1, 1, 1], width: 4, channels: 8, low_channels: 4"
QUERIES = "{hidden_dim: 32, heads: 4, num_queries: 20, encoder_hidden: 32, decoder_layers: 1, decoder_hidden: 32}"
LTSS = ("eval.short_edge=64", "eval.max_edge=96")
SUBCLASSES = f"method.subclasses={[2, 2, *[1] * 19]}"  # what training puts in place of `rule`
FILES = ("method.prototypes={files}/prototypes.pt", "method.class_distribution={files}/shares.npy")
# config; options of the network; further settings
CASES = {
    "average": ("fully_sup/configs/toy/upernet_r18.yaml", UPERNET, ("train.ema=0.9",)),
    "cpsl stage 1": ("uda/configs/toy/stage1.yaml", CPSL, ("method.bank=64", "method.samples=16", *FILES)),
    "cpsl stage 2": ("uda/configs/toy/stage2.yaml", CPSL, ("method.teacher={files}/teacher.safetensors",)),
    "cpsl stage 3": ("uda/configs/toy/stage3.yaml", CPSL, ("method.teacher={files}/teacher.safetensors",)),
    "daformer": ("uda/configs/daformer/toy.yaml", "{channels: 16}", ()),
    "usrn": ("semi_sup/configs/toy_1over8_usrn.json", USRN + ", subclasses: 23}", (SUBCLASSES,)),
    "unimatch": ("semi_sup/configs/unimatch/toy_1over8_unimatch.yaml", "{channels: 8, lateral_channels: 4}", ()),
    "mask2former": ("ltss_benchmark/configs/toy/mask2former/maskformer2_R18.yaml", QUERIES, LTSS),
    "deeplabv3+": (
        "ltss_benchmark/configs/toy/deeplabv3p/deeplabv3p_R18.yaml", "{channels: 8, lateral_channels: 4}", LTSS
    ),
}  # fmt: skip
LAYOUTS = {"semi_sup": "voc", "ltss_benchmark": "ade20k_full"}
EVALUATE = {
    "fully_sup": (fully_sup_test.main,),
    "uda": (uda_test.main,),
    "semi_sup": (semi_sup_main.main, "--test", "--checkpoint"),
    "ltss_benchmark": (train_net.main, "--eval-only", "--checkpoint"),
}


@pytest.fixture(scope="module")
def files(module_path) -> Path:
    """What CPSL's stages read, and data to evaluate on in the layouts that the configs want."""
    np.save(module_path / "shares.npy", np.full(19, 1 / 19))
    torch.save(torch.randn(19, 8), module_path / "prototypes.pt")
    cfg = load_config(ROOT / "uda/configs/toy/warm_up.yaml", [f"model.options={CPSL}"])
    convert_checkpoint.write(module_path / "teacher.safetensors", build_model(cfg.model).state_dict(), {})
    for layout in ("cityscapes", *LAYOUTS.values()):
        toy.make(layout, module_path / layout, train=1, val=2, size=(48, 64))
    return module_path


@pytest.fixture(scope="module", params=list(CASES))
def trained(request, files) -> tuple[str, Path]:
    """The system of a method, and a checkpoint as a training leaves it."""
    name, options, settings = CASES[request.param]
    system = name.partition("/")[0]
    layout = files / LAYOUTS.get(system, "cityscapes")
    roots = [f"data.root={layout}"] + [f"data.val.root={layout}"] * (system == "uda")
    tiny = [f"model.options={options}", "model.checkpoint=null", "train.threads=1", "train.precision=fp32"]
    evaluation = [f"output={files / request.param}", "eval.panels=0", "eval.workers=0"]
    cfg = load_config(ROOT / name, [*roots, *tiny, *evaluation, *(word.format(files=files) for word in settings)])

    method = prepare(cfg, system_of(cfg).build_method, context(cfg.model.num_classes), torch.device("cpu"))
    cfg.folder.mkdir(parents=True)
    trainer = Trainer(cfg, method, torch.device("cpu"))
    trainer.save(1)
    return system, cfg.folder / "checkpoints" / "last"


def test_its_scores(trained, call, fails, tmp_path):
    """In a folder of the test, or with --json in one file and nowhere else."""
    system, checkpoint = trained
    main, *flags = EVALUATE[system]
    words = [*flags, checkpoint, "--save-predictions", tmp_path / "masks", "--device", "cpu"]
    call(main, *words)
    assert len(list((tmp_path / "masks").rglob("*.png"))) == 2
    kept = list(checkpoint.parents[1].glob("test/*/evaluation.json"))

    scores = tmp_path / "below" / "scores.json"
    words[-4:] = ["--json", scores, "--device", "cpu"]
    call(main, *words)
    same = ("miou", "per_class", "confusion", "identity")
    in_folder, in_file = (json.loads(path.read_text()) for path in (*kept, scores))
    assert [in_folder[key] for key in same] == [in_file[key] for key in same]
    assert list(checkpoint.parents[1].glob("test/*/evaluation.json")) == kept
    assert f"{scores}: there already" in fails(main, *words)


def test_its_pictures(trained, call, tmp_path):
    image = save(picture(48, 64), tmp_path / "a.png")
    call(predict.main, trained[1], image, "--out", tmp_path / "out", "--device", "cpu")
    with Image.open(tmp_path / "out" / "a.png") as label:
        assert label.size == (64, 48)


def test_its_tensors_alone(trained, call, tmp_path):
    """They are those of the network that predicts, and open with the config."""
    out = tmp_path / "net.safetensors"
    call(convert_checkpoint.main, trained[1], "--out", out)
    cfg = open_config(None, trained[1])
    images = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8)
    whole, alone = (load_model(cfg.model, path) for path in (trained[1], out))
    assert load_file(out).keys() == whole.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(whole.predict(images), alone.predict(images))


@pytest.mark.slow
def test_its_program(trained, call, tmp_path):
    out = tmp_path / "net.pt2"
    call(export.main, trained[1], "--size", "64x64", "--out", out)
    model = load_model(open_config(None, trained[1]).model, trained[1])
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(out).module()(images), model.predict(images), rtol=1e-4, atol=1e-4)
