"""The quickstart: from images to one page that compares trained, exported and measured architectures.

Every stage is a command that a user could type. This script runs them in order, skips those whose results exist and
are complete, and prints where everything is.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from data_prep import beton, sources
from data_prep.images import Fit
from data_prep.manifest import SPLITS, Manifest
from launch.plan import ROOT, Resources, TrainingPlan, plan_training, training_command
from runner import experiments
from runner.common.command_line import read_command
from runner.common.console import run_command
from runner.common.errors import UserError
from runner.common.files import read_json, write_json
from runner.config.recipe import Count
from runner.run.folder import Run, find_runs
from runner.system import environment

DEFAULT_EXPERIMENTS = ("podeti-alexnet", "podeti-mobilenetv2", "soni-2")
DOWNLOADS = Path("~/.cache/training-runner/downloads")
BANNER = (
    "THE OFFICIAL DATA CANNOT BE REACHED FROM HERE. EVERYTHING BELOW IS MEASURED ON THE BUILT-IN SYNTHETIC SET "
    "(synthetic-10), AND SAYS NOTHING ABOUT CIFAR-10. GIVE REAL IMAGES WITH --source."
)


@dataclass(frozen=True)
class Quickstart:
    """Prepare data; train, export and measure three networks; compare them."""

    source: str = "official"
    """`official` (downloads CIFAR-10; if that fails, uses the built-in synthetic set, with a clear warning),
    `cifar100`, `synthetic`, or the PATH of an archive or folder of images (see `python -m data_prep prepare
    --help`)."""
    size: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Fit the images of a folder to this many pixels per side; by default, all images must have the same size."""
    fit: Fit | None = None
    """With --size: crop the center (by default), pad with black, or stretch."""
    experiments: tuple[str, ...] = DEFAULT_EXPERIMENTS
    """Names of the experiments to train; see `runner list`."""
    epochs: Count | None = None
    """Epochs per experiment; by default the whole recipe on GPUs, and on the CPU a part of one epoch that takes about a
    minute."""
    out: Path = Path("quickstart-out")
    """Output folder; a second call with the same folder continues, and reuses complete results."""

    def __call__(self) -> None:
        Pipeline(self).run()


class Pipeline:
    """Runs all stages of the quickstart, and prints the number and the elapsed time of each."""

    def __init__(self, options: Quickstart) -> None:
        self.options = options
        self.experiments = {name: experiments.get(name) for name in options.experiments}
        if not self.experiments:
            raise UserError("--experiments: expected at least one name (see runner list)")
        if len(self.experiments) < len(options.experiments):
            raise UserError(f"--experiments {' '.join(options.experiments)}: expected each name once")
        gpus, cores = environment.count_gpus(), environment.usable_cores()
        self.resources = Resources(gpus, cores, environment.cpu_supports_bf16())
        self.measures = not self.resources.gpus and options.epochs is None
        self.stage, self.stages = 0, 2 + self.measures + 5 * len(self.experiments)
        self.start = time.monotonic()

    def run(self) -> None:
        """Runs all stages in order."""
        out = self.options.out
        say(f"on {environment.describe_hardware()}, {self.resources.gpus} GPUs; output in {out}")
        manifest, data = self.prepare()
        runs = out / "runs" / data.name
        speeds = self.measure(manifest, out / f"speed-{data.name}.json") if self.measures else {}
        train, test = (manifest.splits[split].images for split in SPLITS)
        for name, experiment in self.experiments.items():
            plan = plan_training(experiment, self.resources, self.options.epochs, train, test, speeds.get(name, {}))
            self.train_and_deploy(name, plan, data, runs, manifest)
        page = out / "report.html"
        self.run_stage("report", False, ["-m", "runner", "report", str(runs), "--out", str(page)])
        say(f"done in {(time.monotonic() - self.start) / 60:.1f} minutes, on {manifest.name}")
        say(f"  data    {data}")
        for run in find_runs([runs]):
            say(f"  run     {run.folder}  (metrics, weights, figures, ONNX{', engine' * _has_engine(run)}, W&B files)")
        say(f"  page    {page}")
        if manifest.name == "synthetic-10" and self.options.source == "official":
            say(BANNER)

    def prepare(self) -> tuple[Manifest, Path]:
        """Prepares and checks the dataset; falls back to the synthetic set if the official one is unreachable."""
        self.announce(f"prepare {self.options.source}")
        try:
            options = self.options
            source = sources.load(options.source, downloads=DOWNLOADS.expanduser(), size=options.size, fit=options.fit)
            slug = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(options.source).name.split(".")[0])
            slug += f"-{options.size}-{options.fit or 'crop'}" if options.size else ""
        except sources.SourceUnreachableError as error:
            if self.options.source != "official":
                raise
            say(str(error))
            say(BANNER)
            source, slug = sources.load("synthetic"), "synthetic"
        for note in source.notes:
            say(f"  {note}")
        data = self.options.out / "data" / slug
        manifest = beton.write(source, data)
        counts = " and ".join(f"{manifest.splits[split].images:,} {split}" for split in SPLITS)
        say(f"  {manifest.name}: {counts} images, fingerprint {manifest.fingerprint}")
        return manifest, data

    def measure(self, manifest: Manifest, file: Path) -> dict[str, dict[str, float]]:
        """Returns the training speed in images per second, by experiment and precision.

        The speeds are stored in `file`, so that a second call makes the same plan.
        """
        precisions = "fp32,bf16" if self.resources.bf16 else "fp32"
        speeds = read_json(file, dict[str, dict[str, float]]) if file.is_file() else {}
        speeds = {name: values for name, values in speeds.items() if set(values) == set(precisions.split(","))}
        missing = [name for name in self.experiments if name not in speeds]
        title = f"measure the training speed in {precisions.replace(',', ' and ')}"
        self.announce(title if missing else f"{title} (already done)")
        if missing:
            height, width, _ = manifest.image_shape
            argv = [precisions, len(manifest.classes), height, width, *missing]
            done = subprocess.run(
                [sys.executable, "-m", "launch.speed", *map(str, argv)], cwd=ROOT, stdout=subprocess.PIPE, check=False
            )
            if done.returncode != 0:
                raise SystemExit(done.returncode)
            speeds |= json.loads(done.stdout)
            write_json(file, speeds)
        for name in self.experiments:
            measured = ", ".join(f"{speed:,.0f} images/s in {p}" for p, speed in speeds[name].items())
            say(f"  {name}: {measured}")
        return speeds

    def train_and_deploy(self, name: str, plan: TrainingPlan, data: Path, runs: Path, manifest: Manifest) -> None:
        """Trains, exports, builds and measures one experiment; skips the stages that are done.

        Whether a stage is done is checked right before it, because earlier stages may change its files.
        """
        run = Run(runs / name / plan.name)
        trained = run.summary.is_file() and run.config().dataset.fingerprint == manifest.fingerprint
        threads = max(1, self.resources.cores // max(1, self.resources.gpus))
        train = [*training_command(plan.launcher, threads), name, "--data", str(data)]
        train += ["--runs", str(runs), "--name", plan.name, "--overwrite", *plan.options]
        self.run_stage(f"train {name}: {plan.description}", trained, train)
        folder = str(run.folder)
        self.run_stage(f"export {name}", trained and bool(_scored(run)), ["-m", "runner", "export", folder])
        # Build the engine before the parity gate, which also scores the engine if there is a GPU to run it.
        if no_engine := _why_no_engine():
            self.announce(f"engine {name} (not possible here)")
            say(f"  {no_engine}")
        else:
            self.run_stage(f"engine {name}", trained and _has_engine(run), ["-m", "runner", "engine", folder])
        gpu = self.resources.gpus > 0
        backend = "engine" if gpu and not no_engine else "onnxruntime"
        passed = trained and backend in _scored(run)
        device = () if gpu else ("--device", "cpu")
        self.run_stage(f"parity {name}", passed, ["-m", "runner", "parity", folder, *device])
        bench = ["-m", "runner", "bench", folder, "--batch", "1", "--seconds", "1"]
        self.run_stage(f"bench {name}", trained and _has_latency(run, backend), bench)

    def run_stage(self, title: str, done: bool, argv: list[str]) -> None:
        """Runs one stage in its own process, unless it is done.

        Raises:
            SystemExit: with code 1 if the stage fails.
        """
        self.announce(title + (" (already done)" if done else ""))
        if done:
            return
        result = subprocess.run([sys.executable, *argv], check=False)
        if result.returncode != 0:
            say(f"{title}: failed with exit code {result.returncode}, see above; rerun the same command to resume here")
            raise SystemExit(1)

    def announce(self, title: str) -> None:
        """Prints the stage's number, the elapsed time and its title."""
        self.stage += 1
        elapsed = int(time.monotonic() - self.start)
        say(f"[{self.stage}/{self.stages}] {elapsed // 60}:{elapsed % 60:02d} {title}")


def say(line: str) -> None:
    """Prints a line and flushes, so that the line appears at once even in a pipe."""
    print(line, flush=True)


def _sha256_of_onnx(run: Run) -> str | None:
    """Returns the hash of the run's ONNX file; None where it is missing, damaged or outdated."""
    from runner.deploy import onnx

    try:
        return onnx.exported(run).sha256
    except UserError:
        return None


def _scored(run: Run) -> set[str]:
    """Returns the backends with which the current ONNX file has passed the gate."""
    try:
        report, sha256 = run.read_parity(), _sha256_of_onnx(run)
    except UserError:
        return set()
    rows = report.rows if report and sha256 else []
    return {row.backend for row in rows if row.passed and row.onnx_sha256 == sha256}


def _has_latency(run: Run, backend: str) -> bool:
    """Returns whether latency.json has measurements of the current ONNX file with a backend."""
    try:
        report, sha256 = run.read_latency(), _sha256_of_onnx(run)
    except UserError:
        return False
    rows = report.rows if report and sha256 else []
    return any(row.measured and (row.backend, row.onnx_sha256) == (backend, sha256) for row in rows)


def _why_no_engine() -> str | None:
    """Returns why no engine can be built on this machine; None if one can."""
    from runner.deploy import engine_library

    try:
        engine_library.select_library("auto")
    except UserError as error:
        return str(error)
    return None


def _has_engine(run: Run) -> bool:
    """Returns whether the current ONNX file has an engine that is not for other GPUs."""
    from runner.deploy import engine_run, onnx

    try:
        return any(
            engine_run.incompatibility(sidecar) is None
            for sidecar in engine_run.verified_engines(run, onnx.exported(run))
        )
    except UserError:
        return False


def main(argv: Sequence[str]) -> None:
    """Entry point of launch/quickstart."""

    def parse() -> Callable[[], None]:
        return read_command(Quickstart, argv, "launch/quickstart")

    run_command(parse, "quickstart")


if __name__ == "__main__":
    main(sys.argv[1:])
