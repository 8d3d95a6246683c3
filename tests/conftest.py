"""Fixtures, tiers, and the closing lines.

Where a new test goes: a new architecture needs none (those that are there count, train and export all of them); a
refusal is a line in BAD of test_cli.py; a fault of machines belongs to test_faults.py. A test over 5 seconds takes
the place of one as dear, or is marked `every`. Helpers are in tests/support/; tests/golden/ is compared with.
"""

import contextlib
import fcntl
import os
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from data_prep import beton, sources
from data_prep.sources import Source
from runner import experiments
from runner.run.folder import Run
from runner.system import environment
from tests.support.models import shallow
from tests.support.processes import ENDING, TINY, launch, runner

with contextlib.suppress(ModuleNotFoundError):  # the tests that need a GPU run without it
    from hypothesis import settings

    settings.load_profile("ci")  # the same examples everywhere, without a time limit for one

KINDS = ("gpu", "slurm", "browser", "root", "processes")
REQUIRED_IN_CI = ("slurm", "browser", "root")  # a skip of one of these fails the run where CI=true


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Undoes `cpu.prepare`, which lets this process take denormal numbers for zero: other tests compare with them."""
    torch = sys.modules.get("torch")
    if torch is not None:  # a fixture of several tests may have called it
        torch.set_flush_denormal(False)
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


# --- data and runs, made once for all workers -----------------------------------------------------------

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes a folder by name, once for all processes that run the tests. Read-only by agreement."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder, done = shared / name, shared / f"{name}.done"
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def source(once: Once) -> Source:
    """All images, in memory: of the archive that CIFAR10_IMAGES names, or the synthetic set."""

    def make(folder: Path) -> None:
        loaded = sources.load(os.environ.get("CIFAR10_IMAGES") or "synthetic")
        (folder / "pickle").write_bytes(pickle.dumps(loaded, protocol=5))

    return pickle.loads((once("source", make) / "pickle").read_bytes())


@pytest.fixture(scope="session")
def data(once: Once, request: pytest.FixtureRequest) -> Path:
    """The whole dataset, prepared."""
    return once("whole", lambda folder: beton.write(request.getfixturevalue("source"), folder / "data")) / "data"


@pytest.fixture(scope="session")
def small(source: Source) -> Source:
    """50 training and 20 test images of each class."""
    train, test = sources.limit_split(source.train, 50), sources.limit_split(source.test, 20)
    return replace(source, train=train, test=test, provenance={**source.provenance, "limited": True})


@pytest.fixture(scope="session")
def small_data(once: Once, request: pytest.FixtureRequest) -> Path:
    """The small dataset, prepared."""
    return once("small", lambda folder: beton.write(request.getfixturevalue("small"), folder / "data")) / "data"


@pytest.fixture(scope="session")
def jpeg_data(once: Once, request: pytest.FixtureRequest) -> Path:
    """The small dataset, prepared with JPEG records."""

    def make(folder: Path) -> None:
        beton.write(request.getfixturevalue("small"), folder / "data", jpeg_quality=90)

    return once("jpeg", make) / "data"


@pytest.fixture
def own_data(small_data: Path, tmp_path: Path) -> Path:
    """A copy of the small dataset that a test may damage."""
    return Path(shutil.copytree(small_data, tmp_path / "own"))


@pytest.fixture(scope="session")
def tiny_run(once: Once, small_data: Path) -> Path:
    """A finished run of the tests' own small network on the small dataset, with W&B's offline file."""

    def make(folder: Path) -> None:
        words = ["train", "tiny", *TINY, "--data", small_data, "--runs", folder, "--device", "cpu"]
        done = runner(*words, WANDB_MODE="offline")
        assert done.returncode == 0, done.stderr

    return once("tiny-run", make) / "tiny" / "seed-0"


@pytest.fixture(scope="session")
def deployed_run(once: Once, tiny_run: Path) -> Path:
    """The tiny run exported in fp32, scored, built and measured, without W&B's file."""

    def make(folder: Path) -> None:
        run = folder / "tiny" / "seed-0"
        shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("wandb"))
        quick = ("--seconds", 0.05, "--repeats", 5)
        for command in (
            ["export", *TINY],
            ["parity", "--device", "cpu", *TINY],
            ["engine"],
            ["bench", "--device", "cpu", *quick, *TINY],
        ):
            done = runner(command[0], run, *command[1:])
            assert done.returncode == 0, done.stderr

    return once("deployed-run", make) / "tiny" / "seed-0"


@dataclass(frozen=True)
class Training:
    """A `runner train` that has ended."""

    done: CompletedProcess[str]
    run: Run

    @property
    def stdout(self) -> str:
        return self.done.stdout

    @property
    def stderr(self) -> str:
        return self.done.stderr


Train = Callable[..., Training]


@pytest.fixture
def train(small_data: Path, tmp_path: Path) -> Train:
    """Trains one of the tests' own experiments on the small dataset: `train("tiny", "--max-steps", 3, ranks=2)`."""

    def run_it(
        experiment: str,
        *options: object,
        ranks: int | None = None,
        data: Path = small_data,
        runs: Path = tmp_path,
        expect: int | None = 0,
        **environ: str,
    ) -> Training:
        """Without `ranks` in one process without a launcher; `expect` is the exit code, None for any."""
        modules = ENDING if experiment == "ending" else TINY
        words = ["train", experiment, *modules, "--data", data, "--runs", runs, *options]
        done = launch(ranks, *words, **environ) if ranks else runner(*words, "--device", "cpu", **environ)
        assert expect is None or done.returncode == expect, done.stderr
        name = options[options.index("--name") + 1] if "--name" in options else "seed-0"
        return Training(done, Run(runs / experiment / str(name)))

    return run_it


# --- tiers ----------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", action="store_true", help="also the tests and cases that are marked `every`")


# These begin first, so that at the end none is waited for alone; the first of them mostly wait themselves.
LONGEST = (
    "test_slurm", "test_gpu_benchmark", "test_launch", "test_deploy", "test_resume", "test_experiments",
    "test_sweep", "test_faults", "test_sync", "test_train_pieces", "test_benchmarks", "test_report",
)  # fmt: skip
# Their tests share what is dear to make, so that one process runs all of them.
TOGETHER = (
    "test_slurm",
    "test_faulty_files",
    "test_gpu_benchmark",
    "test_report",
    "test_fake_cuda",
    "test_gpu_kernel",
    "test_batches",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--every"):
        left = [item for item in items if item.get_closest_marker("every")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("every")]
        _count_left(config, len(left))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        kinds = [kind for kind in KINDS if item.get_closest_marker(kind)] or ["plain"]
        item.user_properties.append(("kinds", kinds))  # reports know a test's keywords, which its parameters are too
        if item.get_closest_marker("gpu") and environment.first_gpu() is None:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


def group_of(test: str) -> str:
    """The group of a test by its node id: a file, or an exported experiment. One process runs all of a group."""
    path, _, rest = test.partition("::")
    name = Path(path).stem
    parameters = rest.partition("[")[2].removesuffix("]")
    known_names = [*experiments.load(), *shallow.EXPERIMENTS]
    exported = [known for known in known_names if f"{parameters}-".startswith(f"{known}-")]
    if name == "test_deploy" and exported:
        return max(exported, key=len)
    return name if name in TOGETHER else test


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Gives the processes whole groups. xdist's own marker for groups has no effect with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


# --- what ran, and what did not -------------------------------------------------------------------------

_ran: Counter[str] = Counter()
_skipped: Counter[tuple[str, str]] = Counter()
_left: list[int] = [0]


def _count_left(config: pytest.Config, count: int) -> None:
    _left.append(count)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left"] = count


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    _left.append(getattr(node, "workeroutput", {}).get("left", 0))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts in the process that reports, also where others run the tests."""
    if report.when == "call" or report.skipped or (report.when == "setup" and report.failed):
        for kind in dict(report.user_properties)["kinds"]:
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
    print("ran: " + ", ".join(f"{_ran[kind]} {kind}" for kind in ("plain", *KINDS)))
    real = os.environ.get("CIFAR10_IMAGES")
    print(f"images: {Path(real).name if real else 'SYNTHETIC (CIFAR10_IMAGES names no archive of real ones)'}")
    if max(_left):
        print(f"{max(_left)} left to --every")
    count = {key: len(reporter.stats.get(key, ())) for key in ("passed", "failed", "error", "skipped")}
    reasons = "; ".join(sorted({reason for _, reason in _skipped}))
    print(
        f"{count['passed']} passed, {count['failed'] + count['error']} failed, {count['skipped']} skipped"
        + (f" ({reasons})" if reasons else "")
    )
