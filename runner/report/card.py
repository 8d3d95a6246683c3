"""A model card of one run, in Markdown: what a reviewer asks before a model is used."""

from collections.abc import Iterator

from runner.common.errors import UserError
from runner.config.recipe import flatten
from runner.report import compare
from runner.report.markdown import LATENCY_TITLES, code, latency_rows, percent, plain, table
from runner.report.run_record import RunRecord
from runner.run.schema import Summary

NOT_STATED = "not stated"
FEW_IMAGES = 100  # of a class, below which its recall is uncertain by several points


def render(record: RunRecord, license_text: str | None = None) -> str:
    """Renders the card of a finished run.

    Args:
        record: the run.
        license_text: the license of the model; None if the author did not state one.

    Raises:
        UserError: the run is unfinished.
    """
    summary = record.summary
    if summary is None:
        raise UserError(f"{record.run.folder}: {record.state}; a card needs a finished run")
    sections = {
        "Model": model(record, license_text),
        "Data": data(record),
        "Training": training(record),
        "Accuracy": accuracy(record, summary),
        "Classes": classes(record, summary),
        "Exported files": gate(record),
        "Latency": latency(record),
        "Limits": "\n".join(f"- {limit}" for limit in limits(record, summary)),
        "Use": use(record),
    }
    title = f"# {plain(record.config.name)}"
    return "\n\n".join([title, *(f"## {name}\n\n{text}" for name, text in sections.items() if text)]) + "\n"


def facts(rows: dict[str, object]) -> str:
    """Formats facts by name as a table without titles."""
    return table(("", ""), ((name, str(value)) for name, value in rows.items()))


def model(record: RunRecord, license_text: str | None) -> str:
    """The architecture, its input and output, and the license."""
    config = record.config
    arguments = ", ".join(f"{name}={value}" for name, value in config.architecture.arguments.items())
    channels, height, width = config.input.shape
    return facts(
        {
            "task": f"image classification, {len(config.dataset.classes)} classes",
            "architecture": code(config.architecture.factory) + (f" ({plain(arguments)})" if arguments else ""),
            "parameters": f"{config.parameters:,}" if config.parameters else NOT_STATED,
            "multiply-accumulates per image": f"{config.macs:,}" if config.macs else NOT_STATED,
            "input": f"RGB, {channels}×{height}×{width}, normalized with mean {triple(config.input.mean)} and standard "
            f"deviation {triple(config.input.std)} (of 0 to 255)",
            "output": f"{len(config.dataset.classes)} logits",
            "license": plain(license_text or NOT_STATED),
        }
    )


def triple(values: list[float]) -> str:
    """Formats one value per channel."""
    return ", ".join(f"{value:.1f}" for value in values)


def data(record: RunRecord) -> str:
    """The dataset, identified by its fingerprint."""
    dataset = record.config.dataset
    height, width, _ = dataset.image_shape
    rows: dict[str, object] = {
        "dataset": plain(dataset.name),
        "fingerprint": code(dataset.fingerprint),
        "images": f"{height}×{width} pixels",
        "held out of the training images": f"{record.config.recipe.validation:,}",
        "classes": ", ".join(plain(name) for name in dataset.classes),
    }
    rows |= {f"source: {plain(name)}": plain(str(value)) for name, value in dataset.source.items()}
    return facts(rows)


def training(record: RunRecord) -> str:
    """How it was trained: what differs from the registered experiment, then every setting."""
    config, summary = record.config, record.summary
    ranks = f"{config.world_size} ranks" if config.world_size > 1 else "1 rank"
    rows: dict[str, object] = {
        "experiment": f"{code(config.experiment)} ({plain(config.paper)}), seed {config.seed}",
        "epochs": f"{summary.epochs:g} of {config.recipe.epochs}, {summary.steps:,} steps" if summary else NOT_STATED,
        "on": f"{plain(str(config.hardware))}, {ranks}, {config.precision}",
        "code": plain(config.git.commit or NOT_STATED) + (" with changes" if config.git.changed else ""),
        "versions": plain(", ".join(f"{name} {version}" for name, version in config.versions.items())),
    }
    for name, source in (("teacher", config.teacher), ("started from", config.started_from)):
        if source is not None:
            rows[name] = f"{code(source.experiment)}, weights {code(source.sha256[:12])}"
    changed = [(code(name), plain(str(old)), plain(str(new))) for name, (old, new) in config.overrides.items()]
    settings = [
        (code(name), plain(compare.setting_text(name, value))) for name, value in flatten(config.recipe).items()
    ]
    parts = [facts(rows)]
    if changed:
        parts.append("Changed from the registered experiment:\n\n" + table(("setting", "registered", "here"), changed))
    parts.append(f"<details><summary>The recipe</summary>\n\n{table(('setting', 'value'), settings)}\n\n</details>")
    return "\n\n".join(parts)


def accuracy(record: RunRecord, summary: Summary) -> str:
    """Accuracy and calibration of the weights, and the accuracy that the paper reports."""
    rows: dict[str, object] = {
        f"test accuracy, {summary.test_images:,} images": percent(summary.test_accuracy, None),
        "top-5 accuracy": percent(summary.test_top5, None),
    }
    if summary.test_accuracy_augmented is not None:
        rows["with test-time augmentation"] = percent(summary.test_accuracy_augmented, None)
    if summary.validation_accuracy is not None:
        images = f"{summary.validation_images or 0:,} images"
        rows[f"validation accuracy, {images}"] = percent(summary.validation_accuracy, None)
    if summary.test_loss is not None:
        rows["test loss"] = f"{summary.test_loss:.4f}"
    if summary.test_calibration_error is not None:
        rows["expected calibration error"] = percent(summary.test_calibration_error, None)
    if (reported := record.config.reported) is not None:
        of = f"{reported.on}, {reported.epoch}; {plain(reported.source)}"
        rows["reported by the paper"] = f"{percent(reported.accuracy, None)} ({of})"
        rows["this run, same split and epoch"] = percent(compare.reproduced(record), None)
    epoch = "the last epoch"
    if record.config.recipe.patience:
        epoch = f"epoch {summary.best_epoch:g}, the best on validation images"
    how = f"computed in {record.config.precision}, as in training"
    note = "Exported files are scored below. No weights were selected on test images."
    return f"The accuracy is that after {epoch}, {how}. {note}\n\n" + facts(rows)


def classes(record: RunRecord, summary: Summary) -> str:
    """Recall and precision of every class, and the class that it is most often taken for."""
    names = record.config.dataset.classes
    predicted = [sum(column) for column in zip(*summary.confusion, strict=True)]
    rows = []
    for index, (name, counts) in enumerate(zip(names, summary.confusion, strict=True)):
        others = [0 if other == index else count for other, count in enumerate(counts)]
        worst = max(range(len(others)), key=others.__getitem__)
        rows.append(
            (
                plain(name),
                f"{sum(counts):,}",
                share(counts[index], sum(counts)),
                share(counts[index], predicted[index]),
                f"{plain(names[worst])} ({share(others[worst], sum(counts))})" if others[worst] else "–",
            )
        )
    return table(("class", "test images", "recall", "precision", "most often taken for"), rows)


def share(part: int, whole: int) -> str:
    """Formats a share of a count; a dash if there is none."""
    return f"{part / whole:.1%}" if whole else "–"


def gate(record: RunRecord) -> str:
    """The ONNX files and engines that were compared with the model, and the result."""
    parity_rows = record.parity.rows if record.parity else []
    rows = [
        (
            code(row.onnx if row.engine_sha256 is None else f"{row.onnx} → engine"),
            row.precision,
            plain(row.provider),
            f"{row.agreement:.3%}",
            f"{row.accuracy:.2%} ({100 * row.accuracy_change:+.2f})",
            ("passed" if row.passed else "failed") + (f"; {plain(row.caveat)}" if row.caveat else ""),
        )
        for row in parity_rows
    ]
    if not rows:
        return "None has been compared with the model: `runner export`, then `runner parity`."
    titles = ("file", "precision", "run by", "top-1 agreement", "accuracy (change in points)", "gate")
    return f"Compared with the model in torch on the whole test set.\n\n{table(titles, rows)}"


def latency(record: RunRecord) -> str:
    """The measured latencies, and the machine."""
    if record.latency is None:
        return ""
    rows = [cells[1:] for cells in latency_rows(record)]
    if not rows:
        return ""
    count = record.latency.threads
    threads = f", {count} thread{'s' if count > 1 else ''}" if count else ""
    return f"On {plain(str(record.latency.hardware))}{threads}.\n\n{table(LATENCY_TITLES[1:], rows)}"


def limits(record: RunRecord, summary: Summary) -> Iterator[str]:
    """What the figures above do not show, as far as the run tells."""
    dataset = record.config.dataset
    yield f"Accuracy was measured on {plain(dataset.name)} alone; on images from elsewhere it is not known."
    yield "Every image is assigned to one of the classes, whatever it shows."
    if record.shortened:
        epochs = f"{summary.epochs:g} epoch{'' if summary.epochs == 1 else 's'}"
        yield f"It was trained for {epochs}; its registered recipe has {record.recipe_epochs}."
    yield "It is one seed; the deviation over seeds is not part of this card."
    if summary.validation_accuracy is None:
        yield "No validation images were held out, so settings may have been chosen on the test images."
    counts = [sum(row) for row in summary.confusion]
    recalls = [(summary.confusion[k][k] / count, dataset.classes[k]) for k, count in enumerate(counts) if count]
    if recalls:
        lowest, name = min(recalls)
        yield f"The lowest recall is {lowest:.1%}, of {plain(name)}."
    if few := [plain(dataset.classes[k]) for k, count in enumerate(counts) if count < FEW_IMAGES]:
        yield f"Fewer than {FEW_IMAGES} test images: {', '.join(few)}."
    if record.failed_precisions:
        yield f"Not to be used, because the gate failed: {', '.join(record.failed_precisions)}."
    if record.predicts_one_class:
        yield "A file predicts the same class for all images, so that agreement with the model proves little."


def use(record: RunRecord) -> str:
    """Code that loads an exported file that passed the gate, or else the command that makes one."""
    rows = record.parity.rows if record.parity else []
    passed = [row for row in rows if row.passed and row.backend == "onnxruntime" and row.front_end == "normalized"]
    if not passed:
        if any(row.backend == "onnxruntime" and not row.passed for row in rows):
            return "No file for onnxruntime has passed the gate."
        return "Export a file first: `runner export RUN`, then `runner parity RUN`."
    path, (channels, height, width) = repr(str(record.run.folder / passed[0].onnx)), record.config.input.shape
    return f"""```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({path}, providers=[{passed[0].provider!r}])
pixels = np.zeros((1, {channels}, {height}, {width}), np.float32)  # RGB, 0 to 255
mean = np.array({[round(value, 4) for value in record.config.input.mean]}, np.float32).reshape(1, 3, 1, 1)
std = np.array({[round(value, 4) for value in record.config.input.std]}, np.float32).reshape(1, 3, 1, 1)
(logits,) = session.run(None, {{session.get_inputs()[0].name: (pixels - mean) / std}})
```

Or, for image files: `runner predict RUN IMAGES…`. The file's metadata contain the names of the classes."""
