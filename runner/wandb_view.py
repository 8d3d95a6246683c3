"""How a run folder looks in W&B: rows, figures, tables, summary, and artifacts with their lineage.

Training shows it as it goes (tracking.py); `runner sync` replays it from files. A row's step in W&B is its place in
metrics.jsonl, where a resumed run writes it again; W&B takes each step once and only in rising order, so a resumed
run, an outage and a second sync repeat nothing and lose nothing. Charts stand over `global_step`.
"""

import contextlib
import hashlib
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from data_prep.console import UserError, track
from runner.runs import Run, read_json, read_metrics, write_json

PROJECT = "training-runner"
STEP = "global_step"
INIT_TIMEOUT = 15  # seconds until W&B counts as unreachable
SYNCED = "synced.json"  # in the run's folder of W&B: what has been sent where
OURS = "/."  # ends the folders that we choose, and changes nothing about them


def keep_inside(run: Run, environ: MutableMapping[str, str]) -> None:
    """Has W&B keep its own files with the run, and not under the home folder, by its variables."""
    for name in [name for name, value in environ.items() if name.startswith("WANDB_") and not value]:
        del environ[name]  # unset to everybody but W&B, which would refuse it
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        if environ.get(f"WANDB_{name}_DIR", OURS).endswith(OURS):  # unset, or of an earlier run of ours
            environ[f"WANDB_{name}_DIR"] = f"{run.folder.absolute() / 'wandb' / f'.{name.lower()}'}{OURS}"


def start(run: Run, config: Mapping[str, Any], environ: Mapping[str, str], mode: str, job: str = "train") -> Any:
    """W&B's run for a run folder, begun or gone on with; for any `job` but training one of its own beside it."""
    import wandb

    name = f"{config['experiment']}/{config['run']}"
    shown = wandb.init(
        project=environ.get("WANDB_PROJECT", PROJECT),
        entity=environ.get("WANDB_ENTITY"),
        id=config["wandb_id"] if job == "train" else f"{config['wandb_id']}-{job}",
        name=environ.get("WANDB_NAME", name) if job == "train" else f"{name} {job}",
        group=environ.get("WANDB_RUN_GROUP", config.get("group", config["paper"])),
        job_type=environ.get("WANDB_JOB_TYPE", job),
        tags=[*tags(config), *filter(None, environ.get("WANDB_TAGS", "").split(","))],
        config=dict(config),
        dir=run.folder,
        mode=mode,
        resume="allow",
        settings=wandb.Settings(init_timeout=float(environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)), silent=True),
    )
    shown.define_metric(STEP)
    shown.define_metric("*", step_metric=STEP)
    return shown


def tags(config: Mapping[str, Any]) -> list[str]:
    """Architecture, dataset, precision."""
    return [config["architecture"]["factory"].rpartition(":")[2], config["dataset"]["name"], config["precision"]]


def log(shown: Any, row: Mapping[str, float], place: int) -> None:
    """Shows one row, the `place`-th of metrics.jsonl from 0."""
    shown.log(dict(row), step=place)


def catch_up(shown: Any, run: Run, until: int) -> int:
    """Shows the rows before the `until`-th that W&B does not have; returns how many."""
    first = shown.starting_step
    for place, row in list(enumerate(read_metrics(run)))[first:until]:
        log(shown, row, place)
    return max(0, until - first)


def conclude(shown: Any, run: Run, online: bool) -> None:
    """Shows what stands at the end of training: pictures, tables, summary, and the weights as an artifact.

    Offline W&B cannot say that a run used an artifact; `runner sync` says it later.
    """
    import wandb

    config, summary = run.config(), read_json(run.summary)
    last = (
        summary["steps"] + 1
    )  # a step of its own: a sync after an outage sends it where only the rows came through
    if shown.starting_step <= last:
        pictures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(run.figures.glob("*.png"))}
        tables = {"confusion": _confusion(config, summary), "mistakes": _mistakes(run, config)}
        shown.log({STEP: summary["steps"]} | pictures | {k: v for k, v in tables.items() if v}, step=last)
    shown.summary.update(_summary(run, config, summary))
    if online:
        shown.use_artifact(_dataset(config))
    shown.log_artifact(_weights(run, config, summary))


def _summary(run: Run, config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The outcome, with what architectures are compared by."""
    kept = {key: value for key, value in summary.items() if not isinstance(value, list | dict)}
    speeds = [row["images_per_second"] for row in read_metrics(run) if "images_per_second" in row]
    kept |= {"parameters": config["parameters"], "macs": config["macs"]}
    if speeds:
        kept["images_per_second"] = statistics.median(speeds)
    if config["reported"]:
        kept["reported_accuracy"] = config["reported"]["accuracy"]
    latency = run.deploy / "latency.json"
    for row in read_json(latency)["rows"] if latency.is_file() else []:
        if "p50_ms" in row:
            kept[f"latency_p50_ms/{row['backend']}_{row['precision']}_batch{row['batch']}"] = row["p50_ms"]
    return kept


def _confusion(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Any:
    """W&B's own chart of a confusion matrix."""
    import wandb

    classes = config["dataset"]["classes"]
    counts = summary["confusion"]
    rows = [
        [label, predicted, counts[i][j]] for i, label in enumerate(classes) for j, predicted in enumerate(classes)
    ]
    table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows)
    fields = {name: name for name in table.columns}
    return wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "confusion, test images"})


def _mistakes(run: Run, config: Mapping[str, Any]) -> Any:
    """The mistakes that the model was surest of, with their images; None where there are none."""
    import wandb
    from PIL import Image

    sheet, listed = run.figures / "mistakes.png", run.figures / "mistakes.json"
    if not sheet.is_file():
        return None
    classes, width = config["dataset"]["classes"], config["dataset"]["image_shape"][1]
    table = wandb.Table(columns=["image", "sample", "label", "predicted", "probability"])
    with Image.open(sheet) as images:
        for place, row in enumerate(read_json(listed)["mistakes"]):
            image = images.crop((place * width, 0, (place + 1) * width, images.height))
            label, predicted = classes[row["label"]], classes[row["predicted"]]
            table.add_data(wandb.Image(image), row["sample"], label, predicted, row["probability"])
    return table


def _dataset(config: Mapping[str, Any]) -> Any:
    """The dataset's manifest, as far as a run folder knows it; the images stay where they are."""
    import wandb

    dataset = {key: value for key, value in config["dataset"].items() if key != "folder"}
    artifact = wandb.Artifact(_plain(dataset["name"]), "dataset", metadata=dataset)
    with artifact.new_file("dataset.json", mode="w", encoding="utf-8") as file:
        json.dump(dataset, file, indent=2, sort_keys=True)
    return artifact


def _weights(run: Run, config: Mapping[str, Any], summary: Mapping[str, Any]) -> Any:
    """The last checkpoint's weights, and the manifest that holds their hash."""
    folders = sorted(run.checkpoints.glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))
    metadata = {"run": f"{config['experiment']}/{config['run']}", "test_accuracy": summary["test_accuracy"]}
    files = [folders[-1] / name for name in ("model.safetensors", "manifest.json")]
    return _artifact(f"{config['experiment']}-weights", "model", files, metadata)


def _artifact(name: str, kind: str, files: list[Path], metadata: Mapping[str, Any]) -> Any:
    import wandb

    artifact = wandb.Artifact(_plain(name), kind, metadata=dict(metadata))
    for file in files:
        artifact.add_file(str(file), policy="immutable", skip_cache=True)
    return artifact


def _plain(name: str) -> str:
    """A name that W&B takes for an artifact."""
    return "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in name).strip("-")


# ---- replaying


def sync(runs: list[Run], environ: MutableMapping[str, str]) -> list[dict[str, Any]]:
    """Brings W&B to what the run folders hold; what it has already is not sent again.

    Of each experiment the finished run with the highest accuracy among these has the alias `best` on its weights;
    accuracy on held-out images where the recipe has some, else on the test images.

    Returns:
        For each run: its name, how many rows were sent, or that nothing was new.

    Raises:
        UserError: W&B cannot be reached, or refuses; what has been sent so far stays, and another call goes on.
    """
    best = _best(runs)
    results = []
    for run in track(runs, "sync", len(runs)):
        digest = _digest(run, run.folder in best, environ)
        marker = run.folder / "wandb" / SYNCED
        if marker.is_file() and read_json(marker)["digest"] == digest:
            results.append({"run": str(run.folder), "rows": 0, "new": False})
            continue
        try:
            rows = _replay(run, run.folder in best, environ)
        except UserError:
            raise
        except Exception as error:  # whatever W&B throws
            told = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{run.folder}: W&B could not take it ({type(error).__name__}: {told}); the same command goes on "
                "later"
            ) from None
        write_json(marker, {"digest": digest})
        results.append({"run": str(run.folder), "rows": rows, "new": True})
    return results


def _best(runs: list[Run]) -> set[Path]:
    found: dict[str, tuple[float, Path]] = {}
    for run in runs:
        if run.summary.is_file():
            summary = read_json(run.summary)
            accuracy = summary.get("best_validation_accuracy", summary["test_accuracy"])
            name = run.config()["experiment"]
            found[name] = max(found.get(name, (-1.0, run.folder)), (accuracy, run.folder))
    return {folder for _, folder in found.values()}


def _digest(run: Run, best: bool, environ: Mapping[str, str]) -> str:
    """Of all that a sync would send, and where to."""
    where = [environ.get(f"WANDB_{name}", "") for name in ("BASE_URL", "ENTITY", "PROJECT")]
    digest = hashlib.sha256(json.dumps([where, best]).encode())
    files = [run.record, run.metrics, run.summary, run.deploy / "parity.json", run.deploy / "latency.json"]
    for path in [*files, *sorted(run.deploy.glob("*.engine.json"))]:
        digest.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
    for path in sorted(run.deploy.glob("*.onnx")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def _replay(run: Run, best: bool, environ: MutableMapping[str, str]) -> int:
    """Sends one run folder; returns how many rows W&B did not have."""
    config = run.config()
    onnx = sorted(run.deploy.glob("*.onnx"))
    engines = sorted(run.deploy.glob("*.engine"))
    finished = run.summary.is_file()
    with _online(run, config, environ, "train") as shown:
        sent = catch_up(shown, run, len(read_metrics(run)))
        if finished:
            conclude(shown, run, online=True)
            weights = _weights(run, config, read_json(run.summary))
            if best:
                shown.log_artifact(weights, aliases=["latest", "best"])
    if not finished:
        return sent
    experiment = config["experiment"]
    exported = _artifact(f"{experiment}-onnx", "onnx", onnx, {"run": run.folder.name}) if onnx else None
    if exported:
        with _online(run, config, environ, "export") as shown:
            shown.use_artifact(_weights(run, config, read_json(run.summary)))
            parity = run.deploy / "parity.json"
            for row in read_json(parity)["rows"] if parity.is_file() else []:
                name = f"{row['precision']}_{row['front_end']}_{row['provider']}"
                for key in ("accuracy", "accuracy_change", "agreement", "largest_logit_difference"):
                    shown.summary[f"parity/{name}/{key}"] = row[key]
            shown.log_artifact(exported)
    built = None
    if exported and engines:
        built = [*engines, *sorted(run.deploy.glob("*.engine.json"))]
        with _online(run, config, environ, "engine") as shown:
            shown.use_artifact(_artifact(f"{experiment}-onnx", "onnx", onnx, {"run": run.folder.name}))
            shown.log_artifact(_artifact(f"{experiment}-engine", "engine", built, {"run": run.folder.name}))
    latency = run.deploy / "latency.json"
    if exported and latency.is_file():
        import wandb

        measured = [row for row in read_json(latency)["rows"] if "p50_ms" in row]
        with _online(run, config, environ, "bench") as shown:
            shown.use_artifact(_artifact(f"{experiment}-onnx", "onnx", onnx, {"run": run.folder.name}))
            if built:
                shown.use_artifact(_artifact(f"{experiment}-engine", "engine", built, {"run": run.folder.name}))
            columns = (
                "backend",
                "provider",
                "precision",
                "batch",
                "p50_ms",
                "p90_ms",
                "p99_ms",
                "images_per_second",
            )
            if shown.starting_step == 0:
                table = wandb.Table(
                    columns=list(columns), data=[[row.get(key) for key in columns] for row in measured]
                )
                shown.log({STEP: 0, "latency": table}, step=0)
            for row in measured:
                name = f"latency_p50_ms/{row['backend']}_{row['precision']}_batch{row['batch']}"
                shown.summary[name] = row["p50_ms"]
    return sent


@contextlib.contextmanager
def _online(run: Run, config: Mapping[str, Any], environ: MutableMapping[str, str], job: str) -> Iterator[Any]:
    """W&B's run for a job, over when the context ends and everything has arrived."""
    keep_inside(run, environ)
    with contextlib.redirect_stdout(sys.stderr):  # it speaks of itself, and standard output is for the result
        shown = start(run, config, environ, "online", job)
        try:
            yield shown
        except BaseException:
            shown.finish(exit_code=1)
            raise
        shown.finish()
