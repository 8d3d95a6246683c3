"""`python -m data_prep prepare|verify`: converts images to FFCV files; verifies them."""

import dataclasses
import json as json_format
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from msgspec import Meta

from data_prep import manifest as manifests
from data_prep.images import Fit
from runner.common.command_line import HELP, Flag, read_command
from runner.common.console import run_command
from runner.common.errors import UserError

DOWNLOADS = Path("~/.cache/training-runner/downloads")
JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Write a dataset as FFCV files: train.beton, test.beton and dataset.json."""

    source: str
    """`official` (downloads CIFAR-10), `cifar100` (downloads CIFAR-100), `synthetic` (built in), or the PATH of an
    official archive (binary or python version), a torchvision root, an image folder train|test/<class>/, or a tar or
    zip archive of such a folder."""
    out: Path
    """Folder to create. An existing folder with the same dataset is checked and not changed."""
    sha256: str | None = None
    """Expected SHA-256 of the archive; required for archives in the official layout other than the official
    files."""
    limit_per_class: Annotated[int, Meta(ge=1)] | None = None
    """Use only the first N images of each class in each split."""
    size: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Resize the images of a folder to this many pixels per side; without it, all must have the same size."""
    fit: Fit | None = None
    """With --size: crop the center (by default), pad with black, or stretch."""
    records: manifests.Records = "raw"
    """Store images as pixels, or as JPEG pictures, which are smaller and no longer exactly the same images."""
    jpeg_quality: manifests.Quality | None = None
    """Quality of JPEG records, 1 to 100; by default 90."""
    name: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    """Name that labels all results on this dataset; by default the name of the source."""
    seed: Annotated[int, Meta(ge=0, lt=2**32)] | None = None
    """Seed of the synthetic dataset, by default 0."""
    downloads: Path = DOWNLOADS
    """Folder in which the downloaded official archive is kept."""
    overwrite: Flag = False
    """Replace a different or damaged dataset in --out."""
    json: Flag = False
    """Print only the manifest, as JSON, on standard output."""

    def __call__(self) -> None:
        from data_prep import beton, sources
        from data_prep.dataset import check_name, named_as_jpeg_records, renamed

        if self.records == "raw" and self.jpeg_quality is not None:
            raise UserError(f"--jpeg-quality {self.jpeg_quality}: expected with --records jpeg, found raw records")
        if self.name is not None:
            check_name(self.name)
        quality = None if self.records == "raw" else self.jpeg_quality or JPEG_QUALITY
        source = sources.load(
            self.source,
            sha256=self.sha256,
            limit_per_class=self.limit_per_class,
            seed=self.seed,
            downloads=self.downloads.expanduser(),
            size=self.size,
            fit=self.fit,
        )
        for note in source.notes:
            print(f"data_prep: {note}", file=sys.stderr)
        if quality is not None:
            source = named_as_jpeg_records(source)
        if self.name is not None:
            source = renamed(source, self.name)
        manifest = beton.write(source, self.out, self.overwrite, quality)
        _print_manifest(manifest, self.out, "prepared", self.json)


@dataclasses.dataclass(frozen=True)
class Verify:
    """Decode every record of a prepared dataset; with --source, compare it with the source."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder made by `prepare`."""
    source: str | None = None
    """Source (as for `prepare`) whose images and labels must be bit-identical; for JPEG records, its images are
    compressed again, and the bytes are compared."""
    sha256: str | None = None
    """Expected SHA-256 of the source archive, as for `prepare`."""
    downloads: Path = DOWNLOADS
    """Folder in which the downloaded official archive is kept."""
    json: Flag = False
    """Print only the manifest, as JSON, on standard output."""

    def __call__(self) -> None:
        from data_prep import sources
        from data_prep.verify import verify

        source = None
        if self.source is None and self.sha256 is not None:
            raise UserError(f"--sha256 {self.sha256}: expected together with --source, which names the archive")
        if self.source is not None:
            manifests.check_files(self.folder, manifest := manifests.read(self.folder))
            made = manifests.prepared_with(self.folder, manifest)
            generated = self.source == "synthetic"
            is_path = not generated and self.source not in sources.BY_SOURCE
            source = sources.load(
                self.source,
                sha256=self.sha256,
                limit_per_class=made.limit_per_class,
                seed=made.seed if generated else None,
                downloads=self.downloads.expanduser(),
                size=made.size if is_path else None,
                fit=made.fit if is_path else None,
            )
        verified, done = verify(self.folder, source), "verified"
        if source is not None:
            done = "verified against its source" + (", compressed again" if verified.records == "jpeg" else "")
        _print_manifest(verified, self.folder, done, self.json)


def _print_manifest(manifest: manifests.Manifest, folder: Path, done: str, json: bool) -> None:
    if json:
        print(json_format.dumps({**dataclasses.asdict(manifest), "fingerprint": manifest.fingerprint}))
        return
    records = f"{manifest.record_kind}, " if manifest.records == "jpeg" else ""
    train, test = (manifest.splits[name].images for name in manifests.SPLITS)
    print(
        f"{done}: {folder}: {manifest.name}, {train:,} training and {test:,} test images, "
        f"{len(manifest.classes)} classes, {records}fingerprint {manifest.fingerprint}"
    )


COMMANDS: dict[str, Callable[..., Any]] = {"prepare": Prepare, "verify": Verify}


def main(arguments: Sequence[str]) -> None:
    """Entry point of `python -m data_prep`."""

    def parse() -> Callable[[], None]:
        name, *rest = arguments or ["--help"]
        if name in COMMANDS:
            return read_command(COMMANDS[name], rest, f"data_prep {name}")
        if name not in HELP:
            raise UserError(f"{name}: expected a command: {', '.join(COMMANDS)}")
        words = ["--help"]
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="data_prep", description=__doc__, args=words)

    run_command(parse, "data_prep")
