"""The model hub: which names are ids there, and the one download of a snapshot's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lidit.errors import InputError, one_line


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as OWNER/MODEL. Paths begin with a dot, a slash or a tilde, or have
    other slashes.
    """
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def fetch_snapshot(
    model: str, revision: str | None, patterns: Sequence[str], local_files_only: bool = False
) -> Path:
    """The local folder with the files of a hub id that match `patterns`; downloaded once.

    `patterns` leave out every format that can run code, so such a file never reaches this machine.
    local_files_only: what was downloaded before, without asking the hub.
    Raises InputError where the hub does not give them: no connection, a wrong id or revision, no
    permission.
    """
    # Imported here: folders and packaged models need no hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(patterns),
            local_files_only=local_files_only,
        )
        return Path(found).resolve()
    except (HfHubHTTPError, OSError, ValueError) as error:
        place = f"{model} at {revision[:12]}" if revision else model
        raise InputError(
            f"{place}: cannot be fetched from the hub ({one_line(error, 200)}); check the id, "
            "the revision and "
            "the connection, or give a folder"
        ) from None
