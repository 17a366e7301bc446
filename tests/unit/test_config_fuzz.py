"""Whatever a config says, reading it gives a config or one line that names the file, within two seconds.

Texts are mutated character by character: 200 seeds by default, 5000 with --slow. The values of a failing test name its
seed. `test_config_sections.py` mutates values.
"""

import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from common.config import ConfigError, load_config
from common.config.text import parse
from common.config.typed import typed

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    path for path in ROOT.glob("*/configs/**/*") if path.suffix in (".yaml", ".json") and "_base_" not in path.parts
)
SEEDS = [
    *(range(first, first + 25) for first in range(0, 200, 25)),
    *(pytest.param(range(first, first + 400), marks=pytest.mark.slow) for first in range(200, 5000, 400)),
]
SNIPPETS = (
    "[", "]", "{", "}", ":", ": ", "- ", "\n", "\t", ",", "&a ", "*a", "<<: ", "!!bool zz", "!!timestamp zz", "!!set ",
    "!!python/object:os.system ", "? ", "|", ">", "%", "@", "`", '"', "'", '"\\UFFFFFFFF"', '"\\ud800"', "\\", "\0",
    "2001-99-99", "1" * 5000, "0x" + "f" * 5000, "1e999", ".nan", "~", "base: 5", "base: .", "é", "\ufeff", "\u2028",
    "null", "true", "-", "=", "0b_", "1:99:99", "---", "...", "#", "[" * 3000, '{"a":' * 3000, "x" * 100_000,
)  # fmt: skip


def expect_config_or_one_line(make, name: str = "") -> bool:
    """Whether it was refused, in one line and in time."""
    start = time.process_time()  # of this process alone: the machine may have other work
    refused = False
    try:
        make()
    except ConfigError as error:
        refused, text = True, str(error)
        assert "\n" not in text and name in text and len(text) < 1500, text[:2000]
    assert time.process_time() - start < 2
    return refused


def mutated_text(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) + 1)
        end = min(place + rng.choice((0, 0, 1, 5, 40)), len(text))
        other = rng.randrange(len(text) + 1)
        piece = rng.choice((*SNIPPETS, text[other : other + rng.randint(1, 60)]))
        text = text[:place] + piece + text[end:]
    return text


def beside_its_parents(source: Path, folder: Path) -> Path:
    """A new file in a copy of the tree of configs, where the `base:` of `source` is found."""
    system = source.relative_to(ROOT).parts[0]
    copy = folder / system
    if not copy.exists():
        shutil.copytree(ROOT / system / "configs", copy / "configs")
    return copy / source.relative_to(ROOT / system).with_name(f"mutated{source.suffix}")


def read_mutated_text(seed: int, folder: Path) -> bool:
    rng = random.Random(seed)
    source = rng.choice(SHIPPED)
    path = beside_its_parents(source, folder)
    content = mutated_text(source.read_text(encoding="utf-8"), rng).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        place = rng.randrange(len(content) + 1)
        content = content[:place] + bytes([rng.randrange(128, 256)]) + content[place:]
    path.write_bytes(content)
    return expect_config_or_one_line(lambda: load_config(path), "mutated")


@pytest.mark.parametrize("seeds", SEEDS)
def test_mutated_texts(seeds, tmp_path):
    refused = [read_mutated_text(seed, tmp_path) for seed in seeds]
    assert 0 < sum(refused) < len(refused), "some of the texts are still configs, some are not"


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))])
MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12))]
)


@pytest.mark.parametrize(
    "text, words",
    [
        ("base: none.yaml", "hostile.yaml: base: "),
        (BOMB, "more than 300000 values, with those that aliases repeat"),
        (MERGES, "more than 300000 values, with those that aliases repeat"),
        ("a: &a [*a]", "an alias inside what it names"),
        ("a: &a {b: *a}", "an alias inside what it names"),
        ("a: " + "[" * 60, "nested more than 50 levels"),
        ("a: " + "[" * 3000 + "]" * 3000, "nest"),  # the parser in C has a limit, too
        ("x" * (2 << 20), "characters; a config has at most"),
        ("a: " + "1" * 5000, "line 1: '11111"),
        ("seed: 0x" + "f" * 5000, "integer of 20000 bits>: an integer beyond 64 bits"),
        ("seed: 9223372036854775808", "an integer beyond 64 bits"),
        ("base: 5", "base: expected the name of a config file or a list of them, got 5"),
        ("base: [5]", "base: expected the name of a config file or a list of them, got [5]"),
        ("seed: !!bool zz", "line 1: 'zz' cannot be read as bool"),
        ("seed: !!timestamp zz", "line 1: unknown tag 'tag:yaml.org,2002:timestamp'"),
        ("seed: !!python/object/apply:os.system [x]", "line 1: unknown tag"),
        ("seed: 2001-99-99", "seed: expected int, got '2001-99-99'"),
        ('seed: "\\UFFFFFFFF"', "not valid YAML"),
        ("? [1, 2]\n: 3", "line 1: a key is no plain value"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("5", "a config is a mapping, not int"),
        ("", "a config is a mapping, not NoneType"),
    ],
)
def test_hostile_yaml(text, words, tmp_path):
    path = tmp_path / "hostile.yaml"
    full = text if words.startswith("a config is") else f"model: {{name: a, num_classes: 2}}\n{text}"
    full = full if "line 1" not in words else text
    path.write_text(full)
    with pytest.raises(ConfigError) as error:
        start = time.process_time()
        load_config(path)
    assert time.process_time() - start < 2
    assert words in str(error.value) and str(path.name) in str(error.value) and len(str(error.value)) < 1500


def test_what_aliases_repeat_counts_as_often(monkeypatch):
    """The values of the tree that is built, counted one by one, are as many as a config may have, and one too many."""
    text = "a: &a {x: 1, y: [2, 3]}\nb: &b [*a, *a, 4]\nc: {d: *b, e: *b, f: *a}"

    def count(tree) -> int:
        parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
        return 1 + sum(count(part) for part in parts)

    most = count(parse(text))
    monkeypatch.setattr("common.config.text.MOST_VALUES", most)
    assert count(parse(text)) == most
    monkeypatch.setattr("common.config.text.MOST_VALUES", most - 1)
    with pytest.raises(ConfigError, match=f"line 1: more than {most - 1} values, with those that aliases repeat"):
        parse(text)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a":' * 3000, "nested more than 50 levels"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested more than 50 levels"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
        ('{"a": 9223372036854775808}', "an integer beyond 64 bits"),
        ('{"a": "\\ud800"}', "holds half a character"),
        ('{"a": "\\u0000"}', "holds a NUL character"),
        ('{"a": 1', "not valid JSON"),
        ("[1]", "a config is a mapping, not list"),
    ],
)
def test_hostile_json(text, words, tmp_path):
    (tmp_path / "hostile.json").write_text(text)
    with pytest.raises(ConfigError, match="hostile.json") as error:
        load_config(tmp_path / "hostile.json")
    assert words in str(error.value)


def test_other_encodings_and_marks(tmp_path):
    text = "model: {name: é, num_classes: 2}\n"
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "run.yaml").write_bytes(text.encode(encoding))
        with pytest.raises(ConfigError, match="run.yaml: the config is not UTF-8 text .*; save it as UTF-8"):
            load_config(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_bytes(text.encode("utf-8-sig"))
    assert load_config(tmp_path / "run.yaml").model.name == "é"


# Values -----------------------------------------------------------------------------------------------------------

WRONG = (
    None, True, False, 0, 1, -1, 2, 3, 2**63, -(2**63), 10**400, 0.0, -0.5, 1.5, 1e30, float("nan"), float("inf"), "",
    "toy", "x" * 100_000, "\n", [], [0], [0, 0], [-1, -1], [1, 2, 3], [[]], [1] * 1000, {}, {"a": 1}, {"": {}}, [{}],
    {"preset": []}, {"recipe": [0, 0]}, ["a", "b"], "(", "released", "dataset",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    a: int = 1


def test_shown_values_are_short():
    for value in WRONG:
        expect_config_or_one_line(lambda value=value: typed(Options, {"a": value}, "here"), "here")
        expect_config_or_one_line(lambda value=value: typed(Options, value, "here"), "here")


@pytest.mark.parametrize(
    "text", ["optim.lr=[", "=", "a", "a..b=1", ".=", "optim.lr=" + "[" * 3000, "optim=" + "x" * 9999]
)
def test_bad_overrides(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "a", "num_classes": 2}}))
    with pytest.raises(ConfigError):
        load_config(path, [text])
    expect_config_or_one_line(lambda: load_config(path, [text]))
