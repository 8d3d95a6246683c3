"""Part 7: ONNX and engines: parity on every test image first, then latency by precision and batch."""

from typing import Any

from runner import experiments
from runner.benchmarks.gpu.part import Context, Ledger, MissingError, RefusedError, fitted
from runner.deploy import engine as engines
from runner.deploy import onnx, parity
from runner.deploy.latency import FILE_NAME as LATENCY
from runner.deploy.session import PROVIDERS, usable_providers
from runner.runs import Run, read_json

TRAINED = "seed-0"  # the run that the papers' part leaves, where its time has been enough
BRIEF = "brief"


def measure(context: Context, ledger: Ledger) -> None:
    """Model by model, from weights to latency; the compiled models last, for each takes minutes to compile."""
    runs = {}
    for name in context.scale.deployed:
        if (found := ledger.once(f"{name}/weights", lambda name=name: weights(context, name))) is None:
            continue
        runs[name] = run = Run(context.out / "runs" / name / found["run"])
        for precision in context.scale.precisions:
            of_precision(context, ledger, name, run, precision)
        ledger.once(f"{name}/eager", lambda run=run: latency(context, run, "fp32", "eager", context.scale.seconds))
    for name, run in runs.items() if not context.rehearse else ():
        ledger.once(f"{name}/compiled", lambda run=run: latency(context, run, "fp32", "compiled", 1.0))


def of_precision(context: Context, ledger: Ledger, name: str, run: Run, precision: str) -> None:
    """One file: export, engine, the gate for whatever can run them here, and the latency of what has passed."""
    place = f"{name}/{precision}"
    if ledger.once(f"{place}/export", lambda: export(context, run, precision)) is None:
        return
    ledger.once(f"{place}/engine", lambda: engine(context, run, precision))
    for backend in ("onnxruntime",) if context.rehearse else ("onnxruntime", "engine"):
        if ledger.once(f"{place}/parity/{backend}", lambda b=backend: scored(context, run, precision, b)):
            ledger.once(
                f"{place}/latency/{backend}",
                lambda b=backend: latency(context, run, precision, b, context.scale.seconds),
            )


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


def scored(context: Context, run: Run, precision: str, backend: str) -> dict[str, Any]:
    """The gate's rows of one backend."""
    if backend == "engine" and not engines.built(run, onnx.exported(run, precision)):
        raise MissingError("no engine")
    if backend == "onnxruntime" and not has_provider(context):
        raise MissingError("onnxruntime has no CUDA provider here")
    words = ["--precision", precision, "--data", context.data, "--device", context.device, "--backend", backend]
    failed = None
    try:
        context.command("-m", "runner", "parity", run.folder, *words)
    except MissingError:
        raise
    except RuntimeError as error:  # a row that did not pass is one all the same
        failed = error
    report = read_json(run.deploy / parity.FILE_NAME) if (run.deploy / parity.FILE_NAME).is_file() else {"rows": []}
    of_engine = backend == "engine"
    rows = [
        row
        for row in report["rows"]
        if row["precision"] == precision and (row["backend"] != "onnxruntime") == of_engine
    ]
    if failed and not rows:
        raise failed
    return {"images": report["images"], "eager_accuracy": report["eager_accuracy"], "rows": rows}


def latency(context: Context, run: Run, precision: str, backend: str, seconds: float) -> dict[str, Any]:
    """The rows of one backend."""
    if backend == "onnxruntime" and not has_provider(context):
        raise MissingError("onnxruntime has no CUDA provider here")
    words = ["--precision", precision, "--batch", *context.scale.batches, "--backend", backend]
    words += ["--seconds", seconds, "--device", context.device]
    words += ["--repeats", 3] if context.rehearse else []
    context.command("-m", "runner", "bench", run.folder, *words)
    measured = read_json(run.deploy / LATENCY)
    ours = (backend, *engines.MODULES) if backend == "engine" else (backend,)
    any_precision = backend in ("eager", "compiled")  # which are measured in those that torch has here
    rows = [
        row
        for row in measured["rows"]
        if row["backend"] in ours and (any_precision or row["precision"] == precision)
    ]
    return {"method": measured["method"], "load": measured["load"], "rows": rows}


def has_provider(context: Context) -> bool:
    """Whether onnxruntime computes where this part does."""
    return PROVIDERS[context.device] in usable_providers()
