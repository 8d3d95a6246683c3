"""int8 files of which some operators stay in fp32, by name or found by a search."""

import random
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.common import files
from runner.common.errors import UserError
from runner.data.open import open_split_of_run
from runner.deploy import onnx as exporter
from runner.deploy import parity, precision
from runner.deploy.precision_search import Drops, SearchImages, least_set, search
from runner.run.folder import Run
from runner.run.schema import PrecisionSearch
from runner.training import checkpoint
from tests.conftest import Once
from tests.support.configs import trusted
from tests.support.processes import TINY, runner


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 30), st.randoms(), st.booleans())
def test_the_search_ends_with_operators_that_are_all_needed(
    losses: list[int], limit: int, generator: random.Random, adds_up: bool
) -> None:
    """Whatever the order, and also where the drops of operators do not add up."""
    names = [f"n{k}" for k in range(len(losses))]
    noise = {frozenset(names): 0}

    def measure(kept: tuple[str, ...]) -> float:
        if not adds_up:
            return noise.setdefault(frozenset(kept), generator.randrange(60))
        return sum(loss for name, loss in zip(names, losses, strict=True) if name not in kept)

    order = generator.sample(names, len(names))
    drops = Drops(measure, limit)
    kept = least_set(order, drops)
    assert drops.passes(kept)
    assert [name for name in kept if drops.passes([other for other in kept if other != name])] == []
    assert sorted(kept, key=order.index) == kept
    if adds_up and sum(losses) <= limit:
        assert kept == []


def test_the_search_measures_few_of_many_operators() -> None:
    calls = []

    def measure(kept: tuple[str, ...]) -> float:
        calls.append(kept)
        return 0.0 if {"n3", "n7"} <= set(kept) else 1.0

    names = [f"n{k}" for k in range(200)]
    assert least_set(names, Drops(measure, 0.5)) == ["n3", "n7"]
    assert len(calls) == len(set(calls)) < 30


def test_few_sets_are_measured_where_all_operators_or_none_can_be_quantized() -> None:
    names = [f"n{k}" for k in range(200)]
    for kept in ([], names):
        measured: list[tuple[str, ...]] = []

        def measure(
            tried: tuple[str, ...], kept: list[str] = kept, measured: list[tuple[str, ...]] = measured
        ) -> float:
            measured.append(tried)
            return float(len(tried) < len(kept))

        assert least_set(names, Drops(measure, 0.5)) == kept
        assert len(measured) < 10 + len(kept)


def test_a_drop_of_exactly_the_limit_passes() -> None:
    """As in the gate, also where the difference of two accuracies is rounded up."""
    assert Drops(lambda kept: 0.9 - 0.85, 0.05).passes([])
    assert not Drops(lambda kept: 0.0501, 0.05).passes([])


@pytest.fixture(scope="session")
def outlier(once: Once, tiny_run: Path) -> Path:
    """A run exported in fp32; one channel before its second convolution is 1,000 times larger than the others.

    The weights that read the channel are as much smaller, so that only int8 is worse. The last layer is fitted to all
    images, because the run was trained for a few steps only.
    """

    def make(folder: Path) -> None:
        run = trusted(folder / "tiny" / "seed-0")
        shutil.copytree(tiny_run, run.folder, ignore=shutil.ignore_patterns("wandb", "deploy"))
        model = checkpoint.load_model(run).requires_grad_(False)
        streams = [open_split_of_run(run.config(), None, split, torch.device("cpu")) for split in ("train", "test")]
        images = torch.cat([stream.clean_images(np.arange(stream.num_images)) for stream in streams])
        targets = torch.nn.functional.one_hot(torch.cat([stream.labels for stream in streams])).double()
        features = model.layers[:-1](images).double()
        features = torch.cat([features, torch.ones(len(features), 1)], 1)
        fitted = torch.linalg.solve(features.T @ features + 1e-3 * torch.eye(features.shape[1]), features.T @ targets)
        model.layers[-1].weight.copy_(fitted[:-1].T)
        model.layers[-1].bias.copy_(fitted[-1])
        channel = model.layers[:3](images).mean((0, 2, 3)).argmax()
        model.layers[0].weight[channel] *= 1000
        model.layers[0].bias[channel] *= 1000
        model.layers[3].weight[:, channel] /= 1000
        checkpoint.save(run, model.state_dict(), int(checkpoint.latest(run).name.removeprefix("step-")))
        done = runner("export", run.folder, *TINY)
        assert done.returncode == 0, done.stderr

    return once("outlier", make) / "tiny" / "seed-0"


@pytest.fixture
def run(outlier: Path, tmp_path: Path) -> Run:
    return trusted(Path(shutil.copytree(outlier, tmp_path / "tiny" / "seed-0")))


def second_convolution(run: Run) -> str:
    proto, _ = exporter.read(exporter.path_of(run, "fp32"))
    return [node.name for node in proto.graph.node if node.op_type == "Conv"][1]


@pytest.mark.parametrize("kind", ["int8", "int8-cpu"])
def test_the_operator_that_loses_the_accuracy_is_found(kind: str, run: Run) -> None:
    lines: list[str] = []
    found = search(run, kind, None, 64, "minmax", 0.05, lines.append)
    name = second_convolution(run)
    assert found.kept == [name] if kind == "int8" else name in found.kept
    assert found.drop <= 0.05 < min(found.drop_of_all, *found.drop_without.values())
    assert found.images == "436 train images"
    assert found.measured == len(lines)
    operators = found.operators
    assert f"{kind}: 0 of {operators} operators in fp32: drop {100 * found.drop_of_all:.2f} points" in lines
    assert f"{kind}: {len(found.kept)} of {operators} operators in fp32: drop {100 * found.drop:.2f} points" in lines
    assert found.bytes_of_all < found.bytes
    assert max(found.added_errors, key=found.added_errors.get) == name
    assert files.read_json(run.deploy / f"search.{kind}.json", PrecisionSearch) == found
    # Measured again, from the file that is written for these operators.
    images = SearchImages(run, None, 64)
    calibration = precision.calibration_images(run, None, 64)
    file = precision.convert(run, kind, calibration, kept=found.kept)
    assert images.accuracy(parity.OnnxSession(file.path)) == pytest.approx(found.accuracy - found.drop)
    assert exporter.read(file.path)[1].kept == found.kept


def test_a_kept_operator_has_its_fp32_weights_and_inputs(run: Run) -> None:
    name = second_convolution(run)
    calibration = precision.calibration_images(run, None, 64)
    plain = onnx.load(precision.convert(run, "int8", calibration).path)
    kept = onnx.load(precision.convert(run, "int8", calibration, kept=[name]).path)
    before, after = (set(precision.quantized_operators(proto, "int8")) for proto in (plain, kept))
    assert before - after == {name}
    (node,) = [node for node in kept.graph.node if node.name == name]
    weights = {entry.name: onnx.numpy_helper.to_array(entry) for entry in kept.graph.initializer}
    expected = checkpoint.load_model(run).layers[3].weight.detach().numpy()
    assert np.array_equal(weights[node.input[1]], expected)
    raw = precision.add_raw_front_end(run, "int8")
    assert exporter.read(raw.path)[1].kept == [name]
    with pytest.raises(UserError, match=f"^--keep conv: expected an operator that int8 quantizes: .*{name}"):
        precision.convert(run, "int8", calibration, kept=["conv"])


class Branches(torch.nn.Module):
    """Two convolutions that read one value, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(images).relu()
        return (self.one(x) + self.other(x) + x).flatten(1)


@pytest.mark.parametrize("kind", ["int8", "int8-cpu"])
def test_a_kept_operator_reads_what_others_read_quantized(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    path = tmp_path / "fp32.onnx"
    onnx.save_model(exporter.to_proto(model, [3, 8, 8]), path)
    images = np.random.default_rng(0).standard_normal((32, 3, 8, 8), dtype=np.float32)
    quantizer = precision.Quantizer(path, kind, images, "minmax")
    convolutions = [node.name for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    assert set(convolutions) <= set(quantizer.operators)
    assert kind == "int8-cpu" or quantizer.operators == convolutions
    for kept in ([convolutions[1]], convolutions):
        proto = quantizer.quantize(kept)
        producers = {name: node.op_type for node in proto.graph.node for name in node.output}
        for node in proto.graph.node:
            if node.name in convolutions:
                assert (producers.get(node.input[0]) == "DequantizeLinear") == (node.name not in kept)
        onnx.checker.check_model(proto, full_check=True)
    if kind == "int8":  # without any quantized operator, the graph is the fp32 one
        logits = parity.OnnxSession(proto.SerializeToString())(images)
        assert np.array_equal(logits, parity.OnnxSession(path)(images))


@pytest.mark.parametrize("kind", ["int8", "int8-cpu"])
@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_ranges_that_are_kept_give_the_same_graph(kind: str, method: str, run: Run, tmp_path: Path) -> None:
    images, source = precision.calibration_images(run, None, 64), exporter.path_of(run, "fp32")
    once = precision.Quantizer(source, kind, images, method, tmp_path / "ranges.json")
    again = [once.quantize(()).SerializeToString() for _ in range(2)]
    assert again == [precision.Quantizer(source, kind, images, method).quantize(()).SerializeToString()] * 2


def test_a_failed_gate_proposes_operators_and_export_keeps_them(run: Run) -> None:
    quick = ("--calibration", 64, *TINY)
    assert runner("export", run.folder, "--precision", "int8", *quick).returncode == 0
    failed = runner("parity", run.folder, "--precision", "int8", "--device", "cpu", *TINY)
    assert failed.returncode == 1
    name = second_convolution(run)
    next_line = [line for line in failed.stderr.splitlines() if line.startswith("runner: next: ")]
    assert next_line[0].startswith(f"runner: next: runner export {run.folder} --precision int8 --search-precision, or ")
    assert name in next_line[0].partition("--keep ")[2].split()
    (row,) = [row for row in run.read_parity().rows if row.precision == "int8"]
    assert row.proposed[0] == name
    found = runner("export", run.folder, "--precision", "int8", "--search-precision", "--drop", 5, *quick)
    assert found.returncode == 0, found.stderr
    assert "1 of 3 operators stay in fp32" in found.stderr
    assert f"  {name}: " in found.stderr
    by_search = run.deploy.joinpath("model.int8.onnx").read_bytes()
    kept = runner("export", run.folder, "--precision", "int8", "--keep", name, *quick)
    assert kept.returncode == 0, kept.stderr
    assert run.deploy.joinpath("model.int8.onnx").read_bytes() == by_search


def test_all_images_of_calibration_leave_none_for_the_search(run: Run) -> None:
    done = runner("export", run.folder, "--precision", "int8", "--search-precision", "--calibration", 500, *TINY)
    assert done.returncode == 2
    assert "--calibration 500: expected fewer than the 500 training images" in done.stderr


def test_images_of_calibration_and_of_the_search_are_all_training_images(run: Run) -> None:
    """None is among both; a sorted dataset has images of all classes among the first."""
    stream = open_split_of_run(run.config(), None, "train", torch.device("cpu"))
    expected = stream.clean_images(np.arange(stream.num_images)).numpy()
    for count in (1, 64, 499):
        images = SearchImages(run, None, count)
        both = [precision.calibration_images(run, None, count), stream.clean_images(images.samples).numpy()]
        assert [len(part) for part in both] == [count, 500 - count]
        assert sorted(map(bytes, np.concatenate(both))) == sorted(map(bytes, expected))
    assert len(precision.calibration_images(run, None, 500)) == 500
    with pytest.raises(UserError, match=r"^--calibration 500: expected fewer than the 500 training images"):
        SearchImages(run, None, 500)
    labels = stream.labels.numpy()
    assert set(labels[SearchImages(run, None, 400).samples]) == set(labels)
    for count in (0, 501):
        with pytest.raises(UserError, match=f"^--calibration {count}: expected 1 to 500, the number of training im"):
            precision.calibration_images(run, None, count)


def test_validation_images_are_searched_where_there_are_some(run: Run) -> None:
    config = run.config()
    recipe = msgspec.structs.replace(config, recipe=type(config.recipe)(**{
        **{name: getattr(config.recipe, name) for name in config.recipe.__dataclass_fields__}, "validation": 80,
    }))  # fmt: skip
    files.write_json(run.run_json, recipe)
    images = SearchImages(run, None, 64)
    assert (images.split, len(images.samples)) == ("validation", 80)
    model = checkpoint.load_model(run)
    labels = images.stream.labels.numpy()
    with torch.no_grad():
        predicted = model(images.stream.clean_images(np.arange(80))).argmax(1).numpy()
    session = parity.OnnxSession(exporter.path_of(run, "fp32"))
    assert images.accuracy(session) == pytest.approx((predicted == labels).mean())
