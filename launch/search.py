"""Searches for hyperparameters and architectures, here or on SLURM: `python -m launch search NAME --trials N …`.

Optuna samples the trials; each is a run of `runner train`, which is paused at rungs and continued if it is among the
best (see runner/search). Workers keep nothing in memory: any may be killed, and others started with the same command,
on other nodes too.
"""

import contextlib
import dataclasses
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from msgspec import Meta

from data_prep import manifest as manifests
from data_prep.manifest import Manifest
from launch import local_pool
from launch.local_pool import Job
from launch.plan import Resources, launcher_for
from launch.submit import Allocation, check_mounts, name_and_log, require_sbatch, sbatch
from launch.train_arguments import (
    SET_BY_JOBS,
    absolute_paths,
    check_dataset,
    check_models,
    reject_options,
    resolve_device,
    train_options,
)
from launch.trials import Trial, check_same_training, expand
from runner.common.command_line import Flag, Option, any_word, options_of, parse_words
from runner.common.console import new_table, print_table
from runner.common.errors import UserError
from runner.common.files import names_in
from runner.config.recipe import Count
from runner.config.train_config import Seed, TrainConfig, check_name
from runner.report import collect, compare
from runner.run.metrics import read_metrics
from runner.search import halving
from runner.search.halving import Pruner, Rungs
from runner.search.sampler import sample
from runner.search.space import EXPERIMENT, Choices, Domain, parse_domain, words_of
from runner.search.study import FOLDER, Definition, Objective, Sampler, Study, StudyTrial
from runner.search.summary import best_trials, cells, describe_state, titles
from runner.system import environment

ONE_NODE = Allocation()
SET_BY_SEARCHES = SET_BY_JOBS | {
    "--seeds": "a search trains each trial with one seed; use --seed",
    "--max-steps": "a search trains whole epochs; use --recipe.epochs",
    "--overwrite": "a search continues its trials; choose another --name",
    "--resume-anyway": "a search continues its trials; choose another --name",
}
MAX_ATTEMPTS = 3  # per trial
MAX_FAILURES = 3  # in a row, of different trials, after which a worker gives up
MAX_SHOWN = 10
POLL_SECONDS = 1.0  # while other workers train what the next step depends on


@dataclass(frozen=True)
class Search:
    """Search for the best values of options, by trials that are stopped early unless they are among the best.

    An option of `runner train` with a range in place of its value is searched: log:A:B and lin:A:B are numbers on a
    logarithmic or linear scale, int:A:B integers, and 'A|B|C' is a choice. All other options are passed on to
    `runner train`, the same for all trials. The same command continues a search, adds workers, or, with more --trials,
    extends it.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAMES")]
    """Experiments, grids or papers (`runner list`, `runner list --grids`), or quoted patterns of names; several are one
    more choice."""
    data: Path
    """Folder of the prepared dataset; for SLURM, on a file system shared by all nodes."""
    trials: Count
    """Number of trials of the search, in all calls together."""
    runs: Path = Path("runs")
    """Folder of runs; for SLURM, on a file system shared by all nodes. The study is in its subfolder searches/NAME."""
    on: Literal["local", "slurm"] = "local"
    """Where to train: on this machine, or on SLURM as a job array of --workers tasks, each on one node, which requeue
    and continue themselves."""
    name: str | None = None
    """Name of the search, and prefix of the names of its runs and the W&B group; by default NAMES."""
    objectives: tuple[Objective, ...] = ("accuracy",)
    """What to optimize: accuracy on the validation images, and parameters, macs, or latency, the milliseconds that the
    fastest file that passed the parity gate takes, at batch size 1 on the worker. Several give a Pareto front."""
    pruner: Pruner | None = None
    """asha stops all but the best 1/reduction of the trials at each rung, hyperband also varies the first rung, none
    trains every trial to its end. By default asha; none with several objectives, which have no order."""
    first_rung: Count | None = None
    """Epochs of the first rung; each next one has --reduction times as many. By default a ninth of the recipe's."""
    reduction: Annotated[int, Meta(ge=2, le=100)] = 3
    """One of so many trials is continued beyond a rung."""
    sampler: Sampler = "tpe"
    """tpe samples where earlier trials were good (tree-structured Parzen estimator); random does not."""
    search_seed: Seed = 0
    """Seed of the sampler: with one worker, the same search has the same trials."""
    seed: Seed = 0
    """Seed of every trial."""
    ranks: Count = 1
    """Number of processes that train a trial: GPUs of one node, or processes on the CPU."""
    slots: Count | None = None
    """Number of concurrent trials per worker; by default as many as there are GPUs for, or one on the CPU."""
    workers: Count | None = None
    """Number of tasks of the SLURM array; by default 1."""
    slurm: Annotated[Allocation, tyro.conf.arg(name="")] = ONE_NODE
    dry_run: Flag = False
    """Print the state of the search, and do nothing."""
    experiments_from: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Importable modules outside the package that define additional EXPERIMENTS or GRIDS."""

    def __call__(self, options: list[str], environ: Mapping[str, str]) -> None:
        """Trains the trials of the search, or submits workers that do.

        Raises:
            UserError: names or options are invalid, or the folder holds another search; nothing is trained.
            SystemExit: with code 1 if no trial was completed, 75 if the search was interrupted.
        """
        self.check_own_options()
        plan = self.plan(options)
        study = Study(self.folder)
        existing, trials = study.read()
        if existing is not None:
            check_same_search(existing, plan.definition, self.folder)
        if self.dry_run:
            print_state(plan.definition, trials, study.held(trials), self.trials)
            return
        if self.on == "slurm":
            require_sbatch(environ)
        if existing is None:
            plan.check_corners(self.slurm.ranks if self.on == "slurm" else 1)
            with study.locked():
                if study.read()[0] is None:
                    study.define(plan.definition)
        environ = {**environ, "WANDB_RUN_GROUP": environ.get("WANDB_RUN_GROUP", self.group)}
        if self.on == "slurm":
            self.submit(options, environ)
        else:
            self.train_here(plan, study, environ)

    def check_own_options(self) -> None:
        """Raises UserError if options of the search are invalid or exclude each other, so that none is ignored."""
        check_name(self.group)
        if len(set(self.objectives)) < len(self.objectives):
            raise UserError(f"--objectives {' '.join(self.objectives)}: expected each once")
        if "accuracy" not in self.objectives:
            raise UserError(f"--objectives {' '.join(self.objectives)}: expected accuracy among them")
        if self.pruner not in (None, "none") and len(self.objectives) > 1:
            raise UserError(f"--pruner {self.pruner}: expected none with several objectives, which have no order")
        if self.first_rung and self.chosen_pruner == "none":
            raise UserError(f"--first-rung {self.first_rung}: expected --pruner asha or hyperband with it")
        given = [
            f"--{name.replace('_', '-')} {value}"
            for name, value in dataclasses.asdict(self.slurm).items()
            if value != getattr(ONE_NODE, name)
        ] + ([f"--workers {self.workers}"] if self.workers else [])
        if self.on == "local" and given:
            raise UserError(f"{given[0]}: expected --on slurm with it")
        if self.slurm.container_image:
            raise UserError(f"--container-image {self.slurm.container_image}: expected none; a search runs without")
        if self.slurm.nodes > 1:
            raise UserError(f"--nodes {self.slurm.nodes}: expected 1; a trial uses one node, and --workers adds nodes")

    def plan(self, options: Sequence[str]) -> "Plan":
        """Returns the definition of the search, and what its trials are built from.

        Raises:
            UserError: names or options are invalid.
        """
        line = parse_words(options, lenient_options())
        reject_options_of(line.words(), SET_BY_SEARCHES)
        space: dict[str, Domain] = {}
        for option, parsed in list(line.options.items()):
            if len(parsed.values) == 1 and (domain := parse_domain(option, parsed.values[0])):
                space[option] = domain
                del line.options[option]
        for option in ("--recipe.epochs", "--recipe.validation"):
            if option in space:
                raise UserError(f"{option} {space[option]}: expected one value, because trials are compared by it")
        modules = ["--experiments-from", *self.experiments_from] if self.experiments_from else []
        fixed = line.words()
        arguments = train_options(self.data, self.runs, [*modules, *fixed], resume=True)
        if self.on == "local":
            arguments = resolve_device(arguments, environment.count_gpus())
        first = {option: domain.samples[0] for option, domain in space.items()}
        words = [f"{option}={word}" for option, word in first.items()]
        experiments = [
            t.config.experiment for t in expand(self.names, (0,), "x", [*arguments, *words], self.experiments_from)
        ]
        if len(experiments) > 1:
            space = {EXPERIMENT: Choices(tuple(experiments)), **space}
        if not space:
            raise UserError(
                "expected an option with a range, such as --recipe.optimizer.lr log:1e-3:1e-1, or several NAMES"
            )
        manifest = manifests.read(self.data)
        plan = Plan(self, tuple(arguments), tuple(experiments), space, manifest, ())
        configs = {name: plan.trial("check", {**first, EXPERIMENT: name}).config for name in experiments}
        epochs = {config.recipe.epochs for config in configs.values()}
        if len(epochs) > 1:
            found = ", ".join(map(str, sorted(epochs)))
            raise UserError(f"NAMES: expected experiments of as many epochs, found {found}; add --recipe.epochs")
        for name, config in configs.items():
            if not config.recipe.validation:
                raise UserError(
                    f"{name}: expected images that are held out to compare trials; add --recipe.validation 5000"
                )
        (count,) = epochs
        every = next(iter(configs.values())).evaluate_every
        rungs = Rungs.of(self.chosen_pruner, count, self.first_rung or max(1, count // 9), self.reduction).epochs
        if odd := [epoch for epoch in rungs[:-1] if epoch % every]:
            raise UserError(
                f"--evaluate-every {every}: expected a divisor of the rungs, found a rung after {odd[0]} epochs"
            )
        if self.first_rung and self.first_rung >= count:
            raise UserError(f"--first-rung {self.first_rung}: expected fewer than the recipe's {count} epochs")
        return replace(plan, fixed=tuple(absolute_paths(fixed)), rungs=rungs)

    @property
    def chosen_pruner(self) -> Pruner:
        """The pruner, given or by default."""
        return self.pruner or ("asha" if len(self.objectives) == 1 else "none")

    @property
    def group(self) -> str:
        """The name of the search."""
        return self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", "+".join(self.names))[:80]

    @property
    def folder(self) -> Path:
        """The folder of the study and the logs."""
        return self.runs / FOLDER / self.group

    def train_here(self, plan: "Plan", study: Study, environ: Mapping[str, str]) -> None:
        """Trains trials on this machine until none is left, and prints the best ones.

        Raises:
            UserError: several trials in a row failed.
            SystemExit: see `__call__`.
        """
        gpus, cores = environment.count_gpus(), environment.usable_cores()
        if plan.trial("check", plan.first_words).config.device == "cpu":
            gpus = 0
        elif self.ranks > gpus:
            raise UserError(f"--ranks {self.ranks}: expected at most the {gpus} GPUs of this machine")
        count = self.slots or gpus // self.ranks or 1
        launcher = launcher_for(Resources(min(gpus, self.ranks), cores))
        if not gpus:
            launcher = ("--config_file", "launch/cpu.yaml", "--num_processes", str(self.ranks))
        slots = local_pool.Slots(count, gpus, max(1, cores // (count * self.ranks)), launcher, self.ranks)
        source = StudySource(plan, study)
        with contextlib.closing(source):
            interrupted = local_pool.train_trials(source, slots, self.folder / "logs", environ)
        _, trials = study.read()
        print_state(plan.definition, trials, study.held(trials), self.trials)
        if source.failures >= MAX_FAILURES:
            raise UserError(f"{self.folder}: {source.failures} trials in a row failed; see {self.folder / 'logs'}")
        if interrupted:
            raise SystemExit(75)
        if not any(trial.state == "complete" for trial in trials):
            raise SystemExit(1)

    def submit(self, options: Sequence[str], environ: Mapping[str, str]) -> None:
        """Submits an array of workers. Raises UserError if SLURM refuses it."""
        words = self.worker_words(options)
        check_mounts(self.slurm, words, self.runs, environ)
        command = ["sbatch", "--parsable", *name_and_log(self.group, self.runs, "%A_%a"), *self.slurm.options()]
        command += [f"--array=0-{(self.workers or 1) - 1}", "slurm/search.sbatch", *words]
        job = sbatch(command, self.runs, environ)
        print(f"job {job}, an array of {self.workers or 1}; logs: {self.runs / 'slurm'}")

    def worker_words(self, options: Sequence[str]) -> list[str]:
        """Returns the arguments of `launch search` for a worker on a node."""
        own: dict[str, Any] = {"data": self.data.absolute(), "runs": self.runs.absolute(), "name": self.group}
        words = list(self.names)
        for field in dataclasses.fields(self):
            value = own.get(field.name, getattr(self, field.name))
            if field.name in ("names", "on", "workers", "slurm", "dry_run") or value in (None, field.default):
                continue
            option = f"--{field.name.replace('_', '-')}"
            if field.name == "experiments_from":
                words += [f"{option}={module}" for module in value]
            else:
                words += [option, *map(str, value if isinstance(value, tuple) else (value,))]
        return [*words, *absolute_ranges(options)]


@dataclass(frozen=True)
class Plan:
    """A search whose options are checked, and what its trials are built from.

    Attributes:
        search: the options of the search.
        arguments: the arguments of `runner train` that all trials share.
        experiments: the experiments.
        space: the ranges, by option.
        manifest: the dataset.
        rungs: the epochs of the rungs.
        fixed: the options of `runner train` that the user gave, without ranges.
    """

    search: Search
    arguments: tuple[str, ...]
    experiments: tuple[str, ...]
    space: dict[str, Domain]
    manifest: Manifest
    rungs: tuple[int, ...]
    fixed: tuple[str, ...] = ()

    @property
    def definition(self) -> Definition:
        """The definition of the study."""
        search = self.search
        return Definition(
            names=self.experiments,
            space={option: str(domain) for option, domain in self.space.items()},
            options=self.fixed,
            objectives=search.objectives,
            sampler=search.sampler,
            seed=search.search_seed,
            pruner=search.chosen_pruner,
            rungs=self.rungs,
            reduction=search.reduction,
            train_seed=search.seed,
            ranks=search.ranks,
            dataset=self.manifest.fingerprint,
        )

    @property
    def first_words(self) -> dict[str, str]:
        """The first value of each range."""
        return {option: domain.samples[0] for option, domain in self.space.items()}

    def trial(self, name: str, words: Mapping[str, str]) -> Trial:
        """Returns the trial with these values. Raises UserError if `runner train` would refuse them."""
        experiment = words.get(EXPERIMENT, self.experiments[0])
        own = [f"{option}={word}" for option, word in words.items() if option != EXPERIMENT]
        modules = self.search.experiments_from
        (trial,) = expand([experiment], (self.search.seed,), name, [*self.arguments, *own], modules)
        return trial

    def stored(self, trial: StudyTrial) -> Trial:
        """Returns a trial of the study as a run."""
        return self.trial(self.run_name(trial.number), trial.parameters)

    def run_name(self, number: int) -> str:
        """Returns the name of a trial's run, without the seed."""
        return f"{self.search.group}-{number:03d}"

    def check_corners(self, ranks: int) -> None:
        """Checks the ends of each range and all choices, one at a time, for each experiment.

        Raises:
            UserError: `runner train` would refuse a trial.
        """
        ranks = max(ranks, self.search.ranks)
        for name in self.experiments:
            first = self.first_words | {EXPERIMENT: name}
            changes: list[dict[str, str]] = [{}] + [
                {option: word} for option, domain in self.space.items() for word in domain.samples[1:]
            ]
            for change in changes if len(self.experiments) == 1 else [c for c in changes if EXPERIMENT not in c]:
                trial = self.trial("check", first | change)
                try:
                    check_dataset(trial.config, self.manifest, ranks)
                    if not change or any(option.startswith("--architecture") for option in change):
                        check_models(trial.config, self.manifest)
                except UserError as error:
                    shown = " ".join(f"{option} {word}" for option, word in (first | change).items())
                    raise UserError(f"{shown}: {error}") from None


def lenient_options() -> dict[str, Option]:
    """Returns the options of `runner train`, each of which accepts a range in place of its value."""
    return {
        spelling: replace(option, accepts=any_word) if option.nargs == 1 else option
        for spelling, option in options_of(TrainConfig).items()
    }


def reject_options_of(words: Sequence[str], reasons: Mapping[str, str]) -> None:
    """Raises UserError if a reserved option is given; unlike `reject_options`, ranges may stand among the words."""
    line = parse_words(words, lenient_options())
    line.options = {name: option for name, option in line.options.items() if name in reasons}
    reject_options(line.words(), reasons)


def absolute_ranges(options: Sequence[str]) -> list[str]:
    """Makes the paths in options absolute, and leaves ranges as they are."""
    line = parse_words(options, lenient_options())
    ranges = {name for name, option in line.options.items() if option.values and parse_domain(name, option.values[0])}
    words = [f"{name}={line.options[name].values[0]}" for name in ranges]
    line.options = {name: option for name, option in line.options.items() if name not in ranges}
    return [*sorted(words), *absolute_paths(line.words())]


def check_same_search(existing: Definition, asked: Definition, folder: Path) -> None:
    """Raises UserError if a folder holds a search of something else."""
    different = [field for field in existing.__struct_fields__ if getattr(existing, field) != getattr(asked, field)]
    if different:
        first = different[0]
        found, expected = getattr(existing, first), getattr(asked, first)
        raise UserError(
            f"{folder}: holds a search with a different {', '.join(different)}, such as {first} {found} instead of "
            f"{expected}; choose another --name"
        )


class StudySource:
    """Source of the trials of a study, some of which are continued: a worker."""

    def __init__(self, plan: Plan, study: Study) -> None:
        self.plan, self.study = plan, study
        self.definition = plan.definition
        self.limit = plan.search.trials
        self.claims: dict[str, tuple[int, int, contextlib.ExitStack]] = {}
        self.failures = 0
        self.look_again = 0.0
        self.closed = self.done = False

    def next(self) -> Job | None:
        """Returns the next job; None if there is none at present."""
        if self.closed or self.done or time.monotonic() < self.look_again:
            return None
        with self.study.locked():
            while True:
                _, trials = self.study.read()
                held = self.study.held(trials)
                step = halving.next_step(trials, held, self.definition.schedule, self.limit)
                if step == "new":
                    if not self._add(trials):
                        self.limit = len(trials)  # the space has no other
                elif step == "done":
                    self.done = True
                    return None
                elif step == "wait":
                    self.look_again = time.monotonic() + POLL_SECONDS
                    return None
                elif job := self._start(trials[step.number], step.target):
                    return job

    def _add(self, trials: Sequence[StudyTrial]) -> bool:
        """Samples a trial; returns False if all of the space are there already."""
        space = self.plan.space
        values = sample(self.definition, space, trials)
        if values is None:
            return False
        number, words = len(trials), words_of(space, values)
        run = self.plan.trial(self.plan.run_name(number), words)
        target = self.definition.schedule.of_trial(number)[0]
        self.study.add(StudyTrial(number=number, run=run.id, parameters=words, values=values, target=target), space)
        return True

    def _start(self, stored: StudyTrial, target: int) -> Job | None:
        """Claims a trial and returns its job; returns None if it has already been trained up to the target."""
        if stored.target != target:
            self.study.set_target(stored.number, target)
        trial = self.plan.stored(stored)
        seed, manifest = trial.config.all_seeds[0], self.plan.manifest
        check_same_training(trial.run, seed, trial.config, manifest.fingerprint)
        if self._record(stored.number, target, trial):
            return None
        claim = contextlib.ExitStack()
        claim.enter_context(self.study.claim(stored.number))
        self.claims[trial.id] = (stored.number, target, claim)
        is_last = target == self.definition.rungs[-1]
        arguments = (*trial.arguments, *(() if is_last else ("--pause-after", str(target))))
        is_trained = trial.state() == "complete"
        return Job(trial, None if is_trained else arguments, self._measurements(trial) if is_last else ())

    def _measurements(self, trial: Trial) -> tuple[tuple[str, ...], ...]:
        """Returns the commands that measure the latency of a complete run, if it is an objective."""
        if "latency" not in self.definition.objectives:
            return ()
        folder = str(trial.run.folder.absolute())
        modules = [word for module in self.plan.search.experiments_from for word in ("--experiments-from", module)]
        commands = (["export", "--precision", "fp32"], ["parity"], ["bench", "--batch", "1"])
        return tuple(("-m", "runner", command[0], folder, *command[1:], *modules) for command in commands)

    def ended(self, job: Job, failure: str) -> str:
        """Stores what a trial has reached, and releases it; returns that in one line."""
        number, target, claim = self.claims.pop(job.trial.id)
        with claim, self.study.locked():
            reached = self._record(number, target, job.trial)
            if reached:
                self.failures = 0
                return reached
            ending = job.trial.run.read_ending()
            if self.closed or (ending and ending.stopped):
                return f"stopped: {ending.reason}" if ending else f"stopped: {failure}"
            reason = ending.reason if ending else failure
            _, trials = self.study.read()
            is_final = (ending is not None and ending.diverged) or trials[number].attempts + 1 >= MAX_ATTEMPTS
            self.study.fail(number, reason, is_final)
            if not (ending and ending.diverged):
                self.failures += 1
                self.closed = self.closed or self.failures >= MAX_FAILURES
            return f"failed: {reason}"

    def _record(self, number: int, target: int, trial: Trial) -> str:
        """Stores the accuracies of a trial that has reached its target; returns "" for one that has not."""
        rows = [row for row in read_metrics(trial.run) if row.validation_accuracy is not None]
        accuracy = {int(row.epoch): row.validation_accuracy or 0.0 for row in rows if row.epoch == int(row.epoch)}
        summary = trial.run.read_summary() if trial.state() == "complete" else None
        if summary:
            objectives = self._objectives(trial, summary.validation_accuracy or 0.0)
            if objectives is None:
                return ""
            if len(self.definition.objectives) == 1 or accuracy:
                self.study.report(number, accuracy)
            self.study.complete(number, objectives)
            return f"{summary.validation_accuracy:.2%} validation accuracy"
        steps = [row.global_step for row in rows if row.epoch == target]
        saved = [
            int(name.removeprefix("step-")) for name in names_in(trial.run.checkpoints) if name.startswith("step-")
        ]
        if not steps or not any(step >= steps[0] for step in saved) or trial.state() == "running":
            return ""
        self.study.report(number, {epoch: value for epoch, value in accuracy.items() if epoch <= target})
        return f"{accuracy[target]:.2%} validation accuracy after {target} epochs"

    def _objectives(self, trial: Trial, accuracy: float) -> list[float] | None:
        """Returns the objectives of a complete run; None if its latency is not measured."""
        found: dict[Objective, Any] = {"accuracy": accuracy}
        if {"parameters", "macs"} & {*self.definition.objectives}:
            config = trial.run.config()
            found |= {"parameters": config.parameters, "macs": config.macs}
        if "latency" in self.definition.objectives:
            best = compare.best_gated(compare.run_row(collect.read(trial.run)))
            found["latency"] = best.p50_ms if best else None
        values = [found[objective] for objective in self.definition.objectives]
        return None if None in values else [float(value) for value in values]

    def is_empty(self) -> bool:
        """Returns whether the search has ended, or this worker gives up."""
        return self.done or self.closed

    def close(self) -> None:
        """Starts no more trials, and releases those whose outcome is not known."""
        self.closed = True

    @property
    def remaining(self) -> str:
        """How many trials the search has."""
        return f"a search of {self.limit} trials"


def print_state(definition: Definition, trials: Sequence[StudyTrial], held: frozenset[int], limit: int) -> None:
    """Prints the best trials, or the Pareto front, and how many trials are in which state."""
    best = best_trials(definition, trials)[:MAX_SHOWN]
    table = new_table(*titles(definition))
    for trial in best:
        table.add_row(*cells(definition, trial))
    if best:
        print_table(table)
    counts = Counter(describe_state(trial, held) for trial in trials)
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    spent, whole = halving.epochs_spent(trials), len(trials) * definition.rungs[-1]
    print(f"{len(trials)} of {limit} trials" + (f": {states}; {spent} of {whole} epochs" if trials else ""))
