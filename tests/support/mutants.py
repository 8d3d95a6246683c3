"""Mutation testing with cosmic-ray: breaks a module in many small ways and reports what its tests do not notice.

`launch/mutants MODULE` calls this. It works on a copy of the checkout. A mutant that survives is a missing assertion,
or it does what the original does; then its entry in the ledger gets the reason by hand (`equivalent`), which the next
run keeps.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runner.common.console import progress
from runner.system import environment

ROOT = Path(__file__).parents[2]
LEDGERS = ROOT / "tests" / "mutants"
TIMEOUT = 180.0  # seconds for the tests of one mutant, which may loop forever
STREAM = "tests/test_batches.py -k 'earlier_versions or seed_and_epoch or offsets or alternating"
# The modules, and the arguments of pytest that select their tests: as few as hold what the module promises.
MODULES = {
    "launch/submit.py": "tests/test_submit.py",
    "runner/common/command_line.py": "tests/test_command_lines.py",
    "runner/data/augment.py": f"{STREAM} or changes_the_images or jitter or cutout'",
    "runner/data/mixing.py": f"{STREAM} or mixed or mixup or union_over_ranks and resident'",
    "runner/data/order.py": f"{STREAM}'",
    "runner/deploy/parity.py": "tests/test_deploy.py -k 'gate or parity or refused or current'",
    "runner/report/compare.py": "tests/test_report.py tests/test_watch.py",
    "runner/training/checkpoint.py": "tests/test_checkpoint.py tests/test_resume.py",
    "runner/training/evaluate.py": "tests/test_evaluate.py tests/test_train_pieces.py",
    "runner/training/optim.py": "tests/test_optim.py",
    "runner/training/state.py": "tests/test_train_pieces.py tests/test_resume.py",
}
# One replacement for each operator, because others of the same operator survive or die together.
OPERATORS = (
    "ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_FloorDiv|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul|RShift_LShift|LShift_RShift"
    "|BitOr_BitAnd|BitAnd_BitOr|BitXor_BitOr)",
    "ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Lt_Gt|LtE_GtE|Gt_Lt|GtE_LtE|Is_IsNot"
    "|IsNot_Is)",
    "ReplaceUnaryOperator_.*", "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr",
    "ReplaceOrWithAnd", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer", "ExceptionReplacer",
    "ZeroIterationForLoop",
)  # fmt: skip


def main(tool: Path, arguments: list[str]) -> None:
    """Runs all mutants of a module, and writes and prints its ledger."""
    (module,) = arguments if len(arguments) == 1 else ("",)
    if module not in MODULES:
        expected = f"expected one of {', '.join(MODULES)}"
        print(
            f"mutants: {' '.join(arguments) or 'MODULE'}: {expected}; others are added in {__file__}", file=sys.stderr
        )
        raise SystemExit(2)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        checkout = copy_checkout(Path(folder))
        tests = f"env PYTHONPATH={checkout} {sys.executable} -m pytest -x -q -p no:cacheprovider {MODULES[module]}"
        baseline = subprocess.run(tests, cwd=checkout, shell=True, capture_output=True, text=True, check=False)
        if baseline.returncode != 0:
            print(f"mutants: {tests}: expected to pass without a mutant:\n{baseline.stdout[-2000:]}", file=sys.stderr)
            raise SystemExit(1)
        rows = run_mutants(tool, checkout, module, tests)
    write_ledger(module, rows)


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


def run_mutants(tool: Path, checkout: Path, module: str, tests: str) -> list[dict[str, Any]]:
    """Runs the tests on each mutant; returns cosmic-ray's results."""
    config, session = checkout / "mutants.toml", checkout / "mutants.sqlite"
    excluded = f"^(?!core/({'|'.join(OPERATORS)})$)"
    config.write_text(
        f"[cosmic-ray]\nmodule-path = {json.dumps(module)}\ntimeout = {TIMEOUT}\nexcluded-modules = []\n"
        f"test-command = {json.dumps(tests)}\n[cosmic-ray.distributor]\nname = 'local'\n"
        f"[cosmic-ray.filters.operators-filter]\nexclude-operators = [{json.dumps(excluded)}]\n"
    )
    for command in (["cosmic-ray", "init", config, session], ["cr-filter-operators", session, config]):
        subprocess.run([tool / command[0], *command[1:]], cwd=checkout, check=True)
    made = len(results(tool, session, done=False))
    process = subprocess.Popen([tool / "cosmic-ray", "exec", config, session], cwd=checkout)
    with progress(f"mutants of {module}", made) as advance:
        done = 0
        while done < made:
            ended = process.poll() is not None
            now = len(results(tool, session))
            advance(now - done)
            done = now
            if ended:
                break
            time.sleep(2)
    if process.wait() != 0:
        raise SystemExit(f"mutants: cosmic-ray ended with exit code {process.returncode}")
    return results(tool, session)


def results(tool: Path, session: Path, done: bool = True) -> list[dict[str, Any]]:
    """Returns the mutants that are not filtered out, with their outcome if `done`."""
    dump = subprocess.run([tool / "cosmic-ray", "dump", session], capture_output=True, text=True, check=True).stdout
    rows = []
    for job, outcome in map(json.loads, dump.splitlines()):
        wanted = not done if outcome is None else outcome["worker_outcome"] != "skipped"
        if wanted:
            rows.append(job["mutations"][0] | (outcome or {}))
    return rows


def write_ledger(module: str, rows: list[dict[str, Any]]) -> None:
    """Writes the ledger of a module, keeps the reasons of earlier equivalent mutants, and prints the survivors."""
    path = LEDGERS / f"{module.removesuffix('.py').replace('/', '.')}.json"
    reasons: dict[str, str | None] = {}
    if path.is_file():
        reasons = {entry["change"]: entry["equivalent"] for entry in json.loads(path.read_text())["survived"]}
    # A test that times out has noticed the mutant as well: it loops forever, or waits for what never comes.
    timed_out = [row for row in rows if "timeout" in (row.get("output") or "").lower()[:200]]
    survived = []
    for row in rows:
        if row["test_outcome"] == "survived":
            change = change_of(row["diff"])
            survived.append({"line": row["start_pos"][0], "change": change, "equivalent": reasons.get(change)})
    survived.sort(key=lambda entry: entry["line"])
    ledger = {
        "module": module,
        "tests": MODULES[module],
        "commit": environment.git_revision().commit,
        "made": len(rows),
        "killed": len(rows) - len(survived) - len(timed_out),
        "timed_out": len(timed_out),
        "survived": survived,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(ledger, indent=2) + "\n")
    for entry in survived:
        print(f"{module}:{entry['line']}: {entry['change']}: {entry['equivalent'] or 'not noticed by any test'}")
    equivalent = sum(entry["equivalent"] is not None for entry in survived)
    print(f"{len(rows)} mutants: {ledger['killed']} killed, {len(timed_out)} timed out, {len(survived)} survived, "
          f"of which {equivalent} equivalent; {path.relative_to(ROOT)}")  # fmt: skip


def change_of(diff: str) -> str:
    """Returns the changed lines of a unified diff in one line: `before → after`."""
    lines = [re.sub("  # .*", "", line) for line in diff.splitlines() if re.match(r"[-+](?![-+]{2} )", line)]
    before, after = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return f"{before} → {after}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
