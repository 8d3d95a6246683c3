"""The models of the timm library: `runner.models.timm:NAME` creates the model NAME of `timm.list_models()`."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, load_state_dict
from torch import nn

from runner.common.errors import UserError
from runner.common.files import sha256_of


def __getattr__(name: str) -> Callable[..., nn.Module]:
    if name.startswith("_") or not is_model(name):
        raise AttributeError(f"timm {timm.__version__} has no model {name!r}")

    def create(
        classes: int = 10,
        image_size: tuple[int, int] = (32, 32),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weights: str = "",
    ) -> nn.Module:
        return build(name, classes, image_size, drop_rate, drop_path_rate, weights)

    return create


def is_model(name: str) -> bool:
    """Returns whether timm lists this name; `timm.create_model` accepts more, such as addresses of downloads."""
    return name in timm.list_models()


def build(
    name: str, classes: int, image_size: tuple[int, int], drop_rate: float, drop_path_rate: float, weights: str
) -> nn.Module:
    """Creates a model of timm that maps images (N, 3, *image_size) to logits (N, classes).

    Args:
        name: name of the model, without a tag of pretrained weights.
        classes: number of classes.
        image_size: height and width of the images. A model that is built for one size is built for this one.
        drop_rate: dropout probability before the last layer.
        drop_path_rate: maximum probability of stochastic depth; refused by models without it.
        weights: file with pretrained weights, which training loads once; "" for random weights.

    Raises:
        UserError: there is no such model, or the images are smaller than its stride.
    """
    if not is_model(name):  # a run folder may name this function as well
        raise UserError(f"{name}: expected a model that timm lists (runner list --timm '*')")
    config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"drop_rate": drop_rate or None, "drop_path_rate": drop_path_rate or None}
    if config is not None and config.fixed_input_size and image_size != tuple(config.input_size[1:]):
        options["img_size"] = image_size
    model = timm.create_model(name, num_classes=classes, **options)
    stride = max((stage["reduction"] for stage in getattr(model, "feature_info", None) or []), default=1)
    if min(image_size) < stride:
        raise UserError(f"timm/{name}: expected images of at least {stride} pixels a side, the stride of the model")
    if weights:
        vars(model)["initialize"] = partial(load_weights, model, name, Path(weights), options)
    return model


def load_weights(
    model: nn.Module, name: str, path: Path, options: dict[str, Any], first_images: Callable[[int], torch.Tensor]
) -> None:
    """Loads pretrained weights, without those of the last layer unless it has as many classes; uses no images.

    timm adapts them to the image size, if the model depends on it.

    Raises:
        UserError: the file is missing, differs from the hash in its name, or holds the weights of another model.
    """
    if not path.is_file():
        raise UserError(f"--pretrained {path}: expected a file with weights of timm/{name}, found none")
    # As in the names of PyTorch's own downloads; digits alone are rather a date or a number of steps.
    stated = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.", path.name)
    if stated and not (found := sha256_of(path)).startswith(stated[1]):
        raise UserError(f"--pretrained {path}: expected SHA-256 {stated[1]}…, found {found[:12]}…; download it again")
    config = timm.get_pretrained_cfg(name) or PretrainedCfg()
    last = config.classifier if isinstance(config.classifier, str) else (config.classifier or ("",))[0]
    failures = []
    try:
        weight = load_state_dict(str(path)).get(f"{last}.weight")
        # In a model with as many classes as the file, so that timm refuses a file that lacks any other weight. If the
        # last layer is not there, the file calls it differently, or lacks it.
        for classes in (config.num_classes, 0) if weight is None else (len(weight),):
            overlay = {"file": str(path), "num_classes": classes, "custom_load": False}
            try:
                source = timm.create_model(
                    name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **options
                )
                break
            except RuntimeError as error:  # other names or shapes
                failures.append(error)
        else:
            raise failures[0]
        if classes != model.num_classes:
            source.reset_classifier(model.num_classes)  # type: ignore[operator]  # every model of timm has it
        model.load_state_dict(source.state_dict())
    except Exception as error:  # torch, safetensors and timm raise many kinds
        raise UserError(
            f"--pretrained {path}: expected weights of timm/{name}: {' '.join(str(error).split())[:300]}"
        ) from None
