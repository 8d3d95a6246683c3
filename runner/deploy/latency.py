"""Latency of a run: the model in torch, eager and compiled, onnxruntime, and TensorRT engines where a GPU is.

Method, as of trtexec and MLPerf's single stream: warm-up by time; then calls one by one, for a least time and a
least number; percentiles of all of them, none cut. On a GPU the input's copy, the computation and the output's
copy are timed apart, each by CUDA events, on pinned memory; engines and the compiled model replay a CUDA graph. On
the CPU a call is timed whole, with a stated number of threads that do not spin. Only what has passed the gate is
measured; the compiled model has to give the logits of the eager one.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from data_prep.console import UserError, progress
from runner import checkpoint, cpu, cuda, environment, launched
from runner.deploy import engine, onnx, parity
from runner.deploy.onnx import Precision
from runner.deploy.session import ProviderError, Session
from runner.runs import Run, read_json, write_json

FILE_NAME = "latency.json"
WARMUP_SECONDS = 0.5
WIDE = 1.5  # p90 over p50, from which a row carries a warning
COMPILED = {"fp32": 1e-3, "fp16": 3e-2}  # of the largest logit, by which compiled may differ from eager
PERCENTILES = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99}
Backend = Literal["eager", "compiled", "onnxruntime", "engine"]


@dataclass(frozen=True)
class Wish:
    """What is to be measured, and how long.

    Attributes:
        batches: batch sizes.
        precisions: of ONNX files and engines; eager and compiled follow with fp32, and on a GPU fp16.
        backends: which.
        seconds, repeats: least time and number of calls of each figure.
        threads: on the CPU; None for all usable cores.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    precisions: tuple[Precision, ...] = ("fp32",)
    backends: tuple[Backend, ...] = ("eager", "onnxruntime", "engine")
    seconds: float = 3.0
    repeats: int = 100
    threads: int | None = None


@dataclass(frozen=True)
class Subject:
    """One thing to measure: its row's beginning, and for a batch size what does the work.

    `parts` gives, for images on the host, the steps of a call in order, by name; it takes `smallest` to `largest`.
    """

    row: dict[str, Any]
    parts: Callable[[np.ndarray], dict[str, Callable[[], Any]]]
    smallest: int = 1
    largest: int = onnx.LARGEST_BATCH


def bench(run: Run, wish: Wish, device: launched.Device, environ: Mapping[str, str]) -> dict[str, Any]:
    """Measures what is wished and can run here, and writes `deploy/latency.json`, whole after each figure.

    Figures that were there stay, where they are of other backends, precisions or batches, of files and engines that
    are there, and of the same weights, hardware, versions and method.

    Args:
        run: exported, and scored by the gate.
        wish: what.
        device: where to compute.
        environ: the process environment, for what the launcher has set.

    Returns:
        Hardware, versions, method, and a row for each backend, precision and batch. What cannot run here has a row
        that says why, and no figure.

    Raises:
        UserError: a number out of range; a file that was not exported, or has not passed the gate.
    """
    for option, value in (
        ("--seconds", wish.seconds),
        ("--repeats", wish.repeats),
        ("--batch", min(wish.batches, default=0)),
        ("--threads", 1 if wish.threads is None else wish.threads),
    ):
        if value <= 0:
            raise UserError(f"{option} {value}: expected more than 0")
    if max(wish.batches) > onnx.LARGEST_BATCH:
        raise UserError(
            f"--batch {max(wish.batches)}: expected at most {onnx.LARGEST_BATCH}, the ONNX file's limit"
        )
    config = run.config()
    files = [onnx.exported(run, precision) for precision in wish.precisions]
    chosen, told = launched.device(device, launched.read(environ), torch.cuda.device_count())
    print(told, file=sys.stderr)
    if chosen == "cpu":
        cpu.prepare()
        torch.set_num_threads(wish.threads or torch.get_num_threads())
    else:
        cuda.exact_fp32()
    hardware = environment.hardware()
    if chosen == "cpu":
        hardware = {key: value for key, value in hardware.items() if key not in ("gpus", "cuda")}  # none has worked
    result = {
        "run": str(run.folder),
        "weights": onnx.weights_of(run),
        "dataset": config["dataset"]["name"],
        "device": chosen,
        "threads": torch.get_num_threads() if chosen == "cpu" else None,
        "hardware": hardware,
        "versions": environment.versions("tensorrt", "tensorrt-rtx"),
        "method": {"warmup_seconds": WARMUP_SECONDS, "seconds": wish.seconds, "repeats": wish.repeats},
    }
    path = run.deploy / FILE_NAME
    before = read_json(path) if path.is_file() else {}
    same = all(before.get(key) == value for key, value in result.items())
    there = _hashes(run) if same else set()
    kept = [
        row
        for row in before.get("rows", [])
        if same and {row.get("onnx_sha256"), row.get("engine_sha256")} <= there
    ]
    result["load"] = round(os.getloadavg()[0], 2)  # before we add to it
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        ours = {_key(row) for row in rows}
        result["rows"] = [*(row for row in kept if _key(row) not in ours), *rows]
        write_json(path, result)

    generator = np.random.default_rng(0)
    subjects = list(_subjects(run, files, wish, chosen))
    with progress("measure latency", len(subjects) * len(wish.batches)) as advance, torch.inference_mode():
        for subject in subjects:
            for size in wish.batches:
                advance(1)
                if "not_measured" in subject.row:
                    keep(subject.row)
                    break
                row = subject.row | {"batch": size}
                if not subject.smallest <= size <= subject.largest:
                    told = f"the engine takes batches of {subject.smallest} to {subject.largest}"
                    keep(row | {"not_measured": told})
                    continue
                images = generator.standard_normal((size, *config["input"]["shape"]), dtype=np.float32)
                try:
                    figures = measure(subject.parts(images), size, wish.seconds, wish.repeats, chosen)
                except torch.OutOfMemoryError:
                    keep(row | {"not_measured": "not enough GPU memory"})
                    torch.cuda.empty_cache()
                    continue
                if chosen == "cuda":
                    figures["sm_mhz"] = _clock()  # it has just worked
                keep(row | subject.row | figures)
    return result | {"rows": rows}


def _hashes(run: Run) -> set[str | None]:
    """What latencies can be of: the run's ONNX files, its engines, and, as None, no file."""
    engines = {read_json(path).get("sha256") for path in engine.sidecars(run) if path.is_file()}
    return {None} | {file.sha256 for file in onnx.all_exported(run)} | engines


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of; of two alike the later is kept."""
    return tuple(row.get(key) for key in ("backend", "provider", "precision", "batch"))


def _subjects(run: Run, files: list[onnx.Exported], wish: Wish, device: str) -> Iterator[Subject]:
    """What is wished, as far as it can run here; the rest with the reason."""
    for backend in ("eager", "compiled"):
        if backend in wish.backends:
            for precision in ("fp32",) if device == "cpu" else ("fp32", "fp16"):
                yield _in_torch(run, backend, precision, device)
    for file in files:
        if "onnxruntime" in wish.backends:
            yield _in_onnxruntime(run, file, wish, device)
        if "engine" in wish.backends and file.precision != "int8-cpu":
            yield from _in_tensorrt(run, file, device)


def _in_torch(run: Run, backend: str, precision: str, device: str) -> Subject:
    if precision != "fp32":
        parity.check_torch(run, precision)
    model = checkpoint.load_model(run).to(device)
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    if precision == "fp16":
        model = model.half()

    def parts(images: np.ndarray) -> dict[str, Callable[[], Any]]:
        host, forward = torch.from_numpy(images), model
        if backend == "compiled":
            torch.compiler.reset()  # for each batch its own kernels, as an engine's are
            forward = torch.compile(model, mode="max-autotune" if device == "cuda" else None, dynamic=False)
            some = host.to(device, dtype).contiguous(memory_format=torch.channels_last)
            expected, found = model(some).float(), forward(some).float()
            if not (found - expected).abs().max() <= COMPILED[precision] * expected.abs().max():
                raise UserError(f"{run.folder}: the compiled model gives other logits than the eager one")
        if device == "cpu":
            ours = host.to(memory_format=torch.channels_last)
            return {"compute": lambda: forward(ours)}
        return _on_gpu(host.to(dtype), lambda images: forward(images), torch.channels_last)

    return Subject({"backend": backend, "provider": f"torch {device}", "precision": precision}, parts)


def _in_onnxruntime(run: Run, file: onnx.Exported, wish: Wish, device: str) -> Subject:
    try:
        session = Session(file.path, device, wish.threads, spinning=False, fp16=file.precision == "fp16")
    except ProviderError as error:
        row = {"backend": "onnxruntime", "precision": file.precision, "not_measured": str(error)}
        return Subject(row, lambda images: {})
    parity.check(run, file, session.provider)
    row = {"backend": "onnxruntime", "provider": session.provider, "precision": file.precision}
    row["onnx_sha256"] = file.sha256
    classes = len(run.config()["dataset"]["classes"])

    def parts(images: np.ndarray) -> dict[str, Callable[[], Any]]:
        if device == "cpu":
            return {"compute": lambda: session(images)}
        host = torch.from_numpy(images)
        on_device, logits = host.cuda(), torch.empty(len(images), classes, device="cuda")
        return _copies(host, on_device, logits) | {"compute": session.bound(on_device, logits)}

    return Subject(row, parts)


def _in_tensorrt(run: Run, file: onnx.Exported, device: str) -> Iterator[Subject]:
    sidecars = engine.built(run, file)
    if not sidecars:
        row = {"backend": "engine", "precision": file.precision}
        yield Subject(row | {"not_measured": "not built (runner engine)"}, lambda images: {})
    for sidecar in sidecars:
        row = {"backend": sidecar["backend"], "provider": engine.provider(sidecar), "precision": file.precision}
        if device != "cuda":
            reason = "an engine runs on a GPU, measured on the CPU here"
            yield Subject(row | {"not_measured": reason}, lambda images: {})
            continue
        try:
            running = engine.RunningEngine(run, sidecar)
        except UserError as error:
            yield Subject(row | {"not_measured": str(error)}, lambda images: {})
            continue
        parity.check(run, file, running.provider, sidecar["sha256"])
        row |= {
            "onnx_sha256": file.sha256,
            "engine_sha256": sidecar["sha256"],
            "opt_batch": sidecar["batch"]["opt"],
        }

        def parts(
            images: np.ndarray, running: engine.RunningEngine = running, row: dict[str, Any] = row
        ) -> dict[str, Callable[[], Any]]:
            host = torch.from_numpy(images)
            on_device = running.accepted(host.cuda())
            logits = running(on_device)  # once outside, which the graph's capture needs
            enqueue = partial(running.enqueue, on_device, logits)
            try:
                compute, row["launched_as"] = _as_graph(enqueue), "CUDA graph"
            except RuntimeError as error:  # an engine may hold what no graph can
                reason = str(error).splitlines()[0][:120]
                compute, row["launched_as"] = enqueue, f"stream of kernels, for it cannot be captured: {reason}"
            return _copies(host, on_device, logits) | {"compute": compute}

        yield Subject(row, parts, sidecar["batch"]["min"], sidecar["batch"]["max"])


def _as_graph(call: Callable[[], None]) -> Callable[[], None]:
    """The same work on the GPU, launched as one CUDA graph."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _on_gpu(
    host: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor], layout: torch.memory_format
) -> dict[str, Callable[[], Any]]:
    host = host.contiguous(memory_format=layout)  # so that copying in is a copy and nothing else
    on_device = host.cuda()
    logits = forward(on_device).clone()  # a compiled model writes the next ones over its own
    return _copies(host, on_device, logits) | {"compute": lambda: forward(on_device)}


def _copies(host: torch.Tensor, on_device: torch.Tensor, logits: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Copies between pinned memory and the device."""
    pinned, out = host.pin_memory(), torch.empty_like(logits, device="cpu").pin_memory()
    return {
        "copy_in": lambda: on_device.copy_(pinned, non_blocking=True),
        "copy_out": lambda: out.copy_(logits, non_blocking=True),
    }


def measure(
    parts: dict[str, Callable[[], Any]], images: int, seconds: float, repeats: int, device: str
) -> dict[str, Any]:
    """Times calls that handle so many images.

    Args:
        parts: by name; `compute` is the one that the row is about, the others are copies around it.
        images: in a call.
        seconds, repeats: least time and number of calls.
        device: "cuda" times by its events, "cpu" by the clock, also where there is a GPU.

    Returns:
        p50, p90, p99 in milliseconds, images a second at p50, and the number of calls; of each copy its p50; a
        warning where the spread is wide.
    """
    clock = _by_events if device == "cuda" else _by_clock
    times: dict[str, list[float]] = {name: [] for name in parts}
    end = time.perf_counter() + WARMUP_SECONDS
    while time.perf_counter() < end:
        for call in parts.values():
            clock(call)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["compute"]) < repeats:
        for name, call in parts.items():
            times[name].append(clock(call))
    figures: dict[str, Any] = {
        name: float(np.percentile(times["compute"], percentile)) for name, percentile in PERCENTILES.items()
    }
    figures["images_per_second"] = images * 1e3 / figures["p50_ms"]
    figures["calls"] = len(times["compute"])
    figures |= {f"{name}_p50_ms": float(np.median(spent)) for name, spent in times.items() if name != "compute"}
    if figures["p90_ms"] > WIDE * figures["p50_ms"]:
        figures["warning"] = f"p90 is {figures['p90_ms'] / figures['p50_ms']:.1f} times p50: something else ran"
    return figures


def _by_clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _by_events(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _clock() -> int | None:
    """Of the GPU's processors, in MHz; None where the driver does not tell."""
    which = torch.cuda.get_device_properties(0).uuid  # CUDA_VISIBLE_DEVICES may have given it another number
    command = ["nvidia-smi", f"--id=GPU-{which}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        return int(told.strip())
    except (OSError, subprocess.SubprocessError, ValueError):  # no figure is worth less for it
        return None


def show(results: list[dict[str, Any]]) -> None:
    """Prints the rows of runs as one table.

    Raises:
        UserError: they were measured on different hardware.
    """
    from rich.console import Console
    from rich.table import Table

    places = {environment.described(result["hardware"]) for result in results}
    if len(places) > 1:
        raise UserError(
            f"rows of {' and of '.join(sorted(places))}: expected one machine; measure them again on it"
        )
    titles = ("run", "backend", "provider", "precision", "batch", *PERCENTILES, "images/s")
    table = Table(*titles, title=f"latency on {places.pop()}", box=None)
    for result in results:
        for row in result["rows"]:
            told = [row["backend"], row.get("provider", ""), row["precision"], str(row.get("batch", ""))]
            if "p50_ms" in row:
                figures = [f"{row[key]:.2f}" for key in PERCENTILES]
                table.add_row(
                    result["run"], *told, *figures, f"{row['images_per_second']:,.0f}", row.get("warning")
                )
            else:
                table.add_row(result["run"], *told, row["not_measured"])
    Console(width=None if sys.stdout.isatty() else 160).print(table)
