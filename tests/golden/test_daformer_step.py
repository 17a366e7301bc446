"""Two training steps of DAFormer, HRDA and MIC against the official ones: losses, gradients, teacher, batch norm.

Ours are made in float64: a ReLU of the head has an input of 5e-7, whose sign in float32 depends on the order of sums,
hence on the processor and its threads, and with it gradients of single tensors by four parts in a thousand.
"""

import json
import math

import numpy as np
import pytest
import torch

from common.config import Config, ModelConfig, OptimConfig
from common.data import DATASETS
from common.engine import MethodContext
from common.models import load_weights
from common.models.hrda import Box
from common.models.pretrained import mmseg
from common.ops.resize import resize
from tests.contexts import context
from tests.golden.fill import fill, image
from tests.golden.test_mmseg_models import DATA, assert_close, reference
from uda import daformer as steps
from uda import mic
from uda.daformer import DAFormer
from uda.hrda import HRDA
from uda.mic import MIC

CASES = {"daformer_step": DAFormer, "mic_daformer_step": MIC, "hrda_step": HRDA}


def weights(manifest, prefix=""):
    return {key: torch.from_numpy(np.asarray(fill(prefix + key, tuple(shape)))) for key, (shape, _) in manifest.items()}


def build(kind, recipe, manifest, folder):
    """The method with the student's weights, and with the backbone's of ImageNet out of a file."""
    backbone = {key: t for key, t in weights(manifest, "imnet_model.").items() if key.startswith("backbone.")}
    torch.save({key.removeprefix("backbone."): t for key, t in backbone.items()}, folder / "imagenet.pth")
    options = {"channels": 32, "dropout": 0.0, "backbone": {"drop_path": 0.0, "reduction_eps": 1e-5}}
    if kind is HRDA:
        options["crop"] = (64, 64)
    name = "hrda" if kind is HRDA else "daformer"
    model = ModelConfig(name, 19, "mit_b0", pretrained=str(folder / "imagenet.pth"), options=options)
    torch.save({"state_dict": {f"model.{key}": t for key, t in weights(manifest).items()}}, folder / "student.pth")

    facts = MethodContext(context(19).statistics, DATASETS["gta5"])
    top, bottom = recipe["ignore_top_bottom"]
    section = {"threshold": recipe["pseudo_threshold"], "margins": {"top": top, "bottom": bottom}}
    section |= {"jitter": 0.0, "blur": 0.0}
    method = kind(Config(model, method=section, optim=OptimConfig(name="sgd"), name="run"), facts)
    for network in (method.model, method.teacher):
        load_weights(network, folder / "student.pth")
    return method.double().train()


def labels(seed, size, block):
    rng = np.random.RandomState(seed)
    shape = (2, *(math.ceil(side / block) for side in size))
    small = rng.randint(0, 19, shape)
    small[rng.random_sample(shape) < 0.1] = -1
    return torch.from_numpy(small.repeat(block, 1).repeat(block, 2))


def pixels(seed, size, model):
    """Images whose normalised values are those of the golden."""
    return torch.from_numpy(image(seed, (2, 3, *size))) * model.std + model.mean


def batches(t, recipe, model):
    size = tuple(recipe["size"])
    source = {"image": pixels(50 + 10 * t, size, model), "label": labels(52 + 10 * t, size, recipe["block"])}
    return {"source": source, "target": {"image": pixels(51 + 10 * t, size, model)}}


def valid_of_hrda(*_):
    """The mask of the recipe."""
    valid = torch.ones(2, 128, 128)
    valid[0, :10] = 0
    valid[1, :, -12:] = 0
    return valid


def kept(function, results):
    """`function`, whose results are remembered."""

    def call(*arguments):
        results.append(function(*arguments))
        return results[-1]

    return call


def given(drawn):
    """What is drawn, in place of a draw."""
    return lambda *_: drawn


def chosen(classes):
    """What `choose_classes` gives for the release's draws, with 255 in the last column."""
    drawn = torch.zeros(2, 20, dtype=torch.bool)
    for row, ids in zip(drawn, classes, strict=True):
        row[[19 if c == 255 else c for c in ids]] = True
    return drawn


def norms_by_official_name(method, manifest):
    """Every official tensor is sent through the conversion filled with its own number, which says where it ends up."""
    numbers = {key: torch.full(shape, float(i + 1)) for i, (key, (shape, _)) in enumerate(manifest.items())}
    origin = mmseg.convert({"state_dict": numbers}, method.model)
    squares = torch.zeros(len(numbers) + 1, dtype=torch.float64)
    for key, p in method.model.named_parameters():
        squares.index_add_(0, origin[key].flatten().long(), p.grad.flatten() ** 2)
    return {key: squares[i + 1].sqrt().item() for i, key in enumerate(numbers)}


def total_norm(method):
    return torch.stack([p.grad.norm() for p in method.model.parameters() if p.grad is not None]).norm().item()


@pytest.mark.parametrize("name", CASES)
def test_two_steps(name, tmp_path, monkeypatch):
    expected = json.loads((DATA / f"{name}.json").read_text())
    recipe = expected["recipe"]
    method = build(CASES[name], recipe, expected["manifest"], tmp_path)
    teacher, seen = reference(f"{name}_teacher"), []
    monkeypatch.setattr(method.teacher, "segment", kept(method.teacher.segment, seen))
    if name == "hrda_step":
        boxes = iter([Box(*box) for box in recipe["boxes"]])
        monkeypatch.setattr(method.model, "draw_box", lambda size: next(boxes))
        monkeypatch.setattr(steps, "valid_pixels", valid_of_hrda)

    for t, step in enumerate(expected["steps"]):
        monkeypatch.setattr(steps, "choose_classes", given(chosen(step["chosen_classes"])))
        noise = np.random.RandomState(54 + 10 * t).random_sample((2, 1, 3, 4)).astype(np.float32)
        monkeypatch.setattr(mic, "block_noise", given(torch.from_numpy(noise)))

        found, totals = {}, []
        for part in method(batches(t, recipe, method.model), t):
            part["loss"].backward()
            totals.append(total_norm(method))
            found |= {key: value.item() for key, value in part.items() if key != "loss"}

        check_losses(found, step, 1e-5 if t == 0 else 1e-4)
        assert totals == pytest.approx(step["grad_norm_after_each_backward"][1:], rel=1e-3)
        norms = norms_by_official_name(method, expected["manifest"])
        assert {key: norms[key] for key in step["grad_norms"]} == pytest.approx(step["grad_norms"], rel=1e-3)
        upsampled = resize(seen[t]["logits"], tuple(recipe["size"]))
        assert_close(upsampled.float()[..., ::4, ::4], teacher[f"teacher_logits_{t}"])

        head = method.model.decode_head
        bn = getattr(head, "head", head).fuse_layer.bottleneck.bn
        assert int(bn.num_batches_tracked) == step["bn_batches_tracked"]
        assert bn.running_mean.norm().item() == pytest.approx(step["bn_running_mean_norm"], rel=1e-4)
        with torch.no_grad():
            for p in method.model.parameters():
                p -= 0.02 * p.grad
                p.grad = None
        method.after_step(t)


def check_losses(found, step, tolerance):
    theirs = step["losses"]
    detailed = "decode.hr.loss_seg" in theirs
    for ours, prefix in (("source", ""), ("mixed", "mix.")):
        if detailed:
            assert 0.1 * found[f"{ours}_detail"] == pytest.approx(theirs[f"{prefix}decode.hr.loss_seg"], rel=tolerance)
        fused = 0.9 * found[f"{ours}_fused"] if detailed else found[f"{ours}_ce"]
        assert fused == pytest.approx(theirs[f"{prefix}decode.loss_seg"], rel=tolerance)
    assert 0.005 * found["feature_distance"] == pytest.approx(theirs["src.loss_imnet_feat_dist"], rel=tolerance)
    assert found["confident"] == pytest.approx(step["pseudo_weight"], rel=1e-6)
    if "masked.decode.loss_seg" in theirs:
        assert found["masked_ce"] == pytest.approx(theirs["masked.decode.loss_seg"], rel=tolerance)
