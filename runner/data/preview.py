"""Draws a picture of the augmentations: one kind per row, the same images in every row.

python -m runner.data.preview --data data/cifar10 --out augmentations.png
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from msgspec import Meta

from runner.common.command_line import read_command
from runner.common.console import run_command
from runner.common.errors import UserError
from runner.config.recipe import SGD, Augment, Recipe
from runner.config.train_config import Seed
from runner.data.open import RankInfo, normalization, open_manifest, open_split

KINDS = {
    "original": Augment(),
    "resized crop": Augment(random_resized_crop=0.2),
    "crop, zero": Augment(crop_padding=4),
    "crop, reflect": Augment(crop_padding=4, crop_fill="reflect"),
    "flip, epoch 0": Augment(flip="alternating"),
    "flip, epoch 1": Augment(flip="alternating"),
    "RandAugment": Augment(policy="rand"),
    "TrivialAugment": Augment(policy="trivial"),
    "brightness": Augment(brightness=0.6),
    "contrast": Augment(contrast=0.8),
    "saturation": Augment(saturation=1.0),
    "hue": Augment(hue=0.5),
    "cutout": Augment(cutout=12),
    "random erasing": Augment(erase=1.0),
    "mixup": Augment(mixup=8.0),
    "CutMix": Augment(cutmix=8.0),
    "two repeats": Augment(policy="rand", crop_padding=4, flip="random", repeats=2),
}


@dataclass(frozen=True)
class Preview:
    """Draw the first training images of an epoch under every kind of augmentation; repeats show half of them twice."""

    data: Path
    """Folder made by `python -m data_prep prepare`."""
    out: Path = Path("augmentations.png")
    """PNG file to write."""
    images: Annotated[int, Meta(ge=1, le=900)] = 12  # the picture may have at most 2**16 pixels in a row
    """Number of images per row."""
    seed: Seed = 0
    """Seed of order and augmentation."""

    def __call__(self) -> None:
        if self.out.suffix.lower() != ".png":
            raise UserError(f"--out {self.out}: expected a name that ends with .png")
        from matplotlib.figure import Figure

        manifest = open_manifest(self.data)
        recipe = Recipe(1, min(self.images, manifest.splits["train"].images), SGD(0.1))
        mean, std = (torch.tensor(values)[:, None, None] for values in normalization(manifest, recipe))
        figure = Figure(figsize=(0.75 * recipe.batch_size + 2, 0.75 * len(KINDS) + 0.6), layout="constrained")
        rows = figure.subplots(len(KINDS), 1)
        rank_info = RankInfo(torch.device("cpu"), loader="resident")
        for axes, (name, augment) in zip(rows, KINDS.items(), strict=True):
            augmented = replace(recipe, augment=augment)
            stream = open_split(self.data, manifest, "train", augmented, rank_info, self.seed)
            samples = stream.order_of(0)
            # The same images in every epoch.
            stream.order_of = lambda epoch, samples=samples: samples  # type: ignore[method-assign, misc]
            images, _ = next(stream.epoch(int(name.endswith("epoch 1"))))
            pixels = (images * std + mean).round().clamp(0, 255).to(torch.uint8)
            axes.imshow(torch.cat(list(pixels.permute(0, 2, 3, 1)), dim=1).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
            axes.spines[:].set_visible(False)
        figure.suptitle(f"{manifest.name}, training images, seed {self.seed}", fontsize=10)
        try:
            figure.savefig(self.out, dpi=90)
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot write there ({error.strerror})") from None
        print(self.out)


if __name__ == "__main__":
    run_command(lambda: read_command(Preview, sys.argv[1:], "python -m runner.data.preview"), "preview")
