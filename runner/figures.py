"""Pictures of one run, drawn from its files: curves, confusion matrix, samples with predictions."""

from pathlib import Path
from typing import Any

import numpy as np

from runner.runs import Run, read_metrics, write_json

SAMPLES = 32
MISTAKES = 12


def samples_of(images: int) -> np.ndarray:
    """Which test images are shown, (n,) int64: the same spread for every run of a dataset, so that runs compare."""
    return np.linspace(0, images - 1, SAMPLES).astype(int)


def mistakes_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mistakes of which the model was surest, those first: (n,) int64, n at most MISTAKES."""
    probability = _probabilities(logits)
    surest = np.argsort(-probability.max(1), kind="stable")
    return surest[logits.argmax(1)[surest] != labels[surest]][:MISTAKES]


def write_mistakes(run: Run, images: np.ndarray) -> None:
    """Writes mistakes.png, the images side by side, and mistakes.json, what they are and were taken for.

    Args:
        run: has predictions.
        images: (n, H, W, 3) uint8, the test images of `mistakes_of`.
    """
    from PIL import Image

    predictions = np.load(run.predictions)
    logits, labels = predictions["logits"], predictions["labels"]
    chosen = mistakes_of(logits, labels)
    probability = _probabilities(logits)
    if len(images):
        run.figures.mkdir(exist_ok=True)
        Image.fromarray(np.concatenate(list(images), axis=1)).save(run.figures / "mistakes.png")
    rows = [
        {
            "sample": int(sample),
            "label": int(labels[sample]),
            "predicted": int(logits[sample].argmax()),
            "probability": float(probability[sample].max()),
        }
        for sample in chosen
    ]
    write_json(run.figures / "mistakes.json", {"mistakes": rows})


def _probabilities(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


def draw(run: Run, config: dict[str, Any], confusion: list[list[int]], images: np.ndarray) -> list[Path]:
    """Draws all pictures of a finished run into its `figures/`.

    Args:
        run: has metrics and predictions.
        config: its run.json.
        confusion: images by [label][predicted].
        images: (n, H, W, 3) uint8, the test images of `samples_of`.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("agg")
    classes, label = config["dataset"]["classes"], f"{config['experiment']} on {config['dataset']['name']}"
    predictions = np.load(run.predictions)
    run.figures.mkdir(exist_ok=True)
    return [
        _curves(run, label),
        _confusion(run, label, np.array(confusion), classes),
        _samples(run, label, images, predictions["logits"], predictions["labels"], classes),
    ]


def _curves(run: Run, label: str) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    rows = read_metrics(run)
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        for key, style in ((f"train/{metric}", "-"), (f"test/{metric}", "o-")):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points, strict=True), style, label=key.split("/")[0], markersize=4)
        axis.set(xlabel="epoch", ylabel=metric)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(label)
    return _save(run, figure, "curves")


def _confusion(run: Run, label: str, counts: np.ndarray, classes: list[str]) -> Path:
    from matplotlib import pyplot as plt

    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    figure, axis = plt.subplots(figsize=(6.4, 6), layout="constrained")
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape):
        shade = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, counts[row, column], ha="center", va="center", color=shade, fontsize=8)
    ticks = range(len(classes))
    axis.set_xticks(ticks, classes, rotation=45, ha="right")
    axis.set_yticks(ticks, classes)
    accuracy = np.trace(counts) / counts.sum()
    axis.set(xlabel="predicted", ylabel="label", title=f"{label}: {accuracy:.2%} of {counts.sum():,}")
    return _save(run, figure, "confusion")


def _samples(
    run: Run, label: str, images: np.ndarray, logits: np.ndarray, labels: np.ndarray, classes: list[str]
) -> Path:
    from matplotlib import pyplot as plt

    probability = _probabilities(logits)
    columns, across, down = SAMPLES // 4, 1.22, 1.45  # in images' widths; the text above one has two lines
    # One axis for all: with one for each, drawing takes five times as long.
    figure, axis = plt.subplots(figsize=(11, 6.4), layout="constrained")
    for number, (image, index) in enumerate(zip(images, samples_of(len(labels)), strict=True)):
        left, top = number % columns * across, number // columns * down
        predicted = logits[index].argmax()
        right = predicted == labels[index]
        axis.imshow(image, extent=(left, left + 1, top + 1, top))
        text = f"{classes[predicted]} {probability[index, predicted]:.0%}"
        text += "" if right else f"\nis {classes[labels[index]]}"
        color = "black" if right else "firebrick"
        axis.text(left + 0.5, top - 0.04, text, ha="center", va="bottom", fontsize=8, color=color)
    axis.set(xlim=(0, columns * across - 0.22), ylim=(4 * down - 0.4, -0.4))
    axis.axis("off")
    figure.suptitle(f"{label}: predictions on test images")
    return _save(run, figure, "samples")


def _save(run: Run, figure: Any, name: str) -> Path:
    from matplotlib import pyplot as plt

    path = run.figures / f"{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
