"""`runner`: the commands along the road. The only place that reads arguments and the environment.

Heavy imports happen inside the commands that need them, so that `runner list` and `--help` answer at once.
"""

import dataclasses
import functools
import json as json_format
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep.console import UserError, run_command
from runner import experiments, launched
from runner.recipe import Architecture, Experiment, Recipe, first_mistake
from runner.request import TrainRequest
from runner.runs import Run

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
RunFolders = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
Modules = tuple[str, ...]
SCORED = "{run}: {test_accuracy:.2%} on {test_images:,} test images of {dataset}"


@dataclasses.dataclass(frozen=True)
class List:
    """List every experiment: paper, architecture, parameters, MACs, reported accuracy."""

    grids: bool = False
    """List the grids instead, with every trial; a trial is trained by its name like any experiment."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""
    experiments_from: Modules = ()
    """Importable modules outside this package that define EXPERIMENTS as well."""

    def __call__(self) -> None:
        if self.grids:
            self.list_grids()
            return
        rows = [
            {
                "name": name,
                "paper": experiment.paper,
                "architecture": experiment.architecture.factory.rpartition(":")[2],
                "parameters": experiment.parameters,
                "macs": experiment.macs,
                "reported": experiment.reported and dataclasses.asdict(experiment.reported),
            }
            for name, experiment in experiments.load(self.experiments_from).items()
        ]
        if self.json:
            print(json_format.dumps(rows))
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("name", "paper", "architecture", "parameters", "MACs", "reported", box=None)
        for row in rows:
            reported = row["reported"]
            table.add_row(
                row["name"],
                row["paper"],
                row["architecture"],
                f"{row['parameters']:,}" if row["parameters"] else "–",
                f"{row['macs'] / 1e6:,.1f} M" if row["macs"] else "–",
                f"{reported['accuracy']:.2%} {reported['on']}, {reported['epoch']} epoch" if reported else "–",
            )
        Console(width=None if sys.stdout.isatty() else 120).print(table)

    def list_grids(self) -> None:
        """Prints every grid with its trials."""
        grids = experiments.load_grids(self.experiments_from)
        if self.json:
            print(json_format.dumps({name: list(trials) for name, trials in grids.items()}))
            return
        for name, trials in grids.items():
            print(f"{name}: {len(trials)} trials")
            for trial in trials:
                print(f"    {trial}")


@dataclasses.dataclass(frozen=True)
class Eval:
    """Score a finished run's weights on the whole test set."""

    run: RunFolder
    """Run folder."""
    data: Path | None = None
    """Prepared dataset; by default the one the run was trained on."""
    device: launched.Device = "auto"
    """Where to compute; auto takes a GPU where there is one and says which it took."""
    precision: Literal["run", "fp32", "bf16", "fp16"] = "run"
    """Autocast precision; by default that of training."""
    test_augmentation: Literal["run", "none", "flip", "flip-shift"] = "run"
    """Score with test-time augmentation as well, and report it apart; by default what the recipe says."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner.job import run_evaluation

        result = run_evaluation(
            Run(self.run), self.data, self.device, self.precision, self.test_augmentation, os.environ
        )
        _result(result, self.json, SCORED)


@dataclasses.dataclass(frozen=True)
class Export:
    """Export a finished run to ONNX and compare it with the model on the whole test set, in onnxruntime."""

    run: RunFolder
    """Run folder."""
    data: Path | None = None
    """Prepared dataset; by default the one the run was trained on."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner.deploy import onnx, parity

        run = Run(self.run)
        path = onnx.export(run)
        report = parity.compare(run, path, self.data)
        _result(report, self.json, "{onnx}: top-1 agreement {agreement:.4%} on {images:,} test images")
        if not report["passed"]:
            print(f"runner: {path}: agreement below the limit of {report['limit']:.2%}", file=sys.stderr)
            raise SystemExit(1)


@dataclasses.dataclass(frozen=True)
class Engine:
    """Build a TensorRT engine from an exported run, with a sidecar that says what it is."""

    run: RunFolder
    """Run folder."""
    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    """TensorRT, or TensorRT for RTX, which also builds without a GPU; auto takes TensorRT where its libraries
    load and a GPU is there, and says which it took."""
    batch: tuple[int, int, int] = (1, 128, 512)
    """Smallest, best served, and largest batch."""
    target: str | None = None
    """Compute capability to build for without having it, e.g. SM89 (tensorrt-rtx only); by default portable."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner.deploy import engine

        sidecar = engine.build(Run(self.run), self.backend, self.batch, self.target)
        _result(sidecar, self.json, "{engine}: {backend} {version}, {bytes:,} bytes, target {target}")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure latency of a run: the model in torch, onnxruntime, and the engine where a GPU is."""

    run: RunFolder
    """Run folder."""
    batch: tuple[int, ...] = (1, 32)
    """Batch sizes to measure, one after the other."""
    seconds: float = 3.0
    """Measure each for at least so long."""
    repeats: int = 100
    """Measure each at least so many times."""
    device: launched.Device = "auto"
    """Where to compute; auto takes a GPU where there is one and says which it took."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner.deploy import latency

        result = latency.bench(Run(self.run), self.batch, self.seconds, self.repeats, self.device, os.environ)
        if self.json:
            print(json_format.dumps(result))
        else:
            latency.show(result)


@dataclasses.dataclass(frozen=True)
class Report:
    """Compare runs on one HTML page that opens offline."""

    runs: RunFolders
    """Run folders, or folders that hold some at any depth."""
    out: Path = Path("report.html")
    """HTML file to write the page to."""
    json: bool = False
    """Print the compared rows as JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner.report import collect, page
        from runner.runs import find_runs

        if not self.runs:
            raise UserError("RUNS: expected at least one run folder or folder of runs")
        collected = [collect.read(run) for run in find_runs(list(self.runs))]
        page.write(collected, self.out)
        if self.json:
            rows = [collect.row(entry) for entry in collected]
            print(json_format.dumps({"runs": rows, "experiments": collect.experiments(collected)}))
        else:
            print(f"{self.out}: {len(collected)} runs compared")


def _train(request: TrainRequest) -> None:
    """Checks what can be checked without torch, trains, and prints the summary."""
    for option, value, least in (
        ("--max-steps", request.max_steps, 1),
        *(("--seed", seed, 0) for seed in request.seeds),
        ("--workers", request.workers, 1),
        ("--checkpoint-every", request.checkpoint_every, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{option} {value}: expected {least} or more")
    if request.resume not in ("auto", "never") and len(request.seeds) > 1:
        raise UserError(f"--resume {request.resume}: expected auto or never with several seeds")
    if max(request.seeds) >= 2**32:
        raise UserError(f"--seed {max(request.seeds)}: expected less than {2**32}")
    if len(set(request.seeds)) < len(request.seeds):
        raise UserError(f"--seeds {' '.join(map(str, request.seeds))}: expected each seed once")
    if mistake := first_mistake(request.recipe):
        raise UserError(mistake)
    if request.recipe.ema and request.recipe.prune:
        raise UserError("--recipe.ema and --recipe.prune: expected one of them; an average would fill the zeros in")
    registered = experiments.get(request.experiment, request.experiments_from)
    from runner.job import run_training

    finished = run_training(request, registered, os.environ)
    if len(finished.summaries) == 1:
        _result(finished.summaries[0], request.json, SCORED)
    elif finished.summaries:
        _results(finished.summaries, request.json)
    if finished.leave_at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _results(summaries: list[dict[str, Any]], json: bool) -> None:
    """Prints the outcome of several seeds."""
    accuracies = [summary["test_accuracy"] for summary in summaries]
    together = {
        "runs": summaries,
        "test_accuracy_mean": statistics.mean(accuracies),
        "test_accuracy_std": statistics.stdev(accuracies),
    }
    if json:
        print(json_format.dumps(together))
        return
    for summary in summaries:
        print(SCORED.format(**summary))
    print(f"{len(summaries)} seeds: {together['test_accuracy_mean']:.2%} ± {together['test_accuracy_std']:.2%}")


def train_with_defaults(default: Experiment) -> Callable[..., Callable[[], None]]:
    """The `train` command with one experiment's values as the defaults of its overrides."""

    def train(
        experiment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
        data: Path,
        runs: Path = Path("runs"),
        name: str | None = None,
        seed: int | None = None,
        seeds: tuple[int, ...] = (),
        max_steps: int | None = None,
        device: launched.Device = "auto",
        precision: Literal["launch", "fp32", "bf16", "fp16"] = "launch",
        loader: Literal["auto", "resident", "streaming"] = "auto",
        workers: int = 1,
        overwrite: bool = False,
        json: bool = False,
        experiments_from: Modules = (),
        teacher: Path | None = None,
        start_from: Path | None = None,
        checkpoint_every: int | None = None,
        resume: str = "never",
        resume_anyway: bool = False,
        architecture: Architecture = default.architecture,
        recipe: Recipe = default.recipe,
    ) -> Callable[[], None]:
        """Train one experiment; under `accelerate launch` on as many ranks as it starts.

        Args:
            experiment: Name of the experiment (see `runner list`); its recipe sets the defaults below.
            data: Folder made by `python -m data_prep prepare`.
            runs: Folder of runs; this one becomes RUNS/NAME/RUN.
            name: Name of the run; by default seed-N.
            seed: Seed of weights, order, augmentation and dropout; by default 0.
            seeds: Several of them: one run each, one after the other. The page shows their mean and deviation.
            max_steps: Stop after so many optimizer steps, and still evaluate and write the summary.
            device: auto takes a GPU where there is one and says which it took; a launch with a GPU
                configuration means cuda and refuses without one.
            precision: Precision of training; `launch` is what the accelerate configuration says, or fp32.
            loader: resident keeps the split on the device as uint8; streaming reads it by FFCV as it goes, with
                the same batches; auto takes resident where the split is a small share of the device's memory,
                and says which it took.
            workers: Decoding threads of the streaming loader; they change no batch.
            overwrite: Replace a run of the same name.
            json: Print the summary as JSON, and nothing else, on standard output.
            experiments_from: Importable modules outside this package that define EXPERIMENTS as well.
            teacher: Finished run whose predictions are learned beside the labels (distillation; see
                --recipe.teacher-weight and --recipe.teacher-temperature).
            start_from: Finished run of the same architecture whose weights are trained on, for fine-tuning and
                pruning (see --recipe.prune).
            checkpoint_every: Optimizer steps between checkpoints within an epoch; each epoch ends with one anyway.
            resume: `auto` goes on from the newest whole checkpoint of the run, or begins where there is none; a
                PATH of a checkpoint goes on from that one; `never` begins, and refuses a folder that holds a run.
                SIGUSR1, SIGTERM or a file `stop` in the run folder end a run with a checkpoint and exit code 75.
            resume_anyway: Resume also where recipe, data or anything else of the training has changed since;
                run.json says what.
            architecture: What is trained.
            recipe: How it is trained.
        """
        if seed is not None and seeds:
            raise UserError(f"--seed {seed} and --seeds: expected one of them")
        chosen = seeds or (seed or 0,)
        request = TrainRequest(
            experiment, data, runs, name, chosen, max_steps, device, precision, loader, workers,
            overwrite, json, experiments_from, architecture, recipe, teacher, start_from, checkpoint_every,
            resume, resume_anyway,
        )  # fmt: skip
        return functools.partial(_train, request)

    return train


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def parse() -> Callable[[], Any]:
        commands: dict[str, Callable[..., Any]] = {
            "list": List,
            "train": train_with_defaults(_experiment_in(given)),
            "eval": Eval,
            "export": Export,
            "engine": Engine,
            "bench": Bench,
            "report": Report,
        }
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="runner",
            description="From FFCV files to trained models, ONNX, TensorRT engines, latencies, and one report.",
            args=given,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
        )

    def checked_parse() -> Callable[[], Any]:
        try:
            return parse()
        except UserError as error:
            return lambda error=error: (_ for _ in ()).throw(error)

    run_command(checked_parse, "runner", speaks=int(os.environ.get("LOCAL_RANK", 0)) == 0)


def _experiment_in(given: list[str]) -> Experiment:
    """The experiment that a `train` command line names, for the defaults of its overrides.

    Where it names none yet (`runner --help`), any will do.
    """
    modules: list[str] = []
    if "--experiments-from" in given:
        for word in given[given.index("--experiments-from") + 1 :]:
            if word.startswith("-"):
                break
            modules.append(word)
    if given[:1] == ["train"] and given[1:] and not given[1].startswith("-"):
        return experiments.get(given[1], tuple(modules))
    # One without arguments of its architecture: those of another would stand in the help without a word.
    return next(one for one in experiments.load().values() if not one.architecture.arguments)


def _result(result: dict[str, Any], json: bool, line: str) -> None:
    print(json_format.dumps(result) if json else line.format(**result))
