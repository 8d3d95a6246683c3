"""The comparison as a W&B report, made of wandb-workspaces' own objects."""

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

from data_prep.console import UserError
from runner.report import markdown
from runner.report.collect import RunRecord

TITLE = "Architectures compared"
METHOD = """\
- Accuracies are of the last epoch on the whole test set, each image scored once; `test_accuracy_augmented` is with
  test-time augmentation. "Reproduced" is of the kind that the paper reports: its set, its epoch.
- A difference to a paper counts only for a whole, unchanged recipe on the official images; a name that ends in
  "(JPEG copy)" or begins with "synthetic" is another dataset.
- Latency is p50 at batch 1 of computing alone, after a warm-up by time, over at least 3 seconds and 100 calls. The
  provider that really computed is in its row. A file is measured only after it has been scored on all test images.
- Every figure is in the run's folder as well, from which this report was made.
"""


def specification(records: list[RunRecord], place: str | None = None) -> str:
    """The report's specification as JSON, without network; the same runs give the same text.

    Args:
        records: what to compare.
        place: ENTITY/PROJECT; None leaves both empty.
    """
    entity, _, project = (place or "/").partition("/")
    with _quiet(), _the_same_names():
        report = _report(records, entity, project)
        # A run set without a place means the report's own, and is not looked up.
        return report._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2) + "\n"


def save(records: list[RunRecord], place: str) -> str:
    """Creates the report in W&B, or updates the one of the same title, and returns its address.

    Raises:
        UserError: W&B cannot be reached or refuses.
    """
    import wandb

    entity, _, project = place.partition("/")
    try:
        with _quiet():
            report = _report(records, entity, project)
            before = [found.id for found in wandb.Api().reports(place) if found.display_name == report.title]
            report.id = before[0] if before else ""
            report.save()
            return report.url
    except Exception as error:  # whatever W&B throws
        told = (str(error).splitlines() or [""])[0]
        raise UserError(f"--wandb {place}: W&B did not take the report ({type(error).__name__}: {told})") from None


def _report(records: list[RunRecord], entity: str, project: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    def grid(title: str, chosen: list[RunRecord], panels: list[Any]) -> Any:
        return wr.PanelGrid(runsets=[_run_set(title, chosen)], panels=panels)

    datasets = sorted({record.dataset for record in records})
    blocks: list[Any] = [
        wr.TableOfContents(),
        wr.H1("Reported and reproduced"),
        wr.MarkdownBlock(markdown.accuracies(records)),
        wr.H1("Accuracy against cost"),
        grid(
            "all",
            records,
            [
                wr.ScatterPlot(
                    title="accuracy against latency (onnxruntime, batch 1)",
                    x=wr.SummaryMetric("latency_p50_ms/onnxruntime_fp32_batch1"),
                    y=wr.SummaryMetric("test_accuracy"),
                    log_x=True,
                    layout=wr.Layout(0, 0, 12, 9),
                ),
                wr.ScatterPlot(
                    title="accuracy against parameters",
                    x=wr.SummaryMetric("parameters"),
                    y=wr.SummaryMetric("test_accuracy"),
                    log_x=True,
                    layout=wr.Layout(12, 0, 12, 9),
                ),
                wr.BarPlot(
                    title="test accuracy, mean over seeds",
                    metrics=[wr.SummaryMetric("test_accuracy")],
                    groupby=wr.Config("experiment"),
                    groupby_aggfunc="mean",
                    groupby_rangefunc="stddev",
                    layout=wr.Layout(0, 9, 24, 10),
                ),
            ],
        ),
        wr.H1("Learning curves"),
    ]
    for group in dict.fromkeys(_group(record) for record in records):
        chosen = [record for record in records if _group(record) == group]
        panels = [
            wr.LinePlot(
                title=metric, x="global_step", y=[metric], layout=wr.Layout(12 * (i % 2), 8 * (i // 2), 12, 8)
            )
            for i, metric in enumerate(("train/loss", "test/loss", "train/accuracy", "test/accuracy"))
        ]
        blocks += [wr.H2(group), grid(group, chosen, panels)]
    blocks += [
        wr.H1("Confusion matrices"),
        grid(
            "finished",
            [record for record in records if record.summary is not None] or records,
            [
                wr.MediaBrowser(title="test images by label and prediction", media_keys=["figures/confusion"]),
            ],
        ),
    ]
    if latencies := markdown.latencies(records):
        blocks += [wr.H1("Deployment"), wr.MarkdownBlock(latencies)]
    blocks += [wr.H1("Method"), wr.MarkdownBlock(METHOD)]
    return wr.Report(
        project=project,
        entity=entity,
        title=TITLE,
        description=f"{len(records)} runs on {', '.join(datasets)}"[:250],
        blocks=blocks,
        width="fluid",
    )


def _group(record: RunRecord) -> str:
    """The sweep that a run is of, or its paper."""
    return record.config.get("group", record.config["paper"])


def _run_set(name: str, records: list[RunRecord]) -> Any:
    """These runs and no others of the project."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    ids = [record.config["wandb_id"] for record in records]
    return wr.Runset(
        name=name,
        filters=[expr.Metric("ID").isin(ids)],
        order=[wr.OrderBy(wr.SummaryMetric("test_accuracy"))],
        pinned_columns=["summary:test_accuracy", "summary:parameters"],
    )


@contextlib.contextmanager
def _the_same_names() -> Iterator[None]:
    """wandb-workspaces draws the names of panels at random; here they are always the same."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Whatever W&B says goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
