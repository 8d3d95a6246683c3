"""Writes a grid as the definition of a W&B sweep, for use with W&B's own controller."""

from pathlib import Path
from typing import Any

from launch.trials import Trial
from runner.common.errors import UserError
from runner.common.files import write_atomically

HEADER = """\
# For a Bayesian search: method: bayes, and under parameters any option of `runner train` with its range, such as
#   recipe.optimizer.lr: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-1}
"""


def write(path: Path, definition: dict[str, Any], trials: int) -> None:
    """Writes the definition of a sweep of `trials` trials, and prints how to start it.

    Raises:
        UserError: the file cannot be written.
    """
    import yaml

    if path.is_dir():
        raise UserError(f"--as-wandb-sweep {path}: expected a file, found a folder")
    try:
        content = (HEADER + yaml.safe_dump(definition, sort_keys=False)).encode()
        if path.is_file() and path.read_bytes() != content:  # users edit it
            raise UserError(f"--as-wandb-sweep {path}: expected a new file, found one with other content; remove it")
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"--as-wandb-sweep {path}: cannot write there ({error.strerror})") from None
    print(f"{path}: {trials} trials; start with: wandb sweep {path}, and on each machine: wandb agent SWEEP")


def definition(name: str, trials: list[Trial]) -> dict[str, Any]:
    """Returns the definition that `wandb sweep` takes.

    Raises:
        UserError: an option contains `${`, which W&B's agent would replace.
    """
    options = trials[0].options
    if replaced := [word for word in options if "${" in word]:
        raise UserError(f"{replaced[0]}: expected no ${{ in an option, because W&B's agent would replace it")
    experiments = list(dict.fromkeys(trial.config.experiment for trial in trials))
    seeds = sorted({trial.config.all_seeds[0] for trial in trials})
    held_out = all(trial.config.recipe.validation for trial in trials)
    return {
        "name": name,
        "method": "grid",
        "metric": {"name": "validation/accuracy" if held_out else "test/accuracy", "goal": "maximize"},
        "parameters": {"experiment": {"values": experiments}, "seed": {"values": seeds}},
        "command": ["${env}", "python", "-m", "launch", "agent", "${args}", *options],
    }
