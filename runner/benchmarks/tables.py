"""Generates the tables of README.md, runner/benchmarks/README.md and launch/searches.md from the committed results.

A cell without a result says so.

python -m runner.benchmarks.tables --write
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import msgspec

from runner import experiments
from runner.benchmarks import program, quantizers
from runner.benchmarks import search as searches
from runner.benchmarks.deploy import BackendRow
from runner.benchmarks.gpu.ledger import Finding, PartResults, was_measured
from runner.benchmarks.measure import Spread
from runner.benchmarks.papers import PaperOutcome
from runner.common.errors import UserError
from runner.common.files import read_json
from runner.config.recipe import Experiment
from runner.report.markdown import percent, table
from runner.run.schema import Hardware, LatencyRow, ParityRow, PrecisionSearch

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "README.md"
SEARCHES = Path(__file__).parents[2] / "launch" / "searches.md"
BENCHMARKS_README = Path(__file__).parent / "README.md"
MISSING = "not measured"
AUGMENTATIONS = {
    "loader-rand-cpu": ", RandAugment",
    "loader-trivial-cpu": ", TrivialAugmentWide",
    "loader-erase-cpu": ", random erasing",
    "loader-jitter-cpu": ", color jitter",
    "loader-resized-crop-cpu": ", random resized crop",
}


@dataclass(frozen=True)
class Tables:
    """Print all tables, or write them into their documents."""

    write: bool = False
    """Write each between its markers in README.md, runner/benchmarks/README.md or launch/searches.md, and draw the
    picture of the results."""

    def __call__(self) -> None:
        for document, tables in TABLES.items():
            if self.write:
                document.write_text(insert_tables(document, tables))
                print(f"{document}: {len(tables)} tables")
            else:
                print(*(f"## {name}\n\n{make()}\n" for name, make in tables.items()), sep="\n")
        if self.write:
            (RESULTS / "results.png").write_bytes(draw_results())


def insert_tables(document: Path, tables: dict[str, Callable[[], str]]) -> str:
    """Returns the text of a document with every table inserted between its markers.

    Raises:
        UserError: a table's markers are missing.
    """
    text = document.read_text()
    for name, make in tables.items():
        first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(first) != 1 or text.count(last) != 1:
            raise UserError(f"{document}: expected {first} and {last} once each")
        before, rest = text.split(first)
        text = f"{before}{first}\n{make()}\n{last}{rest.split(last)[1]}"
    return text


class ParityRun(msgspec.Struct):
    """The parity report of one trained run."""

    experiment: str
    eager_accuracy: float
    rows: list[ParityRow]
    seed: int = 0
    epochs: float = 0.0
    dataset: str = ""
    searches: list[PrecisionSearch] = []


class ParityFile(msgspec.Struct):
    """The content of parity-cpu.json, which parity.py writes."""

    hardware: Hardware
    versions: dict[str, str]
    runs: list[ParityRun]


class DeployFile(msgspec.Struct):
    """The content of deploy-cpu.json, apart from its ratios."""

    hardware: Hardware
    versions: dict[str, str]
    backends: list[BackendRow] = []


def read_part(name: str) -> PartResults | None:
    """Returns the results of a part of the GPU benchmark; None if it has not run.

    Raises:
        UserError: the file is from a rehearsal on a CPU.
    """
    path = RESULTS / f"{name}-gpu.json"
    if not path.is_file():
        return None
    part = read_json(path, PartResults)
    if part.rehearsal or not part.hardware.gpus:
        raise UserError(f"results/{path.name}: expected measurements of a GPU, found a rehearsal")
    return part


def read_findings(name: str) -> dict[str, Finding]:
    """Returns the measured findings of a part of the GPU benchmark by name; empty if it has not run."""
    part = read_part(name)
    return {key: finding for key, finding in part.findings.items() if was_measured(finding)} if part else {}


def complete_experiments() -> str:
    """Returns the table of experiments that were trained in full: reported and reproduced accuracy."""
    known, rows, legend = experiments.load(), [], _Legend()
    for file in ("papers-cpu", "papers-gpu"):
        for outcome in read_unchanged_outcomes(file):
            name = outcome.experiment
            if name in known and not outcome.incomplete:
                letter = legend.letter(outcome.hardware, outcome.versions)
                rows.append([f"`{name}`", _reported(known[name]), _accuracy(outcome), letter])
    titles = ["experiment", "reported", "measured", "on"]
    return f"{table(titles, rows or [_missing_row(titles)])}\n\n{legend}"


def draw_results() -> bytes:
    """Draws the experiments that were trained in full, as PNG: reported and measured accuracy, and the cost in MACs.

    An experiment that was trained on several machines has a marker for each.
    """
    import io

    from matplotlib.figure import Figure

    known = experiments.load()
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    reported_axes, cost_axes = figure.subplots(1, 2)
    names: list[str] = []
    datasets: set[str] = set()
    accuracies, costs = [100.0], [100.0]  # the axes contain all of them
    for file, marker, label in (("papers-cpu", "o", "measured on a CPU"), ("papers-gpu", "s", "measured on a GPU")):
        reported_axes.plot([], [], marker, color="gray", label=label)
        for outcome in read_unchanged_outcomes(file):
            name = outcome.experiment
            if name not in known or outcome.incomplete:
                continue
            is_first = name not in names
            names += [name] if is_first else []
            datasets.add(outcome.dataset)
            accuracy = 100 * (outcome.test_accuracy if outcome.reproduced is None else outcome.reproduced)
            color, macs = f"C{names.index(name)}", known[name].macs
            reported_axes.plot(accuracy, names.index(name), marker, color=color)
            accuracies += [accuracy, 100 * outcome.test_accuracy]
            if macs is None:  # not counted
                continue
            millions = macs / 1_000_000
            costs.append(millions)
            cost_axes.plot(millions, 100 * outcome.test_accuracy, marker, color=color)
            if is_first:
                cost_axes.annotate(
                    name, (millions, 100 * outcome.test_accuracy), (0, -16), textcoords="offset points", fontsize=8,
                    ha="center",
                )  # fmt: skip
    reported_axes.plot([], [], "|", color="black", markersize=14, label="reported by the paper")
    for position, name in enumerate(names):
        if reported := known[name].reported:
            reported_axes.plot(100 * reported.accuracy, position, "|", color="black", markersize=18)
            accuracies.append(100 * reported.accuracy)
    lowest = 10 * (min(accuracies) // 10)
    reported_axes.legend(fontsize=8, loc="lower left")
    reported_axes.set(xlabel="accuracy, %", xlim=(lowest, 100), ylim=(len(names) - 0.5, -0.5))
    reported_axes.set_yticks(range(len(names)), names)
    ticks = [tick for tick in (20, 50, 100, 200, 500, 1000, 2000) if min(costs) / 2 < tick < 2 * max(costs)]
    cost_axes.set(
        xlabel="million multiply-accumulates per image",
        ylabel="test accuracy, %",
        xscale="log",
        xlim=(0.6 * min(costs), 1.8 * max(costs)),
        ylim=(lowest, 100),
    )
    cost_axes.set_xticks(ticks, list(map(str, ticks)))
    cost_axes.minorticks_off()
    for axes in (reported_axes, cost_axes):
        axes.grid(alpha=0.3)
    figure.suptitle(f"Complete recipes on {', '.join(sorted(datasets))}", fontsize=10)
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def all_experiments() -> str:
    """Returns the table of all experiments: reported accuracy, and accuracy reproduced on the CPU and on a GPU."""
    measured = [read_unchanged_outcomes(f"papers-{device}") for device in ("cpu", "gpu")]
    rows = []
    for name, experiment in experiments.load().items():
        rows.append(
            [
                f"`{name}`",
                f"{experiment.parameters:,}",
                f"{(experiment.macs or 0) / 1e6:,.0f}",
                _reported(experiment),
                *(
                    "; ".join(_accuracy(one) for one in outcomes if one.experiment == name) or MISSING
                    for outcomes in measured
                ),
            ]
        )
    titles = ["experiment", "parameters", "M MACs", "reported", "measured, CPU", "measured, GPU"]
    machines = dict.fromkeys(_machine(outcome.hardware, outcome.versions) for outcome in itertools.chain(*measured))
    return f"{table(titles, rows)}\n\nMeasured on: {'; '.join(machines) or MISSING}."


def read_unchanged_outcomes(name: str) -> list[PaperOutcome]:
    """Returns the outcomes in a file, except those that changed more than the number of epochs.

    Raises:
        UserError: an experiment has two outcomes of one precision on one machine.
    """
    path = RESULTS / f"{name}.json"
    entries = read_json(path, dict[str, Any]).get("experiments", []) if path.is_file() else []
    outcomes = msgspec.convert(entries, list[PaperOutcome], strict=False)
    unchanged = [one for one in outcomes if not one.overrides.keys() - {"recipe.epochs"} and not one.teacher]
    keys = [f"{one.experiment} in {one.precision} on {_machine(one.hardware, one.versions)}" for one in unchanged]
    if len(set(keys)) < len(keys):
        raise UserError(
            f"results/{name}.json: expected one entry for each experiment on a machine, found {sorted(keys)}"
        )
    return unchanged


def _reported(experiment: Experiment) -> str:
    """Returns the accuracy that a paper reports, with its split and epoch; a dash if there is none."""
    reported = experiment.reported
    return f"{reported.accuracy:.2%} ({reported.on}, {reported.epoch})" if reported else "–"


def _accuracies(outcomes: list[PaperOutcome], name: str) -> str:
    """Returns the accuracies of an experiment as text."""
    return "; ".join(_accuracy(one) for one in outcomes if one.experiment == name) or MISSING


def _accuracy(outcome: PaperOutcome) -> str:
    """Returns an accuracy as text, with its dataset, epochs and seeds."""
    if outcome.reproduced is None:
        text = percent(outcome.test_accuracy, outcome.test_accuracy_std)
    else:
        text = percent(outcome.reproduced, outcome.reproduced_std)
    if outcome.difference is not None:
        text += f" ({100 * outcome.difference:+.2f})"
    epochs = f"{outcome.epochs:g} of {outcome.recipe_epochs} epochs"
    seeds = f"seed{'s' if outcome.runs > 1 else ''} {', '.join(map(str, outcome.seeds))}"
    return f"{text}, {outcome.dataset}, {epochs}, {seeds}, {outcome.precision}"


def ratios() -> str:
    """Returns the table of ratios from the benchmarks of loaders, overhead, ranks, deployment and GPU speed."""
    rows, legend = [], _Legend()
    for name in ("loader-cpu", *AUGMENTATIONS, "overhead-cpu", "scaling-cpu", "deploy-cpu", "speed-gpu"):
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            rows.append([name, MISSING, "", ""])
            continue
        result = read_json(path, dict[str, Any])
        letter = legend.letter(msgspec.convert(result["hardware"], Hardware), result["versions"])
        # Each finding of a part of the GPU benchmark has its own ratios and goals.
        for finding in result.get("found", {name: result}).values():
            for key, value in finding.items():
                if key.startswith("ratio_") and isinstance(value, dict) and "median" in value:
                    title = key.removeprefix("ratio_").replace("_to_", " ÷ ").replace("_", " ")
                    title += AUGMENTATIONS.get(name, "")
                    goal = finding.get("goals", {}).get(key, "–")
                    rows.append([title, _ratio_text(msgspec.convert(value, Spread)), goal, letter])
    return f"{table(['ratio', 'median (spread)', 'goal', 'on'], rows)}\n\n{legend}"


def cpu_latencies() -> str:
    """Returns the table of latencies relative to eager torch, with one column per backend and precision."""
    path = RESULTS / "deploy-cpu.json"
    result = read_json(path, DeployFile) if path.is_file() else None
    if result is None or not result.backends:
        return f"Latency of every backend: {MISSING}."
    columns = list(dict.fromkeys((row.backend, row.precision) for row in result.backends))
    networks: dict[tuple[str, str, int], dict[tuple[str, str], str]] = {}
    for row in result.backends:
        trained = f"{row.epochs:.2f} epochs, seed {row.seed}, {row.dataset}"
        cell = f"{row.ratio.median:.2f} ({row.ratio.min:.2f} to {row.ratio.max:.2f})"
        cells = networks.setdefault((row.experiment, trained, row.batch), {})
        cells[row.backend, row.precision] = f"**{cell}**" if row.fastest else cell
    titles = ["experiment", "trained", "batch", *(f"{backend} {precision}" for backend, precision in columns)]
    rows = [
        [f"`{experiment}`", trained, str(batch), *(cells.get(column, MISSING) for column in columns)]
        for (experiment, trained, batch), cells in networks.items()
    ]
    return f"{table(titles, rows)}\n\nMeasured on: {_machine(result.hardware, result.versions)}."


def _ratio_text(ratio: Spread) -> str:
    text = f"{ratio.median:.3g}"
    return f"{text} ({ratio.min:.3g} to {ratio.max:.3g}, {ratio.rounds} rounds)" if ratio.rounds > 1 else text


def correctness() -> str:
    """Returns the table of the GPU benchmark's correctness part."""
    findings = read_findings("correctness")
    tests = read_findings("tests").values()
    passed, failed = (sum(counts) for counts in ([t["passed"] for t in tests], [len(t["failed_tests"]) for t in tests]))
    rows = [["GPU tests", f"{passed} passed, {failed} failed" if tests else MISSING]]
    for name, finding in findings.items():
        if name.startswith("batches/"):
            rows.append(
                [
                    f"GPU pixels compared with CPU pixels, {name.removeprefix('batches/')}",
                    f"{finding['equal_share']:.4%} equal, largest difference {finding['largest_difference']:g} of 255",
                ]
            )
    losses = findings.get("losses", {})
    for precision in ("bf16", "fp16"):
        loss = losses.get(precision)
        text = f"{loss['mean']:.2%} mean, {loss['most']:.2%} max" if loss else MISSING
        rows.append([f"relative difference of the {precision} training loss from fp32", text])
    resume, one_rank, all_ranks = (findings.get(name) for name in ("resume", "ddp/one", "ddp/all"))
    rows += [
        [
            "killed and resumed run compared with an uninterrupted one",
            _bit_identity(resume, "same_weights", "weights"),
        ],
        ["one DDP process compared with no DDP", _bit_identity(one_rank, "same_gradients", "gradients")],
        [
            "relative difference of the training loss on all GPUs from one",
            f"{all_ranks['difference']['most']:.2e} max, {all_ranks['ranks']} ranks" if all_ranks else MISSING,
        ],
    ]
    return _with_caption("correctness", table(["check", "result"], rows))


def _bit_identity(finding: Finding | None, key: str, what: str) -> str:
    if finding is None:
        return MISSING
    return f"bit-identical {what}" if finding[key] else f"different {what}"


def training_speeds() -> str:
    """Returns the table of training speeds: images per second, share of the peak, and memory of each architecture."""
    findings = read_findings("speed")
    rows = []
    for name in dict.fromkeys(key.split("/")[1] for key in findings if key.startswith("architectures/")):
        modes = [findings.get(f"architectures/{name}/{mode}") for mode in ("eager", "compiled", "graphs")]
        best = max(filter(None, modes), key=lambda finding: finding["images_per_second"]["median"])
        rates = [f"{finding['images_per_second']['median']:,.0f}" if finding else MISSING for finding in modes]
        limit = best.get("limit_images_per_second")
        utilization = [f"{limit:,.0f}", f"{best['utilization']:.1%}"] if limit else ["–", "–"]
        rows.append([f"`{name}`", *rates, *utilization, f"{best['peak_memory_gib']:.1f}"])
    titles = ["img/s of", "eager", "compiled", "CUDA graphs", "limit of arithmetic", "best ÷ limit", "GiB"]
    return _with_caption("speed", table(titles, rows or [_missing_row(titles)]))


def speedrun() -> str:
    """Returns the table of the speed run: seconds to an accuracy, for this project and for another one."""
    findings = read_findings("speedrun").get("together", {})
    rows = []
    for name in ("ours/eager", "ours/graphs", "peer"):
        finding = findings.get(name)
        if not finding:
            rows.append([name, *[MISSING] * 3])
            continue
        ratio = finding.get("ratio_to_peer")
        rows.append(
            [
                name,
                f"{finding['accuracy']:.2%} ± {finding['accuracy_std']:.2%}, {finding['trainings']} seeds",
                f"{finding['seconds']:.2f} ± {finding['seconds_std']:.2f}",
                f"{ratio['median']:.2f}" if ratio else "–",
            ]
        )
    titles = ["", "accuracy", "seconds", "÷ peer (goal ≤ 0.9)"]
    return _with_caption("speedrun", table(titles, rows))


class MuonFile(msgspec.Struct):
    """The content of muon-gpu.json: the accuracy of the speed run by seed, for several variants of its optimizer."""

    hardware: Hardware
    driver: str
    versions: dict[str, str]
    dataset: str
    series: dict[str, dict[str, float]]


def muon() -> str:
    """Returns the table of the optimizer's variants; each is compared with the one above it, seed by seed."""
    titles = ["Muon", "accuracy", "seeds", "points over the row above, paired ± standard error"]
    if not (RESULTS / "muon-gpu.json").is_file():
        return table(titles, [_missing_row(titles)])
    found = read_json(RESULTS / "muon-gpu.json", MuonFile)
    rows = []
    previous: dict[str, float] = {}
    for name, accuracies in found.series.items():
        differences = [100 * (accuracies[seed] - previous[seed]) for seed in accuracies if seed in previous]
        several = len(differences) > 1
        paired = f"{mean(differences):+.2f} ± {stdev(differences) / len(differences) ** 0.5:.2f}" if several else "–"
        rows.append([name, f"{mean(accuracies.values()):.2%}", str(len(accuracies)), paired])
        previous = accuracies
    machine = f"{_machine(found.hardware, found.versions)}, driver {found.driver}, {found.dataset}"
    return f"{table(titles, rows)}\n\nMeasured on: {machine}."


def profile() -> str:
    """Returns what a training step spends its time on, as text and as a figure."""
    texts = [finding["summary"] for finding in read_findings("profile").values() if "summary" in finding]
    if not texts:
        return f"Where the time of a step goes: {MISSING}."
    return "\n\n".join([*texts, "![Shares of the device time of a step](results/profile.png)"])


def gpu_latencies() -> str:
    """Returns the table of GPU latencies by backend and precision, for files that passed the parity gate."""
    rows = []
    for name, finding in read_findings("deployment").items():
        if "parity" in name or "rows" not in finding:
            continue
        for row in msgspec.convert(finding["rows"], list[LatencyRow]):
            if row.measured:
                percentiles = [f"{figure:.3f}" for figure in (row.p50_ms, row.p90_ms, row.p99_ms)]
                setup = [f"`{name.split('/')[0]}`", row.backend, row.precision, str(row.batch)]
                rows.append([*setup, *percentiles, f"{row.images_per_second:,.0f}"])
    titles = ["experiment", "backend", "precision", "batch", "p50 ms", "p90 ms", "p99 ms", "img/s"]
    return _with_caption("deployment", table(titles, rows or [_missing_row(titles)]))


def parity() -> str:
    """Returns the table of parity results of trained runs, on the CPU and on a GPU."""
    rows, legend = [], _Legend()
    path = RESULTS / "parity-cpu.json"
    if path.is_file():
        cpu = read_json(path, ParityFile)
        letter = legend.letter(cpu.hardware, cpu.versions)
        for report in cpu.runs:
            trained = f"{report.epochs:.2f} epochs, seed {report.seed}, {report.dataset}"
            rows += [_parity_cells(report, row, trained, letter) for row in report.rows]
    if gpu := read_part("deployment"):
        letter = legend.letter(gpu.hardware, gpu.versions)
        findings = read_findings("deployment")
        for name, finding in findings.items():
            if "/parity/" in name:
                experiment = name.split("/")[0]
                report = msgspec.convert(finding | {"experiment": experiment}, ParityRun)
                trained = f"{findings[f'{experiment}/weights']['trained']}, seed 0, {gpu.dataset}"
                rows += [_parity_cells(report, row, trained, letter) for row in report.rows]
    titles = ["experiment", "trained", "precision", "backend", "torch", "exported", "same class", "passed", "on"]
    return f"{table(titles, rows or [_missing_row(titles)])}\n\n{legend}"


def _parity_cells(report: ParityRun, row: ParityRow, trained: str, letter: str) -> list[str]:
    return [
        f"`{report.experiment}`",
        trained,
        row.precision,
        f"{row.backend} {row.provider.removesuffix('ExecutionProvider')}",
        f"{report.eager_accuracy:.2%}",
        f"{row.accuracy:.2%} ({100 * row.accuracy_change:+.2f})",
        f"{row.agreement:.2%}",
        "yes" if row.passed else f"no: {row.limit}",
        letter,
    ]


def precision_searches() -> str:
    """Returns the table of searches for the operators that stay in fp32."""
    path = RESULTS / "parity-cpu.json"
    cpu = read_json(path, ParityFile) if path.is_file() else None
    titles = [
        "experiment", "precision", "limit", "drop, all in int8", "in fp32", "drop",
        "drop if one of them is int8 as well",
        "MB", "MB, all in int8", "measured",
    ]  # fmt: skip
    rows = [
        [
            f"`{report.experiment}`", search.precision, f"{100 * search.limit:g}", f"{100 * search.drop_of_all:.2f}",
            f"{len(search.kept)} of {search.operators}", f"{100 * search.drop:.2f}",
            ", ".join(f"{name} {100 * drop:.2f}" for name, drop in search.drop_without.items()) or "–",
            f"{search.bytes / 1e6:.1f}", f"{search.bytes_of_all / 1e6:.1f}", f"{search.measured} files",
        ]
        for report in (cpu.runs if cpu else [])
        for search in report.searches
    ]  # fmt: skip
    machine = f"\n\nMeasured on: {_machine(cpu.hardware, cpu.versions)}." if cpu and rows else ""
    return table(titles, rows or [_missing_row(titles)]) + machine


def int8() -> str:
    """Returns the table of int8 files by onnxruntime's quantizer and by ModelOpt."""
    titles = ["experiment", "trained", *quantizers.TITLES]
    path = RESULTS / "quantizers-cpu.json"
    if not path.is_file():
        return table(titles, [_missing_row(titles)])
    found = read_json(path, quantizers.Result)
    rows = [
        [f"`{run.experiment}`", f"{run.epochs:.2f} epochs, seed {run.seed}, {run.dataset}", *cells]
        for run in found.runs
        for cells in quantizers.cells_of(run)
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found.modelopt.items())
    machine = f"{_machine(found.hardware, found.versions)}; ModelOpt's environment: {versions}"
    return f"{table(titles, rows)}\n\nMeasured on: {machine}."


def search_regret() -> str:
    """The table of launch/searches.md: the regret of searches over a grid, by epochs spent."""
    path = RESULTS / "search-cpu.json"
    if not path.is_file():
        return MISSING
    result = read_json(path, searches.Result)
    titles = ["method", *(f"{fraction:.0%} of the epochs" for fraction in searches.BUDGETS), "whole search"]

    def cells(method: searches.Method) -> list[str]:
        shown = [budget for budget in method.budgets if budget.fraction in searches.BUDGETS]
        quartiles = [
            f"{100 * b.median:.1f} ({100 * b.lower_quartile:.1f} to {100 * b.upper_quartile:.1f})" for b in shown
        ]
        return [*quartiles, f"{method.spent:.0%}"]

    rows = [[name, *cells(method)] for name, method in result.methods.items()]
    machine = _machine(result.hardware, result.versions)
    caption = f"Regret in points of validation accuracy: median (quartiles) of {result.seeds} seeds; {result.dataset}."
    return f"{table(titles, rows)}\n\n{caption} Measured on: {machine}."


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"results": complete_experiments},
    BENCHMARKS_README: {
        "papers": all_experiments,
        "ratios": ratios,
        "backends": cpu_latencies,
        "parity": parity,
        "precisions": precision_searches,
        "int8": int8,
        "correctness": correctness,
        "architectures": training_speeds,
        "profile": profile,
        "speedrun": speedrun,
        "muon": muon,
        "deployment": gpu_latencies,
    },
    SEARCHES: {"search": search_regret},
}


class _Legend:
    """Assigns each machine of a table a letter, which represents it in the cells."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def letter(self, hardware: Hardware, versions: dict[str, str]) -> str:
        return self.letters.setdefault(_machine(hardware, versions), chr(ord("A") + len(self.letters)))

    def __str__(self) -> str:
        """Returns the line below the table, which explains the letters."""
        machines = "; ".join(f"{letter}, {machine}" for machine, letter in self.letters.items())
        return f"Measured on: {machines or MISSING}."


def _with_caption(name: str, text: str) -> str:
    """Returns a table followed by the GPU, driver and versions of a part of the GPU benchmark."""
    part = read_part(name)
    if part is None:
        return text
    return f"{text}\n\nMeasured on: {_machine(part.hardware, part.versions)}, driver {part.driver}, {part.dataset}."


def _machine(hardware: Hardware, versions: dict[str, str]) -> str:
    return f"{hardware}, torch {versions['torch']}"


def _missing_row(titles: list[str]) -> list[str]:
    return [MISSING, *[""] * (len(titles) - 1)]


if __name__ == "__main__":
    program.run(Tables, "tables")
