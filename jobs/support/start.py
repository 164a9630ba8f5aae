"""How every job starts and ends: quiet libraries, one line for a user's mistake, the exit codes of
the design.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from jobs.support import home
from jobs.support.abrupt import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    end_at_second_interrupt,
    end_interrupted,
    end_when_ray_dies,
)
from jobs.support.terminal import PlainFormatter, plain_streams
from lidit.errors import InputError, JobError, StorageError, one_line

EXIT_INPUT = 2
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
SETTINGS_HELP = re.compile(r"[Ss]ettings[^:]*: (\S+=\S+)")  # "Settings to change: a=1 b=2"
QUIET = "LIDIT_QUIET"  # read where progress is shown, in processes that a job starts too
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
# Packages that only some commands need -> the extra that brings them.
EXTRAS = {
    "ray": "cluster", "deepspeed": "cluster", "mlflow": "cluster", "psutil": "cluster",
    "fastapi": "serve", "starlette": "serve", "uvicorn": "serve", "c2pa": "serve",
    "confusable_homoglyphs": "serve",
    "s3fs": "s3", "gguf": "gguf",
}  # fmt: skip
WRONG_PLACE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


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
    # ours count captions and images, not weight files
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    warnings.filterwarnings("ignore")
    for chatty in ("mlflow", "alembic", "DeepSpeed", "ray.train", "ray.data"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # its errors are ours to tell, without a traceback
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    home.spare()


def enter(app: typer.Typer) -> None:
    """A job as this process: `guarded`, and ended without a traceback also where no code of ours
    gets its turn.
    """
    environment()
    end_at_second_interrupt()
    end_when_ray_dies()
    try:
        guarded(app)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:
            end_interrupted()
        raise


def guarded(app: typer.Typer) -> None:
    """Run a job; a mistake or a failure becomes one or two lines and the right exit code."""
    with plain_streams():
        _run(app)


def _run(app: typer.Typer) -> None:
    try:
        code = app(standalone_mode=False)  # returns the code of typer.Exit, and 130 after Ctrl-C
        if isinstance(code, int) and code not in (0, EXIT_INTERRUPTED):
            raise SystemExit(code)
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
    except InputError as error:
        _end(f"error: {error}", EXIT_INPUT)
    except typer.TyperException as error:
        _end(_usage(error), EXIT_INPUT)
    except ModuleNotFoundError as error:
        if (extra := EXTRAS.get(str(error.name).partition(".")[0])) is None:
            raise
        _end(
            f"error: this command needs {error.name}: pip install 'lidit-pipeline[{extra}]'",
            EXIT_INPUT,
        )
    except JobError as error:
        _end(f"failed: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        _end(
            "interrupted: everything finished is kept; the same command goes on from there",
            EXIT_INTERRUPTED,
        )
    except OSError as error:
        cause = getattr(error, "cause", None) or error  # what a Ray task met
        if isinstance(cause, StorageError):
            _end(f"error: {cause}", EXIT_INPUT)
        if cause.errno == errno.ENOSPC:
            file = cause.filename or "unknown file"
            kept = "everything finished is kept: make room and run the same command again"
            _end(f"failed: no space left on the disk ({file}); {kept}", EXIT_FAILED)
        if (line := _refused(cause)) is None:
            raise
        _end(f"error: {line}", EXIT_INPUT)


def _usage(error: typer.TyperException) -> str:
    """What typer says of wrong words on the command line; nothing where it has shown the help
    instead.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""
    text = one_line(error.format_message()).replace(": Value error, ", ": ").rstrip(".")
    # a usage error's; none where a file given as an option cannot be opened
    context = getattr(error, "ctx", None)
    example = _example_of_a_setting(context) if type(error).__name__ == "NoSuchOption" else ""
    hint = f"; settings are written key=value: {example}" if example else ""
    if context and context.command.hidden and context.parent:
        context = context.parent  # a name that no help offers
    command = context.command_path if context else "lidit"
    return f"error: {command}: {text}{hint} (see {command} --help)"


def _example_of_a_setting(context: Any) -> str:
    """The example in the help of a command's settings; nothing where it takes none."""
    helps = [getattr(one, "help", None) or "" for one in context.command.params] if context else []
    return next((found[1] for text in helps if (found := SETTINGS_HELP.search(text))), "")


def _refused(error: OSError) -> str | None:
    """What the file system refuses, with a remedy. None for what no other path or owner would mend:
    that is a bug.
    """
    if not isinstance(error.filename, str | bytes):
        return None
    path, reason = os.fsdecode(error.filename), os.strerror(error.errno or 0)
    if error.errno in WRONG_PLACE:
        return f"{path}: cannot be opened or made ({reason}); give another path"
    if error.errno not in FORBIDDEN:
        return None
    if os.access(path, os.F_OK) and not os.access(path, os.R_OK):
        return f"{path}: cannot be read ({reason}); give a path you may read, or fix its owner"
    return f"{path}: cannot be written ({reason}); give a folder you may write, or fix its owner"


def _end(line: str, code: int) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)
    raise SystemExit(code)


def run(command: Callable[..., None]) -> None:
    """`python -m jobs.NAME ...`: the same job, the same arguments, as `lidit NAME ...`."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings=HELP_OPTIONS,
    )
    app.command()(command)
    enter(app)
