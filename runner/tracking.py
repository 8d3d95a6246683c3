"""Local files first, W&B as a view of them. No run waits for its tracker, and none dies of it."""

import json
import queue
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from runner import wandb_view
from runner.runs import Run, read_metrics

SERVER = "https://api.wandb.ai"
FINISH_TIMEOUT = 45.0  # seconds it may take at the end to be reached and to hand over what it has left
UPLOAD_RATE = 1e6  # bytes a second that it must manage beyond that
ONLINE = ("online", "shared")


class Tracker:
    """Writes rows to metrics.jsonl and shows them to W&B. Made on rank 0 only.

    W&B is online where a key is known (WANDB_API_KEY, or a login in ~/.netrc) and offline otherwise;
    WANDB_MODE and its other variables win. It lives in a thread of its own, which starts it with the first row:
    importing it and reaching its server take seconds, and training has begun by then. Whatever goes wrong with it
    is told once and then left alone.
    """

    def __init__(self, run: Run, config: dict[str, Any], environ: MutableMapping[str, str]) -> None:
        self.run, self.config, self.environ = run, config, environ
        self.place = len(read_metrics(run))  # of the next row; a run that is resumed has some
        self.rows = run.metrics.open("a", buffering=1)
        self.mode = environ.get("WANDB_MODE") or ("online" if has_key(environ) else "offline")
        self.before = self.place  # rows of the process before, which may not have handed them all over
        self.actions: queue.SimpleQueue[Callable[[Any], Any] | None] = queue.SimpleQueue()  # None is the last
        self.view = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self.hung = False  # W&B did not come back in time at the end; leaving needs os._exit

    def log(self, row: dict[str, float]) -> None:
        """Writes one row; it has `global_step`, the optimizer steps done so far."""
        self.rows.write(json.dumps(row) + "\n")
        place, self.place = self.place, self.place + 1
        self._show(lambda shown: wandb_view.log(shown, row, place))

    def conclude(self) -> None:
        """Shows what the finished run's folder holds."""
        self._show(lambda shown: wandb_view.conclude(shown, self.run, shown.settings.mode in ONLINE))

    def finish(self) -> None:
        """Closes the files, and gives W&B a limited time to hand over what it has left."""
        self.rows.close()
        if not self.view.ident:
            return
        self._show(lambda shown: shown.finish())
        self.actions.put(None)
        # A server that never answers would keep us for ever; the files are on disk by then.
        weights = sum(path.stat().st_size for path in self.run.checkpoints.rglob("model.safetensors"))
        self.view.join(FINISH_TIMEOUT + (weights / UPLOAD_RATE if self.mode in ONLINE else 0))
        self.hung = self.view.is_alive()
        if self.hung:
            self._tell(f"did not take everything in time; what it lacks is sent by: runner sync {self.run.folder}")

    def _show(self, action: Callable[[Any], Any]) -> None:
        if self.mode == "disabled":
            return
        if not self.view.ident:
            self.actions.put(self._catch_up)
            self.view.start()
        self.actions.put(action)

    def _catch_up(self, shown: Any) -> None:
        if self.before and shown.settings.mode in ONLINE:
            wandb_view.catch_up(shown, self.run, self.before)

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
        wandb_view.keep_inside(self.run, self.environ)
        try:
            return wandb_view.start(self.run, self.config, self.environ, self.mode)
        except Exception as error:
            self._tell(f"cannot be reached ({type(error).__name__}: {_first_line(error)}); going on offline")
        try:
            return wandb_view.start(self.run, self.config, self.environ, "offline")
        except Exception as error:
            self._tell(f"cannot run offline either ({_first_line(error)}); metrics.jsonl has everything")
            return None

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
