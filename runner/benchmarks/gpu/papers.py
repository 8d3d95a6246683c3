"""Part 6: every experiment in full, the cheapest first, as far as the time goes."""

from typing import Any

from runner import experiments
from runner.benchmarks import papers as collected
from runner.benchmarks.gpu.part import Context, Ledger, MissingError, RefusedError, fitted
from runner.recipe import Experiment
from runner.runs import Run

SEED = "seed-0"


def measure(context: Context, ledger: Ledger) -> None:
    """Trains, and keeps beside the findings what the README's table of papers is made of."""
    images = context.manifest.splits["train"].images
    known = experiments.load()
    chosen = context.scale.reproduced or tuple(known)
    for name in sorted(chosen, key=lambda name: cost(known[name], images)):
        ledger.once(name, lambda name=name: reproduced(context, name, known[name]))
        whole = [Run(context.out / "runs" / name / SEED) for name in ledger.found]
        ledger.write(experiments=collected.entries(whole))


def cost(experiment: Experiment, images: int) -> float:
    """Multiply-accumulates of the whole training."""
    return experiment.recipe.epochs * images * (experiment.macs or 1e9)


def reproduced(context: Context, name: str, experiment: Experiment) -> dict[str, Any]:
    """Trains one; what time ends in the middle goes on at the next start."""
    processes = max(n for n in range(1, max(1, context.gpus) + 1) if experiment.recipe.batch_size % n == 0)
    processes = 1 if context.rehearse else processes
    images = context.manifest.splits["train"].images
    options = [*fitted(experiment, images), *context.scale.training]
    precision = "fp32" if context.rehearse else "bf16"
    try:
        run = context.train(name, SEED, "--precision", precision, *options, processes=processes)
    except RefusedError as error:  # ImageNet's weights, where there is no network
        raise MissingError(str(error)) from None
    (entry,) = collected.entries([run])
    return {key: entry[key] for key in ("test_accuracy", "reproduced", "difference", "epochs") if key in entry}
