"""`python -m launch search`: each trial is sampled, paused and continued once, whatever is killed meanwhile."""

import contextlib
import dataclasses
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from launch import local_pool, search_worker
from launch import search as search_module
from launch.local_pool import Job, ListedTrials
from launch.search import DEFAULT_ALLOCATION, Search, check_same_search
from launch.search_worker import Plan, StudySource
from launch.trials import expand
from runner.benchmarks import search as replays
from runner.benchmarks import tables
from runner.common.command_line import read_command_and_rest
from runner.common.errors import UserError
from runner.common.files import read_json, write_json
from runner.run import lock
from runner.run.folder import Run
from runner.run.metrics import encode_row, read_metrics
from runner.run.schema import Ending, MetricRow, Summary
from runner.search import space as spaces
from runner.search.halving import Rungs, Train, next_step
from runner.search.sampler import importance, sample
from runner.search.space import Choices, Range, parse_domain
from runner.search.study import Definition, Objective, Study, StudyTrial, find_studies
from runner.search.summary import best_trials, describe_state
from tests.support.compare import assert_same_run
from tests.support.configs import CONFIG
from tests.support.processes import (
    ENDING,
    ROOT,
    TINY,
    clean_environment,
    command_lines,
    descendants_of,
    gone,
    module,
    runner,
    start,
    wait_until,
)
from tests.support.searches import assert_trained_once, trials_of

LR, DECAY = "--recipe.optimizer.lr", "--recipe.optimizer.weight-decay"
SPACE = (LR, "log:1e-3:1e-1", DECAY, "0|1e-4")
OPTIONS = (*TINY, "--recipe.validation", "60", "--recipe.epochs", "9", "--device", "cpu", "--precision", "fp32")


def searched(data: Path, runs: Path, *more: object) -> list[object]:
    return ["search", "tiny", "--data", data, "--runs", runs, *OPTIONS, *SPACE, *more]


# ---------------------------------------------------------------------------------------------------------------------
# Ranges


@pytest.mark.parametrize(
    ("word", "parsed"),
    [
        ("log:1e-4:0.1", Range("log", 1e-4, 0.1)),
        ("lin:-1:2.5", Range("lin", -1.0, 2.5)),
        ("int:2:8", Range("int", 2, 8)),
        ("cosine|step", Choices(("cosine", "step"))),
        ("0.1", None),
        ("tests.models:Tiny", None),
    ],
)
def test_a_value_may_be_a_range(word: str, parsed: spaces.Domain | None) -> None:
    assert parse_domain(LR, word) == parsed
    assert parsed is None or parse_domain(LR, str(parsed)) == parsed


@pytest.mark.parametrize(
    "word",
    ["log:0:1", "log:-1:1", "log:1:1e-3", "lin:1", "lin:1:2:3", "int:1.5:3", "lin:a:b", "lin:nan:1", "log:1:inf", "a|",
     "a|a", "0.1|1e-1", "int:3:3", f"int:1:1{'0' * 400}", "log:1.00001:1.00002", "lin:0.123456:1", "lin:0:0.99999",
     "log:0.12344:0.9"],
)  # fmt: skip
def test_what_is_no_range_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="expected"):
        parse_domain(LR, word)


def test_a_range_has_a_lower_and_a_higher_number_of_at_most_15_digits() -> None:
    nines = 10**15 - 1
    assert parse_domain(LR, f"int:{-nines}:{nines}") == Range("int", -nines, nines)
    for word in (f"int:0:{nines + 1}", f"int:{-nines - 1}:0"):
        with pytest.raises(UserError, match="expected integers of at most 15 digits"):
            parse_domain(LR, word)
    with pytest.raises(UserError, match="expected a range from a lower to a higher number"):
        parse_domain(LR, "int:3:3")


def test_a_range_is_the_same_for_optuna() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    assert Range("int", 2, 5).distribution() == IntDistribution(2, 5)
    assert Range("log", 0.1, 1.0).distribution() == FloatDistribution(0.1, 1.0, log=True)
    assert Range("lin", 0.1, 1.0).distribution() == FloatDistribution(0.1, 1.0)
    assert Choices(("a", "b")).distribution() == CategoricalDistribution(("a", "b"))


def test_a_finite_space_has_each_combination_once() -> None:
    space = {LR: Choices(("0.1", "0.2")), "--recipe.epochs": Range("int", 2, 4)}
    listed = [tuple(values.values()) for values in spaces.combinations(space)]
    assert listed == [("0.1", 2), ("0.1", 3), ("0.1", 4), ("0.2", 2), ("0.2", 3), ("0.2", 4)]
    assert spaces.size(space) == 6
    assert spaces.size(space | {DECAY: Range("lin", 0.0, 1.0)}) == math.inf


@given(st.sampled_from(["log", "lin"]), st.integers(1, 9999), st.integers(1, 9999), st.floats(0, 1))
def test_sampled_numbers_are_those_of_the_command_line(scale: str, one: int, other: int, share: float) -> None:
    """The sampler gets the number that was trained, which is within the range."""
    low, high = sorted((one / 1000, other / 1000))
    if low == high:
        return
    domain = parse_domain(LR, f"{scale}:{low}:{high}")
    assert isinstance(domain, Range)
    value = domain.rounded(low + share * (high - low))
    assert low <= value <= high
    assert float(domain.word(value)) == value


# ---------------------------------------------------------------------------------------------------------------------
# Which trial is next


@dataclass
class Simulated:
    """A trial whose accuracy after each epoch is known beforehand."""

    number: int
    target: int
    curve: dict[int, float]
    accuracy: dict[int, float] = field(default_factory=dict)
    finished: bool = False

    def train(self, last: int) -> None:
        self.accuracy |= {epoch: value for epoch, value in self.curve.items() if epoch <= self.target}
        self.finished = self.target == last


@given(
    st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.integers(2, 4),
    st.sampled_from(["asha", "hyperband", "none"]), st.integers(1, 4), st.randoms(use_true_random=False),
)  # fmt: skip
def test_whatever_the_order_every_trial_is_trained_once_and_one_is_complete(
    count: int, epochs: int, first: int, reduction: int, pruner: str, workers: int, luck: random.Random
) -> None:
    rungs = Rungs.of(pruner, epochs, first, reduction)
    trials: list[Simulated] = []
    running: dict[int, Simulated] = {}
    while True:
        held = frozenset(running)
        step = next_step(trials, held, rungs, count) if len(running) < workers else "wait"
        if step == "new":
            number = len(trials)
            curve = {epoch: luck.random() for epoch in range(1, epochs + 1)}
            trials.append(Simulated(number, rungs.of_trial(number)[0], curve))
        elif isinstance(step, Train):
            trial = trials[step.number]
            assert step.number not in held
            assert not trial.finished
            assert step.target in rungs.of_trial(step.number)
            assert step.target > max(trial.accuracy, default=0), "trained again"
            trial.target, running[step.number] = step.target, trial
        elif step == "wait":
            assert running
            ended = running.pop(luck.choice(list(running)))
            if luck.random() < 0.8:  # otherwise it was killed, and is continued later
                ended.train(epochs)
        else:
            assert not running
            break
    assert len(trials) == count
    complete = [trial for trial in trials if trial.finished]
    assert complete
    if pruner == "none":
        assert len(complete) == count
    for trial in trials:
        assert trial.target in trial.accuracy, "a trial that was started is left at no rung"
    for bracket in range(rungs.brackets):
        own = [trial for trial in trials if rungs.bracket(trial.number) == bracket]
        for epoch in rungs.epochs[bracket:-1]:
            reached = [trial for trial in own if epoch in trial.accuracy]
            continued = sum(trial.target > epoch for trial in reached)
            # With one worker in a synchronous order it would be exact; ASHA may continue some too early.
            assert continued >= len(reached) // reduction


def test_rungs_end_with_the_recipe() -> None:
    assert Rungs.of("asha", 27, 1, 3).epochs == (1, 3, 9, 27)
    assert Rungs.of("asha", 30, 1, 3).epochs == (1, 3, 9, 27, 30)
    assert Rungs.of("none", 30, 1, 3).epochs == (30,)
    assert Rungs.of("asha", 4, 9, 3).epochs == (4,)


def test_only_the_best_are_continued() -> None:
    rungs = Rungs((1, 3, 9), 3)
    accuracies = [0.3, 0.5, 0.4, 0.2, 0.9, 0.1]
    trials = [Simulated(n, 1, {}, {1: accuracy}) for n, accuracy in enumerate(accuracies)]
    assert next_step(trials[:2], frozenset(), rungs, 6) == "new"
    assert next_step(trials[:3], frozenset(), rungs, 6) == Train(1, 3)
    trials[1].target = 3
    assert next_step(trials, frozenset(), rungs, 6) == Train(1, 3), "what was interrupted comes first"
    assert next_step(trials, frozenset({1}), rungs, 6) == Train(4, 3)
    trials[4].target = 3
    assert next_step(trials, frozenset({1, 4}), rungs, 6) == "wait"
    trials[1].accuracy, trials[4].accuracy = {1: 0.5, 3: 0.6}, {1: 0.9, 3: 0.5}
    assert next_step(trials, frozenset(), rungs, 6) == Train(1, 9), "the best of too few"
    trials[1].accuracy, trials[1].target, trials[1].finished = {1: 0.5, 3: 0.6, 9: 0.8}, 9, True
    assert next_step(trials, frozenset(), rungs, 6) == "done"
    assert next_step(trials, frozenset(), rungs, 7) == "new"


def test_of_equals_the_first_is_continued() -> None:
    trials = [Simulated(n, 1, {}, {1: accuracy}) for n, accuracy in enumerate([0.4, 0.5, 0.5, 0.5])]
    assert next_step(trials, frozenset(), Rungs((1, 9), 4), 4) == Train(1, 9)
    assert next_step(trials[1:], frozenset(), Rungs((1, 9), 4), 3) == Train(1, 9), "the best of too few"


def test_trials_of_a_study_have_the_brackets_of_earlier_versions() -> None:
    for epochs, expected in ((27, "0010012001300012001001230010001200130012"), (3, "01001010010100")):
        rungs = Rungs.of("hyperband", epochs, 1, 3)
        assert "".join(str(rungs.bracket(number)) for number in range(len(expected))) == expected


def test_brackets_spend_about_the_same() -> None:
    rungs = Rungs.of("hyperband", 27, 1, 3)
    counts = [[rungs.bracket(number) for number in range(400)].count(bracket) for bracket in range(4)]
    assert counts[0] > 2 * counts[1] > 2 * counts[2] > counts[3] > 0
    # An ideal bracket of n trials spends about n · first rung · number of rungs.
    spent = [count * rungs.epochs[bracket] * (4 - bracket) for bracket, count in enumerate(counts)]
    assert max(spent) < 1.2 * min(spent)


# ---------------------------------------------------------------------------------------------------------------------
# The study and its sampler

DEFINITION = Definition(
    names=("tiny",), space={LR: "log:1e-3:1e-1", DECAY: "0|1e-4"}, options=(), objectives=("accuracy",), sampler="tpe",
    seed=0, pruner="asha", rungs=(1, 3, 9), reduction=3, train_seed=0, ranks=1, dataset="0123",
)  # fmt: skip


def trial_of(number: int, lr: float = 0.01, decay: str = "0", **more: object) -> StudyTrial:
    values = {LR: lr, DECAY: decay}
    words = {LR: f"{lr:g}", DECAY: decay}
    return StudyTrial(number=number, run=f"tiny/t-{number}", parameters=words, values=values, target=1, **more)


def test_a_study_holds_what_was_stored(tmp_path: Path) -> None:
    study = Study(tmp_path / "searches" / "mine")
    assert study.read() == (None, [])
    with study.locked():
        study.define(DEFINITION)
        for number in range(3):
            study.add(trial_of(number, 0.01 * (number + 1)), DEFINITION.domains)
        study.report(0, {1: 0.5})
        study.report(1, {1: 0.4})
        study.set_target(0, 3)
        study.report(0, {1: 0.5, 2: 0.55, 3: 0.6})
        study.fail(2, "no memory", final=False)
    definition, trials = Study(study.folder).read()
    assert definition == DEFINITION
    assert trials[0] == trial_of(0).__class__(
        **{**as_dict(trial_of(0, 0.01)), "target": 3, "accuracy": {1: 0.5, 2: 0.55, 3: 0.6}, "spent": {1: 1, 3: 4}}
    )
    assert trials[1].spent == {1: 2}
    assert (trials[2].state, trials[2].attempts, trials[2].reason) == ("open", 1, "no memory")
    with study.locked():
        study.complete(0, [0.6])
        study.fail(2, "no memory", final=True)
    _, trials = study.read()
    assert [trial.state for trial in trials] == ["complete", "open", "failed"]
    assert trials[0].objectives == (0.6,)
    assert [found.folder for found in find_studies([tmp_path])] == [study.folder]


def as_dict(trial: StudyTrial) -> dict[str, object]:
    return {name: getattr(trial, name) for name in trial.__struct_fields__}


def test_a_line_that_was_cut_off_is_no_end(tmp_path: Path) -> None:
    """A worker may be killed, or the disk be full, in the middle of a line; later lines would follow it."""
    study = Study(tmp_path)
    with study.locked():
        study.define(DEFINITION)
        study.add(trial_of(0), DEFINITION.domains)
    whole = study.journal.read_bytes()
    for cut in (1, 7, len(whole.splitlines()[-1])):
        study.journal.write_bytes(whole[:-cut])
        with study.locked():
            assert len(study.read()[1]) == 0
            study.add(trial_of(0), DEFINITION.domains)
        assert [trial.number for trial in study.read()[1]] == [0]


@pytest.mark.parametrize("content", [b"{}\n", b"no json\n{}\n", b"\x00\xff\n", b'{"op_code": 99}\n'])
def test_a_damaged_study_is_reported_in_one_line(tmp_path: Path, content: bytes) -> None:
    study = Study(tmp_path)
    with study.locked():
        study.define(DEFINITION)
    study.journal.write_bytes(study.journal.read_bytes() + content)
    with pytest.raises(UserError, match=r"journal.log: damaged"):
        study.read()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tiny/t-0", "../t-0"),
        ("tiny/t-0", "/etc/t-0"),
        ('"tiny/t-0"', "5"),
        ('"target":1', '"target":"x"'),
        ("log:1e-3:1e-1", "log:0:1"),
        ('"asha"', '"x"'),
        ('"intermediate_value":0.5', '"intermediate_value":"x"'),
    ],
)
def test_a_study_of_a_stranger_is_checked(tmp_path: Path, old: str, new: str) -> None:
    study = Study(tmp_path)
    with study.locked():
        study.define(DEFINITION)
        study.add(trial_of(0), DEFINITION.domains)
        study.report(0, {1: 0.5})
    text = study.journal.read_text()
    assert old in text
    study.journal.write_text(text.replace(old, new))
    with pytest.raises(UserError):
        study.read()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_journal_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    study = Study(tmp_path)
    if kind == "link":
        study.journal.symlink_to("/nowhere")
    elif kind == "pipe":
        os.mkfifo(study.journal)
    else:
        study.journal.mkdir()
    with pytest.raises(UserError, match="expected a file, found a link, pipe or folder"):
        study.read()


def test_reading_writes_nothing(tmp_path: Path) -> None:
    """Not even in the place of a study whose first line was not written yet."""
    study = Study(tmp_path)
    study.journal.touch()
    assert study.read() == (None, [])
    assert study.held([trial_of(0)]) == frozenset()
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("journal.log", 0)]


def test_a_trial_is_held_by_one_worker(tmp_path: Path) -> None:
    study, trials = Study(tmp_path), [trial_of(0), trial_of(1)]
    assert study.held(trials) == frozenset()
    with study.claim(1):
        assert study.held(trials) == {1}
        with pytest.raises(UserError), study.claim(1):
            pass
    assert study.held(trials) == frozenset()


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_study_has_the_same_next_trial(sampler: str) -> None:
    definition = changed(DEFINITION, sampler=sampler)
    trials: list[StudyTrial] = []
    for number in range(14):
        values = sample(definition, definition.domains, trials)
        assert values is not None
        assert values == sample(definition, definition.domains, trials)
        accuracy = 1 - abs(math.log10(values[LR]) + 2) / 2
        trials.append(trial_of(number, values[LR], values[DECAY], accuracy={1: accuracy}))
    other = sample(changed(definition, seed=1), definition.domains, trials)
    assert other != sample(definition, definition.domains, trials)
    assert len({trial.values[LR] for trial in trials}) == 14


def test_tpe_samples_where_trials_were_good() -> None:
    def distance(sampler: str, seed: int) -> float:
        definition = changed(DEFINITION, sampler=sampler, seed=seed)
        trials: list[StudyTrial] = []
        for number in range(30):
            values = sample(definition, definition.domains, trials)
            assert values is not None
            accuracy = 1 - abs(math.log10(values[LR]) + 2) / 2
            trials.append(trial_of(number, values[LR], values[DECAY], accuracy={1: accuracy}))
        return sum(abs(math.log10(trial.values[LR]) + 2) for trial in trials[-10:])

    assert sum(distance("tpe", seed) for seed in range(5)) < 0.7 * sum(distance("random", seed) for seed in range(5))


def test_a_finite_space_is_searched_without_repetition() -> None:
    definition = changed(DEFINITION, space={LR: "0.1|0.2|0.3", "--recipe.epochs": "int:2:5"})
    trials: list[StudyTrial] = []
    while (values := sample(definition, definition.domains, trials)) is not None:
        words = spaces.words_of(definition.domains, values)
        trials.append(changed(trial_of(len(trials)), values=values, parameters=words, accuracy={1: 0.5}))
    assert len({tuple(trial.parameters.items()) for trial in trials}) == len(trials) == 12


def test_importance_is_that_of_the_option_that_matters() -> None:
    pairs = [(lr, decay) for lr in (0.001, 0.003, 0.01, 0.03, 0.1) for decay in ("0", "1e-4")]
    trials = [trial_of(n, lr, decay, accuracy={1: 0.5 + 0.1 * math.log10(lr)}) for n, (lr, decay) in enumerate(pairs)]
    found = importance(DEFINITION, DEFINITION.domains, trials)
    assert found[LR] > 0.8
    assert math.isclose(sum(found.values()), 1)
    assert importance(DEFINITION, DEFINITION.domains, trials[:3]) == {}


def test_the_front_has_what_nothing_beats() -> None:
    definition = changed(DEFINITION, objectives=("accuracy", "latency"), pruner="none", rungs=(9,))
    objectives = [(0.5, 1.0), (0.6, 2.0), (0.55, 3.0), (0.6, 2.0), (0.7, 9.0), (0.4, 1.0)]
    trials = [trial_of(number, objectives=pair, state="complete") for number, pair in enumerate(objectives)]
    assert [trial.number for trial in best_trials(definition, trials)] == [4, 1, 3, 0]


@pytest.mark.every
def test_a_search_is_near_the_best_of_the_committed_grid_for_a_fraction_of_its_epochs() -> None:
    result = read_json(tables.RESULTS / "search-cpu.json", replays.Result)
    curves = {replays.key_of(trial.parameters): trial.accuracy for trial in result.grid}
    assert len(curves) >= 48
    assert {len(curve) for curve in curves.values()} == {result.epochs}
    rungs = Rungs.of("asha", result.epochs, result.rungs[0], result.reduction)
    definition = changed(DEFINITION, names=tuple(result.experiments), space=result.space, rungs=rungs.epochs)
    found = [replays.replay(changed(definition, seed=seed), curves, rungs) for seed in range(2)]
    summary = replays.summarize(found)
    assert summary.spent <= 0.4
    assert replays.median_regret(found, 0.4) <= replays.GOAL
    assert result.seeds >= 20
    (budget,) = [b for b in result.methods["TPE + ASHA"].budgets if b.fraction == 0.4]
    assert budget.median <= replays.GOAL


def test_a_replay_needs_a_whole_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    definition = changed(
        DEFINITION, space={LR: "0.1|0.2", DECAY: "0|1e-4"}, pruner="none", rungs=(9,), sampler="random"
    )
    study, luck = Study(tmp_path / "runs" / "searches" / "grid"), random.Random(0)
    with study.locked():
        study.define(definition)
    for number in range(4):
        if number == 3:
            with pytest.raises(UserError, match="expected all trials of a finite space, found 3"):
                replays.Replay(study.folder)()
        values = sample(definition, definition.domains, study.read()[1])
        assert values is not None
        trial = changed(trial_of(number), values=values, parameters=spaces.words_of(definition.domains, values))
        run = Run(tmp_path / "runs" / trial.run)
        write_progress(run, 9, luck, None)
        write_json(run.run_json, CONFIG)
        with study.locked():
            study.add(trial, definition.domains)
            study.report(number, {int(row.epoch): row.validation_accuracy or 0 for row in read_metrics(run)})
            study.complete(number, [0.5])
    out = tmp_path / "search.json"
    replays.Replay(study.folder, seeds=3, json=out, picture=tmp_path / "search.png")()
    result = read_json(out, replays.Result)
    assert [method.budgets[-1].median for method in result.methods.values()][:2] == [0.0, 0.0], "all is trained"
    assert {name: method.spent for name, method in result.methods.items()}["random"] == 1
    assert (tmp_path / "search.png").read_bytes()[:4] == b"\x89PNG"
    assert "TPE + ASHA" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Workers, with trials that are written instead of trained


RANGES = ("--device=cpu", "--recipe.validation=60", "--recipe.epochs=9", f"{LR}=log:1e-3:1e-1", f"{DECAY}=0|1e-4")


def command(data: Path, runs: Path, trials: int = 12, **options: object) -> Search:
    return Search(("tiny",), data, trials, runs, experiments_from=(TINY[1],), **options)


@pytest.fixture
def plan(small_data: Path, tmp_path: Path) -> Plan:
    return command(small_data, tmp_path / "runs").plan(RANGES)


def study_of(plan: Plan, tmp_path: Path) -> Study:
    study = Study(tmp_path / "runs" / "searches" / plan.name)
    with study.locked():
        study.define(plan.definition)
    return study


def write_progress(run: Run, last: int, luck: random.Random, ending: Ending | None) -> None:
    """Writes what `runner train --pause-after LAST` would: every epoch once."""
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    rows = read_metrics(run)
    for epoch in range(len(rows) + 1, last + 1):
        with run.metrics.open("ab") as file:
            file.write(
                encode_row(MetricRow(global_step=10 * epoch, epoch=float(epoch), validation_accuracy=luck.random()))
            )
        run.checkpoints.joinpath(f"step-{10 * epoch}").mkdir()
    if ending:
        write_json(run.ended, ending)


class KilledError(BaseException):
    """Stands for the end of a worker's process."""


class Mortal(Study):
    """A study whose process may be killed before each write."""

    luck = random.Random(0)

    def _open(self) -> tuple[Any, Any]:
        storage, study = super()._open()
        for name in ("set_trial_user_attr", "set_trial_intermediate_value", "set_trial_state_values"):
            setattr(storage, name, self.or_die(getattr(storage, name)))
        return storage, study

    def or_die(self, write: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            if self.luck.random() < 0.1:
                raise KilledError
            write(*arguments)

        return call


def killed(worker: StudySource) -> None:
    for _, _, claim in worker.claims.values():  # as the end of its process would
        claim.close()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.every) for seed in range(1, 8))])
@pytest.mark.parametrize("objectives", [("accuracy",), ("accuracy", "parameters")])
def test_workers_share_a_study_and_any_may_be_killed(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, objectives: tuple[Objective, ...]
) -> None:
    """Three workers, killed at random, also between writes: each rung is reached once, and no trial has two workers."""
    monkeypatch.setattr(search_worker, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(search_worker, "check_same_training", lambda *_: None)
    monkeypatch.setattr(search_worker, "_measured", lambda *_: 1000.0)
    plan = command(small_data, tmp_path / "runs", objectives=objectives).plan(RANGES)
    study, luck = Mortal(study_of(plan, tmp_path).folder), random.Random(seed)
    workers = [StudySource(plan, study, 12) for _ in range(3)]
    jobs: list[Job | None] = [None] * 3
    kills = 0
    while not all(worker.is_empty() for worker in workers):
        index = luck.randrange(3)
        try:
            jobs[index] = turn(workers[index], jobs, index, luck)
        except KilledError:
            killed(workers[index])
            workers[index], jobs[index] = StudySource(plan, study, 12), None
            kills += 1
    trials = study.read()[1]
    assert kills >= 3
    assert [trial.number for trial in trials] == list(range(12))
    assert len({trial.run for trial in trials}) == 12
    halving = len(objectives) == 1
    assert {describe_state(trial, frozenset()) for trial in trials} == (
        {"complete", "paused"} if halving else {"complete"}
    )
    for trial in trials:
        rows = [int(row.epoch) for row in read_metrics(Run(tmp_path / "runs" / trial.run))]
        assert rows == list(range(1, trial.epochs + 1))
        assert [trial.spent[epoch] for epoch in sorted(trial.spent)] == sorted(trial.spent.values())
    trained = sum(trial.epochs for trial in trials)
    assert max(max(trial.spent.values()) for trial in trials) == trained
    assert trained < 12 * 9 if halving else trained == 12 * 9


def turn(worker: StudySource, jobs: list[Job | None], index: int, luck: random.Random) -> Job | None:
    """Lets a worker take a job, or train it up to its target or, if it is killed, less; returns its job afterwards."""
    job = jobs[index]
    if job is None:
        job = worker.next()
        running = [other.trial.id for other in (*jobs, job) if other]
        assert len(set(running)) == len(running)
        return job
    assert job.arguments is not None
    options = dict(zip(job.arguments, job.arguments[1:], strict=False))
    target = int(options.get("--pause-after", 9))
    reached = len(read_metrics(job.trial.run))
    assert reached < target, "trained again"
    if luck.random() < 0.3:
        write_progress(job.trial.run, luck.randrange(reached, target), luck, None)
        raise KilledError
    write_progress(job.trial.run, target, luck, Ending(stopped=True) if target < 9 else None)
    if target == 9:
        write_json(job.trial.run.summary, summary_of(job.trial.run))
    assert "validation accuracy" in worker.ended(job, "")
    return None


def summary_of(run: Run) -> Summary:
    rows = read_metrics(run)
    return Summary(
        experiment="tiny", run=run.folder.name, dataset="x", seed=0, epochs=9.0, steps=90, test_accuracy=0.5,
        test_loss=1.0, test_top5=0.9, test_calibration_error=0.0, test_images=10, best_epoch=9.0,
        validation_accuracy=rows[-1].validation_accuracy, class_accuracy=[0.5], confusion=[[10]],
    )  # fmt: skip


@pytest.fixture
def worker(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudySource:
    monkeypatch.setattr(search_worker, "POLL_SECONDS", 0.0)
    return StudySource(plan, study_of(plan, tmp_path), 12)


def next_job(worker: StudySource) -> Job:
    job = worker.next()
    assert job is not None
    return job


def test_a_worker_that_gave_up_says_so_after_another_trial_succeeds(worker: StudySource, tmp_path: Path) -> None:
    jobs = [next_job(worker) for _ in range(search_worker.MAX_FAILURES + 1)]
    for job in jobs[:-1]:
        assert worker.ended(job, "killed") == "failed: killed"
    write_progress(jobs[-1].trial.run, worker.claims[jobs[-1].trial.id][1], random.Random(0), None)
    assert "validation accuracy" in worker.ended(jobs[-1], "")
    assert worker.is_empty()
    assert worker.gave_up


def test_cpus_and_gpus_do_not_share_a_study(plan: Plan, small_data: Path, tmp_path: Path) -> None:
    assert plan.definition.device == "cpu"
    anywhere = [word for word in RANGES if word != "--device=cpu"]
    gpus = dataclasses.replace(DEFAULT_ALLOCATION, gpus_per_node="2")
    submitted = command(small_data, tmp_path / "runs", on="slurm", slurm=gpus)
    assert submitted.plan(anywhere).definition.device == "cuda"
    assert "--device=cuda" in submitted.worker_args(anywhere)
    with pytest.raises(UserError, match="holds another search: --device was cuda, now cpu"):
        check_same_search(submitted.plan(anywhere).definition, plan.definition, tmp_path)
    unknown = command(small_data, tmp_path / "runs", on="slurm").plan(anywhere).definition
    check_same_search(unknown, plan.definition, tmp_path)  # the first worker chooses


def test_a_study_of_an_earlier_version_is_continued(
    plan: Plan, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no device, or has one among its options."""
    definition = changed(plan.definition, device="", options=("--device=cpu", *plan.definition.options))
    earlier = dataclasses.replace(plan, definition=definition)
    next_job(StudySource(earlier, study_of(earlier, tmp_path), 12))
    started = []
    monkeypatch.setattr(local_pool, "train_trials", lambda source, *_: started.append(next_job(source)) or True)
    with pytest.raises(SystemExit, match="75"):
        command(small_data, tmp_path / "runs", name=plan.name)(list(RANGES), dict(os.environ))
    assert started[0].trial.id == "tiny/tiny-000-seed-0"  # whose first worker is gone


def test_a_damaged_run_json_is_a_failed_trial(worker: StudySource, tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "tiny" / "tiny-000-seed-0")
    run.folder.mkdir(parents=True)
    run.run_json.write_text("{")
    assert next_job(worker).trial.id == "tiny/tiny-001-seed-0"
    assert worker.study.read()[1][0].state == "failed"


def test_trials_that_another_call_trains_meanwhile_are_not_started(small_data: Path, tmp_path: Path) -> None:
    trials = expand(["tiny"], (0, 1, 2), None, [*TINY, "--data", str(small_data), "--runs", str(tmp_path)], (TINY[1],))
    source = ListedTrials(trials)
    first = source.next()
    trials[1].run.folder.mkdir(parents=True)
    with lock.locked(trials[1].run.lock, timeout=0):
        second = source.next()
    assert source.describe(0) == "0 of 2 done, 0 waiting"
    assert [first.trial.id, second.trial.id] == [trials[0].id, trials[2].id]
    assert source.next() is None


def test_a_trial_that_diverged_is_not_tried_again(worker: StudySource) -> None:
    for number in range(2 * search_worker.MAX_FAILURES):
        job = next_job(worker)
        write_progress(job.trial.run, 0, random.Random(0), Ending(stopped=False, reason="not finite", diverged=True))
        assert worker.ended(job, "") == "failed: not finite"
        trial = worker.study.read()[1][number]
        assert (trial.state, trial.reason) == ("failed", "not finite")
    assert not worker.is_empty()


def test_a_trial_is_tried_three_times_and_a_worker_gives_up_after_three_trials(worker: StudySource) -> None:
    tried = []
    while not worker.is_empty():
        job = next_job(worker)
        tried.append(job.trial.id[-10:])
        assert worker.ended(job, "no such file") == "failed: no such file"
    assert worker.gave_up
    assert tried == ["000-seed-0"] * 3 + ["001-seed-0"] * 3 + ["002-seed-0"]
    states = [(trial.state, trial.attempts, trial.reason) for trial in worker.study.read()[1]]
    assert states == [("failed", 3, "no such file")] * 2 + [("open", 1, "no such file")]


def test_a_failure_before_the_run_is_continued_is_no_pause(worker: StudySource) -> None:
    """ended.json of the pause is not taken for the outcome of the next start."""
    while True:
        job = next_job(worker)
        assert job.arguments is not None
        if job.arguments[-1] == "3":
            break
        write_progress(job.trial.run, 1, random.Random(0), Ending(stopped=True, reason="paused"))
        worker.ended(job, "")
    job.trial.run.ended.unlink()  # as the pool does when it starts the job
    assert worker.ended(job, "no GPU") == "failed: no GPU"
    assert sum(trial.attempts for trial in worker.study.read()[1]) == 1


def test_a_stopped_trial_is_continued_first(worker: StudySource, plan: Plan) -> None:
    job = next_job(worker)
    worker.close()
    write_progress(job.trial.run, 0, random.Random(0), Ending(stopped=True, reason="asked to stop"))
    assert worker.ended(job, "") == "stopped: asked to stop"
    assert worker.study.read()[1][0].attempts == 0
    assert next_job(StudySource(plan, worker.study, 12)).trial.id == job.trial.id


def test_a_trial_that_was_killed_before_its_results_were_written_is_finished(small_data: Path, tmp_path: Path) -> None:
    """After its last checkpoint: it has the accuracies of all epochs, but is not complete."""
    plan = command(small_data, tmp_path / "runs", pruner="none").plan(RANGES)
    worker = StudySource(plan, study_of(plan, tmp_path), 1)
    job = next_job(worker)
    write_progress(job.trial.run, 9, random.Random(0), None)
    assert worker.ended(job, "killed by signal 9") == "failed: killed by signal 9"
    again = next_job(worker)
    assert (again.trial.id, again.arguments) == (job.trial.id, job.arguments)


def test_two_slots_have_different_trials_also_without_file_locks(
    worker: StudySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Study, "held", lambda *_: frozenset())
    assert next_job(worker).trial.id != next_job(worker).trial.id


def test_a_damaged_run_is_a_failed_trial(worker: StudySource, plan: Plan) -> None:
    job = next_job(worker)
    job.trial.run.folder.mkdir(parents=True)
    job.trial.run.metrics.write_text("damaged\n{}\n")
    assert "metrics.jsonl: line 1: damaged" in worker.ended(job, "")
    assert next_job(worker).trial.id != job.trial.id
    trial = worker.study.read()[1][0]
    assert trial.state == "failed"
    assert "metrics.jsonl: line 1: damaged" in trial.reason


def test_a_folder_of_another_training_stops_the_worker_and_fails_no_trial(worker: StudySource, tmp_path: Path) -> None:
    """As after the study was removed, but not its runs: otherwise, each trial would fail for good."""
    run = Run(tmp_path / "runs" / "tiny" / "tiny-000-seed-0")
    run.folder.mkdir(parents=True)
    write_json(run.run_json, CONFIG)
    with pytest.raises(UserError, match="holds a run with a different"):
        next_job(worker)
    assert worker.study.read()[1][0].state != "failed"


def test_a_combination_that_cannot_be_trained_is_a_failed_trial(small_data: Path, tmp_path: Path) -> None:
    """Each value is valid by itself, so that it is found out only when the combination is sampled."""
    options = [*RANGES[:3], "--recipe.ema=0|0.9", "--recipe.prune=0|0.5"]
    plan = command(small_data, tmp_path / "runs").plan(options)
    plan.check_values()
    worker = StudySource(plan, study_of(plan, tmp_path), 12)
    jobs = [next_job(worker) for _ in range(3)]
    assert worker.next() is None
    trials = worker.study.read()[1]
    (failed,) = [trial for trial in trials if trial.state == "failed"]
    assert "ema" in failed.reason
    assert len({job.trial.id for job in jobs} | {failed.run}) == 4


def test_a_complete_run_whose_latency_cannot_be_measured_fails(small_data: Path, tmp_path: Path) -> None:
    plan = command(small_data, tmp_path / "runs", objectives=("accuracy", "latency")).plan(RANGES)
    worker = StudySource(plan, study_of(plan, tmp_path), 12)
    job = next_job(worker)
    assert [command[2] for command in job.commands] == ["export", "parity", "bench"]
    write_progress(job.trial.run, 9, random.Random(0), None)
    write_json(job.trial.run.run_json, CONFIG)
    write_json(job.trial.run.summary, changed(summary_of(job.trial.run), confusion=[[1] * 10] * 10))
    assert worker.ended(job, "the gate failed") == "failed: the gate failed"
    assert worker.study.read()[1][0].accuracy == {}


def test_a_search_is_extended(worker: StudySource, plan: Plan) -> None:
    def train_all(limit: int) -> list[StudyTrial]:
        source = StudySource(plan, worker.study, limit)
        while job := source.next():
            assert job.arguments is not None
            target = int(job.arguments[-1]) if "--pause-after" in job.arguments else 9
            write_progress(job.trial.run, target, random.Random(target), Ending(stopped=True) if target < 9 else None)
            if target == 9:
                write_json(job.trial.run.summary, summary_of(job.trial.run))
            source.ended(job, "")
        assert source.is_empty()
        return source.study.read()[1]

    first = train_all(6)
    more = train_all(12)
    assert [trial.run for trial in more[:6]] == [trial.run for trial in first]
    assert len(more) == 12
    assert sum(trial.target > 1 for trial in more) >= 4
    assert train_all(12) == more

    import optuna

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(worker.study.journal)))
    loaded = optuna.load_study(study_name=plan.name, storage=storage)
    assert len(loaded.trials) == 12
    assert loaded.best_value == max(trial.objectives[0] for trial in more if trial.objectives)


def test_another_study_in_the_folder_ends_the_worker(worker: StudySource, plan: Plan) -> None:
    with worker.study.locked():
        worker.study.define(changed(plan.definition, seed=1))
    with pytest.raises(UserError, match="holds another search now"):
        worker.next()


def test_a_source_that_fails_lets_its_trials_write_their_checkpoints(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(ListedTrials):
        def next(self) -> Job | None:
            if not self.waiting:
                raise UserError("the study is damaged")
            return super().next()

        def is_empty(self) -> bool:
            return False

        def ended(self, job: Job, failure: str) -> str:
            ended.append(failure)
            return failure

    ended: list[str] = []
    waits = "import sys, time, pathlib\nwhile not pathlib.Path(sys.argv[-1]).exists(): time.sleep(0.05)\n"
    waits += "print('runner: saved')"
    monkeypatch.setattr(local_pool, "training_command", lambda *_: ["-c", waits])
    trials = expand(("tiny",), (0,), None, ["--data", str(small_data), "--runs", str(tmp_path), *TINY], (TINY[1],))
    slots = local_pool.Slots(2, 0, 1, ())
    with pytest.raises(UserError, match="the study is damaged"):
        local_pool.train_trials(Failing(trials), slots, tmp_path / "logs", os.environ)
    assert [message.split(" (")[0] for message in ended] == ["saved"]


def test_each_slot_sees_the_gpus_of_its_ranks(tmp_path: Path) -> None:
    def visible(environ: dict[str, str], slot: int) -> str:
        slots = local_pool.Slots(3, 6, 1, (), ranks=2)
        return local_pool.Pool(ListedTrials([]), slots, tmp_path, environ)._visible_gpu(slot)["CUDA_VISIBLE_DEVICES"]

    assert [visible({}, slot) for slot in range(3)] == ["0,1", "2,3", "4,5"]
    assert visible({"CUDA_VISIBLE_DEVICES": "9,8,7,6,5,4"}, 1) == "7,6"


@pytest.mark.parametrize(
    ("cores", "count", "gpus", "expected"),
    [
        (8, 2, 0, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        (5, 2, 0, [{0, 1}, {2, 3}]),
        (2, 3, 0, [{0}, {1}, {0}]),
        (4, 1, 0, [{0, 1, 2, 3}]),
        (4, 2, 2, [{0, 1, 2, 3}] * 2),
    ],
)
def test_trials_on_the_cpu_divide_the_cores(
    cores: int, count: int, gpus: int, expected: list[set[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_pool.os, "sched_getaffinity", lambda process: set(range(cores)))
    pool = local_pool.Pool(ListedTrials([]), local_pool.Slots(count, gpus, 1, ()), tmp_path, {})
    assert [pool._cores_of(slot) for slot in range(count)] == expected


def test_a_trial_runs_on_the_cores_of_its_slot(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    program = "import os; from runner.system import environment as e; print(e.usable_cores(), os.sched_getaffinity(0))"
    pool = local_pool.Pool(ListedTrials([]), local_pool.Slots(len(cores), 0, 1, ()), tmp_path, os.environ)
    for slot, core in enumerate(cores):
        with (tmp_path / "log").open("wb") as log:
            process = pool._run(slot, ("-c", program), log)
        assert process.wait(60) == 0
        assert (tmp_path / "log").read_text() == f"1 {{{core}}}\n"


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "NAMES: expected several, or an option with a range"),
        ([LR, "log:1e-1:1e-3"], "expected a range from a lower to a higher number"),
        (["--batch-size", "log:16:64"], "--recipe.batch-size log:16:64: expected integers; use int:A:B or A|B|C"),
        ([*SPACE, "--name", "n" * 95], "expected a name that is valid for a run when -004-seed-0 is added"),
        ([DECAY, "lin:-1:1"], "--recipe.optimizer.weight-decay -1.0: expected a number >= 0.0"),
        (["--recipe.epochs", "int:1:3"], "--recipe.epochs int:1:3: expected one value"),
        ([*SPACE, "--seeds", "1", "2"], "use --seed"),
        ([*SPACE, "--pause-after", "1"], "expected no --pause-after"),
        ([*SPACE, "--resume", "never"], "expected no --resume"),
        ([*SPACE, "--max-steps", "5"], "--max-steps 5: expected no --max-steps"),
        ([*SPACE, "--no-such", "1"], "no-such"),
        ([*SPACE, "--tasks", "2"], "--tasks 2: expected --on slurm with it"),
        ([*SPACE, "--on", "slurm", "--gpus-per-node", "1", "--ranks", "2"], "--ranks 2: expected at most the 1 GPUs"),
        ([*SPACE, "--reduction", "4", "--pruner", "none"], "--reduction 4: expected --pruner asha or hyperband"),
        ([*SPACE, "--recipe.patience", "2"], "--recipe.patience 2: expected 0"),
        ([*SPACE, "--objectives", "accuracy", "latency", "--slots", "2"], "--slots 2: expected 1 with latency"),
        ([*SPACE, "--checkpoint-every", "int:1:3"], "--checkpoint-every int:1:3: expected an integer"),
        ([*SPACE, "--evaluate-every", "1|2"], "--evaluate-every 1|2: expected an integer"),
        ([*SPACE, "--partition", "x"], "--partition x: expected --on slurm with it"),
        ([*SPACE, "--on", "slurm", "--nodes", "2"], "--nodes 2: expected 1"),
        ([*SPACE, "--on", "slurm", "--container-image", "x"], "--container-image x: expected none"),
        ([*SPACE, "--on", "slurm"], "sbatch: not found"),
        ([*SPACE, "--objectives", "latency"], "expected accuracy among them"),
        ([*SPACE, "--objectives", "accuracy", "accuracy"], "expected each once"),
        ([*SPACE, "--objectives", "accuracy", "macs", "--pruner", "asha"], "--pruner asha: expected none"),
        ([*SPACE, "--first-rung", "9"], "--first-rung 9: expected fewer than the recipe's 9 epochs"),
        ([*SPACE, "--first-rung", "3", "--pruner", "none"], "--first-rung 3: expected --pruner asha or hyperband"),
        ([*SPACE, "--evaluate-every", "2"], "--evaluate-every 2: expected a divisor of every rung"),
        ([*SPACE, "--trials", "0"], "--trials 0: expected an integer >= 1"),
        ([*SPACE, "--recipe.validation", "0"], "tiny: expected images that are held out"),
        ([*SPACE, "--recipe.batch-size", "100000|60"], "--recipe.batch-size 100000"),
    ],
)
def test_invalid_input_is_refused_and_nothing_is_written(
    small_data: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    given = ["tiny", "--data", str(small_data), "--runs", str(tmp_path / "runs"), *TINY, "--device", "cpu"]
    for option, value in (("--trials", "4"), ("--recipe.validation", "60"), ("--recipe.epochs", "9")):
        given += [] if option in words else [option, value]

    def call() -> None:
        command, rest = read_command_and_rest(Search, [*given, *words], "search", search_module.searchable_options())
        command(rest, {"PATH": "/nowhere"})

    with pytest.raises(UserError) as refused:
        call()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_the_command_reports_invalid_input_in_one_line(small_data: Path, tmp_path: Path) -> None:
    done = module("launch", *searched(small_data, tmp_path / "runs", "--trials", 4, "--tasks", 2))
    assert done.returncode == 2
    assert done.stderr == "launch: --tasks 2: expected --on slurm with it\n"


def test_the_order_of_options_has_no_effect(small_data: Path, tmp_path: Path) -> None:
    one = command(small_data, tmp_path).plan(["--recipe.ema=0.9", *RANGES])
    other = command(small_data, tmp_path).plan([*reversed(RANGES), "--recipe.ema=0.9"])
    assert one.definition == other.definition
    assert list(one.space) == list(other.space)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--first-rung", "2", "--reduction", "2", "--seed", "3", "--sampler", "random", "--search-seed", "4"],
        ["--objectives", "accuracy", "macs", "--name", "mine", "--ranks", "2", "--slots", "3"],
        ["--pruner", "hyperband", "--workers", "2", "--loader", "streaming", "--checkpoint-every", "5"],
    ],
)
def test_a_worker_on_slurm_gets_what_was_asked_for(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """Its words mean the same in another folder, with NAMES after a list option and relative paths."""

    def parsed(words: list[str]) -> tuple[Search, list[str]]:
        return read_command_and_rest(Search, words, "search", search_module.searchable_options())

    monkeypatch.chdir(small_data.parent)
    given = ["--data", small_data.name, "--trials", "7", "--runs", "r", *TINY, *RANGES, "--on", "slurm", "--tasks", "2"]
    asked, options = parsed([*given, *more, "--", "tiny", "tiny-norm"])
    plan = asked.plan(options)
    words = asked.worker_args(options)
    monkeypatch.chdir(tmp_path)
    got, rest = parsed(words)
    assert got.on == "local"
    assert got.plan(rest).definition == plan.definition
    assert (got.trials, got.search_name, got.slots) == (7, asked.search_name, asked.slots)
    assert got.folder == small_data.parent / "r" / "searches" / asked.search_name


@pytest.mark.parametrize("change", [{"reduction": 1}, {"reduction": 0}, {"rungs": (0, 9)}, {"rungs": ()}])
def test_a_damaged_definition_is_refused(change: dict[str, Any]) -> None:
    """Its rungs would never end."""
    content = msgspec.json.encode(changed(DEFINITION, **change))
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(content, type=type(DEFINITION))


def test_another_search_of_the_same_name_is_refused(tmp_path: Path) -> None:
    check_same_search(DEFINITION, changed(DEFINITION), tmp_path)
    changes = {
        "the set of ranges was": {"space": {LR: "log:1e-3:1"}},
        "--search-seed was 0, now 1": {"seed": 1},
        "--seed was 0, now 1": {"train_seed": 1},
        "--first-rung, as epochs of rungs, was": {"rungs": (2, 6, 9)},
        "the set of other options was": {"options": ("--ema=0.9",)},
    }
    for message, change in changes.items():
        with pytest.raises(UserError, match=message):
            check_same_search(DEFINITION, changed(DEFINITION, **change), tmp_path)


def test_the_searches_of_the_documents_are_valid(small_data: Path) -> None:
    texts = [(ROOT / name).read_text().replace("\\\n", " ") for name in ("launch/searches.md", "slurm/README.md")]
    pattern = re.compile(r"(?:launch search|search\.sbatch) (\w[^#]*--[^#]*)")
    commands = [found[1] for text in texts for line in text.splitlines() if (found := pattern.search(line))]
    assert len(commands) >= 3
    for words in commands:
        given = shlex.split(words)
        given[given.index("--data") + 1] = str(small_data)
        asked, rest = read_command_and_rest(Search, given, "search", search_module.searchable_options())
        asked.check_own_options()
        assert asked.plan(rest).space


def test_a_dry_run_shows_the_state(small_data: Path, tmp_path: Path) -> None:
    done = module("launch", *searched(small_data, tmp_path, "--trials", 4, "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0 of 4 trials"
    assert not (tmp_path / "searches").exists()


@pytest.mark.every
def test_a_run_that_is_stopped_in_the_evaluation_before_its_pause_can_be_resumed(
    small_data: Path, tmp_path: Path
) -> None:
    words = ["train", "ending", *ENDING, "--data", small_data, "--device", "cpu", "--resume", "auto"]
    run = Run(tmp_path / "ending" / "seed-0")
    for moment in ("eval 3 0 SIGUSR1", "never 0 0 NONE"):  # the first two passes check shapes and count operations
        paused = runner(*words, "--runs", tmp_path, "--pause-after", 1, END=moment)
        assert paused.returncode == 75, paused.stderr
        evaluated = [row.epoch for row in read_metrics(run) if row.test_accuracy is not None]
        assert evaluated == ([] if "eval" in moment else [1])
    for runs in (tmp_path, tmp_path / "straight"):
        assert runner(*words, "--runs", runs).returncode == 0
    assert_same_run(run.folder, tmp_path / "straight" / "ending" / "seed-0")


def test_a_paused_run_ends_as_one_that_was_never_paused(small_data: Path, tmp_path: Path) -> None:
    words = [
        "train",
        "tiny-everything",
        *TINY,
        "--data",
        small_data,
        "--device",
        "cpu",
        "--recipe.epochs",
        4,
        "--recipe.patience",
        0,
    ]
    straight = runner(*words, "--runs", tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    for epochs in (1, 3):
        paused = runner(*words, "--runs", tmp_path / "paused", "--resume", "auto", "--pause-after", epochs)
        assert paused.returncode == 75, paused.stderr
        run = Run(tmp_path / "paused" / "tiny-everything" / "seed-0")
        assert run.state() == "stopped"
        assert read_metrics(run)[-1].epoch == epochs
    again = runner(*words, "--runs", tmp_path / "paused", "--resume", "auto", "--pause-after", 3)
    assert again.returncode == 2
    assert "--pause-after 3: expected more epochs than the 3" in again.stderr
    done = runner(*words, "--runs", tmp_path / "paused", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert_same_run(run.folder, tmp_path / "straight" / "tiny-everything" / "seed-0")
    beyond = runner(*words, "--runs", tmp_path / "other", "--pause-after", 4)
    assert (beyond.returncode, "expected fewer than the 4 epochs of the run" in beyond.stderr) == (2, True)


# ---------------------------------------------------------------------------------------------------------------------
# Real processes


@pytest.mark.every
@pytest.mark.processes
def test_a_search_of_24_trials_is_killed_twice(small_data: Path, tmp_path: Path) -> None:
    """Each trial is there once; the one that was continued last is bit-identical to a run that was never paused."""
    search = searched(small_data, tmp_path, "--trials", 24, "--slots", 3, "--checkpoint-every", 2)
    for complete, number in ((4, signal.SIGKILL), (8, signal.SIGINT), (12, signal.SIGKILL)):
        process = start("launch", *search)
        wait_until(lambda n=complete: len([t for t in found(tmp_path) if t.accuracy]) >= n, running=process)
        started = descendants_of(process.pid)
        os.kill(process.pid, number)  # and with it all that it started
        assert process.wait(900) == (75 if number == signal.SIGINT else -signal.SIGKILL)
        assert gone(started, 30)
    done = module("launch", *search)
    assert done.returncode == 0, done.stderr
    trials = assert_trained_once(tmp_path, 24)
    assert f"24 of 24 trials: {sum(t.finished for t in trials)} complete" in done.stdout
    assert sum(trial.epochs for trial in trials) < 24 * 9
    best = max((trial for trial in trials if trial.finished), key=lambda trial: max(trial.spent.values()))
    assert sorted(best.spent) == [1, 3, 9]
    options = [word for option, value in best.parameters.items() for word in (option, value)]
    # On as many cores as a trial has, because some processors sum in another order with another number of threads.
    cores = sorted(os.sched_getaffinity(0))[: Run(tmp_path / best.run).config().threads]
    words = ["taskset", "--cpu-list", ",".join(map(str, cores)), sys.executable, "-m", "runner", "train", "tiny"]
    words += ["--data", str(small_data), "--runs", str(tmp_path / "straight"), *OPTIONS, *options]
    straight = subprocess.run(words, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert straight.returncode == 0, straight.stderr
    assert_same_run(tmp_path / best.run, tmp_path / "straight" / "tiny" / "seed-0")
    again = module("launch", *search)
    assert again.returncode == 0
    assert trials_of(tmp_path) == trials, "nothing is left to do"


def found(runs: Path) -> list[StudyTrial]:
    """The trials of a search that may be starting."""
    with contextlib.suppress(UserError, ValueError):
        return trials_of(runs)
    return []


@pytest.mark.every
@pytest.mark.processes
def test_two_workers_on_two_ranks_per_trial(small_data: Path, tmp_path: Path) -> None:
    """Both ranks of a paused trial end, after the same step; the same command started twice is two workers."""
    words = searched(small_data, tmp_path, "--trials", 4, "--ranks", 2, "--reduction", 2, "--first-rung", 3)
    workers = [start("launch", *words) for _ in range(2)]
    for process in workers:
        assert process.wait(500) == 0, process.stderr and process.stderr.read()
    trials = assert_trained_once(tmp_path, 4)
    assert {trial.epochs for trial in trials} == {3, 6, 9} or {trial.epochs for trial in trials} == {3, 9}
    assert {Run(tmp_path / trial.run).config().world_size for trial in trials} == {2}
    assert not [line for line in command_lines() if str(tmp_path) in line], "a rank is left"
    (paused, *_) = [trial for trial in trials if not trial.finished]
    states = [file.name for file in Run(tmp_path / paused.run).checkpoints.glob("step-*")]
    assert len(states) >= 1
    assert Run(tmp_path / paused.run).state() == "stopped"


@pytest.mark.every
@pytest.mark.processes
def test_architectures_by_accuracy_and_latency(small_data: Path, tmp_path: Path) -> None:
    options = [*TINY, "--recipe.validation", 60, "--recipe.epochs", 1, "--recipe.batch-size", 60, "--device", "cpu"]
    words = ["search", "tiny", "tiny-wide", "--data", small_data, "--runs", tmp_path, "--trials", 9, *options]
    done = module("launch", *words, "--objectives", "accuracy", "latency", "parameters")
    assert done.returncode == 0, done.stderr
    assert "2 of 9 trials: 2 complete" in done.stdout  # all that the space has
    for trial in trials_of(tmp_path):
        run = Run(tmp_path / trial.run)
        latency, config, summary = run.read_latency(), run.config(), run.read_summary()
        assert latency is not None
        assert summary is not None
        fastest = min(row.p50_ms for row in latency.rows if row.measured and row.gate and row.batch == 1)
        assert trial.objectives == (summary.validation_accuracy, fastest, config.parameters)
