"""The array jobs of a sweep on SLURM: submitted in pieces that the cluster takes, and found in its queue."""

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import msgspec

from launch.submit import Allocation, name_and_log, sbatch
from launch.trials import Trial
from runner.common.errors import UserError

SECONDS = 60  # for an answer of the controller
WITHOUT_ANSWER = "jobs of this sweep may be queued; try again where SLURM's controller answers"


class ArrayJob(msgspec.Struct):
    """An array job: its number, and the id of each task's trial."""

    job: str
    trials: list[str]


def check_names(trials: Sequence[Trial]) -> None:
    """Raises UserError if slurm/sweep.sbatch, which splits a line at spaces, cannot take an experiment's name."""
    for trial in trials:
        if re.search(r"[ \t\n]", name := trial.config.experiment):
            raise UserError(f"{name!r}: expected a name without spaces, at which slurm/sweep.sbatch splits a line")


def queued_trials(jobs: Sequence[ArrayJob]) -> set[str]:
    """Returns the ids of the trials whose tasks wait or run.

    Raises:
        UserError: SLURM does not answer, or is not installed here.
    """
    if not jobs:
        return set()
    # All jobs of the user at once: a job that SLURM knows no more would be an error if it were asked for by number.
    lines = _ask(["squeue", "--me", "--noheader", "--array", "--format", "%F %K"]).splitlines()
    waiting = {tuple(line.split()) for line in lines}
    return {trial for job in jobs for task, trial in enumerate(job.trials) if (job.job, str(task)) in waiting}


def submit(
    trials: Sequence[Trial],
    folder: Path,
    group: str,
    runs: Path,
    allocation: Allocation,
    at_once: int | None,
    environ: Mapping[str, str],
) -> Iterator[ArrayJob]:
    """Submits trials as array jobs of at most the cluster's MaxArraySize, and yields each as soon as it is queued.

    Task N takes line N of a file.

    Args:
        trials: to train.
        folder: of the sweep, for the files.
        group: name of the sweep, for the jobs' names.
        runs: folder of runs, for the logs.
        allocation: what each task requests.
        at_once: number of tasks that run at a time; then several jobs run one after the other. None for no limit.
        environ: of the jobs.

    Raises:
        UserError: SLURM does not answer, or refuses a job.
    """
    size, previous = _largest_array(), ""
    for start in range(0, len(trials), size):
        piece = trials[start : start + size]
        command = ["sbatch", "--parsable", *name_and_log(group, runs, "%A_%a"), *allocation.options()]
        command += [f"--array=0-{len(piece) - 1}" + (f"%{at_once}" if at_once else "")]
        if at_once and previous:
            command += [f"--dependency=afterany:{previous}"]
        file = _write_lines(folder, [" ".join(trial.argv) for trial in piece])
        command += ["slurm/sweep.sbatch", str(file.absolute()), *piece[0].options]
        previous = sbatch(command, runs, environ)
        yield ArrayJob(previous, [trial.id for trial in piece])


def _write_lines(folder: Path, lines: Sequence[str]) -> Path:
    """Writes lines to a new file, which is never written again: a task reads it whenever it starts."""
    for number in count(len(list(folder.glob("trials-*")))):
        file = folder / f"trials-{number}"
        try:
            with file.open("x") as stream:
                stream.writelines(f"{line}\n" for line in lines)
            return file
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def _largest_array() -> int:
    """Returns the cluster's MaxArraySize: the number of tasks that an array may have."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask(["scontrol", "show", "config"]), re.M)
    return max(1, int(found[1])) if found else 1001  # SLURM's default


def _ask(command: list[str]) -> str:
    """Returns what a command of SLURM prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; {WITHOUT_ANSWER}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer within {SECONDS} s; {WITHOUT_ANSWER}") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{command[0]}: {reason}; {WITHOUT_ANSWER}")
    return done.stdout
