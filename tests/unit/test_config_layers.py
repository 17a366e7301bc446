"""Configs on several parents: who wins, each file once, and one line for what cannot be laid over each other."""

import pytest

from common.config import ConfigError, load_config, read_tree
from common.config.layers import layers
from common.files import PROJECT


@pytest.fixture
def tree(tmp_path):
    """What the last of some files says together with its parents; keywords: a file's text without `.yaml`."""

    def read(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return read_tree(tmp_path / f"{name}.yaml")

    return read


def test_later_parents_win_and_the_file_itself_last(tree):
    found = tree(
        a="x: {p: 1, q: 1, r: 1}\nl: [1, 2]",
        b="x: {q: 2, r: 2}\nl: [3]",
        run="base: [a.yaml, b.yaml]\nx: {r: 3}",
    )
    assert found == {"x": {"p": 1, "q": 2, "r": 3}, "l": [3]}


def test_a_shared_grandparent_lies_below_both(tree):
    """What `a` changes of `common` is not undone by `b`, which is built on `common` too."""
    texts = {"common": "x: 1\ny: 1", "a": "base: common.yaml\nx: 2", "b": "base: common.yaml\ny: 3"}
    assert tree(**texts, run="base: [a.yaml, b.yaml]") == {"x": 2, "y": 3}
    assert tree(**texts, run="base: [common.yaml, a.yaml]") == {"x": 2, "y": 1}


def test_a_chain_is_read_as_before(tree):
    assert tree(a="x: 1", b="base: a.yaml\ny: 2", run="base: [b.yaml]\nx: 3") == {"x": 3, "y": 2}
    assert tree(run="base: []\nx: 1") == {"x": 1}


@pytest.mark.parametrize("texts, words", [
    ({"a": "base: run.yaml", "run": "base: [a.yaml]"}, ["run.yaml: `base` leads back to itself by", "a.yaml"]),
    ({"run": "base: [run.yaml]"}, ["run.yaml: `base` leads back to itself"]),
    ({"a": "x: 1", "run": "base: [a.yaml, a.yaml]"}, ["run.yaml: base: names 'a.yaml' twice; keep one"]),
    ({"a": "x: 1", "b": "base: a.yaml", "run": "base: [b.yaml, a.yaml]"},
     ["run.yaml: base: lists b.yaml before a.yaml, but", "by another `base`; list them in that order"]),
    ({"x": "k: 1", "y": "k: 2", "a": "base: [x.yaml, y.yaml]", "b": "base: [y.yaml, x.yaml]",
      "run": "base: [a.yaml, b.yaml]"}, ["b.yaml: base: lists y.yaml before x.yaml"]),
    ({"a": "s: {t: 1}", "b": "s: 2", "run": "base: [a.yaml, b.yaml]"}, ["b.yaml: s: is a section", "a.yaml"]),
    ({"a": "s: {t: {u: 1}}", "b": "k: 1", "run": "base: [a.yaml, b.yaml]\ns: {t: 3}"},
     ["run.yaml: s.t: is a section", "a.yaml"]),
    ({"run": "base: [nowhere.yaml]"}, ["run.yaml: base:", "nowhere.yaml: cannot read the config"]),
    ({"run": "base: {a: 1}"}, ["run.yaml: base: expected the name of a config file or a list of them"]),
    ({"run": "base: ['']"}, ["run.yaml: base: expected the name of a config file"]),
])  # fmt: skip
def test_what_cannot_be_laid_over_each_other_is_one_line(tree, texts, words):
    with pytest.raises(ConfigError) as error:
        tree(**texts)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_null_takes_a_section_away_and_gives_one_back(tree):
    assert tree(a="s: {t: 1}", run="base: a.yaml\ns: null") == {"s": None}
    assert tree(a="s: null", run="base: a.yaml\ns: {t: 1}") == {"s": {"t": 1}}


def test_parents_are_found_in_the_project_and_first_beside_the_file(tmp_path):
    shipped = "fully_sup/configs/toy/upernet_r18.yaml"
    (tmp_path / "run.yaml").write_text(f"base: [{shipped}]\ntrain: {{steps: 7}}\n")
    assert [layer.path for layer in layers(tmp_path / "run.yaml")][0] == PROJECT / shipped
    cfg = load_config(tmp_path / "run.yaml")
    assert (cfg.model.name, cfg.train.steps, cfg.name) == ("upernet", 7, "run")

    (tmp_path / shipped).parent.mkdir(parents=True)
    (tmp_path / shipped).write_text("model: {name: pspnet, num_classes: 2}")
    assert load_config(tmp_path / "run.yaml").model.name == "pspnet"


def test_what_a_stream_says_of_its_folder_lies_over_that_of_the_data(tmp_path):
    text = (
        "model: {name: upernet, num_classes: 2}\n"
        "data:\n  dataset: folder\n  root: here\n  folder: {images: i, labels: l, classes: [a, b], label_map: {5: 1}}\n"
        "  streams:\n    source: {root: there, folder: {label_map: {7: 0}}}\n    target: {labels: false}\n"
        "    other: {dataset: camvid}\n"
    )
    (tmp_path / "run.yaml").write_text(text)
    data = load_config(tmp_path / "run.yaml").data
    source, target = data.streams["source"], data.streams["target"]
    assert (source.dataset, source.root, target.root) == ("folder", "there", "here")
    assert source.folder == {"images": "i", "labels": "l", "classes": ["a", "b"], "label_map": {"7": 0}}
    assert target.folder == data.val.folder == data.folder
    assert data.streams["other"].folder is None
