"""The entry point of `runner`: parses the command line and runs the command.

Only entry points read sys.argv and os.environ. Commands import torch and other slow packages when they run, so that
`runner list` and `--help` are fast.
"""

import dataclasses
import difflib
import functools
import operator
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

import runner
from runner import experiments
from runner.commands.bench import Bench
from runner.commands.card import Card
from runner.commands.compare import Compare
from runner.commands.doctor import Doctor
from runner.commands.engine import Engine
from runner.commands.eval import Eval
from runner.commands.export import Export
from runner.commands.list import List
from runner.commands.parity import Parity
from runner.commands.predict import Predict
from runner.commands.report import Report
from runner.commands.serve_repo import ServeRepo
from runner.commands.show import Show
from runner.commands.sync import Sync
from runner.commands.train import Train
from runner.commands.watch import Watch
from runner.common.command_line import (
    HELP,
    CommandLine,
    Option,
    options_of,
    parse_with_tyro,
    parse_words,
    read_command,
)
from runner.common.console import OTHER_RANKS_ERROR_DELAY, run_command
from runner.common.errors import UserError
from runner.common.files import is_file
from runner.config.recipe import SGD, Architecture, Recipe
from runner.config.train_config import TrainConfig
from runner.run.folder import Run

KINDS = (
    List,
    Show,
    Watch,
    Compare,
    Eval,
    Export,
    Parity,
    Engine,
    Bench,
    Predict,
    ServeRepo,
    Report,
    Card,
    Sync,
    Doctor,
)
COMMANDS: dict[str, Any] = {re.sub(r"\B(?=[A-Z])", "-", kind.__name__).lower(): kind for kind in KINDS}
KEPT_BY_RESUME = ("precision", "evaluate_every", "checkpoint_every", "peak_tflops")
ABOUT = "From FFCV files to trained models, ONNX, TensorRT, latencies and a report."


@dataclasses.dataclass(frozen=True)
class TrainHelp(TrainConfig):
    """Train one experiment, on all ranks of `accelerate launch`.

    `runner train NAME --help` also shows its architecture and recipe.
    """

    architecture: tyro.conf.Suppress[Architecture] = dataclasses.field(default_factory=lambda: Architecture(""))
    recipe: tyro.conf.Suppress[Recipe] = dataclasses.field(default_factory=lambda: Recipe(1, 1, SGD(1.0)))


def parse(words: list[str]) -> Any:
    """Parses a command line; returns the command, to be called with the environment.

    Raises:
        UserError: the command line is invalid, or the experiment does not exist.
        SystemExit: code 0 after --help and --version.
    """
    name, *rest = words or ["--help"]
    if name == "train":
        return Train(parse_train(rest))
    if name in COMMANDS:
        return read_command(COMMANDS[name], rest, f"runner {name}")
    names = ["train", *COMMANDS]
    if name in ("--version", *HELP) and rest:
        raise UserError(f"{name}: expected alone, found {' '.join(rest)}")
    if name == "--version":
        print(f"runner {runner.__version__}")
        raise SystemExit(0)
    completion = name.startswith("--tyro-")  # --tyro-print-completion, --tyro-write-completion
    if not words or not (name in HELP or completion):
        near = difflib.get_close_matches(name, names) or names
        raise UserError(f"{f'{name}: ' if words else ''}expected a command: {', '.join(near)}")
    kinds = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in {"train": TrainHelp, **COMMANDS}.items()]
    union = functools.reduce(operator.or_, kinds)
    return parse_with_tyro(union, words if completion else ["--help"], "runner", description=ABOUT)


def parse_train(words: Sequence[str]) -> TrainConfig:
    """Parses the words after `runner train`; the experiment sets the defaults.

    Raises:
        UserError: as in `parse`.
        SystemExit: code 0 after --help.
    """
    declared = options_of(TrainConfig) | HELP
    line = parse_words(words, declared, required=True, is_known=experiments.is_known)
    if not line.positional:
        if "--help" in line.options:
            return parse_with_tyro(TrainHelp, ["--help"], "runner train")
        raise UserError("NAME: expected the name of an experiment, found none; runner list shows all")
    modules = line.options.get("--experiments-from")
    experiment = experiments.get(line.positional[0], tuple(modules.values) if modules else ())
    if len(line.positional) > 1:
        raise UserError(f"{line.positional[1]}: expected no further word; runner train takes one NAME")
    for name, option in line.options.items():
        key = name.removeprefix("--architecture.arguments.").replace("-", "_")
        if key != name.replace("-", "_") and key not in experiment.architecture.arguments:
            known = ", ".join(experiment.architecture.arguments) or "none"
            raise UserError(f"{name}: no such argument of {line.positional[0]}; expected one of: {known}")
        if option.is_flag and not isinstance(experiment.architecture.arguments.get(key, False), bool):
            raise UserError(f"{name}: expected a value, found none")
    check_kinds(line, declared, experiment.recipe, line.positional[0])
    default = TrainConfig(tyro.MISSING, tyro.MISSING, experiment.architecture, experiment.recipe)
    config = parse_with_tyro(TrainConfig, line.for_tyro(line.words()), "runner train", default=default)
    if "--pretrained" in line.options and "--architecture.arguments.weights" in line.options:
        raise UserError("--pretrained and --architecture.arguments.weights: expected one of them")
    run = started_run(config)
    if run is not None:
        started = run.config()
        if started.architecture.factory != config.architecture.factory:
            experiments.check_trusted(started.architecture, config.trusted_code, run.run_json)
        options = started.options
        kept = {name: getattr(options, name) for name in KEPT_BY_RESUME} if options else {}
        default = dataclasses.replace(
            default,
            architecture=started.architecture,
            recipe=started.recipe,
            seed=None if config.seeds else started.seed,
            teacher=Path(started.teacher.folder) if started.teacher else None,
            start_from=Path(started.started_from.folder) if started.started_from else None,
            **kept,
        )
        config = parse_with_tyro(TrainConfig, line.for_tyro(line.words()), "runner train", default=default)
        if options and options.deterministic:  # set here, because a flag that is on by default could not be passed
            config = dataclasses.replace(config, deterministic=True)
    return config.with_pretrained(started=run is not None)


def check_kinds(line: CommandLine, declared: Mapping[str, Option], recipe: Recipe, name: str) -> None:
    """Raises UserError for an option of another optimizer or schedule than those of the recipe of experiment `name`."""
    for option in line.options.values():
        path = declared[option.spelling].path if option.spelling in declared else ""
        field, _, setting = path.removeprefix("recipe.").partition(".")
        if field in ("optimizer", "schedule") and not hasattr(chosen := getattr(recipe, field), setting):
            own = [f"--recipe.{field}.{each}".replace("_", "-") for each in chosen.__struct_fields__]
            kind = type(chosen).__name__
            raise UserError(
                f"{option.spelling}: the {field} of {name} is {kind}, which has {', '.join(own) or 'no options'}"
            )


def started_run(config: TrainConfig) -> Run | None:
    """The run that --resume continues, whose recipe sets the defaults; None for a new run."""
    if config.resume == "never":
        return None
    runs = [Run(config.runs / config.experiment / name) for name in config.run_names().values()]
    return next((run for run in runs if is_file(run.run_json)), None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    report_after = 0 if int(os.environ.get("LOCAL_RANK", 0)) == 0 else OTHER_RANKS_ERROR_DELAY
    run_command(lambda: functools.partial(parse(words), os.environ), "runner", report_after)
