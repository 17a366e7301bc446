"""UniMatch, UniMatch V2 and U2PL's base in two gloo processes by torchrun: a resumed training to the bit."""

import shutil

import pytest

from scripts import prepare_splits
from tests.integration.conftest import assert_equal, call, weights
from tests.integration.test_unimatch import CASES, CONFIGS, data, here, settings  # noqa: F401

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "semi_sup.main")


CONFIGS_OF_RANKS = ["unimatch/toy_1over8_unimatch", "unimatch_v2/toy_1over8_unimatch_v2"]
CONFIGS_OF_RANKS.append(pytest.param("u2pl_base/toy_1over8_u2pl", marks=pytest.mark.slow))


@pytest.mark.parametrize("config", CONFIGS_OF_RANKS)
def test_two_ranks_resume_bit_for_bit(config, data):  # noqa: F811
    """With what is summed over ranks: counts of pseudo-labels, and thresholds of classes."""
    crop, _, more = CASES[config]
    thresholds = "u2pl" not in config
    path = CONFIGS / f"{config}.yaml"
    words = settings(config, data, crop)
    here(prepare_splits, path, *words)
    words += [f"data.streams.{key}.batch_size=4" for key in ("labeled", "unlabeled")]
    words += ["remedies.logits={name: blv}", "remedies.counts.refresh=2"]
    words += ["method.class_thresholds=0.9", "method.threshold=0.06"] if thresholds else more
    words += ["name=two_ranks", f"output={data}/{path.stem}", "--device", "cpu"]

    call(*TORCHRUN, "--config", path, *words)
    folder = data / path.stem / "two_ranks"
    whole = weights(folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000004")  # as if it had been killed after step 3
    call(*TORCHRUN, "--config", path, *words, "--resume")
    assert_equal(whole, weights(folder))
    assert whole["loss.counts.pseudo"].sum() > 0
    assert not thresholds or (whole["thresholds.confidence"] < 1).any()
