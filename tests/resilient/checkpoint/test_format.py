"""Manifest and index: what is written is read back, and what lies about itself is refused by name."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.document import digest, dump, load
from resilient.checkpoint.format import (
    IndexRef,
    Manifest,
    PartRef,
    data_prefix,
    decode_manifest,
    encode_manifest,
    index_key,
    index_ref_json,
    index_ref_of,
    part_key,
)
from resilient.checkpoint.geometry import Box
from resilient.checkpoint.index import FOOTER, MAX_BLOCK_BYTES, build_index, read_directory
from resilient.checkpoint.items import TensorInfo
from resilient.checkpoint.lines import TensorReader, ValueReader
from resilient.checkpoint.stored import ChunkRecord
from resilient.errors import CheckpointDamaged, FormatUnsupported, StateInvalid

PREFIX = data_prefix(3, 1200, "00112233445566ff")
OTHER = data_prefix(2, 800, "ffeeddccbbaa9988")
REF = IndexRef(
    writer="n00000",
    key=index_key(PREFIX, "n00000"),
    size=5000,
    tail_bytes=300,
    tail_hash="0" * 32,
    parts=(PartRef(key=part_key(PREFIX, "n00000", 0), size=900), PartRef(key=part_key(OTHER, "n00007", 3), size=7)),
    tensors=2,
    chunks=3,
    values=4,
    raw_bytes=1000,
    stored_bytes=900,
)
MANIFEST = Manifest(
    prefix=PREFIX,
    step=1200,
    generation=3,
    restore_step=1100,
    layout={"dp": 2, "shard": 4},
    world_size=8,
    writers=(REF,),
    metrics={"loss": 0.25, "nan": math.nan, "up": math.inf, "down": -math.inf},
    torch="2.13.0",
    wall_ns=1_700_000_000_000_000_000,
    refers=(OTHER,),
)


def test_a_manifest_is_read_back_as_it_was():
    again = decode_manifest(encode_manifest(MANIFEST), key=MANIFEST.key)
    assert math.isnan(again.metrics["nan"])
    assert replace(again, metrics={}) == replace(MANIFEST, metrics={})
    assert {**again.metrics, "nan": 0} == {**MANIFEST.metrics, "nan": 0}
    assert MANIFEST.keys == (f"{PREFIX}/n00000.00000", f"{PREFIX}/n00000.index", f"{PREFIX}/manifest")


def test_an_index_reference_travels_as_json():
    text = json.dumps(index_ref_json(PREFIX, REF))
    assert index_ref_of(json.loads(text), prefix=PREFIX, refers=(OTHER,)) == REF


def changed(**fields):
    """The manifest's bytes with fields changed; of its one writer where the name begins with w_."""
    body = json.loads(encode_manifest(MANIFEST))
    for name, value in fields.items():
        if name.startswith("w_"):
            body["writers"][0][name[2:]] = value
        else:
            body[name] = value
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format": "zip"}, "it is not"),
        ({"version": "1"}, "version is not a whole number"),
        ({"version": 0}, "version"),
        ({"step": 1201}, "do not lie at this key"),
        ({"step": True}, "step is not a whole number"),
        ({"step": 10**30}, "step is not a whole number"),
        ({"generation": -1}, "generation"),
        ({"prefix": "data/../../etc"}, "do not lie at this key"),
        ({"prefix": OTHER}, "do not lie at this key"),
        ({"prefix": "data/0000000003/000000001200/00112233445566ff"}, "do not lie at this key"),
        ({"refers": ["../other"]}, "not the prefix of another"),
        ({"refers": [PREFIX]}, "not the prefix of another"),
        ({"refers": [OTHER, OTHER]}, "not the prefix of another"),
        ({"refers": []}, "outside of what"),
        ({"layout": {"dp": "2"}}, "layout"),
        ({"layout": []}, "layout"),
        ({"metrics": {"loss": "low"}}, "metrics"),
        ({"metrics": {"loss": 10**400}}, "metrics"),
        ({"world_size": 0}, "world_size"),
        ({"torch": 2}, "torch"),
        ({"writers": {}}, "writers"),
        ({"writers": [index_ref_json(PREFIX, REF)] * 2}, "ascending order"),
        ({"w_writer": "../n"}, "writer"),
        ({"w_writer": "manifest.x"}, "writer"),
        ({"w_parts": [-1]}, "part 0"),
        ({"w_parts": [True]}, "part 0"),
        ({"w_parts": [["/etc/passwd", 5]]}, "part 0"),
        ({"w_parts": [[f"{OTHER}/../x", 5]]}, "part 0"),
        ({"w_parts": [[f"{OTHER}x/n00000.00000", 5]]}, "part 0"),
        ({"w_parts": [["log/00000000000000000000", 5]]}, "part 0"),
        ({"w_parts": [[part_key(OTHER, "n0", 0)]]}, "part 0"),
        ({"w_tail_bytes": 6000}, "tail_bytes"),
        ({"w_tail_hash": "0" * 31}, "tail_hash"),
        ({"w_tail_hash": "0" * 31 + "G"}, "tail_hash"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused_by_name(fields, says):
    with pytest.raises(CheckpointDamaged, match=says) as caught:
        decode_manifest(changed(**fields), key=MANIFEST.key, where="the place")
    assert caught.value.where == "the place"


@pytest.mark.parametrize("name", [*json.loads(encode_manifest(MANIFEST)), "w"])
def test_every_field_of_a_manifest_is_needed(name):
    body = json.loads(encode_manifest(MANIFEST))
    if name == "w":
        del body["writers"][0]["parts"]
    else:
        del body[name]
    with pytest.raises(CheckpointDamaged, match="is missing"):
        decode_manifest(json.dumps(body).encode(), key=MANIFEST.key)


def test_a_field_that_is_not_known_is_ignored():
    assert decode_manifest(changed(comment="hello", w_future=[1]), key=MANIFEST.key).step == 1200


def test_a_newer_version_is_not_damage():
    with pytest.raises(FormatUnsupported, match="version 2"):
        decode_manifest(changed(version=2), key=MANIFEST.key)


def test_a_manifest_lies_where_it_says():
    with pytest.raises(CheckpointDamaged, match="do not lie"):
        decode_manifest(encode_manifest(MANIFEST), key=f"{OTHER}/manifest")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        '{"a":1,"a":2}',
        '{"a":NaN}',
        '{"a":"\\ud800"}',
        '{"\\udfff":1}',
        "[" * 100_000,
        "9" * 5000,
        "\xff",
        "1 2",
    ],
)
def test_text_that_is_not_strict_json_is_refused(text):
    with pytest.raises(CheckpointDamaged):
        load(text.encode("latin-1"), "here")


# ---- index
def info(name="w", shape=(8, 6), dtype="float32"):
    return TensorInfo(name=name, dtype=dtype, shape=shape)


def record(box, *, offset=0, part=0, raw=None, stored=None):
    raw = box.size * 4 if raw is None else raw
    return ChunkRecord(
        box=box, writer="n00000", part=part, offset=offset, stored_bytes=raw if stored is None else stored,
        raw_bytes=raw, codec="raw", raw_hash=b"r" * 16, stored_hash=b"s" * 16,
    )  # fmt: skip


HUGE = (PartRef(key="k", size=1 << 50),)


def read_back(built):
    """The tensors and values in an index's bytes, as a reader takes them."""
    ref = replace(REF, size=len(built.data), tail_bytes=built.tail_bytes, tail_hash=built.tail_hash, parts=HUGE)
    tail = built.data[-built.tail_bytes :]
    assert digest(tail) == built.tail_hash
    directory = read_directory(tail, ref, "index")
    tensors, values = TensorReader(ref, "index"), ValueReader("index")
    for reader, blocks in ((tensors, directory.tensor_blocks), (values, directory.value_blocks)):
        for block in blocks:
            data = built.data[block.offset : block.offset + block.size]
            assert digest(data) == block.hash
            assert len(data) <= MAX_BLOCK_BYTES
            reader.take(data, block.first)
    return directory, tensors.found, values.values()


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
value_keys = st.tuples(names, st.one_of(st.none(), st.integers(0, 100)))


@given(st.dictionaries(names, st.integers(0, 5)), st.dictionaries(value_keys, st.text(st.characters(codec="utf-8"))))
def test_any_index_is_read_back_as_it_was(chunks, texts):
    tensors = {
        name: (info(name, (count, 2)), [record(Box((i, 0), (1, 2))) for i in range(count)])
        for name, count in chunks.items()
    }
    values = {key: text.encode() for key, text in texts.items()}
    _, found, again = read_back(build_index("n00000", tensors, values))
    assert found == tensors
    assert again == values


def test_long_tensors_and_values_go_on_over_many_blocks_and_are_found_by_name():
    rows = 5000
    tensors = {
        name: (info(name, (rows, 2)), [record(Box((i, 0), (1, 2)), offset=8 * i) for i in range(rows)])
        for name in ("a", "b", "b/c", "ä")
    }
    values = {("v", None): b'"' + b"\\" * 300_000 + b'"', ("v", 3): b"1", ("w", None): b""}
    directory, found, again = read_back(build_index("n00000", tensors, values))
    assert (found, again) == (tensors, values)
    assert len(directory.tensor_blocks) > 20
    for name in tensors:
        blocks = directory.blocks_with([name])
        assert len(blocks) < len(directory.tensor_blocks) / 2
    built = build_index("n00000", tensors, values)
    reader = TensorReader(replace(REF, parts=HUGE), "index")
    for block in directory.blocks_with(["b"]):
        reader.take(built.data[block.offset : block.offset + block.size], block.first)
    assert reader.found["b"] == tensors["b"]
    assert directory.blocks_with(["0 before all"]) == ()


def test_names_that_no_reader_would_take_are_not_written():
    for name in ("", "x" * 1025, "\ud800"):
        with pytest.raises(StateInvalid, match="name"):
            build_index("n00000", {name: (info(name), [])}, {})


GOOD_CHUNK = [[0, 0], [8, 6], 0, 0, 192, "raw", "0" * 32, "1" * 32]


def line(**fields):
    return {"name": "w", "dtype": "float32", "shape": [8, 6], "chunks": [GOOD_CHUNK], **fields}


def with_chunk(at, value):
    return line(chunks=[[*GOOD_CHUNK[:at], value, *GOOD_CHUNK[at + 1 :]]])


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([{"name": "w"}], "missing"),
        ([[]], "expected an object"),
        ([line(dtype="float128")], "unknown dtype"),
        ([line(shape=[8, -6])], "impossible shape"),
        ([line(shape=[1 << 62, 1 << 62])], "impossible shape"),
        ([line(shape=[0, 1 << 61])], "impossible shape"),
        ([line(shape=[1] * 65)], "impossible shape"),
        ([line(shape="8x6")], "impossible shape"),
        ([line(chunks=[GOOD_CHUNK[:7]])], "8 fields"),
        ([with_chunk(0, [0])], "wrong type"),
        ([with_chunk(0, [0, -1])], "wrong type"),
        ([with_chunk(0, [1, 0])], "not inside"),
        ([with_chunk(1, [8, 7])], "not inside"),
        ([with_chunk(1, [0, 6])], "not of 1 to"),
        ([with_chunk(2, 1)], "outside of part"),
        ([with_chunk(2, 1.0)], "wrong type"),
        ([with_chunk(3, 10)], "outside of part"),
        ([with_chunk(4, 193)], "outside of part"),
        ([with_chunk(4, 1 << 63)], "wrong type"),
        ([with_chunk(5, "x" * 17)], "stored for"),
        ([with_chunk(5, None)], "stored for"),
        ([with_chunk(6, "0")], "no hashes"),
        ([with_chunk(7, 0)], "no hashes"),
        ([line(), line(dtype="int32")], "differently"),
        ([line(), line(name="a")], "out of order"),
        ([line(name="")], "out of order"),
        ([line(name="v")], "out of order"),
    ],
)
def test_a_line_that_cannot_be_right_is_refused_by_name(lines, says):
    reader = TensorReader(replace(REF, parts=(PartRef(key="k", size=192),)), "index")
    with pytest.raises(CheckpointDamaged, match=says):
        reader.take(b"".join(dump(item) + b"\n" for item in lines), "w")


def test_a_chunk_larger_than_any_reader_must_hold_is_refused():
    reader = TensorReader(replace(REF, parts=HUGE), "index")
    big = line(shape=[1 << 40], chunks=[[[0], [1 << 30], 0, 0, 4, "fill", "0" * 32, "1" * 32]])
    with pytest.raises(CheckpointDamaged, match="not of 1 to"):
        reader.take(dump(big) + b"\n", "w")


def value_line(name, piece=0, pieces=1, rank=None):
    return dump({"name": name, "rank": rank, "piece": piece, "pieces": pieces, "value": "1"}) + b"\n"


@pytest.mark.parametrize(
    "lines",
    [
        [value_line("a"), value_line("a")],
        [value_line("a", rank=1), value_line("a")],
        [value_line("a", 0, 2)],
        [value_line("a", 1, 2)],
        [value_line("a", 0, 3), value_line("a", 2, 3)],
        [value_line("a", 0, 3), value_line("a", 1, 2)],
        [value_line("a", 0, 2), value_line("a", 0, 2)],
        [value_line("a", 0, 2), value_line("b", 1, 2)],
        [value_line("a", 0, 2), value_line("a", 1, 2, rank=0)],
        [value_line("a", 2, 2)],
        [value_line("a", rank="0")],
        [value_line("a")[:-1]],
    ],
)
def test_values_in_pieces_that_do_not_fit_are_refused(lines):
    def read():
        reader = ValueReader("index")
        for each in lines:
            reader.take(each, "")
        return reader.values()

    with pytest.raises(CheckpointDamaged):
        read()


def small_index():
    built = build_index("n00000", {"w": (info(), [record(Box((0, 0), (8, 6)))])}, {("v", None): b"1"})
    return built, replace(REF, size=len(built.data), tail_bytes=built.tail_bytes, tail_hash=built.tail_hash)


def retailed(built, body):
    """A tail with another directory, hashes and all."""
    data = dump(body) + b"\n"
    blocks = len(built.data) - built.tail_bytes
    return data + FOOTER.pack(b"RSLINDEX", 1, 0, blocks, len(data), bytes.fromhex(digest(data)))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(writer="n00001"),
        lambda body: body.pop("tensors"),
        lambda body: body["tensors"][0].__setitem__(1, 1),
        lambda body: body["values"][0].__setitem__(1, 0),
        lambda body: body["values"].pop(),
        lambda body: body["tensors"][0].__setitem__(2, 1 << 30),
        lambda body: body["tensors"][0].pop(),
        lambda body: body["tensors"][0].__setitem__(3, "x"),
        lambda body: body["tensors"].append(body["tensors"][0]),
    ],
)
def test_a_directory_that_leaves_bytes_out_or_counts_them_twice_is_refused(change):
    built, ref = small_index()
    body = json.loads(built.data[-built.tail_bytes : -FOOTER.size])
    good = retailed(built, body)
    assert good == built.data[-built.tail_bytes :]
    change(body)
    tail = retailed(built, body)
    with pytest.raises(CheckpointDamaged):
        read_directory(tail, replace(ref, size=ref.size + len(tail) - len(good), tail_bytes=len(tail)), "index")


def test_any_bit_of_a_tail_that_changes_is_refused_even_without_its_hash():
    built, ref = small_index()
    tail = built.data[-built.tail_bytes :]
    changes = random.Random(3)
    for _ in range(200):
        at = changes.randrange(len(tail))
        wrong = bytearray(tail)
        wrong[at] ^= 1 << changes.randrange(8)
        with pytest.raises(CheckpointDamaged):
            read_directory(bytes(wrong), ref, "index")
