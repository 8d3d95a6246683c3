"""The results of one part of the GPU benchmark, rewritten as valid JSON after every finding."""

import functools
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from runner.benchmarks.gpu.context import Context, MissingError, OutOfTimeError
from runner.common import files
from runner.common.errors import UserError
from runner.common.text import first_line
from runner.config.recipe import to_json
from runner.run.schema import Hardware
from runner.system import environment

# A measurement, with "partial" if the time was up before its end; or {"missing": reason} or {"failed": reason}.
Finding = dict[str, Any]


class PartResults(msgspec.Struct, kw_only=True, rename={"findings": "found"}):
    """The content of NAME-gpu.json: hardware, versions and dataset of a part, and its findings by name.

    Attributes:
        rehearsal: whether it was measured on the CPU, in miniature, by `--rehearse`.
        ended: True once the part has run to its end.
        experiments: in the part `papers`, the outcome of each experiment (`runner.benchmarks.papers`).
    """

    part: str
    rehearsal: bool
    hardware: Hardware
    driver: str | None
    versions: dict[str, str]
    commit: str | None
    dataset: str
    fingerprint: str
    findings: dict[str, Finding] = {}
    ended: bool | UnsetType = UNSET
    experiments: Any = UNSET


# Fields that must be the same for all findings of a file.
MUST_MATCH = ("rehearsal", "hardware", "driver", "versions", "commit", "dataset", "fingerprint")


class Ledger:
    """Measures each finding of a part once, and writes the file after each.

    Args:
        context: the part's context.
        name: the part's name.

    Raises:
        UserError: the file holds findings for another machine, dataset or version of the code.
    """

    def __init__(self, context: Context, name: str) -> None:
        self.context = context
        self.path = path_of(context, name)
        self.file = PartResults(
            part=name,
            rehearsal=context.rehearse,
            hardware=environment.describe_hardware(),
            driver=driver(),
            versions=environment.package_versions("triton", *environment.TENSORRT_PACKAGES),
            commit=context.commit or environment.git_revision().commit,
            dataset=context.manifest.name,
            fingerprint=context.manifest.fingerprint,
        )
        if not self.path.is_file():
            return
        previous = files.read_json(self.path, PartResults)
        for key in MUST_MATCH:
            old, new = (_comparable(getattr(file, key)) for file in (previous, self.file))
            if old != new:
                raise UserError(f"{self.path}: expected results with {key} {new}, found {old}; choose another --out")
        self.file.findings, self.file.ended = previous.findings, previous.ended
        self.file.experiments = previous.experiments

    @property
    def complete(self) -> bool:
        """Whether the part has run to its end and everything was measured."""
        partial = any("partial" in finding for finding in self.file.findings.values())
        return self.file.ended is True and len(self.measured) == len(self.file.findings) and not partial

    @property
    def measured(self) -> dict[str, Finding]:
        """The findings without those that are missing or failed."""
        return {name: finding for name, finding in self.file.findings.items() if was_measured(finding)}

    def once(self, name: str, measure: Callable[[], Finding], remeasure: bool = False) -> Finding | None:
        """Returns a finding from the file, or measures it now.

        An exception is recorded in place of the finding; the next start tries again.

        Args:
            name: name of the finding.
            measure: measures it.
            remeasure: whether `measure` is called even if there is a finding or the time is up; for findings that are
                computed from others, or measured together with them. An earlier one stays if the new one is equal or
                fails.

        Returns:
            The finding; None if it is missing or failed.
        """
        previous = self.measured.get(name)
        extended = previous is not None and "partial" in previous and self.context.seconds_left() > 0
        if previous is not None and not remeasure and not extended:
            return previous
        start, out_of_time = time.monotonic(), False
        try:
            if self.context.seconds_left() <= 0 and not remeasure:
                raise OutOfTimeError
            finding = to_json(measure())
        except (MissingError, ModuleNotFoundError) as error:
            out_of_time = isinstance(error, OutOfTimeError)
            finding = {"missing": str(error)}
        except Exception as error:
            finding = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        reason = finding.get("missing") or finding.get("failed")
        if previous is not None and not reason:
            added = {"took_seconds", "at"} - finding.keys()  # when it is recorded
            if finding == {key: value for key, value in previous.items() if key not in added}:
                return previous
        if not (reason and previous) and not (out_of_time and name in self.file.findings):
            finding.setdefault("took_seconds", round(time.monotonic() - start, 2))
            finding["at"] = datetime.now(UTC).isoformat(timespec="milliseconds")
            self.file.findings[name] = finding
            self.write()
        print(f"  {name}: {reason or 'done'}", flush=True)
        if "CUDA error" in finding.get("failed", ""):
            raise SystemExit(f"  {name}: this process can no longer use the GPU; rerun the same command to continue")
        return self.measured.get(name)

    def write(self) -> None:
        """Writes the file."""
        files.write_json(self.path, self.file)


def _comparable(value: Any) -> Any:
    """Returns a value without memory_gib, which may change under a virtual machine."""
    return msgspec.structs.replace(value, memory_gib=0.0) if isinstance(value, Hardware) else value


def was_measured(finding: Finding) -> bool:
    """Whether a finding is a measurement, rather than the reason why there is none."""
    return not finding.keys() & {"missing", "failed"}


def path_of(context: Context, name: str) -> Path:
    """Returns the path of a part's file. The tables of the README are made from NAME-gpu.json only."""
    return context.out / f"{name}-{'rehearsal' if context.rehearse else 'gpu'}.json"


@functools.cache
def driver() -> str | None:
    """Returns the version of the NVIDIA driver, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    versions = done.stdout.split() if done.returncode == 0 else []  # it prints its errors there as well
    return versions[0] if versions else None
