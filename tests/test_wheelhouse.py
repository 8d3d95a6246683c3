"""Wheelhouses: what launch/environment refuses, and an installation without network and compiler."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import wheelhouse
from tests.support.processes import ROOT, Done

# All that the scripts need of the system, apart from Python.
PROGRAMS = (
    "basename", "bash", "cat", "chmod", "cut", "dirname", "env", "find", "flock", "id", "mkdir", "rm", "sha256sum",
    "timeout", "touch",
)  # fmt: skip
# A stand-in for uv, which writes its arguments and the requirements next to the environment.
UV = """#!/bin/bash
printf '%s\\n' "$@" >"$RUNNER_CACHE/arguments"
cat "${!#}" >"$RUNNER_CACHE/requirements"
"""
WHEELS = {
    "tiny-1.0-py3-none-any.whl": {},
    "pip-2.0-py3-none-any.whl": {},
    "uv-3.0-py3-none-manylinux2014_x86_64.whl": {"uv-3.0.data/scripts/uv": UV},
}
HASH = f"--hash=sha256:{64 * '0'}"  # of what a wheel is made from; an installation compares the wheels themselves
SYSTEM = re.compile(r"ld-linux.*|lib(c|m|dl|rt|pthread|util|gcc_s|stdc\+\+|z)\.so\.\d+")


class Project:
    """A copy of the scripts with other requirements."""

    def __init__(self, folder: Path, requirements: str, installers: str) -> None:
        self.folder, self.cache, self.wheels = folder / "project", folder / "cache", folder / "wheels"
        (self.folder / "launch").mkdir(parents=True)
        for name in ("activate", "environment", "wheelhouse", "wheelhouse.py", "wheelhouse_tools.txt"):
            shutil.copy(ROOT / "launch" / name, self.folder / "launch")
        (self.folder / "requirements.txt").write_text(requirements)
        (self.folder / "launch/installers.txt").write_text(installers)
        self.tools = folder / "tools"
        self.tools.mkdir()
        for name in PROGRAMS:
            (self.tools / name).symlink_to(str(shutil.which(name)))

    def call(self, *words: object, path: str = "", **environ: str) -> Done:
        """Calls a script with the programs of `tools` alone."""
        given = {"PATH": path or str(self.tools), "RUNNER_CACHE": str(self.cache), "RUNNER_PYTHON": sys.executable}
        command = [str(word) for word in words]
        return subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=given | environ)

    def install(self, wheels: Path | None = None) -> Done:
        return self.call("launch/environment", "--wheelhouse", wheels or self.wheels)

    def complete(self) -> bool:
        return any(self.cache.glob("env-*/complete"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The scripts, with three packages of almost nothing, and a wheelhouse of them."""
    made = Project(tmp_path, f"tiny==1.0 {HASH}\n", f"pip==2.0 {HASH}\nuv==3.0 \\\n    {HASH}\n")
    made.wheels.mkdir()
    for name, files in WHEELS.items():
        with zipfile.ZipFile(made.wheels / name, "w") as archive:
            archive.writestr("name", name)
            for member, text in files.items():
                archive.writestr(member, text)
    wheelhouse.write_sums(made.wheels, {name: wheelhouse.digest(made.wheels / name) for name in WHEELS})
    return made


def test_it_installs_what_was_hashed_without_network_and_compiler(project: Project) -> None:
    done = project.install()
    assert done.returncode == 0, done.stderr
    arguments = (project.cache / "arguments").read_text().splitlines()
    assert {"--offline", "--no-index", "--require-hashes", "--no-config"} <= set(arguments)
    assert arguments[arguments.index("--find-links") + 1].endswith(".unpacked/wheels")  # links to these alone
    assert (project.cache / "requirements").read_text().splitlines() == [
        f"{pin} --hash=sha256:{hashlib.sha256((project.wheels / name).read_bytes()).hexdigest()}"
        for pin, name in zip(("tiny==1.0", "pip==2.0", "uv==3.0"), WHEELS, strict=True)
    ]
    assert [path.name for path in project.cache.glob("*.unpacked")] == []
    # The finished environment is found before the wheelhouse, the compiler or apt.
    for path in [path for path in project.cache.iterdir() if path.is_file()]:
        path.unlink()
    shutil.rmtree(project.wheels)
    assert project.install().returncode == 0
    shell = project.call("bash", "-c", "source launch/activate && command -v runner")
    assert shell.returncode == 0, shell.stderr
    assert Path(shell.stdout.strip()).is_relative_to(project.cache)
    assert [path.name for path in project.cache.iterdir() if path.is_file()] == []  # not even the lock


def test_on_a_machine_with_a_gpu_it_says_that_tensorrt_is_missing(project: Project) -> None:
    (project.tools / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    (project.tools / "nvidia-smi").chmod(0o755)
    done = project.install()
    assert done.returncode == 0, done.stderr
    assert "a wheelhouse does not contain TensorRT; engines can be built for RTX cards only" in done.stderr


def test_the_variable_reaches_the_other_scripts(project: Project) -> None:
    shell = "source launch/activate && command -v runner"
    done = project.call("bash", "-c", shell, RUNNER_WHEELHOUSE=str(project.wheels))
    assert done.returncode == 0, done.stderr
    assert project.complete()


def remove_a_wheel(wheels: Path) -> None:
    (wheels / "tiny-1.0-py3-none-any.whl").unlink()


def change_a_wheel(wheels: Path) -> None:
    with (wheels / "pip-2.0-py3-none-any.whl").open("ab") as file:
        file.write(b"x")


def rename_to(tags: str) -> Callable[[Path], None]:
    def rename(wheels: Path) -> None:
        (wheels / "tiny-1.0-py3-none-any.whl").rename(wheels / f"tiny-1.0-{tags}.whl")
        sums = (wheels / "SHA256SUMS").read_text()
        (wheels / "SHA256SUMS").write_text(sums.replace("tiny-1.0-py3-none-any", f"tiny-1.0-{tags}"))

    return rename


def leave_the_folder(wheels: Path) -> None:
    (wheels / "SHA256SUMS").write_text(f"{'0' * 64}  ../tiny-1.0-py3-none-any.whl\n")


def take_all(wheels: Path) -> None:
    shutil.rmtree(wheels)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (take_all, "expected a wheelhouse with a file SHA256SUMS"),
        (remove_a_wheel, "expected a wheel of tiny==1.0, found none"),
        (change_a_wheel, "pip-2.0-py3-none-any.whl: SHA-256 "),
        (rename_to("cp27-cp27m-manylinux2014_x86_64"), "expected a wheel for Python 3."),
        (rename_to("py3-none-manylinux_2_99_x86_64"), "expected a wheel for Python 3."),
        (rename_to("py3-none-win_amd64"), "expected a wheel for Python 3."),
        (leave_the_folder, "expected a hash and a wheel"),
    ],
)  # fmt: skip
def test_a_wheelhouse_that_does_not_fit_is_refused(project: Project, damage: Callable, message: str) -> None:
    damage(project.wheels)
    done = project.install()
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
    assert str(project.wheels) in line
    assert "launch/wheelhouse" in line
    assert not project.complete()


@pytest.mark.parametrize(
    "words",
    [
        ["environment", "--wheels", "x"],
        ["environment", "--wheelhouse", ""],
        ["environment", "x"],
        ["wheelhouse"],
        ["wheelhouse", ""],
        ["wheelhouse", "--help"],
        ["wheelhouse", "a", "b"],
    ],
)
def test_other_arguments_are_refused(project: Project, words: list[str]) -> None:
    done = project.call(f"launch/{words[0]}", *words[1:])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "expected" in line
    assert "DIR" in line


@pytest.mark.parametrize("requirement", [f"tiny>=1.0 {HASH}", "tiny==1.0"])
def test_a_requirement_without_version_or_hash_is_refused(requirement: str, project: Project) -> None:
    (project.folder / "requirements.txt").write_text(f"{requirement}\n")
    done = project.install()
    assert done.returncode == 2
    assert f"{requirement.split()[0]!r}: expected NAME==VERSION and hashes" in done.stderr


def test_a_source_with_another_hash_is_not_built(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`fetch` compares what a wheel is made from, here a package in a local folder, with the requirement."""
    source = tmp_path / "source"
    (source / "tiny").mkdir(parents=True)
    (source / "pyproject.toml").write_text("[project]\nname = 'tiny'\nversion = '1.0'\n")
    subprocess.run(["tar", "-czf", tmp_path / "tiny-1.0.tar.gz", "-C", source, "."], check=True)
    wrong = f"tiny @ {(tmp_path / 'tiny-1.0.tar.gz').as_uri()} {HASH}"
    with pytest.raises(wheelhouse.RefusedError, match=r"tiny==1\.0: cannot be downloaded or built"):
        wheelhouse.fetch("tiny==1.0", wrong, Path(sys.executable), tmp_path)
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in capfd.readouterr().err


MINOR = sys.version_info.minor


@pytest.mark.parametrize(
    ("tags", "fits"),
    [
        (f"cp3{MINOR}-cp3{MINOR}-manylinux_2_17_x86_64", True),
        (f"cp3{MINOR}-cp3{MINOR}-manylinux_2_17_aarch64", False),
        (f"cp3{MINOR}-cp3{MINOR}t-manylinux_2_17_x86_64", False),
        (f"cp3{MINOR - 1}-cp3{MINOR - 1}-manylinux_2_17_x86_64", False),
        ("cp38-abi3-manylinux1_x86_64", True),
        (f"cp3{MINOR + 1}-abi3-manylinux_2_17_x86_64", False),
        (f"cp3{MINOR - 1}-none-manylinux_2_17_x86_64", False),
        ("py2.py3-none-any", True),
        ("py2-none-any", False),
        ("py38-none-manylinux_2_99_x86_64.manylinux2014_x86_64", True),
        ("py3-none-musllinux_1_2_x86_64", False),
    ],
)
def test_the_tags_of_a_wheel(tags: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert wheelhouse.fits(f"tiny-1.0-{tags}.whl") is fits


@pytest.mark.every
@pytest.mark.root
def test_wheels_with_their_libraries_inside_install_without_a_network(tmp_path: Path) -> None:
    """The packages that need libraries of the system, built for real, in a namespace without a network."""
    # setuptools builds FFCV; tensorrt-rtx exists only as a source, whose build also needs wheel.
    names = ("ffcv", "llvmlite", "numba", "numpy", "opencv-python", "setuptools", "tensorrt-rtx")
    pins = [pin for requirement, pin in wheelhouse.read_pins().items() if requirement.split("==")[0] in names]
    chosen = "".join(f"{pin}\n" for pin in pins)
    project = Project(tmp_path, chosen, (ROOT / "launch/installers.txt").read_text())
    built = project.call("launch/wheelhouse", project.wheels, **os.environ, path=os.environ["PATH"])
    assert built.returncode == 0, built.stderr
    again = project.call("launch/wheelhouse", project.wheels, **os.environ, path=os.environ["PATH"])
    assert "9 of 9 packages" in again.stderr
    unshare = str(shutil.which("unshare"))
    done = project.call(unshare, "--net", "launch/environment", "--wheelhouse", project.wheels)
    assert done.returncode == 0, done.stderr
    (home,) = project.cache.glob("env-*/")
    (ffcv,) = home.glob("lib/python3*/site-packages/ffcv/_libffcv*.so")
    program = f"""
import ctypes, cv2, numba, numpy
numba.config.THREADING_LAYER = "omp"
@numba.njit(parallel=True)
def total(count):
    found = 0
    for index in numba.prange(count):
        found += index
    return found
assert total(10) == 45
assert numba.threading_layer() == "omp"
ctypes.CDLL({str(ffcv)!r}).resize
"""
    loaded = project.call(home / "bin/python", "-c", program)
    assert loaded.returncode == 0, loaded.stderr
    files = [path for path in home.rglob("*.so*") if path.is_file()]
    elf = subprocess.run(["readelf", "--dynamic", *files], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", elf))
    assert len(needed) > 30
    assert {name for name in needed - {path.name for path in files} if not SYSTEM.fullmatch(name)} == set()
