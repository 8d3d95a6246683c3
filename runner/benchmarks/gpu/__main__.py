"""Runs all GPU measurements, the most important first, within a given time.

    python -m runner.benchmarks.gpu --data data/cifar10 --out gpu --minutes 30

Each part runs in its own process with a share of the time, and writes its JSON file after each of its findings, so that
a crash loses no results. The same command resumes: findings are kept, and those that failed or were missing are
measured again. Optional packages may be missing; the summary lists what could not be measured.
`--rehearse` runs every part in miniature on the CPU.
"""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from msgspec import Meta

from runner.benchmarks import program
from runner.benchmarks.gpu.context import GRACE, Context
from runner.benchmarks.gpu.ledger import Ledger, PartResults, path_of, was_measured
from runner.common import files
from runner.common.command_line import Flag, NoneByDefault
from runner.common.console import new_table, print_table
from runner.common.errors import UserError
from runner.system import environment, launcher

PartName = Literal["tests", "correctness", "speed", "profile", "speedrun", "papers", "deployment"]
# In order of importance: each part's share of the time that is left when it starts.
SHARES: dict[str, float] = {
    "tests": 0.15,
    "correctness": 0.15,
    "speed": 0.35,
    "profile": 0.1,
    "speedrun": 0.35,
    "papers": 0.55,
    "deployment": 1.0,
}
MIN_SECONDS = 200  # for each part, as far as there is time: one finding of the tests takes two minutes on an H200
DESCRIPTIONS = {
    "tests": "the tests that need a GPU",
    "correctness": "batches, precisions, a killed and resumed run, ranks",
    "speed": "loaders, steps of every architecture, overhead, ranks",
    "profile": "where the time of a step goes",
    "speedrun": "seconds to an accuracy over many seeds",
    "papers": "every experiment, trained in full",
    "deployment": "parity, then latency by precision and batch",
}
VARIABLES = {
    "correctness": ["CUBLAS_WORKSPACE_CONFIG=:4096:8"],  # for deterministic cuBLAS
    "profile": ["KINETO_LOG_LEVEL=99"],  # otherwise torch's profiler logs every start
}


@dataclass(frozen=True)
class GpuBenchmark:
    """Measure everything that needs a GPU: tests, correctness, speed, profile, speed run, papers, deployment."""

    data: Path
    """Dataset folder written by `python -m data_prep prepare`."""
    out: Path
    """Folder for the results, one NAME-gpu.json for each part, and for the trained runs; a second call resumes
    there."""
    minutes: Annotated[float, Meta(gt=0, le=1e6)] = 30.0
    """Total time, which the parts share."""
    only: Annotated[tuple[PartName, ...], NoneByDefault] = ()
    """Run only these parts."""
    peer: Path | None = None
    """Python script of another project that trains on CIFAR-10 repeatedly, to compare the speed run with, such as
    airbench94_muon.py. It is run in a folder where airbench's scripts find the same images."""
    peer_row: str = ""
    """Regular expression of the lines that hold a result, with the groups `accuracy` and `seconds`; by default
    airbench's."""
    rehearse: Flag = False
    """Run every part in miniature on the CPU. Its results are named NAME-rehearsal.json, and are not
    measurements."""
    commit: str | None = None
    """Commit of the code, for a copy of it outside its git checkout."""
    part: Annotated[PartName | None, tyro.conf.arg(help="Run this part in this process.")] = None

    def __call__(self) -> None:
        self.check()
        from runner.data.open import open_manifest

        manifest = open_manifest(self.data)
        deadline = time.monotonic() + 60 * self.minutes
        context = Context(
            self.data.absolute(), manifest, self.out.absolute(), self.rehearse, deadline, self.peer, self.peer_row,
            self.commit,
        )  # fmt: skip
        if self.part is not None:
            module, ledger = importlib.import_module(f"runner.benchmarks.gpu.{self.part}"), Ledger(context, self.part)
            module.measure(context, ledger)
            ledger.file.ended = True
            ledger.write()
            return
        self.out.mkdir(parents=True, exist_ok=True)
        names = [name for name in get_args(PartName) if name in (self.only or get_args(PartName))]
        # Opens the ledgers of all parts, because each refuses results of another machine before anything runs.
        known = [name for name in get_args(PartName) if name in names or path_of(context, name).is_file()]
        ledgers = {name: Ledger(context, name) for name in known}
        missing = [name for name in names if not ledgers[name].complete]
        codes = dict.fromkeys(names, 0) | {name: self.run(name, context, name == missing[-1]) for name in missing}
        if not show(context, codes):
            raise SystemExit(1)

    def check(self) -> None:
        """Raises UserError if an option is invalid, or there is no GPU."""
        if self.peer is not None and not self.peer.is_file():
            raise UserError(f"--peer {self.peer}: expected a Python script, found none")
        try:
            groups = re.compile(self.peer_row).groupindex.keys()
        except re.error as error:
            raise UserError(f"--peer-row {self.peer_row}: expected a regular expression ({error})") from None
        if self.peer_row and not {"accuracy", "seconds"} <= groups:
            raise UserError(f"--peer-row {self.peer_row}: expected the groups (?P<accuracy>…) and (?P<seconds>…)")
        if self.peer_row and self.peer is None:
            raise UserError(f"--peer-row {self.peer_row}: expected with --peer, whose output it reads")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out}: expected a folder, found a file")
        if not self.rehearse and environment.count_gpus() == 0:
            raise UserError("found no CUDA GPU, expected one; --rehearse runs every part in miniature on the CPU")

    def run(self, name: str, context: Context, last: bool) -> int:
        """Runs one part in its own process, stops it when its time is up, and returns its exit code.

        Without time left, the part only records what it has not measured.
        """
        seconds = time_for(name, max(0.0, context.seconds_left()), last)
        print(f"{name}: {DESCRIPTIONS[name]}, at most {seconds / 60:.1f} minutes", flush=True)
        argv = ["--data", context.data, "--out", context.out, "--minutes", max(seconds, 1) / 60, "--part", name]
        argv += ["--peer", context.peer.absolute()] if context.peer else []
        argv += ["--peer-row", self.peer_row] if self.peer_row else []
        argv += ["--commit", self.commit] if self.commit else []
        argv += ["--rehearse"] if self.rehearse else []
        command = ["env", *VARIABLES.get(name, []), sys.executable, "-m", "runner.benchmarks.gpu", *argv]
        process = subprocess.Popen(list(map(str, command)), preexec_fn=partial(launcher.die_with_parent, os.getpid()))
        try:
            return process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            print(f"  {name}: stopped, because its time is up", flush=True)
            return _stop(process)
        except KeyboardInterrupt:
            _stop(process)
            raise SystemExit(128 + signal.SIGINT) from None


def time_for(part: str, seconds_left: float, last: bool) -> float:
    """Returns the seconds that a part may take: its share of the time that is left, but no less than MIN_SECONDS."""
    return seconds_left if last else min(seconds_left, max(seconds_left * SHARES[part], MIN_SECONDS))


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Terminates a process, and kills it if it does not exit; its children die with it."""
    process.terminate()
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def show(context: Context, codes: dict[str, int]) -> bool:
    """Prints what each part measured, and what is missing and why; returns whether nothing failed.

    Args:
        context: the benchmark's context.
        codes: the exit code of each part.
    """
    table = new_table("part", "found", "not measured", title=f"{context.out}")
    failed = any(codes.values())
    for name, code in codes.items():
        path = path_of(context, name)
        findings = files.read_json(path, PartResults).findings if path.is_file() else {}
        messages = []
        for key, finding in findings.items():
            if not was_measured(finding):
                messages.append(f"{key}: {finding.get('missing') or finding['failed']}")
            elif "partial" in finding:
                messages.append(f"{key}: measured in part; rerun the same command to measure it again")
            elif finding.get("failed_tests"):
                messages.append(f"{key}: {len(finding['failed_tests'])} tests failed")
            failed |= "failed" in finding or bool(finding.get("failed_tests"))
        if code != 0:
            messages.append(f"ended with exit code {code}; rerun the same command to continue")
        measured = sum(map(was_measured, findings.values()))
        table.add_row(name, f"{measured} of {len(findings)}", "\n".join(messages))
    print_table(table)
    return not failed


if __name__ == "__main__":
    program.run(GpuBenchmark, "gpu")
