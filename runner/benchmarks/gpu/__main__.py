"""Everything that is worth measuring on a GPU, in the order of its worth, within the minutes there are.

    python -m runner.benchmarks.gpu --data data/cifar10 --out gpu --minutes 30

Each part is a process of its own with a share of the time, and writes a JSON file that is whole after each of its
findings; none can take another's results with it. The same command goes on where it was ended or killed: what has
been found stays, what failed or lacked something is tried again. It needs no more than the packages it finds, and
says what it lacked. `--rehearse` runs every part in miniature on the CPU.
"""

import importlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from data_prep.console import UserError, run_command
from runner import environment, launched
from runner.benchmarks.gpu.part import PATIENCE, Context, Ledger, path_of, was_measured
from runner.runs import read_json

PartName = Literal["tests", "correctness", "speed", "profile", "speedrun", "papers", "deployment"]
# In the order of their worth: each part's share of the time that those before it have left.
SHARES: dict[str, float] = {
    "tests": 0.15,
    "correctness": 0.15,
    "speed": 0.35,
    "profile": 0.1,
    "speedrun": 0.35,
    "papers": 0.55,
    "deployment": 1.0,
}
ROLES = {
    "tests": "the tests that need a GPU",
    "correctness": "batches, precisions, a killed run, ranks: is it the same?",
    "speed": "loaders, steps of every architecture, overhead, ranks",
    "profile": "where the time of a step goes",
    "speedrun": "seconds to an accuracy over many seeds",
    "papers": "every experiment in full",
    "deployment": "parity, then latency by precision and batch",
}
VARIABLES = {
    "correctness": ["CUBLAS_WORKSPACE_CONFIG=:4096:8"],  # cuBLAS wants it where torch is to be deterministic
    "profile": ["KINETO_LOG_LEVEL=99"],  # torch's profiler tells every start
}


@dataclass(frozen=True)
class GpuBenchmark:
    """Fill every table that needs a GPU: tests, correctness, speed, profile, speed run, papers, deployment."""

    data: Path
    """Folder made by `python -m data_prep prepare`."""
    out: Path
    """Folder for the results, NAME-gpu.json for each part, and for the runs that are trained; a second call goes
    on in it."""
    minutes: float = 30.0
    """All the time there is; parts share it."""
    only: tuple[PartName, ...] = ()
    """These parts alone."""
    peer: Path | None = None
    """Python script of another project that trains on CIFAR-10 again and again, for the speed run to compare with:
    airbench94_muon.py, say. It is run in a folder where airbench's scripts find the same images."""
    peer_row: str = ""
    """Regular expression of the lines that hold a result, with the groups `accuracy` and `seconds`; by default
    airbench's."""
    rehearse: bool = False
    """Run every part in miniature on the CPU. Its results are named NAME-rehearsal.json, and are evidence of
    nothing."""
    part: Annotated[PartName | None, tyro.conf.arg(help="Run this part in this process.")] = None

    def __call__(self) -> None:
        from runner.batches.protocol import open_manifest

        if self.minutes <= 0:
            raise UserError(f"--minutes {self.minutes:g}: expected more than 0")
        if self.peer is not None and not self.peer.is_file():
            raise UserError(f"--peer {self.peer}: expected a Python script, found none")
        try:
            groups = re.compile(self.peer_row).groupindex.keys()
        except re.error as error:
            raise UserError(f"--peer-row {self.peer_row}: expected a regular expression ({error})") from None
        if self.peer_row and not {"accuracy", "seconds"} <= groups:
            raise UserError(f"--peer-row {self.peer_row}: expected the groups (?P<accuracy>…) and (?P<seconds>…)")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out}: expected a folder, found a file")
        if not self.rehearse and environment.count_gpus() == 0:
            raise UserError("found no CUDA GPU, expected one; --rehearse runs every part in miniature on the CPU")
        manifest = open_manifest(self.data)
        ends = time.monotonic() + 60 * self.minutes
        context = Context(
            self.data.absolute(), manifest, self.out.absolute(), self.rehearse, ends, self.peer, self.peer_row
        )
        if self.part is not None:
            part, ledger = importlib.import_module(f"runner.benchmarks.gpu.{self.part}"), Ledger(context, self.part)
            part.measure(context, ledger)
            ledger.write(ended=True)
            return
        self.out.mkdir(parents=True, exist_ok=True)
        chosen = [name for name in get_args(PartName) if name in (self.only or get_args(PartName))]
        ledgers = {name: Ledger(context, name) for name in chosen}  # a folder of other findings is refused at once
        codes = {
            name: 0 if ledgers[name].whole else self.run(name, context, last=name == chosen[-1]) for name in chosen
        }
        if not show(context, codes):
            raise SystemExit(1)

    def run(self, name: str, context: Context, last: bool) -> int:
        """One part in a process of its own, ended when its time is over; its exit code."""
        seconds = max(0.0, context.left()) * (1.0 if last else SHARES[name])
        print(f"{name}: {ROLES[name]}, at most {seconds / 60:.1f} minutes", flush=True)
        words = ["--data", context.data, "--out", context.out, "--minutes", max(seconds, 1) / 60, "--part", name]
        words += ["--peer", context.peer.absolute()] if context.peer else []
        words += ["--peer-row", self.peer_row] if self.peer_row else []
        words += ["--rehearse"] if self.rehearse else []
        command = ["env", *VARIABLES.get(name, []), sys.executable, "-m", "runner.benchmarks.gpu", *words]
        process = subprocess.Popen(list(map(str, command)), preexec_fn=launched.end_with_parent)
        try:
            return process.wait(seconds + PATIENCE)
        except subprocess.TimeoutExpired:
            print(f"  {name}: ended, for its time was over", flush=True)
            return _ended(process)
        except KeyboardInterrupt:
            _ended(process)
            raise SystemExit(128 + signal.SIGINT) from None


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Ends a process, gently and then by force. Those that it has started end with it."""
    process.terminate()
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def show(context: Context, codes: dict[str, int]) -> bool:
    """Prints what each part has found and what not, and why; returns whether nothing went wrong."""
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "found", "not measured", title=f"{context.out}", title_justify="left")
    well = True
    for name, code in codes.items():
        path = path_of(context, name)
        found = read_json(path)["found"] if path.is_file() else {}
        lacking = {key: one for key, one in found.items() if not was_measured(one)}
        told = [f"{key}: {one.get('missing') or one['failed']}" for key, one in lacking.items()]
        red = [key for key, one in found.items() if one.get("failed_tests")]
        told += [f"{key}: {len(found[key]['failed_tests'])} tests failed" for key in red]
        if code != 0:
            told.append(f"ended with exit code {code}; the same command goes on")
        well &= code == 0 and not red and not any("failed" in one for one in lacking.values())
        table.add_row(name, f"{len(found) - len(lacking)} of {len(found)}", "\n".join(told))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return well


def main() -> None:
    """Entry point of `python -m runner.benchmarks.gpu`."""

    def parse() -> Callable[[], Any]:
        return tyro.cli(
            GpuBenchmark, prog="python -m runner.benchmarks.gpu", config=(tyro.conf.FlagCreatePairsOff,)
        )

    run_command(parse, "gpu")


if __name__ == "__main__":
    main()
