"""What a job may end with: a user's mistake, a failed job, a store out of reach. Other exceptions
are bugs.
"""

import re

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What steers a terminal or turns the reading direction, and halves of characters; lines and tabs
# stay.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(Exception):
    """A user's mistake: says what is wrong, where, and what to do, in one or two lines. Exit code
    2.
    """


class JobError(Exception):
    """The input was right and the job failed all the same. Exit code 1."""


class StorageError(OSError):
    """An object store that cannot be used: no credentials, no permission, no answer. One line, exit
    code 2.

    Not an InputError: workers retry after this error, because the store may be back by then.
    """


def no_corpus(location: str, exists: bool, used: bool) -> InputError:
    """What to say of a place without a corpus; a folder that somebody uses is no place for one.

    exists: there is a file or folder; used: it is not an empty folder.
    """
    state = "is not a corpus" if exists else "does not exist"
    if used:
        return InputError(
            f"{location}: {state} (no corpus.json); give the folder of one, or make one in a new "
            "folder with: lidit ingest SOURCE --corpus CORPUS"
        )
    return InputError(
        f"{location}: {state} (no corpus.json); make one with: lidit ingest SOURCE --corpus "
        f"{location}"
    )


def one_line(error: object, limit: int | None = None) -> str:
    """The error's text with every run of white space as one space, at most `limit` characters of
    it.
    """
    return plain(" ".join(str(error).split()))[:limit]


def plain(text: str) -> str:
    """Text that cannot steer a terminal or a log: colours are left out, other control characters
    written out (\\x1b).

    Names of files and members, captions and servers' replies may hold any characters.
    """
    return STEERING.sub(
        lambda found: found[0].encode("unicode_escape").decode("ascii"), COLOUR.sub("", text)
    )
