"""Trains every trial of a grid, here or on SLURM: `python -m launch sweep podeti-grid --data DIR`.

The run folders hold the state of every trial, so the same command trains what is missing and repeats nothing.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import tyro

from data_prep import manifest as manifests
from data_prep.manifest import Manifest
from launch import local_pool, slurm_array, wandb_sweep
from launch.plan import Resources, launcher_for
from launch.slurm_array import ArrayJob
from launch.submit import Allocation, check_mounts, name_and_log, require_sbatch
from launch.train_arguments import check_dataset, check_models, reject_options, resolve_device, train_options
from launch.trials import Trial, check_same_training, expand
from runner.common import files
from runner.common.command_line import Flag
from runner.common.errors import UserError
from runner.config.recipe import Count
from runner.config.train_config import Seed, check_name
from runner.run import lock
from runner.system import environment

DEFAULT_ALLOCATION = Allocation()
SET_BY_SWEEPS = {"--seed": "a sweep sets the seed of each trial; use --seeds"}
STATES = ("complete", "running", "queued", "stopped", "crashed", "failed", "missing")  # a run's states, and queued
SKIPPED_STATES = ("complete", "running", "queued")
OLD_STATES = {"whole": "complete", "broken off": "crashed"}  # names that earlier versions wrote


class SweepManifest(msgspec.Struct):
    """The content of sweep.json: names and seeds of the last call, the state of each trial, and SLURM jobs."""

    names: list[str] = []
    seeds: list[int] = []
    trials: dict[str, str] = {}
    jobs: list[ArrayJob] = []

    def __post_init__(self) -> None:
        self.trials = {trial: OLD_STATES.get(state, state) for trial, state in self.trials.items()}


@dataclass(frozen=True)
class Sweep:
    """Train every trial of grids, papers and experiments, here or on SLURM.

    A second call trains only what is missing.
    All other options are passed on to `runner train`, the same for all trials.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAMES")]
    """Grids, papers, experiments, trials of grids (`runner list`, `runner list --grids`), or quoted patterns of names,
    such as 'podeti-grid/alexnet-*'."""
    data: Path
    """Folder of the prepared dataset; for SLURM, on a file system shared by all nodes."""
    runs: Path = Path("runs")
    """Folder of runs; for SLURM, on a file system shared by all nodes."""
    on: Literal["local", "slurm"] = "local"
    """Where to train: on this machine, with one trial per GPU at a time or one on the CPU, or on SLURM as a job array,
    whose tasks requeue and resume themselves."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of every trial."""
    name: str | None = None
    """Prefix of the run names, and name of the W&B group or sweep. By default, the group is named after NAMES, and runs
    are named seed-N, preceded by a digest of the changes to their recipe, if any."""
    slots: Count | None = None
    """Number of concurrent trials on this machine; by default one per GPU, or one on the CPU. On the CPU, each has its
    share of the cores."""
    at_once: Count | None = None
    """Maximum number of concurrent tasks of the SLURM array; by default no limit."""
    slurm: Annotated[Allocation, tyro.conf.arg(name="")] = DEFAULT_ALLOCATION
    dry_run: Flag = False
    """Print the state of each trial and what would be trained, and do nothing."""
    experiments_from: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Importable modules outside the package that define additional EXPERIMENTS or GRIDS."""
    as_wandb_sweep: Path | None = None
    """Instead of training, write the grid to this file as the definition of a W&B sweep (YAML), for `wandb sweep` and
    `wandb agent`."""

    def __call__(self, options: list[str], environ: Mapping[str, str]) -> None:
        """Trains or submits the missing trials.

        Raises:
            UserError: names or options are invalid, or a trial's folder holds a different training; nothing is trained.
            SystemExit: with code 1 if a trial failed, 75 if the sweep was interrupted.
        """
        self.check_own_options()
        trials = self.expand(options)
        manifest = manifests.read(self.data)
        if self.as_wandb_sweep:
            definition = wandb_sweep.definition(self.name or "+".join(self.names), trials)
            self.check_data(trials, manifest)
            wandb_sweep.write(self.as_wandb_sweep, definition, len(trials))
            return
        for trial in trials:
            check_same_training(trial.run, trial.config.all_seeds[0], trial.config, manifest.fingerprint)
        states = self.states(trials)
        missing = [trial for trial in trials if states[trial.id] not in SKIPPED_STATES]
        if self.on == "slurm" and missing and not self.dry_run:
            require_sbatch(environ)  # first, because the checks that follow take seconds
        if self.on == "slurm":
            slurm_array.check_names(missing)
            name_and_log(self.group, self.runs, "%A_%a")
            check_mounts(self.slurm, [word for trial in missing for word in trial.arguments], self.runs, environ)
        self.check_data(missing, manifest)
        if self.dry_run:
            for trial in trials:
                print(f"{states[trial.id]:>10}  {trial.id}")
            print(f"{count_states(states)}; {len(missing)} to train")
            return
        print(count_states(states), flush=True)
        if not missing:
            return
        self.update_manifest(states)
        environ = {**environ, "WANDB_RUN_GROUP": environ.get("WANDB_RUN_GROUP", self.group)}
        if self.on == "slurm":
            self.submit(missing, environ)
        else:
            self.train_here(trials, missing, environ)

    def check_own_options(self) -> None:
        """Raises UserError if options of the sweep are invalid or exclude each other, so that none is ignored."""
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))}: expected each seed once")
        if self.name:
            check_name(self.name)
        if self.dry_run and self.as_wandb_sweep:
            raise UserError("--dry-run and --as-wandb-sweep: expected one of them")
        slurm_options = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in asdict(self.slurm).items()
            if value != getattr(DEFAULT_ALLOCATION, name)
        ]
        slurm_options += [f"--at-once {self.at_once}"] if self.at_once else []
        local_options = [f"--slots {self.slots}"] if self.slots else []
        if self.as_wandb_sweep and (unused := ["--on slurm"] * (self.on == "slurm") + slurm_options + local_options):
            raise UserError(f"{unused[0]}: expected none with --as-wandb-sweep, whose agents decide where to train")
        if self.on == "local" and slurm_options:
            raise UserError(f"{slurm_options[0]}: expected --on slurm with it")
        if self.on == "slurm" and local_options:
            raise UserError(f"{local_options[0]}: expected --on local; for a sweep on SLURM use --at-once")

    def expand(self, options: list[str]) -> list[Trial]:
        """Returns all trials of the sweep.

        Args:
            options: the options of `runner train` that the user gave.

        Raises:
            UserError: names or options are invalid, or the sweep sets one of the options itself.
        """
        reject_options(options, SET_BY_SWEEPS)
        modules = ["--experiments-from", *self.experiments_from] if self.experiments_from else []
        resume = self.as_wandb_sweep is None
        arguments = train_options(self.data, self.runs, [*modules, *options], resume)
        if self.on == "local" and not self.as_wandb_sweep:
            arguments = resolve_device(arguments)
        return expand(self.names, self.seeds, self.name, arguments, self.experiments_from)

    def check_data(self, trials: list[Trial], manifest: Manifest) -> None:
        """Checks that the trials can be trained on the dataset.

        Raises:
            UserError: `runner train` would refuse one of them.
        """
        ranks = self.slurm.ranks if self.on == "slurm" else 1
        built = set()
        for trial in trials:
            recipe = trial.config.recipe
            model = msgspec.json.encode([trial.config.architecture, recipe.normalize, recipe.resize])
            try:
                check_dataset(trial.config, manifest, ranks)
                if model not in built:
                    check_models(trial.config, manifest)
            except UserError as error:
                raise UserError(f"{trial.id}: {error}") from None
            built.add(model)

    @property
    def group(self) -> str:
        """The name of the sweep."""
        return self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", "+".join(self.names))[:80]

    @property
    def folder(self) -> Path:
        """The folder of the manifest and the logs."""
        return self.runs / "sweeps" / self.group

    def states(self, trials: list[Trial]) -> dict[str, str]:
        """Returns the state of each trial by id: the state of its run, or "queued"."""
        # First the queue: a task that is no longer in it has written its outcome.
        queued = slurm_array.queued_trials(self.manifest().jobs)
        states: dict[str, str] = {trial.id: trial.state() for trial in trials}
        for trial in queued:
            if states.get(trial, "running") not in ("complete", "running"):
                states[trial] = "queued"
        return states

    def manifest(self) -> SweepManifest:
        """Reads sweep.json; returns an empty manifest if the file does not exist."""
        path = self.folder / "sweep.json"
        return files.read_json(path, SweepManifest) if files.is_file(path) else SweepManifest()

    def update_manifest(self, states: Mapping[str, str], jobs: Sequence[ArrayJob] = ()) -> None:
        """Adds states and submitted jobs to sweep.json; a job replaces the entry of the same file.

        Raises:
            UserError: the file cannot be written.
        """
        with self.locked("sweep.lock"):
            previous = self.manifest()
            files_of_jobs = {job.file for job in jobs}
            states = {**previous.trials, **states}
            jobs = [*(job for job in previous.jobs if not job.file or job.file not in files_of_jobs), *jobs]
            files.write_json(
                self.folder / "sweep.json", SweepManifest(list(self.names), list(self.seeds), states, jobs)
            )

    def train_here(self, trials: list[Trial], missing: list[Trial], environ: Mapping[str, str]) -> None:
        """Trains the missing trials on this machine, and prints the states of all.

        Raises:
            SystemExit: see `__call__`.
        """
        cores = environment.usable_cores()
        gpus = 0 if missing[0].config.device == "cpu" else environment.count_gpus()
        count = self.slots or gpus or 1  # also for fewer trials: with other threads, a resumed one has other bits
        launcher = launcher_for(Resources(min(gpus, 1), cores))
        slots = local_pool.Slots(count, gpus, max(1, cores // count), launcher)
        interrupted = local_pool.train_trials(local_pool.ListedTrials(missing), slots, self.folder / "logs", environ)
        states = self.states(trials)
        for trial in missing:
            if not interrupted and states[trial.id] in ("missing", "crashed"):
                states[trial.id] = "failed"  # it ended before it could record the reason
        self.update_manifest(states)
        print(count_states(states))
        if interrupted:
            raise SystemExit(75)
        if any(states[trial.id] not in ("complete", "running") for trial in missing):  # another call trains the latter
            raise SystemExit(1)

    def submit(self, missing: list[Trial], environ: Mapping[str, str]) -> None:
        """Submits array jobs, and adds each to the manifest, and its job id as soon as it is queued.

        Raises:
            UserError: SLURM refuses a job, or the folder of the sweep is not writable.
        """
        with self.locked("submit.lock"):  # another call may submit the same trials
            states = self.states(missing)
            trials = [trial for trial in missing if states[trial.id] not in SKIPPED_STATES]
            for job in slurm_array.submit(
                trials, self.folder, self.group, self.runs, self.slurm, self.at_once, environ
            ):
                self.update_manifest({}, [job])
                if job.job:
                    print(f"job {job.job}, an array of {len(job.trials)}; logs: {self.runs / 'slurm'}", flush=True)

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Holds a lock file in the folder of the sweep; raises UserError if the folder is not writable."""
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.locked(self.folder / name, timeout=math.inf))
            except OSError as error:
                raise UserError(f"--runs {self.runs}: cannot write there ({error.strerror})") from None
            yield


def count_states(states: Mapping[str, str]) -> str:
    """Returns a summary such as `5 trials: 3 complete, 2 missing`."""
    counts = Counter(states.values())
    return f"{len(states)} trials: " + ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
