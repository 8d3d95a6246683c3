"""Logs metrics to metrics.jsonl first and to W&B second. Training never waits for W&B and never fails because of it."""

import os
import sys
import threading
from collections.abc import Callable, MutableMapping
from queue import SimpleQueue
from typing import Any, NoReturn, cast

from runner.common.text import first_line
from runner.run.folder import WEIGHTS, Run
from runner.run.metrics import encode_row, read_metrics
from runner.run.schema import MetricRow, RunConfig
from runner.tracking import wandb_run
from runner.tracking.account import has_key

FINISH_TIMEOUT = 45.0  # seconds at the end for W&B to connect and to upload what is queued
UPLOAD_RATE = 1e6  # bytes per second; the weights extend the timeout at this rate
ONLINE_MODES = ("online", "shared")
Action = Callable[[Any], Any]  # called with the W&B run


class Tracker:
    """Writes rows to metrics.jsonl and logs them to W&B. Created on rank 0 only.

    W&B is online if there is a key (WANDB_API_KEY, or a login in ~/.netrc) and offline otherwise; WANDB_MODE and its
    other variables take precedence. W&B runs in a separate thread that starts with the first row, since its import
    and its connection take seconds. If W&B fails, one message is printed and the thread ends.
    """

    def __init__(self, run: Run, config: RunConfig, environ: MutableMapping[str, str]) -> None:
        self.run, self.config, self.environ = run, config, environ
        self.earlier_rows = len(read_metrics(run))  # rows from before a resume; W&B may lack some of them
        self.next_index = self.earlier_rows
        self.metrics = run.metrics.open("a", buffering=1)
        self.mode = cast(wandb_run.Mode, environ.get("WANDB_MODE") or ("online" if has_key(environ) else "offline"))
        self.actions: SimpleQueue[Action | None] = SimpleQueue()  # None ends the thread
        self.thread = threading.Thread(target=self._run_actions, name="wandb", daemon=True)
        self.upload_seconds = 0.0  # that finishing may take in addition
        self.hint_given = False
        self.abandoned = False
        """Whether W&B failed or missed the time limit; its exit handler would wait forever, so use `exit_at_once`."""

    @property
    def status(self) -> str:
        """A message that tells the user where W&B logs to."""
        if self.mode == "offline":
            return f"W&B: offline; upload with: runner sync {self.run.folder}"
        return f"W&B: {self.mode}"

    def _sync_hint(self) -> str:
        """Returns what to do after the run, once: of several failures, only the first says it."""
        said, self.hint_given = self.hint_given, True
        return "" if said else f"; upload what is missing after the run with: runner sync {self.run.folder}"

    def log(self, row: MetricRow) -> None:
        """Writes a row to metrics.jsonl and queues it for W&B."""
        self.metrics.write(encode_row(row).decode())
        index, self.next_index = self.next_index, self.next_index + 1
        self._enqueue(lambda remote: wandb_run.log(remote, row, index))

    def log_results(self) -> None:
        """Logs the results of the finished run: figures, tables, summary, weights."""
        if self.mode in ONLINE_MODES:
            last = self.run.step_folder(max(self.run.checkpoint_steps())) / WEIGHTS
            self.upload_seconds = last.stat().st_size / UPLOAD_RATE
        self._enqueue(lambda remote: wandb_run.log_results(remote, self.run, remote.settings.mode in ONLINE_MODES))

    def finish(self, failed: bool = False) -> None:
        """Closes metrics.jsonl, and waits up to a time limit for W&B to upload everything; sets `abandoned`.

        `failed` marks the run as failed in W&B.
        """
        self.metrics.close()
        if not self.thread.ident:
            return
        self._enqueue(lambda remote: remote.finish(exit_code=int(failed)))
        self.actions.put(None)
        self.thread.join(FINISH_TIMEOUT + self.upload_seconds)
        if self.thread.is_alive():
            self.abandoned = True
            _warn(f"did not finish uploading in time{self._sync_hint()}")

    @staticmethod
    def exit_at_once(code: int) -> NoReturn:
        """Kills W&B's service process, and exits without running exit handlers, which could wait for an upload."""
        sys.stdout.flush()
        sys.stderr.flush()
        wandb_run.kill_service()
        os._exit(code)

    def _enqueue(self, action: Action) -> None:
        """Queues an action; starts the W&B thread on first use."""
        if self.mode == "disabled":
            return
        if not self.thread.ident:
            self.actions.put(self._catch_up)
            self.thread.start()
        self.actions.put(action)

    def _catch_up(self, remote: Any) -> None:
        """Logs rows from before a resume that W&B lacks."""
        if self.earlier_rows and remote.settings.mode in ONLINE_MODES:
            wandb_run.log_missing_rows(remote, self.run, self.earlier_rows)

    def _run_actions(self) -> None:
        """Starts W&B and runs the queued actions; ends after the last one, or when one fails."""
        remote = self._start()
        while remote is not None and (action := self.actions.get()) is not None:
            try:
                action(remote)
            except Exception as error:  # no failure of W&B may stop training
                self.abandoned = True
                _warn(f"failed ({type(error).__name__}: {first_line(error)}){self._sync_hint()}")
                return

    def _start(self) -> Any:
        """Starts a W&B run in the requested mode, or else offline; None if neither starts. Changes `environ`."""
        wandb_run.prepare_environ(self.run, self.environ)
        try:
            return wandb_run.start(self.run, self.config, self.environ, self.mode)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            _warn(f"cannot start {self.mode} ({reason}); continuing offline{self._sync_hint()}")
        try:
            wandb_run.stop_service()  # in which the failed attempt still uses the id
            return wandb_run.start(self.run, self.config, self.environ, "offline")
        except Exception as error:
            _warn(f"cannot run offline either ({first_line(error)}); metrics.jsonl has everything")
            self.abandoned = True
            return None


def _warn(message: str) -> None:
    print(f"W&B {message}", file=sys.stderr)
