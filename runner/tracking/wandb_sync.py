"""`runner sync`: uploads run folders to W&B."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from runner.common.console import track
from runner.common.errors import UserError
from runner.common.files import read_bytes, read_json, write_json
from runner.common.text import first_line
from runner.run.folder import WEIGHTS, Run
from runner.run.metrics import read_metrics
from runner.run.results import current_latency, current_parity
from runner.run.schema import RunConfig
from runner.tracking import account, wandb_run

MARKER = "wandb/synced.json"


class SyncMarker(msgspec.Struct):
    """A hash of a run's records as last uploaded, and of the W&B project that they were uploaded to."""

    digest: str


class Synced(msgspec.Struct, omit_defaults=True):
    """The result of syncing one run folder.

    Attributes:
        run: path of the run folder.
        rows: number of rows uploaded.
        new: whether anything was uploaded.
        reason: why the run was not uploaded; None if it was, or did not need to be.
    """

    run: str
    rows: int
    new: bool
    reason: str | None = None


def sync(runs: list[Run], environ: MutableMapping[str, str]) -> list[Synced]:
    """Uploads to W&B what it lacks from the run folders; skips those that have not changed since they were uploaded.

    The weights of an experiment's best run get the alias `best`; see `best_run`. A run that is damaged or still
    training is not uploaded; its result gives the reason.

    Raises:
        UserError: W&B cannot be reached, or refuses a run. Earlier uploads are kept, and another call uploads the rest.
    """
    return [_sync_one(run, environ) for run in track(runs, "sync", len(runs))]


def _sync_one(run: Run, environ: MutableMapping[str, str]) -> Synced:
    try:
        run.check_links()
        run.check_pictures()
        best = best_run(run) == run.folder.resolve()
        if run.state() == "running":
            raise UserError("it is still training; sync it when it has finished")
        steps = run.checkpoint_steps()
        if run.summary.is_file() and not (steps and (run.step_folder(steps[-1]) / WEIGHTS).is_file()):
            raise UserError(f"{run.checkpoints}: expected the weights of a finished run, found none")
        # Each raises UserError for a damaged file, which is better found before the upload starts.
        for read_records in (
            run.read_parity, run.read_latency, run.read_engines, run.read_summary, run.read_mistakes,
            partial(read_metrics, run),
        ):  # fmt: skip
            read_records()
        digest, marker = _digest(run, best, environ), run.folder / MARKER
        if marker.is_file() and read_json(marker, SyncMarker).digest == digest:
            return Synced(str(run.folder), 0, new=False)
    except UserError as error:
        return Synced(str(run.folder), 0, new=False, reason=str(error))
    try:
        rows = _upload(run, best, environ)
    except UserError:
        raise
    except Exception as error:  # W&B raises errors of many types
        message = first_line(error)
        raise UserError(
            f"{run.folder}: W&B did not accept it ({type(error).__name__}: {message}); sync again later"
        ) from None
    write_json(marker, SyncMarker(digest))
    return Synced(str(run.folder), rows, new=True)


def best_run(run: Run) -> Path | None:
    """Returns the folder of the best finished run of an experiment, among `run` and the runs next to it.

    The best run is that whose weights, those of its last checkpoint, have the highest accuracy on the validation images
    if the recipe holds some out, or else on the test images. Returns None if the runs cannot be compared, because their
    datasets or held-out images differ.

    Raises:
        UserError: `run` is damaged. Damaged runs next to it are skipped.
    """
    experiment, scores, measured_on = run.config().experiment, [], set()
    for folder in run.folder.resolve().parent.iterdir():
        sibling = Run(folder)
        try:
            if not sibling.run_json.is_file() or sibling.config().experiment != experiment:
                continue
            summary = sibling.read_summary()
        except UserError:
            if folder == run.folder.resolve():
                raise
            continue
        if summary is not None:
            validation = summary.validation_accuracy
            scores.append((summary.test_accuracy if validation is None else validation, folder))
            measured_on.add((sibling.config().dataset.fingerprint, summary.validation_images))
    return max(scores)[1] if len(measured_on) == 1 else None


def _digest(run: Run, best: bool, environ: Mapping[str, str]) -> str:
    """Returns a hash of all that decides whether a run is uploaded again.

    That is its records, the sizes and times of its ONNX files, whether it is the best run, and the W&B project.
    """
    project = [account.base_url(environ), *(environ.get(f"WANDB_{name}", "") for name in ("ENTITY", "PROJECT"))]
    digest = hashlib.sha256(json.dumps([project, best]).encode())
    for path in (run.run_json, run.metrics, run.summary, run.parity, run.latency, *run.sidecars()):
        digest.update(path.name.encode() + (read_bytes(path) if path.is_file() else b""))
    for path in _onnx_files(run):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def _onnx_files(run: Run) -> list[Path]:
    return sorted(run.deploy.glob("*.onnx"))


def _upload(run: Run, best: bool, environ: MutableMapping[str, str]) -> int:
    """Uploads one run folder; returns how many rows W&B lacked."""
    config = run.config()
    weights = None
    with _online(run, config, environ, "train") as remote:
        rows = wandb_run.log_missing_rows(remote, run)
        if run.summary.is_file():
            weights = wandb_run.log_results(remote, run, online=True, best=best).wait()
    if weights and _onnx_files(run):
        _upload_deployment(run, config, weights, environ)
    return rows


def _upload_deployment(run: Run, config: RunConfig, weights: Any, environ: MutableMapping[str, str]) -> None:
    """Uploads ONNX files, engines and latencies, each in a W&B run that uses the artifacts it was made from."""
    onnx = _deploy_artifact(run, config, "onnx", _onnx_files(run))
    with _online(run, config, environ, "export") as remote:
        remote.use_artifact(weights)
        parity = current_parity(run)
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
    if latency := current_latency(run):
        with _online(run, config, environ, "bench") as remote:
            remote.use_artifact(onnx)
            if engine:
                remote.use_artifact(engine)
            wandb_run.log_latencies(remote, latency.rows)


def _deploy_artifact(run: Run, config: RunConfig, kind: str, files: list[Path]) -> Any:
    return wandb_run.artifact(f"{config.experiment}-{kind}", kind, files, {"run": run.folder.name})


@contextlib.contextmanager
def _online(run: Run, config: RunConfig, environ: MutableMapping[str, str], job: str) -> Iterator[Any]:
    """Opens the W&B run of a job; once the context has ended, everything has been uploaded."""
    wandb_run.prepare_environ(run, environ)
    with contextlib.redirect_stdout(sys.stderr):  # W&B prints, and standard output is for the result
        remote = wandb_run.start(run, config, environ, "online", job)
        try:
            yield remote
        except BaseException:
            remote.finish(exit_code=1)
            raise
        # W&B shows a run with another exit code as failed.
        remote.finish(exit_code=int(job == "train" and run.state() in ("failed", "crashed")))
