"""Latency of a run: the model in torch, onnxruntime, and the TensorRT engine where a GPU is.

Method: warm-up by time; then calls one by one, each timed, for a least time and a least number; percentiles of
all of them, none cut. What is timed is one forward pass until its result is there, from an input on the device
to an output on it; onnxruntime on a GPU is timed with its copies from and to the host, and its row says so.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from data_prep.console import UserError, progress
from runner import checkpoint, cpu, environment, launched
from runner.deploy import engine, onnx
from runner.deploy.session import Session
from runner.runs import Run, write_json

FILE_NAME = "latency.json"
WARMUP_SECONDS = 0.5


def bench(
    run: Run,
    batches: tuple[int, ...],
    seconds: float,
    repeats: int,
    device: launched.Device,
    environ: Mapping[str, str],
) -> dict[str, Any]:
    """Measures every backend that can run here, and writes `deploy/latency.json`.

    Args:
        run: exported; its engine is measured where a GPU is.
        batches: batch sizes.
        seconds, repeats: the least time and number of calls for each figure.
        device: where to compute.
        environ: the process environment, for what the launcher has set.

    Returns:
        Hardware, versions, method, and a row for each backend and batch. A backend that cannot run here has a
        row that says why, and no figure.
    """
    for option, value in (
        ("--seconds", seconds),
        ("--repeats", repeats),
        ("--batch", min(batches, default=0)),
    ):
        if value <= 0:
            raise UserError(f"{option} {value}: expected more than 0")
    if max(batches) > onnx.LARGEST_BATCH:
        raise UserError(f"--batch {max(batches)}: expected at most {onnx.LARGEST_BATCH}, the ONNX file's limit")
    config = run.config()
    path, sha256 = onnx.exported(run)
    chosen, told = launched.device(device, launched.read(environ), torch.cuda.device_count())
    print(told, file=sys.stderr)
    if chosen == "cpu":
        cpu.prepare()
    model = checkpoint.load_model(run).to(chosen)
    session = Session(path, chosen)
    rows = []
    with progress("measure latency", 2 * len(batches)) as advance, torch.inference_mode():
        for size in batches:
            images = torch.randn(size, *config["input"]["shape"], generator=torch.Generator().manual_seed(0))
            on_device = images.to(chosen, memory_format=torch.channels_last)
            array = images.numpy()
            subjects: list[tuple[str, str, Callable[[], Any]]] = [
                ("eager", f"torch {chosen}", lambda x=on_device: _finished(model(x))),
                ("onnxruntime", session.provider, lambda x=array: session(x)),
            ]
            for backend, provider, call in subjects:
                row = {"backend": backend, "provider": provider, "precision": "fp32", "batch": size}
                rows.append(row | measure(call, size, seconds, repeats))
                if backend == "onnxruntime" and chosen == "cuda":
                    rows[-1]["includes"] = "copies from and to the host"
                advance(1)
        rows += _engine_rows(run, chosen, batches, seconds, repeats)
    result = {
        "run": str(run.folder),
        "onnx_sha256": sha256,
        "dataset": config["dataset"]["name"],
        "device": chosen,
        "threads": torch.get_num_threads() if chosen == "cpu" else None,
        "hardware": environment.hardware(),
        "versions": environment.versions("tensorrt", "tensorrt-rtx"),
        "method": {
            "warmup_seconds": WARMUP_SECONDS,
            "seconds": seconds,
            "repeats": repeats,
            "timed": "forward pass",
        },
        "rows": rows,
    }
    write_json(run.deploy / FILE_NAME, result)
    return result


def measure(call: Callable[[], Any], images: int, seconds: float, repeats: int) -> dict[str, float]:
    """Times a call that handles so many images.

    Returns:
        p50, p90, p99 in milliseconds, images per second at p50, and the number of calls.
    """
    end = time.perf_counter() + WARMUP_SECONDS
    while time.perf_counter() < end:
        call()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < repeats:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    p50, p90, p99 = np.percentile(times, [50, 90, 99]) * 1e3
    figures = {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "images_per_second": images * 1e3 / p50}
    return {name: float(value) for name, value in figures.items()} | {"calls": len(times)}


def show(result: dict[str, Any]) -> None:
    """Prints the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    title = f"{result['run']} on {environment.described(result['hardware'])}"
    table = Table("backend", "provider", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s", title=title, box=None)
    for row in result["rows"]:
        if "p50_ms" in row:
            figures = [f"{row[key]:.2f}" for key in ("p50_ms", "p90_ms", "p99_ms")]
            table.add_row(
                row["backend"],
                row["provider"],
                str(row["batch"]),
                *figures,
                f"{row['images_per_second']:,.0f}",
            )
        else:
            table.add_row(row["backend"], row["not_measured"])
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _finished(output: torch.Tensor) -> torch.Tensor:
    if output.is_cuda:
        torch.cuda.synchronize()
    return output


def _engine_rows(
    run: Run, device: str, batches: tuple[int, ...], seconds: float, repeats: int
) -> list[dict[str, Any]]:
    """The engine's rows. Running an engine needs a GPU; without one its row says so and has no figure."""
    if not (run.deploy / engine.SIDECAR).is_file():
        return [{"backend": "engine", "not_measured": "not built (runner engine)"}]
    sidecar = engine.check_sidecar(run)
    if device != "cuda":
        return [
            {
                "backend": sidecar["backend"],
                "not_measured": "an engine runs on a GPU, measured on the CPU here",
            }
        ]
    running = engine.RunningEngine(run, sidecar)
    rows = []
    for size in batches:
        row = {
            "backend": sidecar["backend"],
            "provider": sidecar["version"],
            "precision": "fp32",
            "batch": size,
        }
        if not sidecar["batch"]["min"] <= size <= sidecar["batch"]["max"]:
            rows.append(row | {"not_measured": f"the engine takes batches of {sidecar['batch']}"})
            continue
        _, *image_shape = sidecar["inputs"][0][1]
        images = torch.randn(size, *image_shape, device=device)
        rows.append(row | measure(lambda x=images: _finished(running(x)), size, seconds, repeats))
    return rows
