"""Draws what augmentation does: one kind a row, the same images in every row, as a model is given them.

python -m runner.batches.preview --data data/cifar10 --out augmentations.png
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from data_prep.console import UserError, run_command
from runner.batches.protocol import Place, normalisation, open_manifest, open_split
from runner.recipe import SGD, Augment, Recipe

KINDS = {
    "as it is": Augment(),
    "crop, zero": Augment(crop_padding=4),
    "crop, reflect": Augment(crop_padding=4, crop_fill="reflect"),
    "flip, epoch 0": Augment(flip="alternating"),
    "flip, epoch 1": Augment(flip="alternating"),
    "brightness": Augment(brightness=0.6),
    "contrast": Augment(contrast=0.8),
    "saturation": Augment(saturation=1.0),
    "hue": Augment(hue=0.5),
    "cutout": Augment(cutout=12),
    "mixup": Augment(mixup=8.0),
    "CutMix": Augment(cutmix=8.0),
}


@dataclass(frozen=True)
class Preview:
    """Draw every kind of augmentation on the first training images of an epoch."""

    data: Path
    """Folder made by `python -m data_prep prepare`."""
    out: Path = Path("augmentations.png")
    """Picture to write."""
    images: int = 12
    """How many images a row."""
    seed: int = 0
    """Seed of order and augmentation."""

    def __call__(self) -> None:
        if self.images < 1 or self.seed < 0:
            raise UserError(f"--images {self.images} --seed {self.seed}: expected 1 or more, and 0 or more")
        from matplotlib.figure import Figure

        manifest = open_manifest(self.data)
        recipe = Recipe(1, min(self.images, manifest.splits["train"].images), SGD(0.1))
        mean, std = (torch.tensor(part)[:, None, None] for part in normalisation(manifest, recipe))
        figure = Figure(figsize=(0.75 * self.images + 2, 0.75 * len(KINDS) + 0.6), layout="constrained")
        rows = figure.subplots(len(KINDS), 1)
        place = Place(torch.device("cpu"), loader="resident")
        for axes, (name, augment) in zip(rows, KINDS.items(), strict=True):
            changed = replace(recipe, augment=augment)
            stream = open_split(self.data, manifest, "train", changed, place, self.seed)
            samples = stream.order_of(0)
            stream.order_of = lambda epoch, samples=samples: samples  # the same images in every epoch
            shown, _ = next(stream.epoch(int(name.endswith("epoch 1"))))
            pixels = (shown * std + mean).round().clamp(0, 255).to(torch.uint8)
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


def main() -> None:
    """Entry point of `python -m runner.batches.preview`."""
    run_command(lambda: tyro.cli(Preview, prog="python -m runner.batches.preview"), "preview")


if __name__ == "__main__":
    main()
