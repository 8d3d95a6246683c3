"""Draws the figures of a run: training curves, confusion matrix, sample predictions, and mistakes."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.files import write_json
from runner.common.text import printable
from runner.run.folder import Run
from runner.run.metrics import read_metrics
from runner.run.schema import Mistake, Mistakes, RunConfig

NUM_SAMPLES = 32
MAX_LABELED_CLASSES = 30  # largest number of classes for which a confusion matrix shows all counts and names
MAX_NAME = 200  # pixels of the longest class name beside a matrix
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
    classes, title = config.dataset.classes, printable(f"{config.experiment} on {config.dataset.name}")
    run.figures.mkdir(exist_ok=True)
    return [
        _draw_curves(run, title),
        _draw_confusion(run, title, np.array(confusion), classes),
        _draw_samples(run, title, images, logits, labels, classes),
    ]


def _draw_curves(run: Run, title: str) -> Path:
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    rcParams["text.parse_math"] = False  # a name may contain a `$`
    figure = Figure(figsize=(10, 3.6), dpi=110)
    canvas = FigureCanvasAgg(figure)
    # Margins of our own, because matplotlib's layouts take as long as drawing.
    margins = {"left": 0.08, "right": 0.985, "bottom": 0.14, "top": 0.89, "wspace": 0.22}
    axes = figure.subplots(1, 2, gridspec_kw=margins)
    rows = read_metrics(run)
    for ax, metric in zip(axes, ("loss", "accuracy"), strict=True):
        for split, style in (("train", "-"), ("test", "o-")):
            points = [(row.epoch, value) for row in rows if (value := getattr(row, f"{split}_{metric}")) is not None]
            epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
            ax.plot(epochs, values, style, label=split, markersize=4)
        ax.set(xlabel="epoch", ylabel=metric)
        ax.locator_params(nbins=6)
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(title)
    canvas.draw()  # `savefig` does it twice
    path = run.figures / "curves.png"
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(path)
    return path


# The other figures hold over a hundred words, each of which costs matplotlib a millisecond or two.


def _draw_confusion(run: Run, title: str, counts: np.ndarray, classes: list[str]) -> Path:
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    small, font = _font(12), _font(15)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    step = -(-len(classes) // MAX_LABELED_CLASSES)
    names = {position: _shorten(name, font, MAX_NAME) for position, name in enumerate(classes) if position % step == 0}
    longest = max(map(font.getlength, names.values()))
    side, left, top = 500, round(longest) + 50, 40  # of the matrix, in pixels
    cell, right, bottom = side / len(classes), left + side, top + side
    picture = Image.new("RGB", (right + 15, bottom + round(0.75 * longest) + 60), "white")
    pen = ImageDraw.Draw(picture)
    colors = (255 * colormaps["Blues"](shares)[..., :3]).round().astype(np.uint8)
    picture.paste(Image.fromarray(colors).resize((side, side), Image.Resampling.BOX), (left, top))
    pen.rectangle((left - 1, top - 1, right, bottom), outline="black")
    for row, column in np.ndindex(*counts.shape) if step == 1 else ():
        center = (left + (column + 0.5) * cell, top + (row + 0.5) * cell)
        color = "white" if shares[row, column] > 0.5 else "black"
        pen.text(center, str(counts[row, column]), color, small, anchor="mm")
    for position, name in names.items():
        across, down = left + (position + 0.5) * cell, top + (position + 0.5) * cell
        pen.line((left - 6, down, left - 1, down), "black")
        pen.text((left - 10, down), name, "black", font, anchor="rm")
        pen.line((across, bottom, across, bottom + 5), "black")
        _write_turned(picture, name, 45, (across, bottom + 8))
    accuracy = np.trace(counts) / counts.sum()
    result = f": {accuracy:.2%} of {counts.sum():,} test images"
    heading = _shorten(title, font, picture.width - 20 - font.getlength(result)) + result
    pen.text((picture.width / 2, top / 2), heading, "black", font, anchor="mm")
    pen.text((left + side / 2, picture.height - 15), "predicted", "black", font, anchor="mm")
    _write_turned(picture, "label", 90, (15, top + side / 2 - 20))
    path = run.figures / "confusion.png"
    picture.save(path)
    return path


def _draw_samples(
    run: Run, title: str, images: np.ndarray, logits: np.ndarray, labels: np.ndarray, classes: list[str]
) -> Path:
    from PIL import Image, ImageDraw

    columns, side, column_width, row_height = 8, 116, 150, 166  # pixels; two lines of text above each image
    picture = Image.new("RGB", (columns * column_width, 50 + -(-len(images) // columns) * row_height), "white")
    pen, font, large = ImageDraw.Draw(picture), _font(12), _font(18)
    heading = _shorten(title, large, 850) + ": predictions on test images"
    pen.text((picture.width / 2, 22), heading, "black", large, anchor="mm")
    longest = column_width - 6 - font.getlength("true: ")
    probabilities = _softmax(logits)
    for position, (image, sample) in enumerate(zip(images, sample_indices(len(labels)), strict=True)):
        center, top = position % columns * column_width + column_width // 2, 85 + position // columns * row_height
        scale = side / max(image.shape[:2])
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
        height, width = (max(1, round(length * scale)) for length in image.shape[:2])
        picture.paste(Image.fromarray(image).resize((width, height), method), (center - width // 2, top))
        predicted = logits[sample].argmax()
        correct = predicted == labels[sample]
        text = f"{_shorten(classes[predicted], font, longest)} {probabilities[sample, predicted]:.0%}"
        text += "" if correct else f"\ntrue: {_shorten(classes[labels[sample]], font, longest)}"
        color = "black" if correct else "firebrick"
        pen.text((center, top - 4), text, color, font, anchor="md", align="center")
    path = run.figures / "samples.png"
    picture.save(path)
    return path


def _write_turned(picture: Any, text: str, degrees: float, end: tuple[float, float]) -> None:
    """Writes text that is turned counterclockwise around the middle of its right end, which is at `end`."""
    from PIL import Image, ImageDraw

    font = _font(15)
    width = round(font.getlength(text)) + 20
    mask = Image.new("L", (2 * width, 2 * width))  # around the end, so that it stays in the center
    ImageDraw.Draw(mask).text((width, width), text, 255, font, anchor="rm")
    mask = mask.rotate(degrees, Image.Resampling.BICUBIC)
    picture.paste("black", (round(end[0]) - width, round(end[1]) - width), mask)


@functools.cache
def _font(size: int) -> Any:
    """Returns the font of matplotlib's figures, of a size in pixels."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _shorten(text: str, font: Any, width: float) -> str:
    """Returns the text in one line, cut off if it is wider than `width` pixels."""
    text, cut = printable(text[:300]), ""
    while text and font.getlength(text + cut) > width:
        text, cut = text[:-1], "…"
    return text + cut
