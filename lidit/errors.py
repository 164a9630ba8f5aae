"""What a job may end with: a user's mistake, a failed job, a store out of reach. Other exceptions are bugs."""


class InputError(Exception):
    """A user's mistake: says what is wrong, where, and what to do, in one or two lines. Exit code 2."""


class JobError(Exception):
    """The input was right and the job failed all the same. Exit code 1."""


class StorageError(OSError):
    """An object store that cannot be used: no credentials, no permission, no answer. One line, exit code 2.

    Not an InputError: workers retry after this error, because the store may be back by then.
    """


def one_line(error: object, limit: int | None = None) -> str:
    """The error's text with every run of white space as one space, at most `limit` characters of it."""
    return " ".join(str(error).split())[:limit]
