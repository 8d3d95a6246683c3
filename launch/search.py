"""Searches for hyperparameters and architectures, here or on SLURM: `python -m launch search NAME --trials N …`.

Optuna samples the trials; each is a run of `runner train`, which is paused at rungs and continued if it is among the
best (see runner/search). Workers are stateless: any may be killed, and the same command starts more, also on other
nodes.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from msgspec import Meta

from data_prep import manifest as manifests
from launch import local_pool
from launch.plan import Resources, launcher_for
from launch.search_worker import MAX_FAILURES, Plan, StudySource
from launch.submit import Allocation, name_and_log, require_sbatch, sbatch
from launch.train_arguments import (
    SET_BY_JOBS,
    WEIGHTS,
    absolute_paths,
    reject_options,
    resolve_device,
    train_options,
)
from launch.trials import expand
from runner.common.command_line import NUMBERS, CommandLine, Flag, Option, any_word, options_of, parse_words
from runner.common.console import new_table, print_table
from runner.common.errors import UserError
from runner.config.recipe import Count
from runner.config.train_config import Seed, TrainConfig, check_name
from runner.search.halving import Pruner, Rungs
from runner.search.space import EXPERIMENT, Choices, Domain, Range, parse_domain
from runner.search.study import FOLDER, Definition, Objective, Sampler, Study, StudyTrial
from runner.search.summary import best_trials, cells, count_states, epochs_trained, titles
from runner.system import environment

DEFAULT_ALLOCATION = Allocation()
REDUCTION = 3
DEFINED_BY = {  # the option of each field of a definition that has another name
    "names": "NAMES",
    "space": "the set of ranges",
    "options": "the set of other options",
    "seed": "--search-seed",
    "train_seed": "--seed",
    "rungs": "--first-rung, as epochs of rungs,",
    "dataset": "the dataset",
}
SEARCHABLE_PREFIXES = ("--recipe.", "--architecture.")  # options that may have a range
SET_BY_SEARCHES = SET_BY_JOBS | {
    "--seeds": "a search trains each trial with one seed; use --seed",
    "--pause-after": "a search pauses trials at its rungs; use --first-rung",
    "--max-steps": "a search trains whole epochs; use --recipe.epochs",
    "--overwrite": "a search continues its trials; choose another --name",
    "--resume-anyway": "a search continues its trials; choose another --name",
}


@dataclass(frozen=True)
class Search:
    """Search for the best option values; stop all but the best trials early.

    - A --recipe.… or --architecture.… option takes a range in place of a value:
    - log:A:B (log-uniform), lin:A:B (uniform), int:A:B (integers) or 'A|B|C'.
    - All other options are passed on to `runner train`, the same for all trials.
    - The same command continues a search, adds workers, or adds --trials.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAMES")]
    """Experiments, grids or papers (`runner list`, `runner list --grids`), or quoted patterns of names; if there are
    several, the experiment is searched as well."""
    data: Path
    """Folder of the prepared dataset; for SLURM, on a file system shared by all nodes."""
    trials: Count
    """Number of trials of the search, in all calls together."""
    runs: Path = Path("runs")
    """Folder of runs; for SLURM, on a file system shared by all nodes. The study is in its subfolder searches/NAME."""
    on: Literal["local", "slurm"] = "local"
    """Where to train: on this machine, or on SLURM as a job array of --tasks workers, each on one node, which requeue
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
    """Epochs of the first rung; each later one has --reduction times as many. By default a ninth of the recipe's."""
    reduction: Annotated[int, Meta(ge=2, le=100)] | None = None
    """Reduction factor: one in so many trials is continued beyond a rung; by default 3."""
    sampler: Sampler = "tpe"
    """tpe samples where earlier trials were good (tree-structured Parzen estimator); random samples uniformly."""
    search_seed: Seed = 0
    """Seed of the sampler: with one worker, the same search has the same trials."""
    seed: Seed = 0
    """Seed of every trial."""
    ranks: Count = 1
    """Number of processes that train a trial: GPUs of one node, or processes on the CPU."""
    slots: Count | None = None
    """Number of concurrent trials per worker; by default as many as the GPUs allow; one on the CPU and with
    latency. On the CPU, each has its share of the cores."""
    tasks: Count | None = None
    """Number of tasks of the SLURM array, each of which is a worker; by default 1."""
    slurm: Annotated[Allocation, tyro.conf.arg(name="")] = DEFAULT_ALLOCATION
    dry_run: Flag = False
    """Print the state of the search without training anything."""
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
        if trials:
            # The state may be shown on a machine without a GPU.
            shown = replace(plan.definition, device="") if self.dry_run else plan.definition
            check_same_search(existing, shown, self.folder)
        if self.dry_run:
            print_state(plan.definition, trials, study.held(trials), self.trials)
            return
        if self.on == "slurm":
            require_sbatch(environ)
        slots = self.slots_here(plan) if self.on == "local" else None
        if not trials:
            plan.check_values()
        with study.locked():
            existing, trials = study.read()
            if trials and existing:  # another worker may have started meanwhile
                check_same_search(existing, plan.definition, self.folder)
                plan = dataclasses.replace(plan, definition=existing)
            elif existing != plan.definition:
                study.define(plan.definition)
        environ = {**environ, "WANDB_RUN_GROUP": environ.get("WANDB_RUN_GROUP", self.search_name)}
        if slots is None:
            self.submit(options, environ)
        else:
            self.train_here(plan, study, slots, environ)

    def check_own_options(self) -> None:
        """Raises UserError if options of the search are invalid or exclude each other, so that none is ignored."""
        longest = f"{self.search_name}-{self.trials:03d}-seed-{self.seed}"  # name of a run
        try:
            check_name(longest)
        except UserError:
            expected = f"a name that is valid for a run when {longest[len(self.search_name) :]} is added"
            raise UserError(f"--name {self.search_name!r}: expected {expected}; choose a --name") from None
        if self.on == "slurm":
            name_and_log(self.search_name, self.runs, "%A_%a")
        objectives = f"--objectives {' '.join(self.objectives)}"
        if len(set(self.objectives)) < len(self.objectives):
            raise UserError(f"{objectives}: expected each once")
        if "accuracy" not in self.objectives:
            raise UserError(f"{objectives}: expected accuracy among them")
        if self.pruner not in (None, "none") and len(self.objectives) > 1:
            raise UserError(f"--pruner {self.pruner}: expected none with several objectives, which have no order")
        for option, value in (("--first-rung", self.first_rung), ("--reduction", self.reduction)):
            if value and len(self.objectives) > 1:
                raise UserError(f"{option} {value}: expected one objective; several have no rungs")
            if value and self.actual_pruner == "none":
                raise UserError(f"{option} {value}: expected --pruner asha or hyperband, which have rungs")
        if "latency" in self.objectives and (self.slots or 1) > 1:
            raise UserError(f"--slots {self.slots}: expected 1 with latency, which is measured on an idle machine")
        given = [
            f"--{name.replace('_', '-')} {value}"
            for name, value in dataclasses.asdict(self.slurm).items()
            if value != getattr(DEFAULT_ALLOCATION, name)
        ] + ([f"--tasks {self.tasks}"] if self.tasks else [])
        if self.on == "local" and given:
            raise UserError(f"{given[0]}: expected --on slurm with it")
        if self.slurm.container_image:
            raise UserError(
                f"--container-image {self.slurm.container_image}: expected none; a search does not run in a container"
            )
        if self.slurm.nodes > 1:
            raise UserError(f"--nodes {self.slurm.nodes}: expected 1; a trial uses one node, and --tasks adds nodes")
        if (self.slurm.gpus_per_node or self.slurm.gres) and self.ranks > self.slurm.ranks:
            raise UserError(f"--ranks {self.ranks}: expected at most the {self.slurm.ranks} GPUs that are requested")

    def plan(self, options: Sequence[str]) -> Plan:
        """Returns the definition of the search, and what its trials are built from.

        Raises:
            UserError: names or options are invalid.
        """
        space, line = split_ranges(options)
        fixed = line.words()
        reject_options(fixed, SET_BY_SEARCHES)
        modules = ["--experiments-from", *self.experiments_from] if self.experiments_from else []
        arguments = train_options(self.data, self.runs, [*modules, *fixed], resume=True)
        if self.on == "local":
            arguments = resolve_device(arguments)
        first = [f"{option}={domain.samples[0]}" for option, domain in space.items()]
        trials = expand(self.names, (self.seed,), "check", [*arguments, *first], self.experiments_from)
        experiments = tuple(trial.config.experiment for trial in trials)
        if len(experiments) > 1:
            space = {EXPERIMENT: Choices(experiments), **space}
        if not space:
            raise UserError("NAMES: expected several, or an option with a range: --recipe.optimizer.lr log:1e-3:1e-1")
        manifest = manifests.read(self.data)
        device = trials[0].config.device
        if device == "auto" and (self.on == "local" or self.slurm.gpus_per_node or self.slurm.gres):
            device = "cuda"  # `resolve_device` has replaced it where there is no GPU
        definition = Definition(
            names=experiments,
            space={option: str(domain) for option, domain in space.items()},
            options=tuple(word for word in absolute_paths(fixed) if not word.startswith("--device=")),
            objectives=self.objectives,
            sampler=self.sampler,
            seed=self.search_seed,
            pruner=self.actual_pruner,
            rungs=self.rungs([trial.config for trial in trials]),
            reduction=self.reduction or REDUCTION,
            train_seed=self.seed,
            ranks=self.ranks,
            dataset=manifest.fingerprint,
            device="" if device == "auto" else device,
        )
        return Plan(definition, space, tuple(arguments), self.experiments_from, self.search_name, manifest)

    def rungs(self, configs: Sequence[TrainConfig]) -> tuple[int, ...]:
        """Returns the epochs of the rungs.

        Raises:
            UserError: the experiments cannot be compared at the same epochs, by images that are held out.
        """
        counts = sorted({config.recipe.epochs for config in configs})
        if len(counts) > 1:
            found = ", ".join(map(str, counts))
            raise UserError(
                f"NAMES: expected experiments with the same number of epochs, found {found}; add --recipe.epochs"
            )
        for config in configs:
            if not config.recipe.validation:
                expected = "images that are held out to compare trials; add --recipe.validation 5000"
                raise UserError(f"{config.experiment}: expected {expected}")
            if config.recipe.patience:
                expected = "0, because trials are compared after the same epochs"
                raise UserError(f"--recipe.patience {config.recipe.patience}: expected {expected}")
        epochs, every = counts[0], configs[0].evaluate_every
        if self.first_rung and self.first_rung >= epochs:
            raise UserError(f"--first-rung {self.first_rung}: expected fewer than the recipe's {epochs} epochs")
        first = self.first_rung or max(1, epochs // 9)
        rungs = Rungs.of(self.actual_pruner, epochs, first, self.reduction or REDUCTION).epochs
        if unevaluated := [epoch for epoch in rungs[:-1] if epoch % every]:
            expected = f"a divisor of every rung, found one at epoch {unevaluated[0]}; set --first-rung to a multiple"
            raise UserError(f"--evaluate-every {every}: expected {expected}")
        return rungs

    @property
    def actual_pruner(self) -> Pruner:
        """The pruner, by default one that depends on the objectives."""
        return self.pruner or ("asha" if len(self.objectives) == 1 else "none")

    @property
    def search_name(self) -> str:
        """The name of the search."""
        return self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", "+".join(self.names)).lstrip("-._")[:80]

    @property
    def folder(self) -> Path:
        """The folder of the study and the logs."""
        return self.runs / FOLDER / self.search_name

    def slots_here(self, plan: Plan) -> local_pool.Slots:
        """Returns how this machine is divided among trials. Raises UserError if it has too few GPUs."""
        cores = environment.usable_cores()
        on_gpus = plan.trial(plan.first_words).config.device != "cpu"
        gpus = environment.count_gpus() if on_gpus else 0
        if on_gpus and self.ranks > gpus:
            raise UserError(f"--ranks {self.ranks}: expected at most the {gpus} GPUs of this machine; lower it")
        count = self.slots or (1 if "latency" in self.objectives else max(1, gpus // self.ranks))
        on_cpu = ("--config_file", "launch/cpu.yaml", "--num_processes", str(self.ranks))
        launcher = launcher_for(Resources(self.ranks, cores)) if gpus else on_cpu
        return local_pool.Slots(count, gpus, max(1, cores // (count * self.ranks)), launcher, self.ranks)

    def train_here(self, plan: Plan, study: Study, slots: local_pool.Slots, environ: Mapping[str, str]) -> None:
        """Trains trials on this machine until none is left, and prints the best ones.

        Raises:
            UserError: several trials in a row failed, or the study cannot be read or written.
            SystemExit: see `__call__`.
        """
        source = StudySource(plan, study, self.trials)
        interrupted = local_pool.train_trials(source, slots, self.folder / "logs", environ)
        _, trials = study.read()
        print_state(plan.definition, trials, study.held(trials), self.trials)
        if source.gave_up:
            raise UserError(f"{self.folder}: {MAX_FAILURES} trials in a row failed; see {self.folder / 'logs'}")
        if interrupted:
            raise SystemExit(75)
        if not any(trial.state == "complete" for trial in trials):
            raise SystemExit(1)

    def submit(self, options: Sequence[str], environ: Mapping[str, str]) -> None:
        """Submits an array of workers. Raises UserError if SLURM refuses it."""
        command = ["sbatch", "--parsable", *name_and_log(self.search_name, self.runs, "%A_%a"), *self.slurm.options()]
        command += [f"--array=0-{(self.tasks or 1) - 1}", "slurm/search.sbatch", *self.worker_args(options)]
        job = sbatch(command, self.runs, environ)
        print(f"job {job}, an array of {self.tasks or 1}; logs: {self.runs / 'slurm'}")

    def worker_args(self, options: Sequence[str]) -> list[str]:
        """Returns the arguments of `launch search` for a worker on a node."""
        own: dict[str, Any] = {"data": self.data.absolute(), "runs": self.runs.absolute(), "name": self.search_name}
        words: list[str] = []
        for field in dataclasses.fields(self):
            value = own.get(field.name, getattr(self, field.name))
            if field.name in ("names", "on", "tasks", "slurm", "dry_run") or value in (None, field.default):
                continue
            option = f"--{field.name.replace('_', '-')}"
            if field.name == "objectives":
                words += [option, *value]
            else:
                words += [f"{option}={one}" for one in (value if isinstance(value, tuple) else (value,))]
        space, line = split_ranges(options)
        ranges = [f"{option}={domain}" for option, domain in space.items()]
        fixed = absolute_paths(line.words())
        if (self.slurm.gpus_per_node or self.slurm.gres) and "--device" not in line.options:
            fixed = [*fixed, "--device=cuda"]  # so that a node without a working GPU is an error
        return [*words, *ranges, *fixed, "--", *self.names]


def searchable_options() -> dict[str, Option]:
    """Returns the options of `runner train`, of which those that may be searched accept a range as their value."""
    return {
        spelling: replace(option, accepts=any_word) if option.nargs == 1 and _may_be_searched(option.name) else option
        for spelling, option in options_of(TrainConfig).items()
    }


def split_ranges(options: Sequence[str]) -> tuple[dict[str, Domain], CommandLine]:
    """Separates the options with ranges from the others; both are sorted, so that their order has no effect.

    Raises:
        UserError: an option does not exist, or has an invalid range.
    """
    line = parse_words(options, searchable_options())
    space: dict[str, Domain] = {}
    for option, parsed in sorted(line.options.items()):
        values = parsed.values if _may_be_searched(option) else []
        if len(values) == 1 and (domain := parse_domain(option, values[0])):
            space[option] = _normalize_domain(option, domain)
    for option in ("--recipe.epochs", "--recipe.validation", "--recipe.patience"):
        if option in space:
            raise UserError(f"{option} {space[option]}: expected one value, which is the same for all trials")
    line.options = {name: option for name, option in sorted(line.options.items()) if name not in space}
    return space, line


def _normalize_domain(option: str, domain: Domain) -> Domain:
    """Returns a range for the option: with absolute paths, since a trial starts in another folder.

    Raises:
        UserError: the option is an integer, and the range is not.
    """
    declared = options_of(TrainConfig).get(option)
    if isinstance(domain, Range) and domain.scale != "int" and declared and declared.expected == NUMBERS["int"]:
        raise UserError(f"{option} {domain}: expected integers; use int:A:B or A|B|C")
    if option == WEIGHTS and isinstance(domain, Choices):
        return Choices(tuple(str(Path(word).absolute()) if Path(word).is_file() else word for word in domain.words))
    return domain


def _may_be_searched(option: str) -> bool:
    return option.startswith(SEARCHABLE_PREFIXES)


def check_same_search(existing: Definition | None, requested: Definition, folder: Path) -> None:
    """Raises UserError if a folder holds a search of something else."""
    for field in requested.__struct_fields__:
        found, expected = getattr(existing, field, None), getattr(requested, field)
        if field == "device" and "" in (found, expected):
            continue  # known only on the node, or a study of an earlier version
        if field == "options":
            found, expected = (tuple(word for word in words or () if not word.startswith("--device="))
                               for words in (found, expected))  # fmt: skip
        if found != expected:
            what = DEFINED_BY.get(field, f"--{field}")
            raise UserError(
                f"{folder}: holds another search: {what} was {found}, now {expected}; choose another --name"
            )


def print_state(definition: Definition, trials: Sequence[StudyTrial], held: frozenset[int], limit: int) -> None:
    """Prints the best trials, or the Pareto front, and how many trials are in which state."""
    table = new_table(*titles(definition))
    for trial in best_trials(definition, trials):
        table.add_row(*cells(definition, trial))
    if table.row_count:
        print_table(table)
    states = ", ".join(f"{count} {state}" for state, count in count_states(trials, held).items())
    trained, total = epochs_trained(definition, trials)
    print(f"{len(trials)} of {limit} trials" + (f": {states}; {trained} of {total} epochs" if trials else ""))
