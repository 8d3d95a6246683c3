"""The types of the JSON files in a run folder. Readers ignore keys that they do not know.

This version reads the files of every earlier version; `format` increases when that is no longer possible. Non-finite
numbers are written as null, which is valid JSON; `decode` also reads NaN and Infinity as null.
"""

import dataclasses
import json
import re
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from runner.common.files import decode_text
from runner.common.text import without_controls
from runner.config.recipe import Architecture, Fraction, NonNegative, Recipe, Reported
from runner.config.train_config import TrainConfig

T = TypeVar("T")
Side = Annotated[int, Meta(ge=1, le=2**13)]  # side of an image that `predict` allocates
Natural = Annotated[int, Meta(ge=0, le=2**53)]  # up to the largest exact integer in JavaScript, which draws the page
Measured = Annotated[float, Meta(ge=0, le=1e12)]  # a table cannot show larger numbers

FORMAT = 1
Precision = Literal["fp32", "fp16", "int8", "int8-cpu"]
ScoredBackend = Literal["onnxruntime", "onnxruntime-tensorrt", "engine", "aotinductor"]  # of `runner parity`
MeasuredBackend = Literal[  # of `runner bench`
    "eager", "compiled", "aotinductor", "onnxruntime", "onnxruntime-tensorrt", "engine"
]
Calibration = Literal["minmax", "percentile"]  # how int8 estimates the ranges of activations
TrainPrecision = Literal["fp32", "bf16", "fp16"]


class FrontEnd(StrEnum):
    """The input of an ONNX file or engine: normalized images, or uint8 pixels that it normalizes itself."""

    NORMALIZED = "normalized"
    RAW = "raw"

    @classmethod
    def _missing_(cls, value: object) -> "FrontEnd | None":
        """Accepts the different spelling in files of earlier versions."""
        return cls.NORMALIZED if value == "normalised" else None


NOT_FINITE = re.compile(rb"\b(NaN|Infinity)\b")
# Earlier versions wrote whether a recipe compiles; now it is a mode.
OLD_COMPILE = re.compile(rb'"compile":\s*(true|false)\b')
COMPILE_MODES = {b"false": b'"compile": "none"', b"true": b'"compile": "default"'}


def decode(content: bytes, kind: type[T]) -> T:
    """Decodes a JSON file of a run folder. NaN and Infinity, which some writers emit, become null.

    Raises:
        ValueError: the content is damaged, or does not match the type; the message names the key.
    """
    content = without_controls(content)
    try:
        try:
            return msgspec.json.decode(content, type=kind, dec_hook=decode_text)
        except msgspec.DecodeError:
            if not NOT_FINITE.search(content) and not OLD_COMPILE.search(content):
                raise
        current = OLD_COMPILE.sub(lambda match: COMPILE_MODES[match[1]], content)
        finite = json.dumps(json.loads(current, parse_constant=lambda _: None))
        return msgspec.json.decode(finite, type=kind, dec_hook=decode_text)
    except RecursionError:
        raise ValueError("nested too deep") from None


class JsonStruct(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base class of the JSON files and their parts."""


class Hardware(JsonStruct, frozen=True, kw_only=True):
    """A machine: processor, usable cores, memory in GiB, the GPUs that torch sees, and its CUDA version."""

    cpu: str
    cores: int
    memory_gib: float = 0.0
    gpus: list[str] | None = None
    cuda: str | None = None

    def __str__(self) -> str:
        """Returns a short description, such as `2 × NVIDIA H200` or `2 cores of AMD EPYC`."""
        return f"{len(self.gpus)} × {self.gpus[0]}" if self.gpus else f"{self.cores} cores of {self.cpu}"


class Git(JsonStruct, frozen=True, kw_only=True):
    """The git checkout of the running code: its commit, and whether files differ from it. Empty outside a checkout."""

    commit: str | None = None
    changed: bool | None = None


class Dataset(JsonStruct, frozen=True, kw_only=True):
    """The dataset of a run. `mean` and `std` are per channel, in 0..255; `image_shape` is (H, W, 3)."""

    name: str
    fingerprint: str
    classes: list[str]
    image_shape: list[int]
    mean: list[float]
    std: list[float]
    folder: str = ""
    source: dict[str, Any] = {}

    @property
    def is_cifar10(self) -> bool:
        """Whether it is all of CIFAR-10 or of a copy, such as "CIFAR-10 (JPEG copy)". `prepare` reserves the name."""
        shape = (len(self.classes), *self.image_shape)
        named = (self.name + " ").startswith("CIFAR-10 ")
        return named and shape == (10, 32, 32, 3) and "limit_per_class" not in self.source


class ModelInput(JsonStruct, frozen=True, kw_only=True):
    """The input of a model: its shape (3, H, W), and the mean and std per channel, in 0..255, that normalize it."""

    shape: list[int]
    mean: list[float]
    std: list[float]

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{'×'.join(map(str, self.shape))}, mean {mean}, standard deviation {std}"


class Origin(JsonStruct, frozen=True, kw_only=True):
    """The origin of weights from another run: its experiment, folder and checkpoint, and the hash of the weights."""

    experiment: str
    folder: str
    checkpoint: str
    sha256: str


class Resumed(JsonStruct, frozen=True, kw_only=True):
    """One resumption of a run: its step and number of ranks, whether it is bit-identical, and what had changed."""

    step: int
    world_size: int
    bitwise: bool
    changed: dict[str, tuple[Any, Any]]
    commit: str | None = None


class Version(msgspec.Struct, frozen=True):
    """The format version of run.json, which is read before the rest of the file."""

    format: int = FORMAT


class RunConfig(msgspec.Struct, frozen=True, kw_only=True):
    """run.json: the resolved configuration of a run, and the dataset, hardware and software that it used."""

    format: int = FORMAT
    experiment: str
    run: str
    paper: str
    seed: int
    max_steps: int | None = None
    architecture: Architecture
    recipe: Recipe
    overrides: dict[str, tuple[Any, Any]] = {}
    """Differences from the registered experiment, by dotted name: [registered value, value of this run]."""
    reported: Reported | None = None
    parameters: Natural | None = None
    macs: Natural | None = None
    teacher: Origin | None = None
    started_from: Origin | None = None
    dataset: Dataset
    input: ModelInput
    precision: TrainPrecision
    device: str = "cpu"
    world_size: Natural = 1
    threads: int | None = None
    deterministic: bool = False
    loader: str = "resident"
    hardware: Hardware
    versions: dict[str, str]
    git: Git = Git()
    source_sha256: str | None = None
    """SHA-256 of the files of this package and of own experiments; runs of earlier versions lack it."""
    wandb_id: str = ""
    group: str = ""
    resumed: list[Resumed] = []
    options: TrainConfig | None = None
    """The options of `runner train`, given or default, before they were resolved."""

    def __post_init__(self) -> None:
        for part in (self.architecture, self.recipe, self.reported, self.options):
            if part is not None:
                _set_defaults(part)

    @property
    def name(self) -> str:
        """`experiment/run`."""
        return f"{self.experiment}/{self.run}"


def _set_defaults(value: Any) -> None:
    """Sets the fields of a dataclass that were missing in its JSON, which an earlier version wrote.

    msgspec leaves them to the class, and would not encode them: two equal recipes would differ.
    """
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        object.__setattr__(value, field.name, item)
        if dataclasses.is_dataclass(item):
            _set_defaults(item)


class Summary(JsonStruct, frozen=True, kw_only=True):
    """summary.json: the results of the last epoch and of the best epoch. Accuracies are in 0..1, losses in nats.

    The best epoch is selected on the validation images if the recipe holds some out. Otherwise it is selected on the
    test images, so `best_test_accuracy` is not a valid estimate of the accuracy.

    With early stopping (`recipe.patience`), all results are those of the best epoch, whose weights are saved;
    `stopped_early` says whether epochs were left out, and `epochs` counts those that were trained.
    """

    experiment: str
    run: str
    dataset: str
    seed: int
    epochs: NonNegative
    steps: Natural
    stopped_early: bool = False
    test_accuracy: Fraction
    test_loss: float | None
    test_top5: Fraction
    test_calibration_error: float | None
    test_images: Natural
    best_epoch: NonNegative
    best_test_accuracy: Fraction | None = None
    validation_accuracy: Fraction | None = None
    validation_loss: float | None = None
    validation_images: Natural | None = None
    best_validation_accuracy: Fraction | None = None
    test_accuracy_of_best_validation: Fraction | None = None
    test_accuracy_augmented: Fraction | None = None
    class_accuracy: list[Fraction | None]
    confusion: list[list[Natural]]


METRICS = {
    f"{split}_{name}": f"{split}/{name}"
    for split in ("train", "train_epoch", "validation", "test")
    for name in ("loss", "accuracy")
} | {"train_grad_norm": "train/grad_norm", "lr_1": "lr/1"}


class MetricRow(JsonStruct, frozen=True, kw_only=True, rename=METRICS):
    """A line of metrics.jsonl after `global_step` steps: metrics of training, or of an epoch and its evaluations."""

    global_step: int
    epoch: float
    lr: float | None = None
    lr_1: float | None = None
    """Learning rate of the last group of parameters, if its peak differs from that of the first: with Muon, and of the
    first layer with `layer_decay`."""
    train_loss: float | None = None
    train_accuracy: float | None = None
    train_grad_norm: float | None = None
    """Norm of the gradient of the last step, before it is clipped."""
    images_per_second: float | None = None
    data_seconds: float | None = None
    """Mean time per step that the first rank waits for a batch; on a GPU, until its kernels are launched."""
    compute_seconds: float | None = None
    """Mean time per step of everything else."""
    memory_gb: float | None = None
    """Peak memory of the first rank since its process started, in 10^9 bytes: of the GPU, or else of the process."""
    flops_utilization: float | None = None
    """Fraction of --peak-tflops that the model's arithmetic takes; see `flops_utilization` in training/meter.py."""
    train_epoch_loss: float | None = None
    train_epoch_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None


class Ending(JsonStruct, frozen=True, kw_only=True, rename={"reason": "told"}):
    """ended.json: how the last attempt to train the run ended, if it ended early."""

    stopped: bool
    reason: str = ""
    diverged: bool = False
    """Whether a loss or a weight was not finite, which would happen again."""


class CheckpointManifest(JsonStruct, frozen=True, kw_only=True):
    """manifest.json of a checkpoint: its step, its dataset's name, and the SHA-256 of each file."""

    step: int
    dataset: str
    sha256: dict[str, str]


class Mistake(JsonStruct, frozen=True, kw_only=True):
    """A misclassified test image. The image and the classes are given by their indices."""

    sample: Natural
    label: Natural
    predicted: Natural
    probability: Fraction


class Mistakes(JsonStruct, frozen=True, kw_only=True):
    """figures/mistakes.json: the mistakes with the highest confidence, in descending order."""

    mistakes: list[Mistake]


class Export(JsonStruct, frozen=True, kw_only=True):
    """One entry of deploy/exports.json: the hash of an ONNX file, and of the weights from which it was exported."""

    sha256: str
    weights: str


class PrecisionSearch(JsonStruct, frozen=True, kw_only=True):
    """deploy/search.*.json: the operators that must stay in fp32 for an int8 file to keep its accuracy.

    Accuracies and drops are fractions of the images; a drop is relative to the fp32 file.
    """

    precision: Precision
    calibration_method: Calibration
    images: str
    accuracy: Fraction
    """Accuracy of the fp32 file."""
    limit: float
    operators: Natural
    """Number of operators that can be quantized."""
    drop_of_all: float
    """Drop with all of them quantized."""
    bytes_of_all: Natural
    kept: list[str]
    """The operators that stay in fp32."""
    drop: float
    bytes: Natural
    drop_without: dict[str, float]
    """Drop if this one is quantized as well, which exceeds the limit."""
    measured: Natural
    """Number of sets of operators that were measured."""
    added_errors: dict[str, float]
    """Relative error that each operator adds when all are quantized."""


class Machine(JsonStruct, frozen=True, kw_only=True, omit_defaults=False):
    """The machine for which a result of the parity gate is valid: processor, GPUs, and version of onnxruntime."""

    cpu: str
    gpus: list[str] | None = None
    onnxruntime: str | None = None


class Scores(JsonStruct, frozen=True, kw_only=True, omit_defaults=False):
    """How much a model's logits differ from those of the fp32 model in torch, on all test images.

    `agreement` is the fraction of images with the same top class.
    Changes are relative to the accuracy of the fp32 model.
    """

    images: Natural
    accuracy: Fraction
    accuracy_change: float
    agreement: Fraction
    class_change: list[float | None]
    largest_logit_difference: float | None
    limit: str
    passed: bool

    def __str__(self) -> str:
        return f"agreement {self.agreement:.4%}, accuracy {self.accuracy:.2%} ({100 * self.accuracy_change:+.2f})"


class GateResult(JsonStruct, frozen=True, kw_only=True):
    """The result of the parity gate for the ONNX file or engine whose latency is measured."""

    accuracy_change: float
    agreement: Fraction
    passed: bool


def _name_engine(row: "ParityRow | LatencyRow") -> None:
    """Sets `backend` to `engine` for engines. Earlier versions wrote the library's name, which is in `provider`."""
    if row.backend.startswith("tensorrt"):
        msgspec.structs.force_setattr(row, "backend", "engine")


class ParityRow(Scores, frozen=True, kw_only=True, rename={"machine": "place"}):
    """The result of the parity gate for an ONNX file, or for an engine built from it."""

    backend: str
    onnx: str
    onnx_sha256: str
    engine_sha256: str | None = None
    precision: Precision
    front_end: FrontEnd
    provider: str
    culprit: str | None = None
    proposed: list[str] = []
    """For a failed int8 file, the operators that `runner export --keep` should leave in fp32 first."""
    caveat: str | None = None
    """For an engine, what of its arithmetic is outside NVIDIA's support matrix."""
    classes_predicted: int | None = None
    """Number of distinct classes predicted over all images; if it is one, agreement with the model proves little."""
    machine: Machine | None = None

    def __post_init__(self) -> None:
        _name_engine(self)

    @property
    def predicts_one_class(self) -> bool:
        """Whether the same class is predicted for all images."""
        return self.classes_predicted == 1

    @property
    def gate(self) -> GateResult:
        """The part of the result that is stored with a latency."""
        return GateResult(accuracy_change=self.accuracy_change, agreement=self.agreement, passed=self.passed)

    def __str__(self) -> str:
        scores = Scores.__str__(self)
        if self.predicts_one_class:
            scores += ", but one class is predicted for all images, so agreement proves nothing"
        if self.caveat:
            scores += f", {self.caveat}"
        return scores if self.passed else f"{scores}, limit: {self.limit}; worst at {self.culprit}"


class TorchRow(Scores, frozen=True, kw_only=True, rename={"machine": "place"}):
    """The result of the parity gate for the model itself, run by torch on a GPU in a lower precision."""

    precision: Precision
    weights: str
    machine: Machine


class NotScored(JsonStruct, frozen=True, kw_only=True):
    """An ONNX file that could not be scored with a backend, and the reason."""

    onnx: str
    backend: str
    reason: str


class ParityReport(JsonStruct, frozen=True, kw_only=True, omit_defaults=False):
    """deploy/parity.json: the results of the parity gate, and the accuracy of the model in torch."""

    run: str
    dataset: str
    images: Natural
    eager_accuracy: Fraction
    hardware: Hardware
    versions: dict[str, str]
    rows: list[ParityRow] = []
    torch: list[TorchRow] = []
    not_scored: list[NotScored] = []


class LatencyRow(JsonStruct, frozen=True, kw_only=True):
    """The latency of one backend, precision and batch size, or in `not_measured` the reason why it was not measured.

    `refused` is set if the reason is an error: it has not passed the gate, or failed to run.
    `p50_ms`, `p90_ms` and `p99_ms` cover only the computation; copies to and from a GPU are measured separately.
    """

    backend: str
    provider: str | None = None
    precision: Precision
    onnx_sha256: str | None = None
    engine_sha256: str | None = None
    opt_batch: int | None = None
    launched_as: str | None = None
    gate: GateResult | None = None
    batch: Natural | None = None
    p50_ms: Measured | None = None
    p90_ms: Measured | None = None
    p99_ms: Measured | None = None
    images_per_second: Measured | None = None
    calls: Natural | None = None
    copy_in_p50_ms: NonNegative | None = None
    copy_out_p50_ms: NonNegative | None = None
    sm_mhz: int | None = None
    warning: str | None = None
    not_measured: str | None = None
    refused: bool = False

    def __post_init__(self) -> None:
        _name_engine(self)

    @property
    def measured(self) -> bool:
        """Whether the latency was measured."""
        return self.p50_ms is not None

    @property
    def label(self) -> str:
        """Backend and provider as shown in tables, such as `onnxruntime CPU`; the library alone for an engine."""
        text = self.provider if self.engine_sha256 else f"{self.backend} {self.provider or ''}".strip()
        return (text or self.backend).removesuffix("ExecutionProvider")


class Method(JsonStruct, frozen=True, kw_only=True):
    """How latencies were measured: seconds of warmup, and the minimum duration and number of calls."""

    warmup_seconds: float
    seconds: float
    repeats: int


class LatencyReport(JsonStruct, frozen=True, kw_only=True, omit_defaults=False):
    """deploy/latency.json: the latencies measured on one machine.

    `weights` is the hash of the weights, and `load` the load average of the machine before the measurement.
    """

    run: str
    weights: str
    dataset: str
    device: str
    threads: int | None = None
    hardware: Hardware
    versions: dict[str, str]
    method: Method
    load: float | None = None
    rows: list[LatencyRow] = []

    @property
    def fastest(self) -> list[LatencyRow]:
        """The row with the lowest p50 of each precision and batch size, where several backends were measured."""
        rivals: dict[tuple[Precision, int | None], list[LatencyRow]] = {}
        for row in self.rows:
            if row.p50_ms is not None:
                rivals.setdefault((row.precision, row.batch), []).append(row)
        return [min(rows, key=lambda row: row.p50_ms or 0.0) for rows in rivals.values() if len(rows) > 1]


class BatchRange(JsonStruct, frozen=True, kw_only=True):
    """The smallest batch size that an engine accepts, the one that it is optimized for, and the largest."""

    min: int
    opt: int
    max: int


class EngineSidecar(JsonStruct, frozen=True, kw_only=True, omit_defaults=False):
    """model.*.engine.json: the description of an engine, and the hashes that identify it before it is loaded."""

    engine: str
    sha256: str
    bytes: Natural
    onnx: str
    onnx_sha256: str
    precision: Precision
    front_end: FrontEnd
    dataset: str
    backend: str
    version: str
    version_compatible: bool = False
    """Whether later versions with the same major number run it."""
    build_route: str | None = None
    """Settings of TensorRT's compiler; None for the default ones."""
    target: str
    compute_capabilities: list[str] = []
    """Compute capabilities of the GPUs that it runs on, such as "8.9"; empty if an earlier version built it."""
    outside_matrix: list[str] = []
    """Arithmetic in it that NVIDIA's support matrix of the library does not list, such as "int8 convolutions"."""
    batch: BatchRange
    inputs: list[tuple[str, list[int], str]]
    layers: int | None = None
    layer_precisions: dict[str, dict[str, int]] = {}
    layer_precisions_from: str = ""
    inspected_layers: list[Any] | None = None
    inspected_precisions: dict[str, int] | None = None
    weights_bytes: int | None = None
    optimization_level: int | None = None
    timing_cache: bool = False
    hardware: Hardware | None = None
    versions: dict[str, str] = {}
    log: list[str] = []

    @property
    def caveat(self) -> str | None:
        """What NVIDIA's support matrix does not list, as a remark; None if it lists everything."""
        return f"outside NVIDIA's support matrix: {', '.join(self.outside_matrix)}" if self.outside_matrix else None

    @property
    def capabilities_text(self) -> str:
        """The compute capabilities of the GPUs that it runs on, in words."""
        return " or ".join(self.compute_capabilities) or "not recorded"

    @property
    def provider(self) -> str:
        """The library that runs the engine and its version, such as `tensorrt-rtx 1.2`."""
        return f"{self.backend} {self.version}"


class OnnxDataset(JsonStruct, frozen=True, kw_only=True):
    """The dataset of an ONNX file."""

    name: str
    fingerprint: str


class OnnxMetadata(JsonStruct, frozen=True, kw_only=True):
    """The metadata that a server needs, stored in an ONNX file with each value as JSON. See ModelInput and Dataset."""

    classes: list[str]
    precision: Precision
    front_end: FrontEnd
    shape: tuple[Side, Side, Side]
    image_shape: tuple[Side, Side, Side]
    fit: Literal["crop", "pad", "stretch"] = "stretch"
    """How an image of another size is resized to `image_shape`, as by `prepare --fit`."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    experiment: str
    run: str
    dataset: OnnxDataset
    commit: str | None = None
    weights: str = ""
    kept: list[str] = []
    """Operators of an int8 file that stay in fp32."""
    largest_batch: int
