"""What a user asked `runner train` for, as a value. Does not import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner.launched import Device
from runner.recipe import Architecture, Recipe


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

    def run_names(self) -> dict[int, str]:
        """The name of each seed's run."""
        if self.name is None:
            return {seed: f"seed-{seed}" for seed in self.seeds}
        if len(self.seeds) == 1:
            return {self.seeds[0]: self.name}
        return {seed: f"{self.name}-seed-{seed}" for seed in self.seeds}
