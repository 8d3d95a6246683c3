"""What a user asked `runner train` for, as a value, and what can be refused of it without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.console import UserError
from runner import experiments
from runner.launched import Device
from runner.recipe import Architecture, Experiment, Recipe, first_mistake
from runner.runs import check_name


@dataclass(frozen=True)
class TrainRequest:
    """The arguments of `runner train`; its --help explains each."""

    experiment: str
    data: Path
    runs: Path
    name: str | None
    seeds: tuple[int, ...]
    max_steps: int | None
    device: Device
    precision: Literal["launch", "fp32", "bf16", "fp16"]
    loader: Literal["auto", "resident", "streaming"]
    workers: int
    overwrite: bool
    json: bool
    experiments_from: tuple[str, ...]
    architecture: Architecture
    recipe: Recipe
    teacher: Path | None = None
    start_from: Path | None = None
    checkpoint_every: int | None = None
    resume: str = "never"
    resume_anyway: bool = False
    stop_file: Path | None = None
    hang_timeout: float = 600.0
    evaluate_every: int = 1
    deterministic: bool = False

    def run_names(self) -> dict[int, str]:
        """The name of each seed's run."""
        if self.name is None:
            return {seed: f"seed-{seed}" for seed in self.seeds}
        if len(self.seeds) == 1:
            return {self.seeds[0]: self.name}
        return {seed: f"{self.name}-seed-{seed}" for seed in self.seeds}

    def check(self) -> Experiment:
        """The experiment as it is registered, where nothing here is a mistake.

        Raises:
            UserError: something is.
        """
        for option, value, least in (
            ("--max-steps", self.max_steps, 1),
            *(("--seed", seed, 0) for seed in self.seeds),
            ("--workers", self.workers, 1),
            ("--checkpoint-every", self.checkpoint_every, 1),
            ("--evaluate-every", self.evaluate_every, 1),
            ("--hang-timeout", self.hang_timeout, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"{option} {value}: expected {least} or more")
        if self.resume not in ("auto", "never") and len(self.seeds) > 1:
            raise UserError(f"--resume {self.resume}: expected auto or never with several seeds")
        if self.overwrite and self.resume != "never":
            raise UserError(
                "--overwrite: expected no --resume beside it, which jobs and sweeps always have: going on, a run "
                "would erase itself; choose another --name"
            )
        if max(self.seeds) >= 2**32:
            raise UserError(f"--seed {max(self.seeds)}: expected less than {2**32}")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))}: expected each seed once")
        for name in self.run_names().values():
            check_name(name)
        if mistake := first_mistake(self.recipe):
            raise UserError(mistake)
        return experiments.get(self.experiment, self.experiments_from)
