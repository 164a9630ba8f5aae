"""Passwords in URLs, in every place where a URL can hold one."""

from __future__ import annotations

import re
from typing import Any

USER_PART = re.compile(r"(https?:)?//([^/?#\s@]*)@", re.IGNORECASE)
# A password that was not encoded holds a slash, a space or a quote. Digits and then a slash are a
# port instead: `http://host:5000/a@b` has no password.
UNENCODED = re.compile(r"//[^/?#\s:@]{0,200}:(?!\d*(?:[/?#]|\s|$))(?!\s)[^@\n]{1,200}@[^\s@/]")
QUERY_KEY = re.compile(r"[?&;#]([\w.-]{1,100})=[^&;#\s]")
# Keys that hold a secret: of databases, of web services, of presigned object URLs.
SECRET_ENDS = (
    "password",
    "passwd",
    "passphrase",
    "token",
    "secret",
    "apikey",
    "accesskey",
    "secretkey",
)
SECRET_WORDS = {"pass", "pwd", "pw", "sig", "signature", "credential", "auth"}


def has_password(value: Any) -> bool:
    """Whether a value is a text with a password or a token in a URL."""
    if not isinstance(value, str) or "//" not in value:
        return False
    users = any(_is_secret(*match.groups()) for match in USER_PART.finditer(value))
    return (
        users or bool(UNENCODED.search(value)) or any(map(_names_secret, QUERY_KEY.findall(value)))
    )


def _is_secret(web: str | None, user: str) -> bool:
    """Whether what stands before the @ is more than a name; nobody logs in to a web server by name
    alone.
    """
    name, _, password = user.replace("%3A", ":").replace("%3a", ":").partition(":")
    return bool(password or (web and name))


def _names_secret(key: str) -> bool:
    words = re.split(r"[-_.]", key.lower())
    return words == ["key"] or any(
        word in SECRET_WORDS or word.endswith(SECRET_ENDS) for word in (*words, "".join(words))
    )
