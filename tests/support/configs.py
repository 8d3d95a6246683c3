"""The content of run.json for run folders that tests create themselves."""

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import msgspec

from runner.config.recipe import SGD, Architecture, Augment, Recipe
from runner.config.trust import TrustedCode
from runner.run.folder import Run
from runner.run.schema import Dataset, Git, Hardware, ModelInput, RunConfig

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CONFIG = RunConfig(
    experiment="tiny",
    run="seed-0",
    paper="tests",
    seed=0,
    architecture=Architecture("tests.support.models.tiny:Tiny"),
    recipe=Recipe(1, 50, SGD(0.1)),
    parameters=10**6,
    macs=10**8,
    dataset=Dataset(
        name="synthetic-10", fingerprint="0123456789abcdef", classes=CLASSES, image_shape=[32, 32, 3],
        mean=[120.0] * 3, std=[60.0] * 3, folder="/nowhere",
    ),
    input=ModelInput(shape=[3, 32, 32], mean=[120.0] * 3, std=[60.0] * 3),
    precision="fp32",
    hardware=Hardware(cpu="No Processor", cores=2, memory_gib=1.0),
    versions={"torch": "0"},
    git=Git(),
    wandb_id="abc",
    group="tests",
)  # fmt: skip


# Every augmentation: the second has those that exclude one of the first.
EVERY_AUGMENTATION = Augment(
    crop_padding=4, crop_fill="reflect", flip="alternating", policy="rand", rand_ops=3, rand_magnitude=12,
    brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, cutout=8, erase=0.3, mixup=0.2, cutmix=1.0, repeats=2,
)  # fmt: skip
EVERY_WITH_RESIZED_CROP = replace(EVERY_AUGMENTATION, crop_padding=0, crop_fill="zero", random_resized_crop=0.2)


def config_of(**changes: Any) -> RunConfig:
    """Returns a complete run.json with some fields changed; `dataset` may be a name."""
    if isinstance(changes.get("dataset"), str):
        changes["dataset"] = msgspec.structs.replace(CONFIG.dataset, name=changes["dataset"])
    return msgspec.structs.replace(CONFIG, **changes)


def trusted(folder: str | PathLike[str]) -> Run:
    """A run folder that may name any model, such as those of the tests."""
    return Run(Path(folder), TrustedCode(trust=True))
