"""What W&B's agent calls for one trial of a sweep: `python -m launch agent --experiment=NAME --seed=0 …`."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from launch.plan import Hardware, launcher_for, training_command
from launch.submit import requested
from runner import environment


@dataclass(frozen=True)
class Agent:
    """Train one trial that W&B's controller chose, on all GPUs of this machine, or on the CPU.

    Further options are those of `runner train`.
    """

    experiment: str
    """Name from `runner list`."""
    seed: int = 0
    """Seed of the run."""

    def __call__(self, options: list[str], environ: Mapping[str, str]) -> None:
        """Becomes the launcher; W&B has put the run's identity into the environment, and the run takes it.

        Raises:
            UserError: the options are mistaken.
        """
        words = [self.experiment, "--seeds", str(self.seed), *options]
        if "WANDB_RUN_ID" in environ:
            words += ["--name", f"{environ.get('WANDB_SWEEP_ID', 'sweep')}-{environ['WANDB_RUN_ID']}"]
        request = requested(words)
        request.check()
        gpus = 0 if request.device == "cpu" else environment.count_gpus()
        device = [] if gpus or request.device != "auto" else ["--device", "cpu"]
        command = training_command(launcher_for(Hardware(gpus, 1)), len(os.sched_getaffinity(0)))
        os.execve(sys.executable, [sys.executable, *command, *words, *device], dict(environ))
