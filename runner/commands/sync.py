"""`runner sync`: uploads run folders to W&B."""

import dataclasses
import sys
from collections.abc import MutableMapping

from runner.commands.options import Flag, RunFolders
from runner.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sync:
    """Upload from run folders what W&B lacks; nothing is uploaded twice."""

    runs: RunFolders
    """Run folders, or folders that contain run folders at any depth."""
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        import msgspec

        from runner.common.console import EXIT_BAD_INPUT
        from runner.run.folder import find_runs
        from runner.tracking import wandb_sync
        from runner.tracking.account import has_key

        runs = find_runs(list(self.runs))
        if not has_key(environ):
            raise UserError("W&B: expected an API key in WANDB_API_KEY or ~/.netrc, found none; run: wandb login")
        synced = wandb_sync.sync(runs, environ)
        for one in synced:
            if one.reason:
                print(f"runner: {one.run}: not uploaded: {one.reason}", file=sys.stderr)
            elif not self.json:
                print(f"{one.run}: uploaded, {one.rows} new rows" if one.new else f"{one.run}: nothing new")
        if self.json:
            print(msgspec.json.encode(synced).decode())
        if any(one.reason for one in synced):
            raise SystemExit(EXIT_BAD_INPUT)
