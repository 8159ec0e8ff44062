"""One line of JSON that carries the hash of its own bytes (pure)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from resilient.errors import EntryInvalid, LogDamaged

# The hash is that of the bytes between the middle and the tail, as they stand: no canonical form is needed.
_HEAD, _MIDDLE, _TAIL = b'{"hash":"', b'","entry":', b"}\n"
HASH_CHARS = 32


def digest(data: bytes) -> str:
    """hex xxh3_128, as references and envelopes hold it."""
    return xxhash.xxh3_128_hexdigest(data)


def seal(body: Mapping[str, object]) -> bytes:
    """`body` as one line of JSON with its own hash inside. Raises EntryInvalid for what JSON cannot hold."""
    try:
        text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError) as error:
        raise EntryInvalid(f"not plain JSON: {error}") from error
    return _HEAD + digest(text).encode("ascii") + _MIDDLE + text + _TAIL


def _no_constant(name: str) -> float:
    raise EntryInvalid(f"{name} is not JSON")


def unseal(data: bytes, where: str = "") -> dict[str, Any]:
    """The body of a sealed object, its hash verified. Raises LogDamaged."""
    start = len(_HEAD) + HASH_CHARS + len(_MIDDLE)
    text = data[start : -len(_TAIL)]
    if len(data) < start + len(_TAIL) or data != _HEAD + digest(text).encode("ascii") + _MIDDLE + text + _TAIL:
        raise LogDamaged(f"{len(data)} bytes that do not match the hash inside", where=where)
    try:
        body = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError, EntryInvalid) as error:
        raise LogDamaged(f"the hash is right, the JSON is not: {error}", where=where) from error
    if not isinstance(body, dict):
        raise LogDamaged("the hash is right, but it is not a JSON object", where=where)
    return body
