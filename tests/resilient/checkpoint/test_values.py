"""Plain values survive exactly, or are refused by name."""

from __future__ import annotations

import contextlib
import enum
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint import values
from resilient.checkpoint.values import HeldRef, TensorRef, decode, digest, encode
from resilient.errors import CheckpointDamaged, StateInvalid


def same(a: object, b: object) -> bool:
    """Equal in type, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
            return False
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, list | tuple | deque):
        return (
            len(a) == len(b)
            and all(same(x, y) for x, y in zip(a, b, strict=True))
            and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
        )
    return a == b


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(),
    st.floats(width=32).map(np.float32), st.integers(-(2**63), 2**63 - 1).map(np.int64),
)  # fmt: skip
hashables = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.binary(), st.tuples(st.integers()))
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.lists(inner).map(deque),
        st.dictionaries(hashables, inner),
        st.dictionaries(st.text(), inner),
        st.dictionaries(hashables, inner).map(OrderedDict),
        st.sets(hashables),
        st.frozensets(hashables),
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(trees)
def test_what_is_decoded_is_what_was_encoded_to_the_bit(value):
    assert same(decode(encode(value)), value)
    assert encode(decode(encode(value))) == encode(value)


@pytest.mark.parametrize(
    "value",
    [
        Counter({3: 1, 5: 2}),
        {1: "int", "1": "str", (1, 2): "tuple", None: 0},
        {"$tensor": "not a reference"},
        [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e22, 0.1],
        2**200,
        -(2**64),
        "\ud800 \u0000 ü",
        defaultdict(list, {"a": [1]}),
        defaultdict(None, {}),
        deque([1, 2], maxlen=3),
        bytearray(b"x"),
        range(3, 9, 2),
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["ab", "c"]),
        np.zeros((0, 3), np.float16),
        np.datetime64("2020-01-01", "ns"),
        np.bool_(True),
        [TensorRef("a/b"), HeldRef("m")],
        [torch.float32, torch.device("cpu"), torch.Size([2, 3])],
    ],
    ids=repr,
)
def test_types_that_json_would_change_survive(value):
    assert same(decode(encode(value)), value)


def test_a_nans_payload_survives():
    (nan,) = struct.unpack("d", struct.pack("Q", 0xFFF8_0000_0000_1234))
    assert same(decode(encode(nan)), nan)


Point = namedtuple("Point", "x")  # noqa: PYI024


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [object(), Point(1), Colour.RED, print, torch.zeros(1), np.array([object()]), defaultdict(lambda: 0)],
    ids=lambda v: type(v).__name__,
)
def test_a_type_that_would_change_is_refused_with_its_path(value):
    with pytest.raises(StateInvalid, match=r"state\['a'\]\[1\]"):
        encode({"a": [0, value]})


def test_a_value_that_holds_itself_is_refused():
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(StateInvalid, match="contain itself"):
        encode(loop)


def test_order_of_a_plain_dict_is_kept_but_ranks_that_built_it_differently_agree():
    a, b = {"x": 1, 2: {"y": 2, "z": 3}}, {2: {"z": 3, "y": 2}, "x": 1}
    assert list(decode(encode(b))) == [2, "x"]
    assert encode(a) != encode(b)
    assert digest(encode(a)) == digest(encode(b))
    assert digest(encode(OrderedDict(x=1, y=2))) != digest(encode(OrderedDict(y=2, x=1)))
    assert digest(encode({"x": 1})) != digest(encode({"x": 1.0}))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff", b"NaN", b'{"$nope":1}', b'{"$tuple":1}', b'{"$tuple":[],"a":1}', b'{"a":1,"$set":[]}',
        b'{"$set":[[1]]}', b'{"$bytes":"%%"}', b'{"$array":["<f4",[2],"AAAA"]}', b'{"$array":["|O",[1],"AAAA"]}',
        b'{"$array":["<f4",[-1,-1],"AAAAAA=="]}', b'{"$scalar":["<f4",""]}', b'{"$dtype":"load"}', b'{"$float":"00"}',
        b'{"$default":["eval",[]]}', b'{"$range":[1,2,0]}', b'{"$tensor":3}', b"[" * 5000 + b"]" * 5000,
        b'{"$tuple":[' * 100 + b"1" + b"]}" * 100, b'{"$deque":[-1,[]]}', b'{"$scalar":["<f4","AAAAAAAAAAA="]}',
    ],
    ids=lambda d: d[:24].decode("latin1"),
)  # fmt: skip
def test_bytes_that_no_encoder_wrote_are_damage(data):
    with pytest.raises(CheckpointDamaged):
        decode(data)


@settings(max_examples=100, deadline=None)
@given(trees, st.randoms(use_true_random=False))
def test_a_flipped_byte_is_a_typed_error_or_a_value_never_a_crash(value, random):
    data = bytearray(encode(value))
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    with contextlib.suppress(CheckpointDamaged):
        decode(bytes(data))


def test_size_is_bounded(monkeypatch):
    monkeypatch.setattr(values, "MAX_BYTES", 100)
    with pytest.raises(StateInvalid, match="more than 100"):
        encode("x" * 200)
    with pytest.raises(CheckpointDamaged, match="larger than 100"):
        decode(b'"' + b"x" * 200 + b'"')
