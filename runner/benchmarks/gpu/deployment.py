"""Part 7 of the GPU benchmark: parity of ONNX files and engines on all test images, then their latency."""

from functools import partial
from typing import Any

import msgspec

from runner import experiments
from runner.benchmarks.gpu.context import Context, MissingError, RefusedError, validation_options
from runner.benchmarks.gpu.ledger import Ledger
from runner.deploy import engine_run, onnx
from runner.deploy.onnx import PRECISIONS
from runner.deploy.session import PROVIDERS, usable_providers
from runner.run.folder import Run
from runner.run.schema import Precision

TRAINED = "seed-0"  # the run of the part `papers`, if it was finished in time
BRIEF = "brief"


def measure(context: Context, ledger: Ledger) -> None:
    """Measures each model, from weights to latency; compiled models come last, because compiling takes minutes."""
    runs = {}
    for name in context.scale.deploy_experiments:
        if (trained := ledger.once(f"{name}/weights", partial(train, context, name))) is None:
            continue
        runs[name] = run = Run(context.out / "runs" / name / trained["run"])
        for precision in PRECISIONS:
            if precision in context.scale.export_precisions:
                measure_precision(context, ledger, name, run, precision)
        if not context.rehearse:
            ledger.once(f"{name}/torch", partial(torch_parity, context, run))
        ledger.once(f"{name}/eager", partial(latency, context, run, "fp32", "eager", context.scale.latency_seconds))
    for name, run in runs.items() if not context.rehearse else ():
        ledger.once(f"{name}/compiled", partial(latency, context, run, "fp32", "compiled", 1.0))


def measure_precision(context: Context, ledger: Ledger, name: str, run: Run, precision: Precision) -> None:
    """Exports a run in one precision, builds its engine, scores both, and measures the latency of what passed."""
    prefix = f"{name}/{precision}"
    if ledger.once(f"{prefix}/export", partial(export, context, run, precision)) is None:
        return
    ledger.once(f"{prefix}/engine", partial(engine, context, run, precision))
    for backend in ("onnxruntime",) if context.rehearse else ("onnxruntime", "engine"):
        if ledger.once(f"{prefix}/parity/{backend}", partial(parity, context, run, precision, backend)):
            measure_latency = partial(latency, context, run, precision, backend, context.scale.latency_seconds)
            ledger.once(f"{prefix}/latency/{backend}", measure_latency)


def train(context: Context, name: str) -> dict[str, Any]:
    """Returns the run to deploy: the fully trained one, or else one that is trained here for some steps."""
    if Run(context.out / "runs" / name / TRAINED).summary.is_file():
        return {"run": TRAINED, "trained": "in full"}
    images = context.manifest.splits["train"].images
    experiment = experiments.get(name)
    batch = min(experiment.recipe.batch_size, images // 4)
    options = [*validation_options(experiment, images), "--max-steps", context.scale.brief_steps]
    context.train(name, BRIEF, *options, "--recipe.batch-size", batch)
    return {"run": BRIEF, "trained": f"{context.scale.brief_steps} steps"}


def export(context: Context, run: Run, precision: Precision) -> dict[str, Any]:
    """Exports a run and describes the ONNX file."""
    data = ("--data", context.data) if precision == "int8" else ()
    context.run_python("-m", "runner", "export", run.folder, "--precision", precision, *data)
    file = onnx.exported(run, precision)
    return {"onnx": file.path.name, "sha256": file.sha256, "bytes": file.path.stat().st_size}


def engine(context: Context, run: Run, precision: Precision) -> dict[str, Any]:
    """Builds an engine and describes it: which TensorRT built it, and the precision of its layers."""
    largest = max(context.scale.latency_batches)
    sizes = (1, max(1, largest // 4), largest)
    try:
        context.run_python("-m", "runner", "engine", run.folder, "--precision", precision, "--batch", *sizes)
    except RefusedError as error:
        raise MissingError(str(error)) from None
    (sidecar,) = engine_run.verified_engines(run, onnx.exported(run, precision))
    keys = ("engine", "backend", "version", "layer_precisions", "target", "batch", "bytes")
    return {key: msgspec.to_builtins(getattr(sidecar, key)) for key in keys}


def parity(context: Context, run: Run, precision: Precision, backend: str) -> dict[str, Any]:
    """Scores an ONNX file or its engine, and returns the parity gate's rows for this backend, passed or not."""
    if backend == "engine" and not engine_run.verified_engines(run, onnx.exported(run, precision)):
        raise MissingError("no engine")
    if backend == "onnxruntime" and not has_provider(context):
        raise MissingError("onnxruntime has no CUDA provider here")
    options = ["--precision", precision, "--data", context.data, "--device", context.device, "--backend", backend]
    failure = None
    try:
        context.run_python("-m", "runner", "parity", run.folder, *options)
    except MissingError:
        raise
    except RuntimeError as error:  # also raised if a row did not pass
        failure = error
    report = run.read_parity()
    rows = [row for row in report.rows if (row.precision, row.backend) == (precision, backend)] if report else []
    if report is None or (failure and not rows):
        raise failure or RuntimeError("runner parity wrote no report")
    return {
        "images": report.images,
        "eager_accuracy": report.eager_accuracy,
        "rows": msgspec.to_builtins(rows),
    }


def torch_parity(context: Context, run: Run) -> dict[str, Any]:
    """Scores the torch model in fp16 against fp32, which needs no other package, and returns its row."""
    failure = None
    try:
        context.run_python("-m", "runner", "parity", run.folder, "--data", context.data, "--device", context.device)
    except MissingError:
        raise
    except RuntimeError as error:  # also raised if no exported file could be scored
        failure = error
    report = run.read_parity()
    if report is None or not report.torch:
        raise failure or RuntimeError("runner parity did not score the torch model")
    return {"images": report.images, "eager_accuracy": report.eager_accuracy, "rows": msgspec.to_builtins(report.torch)}


def latency(context: Context, run: Run, precision: Precision, backend: str, seconds: float) -> dict[str, Any]:
    """Measures latencies, and returns the rows of this backend."""
    if backend == "onnxruntime" and not has_provider(context):
        raise MissingError("onnxruntime has no CUDA provider here")
    options: list[object] = ["--precision", precision, "--batch", *context.scale.latency_batches, "--backend", backend]
    options += ["--seconds", seconds, "--device", context.device]
    options += ["--repeats", 3] if context.rehearse else []
    failure = None
    try:
        context.run_python("-m", "runner", "bench", run.folder, *options)
    except MissingError:
        raise
    except RuntimeError as error:  # also raised if a row was refused
        failure = error
    report = run.read_latency()
    if report is None:
        raise failure or RuntimeError("runner bench wrote no report")
    in_torch = backend in ("eager", "compiled")  # measured in every precision that torch supports here
    rows = [row for row in report.rows if row.backend == backend and (in_torch or row.precision == precision)]
    if failure and not any(row.measured for row in rows):
        raise failure
    return {"method": msgspec.to_builtins(report.method), "load": report.load, "rows": msgspec.to_builtins(rows)}


def has_provider(context: Context) -> bool:
    """Returns whether onnxruntime has a provider for the device of this part."""
    return PROVIDERS[context.device] in usable_providers()
