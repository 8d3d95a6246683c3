"""`runner predict`: classifies images with an exported model."""

import dataclasses
import json as json_format
from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated, Literal

import tyro

from runner.commands.options import Flag
from runner.common.errors import UserError
from runner.common.text import printable
from runner.config.recipe import Count


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify images with an exported model."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """ONNX file written by `runner export`; a run folder, to use its file that passed the gate on this
    machine; or, on a GPU, an engine in the `deploy` folder of its run. With --server, the name of a model on it."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Image files, or folders of them."""
    batch: Count = 32
    """Number of images in a batch."""
    sheet: Path | None = None
    """PNG or JPEG file for a contact sheet: the images with their predictions."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device that onnxruntime runs on."""
    server: str | None = None
    """Address of a Triton Inference Server with a model of `runner serve-repo`, such as http://localhost:8000."""
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.deploy import predict

        if self.server is not None and self.device == "cuda":
            raise UserError("--device cuda and --server: expected one of them, because the server has its own device")
        predictions = predict.predict(self.model, list(self.images), self.batch, self.device, self.sheet, self.server)
        if self.json:
            print(json_format.dumps([dataclasses.asdict(prediction) for prediction in predictions]))
            return
        for prediction in predictions:
            print(f"{printable(prediction.image)}: {prediction.label} {prediction.probability:.1%}")
