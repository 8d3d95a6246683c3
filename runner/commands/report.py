"""`runner report`: compares runs on an HTML page, as Markdown, or as a W&B report."""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from runner.commands.options import Flag, RunFolders
from runner.common.errors import UserError
from runner.common.text import printable


@dataclasses.dataclass(frozen=True)
class Report:
    """Compare runs: an HTML page that opens offline, Markdown, or a W&B report."""

    runs: RunFolders
    """Run folders, or folders that contain run folders at any depth."""
    out: Path = Path("report.html")
    """HTML file to write the page to."""
    markdown: Path | None = None
    """Also write the tables as Markdown to this file."""
    wandb: str | None = None
    """Also create or update the report in the W&B project ENTITY/PROJECT; the runs must have been logged there by
    training or `runner sync`."""
    wandb_spec: Path | None = None
    """Also write the W&B report's specification to this file; needs no network access."""
    json: Flag = False
    """Print the compared rows as JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        import msgspec

        from runner.common.files import write_atomically
        from runner.report import collect, compare, markdown, page, searches
        from runner.report.run_record import format_counts
        from runner.run.folder import find_runs

        if self.wandb is not None and (self.wandb.count("/") != 1 or "" in self.wandb.split("/")):
            raise UserError(f"--wandb {self.wandb}: expected ENTITY/PROJECT")
        outputs = {"--out": self.out, "--markdown": self.markdown, "--wandb-spec": self.wandb_spec}
        check_outputs({option: path for option, path in outputs.items() if path is not None})
        records, unreadable = collect.read_all(find_runs(list(self.runs)))
        if not records and len(unreadable) == 1:
            raise UserError(f"{unreadable[0].folder}: {unreadable[0].reason}")
        found_searches, damaged = searches.read_all(list(self.runs))
        unreadable += damaged
        for entry in unreadable:
            print(f"runner: not read: {entry.folder}: {entry.reason}", file=sys.stderr)
        if not records:
            raise UserError("RUNS: expected a run that can be read, found none")
        page.write(records, self.out, unreadable, found_searches)
        if self.markdown is not None:
            write_atomically(self.markdown, markdown.render(records, unreadable, found_searches).encode())
        if self.wandb_spec is not None or self.wandb is not None:
            from runner.report import wandb_report
            from runner.tracking.account import choose_server

            if self.wandb_spec is not None:
                specification = wandb_report.specification(records, self.wandb, found_searches, unreadable)
                write_atomically(self.wandb_spec, specification.encode())
            if self.wandb is not None:
                choose_server(environ)
                print(
                    f"W&B report: {wandb_report.save(records, self.wandb, found_searches, unreadable)}", file=sys.stderr
                )
        if self.json:
            rows = [compare.run_row(record) for record in records]
            compared = {"runs": rows, "experiments": compare.outcomes(records), "unreadable": unreadable}
            print(msgspec.json.encode(compared).decode())
        else:
            print(f"{printable(self.out)}: {format_counts(records, unreadable)}")


def check_outputs(outputs: dict[str, Path]) -> None:
    """Checks that every file can be written before any of them is written.

    Args:
        outputs: output files by option.

    Raises:
        UserError: two options name the same file, or a file cannot be written.
    """
    options: dict[Path, str] = {}
    for option, path in outputs.items():
        other = options.setdefault(path.resolve(), option)
        if other != option:
            raise UserError(f"{option} {path}: expected a file other than that of {other}")
        try:
            if path.is_dir() or (path.exists() and not path.is_file()):
                raise UserError(f"{option} {path}: expected a file, found a folder or device; choose another name")
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            with contextlib.suppress(FileNotFoundError):
                (folder / f".{path.name}.part").stat()  # raises another error if the name is too long
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{option} {path}: cannot write there ({error.strerror}); choose another file") from None
    for option, path in outputs.items():
        for parent in path.resolve().parents:
            if parent in options:
                raise UserError(f"{option} {path}: expected a file in a folder, found the file of {options[parent]}")
