"""Searches for a report: what was found, for how many epochs, and which options mattered."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.common.errors import UserError
from runner.common.text import printable
from runner.report.figures import PALETTE, Chart
from runner.report.run_record import Unreadable
from runner.search.sampler import importance
from runner.search.study import Definition, Study, StudyTrial, find_studies
from runner.search.summary import best_trials, cells, count_states, epochs_trained, short_name, titles


@dataclass(frozen=True)
class RungRow:
    """A rung of a search: how many trials reached it, and how many of them were continued.

    Attributes:
        epochs: epochs of the rung.
        reached, continued: numbers of trials.
        best: best validation accuracy at the rung, in 0..1.
    """

    epochs: int
    reached: int
    continued: int
    best: float | None


@dataclass(frozen=True)
class SearchRecord:
    """A search and its results.

    Attributes:
        study: the folder.
        definition: what it optimizes.
        trials: all trials.
        held: numbers of the trials that are being trained.
    """

    study: Study
    definition: Definition
    trials: list[StudyTrial]
    held: frozenset[int]

    @property
    def name(self) -> str:
        """The name of the search."""
        return printable(self.study.folder.name)

    @property
    def states(self) -> dict[str, int]:
        """Number of trials by state."""
        return count_states(self.trials, self.held)

    @property
    def best(self) -> list[StudyTrial]:
        """The best trials, or the Pareto front."""
        return best_trials(self.definition, self.trials)

    @property
    def epochs(self) -> tuple[int, int]:
        """The epochs that were trained, and those that all trials would take without pauses."""
        return epochs_trained(self.definition, self.trials)

    @property
    def rungs(self) -> list[RungRow]:
        """The rungs."""
        rows = []
        for epoch in self.definition.rungs:
            reached = [trial for trial in self.trials if epoch in trial.accuracy]
            best = max((trial.accuracy[epoch] for trial in reached), default=None)
            rows.append(RungRow(epoch, len(reached), sum(trial.target > epoch for trial in reached), best))
        return rows

    @property
    def importance(self) -> dict[str, float]:
        """How much of the differences in accuracy each option explains, by its short name."""
        shares = importance(self.definition, self.definition.domains, self.trials)
        return {short_name(option): share for option, share in shares.items()}

    @property
    def titles(self) -> list[str]:
        """Titles of the columns of the table of trials."""
        return titles(self.definition)

    def cells(self, trial: StudyTrial) -> list[str]:
        """Returns the cells of a trial in the table, after its name."""
        return cells(self.definition, trial)[1:]

    def run_folder(self, trial: StudyTrial) -> Path:
        """Returns the folder of a trial's run."""
        return self.study.folder.parent.parent / trial.run

    def chart(self, position: int) -> Chart:
        """Builds the chart of the search: accuracy over the epochs spent, or over the second objective."""
        return {"id": f"search-{position}"} | (
            _budget(self) if len(self.definition.objectives) == 1 else _tradeoff(self)
        )


def _budget(search: SearchRecord) -> Chart:
    """Builds the validation accuracy of each trial at each rung over the epochs that all trials had been trained."""
    traces: list[Chart] = []
    for index, epoch in enumerate(search.definition.rungs):
        reached = [trial for trial in search.trials if epoch in trial.spent.keys() & trial.accuracy.keys()]
        points = sorted((trial.spent[epoch], trial.accuracy[epoch], trial.run) for trial in reached)
        if points:
            x, y, names = zip(*points, strict=True)
            marker = {"size": 7 + 2 * index, "color": PALETTE[index % len(PALETTE)], "opacity": 0.8}
            name = f"after {epoch} epoch{'s' if epoch > 1 else ''}"
            trace = {"type": "scatter", "mode": "markers", "name": name, "marker": marker}
            hover = "%{text}<br>%{y:.2f} % " + f"{name}<extra></extra>"
            traces.append(trace | {"x": x, "y": [100 * value for value in y], "text": names, "hovertemplate": hover})
    last = search.definition.rungs[-1]
    reached = [trial for trial in search.trials if last in trial.spent.keys() & trial.accuracy.keys()]
    complete = sorted((trial.spent[last], trial.accuracy[last]) for trial in reached)
    if complete:
        x, accuracies = zip(*complete, strict=True)
        best = [100 * value for value in itertools.accumulate(accuracies, max)]
        line = {"color": PALETTE[9], "shape": "hv", "dash": "dot"}
        traces.append({"type": "scatter", "mode": "lines", "name": "best complete", "x": x, "y": best, "line": line})
    layout = {
        "xaxis": {"title": {"text": "epochs spent, all trials"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "validation accuracy, %"}},
    }
    return {"data": traces, "layout": layout}


def _tradeoff(search: SearchRecord) -> Chart:
    """Builds the validation accuracy of the complete trials over their second objective."""
    accuracy = search.definition.objectives.index("accuracy")
    other = 1 - accuracy if accuracy < 2 else 0
    name = search.definition.objectives[other]
    groups = {
        "Pareto front": best_trials(search.definition, search.trials),
        "other trials": [trial for trial in search.trials if trial.state == "complete"],
    }
    groups["other trials"] = [trial for trial in groups["other trials"] if trial not in groups["Pareto front"]]
    traces: list[Chart] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": title,
            "x": [trial.objectives[other] for trial in trials],
            "y": [100 * trial.objectives[accuracy] for trial in trials],
            "text": [trial.run for trial in trials],
            "marker": {"size": 10, "color": PALETTE[index], "symbol": ["circle", "circle-open"][index]},
            "hovertemplate": "%{text}<br>%{y:.2f} %, %{x:,}<extra></extra>",
        }
        for index, (title, trials) in enumerate(groups.items())
    ]
    unit = ", ms" if name == "latency" else ""
    layout = {"xaxis": {"title": {"text": name + unit}}, "yaxis": {"title": {"text": "validation accuracy, %"}}}
    return {"data": traces, "layout": layout}


def read_all(folders: Sequence[Path]) -> tuple[list[SearchRecord], list[Unreadable]]:
    """Reads the searches in or below folders; returns damaged ones separately."""
    searches, unreadable = [], []
    for study in find_studies(folders):
        try:
            definition, trials = study.read()
            if definition is not None:
                search = SearchRecord(study, definition, trials, study.held(trials))
                _ = search.importance, search.best, search.chart(0)  # raises if a value cannot be shown
                searches.append(search)
        except (UserError, ValueError, KeyError, IndexError, OSError) as error:
            reason = str(error).removeprefix(f"{study.journal}: ")
            unreadable.append(Unreadable(printable(study.folder), printable(" ".join(reason.split()))))
    return searches, unreadable
