"""Trains one trial of a W&B sweep. W&B's agent runs `python -m launch agent --experiment=NAME --seed=0 …`."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from launch.plan import Resources, launcher_for, training_command
from launch.train_arguments import SET_BY_AGENTS, reject_options, resolve_device
from runner import cli
from runner.config.train_config import Seed
from runner.system import environment


@dataclass(frozen=True)
class Agent:
    """Train one trial that W&B's controller chose, on all GPUs or on the CPU.

    All other options are passed on to `runner train`.
    """

    experiment: str
    """Name of the experiment; see `runner list`."""
    seed: Seed = 0
    """Seed of the run."""

    def __call__(self, options: list[str], environ: Mapping[str, str]) -> None:
        """Replaces this process with the launcher; the run takes its W&B id from the environment.

        Raises:
            UserError: the options are invalid.
        """
        reasons = {**SET_BY_AGENTS, "--seeds": "an agent trains one seed; use --seed"}
        name = []
        if "WANDB_RUN_ID" in environ:
            name = ["--name", f"{environ.get('WANDB_SWEEP_ID', 'sweep')}-{environ['WANDB_RUN_ID']}"]
            reasons["--name"] = "runs of a W&B sweep are named after the ids of sweep and run; leave it out"
        reject_options(options, reasons)
        arguments = [self.experiment, "--seeds", str(self.seed), *name, *resolve_device(options)]
        config = cli.parse_train(arguments)
        config.check()
        resources = Resources(0 if config.device == "cpu" else environment.count_gpus(), 1)
        threads = max(1, environment.usable_cores() // max(1, resources.gpus))
        command = training_command(launcher_for(resources), threads)
        os.execve(sys.executable, [sys.executable, *command, *arguments], dict(environ))
