"""Local files first, W&B as a view of them. No run waits for its tracker, and none dies of it."""

import json
import queue
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from runner.runs import Run

PROJECT = "training-runner"
SERVER = "https://api.wandb.ai"
INIT_TIMEOUT = 15  # seconds until W&B counts as unreachable
FINISH_TIMEOUT = 45.0  # seconds it may take at the end to be reached and to hand over what it has left
STEP = "global_step"
OURS = "/."  # ends the folders that we choose, and changes nothing about them


class Tracker:
    """Writes rows to metrics.jsonl and shows them to W&B. Made on rank 0 only.

    W&B is online where a key is known (WANDB_API_KEY, or a login in ~/.netrc) and offline otherwise;
    WANDB_MODE and its other variables win. It lives in a thread of its own, which starts it with the first row:
    importing it and reaching its server take seconds, and training has begun by then. Whatever goes wrong with it
    is told once and then left alone.
    """

    def __init__(
        self, run: Run, config: dict[str, Any], environ: MutableMapping[str, str], tags: list[str]
    ) -> None:
        self.run, self.config, self.environ, self.tags = run, config, environ, tags
        self.rows = run.metrics.open("a", buffering=1)
        self.mode = environ.get("WANDB_MODE") or ("online" if has_key(environ) else "offline")
        self.actions: queue.SimpleQueue[Callable[[Any], Any] | None] = queue.SimpleQueue()  # None is the last
        self.view = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self.hung = False  # W&B did not come back in time at the end; leaving needs os._exit

    def log(self, row: dict[str, float]) -> None:
        """Writes one row; it has `global_step`, the optimizer steps done so far."""
        self.rows.write(json.dumps(row) + "\n")
        self._show(lambda shown: shown.log(row))

    def figures(self, paths: list[Path], step: int) -> None:
        """Shows pictures of the run."""

        def show(shown: Any) -> None:
            import wandb

            shown.log({STEP: step} | {f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})

        self._show(show)

    def summarise(self, summary: dict[str, Any]) -> None:
        """Shows the outcome."""
        self._show(lambda shown: shown.summary.update(summary))

    def finish(self) -> None:
        """Closes the files, and gives W&B a limited time to hand over what it has left."""
        self.rows.close()
        if not self.view.ident:
            return
        self._show(lambda shown: shown.finish())
        self.actions.put(None)
        # A server that never answers would keep us for ever; the files are on disk by then.
        self.view.join(FINISH_TIMEOUT)
        self.hung = self.view.is_alive()
        if self.hung:
            self._tell(f"did not answer for {FINISH_TIMEOUT:.0f} s; its files are in {self.run.folder / 'wandb'}")

    def _show(self, action: Callable[[Any], Any]) -> None:
        if self.mode == "disabled":
            return
        if not self.view.ident:
            self.view.start()
        self.actions.put(action)

    def _serve(self) -> None:
        """The thread: starts W&B, and does what it is given until one action fails or no more come."""
        shown = self._start()
        while shown is not None and (action := self.actions.get()) is not None:
            try:
                action(shown)
            except Exception as error:  # any failure of the tracker must leave the run alone
                self._tell(f"failed ({type(error).__name__}: {_first_line(error)}); metrics.jsonl goes on")
                return

    def _start(self) -> Any:
        """W&B's run, online if that is wanted and possible; None where it cannot run at all."""
        # W&B's own files stay with the run, not under the home folder.
        for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            folder = self.run.folder.absolute() / "wandb" / f".{name.lower()}"
            if self.environ.get(f"WANDB_{name}_DIR", OURS).endswith(OURS):  # unset, or of an earlier run of ours
                self.environ[f"WANDB_{name}_DIR"] = f"{folder}{OURS}"
        try:
            return self._init(self.mode)
        except Exception as error:
            self._tell(f"cannot be reached ({type(error).__name__}: {_first_line(error)}); going on offline")
        try:
            return self._init("offline")
        except Exception as error:
            self._tell(f"cannot run offline either ({_first_line(error)}); metrics.jsonl has everything")
            return None

    def _init(self, mode: str) -> Any:
        import wandb

        config, environ = self.config, self.environ
        timeout = float(environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT))
        shown = wandb.init(
            project=environ.get("WANDB_PROJECT", PROJECT),
            entity=environ.get("WANDB_ENTITY"),
            id=config["wandb_id"],
            name=environ.get("WANDB_NAME", f"{config['experiment']}/{config['run']}"),
            group=environ.get("WANDB_RUN_GROUP", config["paper"]),
            job_type=environ.get("WANDB_JOB_TYPE", "train"),
            tags=[*self.tags, *filter(None, environ.get("WANDB_TAGS", "").split(","))],
            config=config,
            dir=self.run.folder,
            mode=mode,
            resume="allow",
            settings=wandb.Settings(init_timeout=timeout, silent=True),
        )
        shown.define_metric(STEP)
        shown.define_metric("*", step_metric=STEP)
        return shown

    def _tell(self, message: str) -> None:
        print(f"W&B {message}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def has_key(environ: Mapping[str, str]) -> bool:
    """Whether W&B's key is in the environment or in ~/.netrc."""
    if environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlsplit

    host = urlsplit(environ.get("WANDB_BASE_URL", SERVER)).hostname
    try:
        return netrc.netrc(environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
