"""Addresses of stores: which kind of store one names, and how it is shown without secrets."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from storage.errors import StoreFailed

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USER = re.compile(r"(?<=://)[^/?#]*@")


def redact(url: str) -> str:
    """The address without what may be a secret: user and password, query (signed tokens), fragment."""
    if not _SCHEME.match(url):
        return url
    return re.split(r"[?#]", _USER.sub("", url), maxsplit=1)[0]


def split(url: str) -> tuple[str, str]:
    """(scheme in lower case, the rest); ("file", path) for a plain path or a file: address.

    Raises StoreFailed for an address without a place, or a chain of several ("simplecache::s3://...": a cache would
    hide what others wrote).
    """
    if "::" in url:
        raise StoreFailed(
            "chained addresses are not supported, a cache in between would hide what others wrote",
            where=redact(url),
            next="name the store itself",
        )
    match = _SCHEME.match(url)
    if match is None:
        scheme, rest = "file", url
    elif match[1].lower() in ("file", "local"):
        scheme, rest = "file", unquote(url[match.end() :])
    else:
        scheme, rest = match[1].lower(), url[match.end() :]
    if scheme == "file" and rest:
        return scheme, str(Path(rest).expanduser().absolute())
    if scheme != "memory" and not rest.strip("/"):
        raise StoreFailed("the address names no place", where=redact(url), next="give a directory or s3://bucket/path")
    return scheme, rest
