"""The run folder: `runs/<experiment>/<run>/`, its files, and how they are read.

run.json         what was run: resolved config, versions, git commit, dataset, hardware
metrics.jsonl    every metric, one JSON object per line: the source of truth that W&B mirrors
summary.json     the outcome; its presence means that the run is finished
ended.json       why the last attempt ended early, if it did
predictions.npz  logits (N, classes) and labels (N,) of the test images after training
checkpoints/     step-N/: weights, and a manifest with their hash
figures/         pictures of this run
profile/         a trace of some steps, and a picture of it, with --profile-steps
deploy/          ONNX files, engines, parity report, latencies
wandb/           W&B's own files
lock             held by the process that trains
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

from msgspec.structs import replace

from runner.common.console import list_some
from runner.common.errors import TRANSIENT_ERRNOS, UserError
from runner.common.files import is_file, names_in, read_bytes, unreadable
from runner.config.train_config import check_name
from runner.config.trust import TrustedCode
from runner.run import lock
from runner.run.schema import (
    FORMAT,
    CheckpointManifest,
    Ending,
    EngineSidecar,
    Export,
    LatencyReport,
    Mistake,
    Mistakes,
    ParityReport,
    Precision,
    PrecisionSearch,
    RunConfig,
    Summary,
    Version,
    decode,
)

T = TypeVar("T")
METRICS = "metrics.jsonl"
WEIGHTS = "model.safetensors"  # of a checkpoint
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d+)")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LOCK_TIMEOUT = 60.0  # seconds to wait for the previous process to exit, possibly on another node
State = Literal["complete", "running", "stopped", "failed", "crashed", "missing"]


@dataclass(frozen=True)
class Run:
    """A run folder: the path of every file in it, and readers for them. Creating this value does not touch the disk.

    Attributes:
        folder: its path.
        trusted_code: which models may be built from it (see runner.experiments.check_trusted).
    """

    folder: Path
    trusted_code: TrustedCode = TrustedCode()

    @property
    def run_json(self) -> Path:
        """Path of run.json."""
        return self.folder / "run.json"

    @property
    def metrics(self) -> Path:
        """Path of metrics.jsonl."""
        return self.folder / METRICS

    @property
    def summary(self) -> Path:
        """Path of summary.json."""
        return self.folder / "summary.json"

    @property
    def ended(self) -> Path:
        """Path of ended.json."""
        return self.folder / "ended.json"

    @property
    def lock(self) -> Path:
        """Path of the lock file."""
        return self.folder / "lock"

    @property
    def predictions(self) -> Path:
        """Path of predictions.npz."""
        return self.folder / "predictions.npz"

    @property
    def checkpoints(self) -> Path:
        """Path of the folder of checkpoints."""
        return self.folder / "checkpoints"

    def step_folder(self, step: int) -> Path:
        """Path of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step}"

    def checkpoint_steps(self) -> list[int]:
        """The steps of the checkpoints that exist, in ascending order."""
        return sorted(int(found[1]) for found in map(STEP_FOLDER.fullmatch, names_in(self.checkpoints)) if found)

    def weights_sha256(self) -> str | None:
        """The SHA-256 of the newest checkpoint's weights, from its manifest; None without a checkpoint."""
        steps = self.checkpoint_steps()
        manifest = self.step_folder(steps[-1]) / MANIFEST if steps else None
        if manifest is None or not is_file(manifest):
            return None
        return _read(manifest, CheckpointManifest).sha256.get(WEIGHTS)

    @property
    def figures(self) -> Path:
        """Path of the folder of figures."""
        return self.folder / "figures"

    @property
    def profile(self) -> Path:
        """Path of the folder of profiles."""
        return self.folder / "profile"

    @property
    def mistakes(self) -> Path:
        """Path of figures/mistakes.json."""
        return self.figures / "mistakes.json"

    @property
    def deploy(self) -> Path:
        """Path of the folder of ONNX files, engines and their measurements."""
        return self.folder / "deploy"

    @property
    def exports(self) -> Path:
        """Path of deploy/exports.json."""
        return self.deploy / "exports.json"

    @property
    def parity(self) -> Path:
        """Path of deploy/parity.json."""
        return self.deploy / "parity.json"

    @property
    def latency(self) -> Path:
        """Path of deploy/latency.json."""
        return self.deploy / "latency.json"

    def check_links(self) -> None:
        """Raises UserError if a symbolic link leads out of the folder, since its readers could publish private files.

        W&B's own files, which are never read, may contain links to W&B's logs elsewhere; but W&B writes into the
        folder `wandb`, and into those in it whose names begin with a dot.
        """
        root = self.folder.resolve()
        for path in paths_below(self.folder):
            top, second, *_ = (*path.relative_to(self.folder).parts, ".")
            if top == "wandb" and not second.startswith("."):
                continue
            # `Path.resolve` raises RuntimeError for a link to itself, which nothing can read.
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise UserError(
                    f"{path}: a link that leads out of the run folder; replace it with the file, or remove it"
                )

    def check_pictures(self) -> None:
        """Raises UserError if a picture is not a PNG file: its readers would choose a decoder by its content."""
        for path in sorted(self.figures.glob("*.png")):
            is_png = False
            try:
                if is_file(path):  # and no pipe
                    with path.open("rb") as file:
                        is_png = file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror}); remove it") from None
            if not is_png:
                raise UserError(f"{path}: expected a PNG file; remove it")

    def state(self) -> State:
        """Returns the state of the run.

        `stopped` means that it was stopped on request, with a checkpoint; `failed`, that it ended with a recorded
        reason; `crashed`, that it ended without one, for example because it was killed; `missing`, that it was never
        started.
        """
        if is_file(self.summary):
            return "complete"
        if lock.is_locked(self.lock):
            return "running"
        if ending := self.read_ending():
            return "stopped" if ending.stopped else "failed"
        return "crashed" if is_file(self.run_json) else "missing"

    def config(self) -> RunConfig:
        """Reads run.json. Raises UserError if it is missing, damaged, or written by a later version."""
        if not is_file(self.run_json):
            raise UserError(f"{self.folder}: expected a run folder with run.json; make one with: runner train")
        content = _read_bytes(self.run_json)
        version = _decode(self.run_json, content, Version).format
        if version != FORMAT:
            raise UserError(
                f"{self.run_json}: expected format {FORMAT}, found {version}; use the version that wrote it"
            )
        return _decode(self.run_json, content, RunConfig)

    def read_summary(self) -> Summary | None:
        """Reads summary.json; returns None if the run is unfinished."""
        return _read(self.summary, Summary) if is_file(self.summary) else None

    def read_ending(self) -> Ending | None:
        """Reads ended.json; returns None if the last attempt did not end early."""
        return _read(self.ended, Ending) if is_file(self.ended) else None

    def read_mistakes(self) -> list[Mistake]:
        """Reads mistakes.json; returns an empty list if it does not exist. Raises UserError for an unknown class."""
        mistakes = _read(self.mistakes, Mistakes).mistakes if is_file(self.mistakes) else []
        highest = max((max(mistake.label, mistake.predicted) for mistake in mistakes), default=-1)
        if highest >= 0 and highest >= (count := len(self.config().dataset.classes)):
            raise UserError(f"{self.mistakes}: expected one of {count} classes, found {highest}; restore or remove it")
        return mistakes

    def precision_search(self, precision: Precision) -> Path:
        """Path of the result of a search for the operators that stay in fp32."""
        return self.deploy / f"search.{precision}.json"

    def read_precision_searches(self) -> list[PrecisionSearch]:
        """Reads the results of all such searches."""
        paths = (self.precision_search(precision) for precision in get_args(Precision))
        return [_read(path, PrecisionSearch) for path in paths if path.is_file()]

    def read_exports(self) -> dict[str, Export]:
        """Reads exports.json, which lists the exported files by name; returns an empty dict if it does not exist."""
        return _read(self.exports, dict[str, Export]) if is_file(self.exports) else {}

    def read_parity(self) -> ParityReport | None:
        """Reads parity.json; returns None if it does not exist."""
        return _read(self.parity, ParityReport) if is_file(self.parity) else None

    def read_latency(self) -> LatencyReport | None:
        """Reads latency.json; returns None if it does not exist.

        Earlier versions stored the results of the parity gate only in parity.json, from which they are filled in.
        """
        if not is_file(self.latency):
            return None
        report = _read(self.latency, LatencyReport)
        if all(row.gate or not row.onnx_sha256 for row in report.rows):
            return report
        parity = self.read_parity()
        gates = {(row.onnx_sha256, row.engine_sha256, row.provider): row.gate for row in parity.rows} if parity else {}
        rows = [
            replace(row, gate=row.gate or gates.get((row.onnx_sha256 or "", row.engine_sha256, row.provider or "")))
            for row in report.rows
        ]
        return replace(report, rows=rows)

    def sidecars(self) -> list[Path]:
        """Returns the paths of the JSON files that describe the engines."""
        return sorted(self.deploy.glob("model.*.engine.json"))

    def read_engines(self) -> list[EngineSidecar]:
        """Reads the description of every engine."""
        return [_read(path, EngineSidecar) for path in self.sidecars()]


def _read(path: Path, kind: type[T]) -> T:
    """Reads a JSON file. Raises UserError if it is damaged or does not match the type; the message names the key."""
    return _decode(path, _read_bytes(path), kind)


def _read_bytes(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise unreadable(path, error) from None


def _decode(path: Path, content: bytes, kind: type[T]) -> T:
    try:
        return decode(content, kind)
    except ValueError as error:
        raise unreadable(path, error) from None


def paths_below(folder: Path, name: str | None = None) -> list[Path]:
    """Returns the paths below a folder, sorted: all, or those with this name. Links are not followed.

    Folders that disappear meanwhile are skipped, because a training may be replacing its checkpoints; `Path.rglob`
    raises an error then.

    Raises:
        UserError: folders are nested too deep, or cannot be read.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    try:
        walk = os.walk(folder, onerror=refuse)
        found = [Path(parent, one) for parent, folders, files in walk for one in (*folders, *files)]
        return sorted(path for path in found if name in (None, path.name))
    except (RecursionError, OSError) as error:  # from Python 3.12 on, os.walk ends where a path is too long
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
        raise UserError(f"{folder}: folders nested too deep; remove them") from None


@contextlib.contextmanager
def locked_runs(
    runs: Path,
    experiment: str,
    names: list[str],
    resuming: bool = False,
    overwrite: bool = False,
    job: str = "",
    start: int = 0,
) -> Iterator[list[Run]]:
    """Creates run folders and locks them until the context exits.

    With `resuming`, a folder may already contain a run; with `overwrite`, its contents are deleted, but only after all
    folders are locked. `job` is the id of this process's batch job, and `start` how often that has been requeued.

    Raises:
        UserError: a name is invalid, or a folder contains a run, is locked by another process, or cannot be written.
    """
    claimed = [Run(runs / experiment / name) for name in names]
    for name, run in zip(names, claimed, strict=True):
        check_name(name)
        if is_file(run.run_json) and not resuming and not overwrite:
            state = "a finished" if is_file(run.summary) else "an unfinished"
            raise UserError(f"{run.folder}: holds {state} run; choose another --name, --resume auto, or --overwrite")
    with contextlib.ExitStack() as stack:
        try:
            for run in claimed:
                run.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.locked(run.lock, LOCK_TIMEOUT if resuming else 1, job, start))
            for run in claimed:
                if overwrite:
                    _refuse_foreign(run)
            for run in claimed:
                if overwrite:
                    _delete_contents(run)
        except OSError as error:
            if error.errno in TRANSIENT_ERRNOS:
                raise
            raise UserError(f"--runs {runs}: cannot write there ({error.strerror}); choose another folder") from None
        yield claimed


def finished_run(option: str, folder: Path, code: TrustedCode) -> Run:
    """Returns the run in the folder given by an option. Raises UserError if the run is not finished."""
    run = Run(folder, code)
    if (state := run.state()) != "complete":
        found = "none" if state == "missing" else f"one that is {state}"
        raise UserError(f"{option} {folder}: expected the folder of a finished run, found {found}; train it first")
    return run


def _refuse_foreign(run: Run) -> None:
    """Raises UserError if the folder contains files but no run, because --overwrite would delete the files."""
    others = sorted(path.name for path in run.folder.iterdir() if path != run.lock)
    if others and not is_file(run.run_json):
        raise UserError(f"--overwrite: {run.folder} is not a run, but holds {list_some(others)}; choose another --name")


def _delete_contents(run: Run) -> None:
    """Deletes everything in a run folder except its lock.

    First the summary, which would say that the run is complete; last run.json, without which it is not a run, so that
    an interrupted deletion can be repeated.
    """
    order = {run.summary: 0, run.run_json: 2}
    for path in sorted(run.folder.iterdir(), key=lambda path: order.get(path, 1)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != run.lock:
            path.unlink()


def find_runs(paths: list[Path]) -> list[Run]:
    """Returns every run folder at or below the paths, without duplicates, sorted within each path.

    Raises:
        UserError: a path does not exist, or there is no run below it.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: expected a run folder or a folder of runs, found no such folder")
        records = paths_below(path, "run.json")
        if not records:
            raise UserError(f"{path}: expected a run folder or a folder of runs, found none; make one: runner train")
        runs |= {record.parent.resolve(): Run(record.parent) for record in records}
    return list(runs.values())
