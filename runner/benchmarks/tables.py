"""The README's tables, made from the committed results. A cell without a result says so.

python -m runner.benchmarks.tables --write
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from data_prep.console import UserError, run_command
from runner import experiments
from runner.benchmarks.gpu.part import was_measured
from runner.environment import described
from runner.report.markdown import table

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent.parent / "README.md"
MISSING = "not measured"


@dataclass(frozen=True)
class Tables:
    """Print the README's tables, or write them into it."""

    write: bool = False
    """Put them into README.md, each between its marks."""

    def __call__(self) -> None:
        if not self.write:
            for name, make in TABLES.items():
                print(f"## {name}\n\n{make()}\n")
            return
        README.write_text(filled(README.read_text()))
        print(f"{README}: {len(TABLES)} tables")


def filled(text: str) -> str:
    """The README with every table put between its marks.

    Raises:
        UserError: a table's marks are missing.
    """
    for name, make in TABLES.items():
        first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if text.count(first) != 1 or text.count(last) != 1:
            raise UserError(f"README.md: expected {first} and {last} once each")
        before, rest = text.split(first)
        text = f"{before}{first}\n{make()}\n{last}{rest.split(last)[1]}"
    return text


def result(name: str) -> dict[str, Any] | None:
    """A committed result; None where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def papers() -> str:
    """Every experiment: reported, and what was reproduced on the CPU and on a GPU."""
    found = {place: _by_name(result(f"papers-{place}")) for place in ("cpu", "gpu")}
    rows = []
    for name, experiment in experiments.load().items():
        reported = experiment.reported
        rows.append(
            [
                f"`{name}`",
                f"{experiment.parameters:,}",
                f"{experiment.macs / 1e6:,.0f}",
                f"{reported.accuracy:.2%} ({reported.on}, {reported.epoch})" if reported else "–",
                *(_accuracy(found[place].get(name)) for place in ("cpu", "gpu")),
            ]
        )
    titles = ["experiment", "parameters", "M MACs", "reported", "ours, CPU", "ours, GPU"]
    told = "; ".join(_hardware(entry) for entry in _distinct([*found["cpu"].values(), *found["gpu"].values()]))
    return f"{table(titles, rows)}\n\nMeasured on: {told or MISSING}."


def ratios() -> str:
    """The ratios of the benchmarks of loaders, overhead, ranks and deployment, and of those on the GPU."""
    rows, places = [], _Places()
    for name in ("loader-cpu", "overhead-cpu", "scaling-cpu", "deploy-cpu", "speed-gpu"):
        measured = result(name)
        if measured is None:
            rows.append([name, MISSING, "", ""])
            continue
        letter = places.letter(measured)
        for key, ratio, goals in _leaves(measured):
            if isinstance(ratio, dict) and "median" in ratio and key.startswith("ratio_"):
                spread = f"{ratio['median']:.3g}"
                if ratio["rounds"] > 1:
                    spread += f" ({ratio['min']:.3g} to {ratio['max']:.3g}, {ratio['rounds']} rounds)"
                told = key.removeprefix("ratio_").replace("_to_", " ÷ ").replace("_", " ")
                rows.append([told, spread, goals.get(key, "–"), letter])
    return f"{table(['ratio', 'median (spread)', 'goal', 'on'], rows)}\n\n{places.told()}"


def correctness() -> str:
    """What the GPU part that is about correctness found, in words."""
    found = _found("correctness")
    tests = _found("tests").get("pytest", {})
    rows = [["GPU tests", f"{tests['passed']} passed, {len(tests['failed_tests'])} failed" if tests else MISSING]]
    for name, one in found.items():
        if name.startswith("batches/"):
            kind = name.removeprefix("batches/")
            told = f"{one['equal_share']:.4%} equal, largest difference {one['largest_difference']:g} of 255"
            rows.append([f"pixels made on the GPU beside the CPU's, {kind}", told])
    losses = found.get("losses", {})
    for precision in ("bf16", "fp16"):
        one = losses.get(precision)
        told = f"{one['mean']:.2%} mean, {one['most']:.2%} most" if one else MISSING
        rows.append([f"training loss in {precision} beside fp32's, relative", told])
    resume, one, every = (found.get(name) for name in ("resume", "ddp/one", "ddp/all"))
    rows += [
        ["killed and resumed beside never stopped, deterministic", _equal(resume, "same_weights", "weights")],
        ["DDP of one process beside none", _equal(one, "same_gradients", "gradients")],
        [
            "all GPUs of the node beside one, training loss, relative",
            f"{every['difference']['most']:.2e} most, {every['ranks']} ranks" if every else MISSING,
        ],
    ]
    return _with_place("correctness", table(["what", "found"], rows))


def architectures() -> str:
    """Steps of every architecture: images a second, share of the peak, memory."""
    found = _found("speed")
    rows = []
    for name in dict.fromkeys(key.split("/")[1] for key in found if key.startswith("architectures/")):
        modes = {mode: found.get(f"architectures/{name}/{mode}") for mode in ("eager", "compiled", "graphs")}
        measured = [one for one in modes.values() if one]
        best = max(measured, key=lambda one: one["images_per_second"]["median"])
        rates = [f"{one['images_per_second']['median']:,.0f}" if one else MISSING for one in modes.values()]
        limit = best.get("limit_images_per_second")
        used = [f"{limit:,.0f}", f"{best['utilisation']:.0%}"] if limit else ["–", "–"]
        rows.append([f"`{name}`", *rates, *used, f"{best['peak_memory_gib']:.1f}"])
    titles = ["img/s of", "eager", "compiled", "CUDA graphs", "limit of arithmetic", "best ÷ limit", "GiB"]
    return _with_place("speed", table(titles, rows or [[MISSING, *[""] * (len(titles) - 1)]]))


def speedrun() -> str:
    """Seconds to an accuracy, ours and a peer's."""
    found = _found("speedrun").get("together", {})
    rows = []
    for who in ("ours/eager", "ours/compiled", "peer"):
        one = found.get(who)
        if not one:
            rows.append([who, *[MISSING] * 3])
            continue
        ratio = one.get("ratio_to_peer")
        rows.append(
            [
                who,
                f"{one['accuracy']:.2%} ± {one['accuracy_std']:.2%}, {one['trainings']} seeds",
                f"{one['seconds']:.2f} ± {one['seconds_std']:.2f}",
                f"{ratio['median']:.2f}" if ratio else "–",
            ]
        )
    titles = ["", "accuracy", "seconds", "÷ peer (goal ≤ 0.9)"]
    return _with_place("speedrun", table(titles, rows))


def profile() -> str:
    """Where the time of a step goes, in words and as a picture."""
    found = _found("profile")
    told = [one["told"] for one in found.values() if "told" in one]
    if not told:
        return f"Where the time of a step goes: {MISSING}."
    return "\n\n".join([*told, "![Shares of the device time of a step](runner/benchmarks/results/profile.png)"])


def deployment() -> str:
    """Latency on the GPU by backend and precision, of what has passed the gate."""
    found = _found("deployment")
    rows = []
    for name, one in found.items():
        if "parity" in name or "rows" not in one:
            continue
        experiment = name.split("/")[0]
        for row in one["rows"]:
            if "p50_ms" in row:
                figures = [f"{row[key]:.3f}" for key in ("p50_ms", "p90_ms", "p99_ms")]
                told = [f"`{experiment}`", row["backend"], row["precision"], str(row["batch"]), *figures]
                rows.append([*told, f"{row['images_per_second']:,.0f}"])
    titles = ["experiment", "backend", "precision", "batch", "p50 ms", "p90 ms", "p99 ms", "img/s"]
    return _with_place("deployment", table(titles, rows or [[MISSING, *[""] * (len(titles) - 1)]]))


def parity() -> str:
    """The gate's rows of trained runs, on the CPU and on a GPU."""
    rows, places = [], _Places()
    measured = result("parity-cpu")
    reports = []
    for each in [] if measured is None else measured["runs"]:
        told = f"{each['epochs']:.2f} epochs, seed {each['seed']}, {each['dataset']}"
        reports.append((places.letter(measured), each | {"trained": told}))
    gpu = result("deployment-gpu")
    found = _found("deployment")
    for name, one in found.items():
        if "/parity/" in name:
            experiment = name.split("/")[0]
            trained = f"{found[f'{experiment}/weights']['trained']}, seed 0, {gpu['dataset']}"
            reports.append((places.letter(gpu), one | {"experiment": experiment, "trained": trained}))
    for letter, report in reports:
        for row in report["rows"]:
            backend = row["provider"].removesuffix("ExecutionProvider")
            rows.append(
                [
                    f"`{report['experiment']}`",
                    report["trained"],
                    row["precision"],
                    f"{row['backend']} {backend}",
                    f"{report['eager_accuracy']:.2%}",
                    f"{row['accuracy']:.2%} ({100 * row['accuracy_change']:+.2f})",
                    f"{row['agreement']:.2%}",
                    "yes" if row["passed"] else f"no: {row['limit']}",
                    letter,
                ]
            )
    titles = ["experiment", "trained", "precision", "backend", "torch", "exported", "same class", "passed", "on"]
    return f"{table(titles, rows or [[MISSING, *[''] * (len(titles) - 1)]])}\n\n{places.told()}"


TABLES = {
    "papers": papers,
    "ratios": ratios,
    "parity": parity,
    "correctness": correctness,
    "architectures": architectures,
    "profile": profile,
    "speedrun": speedrun,
    "deployment": deployment,
}


class _Places:
    """The machines of a table, each with a letter, so that no cell has to spell them out."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def letter(self, measured: dict[str, Any]) -> str:
        return self.letters.setdefault(_hardware(measured), chr(ord("A") + len(self.letters)))

    def told(self) -> str:
        """The line below the table."""
        return "Measured on: " + ("; ".join(f"{a}, {what}" for what, a in self.letters.items()) or MISSING) + "."


def _found(part: str) -> dict[str, dict[str, Any]]:
    """What a part of the GPU benchmark has measured, by name.

    Raises:
        UserError: it was a rehearsal, which is evidence of nothing.
    """
    measured = result(f"{part}-gpu")
    if measured is None:
        return {}
    if measured["rehearsal"] or not measured["hardware"].get("gpus"):
        raise UserError(f"results/{part}-gpu.json: expected measurements of a GPU, found a rehearsal")
    return {name: one for name, one in measured["found"].items() if was_measured(one)}


def _equal(found: dict[str, Any] | None, key: str, what: str) -> str:
    if found is None:
        return MISSING
    return f"the same {what}, to the bit" if found[key] else f"other {what}"


def _with_place(part: str, rows: str) -> str:
    """A table with the GPU, driver and versions that it was measured with."""
    measured = result(f"{part}-gpu")
    if measured is None:
        return rows
    told = f"{_hardware(measured)}, driver {measured['driver']}, {measured['dataset']}"
    return f"{rows}\n\nMeasured on: {told}."


def _leaves(measured: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, str]]]:
    """The entries of a result, and of a GPU part those of its findings, each with the goals beside it."""
    for one in measured["found"].values() if "found" in measured else [measured]:
        for key, value in one.items():
            yield key, value, one.get("goals", {})


def _by_name(measured: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The unchanged experiments of a result by name; one entry each."""
    entries = [] if measured is None else measured.get("experiments", [])
    entries = [e for e in entries if not e["overrides"].keys() - {"recipe.epochs"} and not e["teacher"]]
    names = [entry["experiment"] for entry in entries]
    if len(set(names)) < len(names):
        raise UserError(f"results: expected one entry for each experiment, found {sorted(names)}")
    return dict(zip(names, entries, strict=True))


def _accuracy(entry: dict[str, Any] | None) -> str:
    """Our figure with data source, epochs and seeds."""
    if entry is None:
        return MISSING
    figure = entry["test_accuracy"] if entry["reproduced"] is None else entry["reproduced"]
    deviation = entry["test_accuracy_std"] if entry["reproduced"] is None else entry["reproduced_std"]
    shown = f"{100 * figure:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "") + " %"
    if entry["difference"] is not None:
        shown += f" ({100 * entry['difference']:+.2f})"
    epochs = f"{entry['epochs']:g} of {entry['recipe_epochs']} epochs"
    seeds = f"seed{'s' if entry['runs'] > 1 else ''} {', '.join(map(str, entry['seeds']))}"
    return f"{shown}, {entry['dataset']}, {epochs}, {seeds}, {entry['precision']}"


def _distinct(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({_hardware(entry): entry for entry in entries}.values())


def _hardware(entry: dict[str, Any]) -> str:
    return f"{described(entry['hardware'])}, torch {entry['versions']['torch']}"


def main() -> None:
    """Entry point of `python -m runner.benchmarks.tables`."""
    run_command(lambda: tyro.cli(Tables, prog="python -m runner.benchmarks.tables"), "tables")


if __name__ == "__main__":
    main()
