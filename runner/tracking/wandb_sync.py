"""`runner sync`: replays run folders to W&B."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import msgspec

from runner.common.console import track
from runner.common.errors import UserError
from runner.common.files import read, write
from runner.run.folder import Run
from runner.run.metrics import read_metrics
from runner.run.schema import RunConfig
from runner.tracking import wandb_run

MARKER = "wandb/synced.json"  # in the run folder: what has been sent, and to which project


class Marker(msgspec.Struct):
    """The marker of a synced run folder: a hash of its files and of the W&B project."""

    digest: str


class Synced(msgspec.Struct):
    """What a sync did with a run: its folder, the number of rows that it sent, and whether anything was new."""

    run: str
    rows: int
    new: bool


def sync(runs: list[Run], environ: MutableMapping[str, str]) -> list[Synced]:
    """Sends to W&B what it lacks of the run folders.

    For each experiment, the weights of the finished run with the highest accuracy get the alias `best`: accuracy on
    the validation images if the recipe holds some out, else on the test images.

    Raises:
        UserError: a run folder links to a file outside; or W&B cannot be reached, or refuses. What has been sent stays,
            and another call sends the rest.
    """
    for run in runs:
        run.check_links()
    best = _best_runs(runs)
    results = []
    for run in track(runs, "sync", len(runs)):
        marker = run.folder / MARKER
        digest = _digest(run, run.folder in best, environ)
        if marker.is_file() and read(marker, Marker).digest == digest:
            results.append(Synced(str(run.folder), 0, False))
            continue
        try:
            rows = _replay(run, run.folder in best, environ)
        except UserError:
            raise
        except Exception as error:  # W&B documents no common base class
            message = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{run.folder}: W&B did not accept it ({type(error).__name__}: {message}); sync again later"
            ) from None
        write(marker, Marker(digest))
        results.append(Synced(str(run.folder), rows, True))
    return results


def _best_runs(runs: list[Run]) -> set[Path]:
    """For each experiment, the folder of the finished run with the highest accuracy."""
    best: dict[str, tuple[float, Path]] = {}
    for run in runs:
        if summary := run.read_summary():
            validation = summary.best_validation_accuracy
            accuracy = summary.test_accuracy if validation is None else validation
            experiment = run.config().experiment
            best[experiment] = max(best.get(experiment, (-1.0, run.folder)), (accuracy, run.folder))
    return {folder for _, folder in best.values()}


def _digest(run: Run, best: bool, environ: Mapping[str, str]) -> str:
    """A hash of everything that a sync would send, and of the project it would go to."""
    project = [environ.get(f"WANDB_{name}", "") for name in ("BASE_URL", "ENTITY", "PROJECT")]
    digest = hashlib.sha256(json.dumps([project, best]).encode())
    for path in (run.record, run.metrics, run.summary, run.parity, run.latency, *run.sidecars()):
        digest.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
    for path in _onnx_files(run):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def _onnx_files(run: Run) -> list[Path]:
    return sorted(run.deploy.glob("*.onnx"))


def _replay(run: Run, best: bool, environ: MutableMapping[str, str]) -> int:
    """Sends one run folder; returns how many rows W&B lacked."""
    config = run.config()
    weights = None
    with _online(run, config, environ, "train") as remote:
        sent = wandb_run.catch_up(remote, run, len(read_metrics(run)))
        if run.summary.is_file():
            weights = wandb_run.conclude(remote, run, online=True, best=best).wait()
    if weights and _onnx_files(run):
        _replay_deployment(run, config, weights, environ)
    return sent


def _replay_deployment(run: Run, config: RunConfig, weights: Any, environ: MutableMapping[str, str]) -> None:
    """Sends ONNX files, engines and latencies, each as a W&B run that uses the artifacts it was made from."""
    onnx = _deploy_artifact(run, config, "onnx", _onnx_files(run))
    with _online(run, config, environ, "export") as remote:
        remote.use_artifact(weights)
        parity = run.read_parity()
        for row in parity.rows if parity else []:
            for key in ("accuracy", "accuracy_change", "agreement", "largest_logit_difference"):
                name = f"parity/{row.precision}_{row.front_end}_{row.provider}/{key}"
                remote.summary[name] = getattr(row, key)
        remote.log_artifact(onnx).wait()
    engine = None
    if files := sorted(run.deploy.glob("*.engine")):
        engine = _deploy_artifact(run, config, "engine", [*files, *run.sidecars()])
        with _online(run, config, environ, "engine") as remote:
            remote.use_artifact(onnx)
            remote.log_artifact(engine).wait()
    if latency := run.read_latency():
        with _online(run, config, environ, "bench") as remote:
            remote.use_artifact(onnx)
            if engine:
                remote.use_artifact(engine)
            wandb_run.log_latencies(remote, latency.rows)


def _deploy_artifact(run: Run, config: RunConfig, kind: str, files: list[Path]) -> Any:
    return wandb_run.artifact(f"{config.experiment}-{kind}", kind, files, {"run": run.folder.name})


@contextlib.contextmanager
def _online(run: Run, config: RunConfig, environ: MutableMapping[str, str], job: str) -> Iterator[Any]:
    """W&B's run for a job; when the context ends, everything has been uploaded."""
    wandb_run.keep_inside(run, environ)
    with contextlib.redirect_stdout(sys.stderr):  # W&B prints, and standard output is for the result
        remote = wandb_run.start(run, config, environ, "online", job)
        try:
            yield remote
        except BaseException:
            remote.finish(exit_code=1)
            raise
        remote.finish()
