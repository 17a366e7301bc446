"""Two gloo processes by torchrun: resume bit for bit, and metrics that do not depend on the number of ranks."""

import json

from safetensors.torch import load_file

from tests.integration.conftest import call, config, toy  # noqa: F401

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fully_sup.train")


def weights(folder):
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def test_two_ranks_resume_bit_for_bit_and_evaluate_like_one(config, tmp_path):  # noqa: F811
    devices = ("train.devices=2", "train.steps=8", "train.save_every=4", "eval.every=8")
    call(*TORCHRUN, config, *devices, "name=whole")
    call(*TORCHRUN, config, *devices, "name=parts", "train.steps=8", "eval.every=5")
    for path in (tmp_path / "parts" / "checkpoints").glob("step_00000008"):
        (path / "model.safetensors").write_bytes(b"torn")
    call(*TORCHRUN, config, *devices, "name=parts", "--resume")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(a[name].equal(b[name]) for name in a)
    call("fully_sup/test.py", config, tmp_path / "whole" / "checkpoints" / "last", "name=whole")
    one = json.loads(next((tmp_path / "whole" / "test").glob("*/evaluation.json")).read_text())
    two = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    assert one["confusion"] == two["confusion"]  # five images over two ranks
