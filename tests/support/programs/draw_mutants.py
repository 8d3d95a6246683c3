"""Prints the mutants of a module as JSON lines: `line`, and the mutated `source`. Runs in cosmic-ray's environment.

draw_mutants.py MODULE OPERATORS, where OPERATORS is a regular expression.
"""

import contextlib
import json
import re
import sys
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

source = Path(sys.argv[1]).read_text()
nodes = list(ast_nodes(get_ast(source)))
for name in sorted(filter(re.compile(sys.argv[2]).fullmatch, operator_names())):
    operator = get_operator(name)()
    positions = [start for node in nodes for start, _ in operator.mutation_positions(node)]
    for occurrence, (line, _) in enumerate(positions):
        with contextlib.suppress(AttributeError):  # ExceptionReplacer fails on exceptions with a dotted name
            print(json.dumps({"line": line, "source": mutate_code(source, operator, occurrence)}))
