"""A loss sees each pixel where evaluation puts it, whatever the crop: 64 fits every stride, 65 and 97 fit none.

The reference of each test is what `predict` (or the `Extents` that it is made with) gives for the same crop.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Config, ModelConfig, TrainConfig
from common.data import IGNORE
from common.models import MODELS, build_model
from common.models.mask2former.decoder import masks
from common.models.segmentor import Extents
from fully_sup.supervised import Supervised
from ltss_benchmark import criterion
from ltss_benchmark.deeplabv3plus import DeepLabV3PlusMethod
from ltss_benchmark.mask2former import Mask2FormerMethod
from semi_sup.config import build_method
from semi_sup.view_cells import inside
from tests.contexts import context
from tests.unit.test_cpsl_method import SMALL as CPSL_NETWORK
from tests.unit.test_models import SMALL, USRN
from uda.cpsl import CPSL
from uda.distill import Distill
from uda.mixing import Box, paste_labels
from uda.warmup import WarmUp

CLASSES = 5
CROPS = (64, 65, 97)
SUPERVISED = [name for name in SMALL if name not in ("usrn", "deeplabv3plus", "upernet_no_aux")]
USRN_NETWORK = {**USRN, "dropout": (0.0, 0.0, 0.0)}
D2_NETWORK = {"channels": 8, "lateral_channels": 4, "dropout": 0.0}
MASK_NETWORK = {
    "hidden_dim": 32, "heads": 4, "num_queries": 9, "encoder_layers": 1, "encoder_hidden": 32, "decoder_layers": 2,
    "decoder_hidden": 32,
}  # fmt: skip
CPSL_MODEL = ModelConfig(
    "deeplabv2", CLASSES, mean=(0, 0, 0), std=(255, 255, 255), align_corners=True, options=CPSL_NETWORK
)

pytestmark = pytest.mark.parametrize("crop", CROPS)


def config(model: ModelConfig, **method) -> Config:
    return Config(model, method=method, train=TrainConfig(steps=10), name="test")


def batch(crop: int, **more: Tensor) -> dict[str, Tensor]:
    """Two square crops with labels, a few of them ignored."""
    generator = torch.Generator().manual_seed(crop)
    image = torch.randint(0, 256, (2, 3, crop, crop), generator=generator, dtype=torch.uint8)
    label = torch.randint(IGNORE, CLASSES, (2, crop, crop), generator=generator)
    return {"image": image, "label": label, **more}


def expected(model, data: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of what evaluation predicts."""
    return F.cross_entropy(model.predict(data["image"]), data["label"], ignore_index=IGNORE)


def test_the_rows_are_all_networks(crop):
    tested = {SMALL[name].name for name in SMALL} | {"deeplabv2", "deeplabv3plus_d2", "mask2former"}
    assert tested == set(MODELS)


@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised(name, crop):
    torch.manual_seed(0)
    heads = {head: {} for head in build_model(SMALL[name]).heads}
    torch.manual_seed(0)
    method = Supervised(config(SMALL[name], heads=heads, average="valid"), context()).eval()
    data = batch(crop)
    terms = method({"labeled": data}, 0)
    last = [key for key in terms if key.startswith("decode")][-1]
    torch.testing.assert_close(terms[last], expected(method.model, data))


@pytest.mark.parametrize("name", ["baseline", "self_training", "usrn"])
def test_usrn_labelled(name, crop):
    torch.manual_seed(0)
    subclasses = (3, 1, 2, 2, 1)
    options = {"subclasses": sum(subclasses)} if name == "usrn" else {}
    network = "usrn" if name == "usrn" else "deeplabv3plus"
    model = ModelConfig(network, CLASSES, "resnet50", options={**USRN_NETWORK, **options}, align_corners=True)
    more = {"subclasses": subclasses} if name == "usrn" else {}
    method = build_method(config(model, name=name, **more), context()).eval()
    data = batch(crop)
    data["sub_label"] = torch.where(data["label"] < 0, IGNORE, 2 * data["label"].clamp(max=4))
    unlabeled = {"weak": data["image"], "strong": data["image"], "geometry": whole(crop)}

    terms = next(iter(method({"labeled": data, "unlabeled": unlabeled}, 0)))
    torch.testing.assert_close(terms["Ls"], expected(method.model, data))

    if name == "usrn":
        out = method.model.segment(method.model.normalise(data["image"]), subclasses=True)
        padded = -(-crop // 8) * 8
        geometry = Extents((padded, padded), (crop, crop), (crop, crop))
        large = method.model.upsample(out["sub_logits"], geometry, (0, crop))
        reference = F.cross_entropy(large, data["sub_label"], ignore_index=IGNORE)
        torch.testing.assert_close(terms["Ls_sub"], reference)


def whole(crop: int) -> Tensor:
    """The geometry of two crops that are whole images."""
    return torch.tensor([[crop, crop, crop, crop, 0, 0, 0]] * 2, dtype=torch.int32)


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("borders", [True, False])
def test_usrn_unlabelled_cells_that_count(borders, flip, crop):
    """Against a picture of what is shown, padded as the network pads and looked up at the centres of 8×8 pixels."""
    height, width = crop - 20, crop - 9
    model = ModelConfig("deeplabv3plus", CLASSES, "resnet50", options=USRN_NETWORK, align_corners=True)
    method = build_method(config(model, name="self_training", mask_borders=borders), context())
    geometry = torch.tensor([[height, width, height, width, 0, 0, flip]], dtype=torch.int32)
    view = torch.zeros(1, 3, crop, crop, dtype=torch.uint8)

    shown = torch.zeros(crop, crop, dtype=torch.bool)
    left = crop - width if flip else 0
    shown[:height, left : left + width] = True
    shown = shown if borders else torch.ones_like(shown)
    grid = -(-crop // 8)
    shown = F.pad(shown, (0, 8 * grid - crop, 0, 8 * grid - crop))

    found = method.valid({"weak": view, "geometry": geometry}, torch.zeros(1, CLASSES, grid, grid))
    found = torch.ones(1, grid, grid, dtype=torch.bool) if found is None else found
    assert torch.equal(found[0], shown[4::8, 4::8])
    if borders:
        assert torch.equal(found, inside(geometry, (crop, crop), (grid, grid)))


@pytest.mark.parametrize("loss", ["ce", "hard_pixels"])
def test_detectron2_deeplab(loss, crop):
    torch.manual_seed(0)
    model = ModelConfig("deeplabv3plus_d2", CLASSES, "resnet18", options=D2_NETWORK)
    focus = {"name": "hard_pixels", "fraction": 1.0} if loss == "hard_pixels" else None
    cfg = replace(config(model, name="deeplabv3plus"), remedies={"focus": focus})
    method = DeepLabV3PlusMethod(cfg, context()).eval()
    data = batch(crop)
    found = method({"labeled": data}, 0)["loss"]
    share = (data["label"] != IGNORE).float().mean() if loss == "hard_pixels" else 1.0
    torch.testing.assert_close(found, share * expected(method.model, data))


def test_mask2former(monkeypatch, crop):
    """A loss at the pixels' centres, cut off from the image's borders: masks and truth as evaluation has them."""
    torch.manual_seed(0)
    model = ModelConfig("mask2former", CLASSES, "resnet18", options=MASK_NETWORK)
    method = Mask2FormerMethod(config(model, name="mask2former"), context())
    data = batch(crop)
    out = method.model.train()(data["image"])
    maps = masks(out["mask_embed"], out["mask_features"])
    padded = -(-crop // 32) * 32

    inner = torch.arange(2, crop)  # the outermost half cell differs: outside a map counts as 0, resizing repeats it
    rows, columns = torch.meshgrid(inner, inner, indexing="ij")
    points = torch.stack([columns, rows], -1).flatten(0, 1)
    if padded == crop:
        points = points[(points < crop - 2).all(1)]
    centres = ((points + 0.5) / padded)[None]
    monkeypatch.setattr(criterion, "uncertain_points", lambda maps, *a, **k: centres.expand(len(maps), -1, -1))

    label = criterion.pad_label(data["label"], out["mask_features"].shape[-2:])
    classes = torch.tensor([0, 3])
    found = method.criterion._pair_losses(maps[0, :2], classes, torch.zeros_like(classes), label, [2])

    large = method.model.upsample(maps[:1, :2], Extents((padded,) * 2, (crop,) * 2, (crop,) * 2), (0, crop))[0]
    truth = (data["label"][0] == classes[:, None, None]).float()
    x, y = points.T
    torch.testing.assert_close(found, criterion.point_losses(large[:, y, x], truth[:, y, x]))


def test_adaptation_source(crop):
    torch.manual_seed(0)
    method = WarmUp(config(CPSL_MODEL, adversarial=0.0), context()).eval()
    data = batch(crop)
    torch.testing.assert_close(method({"source": data}, 0)["loss"], expected(method.model, data))


def test_adaptation_target_grid(tmp_path, crop):
    """Labels, warm labels and pasted source labels of stage 1, and pseudo-labels of stage 2, share one grid.

    Where the whole image is the crop, a cell holds what the pixel under it holds: cell i is pixel 4i.
    """
    np.save(tmp_path / "delta.npy", np.full(CLASSES, 1 / CLASSES))
    torch.save(torch.randn(CLASSES, 8), tmp_path / "prototypes.pt")
    files = {"prototypes": str(tmp_path / "prototypes.pt"), "class_distribution": str(tmp_path / "delta.npy")}
    method = CPSL(config(CPSL_MODEL, **files, bank=64, samples=16, rectify=False), context())
    data = batch(crop)
    label = data["label"].clamp(min=0)
    target = {
        "weak": data["image"], "full": data["image"], "geometry": whole(crop),
        "soft": F.one_hot(label[:, ::4, ::4]).movedim(3, 1).half(),
    }  # fmt: skip
    _, found, _, _ = method.label_target(target)
    assert torch.equal(found, label[:, ::4, ::4])

    pasted = paste_labels(found, data["label"], Box(0, crop, 0, crop))
    assert torch.equal(pasted, data["label"][:, ::4, ::4])

    stage2 = Distill.__new__(Distill)
    torch.nn.Module.__init__(stage2)
    stage2.options = Distill.Options(teacher="none", threshold=0.5)
    still = {"warp": torch.eye(3).repeat(2, 1, 1), "cutout": torch.zeros(2, 4, dtype=torch.int32)}
    confidence = torch.full_like(label, 254)
    pseudo = {"pseudo": label, "confidence": confidence, "strong": data["image"], **still}
    assert torch.equal(stage2.labels_on_grid(pseudo), label[:, ::4, ::4])
