"""Entries survive their encoding, and nothing else is taken for one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from resilient.errors import EntryInvalid, EntryTooLarge, FormatUnsupported, LogDamaged
from resilient.log.entries import (
    MAX_ENTRY_BYTES,
    TIERS,
    Base,
    Commit,
    Drop,
    Entry,
    Epoch,
    Generation,
    Ref,
    State,
    body_of,
    decode,
    encode,
)
from resilient.log.envelope import digest, seal

numbers = st.integers(0, 2**63 - 1)
nonces = st.text("0123456789abcdef", min_size=16, max_size=16)
hashes = st.text("0123456789abcdef", min_size=32, max_size=32)
keys = st.builds("data/{:08d}/{:012d}/{}/manifest".format, st.integers(0, 99), st.integers(0, 9999), nonces)
refs = st.builds(Ref, key=keys, hash=hashes, size=numbers)
ref_lists = st.lists(refs, max_size=8, unique_by=lambda ref: ref.key).map(tuple)
names = st.text(max_size=20)
states = st.builds(State, generation=numbers, step=numbers)
entries: st.SearchStrategy[Entry] = st.one_of(
    st.builds(Epoch, nonce=nonces, address=st.text(max_size=60), wall_ns=numbers),
    st.builds(
        Generation,
        epoch=numbers,
        nonce=nonces,
        members=numbers,
        layout=st.dictionaries(names, numbers, max_size=6),
        restored=st.none() | states,
        source=st.text(max_size=60),
    ),
    st.builds(
        Commit,
        epoch=numbers,
        nonce=nonces,
        generation=numbers,
        step=numbers,
        restore_step=numbers,
        tier=st.sampled_from(TIERS),
        manifest=refs,
        uses=ref_lists,
        metrics=st.dictionaries(names, st.floats(allow_nan=False), max_size=6),
        wall_ns=numbers,
    ),
    st.builds(Drop, epoch=numbers, nonce=nonces, manifests=ref_lists),
    st.builds(Base, epoch=numbers, nonce=nonces, summary=refs, upto=numbers, previous=st.none() | numbers),
)
EPOCH = Epoch(nonce="0123456789abcdef", address="host:1", wall_ns=5)


@given(entries)
def test_an_entry_read_back_is_the_entry_written(entry: Entry) -> None:
    data = encode(entry)
    assert len(data) <= MAX_ENTRY_BYTES
    assert decode(data) == entry


def test_a_metric_that_is_no_number_survives() -> None:
    ref = Ref(key="data/x", hash="0" * 32, size=1)
    entry = Commit(
        epoch=0, nonce="0" * 16, generation=1, step=2, restore_step=0, tier="disk", manifest=ref,
        metrics={"loss": math.nan, "up": math.inf, "down": -math.inf},
    )  # fmt: skip
    back = decode(encode(entry))
    assert isinstance(back, Commit)
    assert math.isnan(back.metrics["loss"])
    assert (back.metrics["up"], back.metrics["down"]) == (math.inf, -math.inf)


@given(entries, st.data())
def test_every_single_changed_or_missing_byte_is_damage(entry: Entry, data: st.DataObject) -> None:
    good = encode(entry)
    at = data.draw(st.integers(0, len(good) - 1))
    flipped = bytearray(good)
    flipped[at] ^= data.draw(st.integers(1, 255))
    for bad in (bytes(flipped), good[:at], good[:at] + good[at + 1 :], good + b"\n"):
        with pytest.raises(LogDamaged):
            decode(bad, "log/7")


def test_each_bit_of_an_entry_counts() -> None:
    good = encode(EPOCH)
    for bit in range(len(good) * 8):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(LogDamaged):
            decode(bytes(flipped))


@given(st.binary(max_size=300))
def test_noise_is_damage(data: bytes) -> None:
    with pytest.raises(LogDamaged):
        decode(data)


CHANGES: list[dict[str, object]] = [
    {"v": 0}, {"v": "1"}, {"v": True}, {"kind": "epic"}, {"kind": None}, {"more": 1}, {"wall_ns": -1},
    {"wall_ns": 1.0}, {"wall_ns": True}, {"wall_ns": 1 << 63}, {"nonce": "xyz"}, {"nonce": "0" * 17}, {"nonce": 3},
    {"address": None}, {"address": "x" * 257}, {"address": ["a"]},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_fields_are_checked_even_under_a_right_hash(change: dict[str, object]) -> None:
    with pytest.raises(LogDamaged):
        decode(seal({**body_of(EPOCH), **change}))


def test_a_missing_field_is_damage() -> None:
    body = body_of(EPOCH)
    del body["address"]
    with pytest.raises(LogDamaged, match="fields"):
        decode(seal(body))


def ref_body(ref: object) -> bytes:
    return seal({"v": 1, "kind": "drop", "epoch": 0, "nonce": "0" * 16, "manifests": [ref]})


@pytest.mark.parametrize(
    "ref",
    [
        ["../secret", "0" * 32, 1],
        ["/etc/passwd", "0" * 32, 1],
        ["a//b", "0" * 32, 1],
        ["a", "0" * 31, 1],
        ["a", "0" * 32, -1],
        ["a", "0" * 32],
        {"key": "a"},
        None,
    ],
    ids=str,
)
def test_a_reference_cannot_leave_the_root_or_be_half_there(ref: object) -> None:
    with pytest.raises(LogDamaged):
        decode(ref_body(ref))


def test_a_reference_named_twice_is_damage() -> None:
    ref = ["a", "0" * 32, 1]
    with pytest.raises(LogDamaged, match="once"):
        decode(seal({"v": 1, "kind": "drop", "epoch": 0, "nonce": "0" * 16, "manifests": [ref, ref]}))


def test_json_that_is_not_an_object_or_not_json_is_damage() -> None:
    for text in (b"[]", b"1", b"{", b"[" * 5000, b'{"v":NaN}', b"\xff"):
        envelope = b'{"hash":"' + xxhash.xxh3_128_hexdigest(text).encode() + b'","entry":' + text + b"}\n"
        with pytest.raises(LogDamaged):
            decode(envelope)


def test_an_entry_of_a_newer_version_is_not_mistaken_for_damage() -> None:
    with pytest.raises(FormatUnsupported, match="version 2"):
        decode(seal({**body_of(EPOCH), "v": 2, "more": 1}))


def test_too_large_an_entry_is_refused_before_it_is_written() -> None:
    refs = tuple(Ref(key=f"data/{n}", hash="0" * 32, size=n) for n in range(200))
    with pytest.raises(EntryTooLarge, match="4096 are allowed"):
        encode(Drop(epoch=0, nonce="0" * 16, manifests=refs))


def test_too_large_an_object_is_damage() -> None:
    with pytest.raises(LogDamaged, match="at most"):
        decode(b"x" * (MAX_ENTRY_BYTES + 1))


def test_what_no_reader_would_take_is_never_written() -> None:
    with pytest.raises(EntryInvalid, match=r"epoch\.nonce"):
        encode(Epoch(nonce="short", address="", wall_ns=0))


def test_the_bytes_are_as_documented() -> None:
    """Golden: the entry of docs/log.md. Other programs read these bytes; change VERSION before changing them."""
    data = encode(EPOCH)
    assert data == (
        b'{"hash":"af44f7eda035bf8badb82a6ddff1b481","entry":{"v":1,"kind":"epoch","nonce":"0123456789abcdef",'
        b'"address":"host:1","wall_ns":5}}\n'
    )
    assert json.loads(data)["entry"]["kind"] == "epoch"
    document = (Path(__file__).parents[3] / "docs" / "log.md").read_text()
    assert data.decode().strip() in document
    assert digest(data[:-2][51:]) == json.loads(data)["hash"]  # what its shell command computes
