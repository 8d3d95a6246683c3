"""A network that ends its own process at a moment defined by the environment variable END.

`train 5 1 SIGKILL` sends the signal to rank 1 in its fifth forward pass of training; `eval 3 0 SIGKILL` in the third
pass of evaluation; `commit 2 0 SIGKILL` just before the second checkpoint is renamed; `train 5 1 NAN` makes the
logits of that pass NaN, and `train 5 1 MEMORY` raises what torch raises for lack of memory; `train 5 1 STALL` sleeps
ten minutes in that pass, in the first start of a SLURM job; `train 5 1 SLEEP2` sleeps half a second in that pass and
each later one, in the first two starts of a SLURM job.
"""

import os
import signal
import sys
import time
from dataclasses import replace

import torch

from runner.config.recipe import Architecture
from tests.support.models import tiny
from tests.support.models.tiny import Tiny


class Ending(Tiny):
    """Tiny with a fault at the moment that END defines."""

    def __init__(self, **arguments: float) -> None:
        super().__init__(**arguments)
        self.passes = {"train": 0, "eval": 0}
        self.moment, self.count, self.rank, self.fault = ("never", 0, "", "")
        if "END" in os.environ:
            self.moment, count, self.rank, self.fault = os.environ["END"].split()
            self.count = int(count)
        if self.rank == os.environ.get("RANK", "0") and self.moment == "commit":
            commits = []

            def hook(event: str, arguments: tuple) -> None:
                if event == "os.rename" and str(arguments[0]).endswith(".writing"):
                    commits.append(arguments)
                    if len(commits) == self.count:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        moment = "train" if self.training else "eval"
        self.passes[moment] += 1
        logits = super().forward(images)
        if moment == self.moment and self.rank == os.environ.get("RANK", "0"):
            if self.fault.startswith("SLEEP"):
                restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
                if self.passes[moment] >= self.count and restarts < int(self.fault.removeprefix("SLEEP")):
                    time.sleep(0.5)
            elif self.passes[moment] == self.count:
                if self.fault == "NAN":
                    return logits * torch.nan
                if self.fault == "MEMORY":
                    raise torch.OutOfMemoryError("no memory is left")
                if self.fault == "STALL":
                    time.sleep(600 if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else 0)
                    return logits
                os.kill(os.getpid(), getattr(signal, self.fault))
        return logits


_everything = tiny.EXPERIMENTS["tiny-everything"]
EXPERIMENTS = {
    "ending": replace(
        _everything,
        architecture=Architecture(
            "tests.support.models.ending:Ending", {"channels": 8, **_everything.architecture.arguments}
        ),
        recipe=replace(_everything.recipe, epochs=8),
    )
}
