"""Samples the parameters of the next trial, by Optuna's samplers."""

import random
import warnings
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from runner.search.space import MAX_COMBINATIONS, Space, combinations, size
from runner.search.study import Definition, StudyTrial, direction

TRIES = 20  # to sample parameters that no other trial has, by the study's sampler; then as many at random


def sample(definition: Definition, space: Space, trials: Sequence[StudyTrial]) -> dict[str, Any] | None:
    """Samples parameters that no trial of the study has; returns None if there are none left, or none were found.

    The result depends on the study alone: its definition, seed and trials, not on the worker.

    Args:
        definition: the definition of the study.
        space: its parsed ranges.
        trials: its trials. Those that are neither complete nor in their first rung count as pruned: with one objective,
            a later rung is better, and failed ones are the worst.
    """
    taken = {tuple(trial.values[option] for option in space) for trial in trials}
    for attempt in range(2 * TRIES):
        seed = random.Random(f"{definition.seed} {len(trials)} {attempt}").getrandbits(32)
        drawn_by = definition if attempt < TRIES else replace(definition, sampler="random")
        values = _ask(drawn_by, space, trials, seed)
        if tuple(values[option] for option in space) not in taken:
            return values
    if size(space) > MAX_COMBINATIONS:
        return None
    left = [values for values in combinations(space) if tuple(values.values()) not in taken]
    return random.Random(f"{definition.seed} {len(trials)}").choice(left) if left else None


def _ask(definition: Definition, space: Space, trials: Sequence[StudyTrial], seed: int) -> dict[str, Any]:
    """Returns the parameters that a new sampler, with this seed, draws after the trials."""
    import optuna
    from optuna.samplers import BaseSampler, RandomSampler, TPESampler

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {option: domain.distribution() for option, domain in space.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: BaseSampler = RandomSampler(seed) if definition.sampler == "random" else TPESampler(seed=seed)
        study = optuna.create_study(directions=list(map(direction, definition.objectives)), sampler=sampler)
        study.add_trials([_to_optuna_trial(trial, distributions, len(definition.objectives) == 1) for trial in trials])
        asked = study.ask(distributions)
    return {option: domain.rounded(asked.params[option]) for option, domain in space.items()}


def _to_optuna_trial(trial: StudyTrial, distributions: dict[str, Any], single_objective: bool) -> Any:
    """Returns Optuna's FrozenTrial of a trial."""
    from optuna.trial import TrialState, create_trial

    in_first_rung = trial.state == "open" and not trial.accuracy
    other = TrialState.RUNNING if in_first_rung else TrialState.PRUNED
    state = TrialState.COMPLETE if trial.state == "complete" else other
    return create_trial(
        state=state,
        params=trial.values,
        distributions=distributions,
        values=list(trial.objectives) or None,
        intermediate_values=trial.accuracy if single_objective and trial.state != "failed" else {},
    )


def importance(definition: Definition, space: Space, trials: Sequence[StudyTrial]) -> dict[str, float]:
    """Returns how much of the differences in accuracy each parameter explains (PED-ANOVA: Watanabe et al., IJCAI 2023).

    The accuracies are those of the latest epoch that at least half of the trials reached. The importances add up to 1;
    the result is empty for fewer than four such trials, or if their accuracies are equal.
    """
    import optuna
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    epochs = [e for e in definition.rungs if 2 * sum(e in t.accuracy for t in trials) >= max(8, len(trials))]
    reached = [trial for trial in trials if epochs and epochs[-1] in trial.accuracy]
    if len({trial.accuracy[epochs[-1]] for trial in reached}) < 2:
        return {}
    distributions = {option: domain.distribution() for option, domain in space.items()}
    study = optuna.create_study(direction="maximize")
    for trial in reached:
        value = trial.accuracy[epochs[-1]]
        study.add_trial(create_trial(params=trial.values, distributions=distributions, value=value))
    return optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
