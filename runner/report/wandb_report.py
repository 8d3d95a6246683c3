"""Builds the comparison of runs as a W&B report, with wandb-workspaces."""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec

from runner.common.errors import UserError
from runner.common.text import first_line
from runner.report import compare, markdown
from runner.report.compare import RunRow
from runner.report.run_record import RunRecord, Unreadable, format_counts
from runner.report.searches import SearchRecord

TITLE = "Architectures compared"
LOOKED_AT = 50  # rows at the beginning and at the end of a run, to see which metrics it logged
CURVES: dict[str, list[Any]] = {
    **{metric: [metric] for metric in ("train/loss", "test/loss", "train/accuracy", "test/accuracy")},
    "norm of the gradient": ["train/grad_norm"],
    "learning rate": ["lr", "lr/1"],
    "images per second": ["images_per_second"],
    "seconds per step": ["data_seconds", "compute_seconds"],
    "peak memory, GB": ["memory_gb"],
    "FLOPs utilization": ["flops_utilization"],
}
METHOD = """\
- Accuracy is measured on the whole test set, each image once, after the last epoch, or the best one with early
  stopping; `test_accuracy_augmented` uses test-time augmentation. "Reproduced" is measured as in the paper: on the same
  split, after the same epoch.
- A difference from a paper is valid only for a complete, unchanged recipe on the official images; a name that ends in
  "(JPEG copy)" or begins with "synthetic" is another dataset.
- Latency is the median (p50) at batch 1, without copies to and from the device, after a timed warm-up; the minimum
  duration and number of calls are in each run's latency.json. A file is measured only after it has been scored on all
  test images.
- The report is made from the run folders, which hold every value in it.
"""


def specification(
    records: list[RunRecord],
    project_path: str | None = None,
    searches: Sequence[SearchRecord] = (),
    unreadable: Sequence[Unreadable] = (),
) -> str:
    """The report's specification as JSON, without network access; the same runs give the same text.

    Args:
        records: the runs to compare.
        project_path: ENTITY/PROJECT; None leaves both empty.
        searches: the searches to show.
        unreadable: folders that could not be read.
    """
    entity, _, project = (project_path or "/").partition("/")
    with _stdout_to_stderr(), _reproducible_panel_names():
        report = _report(records, entity, project, searches, unreadable)
        # A run set without entity and project uses those of the report, and needs no lookup.
        return report._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2) + "\n"


def save(
    records: list[RunRecord],
    project_path: str,
    searches: Sequence[SearchRecord] = (),
    unreadable: Sequence[Unreadable] = (),
) -> str:
    """Creates the report in W&B, or updates the one with the same title, and returns its URL.

    Raises:
        UserError: W&B cannot be reached, or refuses the report.
    """
    import wandb

    entity, _, project = project_path.partition("/")
    report = _report(records, entity, project, searches, unreadable)
    try:
        with _stdout_to_stderr():
            same_title = [old.id for old in wandb.Api().reports(project_path) if old.display_name == report.title]
            report.id = same_title[0] if same_title else ""
            report.save()
            return report.url
    except Exception as error:  # W&B documents no common base class
        message = first_line(error)
        raise UserError(
            f"--wandb {project_path}: cannot save the report in W&B ({type(error).__name__}: {message})"
        ) from None


def _report(
    records: list[RunRecord],
    entity: str,
    project: str,
    searches: Sequence[SearchRecord],
    unreadable: Sequence[Unreadable],
) -> Any:
    import wandb_workspaces.reports.v2 as wr

    datasets = sorted({record.dataset for record in records})
    blocks: list[Any] = [
        wr.TableOfContents(),
        wr.MarkdownBlock(markdown.overview(records)),
        wr.H1("Reported and reproduced"),
        wr.MarkdownBlock(markdown.accuracies(records)),
        wr.H1("Accuracy against cost"),
    ]
    for dataset in datasets:
        on_dataset = [record for record in records if record.dataset == dataset]
        complete = [record for record in on_dataset if record.summary and not record.shortened]
        incomplete = [record for record in on_dataset if record.shortened]
        named = {"complete": complete, "incomplete": incomplete}
        run_sets = [_run_set(f"{name}, {dataset}", runs) for name, runs in named.items() if runs]
        if run_sets:
            blocks += [wr.H2(dataset), wr.PanelGrid(runsets=run_sets, panels=_cost_panels(on_dataset))]
    blocks.append(wr.H1("Learning curves"))
    for group in dict.fromkeys(_group(record) for record in records):
        members = [record for record in records if _group(record) == group]
        panels = _curve_panels(members)
        blocks += [wr.H2(group), wr.PanelGrid(runsets=[_run_set(group, members)], panels=panels)]
    finished = [record for record in records if record.summary is not None] or records
    blocks += [
        wr.H1("Predictions"),
        wr.PanelGrid(runsets=[_run_set("finished", finished)], panels=_picture_panels()),
    ]
    if latencies := markdown.latencies(records):
        blocks += [wr.H1("Deployment"), wr.MarkdownBlock(latencies)]
    if searches:
        blocks += [wr.H1("Searches"), *(wr.MarkdownBlock(markdown.search_results(search)) for search in searches)]
    if unreadable:
        blocks += [wr.H1("Not read"), wr.MarkdownBlock(markdown.not_read(unreadable))]
    blocks += [wr.H1("Method"), wr.MarkdownBlock(METHOD)]
    return wr.Report(
        project=project,
        entity=entity,
        title=TITLE,
        description=f"{format_counts(records, unreadable)}, on {', '.join(datasets)}"[:250],
        blocks=blocks,
        width="fluid",
    )


def _cost_panels(records: list[RunRecord]) -> list[Any]:
    """Builds panels of accuracy against each cost that a run has, and by experiment, in two columns."""
    import wandb_workspaces.reports.v2 as wr

    rows = [compare.run_row(record) for record in records]
    costs: dict[str, tuple[str, Callable[[RunRow], float | None]]] = {
        "latency (onnxruntime, batch 1)": (
            "latency_p50_ms/onnxruntime_fp32_batch1", partial(compare.p50_ms, backend="onnxruntime"),
        ),
        "latency (eager torch, batch 1)": (
            "latency_p50_ms/eager_fp32_batch1", partial(compare.p50_ms, backend="eager"),
        ),
        "parameters": ("parameters", lambda row: row.parameters),
        "multiply-accumulates": ("macs", lambda row: row.macs),
    }  # fmt: skip
    known = {title: metric for title, (metric, cost) in costs.items() if any(map(cost, rows))}
    panels = [
        wr.ScatterPlot(
            title=f"accuracy against {title}",
            x=wr.SummaryMetric(metric),
            y=wr.SummaryMetric("test_accuracy"),
            log_x=True,
            layout=wr.Layout(12 * (i % 2), 9 * (i // 2), 12, 9),
        )
        for i, (title, metric) in enumerate(known.items())
    ]
    return [
        *panels,
        wr.BarPlot(
            title="test accuracy, mean over seeds",
            metrics=[wr.SummaryMetric("test_accuracy")],
            groupby=wr.Config("experiment"),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            layout=wr.Layout(0, 9 * (-(-len(panels) // 2)), 24, 10),
        ),
    ]


def _curve_panels(records: list[RunRecord]) -> list[Any]:
    """Builds panels of the metrics that these runs logged, in two columns."""
    import wandb_workspaces.reports.v2 as wr

    logged: set[str] = set()
    for record in records:  # the first and last rows have every metric of a run
        for row in (*record.metrics[:LOOKED_AT], *record.metrics[-LOOKED_AT:]):
            logged |= msgspec.to_builtins(row).keys()
    known = {title: [metric for metric in metrics if metric in logged] for title, metrics in CURVES.items()}
    panels = [(title, metrics) for title, metrics in known.items() if metrics]
    return [
        wr.LinePlot(title=title, x="global_step", y=metrics, layout=wr.Layout(12 * (i % 2), 8 * (i // 2), 12, 8))
        for i, (title, metrics) in enumerate(panels)
    ]


def _picture_panels() -> list[Any]:
    """Builds panels of the figures of each run."""
    import wandb_workspaces.reports.v2 as wr

    titles = {
        "confusion": "test images by label and prediction",
        "samples": "predictions on test images",
        "mistakes": "the most confident mistakes",
    }
    return [
        wr.MediaBrowser(title=title, media_keys=[f"figures/{name}"], layout=wr.Layout(0, 10 * i, 24, 10))
        for i, (name, title) in enumerate(titles.items())
    ]


def _group(record: RunRecord) -> str:
    """Returns the sweep that a run belongs to, or else its paper."""
    return record.config.group or record.config.paper


def _run_set(name: str, records: list[RunRecord]) -> Any:
    """Builds a W&B run set that selects these runs and no others in the project."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    return wr.Runset(
        name=name,
        filters=[expr.Metric("ID").isin([record.config.wandb_id for record in records])],
        order=[wr.OrderBy(wr.SummaryMetric("test_accuracy"))],
        pinned_columns=["summary:test_accuracy", "summary:parameters"],
    )


@contextlib.contextmanager
def _reproducible_panel_names() -> Iterator[None]:
    """Seeds the random numbers from which wandb-workspaces generates panel names."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirects W&B's output to standard error, because standard output is for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
