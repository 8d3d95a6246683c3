"""Measures the latency of a run's model in torch (eager and compiled), in onnxruntime, and as TensorRT engines.

The method follows trtexec and MLPerf's single-stream scenario: a warm-up of fixed duration, then single calls for a
minimum duration and count; percentiles are over all calls, untrimmed. On a GPU, CUDA events time the input copy,
the computation and the output copy separately, with pinned memory; engines and the compiled model replay a CUDA graph.
On the CPU, a call is timed as a whole, with a fixed number of threads that do not spin.

Files and engines are measured only if they passed the parity gate; the compiled model must return the eager model's
logits.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from runner.common.console import new_table, print_table, progress
from runner.common.errors import UserError
from runner.common.files import write_json
from runner.common.text import first_line, printable
from runner.config.train_config import Device
from runner.deploy import engine_run, onnx, package, parity
from runner.deploy.session import OnnxSession, ProviderError
from runner.run.folder import Run
from runner.run.schema import EngineSidecar, LatencyReport, LatencyRow, MeasuredBackend, Method, Precision
from runner.system import cpu, cuda, environment, launcher
from runner.training import checkpoint

WARMUP_SECONDS = 0.5
FEW_CALLS = 100  # number of calls below which a row gets a warning
WIDE_SPREAD = 1.5  # ratio of p90 to p50 above which a row gets a warning
COMPILED_LIMIT = {"fp32": 1e-3, "fp16": 3e-2}  # maximum difference from eager logits, relative to the largest
PERCENTILES = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99}
Steps = dict[str, Callable[[], Any]]  # of one call: "compute", preceded on a GPU by "copy_in" and "copy_out"


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and for how long.

    Attributes:
        batches: batch sizes.
        precisions: precisions of the ONNX files and engines. Eager and compiled models run in fp32, and on a GPU also
            in fp16.
        backends: backends that run the model.
        seconds, repeats: minimum duration and minimum number of calls per measurement.
        threads: number of CPU threads; None for all usable cores.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    precisions: tuple[Precision, ...] = ("fp32",)
    backends: tuple[MeasuredBackend, ...] = ("eager", "onnxruntime", "engine")
    seconds: float = 3.0
    repeats: int = 100
    threads: int | None = None


@dataclass(frozen=True)
class Call:
    """The steps of one call on a batch, and how the computation is launched on a GPU if there is a choice."""

    steps: Steps
    launched_as: str | None = None


@dataclass(frozen=True)
class Target:
    """A model, session or engine to measure; if it cannot run here, `row.not_measured` gives the reason.

    Attributes:
        row: the row of the report, without the fields that depend on the batch size.
        prepare: builds the call for a batch of images in host memory, (n, 3, H, W) float32.
        smallest, largest: minimum and maximum batch size.
        refused: the error, if it has not passed the gate, or its file is missing or damaged; otherwise None.
    """

    row: LatencyRow
    prepare: Callable[[np.ndarray], Call] = lambda images: Call({})
    smallest: int = 1
    largest: int = onnx.LARGEST_BATCH
    refused: UserError | None = None


def bench(run: Run, options: BenchOptions, device: Device, environ: Mapping[str, str]) -> LatencyReport:
    """Measures everything that is requested and can run here, and updates `deploy/latency.json` after each row.

    Keeps earlier rows for other backends, precisions or batch sizes if their files and engines are current, and if
    weights, hardware, versions and method are the same.

    Args:
        run: a run that has been exported and has passed the gate.
        options: what to measure.
        device: device to compute on.
        environ: the process environment, which contains the launcher's variables.

    Returns:
        A report with the rows of this call, one per backend, precision and batch size. What cannot run here has a row
        with the reason.

    Raises:
        UserError: a batch size is out of range, a file has not been exported, or nothing can be measured here.
    """
    if max(options.batches) > onnx.LARGEST_BATCH:
        raise UserError(f"--batch {max(options.batches)}: expected at most {onnx.LARGEST_BATCH}, the ONNX file's limit")
    if set(options.backends) - {"eager", "compiled", "aotinductor"}:
        files = [onnx.exported(run, precision) for precision in options.precisions]
    else:
        files = []
    selected, message = launcher.select_device(device, launcher.read(environ), torch.cuda.device_count())
    print(message, file=sys.stderr)
    if selected == "cpu":
        cpu.prepare()
        torch.set_num_threads(options.threads or torch.get_num_threads())
    else:
        if options.threads is not None:
            raise UserError(f"--threads {options.threads}: expected with --device cpu, found a GPU")
        cuda.disable_tf32()
        torch.backends.cudnn.benchmark = True  # torch selects its kernels by their time, as engines do
    report = _new_report(run, options, selected)
    earlier = _comparable_rows(run, report)
    rows: list[LatencyRow] = []
    targets = list(open_targets(run, files, options, selected))
    if not targets:
        precisions = " ".join(options.precisions)
        raise UserError(f"--precision {precisions}: expected a file that --backend {' '.join(options.backends)} runs")
    if all(target.row.not_measured for target in targets):
        refused = [target.refused for target in targets if target.refused]
        reasons = (f"{target.row.backend} {target.row.precision}: {target.row.not_measured}" for target in targets)
        raise refused[0] if refused else UserError(f"{run.folder}: nothing can be measured: {'; '.join(reasons)}")
    with progress("measure latency", len(targets) * len(options.batches)) as advance, torch.inference_mode():
        for target in targets:
            for row in _measure_target(target, run.config().input.shape, options, selected):
                rows.append(row)
                kept = [old for old in earlier if not any(_replaces(new, old) for new in rows)]
                write_json(run.latency, replace(report, rows=[*kept, *rows]))
                advance(1 if row.batch else len(options.batches))
    return replace(report, rows=rows)


def _new_report(run: Run, options: BenchOptions, device: str) -> LatencyReport:
    """Creates a report on this machine, without rows."""
    hardware = environment.describe_hardware()
    if device == "cpu":
        hardware = replace(hardware, gpus=None, cuda=None)  # the measurement does not use them
    return LatencyReport(
        run=str(run.folder),
        weights=onnx.weights_sha256(run),
        dataset=run.config().dataset.name,
        device=device,
        threads=torch.get_num_threads() if device == "cpu" else None,
        hardware=hardware,
        versions=environment.package_versions(*environment.TENSORRT_PACKAGES),
        method=Method(warmup_seconds=WARMUP_SECONDS, seconds=options.seconds, repeats=options.repeats),
        load=round(os.getloadavg()[0], 2),
    )


def _comparable_rows(run: Run, report: LatencyReport) -> list[LatencyRow]:
    """Returns the existing report's rows for current files and engines; none if it was measured differently."""
    earlier = run.read_latency()
    if earlier is None:
        return []
    if replace(earlier, run=report.run, load=report.load, rows=[]) != report:
        if earlier.rows:
            print(f"{run.latency}: replaced, because it was measured differently or elsewhere", file=sys.stderr)
        return []
    engines = {sidecar.sha256 for sidecar in run.read_engines() if (run.folder / sidecar.engine).is_file()}
    files = [*onnx.all_exported(run), *package.all_compiled(run)]
    current = {None} | {file.sha256 for file in files} | engines
    return [row for row in earlier.rows if {row.onnx_sha256, row.engine_sha256} <= current]


def _replaces(new: LatencyRow, old: LatencyRow) -> bool:
    """Returns whether a new row replaces an earlier one.

    A row without a provider or batch size says why a backend could not be measured at all: a file that fails the gate
    now has no latencies, and the first latency of a backend ends the reason why there was none.
    """
    if (new.backend, new.precision) != (old.backend, old.precision):
        return False
    if new.not_measured and new.batch is not None and old.measured:
        return False  # this one measurement failed, perhaps because the machine was busy
    return all(None in pair or pair[0] == pair[1] for pair in ((new.provider, old.provider), (new.batch, old.batch)))


def open_targets(run: Run, files: list[onnx.OnnxFile], options: BenchOptions, device: str) -> Iterator[Target]:
    """Yields a target for everything that is requested; a target that cannot run here has the reason."""
    precisions: tuple[Precision, ...] = ("fp32",) if device == "cpu" else ("fp32", "fp16")
    for backend in ("eager", "compiled"):
        if backend in options.backends:
            for precision in precisions:
                yield _torch_target(run, backend, precision, device)
    if "aotinductor" in options.backends:
        yield _package_target(run, device)
    for file in files:
        if "onnxruntime" in options.backends:
            yield _onnxruntime_target(run, file, options, device, "onnxruntime")
        if "onnxruntime-tensorrt" in options.backends:
            yield _onnxruntime_target(run, file, options, device, "onnxruntime-tensorrt")
        if "engine" in options.backends and file.precision != "int8-cpu":
            yield from _engine_targets(run, file, device)


def _torch_target(run: Run, backend: str, precision: Precision, device: str) -> Target:
    row = LatencyRow(backend=backend, provider=f"torch {device}", precision=precision)
    if precision != "fp32":
        try:
            parity.require_torch_passed(run, precision)
        except UserError as error:
            return _refused(row, error)
    model = checkpoint.load_model(run).to(device)
    dtype = torch.float32
    if precision == "fp16":
        model, dtype = model.half(), torch.float16

    def prepare(images: np.ndarray) -> Call:
        host = torch.from_numpy(images)
        forward: Callable[[torch.Tensor], torch.Tensor] = model
        if backend == "compiled":
            torch.compiler.reset()  # compile for each batch size, just as engines select kernels for one
            forward = torch.compile(model, mode="max-autotune" if device == "cuda" else None, dynamic=False)
            inputs = host.to(device, dtype).contiguous(memory_format=torch.channels_last)
            expected, actual = model(inputs).float(), forward(inputs).float()
            if not (actual - expected).abs().max() <= COMPILED_LIMIT[precision] * expected.abs().max():
                raise UserError(f"{run.folder}: the compiled model's logits differ from the eager model's")
        if device == "cpu":
            inputs = host.to(memory_format=torch.channels_last)
            return Call({"compute": lambda: forward(inputs)})
        host = host.to(dtype).contiguous(memory_format=torch.channels_last)  # so that the copy does not convert
        on_device = host.cuda()
        logits = forward(on_device).clone()  # a compiled model reuses its output's memory
        return Call(_copies(host, on_device, logits) | {"compute": lambda: forward(on_device)})

    return Target(row, prepare)


def _refused(row: LatencyRow, error: UserError) -> Target:
    """Returns a target that the gate refuses, so that the others are measured nevertheless."""
    return Target(replace(row, not_measured=str(error), refused=True), refused=error)


def _onnxruntime_target(
    run: Run, file: onnx.OnnxFile, options: BenchOptions, device: str, backend: MeasuredBackend
) -> Target:
    caveat = parity.TF32_CAVEAT if (backend, file.precision) == ("onnxruntime-tensorrt", "fp32") else None
    row = LatencyRow(backend=backend, precision=file.precision, warning=caveat)
    provider = "tensorrt" if backend == "onnxruntime-tensorrt" else device
    if provider == "tensorrt" and device == "cpu":
        return Target(replace(row, not_measured="runs on a GPU, but this measurement is on the CPU"))
    try:
        session = OnnxSession(file.path, provider, options.threads, spinning=False, fp16=file.precision == "fp16")
    except ProviderError as error:
        return Target(replace(row, not_measured=str(error)))
    try:
        gate = parity.require_passed(run, file, session.provider)
    except UserError as error:
        return _refused(replace(row, provider=session.provider), error)
    classes = len(run.config().dataset.classes)

    def prepare(images: np.ndarray) -> Call:
        if device == "cpu":
            return Call({"compute": lambda: session(images)})
        host = torch.from_numpy(images)
        on_device, logits = host.cuda(), torch.empty(len(images), classes, device="cuda")
        return Call(_copies(host, on_device, logits) | {"compute": session.bind(on_device, logits)})

    return Target(replace(row, provider=session.provider, onnx_sha256=file.sha256, gate=gate), prepare)


def _package_target(run: Run, device: str) -> Target:
    provider = package.provider_of(device)
    row = LatencyRow(backend="aotinductor", provider=provider, precision="fp32")
    try:
        file = package.compiled(run, "cuda" if device == "cuda" else "cpu")
        gate = parity.require_passed(run, file, provider)
        forward = package.load(file.path)
    except UserError as error:
        return _refused(row, error)

    def prepare(images: np.ndarray) -> Call:
        host = torch.from_numpy(images)
        if device == "cpu":
            return Call({"compute": lambda: forward(host)})
        on_device = host.cuda()
        return Call(_copies(host, on_device, forward(on_device)) | {"compute": lambda: forward(on_device)})

    return Target(replace(row, onnx_sha256=file.sha256, gate=gate), prepare)


def _engine_targets(run: Run, file: onnx.OnnxFile, device: str) -> Iterator[Target]:
    row = LatencyRow(backend="engine", precision=file.precision)
    try:
        sidecars = engine_run.verified_engines(run, file)
    except UserError as error:  # a damaged engine
        yield _refused(row, error)
        return
    if not sidecars:
        yield Target(replace(row, not_measured="not built (runner engine)"))
    for sidecar in sidecars:
        row = replace(row, provider=sidecar.provider)
        if device != "cuda":
            yield Target(replace(row, not_measured="engines run on a GPU, but this measurement is on the CPU"))
            continue
        try:
            loaded = engine_run.LoadedEngine(run, sidecar)
        except UserError as error:
            yield Target(replace(row, not_measured=str(error)))
            continue
        yield _engine_target(run, file, loaded, row, sidecar)


def _engine_target(
    run: Run, file: onnx.OnnxFile, loaded: engine_run.LoadedEngine, row: LatencyRow, sidecar: EngineSidecar
) -> Target:
    def prepare(images: np.ndarray) -> Call:
        host = torch.from_numpy(images)
        on_device = loaded.set_input(host.cuda())
        logits = loaded(on_device)  # the first call cannot be captured in a graph
        enqueue = partial(loaded.enqueue, on_device, logits)
        try:
            compute, launched_as = _as_graph(enqueue), "CUDA graph"
        except RuntimeError as error:  # some engines cannot be captured
            reason = first_line(error)[:120]
            compute, launched_as = enqueue, f"separate kernels, because no CUDA graph could be captured: {reason}"
        return Call(_copies(host, on_device, logits) | {"compute": compute}, launched_as)

    try:
        gate = parity.require_passed(run, file, sidecar.provider, sidecar.sha256)
    except UserError as error:
        return _refused(row, error)
    row = replace(
        row,
        onnx_sha256=file.sha256,
        engine_sha256=sidecar.sha256,
        opt_batch=sidecar.batch.opt,
        warning=sidecar.caveat,
        gate=gate,
    )
    return Target(row, prepare, sidecar.batch.min, sidecar.batch.max)


def _as_graph(call: Callable[[], None]) -> Callable[[], None]:
    """Captures GPU work in a CUDA graph, and returns a function that replays it."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _copies(host: torch.Tensor, on_device: torch.Tensor, logits: torch.Tensor) -> Steps:
    """Returns the steps that copy images and logits between pinned host memory and the device."""
    pinned, out = host.pin_memory(), torch.empty_like(logits, device="cpu").pin_memory()
    return {
        "copy_in": lambda: on_device.copy_(pinned, non_blocking=True),
        "copy_out": lambda: out.copy_(logits, non_blocking=True),
    }


def _measure_target(target: Target, shape: list[int], options: BenchOptions, device: str) -> Iterator[LatencyRow]:
    """Measures a target at each batch size, on random images of the given shape (3, H, W)."""
    if target.row.not_measured:
        yield target.row
        return
    generator = np.random.default_rng(0)
    for batch in options.batches:
        row = replace(target.row, batch=batch)
        if not target.smallest <= batch <= target.largest:
            reason = f"the engine takes batches of {target.smallest} to {target.largest}"
            yield replace(row, not_measured=reason)
            continue
        images = generator.standard_normal((batch, *shape), dtype=np.float32)
        try:
            call = target.prepare(images)
            figures = measure(call.steps, batch, options.seconds, options.repeats, device)
        except torch.OutOfMemoryError:
            yield replace(row, not_measured="not enough GPU memory")
            torch.cuda.empty_cache()
            continue
        except (UserError, RuntimeError) as error:  # the other targets are measured nevertheless
            yield replace(row, not_measured=first_line(error), refused=True)
            continue
        sm_mhz = _sm_clock() if device == "cuda" else None  # right after the measurement, before the clock drops
        figures["warning"] = "; ".join(filter(None, (row.warning, figures.get("warning")))) or None
        yield replace(row, **figures, launched_as=call.launched_as, sm_mhz=sm_mhz)


def measure(steps: Steps, images: int, seconds: float, repeats: int, device: str) -> dict[str, Any]:
    """Times a call.

    Args:
        steps: the steps of the call by name. Percentiles are computed for `compute`; the other steps are copies.
        images: number of images per call.
        seconds, repeats: minimum duration and minimum number of calls.
        device: "cuda" times with CUDA events; "cpu" times with the system clock, even if there is a GPU.

    Returns:
        Fields of `LatencyRow`: percentiles in milliseconds, images per second at p50, the number of calls, the p50 of
        each copy, and a warning if the spread is wide or the calls are few.
    """
    timer = _time_by_events if device == "cuda" else _time_by_clock
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + WARMUP_SECONDS
    while time.perf_counter() < end:
        for step in steps.values():
            timer(step)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["compute"]) < repeats:
        for name, step in steps.items():
            times[name].append(timer(step))
    compute = times.pop("compute")
    figures: dict[str, Any] = {name: float(np.percentile(compute, percent)) for name, percent in PERCENTILES.items()}
    figures |= {f"{name}_p50_ms": float(np.median(copy)) for name, copy in times.items()}
    figures |= {"images_per_second": images * 1e3 / figures["p50_ms"], "calls": len(compute)}
    warnings = [f"only {len(compute)} calls"] if len(compute) < FEW_CALLS else []
    if (spread := figures["p90_ms"] / figures["p50_ms"]) > WIDE_SPREAD:
        warnings.append(f"p90 is {spread:.1f} times p50: other programs were running")
    return figures | {"warning": "; ".join(warnings) or None}


def _time_by_clock(call: Callable[[], Any]) -> float:
    """Times a call on the CPU, in milliseconds."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _time_by_events(call: Callable[[], Any]) -> float:
    """Times a call on the GPU, in milliseconds."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _sm_clock() -> int | None:
    """Returns the current SM clock of the GPU in MHz; None if the driver does not report it."""
    uuid = torch.cuda.get_device_properties(0).uuid  # CUDA_VISIBLE_DEVICES renumbers devices
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def show(reports: list[LatencyReport]) -> None:
    """Prints the rows of each run as a table. All were measured on this machine."""
    print(f"latency on {reports[0].hardware}")
    for report in reports:
        print(f"\n{report.run}")
        table = new_table(
            "backend", "precision", "batch", *(name.replace("_", " ") for name in PERCENTILES), "images/s", ""
        )
        notes = []
        for row in report.rows:
            cells = [row.label, row.precision, str(row.batch or "")]
            note = row.warning if row.measured else f"not measured: {row.not_measured}"
            if note:
                notes.append(f"{' '.join(filter(None, cells))}: {note}")
            if row.measured:
                cells += [f"{getattr(row, name):.2f}" for name in PERCENTILES]
                table.add_row(*cells, f"{row.images_per_second:,.0f}", "*" if row in report.fastest else "")
        print_table(table)
        if report.fastest:
            notes.insert(0, "*: the fastest of its precision and batch size")
        print(*map(printable, notes), sep="\n", end="\n" if notes else "")
