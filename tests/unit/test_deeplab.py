"""DeepLabV2: sizes, start, options, and initial weights from classifiers' files."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from common.config import ConfigError, ModelConfig
from common.models import build_model, load_weights
from common.models.pretrained.cpsl import read_extras

SMALL = {"blocks": [1, 1, 1, 1], "width": 8, "head_channels": 16, "features": 24}


def config(pretrained: bool | str = False, classes: int = 5, **options) -> ModelConfig:
    scale = {"mean": (0.0, 0.0, 0.0), "std": (255.0, 255.0, 255.0), "align_corners": True}
    return ModelConfig("deeplabv2", classes, pretrained=pretrained, options=options, **scale)


@pytest.mark.parametrize(
    ("image", "grid"), [((512, 896), (65, 113)), ((1024, 2048), (129, 257)), ((760, 1280), (96, 161))]
)
def test_grid_of_the_published_sizes(image, grid):
    with torch.device("meta"):
        out = build_model(config(classes=19)).eval().segment(torch.empty(1, 3, *image))
    assert out["logits"].shape == (1, 19, *grid) and out["features"].shape == (1, 256, *grid) and out["aux"] == []


def test_start():
    model = build_model(config(**SMALL, extra_norm=True))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    weights = torch.cat([m.weight.detach().flatten() for m in convs])
    assert abs(weights.std() - 0.01) < 2e-4 and abs(weights.mean()) < 2e-4
    assert all(m.weight.numel() < 500 or abs(m.weight.std() - 0.01) < 2e-3 for m in convs)
    assert not model.layer5.bottleneck[1].bias.any() and model.layer5.conv2d_list[1][0].bias.any()
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm))


def test_small_network_learns():
    """Two colours, two classes: cross-entropy falls, in the class and scale that full size uses."""
    model = build_model(config(classes=2, **SMALL)).train()
    image = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    image[:, :, :, 32:] = 255
    label = (image[:, 0] > 0).long()[:, ::8, ::8]
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(60):
        logits = torch.nn.functional.interpolate(model(image)["logits"], (8, 8), mode="bilinear", align_corners=True)
        losses.append(nn.functional.cross_entropy(logits, label))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.3 * losses[0]
    hit, _ = model.eval().labels(image)
    assert hit.shape == (2, 64, 64) and (hit == (image[:, 0] > 0)).float().mean() > 0.85


def test_features_are_those_that_the_classifier_sees():
    model = build_model(config(**SMALL, dropout=0.5)).train()
    out = model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert torch.equal(model.layer5.head[1](out["features"]), out["logits"])
    assert (out["features"].flatten(2) == 0).all(2).any()  # whole channels are dropped


def test_frozen_norms_do_not_move():
    model = build_model(config(**SMALL, freeze_bn=True)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))["logits"].square().mean().backward()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(not m.training and m.weight.grad is None for m in norms)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.layer5.bottleneck[2].weight.grad is not None and model.layer5.head[0].training


@pytest.fixture
def classifier(tmp_path):
    """A classifier with one bottleneck a stage, as torchvision writes it."""
    net = ResNet(Bottleneck, [1, 1, 1, 1])
    path = tmp_path / "resnet.pth"
    torch.save(net.state_dict(), path)
    return net.state_dict(), path


def check(model: nn.Module, state: dict) -> None:
    names = [name for name in model.state_dict() if not name.startswith(("layer5", "bn_pretrain"))]
    assert len(names) == len(state) - 2 and all(torch.equal(model.state_dict()[n], state[n]) for n in names)


def test_torchvision_file_fills_the_backbone(classifier, recwarn):
    state, path = classifier
    check(build_model(config(str(path), blocks=[1, 1, 1, 1])), state)
    assert not [w for w in recwarn if "left out" in str(w.message)]


def test_key_map_reads_other_layouts(classifier, tmp_path):
    state, _ = classifier
    path = tmp_path / "simclr.pth"
    other = {f"module.net.{name.replace('layer', 'block')}": t for name, t in state.items()} | {"head.w": torch.ones(2)}
    torch.save({"state_dict": other}, path)
    with pytest.raises(ValueError, match=r"simclr.pth: does not fit the backbone. missing: .*pretrained_keys"):
        build_model(config(str(path), blocks=[1, 1, 1, 1]))
    keys = {r"^net\.": "", "^block": "layer"}
    with pytest.warns(UserWarning, match=r"left out: head.w"):
        check(build_model(config(str(path), blocks=[1, 1, 1, 1], pretrained_keys=keys, extra_norm=True)), state)


@pytest.mark.parametrize("form", ["bare", "module", "proda", "old"])
@pytest.mark.parametrize("extra_norm", [False, True])
def test_all_forms_of_checkpoints_load(form, extra_norm, tmp_path):
    theirs, ours = (build_model(config(**SMALL, extra_norm=extra_norm)) for _ in range(2))
    state, path = theirs.state_dict(), tmp_path / "model.pkl"
    forms = {
        "bare": state,
        "module": {f"module.{name}": t for name, t in state.items()},
        "proda": {"ResNet101": {"model_state": state, "objective_vectors": torch.ones(5, 24)}, "iter": 7},
        "old": {"ResNet101": {"model_state": {n: t for n, t in state.items() if "num_batches" not in n}}},
    }
    torch.save(forms[form], path)
    load_weights(ours, path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    if form == "proda":
        assert torch.equal(read_extras(path).prototypes, torch.ones(5, 24)) and read_extras(path).iteration == 7
    elif form == "bare":
        with pytest.raises(ValueError, match="not a checkpoint of CPSL"):
            read_extras(path)


def test_wrong_initial_weights_are_refused(classifier, tmp_path):
    with pytest.raises(ValueError, match="of another shape: conv1.weight"):
        build_model(config(str(classifier[1]), **SMALL))
    with pytest.raises(ConfigError, match=r"blocks \[3, 4, 23, 3\] and width 64"):
        build_model(config(True, **SMALL))
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        build_model(config(str(tmp_path / "nothing.pth"), **SMALL))
    with pytest.raises(ConfigError, match="did you mean 'extra_norm'"):
        build_model(config(extra_norms=True))
