"""What a search has found so far, for the terminal and the report."""

from collections import Counter
from collections.abc import Sequence

from runner.search.study import Definition, Objective, StudyTrial

MAX_SHOWN = 10


def best_trials(definition: Definition, trials: Sequence[StudyTrial]) -> list[StudyTrial]:
    """Returns up to ten trials: the latest rung first, and there the best; with several objectives, the Pareto front.

    The front has the complete trials to which no other is at least equal in all objectives and better in one.
    """
    if len(definition.objectives) == 1:
        reached = [trial for trial in trials if trial.accuracy and trial.state != "failed"]
        return sorted(reached, key=lambda trial: (-trial.epochs, -trial.last_accuracy, trial.number))[:MAX_SHOWN]
    complete = [trial for trial in trials if trial.state == "complete"]
    scores = {trial.number: _scores(definition, trial) for trial in complete}

    def is_dominated(trial: StudyTrial) -> bool:
        own = scores[trial.number]
        others = (scores[other.number] for other in complete)
        return any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for other in others)

    front = [trial for trial in complete if not is_dominated(trial)]
    return sorted(front, key=lambda trial: scores[trial.number], reverse=True)[:MAX_SHOWN]


def _scores(definition: Definition, trial: StudyTrial) -> tuple[float, ...]:
    """Returns the objectives of a complete trial; more is better."""
    pairs = zip(definition.objectives, trial.objectives, strict=True)
    return tuple(value if objective == "accuracy" else -value for objective, value in pairs)


def describe_state(trial: StudyTrial, held: frozenset[int]) -> str:
    """Returns the state of a trial: complete, failed, running, paused at a rung, or waiting to be trained."""
    if trial.finished:
        return trial.state
    if trial.number in held:
        return "running"
    return "paused" if trial.target in trial.accuracy else "waiting"


def count_states(trials: Sequence[StudyTrial], held: frozenset[int]) -> dict[str, int]:
    """Returns the number of trials in each state."""
    return dict(sorted(Counter(describe_state(trial, held) for trial in trials).items()))


def epochs_trained(definition: Definition, trials: Sequence[StudyTrial]) -> tuple[int, int]:
    """Returns the epochs that the trials were trained, and those that all would take without pauses."""
    return sum(trial.epochs for trial in trials), len(trials) * definition.rungs[-1]


def format_objective(objective: Objective, value: float) -> str:
    """Returns the value of an objective as text."""
    if objective == "accuracy":
        return f"{value:.2%}"
    return f"{value:.3g} ms" if objective == "latency" else f"{value:,.0f}"


def titles(definition: Definition) -> list[str]:
    """Returns the titles of the columns of a table of trials."""
    return ["trial", *definition.objectives, "epochs", *map(short_name, definition.space)]


def cells(definition: Definition, trial: StudyTrial) -> list[str]:
    """Returns the cells of a trial in such a table."""
    objectives = map(format_objective, definition.objectives, trial.objectives or (trial.last_accuracy,))
    return [trial.run, *objectives, str(trial.epochs), *trial.parameters.values()]


def short_name(option: str) -> str:
    """Returns the last part of an option's name: `lr` for `--recipe.optimizer.lr`."""
    return option.removeprefix("--").rpartition(".")[2]
