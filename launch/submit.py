"""Submits one experiment to SLURM: `python -m launch submit NAME --nodes 2 --gpus-per-node 8 --data DIR`."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import tyro
from msgspec import Meta

from data_prep import manifest as manifests
from launch.plan import ROOT
from launch.train_arguments import check_dataset, check_models, job_environment, parse_job, train_options
from launch.trials import check_same_training
from runner.common.command_line import Flag
from runner.common.errors import UserError
from runner.config.recipe import Count
from runner.run.folder import Run

SECRETS = ("WANDB_API_KEY",)  # SLURM stores a job's environment in files
# Variables of the job that this process is part of, which srun would obey in the new job, and options of sbatch.
INHERITED_JOB_VARIABLES = re.compile(r"(SLURM|SRUN)_(?!CONF$|CLUSTERS$|TIME_FORMAT$)\w+|SBATCH_ARRAY_INX|SBATCH_EXPORT")


@dataclass(frozen=True)
class Format:
    """The format of an option that is passed to sbatch: a pattern, and its description."""

    pattern: str
    expected: str


Gpus = Annotated[
    str, Format(r"([A-Za-z0-9][A-Za-z0-9_.-]*:)?[1-9][0-9]{0,5}", "NUMBER or TYPE:NUMBER, such as 8 or h100:8")
]
TimeLimit = Annotated[
    str,
    Format(
        r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "MINUTES[:SECONDS], HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]]"
    ),
]
Name = Annotated[
    str,
    Format(r"[A-Za-z0-9][A-Za-z0-9_.,:@+/%=-]{0,999}", "a letter or digit, then letters, digits and any of _.,:@+/%=-"),
]
Memory = Annotated[
    str, Format(r"0|[1-9][0-9]{0,8}[KMGT]?", "MiB, or a number with K, M, G or T, such as 64G; 0 for all of a node's")
]
_RESOURCE = r"(?!gres:)[A-Za-z][A-Za-z0-9_-]*:([A-Za-z0-9][A-Za-z0-9_.-]*:)?[1-9][0-9]{0,5}[KMGT]?"
Gres = Annotated[
    str, Format(rf"{_RESOURCE}(,{_RESOURCE})*", "NAME:NUMBER or NAME:TYPE:NUMBER, such as gpu:8 or gpu:h100:8,nvme:1")
]
Constraint = Annotated[
    str,
    Format(
        r"[A-Za-z0-9(\[][A-Za-z0-9_.,:=/+&|*()\[\]-]{0,999}",
        "features, combined with & for and, | for or, such as h100&nvlink",
    ),
]
Image = Annotated[
    str,
    Format(
        r"[A-Za-z0-9/][A-Za-z0-9_.:@+/%=#-]{0,999}",
        "an image, such as ghcr.io#team/runner:1, or the absolute path of a squashfs file",
    ),
]


@dataclass(frozen=True)
class Allocation:
    """The resources that a job requests from SLURM.

    Raises:
        UserError: a value does not match the format of its type, so sbatch could read it as another option, or two
            options exclude each other.
    """

    nodes: Count = 1
    """Number of nodes."""
    gpus_per_node: Gpus | None = None
    """GPUs per node, as NUMBER or TYPE:NUMBER; by default none, and one rank per node, for --device cpu."""
    gres: Gres | None = None
    """Generic resources per node, as NAME:NUMBER or NAME:TYPE:NUMBER, separated by commas, e.g. gpu:8 on clusters
    without --gpus-per-node."""
    cpus_per_gpu: Count | None = None
    """CPUs per GPU. By default, SLURM gives all ranks of a node one CPU, unless the cluster is configured otherwise."""
    cpus_per_task: Count | None = None
    """CPUs per node, which its ranks share, because the job has one task per node."""
    mem: Memory | None = None
    """Memory per node in MiB, or with K, M, G or T, e.g. 64G; 0 for all of it. By default what the cluster gives."""
    exclusive: Flag = False
    """Share the nodes with no other job, and use all of their CPUs. GPUs and memory still have to be requested."""
    time: TimeLimit | None = None
    """Time limit in the format of sbatch, e.g. 2:00:00."""
    partition: Name | None = None
    """Partition; by default the cluster's default partition."""
    account: Name | None = None
    """Account to charge; by default your own."""
    qos: Name | None = None
    """Quality of service."""
    constraint: Constraint | None = None
    """Features that the nodes must have, e.g. h100&nvlink."""
    container_image: Image | None = None
    """Container image in which the ranks run, on clusters with pyxis: a name such as ghcr.io#team/runner:1, or the
    absolute path of a squashfs file; see slurm/README.md."""
    stop_before: Annotated[int, Meta(ge=1, le=65535)] = 180
    """Seconds before the time limit at which the run writes a checkpoint and the job is requeued; must be longer than
    20 training steps take."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            formats = [item for kind in get_args(hint) for item in getattr(kind, "__metadata__", ())]
            for item in formats:
                if isinstance(item, Format) and value is not None and not re.fullmatch(item.pattern, value):
                    raise UserError(f"--{name.replace('_', '-')} {value!r}: expected {item.expected}")
        self._check_resources()
        if self.time is not None and 0 < _seconds(self.time) <= self.stop_before:
            raise UserError(
                f"--time {self.time!r}: expected more than --stop-before ({self.stop_before} seconds), or every start "
                "would stop at once; increase --time or decrease --stop-before"
            )

    def _check_resources(self) -> None:
        """Raises UserError for repeated or conflicting resource options."""
        names = [resource.rpartition(":")[0] for resource in (self.gres or "").split(",")]
        if len(set(names)) < len(names) or re.search(r"(^|,)gpu:[^,]*[KMGT](,|$)", self.gres or ""):
            raise UserError(f"--gres {self.gres!r}: expected each resource once, and GPUs as a plain number")
        by_gres = _count_gpus(self.gres)
        if self.gpus_per_node and by_gres:
            both = f"--gpus-per-node {self.gpus_per_node!r} and --gres {self.gres!r}"
            raise UserError(f"{both}: expected GPUs in one of them; leave out the other")
        if self.cpus_per_gpu and self.cpus_per_task:
            both = f"--cpus-per-gpu {self.cpus_per_gpu} and --cpus-per-task {self.cpus_per_task}"
            raise UserError(f"{both}: expected one of them; leave out the other")
        if self.cpus_per_gpu and not self.gpus_per_node and not by_gres:
            expected = "--gpus-per-node or --gres gpu:NUMBER with it; without GPUs, use --cpus-per-task"
            raise UserError(f"--cpus-per-gpu {self.cpus_per_gpu}: expected {expected}")

    @property
    def ranks(self) -> int:
        """Number of ranks of the job, counted as in slurm/train_node."""
        gpus = int(self.gpus_per_node.rpartition(":")[2]) if self.gpus_per_node else _count_gpus(self.gres)
        return self.nodes * (gpus or 1)

    def options(self) -> list[str]:
        """Returns the options of sbatch that request these resources."""
        values = {
            "nodes": self.nodes,
            "gpus-per-node": self.gpus_per_node,
            "gres": self.gres,
            "cpus-per-gpu": self.cpus_per_gpu,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.mem,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            # Not sbatch's own options for containers: they would run the script in it, which calls srun and scontrol.
            "export": f"ALL,RUNNER_CONTAINER_IMAGE={self.container_image}" if self.container_image else "ALL",
        }
        # On the command line, because environment variables such as SBATCH_SIGNAL override the options in a script.
        fixed = ["--requeue", "--open-mode=append", f"--signal=B:USR1@{self.stop_before}"]
        fixed += ["--exclusive"] if self.exclusive else []
        return [*fixed, *(f"--{name}={value}" for name, value in values.items() if value is not None)]


def _count_gpus(gres: str | None) -> int:
    """Returns the number of GPUs in the value of --gres."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu:(?:[^,:]*:)?([0-9]+)", gres or ""))


def _seconds(limit: str) -> int:
    """Returns the seconds of a time limit of SLURM; 0 for no limit."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]  # MINUTES or MINUTES:SECONDS
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds


@dataclass(frozen=True)
class Submit:
    """Submit an experiment as a job that requeues and resumes itself to its end.

    All other options are passed on to `runner train`, and are checked first.
    """

    experiment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the experiment; see `runner list`."""
    data: Path
    """Folder of the prepared dataset, on a file system shared by all nodes."""
    runs: Path = Path("runs")
    """Folder of runs, on a file system shared by all nodes; the job's log is written to its subfolder `slurm`."""
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
        check_mounts(self.slurm, arguments, self.runs, environ)
        for seed, name in config.run_names().items() if not config.resume_anyway else ():
            check_same_training(Run(self.runs / self.experiment / name), seed, config, manifest.fingerprint)
        if not self.dry_run:
            require_sbatch(environ)  # before the checks that take seconds
        check_dataset(config, manifest, self.slurm.ranks)
        check_models(config, manifest)
        if self.dry_run:
            print(shlex.join(command))
            return
        job_id = sbatch(command, self.runs, environ)
        print(f"job {job_id}; log: {self.runs / 'slurm' / job_name(self.experiment)}-{job_id}.log")

    def command(self, arguments: list[str]) -> list[str]:
        """Returns the sbatch command as a list of arguments, for use without a shell.

        Args:
            arguments: the arguments of `runner train` for the job.

        Raises:
            UserError: see `name_and_log`.
        """
        fixed = ["sbatch", "--parsable", *name_and_log(self.experiment, self.runs, "%j")]
        return [*fixed, *self.slurm.options(), "slurm/train.sbatch", *arguments]


def job_name(name: str) -> str:
    """Returns the job's name in SLURM for an experiment or sweep; its log begins with it."""
    return "runner-" + re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def name_and_log(name: str, runs: Path, job_id_pattern: str) -> list[str]:
    """Returns the options of sbatch for the job's name and its log.

    Args:
        name: name of the experiment or sweep.
        runs: folder of runs.
        job_id_pattern: sbatch's filename pattern for the job ID, such as `%j`.

    Raises:
        UserError: the path contains characters that sbatch would change.
    """
    folder = str(runs.absolute() / "slurm")
    if "\\" in folder or "\n" in folder:
        raise UserError(f"--runs {str(runs)!r}: expected no backslash and no line break, which sbatch would change")
    return [f"--job-name={job_name(name)}", f"--output={folder.replace('%', '%%')}/%x-{job_id_pattern}.log"]


def check_mounts(allocation: Allocation, arguments: Iterable[str], runs: Path, environ: Mapping[str, str]) -> None:
    """Checks the folders and files that slurm/train.sbatch mounts into a container, in the same way.

    Raises:
        UserError: the path of one contains a character at which pyxis would split it.
    """
    modules = job_environment(environ)["PYTHONPATH"].split(os.pathsep)
    words = [re.sub(r"^--[^=]*=", "", word) for word in arguments]
    created = str(runs.absolute())  # mounted as well, even if it does not exist yet
    for path in (str(ROOT), *modules, created, *words) if allocation.container_image else ():
        if path.startswith("/") and re.search("[,:]", path) and (path == created or Path(path).exists()):
            split = "at which pyxis splits --container-mounts"
            raise UserError(f"{path}: expected no comma and no colon with --container-image, {split}; rename it")


def require_sbatch(environ: Mapping[str, str]) -> None:
    """Raises UserError if sbatch is not installed."""
    if shutil.which("sbatch", path=environ.get("PATH")) is None:
        raise UserError("sbatch: not found; expected a machine that can submit jobs to SLURM")


def sbatch(command: list[str], runs: Path, environ: Mapping[str, str]) -> str:
    """Runs sbatch in the checkout, and returns the job ID.

    The W&B key is not passed on, because SLURM stores a job's environment in files. On the nodes the key comes from
    ~/.netrc, which `wandb login` writes; without it, runs are offline. If this process is part of a job, that job's
    variables are not passed on either, because srun would obey them in the new job.

    Raises:
        UserError: sbatch refuses the job, or the folder of logs is not writable.
    """
    if any(name in environ for name in SECRETS):
        reason = "WANDB_API_KEY is not passed to SLURM, which would store it in files; on the cluster, use: wandb login"
        print(f"W&B: {reason}", file=sys.stderr)
    try:
        (runs / "slurm").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs {runs}: cannot write there ({error.strerror}); choose another folder") from None
    withheld = {name for name in environ if name in SECRETS or INHERITED_JOB_VARIABLES.fullmatch(name)}
    job_environ = {name: value for name, value in job_environment(environ).items() if name not in withheld}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=job_environ, check=False)
    if result.returncode != 0:
        reason = "; ".join(result.stderr.strip().splitlines()) or f"exit code {result.returncode}"
        if re.search("timed out|Unable to contact", reason):
            raise UserError(f"{reason}; the job may have been queued anyway; check squeue --me before submitting again")
        raise UserError(f"sbatch refused: {reason}")
    return result.stdout.strip().split(";")[0]
