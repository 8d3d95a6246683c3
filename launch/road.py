"""The quickstart: from images to one page that compares trained, exported and measured architectures.

Every stage is the command that a user would type; this script only puts them in a row, skips what is already
there and whole, and says where everything is.
"""

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from data_prep import beton, sources
from data_prep.console import UserError, run_command
from data_prep.manifest import SPLITS, Manifest
from launch.plan import Hardware, Job, quick_job, training_command
from runner import environment, experiments
from runner.recipe import Experiment
from runner.runs import Run, find_runs, read_json

DEFAULT_EXPERIMENTS = ("podeti-alexnet", "podeti-mobilenetv2", "merabishvili")
DOWNLOADS = Path("~/.cache/training-runner/downloads")
BANNER = (
    "THE OFFICIAL DATA CANNOT BE REACHED FROM HERE. EVERYTHING BELOW IS MEASURED ON THE BUILT-IN SYNTHETIC SET "
    "(synthetic-10), AND SAYS NOTHING ABOUT CIFAR-10. GIVE REAL IMAGES WITH --source."
)


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Prepare data, train three architectures, export, build engines, measure latency, and compare on one page."""

    source: str = "official"
    """`official` (downloads CIFAR-10; where that cannot be reached, the built-in synthetic set stands in and
    everything says so), `synthetic`, or the PATH of an archive or folder of images (see `python -m data_prep
    prepare --help`)."""
    experiments: tuple[str, ...] = DEFAULT_EXPERIMENTS
    """Names from `runner list`."""
    epochs: int | None = None
    """Epochs of each; by default the whole recipe on GPUs, and a part of one epoch, told by the cores, on the
    CPU."""
    out: Path = Path("quickstart-out")
    """Folder for everything; a second call in the same folder continues and reuses what is whole."""

    def __call__(self) -> None:
        Road(self).walk()


class Road:
    """One walk along the road, with its stages counted and timed."""

    def __init__(self, wish: Quickstart) -> None:
        if wish.epochs is not None and wish.epochs < 1:
            raise UserError(f"--epochs {wish.epochs}: expected 1 or more")
        self.wish = wish
        self.chosen: dict[str, Experiment] = {name: experiments.get(name) for name in wish.experiments}
        if not self.chosen:
            raise UserError("--experiments: expected at least one name (see runner list)")
        self.hardware = Hardware(environment.count_gpus(), len(os.sched_getaffinity(0)), environment.cpu_has_bf16())
        self.stage, self.stages = 0, 2 + 5 * len(self.chosen)
        self.began = time.monotonic()

    def walk(self) -> None:
        """All stages, in order."""
        place = environment.described(environment.hardware())
        say(f"on {place}, {self.hardware.gpus} GPUs; output in {self.wish.out}")
        manifest, data = self.prepare()
        runs = self.wish.out / "runs" / data.name
        for name, experiment in self.chosen.items():
            job = quick_job(experiment, self.hardware, self.wish.epochs, manifest.splits["train"].images)
            self.train_and_deploy(name, experiment, job, data, runs, manifest)
        page = self.wish.out / "report.html"
        self.do("report", False, ["-m", "runner", "report", str(runs), "--out", str(page)])
        minutes = (time.monotonic() - self.began) / 60
        say(f"done in {minutes:.1f} minutes, on {manifest.name}")
        say(f"  data    {data}")
        for run in find_runs([runs]):
            say(f"  run     {run.folder}  (metrics, weights, figures, ONNX, engine, W&B files)")
        say(f"  page    {page.absolute()}")
        if manifest.name == "synthetic-10" and self.wish.source == "official":
            say(BANNER)

    def prepare(self) -> tuple[Manifest, Path]:
        """The dataset, whole and checked; the synthetic set where the official one cannot be reached."""
        self.announce(f"prepare {self.wish.source}")
        downloads = DOWNLOADS.expanduser()
        try:
            source = sources.load(self.wish.source, downloads=downloads)
            slug = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(self.wish.source).name.split(".")[0])
        except sources.SourceUnreachableError as error:
            say(str(error))
            say(BANNER)
            source, slug = sources.load("synthetic"), "synthetic"
        data = self.wish.out / "data" / slug
        manifest = beton.write(source, data)
        counts = " and ".join(f"{manifest.splits[split].images:,} {split}" for split in SPLITS)
        say(f"  {manifest.name}: {counts} images, fingerprint {manifest.fingerprint}")
        return manifest, data

    def train_and_deploy(
        self, name: str, experiment: Experiment, job: Job, data: Path, runs: Path, manifest: Manifest
    ) -> None:
        """Trains, exports, builds and measures one experiment, as far as that is not done already."""
        run = Run(runs / name / job.name)
        trained = run.summary.is_file() and run.config()["dataset"]["fingerprint"] == manifest.fingerprint
        train = [*training_command(job.launcher, self.hardware.cores), name, "--data", str(data)]
        train += ["--runs", str(runs), "--name", job.name, "--overwrite", *job.options]
        self.do(f"train {name}: {job.told}", trained, train)
        folder = str(run.folder)
        # Whether a stage is done is asked when its turn has come: the one before may have changed its files.
        self.do(f"export {name}", trained and _scored(run), ["-m", "runner", "export", folder])
        # The engine before the gate, which scores it as well where a GPU can run it.
        self.do(f"engine {name}", trained and _built(run), ["-m", "runner", "engine", folder])
        device = () if self.hardware.gpus else ("--device", "cpu")
        scored = trained and _scored(run, engine=self.hardware.gpus > 0)
        self.do(f"parity {name}", scored, ["-m", "runner", "parity", folder, *device])
        quick = ["--batch", "1", "--seconds", "1"]
        self.do(f"bench {name}", trained and _measured(run), ["-m", "runner", "bench", folder, *quick])

    def do(self, told: str, done: bool, arguments: list[str]) -> None:
        """Runs one stage as a process of its own, unless it is done."""
        self.announce(told + (" – there already" if done else ""))
        if done:
            return
        result = subprocess.run([sys.executable, *arguments], check=False)
        if result.returncode != 0:
            say(f"{told}: failed with exit code {result.returncode}, see above; the same command continues here")
            raise SystemExit(1)

    def announce(self, told: str) -> None:
        """One line for a stage, with the time since the start."""
        self.stage += 1
        elapsed = int(time.monotonic() - self.began)
        say(f"[{self.stage}/{self.stages}] {elapsed // 60}:{elapsed % 60:02d} {told}")


def say(line: str) -> None:
    """Tells the user, at once even through a pipe."""
    print(line, flush=True)


def _scored(run: Run, engine: bool = False) -> bool:
    """Whether the gate's report speaks of the ONNX file that is there, and of its engine where one can run."""
    backends = {row["backend"] for row in _rows_of_onnx(run, "parity.json")}
    return bool(backends - {"onnxruntime"} if engine else backends)


def _measured(run: Run) -> bool:
    """Whether the latencies are those of the ONNX file that is there."""
    return bool(_rows_of_onnx(run, "latency.json"))


def _rows_of_onnx(run: Run, name: str) -> list[dict[str, Any]]:
    from runner.deploy import onnx

    try:
        rows, sha256 = read_json(run.deploy / name)["rows"], onnx.exported(run).sha256
    except (UserError, KeyError):
        return []
    return [row for row in rows if row.get("onnx_sha256") == sha256]


def _built(run: Run) -> bool:
    """Whether there is an engine, of the ONNX file that is there."""
    from runner.deploy import engine, onnx

    try:
        return bool(engine.built(run, onnx.exported(run)))
    except (UserError, KeyError):
        return False


def main() -> None:
    """Entry point of launch/quickstart."""

    def parse() -> Callable[[], None]:
        return tyro.cli(Quickstart, prog="launch/quickstart")

    run_command(parse, "quickstart")


if __name__ == "__main__":
    main()
