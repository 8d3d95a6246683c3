"""`runner eval`: evaluate the weights of a run on the test set."""

import dataclasses
from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal

from runner.commands.options import Code, Device, Flag, RunFolder, open_run
from runner.commands.output import note_unfinished, print_result
from runner.config.trust import TrustedCode


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate the weights of a run on the whole test set."""

    run: RunFolder
    """Folder of the run."""
    data: Path | None = None
    """Prepared dataset; by default the run's own."""
    device: Device = "auto"
    """Device to compute on; auto selects a GPU if there is one, and reports its choice."""
    precision: Literal["run", "fp32", "bf16", "fp16"] = "run"
    """Autocast precision; by default the one used in training."""
    test_augmentation: Literal["run", "none", "flip", "flip-shift"] = "run"
    """Also evaluate with test-time augmentation, reported separately; by default as in the recipe."""
    code: Code = TrustedCode()
    json: Flag = False
    """Print only JSON on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.training.eval_run import evaluate_run

        run = open_run(self.run, self.code)
        note_unfinished(run)
        result = evaluate_run(run, self.data, self.device, self.precision, self.test_augmentation, environ)
        print_result(result, self.json)
