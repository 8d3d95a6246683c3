"""`runner`: the commands along the road. The only place that reads arguments and the environment.

Heavy imports happen inside the commands that need them, so that `runner list` and `--help` answer at once.
"""

import dataclasses
import json as json_format
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep.console import UserError, run_command, track
from runner import experiments, launched
from runner.recipe import Architecture, Experiment, Recipe
from runner.request import TrainRequest
from runner.runs import Run

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
RunFolders = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
Modules = tuple[str, ...]
Precision = Literal["fp32", "fp16", "int8", "int8-cpu"]
Calibration = Literal["minmax", "percentile"]
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
    """Export a finished run to ONNX, one file for each precision, with a quick check against the model."""

    run: RunFolder
    """Run folder."""
    precision: tuple[Precision, ...] = ("fp32",)
    """fp32; fp16; int8, symmetric Q/DQ for TensorRT; int8-cpu, for onnxruntime on the CPU. The others are made of
    fp32, which is exported first where it is not there, or of earlier weights."""
    raw: bool = False
    """Also write files that take uint8 pixels (batch, H, W, 3) and normalise inside the graph."""
    calibration: int = 512
    """Training images on which int8 finds the ranges of activations."""
    calibration_method: Calibration = "minmax"
    """How int8 chooses ranges from what it saw."""
    data: Path | None = None
    """Prepared dataset, for calibration; by default the one the run was trained on."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner.deploy import onnx, precision

        run = Run(self.run)
        made = []
        if "fp32" in self.precision or not onnx.is_current(run, "fp32"):
            made.append(onnx.export(run))
        lower = [kind for kind in self.precision if kind != "fp32"]
        quantised = any(kind.startswith("int8") for kind in lower)
        images = precision.calibration_images(run, self.data, self.calibration) if quantised else None
        made += [
            precision.convert(run, kind, images, self.calibration_method)
            for kind in track(lower, "convert", len(lower))
        ]
        if self.raw:
            made += [precision.raw(run, kind) for kind in self.precision]
        rows = [
            {"onnx": str(file.path), "name": file.name, "sha256": file.sha256, "bytes": file.path.stat().st_size}
            for file in made
        ]
        if self.json:
            print(json_format.dumps(rows))
            return
        for row in rows:
            print("{onnx}: {bytes:,} bytes".format(**row))
        print(f"next, the gate: runner parity {self.run}")


@dataclasses.dataclass(frozen=True)
class Parity:
    """Score a run's ONNX files on the whole test set beside the model; exit code 1 where one leaves its limit."""

    run: RunFolder
    """Run folder."""
    precision: tuple[Precision, ...] = ()
    """Which files; by default all that were exported, each with its raw front end where it has one."""
    data: Path | None = None
    """Prepared dataset; by default the one the run was trained on."""
    device: launched.Device = "auto"
    """Where to compute; on a GPU engines are scored as well."""
    backend: tuple[Literal["onnxruntime", "engine"], ...] = ()
    """What runs the files, and then has to; by default whatever can here. Engines run on a GPU alone."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner import environment
        from runner.deploy import onnx, parity

        run = Run(self.run)
        for kind in self.precision or ("fp32",):
            onnx.exported(run, kind)
        files = [file for file in onnx.all_exported(run) if not self.precision or file.precision in self.precision]
        launch = launched.read(os.environ)
        device, told = launched.device(self.device, launch, environment.count_gpus())
        print(told, file=sys.stderr)
        report = parity.compare(run, files, self.data, device, self.backend)
        names = [str(file.path.relative_to(run.folder)) for file in files]
        rows = [row for row in report["rows"] if row["onnx"] in names]
        if self.json:
            print(json_format.dumps(report))
        for row in rows:
            line = f"{self.run / row['onnx']} on {row['provider']}: {parity.told(row)}, {row['images']:,} images"
            if not row["passed"]:
                print(f"runner: {line}", file=sys.stderr)
            elif not self.json:
                print(line)
        for entry in report["not_scored"]:
            print("runner: {onnx} by {backend}: not scored: {reason}".format(**entry), file=sys.stderr)
        if not all(row["passed"] for row in rows):
            raise SystemExit(1)


@dataclasses.dataclass(frozen=True)
class Engine:
    """Build TensorRT engines of an exported run, each with a sidecar that says what it is."""

    run: RunFolder
    """Run folder."""
    precision: tuple[Precision, ...] = ("fp32",)
    """Of which ONNX files: an engine has the precision of its graph."""
    raw: bool = False
    """Build of the files with the raw front end."""
    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    """TensorRT, or TensorRT for RTX, which also builds without a GPU; auto takes TensorRT where its libraries
    load and a GPU is there, and says which it took."""
    batch: tuple[int, int, int] = (1, 128, 512)
    """Smallest, best served, and largest batch."""
    target: tuple[str, ...] = ()
    """Compute capabilities to build for without having them, e.g. SM89 SM120 (tensorrt-rtx only); by default the
    GPU that is here, or portable."""
    optimization_level: int | None = None
    """0 to 5: how long the builder looks for the fastest kernels; by default its own choice."""
    no_timing_cache: bool = False
    """Begin without what the builder measured before, and keep nothing of it (tensorrt only)."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner.deploy import engine, onnx

        run = Run(self.run)
        wish = engine.Wish(self.backend, self.batch, self.target, self.optimization_level, not self.no_timing_cache)
        files = [onnx.exported(run, kind, self.raw) for kind in self.precision]
        sidecars = [engine.build(run, file, wish) for file in track(files, "build", len(files))]
        if self.json:
            print(json_format.dumps(sidecars))
            return
        for sidecar in sidecars:
            print("{engine}: {backend} {version}, {precision}, {bytes:,} bytes, target {target}".format(**sidecar))


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure latency of runs: the model in torch, onnxruntime, and engines where a GPU is."""

    runs: RunFolders
    """Run folders, exported and scored by `runner parity`."""
    batch: tuple[int, ...] = (1, 8, 32)
    """Batch sizes to measure, one after the other."""
    precision: tuple[Precision, ...] = ("fp32",)
    """Which ONNX files and engines."""
    backend: tuple[Literal["eager", "compiled", "onnxruntime", "engine"], ...] = ("eager", "onnxruntime", "engine")
    """What runs them; compiled takes a minute before it can be measured."""
    seconds: float = 3.0
    """Measure each for at least so long."""
    repeats: int = 100
    """Measure each at least so many times."""
    threads: int | None = None
    """On the CPU; by default all usable cores."""
    device: launched.Device = "auto"
    """Where to compute; auto takes a GPU where there is one and says which it took."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner.deploy import latency

        if not self.runs:
            raise UserError("RUNS: expected at least one run folder")
        wish = latency.Wish(self.batch, self.precision, self.backend, self.seconds, self.repeats, self.threads)
        results = [latency.bench(Run(run), wish, self.device, os.environ) for run in self.runs]
        if self.json:
            print(json_format.dumps(results))
        else:
            latency.show(results)


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify images with an exported model; needs nothing but its file."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """ONNX file of `runner export`, or an engine with its sidecar (on a GPU)."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Image files, or folders of them."""
    batch: int = 32
    """Images at a time."""
    sheet: Path | None = None
    """PNG file for a contact sheet: the images with what was said of them."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where onnxruntime computes."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner.deploy import predict

        found = predict.predict(self.model, list(self.images), self.batch, self.device, self.sheet)
        if self.json:
            print(json_format.dumps([dataclasses.asdict(one) for one in found]))
            return
        for one in found:
            print(f"{one.image}: {one.label} {one.probability:.1%}")


@dataclasses.dataclass(frozen=True)
class Report:
    """Compare runs on one HTML page that opens offline, as Markdown, or as a W&B report."""

    runs: RunFolders
    """Run folders, or folders that hold some at any depth."""
    out: Path = Path("report.html")
    """HTML file to write the page to."""
    markdown: Path | None = None
    """Also write the tables as Markdown to this file."""
    wandb: str | None = None
    """Also create, or update, the report in W&B, as ENTITY/PROJECT; its runs are those that training or `runner
    sync` has shown there."""
    wandb_spec: Path | None = None
    """Also write that report's specification to this file; needs no network."""
    json: bool = False
    """Print the compared rows as JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner.report import collect, markdown, page
        from runner.runs import find_runs, write_atomically

        if not self.runs:
            raise UserError("RUNS: expected at least one run folder or folder of runs")
        if self.wandb is not None and self.wandb.count("/") != 1:
            raise UserError(f"--wandb {self.wandb}: expected ENTITY/PROJECT")
        records, unreadable = collect.read_all(find_runs(list(self.runs)))
        for entry in unreadable:
            print(f"runner: not read: {entry.run.folder}: {entry.told}", file=sys.stderr)
        if not records:
            raise UserError("RUNS: expected a run that can be read, found none")
        page.write(records, self.out, unreadable)
        for path, text in ((self.markdown, markdown.render),):
            if path is not None:
                write_atomically(path, text(records).encode())
        if self.wandb_spec is not None or self.wandb is not None:
            from runner.report import wandb_report

            if self.wandb_spec is not None:
                write_atomically(self.wandb_spec, wandb_report.specification(records, self.wandb).encode())
            if self.wandb is not None:
                print(f"W&B report: {wandb_report.save(records, self.wandb)}", file=sys.stderr)
        if self.json:
            rows = [collect.row(entry) for entry in records]
            print(json_format.dumps({"runs": rows, "experiments": collect.experiments(records)}))
        else:
            print(f"{self.out}: {len(records)} runs compared")


@dataclasses.dataclass(frozen=True)
class Sync:
    """Bring W&B to what run folders hold: rows, tables, summary, artifacts; each once, however often called."""

    runs: RunFolders
    """Run folders, or folders that hold some at any depth."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner import wandb_view
        from runner.runs import find_runs
        from runner.tracking import has_key

        if not self.runs:
            raise UserError("RUNS: expected at least one run folder or folder of runs")
        found = find_runs(list(self.runs))
        if not has_key(os.environ):
            raise UserError("W&B: no key in WANDB_API_KEY or ~/.netrc; expected one, from: wandb login")
        results = wandb_view.sync(found, os.environ)
        if self.json:
            print(json_format.dumps(results))
            return
        for result in results:
            print(
                f"{result['run']}: {result['rows']} new rows" if result["new"] else f"{result['run']}: nothing new"
            )


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Check this machine: data, disk, GPUs, all-reduce, rendezvous, W&B, onnxruntime, TensorRT; say what to do."""

    data: Path | None = None
    """Prepared dataset to check, file by file."""
    runs: Path = Path("runs")
    """Folder of runs, whose disk is checked."""
    ranks: int | None = None
    """Ranks of the all-reduce; by default one a GPU, or two on the CPU."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from runner import doctor

        findings = doctor.examine(self.data, self.runs, self.ranks, os.environ)
        if self.json:
            print(json_format.dumps([dataclasses.asdict(finding) for finding in findings]))
        else:
            doctor.show(findings)
        if any(finding.state == "fault" for finding in findings):
            raise SystemExit(1)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train as a request says, and print the summary."""

    request: TrainRequest

    def __call__(self) -> None:
        registered = self.request.check()
        from runner.job import run_training

        finished = run_training(self.request, registered, os.environ)
        if len(finished.summaries) == 1:
            _result(finished.summaries[0], self.request.json, SCORED)
        elif finished.summaries:
            _results(finished.summaries, self.request.json)
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
        stop_file: Path | None = None,
        hang_timeout: float = 600.0,
        evaluate_every: int = 1,
        deterministic: bool = False,
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
            precision: Precision of training; `launch` is what the accelerate configuration says, or fp32. On GPUs
                fp32 has TF32 in convolutions, as torch has it.
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
            stop_file: File that ends the run with a checkpoint when it appears, and is removed when that is done;
                by default `stop` in the run folder.
            hang_timeout: Seconds without a step after which a rank shows its stacks and leaves with exit code 70,
                and all ranks with it; three times as long until the first step.
            evaluate_every: Epochs between two evaluations, each with a checkpoint; the last epoch always has one.
            deterministic: Choose kernels that give the same sums every time, so that two runs on one GPU are equal
                to the bit; an operation that has none is refused. On the CPU they are so anyway.
            architecture: What is trained.
            recipe: How it is trained.
        """
        if seed is not None and seeds:
            raise UserError(f"--seed {seed} and --seeds: expected one of them")
        chosen = seeds or (seed or 0,)
        request = TrainRequest(
            experiment, data, runs, name, chosen, max_steps, device, precision, loader, workers,
            overwrite, json, experiments_from, architecture, recipe, teacher, start_from, checkpoint_every,
            resume, resume_anyway, stop_file, hang_timeout, evaluate_every, deterministic,
        )  # fmt: skip
        return Train(request)

    return train


def parse(given: list[str]) -> Callable[[], Any]:
    """Reads a command line; returns the command as a function of no arguments.

    Raises:
        UserError: it names an experiment that there is not.
        SystemExit: code 2 where the options cannot be read.
    """
    commands: dict[str, Callable[..., Any]] = {
        "list": List,
        "train": train_with_defaults(_experiment_in(given)),
        "eval": Eval,
        "export": Export,
        "parity": Parity,
        "engine": Engine,
        "bench": Bench,
        "predict": Predict,
        "report": Report,
        "sync": Sync,
        "doctor": Doctor,
    }
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="runner",
        description="From FFCV files to trained models, ONNX, TensorRT engines, latencies, and one report.",
        args=given,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    run_command(lambda: parse(given), "runner", speaks=int(os.environ.get("LOCAL_RANK", 0)) == 0)


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
