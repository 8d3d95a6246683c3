"""The options of `runner train`, and the checks that do not need torch."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from msgspec import Meta

from runner import experiments
from runner.common.command_line import Flag, NoneByDefault, check_limits
from runner.common.errors import UserError
from runner.config.recipe import Architecture, Count, Experiment, NonNegative, Recipe, check_recipe
from runner.config.trust import TrustedCode

Seed = Annotated[int, Meta(ge=0, lt=2**32)]
Tflops = Annotated[float, Meta(gt=0, le=1e6)]
Device = Literal["auto", "cuda", "cpu"]
STEP_RANGE = re.compile(r"([1-9]\d{0,9}):([1-9]\d{0,9})")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class TrainConfig:
    """Train one experiment, on all ranks of `accelerate launch`."""

    experiment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the experiment (see `runner list`), whose recipe sets the defaults below."""
    data: Path
    """Folder made by `python -m data_prep prepare`."""
    architecture: Annotated[Architecture, tyro.conf.FlagConversionOff]
    """Model to train."""
    recipe: Recipe
    """Settings for the training."""
    runs: Path = Path("runs")
    """Folder of all runs; this run is written to RUNS/NAME/RUN."""
    name: str | None = None
    """Name of the run; by default seed-N."""
    seed: Seed | None = None
    """Random seed for the weights, sample order, augmentation and dropout; by default 0."""
    seeds: Annotated[tuple[Seed, ...], NoneByDefault] = ()
    """Several seeds: one run each, in sequence. The report shows their mean and standard deviation."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps, then evaluate and write the summary."""
    device: Device = "auto"
    """auto selects a GPU if there is one and reports its choice; a launch with a GPU configuration requires cuda."""
    precision: Literal["launch", "fp32", "bf16", "fp16"] = "launch"
    """Precision of training; `launch` follows the accelerate configuration, or fp32 without one. fp32 does not use
    TF32."""
    loader: Literal["auto", "resident", "streaming"] = "auto"
    """resident keeps the split on the device as uint8; streaming reads the same batches from disk with FFCV; auto
    selects resident if the split is small compared with the device's memory, and reports its choice."""
    workers: Count = 1
    """Number of decoding threads of the streaming loader; the batches do not depend on it."""
    overwrite: Flag = False
    """Replace an existing run of the same name."""
    json: Flag = False
    """Print only the summary, as JSON, on standard output."""
    experiments_from: Annotated[tuple[str, ...], NoneByDefault] = ()
    """Importable modules outside this package that define further EXPERIMENTS."""
    trust: Flag = False
    """Import whatever model a run to resume, --teacher or --start-from names, also from other modules."""
    teacher: Path | None = None
    """Finished run to distill: the model learns its predictions together with the labels (see --recipe.teacher-weight
    and --recipe.teacher-temperature)."""
    start_from: Path | None = None
    """Finished run of the same architecture whose weights are the initial weights, for fine-tuning and pruning (see
    --recipe.prune)."""
    pretrained: Path | None = None
    """File with pretrained weights, from which training starts, for architectures with an argument `weights`, which it
    sets. The last layer starts from random weights, unless the file has as many classes."""
    checkpoint_every: Count | None = None
    """Optimizer steps between checkpoints within an epoch, in addition to those that follow evaluations."""
    checkpoint_seconds: NonNegative = 10.0
    """An evaluation is not followed by a checkpoint if the last one is more recent than this many seconds, so that
    short epochs do not wait for the disk; the last step always is."""
    resume: str = "never"
    """`auto` resumes from the newest intact checkpoint of the run, or starts from scratch if there is none; a PATH
    resumes from that checkpoint; `never` starts from scratch, and refuses a folder that contains a run. A resumed run
    uses its own architecture, recipe, precision, seed, teacher and initial weights as defaults; with several seeds, the
    defaults are those of the first run that was started. Ctrl-C, SIGUSR1, SIGTERM or a file `stop` in the run folder
    stops a run with a checkpoint and exit code 75."""
    resume_anyway: Flag = False
    """Resume even if the data or most settings have changed, but not the architecture, the kind of optimizer, which
    weights decay, the decay over layers, EMA or pruning; the changes are recorded in run.json."""
    stop_file: Path | None = None
    """File that stops the run with a checkpoint when it is created, and that is then removed; by default `stop` in the
    run folder."""
    pause_after: Count | None = None
    """Stop with a checkpoint and exit code 75 after this many epochs in total, as a stop file created at that moment
    would; `--resume auto` continues the run, and its result is the same as without the pause."""
    hang_timeout: Annotated[float, Meta(ge=1, le=1e9)] = 600.0
    """Seconds without a step after which a rank prints its stacks and exits with code 70, which ends all ranks; the
    limit is three times as long before the first step."""
    evaluate_every: Count = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    deterministic: Flag = False
    """Use deterministic kernels, so that two runs on one GPU are bit-identical; an operation without one raises an
    error. CPU kernels are always deterministic."""
    peak_tflops: Tflops | None = None
    """Peak of one device in the precision of training, in 10^12 FLOPs per second, from its data sheet or measured; the
    metrics then contain `flops_utilization`, the fraction of it that the model's arithmetic takes."""
    profile_steps: str | None = None
    """Profile the optimizer steps A:B of every run on the first rank, counted from 1, both included; writes a trace for
    Perfetto or chrome://tracing, and a picture of the shares of kernels, to `profile` in the run folder."""

    @property
    def trusted_code(self) -> TrustedCode:
        """Which models may be built from a run folder."""
        return TrustedCode(self.experiments_from, self.trust)

    @property
    def resume_path(self) -> Path | None:
        """The checkpoint that --resume names; None for auto and never."""
        return None if self.resume in ("auto", "never") else Path(self.resume)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of all runs."""
        return self.seeds or (self.seed or 0,)

    def with_pretrained(self, started: bool) -> "TrainConfig":
        """Returns these options with the file of --pretrained as an argument of the architecture.

        A run that has `started` does not need the file any more.

        Raises:
            UserError: there is no such file, or the architecture has no such argument.
        """
        if self.pretrained is None:
            return self
        arguments = self.architecture.arguments
        if "weights" not in arguments:
            raise UserError(f"--pretrained: {self.architecture.factory} has no pretrained weights; choose an "
                            "architecture with an argument `weights`, such as those of timm")  # fmt: skip
        if not started and not self.pretrained.is_file():
            raise UserError(f"--pretrained {self.pretrained}: expected a file with weights, found none")
        arguments = arguments | {"weights": str(self.pretrained.absolute())}
        return replace(self, architecture=replace(self.architecture, arguments=arguments))

    def run_names(self) -> dict[int, str]:
        """Returns the name of each run, by seed."""
        if self.name is None:
            return {seed: f"seed-{seed}" for seed in self.all_seeds}
        if len(self.all_seeds) == 1:
            return {self.all_seeds[0]: self.name}
        return {seed: f"{self.name}-seed-{seed}" for seed in self.all_seeds}

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and last step to profile. Raises UserError if --profile-steps is not a range of steps."""
        if self.profile_steps is None:
            return None
        match = STEP_RANGE.fullmatch(self.profile_steps)
        if match is None or int(match[1]) > int(match[2]):
            raise UserError(
                f"--profile-steps {self.profile_steps}: expected the first and the last step, counted from 1, such as "
                "10:12"
            )
        return int(match[1]), int(match[2])

    def check(self) -> Experiment:
        """Checks all options and returns the registered experiment, without overrides.

        Raises:
            UserError: an option is invalid.
        """
        if self.seed is not None and self.seeds:
            raise UserError(f"--seed {self.seed} and --seeds: expected one of them")
        check_limits(self)
        check_precision(self.precision, self.device)
        self._check_combinations()
        if self.resume_path and len(self.all_seeds) > 1:
            raise UserError(f"--resume {self.resume}: expected auto or never with several seeds")
        if self.overwrite and self.resume != "never":
            raise UserError(
                "--overwrite: expected no --resume, which jobs and sweeps always set, because a resumed run would "
                "erase itself; choose another --name"
            )
        if len(set(self.all_seeds)) < len(self.all_seeds):
            raise UserError(f"--seeds {' '.join(map(str, self.all_seeds))}: expected each seed once")
        for name in self.run_names().values():
            check_name(name)
        check_recipe(self.recipe)
        experiment = experiments.get(self.experiment, self.experiments_from)
        for name in ("teacher_weight", "teacher_temperature"):
            value = getattr(self.recipe, name)
            if self.teacher is None and value != getattr(experiment.recipe, name):
                raise UserError(f"--recipe.{name.replace('_', '-')} {value}: expected with --teacher, found none")
        return experiment

    def _check_combinations(self) -> None:
        """Raises UserError for an option that would be ignored, and for paths that cannot be used."""
        if self.resume_anyway and self.resume == "never":
            raise UserError("--resume-anyway: expected with --resume auto or --resume PATH, found none")
        if self.trust and self.resume == "never" and self.teacher is None and self.start_from is None:
            raise UserError("--trust: expected with --resume, --teacher or --start-from, whose models it permits")
        _ = self.profiled_steps
        if self.recipe.patience % self.evaluate_every:
            raise UserError(
                f"--recipe.patience {self.recipe.patience}: expected a multiple of --evaluate-every "
                f"{self.evaluate_every}, the epochs between evaluations"
            )
        if self.pause_after and self.pause_after % self.evaluate_every:
            raise UserError(
                f"--pause-after {self.pause_after}: expected a multiple of --evaluate-every {self.evaluate_every}, the "
                "epochs between evaluations"
            )
        if self.pause_after and len(self.all_seeds) > 1:
            raise UserError(f"--pause-after {self.pause_after}: expected one seed, found {len(self.all_seeds)}")
        if self.pretrained is not None and self.start_from is not None:
            raise UserError("--pretrained and --start-from: expected one of them, both are initial weights")
        if self.workers != 1 and self.loader == "resident":
            raise UserError(f"--workers {self.workers}: expected with --loader streaming, found resident")
        for option, path in (("--data", self.data), ("--runs", self.runs)):
            try:
                str(path).encode()
            except UnicodeEncodeError:
                raise UserError(f"{option} {str(path)!r}: expected a path in UTF-8, as run.json requires") from None
        if self.stop_file is not None and self.stop_file.is_dir():
            raise UserError(f"--stop-file {self.stop_file}: expected a file, found a folder")
        if self.stop_file is not None and self.stop_file.is_file() and self.stop_file.stat().st_size:
            raise UserError(f"--stop-file {self.stop_file}: holds data, and would be removed; choose another file")


def check_precision(precision: str, device: str) -> None:
    """Raises UserError for fp16 on the CPU, which accelerate would train in fp32."""
    if precision == "fp16" and device == "cpu":
        raise UserError("--precision fp16: expected a GPU, found --device cpu; choose bf16 or fp32")


def check_name(name: str) -> None:
    """Raises UserError if a run cannot have this name."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: expected letters, digits, '.', '_' and '-', beginning with a letter or digit, at most "
            "100 characters"
        )
