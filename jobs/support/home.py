"""A home folder that does not exist or cannot be written: libraries get folders of their own for
what they keep.
"""

from __future__ import annotations

import getpass
import logging
import os
import pwd
import stat
import tempfile
from pathlib import Path

# Variable -> where the library would keep its files without it, in the home folder.
KEEPERS = {
    "LIDIT_CACHE": ".cache/lidit",
    "HF_HOME": ".cache/huggingface",
    "TORCH_HOME": ".cache/torch",
    "TORCH_EXTENSIONS_DIR": ".cache/torch_extensions",
    "TRITON_HOME": "",
    "MPLCONFIGDIR": ".config/matplotlib",
}
# Libraries that write beside what they read there, even where it is complete.
WRITERS = {"TORCH_EXTENSIONS_DIR", "TRITON_HOME", "MPLCONFIGDIR"}

log = logging.getLogger(__name__)


def spare() -> None:
    """Where HOME cannot be written, set libraries' own variables, and say so. What HOME has stays
    readable.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name, which torch asks for
        os.environ["USER"] = f"user-{os.getuid()}"
    home = Path("~").expanduser() if os.environ.get("HOME") else _registered_home()
    os.environ.setdefault("HOME", str(home))  # Ray's C++ asks the variable only
    if home.is_dir() and os.access(home, os.W_OK | os.X_OK):
        return

    try:
        folder = _own_folder()
    except OSError as error:
        log.warning("HOME=%s cannot be written, nor can %s: set HOME", home, error.filename)
        return
    for name, place in KEEPERS.items():
        if name in WRITERS or not (home / place).is_dir():
            os.environ.setdefault(name, str(folder / (Path(place).name or "triton")))
    if not home.is_dir():  # it holds nothing that could be read
        os.environ["HOME"] = str(folder)
    log.warning(
        "HOME=%s cannot be written: caches of models and compiled kernels go to %s", home, folder
    )


def _registered_home() -> Path:
    """The home folder in the system's list of users; the root folder for a number that is not in
    it.
    """
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return Path("/")


def _own_folder() -> Path:
    """A folder of this user alone that later commands find again; another where somebody else has
    taken its name.
    """
    folder = Path(tempfile.gettempdir(), f"lidit-home-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix="lidit-home-"))
