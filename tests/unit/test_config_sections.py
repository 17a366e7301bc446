"""Wrong values anywhere in a shipped config: a config that can be built, or one line that says what is wrong.

Every section goes to its owner: the config's own dataclasses, augmentation and sampler of each stream, the network
(made without memory, on the meta device) and the method's options. 200 seeds by default, 5000 with --slow.
"""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from common.config import Config, ConfigError, to_tree, typed
from common.config.load import config_of, read_tree
from common.data.catalogue.folder import folder_row
from common.data.orders import SamplerConfig
from common.data.recipes.build import build_transform
from common.data.statistics import placeholder
from common.engine.method import MethodContext, pixel_loss
from common.models import BACKBONES, MODELS, build_model
from fully_sup.supervised import Supervised
from ltss_benchmark.methods import check_options as check_ltss_options
from semi_sup.config import build_method as semi_method
from tests.unit.test_config_fuzz import ROOT, SHIPPED, expect_config_or_one_line
from uda.train import METHODS as STAGES

SEEDS = [
    *(range(first, first + 20) for first in range(0, 200, 20)),
    *(pytest.param(range(first, first + 400), marks=pytest.mark.slow) for first in range(200, 5000, 400)),
]
# task.yaml is what its stages share, and no config of a run
WHOLE = [path for path in SHIPPED if path.stem != "task"]
WRONG = (
    None, True, False, 0, 1, -1, 2, 3, 7, 65537, 2**63, -(2**63), 10**400, 0.0, -0.5, 1.5, 1e30, 1e-30, float("nan"),
    float("inf"), "", "toy", "x" * 100_000, "\n", [], [0], [0, 0], [-1, -1], [1, 2, 3], [3, 3], [1, 1, 1, 1], [[]],
    [1] * 1000, {}, {"a": 1}, {"": {}}, [{}], {"preset": []}, {"recipe": [0, 0]}, ["a", "b"], "(", "released", "folder",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What a network imports when it is first built is no part of the time that a config may take."""
    path = ROOT / "uda/configs/daformer/toy_lite0.yaml"
    open_sections(path, tree_of(path))


@cache
def tree_of(path: Path) -> dict:
    """All keys of a shipped config, those with default values too."""
    return to_tree(config_of(read_tree(path), (), path.name))


def places(tree, path=()):
    """The paths of all values below `tree`."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(tree, path, value):
    """A copy of `tree` in which one place holds `value`."""
    if not path:
        return value
    first, *rest = path
    if isinstance(tree, list):
        return [changed(item, rest, value) if i == first else item for i, item in enumerate(tree)]
    return {key: changed(item, rest, value) if key == first else item for key, item in tree.items()}


def mutated(tree: dict, rng: random.Random) -> dict:
    for _ in range(rng.randint(1, 2)):
        every = list(places(tree))
        section = rng.choice(("model", "method", "remedies", "data", None))  # of which there are many, small ones
        chosen = rng.choice([path for path in every if path[0] == section] or every)
        names = {"name": [*MODELS], "backbone": [*BACKBONES]}.get(chosen[-1], [])
        tree = changed(tree, chosen, rng.choice((*WRONG, *names)))
    return tree


def open_sections(path: Path, tree: dict) -> None:
    """What an entry point does before it opens a data set."""
    cfg = config_of(tree, (), path.name)
    if cfg.data.folder is not None:
        folder_row(cfg.data.folder)
    for name, stream in cfg.data.streams.items():
        build_transform(stream.augment, f"data.streams.{name}.augment")
        typed(SamplerConfig, stream.sampler, f"data.streams.{name}.sampler")
    cfg = replace(cfg, name=path.stem, model=replace(cfg.model, pretrained=False, checkpoint=None))
    with torch.device("meta"):
        build_method(path.relative_to(ROOT).parts[0], cfg)


def build_method(system: str, cfg: Config) -> None:
    context = MethodContext(placeholder(cfg.model.num_classes))
    if system == "fully_sup":
        Supervised(cfg, context)
    elif system == "ltss_benchmark":
        check_ltss_options(cfg)
    elif system == "semi_sup":
        semi_method(cfg, context)
    else:
        build_model(cfg.model)
        options = dict(cfg.method)
        stage = STAGES[options.pop("name")] if options.get("name") in list(STAGES) else STAGES["distill"]
        typed(stage.Options, options, "method")
        pixel_loss(cfg.remedies, cfg, context, pseudo_labels=stage.pseudo_labels)


@pytest.mark.parametrize("seeds", SEEDS)
def test_wrong_values(seeds):
    for seed in seeds:
        rng = random.Random(seed)
        path = rng.choice(WHOLE)
        tree = mutated(tree_of(path), rng)
        expect_config_or_one_line(lambda path=path, tree=tree: open_sections(path, tree))


TOY = [path for path in WHOLE if "toy" in path.parts]


@pytest.mark.parametrize("path", TOY, ids=lambda path: path.stem)
def test_shipped_values_pass(path):
    try:
        open_sections(path, tree_of(path))
    except ConfigError as error:
        assert "subclass" in str(error) or "no folder" in str(error)
