"""The benchmarks and the tables of their results."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from runner import experiments
from runner.benchmarks import allreduce, measure, scaling, tables
from runner.benchmarks.loader import Augmentation, LoaderBenchmark, loaders, torchvision_loader
from runner.benchmarks.overhead import OverheadBenchmark
from runner.common.errors import UserError
from runner.common.files import write_json
from runner.data.open import open_manifest
from runner.run.folder import Run
from runner.run.schema import PrecisionSearch
from runner.system import cpu
from tests.support.processes import TINY, module, runner


@pytest.mark.parametrize("document", tables.TABLES, ids=["readme", "benchmarks", "launch"])
def test_the_tables_are_made_from_the_results(document: Path) -> None:
    text = tables.insert_tables(document, tables.TABLES[document])
    assert text == document.read_text(), "run: python -m runner.benchmarks.tables --write"


def test_a_cell_without_a_result_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.all_experiments()
    assert text.count(tables.MISSING) >= 2 * text.count("| `")
    assert "not measured" in tables.ratios()
    assert "not measured" in tables.complete_experiments()
    document = tmp_path / "README.md"
    document.write_text("no markers")
    with pytest.raises(UserError, match="expected <!-- papers -->"):
        tables.insert_tables(document, {"papers": tables.all_experiments})


def test_papers_collects_runs(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "papers-cpu.json"
    done = module("runner.benchmarks.papers", tiny_run, "--json", out)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(out.read_text())["experiments"]
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert entry["test_accuracy"] == summary["test_accuracy"]
    assert len(entry["epochs_test_accuracy"]["0"]) == 2
    assert entry["versions"]["torch"]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    registered = entry | {"experiment": "soni-2"}  # the table has no row for the tests' own experiment
    out.write_text(json.dumps({"experiments": [registered]}))
    (line,) = [line for line in tables.all_experiments().splitlines() if line.startswith("| `soni-2` |")]
    assert f"| {100 * summary['test_accuracy']:.2f}%, {summary['dataset']}, 2 of 2 epochs, seed 0, fp32 |" in line
    nothing = module("runner.benchmarks.papers", tmp_path)
    assert nothing.returncode == 2


def test_searches_for_precisions_are_collected(
    deployed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Path(shutil.copytree(deployed_run, tmp_path / "tiny" / "seed-0")))
    found = PrecisionSearch(
        precision="int8", calibration_method="minmax", images="9 images", accuracy=0.9, limit=0.001, operators=8,
        drop_of_all=0.0025, bytes_of_all=2_000_000, kept=["a"], drop=0.0005, bytes=3_500_000,
        drop_without={"a": 0.0025}, measured=4, added_errors={},
    )  # fmt: skip
    write_json(run.precision_search("int8"), found)
    out = tmp_path / "parity-cpu.json"
    done = module("runner.benchmarks.parity", tmp_path / "tiny", "--json", out)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    row = tables.precision_searches().splitlines()[2]
    assert row == "| `tiny` | int8 | 0.1 | 0.25 | 1 of 8 | 0.05 | a 0.25 | 3.5 | 2.0 | 4 files |"


def test_the_table_of_backends_marks_the_fastest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.cpu_latencies() == "Latency of every backend: not measured."
    trained = {"experiment": "a", "seed": 1, "epochs": 2.0, "dataset": "d", "precision": "fp32", "batch": 8}
    rows = [
        trained | {"backend": name, "fastest": fastest, "ratio": {"median": x, "min": x / 2, "max": 2 * x, "rounds": 7}}
        for name, fastest, x in (("eager", False, 1.0), ("compiled", True, 0.5))
    ]
    rows.append(rows[0] | {"batch": 32})
    machine = {"hardware": {"cpu": "c", "cores": 2, "memory_gib": 1.0}, "versions": {"torch": "2"}}
    (tmp_path / "deploy-cpu.json").write_text(json.dumps(machine | {"backends": rows}))
    assert tables.cpu_latencies().splitlines()[2:4] == [
        "| `a` | 2.00 epochs, seed 1, d | 8 | 1.00 (0.50 to 2.00) | **0.50 (0.25 to 1.00)** |",
        "| `a` | 2.00 epochs, seed 1, d | 32 | 1.00 (0.50 to 2.00) | not measured |",
    ]


def test_ratios_are_taken_within_a_round() -> None:
    assert measure.ratio([10, 20, 30], [1, 2, 6]) == measure.Spread(10, 5, 10, 3)
    order = []
    candidates = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    measure.interleaved(candidates, 3, "test", lambda: order.append("|"))
    assert "".join(order) == "abc|bca|cab|"


FILES = Path(tables.__file__).parent.glob("*.py")
PROGRAMS = [path.stem for path in FILES if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("name", [*sorted(PROGRAMS), pytest.param("gpu", id="all-of-a-gpu")])
def test_every_benchmark_has_help(name: str) -> None:
    done = module(f"runner.benchmarks.{name}", "--help")
    assert done.returncode == 0
    assert "usage" in done.stdout


def test_the_all_reduce_model_and_its_document_agree() -> None:
    text = allreduce.DOCUMENT.read_text()
    assert allreduce.filled(text) == text, "run: python -m runner.benchmarks.allreduce --write"
    cluster = allreduce.Cluster()
    assert allreduce.all_reduce(1e6, 1, cluster) == 0
    # 8 GPUs of a node: each sends 7/8 of the gradients twice.
    assert allreduce.all_reduce(8e9, 8, cluster) == pytest.approx(2 * 7e9 / cluster.link, rel=2e-3)
    known = experiments.load()
    for name in allreduce.SHOWN:
        shares = [allreduce.efficiency(known[name], 512, gpus, cluster) for gpus in allreduce.GPUS]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] == 1
        assert allreduce.efficiency(known[name], 2048, 64, cluster) > allreduce.efficiency(
            known[name], 512, 64, cluster
        )


def test_ddp_with_one_process_is_measured_against_no_ddp(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scaling.DDP_STEPS, "cpu", 1)
    with cpu.preserve_torch_num_threads():
        walls = scaling.ddp_of_one("soni-2", small_data, 1, "cpu")
    assert {name: len(rounds) for name, rounds in walls.items()} == {"none": 1, "ddp": 1}
    assert all(wall > 0 for rounds in walls.values() for wall in rounds)


def test_the_ratio_of_ranks_is_written_before_ddp_is_measured(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "ddp_of_one", interrupted)
    monkeypatch.setattr(scaling.ScalingBenchmark, "launched", lambda self, processes, batch: float(processes))
    monkeypatch.setattr(scaling.environment, "count_gpus", lambda: 0)
    with pytest.raises(KeyboardInterrupt):
        scaling.ScalingBenchmark(small_data, json=tmp_path / "scaling.json")()
    assert json.loads((tmp_path / "scaling.json").read_text())["ratio_ranks_to_one_process"]["median"] == 2.0


@pytest.mark.every
@pytest.mark.processes
def test_the_scaling_benchmark_launches_ranks(small_data: Path) -> None:
    assert scaling.ScalingBenchmark(small_data, "soni-2", steps=3).launched(2, 20) > 0


def overhead(data: Path, *options: object) -> CompletedProcess[str]:
    return module("runner.benchmarks.overhead", "--data", data, "--steps", 3, "--batch", 20, *options)


@pytest.mark.every
def test_the_overhead_benchmark_times_a_part_in_a_separate_process(small_data: Path) -> None:
    clocks: list[list[float]] = []
    seconds = OverheadBenchmark(small_data, "soni-2", steps=3, batch=20).timed("imports", clocks)
    assert clocks == [[seconds]]
    assert seconds > 0


OTHER_PARTS = (("imports", 1), ("loop", 3), ("accelerate", 3))


@pytest.mark.parametrize(
    ("part", "steps"),
    [("runner", 3), *(pytest.param(part, steps, marks=pytest.mark.every) for part, steps in OTHER_PARTS)],
)
def test_the_overhead_benchmark_runs_its_parts(small_data: Path, part: str, steps: int) -> None:
    done = overhead(small_data, "--experiment", "soni-2", "--part", part)
    assert done.returncode == 0, done.stderr
    clock = json.loads(done.stdout.splitlines()[-1])
    assert clock == sorted(clock)
    assert len(clock) == steps


def test_each_round_of_the_overhead_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a GPU that is borrowed for a time keeps the rounds before the one that was interrupted."""
    out, programs = tmp_path / "overhead.json", []

    def timed(self: OverheadBenchmark, program: str, clocks: list[list[float]]) -> float:
        programs.append(program)
        if len(programs) == 7:
            raise KeyboardInterrupt
        clocks.append([1.0, 2.0, 4.0])
        return 4.0

    monkeypatch.setattr(OverheadBenchmark, "timed", timed)
    with pytest.raises(KeyboardInterrupt):
        OverheadBenchmark(tmp_path, json=out)()
    written = json.loads(out.read_text())
    assert written["ratio_runner_to_shortest_loop"] == {"median": 1.0, "min": 1.0, "max": 1.0, "rounds": 1}


@pytest.mark.every
def test_the_overhead_benchmark_passes_on_what_a_part_rejects(small_data: Path) -> None:
    done = overhead(small_data, "--experiment", "podeti-alexnet")  # holds out 5,000 of 500 images
    assert done.returncode == 2
    assert "expected fewer than the 500 training images" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.every
@pytest.mark.parametrize("augmentation", ["resized-crop", "rand", "trivial", "erase", "jitter"])
def test_the_loaders_that_are_compared_have_the_same_augmentation(small_data: Path, augmentation: Augmentation) -> None:
    """Their batches have one shape and type, and similar contrast."""
    options = LoaderBenchmark(small_data, 60, workers=1, augmentation=augmentation)
    both = loaders(options, open_manifest(small_data), torch.device("cpu"))
    assert both.keys() == {"resident", "streaming", "torchvision"}
    batches = {name: next(iter(epoch(0)))[0] for name, epoch in both.items()}
    assert {(batch.shape, batch.dtype) for batch in batches.values()} == {((60, 3, 32, 32), torch.float32)}
    deviations = [float(batch.std()) for batch in batches.values()]
    assert max(deviations) < 1.5 * min(deviations)


def test_an_augmentation_is_given_once(small_data: Path) -> None:
    assert LoaderBenchmark(small_data, rand_augment=True).applied == "rand"
    with pytest.raises(UserError, match="--rand-augment and --augmentation erase: expected one of them"):
        LoaderBenchmark(small_data, rand_augment=True, augmentation="erase")()


def test_the_loader_benchmark_rejects_large_batches(small_data: Path) -> None:
    manifest = open_manifest(small_data)
    with pytest.raises(UserError, match="batch size 167: expected at most a third of 500 images"):
        torchvision_loader(LoaderBenchmark(small_data, 167), manifest)


def test_the_preview_writes_a_picture(small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    done = module("runner.data.preview", "--data", small_data, "--out", out, "--images", 3)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")
    missing_folder = tmp_path / "x" / "y.png"
    refused = module("runner.data.preview", "--data", small_data, "--out", missing_folder, "--images", 1)
    assert refused.returncode == 2
    assert "cannot write there" in refused.stderr


@pytest.mark.every
def test_the_deploy_benchmark_compares_an_exported_run(deployed_run: Path, small_data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(deployed_run, tmp_path / "tiny" / "seed-0")
    for command in (
        ["export", run, "--precision", "int8-cpu", "--calibration", 100, *TINY],
        ["parity", run, "--device", "cpu", *TINY],
    ):
        done = runner(*command)
        assert done.returncode == 0, done.stderr
    out = tmp_path / "deploy.json"
    done = module("runner.benchmarks.deploy", run, *TINY, "--batch", 1, 2, "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    ratios = {name: ratio for name, ratio in result.items() if name.startswith("ratio_")}
    assert ratios.keys() == {
        f"ratio_{name}_tiny" for name in ("onnxruntime_to_eager", "int8_to_fp32", "export_to_bare")
    }
    assert all(0 < r["min"] <= r["median"] <= r["max"] and r["rounds"] == 7 for r in ratios.values())
    rows = result["backends"]
    backends = [("eager", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "int8-cpu")]
    assert [(row["batch"], row["backend"], row["precision"]) for row in rows] == [
        (batch, *backend) for batch in (1, 2) for backend in backends
    ]
    assert [row["ratio"] for row in rows if row["backend"] == "eager"] == [
        {"median": 1.0, "min": 1.0, "max": 1.0, "rounds": 7}
    ] * 2
    for batch in (1, 2):
        (fastest,) = [row for row in rows if row["batch"] == batch and row["fastest"]]
        assert fastest["ratio"]["median"] <= 1.5  # eager has 1.0; medians of ratios and of latencies may differ
