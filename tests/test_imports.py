"""One way for imports to flow, read from the sources by AST."""

import ast
import graphlib
from collections.abc import Iterable
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


# What each part may import of the project, in the order of the pipeline; it may import nothing else.
COMMON = ["runner.common"]
CONFIG = [*COMMON, "runner.config", "runner.experiments"]
RUN = [*CONFIG, "runner.run", "runner.system"]
DATA = [*RUN, "data_prep.manifest", "data_prep.beton_reader", "data_prep.images", "data_prep.synthetic", "runner.data"]
TRAINING = [*DATA, "runner.training"]
ALLOWED = {
    "runner.common": COMMON,
    "data_prep": [*COMMON, "data_prep"],
    "runner.config": CONFIG,
    "runner.experiments": CONFIG,
    "runner.models": [*COMMON, "runner.models"],
    "runner.run": RUN,
    "runner.system": RUN,
    "runner.data": DATA,
    "runner.training": [*TRAINING, "runner.models"],
    "runner.tracking": [*RUN, "runner.tracking"],
    "runner.deploy": [*TRAINING, "runner.deploy"],
    "runner.search": [*COMMON, "runner.run", "runner.search"],
    "runner.report": [*CONFIG, "runner.run", "runner.search", "runner.report"],
    "runner.commands": ["runner.commands", *TRAINING, "runner.tracking", "runner.deploy", "runner.report"],
    "runner.cli": ["runner.commands", *RUN],
    "runner.benchmarks": ["runner", "data_prep"],
    "launch": ["runner", "data_prep", "launch"],
}
# And of other packages what starts slowly.
WITHOUT_TORCH = ("runner.common", "runner.config", "runner.experiments", "runner.run", "runner.search", "runner.report")


@pytest.mark.parametrize("who", ALLOWED)
def test_imports_flow_one_way(who: str) -> None:
    files = [path for path in FILES if f"{module_of(path)}.".startswith(f"{who}.")]
    assert files
    allowed = ALLOWED[who]
    wrong = {}
    for path in files:
        ours = {name for name in modules_imported(path) if not within(name, allowed)}
        if ours:
            wrong[module_of(path)] = ours
    assert wrong == {}


def within(name: str, packages: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def modules_imported(path: Path) -> set[str]:
    """The modules of this project that a file imports, as deep as they are known."""
    known = {module_of(one) for one in FILES}
    names = {name for name in imports_of(path) if name.split(".")[0] in ("data_prep", "runner", "launch")}
    return {name for name in names & known if not any(other.startswith(f"{name}.") for other in names & known)}


def test_no_modules_import_each_other() -> None:
    """Not even within a package, or late."""
    graph = {module_of(path): modules_imported(path) for path in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules


def test_no_function_is_longer_than_a_screen() -> None:
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[bool(ast.get_docstring(node)) :]
                if body and body[-1].end_lineno - body[0].lineno >= 60:
                    long[f"{module_of(path)}.{node.name}"] = body[-1].end_lineno - body[0].lineno + 1
    assert long == {}


def test_every_file_is_in_the_order_above() -> None:
    outside = {module_of(path) for path in FILES} - {"runner", "runner.__main__"}
    assert {name for name in outside if not any(f"{name}.".startswith(f"{who}.") for who in ALLOWED)} == set()


@pytest.mark.parametrize("who", WITHOUT_TORCH)
def test_what_answers_at_once_has_no_torch(who: str) -> None:
    files = [path for path in FILES if f"{module_of(path)}.".startswith(f"{who}.")]
    assert {module_of(path): found for path in files if (found := imports(path, "torch", "numpy"))} == {}


# These packages belong to these files alone.
RESERVED_PREFIXES = {
    "ffcv": {"data_prep.beton", "runner.data.streaming", "runner.benchmarks.loader"},
    "tensorrt": {"runner.deploy.engine_library"},
    "tensorrt_rtx": {"runner.deploy.engine_library"},
    "wandb": {"runner.tracking.wandb_run", "runner.report.wandb_report"},
    "wandb_workspaces": {"runner.report.wandb_report"},
    "onnxruntime": {"runner.deploy.session", "runner.deploy.precision"},
    "optuna": {"runner.search.space", "runner.search.sampler", "runner.search.study"},
}


@pytest.mark.parametrize("package", RESERVED_PREFIXES)
def test_a_package_stays_in_its_rooms(package: str) -> None:
    users = {module_of(path) for path in FILES if imports(path, package)}
    assert users <= RESERVED_PREFIXES[package]


def test_wandb_ffcv_and_tensorrt_are_imported_late() -> None:
    early = {
        module_of(path): found
        for path in FILES
        if (
            found := {n.split(".")[0] for n in imports_of(path, top_level_only=True)}
            & (RESERVED_PREFIXES.keys() - {"onnxruntime"})
        )
    }
    assert early == {}


READING = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.*", "sys.argv", "sys.orig_argv", "sys.*"}


def test_only_the_edges_read_arguments_and_environment() -> None:
    readers = {module_of(path) for path in FILES if READING & names_in(path.read_text())}
    assert readers == {
        "runner.cli", "launch.__main__", "launch.quickstart", "data_prep.__main__", "runner.benchmarks.program",
        "runner.data.preview", "launch.speed", "launch.wheelhouse",
        "runner.benchmarks.modelopt_int8",  # a program for an environment without this project
    }  # fmt: skip


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['HOME']",
        "def late():\n    import os\n    return os.getenv('HOME')",
        "import os as system\nsystem.environ",
        "from os import environ",
        "from os import getenv as get",
        "from os import *",
        "from sys import argv",
    ],
)
def test_no_way_of_reading_them_escapes(source: str) -> None:
    assert READING & names_in(source)


def names_in(source: str) -> set[str]:
    """Dotted names that a source uses, whatever it calls the modules."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules = {alias.asname: alias.name for alias in imported if alias.asname}
    found = {f"{node.module}.{name.name}" for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            found.add(f"{modules.get(first, first)}.{rest}")
    return found
