"""`runner card`: writes a model card."""

import dataclasses
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated

import tyro

from runner.commands.report import check_outputs
from runner.run.folder import Run


@dataclasses.dataclass(frozen=True)
class Card:
    """Write a model card in Markdown: data, recipe, accuracy, gate, latency, limits."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, RUNS/NAME/RUN."""
    out: Path | None = None
    """File to write the card to, instead of standard output."""
    license: str | None = None
    """License of the model, such as Apache-2.0; by default the card says that none is stated."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        from runner.common.files import write_atomically
        from runner.common.text import printable
        from runner.report import card, collect

        if self.out is not None:
            check_outputs({"--out": self.out})
        text = card.render(collect.read(Run(self.run)), self.license)
        if self.out is None:
            sys.stdout.write(text)
            return
        write_atomically(self.out, text.encode())
        print(printable(self.out))
