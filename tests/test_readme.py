"""What the READMEs promise, and no other test shows: their examples do what is printed there."""

import contextlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data_prep import cli as data_prep
from launch.trials import expand
from runner import cli
from runner.run.folder import Run
from tests.support.processes import ROOT, TINY, module, python, runner


def console(readme: str, command: str) -> list[str]:
    """The lines that a README shows after a command, up to the next one."""
    text = (ROOT / readme).read_text()
    return re.split(r"\n\$ |\n```", text[text.index(f"$ {command}") :])[0].splitlines()[1:]


def python_block(readme: str, containing: str) -> str:
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.S) if containing in b]
    return block


@pytest.mark.every
def test_the_example_of_data_prep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """From the images to the records and back; the fingerprint is that of the README on every machine."""
    monkeypatch.chdir(tmp_path)
    for words in ("prepare --source synthetic --limit-per-class 100 --out data/demo",
                  "verify data/demo --source synthetic"):  # fmt: skip
        data_prep.main(words.split())
        (expected,) = console("data_prep/README.md", f"python -m data_prep {words}")
        assert capsys.readouterr().out.startswith(expected.removesuffix("…\n").removesuffix("…"))
    assert " ".join(sorted(path.name for path in Path("data/demo").iterdir())) == "dataset.json test.beton train.beton"
    program = python_block("data_prep/README.md", "beton_reader.read")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {})
    assert printed.getvalue() in (ROOT / "data_prep/README.md").read_text()
    data_prep.main(["verify", "data/demo", "--json"])
    assert json.loads(capsys.readouterr().out)["name"] == "synthetic-10"


@pytest.mark.parametrize("options", ["--recipe.epoch 3", "--recipe.epochs=3 --epochs 4"])
def test_the_example_of_a_mistake(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"train soni-2 --data data/demo {options}"
    with pytest.raises(SystemExit) as stopped:
        cli.main(command.split())
    assert (stopped.value.code, capsys.readouterr().err.splitlines()) == (
        2, console("runner/README.md", f"runner {command}"),
    )  # fmt: skip


def test_the_example_of_a_sweep() -> None:
    """The digest of the overrides, by which the same command finds the same runs, is that of the README."""
    (block,) = re.findall(r"```console\n(\$ python -m launch sweep soni-2 --seeds.*?)```",
                          (ROOT / "launch/README.md").read_text(), re.S)  # fmt: skip
    words = shlex.split(block.splitlines()[0])
    trials = expand(["soni-2"], (0, 1), None, words[words.index("--data") :])
    assert [trial.id for trial in trials] == re.findall(r"^(soni-2/\S+):", block, re.M)


def test_the_example_of_a_job(data: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```console\n\$ (python -m launch submit .*?)```",
                          (ROOT / "launch/README.md").read_text(), re.S)  # fmt: skip
    command, _, expected = block.replace("\\\n", "").partition("\n")
    words = [word if word != "data/cifar10" else str(data) for word in shlex.split(command)[2:]]
    done = module(*words, "--runs", tmp_path)
    assert done.returncode == 0, done.stderr
    places = {f"{data}": "…/data/cifar10", f"{tmp_path}": "…/runs"}
    found = done.stdout
    for place, name in places.items():
        found = found.replace(place, name)
    assert found.split() == expected.split()


@pytest.mark.every
def test_the_example_of_an_architecture(small_data: Path, tmp_path: Path) -> None:
    """A module outside of the package, which later commands must name again."""
    network = (
        "from torch import nn\n\ndef MyNet(width, classes=10):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.Linear(width, classes))\n"
    )
    (tmp_path / "mine.py").write_text(network + python_block("runner/README.md", "EXPERIMENTS"))
    environ = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    words = ["--data", small_data, "--runs", tmp_path / "runs", "--batch-size", 50, "--max-steps", 1]
    done = runner("train", "my-net", "--experiments-from", "mine", *words, "--device", "cpu", **environ)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "my-net" / "seed-0"
    refused = runner("eval", run, "--device", "cpu", **environ)
    assert (refused.returncode, "found mine:MyNet" in refused.stderr) == (2, True)
    scored = runner("eval", run, "--device", "cpu", "--experiments-from", "mine", "--json", **environ)
    assert json.loads(scored.stdout)["test_accuracy"] == Run(run).read_summary().test_accuracy


def test_eval_in_another_precision_and_with_augmentation(tiny_run: Path) -> None:
    plain, other = (
        json.loads(runner("eval", tiny_run, *TINY, "--device", "cpu", "--json", *options).stdout)
        for options in ((), ("--precision", "bf16", "--test-augmentation", "flip"))
    )
    assert (plain["precision"], plain["test_augmentation"]) == ("fp32", "none")
    assert "test_accuracy_augmented" not in plain
    assert (other["precision"], other["test_augmentation"]) == ("bf16", "flip")
    assert other["test_loss_augmented"] != other["test_loss"] != plain["test_loss"]
    assert other["test_loss"] == pytest.approx(plain["test_loss"], rel=0.02)
    assert np.sum(other["confusion"]) == 200


def test_tab_completion_is_a_script_that_knows_the_commands() -> None:
    done = python("-m", "runner", "--tyro-print-completion", "bash")
    assert done.returncode == 0, done.stderr
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    for command in cli.COMMANDS:
        assert re.search(rf"\b{command}\b", done.stdout), command
