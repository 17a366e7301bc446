"""detectron2's keys that say what a config does already, and its weights: taken where true, else refused."""

from pathlib import Path

import pytest

from common.config import ConfigError, load_config
from ltss_benchmark.detectron2_keys import read_config
from ltss_benchmark.detectron2_keys.agreeing import AGREEING

CONFIGS = Path(__file__).parents[2] / "ltss_benchmark" / "configs"
BASE = CONFIGS / "ade20k_full" / "mask2former" / "maskformer2_R50_bs16_200k.yaml"
DEEPLAB = CONFIGS / "ade20k_full" / "deeplabv3p" / "deeplabv3p_R50_bs16_200k.yaml"
MATCHED = BASE.with_name("matcher-maskformer2_R50_bs16_200k.yaml")
SWIN = CONFIGS / "ade20k" / "mask2former" / "swin" / "maskformer2_swin_tiny_bs16_160k.yaml"
RELEASED = {  # what the release's own files say of these configs
    BASE: """
        DATASETS.TRAIN ("ade20k_full_sem_seg_train",)
        DATASETS.TEST ("ade20k_full_sem_seg_val",)
        INPUT.SIZE_DIVISIBILITY 512
        INPUT.DATASET_MAPPER_NAME mask_former_semantic
        MODEL.META_ARCHITECTURE MaskFormer
        MODEL.BACKBONE.NAME build_resnet_backbone
        MODEL.RESNETS.DEPTH 50
        MODEL.RESNETS.NORM FrozenBN
        MODEL.SEM_SEG_HEAD.NAME MaskFormerHead
        MODEL.SEM_SEG_HEAD.IGNORE_VALUE 65535
        MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME MSDeformAttnPixelDecoder
        MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME MultiScaleMaskedTransformerDecoder
        SOLVER.BACKBONE_MULTIPLIER 0.1
        SOLVER.LR_SCHEDULER_NAME WarmupPolyLR
        SOLVER.BASE_LR_END 0.0
        SOLVER.CLIP_GRADIENTS.ENABLED True
        SOLVER.WEIGHT_DECAY_NORM 0.0
        SOLVER.WEIGHT_DECAY_EMBED 0.0
        TEST.AUG.MIN_SIZES [256,384,512,640,768,896]
        MATCHER.DATASET \"\"
    """,
    MATCHED: "MATCHER.DATASET ade20k-full",
    DEEPLAB: """
        MODEL.META_ARCHITECTURE SemanticSegmentor
        MODEL.SEM_SEG_HEAD.NAME DeepLabV3PlusHead
        MODEL.SEM_SEG_HEAD.LOSS_TYPE hard_pixel_mining
        MODEL.RESNETS.NORM SyncBN
        SOLVER.BACKBONE_MULTIPLIER 1.0
        SOLVER.CLIP_GRADIENTS.ENABLED False
        SOLVER.WEIGHT_DECAY_NORM 0.0
        CUDNN_BENCHMARK True
    """,
    SWIN: """
        MODEL.BACKBONE.NAME D2SwinTransformer
        MODEL.SWIN.EMBED_DIM 96
        MODEL.SWIN.DEPTHS [2,2,6,2]
        MODEL.SWIN.NUM_HEADS [3,6,12,24]
        MODEL.SWIN.WINDOW_SIZE 7
        MODEL.SWIN.PRETRAIN_IMG_SIZE 224
    """,
}


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_keys_that_say_what_the_config_does_change_nothing(path):
    words = RELEASED[path].replace('\\"', '"').split()
    assert read_config(path, words) == load_config(path)


def test_every_such_key_is_tried():
    typed = {word for text in RELEASED.values() for word in text.split()}
    assert AGREEING.keys() <= typed


@pytest.mark.parametrize("key", AGREEING)
def test_such_keys_with_another_value_are_refused(key):
    with pytest.raises(ConfigError) as error:
        read_config(BASE, [key, "other"])
    assert f"{key}: 'other' is not used here" in str(error.value) and AGREEING[key][1] in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("INPUT.SIZE_DIVISIBILITY 512 INPUT.CROP.SIZE (640,640)", "'512' is not used here (this config: 640)"),
        ("MODEL.RESNETS.DEPTH 101", "'101' is not used here (this config: 50): set model.backbone"),
        ("MODEL.RESNETS.NORM SyncBN", "'SyncBN' is not used here (this config: FrozenBN)"),
        ("SOLVER.BACKBONE_MULTIPLIER 1.0", "'1.0' is not used here (this config: 0.1): set optim.groups"),
        ("MATCHER.DATASET coco-lt", "'coco-lt' is not used here (this config: ade20k-full)"),
        ("SOLVER.CLIP_GRADIENTS.ENABLED 1", "'1' is not used here (this config: True)"),
    ],
)
def test_a_contradiction_is_named_with_what_the_config_does(words, message):
    with pytest.raises(ConfigError) as error:
        read_config(BASE, words.split())
    assert message in str(error.value)


def test_the_order_of_such_keys_does_not_matter():
    words = "INPUT.SIZE_DIVISIBILITY 640 INPUT.CROP.SIZE (640,640) MODEL.RESNETS.DEPTH 101 model.backbone=resnet101"
    assert read_config(BASE, words.split()).model.backbone == "resnet101"


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "pretrained", "checkpoint"),
    [
        (["MODEL.WEIGHTS", ""], False, None),
        (["MODEL.WEIGHTS", '""'], False, None),
        (["MODEL.WEIGHTS="], False, None),
        (["MODEL.WEIGHTS", "R-50.pkl"], True, None),
        (["MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl"], True, None),
        (["MODEL.WEIGHTS", "R-101.pkl", "model.backbone=resnet101"], True, None),
        (["model.backbone=swin_tiny", "MODEL.WEIGHTS", "x/swin_tiny_patch4_window7_224.pkl"], True, None),
        (["MODEL.WEIGHTS", "model_final_e0c58e.pkl"], True, "model_final_e0c58e.pkl"),
        (["MODEL.WEIGHTS", "R-50_run/model_final.pth"], True, "R-50_run/model_final.pth"),
    ],
)
def test_weights_are_nothing_a_backbone_or_a_checkpoint(words, pretrained, checkpoint):
    cfg = read_config(BASE, words)
    assert (cfg.model.pretrained, cfg.model.checkpoint) == (pretrained, checkpoint)


def test_a_backbones_file_is_taken_where_it_is(tmp_path):
    path = tmp_path / "R-50.pkl"
    path.touch()
    assert read_config(BASE, ["MODEL.WEIGHTS", str(path)]).model.pretrained == str(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("R-101.pkl", "'R-101.pkl' is of resnet101, and model.backbone is resnet50; make them equal"),
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", "BGR images"),
        ("https://host/maskformer2_model.pkl", "not fetched here; give the path of the file"),
    ],
)
def test_weights_of_another_network_are_refused(value, message):
    with pytest.raises(ConfigError) as error:
        read_config(BASE, ["MODEL.WEIGHTS", value])
    assert message in str(error.value) and str(error.value).startswith("MODEL.WEIGHTS: ")
