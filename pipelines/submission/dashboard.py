"""The way to a cluster's dashboard: one address, one token, and in one line what is wrong with
either.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from lidit.errors import InputError, JobError, one_line

ADDRESS_OVERRIDE = "RAY_API_SERVER_ADDRESS"
# What a cluster that is away, restarting or behind a dropped tunnel looks like from here. What
# Ray's client raises of a reply that is JSON and not what a dashboard says: null, a list, an
# unknown status.
REPLY_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
CONNECTION_ERRORS = (
    aiohttp.ClientError,
    requests.exceptions.RequestException,
    ConnectionError,
    TimeoutError,
)


def connect(address: str) -> JobSubmissionClient:
    """A client for the cluster's dashboard at http(s)://HOST:PORT. InputError: no answer, no token,
    a wrong token.
    """
    if not re.match(r"https?://[^/\s]+", address):
        raise InputError(
            f"{address!r}: the address is the dashboard's URL, such as http://127.0.0.1:8265"
        )
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path and not os.environ.get("RAY_AUTH_TOKEN") and not _has_text(Path(path)):
        raise InputError(f"RAY_AUTH_TOKEN_PATH={path}: no token can be read from this file")
    before = os.environ.get(ADDRESS_OVERRIDE)
    # RAY_ADDRESS in the environment would win over the address asked for; this variable wins over
    # both.
    os.environ[ADDRESS_OVERRIDE] = address
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise token_error(address, error) from None
    except CONNECTION_ERRORS as error:
        raise InputError(
            f"{address}: no Ray dashboard answers ({type(error).__name__}); "
            "check the address, or the tunnel or port-forward to it"
        ) from None
    except (RuntimeError, *REPLY_ERRORS) as error:
        raise InputError(
            f"{address}: what answers here is no Ray dashboard that this Ray can talk to "
            f"({one_line(error, 200)}); "
            "check the address and the cluster's version"
        ) from None
    finally:
        if before is None:
            del os.environ[ADDRESS_OVERRIDE]
        else:
            os.environ[ADDRESS_OVERRIDE] = before


@contextlib.contextmanager
def understood(name: str) -> Iterator[None]:
    """Raises JobError for a reply about job `name` that cannot be understood; broken connections
    pass as they are.
    """
    try:
        yield
    except CONNECTION_ERRORS:
        raise
    except REPLY_ERRORS as error:
        raise JobError(
            f"{name}: the cluster's reply cannot be understood ({one_line(error, 200)}); check "
            "the address, and that "
            "Ray is the same version here and there"
        ) from None


def _has_text(path: Path) -> bool:
    try:
        return bool(path.read_text().strip())
    except OSError:
        return False


def token_error(address: str, error: Exception) -> InputError:
    if "Forbidden" in str(error):
        return InputError(
            f"{address}: the cluster refuses this token; "
            "check RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token (the first that is "
            "set is used)"
        )
    return InputError(
        f"{address}: the cluster wants a token and there is none; "
        "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or put it into ~/.ray/auth_token"
    )
