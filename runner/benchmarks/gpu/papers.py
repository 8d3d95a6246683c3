"""Part 6 of the GPU benchmark: trains every experiment in full, the cheapest first, as far as the time allows."""

import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from runner import experiments
from runner.benchmarks.gpu.context import Context, MissingError, OutOfTimeError, RefusedError, validation_options
from runner.benchmarks.gpu.ledger import Ledger
from runner.benchmarks.gpu.speed import FLOPS_PER_MAC
from runner.benchmarks.papers import collect_outcomes
from runner.config.recipe import Experiment, to_json
from runner.run.folder import Run

SEED = "seed-0"
# Of a large GPU, to sort experiments by their predicted time: seconds to launch a step's kernels, and achieved FLOP/s.
LAUNCH_SECONDS, FLOPS = 5e-3, 2e14


def measure(context: Context, ledger: Ledger) -> None:
    """Trains the experiments, and writes the outcomes from which the README's table of papers is generated."""
    images = context.manifest.splits["train"].images
    known = experiments.load()
    names = sorted(context.scale.paper_experiments or known, key=lambda name: predicted_seconds(known[name], images))
    # Accuracy does not depend on speed, and small networks leave most of a GPU idle, so several train at once.
    with ThreadPoolExecutor(context.scale.concurrent_trainings if context.max_ranks < 2 else 1) as pool:
        trainings = {
            name: pool.submit(train, context, name, known[name]) for name in names if name not in ledger.measured
        }
        waiting = {future: name for name, future in trainings.items()}
        for future in as_completed(waiting):
            ledger.once(waiting[future], future.result, remeasure=True)
            finished = [Run(context.out / "runs" / name / SEED) for name in ledger.measured]
            ledger.file.experiments = to_json(collect_outcomes(finished))
            ledger.write()


def predicted_seconds(experiment: Experiment, images: int) -> float:
    """Returns the approximate time of the whole training, whose steps are bound by launches or by arithmetic."""
    recipe = experiment.recipe
    step = max(LAUNCH_SECONDS, FLOPS_PER_MAC * recipe.batch_size * (experiment.macs or 1e9) / FLOPS)
    return recipe.epochs * images / recipe.batch_size * step


def train(context: Context, name: str, experiment: Experiment) -> dict[str, Any]:
    """Trains one experiment, and returns its accuracy; if the time runs out, the next start resumes it.

    Raises:
        MissingError: the time is up, or something that the experiment needs is missing.
    """
    if context.seconds_left() <= 0:
        raise OutOfTimeError
    start = time.monotonic()
    processes = max(n for n in range(1, max(1, context.max_ranks) + 1) if experiment.recipe.batch_size % n == 0)
    processes = 1 if context.rehearse else processes
    options = validation_options(experiment, context.manifest.splits["train"].images)
    options += ["--precision", "fp32" if context.rehearse else "bf16", *context.scale.paper_options]
    try:
        run = context.train(name, SEED, *options, processes=processes)
    except RefusedError as error:  # e.g. ImageNet weights are needed, and there is no network
        raise MissingError(str(error)) from None
    (outcome,) = to_json(collect_outcomes([run]))
    figures = {key: outcome[key] for key in ("test_accuracy", "reproduced", "difference", "epochs") if key in outcome}
    return figures | {"took_seconds": round(time.monotonic() - start, 2)}  # beside other trainings
