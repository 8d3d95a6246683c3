"""Compares int8 files by onnxruntime's quantizer, which `runner export` uses, with those by NVIDIA ModelOpt.

ModelOpt needs other versions of onnx and onnxruntime than this project, thus an environment of its own:

    uv venv modelopt-env
    uv pip install --python modelopt-env/bin/python "nvidia-modelopt[onnx]"
    python -m runner.benchmarks.quantizers runs/podeti-resnet18/seed-0 --data data/cifar10 \
        --modelopt modelopt-env/bin/python --json runner/benchmarks/results/quantizers-cpu.json

All files are made from one fp32 file, calibrated on the same images, and scored like `runner parity` does: by
onnxruntime on the CPU, on all test images, against the model in torch.
"""

import json as json_format
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import tyro

from runner.benchmarks import deploy, measure, program
from runner.commands.options import Code, open_run
from runner.common.console import new_table, print_table, progress
from runner.common.errors import UserError
from runner.config.recipe import Count
from runner.config.trust import TrustedCode
from runner.run.folder import Run
from runner.run.schema import Hardware, Scores, Summary
from runner.system import cpu, environment, launcher

if TYPE_CHECKING:
    from onnx import GraphProto

    from runner.data.stream import BatchStream

SCRIPT = Path(__file__).with_name("modelopt_int8.py")
PRINT_VERSIONS = (
    "import json; from importlib.metadata import version;"
    "print(json.dumps({name: version(name) for name in ('nvidia-modelopt', 'onnx')}))"
)
# The types that ModelOpt documents. Others, such as Shape, may read a quantized value as well, but gain nothing by it.
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
OTHERS = ("Add", "AveragePool", "BatchNormalization", "Clip", "GlobalAveragePool", "MaxPool", "Mul")
TITLES = ("quantizer", "exported", "same class", "passed", "operators in int8", "MB")
METHODS = ("entropy", "max")  # ModelOpt's default, and the one that estimates ranges like onnxruntime's minmax


class Operators(msgspec.Struct):
    """How many operators of a type a graph has, and how many of them take int8 values."""

    int8: int = 0
    all: int = 0


class File(msgspec.Struct):
    """An ONNX file: how it was made, its size, its operators by type, and its scores.

    `quantizer` is empty for the fp32 file.
    """

    quantizer: str
    bytes: int
    operators: dict[str, Operators]
    scores: Scores


class QuantizedRun(msgspec.Struct):
    """The files of one trained run."""

    experiment: str
    seed: int
    epochs: float
    dataset: str
    fingerprint: str
    eager_accuracy: float
    files: list[File]


class Result(msgspec.Struct):
    """The content of the JSON file."""

    hardware: Hardware
    versions: dict[str, str]
    modelopt: dict[str, str]
    calibration: int
    runs: list[QuantizedRun]


@dataclass(frozen=True)
class Quantizers:
    """Compare int8 by onnxruntime and by NVIDIA ModelOpt: accuracy, operators in int8, size of the file."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """Folders of finished runs; they are not modified."""
    modelopt: Path
    """Python interpreter of an environment with `nvidia-modelopt[onnx]`."""
    data: Path | None = None
    """Prepared dataset; by default the one that the runs were trained on."""
    calibration: Count = 512
    """Number of training images for estimating the activation ranges."""
    code: Code = TrustedCode()
    json: Path | None = None
    """JSON file to write."""

    def __call__(self) -> None:
        cpu.prepare()
        opened = [self._open(folder) for folder in self.runs]  # errors come before the work, which takes minutes
        modelopt = json_format.loads(self.run_modelopt("-c", PRINT_VERSIONS))
        compared = [self._compare(*run) for run in opened]
        for run in compared:
            table = new_table(*TITLES, title=run.experiment)
            for cells in cells_of(run):
                table.add_row(*cells)
            print_table(table)
        if self.json is not None:
            hardware, versions = environment.describe_hardware(), environment.package_versions()
            measure.write(Result(hardware, versions, modelopt, self.calibration, compared), self.json)

    def run_modelopt(self, *arguments: object) -> str:
        """Runs ModelOpt's interpreter, and returns what it prints.

        Raises:
            UserError: it cannot be started, or fails.
        """
        command = [str(self.modelopt), "-I", *map(str, arguments)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                preexec_fn=partial(launcher.die_with_parent, os.getpid()),
            )
        except OSError as error:
            found = error.strerror
        else:
            if done.returncode == 0:
                return done.stdout
            found = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
        raise UserError(
            f"--modelopt {self.modelopt}: expected a Python with nvidia-modelopt[onnx], found: {found}; make one: "
            'uv venv ENV; uv pip install --python ENV/bin/python "nvidia-modelopt[onnx]"'
        )

    def _open(self, folder: Path) -> tuple[Run, Summary, "BatchStream"]:
        """Returns a run, its summary and its test images.

        Raises:
            UserError: the run has no weights or is not finished, or the dataset is not the run's.
        """
        import torch

        from runner.data.open import open_split_of_run
        from runner.training import checkpoint

        run = open_run(folder, self.code)
        batches = open_split_of_run(run.config(), self.data, "test", torch.device("cpu"))
        checkpoint.latest(run)
        summary = run.read_summary()
        if summary is None:
            raise UserError(f"{folder}: expected a finished run, found no {run.summary.name}; train it to the end")
        return run, summary, batches

    def _compare(self, run: Run, summary: Summary, batches: "BatchStream") -> QuantizedRun:
        """Makes and scores the files of a run."""
        from onnx import load

        from runner.deploy import parity
        from runner.training import checkpoint
        from runner.training.evaluate import evaluate

        dataset, files = run.config().dataset, []
        classes, evaluations = len(dataset.classes), 3 + len(METHODS)
        with (
            tempfile.TemporaryDirectory() as scratch,
            progress(f"score {run.folder}", evaluations * batches.num_images) as advance,
        ):
            baseline = evaluate(checkpoint.load_model(run), batches, classes, advance=advance)
            for quantizer, path in self._made(run, Path(scratch)):
                measured = evaluate(_forward(path), batches, classes, advance=advance)
                scores = parity.compare_scores("int8" if quantizer else "fp32", baseline, measured)
                files.append(File(quantizer, path.stat().st_size, operators_of(load(path).graph), scores))
        return QuantizedRun(
            summary.experiment,
            summary.seed,
            summary.epochs,
            dataset.name,
            dataset.fingerprint,
            baseline.accuracy,
            files,
        )

    def _made(self, run: Run, scratch: Path) -> Iterator[tuple[str, Path]]:
        """Makes the files of a run in the folder `scratch`; yields the quantizer of each, and its path."""
        import numpy as np

        from runner.deploy import onnx, precision

        copy = deploy.copy_of(run, scratch)
        fp32 = onnx.export(copy).path
        yield "", fp32
        images = precision.calibration_images(run, self.data, self.calibration)
        yield "onnxruntime, minmax", precision.convert(copy, "int8", images).path
        calibration = scratch / "images.npy"
        np.save(calibration, images)
        for method in METHODS:
            int8 = scratch / f"{method}.onnx"
            self.run_modelopt(SCRIPT, fp32, calibration, method, int8)
            yield f"ModelOpt, {method}", int8


def _forward(path: Path) -> Callable:
    """Returns a function that computes the logits of a batch with an ONNX file."""
    import torch

    from runner.deploy.session import OnnxSession

    session = OnnxSession(path, spinning=False)
    return lambda images: torch.from_numpy(session(images.numpy()))


def operators_of(graph: "GraphProto") -> dict[str, Operators]:
    """Counts the operators of a graph by type.

    An operator takes int8 values if they come from DequantizeLinear: of a convolution or matrix product both the
    activations and the weights, of any other operator at least one input, because the other operand of an addition
    can be the result of a convolution, of which TensorRT makes the addition a part.
    """
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    counts: dict[str, Operators] = {}
    for node in graph.node:
        if node.op_type in (*PRODUCTS, *OTHERS):
            inputs = [name in dequantized for name in node.input]
            count = counts.setdefault(node.op_type, Operators())
            count.all += 1
            count.int8 += all(inputs[:2]) if node.op_type in PRODUCTS else any(inputs)
    return counts


def cells_of(run: QuantizedRun) -> Iterator[list[str]]:
    """Yields the cells of a table for each file of a run."""
    quantized = {kind: None for file in run.files for kind, count in file.operators.items() if count.int8}
    for file in run.files:
        counts = {kind: file.operators.get(kind, Operators()) for kind in quantized}
        yield [
            file.quantizer or "none (fp32)",
            f"{file.scores.accuracy:.2%} ({100 * file.scores.accuracy_change:+.2f})",
            f"{file.scores.agreement:.2%}",
            "yes" if file.scores.passed else f"no: {file.scores.limit}",
            ", ".join(f"{count.int8} of {count.all} {kind}" for kind, count in counts.items()),
            f"{file.bytes / 1e6:.1f}",
        ]


if __name__ == "__main__":
    program.run(Quantizers, "quantizers")
