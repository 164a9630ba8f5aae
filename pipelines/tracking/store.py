"""Where the tracker's store is, and how to sign in to it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from lidit.config.passwords import has_password
from lidit.errors import InputError

SQLITE = "sqlite:///"


def local_store(folder: Path) -> str:
    """The uri of the sqlite store in `folder`."""
    # A question mark would end the path, and MLflow's database library decodes %xx.
    path = str(folder.resolve() / "mlflow.db").replace("%", "%25").replace("?", "%3F")
    return SQLITE + path


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store; None for other stores."""
    return (
        Path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))
        if uri.startswith(SQLITE)
        else None
    )


def store_uri(uri: str | None, folder: Path) -> str:
    """The recipe's store, else the one in MLFLOW_TRACKING_URI, else a sqlite file in `folder`;
    never with a password.

    The address is logged, so user and password of an http(s) address are left out: `sign_in` takes
    them over. Raises InputError for a password or a token that MLflow's client cannot take from the
    environment.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    return _without_password(uri) if uri else local_store(folder)


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    web = parts.scheme in ("http", "https")
    if parts.password and not web:
        raise InputError(
            "MLFLOW_TRACKING_URI: a database address with a password would be logged; give the "
            "password by the "
            "database's own means (PGPASSWORD, ~/.pgpass), or use an MLflow server"
        )
    clean = (
        urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        if parts.password
        else uri
    )
    if has_password(clean):
        raise InputError(
            "MLFLOW_TRACKING_URI: a token in the address would be logged; give it by "
            "MLFLOW_TRACKING_TOKEN, or user "
            "and password by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return clean


def sign_in(uri: str) -> None:
    """Hand user and password of MLFLOW_TRACKING_URI to MLflow's client, where `uri` is that address
    without them.

    The client reads them from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, which this
    sets.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    parts = urlsplit(given)
    if parts.password and parts.scheme in ("http", "https") and _without_password(given) == uri:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)


def credentials() -> dict[str, str]:
    """What a worker on another node needs in its environment to log; hand it over where nothing
    records it.
    """
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    return {name: os.environ[name] for name in names if name in os.environ}


def server_environment() -> dict[str, str]:
    """For MLflow's server beside a sqlite store: no processes that wait for jobs which nobody gives
    them.
    """
    return {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def open_command(uri: str) -> str:
    """The one command that shows a store's runs."""
    file = sqlite_file(uri)
    return f"lidit ui {shlex.quote(str(file.parent))}" if file else f"open {uri}"
