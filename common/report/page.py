"""One self-contained HTML file about a run, or about several compared with a baseline.

Changes are shown between scores of one identity only: the same images, labels and settings. What is missing in a run's
folder (see `runs`) is left out of the report and named at its top.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from common.comparison import Difference, paired
from common.evaluation.identity import differences, has_identity, other_means
from common.evaluation.summary import rescore
from common.files import replacing
from common.report.classes import classes, confusion
from common.report.compared import Compared, compare, pairs_of
from common.report.curves import curves
from common.report.groups import Group
from common.report.html import page
from common.report.panels import configs, making, panels
from common.report.runs import RunFolder
from common.report.sections import headline, notes, run_bar, summary
from common.report.seeds import mean_result, methods, pooled

SECTIONS = {
    "Scores": summary,
    "Training": curves,
    "Classes": classes,
    "Confusion": confusion,
    "Images": panels,
    "Making": making,
    "Configuration": configs,
}


class Report:
    """The methods of one report, the baseline first, all scored by the baseline's convention.

    groups: the methods, each the runs of one config by seed. runs: each method as one run, of several seeds their mean
    (`seeds.pooled`). results: its evaluation, None where it has none to show. differing: the methods whose scores do
    not compare with the first that has any, and why. regrouped: of those that do, the means over other classes than
    the first's ("tail", levels of groups). changes: of those that do, the comparison with the baseline.
    """

    def __init__(self, runs: Sequence[RunFolder], baseline: int):
        first = runs[baseline]
        groups = methods([first, *(run for run in runs if run is not first)])
        self.groups = sorted(groups, key=lambda group: not group.holds(first))
        self.runs = [pooled(group) for group in self.groups]
        names = [run.name for run in self.runs]
        self.names = [
            n if names.count(n) == 1 else str(run.path)
            for n, run in zip(names, self.runs, strict=True)
        ]
        scored = [run.evaluation for run in self.runs if run.evaluation]
        self.convention: str = scored[0]["convention"] if scored else self._logged_convention()
        self.notes: list[str] = []
        self.differing: dict[int, list[str]] = {}
        self.regrouped: dict[int, set[str]] = {}
        self.results = [self._result(i) for i in range(len(self.runs))]
        self._compare()
        self.changes = self._changes()
        self._tell_lacks()
        self.shares, self.share_label = self._shares()

    @property
    def compared(self) -> bool:
        return len(self.runs) > 1

    @property
    def scored(self) -> list[int]:
        """The runs whose evaluation compares with the first that has one."""
        return [
            i for i, result in enumerate(self.results) if result and i not in self.differing
        ]

    def mark(self, i: int) -> str:
        """What has to be known of a run's scores before they are compared; "" for nothing."""
        if i in self.differing:
            return "not comparable"
        result = self.results[i]
        return (
            "identity unknown" if result and self.compared and not has_identity(result) else ""
        )

    def _logged_convention(self) -> str:
        named = [
            line["convention"]
            for run in self.runs
            for line in run.log
            if line.get("convention")
        ]
        configured = [run.tree.get("eval", {}).get("convention") for run in self.runs]
        return next((c for c in (*named, *configured) if c), "not recorded")

    def _result(self, i: int) -> dict[str, Any] | None:
        """The run's evaluation under the report's convention."""
        run = self.runs[i]
        name = self.names[i]
        if run.missing:
            self.notes.append(f"{name} has no {', '.join(run.missing)}.")

        result = run.evaluation
        if result is None or result["convention"] == self.convention:
            return result

        if not result.get("confusion"):
            self.differing[i] = [f"scored by {result['convention']}"]
            self.notes.append(
                f"{name} was scored by {result['convention']} and left no confusion matrix to rescore."
            )
            return None

        self.notes.append(
            f"{name} was scored by {result['convention']}; shown here is {self.convention}."
        )

        seeds = {
            seed: replace(member, evaluation=rescore(member.evaluation, self.convention))
            for seed, member in self.groups[i].runs.items()
        }
        self.groups[i] = Group(self.groups[i].name, seeds)
        return mean_result([member.evaluation for member in seeds.values()])

    def _compare(self) -> None:
        """Find the runs whose scores do not compare: other classes are left out, all others marked."""
        first = next((i for i, result in enumerate(self.results) if result), 0)
        for i in range(first + 1, len(self.results)):
            result = self.results[i]
            if result is None:
                continue
            if class_names(result) != class_names(self.results[first]):
                self.differing[i] = ["other classes"]
                self.results[i] = None
                self.notes.append(
                    f"{self.names[i]} was evaluated on other classes; its scores are left out."
                )
            elif parts := differences(result, self.results[first]):
                self.differing[i] = parts
                self.notes.append(
                    f"{self.names[i]} does not compare with {self.names[first]}: {'; '.join(parts)}."
                )

        for i in self.scored[1:]:
            self.regrouped[i] = other_means(
                self.results[i]["per_class"], self.results[first]["per_class"]
            )
            if self.regrouped[i]:
                over = ", ".join(sorted(self.regrouped[i]))
                text = f"group other classes ({over}); these means are shown without changes"
                self.notes.append(f"{self.names[i]} and {self.names[first]} {text}.")

        unknown = [self.names[i] for i in self.scored if self.mark(i)]
        if unknown:
            self.notes.append(
                f"Identity unknown: {', '.join(unknown)}. Scored before an evaluation kept its identity; whether the "
                "same images were evaluated in the same way cannot be checked."
            )

    def _changes(self) -> dict[int, Compared]:
        """The comparison of each method with the baseline, where both kept their confusion matrices."""
        usable = [
            i
            for i in self.scored
            if self.results[i].get("confusion") and "tail" not in self.regrouped.get(i, ())
        ]
        if len(usable) < 2 or usable[0] != 0:
            return {}

        groups = [Group(self.names[i], self.groups[i].runs) for i in usable]
        try:
            compared = compare(groups, groups[0])
        except ValueError as error:
            self.notes.append(f"No intervals: {error}.")
            return {}

        return dict(zip(usable[1:], compared, strict=True))

    def change(
        self, i: int, get: Callable[[Any], float | None], key: str = ""
    ) -> Difference | None:
        """A score of method `i` against the baseline's, seed by seed where one has several; None where nothing pairs.

        get: the score (0..1) of an evaluation. key: its name in `changes`, which know of intervals over images.
        """
        found = self.changes[i].overall.get(key) if i in self.changes else None
        if found is not None:
            return found.difference if math.isfinite(found.difference.mean) else None

        pairs = pairs_of(self.groups[i], self.groups[0])
        if not pairs or any(run.evaluation is None for pair in pairs for run in pair):
            return None

        values = [(get(ours.evaluation), get(theirs.evaluation)) for ours, theirs in pairs]
        if any(None in pair for pair in values):
            return None
        return paired([after for after, _ in values], [before for _, before in values])

    def _tell_lacks(self) -> None:
        """What the training labels of the runs lack, each lack once."""
        lacks: dict[str, list[str]] = {}
        for run, name in zip(self.runs, self.names, strict=True):
            for lack in (run.statistics or {}).get("warnings", ()):
                lacks.setdefault(lack, []).append(name)

        self.notes += [f"{', '.join(names)}: {lack}." for lack, names in lacks.items()]

    def _shares(self) -> tuple[list[float | None], str]:
        """Every class's share of the labelled training pixels; of the evaluated ones where no run says."""
        if not self.scored:
            return [], ""

        per_class = self.results[self.scored[0]]["per_class"]

        for run in self.runs:
            counts = (run.statistics or {}).get("class_pixels")
            if counts and len(counts) == len(per_class):
                return _normalised(counts), "share of training pixels (log scale)"

        published = [item.get("train_pixels") for item in per_class]
        if None not in published:
            return _normalised(published), "share of training pixels (log scale)"

        self.notes.append(
            "No run has statistics.json: frequencies are those of the evaluated images."
        )

        return _normalised(
            [item["pixels"] for item in per_class]
        ), "share of evaluated pixels (log scale)"

    def tail(self) -> tuple[list[int], str]:
        """The classes to look at, rarest last, and how they are called."""
        per_class = self.results[self.scored[0]]["per_class"]
        ids = [item["id"] for item in per_class if item["tail"]]
        called = "tail classes"
        if not ids:
            seen = [item["id"] for item in per_class if item["pixels"]]
            ids = sorted(seen, key=lambda k: self.shares[k] or 0)[
                : max(1, min(12, math.ceil(len(per_class) / 5)))
            ]
            called = "rarest classes"

        ids = sorted(ids, key=lambda k: self.shares[k] or 0)
        if len(ids) > 12:
            ids = ids[:12]
            called = f"twelve rarest {called}"

        return ids[::-1], called


def _normalised(counts: Sequence[float]) -> list[float | None]:
    total = sum(counts)
    return [count / total if total else None for count in counts]


def class_names(result: dict[str, Any]) -> list[str]:
    return [item["name"] for item in result["per_class"]]


def write_report(
    out_html: str | Path,
    runs: Sequence[RunFolder],
    baseline: int = 0,
    *,
    command: str | None = None,
) -> Path:
    """Write the report on `runs` and return its path; changes are against `runs[baseline]`, seeds together.

    command: how the report was made, for its last line. Raises ValueError without runs.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder")
    if not 0 <= baseline < len(runs):
        raise ValueError(f"baseline {baseline} is none of the {len(runs)} runs")

    report = Report(runs, baseline)
    sections = {title: make(report) for title, make in SECTIONS.items()}
    links = "".join(
        f'<a href="#{title.lower()}">{title}</a>' for title, body in sections.items() if body
    )
    made = f"Report made {time.strftime('%Y-%m-%d %H:%M')}" + (
        f" by <code>{escape(command)}</code>" if command else ""
    )
    body = (
        headline(report)
        + f'<nav aria-label="Sections">{links}</nav>'
        + notes(report)
        + run_bar(report)
        + "".join(sections.values())
        + f"<footer>{made}. All scores: convention <b>{escape(report.convention)}</b>, in percent.</footer>"
    )
    title = f"Long-tail segmentation: {', '.join(report.names)}"
    out = Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)

    with replacing(out) as draft:
        draft.write_text(page(title, body, len(report.runs)), encoding="utf-8")

    return out
