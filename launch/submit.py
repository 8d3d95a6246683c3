"""Submits one experiment to SLURM: `python -m launch submit NAME --nodes 2 --gpus-per-node 8 --data DIR`."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_prep import manifest as manifests
from data_prep.console import UserError, in_one_line
from launch.plan import ROOT
from runner import cli
from runner.request import TrainRequest

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,:@+/%=-]*")  # a value that sbatch takes; never an option of its own
SECRETS = ("WANDB_API_KEY",)  # an environment is kept in the controller's files


@dataclass(frozen=True)
class Allocation:
    """What a job asks SLURM for."""

    nodes: int = 1
    """How many nodes."""
    gpus_per_node: str | None = None
    """GPUs of each node, as a number or as TYPE:NUMBER; without, one rank a node, for --device cpu."""
    time: str | None = None
    """Time limit as sbatch takes it, e.g. 2:00:00."""
    partition: str | None = None
    """Partition; by default the cluster's."""
    account: str | None = None
    """Account that is charged; by default yours."""

    def options(self) -> list[str]:
        """The options of sbatch.

        Raises:
            UserError: a value that is not plain.
        """
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes}: expected 1 or more")
        given = {
            "nodes": str(self.nodes),
            "gpus-per-node": self.gpus_per_node,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
        }
        return plain(given)


@dataclass(frozen=True)
class Submit:
    """Submit one experiment as a batch job; it queues again and resumes by itself until it is done.

    Further options are those of `runner train` and go there, checked here.
    """

    experiment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name from `runner list`."""
    data: Path
    """Prepared dataset, on a file system that all nodes see."""
    runs: Path = Path("runs")
    """Folder of runs, on a file system that all nodes see; the job's log goes to its folder slurm."""
    slurm: Annotated[Allocation, tyro.conf.arg(name="")] = Allocation()
    dry_run: bool = False
    """Print the command, and submit nothing."""

    def __call__(self, options: list[str], environ: Mapping[str, str]) -> None:
        """Submits, or prints what would be.

        Raises:
            UserError: the options are mistaken, there is no such dataset, or SLURM refuses.
        """
        words = [self.experiment, *places(self.data, self.runs), *options]
        requested([*words, "--resume", "auto"]).check()  # as the batch script says it
        manifests.read(self.data)
        command = self.command(words)
        if self.dry_run:
            print(shlex.join(command))
            return
        print(f"job {submitted(command, self.runs, environ)}; its log: {self.runs / 'slurm'}")

    def command(self, training: list[str]) -> list[str]:
        """The call of sbatch, as a list of arguments that no shell reads.

        Args:
            training: arguments of `runner train`.

        Raises:
            UserError: a value that is not plain.
        """
        name = f"runner-{self.experiment.replace('/', '-')}"
        log = self.runs.absolute() / "slurm" / "%x-%j.log"
        fixed = ["sbatch", "--parsable", f"--job-name={name}", f"--output={log}"]
        return [*fixed, *self.slurm.options(), "slurm/train.sbatch", *training]


def places(data: Path, runs: Path) -> list[str]:
    """The arguments of `runner train` that say where; absolute, because a job starts elsewhere."""
    return ["--data", str(data.absolute()), "--runs", str(runs.absolute())]


def requested(words: Sequence[str]) -> TrainRequest:
    """What `runner train` would understand of these arguments.

    Raises:
        UserError: they are mistaken.
    """
    command = in_one_line(lambda: cli.parse(["train", *words]))
    assert isinstance(command, cli.Train)
    return command.request


def plain(given: Mapping[str, str | None]) -> list[str]:
    """Options of sbatch from names and values, without those that were not given.

    Raises:
        UserError: a value that is not made of letters, digits and a few signs.
    """
    for name, value in given.items():
        if value is not None and not PLAIN.fullmatch(value):
            raise UserError(f"--{name} {value!r}: expected letters, digits and any of _.,:@+/%=- after them")
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def require_sbatch(environ: Mapping[str, str]) -> None:
    """Raises UserError where SLURM takes no jobs."""
    if shutil.which("sbatch", path=environ.get("PATH")) is None:
        raise UserError("sbatch: not found; expected a machine from which SLURM takes jobs")


def submitted(command: list[str], runs: Path, environ: Mapping[str, str]) -> str:
    """Calls sbatch from the checkout, and returns the job's number.

    The W&B key stays here: SLURM keeps a job's environment in files. On the nodes `wandb login` has written one
    into ~/.netrc, or runs are offline.

    Raises:
        UserError: there is no sbatch, or it refused.
    """
    require_sbatch(environ)
    if any(name in environ for name in SECRETS):
        told = "its key is not handed to SLURM, which keeps it in files; log in on the cluster with: wandb login"
        print(f"W&B: {told}", file=sys.stderr)
    (runs / "slurm").mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in environ.items() if name not in SECRETS}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=kept, check=False)
    if done.returncode != 0:
        raise UserError(f"sbatch refused: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
