"""`method.name=baseline` on a config of another method: the same network, labelled crops and remedies, alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.config import ConfigError, load_config
from common.losses.hard_pixel import HardPixels
from common.ops.resize import resize
from semi_sup.baseline import Baseline
from semi_sup.config import build_method, resolve
from tests.contexts import context
from tests.unit.test_unimatch_method import batches, method, run

CONFIGS = Path(__file__).parents[2] / "semi_sup" / "configs"
OHEM = {"name": "hard_pixels", "threshold": 0.2, "min_kept": 300}
TWINS = {  # on Cityscapes, whose labelled loss mines hard pixels; pixels that are kept at least
    "unimatch/cityscapes_1_16_r50.yaml": 200_000,
    "unimatch_v2/cityscapes_1_16_dinov2_small.yaml": 200_000,
    "u2pl_base/cityscapes_1_16.yaml": 100_000,
}


@pytest.mark.parametrize("name", TWINS)
def test_the_twin_mines_hard_pixels_like_its_config(name):
    words = ["method.name=baseline", *(["model.options.auxiliary=false"] if name.startswith("u2pl") else [])]
    cfg = resolve(load_config(CONFIGS / name, words))
    with torch.device("meta"):
        twin = build_method(cfg, context(19))
    assert isinstance(twin, Baseline) and cfg.data.streams.keys() == {"labeled"}
    assert twin.loss.focus == HardPixels(threshold=0.7, min_kept=TWINS[name])


@pytest.mark.parametrize("name", ["unimatch", "unimatch_v2"])
def test_mined_loss_of_the_twin_is_that_of_whole_maps(name):
    """And that of the method whose twin it is, on the same labelled crops."""
    both, streams = method(name, remedies={"focus": OHEM}).eval(), batches()
    alone = method(name, alone=True, remedies={"focus": OHEM}).eval()
    alone.load_state_dict(both.state_dict(), strict=False)
    image, label = streams["labeled"]["image"], streams["labeled"]["label"].long()

    loss = next(alone(streams, 0))["Ls"]
    pixels = F.cross_entropy(resize(alone.model(image)["logits"], label.shape[-2:], True), label, reduction="none",
                             ignore_index=-1).flatten()  # fmt: skip
    valid, probability = label.flatten() >= 0, (-pixels.detach()).exp()
    least = probability[valid].sort().values[OHEM["min_kept"] - 1]
    kept = valid & (probability <= max(float(least), OHEM["threshold"]))
    assert OHEM["min_kept"] <= kept.sum() < valid.sum()
    torch.testing.assert_close(loss, pixels[kept].mean())
    torch.testing.assert_close(loss.detach(), run(both, streams)["Lx"])


def test_terms_over_regions_at_label_size_like_its_config():
    sets = {"sets": [{"name": "lovasz", "at": "label"}]}
    both, alone, streams = method(remedies=sets).eval(), method(alone=True, remedies=sets).eval(), batches()
    alone.load_state_dict(both.state_dict(), strict=False)
    torch.testing.assert_close(next(alone(streams, 0))["Ls"].detach(), run(both, streams)["Lx"])


@pytest.mark.parametrize("name", ["baseline", "self_training"])
def test_on_the_network_of_usrn_no_batch_is_whole(name):
    """What USRN's methods refuse, their twin does."""
    cfg = load_config(CONFIGS / "voc_1over32_baseline.json")
    cfg = replace(cfg, method={"name": name}, model=replace(cfg.model, pretrained=False))
    lovasz = {"sets": [{"name": "lovasz", "at": "label"}]}
    for remedies, message in (({"focus": OHEM}, "hard_pixels needs"), (lovasz, "set it to network")):
        with torch.device("meta"), pytest.raises(ConfigError, match=message):
            build_method(replace(cfg, remedies=remedies), context(21))
