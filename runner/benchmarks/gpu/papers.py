"""Part 6 of the GPU benchmark: trains every experiment in full, the cheapest first, as far as the time allows."""

from functools import partial
from typing import Any

from runner import experiments
from runner.benchmarks.gpu.context import Context, MissingError, RefusedError, validation_options
from runner.benchmarks.gpu.ledger import Ledger
from runner.benchmarks.papers import collect_outcomes
from runner.config.recipe import Experiment, to_json
from runner.run.folder import Run

SEED = "seed-0"


def measure(context: Context, ledger: Ledger) -> None:
    """Trains the experiments, and writes the outcomes from which the README's table of papers is generated."""
    images = context.manifest.splits["train"].images
    known = experiments.load()
    names = context.scale.reproduced or tuple(known)
    for name in sorted(names, key=lambda name: cost(known[name], images)):
        ledger.once(name, partial(train, context, name, known[name]))
        finished = [Run(context.out / "runs" / name / SEED) for name in ledger.measured]
        ledger.file.experiments = to_json(collect_outcomes(finished))
        ledger.write()


def cost(experiment: Experiment, images: int) -> float:
    """Returns the multiply-accumulates of the whole training."""
    return experiment.recipe.epochs * images * (experiment.macs or 1e9)


def train(context: Context, name: str, experiment: Experiment) -> dict[str, Any]:
    """Trains one experiment, and returns its accuracy; if the time runs out, the next start resumes it."""
    processes = max(n for n in range(1, max(1, context.gpus) + 1) if experiment.recipe.batch_size % n == 0)
    processes = 1 if context.rehearse else processes
    options = validation_options(experiment, context.manifest.splits["train"].images)
    options += ["--precision", "fp32" if context.rehearse else "bf16", *context.scale.training]
    try:
        run = context.train(name, SEED, *options, processes=processes)
    except RefusedError as error:  # e.g. ImageNet weights are needed, and there is no network
        raise MissingError(str(error)) from None
    (outcome,) = to_json(collect_outcomes([run]))
    return {key: outcome[key] for key in ("test_accuracy", "reproduced", "difference", "epochs") if key in outcome}
