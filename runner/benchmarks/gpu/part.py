"""What every part has: its time, its size, its commands, and a file that is whole after every finding."""

import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from data_prep.console import EXIT_BAD_INPUT, UserError
from data_prep.manifest import Manifest
from runner import environment, launched
from runner.benchmarks.measure import accelerate_launch
from runner.recipe import Experiment
from runner.runs import Run, read_json, write_json

ROOT = Path(__file__).parents[3]
PATIENCE = 45.0  # seconds that a command has to end by itself, with a checkpoint, when its time is over
SAME = ("rehearsal", "hardware", "driver", "versions", "commit", "dataset", "fingerprint")


class MissingError(RuntimeError):
    """Something that a finding needs is not here: a package, a second GPU, time."""


class RefusedError(RuntimeError):
    """A command does not do here what was asked of it: exit code 2."""


class OutOfTimeError(MissingError):
    """The part's share of the minutes is used up."""

    def __init__(self) -> None:
        super().__init__("out of time")


@dataclass(frozen=True)
class Scale:
    """How much is done of everything.

    Attributes:
        rounds: turns of subjects that are compared.
        steps: optimizer steps in a turn.
        batch: images of a training step.
        losses: optimizer steps over which precisions and ranks are compared.
        trained_in: precisions of training; fp16 is a GPU's alone.
        killed: optimizer steps of the run that is killed.
        product: side of the matrices whose product tells the peak.
        architectures: experiments whose steps are measured; empty for one of every architecture.
        modes: of torch.compile by name, None for none.
        scripts: other benchmarks, whose own tests rehearse them.
        seeds: trainings of the speed run.
        speedrun: its options beyond the recipe.
        reproduced: experiments that are trained; empty for all.
        training: options of their training.
        deployed: experiments that are exported and measured.
        brief: optimizer steps that they get where they have not been trained.
        precisions, batches: in which.
        seconds: of each latency at least.
    """

    rounds: int = 7
    steps: int = 20
    batch: int = 512
    losses: int = 200
    trained_in: tuple[str, ...] = ("fp32", "bf16", "fp16")
    killed: int = 2000
    product: int = 8192
    architectures: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("eager", "compiled", "graphs")
    scripts: tuple[str, ...] = ("overhead", "scaling")
    seeds: int = 20
    speedrun: tuple[tuple[str, Any], ...] = ()
    reproduced: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    deployed: tuple[str, ...] = (
        "podeti-resnet18",
        "podeti-mobilenetv2",
        "merabishvili",
        "vit-tiny-4",
        "podeti-alexnet",
    )
    brief: int = 200
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    batches: tuple[int, ...] = (1, 8, 32, 128, 256, 512)
    seconds: float = 3.0


MINIATURE = Scale(
    rounds=2,
    steps=2,
    batch=8,
    losses=2,
    trained_in=("fp32", "bf16"),
    killed=40,
    product=128,
    architectures=("soni-2", "efficientnet-b0"),
    modes=("eager",),
    scripts=(),
    seeds=2,
    speedrun=(("epochs", 1), ("batch_size", 100)),
    reproduced=("soni-2",),
    training=("--max-steps", "1", "--recipe.batch-size", "50"),
    deployed=("soni-2",),
    brief=1,
    precisions=("fp32", "fp16"),
    batches=(1, 2),
    seconds=0.05,
)


@dataclass(frozen=True)
class Context:
    """What a part is given.

    Attributes:
        data, manifest: the prepared dataset.
        out: folder of the results, and of the runs that are trained for them.
        rehearse: everything in miniature on the CPU.
        ends: when its time is over, by the monotonic clock.
        peer: a script to run beside the speed run.
        peer_row: what its line of a result looks like, with the groups `accuracy` and `seconds`.
    """

    data: Path
    manifest: Manifest
    out: Path
    rehearse: bool
    ends: float
    peer: Path | None = None
    peer_row: str = ""

    @property
    def scale(self) -> Scale:
        """How much is done."""
        return MINIATURE if self.rehearse else Scale()

    @property
    def device(self) -> str:
        """ "cuda", or "cpu" in a rehearsal."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def gpus(self) -> int:
        """Processes that training can be spread over: the GPUs, or two on the CPU."""
        return 2 if self.rehearse else environment.count_gpus()

    def left(self) -> float:
        """Seconds of this part's time that are left."""
        return self.ends - time.monotonic()

    def command(self, *words: object, cwd: Path | None = None) -> str:
        """Runs `python words…`, W&B switched off, and returns what it printed.

        Raises:
            OutOfTimeError: it was asked to end, for its time was over; training has left a checkpoint.
            RefusedError: it cannot be had here.
            RuntimeError: it failed; the message is the end of what it said.
        """
        process = self.begin(*words, cwd=cwd)
        try:
            out, err = process.communicate(timeout=max(0.1, self.left()))
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            raise OutOfTimeError from None
        if process.returncode != 0:
            kind = RefusedError if process.returncode == EXIT_BAD_INPUT else RuntimeError
            raise kind(" ".join((err or out).split())[-600:])
        return out

    def begin(
        self, *words: object, cwd: Path | None = None, errors: IO[str] | int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Starts `python words…`, its errors into a file or a pipe; it dies with this process."""
        variables = ["env", "WANDB_MODE=disabled", f"PYTHONPATH={':'.join([str(ROOT), *sys.path[1:]])}"]
        variables += ["ACCELERATE_USE_CPU=true"] if self.rehearse else []
        return subprocess.Popen(
            [*variables, sys.executable, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=cwd,
            preexec_fn=launched.end_with_parent,
        )

    def training(self, name: str, run: str, *options: object, processes: int = 1) -> tuple[Run, list[object]]:
        """The run that a training leaves, and the words that start it; where it has begun it goes on."""
        runs = self.out / "runs"
        words = ["-m", "runner", "train", name, "--data", self.data, "--runs", runs, "--name", run]
        words += ["--resume", "auto", "--device", self.device, *options]
        if processes > 1:
            words = [*accelerate_launch(processes, "no"), *words]
        return Run(runs / name / run), words

    def train(self, name: str, run: str, *options: object, processes: int = 1) -> Run:
        """Trains, and returns the finished run."""
        trained, words = self.training(name, run, *options, processes=processes)
        self.command(*words)
        return trained


class Ledger:
    """The findings of a part by name, in a JSON file that is whole after each of them.

    Args:
        context: of the part.
        name: of the part.

    Raises:
        UserError: the file holds findings of another machine, dataset or version of the code.
    """

    def __init__(self, context: Context, name: str) -> None:
        self.context = context
        self.path = path_of(context, name)
        about = {
            "part": name,
            "rehearsal": context.rehearse,
            "hardware": environment.hardware(),
            "driver": driver(),
            "versions": environment.versions("triton", "tensorrt", "tensorrt-rtx"),
            "commit": environment.git_commit().get("commit"),
            "dataset": context.manifest.name,
            "fingerprint": context.manifest.fingerprint,
        }
        before = read_json(self.path) if self.path.is_file() else about
        for key in SAME:
            old, new = (_compared(content.get(key)) for content in (before, about))
            if old != new:
                told = f"holds findings of {key} {old}, this is {new}"
                raise UserError(f"{self.path}: {told}; expected an --out of its own for each")
        self.content: dict[str, Any] = {"found": {}, **before, **about}

    @property
    def whole(self) -> bool:
        """Whether the part has come to its end, and lacked nothing."""
        return self.content.get("ended", False) and len(self.found) == len(self.content["found"])

    @property
    def found(self) -> dict[str, dict[str, Any]]:
        """What has been measured so far."""
        return {name: one for name, one in self.content["found"].items() if was_measured(one)}

    def once(self, name: str, find: Callable[[], dict[str, Any]], derived: bool = False) -> dict[str, Any] | None:
        """A finding: the one that is written down, or else the one that `find` makes now.

        Whatever goes wrong with it is written in its place, is no other's concern, and is tried again at the next
        start.

        Args:
            name: of the finding.
            find: measures.
            derived: it follows from other findings, and is made anew where these have become more.

        Returns:
            The finding; None where there is none.
        """
        if name in self.found and not derived:
            return self.found[name]
        began = time.monotonic()
        try:
            if self.context.left() <= 0 and not derived:
                raise OutOfTimeError
            finding = find()
        except MissingError as error:
            finding = {"missing": str(error)}
        except ModuleNotFoundError as error:
            finding = {"missing": str(error)}
        except Exception as error:
            told = (str(error).splitlines() or [""])[0]
            finding = {"failed": f"{type(error).__name__}: {told}"}
        if derived and name in self.found and not changed(self.found[name], finding):
            return self.found[name]
        finding |= {"took_seconds": round(time.monotonic() - began, 2)}
        finding |= {"at": datetime.now(UTC).isoformat(timespec="milliseconds")}
        self.content["found"][name] = json.loads(json.dumps(finding))
        self.write()
        print(f"  {name}: {finding.get('missing') or finding.get('failed') or 'done'}", flush=True)
        if "CUDA error" in finding.get("failed", ""):
            raise SystemExit(f"  {name}: the GPU is of no use to this process any more; the same command goes on")
        return finding if was_measured(finding) else None

    def write(self, **more: Any) -> None:
        """Writes the file, with something beside the findings."""
        self.content |= more
        write_json(self.path, self.content)


def _compared(value: Any) -> Any:
    """What has to be the same; memory may grow and shrink under a virtual machine."""
    return {key: one for key, one in value.items() if key != "memory_gib"} if isinstance(value, dict) else value


def changed(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a finding is another one than before."""
    return any(before.get(key) != value for key, value in json.loads(json.dumps(now)).items())


def was_measured(finding: dict[str, Any]) -> bool:
    """Whether a finding is one, rather than the reason why there is none."""
    return not finding.keys() & {"missing", "failed"}


def path_of(context: Context, name: str) -> Path:
    """Where a part's findings lie; only those of a GPU have the name that the README's tables look for."""
    return context.out / f"{name}-{'rehearsal' if context.rehearse else 'gpu'}.json"


@functools.cache
def driver() -> str | None:
    """Version of the NVIDIA driver; None where it does not tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
    return told[0] if told else None


def fitted(experiment: Experiment, images: int) -> list[str]:
    """Options that fit a recipe to a dataset of so few training images; none for a whole one."""
    held_out = experiment.recipe.validation
    return ["--recipe.validation", str(images // 10)] if held_out * 2 > images else []


def spread(figures: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    ordered = sorted(figures)
    return {"median": ordered[len(ordered) // 2], "min": ordered[0], "max": ordered[-1]}
