"""What is measured of USRN's gate, and the page that says it."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from common.comparison import head_and_tail
from scripts import gate_page
from semi_sup import gate
from semi_sup.losses import entropy, gated_labels, gated_labels_by_product
from semi_sup.view_cells import at_cells
from tests.unit.test_usrn_method import batches, method, run


@pytest.mark.parametrize("name, branch", [("usrn", True), ("usrn", False), ("self_training", False)])
def test_labels_of_unlabelled_images_are_looked_at_and_not_learned(name, branch):
    """The truth at the centres of the cells of 8×8 pixels; losses and what else is logged stay as they were."""
    streams = batches()
    m = method(name, threshold=0.2, **({"branch": branch} if name == "usrn" else {"teacher": "none"})).eval()
    before = run(m, streams)

    net = m.model
    with torch.no_grad():
        out = net(streams["unlabeled"]["weak"], subclasses=branch, pooled=2)
    p = out["pooled_logits"].softmax(1)
    label = gated_labels(out["pooled_logits"], out["pooled_sub_logits"], m.parents, 0.2) if branch else p.argmax(1)
    label = torch.where(p.amax(1) > 0.2, label, -1)
    truth = torch.randint(-1, 5, (2, 4, 4), generator=torch.Generator().manual_seed(3))
    truth[0] = label[0]
    pixels = torch.full((2, 32, 32), 4, dtype=torch.int16)
    pixels[:, 4::8, 4::8] = truth
    streams["unlabeled"]["label"] = pixels

    m.zero_grad()
    after = run(m, streams)
    named = {"kept", "vetoed"} if branch else {"kept"}
    assert set(after) - set(before) == {f"{key}_{end}" for key in named for end in ("right", "wrong")}
    assert all(after[key] == value for key, value in before.items())
    kept = (label >= 0) & (truth >= 0)
    assert after["kept_right"] == (kept & (label == truth)).float().mean() > 0
    assert after["kept_wrong"] == (kept & (label != truth)).float().mean()


@pytest.mark.parametrize("threshold", gate.THRESHOLDS)
def test_shares_are_those_of_the_gate(threshold):
    """At every threshold, of both branches' logits on the cells of a batch with labels."""
    torch.manual_seed(1)
    m = method(threshold=threshold).eval()
    with torch.no_grad():
        for head in (m.model.classifier, m.model.classifier_SubCls):
            head[-1].weight.mul_(30)  # some cells are certain
    batch = batches()["unlabeled"] | {"label": torch.randint(-1, 5, (2, 32, 32)).short()}
    found = gate.shares(gate.look(m, batch), threshold)

    weak = m.label(batch["weak"])
    p = weak.classes.softmax(1)
    truth = at_cells(batch["label"])
    known = truth >= 0
    confident = (p.amax(1) > threshold) & known
    surer = entropy(weak.subclasses) <= entropy(weak.classes)
    differs = m.parents[weak.subclasses.argmax(1)] != p.argmax(1)
    taken = confident & (gated_labels_by_product(weak.classes, weak.subclasses, m.parents, threshold) < 0)
    groups = {"confident": confident, "surer": confident & surer, "differs": confident & differs, "taken": taken}
    assert found == {
        "threshold": threshold,
        **{key: pytest.approx(float(group.sum() / known.sum())) for key, group in groups.items()},
        **{f"{key}_right": right(groups[key], p.argmax(1) == truth) for key in ("confident", "taken")},
    }
    assert found["confident"] > 0 or threshold > 0.5
    assert len(gate.table([found]).splitlines()) == 2


def right(group, hits):
    return pytest.approx(float(hits[group].float().mean())) if group.any() else None


def leave_run(folder, hits, steps):
    """What a run leaves: two classes of ten pixels each, of which so many are found."""
    folder.mkdir(parents=True)
    groups = {"a": "frequent", "b": "rare"}
    per_class = [{"name": n, "id": i, "groups": {"pixel": groups[n]}} for i, n in enumerate(groups)]
    result = {"convention": "nan_mean", "images": 3, "per_class": per_class, "confusion": [[10, 0], [10 - hits, hits]]}
    machine = {"threads": 1, "processor": "x", "torch": "2"}
    made = {"command": "python main.py output=saved/s name=run", "commit": "abc", "minutes": 2.0, "machine": machine}
    (folder / "evaluation.json").write_text(json.dumps(result))
    (folder / "run.json").write_text(json.dumps(made))
    (folder / "config.yaml").write_text("model: {options: {subclasses: 7}}")
    (folder / "log.jsonl").write_text("".join(json.dumps({"kind": "train", **step}) + "\n" for step in steps))


def test_the_page_says_what_the_runs_say(tmp_path):
    step = {"kept": 0.5, "surer": 0.1, "kept_right": 0.3, "kept_wrong": 0.1, "vetoed_right": 0.01, "vetoed_wrong": 0.03}
    steps = [{"step": 10 * (i + 1), **step, "vetoed": 0.005 * i} for i in range(10)]
    hits = {name: [4 + i, 5 + i, 9 - i] for i, name in enumerate(gate_page.NAMES)}
    for name, numbers in hits.items():
        for seed, number in enumerate(numbers):
            leave_run(tmp_path / f"seed_{seed}" / name, number, [] if "baseline" in name else steps)
    row = {"threshold": 0.75, "confident": 0.5, "surer": 0.02, "differs": 0.03, "taken": 0.0}
    row |= {"confident_right": 0.9, "taken_right": None}
    (tmp_path / "seed_0" / gate_page.USRN / "gate.json").write_text(json.dumps([row]))

    text = gate_page.page(gate_page.collect(tmp_path))
    line = "| 0.75 | 50.0 (50.0–50.0) | 2.0 (2.0–2.0) | 3.0 (3.0–3.0) | 0.0 (0.0–0.0) | 90.0 (90.0–90.0) | – |"
    assert "7 subclasses, 1 seed(s):" in text and line in text
    assert "python gate.py saved/s/run/checkpoints/last" in text
    shares = ["50.0 (50.0–50.0)", "10.0 (10.0–10.0)", "0.2 (0.2–0.2)", "75.0 (75.0–75.0)", "25.0 (25.0–25.0)"]
    assert f"| to 20 | {' | '.join(shares)} |" in text
    assert "More than 1 % is vetoed in 70 % of the 30 logged steps" in text

    scored = {n: [head_and_tail(np.array([[10, 0], [10 - x, x]]), [1])["miou_tail"] for x in hits[n]] for n in hits}
    change = 100 * np.subtract(scored[gate_page.USRN], scored["toy_usrn_nogate"])
    half = stats.t.ppf(0.975, 2) * change.std(ddof=1) / np.sqrt(3)
    line = next(line for line in text.splitlines() if line.startswith("- **USRN, `gate: false`**"))
    assert f"mIoU(tail) {change.mean():+.1f} ± {half:.1f} points over 3 pairs" in line


def test_the_page_is_of_its_values():
    written = gate_page.PAGE.read_text(encoding="utf-8")
    assert written == gate_page.page(json.loads(gate_page.RESULTS.read_text())), "run scripts/gate_page.py page"
