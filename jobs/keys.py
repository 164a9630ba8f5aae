"""`lidit keys`: who may use a served model, and how much of it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.support.start import HELP_OPTIONS
from lidit.errors import InputError, plain

if TYPE_CHECKING:
    from lidit.serving.keys import Key
    from lidit.serving.shared_keys import Keys

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", context_settings=HELP_OPTIONS)
File = Annotated[
    str,
    typer.Option(
        help="File of keys, in the folder of `lidit serve`, or the address of a Redis: "
        "redis://host:6379/0."
    ),
]
DEFAULT = str(Path("serving") / "keys.sqlite")
DAY = 86400
SCOPES = "generate, moderate, verify, admin"  # the help must not wait for what opens a file of keys


@app.callback()
def keys() -> None:
    """Give keys to a served model's API, list them, revoke them; a running server sees every change
    at once.

    **Reads** and **Writes** the file of keys. A key's text is printed once and stored nowhere.

    **Example:** `lidit keys add alice --quota 5000000000`
    """


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is; shown in lists.")],
    scope: Annotated[list[str] | None, typer.Option(help=f"{SCOPES}; repeat for several.")] = None,
    days: Annotated[
        float | None, typer.Option(min=0.001, help="Until it expires; never without it.")
    ] = None,
    quota: Annotated[
        int | None, typer.Option(min=1, help="Compute units, pixels x steps, per period.")
    ] = None,
    period: Annotated[float, typer.Option(min=0.001, help="Days of a quota's period.")] = 1.0,
    file: File = DEFAULT,
) -> None:
    """Make a key and print it, once.

    **Example:** `lidit keys add alice --scope generate --scope verify --days 90 --quota 5000000000`
    """
    store = _open(file, create=True)
    now = datetime.datetime.now(datetime.UTC).timestamp()
    scopes = scope or ["generate", "moderate", "verify"]
    text, key = store.add(
        name, scopes, None if days is None else now + days * DAY, quota, round(period * DAY)
    )
    print(f"{_line(key, 0)}\n{text}\nThis is the only time that the key is shown.")


@app.command("list")
def list_keys(file: File = DEFAULT) -> None:
    """List the keys: id, name, scopes, until when, what is used of the quota in this period.

    **Example:** `lidit keys list`
    """
    store = _open(file)
    for key in store.list():
        print(_line(key, store.used(key)))


@app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id, as lidit keys list shows it.")],
    file: File = DEFAULT,
) -> None:
    """Refuse a key from now on.

    **Example:** `lidit keys revoke 0123456789`
    """
    # Whoever has the text at hand may give that; it is the part between its two lines.
    key_id = key.removeprefix("lidit_").partition("_")[0]
    store = _open(file)
    print(_line(store.revoke(key_id), 0))


def _open(file: str, create: bool = False) -> Keys:
    from lidit.serving.keys import KeysUnavailable
    from lidit.serving.shared_keys import open_keys

    try:
        return open_keys(file, create)
    except KeysUnavailable as error:
        raise InputError(
            f"{error}; give the file of keys by --file, or make it with lidit keys add"
        ) from None


def _line(key: Key, used: int) -> str:
    if key.revoked is not None:
        state = f"revoked {_day(key.revoked)}"
    else:
        state = "never expires" if key.expires is None else f"until {_day(key.expires)}"
    shares: list[Any] = [key.id, plain(key.name), ",".join(sorted(key.scopes)), state]
    if key.quota is not None:
        shares.append(f"{used:,} of {key.quota:,} units in {key.period / DAY:g} days")
    return "  ".join(shares)


def _day(time: float) -> str:
    return datetime.datetime.fromtimestamp(time, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
