"""Replays searches over a grid that was trained once, whole: how far from the best trial they are, by epochs spent.

python -m launch search NAMES --name grid --sampler random --pruner none ...    # every trial of a finite space
python -m runner.benchmarks.search RUNS/searches/grid --json runner/benchmarks/results/search-cpu.json

A replay makes the same decisions as a search with one worker, and reads the accuracy of each trial after each epoch
from the grid. Its regret is the accuracy of the grid's best trial minus that of the trial that the search would choose
now, both after their last epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import msgspec
import tyro
from msgspec import Meta
from msgspec.structs import replace

from runner.benchmarks import measure, program
from runner.common.console import new_table, print_table, progress
from runner.common.errors import UserError
from runner.common.files import write_atomically
from runner.run.folder import Run
from runner.run.metrics import read_metrics
from runner.run.schema import Hardware
from runner.search.halving import Pruner, Rungs, Train, next_step
from runner.search.sampler import sample
from runner.search.space import words_of
from runner.search.study import Definition, Sampler, Study, StudyTrial
from runner.search.summary import best_trials

METHODS: dict[str, tuple[Sampler, Pruner]] = {
    "random": ("random", "none"),
    "TPE": ("tpe", "none"),
    "random + ASHA": ("random", "asha"),
    "TPE + ASHA": ("tpe", "asha"),
    "TPE + Hyperband": ("tpe", "hyperband"),
}
BUDGETS = (0.1, 0.2, 0.4, 0.6, 1.0)  # fractions of the grid's epochs
GOAL = 0.005  # half a point
Regrets = list[tuple[float, float]]  # pairs of (fraction of the grid's epochs, regret), at every change


class GridTrial(msgspec.Struct):
    """A trial of the grid: its values, and its validation accuracy after each epoch."""

    parameters: dict[str, str]
    accuracy: list[float]


class Budget(msgspec.Struct):
    """The regret over the seeds of a method, in 0..1, after a fraction of the grid's epochs."""

    fraction: float
    median: float
    lower_quartile: float
    upper_quartile: float


class Method(msgspec.Struct):
    """A method: its regret by budget.

    Attributes:
        budgets: regrets by budget.
        to_goal: fraction of the grid's epochs after which the median regret stays at or below GOAL; None if it never
            does.
        spent: median fraction of the grid's epochs that a whole search spends.
    """

    budgets: list[Budget]
    to_goal: float | None
    spent: float


class Result(msgspec.Struct):
    """What the benchmark writes."""

    dataset: str
    experiments: list[str]
    space: dict[str, str]
    epochs: int
    rungs: list[int]
    reduction: int
    seeds: int
    grid: list[GridTrial]
    methods: dict[str, Method]
    hardware: Hardware
    versions: dict[str, str]


@dataclass(frozen=True)
class Replay:
    """Replay searches over the trials of a search that trained all of a finite space, without pauses."""

    study: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """Folder of that search, RUNS/searches/NAME."""
    seeds: Annotated[int, Meta(ge=3, le=10_000)] = 20
    """Number of seeds per method."""
    first_rung: Annotated[int, Meta(ge=1, le=10**6)] = 1
    """Epochs of the first rung."""
    reduction: Annotated[int, Meta(ge=2, le=100)] = 3
    """One of so many trials is continued beyond a rung."""
    json: Path | None = None
    """JSON file to write."""
    picture: Path | None = None
    """PNG file to write: regret over the epochs spent."""

    def __call__(self) -> None:
        study = Study(self.study)
        definition, trials = study.read()
        if definition is None:
            raise UserError(f"{self.study}: expected the folder of a search, found none")
        curves = read_curves(self.study, definition, trials)
        replays = self.replay_all(definition, curves)
        config = Run(self.study.resolve().parent.parent / trials[0].run).config()
        result = Result(
            dataset=config.dataset.name,
            experiments=list(definition.names),
            space=definition.space,
            epochs=definition.rungs[-1],
            rungs=list(self.rungs("asha", definition.rungs[-1]).epochs),
            reduction=self.reduction,
            seeds=self.seeds,
            grid=[GridTrial(trial.parameters, curves[key_of(trial.parameters)]) for trial in trials],
            methods={name: summarize(runs) for name, runs in replays.items()},
            hardware=config.hardware,
            versions=config.versions,
        )
        measure.write(msgspec.to_builtins(result), self.json)
        if self.picture:
            write_atomically(self.picture, draw(replays, result))
        print_table(table_of(result))

    def rungs(self, pruner: Pruner, epochs: int) -> Rungs:
        """Returns the rungs of a replay."""
        return Rungs.of(pruner, epochs, self.first_rung, self.reduction)

    def replay_all(self, definition: Definition, curves: Mapping[str, list[float]]) -> dict[str, list[Regrets]]:
        """Replays every method with every seed."""
        epochs = definition.rungs[-1]
        replays: dict[str, list[Regrets]] = {name: [] for name in METHODS}
        with progress("replay", len(METHODS) * self.seeds) as advance:
            for name, (sampler, pruner) in METHODS.items():
                rungs = self.rungs(pruner, epochs)
                for seed in range(self.seeds):
                    changes: Any = {"sampler": sampler, "pruner": pruner, "rungs": rungs.epochs, "seed": seed}
                    replays[name].append(replay(replace(definition, **changes), curves, rungs))
                    advance(1)
        return replays


def read_curves(folder: Path, definition: Definition, trials: Sequence[StudyTrial]) -> dict[str, list[float]]:
    """Returns the validation accuracy after each epoch of every trial.

    Raises:
        UserError: a trial of the space is missing, or not complete.
    """
    epochs = definition.rungs[-1]
    curves = {}
    for trial in trials:
        rows = read_metrics(Run(folder.resolve().parent.parent / trial.run))
        curve = [row.validation_accuracy for row in rows if row.validation_accuracy is not None]
        if len(curve) != epochs:
            raise UserError(f"{trial.run}: expected the accuracy after each of {epochs} epochs, found {len(curve)}")
        curves[key_of(trial.parameters)] = curve
    if sample(definition, definition.domains, trials) is not None:
        raise UserError(f"{folder}: expected all trials of a finite space, found {len(trials)}; add --trials")
    return curves


def key_of(parameters: Mapping[str, str]) -> str:
    """Returns a key for the values of a trial."""
    return " ".join(f"{option}={word}" for option, word in sorted(parameters.items()))


def replay(definition: Definition, curves: Mapping[str, list[float]], rungs: Rungs) -> Regrets:
    """Returns the regret of a search over the fraction of the grid's epochs that it has spent."""
    best, all_epochs = max(curve[-1] for curve in curves.values()), len(curves) * rungs.epochs[-1]
    trials: list[StudyTrial] = []
    regrets: Regrets = []
    spent = 0
    while True:
        step = next_step(trials, frozenset(), rungs, len(curves))
        if step == "new":
            values = sample(definition, definition.domains, trials)
            assert values is not None, "there are as many trials as the space has"
            words, target = words_of(definition.domains, values), rungs.of_trial(len(trials))[0]
            trials.append(StudyTrial(number=len(trials), run="", parameters=words, values=values, target=target))
        elif isinstance(step, Train):
            trial = trials[step.number]
            curve = curves[key_of(trial.parameters)]
            spent += step.target - trial.epochs
            trials[step.number] = replace(
                trial,
                target=step.target,
                accuracy={epoch: curve[epoch - 1] for epoch in rungs.of_trial(step.number) if epoch <= step.target},
                state="complete" if step.target == rungs.epochs[-1] else "open",
                objectives=(curve[-1],) if step.target == rungs.epochs[-1] else (),
            )
            chosen = best_trials(definition, trials)[0]
            regrets.append((spent / all_epochs, best - curves[key_of(chosen.parameters)][-1]))
        else:
            return regrets


def regret_at(regrets: Regrets, fraction: float) -> float:
    """Returns the regret after a fraction of the epochs; before the first trial it is unknown, and counts as 1."""
    return next((regret for spent, regret in reversed(regrets) if spent <= fraction), 1.0)


def summarize(replays: Sequence[Regrets]) -> Method:
    """Summarizes the replays of a method."""
    budgets = []
    for fraction in BUDGETS:
        lower, middle, upper = quantiles([regret_at(one, fraction) for one in replays], n=4, method="inclusive")
        budgets.append(Budget(fraction, middle, lower, upper))
    steps = sorted({spent for one in replays for spent, _ in one})
    reached = [fraction for fraction in steps if median_regret(replays, fraction) <= GOAL]
    last_above = max((fraction for fraction in steps if median_regret(replays, fraction) > GOAL), default=0.0)
    to_goal = next((fraction for fraction in reached if fraction > last_above), None)
    spent = quantiles([one[-1][0] for one in replays], n=2, method="inclusive")[0]
    return Method(budgets, to_goal, spent)


def median_regret(replays: Sequence[Regrets], fraction: float) -> float:
    """Returns the median regret after a fraction of the epochs."""
    return quantiles([regret_at(one, fraction) for one in replays], n=2, method="inclusive")[0]


def table_of(result: Result) -> Any:
    """Returns a table of the regrets in points."""
    title = f"regret in points, median (upper quartile) of {result.seeds} seeds, by fraction of the grid's epochs"
    table = new_table(
        "method", *(f"{fraction:.0%}" for fraction in BUDGETS), "to 0.5 points", "whole search", title=title
    )
    for name, method in result.methods.items():
        cells = [f"{100 * budget.median:.1f} ({100 * budget.upper_quartile:.1f})" for budget in method.budgets]
        table.add_row(name, *cells, f"{method.to_goal:.0%}" if method.to_goal else "–", f"{method.spent:.0%}")
    return table


def draw(replays: Mapping[str, Sequence[Regrets]], result: Result) -> bytes:
    """Draws the median regret of each method over the epochs spent, and the quartiles of two of them, as PNG."""
    import io

    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    fractions = [index / 200 for index in range(1, 201)]
    for index, (name, runs) in enumerate(replays.items()):
        cuts = [quantiles([regret_at(one, f) for one in runs], n=4, method="inclusive") for f in fractions]
        known = [(f, *cut) for f, cut in zip(fractions, cuts, strict=True) if cut[2] < 1]
        x, lower, middle, upper = ([100 * value for value in column] for column in zip(*known, strict=True))
        axes.step(x, middle, where="post", label=name, color=f"C{index}")
        if name in ("random", "TPE + ASHA"):
            axes.fill_between(x, lower, upper, step="post", alpha=0.15, color=f"C{index}")
    axes.axhline(100 * GOAL, color="gray", linestyle=":", linewidth=1)
    axes.set(
        xlabel="epochs spent, % of the whole grid",
        ylabel="regret, points of validation accuracy",
        xlim=(0, 100),
        ylim=0,
    )
    axes.set_title(
        f"{len(result.grid)} trials of {result.epochs} epochs on {result.dataset}, {result.seeds} seeds", fontsize=10
    )
    axes.legend()
    figure.tight_layout()
    plt.close(figure)
    figure.savefig(buffer := io.BytesIO(), format="png", metadata={"Software": None})
    return buffer.getvalue()


if __name__ == "__main__":
    program.run(Replay, "search")
