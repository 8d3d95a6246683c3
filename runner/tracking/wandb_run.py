"""Logs a run folder as a W&B run: rows, figures, tables, summary, and artifacts with their lineage.

Training logs it live (tracker.py); `runner sync` replays it from files (wandb_sync.py). A row's step in W&B is its
index in metrics.jsonl. W&B accepts each step once and in increasing order only, and a resumed run writes the same
row at the same index again; so no row is repeated or lost by a resume, an outage or a second sync. Charts use
`global_step` as the x-axis.
"""

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from runner.config.recipe import to_json
from runner.run.folder import MANIFEST, WEIGHTS, Run
from runner.run.metrics import median_speed, read_metrics
from runner.run.results import current_latency
from runner.run.schema import LatencyRow, MetricRow, RunConfig, Summary
from runner.tracking.account import choose_server

PROJECT = "training-runner"
STEP = "global_step"
INIT_TIMEOUT = 15  # seconds after which W&B counts as unreachable
Mode = Literal["online", "offline", "shared", "disabled"]
OWN_FOLDER = "/."  # suffix that marks folders set by this module, without changing the path


def prepare_environ(run: Run, environ: MutableMapping[str, str]) -> None:
    """Sets W&B's environment variables so that it keeps its files in the run folder and not in the home folder.

    Removes empty variables, and sets the server (see `choose_server`). Leaves WANDB_CONFIG_DIR as it is, because its
    settings may name the user's own server.
    """
    for name in [name for name, value in environ.items() if name.startswith("WANDB_") and not value]:
        del environ[name]  # W&B refuses empty values
    choose_server(environ)
    for name in ("CACHE", "DATA", "ARTIFACT"):
        if environ.get(f"WANDB_{name}_DIR", OWN_FOLDER).endswith(OWN_FOLDER):  # unset, or set for an earlier run
            environ[f"WANDB_{name}_DIR"] = f"{run.folder.absolute() / 'wandb' / f'.{name.lower()}'}{OWN_FOLDER}"


def start(run: Run, config: RunConfig, environ: Mapping[str, str], mode: Mode, job: str = "train") -> Any:
    """Starts or resumes the W&B run of a run folder; every `job` other than training has its own W&B run."""
    import wandb

    training, wandb_id = job == "train", config.wandb_id if job == "train" else f"{config.wandb_id}-{job}"
    remote = wandb.init(
        project=environ.get("WANDB_PROJECT", PROJECT),
        entity=environ.get("WANDB_ENTITY"),
        id=wandb_id,
        name=environ.get("WANDB_NAME", config.name) if training else f"{config.name} {job}",
        group=environ.get("WANDB_RUN_GROUP", config.group or config.paper),
        job_type=environ.get("WANDB_JOB_TYPE", job) if training else job,
        tags=[*tags(config), *filter(None, environ.get("WANDB_TAGS", "").split(","))],
        config=msgspec.to_builtins(config, enc_hook=str),
        dir=run.folder,
        mode=mode,
        resume="allow",
        reinit="create_new",  # by default, wandb returns a run that another seed could not finish
        settings=wandb.Settings(init_timeout=float(environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)), silent=True),
    )
    if remote.id != wandb_id:
        raise RuntimeError(f"expected W&B's run {wandb_id}, found {remote.id}")
    remote.define_metric(STEP)
    remote.define_metric("*", step_metric=STEP)
    return remote


def stop_service() -> None:
    """Ends W&B's own process; the next run starts another one."""
    import wandb

    wandb.teardown()


def kill_service() -> None:
    """Kills the process that W&B started for this one."""
    for children in Path("/proc/self/task").glob("*/children"):
        pids: list[str] = []
        with contextlib.suppress(OSError):  # a thread that has ended
            pids = children.read_text().split()
        for pid in pids:
            with contextlib.suppress(OSError):  # a process that has ended
                if Path(f"/proc/{pid}/comm").read_text() == "wandb-core\n":
                    os.kill(int(pid), signal.SIGKILL)


def tags(config: RunConfig) -> list[str]:
    """Returns the W&B tags of a run: architecture, dataset and precision, cut to W&B's limit of 64 characters."""
    return [tag[:64] for tag in (config.architecture.factory.rpartition(":")[2], config.dataset.name, config.precision)]


def log(remote: Any, row: MetricRow, index: int) -> None:
    """Logs one row of metrics; `index` is its line in metrics.jsonl, counted from 0."""
    remote.log(msgspec.to_builtins(row), step=index)


def log_missing_rows(remote: Any, run: Run, end: int | None = None) -> int:
    """Logs the rows before index `end` (None for all) that W&B lacks; returns the number of rows logged."""
    missing = list(enumerate(read_metrics(run)))[remote.starting_step : end]
    for index, row in missing:
        log(remote, row, index)
    return len(missing)


def log_results(remote: Any, run: Run, online: bool, best: bool = False) -> Any:
    """Logs the results of a finished run: figures, tables, summary, and the weights as an artifact.

    W&B cannot record offline that a run used an artifact; `runner sync` does so later.

    Args:
        remote: the W&B run.
        run: a finished run.
        online: whether W&B is online.
        best: whether to give the weights the alias `best`.

    Returns:
        The artifact with the weights.
    """
    import wandb

    config, summary = run.config(), run.read_summary()
    assert summary is not None, "only finished runs have results"
    # A separate step after the last row's: after an outage, W&B may have all rows but no figures.
    last = max(summary.steps + 1, len(read_metrics(run)))
    if remote.starting_step <= last:
        media = {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(run.figures.glob("*.png"))}
        media["confusion"] = _confusion_chart(config.dataset.classes, summary.confusion)
        if (run.figures / "mistakes.png").is_file():
            media["mistakes"] = _mistakes_table(run, config)
        remote.log({STEP: summary.steps} | media, step=last)
    remote.summary.update(_summary(run, config, summary))
    if online:
        remote.use_artifact(_dataset_artifact(config))
    weights = _weights_artifact(run, config, summary)
    remote.log_artifact(weights, aliases=["latest", "best"] if best else ["latest"])
    return weights


def log_latencies(remote: Any, rows: list[LatencyRow]) -> None:
    """Logs the measured latencies to the summary and, only the first time, as a table."""
    import wandb

    columns = ("backend", "provider", "precision", "batch", "p50_ms", "p90_ms", "p99_ms", "images_per_second")
    if remote.starting_step == 0:
        data = [[getattr(row, column) for column in columns] for row in rows if row.measured]
        table = wandb.Table(columns=list(columns), data=data)
        remote.log({STEP: 0, "latency": table}, step=0)
    remote.summary.update(latency_summary(rows))


def latency_summary(rows: Iterable[LatencyRow]) -> dict[str, float]:
    """Maps keys of W&B's summary to median latencies in milliseconds; of several engines, the fastest counts."""
    values: dict[str, float] = {}
    for row in rows:
        if row.p50_ms is not None:
            key = f"latency_p50_ms/{row.backend}_{row.precision}_batch{row.batch}"
            values[key] = min(row.p50_ms, values.get(key, row.p50_ms))
    return values


def _summary(run: Run, config: RunConfig, summary: Summary) -> dict[str, Any]:
    """Returns the scalars of summary.json, and the values for comparing runs: size, speed, reported accuracy."""
    values = {key: value for key, value in to_json(summary).items() if not isinstance(value, list | dict)}
    values |= {"parameters": config.parameters, "macs": config.macs}
    speed = median_speed(read_metrics(run))
    if speed is not None:
        values["images_per_second"] = speed
    if config.reported:
        values["reported_accuracy"] = config.reported.accuracy
    latency = current_latency(run)
    return values | latency_summary(latency.rows) if latency else values


def _confusion_chart(classes: list[str], counts: list[list[int]]) -> Any:
    """Builds W&B's chart of a confusion matrix; `counts` is indexed by [label][predicted]."""
    import wandb

    rows = [[label, predicted, counts[i][j]] for i, label in enumerate(classes) for j, predicted in enumerate(classes)]
    fields = {name: name for name in ("Actual", "Predicted", "nPredictions")}
    table = wandb.Table(columns=list(fields), data=rows)
    return wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "confusion, test images"})


def _mistakes_table(run: Run, config: RunConfig) -> Any:
    """Builds a table of the most confident mistakes, each with its image cropped from mistakes.png."""
    import wandb
    from PIL import Image

    classes, width = config.dataset.classes, config.dataset.image_shape[1]
    table = wandb.Table(columns=["image", "sample", "label", "predicted", "probability"])
    with Image.open(run.figures / "mistakes.png") as sheet:
        for index, mistake in enumerate(run.read_mistakes()):
            image = wandb.Image(sheet.crop((index * width, 0, (index + 1) * width, sheet.height)))
            label, predicted = classes[mistake.label], classes[mistake.predicted]
            table.add_data(image, mistake.sample, label, predicted, mistake.probability)
    return table


def _dataset_artifact(config: RunConfig) -> Any:
    """Builds an artifact with run.json's description of the dataset; the images are not uploaded."""
    import wandb

    dataset = to_json(config.dataset)
    dataset.pop("folder", None)
    artifact = wandb.Artifact(_artifact_name(config.dataset.name), "dataset", metadata=dataset)
    with artifact.new_file("dataset.json", mode="w", encoding="utf-8") as file:
        json.dump(dataset, file, indent=2, sort_keys=True)
    return artifact


def _weights_artifact(run: Run, config: RunConfig, summary: Summary) -> Any:
    """Builds an artifact of the last checkpoint's weights and the manifest with their hash."""
    last = run.step_folder(run.checkpoint_steps()[-1])
    files = [last / WEIGHTS, last / MANIFEST]
    metadata = {"run": config.name, "test_accuracy": summary.test_accuracy}
    return artifact(f"{config.experiment}-weights", "model", files, metadata)


def artifact(name: str, kind: str, files: list[Path], metadata: Mapping[str, Any]) -> Any:
    """Builds an artifact of files, but does not upload it."""
    import wandb

    draft = wandb.Artifact(_artifact_name(name), kind, metadata=dict(metadata))
    for file in files:
        draft.add_file(str(file), policy="immutable", skip_cache=True)
    return draft


def _artifact_name(name: str) -> str:
    """Replaces the characters that W&B does not allow in an artifact's name, and cuts it to 128, its limit."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:128].strip("-") or "unnamed"
