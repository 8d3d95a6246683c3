"""The W&B server and the user's key for it, found without importing wandb, which takes seconds."""

import configparser
import netrc
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_BASE_URL = "https://api.forge.coreweave.com"
DEFAULT_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # one server; wandb also uses a login for the second name


def choose_server(environ: MutableMapping[str, str]) -> None:
    """Sets WANDB_BASE_URL to the user's server.

    W&B also reads `wandb/settings` in the current folder and in its own: a run folder from someone else could name
    another server there, to which W&B would send the key. Environment variables take precedence over such files.
    """
    environ["WANDB_BASE_URL"] = base_url(environ)


def base_url(environ: Mapping[str, str]) -> str:
    """Returns the URL of the W&B server from WANDB_BASE_URL, from W&B's settings, or by default."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        folder = Path(environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
        parser.read(folder / "settings")
        configured = parser.get("default", "base_url", fallback=DEFAULT_BASE_URL)
    except (configparser.Error, OSError, UnicodeDecodeError, RuntimeError):  # RuntimeError: the user has no home
        configured = DEFAULT_BASE_URL  # W&B itself reports damaged settings
    return environ.get("WANDB_BASE_URL") or configured


def has_key(environ: Mapping[str, str]) -> bool:
    """Returns whether there is a W&B API key in the environment or in ~/.netrc."""
    if environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(base_url(environ)).netloc  # with its port, as W&B stores it
    try:
        logins = netrc.netrc(environ.get("NETRC") or None)
        return any(logins.authenticators(name) for name in (DEFAULT_HOSTS if host in DEFAULT_HOSTS else (host,)))
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError, RuntimeError):
        return False
