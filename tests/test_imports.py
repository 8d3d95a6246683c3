"""One way for imports to flow, read from the sources by AST."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("data_prep", "runner", "launch") for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports, anywhere or at import time; `from a import b` gives both a and a.b."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def imports(path: Path, *packages: str) -> set[str]:
    return {name for name in imports_of(path) for package in packages if f"{name}.".startswith(f"{package}.")}


# Whoever matches the left may not import what is on the right, not even inside a function.
FORBIDDEN = [
    ("data_prep", ["runner", "launch"]),
    ("runner", ["launch"]),
    ("runner.recipe", ["torch", "runner", "data_prep", "numpy"]),
    ("runner.runs", ["torch", "numpy"]),
    ("runner.experiments", ["torch", "torchvision", "runner.train", "runner.models"]),
    ("runner.models", ["runner"]),
    ("runner.batches", ["runner.train", "runner.optim", "runner.deploy", "runner.report", "runner.models"]),
    ("runner.optim", ["runner.train", "runner.deploy", "runner.report"]),
    ("runner.evaluate", ["runner.train", "runner.deploy", "runner.report"]),
    ("runner.checkpoint", ["runner.train", "runner.deploy", "runner.report"]),
    ("runner.tracking", ["runner.train", "runner.deploy", "runner.report"]),
    ("runner.wandb_view", ["torch", "runner.train", "runner.deploy", "runner.report"]),
    ("runner.train", ["runner.deploy", "runner.report", "runner.cli", "runner.tracking"]),
    ("runner.deploy", ["runner.train", "runner.job", "runner.report"]),
    (
        "runner.report",
        ["torch", "runner.train", "runner.job", "runner.deploy", "runner.batches", "runner.checkpoint"],
    ),
]


@pytest.mark.parametrize(("who", "what"), FORBIDDEN)
def test_no_stage_imports_a_later_one(who: str, what: list[str]) -> None:
    files = [path for path in FILES if f"{module_of(path)}.".startswith(f"{who}.")]
    assert files
    assert {module_of(path): found for path in files if (found := imports(path, *what))} == {}


# These packages belong to these files alone.
RESERVED = {
    "ffcv": {"data_prep.beton", "data_prep.verify", "runner.batches.streaming"},
    "tensorrt": {"runner.deploy.engine", "runner.deploy.latency"},
    "tensorrt_rtx": {"runner.deploy.engine", "runner.deploy.latency"},
    "wandb": {"runner.wandb_view", "runner.report.wandb_report"},
    "wandb_workspaces": {"runner.report.wandb_report"},
    "onnxruntime": {"runner.deploy.session", "runner.deploy.precision"},
}


@pytest.mark.parametrize("package", RESERVED)
def test_a_package_stays_in_its_rooms(package: str) -> None:
    users = {module_of(path) for path in FILES if imports(path, package)}
    assert users <= RESERVED[package]


def test_wandb_ffcv_and_tensorrt_are_imported_late() -> None:
    early = {
        module_of(path): found
        for path in FILES
        if (
            found := {n.split(".")[0] for n in imports_of(path, top_level_only=True)}
            & (RESERVED.keys() - {"onnxruntime"})
        )
    }
    assert early == {}


def test_only_the_edges_read_arguments_and_environment() -> None:
    readers = {module_of(path) for path in FILES if {"os.environ", "sys.argv"} & names_in(path)}
    assert readers <= {"runner.cli", "launch.__main__"}


def names_in(path: Path) -> set[str]:
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
