"""Local files first, W&B as a view of them. No run waits for its tracker, and none dies of it."""

import json
import sys
import threading
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from runner.runs import Run

PROJECT = "training-runner"
INIT_TIMEOUT = 15  # seconds until W&B counts as unreachable
FINISH_TIMEOUT = 30.0  # seconds it may take to hand over what it has left at the end
STEP = "global_step"


class Tracker:
    """Writes rows to metrics.jsonl and shows them to W&B. Made on rank 0 only.

    W&B is online where a key is known (WANDB_API_KEY, or a login in ~/.netrc) and offline otherwise;
    WANDB_MODE and its other variables win. Whatever goes wrong with W&B is told once and then left alone.
    """

    def __init__(
        self, run: Run, config: dict[str, Any], environ: MutableMapping[str, str], tags: list[str]
    ) -> None:
        self.run = run
        self.rows = run.metrics.open("a", buffering=1)
        self.wandb: Any = None
        self.hung = False  # W&B did not come back in time at the end; leaving needs os._exit
        mode = environ.get("WANDB_MODE") or ("online" if _has_key(environ) else "offline")
        if mode == "disabled":
            return
        # W&B's own files stay with the run, not under the home folder.
        for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            environ.setdefault(f"WANDB_{name}_DIR", str(run.folder.absolute() / "wandb" / f".{name.lower()}"))
        try:
            self._start(mode, config, environ, tags)
        except Exception as error:  # any failure of the tracker must leave the run alone
            self._tell(f"cannot be reached ({type(error).__name__}: {_first_line(error)}); going on offline")
            try:
                self._start("offline", config, environ, tags)
            except Exception as second:
                self._tell(f"cannot run offline either ({_first_line(second)}); metrics.jsonl has everything")

    def _start(self, mode: str, config: dict[str, Any], environ: MutableMapping[str, str], tags: list[str]) -> None:
        import wandb

        timeout = float(environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT))
        self.wandb = wandb.init(
            project=environ.get("WANDB_PROJECT", PROJECT),
            entity=environ.get("WANDB_ENTITY"),
            id=config["wandb_id"],
            name=environ.get("WANDB_NAME", f"{config['experiment']}/{config['run']}"),
            group=environ.get("WANDB_RUN_GROUP", config["paper"]),
            job_type=environ.get("WANDB_JOB_TYPE", "train"),
            tags=[*tags, *filter(None, environ.get("WANDB_TAGS", "").split(","))],
            config=config,
            dir=self.run.folder,
            mode=mode,
            resume="allow",
            settings=wandb.Settings(init_timeout=timeout, silent=True),
        )
        self.wandb.define_metric(STEP)
        self.wandb.define_metric("*", step_metric=STEP)

    def log(self, row: dict[str, float]) -> None:
        """Writes one row; it has `global_step`, the optimizer steps done so far."""
        self.rows.write(json.dumps(row) + "\n")
        self._show(lambda: self.wandb.log(row))

    def figures(self, paths: list[Path], step: int) -> None:
        """Shows pictures of the run."""

        def show() -> None:
            import wandb

            self.wandb.log({STEP: step} | {f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})

        self._show(show)

    def summarise(self, summary: dict[str, Any]) -> None:
        """Shows the outcome."""
        self._show(lambda: self.wandb.summary.update(summary))

    def finish(self) -> None:
        """Closes the files, and gives W&B a limited time to hand over what it has left."""
        self.rows.close()
        if self.wandb is None:
            return
        # A server that never answers would keep finish() for ever; the files are on disk by then.
        last = threading.Thread(target=lambda: self._show(self.wandb.finish), daemon=True)
        last.start()
        last.join(FINISH_TIMEOUT)
        self.hung = last.is_alive()
        if self.hung:
            self._tell(f"did not answer for {FINISH_TIMEOUT:.0f} s; its files are in {self.run.folder / 'wandb'}")

    def _show(self, action: Any) -> None:
        if self.wandb is None:
            return
        try:
            action()
        except Exception as error:
            self._tell(f"failed ({type(error).__name__}: {_first_line(error)}); metrics.jsonl goes on")
            self.wandb = None

    def _tell(self, message: str) -> None:
        print(f"W&B {message}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _has_key(environ: MutableMapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlsplit

    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
