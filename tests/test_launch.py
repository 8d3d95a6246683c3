"""The two commands of the README, the configurations, and what is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from launch.road import BANNER, Quickstart, Road
from tests import archives
from tests.conftest import ROOT, clean_environment


def quickstart(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The quickstart's Python half, in the environment of the tests."""
    return subprocess.run(
        [sys.executable, "-m", "launch.road", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=clean_environment(), timeout=500,
    )  # fmt: skip


@pytest.mark.processes
def test_the_whole_road_and_a_second_walk(tmp_path: Path) -> None:
    images = archives.tar(tmp_path / "pictures.tar.gz", archives.image_files(per_class=15))
    call = ("--source", images, "--experiments", "podeti-alexnet", "--out", tmp_path / "out")
    done = quickstart(*call, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "out/runs/pictures/podeti-alexnet/1-steps"
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    assert [row["passed"] for row in json.loads((run / "deploy/parity.json").read_text())["rows"]] == [True]
    assert (run / "deploy/model.fp32.tensorrt-rtx.engine").stat().st_size > 90e6
    page = (tmp_path / "out/report.html").read_text()
    assert "podeti-alexnet/1-steps" in page
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    stages = re.findall(r"^\[\d/7\] \d+:\d\d (\w+)", done.stdout, re.M)
    # The engine before the gate, which on a GPU has to score it.
    assert " ".join(stages) == "prepare train export engine parity bench report"
    again = quickstart(*call, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("there already") == 5
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    (run / "deploy/model.fp32.onnx").write_bytes(b"damaged")
    third = quickstart(*call, cwd=tmp_path)
    assert third.returncode == 0
    # The export alone is made again, and to the same bytes: what came after it still speaks of it.
    assert third.stdout.count("there already") == 4
    assert not third.stdout.count("export podeti-alexnet – there already")


def test_without_the_official_data_the_synthetic_set_stands_in_and_says_so(tmp_path, monkeypatch, capsys) -> None:
    from data_prep import sources, synthetic

    monkeypatch.setattr(sources, "OFFICIAL_URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    monkeypatch.setattr("launch.road.DOWNLOADS", tmp_path / "downloads")
    draw = synthetic.draw
    monkeypatch.setattr(synthetic, "draw", lambda images, seed, split: draw(images // 100, seed, split))
    manifest, data = Road(Quickstart(out=tmp_path / "out")).prepare()
    told = capsys.readouterr().out
    assert BANNER in told
    assert BANNER.upper().replace("SYNTHETIC-10", "synthetic-10").replace("--SOURCE", "--source") == BANNER
    assert manifest.name == "synthetic-10"
    assert data.name == "synthetic"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--experiments", "nope"], "no such experiment"),
        (["--epochs", "0"], "--epochs 0"),
        (["--source", "missing.tar"], "no such file"),
        (["--sauce", "x"], "--sauce"),
    ],
)
def test_bad_input(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = quickstart(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "quickstart-out").exists()


@pytest.mark.parametrize("name", ["one_process", "one_node", "multi_node", "cpu"])
def test_accelerate_reads_our_configurations(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "launch" / f"{name}.yaml"
    loaded = load_config_from_file(str(path))
    assert loaded.mixed_precision == yaml.safe_load(path.read_text())["mixed_precision"]


def test_scripts_are_executable_and_sound() -> None:
    for script in ("launch/quickstart", "launch/check", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK)
    for script in ("launch/quickstart", "launch/check", "launch/environment", "launch/activate", ".ci/run"):
        subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_missing_packages_without_rights_are_one_command_and_exit_2(tmp_path: Path) -> None:
    """As a user who is not root, on a machine where nothing is installed and sudo is not there."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dirname", "basename", "grep", "bash"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    for name, text in (("id", "echo 1000"), ("dpkg-query", "exit 1")):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", ROOT / "launch/quickstart"],
        capture_output=True,
        text=True,
        env={"PATH": str(tools), "HOME": "/"},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "quickstart: missing system packages and no rights to install them; "
        "run: apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev"
    ]


def test_the_wheel_holds_everything_and_installs(tmp_path: Path) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        tmp_path,
    ]
    built = subprocess.run([*pip, ROOT], capture_output=True, text=True, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    environ = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [tmp_path / "bin/runner", "list", "--json"], capture_output=True, text=True, env=environ, cwd="/"
    )
    assert len(json.loads(done.stdout)) >= 3
    assert (tmp_path / "runner/report/page.html.j2").is_file()
    assert (tmp_path / "launch/cpu.yaml").is_file()


def test_the_cuda_provider_finds_every_library_that_it_is_linked_to() -> None:
    """None but the driver's has to come from elsewhere; whether they then load needs a GPU."""
    package = Path(importlib.util.find_spec("onnxruntime").origin).parent
    (provider,) = package.glob("capi/libonnxruntime_providers_cuda.so")
    told = subprocess.run(["readelf", "--dynamic", provider], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(lib(?:cu|nv)[^\]]*)\]", told)) - {"libcuda.so.1"}
    assert len(needed) >= 4
    assert needed <= {path.name for path in package.parent.glob("nvidia/*/lib/*.so*")}


def test_requirements_are_pinned_and_name_no_registry() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.+!-]+( ; .*)?", line) for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0] for line in lines}
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    assert {re.match(r"[a-z0-9-]+", name)[0] for name in wanted} <= pinned
    assert not re.search(r"://", (ROOT / "pyproject.toml").read_text())
