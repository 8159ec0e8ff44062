"""Codecs: lossless for every bit pattern, small for trained weights, never larger than raw, safe on hostile bytes."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint import planes
from resilient.checkpoint.codec import CODECS, FILL, PLANES, RAW, decode, encode, word_bytes
from resilient.checkpoint.items import ITEM_BYTES
from resilient.errors import CheckpointDamaged, DtypeUnknown, StateInvalid
from tests.resilient.checkpoint.saved import bf16, trained

BOMB_BYTES = 64 << 20
RNG = np.random.default_rng(7)


def there_and_back(raw, dtype, codec="fast"):
    """(form, stored bytes), after proving that decoding gives the same bytes."""
    raw = memoryview(raw).cast("B")
    form, pieces = encode(raw, dtype, codec)
    stored = b"".join(pieces)
    out = memoryview(bytearray(b"\xa5" * raw.nbytes))
    decode(form, memoryview(stored), dtype, out)
    assert out == raw
    assert len(stored) <= raw.nbytes
    return form, stored


def content(kind, nbytes, seed):
    """Bytes of one kind: what tensors hold at their best and at their worst."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.bytes(nbytes)
    if kind == "zeros":
        return bytes(nbytes)
    if kind == "weights":
        return (rng.standard_normal(nbytes // 4 + 1) * 0.02).astype(np.float32).tobytes()[:nbytes]
    if kind == "squares":
        return (rng.standard_normal(nbytes // 4 + 1) ** 2).astype(np.float32).tobytes()[:nbytes]
    if kind == "count":
        return np.arange(nbytes // 8 + 1).tobytes()[:nbytes]
    return bytes(rng.choice([0, 0, 0, 0xFF, 0x7F, 0x80, 1], nbytes).astype(np.uint8))  # -0.0, NaN, inf, denormals


KINDS = ("noise", "zeros", "weights", "squares", "count", "special")


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(ITEM_BYTES)),
    st.sampled_from(KINDS),
    st.one_of(st.integers(1, 300), st.integers(1, 20_000)),
    st.integers(0, 2**32 - 1),
    st.sampled_from(CODECS),
)
def test_every_dtype_survives_bit_for_bit_and_never_grows(dtype, kind, items, seed, codec):
    there_and_back(content(kind, items * ITEM_BYTES[dtype], seed), dtype, codec)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_blocks_larger_than_the_working_block_survive(dtype):
    items = planes.BLOCK_WORDS + 77
    for kind in ("weights", "squares", "special"):
        there_and_back(content(kind, items * ITEM_BYTES[dtype], 3), dtype)


def test_nan_payloads_and_negative_zero_survive():
    words = np.tile(np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0, 0x7F800000, 1], np.uint32), 1000)
    form, _ = there_and_back(words.tobytes(), "float32")
    assert form == PLANES


@pytest.mark.parametrize(
    ("name", "dtype", "at_least", "at_most"),
    [
        ("weights", "float32", 1.19, 1.25),
        ("weights", "bfloat16", 1.45, 1.56),
        ("squares", "float32", 1.23, 1.30),
        ("weights", "float16", 1.10, 1.30),
        ("ids", "int64", 6, 1e9),
        ("mask", "bool", 6, 1e9),
    ],
)
def test_what_training_produces_becomes_as_small_as_measured(name, dtype, at_least, at_most):
    weights = trained(np.random.default_rng(1), (1024, 512))
    data = {
        ("weights", "float32"): weights,
        ("weights", "bfloat16"): bf16(weights),
        ("weights", "float16"): weights.astype(np.float16),
        ("squares", "float32"): np.mean([trained(np.random.default_rng(k), (512, 512)) ** 2 for k in range(9)], axis=0),
        ("ids", "int64"): np.random.default_rng(1).zipf(1.3, 100_000) % 50_000,
        ("mask", "bool"): np.random.default_rng(1).random(100_000) < 0.1,
    }[name, dtype]
    _, stored = there_and_back(np.ascontiguousarray(data).data, dtype)
    assert at_least < data.nbytes / len(stored) < at_most


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_constants_cost_one_element(dtype):
    item = bytes(range(1, ITEM_BYTES[dtype] + 1))
    form, stored = there_and_back(item * 5000, dtype)
    assert (form, stored) == (FILL, item)


def test_a_late_difference_is_no_constant():
    form, _ = there_and_back(bytes(4 * 9999) + b"\1\0\0\0", "float32")
    assert form != FILL


def test_noise_is_left_alone_without_a_copy():
    raw = memoryview(RNG.bytes(1 << 20))
    form, pieces = encode(raw, "float32", "fast")
    assert form == RAW
    assert len(pieces) == 1
    assert np.shares_memory(np.frombuffer(pieces[0], np.uint8), np.frombuffer(raw, np.uint8))


def test_the_codec_raw_stores_the_bytes_themselves():
    assert encode(memoryview(bytes(4096)), "float32", "raw") == (RAW, [bytes(4096)])


def test_planes_are_put_where_the_caller_has_room():
    raw = trained(RNG, (256, 256)).data.cast("B")
    room = np.zeros(raw.nbytes, np.uint8)
    _, pieces = encode(raw, "float32", "fast", room)
    assert sum(np.shares_memory(np.frombuffer(piece, np.uint8), room) for piece in pieces) == 3


def test_an_unknown_codec_or_dtype_is_refused():
    with pytest.raises(StateInvalid, match="gzip"):
        encode(memoryview(b""), "float32", "gzip")
    with pytest.raises(DtypeUnknown):
        word_bytes("float128")
    with pytest.raises(CheckpointDamaged, match="unknown"):
        decode("brotli", memoryview(b""), "float32", memoryview(bytearray(4)))


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_packing_seven_bits_is_undone(size, seed):
    plane = np.random.default_rng(seed).integers(0, 128, size, np.uint8) << 1
    packed = planes.pack7(plane)
    assert packed.size == 7 * -(-size // 8)
    assert (planes.unpack7(packed, size) == plane).all()


# ---- hostile bytes
def frame(data, **options):
    return zstandard.ZstdCompressor(**options).compress(data)


def one_plane(mode, body):
    """The stored form of uint8 elements whose plane has this mode and body."""
    return struct.pack("<BBBI", 1, 0, mode, len(body)) + body


@pytest.mark.parametrize(
    ("what", "stored"),
    [
        ("no header of planes", b"\1"),
        ("2-byte words", struct.pack("<BB", 2, 0) + bytes(10)),
        ("rotated by 1", struct.pack("<BBBI", 1, 1, 0, 0)),
        ("within the table", struct.pack("<BB", 1, 0)),
        ("claims", struct.pack("<BBBI", 1, 0, 0, 4_000_000_000)),
        ("raw plane", one_plane(0, bytes(999))),
        ("constant plane", one_plane(1, b"ab")),
        ("packed plane", one_plane(3, bytes(10))),
        ("unknown mode", one_plane(9, b"")),
        ("follow", one_plane(0, bytes(1000)) + b"x"),
        ("Zstandard", one_plane(2, b"not a frame")),
        ("declares", one_plane(2, frame(bytes(BOMB_BYTES)))),
        ("declares", one_plane(2, frame(bytes(1000), write_content_size=False))),
        ("declares", one_plane(2, frame(bytes(999)))),
        ("Zstandard", one_plane(2, frame(bytes(1000)) + frame(bytes(BOMB_BYTES)))),
        ("Zstandard", one_plane(2, frame(RNG.bytes(1000))[:-40])),
    ],
)
def test_bytes_that_are_no_stored_form_are_refused_by_name(what, stored):
    with pytest.raises(CheckpointDamaged, match=what):
        decode(PLANES, memoryview(stored), "uint8", memoryview(bytearray(1000)))


def test_a_frame_that_unfolds_to_more_than_it_says_takes_no_memory():
    bomb = frame(bytes(BOMB_BYTES))
    # The header is made to promise what is expected; the content is 64 MiB all the same.
    lying = bytearray(zstandard.ZstdCompressor(write_content_size=True).compress(bytes(1000)))
    blocks = bomb[zstandard.frame_header_size(bomb) :]
    lying = bytes(lying[: zstandard.frame_header_size(bytes(lying))]) + blocks
    for body in (bomb, lying):
        tracemalloc.start()
        with pytest.raises(CheckpointDamaged):
            decode(PLANES, memoryview(one_plane(2, body)), "uint8", memoryview(bytearray(1000)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_changed_bytes_never_do_more_than_decode_wrongly_or_raise():
    changes = random.Random(5)
    weights = trained(np.random.default_rng(2), (64, 64))
    for data, dtype in ((weights.data, "float32"), (bf16(weights).data, "bfloat16"), ((weights**2).data, "float32")):
        form, stored = there_and_back(data, dtype)
        refused = 0
        for _ in range(300):
            changed = bytearray(stored)
            for _ in range(changes.randint(1, 3)):
                changed[changes.randrange(min(len(changed), 4000))] = changes.randrange(256)
            out = bytearray(data.nbytes)
            try:
                decode(
                    form,
                    memoryview(changed[: changes.choice([len(changed), changes.randrange(len(changed))])]),
                    dtype,
                    memoryview(out),
                )
            except CheckpointDamaged:
                refused += 1
        assert refused > 100
