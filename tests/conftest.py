"""Fixtures: datasets prepared once, real processes, and the closing tally of what ran and what did not."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep import beton, sources
from data_prep.sources import Source
from tests import warm

ROOT = Path(__file__).parent.parent
MARKERS = ("gpu", "slurm", "browser", "processes")
REQUIRED_IN_CI = ("slurm", "browser")  # a skip of one of these fails the run where CI=true
TINY = ("--experiments-from", "tests.tiny")

Runs = Callable[..., subprocess.CompletedProcess[str]]


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a command under test: no W&B server, no settings of the person who runs the tests."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "ACCELERATE_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "WANDB_MODE": "offline", "COLUMNS": "200"} | more


def python(
    *arguments: object, cwd: Path | None = None, timeout: float = 500, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Runs this Python with arguments and returns what it said."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd or ROOT,
        timeout=timeout,
        env=clean_environment(**environ),
    )


_warm: list[warm.Server] = []
COLD = ("HOME", "XDG_", "OMP_", "LD_", "PYTHON")  # variables that count when a process starts


def runner(
    *arguments: object, cwd: Path | None = None, timeout: float = 500, **environ: str
) -> subprocess.CompletedProcess[str]:
    """`runner ...` as a process that has made its imports already, where the environment does not concern these."""
    return module("runner", *arguments, cwd=cwd, timeout=timeout, **environ)


def module(
    name: str, *arguments: object, cwd: Path | None = None, timeout: float = 500, **environ: str
) -> subprocess.CompletedProcess[str]:
    """`python -m NAME ...`, as `runner` does it."""
    words = ["-m", name, *map(str, arguments)]
    if any(name.startswith(COLD) for name in environ):
        return python(*words, cwd=cwd, timeout=timeout, **environ)
    if not _warm:
        _warm.append(warm.Server())
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        place = (cwd or ROOT, clean_environment(**environ), timeout)
        code = _warm[0].run(words, *place, out.fileno(), err.fileno())
        told = [stream.seek(0) or stream.read().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(words, code, *told)


def launch(processes: int, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """`accelerate launch ... -m runner ... --device cpu` with so many gloo ranks."""
    words = ["--config_file", ROOT / "launch/cpu.yaml", "--num_processes", processes, "-m", "runner", *arguments]
    return module("accelerate.commands.launch", *words, "--device", "cpu", **options)


def begun(processes: int, *words: object, **environ: str) -> subprocess.Popen[str]:
    """A `runner ...` on so many gloo ranks that is under way, in a process group of its own."""
    launcher = [
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "launch/cpu.yaml",
        "--num_processes",
        processes,
    ]
    command = [sys.executable, "-m", *launcher, "-m", "runner", *words]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=clean_environment(**environ), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for_step(run: Path, step: int, seconds: float = 240) -> None:
    """Until a checkpoint of `step` or later is there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if any(int(folder.name[5:]) >= step for folder in run.glob("checkpoints/step-*")):
            return
        time.sleep(0.02)
    pytest.fail(f"no checkpoint of step {step}")


def ranks_of(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    return [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def gone(processes: list[int], seconds: float) -> bool:
    """Whether all have ended within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        states = [Path(f"/proc/{process}/stat") for process in processes]
        if not any(state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z" for state in states):
            return True
        time.sleep(0.1)
    return False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every",
        action="store_true",
        help="export and build every experiment, in batches up to the largest, where by default it is one of each "
        "architecture; train every experiment on 1 and 2 ranks in fp32 and bf16, where it is two of the four",
    )


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """A port that someone listens on."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(scope="session")
def images() -> str:
    """The source of the session's images: the archive that CIFAR10_IMAGES names, or the synthetic set."""
    return os.environ.get("CIFAR10_IMAGES") or "synthetic"


@pytest.fixture(scope="session")
def source(images: str) -> Source:
    """All images, in memory."""
    return sources.load(images)


@pytest.fixture(scope="session")
def data(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole dataset, prepared. Read-only by agreement."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    beton.write(source, folder)
    return folder


@pytest.fixture(scope="session")
def small(source: Source) -> Source:
    """50 training and 20 test images of each class."""
    return sources.Source(
        source.name,
        source.classes,
        sources.limited(source.train, 50),
        sources.limited(source.test, 20),
        {**source.provenance, "limited": True},
    )


@pytest.fixture(scope="session")
def small_data(small: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small dataset, prepared. Read-only by agreement."""
    folder = tmp_path_factory.mktemp("small") / "data"
    beton.write(small, folder)
    return folder


@pytest.fixture
def own_data(small_data: Path, tmp_path: Path) -> Path:
    """A copy of the small dataset that a test may damage."""
    return Path(shutil.copytree(small_data, tmp_path / "own"))


@pytest.fixture(scope="session")
def tiny_run(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tests' own small network on the small dataset. Read-only by agreement."""
    runs = tmp_path_factory.mktemp("runs")
    done = runner("train", "tiny", *TINY, "--data", small_data, "--runs", runs, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return runs / "tiny" / "seed-0"


# --- what ran, and what did not -------------------------------------------------------------------------

_ran: Counter[str] = Counter()
_skipped: Counter[tuple[str, str]] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts in the process that reports, also where others run the tests."""
    if report.when == "call" or report.skipped or (report.when == "setup" and report.failed):
        for kind in [marker for marker in MARKERS if marker in report.keywords] or ["plain"]:
            if report.skipped:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple | list) else str(report.longrepr)
                _skipped[kind, reason.removeprefix("Skipped: ")] += 1
            else:
                _ran[kind] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("CI") == "true" and any(kind in REQUIRED_IN_CI for kind, _ in _skipped):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not (_ran or _skipped):
        return
    for kind, reason in sorted(_skipped):
        print(f"skipped {_skipped[kind, reason]} {kind}: {reason}")
    print("ran: " + ", ".join(f"{_ran[kind]} {kind}" for kind in ("plain", *MARKERS)))
    real = os.environ.get("CIFAR10_IMAGES")
    print(f"images: {Path(real).name if real else 'SYNTHETIC (CIFAR10_IMAGES names no archive of real ones)'}")
    count = {key: len(reporter.stats.get(key, ())) for key in ("passed", "failed", "error", "skipped")}
    reasons = "; ".join(sorted({reason for _, reason in _skipped}))
    print(
        f"{count['passed']} passed, {count['failed'] + count['error']} failed, {count['skipped']} skipped"
        + (f" ({reasons})" if reasons else "")
    )


# Files that take longest begin first, so that at the end none is waited for alone.
LONGEST = (
    "test_slurm", "test_gpu_benchmark", "test_deploy", "test_experiments", "test_resume", "test_sweep",
    "test_train_pieces", "test_faults", "test_benchmarks", "test_sync",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from runner import environment

    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if environment.count_gpus() == 0:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
