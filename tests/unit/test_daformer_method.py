"""DAFormer and MIC: the shipped configs, what a step does to which network, what a checkpoint holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from common.config import Config, ConfigError, ModelConfig, load_config
from common.data import DATASETS, build_transform
from common.engine import MethodContext
from common.engine.optim import learning_rate
from common.losses.blv import BLV
from common.models import build_model
from tests.contexts import context
from uda.confidence import Margins
from uda.daformer import ramp
from uda.train import METHODS, build_method

FOLDER = Path(__file__).parents[2] / "uda" / "configs"
SHIPPED = sorted(
    f"{folder}/{path.stem}"
    for folder in ("daformer", "hrda", "mic")
    for path in (FOLDER / folder).glob("*.yaml")
    if not path.stem.startswith("task")
)
CROP = (64, 96)
SMALL = {
    "daformer": ("mit_b0", {"channels": 8}),
    "hrda": ("mit_b0", {"channels": 8, "crop": (48, 64)}),
    "deeplabv2_reduced": ("resnet18", {"backbone": {"output_stride": 32}}),
}


def load(name, *words):
    return load_config(FOLDER / f"{name}.yaml", words)


def weights(folder, backbone="mit_b0"):
    """A file of a backbone's weights, in place of ImageNet's."""
    path = folder / f"{backbone}.pth"
    if not path.exists():
        cfg = load("daformer/toy", f"model.backbone={backbone}")
        torch.save(build_model(cfg.model).backbone.state_dict(), path)
    return path


def small(name, folder, *words):
    """The method of a config with a tiny network."""
    cfg = load(name)
    backbone, options = SMALL[cfg.model.name]
    if cfg.model.options.get("head") == "deeplabv2_reduced":  # HRDA on the CNN
        backbone, options = "resnet18", {"head": "deeplabv2_reduced", "crop": (32, 64)}
    model = replace(cfg.model, backbone=backbone, options=options, checkpoint=None)
    if model.pretrained:
        model = replace(model, pretrained=str(weights(folder, backbone)))
    cfg = replace(load(name, *words), model=model)
    return build(cfg)


def build(cfg: Config):
    row = DATASETS[cfg.data.streams["source"].dataset]
    facts = MethodContext(context(range(1, row.num_classes + 1)).statistics, row)
    torch.manual_seed(0)
    return build_method(cfg, facts).train()


def batches(size=2, classes=19):
    g = torch.Generator().manual_seed(1)
    source, target = (torch.randint(0, 256, (size, 3, *CROP), generator=g, dtype=torch.uint8) for _ in range(2))
    blocks = torch.randint(-1, classes, (size, 2, 3), generator=g, dtype=torch.int16)
    label = blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)
    shared = {"extent": torch.tensor([CROP] * size, dtype=torch.int32)}
    shared["geometry"] = torch.tensor([[512, 768, 512, 768, 32, 16, 1]] * size, dtype=torch.int32)
    return {"source": {"image": source, "label": label, **shared}, "target": {"image": target, **shared}}


def step(method, number=0):
    """The parts of a step, back-propagated as the engine does, and its end."""
    parts = []
    for part in method(batches(classes=method.model.num_classes), number):
        part["loss"].backward()
        parts.append({key: value.detach() for key, value in part.items()})
    return parts


# Configs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_take_a_step(name, tmp_path):
    folder, stem = name.split("/")
    blocks = ["method.mask_block=16"] * (folder == "mic")  # a crop that is hidden whole is too much for new weights
    method = small(name, tmp_path, *blocks)
    assert type(method) is METHODS["mic_hrda" if folder == "mic" and "_hrda" in stem else folder]
    assert isinstance(method.loss.logits, BLV) == ("_blv" in stem)

    trained = {id(p) for p in method.parameters() if p.requires_grad}
    assert trained == {id(p) for p in method.model.parameters()}
    assert {id(p) for group in method.parameter_groups() for p in group["params"]} == trained
    parts = step(method)
    assert len(parts) == method.backwards
    assert all(value.isfinite().all() for part in parts for value in part.values())
    assert all(p.grad.isfinite().all() for p in method.model.parameters())
    method.after_step(0)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load(name):
    cfg = load(name)
    folder, stem = name.split("/")
    assert (cfg.name, cfg.output) == (stem, f"runs/{folder}")
    with torch.device("meta"):
        assert sum(len(group["params"]) for group in build(cfg).parameter_groups()) > 50
    for stream in cfg.data.streams.values():
        build_transform(stream.augment, "augment")
        assert DATASETS[stream.dataset].num_classes == cfg.model.num_classes
    blv = [name for name in SHIPPED if name == f"{folder}/{stem}_blv"]
    assert "_blv" in stem or stem.endswith(("dacs", "source_only")) or blv


@pytest.mark.parametrize("name", ["daformer", "mic"])
def test_values_of_the_official_task(name, tmp_path):
    cfg = load(f"{name}/gta5_to_cityscapes")
    o, t, m = cfg.optim, cfg.train, cfg.model
    assert (o.name, o.lr, o.betas, o.weight_decay, o.clip) == ("adamw", 6e-5, (0.9, 0.999), 0.01, None)
    assert (t.steps, t.devices, m.norm) == (40_000, 1, "bn")
    rates = [learning_rate(o.lr, n, o, t.steps) for n in (0, 49, 1500)]
    assert rates == pytest.approx([6e-11, 1.9577e-6, 5.775e-5], rel=1e-4)
    assert cfg.data.streams["source"].sampler == {
        "order": "rare_class", "temperature": 0.01, "min_pixels": 3000, "min_crop_ratio": 0.5,
    }  # fmt: skip
    options = small(f"{name}/gta5_to_cityscapes", tmp_path).options
    assert (options.momentum, options.threshold, options.jitter, options.blur) == (0.999, 0.968, 0.8, 0.5)
    assert (options.feature_distance.weight, options.feature_distance.share) == (0.005, 0.75)
    assert (options.margins.top, options.margins.bottom, options.margins.of) == (15, 120, "crop")


@pytest.mark.parametrize("name", ["hrda/gta5_to_cityscapes", "mic/gta5_to_cityscapes_hrda"])
def test_values_of_the_official_task_at_full_resolution(name, tmp_path):
    cfg = load(name)
    assert cfg.model.options["crop"] == [512, 512]
    for stream, box in (("source", [1440, 2560]), ("target", [1024, 2048])):
        augment = cfg.data.streams[stream].augment
        assert (augment["crop"], augment["box"]) == ([1024, 1024], box)
    assert cfg.data.streams["source"].sampler["min_crop_ratio"] == 2.0
    e = cfg.eval
    assert (e.mode, e.crop, e.stride, e.short_edge) == ("slide", (1024, 1024), (512, 512), None)
    options = small(name, tmp_path).options
    assert options.detail_weight == 0.1 and getattr(options, "mask_block", 64) == 64
    assert options.margins == Margins(top=30, bottom=240, left=30, right=30, of="image")


@pytest.mark.parametrize("row, name", [("acdc", "acdc"), ("dark_zurich", "darkzurich")])
def test_values_of_the_tasks_to_adverse_conditions(row, name, tmp_path):
    """Cityscapes' sizes, and half or all of 1920×1080; margins on DAFormer alone; MIC masks both domains."""
    tasks = {
        f"daformer/cityscapes_to_{name}": ((512, 1024), (540, 960), (15, 120), 540),
        f"mic/cityscapes_to_{name}": ((512, 1024), (540, 960), (15, 120), 540),
        f"hrda/cityscapes_to_{name}": ((1024, 2048), (1080, 1920), (0, 0), None),
        f"mic/cityscapes_to_{name}_hrda": ((1024, 2048), (1080, 1920), (0, 0), None),
    }
    for task, (source, target, margins, short_edge) in tasks.items():
        cfg = load(task)
        streams = cfg.data.streams
        assert (streams["source"].dataset, streams["target"].dataset) == ("cityscapes", row)
        assert (cfg.data.val.dataset, cfg.data.val.split, cfg.eval.short_edge) == (row, "val", short_edge)
        boxes = tuple(tuple(streams[stream].augment["box"]) for stream in ("source", "target"))
        assert boxes == (source, target) and not streams["target"].labels

        options = small(task, tmp_path).options
        assert (options.margins.top, options.margins.bottom) == margins
        assert not (options.margins.left or options.margins.right)
        assert getattr(options, "masked", "separate") == "separate"
        assert cfg.data.streams["source"].sampler["min_crop_ratio"] == (0.5 if short_edge else 2.0)


def test_groups_of_the_official_network():
    """34 tensors of the head, 322 of the backbone's norms, 730 others."""
    with torch.device("meta"):
        method = build(load("daformer/gta5_to_cityscapes"))
    groups = {group["name"]: group for group in method.parameter_groups()}
    head, norm, rest = groups.values()
    assert [len(group["params"]) for group in (head, norm, rest)] == [34, 322, 730]
    assert [group["lr"] for group in (head, norm, rest)] == pytest.approx([6e-4, 6e-5, 6e-5])
    assert [group["weight_decay"] for group in (head, norm, rest)] == [0.01, 0, 0.01]


def test_things_of_the_data_sets():
    for name in ("gta5", "cityscapes", "synthia19"):
        assert DATASETS[name].things == (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
    row = DATASETS["cityscapes16"]
    assert [row.classes[k] for k in row.things] == [
        "traffic light", "traffic sign", "person", "rider", "car", "bus", "motorcycle", "bicycle",
    ]  # fmt: skip


# One step ------------------------------------------------------------------------------------------------------------


def test_the_teacher_is_a_moving_average_of_the_student(tmp_path):
    method = small("daformer/toy", tmp_path)
    assert [ramp(t, 0.99) for t in (0, 1, 2, 97, 98, 500)] == pytest.approx([1 / 2, 2 / 3, 3 / 4, 98 / 99, 0.99, 0.99])
    before = [p.clone() for p in method.teacher.parameters()]
    with torch.no_grad():
        for p in method.model.parameters():
            p += 1
    method.after_step(0)
    for old, new in zip(before, method.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_mode_of_the_teacher(mode, tmp_path):
    """Batch statistics, but nothing random: no dropout, no dropped paths."""
    method = small("daformer/toy", tmp_path, f"method.teacher_mode={mode}", "model.options.dropout=0.5")
    step(method)
    kinds = {nn.BatchNorm2d: mode == "train", nn.Dropout2d: False, DropPath: False}
    for kind, training in kinds.items():
        modules = [m for m in method.teacher.modules() if isinstance(m, kind)]
        assert modules and all(m.training == training for m in modules)
    assert all(m.training for m in method.model.modules())


def test_padding_of_target_crops_is_not_learned(tmp_path):
    method = small("daformer/toy", tmp_path, "method.threshold=0.0")
    data = batches()
    data["target"]["extent"] = torch.tensor([[64, 50], [40, 96]], dtype=torch.int32)
    pseudo = method.look(method.teacher, method.normalised(data["target"]), data["target"])
    assert pseudo.weight[0, :, :50].eq(1).all() and not pseudo.weight[0, :, 50:].any()
    assert pseudo.weight[1, :40].eq(1).all() and not pseudo.weight[1, 40:].any()


def test_a_step_without_things_is_finite(tmp_path):
    method = small("daformer/gta5_to_cityscapes", tmp_path)
    data = batches()
    data["source"]["label"].zero_()
    first = next(iter(method(data, 0)))
    assert first["feature_distance"] == 0 and first["loss"] == first["source_ce"]


def test_remedies_do_not_reach_teacher_and_feature_distance(tmp_path):
    """Two strengths of the noise: another loss, the same pseudo-labels and features."""
    found = []
    for name in ("daformer/gta5_to_cityscapes", "daformer/gta5_to_cityscapes_blv"):
        method = small(name, tmp_path)
        method.model.eval()  # no dropped paths
        torch.manual_seed(3)
        source, target = method.opened(batches()["source"]), method.normalised(batches()["target"])
        found.append((method.source_terms(source, 0.0), method.look(method.teacher, target, batches()["target"])))
    (plain, pseudo), (blv, other) = found
    assert torch.equal(plain["feature_distance"], blv["feature_distance"])
    assert torch.equal(pseudo.label, other.label) and torch.equal(pseudo.weight, other.weight)
    assert not torch.equal(plain["source_ce"], blv["source_ce"])


def test_source_only_reads_no_target(tmp_path):
    method = small("daformer/toy_source_only", tmp_path)
    assert method.teacher is None and method.imagenet is None
    (part,) = method({"source": batches()["source"]}, 0)
    assert part.keys() == {"loss", "source_ce"}


def test_masked_image_and_its_labels(tmp_path):
    method = small("mic/toy", tmp_path, "method.jitter=0", "method.blur=0")
    source, target = method.opened(batches()["source"]), method.normalised(batches()["target"])
    pseudo = method.look(method.teacher, target, batches()["target"])
    image, label, weight = method.to_mask(source, target, pseudo)
    assert torch.equal(image, target) and label is pseudo.label and weight is pseudo.weight
    hidden = method.hidden(image)
    shown = (hidden != 0).any(1)
    assert torch.equal(hidden, image * shown[:, None]) and 0 < shown.float().mean() < 1

    method = small("mic/toy", tmp_path, "method.masked=separate")
    image, label, weight = method.to_mask(source, target, pseudo)
    assert torch.equal(image[0], source.image[0]) and torch.equal(image[1], target[0])
    assert torch.equal(label, torch.stack((source.label[0], pseudo.label[0]))) and weight[0].eq(1).all()


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_the_imagenet_network_is_in_no_checkpoint(tmp_path):
    """It comes from the file of weights, also where the student starts from a checkpoint, and is never trained."""
    method = small("daformer/gta5_to_cityscapes", tmp_path)
    state = method.state_dict()
    assert {name.partition(".")[0] for name in state} <= {"model", "teacher", "loss"}

    frozen = {name: t.clone() for name, t in method.imagenet.net.state_dict().items()}
    expected = torch.load(weights(tmp_path))
    assert all(torch.equal(frozen[name], expected[name]) for name in expected)
    step(method)
    assert not any(m.training for m in method.imagenet.modules())

    other = small("daformer/gta5_to_cityscapes", tmp_path)
    other.load_state_dict(method.state_dict())
    assert all(torch.equal(t, frozen[name]) for name, t in other.imagenet.net.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: t for name, t in state.items() if "decode_head" not in name})


def test_a_resumed_step_is_the_one_that_would_have_come(tmp_path):
    """To the bit, from the state dict alone: the release copies its teacher from the student again."""
    method, resumed = (small("mic/toy", tmp_path) for _ in range(2))
    torch.manual_seed(1)
    step(method)
    with torch.no_grad():
        for p in method.model.parameters():
            p -= 0.1 * p.grad
            p.grad = None
    method.after_step(0)
    resumed.load_state_dict(method.state_dict())
    losses = []
    for each in (method, resumed):
        torch.manual_seed(2)
        losses.append([part["loss"] for part in step(each, 1)])
    assert all(torch.equal(*pair) for pair in zip(*losses, strict=True))


def test_a_checkpoint_of_the_student_leaves_the_imagenet_network_alone(tmp_path):
    start = small("daformer/toy", tmp_path)
    torch.save(start.model.state_dict(), tmp_path / "start.pth")
    cfg = load("daformer/toy", f"model.checkpoint={tmp_path / 'start.pth'}", "model.options.channels=8")
    cfg = replace(cfg, model=replace(cfg.model, pretrained=str(weights(tmp_path))), method={"name": "daformer"})
    method = build(cfg)
    assert torch.equal(method.model.decode_head.conv_seg.weight, start.model.decode_head.conv_seg.weight)
    expected = torch.load(weights(tmp_path))
    assert all(torch.equal(t, expected[name]) for name, t in method.imagenet.net.state_dict().items())


# User mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, words, message",
    [
        (
            "daformer/toy",
            ["method.feature_distance.weight=0.005"],
            "toy: method.feature_distance needs ImageNet weights",
        ),
        ("daformer/toy", ["method.threshold=1.5"], "toy: method.threshold: 1.5 is more than 1"),
        ("daformer/toy", ["method.margins.of=picture"], "toy: method.margins.of"),
        (
            "daformer/toy",
            ["data.streams.target.augment={recipe: detectron2, crop: [96, 128]}"],
            "toy: data.streams.target.augment.recipe: 'detectron2' does not tell the padding of small images, which",
        ),
        ("mic/toy", ["method.adapt=false"], "adapt: false leaves MIC nothing to do"),
        ("mic/toy", ["method.mask_block=0"], "toy: method.mask_block: 0 is less than 1"),
    ],
)
def test_one_line_for_what_does_not_fit(name, words, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(load(name, *words))
    assert "\n" not in str(error.value)


def test_network_of_another_kind():
    cfg = load("daformer/toy")
    with pytest.raises(ConfigError, match="'deeplabv2' does not fit the method; set it to daformer or deeplabv2_red"):
        build(replace(cfg, model=ModelConfig("deeplabv2", 19)))


def test_classes_of_the_feature_distance(tmp_path):
    method = small("daformer/gta5_to_cityscapes", tmp_path, "method.feature_distance.classes=[car, bus]")
    assert method.things.nonzero().flatten().tolist() == [13, 15]
    with pytest.raises(ConfigError, match="method.feature_distance.classes: 'cart' is no class of gta5"):
        small("daformer/gta5_to_cityscapes", tmp_path, "method.feature_distance.classes=[cart]")


def test_crops_of_two_sizes(tmp_path):
    method = small("daformer/toy", tmp_path)
    data = batches()
    data["target"] = {"image": data["target"]["image"][:, :, :32]}
    with pytest.raises(ValueError, match="source crops .* and target crops .* differ; give both streams the same"):
        list(method(data, 0))
