"""Part 1 of the GPU benchmark: the tests that need a GPU."""

from collections import Counter
from typing import Any
from xml.etree import ElementTree

from runner.benchmarks.gpu.context import ROOT, Context, MissingError
from runner.benchmarks.gpu.ledger import Ledger


def measure(context: Context, ledger: Ledger) -> None:
    """Runs all tests that need a GPU."""
    ledger.once("pytest", lambda: pytest(context))


def pytest(context: Context) -> dict[str, Any]:
    """Runs pytest; returns the numbers of passed and skipped tests, and the failed tests with their messages."""
    folder = ROOT / "tests"
    if not folder.is_dir():
        raise MissingError(f"no tests in {ROOT}: run from a checkout")
    report = context.out / "tests.xml"
    tests = folder / "test_batches.py" if context.rehearse else folder
    options = ["--continue-on-collection-errors", "-p", "no:cacheprovider", f"--junitxml={report}"]
    try:
        context.command("-m", "pytest", "-m", "gpu", "-q", *options, tests, cwd=ROOT)
    except RuntimeError as error:  # a test failed, which the report shows, or pytest itself failed
        if not report.is_file():
            raise MissingError(str(error)) from None
    return read(ElementTree.parse(report).getroot())


def read(report: ElementTree.Element) -> dict[str, Any]:
    """Reads pytest's report in the JUnit format."""
    passed, failed = 0, {}
    skipped: Counter[str] = Counter()
    for case in report.iter("testcase"):
        failures = [child for child in case if child.tag in ("failure", "error")]
        skips = [child for child in case if child.tag == "skipped"]
        if failures:
            lines = (failures[0].get("message") or "").splitlines() or [""]
            failed[f"{case.get('classname')}::{case.get('name')}"] = lines[0]
        elif skips:
            skipped[skips[0].get("message") or ""] += 1
        else:
            passed += 1
    return {"passed": passed, "failed_tests": failed, "skipped": dict(skipped)}
