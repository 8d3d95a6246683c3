"""Properties of the pure parts, for any input that hypothesis draws: order, schedules, resuming, reports."""

import json
import math
import random
import re
import shutil
import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from runner import experiments
from runner.common.files import write_json
from runner.config.recipe import SGD, Architecture, Augment, Constant, Cosine, Linear, OneCycle, Recipe, Schedule, Step
from runner.data import order
from runner.data.open import RankInfo, open_manifest, open_split
from runner.data.resident import ResidentBatches
from runner.data.stream import StreamOptions
from runner.report import collect, compare, markdown, page
from runner.report.compare import Outcome
from runner.report.run_record import RunRecord
from runner.run.folder import Run, find_runs
from runner.run.schema import GateResult
from runner.training import checkpoint
from runner.training.loop import LoopOptions, StoppedError, TrainingData, train
from runner.training.model import build_model
from runner.training.optim import lr_factor
from tests.support import many_runs
from tests.support.configs import config_of, trusted

FRACTION = st.floats(0, 1)
FEW = settings(max_examples=100, deadline=None, derandomize=True)


@given(
    images=st.integers(1, 300), batch=st.integers(1, 64), world=st.integers(1, 17), training=st.booleans(),
    drop_last=st.booleans(), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000), start=st.integers(0, 300),
)  # fmt: skip
@FEW
def test_the_ranks_slices_partition_the_epoch(
    images: int, batch: int, world: int, training: bool, drop_last: bool, seed: int, epoch: int, start: int
) -> None:
    """Each image once, or never if the last partial batch is dropped; from any step on, the same as from the first."""
    options = StreamOptions(
        (0.0,) * 3, (1.0,) * 3, batch, 0, world, training=training, drop_last=drop_last, image_size=(1, 1), seed=seed
    )
    labels, pixels = np.arange(images), np.zeros((images, 1, 1, 3), np.uint8)
    ranks = [ResidentBatches(pixels, labels, replace(options, rank=rank)) for rank in range(world)]
    steps = len(ranks[0])
    seen: list[int] = []
    for step in range(steps):
        parts = [stream.order_of(epoch)[stream.slice_of(step)].tolist() for stream in ranks]
        sizes = [len(part) for part in parts]
        assert sum(sizes) == ranks[0].size_of(step) <= batch
        assert max(sizes) - min(sizes) <= 1
        seen += [sample for part in parts for sample in part]
    assert len(set(seen)) == len(seen) == (images - images % batch if drop_last else images)
    if not training:
        assert seen == sorted(seen)
    first = min(start, steps)
    for stream in ranks[:2]:
        whole = [targets.tolist() for _, targets in stream.epoch(epoch)]
        assert [targets.tolist() for _, targets in stream.epoch(epoch, first)] == whole[first:]


@given(
    images=st.integers(1, 300), batch=st.integers(1, 64), world=st.integers(1, 4), repeats=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000),
)  # fmt: skip
@FEW
def test_repeated_augmentation_shows_few_images_several_times(
    images: int, batch: int, world: int, repeats: int, seed: int, epoch: int
) -> None:
    """The first images of the epoch's order, each several times in one batch; the ranks' slices form the same epoch."""
    options = StreamOptions(
        (0.0,) * 3, (1.0,) * 3, batch, 0, world, training=True, image_size=(1, 1), seed=seed,
        augment=Augment(repeats=repeats),
    )  # fmt: skip
    labels, pixels = np.arange(images), np.zeros((images, 1, 1, 3), np.uint8)
    ranks = [ResidentBatches(pixels, labels, replace(options, rank=rank)) for rank in range(world)]
    parts = zip(*([targets.tolist() for _, targets in stream.epoch(epoch)] for stream in ranks), strict=True)
    batches = [[sample for part in step for sample in part] for step in parts]
    shown = [sample for one in batches for sample in one]
    counts = np.bincount(shown, minlength=images)
    assert len(shown) == images
    first = order.epoch_order(images, seed, epoch)
    assert counts[first].tolist() == np.clip(images - repeats * np.arange(images), 0, repeats).tolist()
    for one in batches:
        if batch % repeats == 0 and len(one) == batch:  # all copies, and neighbors differ
            assert {one.count(sample) for sample in one} == {repeats}
            assert batch == repeats or all(a != b for a, b in pairwise([one[-1], *one]))
    slots = ranks[0].slots
    assert np.array_equal(first[slots // repeats], shown)
    assert len({*zip(shown, (slots % repeats).tolist(), strict=True)}) == images  # no copy is shown twice


SCHEDULES = st.one_of(
    st.builds(Constant, warmup=FRACTION),
    st.builds(
        Step,
        milestones=st.lists(FRACTION, max_size=4).map(lambda milestones: tuple(sorted(milestones))),
        factor=FRACTION,
        warmup=FRACTION,
    ),
    st.builds(Cosine, warmup=FRACTION, final=FRACTION),
    st.builds(Linear, warmup=FRACTION, final=FRACTION),
    st.builds(OneCycle, warmup=FRACTION, initial=FRACTION, final=FRACTION),
)


@given(schedule=SCHEDULES, steps=st.integers(1, 400))
@FEW
def test_a_schedule_stays_within_its_bounds_and_has_no_jumps(schedule: Schedule, steps: int) -> None:
    """Except at the milestones of Step. The longest step of half a cosine is π/2 times that of a line."""
    factors = [lr_factor(schedule, step, steps) for step in range(steps)]
    assert all(-1e-12 <= factor <= 1 + 1e-12 for factor in factors)
    if isinstance(schedule, Step):
        allowed = [1.0] if schedule.milestones else [math.inf]
        drops = sum(after < before for before, after in pairwise(factors))
        assert drops <= len(schedule.milestones)
    else:
        warmup = schedule.warmup * steps
        allowed = [math.pi / 2 / max(1.0, length) for length in (warmup - 1, steps - warmup - 1)]
    changes = np.abs(np.diff(factors))
    assert changes.max(initial=0.0) <= max(allowed) + 1e-9


@pytest.mark.every
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_training_stopped_anywhere_ends_with_the_same_bits(small_data: Path, tmp_path: Path, ema: float) -> None:
    """In this process; killed processes and several ranks are in test_resume.py."""
    prepared = open_manifest(small_data)
    augment = Augment(policy="rand", erase=0.3, repeats=3)
    recipe = Recipe(3, 90, SGD(0.05), ema=ema, schedule=Cosine(), drop_last=False, augment=augment)
    splits = {s: open_split(small_data, prepared, s, recipe, RankInfo(torch.device("cpu"))) for s in ("train", "test")}
    architecture = Architecture("tests.support.models.tiny:Tiny", {"norm": True, "dropout": 0.2})
    data = TrainingData(splits["train"], splits["test"], None, 10)
    accelerator = Accelerator(cpu=True)
    number = 0

    def weights(stops: list[int], **options: Any) -> dict[str, torch.Tensor]:
        """Trains, stopping after each of the given steps, and returns what is kept."""
        nonlocal number
        number += 1
        run = trusted(tmp_path / str(number))
        write_json(run.run_json, config_of(architecture=architecture, dataset=prepared.name))
        state = None
        for stop in [*stops, 10**9]:
            count = state["step"] if state else 0

            def should_stop(stop: int = stop) -> bool:
                nonlocal count
                count += 1
                return count >= stop

            model = build_model(architecture, recipe, 0, splits["train"].first_images, None)
            try:
                train(model, recipe, data, accelerator, run, 0, options=LoopOptions(
                    resume=state, should_stop=should_stop, **options))  # fmt: skip
            except StoppedError:
                state = checkpoint.read_state(checkpoint.latest(run))
            else:
                break
            finally:
                accelerator.free_memory()
        return checkpoint.load_model(run).state_dict()

    expected = weights([])
    steps = recipe.epochs * len(splits["train"])

    @given(
        stops=st.lists(st.integers(1, steps - 1), min_size=1, max_size=3, unique=True).map(sorted),
        evaluate_every=st.integers(1, 4), checkpoint_every=st.none() | st.integers(1, 5),
        checkpoint_seconds=st.sampled_from([0.0, 3600.0]),
    )  # fmt: skip
    @settings(max_examples=12, deadline=None, derandomize=True)
    def check(stops: list[int], **options: Any) -> None:
        found = weights(stops, **options)
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items()), (stops, options)

    check()


# --- reports of any set of runs -------------------------------------------------------------------------

EXPERIMENTS = {
    name: replace(experiment, recipe=replace(experiment.recipe, epochs=3))
    for name, experiment in (
        ("soni-2", experiments.get("soni-2")),
        ("podeti-alexnet", experiments.get("podeti-alexnet")),
        ("a|<i>`b`[c](d)", experiments.get("soni-4")),  # which a run folder from someone else could have
    )
}


@dataclass(frozen=True)
class AnyRun:
    """A run folder: `root`, `experiment` and `name` are its place, and `fault` a number in it that is not finite."""

    root: str
    experiment: str
    name: str
    seed: int
    lr: float
    dataset: tuple[str, str]  # name and fingerprint
    epochs: float | None  # of 3; None for an unfinished run
    accuracy: float
    scored: bool | None  # whether its files passed the gate; None if it is not deployed
    fault: str

    @property
    def readable(self) -> bool:
        """Whether it has the numbers without which it cannot be compared."""
        return not (self.fault == "accuracy" and self.epochs) and not (self.fault == "p90" and self.scored is not None)

    @property
    def training(self) -> tuple[object, ...]:
        """What runs that are seeds of one training have in common."""
        return self.experiment, self.lr, self.dataset[1]

    def write(self, folder: Path) -> Path:
        experiment = EXPERIMENTS[self.experiment]
        run = Run(folder / self.root / f"{list(EXPERIMENTS).index(self.experiment)}" / self.name)
        many_runs.write_run(run, self.experiment, experiment, self.seed, "0", random.Random(self.name))
        config, summary, latency = run.config(), run.read_summary(), run.read_latency()
        optimizer = msgspec.structs.replace(experiment.recipe.optimizer, lr=self.lr)
        changed = {} if self.lr == 0.1 else {"recipe.optimizer.lr": (0.1, self.lr)}
        recipe, (name, fingerprint) = replace(experiment.recipe, optimizer=optimizer), self.dataset
        dataset = msgspec.structs.replace(config.dataset, name=name, fingerprint=fingerprint)
        write_json(run.run_json, msgspec.structs.replace(config, recipe=recipe, overrides=changed, dataset=dataset))
        results = {"test_accuracy": self.accuracy, "epochs": self.epochs or 0.0}
        write_json(run.summary, msgspec.structs.replace(summary, **results))
        gate = GateResult(accuracy_change=0.0, agreement=1.0, passed=self.scored is True)
        rows = [msgspec.structs.replace(row, gate=row.gate and gate) for row in latency.rows]
        write_json(run.latency, msgspec.structs.replace(latency, rows=rows))
        parity = run.read_parity()
        rows = [msgspec.structs.replace(row, passed=self.scored is True) for row in parity.rows]
        write_json(run.parity, msgspec.structs.replace(parity, rows=rows))
        for path, key in ((run.summary, "test_accuracy"), (run.summary, "test_loss"), (run.latency, "p90_ms")):
            if self.fault and self.fault in key:
                path.write_text(re.sub(rf'"{key}": [\d.e-]+', f'"{key}": NaN', path.read_text()))
        if self.fault == "loss":
            run.metrics.write_text(re.sub(r'"train/loss":[\d.e-]+', '"train/loss":Infinity', run.metrics.read_text()))
        if self.epochs is None:
            run.summary.unlink()
        if self.scored is None:
            shutil.rmtree(run.deploy)
        return run.folder


ANY_RUNS = st.lists(
    st.builds(
        AnyRun,
        root=st.sampled_from(["new", "old"]),
        experiment=st.sampled_from(list(EXPERIMENTS)),
        name=st.sampled_from(["a", "b", "c"]),
        seed=st.integers(0, 2),
        lr=st.sampled_from([0.1, 0.01]),
        dataset=st.sampled_from([("CIFAR-10", "0" * 16), ("CIFAR-10", "1" * 16), ("own|<b>", "2" * 16)]),
        epochs=st.sampled_from([3.0, 3.0, 1.5, None]),
        accuracy=st.integers(0, 10_000).map(lambda hits: hits / 10_000),
        scored=st.sampled_from([True, False, None]),
        fault=st.sampled_from(["", "", "", "loss", "accuracy", "p90"]),
    ),
    min_size=1, max_size=8, unique_by=lambda run: (run.root, run.experiment, run.name),
)  # fmt: skip


@given(runs=ANY_RUNS)
@settings(FEW, max_examples=15)
def test_a_report_of_any_runs_has_each_of_them_once(runs: list[AnyRun]) -> None:
    """On the page, in the Markdown and among the outcomes, which count runs and seeds."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"), mock.patch(PLOTLY, return_value=""):
        by_folder = {run.write(Path(folder)): run for run in runs}
        records, unreadable = collect.read_all(find_runs([Path(folder)]))
        drawn = [by_folder[record.run.folder] for record in records]
        html, text = page.render(records, unreadable), markdown.render(records, unreadable)
        order = sorted(by_folder)
    assert [record.run.folder for record in records] == [path for path in order if by_folder[path].readable]
    assert [entry.folder for entry in unreadable] == [str(path) for path in order if not by_folder[path].readable]
    assert len({record.name for record in records}) == len(records)
    finished = [run for run in drawn if run.epochs]
    counts = f"{len(finished)} run{'' if len(finished) == 1 else 's'} compared"
    for count, what in ((len(drawn) - len(finished), "unfinished"), (len(unreadable), "not read")):
        counts += f", {count} {what}" if count else ""
    outcomes = compare.outcomes(records)
    check_outcomes(outcomes, finished)
    check_page(html, records, drawn, counts, len(outcomes), len(unreadable))
    tables = markdown_tables(text)
    assert f"\n{counts.removesuffix(f', {len(unreadable)} not read')}, on " in f"\n{text}"
    assert len(tables.pop("experiment")) == len(outcomes)
    assert len(tables.pop("folder", [])) == len(unreadable)
    measured = 3 * sum(run.scored is not None for run in drawn)
    assert len(tables.pop("run", [])) == measured
    assert not tables


PLOTLY = "plotly.offline.get_plotlyjs"  # most of a page, and the same in all


def check_outcomes(outcomes: list[Outcome], finished: list[AnyRun]) -> None:
    """Each outcome is of all seeds of one training, in the order of their first runs."""
    groups: dict[tuple[object, ...], list[AnyRun]] = {}
    for run in finished:
        groups.setdefault(run.training, []).append(run)
    assert [outcome.runs for outcome in outcomes] == [len(group) for group in groups.values()]
    assert len({(outcome.dataset, outcome.label) for outcome in outcomes}) == len(outcomes)
    for outcome, group in zip(outcomes, groups.values(), strict=True):
        seeds, accuracies = sorted({run.seed for run in group}), [run.accuracy for run in group]
        assert outcome.seeds == seeds
        assert outcome.test_accuracy == pytest.approx(statistics.mean(accuracies))
        deviation = statistics.stdev(accuracies) if len(seeds) > 1 else None
        assert outcome.test_accuracy_std == (deviation if deviation is None else pytest.approx(deviation))


class Page(HTMLParser):
    """Checks that every element ends where it may, and collects ids, links, and the rows of the table of runs."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.positions: list[int] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs)
        if tag not in ("meta", "link", "input", "img"):
            self.open.append(tag)
        self.ids += filter(None, [found.get("id")])
        self.links += [link[1:] for link in filter(None, [found.get("href")]) if link[0] == "#"]
        if "data-run" in found:
            self.positions.append(int(found["data-run"] or -1))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def check_page(
    html: str, records: list[RunRecord], drawn: list[AnyRun], counts: str, outcomes: int, unreadable: int
) -> None:
    """The table lists the runs in their order; each has a section and its data; the verdict names the best."""
    shown = Page(html)
    positions = list(range(len(records)))
    assert shown.positions == positions
    assert len(set(shown.ids)) == len(shown.ids)
    assert set(shown.links) <= set(shown.ids)
    assert [name for name in shown.ids if re.fullmatch(r"run-\d+", name)] == [f"run-{n}" for n in positions]
    assert shown.texts["h1"] == [counts]
    names = [record.name for record in records]
    assert [name for name in shown.texts.get("h3", []) if name in names] == names
    (data,) = [text for text in shown.texts["script"] if text.startswith("{")]
    runs = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["runs"]
    assert [(run["position"], run["name"]) for run in runs] == [(n, record.name) for n, record in enumerate(records)]
    gated = [min(r.p50_ms for r in record.latency.rows if r.gate) if run.scored else None
             for record, run in zip(records, drawn, strict=True)]  # fmt: skip
    assert [run["gated_ms"] for run in runs] == gated
    rows = html[html.index('id="experiments"') : html.index('id="tradeoff-title"')].split("<tbody>")[1]
    assert rows.count("<tr>") == outcomes
    assert html.count("<li><code>") == unreadable
    overview = compare.summarize_runs(records)
    finished = [(record, run) for record, run in zip(records, drawn, strict=True) if run.epochs]
    best: dict[str, tuple[bool, float]] = {}
    for record, run in finished:
        best[record.dataset] = max(best.get(record.dataset, (False, -1.0)), (run.epochs == 3, run.accuracy))
    assert [(name, records[one].summary.test_accuracy) for name, one in overview.best.items()] == [
        (name, accuracy) for name, (_, accuracy) in sorted(best.items())
    ]
    gates = Counter({True: "passed", False: "failed", None: "not scored"}[run.scored] for _, run in finished)
    assert {result: len(runs) for result, runs in overview.gate.items()} == gates
    assert len(overview.incomplete) == sum(run.epochs == 1.5 for _, run in finished)
    assert len(overview.unfinished) == len(records) - len(finished)


def markdown_tables(text: str) -> dict[str, list[str]]:
    """Returns the rows of all tables by the title of their first column; those of one title together."""
    tables: dict[str, list[str]] = {}
    for block in re.split(r"\n\n", text):
        lines = block.strip().split("\n")
        if lines[0].startswith("|"):
            cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
            assert len(set(cells)) == 1, block
            assert set(lines[1]) <= set("|- ")
            tables.setdefault(lines[0].split("|")[1].strip(), []).extend(lines[2:])
    return tables
