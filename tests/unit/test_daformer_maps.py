"""What DAFormer, HRDA and MIC compare, count and leave out, and the settings that could not do what they say."""

from dataclasses import replace

import pytest
import torch

from common.config import ConfigError, ModelConfig
from common.losses.feature_distance import cells_of, feature_distance
from common.models import build_model, load_weights
from common.ops.resize import size_of
from tests.unit.test_daformer_method import batches, load, small
from uda.confidence import Margins, check_image_margins
from uda.daformer import FeatureDistance, check_maps
from uda.mic import MIC


@pytest.mark.parametrize(
    ("name", "backbone", "options"),
    [
        ("daformer", "timm:vit_tiny_patch16_224", {"channels": 8}),
        ("upernet", "dinov2_small", {"channels": 8, "auxiliary": False, "neck": "mln"}),
    ],
)
def test_maps_of_an_untrained_neck_are_no_features_of_imagenet(name, backbone, options):
    """They would hold the student to random numbers, other ones for every seed."""
    with torch.device("meta"):
        model = build_model(ModelConfig(name, 5, backbone, pretrained=False, options=options))
    with pytest.raises(ConfigError, match=f"here: the maps of {backbone} come through a neck"):
        check_maps(model, -1, backbone, "here")


@pytest.mark.parametrize("name", ["daformer/gta5_to_cityscapes", "hrda/gta5_to_cityscapes"])
def test_any_stage_can_be_held(name, tmp_path):
    """After the student has moved from its start, by hand on the map before the last."""
    words = "method.feature_distance={weight: 0.005, share: 0.5, stage: -2}"
    method = small(name, tmp_path, words)
    torch.manual_seed(3)
    for p in method.model.backbone.parameters():
        p.data += 0.01 * torch.randn_like(p)
    for module in (method.model, method.imagenet):
        module.eval()
    source = method.opened(batches(classes=method.model.num_classes)["source"])
    seen = method.seen_by_backbone(source.image)

    with torch.no_grad():
        found = method.source_terms(source, 0.0)["feature_distance"]
        ours, theirs = method.model.backbone(seen)[-2], method.imagenet(seen)[-2]
        where = cells_of(source.label, size_of(ours), method.things, 0.5)
    assert where.any() and found > 0
    torch.testing.assert_close(found, feature_distance(ours, theirs, where))

    with pytest.raises(ConfigError, match=r"feature_distance.stage: 4: .* gives 4 maps; set it to -4 to 3"):
        small(name, tmp_path, words.replace("-2", "4"))


def test_classes_beside_all_cells_are_refused():
    with pytest.raises(ValueError, match="classes: cells: all holds every feature"):
        FeatureDistance(cells="all", classes=("car",))


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, True), (1.0, False)])
def test_pseudo_labels_without_weight_do_not_count(threshold, expected, tmp_path):
    method = small("daformer/toy_blv", tmp_path, "remedies.counts.refresh=1", f"method.threshold={threshold}")
    for part in method(batches(classes=method.model.num_classes), 0):
        confident = part.get("confident")
    assert bool(confident > 0) is expected
    assert bool(method.loss.counts.running.sum() > 0) is expected


def test_margins_of_images_that_leave_nothing_are_refused(tmp_path):
    """When the first images come: nobody knows their size before."""
    geometry = torch.tensor([[128, 256, 128, 256, 0, 0, 0]])
    check_image_margins(geometry, Margins(30, 97, 30, 30, "image"))
    with pytest.raises(ValueError, match="top and bottom 128, left and right 60 leave nothing of an image of 128×256"):
        check_image_margins(geometry, Margins(30, 98, 30, 30, "image"))

    method = small("daformer/toy", tmp_path, "method.margins={of: image, left: 400, right: 368}")
    with pytest.raises(ValueError, match="leave nothing of an image of 512×768"):
        list(method(batches(classes=method.model.num_classes), 0))
    method = small("daformer/toy", tmp_path, "method.margins={of: image, left: 40, right: 36}")
    assert len(list(method(batches(classes=method.model.num_classes), 0))) == 2


def test_blocks_as_large_as_the_crop_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="method.mask_block: 64: crops of 64×128 have one row or column"):
        small("mic/toy", tmp_path, "method.mask_block=64", *(crop(name) for name in ("source", "target")))
    assert isinstance(small("mic/toy", tmp_path, "method.mask_block=16"), MIC)


def crop(stream):
    return f"data.streams.{stream}.augment.crop=[64, 128]"


@pytest.mark.parametrize("task", ["daformer/gta5_to_cityscapes", "daformer/synthia_to_cityscapes_cnn"])
def test_target_crops_have_no_limit_of_one_class(task):
    """With labels, too, as a run that is told more than the release's has them."""
    streams = load(task, "data.streams.target.labels=true").data.streams
    assert streams["target"].augment["category_limit"] == 1
    assert streams["source"].augment.get("category_limit", 0.75) == 0.75


# HRDA ----------------------------------------------------------------------------------------------------------------

CNN = {"head": "deeplabv2_reduced", "crop": (64, 64)}


@pytest.mark.parametrize(
    ("backbone", "options", "why"),
    [
        (
            "dinov2_small",
            {"channels": 8, "crop": (112, 112)},
            "dinov2 gives maps of strides 14, 14, 14, 14; HRDA needs",
        ),
        ("vit_base_patch16", {"channels": 8, "crop": (64, 64)}, "vit gives maps of strides 16, 16, 16, 16"),
        ("resnet18", {**CNN, "backbone": {"output_stride": 16}}, "output_stride: 16: HRDA's deeplabv2_reduced takes 8"),
        ("resnet18", {**CNN, "channels": 8}, "channels: of head: daformer"),
        ("resnet18", {**CNN, "fusion": "conv"}, "fusion: of head: daformer"),
        ("resnet18", {**CNN, "dropout": 0.3}, "dropout: of head: daformer"),
    ],
)
def test_networks_that_hrda_cannot_have(backbone, options, why):
    with torch.device("meta"), pytest.raises(ConfigError, match=why):
        build_model(ModelConfig("hrda", 5, backbone, options=options))


@pytest.mark.parametrize("options", [{"channels": 8, "crop": (64, 64)}, CNN])
def test_classifiers_of_both_heads_can_be_new(options, tmp_path):
    """Both have K outputs: the logits and the attention of every class."""
    config = ModelConfig("hrda", 7, "resnet18", options=options)
    stored = build_model(config).state_dict()
    torch.save({"state_dict": stored}, tmp_path / "seven.pth")
    model = build_model(replace(config, num_classes=5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="trained on 7 classes, the model has 5; its classifier is left out"):
        load_weights(model, tmp_path / "seven.pth", reset_classifier=True)

    for key, value in model.state_dict().items():
        is_new = key.rpartition(".")[0] in model.classifiers
        assert is_new == (value.shape != stored[key].shape)
        assert torch.equal(value, (before if is_new else stored)[key])
