"""`python -m data_prep prepare|verify`: images to FFCV files, and the proof that they are the same images."""

import dataclasses
import json as json_format
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from data_prep import manifest as manifests
from data_prep.console import run_command

DOWNLOADS = Path("~/.cache/training-runner/downloads")


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Write a dataset as FFCV files: train.beton, test.beton and dataset.json, all of them or none."""

    source: str
    """`official` (downloads CIFAR-10), `synthetic` (built in), or the PATH of an official archive (binary or
    python version), a torchvision root, an image folder train|test/<class>/*.png|jpg, or a tar or zip of one."""
    out: Path
    """Folder to make. One that holds the same dataset already is checked and kept."""
    sha256: str | None = None
    """SHA-256 that the archive must have; needed for archives of the official layout that are not the official
    files."""
    limit_per_class: int | None = None
    """Keep only the first N images of each class in each split."""
    name: str | None = None
    """Label of figures measured on this dataset; by default told from the source."""
    seed: int = 0
    """Seed of the synthetic set."""
    downloads: Path = DOWNLOADS
    """Folder that keeps the downloaded official archive."""
    overwrite: bool = False
    """Replace another or damaged dataset that stands in --out."""
    json: bool = False
    """Print the manifest as JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from data_prep import beton, sources

        source = sources.load(
            self.source,
            sha256=self.sha256,
            limit_per_class=self.limit_per_class,
            seed=self.seed,
            downloads=self.downloads.expanduser(),
        )
        if self.name is not None:
            source = dataclasses.replace(source, name=self.name)
        _tell(beton.write(source, self.out, self.overwrite), self.out, "prepared", self.json)


@dataclasses.dataclass(frozen=True)
class Verify:
    """Decode every record of a prepared dataset and compare it with its manifest, and with its source."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder made by prepare."""
    source: str | None = None
    """Compare every image and label, bit by bit, with this source (as for prepare)."""
    sha256: str | None = None
    """SHA-256 that the source archive must have, as for prepare."""
    downloads: Path = DOWNLOADS
    """Folder that keeps the downloaded official archive."""
    json: bool = False
    """Print the manifest as JSON, and nothing else, on standard output."""

    def __call__(self) -> None:
        from data_prep import sources
        from data_prep.verify import verify

        source = None
        if self.source is not None:
            manifests.check_files(self.folder, manifest := manifests.read(self.folder))
            source = sources.load(
                self.source,
                sha256=self.sha256,
                limit_per_class=manifest.source.get("limit_per_class"),
                seed=manifest.source.get("seed", 0),
                downloads=self.downloads.expanduser(),
            )
        done = "verified against its source" if source else "verified"
        _tell(verify(self.folder, source), self.folder, done, self.json)


def _tell(manifest: manifests.Manifest, folder: Path, done: str, json: bool) -> None:
    if json:
        print(json_format.dumps({**dataclasses.asdict(manifest), "fingerprint": manifest.fingerprint}))
        return
    train, test = (manifest.splits[name].images for name in manifests.SPLITS)
    print(
        f"{done}: {folder}: {manifest.name}, {train:,} training and {test:,} test images, "
        f"{len(manifest.classes)} classes, fingerprint {manifest.fingerprint}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m data_prep`."""

    def parse() -> Callable[[], None]:
        commands = {"prepare": Prepare, "verify": Verify}
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="data_prep",
            description=__doc__,
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )

    run_command(parse, "data_prep")
