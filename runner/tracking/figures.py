"""Draws the figures of a run: training curves, confusion matrix, sample predictions, and mistakes."""

from pathlib import Path
from typing import Any

import numpy as np

from runner.common.files import write_json
from runner.run.folder import Run
from runner.run.metrics import read_metrics
from runner.run.schema import Mistake, Mistakes, RunConfig

NUM_SAMPLES = 32
MAX_LABELED_CLASSES = 30  # largest number of classes for which a confusion matrix shows all counts and names
MAX_NAME = 24  # longest class name that is drawn in full
MAX_MISTAKES = 12


def sample_indices(num_images: int) -> np.ndarray:
    """Returns the indices of the test images to show, (n,) int64: evenly spaced, so the same for all runs on a dataset.

    Args:
        num_images: number of test images.
    """
    return np.unique(np.linspace(0, num_images - 1, NUM_SAMPLES).astype(int))


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
    write_json(run.mistakes, Mistakes(mistakes=mistakes))


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
        images: (n, H, W, 3) uint8, the test images that `sample_indices` selects.

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
    figure = _new_figure(10, 3.6)
    margins = {"left": 0.08, "right": 0.985, "bottom": 0.14, "top": 0.89, "wspace": 0.22}
    axes = figure.subplots(1, 2, gridspec_kw=margins)
    rows = read_metrics(run)
    for ax, metric in zip(axes, ("loss", "accuracy"), strict=True):
        for split, style in (("train", "-"), ("test", "o-")):
            points = [(row.epoch, value) for row in rows if (value := getattr(row, f"{split}_{metric}")) is not None]
            epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
            ax.plot(epochs, values, style, label=split, markersize=4)
        ax.set(xlabel="epoch", ylabel=metric)
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(title)
    return _save(run, figure, "curves")


def _draw_confusion(run: Run, title: str, counts: np.ndarray, classes: list[str]) -> Path:
    row_fractions = counts / counts.sum(axis=1, keepdims=True).clip(1)
    names = [_shorten(name) for name in classes]
    longest = 0.55 + 0.085 * max(map(len, names))  # inches of the longest name and of the title of its axis
    figure = _new_figure(4.6 + longest, 4.9 + 0.75 * longest)
    width, height = figure.get_size_inches()
    left, bottom = longest / width, 0.75 * longest / height
    ax = figure.add_axes((left, bottom, 4.5 / width, 4.5 / height))
    ax.imshow(row_fractions, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape) if len(classes) <= MAX_LABELED_CLASSES else ():
        color = "white" if row_fractions[row, column] > 0.5 else "black"
        ax.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    ticks = range(0, len(classes), -(-len(classes) // MAX_LABELED_CLASSES))
    ax.set_xticks(ticks, names[:: ticks.step], rotation=45, ha="right")
    ax.set_yticks(ticks, names[:: ticks.step])
    accuracy = np.trace(counts) / counts.sum()
    ax.set(xlabel="predicted", ylabel="label", title=f"{title}: {accuracy:.2%} of {counts.sum():,} test images")
    return _save(run, figure, "confusion")


def _draw_samples(
    run: Run, title: str, images: np.ndarray, logits: np.ndarray, labels: np.ndarray, classes: list[str]
) -> Path:
    probabilities = _softmax(logits)
    columns, column_width, row_height = NUM_SAMPLES // 4, 1.22, 1.45  # in images; two lines of text above each
    figure = _new_figure(11, 6.4)
    ax = figure.add_axes((0.01, 0.01, 0.98, 0.95))  # for all images, because an Axes per image is five times slower
    for position, (image, sample) in enumerate(zip(images, sample_indices(len(labels)), strict=True)):
        left, top = position % columns * column_width, position // columns * row_height
        predicted = logits[sample].argmax()
        correct = predicted == labels[sample]
        height, width = (side / max(image.shape[:2]) for side in image.shape[:2])
        ax.imshow(image, extent=(left + 0.5 - width / 2, left + 0.5 + width / 2, top + height, top))
        text = f"{_shorten(classes[predicted])} {probabilities[sample, predicted]:.0%}"
        text += "" if correct else f"\ntrue: {_shorten(classes[labels[sample]])}"
        color = "black" if correct else "firebrick"
        ax.text(left + 0.5, top - 0.04, text, ha="center", va="bottom", fontsize=8, color=color)
    ax.set(xlim=(0, columns * column_width - 0.22), ylim=(4 * row_height - 0.4, -0.4))
    ax.axis("off")
    figure.suptitle(f"{title}: predictions on test images")
    return _save(run, figure, "samples")


def _shorten(name: str) -> str:
    """Returns the name of a class, cut off if it is long."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _new_figure(width: float, height: float) -> Any:
    """Returns a matplotlib Figure of this size in inches. Its text has no formulas: a class name may contain a `$`.

    The figures set their margins themselves, because matplotlib's layouts take as long as drawing.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False
    return Figure(figsize=(width, height), dpi=110)


def _save(run: Run, figure: Any, name: str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    path = run.figures / f"{name}.png"
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # `savefig` does it twice
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(path)
    return path
