"""HRDA's network against the official one: inference by windows, and the training forward with its losses."""

import numpy as np
import pytest
import torch

from common.config import ModelConfig
from common.losses.cross_entropy import pixel_cross_entropy
from common.models import build_model, load_weights
from common.models.hrda import Box
from common.ops.resize import resize
from tests.golden.fill import image
from tests.golden.test_mmseg_models import assert_close, reference, write_official

OPTIONS = {"crop": (64, 96), "dropout": 0.0, "backbone": {"drop_path": 0.0, "reduction_eps": 1e-5}}


@pytest.fixture(scope="module")
def expected():
    return reference("hrda_mitb5")


@pytest.fixture(scope="module")
def model(module_path):
    path = write_official("hrda_mitb5", module_path)
    raw = torch.load(path)
    torch.save({"state_dict": {f"model.{key}": tensor for key, tensor in raw["state_dict"].items()}}, path)
    model = build_model(ModelConfig("hrda", 19, "mit_b5", options=OPTIONS))
    load_weights(model, path)
    path.unlink()
    return model


def test_parameter_counts():
    for name, backbone, count in (("daformer", "mit_b5", 85_685_990), ("deeplabv2_reduced", "resnet101c", 43_920_300)):
        with torch.device("meta"):
            model = build_model(ModelConfig("hrda", 19, backbone, options={"head": name}))
        assert sum(p.numel() for p in model.parameters()) == count


@torch.inference_mode()
def test_inference(model, expected):
    x = torch.from_numpy(image(21, (1, 3, 128, 256)))
    assert [list(box) for box in model.windows((128, 256))] == expected["boxes"].tolist()
    out = model.eval().segment(x)
    assert_close(resize(out["logits"], (128, 256))[..., ::4, ::4], expected["logits"])
    assert_close(out["attention"], expected["attention"])
    assert_close(out["detail"][..., ::2, ::2], expected["detail"])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_training_forward(model, expected, mode):
    model.train(mode == "train")
    x = torch.from_numpy(image(22, (2, 3, 128, 256)))
    label = torch.from_numpy(expected["train_label"].astype(np.int64)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    label = torch.where(label == 255, -1, label)
    weight = torch.from_numpy(np.random.RandomState(24).random_sample((2, 128, 256)).astype(np.float32))
    box = Box(*expected["train_box"].tolist())

    with torch.no_grad():
        out = model.segment_crop(x, box)
    assert_close(out["logits"][..., ::2, ::2], expected[f"{mode}.fused"])
    assert_close(out["detail"][:, ::2], expected[f"{mode}.detail"])
    for logits, part, share, key in (
        (out["logits"], Box(0, 128, 0, 256), 0.9, "loss_seg"),
        (out["detail"], box, 0.1, "hr.loss_seg"),
    ):
        large = resize(logits, tuple(part.of(label).shape[-2:]))
        loss = share * pixel_cross_entropy(large, part.of(label), pixel_weight=part.of(weight), average="all")
        assert loss.item() == pytest.approx(float(expected[f"{mode}.decode.{key}"]), rel=1e-5)
    if mode == "train":
        bn = model.decode_head.head.fuse_layer.bottleneck.bn
        assert_close(bn.running_mean, expected["train.running_mean"])
        assert_close(bn.running_var, expected["train.running_var"])
        attention = model.decode_head.scale_attention.fuse_layer.bn
        assert (int(bn.num_batches_tracked), int(attention.num_batches_tracked)) == (2, 1)
