"""Strict reading of JSON that nobody vouches for: every field has a type, a range and a name in the error (pure)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import xxhash

from resilient.errors import CheckpointDamaged

T = TypeVar("T")
MAX_NUMBER = (1 << 63) - 1
HASH_HEX = re.compile(r"[0-9a-f]{32}")


def digest(data: bytes | memoryview) -> str:
    """hex xxh3_128 (seed 0, canonical byte order), as every document names the bytes it refers to."""
    return xxhash.xxh3_128_hexdigest(data)


def dump(value: object) -> bytes:
    """`value` as one line of UTF-8 JSON without its newline. Raises ValueError for what JSON cannot hold."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode("utf-8")


def load(data: bytes, where: str) -> Any:
    """The JSON value in `data`. Raises CheckpointDamaged: bad syntax, a repeated key, NaN, nesting too deep."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"the hash is right, the JSON is not: {str(error)[:200]}", where=where) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is there twice")
    for text in (*fields, *fields.values()):
        if isinstance(text, str) and not text.isascii():
            text.encode("utf-8")  # half a surrogate pair is legal JSON, and no text
    return fields


class Fields:
    """The fields of one JSON object. Every method raises CheckpointDamaged, naming the field, for what does not fit.

    Fields that are not asked for are ignored: a later writer may add some that an older reader can do without.
    """

    def __init__(self, value: object, where: str) -> None:
        self._where = where
        if not isinstance(value, dict):
            self.fail(f"expected an object, not {str(value)[:80]!r}")
        self._fields: dict[str, Any] = value

    def fail(self, what: str) -> NoReturn:
        """Raise CheckpointDamaged here."""
        raise CheckpointDamaged(what, where=self._where)

    def get(self, name: str) -> Any:
        """The field as JSON gave it."""
        if name not in self._fields:
            self.fail(f"the field {name!r} is missing")
        return self._fields[name]

    def integer(self, name: str, *, low: int = 0, high: int = MAX_NUMBER) -> int:
        """A whole number within bounds, both included."""
        value = self.get(name)
        if type(value) is not int or not low <= value <= high:
            self.fail(f"{name} is not a whole number from {low} to {high}: {str(value)[:80]!r}")
        return value

    def text(self, name: str, pattern: str | None = None, *, max_chars: int = 1024) -> str:
        """Text, of the whole of which `pattern` must be true."""
        value = self.get(name)
        if not isinstance(value, str) or len(value) > max_chars or (pattern and not re.fullmatch(pattern, value)):
            self.fail(f"{name} is not {pattern or f'text of at most {max_chars} characters'}: {str(value)[:80]!r}")
        return value

    def hash(self, name: str) -> str:
        """32 lower-case hex digits."""
        return self.text(name, HASH_HEX.pattern)

    def items(self, name: str, *, max_items: int) -> list[Any]:
        """A list."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) > max_items:
            self.fail(f"{name} is not a list of at most {max_items} items: {str(value)[:80]!r}")
        return value

    def table(self, name: str, read: Callable[[Any], T], *, max_items: int) -> Mapping[str, T]:
        """An object whose values `read` takes; it raises ValueError for one that does not fit."""
        value = self.get(name)
        if not isinstance(value, dict) or len(value) > max_items:
            self.fail(f"{name} is not an object of at most {max_items} fields: {str(value)[:80]!r}")
        try:
            return {key: read(item) for key, item in value.items()}
        except ValueError as error:
            self.fail(f"{name}: {error}")


def is_numbers(value: object, max_items: int) -> bool:
    """Whether it is a list of at most so many whole numbers from 0 to 2**63-1."""
    return (
        isinstance(value, list)
        and len(value) <= max_items
        and all(type(n) is int and 0 <= n <= MAX_NUMBER for n in value)
    )
