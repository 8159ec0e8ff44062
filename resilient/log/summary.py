"""A log view as an object of its own: what a `base` entry names, written and strictly read (pure)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

from resilient.errors import EntryInvalid, LogDamaged
from resilient.log.entries import (
    MAX_ADDRESS_CHARS,
    Commit,
    Entry,
    Generation,
    body_of,
    entry_of,
    read_int,
    read_optional_int,
    read_state,
    read_text,
    to_json,
)
from resilient.log.envelope import seal, unseal
from resilient.log.view import Committed, LogView, Opened

Row = TypeVar("Row")

VERSION = 1
MAX_SUMMARY_BYTES = 256 << 20
_FIELDS = {
    "v", "kind", "next_slot", "epoch", "leader", "generations", "live", "off_line",
    "dropped", "damaged", "invalid", "last_base",
}  # fmt: skip


def _opened_json(opened: Opened) -> dict[str, object]:
    entry = None if opened.entry is None else body_of(opened.entry)
    restored = to_json(opened.restored)
    return {"slot": opened.slot, "restore_step": opened.restore_step, "restored": restored, "entry": entry}


def encode_summary(view: LogView) -> bytes:
    """The bytes of a summary: one sealed JSON object. Equal views give equal bytes."""
    return seal(
        {
            "v": VERSION,
            "kind": "summary",
            "next_slot": view.next_slot,
            "epoch": view.epoch,
            "leader": view.leader,
            "generations": [_opened_json(opened) for opened in view.generations],
            "live": [[commit.slot, body_of(commit.entry)] for commit in view.live],
            "off_line": [[commit.slot, body_of(commit.entry)] for commit in view.off_line],
            "dropped": dict(sorted(view.dropped.items())),
            "damaged": list(view.damaged),
            "invalid": view.invalid,
            "last_base": view.last_base,
        }
    )


def _entry(kind: type[Entry], body: Any) -> Entry:
    if not isinstance(body, dict):
        raise EntryInvalid("expected an entry")
    entry = entry_of(body)
    if not isinstance(entry, kind):
        raise EntryInvalid(f"expected a {kind.__name__.lower()}")
    return entry


def _opened(value: Any) -> Opened:
    if not isinstance(value, dict) or set(value) != {"slot", "restore_step", "restored", "entry"}:
        raise EntryInvalid("expected a generation")
    entry = None if value["entry"] is None else cast(Generation, _entry(Generation, value["entry"]))
    return Opened(
        slot=read_int(value["slot"]),
        restore_step=read_int(value["restore_step"]),
        restored=read_state(value["restored"]),
        entry=entry,
    )


def _committed(value: Any) -> Committed:
    if not isinstance(value, list) or len(value) != 2:
        raise EntryInvalid("expected a slot and a commit")
    return Committed(slot=read_int(value[0]), entry=cast(Commit, _entry(Commit, value[1])))


def _rows(value: Any, read: Callable[[Any], Row]) -> tuple[Row, ...]:
    if not isinstance(value, list):
        raise EntryInvalid("expected a list")
    return tuple(read(row) for row in value)


def _view(body: Mapping[str, Any]) -> LogView:
    dropped = body["dropped"]
    if not isinstance(dropped, dict):
        raise EntryInvalid("expected the dropped manifests")
    return LogView(
        next_slot=read_int(body["next_slot"]),
        epoch=read_optional_int(body["epoch"]),
        leader=read_text(MAX_ADDRESS_CHARS)(body["leader"]),
        generations=_rows(body["generations"], _opened),
        live=_rows(body["live"], _committed),
        off_line=_rows(body["off_line"], _committed),
        dropped=MappingProxyType({key: read_int(slot) for key, slot in dropped.items()}),
        damaged=_rows(body["damaged"], read_int),
        invalid=read_int(body["invalid"]),
        last_base=read_optional_int(body["last_base"]),
    )


def decode_summary(data: bytes, where: str = "") -> LogView:
    """The view in these untrusted bytes. Raises LogDamaged; FormatUnsupported if a newer version wrote it."""
    body = unseal(data, where)
    if body.get("v") != VERSION or body.get("kind") != "summary" or set(body) != _FIELDS:
        raise LogDamaged("not a summary of the log that this reader knows", where=where)
    try:
        return _view(body)
    except EntryInvalid as error:
        raise LogDamaged(f"the hash is right, the fields are not: {error.what}", where=where) from error
