"""Part 1: the tests that need a GPU."""

from collections import Counter
from typing import Any
from xml.etree import ElementTree

from runner.benchmarks.gpu.part import ROOT, Context, Ledger, MissingError

RED = {"failure", "error"}


def measure(context: Context, ledger: Ledger) -> None:
    """Runs them all."""
    ledger.once("pytest", lambda: pytest(context))


def pytest(context: Context) -> dict[str, Any]:
    """How many passed, which failed with what message, and how many were skipped for what reason."""
    folder = ROOT / "tests"
    if not folder.is_dir():
        raise MissingError(f"no tests in {ROOT}: run from a checkout")
    report = context.out / "tests.xml"
    where = folder / "test_batches.py" if context.rehearse else folder
    words = [
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        where,
    ]
    try:
        context.command(*words, cwd=ROOT)
    except RuntimeError as error:  # a test has failed, which the report tells, or pytest itself
        if not report.is_file():
            raise MissingError(str(error)) from None
    return read(ElementTree.parse(report).getroot())


def read(report: ElementTree.Element) -> dict[str, Any]:
    """pytest's report in the JUnit format."""
    passed, failed, skipped = 0, {}, Counter()
    for case in report.iter("testcase"):
        red = [child for child in case if child.tag in RED]
        left_out = [child for child in case if child.tag == "skipped"]
        if red:
            told = (red[0].get("message") or "").splitlines() or [""]
            failed[f"{case.get('classname')}::{case.get('name')}"] = told[0]
        elif left_out:
            skipped[left_out[0].get("message") or ""] += 1
        else:
            passed += 1
    return {"passed": passed, "failed_tests": failed, "skipped": dict(skipped)}
