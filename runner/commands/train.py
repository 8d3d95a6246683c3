"""`runner train`: train one experiment."""

import dataclasses
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING

from runner.commands.output import print_summaries
from runner.config.train_config import TrainConfig
from runner.system import launcher

if TYPE_CHECKING:
    from numpy import ndarray

    from runner.run.folder import Run
    from runner.run.schema import RunConfig
    from runner.training.evaluate import Evaluation


@dataclasses.dataclass(frozen=True)
class Train:
    """Train an experiment and print the summary."""

    config: TrainConfig

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        registered = self.config.check()
        if launcher.read(environ).by_accelerate:
            launcher.die_with_parent()  # before the slow imports
        from runner.tracking.tracker import Tracker
        from runner.training.session import TrackingCallbacks, run_training

        finished = run_training(self.config, registered, environ, TrackingCallbacks(Tracker, draw_figures))
        if finished.summaries:
            print_summaries(finished.summaries, self.config.json)
        if finished.exit_at_once:
            Tracker.exit_at_once(0)


def draw_figures(
    run: "Run", config: "RunConfig", test: "Evaluation", read_images: "Callable[[ndarray], ndarray]"
) -> None:
    """Draws the figures of a finished run; `read_images` reads test images by index."""
    from runner.tracking import figures

    logits, labels = test.logits.numpy(), test.labels.numpy()
    figures.write_mistakes(run, logits, labels, read_images(figures.mistakes_of(logits, labels)))
    samples = read_images(figures.sample_indices(test.num_images))
    figures.draw(run, config, test.confusion, logits, labels, samples)
