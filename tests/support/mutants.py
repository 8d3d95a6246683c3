"""Mutation testing: breaks a module in many small ways, drawn by cosmic-ray, and reports what its tests do not notice.

`launch/mutants MODULE` calls this. It works on a copy of the checkout. The tests of each mutant run in a process that
is forked from this one, in which torch and other libraries, but nothing of the project, are already imported. A mutant
that survives is a missing assertion, needless code, or does what the original does; then its entry in the ledger gets
the reason by hand (`equivalent`), which the next run keeps.
"""

import contextlib
import difflib
import gc
import importlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
from hypothesis import Phase, settings

from runner.system import environment
from tests.support import processes, warm

ROOT = Path(__file__).parents[2]
LEDGERS = ROOT / "tests" / "mutants"
BATCH = (
    "pass_words_on or a_job or second_signal or controller_that or many_nodes or one_node or ipv6_address or stop_file "
    "or batch_script_without or container_gets or gives_up_before or requeues_that "
    "or ranks_do_not or ranks_that_stop or cancelled_job or only_a_failed or complete_run or failed_step"
)
STREAM = "earlier_versions or seed_and_epoch or offsets or alternating"
# The modules, and for each the selections of tests, as arguments of pytest: as few tests as hold what the module
# promises, and the quick ones first, because the later ones run only on the mutants that survive those before.
MODULES = {
    "launch/submit.py": [
        "tests/test_submit.py -k 'sbatch_takes or sbatch_reads or one_node or each_gpu or plain_name or the_answer'",
        "tests/test_submit.py -k inherit",
        "tests/test_submit.py -k 'dry_run or exits_2 or missing or before_the_queue or only_what'",
    ],
    **{
        script: [f"tests/test_launch.py -k '{selection}'"]
        for script, selection in {
            "slurm/train.sbatch": BATCH,
            "slurm/sweep.sbatch": "task_of_a_sweep or pass_words_on or sweep_needs or sweep_of_one",
            "slurm/search.sbatch": "worker_of_a_search",
            "slurm/requeue": f"{BATCH} or worker_of_a_search",
            "slurm/count_gpus": "gpus_are_counted",
            "slurm/train_node": "each_node_starts or pass_words_on or gives_its_cpus or first_node or without_gpus",
        }.items()
    },
    "runner/common/command_line.py": [
        "tests/test_command_lines.py -k 'not any_order'",
        "tests/test_command_lines.py -k any_order",
    ],
    "runner/data/augment.py": [
        f"tests/test_batches.py -k '{STREAM} or changes_the_images or jitter or cutout or resized_crop'",
        "tests/test_policy.py -k 'parameters or erasing or copies or uniform'",
    ],
    "runner/data/mixing.py": [
        "tests/test_batches.py -k 'earlier_versions or mixed or mixup'",
        "tests/test_batches.py -k 'union_over_ranks and resident'",
    ],
    "runner/data/order.py": [
        f"tests/test_batches.py -k '{STREAM}'",
        "tests/test_policy.py -k 'parameters or copies or copy'",
    ],
    "runner/deploy/onnx.py": [
        "tests/test_onnx.py -k 'not computes_what'",
        "tests/test_onnx.py -k computes_what",
    ],
    "runner/deploy/parity.py": ["tests/test_parity.py"],
    "runner/deploy/precision.py": [
        "tests/test_precision.py",
        "tests/test_precision_search.py -k '(images or kept_operator or ranges) and not leave_none'",
    ],
    "runner/deploy/precision_search.py": [
        "tests/test_precision_search.py -k 'all_needed or few or exactly'",
        "tests/test_precision_search.py -k '(accuracy_is_found or images) and not leave_none'",
    ],
    "runner/report/compare.py": [
        "tests/test_compare.py",
        "tests/test_report.py -k 'grouped or label or deviation or reproduced or earlier_versions or json_rows'",
        "tests/test_watch.py -k 'compare_shows or without_a_difference'",
    ],
    "runner/search/halving.py": [
        "tests/test_search.py -k 'whatever_the_order or rungs_end or only_the_best or of_equals or brackets'"
    ],
    "runner/search/space.py": [
        "tests/test_search.py -k 'may_be_a_range or no_range or a_range or sampled_numbers or finite_space'"
    ],
    "runner/training/checkpoint.py": [
        "tests/test_checkpoint.py -k 'not kill_at_any'",
        "tests/test_checkpoint.py -k kill_at_any",
    ],
    "runner/training/evaluate.py": [
        "tests/test_evaluate.py tests/test_train_pieces.py -k 'test_metrics or views or torchmetrics or resident'",
        "tests/test_evaluate.py tests/test_train_pieces.py -k 'asked or restored or twice or augmentation_is_reported'",
    ],
    "runner/training/optim.py": [
        "tests/test_optim.py tests/test_properties.py -k 'test_optim or schedule'",
        "tests/test_train_pieces.py -k 'average_over_steps or statistics_of_batch'",
    ],
    "runner/training/state.py": ["tests/test_state.py"],
}
# One replacement for each operator, because others of the same operator survive or die together.
OPERATORS = (
    "core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_FloorDiv|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul|RShift_LShift"
    "|LShift_RShift|BitOr_BitAnd|BitAnd_BitOr|BitXor_BitOr)"
    "|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Lt_Gt|LtE_GtE|Gt_Lt|GtE_LtE|Is_IsNot"
    "|IsNot_Is)"
    "|ReplaceUnaryOperator_.*|AddNot|ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd"
    "|ReplaceBreakWithContinue|ReplaceContinueWithBreak|NumberReplacer|ExceptionReplacer|ZeroIterationForLoop)"
)
KEYWORDS = "if|elif|else|then|fi|for|while|do|done|case|esac|local|set|source"
# In scripts of the shell: comparisons, conditions, numbers, and commands that are left out.
SHELL = (
    *((rf"(?<= )-{old}(?= )", f"-{new}") for old, new in (
        ("eq", "ne"), ("ne", "eq"), ("ge", "gt"), ("gt", "ge"), ("lt", "le"), ("le", "lt"), ("n", "z"), ("z", "n"),
        ("e", "n"), ("d", "e"),
    )),
    (r"&&", "||"),
    (r"\|\|", "&&"),
    (r"(?<=[\[( ])! ", ""),
    (r"(?<= )(!=)(?= )", "="),
    (r"(?<= )=(?= )", "!="),
    (r"(?<![\w.$:{&-])(\d+)(?![\w.}>-])", r"1\g<1>"),
    (rf"^(\s*)(?!(?:{KEYWORDS})\b)([A-Za-z_][^={{}}]*)(?=\n)", r"\g<1>:"),
)  # fmt: skip


def main(tool: Path, arguments: list[str]) -> None:
    """Runs the mutants of a module, or those that `--survivors` selects, and writes and prints the ledger."""
    module, again = "".join(arguments[:1]), arguments[1:] == ["--survivors"]
    if module not in MODULES or (arguments[1:] and not again):
        expected = f"expected one of {', '.join(MODULES)}, and then nothing or --survivors"
        print(
            f"mutants: {' '.join(arguments) or 'MODULE'}: {expected}; others are added in {__file__}", file=sys.stderr
        )
        raise SystemExit(2)
    install(tool)
    earlier = read_ledger(module)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        checkout = copy_checkout(Path(folder))
        drawn = mutants = draw(tool, checkout, module)
        if again:
            known, newer = {entry["change"] for entry in earlier["survived"]}, lines_since(earlier["commit"], module)
            mutants = [mutant for mutant in drawn if mutant["change"] in known or mutant["line"] in newer]
        prepare_to_fork(checkout)
        run_mutants(checkout, module, mutants)
    write_ledger(module, len(drawn), mutants, earlier, again)


def install(tool: Path) -> None:
    """Installs cosmic-ray, apart from the project's environment, which it does not belong to."""
    if not (tool / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", tool], check=True)
        command = ["uv", "pip", "install", "--quiet", "--python", tool / "bin/python", "cosmic-ray==8.7.0"]
        subprocess.run(command, check=True)
        (tool / "complete").touch()


def copy_checkout(folder: Path) -> Path:
    """Copies the files that git tracks or would add, and returns the copy."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def draw(tool: Path, checkout: Path, module: str) -> list[dict[str, Any]]:
    """Returns the mutants of a module: `line`, `source` and `change`, which is the changed lines."""
    if not module.endswith(".py"):
        return draw_shell(checkout / module)
    program = ROOT / "tests/support/programs/draw_mutants.py"
    command = [tool / "bin/python", program, checkout / module, OPERATORS]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env={}).stdout
    original = (checkout / module).read_text()
    drawn = [
        mutant | {"change": change_of(original, mutant["source"])} for mutant in map(json.loads, printed.splitlines())
    ]
    # Checks of the program itself, which no input fails.
    checks = re.compile("(frozen|kw_only|strict)=False")
    return sorted((one for one in drawn if not checks.search(one["change"])), key=lambda mutant: mutant["line"])


def draw_shell(path: Path) -> list[dict[str, Any]]:
    """Returns the mutants of a script of the shell, for which there is no tool: each match of SHELL, one at a time.

    A script that bash would not read is not a mutant, because no job would start.
    """
    original = path.read_text()
    lines, drawn = original.splitlines(keepends=True), []
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        for pattern, replacement in SHELL:
            for match in re.finditer(pattern, line):
                changed = line[: match.start()] + match.expand(replacement) + line[match.end() :]
                source = "".join([*lines[: number - 1], changed, *lines[number:]])
                read = subprocess.run(["bash", "-n"], input=source, text=True, capture_output=True, check=False)
                if read.returncode == 0 and source != original:
                    change = change_of(original, source)
                    drawn.append({"line": number, "source": source, "change": change})
    return drawn


def lines_since(commit: str, module: str) -> set[int]:
    """Returns the lines of a module that are not the same as in an earlier commit."""
    command = ["git", "diff", "--unified=0", commit, "--", module]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines: set[int] = set()
    for start, count in re.findall(r"^@@ \S+ \+(\d+)(?:,(\d+))? @@", printed, re.M):
        lines |= set(range(int(start), int(start) + int(count or 1)))
    return lines


def change_of(before: str, after: str) -> str:
    """Returns the lines that differ in one line: `before → after`."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    texts = (" ".join(re.sub("  # .*", "", line[1:]).strip() for line in lines if line[0] == sign) for sign in "-+")
    return " → ".join(texts)


def prepare_to_fork(checkout: Path) -> None:
    """Imports libraries, forgets the project's modules, and makes the copy of the checkout the one that is imported."""
    for name in warm.IMPORTS:
        if not name.startswith(("runner", "launch", "data_prep")):
            importlib.import_module(name)
    for name in [name for name in sys.modules if name.startswith(("runner", "launch", "data_prep", "tests"))]:
        del sys.modules[name]
    sys.path[:] = [str(checkout), *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(checkout)
    os.chdir(checkout)
    # The first example that fails is enough.
    settings.register_profile("ci", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
    gc.collect()
    gc.freeze()


def run_mutants(checkout: Path, module: str, mutants: list[dict[str, Any]]) -> None:
    """Adds an `outcome` to each mutant: killed, timed out, or survived."""
    path, log, stages = checkout / module, checkout / "mutant.log", []
    for selection in MODULES[module]:
        start = time.monotonic()
        recorder = LineRecorder(path, checkout / "lines.json")
        if run_tests(shlex.split(selection), log, 1800, recorder) != "survived":
            print(f"mutants: pytest {selection}: expected to pass without a mutant:", file=sys.stderr)
            print(log.read_text()[-3000:], file=sys.stderr)
            raise SystemExit(1)
        seconds = time.monotonic() - start
        stages.append((json.loads(recorder.output.read_text()), 20 + 4 * seconds))  # a mutant may loop forever
        print(f"without a mutant, {seconds:.1f} s: pytest {selection}", flush=True)
    # Python compares a compiled file with the size and the second of its source, which mutants have in common.
    os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()
    for number, mutant in enumerate(mutants, 1):
        path.write_text(mutant["source"])
        start = time.monotonic()
        for stage, (lines, limit) in enumerate(stages, 1):  # noqa: B007
            mutant["outcome"] = run_tests(tests_of(mutant["line"], lines), log, limit)
            if mutant["outcome"] != "survived":
                break
        took = f"{mutant['outcome']} by selection {stage} in {time.monotonic() - start:.1f} s"
        print(f"{number}/{len(mutants)} {took}: {mutant['line']}: {mutant['change']}", flush=True)


def tests_of(line: int, lines: dict[str, list[int]]) -> list[str]:
    """Returns the tests that run a line, and those that run none of the module, perhaps because its process is another.

    A line that no test runs by itself runs when the module is imported; then all tests are returned.
    """
    if not any(line in found for found in lines.values()):
        return list(lines)
    return [test for test, found in lines.items() if line in found or not found]


class LineRecorder:
    """A plugin of pytest that records which lines of a file each test runs in this process."""

    def __init__(self, path: Path, output: Path) -> None:
        self.path, self.output = str(path), output
        self.lines: dict[str, set[int]] = {}
        self.current: set[int] = set()

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        """Called by Python for each line of the file, and for each call elsewhere."""
        if frame.f_code.co_filename != self.path or frame.f_code.co_name == "<module>":
            return None
        self.current.add(frame.f_lineno)
        return self.trace

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.current = self.lines.setdefault(item.nodeid, set())
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def pytest_sessionfinish(self) -> None:
        self.output.write_text(json.dumps({test: sorted(lines) for test, lines in self.lines.items()}))


def run_tests(tests: list[str], log: Path, seconds: float, plugin: LineRecorder | None = None) -> str:
    """Runs tests in a forked process for at most `seconds`."""
    child = os.fork()
    if child == 0:
        os.setsid()
        run_pytest(tests, log, plugin)
    descriptor = os.pidfd_open(child)
    try:
        ended = select.select([descriptor], [], [], seconds)[0]
    finally:
        os.close(descriptor)
        for process in processes.descendants_of(child):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "survived" if ended and code == 0 else "killed" if ended else "timed out"


def run_pytest(tests: list[str], log: Path, plugin: LineRecorder | None) -> NoReturn:
    """Runs pytest in this process, which is a fork, and ends it."""
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        fork_warm_server()
        # As a process of pytest-xdist, it shares the datasets and runs that the first made, without a mutant.
        os.environ["PYTEST_XDIST_WORKER"] = "mutant"
        folder = log.with_name("temporary") / "mutant"
        folder.parent.mkdir(exist_ok=True)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(folder)]
        code = pytest.main([*options, *tests], [plugin] if plugin else [])
    finally:
        os._exit(code)


def fork_warm_server() -> None:
    """Gives the tests of this process a server of warm processes that is forked too, which costs less."""
    from tests.support import processes, warm  # of the copy

    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        select.select([theirs], [], [])  # most tests never need it
        sys.argv[1:] = [str(theirs.detach())]
        warm.main()
        os._exit(0)
    theirs.close()
    server = object.__new__(warm.Server)
    server.socket, server.has_ended = ours, lambda: False
    processes._servers[""] = server


def read_ledger(module: str) -> dict[str, Any]:
    """Returns the ledger of a module, or {} if there is none."""
    path = ledger_of(module)
    return json.loads(path.read_text()) if path.is_file() else {}


def ledger_of(module: str) -> Path:
    """Returns the file of a module's ledger."""
    return LEDGERS / f"{module.removesuffix('.py').replace('/', '.')}.json"


def write_ledger(module: str, made: int, mutants: list[dict[str, Any]], earlier: dict[str, Any], again: bool) -> None:
    """Writes the ledger of a module, keeps the reasons of earlier equivalent mutants, and prints the survivors."""
    reasons = {entry["change"]: entry["equivalent"] for entry in earlier.get("survived", ())}
    survived = [
        {key: mutant[key] for key in ("line", "change")} | {"equivalent": reasons.get(mutant["change"])}
        for mutant in mutants if mutant["outcome"] == "survived"
    ]  # fmt: skip
    # A test that times out has noticed the mutant as well: it loops forever, or waits for what never comes.
    timed_out = sum(mutant["outcome"] == "timed out" for mutant in mutants) + (earlier["timed_out"] if again else 0)
    new = sum(entry["change"] not in reasons for entry in survived)
    ledger = {
        "module": module,
        "tests": MODULES[module],
        "commit": environment.git_revision().commit,
        "made": made,
        "killed": made - timed_out - len(survived),
        "timed_out": timed_out,
        "survived_at_first": earlier.get("survived_at_first", 0) + new,
        "survived": survived,
    }
    LEDGERS.mkdir(exist_ok=True)
    ledger_of(module).write_text(json.dumps(ledger, indent=2, ensure_ascii=False) + "\n")
    for entry in survived:
        print(f"{module}:{entry['line']}: {entry['change']}: {entry['equivalent'] or 'not noticed by any test'}")
    equivalent = sum(entry["equivalent"] is not None for entry in survived)
    print(f"{made} mutants: {ledger['killed']} killed, {timed_out} timed out, {len(survived)} survived, of which "
          f"{equivalent} equivalent; {ledger_of(module).relative_to(ROOT)}")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
