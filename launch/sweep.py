"""Trains every trial of a grid, here or on SLURM: `python -m launch sweep podeti-grid --data DIR`.

Run folders say how far each trial is, so calling it again trains what is missing and repeats nothing.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep import manifest as manifests
from data_prep.console import UserError
from launch import local, wandb_sweep
from launch.plan import Hardware, launcher_for
from launch.submit import Allocation, places, requested, require_sbatch, submitted
from launch.trials import Trial, check_same, expand
from runner import environment
from runner.runs import check_name, read_json, write_json

MANIFEST = "sweep.json"
ONE_NODE = Allocation()
DONE = ("whole", "running", "queued")  # what a call leaves alone


@dataclass(frozen=True)
class Sweep:
    """Train every trial of grids, papers and experiments, here or on SLURM; called again, it fills the gaps.

    Further options are those of `runner train`, the same for all trials.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAMES")]
    """Grids, papers, experiments, trials of grids (`runner list`, `runner list --grids`), or patterns of these in
    quotes, as 'podeti-grid/alexnet-*'."""
    data: Path
    """Prepared dataset; for SLURM on a file system that all nodes see."""
    runs: Path = Path("runs")
    """Folder of runs; for SLURM on a file system that all nodes see."""
    on: Literal["local", "slurm"] = "local"
    """Here, one trial a GPU at a time, or on the CPU; or as one array job, each of whose tasks resumes and queues
    again by itself."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every trial."""
    name: str | None = None
    """Prefix of the runs' names, and W&B's group; by default the group is made of NAMES, and runs are called
    seed-N, behind a digest of what was changed in their recipes."""
    slots: int | None = None
    """Trials at a time here; by default one a GPU, or one on the CPU. They share the cores."""
    at_once: int | None = None
    """Tasks of the SLURM array at a time; by default as many as there is room for."""
    slurm: Annotated[Allocation, tyro.conf.arg(name="")] = ONE_NODE
    dry_run: bool = False
    """Say how far each trial is and what would be done, and do nothing."""
    experiments_from: tuple[str, ...] = ()
    """Importable modules outside the package that define EXPERIMENTS or GRIDS as well."""
    as_wandb_sweep: Path | None = None
    """Write the same grid as a W&B sweep's definition (YAML) to this file instead, for `wandb sweep` and
    `wandb agent`."""

    def __call__(self, options: list[str], environ: Mapping[str, str]) -> None:
        """Trains, or submits, what is missing.

        Raises:
            UserError: names or options are mistaken, or a trial's folder holds another training; nothing was begun.
            SystemExit: code 1 where a trial failed, 75 where it was asked to stop.
        """
        modules = ["--experiments-from", *self.experiments_from] if self.experiments_from else []
        common = [*places(self.data, self.runs), *modules, *options]
        for option, value in (("--slots", self.slots), ("--at-once", self.at_once)):
            if value is not None and value < 1:
                raise UserError(f"{option} {value}: expected 1 or more")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))}: expected each seed once")
        if self.name:
            check_name(self.name)
        trials = expand(
            self.names,
            self.seeds,
            self.name,
            lambda words: requested([*words, *common, "--resume", "auto"]),  # as every trial is begun
            self.experiments_from,
        )
        fingerprint = manifests.read(self.data).fingerprint
        if self.as_wandb_sweep:
            wandb_sweep.write(self.as_wandb_sweep, self.names, trials, common)
            return
        for trial in trials:
            check_same(trial, fingerprint)
        folder = self.runs / "sweeps" / self.group
        states = self.states(trials, folder)
        missing = [trial for trial in trials if states[trial.id] not in DONE]
        told = f"{len(trials)} trials: {counted(states)}"
        if self.dry_run:
            for trial in trials:
                print(f"{states[trial.id]:>10}  {trial.id}")
            print(f"{told}; {len(missing)} to train")
            return
        print(told, flush=True)
        if not missing:
            return
        if self.on == "slurm":
            require_sbatch(environ)
        self.record(folder, trials, states)
        environ = {**environ, "WANDB_RUN_GROUP": environ.get("WANDB_RUN_GROUP", self.group)}
        if self.on == "slurm":
            self.submit(folder, missing, common, environ)
            return
        hardware = Hardware(environment.count_gpus(), len(os.sched_getaffinity(0)))
        cpu = missing[0].request.device == "cpu" or not hardware.gpus
        slots = self.slots or (1 if cpu else hardware.gpus)
        launcher = launcher_for(Hardware(0 if cpu else 1, hardware.cores))
        place = local.Place(slots, 0 if cpu else hardware.gpus, max(1, hardware.cores // slots), launcher)
        stopped = local.train(missing, common, place, folder / "logs", environ)
        states = self.states(trials, folder)
        for trial in missing:
            if not stopped and states[trial.id] in ("missing", "broken off"):
                states[trial.id] = "failed"  # before it could leave a word
        self.record(folder, trials, states)
        print(f"{len(trials)} trials: {counted(states)}")
        if stopped:
            raise SystemExit(75)
        if any(states[trial.id] != "whole" for trial in missing):
            raise SystemExit(1)

    @property
    def group(self) -> str:
        """What the sweep is called."""
        return self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", "+".join(self.names))[:80]

    def states(self, trials: list[Trial], folder: Path) -> dict[str, str]:
        """How far each trial is, by its id: a run's state, or queued."""
        states: dict[str, str] = {trial.id: trial.state() for trial in trials}
        jobs = read_json(folder / MANIFEST)["jobs"] if (folder / MANIFEST).is_file() else []
        for job in jobs:
            for index in waiting(job["job"]):
                trial = job["trials"][index]
                if states.get(trial, "running") not in ("whole", "running"):
                    states[trial] = "queued"
        return states

    def record(
        self, folder: Path, trials: list[Trial], states: Mapping[str, str], job: dict[str, Any] | None = None
    ) -> None:
        """Writes the manifest: what the sweep is, how far each trial is, and which jobs were given to SLURM."""
        path = folder / MANIFEST
        before = read_json(path) if path.is_file() else {"jobs": [], "trials": {}}
        manifest = {
            "names": list(self.names),
            "seeds": list(self.seeds),
            "trials": before["trials"] | {trial.id: states[trial.id] for trial in trials},
            "jobs": [*before["jobs"], *([job] if job else [])],
        }
        try:
            write_json(path, manifest)
        except OSError as error:
            raise UserError(f"--runs {self.runs}: cannot write there ({error.strerror})") from None

    def submit(self, folder: Path, missing: list[Trial], common: list[str], environ: Mapping[str, str]) -> None:
        """One array job for what is missing; task N takes line N of a file."""
        ids = [trial.id for trial in missing]
        lines = "".join(" ".join(trial.words) + "\n" for trial in missing)
        count = len(list(folder.glob("trials-*")))
        file = folder / f"trials-{count}"
        file.write_text(lines)
        log = self.runs.absolute() / "slurm" / "%x-%A_%a.log"
        limit = f"%{self.at_once}" if self.at_once else ""
        command = ["sbatch", "--parsable", f"--job-name=runner-{self.group}", f"--output={log}"]
        command += [f"--array=0-{len(missing) - 1}{limit}", *self.slurm.options()]
        command += ["slurm/sweep.sbatch", str(file.absolute()), *common]
        job = submitted(command, self.runs, environ)
        self.record(folder, [], {}, {"job": job, "trials": ids})
        print(f"job {job}, an array of {len(missing)}; logs: {self.runs / 'slurm'}")


def waiting(job: str) -> list[int]:
    """The tasks of an array job that SLURM still has, waiting or running; none where it knows it no more."""
    command = ["squeue", "--noheader", "--array", "--job", job, "--format", "%K"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        raise UserError(f"squeue: not found; job {shlex.quote(job)} of this sweep is SLURM's") from None
    return [int(line) for line in done.stdout.split() if line.isdigit()]


def counted(states: Mapping[str, str]) -> str:
    """`3 whole, 2 missing`."""
    order = ("whole", "running", "queued", "stopped", "broken off", "failed", "missing")
    counts = {state: list(states.values()).count(state) for state in order}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
