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
NO_ANSWER_HINT = "jobs of this sweep may be queued; try again where SLURM's controller can be reached"


class ArrayJob(msgspec.Struct):
    """A job array: its job id, and the trial that each of its tasks trains."""

    job: str
    trials: list[str]


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
    lines = _run(["squeue", "--me", "--noheader", "--array", "--format", "%F %K"]).splitlines()
    queued = {tuple(line.split()) for line in lines}  # (job id of the array, index of the task)
    return {trial for array in jobs for task, trial in enumerate(array.trials) if (array.job, str(task)) in queued}


def submit(
    trials: Sequence[Trial],
    folder: Path,
    group: str,
    runs: Path,
    allocation: Allocation,
    at_once: int | None,
    environ: Mapping[str, str],
) -> Iterator[ArrayJob]:
    """Submits trials as job arrays of at most MaxArraySize tasks, and yields each array as soon as it is queued.

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
        file = _write_lines(folder, [" ".join(trial.argv) for trial in tasks])
        command += ["slurm/sweep.sbatch", str(file.absolute()), *tasks[0].options]
        previous = sbatch(command, runs, environ)
        yield ArrayJob(previous, [trial.id for trial in tasks])


def _write_lines(folder: Path, lines: Sequence[str]) -> Path:
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
        raise UserError(f"{command[0]}: not found; {NO_ANSWER_HINT}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer within {TIMEOUT_SECONDS} s; {NO_ANSWER_HINT}") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{command[0]}: {reason}; {NO_ANSWER_HINT}")
    return done.stdout
