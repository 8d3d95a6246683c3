"""Submits one experiment to SLURM: `python -m launch submit NAME --nodes 2 --gpus-per-node 8 --data DIR`."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import tyro

from data_prep import manifest as manifests
from launch.plan import ROOT
from launch.train_arguments import check_dataset, check_models, job_environment, parse_job, train_options
from launch.trials import check_same
from runner.common.command_line import Flag
from runner.common.errors import UserError
from runner.config.recipe import Count
from runner.run.folder import Run

SECRETS = ("WANDB_API_KEY",)  # SLURM stores a job's environment in files


@dataclass(frozen=True)
class Format:
    """The format of an option that is passed to sbatch: a pattern, and its description."""

    pattern: str
    expected: str


Gpus = Annotated[
    str, Format(r"([A-Za-z0-9][A-Za-z0-9_.-]*:)?[1-9][0-9]{0,5}", "NUMBER or TYPE:NUMBER, such as 8 or h100:8")
]
TimeLimit = Annotated[
    str, Format(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
]
Name = Annotated[str, Format(r"[A-Za-z0-9][A-Za-z0-9_.,:@+/%=-]*", "letters, digits and any of _.,:@+/%=- after them")]


@dataclass(frozen=True)
class Allocation:
    """What a job requests from SLURM.

    Raises:
        UserError: a value does not have the format that its type states, so it could be another option of sbatch.
    """

    nodes: Count = 1
    """How many nodes."""
    gpus_per_node: Gpus | None = None
    """GPUs of each node, as NUMBER or TYPE:NUMBER; by default none, and one rank per node, for --device cpu."""
    time: TimeLimit | None = None
    """Time limit as sbatch takes it, e.g. 2:00:00."""
    partition: Name | None = None
    """Partition; by default the cluster's."""
    account: Name | None = None
    """Account that is charged; by default yours."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            formats = [item for kind in get_args(hint) for item in getattr(kind, "__metadata__", ())]
            for item in formats:
                if isinstance(item, Format) and value is not None and not re.fullmatch(item.pattern, value):
                    raise UserError(f"--{name.replace('_', '-')} {value!r}: expected {item.expected}")

    @property
    def ranks(self) -> int:
        """Ranks of the job, as slurm/train.sbatch counts them."""
        return self.nodes * int((self.gpus_per_node or "1").rpartition(":")[2])

    def options(self) -> list[str]:
        """Returns the options of sbatch."""
        values = {
            "nodes": str(self.nodes),
            "gpus-per-node": self.gpus_per_node,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
        }
        return [f"--{name}={value}" for name, value in values.items() if value is not None]


@dataclass(frozen=True)
class Submit:
    """Submit one experiment as a batch job; it requeues and resumes by itself until it is complete.

    Further options are those of `runner train`; they are checked here.
    """

    experiment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name from `runner list`."""
    data: Path
    """Prepared dataset, on a file system that all nodes see."""
    runs: Path = Path("runs")
    """Folder of runs, on a file system that all nodes see; the job's log goes to its folder slurm."""
    slurm: Annotated[Allocation, tyro.conf.arg(name="")] = Allocation()
    dry_run: Flag = False
    """Print the command, and submit nothing."""

    def __call__(self, options: list[str], environ: Mapping[str, str]) -> None:
        """Submits the job, or prints the command.

        Raises:
            UserError: the options are invalid or do not fit the dataset, or SLURM refuses the job.
        """
        arguments = [self.experiment, *train_options(self.data, self.runs, options, resume=True)]
        config, manifest = parse_job(arguments), manifests.read(self.data)
        command = self.command(arguments)
        for seed, name in config.run_names().items() if not config.resume_anyway else ():
            check_same(Run(self.runs / self.experiment / name), seed, config, manifest.fingerprint)
        if not self.dry_run:
            require_sbatch(environ)  # before the checks that take seconds
        check_dataset(config, manifest, self.slurm.ranks)
        check_models(config, manifest)
        if self.dry_run:
            print(shlex.join(command))
            return
        print(f"job {sbatch(command, self.runs, environ)}; its log: {self.runs / 'slurm'}")

    def command(self, arguments: list[str]) -> list[str]:
        """Returns the sbatch command as a list of arguments, for use without a shell.

        Args:
            arguments: those of `runner train` that the job runs.

        Raises:
            UserError: see `name_and_log`.
        """
        fixed = ["sbatch", "--parsable", *name_and_log(self.experiment, self.runs, "%j")]
        return [*fixed, *self.slurm.options(), "slurm/train.sbatch", *arguments]


def name_and_log(name: str, runs: Path, number: str) -> list[str]:
    """Returns the options of sbatch for the job's name and its log.

    Args:
        name: of what is trained.
        runs: folder of runs.
        number: sbatch's pattern for the number of the job.

    Raises:
        UserError: sbatch cannot write to such a path.
    """
    folder = str(runs.absolute() / "slurm")
    if "\\" in folder or "\n" in folder:
        raise UserError(f"--runs {str(runs)!r}: expected no backslash and no line break, which sbatch would change")
    job_name = "runner-" + re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    return [f"--job-name={job_name}", f"--output={folder.replace('%', '%%')}/%x-{number}.log"]


def require_sbatch(environ: Mapping[str, str]) -> None:
    """Raises UserError if there is no sbatch."""
    if shutil.which("sbatch", path=environ.get("PATH")) is None:
        raise UserError("sbatch: not found; expected a machine from which SLURM takes jobs")


def sbatch(command: list[str], runs: Path, environ: Mapping[str, str]) -> str:
    """Runs sbatch in the checkout, and returns the job's number.

    The W&B key is not passed on, because SLURM stores a job's environment in files. On the nodes the key comes from
    ~/.netrc, which `wandb login` writes; without it, runs are offline.

    Raises:
        UserError: sbatch refused the job, or the folder of logs cannot be written.
    """
    if any(name in environ for name in SECRETS):
        reason = "its key is not handed to SLURM, which keeps it in files; log in on the cluster with: wandb login"
        print(f"W&B: {reason}", file=sys.stderr)
    try:
        (runs / "slurm").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs {runs}: cannot write there ({error.strerror}); choose another folder") from None
    public = {name: value for name, value in job_environment(environ).items() if name not in SECRETS}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=public, check=False)
    if result.returncode != 0:
        raise UserError(f"sbatch refused: {result.stderr.strip()}")
    return result.stdout.strip().split(";")[0]
