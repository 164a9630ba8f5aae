"""How every job starts and ends: quiet libraries, one line for a user's mistake, the exit codes of the design."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from lidit.errors import InputError, JobError

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130
DISK_FULL = 28


def environment() -> None:
    """Set before torch, transformers, ray or mlflow are imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its warnings are in Ray's log folder
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "False")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours count captions and images, not weight files
    os.environ.setdefault("MPLBACKEND", "Agg")
    warnings.filterwarnings("ignore")
    for chatty in ("mlflow", "alembic", "DeepSpeed", "ray.train", "ray.data"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # its errors are ours to tell, without a traceback
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)


def guarded(work: Callable[[], Any]) -> None:
    """Run a job; a mistake or a failure becomes one or two lines and the right exit code."""
    try:
        work()
    except InputError as error:
        _end(f"error: {error}", EXIT_INPUT)
    except JobError as error:
        _end(f"failed: {error}", EXIT_FAILED)
    except (KeyboardInterrupt, SystemExit) as leaving:  # typer turns the first into the second
        if isinstance(leaving, SystemExit) and leaving.code != EXIT_INTERRUPTED:
            raise
        _end("interrupted: everything finished is kept; the same command goes on from there", EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno != DISK_FULL:
            raise
        _end(f"failed: no space left on the disk ({error.filename or 'unknown file'}); everything finished is kept: "
             "make room and run the same command again", EXIT_FAILED)  # fmt: skip


def _end(line: str, code: int) -> None:
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(code)


def run(command: Callable[..., None]) -> None:
    """`python -m jobs.NAME ...`: the same job, the same arguments, as `lidit NAME ...`."""
    environment()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command()(command)
    guarded(app)
