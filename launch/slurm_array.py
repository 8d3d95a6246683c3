"""Submits a sweep to SLURM as job arrays, and finds their tasks in the queue."""

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import msgspec

from launch.submit import Allocation, name_and_log, sbatch
from launch.trials import Trial
from runner.common.errors import UserError

TIMEOUT_SECONDS = 60  # timeout for an answer from the controller
MAY_BE_QUEUED_HINT = "jobs of this sweep may be queued; try again where SLURM's controller can be reached"


class ArrayJob(msgspec.Struct):
    """A job array, and the trial that each of its tasks trains.

    Attributes:
        job: job id; empty if sbatch has not returned it.
        trials: ids of the trials, by task.
        file: file with the arguments of the tasks, which no other array has; empty if an earlier version wrote this.
    """

    job: str
    trials: list[str]
    file: str = ""


def check_names(trials: Sequence[Trial]) -> None:
    """Raises UserError if an experiment's name contains whitespace, at which slurm/sweep.sbatch splits a line."""
    for trial in trials:
        if re.search(r"[ \t\n]", name := trial.config.experiment):
            raise UserError(f"{name!r}: expected a name without spaces, at which slurm/sweep.sbatch splits a line")


def queued_trials(jobs: Sequence[ArrayJob]) -> set[str]:
    """Returns the ids of the trials whose tasks are pending or running.

    Args:
        jobs: the job arrays of the sweep.

    Raises:
        UserError: SLURM does not answer, or is not installed here.
    """
    if not jobs:
        return set()
    # All of the user's jobs at once, because squeue fails if it is asked for a job that SLURM has forgotten.
    lines = _run(["squeue", "--me", "--noheader", "--array", "--format", "%F %K %o"]).splitlines()
    tasks: dict[str, set[str]] = {}  # indices of the tasks, by job id of the array
    commands: dict[str, str] = {}  # the command contains the file
    for line in lines:
        job, task, command = (*line.split(" ", 2), "", "")[:3]
        tasks.setdefault(job, set()).add(task)
        commands[job] = f"{command} "
    queued = set()
    for array in jobs:
        # Where a busy controller did not answer sbatch, the job may be queued all the same.
        ids = [array.job] if array.job else [job for job, command in commands.items() if f" {array.file} " in command]
        indices = set().union(*(tasks.get(job, ()) for job in ids))
        queued |= {trial for task, trial in enumerate(array.trials) if str(task) in indices}
    return queued


def submit(
    trials: Sequence[Trial],
    folder: Path,
    group: str,
    runs: Path,
    allocation: Allocation,
    at_once: int | None,
    environ: Mapping[str, str],
) -> Iterator[ArrayJob]:
    """Submits trials as job arrays of at most MaxArraySize tasks.

    Yields each array twice: before it is submitted, without a job id, and as soon as it is queued.

    Each array has a file of its own, in which line N holds the arguments of task N.

    Args:
        trials: the trials to train.
        folder: folder of the sweep, where the files are written.
        group: name of the sweep, from which the arrays are named.
        runs: folder of runs, where the logs are written.
        allocation: resources that each task requests.
        at_once: maximum number of concurrent tasks (arrays then run one after the other); None for no limit.
        environ: environment of the tasks.

    Raises:
        UserError: SLURM does not answer, or refuses a job.
    """
    size, previous = _max_array_size(), ""
    for start in range(0, len(trials), size):
        tasks = trials[start : start + size]
        command = ["sbatch", "--parsable", *name_and_log(group, runs, "%A_%a"), *allocation.options()]
        command += [f"--array=0-{len(tasks) - 1}" + (f"%{at_once}" if at_once else "")]
        if at_once and previous:
            command += [f"--dependency=afterany:{previous}"]
        file = _write_argument_file(folder, [" ".join(trial.argv) for trial in tasks])
        command += ["slurm/sweep.sbatch", str(file.absolute()), *tasks[0].options]
        array = ArrayJob("", [trial.id for trial in tasks], str(file.absolute()))
        yield array
        previous = sbatch(command, runs, environ)
        yield msgspec.structs.replace(array, job=previous)


def _write_argument_file(folder: Path, lines: Sequence[str]) -> Path:
    """Writes lines to a new file, which is never changed, because a task that is requeued reads it again."""
    for number in count(len(list(folder.glob("trials-*")))):
        file = folder / f"trials-{number}"
        try:
            with file.open("x") as stream:
                stream.writelines(f"{line}\n" for line in lines)
            return file
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def _max_array_size() -> int:
    """Returns the cluster's MaxArraySize, the largest number of tasks in an array."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run(["scontrol", "show", "config"]), re.M)
    return max(1, int(found[1])) if found else 1001  # SLURM's default


def _run(command: list[str]) -> str:
    """Runs a SLURM command and returns its standard output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; {MAY_BE_QUEUED_HINT}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer within {TIMEOUT_SECONDS} s; {MAY_BE_QUEUED_HINT}") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{command[0]}: {reason}; {MAY_BE_QUEUED_HINT}")
    return done.stdout
