"""The model cards: a page that says what the results in docs/results say."""

import json
import re

import numpy as np
import pytest

from scripts import model_cards


def test_the_page_says_what_the_results_say():
    written = model_cards.PAGE.read_text(encoding="utf-8")
    assert written == model_cards.page(), "run scripts/model_cards.py"


def test_every_file_of_trained_networks_has_a_card():
    """Such a file holds scores of runs, or their confusion matrices; the others are benchmarks. Files of choices, which
    have each a file of results that is named so, hold the scores of strengths that were tried."""
    carded = {*model_cards.evidence_files(), *(card.file for card in model_cards.CARDS)}
    trained = set()
    for path in model_cards.RESULTS.glob("*.json"):
        if path.with_name(path.name.replace("_choices", "")) in {*model_cards.RESULTS.glob("*.json")} - {path}:
            continue
        text = path.read_text(encoding="utf-8")
        if '"miou"' in text or '"matrices"' in text:
            trained.add(path.stem)
    assert trained == carded


@pytest.mark.parametrize("card", model_cards.CARDS, ids=lambda card: card.file)
def test_a_card_has_the_scores_and_configs_of_its_runs(card):
    text = model_cards.card(card)
    for name, runs in json.loads((model_cards.RESULTS / f"{card.file}.json").read_text()).items():
        row = re.search(rf"^\| {re.escape(name)} \| ([\d.]+) ± ([\d.]+) \| ([\d.]+) ±", text, re.MULTILINE)
        values = 100 * np.array([[run["miou"], run["miou_tail"]] for run in runs])
        expected = (values.mean(0)[0], np.ptp(values[:, 0]) / 2, values.mean(0)[1])
        assert [float(cell) for cell in row.groups()] == pytest.approx(expected, abs=0.0501)
        assert runs[0]["made"]["command"] in text
    for config in re.findall(r"`(\S+configs/\S+?)`", text):
        assert (model_cards.ROOT / config).is_file(), config
    assert "Half size" in text and "2 seeds" in text


def test_one_seed_is_called_one():
    assert "One seed" in model_cards.limits([], [0]) and model_cards.spread([0.25]) == "25.0"
