"""HRDA's network in closed form: windows, detail crops, and which scale says what where."""

import pytest
import torch

from common.config import ConfigError, ModelConfig
from common.models import build_model
from common.models.hrda import Box
from common.ops.resize import resize


def network(**options):
    torch.manual_seed(0)
    return build_model(ModelConfig("hrda", 5, "resnet18", options={"channels": 8, "dropout": 0.0, **options})).eval()


def attend(model, value):
    """Attention that is 0 or 1 everywhere."""
    torch.nn.init.zeros_(model.decode_head.scale_attention.conv_seg.weight)
    torch.nn.init.constant_(model.decode_head.scale_attention.conv_seg.bias, value)


def test_windows():
    model = network(crop=(512, 512))
    assert len(model.windows((1024, 1024))) == 9
    assert model.windows((512, 512)) == [Box(0, 512, 0, 512)]
    assert [box.x1 for box in model.windows((512, 1200))] == [0, 256, 512, 688]
    assert [box.y1 for box in network(crop=(512, 512), overlap=False).windows((1200, 512))] == [0, 512, 688]
    assert model.windows((64, 96)) == [Box(0, 64, 0, 96)]


def test_drawn_boxes():
    """Multiples of 8, up to 504: the last place is never drawn; an axis without room has one."""
    torch.manual_seed(0)
    boxes = [network.draw_box((1024, 512)) for network in [network(crop=(512, 512))] for _ in range(2000)]
    starts = {box.y1 for box in boxes}
    assert starts == set(range(0, 512, 8))
    assert {(box.y2 - box.y1, box.x1, box.x2) for box in boxes} == {(512, 0, 512)}


def test_boxes_may_end_at_the_border():
    """`inclusive`: of 1028 rows, the multiples of 8 that leave room for 512."""
    torch.manual_seed(0)
    model = network(crop=(512, 512), inclusive=True)
    boxes = [model.draw_box((1028, 512)) for _ in range(2000)]
    assert {box.y1 for box in boxes} == set(range(0, 513, 8)) and {box.x1 for box in boxes} == {0}


@torch.no_grad()
def test_without_attention_the_context_alone_speaks():
    model, x = network(crop=(32, 32)), torch.randn(2, 3, 64, 96)
    attend(model, -1e4)
    context = model.decode_head.head(list(model.backbone(model.context(x))))
    for out in (model.segment(x), model.segment_crop(x, Box(8, 40, 16, 48))):
        torch.testing.assert_close(out["logits"], resize(context, (16, 24)))


@torch.no_grad()
def test_with_full_attention_the_detail_alone_speaks():
    """Of one window as large as the image: the plain network at full size."""
    model, x = network(crop=(64, 96)), torch.randn(2, 3, 64, 96)
    attend(model, 1e4)
    detail = model.decode_head.head(list(model.backbone(x)))
    for out in (model.segment(x), model.segment_crop(x, Box(0, 64, 0, 96))):
        torch.testing.assert_close(out["logits"], detail)


@torch.no_grad()
def test_the_number_of_windows_at_once_changes_nothing():
    x = torch.randn(2, 3, 64, 96)
    few, many = (network(crop=(32, 32), window_batch=n).segment(x)["logits"] for n in (1, 100))
    torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-5)


def test_the_detail_learns_inside_its_box_alone():
    model, x = network(crop=(32, 32)), torch.randn(1, 3, 64, 96)
    box = Box(8, 40, 16, 48)
    out = model.segment_crop(x, box)
    outside = out["logits"].clone()
    box.over(4).of(outside).zero_()
    (gradient,) = torch.autograd.grad(outside.sum(), out["detail"], retain_graph=True)
    assert not gradient.any()
    (gradient,) = torch.autograd.grad(out["logits"].sum(), out["detail"])
    assert gradient.abs().gt(0).all()


def test_crops_that_do_not_divide():
    with pytest.raises(ConfigError, match="crop: .*: sides must be multiples of 16 for head: daformer"):
        network(crop=(60, 64))


@pytest.mark.parametrize(("backbone", "crop", "passes"), [("mit_b0", 64, 1), ("mit_b0", 48, 2), ("resnet18", 64, 2)])
def test_context_and_detail_are_one_pass_of_the_backbone(backbone, crop, passes, monkeypatch):
    """Where they have one size and no batch norm sees both; the maps and the gradients are those of two passes."""
    options = {"channels": 8, "dropout": 0.0, "crop": (crop, crop)}
    if backbone == "mit_b0":
        options["backbone"] = {"drop_path": 0.0}
    torch.manual_seed(0)
    model = build_model(ModelConfig("hrda", 5, backbone, options=options)).train()
    x = torch.randn(2, 3, 128, 128)
    box = Box(32, 32 + crop, 16, 16 + crop)

    def step() -> tuple[torch.Tensor, ...]:
        seen.clear()
        model.zero_grad()
        out = model.segment_crop(x, box)
        (out["logits"].square().mean() + out["detail"].square().mean()).backward()
        first = next(model.backbone.parameters()).grad
        return out["logits"], out["detail"], out["features"][-1], first.clone()

    seen = []
    model.backbone.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    once = step()
    assert seen == ([4] if passes == 1 else [2, 2])
    monkeypatch.setattr(model, "mixes_images", True)
    twice = step()
    assert seen == [2, 2]
    for ours, plain in zip(once, twice, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
