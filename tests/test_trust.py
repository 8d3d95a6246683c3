"""Run folders from strangers: which code they may name."""

import shutil
from pathlib import Path

import msgspec
import pytest

from runner import experiments
from runner.common.errors import UserError
from runner.common.files import write_json
from runner.config.recipe import Architecture
from runner.config.trust import TrustedCode
from runner.run.folder import Run
from tests.support.processes import TINY, runner

TINY_MODULE = TINY[1]


@pytest.fixture
def hostile(deployed_run: Path, tmp_path: Path) -> tuple[Run, Path]:
    """A deployed run that names a function of the standard library as its model, and the file that a call creates."""
    run = Run(Path(shutil.copytree(deployed_run, tmp_path / "tiny" / "seed-0")))
    created = tmp_path / "created"
    call = Architecture("os:system", {"command": f"touch {created}"})
    write_json(run.run_json, msgspec.structs.replace(run.config(), architecture=call))
    return run, created


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("eval RUN --device cpu", marks=pytest.mark.every),
        "export RUN",
        pytest.param("parity RUN --device cpu", marks=pytest.mark.every),
        pytest.param("bench RUN --device cpu --backend eager", marks=pytest.mark.every),
        "train tiny --data DATA --runs RUNS --name new --teacher RUN",
        pytest.param("train tiny --data DATA --runs RUNS --name new --start-from RUN", marks=pytest.mark.every),
        "train tiny --data DATA --runs RUNS --resume auto",
    ],
)
def test_a_run_folder_cannot_run_code(
    hostile: tuple[Run, Path], small_data: Path, tmp_path: Path, command: str
) -> None:
    """Also not where the user trusts another module."""
    run, created = hostile
    before = sorted(tmp_path.rglob("*"))
    words = {"RUN": run.folder, "RUNS": tmp_path, "DATA": small_data}
    done = runner(*(words.get(word, word) for word in command.split()), *TINY)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("runner: ")]
    assert lines == [
        f"runner: {run.run_json}: expected a model of runner.models or of a module given by --experiments-from, found "
        "os:system; --trust imports it all the same"
    ]
    assert not created.exists()
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_trusted_is_evaluated(tiny_run: Path) -> None:
    refused = runner("eval", tiny_run, "--device", "cpu")
    assert refused.returncode == 2
    assert f"found {TINY_MODULE}:Tiny; --trust imports it" in refused.stderr
    for options in ((*TINY,), ("--trust",)):
        done = runner("eval", tiny_run, "--device", "cpu", *options)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("factory", "modules"),
    [
        ("os:system", ()),
        ("torchvision.models:vgg11", ()),
        ("runner.modelsx:net", ()),
        ("runner.models.resnet:Sequence", ()),  # which that module has imported
        ("runner.models.resnet:nn.Module", ()),
        ("runner.models.resnet:missing", ()),
        ("runner.models.resnet:__dir__", ()),
        ("runner.models.transfer:weight_file", ()),  # defined there, but no model
        ("runner.models.missing:net", ()),
        ("runner.cli:main", ()),
        ("", ()),
        (f"{TINY_MODULE}:Tiny", ()),
        (f"{TINY_MODULE}:SGD", (TINY_MODULE,)),
    ],
)
def test_other_models_are_refused(factory: str, modules: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"found {factory}; --trust"):
        experiments.check_trusted(Architecture(factory), TrustedCode(modules), Path("run.json"))


def test_every_experiment_may_be_loaded() -> None:
    grids = experiments.load_grids().values()
    for group in (experiments.load(), *grids):
        for experiment in group.values():
            experiments.check_trusted(experiment.architecture, TrustedCode(), Path("run.json"))
    experiments.check_trusted(Architecture(f"{TINY_MODULE}:Tiny"), TrustedCode((TINY_MODULE,)), Path("run.json"))
