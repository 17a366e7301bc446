"""Where a network of queries loses a class: against loops over classes, queries and pixels, and the program."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file

from common.config import load_config, save_config
from common.data import IGNORE, SegmentationDataset
from common.evaluation import network_input
from common.files import write_json
from common.models import build_model, load_model
from common.models.mask2former import class_probabilities
from scripts import queries

pytestmark = pytest.mark.usefixtures("unchanged", "one_thread")
SMALL = {"hidden_dim": 32, "num_queries": 20, "encoder_layers": 1, "encoder_hidden": 32}
SMALL |= {"decoder_layers": 2, "decoder_hidden": 32}


def saved(config, folder, name, *words):
    """What a run leaves of an untrained network."""
    cfg = load_config(config, [f"name={name}", f"output={folder}", "eval.workers=0", *words])
    torch.manual_seed(0)
    model = build_model(cfg.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    cfg.folder.mkdir()
    save_file(model.state_dict(), cfg.folder / "net.safetensors")
    write_json(cfg.folder / "evaluation.json", {"checkpoint": str(cfg.folder / "net.safetensors")})
    save_config(cfg, cfg.folder / "config.yaml")
    return cfg


@pytest.fixture(params=["softmax", "seesaw"])
def run(config, tmp_path, request):
    """Evaluated at another size than the images': masks are padded, cut and resized."""
    tree = yaml.safe_load(config.read_text())
    tree["model"] |= {"name": "mask2former", "options": {**SMALL, "class_head": request.param}}
    config.write_text(yaml.safe_dump(tree))
    return saved(config, tmp_path, "run", "eval.short_edge=50", "eval.max_edge=200")


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def by_loops(model, image, label):
    """Class → (IoU of the best query, its class, its objectness, votes, IoU of the prediction)."""
    out = model(image)
    inner = image.shape[-2:]
    padded = [-(-side // 32) * 32 for side in inner]
    logits = out["pred_logits"][0]
    masks = F.interpolate(out["pred_masks"], padded, mode="bilinear")[..., : inner[0], : inner[1]].sigmoid()
    masks = F.interpolate(masks, label.shape, mode="bilinear")[0] > 0.5
    predicted = model.predict(image, tuple(label.shape)).argmax(1)[0]
    counted = label != IGNORE
    probability = class_probabilities(logits, 19)
    found = {}
    for k in sorted(set(label[counted].tolist())):
        truth = (label == k)[counted]
        scores = [iou(mask[counted], truth) for mask in masks]
        query = int(np.argmax(scores))
        objects = 1 - logits[query].softmax(0)[-1] if len(logits[0]) == 20 else logits[query, 19:].softmax(0)[0]
        named = int(logits[query, :19].argmax())
        found[k] = scores[query], named, objects, probability[:, k].sum(), iou((predicted == k)[counted], truth)
    return found


def test_the_best_query_of_every_class(run, call, tmp_path):
    """And the program's means over images."""
    file = tmp_path / "queries.json"
    text = call(queries.main, run.folder, "--device", "cpu", "--json", file)
    model = load_model(run.model, run.folder / "net.safetensors").eval()
    dataset = SegmentationDataset(run.data.val)
    every = {}
    for index in range(len(dataset)):
        sample = dataset.load(index)
        image = network_input(sample["image"], run.eval)[None]
        label = torch.from_numpy(sample["label"].astype(np.int64))
        with torch.no_grad():
            expected = by_loops(model, image, label)
        ours = {best.klass: best[1:] for best in queries.best_queries(model, image, label)}
        assert ours.keys() == expected.keys() and (label == IGNORE).any()
        for k, values in expected.items():
            assert ours[k] == pytest.approx([float(value) for value in values], rel=1e-4, abs=1e-6)
            every.setdefault(k, []).append(ours[k])

    rows = json.loads(file.read_text())["classes"]
    names = dataset.row.classes
    assert [row["class"] for row in rows] == [names[k] for k in sorted(every)]
    for row, k in zip(rows, sorted(every), strict=True):
        values = every[k]
        assert row["images"] == len(values)
        means = [row["mask"], row["object"], row["votes"], row["found"]]
        assert means == pytest.approx([np.mean([value[i] for value in values]) for i in (0, 2, 3, 4)])
        assert row["named"] + sum(row["taken_for"].values()) == pytest.approx(1)
        assert row["named"] == np.mean([value[1] == k for value in values])
    line = next(line for line in text.splitlines() if line.startswith("road "))
    road = rows[0]
    assert line.split()[1:4] == [str(road["images"]), f"{100 * road['mask']:.1f}", f"{100 * road['named']:.1f}"]


def test_an_image_without_labels_shows_nothing(run):
    model = load_model(run.model, run.folder / "net.safetensors").eval()
    label = torch.full((20, 30), IGNORE)
    assert list(queries.best_queries(model, torch.zeros(1, 3, 20, 30), label)) == []
    assert queries.table([]).split() == "images mask named object found votes taken for".split()


def test_what_cannot_be_looked_at(config, tmp_path, fails):
    plain = saved(config, tmp_path, "plain").folder
    assert "plain: its network, upernet, has no queries" in fails(queries.main, plain, "--device", "cpu")
    (tmp_path / "there.json").touch()
    assert "there.json: there already" in fails(queries.main, plain, "--json", tmp_path / "there.json")
    assert "nowhere/config.yaml: not there" in fails(queries.main, tmp_path / "nowhere")
    assert "max_images" in fails(queries.main, plain, "--images", "0")
    shutil.rmtree(plain)
    words = ("eval.mode=slide", "eval.crop=[32, 32]")
    windows = saved(config, tmp_path, "plain", *words).folder
    assert "eval.mode: slide; queries are those of whole images" in fails(queries.main, windows)
