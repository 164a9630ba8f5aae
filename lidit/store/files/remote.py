"""Why an object store cannot be used, as one line: each client library raises exceptions of its
own.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from lidit.errors import StorageError, one_line

# By name, because none of them need be installed: the packages behind fsspec's s3://, gs:// and
# abfs://.
CLIENTS = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "s3fs"}
OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def plain_refusals(url: str) -> Iterator[None]:
    """Turn errors of the store at `url` into StorageError.

    FileExistsError and FileNotFoundError pass through: callers rely on them.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        if (reason := _reason(url, error)) is None:
            raise
        raise StorageError(f"{url}: {reason}") from error


def _reason(url: str, error: Exception) -> str | None:
    """Reason and remedy; None for a bug, and for an error of this machine such as a full disk."""
    kinds = type(error).__mro__
    of_client = any(kind.__module__.partition(".")[0] in CLIENTS for kind in kinds)
    of_system = isinstance(error, OSError) and error.errno not in OF_THIS_MACHINE
    # botocore raises a bare one
    bad_endpoint = isinstance(error, ValueError) and "endpoint" in str(error).lower()
    if not (of_client or of_system or bad_endpoint):
        return None
    s3 = url.startswith(("s3://", "s3a://"))
    said = re.sub(r"://[^/\s@]*@", "://", one_line(error))[:300] or type(error).__name__
    if any("Credential" in kind.__name__ for kind in kinds):
        keys = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL outside AWS)"
        return f"no credentials; {keys}" if s3 else f"no credentials ({said})"
    if isinstance(error, PermissionError):
        return f"access refused ({said}); give credentials that may read and write there"
    if any(
        word in kind.__name__ for kind in kinds for word in ("Connect", "Timeout", "HTTPClient")
    ):
        return f"no answer ({said}); check the network" + (" and AWS_ENDPOINT_URL" if s3 else "")
    return f"the object store refuses ({said}); check the address" + (
        ", region and AWS_ENDPOINT_URL" if s3 else ""
    )
