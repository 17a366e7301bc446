"""The parts of DAFormer's and MIC's step against the official ones."""

import numpy as np
import pytest
import torch

from common.losses.feature_distance import cells_of, feature_distance, main_class
from common.ops.block_mask import block_mask, block_noise
from common.ops.class_mix import class_mask, paste
from common.ops.colour import Jitter, blur, jitter
from common.ops.upsampled_loss import upsampled_labels
from tests.golden.fill import image
from tests.golden.test_mmseg_models import assert_close, reference
from uda.confidence import Margins, confident_share, crop_margins

THINGS = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)


@pytest.fixture(scope="module")
def ops():
    return {key: torch.from_numpy(np.asarray(value)) for key, value in reference("daformer_ops").items()}


def ours(label):
    """Labels with −1 in place of 255."""
    label = label.long()
    return torch.where(label == 255, -1, label)


def normal(seed, shape):
    return torch.from_numpy(image(int(seed), tuple(int(side) for side in shape)))


def test_class_mix(ops):
    chosen = torch.zeros(2, 20, dtype=torch.bool)
    for row, classes in zip(chosen, ops["mix_chosen"].tolist(), strict=True):
        row[[19 if c == 255 else c for c in classes]] = True
    source, target = (normal(seed, (2, 3, 24, 40)) for seed in ops["mix_image_seeds"])

    mask = class_mask(ours(ops["mix_gt"]), chosen)
    assert torch.equal(mask.long(), ops["mix_mask"])
    assert torch.equal(paste(mask, source, target), ops["mix_image"])
    label = paste(mask, ours(ops["mix_gt"]), ops["mix_pseudo"].long())
    assert torch.equal(label, ours(ops["mix_label"]))
    weight = paste(mask, torch.ones_like(ops["mix_weight"]), ops["mix_weight"])
    torch.testing.assert_close(weight, ops["mix_mixed_weight"])


@pytest.mark.parametrize("name", ["blur_a", "blur_b"])
def test_blur(ops, name):
    x = normal(37, ops[f"{name}_shape"])
    sigma = torch.full((len(x),), float(ops[f"{name}_sigma"]))
    assert_close(blur(x, sigma)[..., ::2, ::2], ops[name], 1e-5)


@pytest.mark.parametrize("order", ["0123", "3102"])
def test_jitter(ops, order):
    factors = Jitter(*(ops[f"jitter_{name}_factor"] for name in Jitter._fields))
    assert_close(jitter(ops["jitter_rgb"], factors, [int(n) for n in order]), ops[f"jitter_{order}"], 1e-5)


def test_pseudo_labels(ops):
    logits = float(ops["pl_logits_scale"]) * normal(ops["pl_logits_seed"], (2, 7, 24, 40))
    label, probability = upsampled_labels(logits, (24, 40), align_corners=False)
    share = confident_share(probability, 0.968)
    assert torch.equal(label, ops["pl_label"])
    torch.testing.assert_close(share, ops["pl_weight"])

    rows = share * crop_margins((24, 40), Margins(top=3, bottom=5), label.device)
    torch.testing.assert_close(rows.expand(2, -1, -1), ops["pl_weight_rows"])


@pytest.mark.parametrize("name", ["mic_a", "mic_b", "mic_c"])
def test_masks(ops, name):
    block, ratio = ops[f"{name}_block_ratio"].tolist()
    mask = ops[f"{name}_mask"]
    noise = ops[f"{name}_uniform"]
    assert block_noise(torch.zeros(2, 3, *mask.shape[-2:]), int(block)).shape == noise.shape
    assert torch.equal(block_mask(noise, mask.shape[-2:], ratio), mask.bool())


def test_feature_distance(ops):
    features, frozen = (normal(seed, (2, 8, 3, 4)) for seed in ops["fd_seeds"])
    frozen[0, :, 0, 0] = features[0, :, 0, 0]
    label = ours(ops["fd_label"])
    things = torch.zeros(19, dtype=torch.bool)
    things[list(THINGS)] = True

    assert torch.equal(main_class(label, (3, 4), 19, 0.75), ours(ops["fd_scaled"]))
    where = cells_of(label, (3, 4), things, 0.75)
    assert torch.equal(where, ops["fd_mask"])

    features.requires_grad_()
    loss = 0.005 * feature_distance(features, frozen, where)
    torch.testing.assert_close(loss.detach(), ops["fd_loss"], rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, features)
    assert_close(gradient, ops["fd_grad"], 1e-5)


def test_feature_distance_without_things():
    """The release's loss is not a number there, and its gradient 0."""
    features = normal(42, (2, 8, 3, 4)).requires_grad_()
    nowhere = cells_of(torch.zeros(2, 96, 128, dtype=torch.int64), (3, 4), torch.arange(19) == 6, 0.75)
    loss = feature_distance(features, normal(43, (2, 8, 3, 4)), nowhere)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, features)[0].any()
