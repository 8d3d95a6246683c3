"""Figures of a run, drawn from its files: curves, confusion matrix, samples with predictions, mistakes."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.files import write
from runner.run.folder import Run
from runner.run.metrics import read_metrics
from runner.run.schema import Mistake, Mistakes, RunConfig

SAMPLES = 32
MAX_LABELED_CLASSES = 30  # most classes for which a confusion matrix shows all counts and names
MAX_MISTAKES = 12


def samples_of(images: int) -> np.ndarray:
    """Returns the indices of the test images to show, (n,) int64: evenly spaced, so the same for all runs on a dataset.

    Args:
        images: number of test images.
    """
    return np.linspace(0, images - 1, SAMPLES).astype(int)


def mistakes_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the indices of the most confident mistakes, (n,) int64, in descending order of predicted probability.

    Args:
        logits: (N, classes) float32.
        labels: (N,) int64.
    """
    by_confidence = np.argsort(-_softmax(logits).max(1), kind="stable")
    wrong = logits.argmax(1) != labels
    return by_confidence[wrong[by_confidence]][:MAX_MISTAKES]


def write_mistakes(run: Run, logits: np.ndarray, labels: np.ndarray, images: np.ndarray) -> None:
    """Writes mistakes.png, the images side by side, and mistakes.json, their labels and predictions.

    Args:
        run: the run, for its paths.
        logits: (N, classes) float32.
        labels: (N,) int64.
        images: (n, H, W, 3) uint8, the test images that `mistakes_of` selects.
    """
    from PIL import Image

    probabilities = _softmax(logits)
    if len(images):
        run.figures.mkdir(exist_ok=True)
        Image.fromarray(np.concatenate(list(images), axis=1)).save(run.figures / "mistakes.png")
    mistakes = [
        Mistake(
            sample=int(sample),
            label=int(labels[sample]),
            predicted=int(logits[sample].argmax()),
            probability=float(probabilities[sample].max()),
        )
        for sample in mistakes_of(logits, labels)
    ]
    write(run.mistakes, Mistakes(mistakes=mistakes))


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


def draw(
    run: Run,
    config: RunConfig,
    confusion: list[list[int]],
    logits: np.ndarray,
    labels: np.ndarray,
    images: np.ndarray,
) -> list[Path]:
    """Draws the curves, the confusion matrix and the samples of a finished run into its `figures/` folder.

    Args:
        run: a run with metrics.
        config: the contents of its run.json.
        confusion: number of test images by [label][predicted].
        logits: (N, classes) float32.
        labels: (N,) int64.
        images: (n, H, W, 3) uint8, the test images that `samples_of` selects.

    Returns:
        The paths of the figures.
    """
    classes, title = config.dataset.classes, f"{config.experiment} on {config.dataset.name}"
    run.figures.mkdir(exist_ok=True)
    return [
        _draw_curves(run, title),
        _draw_confusion(run, title, np.array(confusion), classes),
        _draw_samples(run, title, images, logits, labels, classes),
    ]


def _draw_curves(run: Run, title: str) -> Path:
    plt = _pyplot()

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    rows = read_metrics(run)
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        for split, style in (("train", "-"), ("test", "o-")):
            points = [(row.epoch, value) for row in rows if (value := getattr(row, f"{split}_{metric}")) is not None]
            epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
            axis.plot(epochs, values, style, label=split, markersize=4)
        axis.set(xlabel="epoch", ylabel=metric)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    return _save(run, figure, "curves")


def _draw_confusion(run: Run, title: str, counts: np.ndarray, classes: list[str]) -> Path:
    plt = _pyplot()

    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    figure, axis = plt.subplots(figsize=(6.4, 6), layout="constrained")
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape) if len(classes) <= MAX_LABELED_CLASSES else ():
        color = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    ticks = range(0, len(classes), -(-len(classes) // MAX_LABELED_CLASSES))
    names = [textwrap.shorten(classes[tick], 24, placeholder="…") for tick in ticks]
    axis.set_xticks(ticks, names, rotation=45, ha="right")
    axis.set_yticks(ticks, names)
    accuracy = np.trace(counts) / counts.sum()
    axis.set(xlabel="predicted", ylabel="label", title=f"{title}: {accuracy:.2%} of {counts.sum():,}")
    return _save(run, figure, "confusion")


def _draw_samples(
    run: Run, title: str, images: np.ndarray, logits: np.ndarray, labels: np.ndarray, classes: list[str]
) -> Path:
    plt = _pyplot()

    probabilities = _softmax(logits)
    columns, column_width, row_height = SAMPLES // 4, 1.22, 1.45  # in image widths; two lines of text above each image
    # One axis for all images: one axis per image would make drawing five times slower.
    figure, axis = plt.subplots(figsize=(11, 6.4), layout="constrained")
    for position, (image, sample) in enumerate(zip(images, samples_of(len(labels)), strict=True)):
        left, top = position % columns * column_width, position // columns * row_height
        predicted = logits[sample].argmax()
        correct = predicted == labels[sample]
        axis.imshow(image, extent=(left, left + 1, top + 1, top))
        text = f"{classes[predicted]} {probabilities[sample, predicted]:.0%}"
        text += "" if correct else f"\nis {classes[labels[sample]]}"
        color = "black" if correct else "firebrick"
        axis.text(left + 0.5, top - 0.04, text, ha="center", va="bottom", fontsize=8, color=color)
    axis.set(xlim=(0, columns * column_width - 0.22), ylim=(4 * row_height - 0.4, -0.4))
    axis.axis("off")
    figure.suptitle(f"{title}: predictions on test images")
    return _save(run, figure, "samples")


def _pyplot() -> Any:
    """Imports pyplot, set up to draw to files and not to parse text as formulas: a class name may contain a `$`."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["text.parse_math"] = False
    from matplotlib import pyplot

    return pyplot


def _save(run: Run, figure: Any, name: str) -> Path:
    plt = _pyplot()

    path = run.figures / f"{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
