"""The table of faults in faults.md: every test that it names exists, and is in the tier that it names."""

import ast
import functools
import re
from pathlib import Path

FOLDER = Path(__file__).parent
ROWS = [line.split(" | ") for line in (FOLDER / "faults.md").read_text().splitlines() if "::test_" in line]


@functools.cache
def functions_of(file: str) -> list[ast.FunctionDef]:
    return [node for node in ast.parse((FOLDER / file).read_text()).body if isinstance(node, ast.FunctionDef)]


def tier_of(test: str) -> str:
    """`every` for a test that is marked so, `both` for one of which some cases are, `default` for all others."""
    file, name = test.split("::")
    (decorators,) = [list(map(ast.unparse, node.decorator_list)) for node in functions_of(file) if node.name == name]
    if "pytest.mark.every" in decorators:
        return "every"
    return "both" if any("pytest.mark.every" in decorator for decorator in decorators) else "default"


def test_every_test_of_the_table_exists_in_its_tier() -> None:
    assert len(ROWS) > 27
    for _, _, tests, tier in ROWS:
        tiers = {tier_of(test) for test in re.findall(r"`(\w+\.py::\w+)`", tests)}
        assert tier.removesuffix(" |") == (tiers.pop() if len(tiers) == 1 else "both"), tests
