"""Weight files: what is recognised, what is refused, and that refusing runs nothing."""

import os
import pickle
import re
import sys
import types
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from common.config import ModelConfig
from common.engine import checkpoint
from common.models import build_backbone, build_model, load_model, load_weights
from common.models.pretrained import containers, load, load_backbone
from common.models.pretrained.containers import read

CONFIG = ModelConfig("pspnet", 5, "resnet50c", options={"channels": 8, "auxiliary_channels": 8})
OFFICIAL = {"conv1.0": "stem.0", "conv1.1": "stem.1", "conv1.3": "stem.3", "conv1.4": "stem.4", "conv1.6": "stem.6"}
OFFICIAL["bn1"] = "stem.7"


@pytest.fixture(scope="module")
def trained():
    """A model whose weights are unlike any fresh one's."""
    torch.manual_seed(7)
    return build_model(CONFIG)


@pytest.fixture
def fresh():
    return build_model(CONFIG)


def openmmlab(backbone_state):
    """A backbone's weights under OpenMMLab's names."""
    return {
        ".".join((OFFICIAL.get(key.rpartition(".")[0], key.rpartition(".")[0]), key.rpartition(".")[2])): t
        for key, t in backbone_state.items()
    }


def mmseg_state(model, wrapper=""):
    """A model's weights under MMSegmentation's names."""
    state = {k: t for k, t in model.state_dict().items() if not k.startswith("backbone.")}
    backbone = {k.removeprefix("backbone."): t for k, t in model.state_dict().items() if k.startswith("backbone.")}
    state |= {f"backbone.{k}": t for k, t in openmmlab(backbone).items()}
    return OrderedDict((wrapper + k, t) for k, t in state.items())


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("wrapper", ["", "module.", "module.module."])
@pytest.mark.parametrize("legacy", [False, True])
def test_mmsegmentation(trained, fresh, tmp_path, wrapper, legacy):
    raw = {"meta": {"CLASSES": ("a", "b"), "seed": 0}, "state_dict": mmseg_state(trained, wrapper), "optimizer": {}}
    torch.save(raw, tmp_path / "iter.pth", _use_new_zipfile_serialization=not legacy)
    load_weights(fresh, tmp_path / "iter.pth")
    assert_same(fresh, trained)


def test_counters_of_batch_norm_may_be_missing(trained, fresh, tmp_path):
    state = {k: t for k, t in mmseg_state(trained).items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": state}, tmp_path / "old.pth")
    load_weights(fresh, tmp_path / "old.pth")
    assert_same(fresh, trained)


@pytest.mark.parametrize("prefix", ["", "teacher."])
def test_checkpoint_folder_of_a_method(trained, fresh, tmp_path, prefix):
    state = {f"{prefix}{k}": t for k, t in trained.state_dict().items()}
    state |= {"student.queue": torch.zeros(3)} if prefix else {}
    (tmp_path / "step").mkdir()
    save_file(state, tmp_path / "step" / "model.safetensors", {"predict_prefix": prefix})
    load_weights(fresh, tmp_path / "step")
    assert_same(fresh, trained)


def test_state_dict_of_torch_save(trained, fresh, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "ours.pt")
    load_weights(fresh, tmp_path / "ours.pt")
    assert_same(fresh, trained)


def test_what_does_not_fit_is_listed(trained, fresh, tmp_path):
    state, before = mmseg_state(trained), {k: t.clone() for k, t in fresh.state_dict().items()}
    del state["decode_head.bottleneck.bn.bias"]
    state["decode_head.conv_cat.conv.weight"] = torch.zeros(1)
    state["auxiliary_head.convs.0.bn.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "bad.pth")
    with pytest.raises(ValueError) as error:
        load_weights(fresh, tmp_path / "bad.pth", reset_classifier=True)
    assert "\n" not in str(error.value) and "bad.pth" in str(error.value)
    assert "missing: decode_head.bottleneck.bn.bias;" in str(error.value)
    assert "not in the model: decode_head.conv_cat.conv.weight;" in str(error.value)
    assert "of another shape: auxiliary_head.convs.0.bn.weight (3,) for (8,)" in str(error.value)
    assert all(torch.equal(t, before[k]) for k, t in fresh.state_dict().items())


def test_another_class_count(trained, tmp_path):
    torch.save({"state_dict": mmseg_state(trained)}, tmp_path / "five.pth")
    model = build_model(ModelConfig("pspnet", 7, "resnet50c", options=CONFIG.options))
    with pytest.raises(ValueError, match="trained on 5 classes, the model has 7; .*reset_classifier"):
        load_weights(model, tmp_path / "five.pth")
    with pytest.raises(ValueError, match="the model has 7; set model.num_classes$"):  # no training, no new classifier
        load_model(replace(CONFIG, num_classes=7, reset_classifier=True), tmp_path / "five.pth")
    before = model.decode_head.conv_seg.weight.clone()
    with pytest.warns(UserWarning, match="trained on 5 classes, the model has 7; its classifier is left out"):
        load_weights(model, tmp_path / "five.pth", reset_classifier=True)
    assert torch.equal(model.decode_head.conv_seg.weight, before)
    assert torch.equal(model.decode_head.bottleneck.conv.weight, trained.decode_head.bottleneck.conv.weight)


TINY = {"hidden_dim": 32, "heads": 4, "num_queries": 3, "encoder_layers": 1, "encoder_hidden": 8, "decoder_layers": 1}


def mask2former(classes=5, **options):
    return build_model(
        ModelConfig("mask2former", classes, "resnet18", options={**TINY, "decoder_hidden": 8, **options})
    )


@pytest.mark.parametrize(("theirs", "ours", "rows"), [("seesaw", "softmax", 6), ("softmax", "seesaw", 4)])
def test_another_class_head(tmp_path, theirs, ours, rows):
    """Of as many classes: one output more or less."""
    save_file(mask2former(class_head=theirs).state_dict(), tmp_path / "five.safetensors")
    message = (
        f"trained on 5 classes with class_head {theirs}, or on {rows} with {ours}; set "
        f"model.options.class_head={theirs}, or model.num_classes={rows}, or model.reset_classifier=true"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(mask2former(class_head=ours), tmp_path / "five.safetensors")
    with pytest.raises(ValueError, match="trained on 5 classes, the model has 8; set model.num_classes, or"):
        load_weights(mask2former(8, class_head=theirs), tmp_path / "five.safetensors")


@pytest.mark.parametrize("frozen", [True, False])
def test_trained_and_frozen_norms_hold_the_same_weights(tmp_path, frozen):
    """Only trained ones have counters."""
    theirs, ours = mask2former(frozen_norm=not frozen), mask2former(frozen_norm=frozen)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    load_weights(ours, tmp_path / "w.safetensors")
    found, expected = ours.state_dict(), theirs.state_dict()
    shared = [name for name in found if not name.endswith("num_batches_tracked")]
    assert len(found.keys() ^ expected.keys()) == 20  # the counters of ResNet-18's norms
    assert all(torch.equal(found[name], expected[name]) for name in shared)


def test_config_names_the_checkpoint(trained, tmp_path):
    torch.save({"state_dict": mmseg_state(trained)}, tmp_path / "five.pth")
    config = ModelConfig(
        "pspnet", 5, "resnet50c", pretrained="absent.pth", checkpoint=str(tmp_path / "five.pth"), options=CONFIG.options
    )
    assert_same(build_model(config), trained)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle2", "pickle4"])
def test_code_is_refused_by_name(fresh, tmp_path, form):
    path, witness = tmp_path / "weights.pth", tmp_path / "ran"
    raw = {"state_dict": {"backbone.x": torch.zeros(1)} if "pickle" not in form else {}, "meta": Evil(witness)}
    if "pickle" in form:
        path.write_bytes(pickle.dumps(raw, int(form[-1])))
    else:
        torch.save(raw, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"weights.pth: names (posix|nt)\.system, .*would run code") as error:
        load_weights(fresh, path)
    assert "\n" not in str(error.value)
    assert not witness.exists()


def foreign(monkeypatch, name, **classes):
    """A module that exists while a file is written, and not when it is read."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        package = ".".join(parts[:i])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for key, cls in classes.items():
        cls.__module__, cls.__qualname__ = name, key
        setattr(sys.modules[name], key, cls)


def test_log_buffers_and_config_nodes_are_inert(trained, fresh, tmp_path, monkeypatch):
    class HistoryBuffer:
        def __init__(self):
            self.history, self.methods = np.arange(4, dtype=np.float32), {"mean": HistoryBuffer.mean}

        @staticmethod
        def mean(values):
            return sum(values)

    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = "mmengine.logging.history_buffer"

    class ConfigDict(dict):
        pass

    with monkeypatch.context() as patch:
        foreign(patch, "mmengine.logging.history_buffer", HistoryBuffer=HistoryBuffer)
        foreign(patch, "mmengine.config.config", ConfigDict=ConfigDict)
        node = ConfigDict(lr=0.01)
        node.frozen = True
        hub = {"log_scalars": OrderedDict(loss=HistoryBuffer()), "cfg": node, "best": np.float64(77.1)}
        torch.save({"state_dict": mmseg_state(trained), "message_hub": hub}, tmp_path / "iter_40000.pth")
    load_weights(fresh, tmp_path / "iter_40000.pth")
    assert_same(fresh, trained)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_and_scalars_of_numpy(tmp_path, protocol):
    arrays = {
        "float": np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "swapped": np.arange(3, dtype=">f8"),
        "flag": np.array([True, False]),
        "empty": np.zeros((0, 2), np.float16),
        "scalar": np.array(3.5),
    }
    raw = {"model": arrays, "best_iou": np.float64(0.5), "names": np.array(["a"]), "objects": np.array([None, 1])}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(raw, protocol))
    found, metadata = read(tmp_path / "w.pkl")
    assert found["best_iou"] == 0.5 and metadata == {}
    tensors = containers.tensors(found["model"])
    for name, array in arrays.items():
        assert tensors[name].shape == array.shape
        np.testing.assert_array_equal(tensors[name].numpy(), array)
        assert tensors[name].numpy().dtype == array.dtype.newbyteorder("=")
    torch.save(raw | {"objects": None}, tmp_path / "w.pth")
    assert read(tmp_path / "w.pth")[0]["best_iou"] == 0.5


def test_array_pickled_by_python_2(tmp_path):
    body = (
        b"\x80\x02}q\x00U\x05modelq\x01}q\x02U\x01wq\x03cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\nq\x05"
        b"K\x00\x85U\x01b\x87Rq\x06(K\x01K\x02\x85cnumpy\ndtype\nq\x07U\x02f4K\x00K\x01\x87Rq\x08(K\x03U\x01<NNNJ\xff\xff"
        b"\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0tbss."
    )
    (tmp_path / "zoo.pkl").write_bytes(body)
    assert containers.tensors(containers.state_dict(read(tmp_path / "zoo.pkl")[0]))["w"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "neither safetensors nor"),
        (b"hello world, this is text", "neither safetensors nor"),
        (b"PK\x03\x04" + bytes(100), "damaged file"),
        (b"\x80\x04\x95", "damaged file"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"state_dict": {"a": 3}}), "not a dict of weights: a of int is no tensor"),
        (pickle.dumps({}), "does not fit this model"),
        ((10**6).to_bytes(8, "little") + b"{}", "neither safetensors nor"),
        ((4).to_bytes(8, "little") + b"{{{{}", "damaged file"),
    ],
)
def test_damaged_files(fresh, tmp_path, content, message):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\.pth: .*{message}"):
        load_weights(fresh, tmp_path / "w.pth")


@pytest.mark.parametrize("symlinks", [True, False])
def test_a_run_a_link_and_a_checkpoint_name_the_same_weights(trained, tmp_path, monkeypatch, symlinks):
    """Where there are no symbolic links, `last` is a text file; a flipped bit in the weights is seen."""
    if not symlinks:
        monkeypatch.setattr(os, "symlink", lambda *args: (_ for _ in ()).throw(OSError("no symbolic links")))
    folder = tmp_path / "checkpoints"
    path = checkpoint.save(folder, 3, trained, {}, {})
    assert (folder / "last").is_symlink() == symlinks
    for name in (path, path / "model.safetensors", folder / "last", tmp_path):
        assert_same(load_model(CONFIG, name), trained)

    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: size or checksum is not what was written"):
        load_model(CONFIG, folder / "last")


def test_absent_file(fresh, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth: no such weight file"):
        load_weights(fresh, tmp_path / "nowhere.pth")


def backbone_config(name, source):
    return ModelConfig("upernet", 5, name, pretrained=str(source))


@pytest.mark.parametrize("spelling", ["timm", "openmmlab", "mmpretrain"])
def test_backbone_files(tmp_path, spelling):
    net = timm.create_model("resnet50c", num_classes=3)
    state = net.state_dict() if spelling == "timm" else openmmlab(net.state_dict())
    if spelling == "mmpretrain":
        head = ("fc.weight", "fc.bias")
        state = {f"head.{k}" if k in head else f"backbone.{k}": t for k, t in state.items()}
    torch.save({"state_dict": state} if spelling == "mmpretrain" else state, tmp_path / "net.pth")
    backbone = build_backbone(backbone_config("resnet50c", tmp_path / "net.pth"))
    reference = net.state_dict()
    assert all(torch.equal(t, reference[key]) for key, t in backbone.state_dict().items())


def test_backbone_file_of_torchvision(tmp_path):
    from torchvision.models import resnet18

    net = resnet18()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    x = torch.randn(1, 3, 64, 64)
    backbone = build_backbone(backbone_config("resnet18", tmp_path / "net.pth")).eval()
    net.fc, net.avgpool = torch.nn.Identity(), torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(backbone(x)[-1].flatten(1), net.eval()(x))


def detectron2_names(name):
    """torchvision's name as detectron2's conversion of ImageNet weights writes it."""
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    return (
        re.sub(r"bn(\d)", r"conv\1.norm", name)
        .replace("downsample.0", "shortcut")
        .replace("downsample.1", "shortcut.norm")
    )


@pytest.fixture
def zoo(tmp_path):
    """A ResNet-18 and its pickle in detectron2's form, classifier included."""
    net = timm.create_model("resnet18", num_classes=3)
    weights = {detectron2_names(name): tensor.numpy() for name, tensor in net.state_dict().items()}
    assert {"stem.conv1.norm.bias", "res3.0.shortcut.norm.running_var", "stem.fc.weight"} <= weights.keys()
    raw = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(raw))
    return net.state_dict(), tmp_path / "R-18.pkl"


def test_backbone_file_of_detectron2(zoo):
    """Norms are frozen at the file's scale, zeros of the last norms included."""
    reference, path = zoo
    config = ModelConfig("mask2former", 5, "resnet18", pretrained=str(path), options=TINY | {"decoder_hidden": 8})
    for backbone in (build_backbone(config), build_model(config).backbone):
        assert all(torch.equal(tensor, reference[key]) for key, tensor in backbone.state_dict().items())
    assert not reference["layer4.1.bn2.weight"].any()


def test_backbone_file_in_place_of_a_checkpoint(zoo, trained, fresh, tmp_path):
    with pytest.raises(ValueError, match="R-18.pkl: .*holds the backbone alone: name it in model.pretrained, not"):
        load_weights(mask2former(), zoo[1])
    backbone = {k: t for k, t in mmseg_state(trained).items() if k.startswith("backbone.")}
    torch.save(backbone, tmp_path / "net.pth")
    with pytest.raises(ValueError, match="name it in model.pretrained"):
        load_weights(fresh, tmp_path / "net.pth")
    torch.save(backbone | {"decode_head.conv_seg.bias": torch.zeros(5)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="missing: ") as error:
        load_weights(fresh, tmp_path / "part.pth")
    assert "model.pretrained" not in str(error.value)


def test_backbone_file_that_does_not_fit(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "net.pth")
    with pytest.raises(ValueError, match="net.pth: does not fit the backbone resnet50c. missing: conv1.0.weight"):
        build_backbone(backbone_config("resnet50c", tmp_path / "net.pth"))


@pytest.mark.parametrize("part", ["socket.getaddrinfo", "timm.create_model"])
def test_without_network(monkeypatch, part):
    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    backbone = build_backbone(ModelConfig("upernet", 5, "resnet18"))
    monkeypatch.setattr("common.models.pretrained.timm.getproxies", dict)
    monkeypatch.setattr("common.models.pretrained.timm.socket.getaddrinfo", lambda *args: [])
    monkeypatch.setattr(f"common.models.pretrained.timm.{part}", fail)
    with pytest.raises(ValueError, match="cannot fetch resnet50c.gluon_in1k.*without network, set.* to a file"):
        load_backbone(backbone, "resnet50c", True)


def test_readers_tell_their_files_apart(trained):
    raw = {"state_dict": mmseg_state(trained)}
    assert [reader.__name__.rpartition(".")[2] for reader in load.READERS if reader.matches(raw)] == ["mmseg"]
