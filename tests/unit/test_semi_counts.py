"""When class counts of a semi-supervised run are joined by those of its pseudo-labels."""

from pathlib import Path

import numpy as np
import pytest

from common.config import ConfigError, load_config
from semi_sup.config import METHODS, resolve
from semi_sup.streams import check_streams
from tests.unit.data_files import picture, save

CONFIGS = Path(__file__).parents[2] / "semi_sup" / "configs"
NAMES = [f"2007_{k:06d}" for k in range(9)]
TOYS = {
    "unimatch": "unimatch/toy_1over8_unimatch.yaml",
    "unimatch_v2": "unimatch_v2/toy_1over8_unimatch_v2.yaml",
    "u2pl": "u2pl_base/toy_1over8_u2pl.yaml",
}
OWN = ["{name: blv, counts: released}", "{name: blv, counts: [0.7, 0.2, 0.1]}", "{name: seesaw, counts: online}"]


@pytest.fixture
def words(tmp_path) -> list[str]:
    """Two labelled and seven unlabelled images in VOC's layout, the latter in batches of three."""
    for k, name in enumerate(NAMES):
        save(picture(8, 8, k), tmp_path / "JPEGImages" / f"{name}.jpg")
    for name in NAMES[:2]:
        save(np.zeros((8, 8), np.uint8), tmp_path / "SegmentationClassAug" / f"{name}.png")
    lists = {"labeled": NAMES[:2], "unlabeled": NAMES[2:]}
    for stream, names in lists.items():
        (tmp_path / f"{stream}.txt").write_text("\n".join(names))
    given = [f"data.streams.{stream}.list={tmp_path}/{stream}.txt" for stream in lists]
    return [f"data.root={tmp_path}", *given, "data.streams.unlabeled.batch_size=3"]


def refresh(name: str, words: list[str], *more: str) -> int | None:
    cfg = resolve(load_config(CONFIGS / TOYS[name], [*words, *more]))
    return cfg.remedies.get("counts", {}).get("refresh")


@pytest.mark.parametrize("name", TOYS)
def test_counts_are_refreshed_once_a_pass(name, words):
    """Over seven images in batches of three; as often as it is said; never where nothing goes by counts."""
    for remedy in ("remedies.logits={name: blv}", "remedies.class_weight={name: inverse}"):
        assert refresh(name, words, remedy) == 3
        assert refresh(name, words, remedy, "remedies.counts.refresh=5") == 5
        assert refresh(name, words, remedy, "remedies.counts.refresh=0") == 0
    assert refresh(name, words) is None
    assert refresh(name, words, "remedies.sets=[{name: lovasz, at: network}]") is None


@pytest.mark.parametrize("remedy", OWN)
def test_counts_that_a_remedy_states_are_joined_when_asked_alone(remedy, words):
    """Shares beside thousands of pseudo-labelled pixels would weigh nothing."""
    stated = f"remedies.logits={remedy}"
    assert refresh("unimatch", words, stated) is None
    assert refresh("unimatch", words, stated, "remedies.class_weight={name: inverse}") == 3
    assert refresh("unimatch", words, stated, "remedies.counts.refresh=7") == 7


def test_counts_of_u2pl_need_to_know_the_padding():
    """Also where padding takes part in the loss, for which alone any recipe will do."""
    words = ["method.mask_padding=false", "data.streams.unlabeled.augment.recipe=mmseg"]
    path = CONFIGS / TOYS["u2pl"]
    check_streams(load_config(path, words), METHODS["u2pl"])
    with pytest.raises(ConfigError, match="recipe: mmseg gives no shown, which method 'u2pl' reads; set it to u2pl$"):
        check_streams(load_config(path, [*words, "remedies.logits={name: blv}"]), METHODS["u2pl"])
    check_streams(
        load_config(path, [*words, "remedies.logits={name: blv}", "remedies.counts.refresh=0"]), METHODS["u2pl"]
    )
