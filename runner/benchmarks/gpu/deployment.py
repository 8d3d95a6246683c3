"""Part 7: ONNX and engines: parity on every test image first, then latency by precision and batch."""

from typing import Any

from runner import experiments
from runner.benchmarks.gpu.part import Context, Ledger, MissingError, RefusedError, fitted
from runner.deploy import engine as engines
from runner.deploy import onnx, parity
from runner.deploy.latency import FILE_NAME as LATENCY
from runner.runs import Run, read_json

TRAINED = "seed-0"  # the run that the papers' part leaves, where its time has been enough
BRIEF = "brief"


def measure(context: Context, ledger: Ledger) -> None:
    """Model by model, from weights to latency."""
    for name in context.scale.deployed:
        if ledger.once(f"{name}/weights", lambda name=name: weights(context, name)) is None:
            continue
        run = Run(context.out / "runs" / name / ledger.found[f"{name}/weights"]["run"])
        for precision in context.scale.precisions:
            place = f"{name}/{precision}"
            exported = ledger.once(f"{place}/export", lambda p=precision, run=run: export(context, run, p))
            if exported is None:
                continue
            ledger.once(f"{place}/engine", lambda p=precision, run=run: engine(context, run, p))
            gate = ledger.once(f"{place}/parity", lambda p=precision, run=run: scored(context, run, p))
            if gate is not None:
                ledger.once(f"{place}/latency", lambda p=precision, run=run: latency(context, run, p))


def weights(context: Context, name: str) -> dict[str, Any]:
    """The run to deploy: trained in full, or else for some steps, which is said."""
    if Run(context.out / "runs" / name / TRAINED).summary.is_file():
        return {"run": TRAINED, "trained": "in full"}
    images = context.manifest.splits["train"].images
    recipe = experiments.get(name).recipe
    batch = min(recipe.batch_size, images // 4)
    options = [*fitted(experiments.get(name), images), "--max-steps", context.scale.brief]
    context.train(name, BRIEF, *options, "--recipe.batch-size", batch)
    return {"run": BRIEF, "trained": f"{context.scale.brief} steps"}


def export(context: Context, run: Run, precision: str) -> dict[str, Any]:
    """The ONNX file."""
    context.command("-m", "runner", "export", run.folder, "--precision", precision, "--data", context.data)
    file = onnx.exported(run, precision)
    return {"onnx": file.path.name, "sha256": file.sha256, "bytes": file.path.stat().st_size}


def engine(context: Context, run: Run, precision: str) -> dict[str, Any]:
    """The engine; which TensorRT built it, and what its layers compute in."""
    largest = max(context.scale.batches)
    sizes = (1, max(1, largest // 4), largest)
    try:
        context.command("-m", "runner", "engine", run.folder, "--precision", precision, "--batch", *sizes)
    except RefusedError as error:
        raise MissingError(str(error)) from None
    (sidecar,) = engines.built(run, onnx.exported(run, precision))
    told = ("engine", "backend", "version", "layer_precisions", "target", "batch", "bytes")
    return {key: sidecar[key] for key in told}


def scored(context: Context, run: Run, precision: str) -> dict[str, Any]:
    """The gate's rows, of everything that can run the file here."""
    words = ["--precision", precision, "--data", context.data, "--device", context.device]
    try:
        context.command("-m", "runner", "parity", run.folder, *words)
        failed = None
    except RuntimeError as error:
        failed = str(error)
    report = read_json(run.deploy / parity.FILE_NAME) if (run.deploy / parity.FILE_NAME).is_file() else {"rows": []}
    rows = [row for row in report["rows"] if row["precision"] == precision]
    if not rows:
        raise RuntimeError(failed)
    return {"images": report["images"], "eager_accuracy": report["eager_accuracy"], "rows": rows}


def latency(context: Context, run: Run, precision: str) -> dict[str, Any]:
    """Latency of the file and its engine; with fp32 also of the model in torch, eager and compiled."""
    scale = context.scale
    backends = ["onnxruntime", "engine"]
    if precision == scale.precisions[0]:
        backends = ["eager", *([] if context.rehearse else ["compiled"]), *backends]
    words = ["--precision", precision, "--batch", *scale.batches, "--backend", *backends]
    words += ["--seconds", scale.seconds, "--device", context.device]
    words += ["--repeats", 3] if context.rehearse else []
    context.command("-m", "runner", "bench", run.folder, *words)
    measured = read_json(run.deploy / LATENCY)
    return {key: measured[key] for key in ("method", "clocks", "load", "rows")}
