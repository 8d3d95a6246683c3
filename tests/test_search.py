"""`python -m launch search`: each trial is sampled, paused and continued once, whatever is killed meanwhile."""

import contextlib
import math
import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from launch import search as search_module
from launch.search import Search, StudySource, check_same_search
from runner.benchmarks import search as replays
from runner.benchmarks import tables
from runner.common.command_line import read_command_and_rest
from runner.common.errors import UserError
from runner.common.files import read, write
from runner.run.folder import Run
from runner.run.metrics import encode_row, read_metrics
from runner.run.schema import Ending, MetricRow
from runner.search import space as spaces
from runner.search.halving import Rungs, Train, next_step
from runner.search.sampler import importance, sample
from runner.search.space import Choices, Range, parse_domain
from runner.search.study import Definition, Study, StudyTrial, find_studies
from runner.search.summary import best_trials, describe_state
from tests.support.compare import assert_same_run
from tests.support.configs import CONFIG
from tests.support.processes import (
    TINY,
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
     "a|a", "int:3:3", "log:1.00001:1.00002", "lin:0.123456:1"],
)  # fmt: skip
def test_what_is_no_range_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="expected"):
        parse_domain(LR, word)


@given(st.sampled_from(["log", "lin"]), st.integers(1, 9999), st.integers(1, 9999), st.floats(0, 1))
def test_sampled_numbers_are_those_of_the_command_line(scale: str, one: int, other: int, share: float) -> None:
    """The sampler is told the number that was trained, which is within the range."""
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
    rungs = Rungs.of(pruner, epochs, first, reduction)  # type: ignore[arg-type]
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
        assert trial.target in trial.accuracy, "a trial that was begun is left at no rung"
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
    return StudyTrial(number=number, run=f"tiny/t-{number}", parameters=words, values=values, target=1, **more)  # type: ignore[arg-type]


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


def test_a_search_is_near_the_best_of_the_committed_grid_for_a_fraction_of_its_epochs() -> None:
    result = read(tables.RESULTS / "search-cpu.json", replays.Result)
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
        write(run.run_json, CONFIG)
        with study.locked():
            study.add(trial, definition.domains)
            study.report(number, {int(row.epoch): row.validation_accuracy or 0 for row in read_metrics(run)})
            study.complete(number, [0.5])
    out = tmp_path / "search.json"
    replays.Replay(study.folder, seeds=3, json=out, picture=tmp_path / "search.png")()
    result = read(out, replays.Result)
    assert [method.budgets[-1].median for method in result.methods.values()][:2] == [0.0, 0.0], "all is trained"
    assert {name: method.spent for name, method in result.methods.items()}["random"] == 1
    assert (tmp_path / "search.png").read_bytes()[:4] == b"\x89PNG"
    assert "TPE + ASHA" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Workers, with trials that are written instead of trained


@pytest.fixture
def plan(small_data: Path, tmp_path: Path) -> search_module.Plan:
    command = Search(("tiny",), small_data, 12, tmp_path / "runs", experiments_from=(TINY[1],))
    options = ["--device=cpu", "--recipe.validation=60", "--recipe.epochs=9", f"{LR}=log:1e-3:1e-1", f"{DECAY}=0|1e-4"]
    return command.plan(options)


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
        write(run.ended, ending)


def test_workers_share_a_study_and_any_may_be_killed(plan: search_module.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers, which are killed at random: every trial reaches its rungs once, and none is trained by two."""
    monkeypatch.setattr(search_module, "POLL_SECONDS", 0.0)
    study, luck = Study(plan.search.folder), random.Random(0)
    with study.locked():
        study.define(plan.definition)
    monkeypatch.setattr(search_module, "check_same_training", lambda *_: None)
    workers = [StudySource(plan, study) for _ in range(3)]
    jobs: list[search_module.Job | None] = [None] * 3
    epochs: dict[str, int] = {}
    kills = 0
    while not all(worker.is_empty() for worker in workers):
        index = luck.randrange(3)
        job = jobs[index]
        if job is None:
            jobs[index] = workers[index].next()
            continue
        running = [other.trial.id for other in jobs if other]
        assert len(set(running)) == len(running)
        assert job.arguments is not None
        options = dict(zip(job.arguments, job.arguments[1:], strict=False))
        target = int(options.get("--pause-after", 9))
        if luck.random() < 0.3:  # killed, after some epochs
            write_progress(job.trial.run, luck.randrange(epochs.get(job.trial.id, 0), target), luck, None)
            for _, _, claim in workers[index].claims.values():
                claim.close()  # as the end of the process would
            workers[index], jobs[index] = StudySource(plan, study), None
            kills += 1
            continue
        write_progress(job.trial.run, target, luck, Ending(stopped=True) if target < 9 else None)
        if target == 9:
            write(job.trial.run.summary, summary_of(job.trial.run))
        epochs[job.trial.id] = target
        assert "validation accuracy" in workers[index].ended(job, "")
        jobs[index] = None
    _, trials = study.read()
    assert kills >= 3
    assert [trial.number for trial in trials] == list(range(12))
    assert len({trial.run for trial in trials}) == 12
    assert {describe_state(trial, frozenset()) for trial in trials} == {"complete", "paused"}
    for trial in trials:
        rows = [int(row.epoch) for row in read_metrics(Run(plan.search.runs / trial.run))]
        assert rows == list(range(1, trial.epochs + 1))
        assert [trial.spent[epoch] for epoch in sorted(trial.spent)] == sorted(trial.spent.values())
    assert max(max(trial.spent.values()) for trial in trials) == sum(trial.epochs for trial in trials) < 12 * 9 / 2


def summary_of(run: Run) -> object:
    from runner.run.schema import Summary

    rows = read_metrics(run)
    return Summary(
        experiment="tiny", run=run.folder.name, dataset="x", seed=0, epochs=9.0, steps=90, test_accuracy=0.5,
        test_loss=1.0, test_top5=0.9, test_calibration_error=0.0, test_images=10, best_epoch=9.0,
        validation_accuracy=rows[-1].validation_accuracy, class_accuracy=[0.5], confusion=[[10]],
    )  # fmt: skip


@pytest.fixture
def worker(plan: search_module.Plan, monkeypatch: pytest.MonkeyPatch) -> StudySource:
    monkeypatch.setattr(search_module, "check_same_training", lambda *_: None)
    study = Study(plan.search.folder)
    with study.locked():
        study.define(plan.definition)
    return StudySource(plan, study)


def test_a_trial_that_diverged_is_not_tried_again(worker: StudySource) -> None:
    for number in range(2 * search_module.MAX_FAILURES):
        job = worker.next()
        assert job is not None
        write_progress(job.trial.run, 0, random.Random(0), Ending(stopped=False, reason="not finite", diverged=True))
        assert worker.ended(job, "") == "failed: not finite"
        trial = worker.study.read()[1][number]
        assert (trial.state, trial.reason) == ("failed", "not finite")
    assert not worker.is_empty()


def test_a_worker_gives_up_where_nothing_can_be_trained(worker: StudySource) -> None:
    for _ in range(search_module.MAX_FAILURES):
        assert not worker.is_empty()
        job = worker.next()
        assert job is not None
        assert worker.ended(job, "no such file") == "failed: no such file"
    assert worker.is_empty()
    (trial,) = worker.study.read()[1]
    assert (trial.state, trial.attempts, trial.reason) == ("failed", 3, "no such file")


def test_a_stopped_trial_is_continued_first(worker: StudySource, plan: search_module.Plan) -> None:
    job = worker.next()
    assert job is not None
    worker.close()
    write_progress(job.trial.run, 0, random.Random(0), Ending(stopped=True, reason="asked to stop"))
    assert worker.ended(job, "") == "stopped: asked to stop"
    assert worker.study.read()[1][0].attempts == 0
    again = StudySource(plan, worker.study).next()
    assert again is not None
    assert again.trial.id == job.trial.id


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected an option with a range"),
        ([LR, "log:1e-1:1e-3"], "expected a range from a lower to a higher number"),
        ([DECAY, "lin:-1:1"], "--recipe.optimizer.weight-decay -1.0: expected a number >= 0.0"),
        (["--recipe.epochs", "int:1:3"], "--recipe.epochs int:1:3: expected one value"),
        ([*SPACE, "--seeds", "1", "2"], "use --seed"),
        ([*SPACE, "--pause-after", "1"], "expected no --pause-after"),
        ([*SPACE, "--resume", "never"], "expected no --resume"),
        ([*SPACE, "--max-steps", "5"], "--max-steps 5: expected no --max-steps"),
        ([*SPACE, "--no-such", "1"], "no-such"),
        ([*SPACE, "--workers", "2"], "--workers 2: expected --on slurm with it"),
        ([*SPACE, "--partition", "x"], "--partition x: expected --on slurm with it"),
        ([*SPACE, "--on", "slurm", "--nodes", "2"], "--nodes 2: expected 1"),
        ([*SPACE, "--on", "slurm", "--container-image", "x"], "--container-image x: expected none"),
        ([*SPACE, "--on", "slurm"], "sbatch: not found"),
        ([*SPACE, "--objectives", "latency"], "expected accuracy among them"),
        ([*SPACE, "--objectives", "accuracy", "accuracy"], "expected each once"),
        ([*SPACE, "--objectives", "accuracy", "macs", "--pruner", "asha"], "--pruner asha: expected none"),
        ([*SPACE, "--first-rung", "9"], "--first-rung 9: expected fewer than the recipe's 9 epochs"),
        ([*SPACE, "--first-rung", "3", "--pruner", "none"], "--first-rung 3: expected --pruner asha or hyperband"),
        ([*SPACE, "--evaluate-every", "2"], "--evaluate-every 2: expected a divisor of the rungs"),
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
        command, rest = read_command_and_rest(Search, [*given, *words], "search", search_module.lenient_options())
        command(rest, {"PATH": "/nowhere"})

    with pytest.raises(UserError) as refused:
        call()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_the_command_reports_invalid_input_in_one_line(small_data: Path, tmp_path: Path) -> None:
    done = module("launch", *searched(small_data, tmp_path / "runs", "--trials", 4, "--workers", 2))
    assert done.returncode == 2
    assert done.stderr == "launch: --workers 2: expected --on slurm with it\n"


def test_another_search_of_the_same_name_is_refused(tmp_path: Path) -> None:
    check_same_search(DEFINITION, changed(DEFINITION), tmp_path)
    for change in ({"space": {LR: "log:1e-3:1"}}, {"seed": 1}, {"rungs": (2, 6, 9)}, {"options": ("--ema=0.9",)}):
        with pytest.raises(UserError, match=next(iter(change))):
            check_same_search(DEFINITION, changed(DEFINITION, **change), tmp_path)  # type: ignore[arg-type]


def test_a_dry_run_shows_the_state(small_data: Path, tmp_path: Path) -> None:
    done = module("launch", *searched(small_data, tmp_path, "--trials", 4, "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0 of 4 trials"
    assert not (tmp_path / "searches").exists()


def test_a_paused_run_is_the_run_that_never_was(small_data: Path, tmp_path: Path) -> None:
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
    assert (beyond.returncode, "expected fewer than its 4 epochs" in beyond.stderr) == (2, True)


# ---------------------------------------------------------------------------------------------------------------------
# Real processes


@pytest.mark.every
@pytest.mark.processes
@pytest.mark.timeout(900)
def test_a_search_of_24_trials_is_killed_twice(small_data: Path, tmp_path: Path) -> None:
    """Each trial is there once, and the one that was continued last is, to the bit, a run that was never paused."""
    words = searched(small_data, tmp_path, "--trials", 24, "--slots", 3, "--checkpoint-every", 2)
    for complete in (4, 12):
        process = start("launch", *words)
        wait_until(lambda n=complete: len([t for t in found(tmp_path) if t.accuracy]) >= n, 400, process)
        started = descendants_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)  # and with it all that it started
        process.wait()
        assert gone(started, 30)
    done = module("launch", *words, timeout=800)
    assert done.returncode == 0, done.stderr
    trials = assert_trained_once(tmp_path, 24)
    assert f"24 of 24 trials: {sum(t.finished for t in trials)} complete" in done.stdout
    assert sum(trial.epochs for trial in trials) < 0.5 * 24 * 9
    best = max((trial for trial in trials if trial.finished), key=lambda trial: max(trial.spent.values()))
    assert sorted(best.spent) == [1, 3, 9]
    options = [word for option, value in best.parameters.items() for word in (option, value)]
    straight = runner("train", "tiny", "--data", small_data, "--runs", tmp_path / "straight", *OPTIONS, *options)
    assert straight.returncode == 0, straight.stderr
    assert_same_run(tmp_path / best.run, tmp_path / "straight" / "tiny" / "seed-0")
    again = module("launch", *words)
    assert again.returncode == 0
    assert trials_of(tmp_path) == trials, "nothing is left to do"


def found(runs: Path) -> list[StudyTrial]:
    """The trials of a search that may be starting."""
    with contextlib.suppress(UserError, ValueError):
        return trials_of(runs)
    return []


@pytest.mark.every
@pytest.mark.processes
@pytest.mark.timeout(600)
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
@pytest.mark.timeout(600)
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
