"""Part 1 of the GPU benchmark: the tests that need a GPU."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from runner.benchmarks.gpu.context import ROOT, Context, MissingError
from runner.benchmarks.gpu.ledger import Ledger

MARK = "pytest.mark.gpu"


def measure(context: Context, ledger: Ledger) -> None:
    """Runs the tests that need a GPU, one file at a time, so that running out of time loses only one file."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if MARK in path.read_text()]
    for path in files[:1] if context.rehearse else files:
        ledger.once(path.stem, partial(pytest, context, path))
    if not files:
        ledger.once("pytest", none_found)


def none_found() -> dict[str, Any]:
    """Raises MissingError."""
    raise MissingError(f"no tests in {ROOT}: run from a checkout")


def pytest(context: Context, path: Path) -> dict[str, Any]:
    """Runs a test file; returns the numbers of passed and skipped tests, and the failed tests with their messages."""
    report = context.scratch / f"{path.stem}.xml"
    report.unlink(missing_ok=True)
    options = ["--continue-on-collection-errors", "-p", "no:cacheprovider", f"--junitxml={report}"]
    try:
        context.run_python("-m", "pytest", "-m", "gpu", "-q", *options, path, cwd=ROOT)
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
