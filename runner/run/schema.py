"""What the JSON files of a run folder hold, as types. Keys that a reader does not know are left alone.

Readers of this version take the files of every earlier one; `format` rises when that ends. Numbers that are not finite
are written as null, which is JSON; `decode` also reads NaN and Infinity as null.
"""

import json
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from runner.config.recipe import Architecture, Fraction, NonNegative, Recipe, Reported
from runner.config.train_config import TrainConfig

T = TypeVar("T")
Natural = Annotated[int, Meta(ge=0, le=2**53)]  # up to the largest that JavaScript, which draws the page, counts to

FORMAT = 1
Precision = Literal["fp32", "fp16", "int8", "int8-cpu"]
Calibration = Literal["minmax", "percentile"]  # how int8 estimates the ranges of activations
Autocast = Literal["fp32", "bf16", "fp16"]
FrontEnd = Literal["normalised", "raw"]


NOT_FINITE = re.compile(rb"\b(NaN|Infinity)\b")


def decode(content: bytes, kind: type[T]) -> T:
    """Decodes the JSON of a run folder. Some writers put NaN and Infinity into it, which JSON lacks: they become null.

    Raises:
        ValueError: it is damaged, or does not match the type; the message names the key.
    """
    try:
        try:
            return msgspec.json.decode(content, type=kind, dec_hook=_from_text)
        except msgspec.DecodeError:
            if not NOT_FINITE.search(content):
                raise
        finite = json.dumps(json.loads(content, parse_constant=lambda _: None))
        return msgspec.json.decode(finite, type=kind, dec_hook=_from_text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _from_text(kind: type, value: Any) -> Any:
    """Paths are text in JSON."""
    return kind(value)


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of a file."""


class Hardware(Record, frozen=True, kw_only=True):
    """A machine: processor, usable cores, memory in GiB, the GPUs that torch sees, and its CUDA version."""

    cpu: str
    cores: int
    memory_gib: float = 0.0
    gpus: list[str] | None = None
    cuda: str | None = None

    def __str__(self) -> str:
        """`2 × NVIDIA H200`, or `2 cores of AMD EPYC`."""
        return f"{len(self.gpus)} × {self.gpus[0]}" if self.gpus else f"{self.cores} cores of {self.cpu}"


class Git(Record, frozen=True, kw_only=True):
    """The checkout that ran: its commit, and whether files differed from it. Empty outside of a checkout."""

    commit: str | None = None
    changed: bool | None = None


class Dataset(Record, frozen=True, kw_only=True):
    """The dataset of a run; mean and std per channel, in 0..255; image_shape is (H, W, 3)."""

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
        """Whether it is all of CIFAR-10, or of a copy such as "CIFAR-10 (JPEG copy)"; `prepare` reserves the name."""
        return (self.name + " ").startswith("CIFAR-10 ") and "limit_per_class" not in self.source


class ModelInput(Record, frozen=True, kw_only=True):
    """What a model is given: shape (3, H, W); mean and std per channel, in 0..255, subtracted and divided by."""

    shape: list[int]
    mean: list[float]
    std: list[float]


class Origin(Record, frozen=True, kw_only=True):
    """The weights of another run: its experiment and folder, the checkpoint, and the hash of the weights."""

    experiment: str
    folder: str
    checkpoint: str
    sha256: str


class Resumed(Record, frozen=True, kw_only=True):
    """One resumption: from which step, on how many ranks, whether bit-identical, and what had changed by then."""

    step: int
    world_size: int
    bitwise: bool
    changed: dict[str, tuple[Any, Any]]
    commit: str | None = None


class Version(msgspec.Struct, frozen=True):
    """The version of run.json, which is read before anything else of it."""

    format: int = FORMAT


class RunConfig(msgspec.Struct, frozen=True, kw_only=True):
    """run.json: what was trained and how, as resolved, and what it was trained on."""

    format: int = FORMAT
    experiment: str
    run: str
    paper: str
    seed: int
    max_steps: int | None = None
    architecture: Architecture
    recipe: Recipe
    overrides: dict[str, tuple[Any, Any]] = {}
    """What differs from the registered experiment: [registered, ours] by dotted name."""
    reported: Reported | None = None
    parameters: Natural | None = None
    macs: Natural | None = None
    teacher: Origin | None = None
    started_from: Origin | None = None
    dataset: Dataset
    input: ModelInput
    precision: Autocast
    device: str = "cpu"
    world_size: Natural = 1
    threads: int | None = None
    deterministic: bool = False
    loader: str = "resident"
    hardware: Hardware
    versions: dict[str, str]
    git: Git = Git()
    wandb_id: str = ""
    group: str = ""
    resumed: list[Resumed] = []
    options: TrainConfig | None = None
    """The options of `runner train` as given or by default, before they were resolved."""

    @property
    def name(self) -> str:
        """`experiment/run`."""
        return f"{self.experiment}/{self.run}"


class Summary(Record, frozen=True, kw_only=True):
    """summary.json: the outcome of the last epoch, with the best beside it; accuracies in 0..1, losses in nats.

    The best epoch is chosen on the validation images where the recipe holds some out; else on the test images, which
    makes `best_test_accuracy` no estimate of anything.
    """

    experiment: str
    run: str
    dataset: str
    seed: int
    epochs: NonNegative
    steps: Natural
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
}


class MetricRow(Record, frozen=True, kw_only=True, rename=METRICS):
    """A line of metrics.jsonl, at `global_step` optimizer steps: of training, or of an epoch with its evaluations."""

    global_step: int
    epoch: float
    lr: float | None = None
    train_loss: float | None = None
    train_accuracy: float | None = None
    images_per_second: float | None = None
    train_epoch_loss: float | None = None
    train_epoch_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None


class Ending(Record, frozen=True, kw_only=True, rename={"reason": "told"}):
    """ended.json: how the last attempt ended where that was before its time."""

    stopped: bool
    reason: str = ""


class Manifest(Record, frozen=True, kw_only=True):
    """manifest.json of a checkpoint: its step, its dataset's name, and the SHA-256 of each file."""

    step: int
    dataset: str
    sha256: dict[str, str]


class Mistake(Record, frozen=True, kw_only=True):
    """A test image that was taken for another class, by its index; classes by theirs."""

    sample: Natural
    label: Natural
    predicted: Natural
    probability: Fraction


class Mistakes(Record, frozen=True, kw_only=True):
    """figures/mistakes.json: the mistakes of which the model was surest, those first."""

    mistakes: list[Mistake]


class Export(Record, frozen=True, kw_only=True):
    """One entry of deploy/exports.json: the hash of an ONNX file, and that of the weights it was made from."""

    sha256: str
    weights: str


class Machine(Record, frozen=True, kw_only=True, omit_defaults=False):
    """What a row of the gate holds for, beside file and engine: processor, GPUs, and onnxruntime's version."""

    cpu: str
    gpus: list[str] | None = None
    onnxruntime: str | None = None


class Scores(Record, frozen=True, kw_only=True, omit_defaults=False):
    """How far a model's logits are from those of the fp32 model in torch, on all test images.

    `agreement` is the share of images with the same top class; changes are ours less the model's.
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


class Gate(Record, frozen=True, kw_only=True):
    """What the gate found of the file that a latency is of."""

    accuracy_change: float
    agreement: Fraction
    passed: bool


def _name_engine(row: "ParityRow | LatencyRow") -> None:
    """`backend` is `engine` for every engine; earlier versions wrote the name of its library, which `provider` has."""
    if row.backend.startswith("tensorrt"):
        msgspec.structs.force_setattr(row, "backend", "engine")


class ParityRow(Scores, frozen=True, kw_only=True):
    """A file, or an engine of it, as the gate scored it."""

    backend: str
    onnx: str
    onnx_sha256: str
    engine_sha256: str | None = None
    precision: Precision
    front_end: FrontEnd
    provider: str
    culprit: str | None = None
    classes_predicted: int | None = None
    """How many classes it predicts over all images; with one, that it agrees with the model proves little."""
    place: Machine | None = None

    def __post_init__(self) -> None:
        _name_engine(self)

    @property
    def predicts_one_class(self) -> bool:
        """Whether it predicts the same class for all images."""
        return self.classes_predicted == 1

    @property
    def gate(self) -> Gate:
        """What a latency needs of it."""
        return Gate(accuracy_change=self.accuracy_change, agreement=self.agreement, passed=self.passed)

    def __str__(self) -> str:
        scores = Scores.__str__(self)
        if self.predicts_one_class:
            scores += ", but one class is predicted for all images, so agreement proves nothing"
        return scores if self.passed else f"{scores}, limit: {self.limit}; worst at {self.culprit}"


class TorchRow(Scores, frozen=True, kw_only=True):
    """The model itself in a lower precision, as torch runs it on a GPU."""

    precision: Precision
    weights: str
    place: Machine


class NotScored(Record, frozen=True, kw_only=True):
    """What could not be scored, and why."""

    onnx: str
    backend: str
    reason: str


class ParityReport(Record, frozen=True, kw_only=True, omit_defaults=False):
    """deploy/parity.json: the gate's rows, beside the accuracy of the model in torch."""

    run: str
    dataset: str
    images: Natural
    eager_accuracy: Fraction
    hardware: Hardware
    versions: dict[str, str]
    rows: list[ParityRow] = []
    torch: list[TorchRow] = []
    not_scored: list[NotScored] = []


class LatencyRow(Record, frozen=True, kw_only=True):
    """Latency of one backend, precision and batch size; without figures, and with the reason, where none was measured.

    Milliseconds are of computing alone; copies to and from a GPU have their own.
    """

    backend: str
    provider: str | None = None
    precision: Precision
    onnx_sha256: str | None = None
    engine_sha256: str | None = None
    opt_batch: int | None = None
    launched_as: str | None = None
    gate: Gate | None = None
    batch: Natural | None = None
    p50_ms: NonNegative | None = None
    p90_ms: NonNegative | None = None
    p99_ms: NonNegative | None = None
    images_per_second: NonNegative | None = None
    calls: Natural | None = None
    copy_in_p50_ms: NonNegative | None = None
    copy_out_p50_ms: NonNegative | None = None
    sm_mhz: int | None = None
    warning: str | None = None
    not_measured: str | None = None

    def __post_init__(self) -> None:
        _name_engine(self)

    @property
    def measured(self) -> bool:
        """Whether it has figures."""
        return self.p50_ms is not None


class Method(Record, frozen=True, kw_only=True):
    """How latencies were measured: seconds of warm-up, and the least time and number of calls."""

    warmup_seconds: float
    seconds: float
    repeats: int


class LatencyReport(Record, frozen=True, kw_only=True, omit_defaults=False):
    """deploy/latency.json: the rows measured on one machine, of weights with a hash; `load` is that of before."""

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


class BatchRange(Record, frozen=True, kw_only=True):
    """The least batch that an engine takes, the one it is best at, and the largest."""

    min: int
    opt: int
    max: int


class EngineSidecar(Record, frozen=True, kw_only=True, omit_defaults=False):
    """model.*.engine.json: what an engine is, and the hashes by which it is known before anything loads it."""

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
    target: str
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
    def provider(self) -> str:
        """What runs it: `tensorrt-rtx 1.2`."""
        return f"{self.backend} {self.version}"


class OnnxDataset(Record, frozen=True, kw_only=True):
    """The dataset of an ONNX file."""

    name: str
    fingerprint: str


class OnnxMetadata(Record, frozen=True, kw_only=True):
    """The metadata of an ONNX file, each value as JSON: what a server needs. See ModelInput and Dataset."""

    classes: list[str]
    precision: Precision
    front_end: FrontEnd
    shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    fit: Literal["crop", "pad", "stretch"] = "stretch"
    """How an image of another size is brought to `image_shape`, as `prepare --fit` did."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    experiment: str
    run: str
    dataset: OnnxDataset
    commit: str | None = None
    weights: str = ""
    largest_batch: int
