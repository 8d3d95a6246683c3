"""What the READMEs promise, and no other test shows: their examples do what is printed there."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import cli as data_prep
from data_prep.sources import Source
from launch.trials import expand
from runner import cli
from runner.deploy import precision
from runner.run.folder import Run
from tests.conftest import Train
from tests.support.configs import trusted
from tests.support.processes import ROOT, TINY, module, python, runner


def console(readme: str, command: str) -> list[str]:
    """The lines that a README shows after a command, up to the next one."""
    text = (ROOT / readme).read_text()
    return re.split(r"\n\$ |\n```", text[text.index(f"$ {command}") :])[0].splitlines()[1:]


def shape(lines: list[str], **places: object) -> list[str]:
    """Lines without what differs between runs and machines: numbers, signs, bars, the name of the experiment.

    Args:
        lines: lines that a README shows, or that a command has printed.
        places: texts, such as the folder of a test, by the word of the README that they are replaced with.
    """
    shapes = []
    for line in lines:
        for name, place in places.items():
            line = line.replace(str(place), name)
        line = re.sub(r"\b(soni-2|tiny)\b", "EXPERIMENT", line)
        line = re.sub(r"[+-]?\d[\d,.]*", "#", line)
        shapes.append(" ".join(re.sub("[▁-█━]+", "▁", line).split()))
    return shapes


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


@pytest.mark.every
def test_the_example_of_larger_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """From a folder of JPEG files to an exported model, whose training ends after two steps."""
    monkeypatch.chdir(tmp_path)
    exec(python_block("runner/data/README.md", ".resize((300 + 2 * k, 320)"), {})
    for words in ("prepare --source shapes --size 256 --records jpeg --out data/shapes",
                  "verify data/shapes --source shapes"):  # fmt: skip
        data_prep.main(words.split())
        (expected,) = console("runner/data/README.md", f"python -m data_prep {words}")
        assert capsys.readouterr().out.startswith(expected.removesuffix("…"))
    block = (ROOT / "runner/data/README.md").read_text().replace("\\\n", "")
    (words,) = re.findall(r"^\$ runner (train timm/resnet10t .*)$", block, re.M)
    run = tmp_path / "runs" / "timm" / "resnet10t" / "seed-0"
    words = words.replace("data/shapes", str(tmp_path / "data" / "shapes"))  # commands run in the checkout
    for command in (f"{words} --max-steps 2 --runs {tmp_path / 'runs'}", f"export {run}", f"parity {run} --device cpu"):
        done = runner(*command.split())
        assert done.returncode == 0, done.stderr
    config = Run(run).config()
    assert (config.loader, config.input.shape) == ("streaming", [3, 224, 224])


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


@pytest.mark.every
def test_the_example_of_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Five classes of photographs, with files among them that are no images."""
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        for split in ("train", "val"):
            folder = Path("flowers") / split / f"flower-{number}"
            folder.mkdir(parents=True)
            for name in "ab":
                Image.new("RGB", (80, 70), (10 * number, 20, 30 + ord(name))).save(folder / f"{name}.png")
    Path("flowers/LICENSE.txt").touch()
    Path("flowers/train/notes.csv").touch()
    command = "prepare --source flowers --size 64 --out data/flowers"
    data_prep.main(command.split())
    printed = capsys.readouterr()
    shown = console("data_prep/README.md", f"python -m data_prep {command}")
    assert printed.err.splitlines() == shown[:-1]
    form = ".*".join(map(re.escape, shown[-1].split("…")))
    assert re.fullmatch(form + "\n", printed.out)


def test_the_example_of_a_damaged_file(own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    own_data.rename("data/demo")
    with Path("data/demo/train.beton").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(SystemExit):
        cli.main(["train", "soni-2", "--data", "data/demo", "--device", "cpu"])
    (shown,) = console("data_prep/README.md", "runner train soni-2 --data data/demo")
    form = ".*".join(map(re.escape, re.sub("[0-9a-f]{8}…", "…", shown).split("…")))
    assert re.fullmatch(form, capsys.readouterr().err.splitlines()[-1])


def test_the_example_of_a_sweep_of_wandb(small_data: Path, tmp_path: Path) -> None:
    command = "python -m launch sweep soni --data data/cifar10 --as-wandb-sweep sweep.yaml"
    words = [str(small_data) if word == "data/cifar10" else word for word in command.split()[2:]]
    done = module(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == console("launch/README.md", command)


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


def test_the_examples_show_the_same_run() -> None:
    """Training, evaluation, a resumed run, the gate and the table of the report agree in its accuracy."""
    training = console("runner/README.md", "runner train soni-2 --data data/demo --seeds 0 1")
    seeds = [float(line.partition(": ")[2].partition("%")[0]) for line in training[-3:-1]]
    assert training[-1] == f"2 seeds: {statistics.mean(seeds):.2f}% ± {statistics.stdev(seeds):.2f}%"
    assert f"({seeds[0]:.2f}%), lr 0.01" in training[5]
    for command in ("runner eval runs/soni-2/seed-0", "runner train soni-2 --data data/demo --name again --epochs 2"):
        assert console("runner/README.md", command)[-1].replace("again", "seed-0") == training[-3]
    for kind, line in zip(("fp32", "fp16", "int8", "int8-cpu"),
                          console("runner/deploy/README.md", "runner parity runs"), strict=True):  # fmt: skip
        accuracy, change = re.fullmatch(rf"….{kind}.onnx on .*, accuracy (\S+)% \((\S+)\), .*", line).groups()
        assert float(accuracy) - float(change) == pytest.approx(seeds[0])
    mean = f"{statistics.mean(seeds):.2f} ± {statistics.stdev(seeds):.2f}%"
    assert f"| 2 seeds | {mean} |" in (ROOT / "runner/report/README.md").read_text()


@pytest.mark.every
def test_training_prints_what_the_example_shows(train: Train, tmp_path: Path) -> None:
    done = train("tiny", "--seeds", 0, 1, "--epochs", 2, WANDB_MODE="offline")
    shown = console("runner/README.md", "runner train soni-2 --data data/demo --seeds 0 1")
    more = shown.index("…")
    assert shape(done.stderr.splitlines(), runs=tmp_path)[:more] == shape(shown[:more])
    assert shape(done.stdout.splitlines(), runs=tmp_path) == shape(shown[more + 1 :])


def test_metrics_and_evaluation_are_what_the_example_shows(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [list(json.loads(line)) for line in Run(tiny_run).metrics.read_text().splitlines()]
    for row, line in zip(rows, console("runner/README.md", "cat runs/soni-2"), strict=False):
        assert row[: line.count('":')] == re.findall(r'"([^"]+)":', line)
    cli.main(["eval", str(tiny_run), *TINY, "--device", "cpu"])
    shown = console("runner/README.md", "runner eval runs/soni-2/seed-0")
    assert shape(capsys.readouterr().out.splitlines(), runs=tiny_run.parents[1]) == shape(shown)


def test_watch_and_report_print_what_the_examples_show(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = console("runner/README.md", "runner watch runs/soni-2/profiled")
    cli.main(["watch", str(tiny_run)])
    printed = capsys.readouterr().out.splitlines()
    assert shape(printed[1 : len(shown)]) == shape(shown[1:])
    for head in (shown[0], printed[0]):  # between them is the machine
        assert re.fullmatch(r"(soni-2/profiled|tiny/seed-0)  complete  \S.*, fp32 *", head)
    for seed in (0, 1):
        shutil.copytree(tiny_run, tmp_path / "runs" / f"seed-{seed}")
    words = ["--out", str(tmp_path / "report.html"), "--markdown", str(tmp_path / "report.md")]
    cli.main(["report", str(tmp_path / "runs"), *words])
    shown = console("runner/report/README.md", "runner report runs")
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/{line}" for line in shown]
    table = re.findall("^> (.*)$", (ROOT / "runner/report/README.md").read_text(), re.M)
    written = (tmp_path / "report.md").read_text().splitlines()
    assert set(table[:2]) <= set(written)
    (row,) = [line for line in written if line.startswith("| `tiny")]
    assert len(row.split(" | ")) == len(table[2].split(" | "))


def test_the_example_of_predict(
    deployed_run: Path, small: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The commands of the README, on images with the names that it shows."""
    readme, shown = "runner/deploy/README.md", "runner predict runs/soni-2/seed-0/deploy/model.fp32.raw.onnx pictures"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(deployed_run, "runs/soni-2/seed-0")
    precision.add_raw_front_end(trusted("runs/soni-2/seed-0"), "fp32")
    Path("pictures").mkdir()
    names = [line.partition(":")[0] for line in console(readme, shown)]
    for name, image in zip(names, small.test.images, strict=False):
        Image.fromarray(image).save(name)
    (command,) = re.findall(rf"^\$ (runner {shown[7:]}.*)$", (ROOT / readme).read_text(), re.M)
    cli.main(shlex.split(command)[1:])
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == names
    classes = "|".join(map(re.escape, small.classes))
    for line in [*printed, *console(readme, shown)]:
        assert re.fullmatch(rf"pictures/\w+\.png: ({classes}) \d+\.\d%", line)
    assert Image.open("sheet.png").format == "PNG"


def test_the_gate_and_the_engine_print_what_the_example_shows(
    deployed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(deployed_run, "runs/soni-2/seed-0")
    for words, more in (("export", TINY), ("engine", ()), ("parity", (*TINY, "--device", "cpu"))):
        cli.main([words, "runs/soni-2/seed-0", *more])
        printed = capsys.readouterr().out.splitlines()
        shown = console("runner/deploy/README.md", f"runner {words} runs/soni-2/seed-0")
        shown = [line for line in shown if not re.search("fp16|int8", line)]  # which take longer
        places = {"…": "runs/soni-2/seed-0/deploy/model"} if words == "parity" else {}
        assert " ".join(shape(printed, **places)) == " ".join(shape(shown))


def test_bench_prints_what_the_example_shows(deployed_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(deployed_run, tmp_path / "runs" / "soni-2" / "seed-0")
    quick = ("--batch", 1, "--seconds", 0.05, "--repeats", 3)
    done = runner("bench", run, *TINY, "--device", "cpu", *quick)
    assert done.returncode == 0, done.stderr
    printed, shown = (
        [line for line in lines if not re.search(r"int8-cpu|programs were running|only \d+ calls", line)]
        for lines in (done.stdout.splitlines(), console("runner/deploy/README.md", "runner bench runs/soni-2"))
    )
    for lines in (printed, shown):  # of two rows in fp32, one is marked; in a short measurement, it may be either
        assert [line.rstrip().endswith(" *") for line in lines].count(True) == 1
        lines[:] = [line.rstrip().removesuffix(" *").rstrip() for line in lines]
    assert re.match("latency on .", printed[0])
    assert shape(printed[1:], runs=tmp_path / "runs") == shape(shown[1:])


def test_tab_completion_is_a_script_that_knows_the_commands() -> None:
    done = python("-m", "runner", "--tyro-print-completion", "bash")
    assert done.returncode == 0, done.stderr
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    for command in cli.COMMANDS:
        assert re.search(rf"\b{command}\b", done.stdout), command
