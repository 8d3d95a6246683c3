"""Finds the operators that must stay in fp32 for an int8 file to keep its accuracy.

The search measures how much error each operator adds, and takes the shortest sequence of the worst ones with which the
accuracy stays within the limit, by bisection. Then it quantizes each of these again that is not needed after all, so
that in the end none can be quantized without exceeding the limit. It never looks at test images: those are the gate's.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runner.common.errors import UserError
from runner.common.files import write_json
from runner.data import order
from runner.data.open import SplitName, open_split_of_run
from runner.deploy import onnx, precision
from runner.deploy.sensitivity import added_errors
from runner.deploy.session import OnnxSession
from runner.run.folder import Run
from runner.run.schema import Calibration, Precision, PrecisionSearch

MOST_IMAGES = 5000
BATCH = 250
SENSITIVITY_IMAGES = 64


class SearchImages:
    """The images on which the search measures accuracy: held-out ones, or training images without those of calibration.

    Attributes:
        split: "validation" or "train".
        samples: (n,) int64, their indices.
    """

    def __init__(self, run: Run, data: Path | None, calibration: int) -> None:
        config = run.config()
        self.split: SplitName = "validation" if config.recipe.validation else "train"
        self.stream = open_split_of_run(config, data, self.split, torch.device("cpu"))
        shuffled = order.epoch_order(self.stream.num_images, 0, 0)
        self.samples = shuffled[0 if config.recipe.validation else calibration :][:MOST_IMAGES]
        if not len(self.samples):
            raise UserError(
                f"--calibration {calibration}: expected fewer than the {self.stream.num_images:,} training images, "
                "because the search measures accuracy on the others"
            )

    def accuracy(self, session: OnnxSession) -> float:
        """Returns the accuracy of an ONNX file on these images, in 0..1."""
        labels, correct = self.stream.labels.numpy(), 0
        for start in range(0, len(self.samples), BATCH):
            samples = self.samples[start : start + BATCH]
            logits = session(self.stream.clean_images(samples).numpy())
            correct += int((logits.argmax(1) == labels[samples]).sum())
        return correct / len(self.samples)


@dataclass
class Drops:
    """Measures the drop in accuracy for sets of operators that stay in fp32, each set once."""

    measure: Callable[[tuple[str, ...]], float]
    limit: float
    known: dict[frozenset[str], float] = field(default_factory=dict)

    def of(self, kept: list[str]) -> float:
        """The drop with these operators in fp32, as a fraction of the images."""
        key = frozenset(kept)
        if key not in self.known:
            self.known[key] = self.measure(tuple(sorted(kept)))
        return self.known[key]

    def passes(self, kept: list[str]) -> bool:
        """Whether the drop is within the limit; as in the gate, a drop of exactly the limit is."""
        return self.of(kept) <= self.limit + 1e-9


def search(
    run: Run,
    kind: Precision,
    data: Path | None,
    calibration: int,
    method: Calibration,
    limit: float,
    report: Callable[[str], None] = lambda line: None,
) -> PrecisionSearch:
    """Searches the operators to keep in fp32, and writes the result to `deploy/search.<precision>.json`.

    Args:
        run: a run that has been exported in fp32.
        kind: "int8" or "int8-cpu".
        data: the prepared dataset; None for the run's own.
        calibration: number of training images for estimating the activation ranges.
        method: how these are estimated.
        limit: largest drop in accuracy, as a fraction of the images.
        report: called with a line for each set of operators that was measured.

    Raises:
        UserError: the dataset is missing or not the run's, or there are too few images.
    """
    images = SearchImages(run, data, calibration)
    source = onnx.exported(run, "fp32").path
    with tempfile.TemporaryDirectory() as folder:
        quantizer = precision.Quantizer(
            source, kind, precision.calibration_images(run, data, calibration), method, Path(folder) / "ranges.json"
        )
        accuracy = images.accuracy(OnnxSession(source))

        def measure(kept: tuple[str, ...]) -> float:
            drop = accuracy - images.accuracy(OnnxSession(quantizer.quantize(kept).SerializeToString()))
            report(f"{kind}: {len(kept)} of {len(quantizer.operators)} operators in fp32: drop {100 * drop:.2f} points")
            return drop

        few = images.stream.clean_images(images.samples[:SENSITIVITY_IMAGES]).numpy()
        errors = added_errors(onnx.read(source)[0], quantizer.quantize(()), few)
        # An operator with several outputs has as many errors; those without an output in both graphs have none.
        worst_first = list(dict.fromkeys(error.operator for error in errors if error.operator in quantizer.operators))
        worst_first += [name for name in quantizer.operators if name not in worst_first]
        drops = Drops(measure, limit)
        kept = least_set(worst_first, drops)
        result = PrecisionSearch(
            precision=kind,
            calibration_method=method,
            images=f"{len(images.samples):,} {images.split} images",
            accuracy=accuracy,
            limit=limit,
            operators=len(quantizer.operators),
            drop_of_all=drops.of([]),
            bytes_of_all=quantizer.quantize(()).ByteSize(),
            kept=kept,
            drop=drops.of(kept),
            bytes=quantizer.quantize(tuple(kept)).ByteSize(),
            drop_without={name: drops.of([other for other in kept if other != name]) for name in kept},
            measured=len(drops.known),
            added_errors={error.operator: error.added for error in errors if error.operator in quantizer.operators},
        )
    write_json(run.precision_search(kind), result)
    return result


def least_set(worst_first: list[str], drops: Drops) -> list[str]:
    """Returns operators of which none can be left out, and with which the accuracy stays within the limit.

    Args:
        worst_first: all operators, in descending order of the error that they add.
        drops: measures a set. With all operators, the drop is within the limit.
    """
    low, high = 0, len(worst_first)  # the first `high` operators suffice; fewer than `low` do not
    while low < high:
        middle = (low + high) // 2
        if drops.passes(worst_first[:middle]):
            high = middle
        else:
            low = middle + 1
    kept = worst_first[:high]
    needed = False
    while not needed:  # again after one was left out, because another may be needed no more
        needed = True
        for name in reversed(kept):
            rest = [other for other in kept if other != name]
            if drops.passes(rest):
                kept, needed = rest, False
    return kept
