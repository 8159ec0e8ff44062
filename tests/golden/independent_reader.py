"""A second reader of format version 1, made from docs/checkpoint-format.md alone: it imports nothing of this project.

python independent_reader.py RUN_DIRECTORY MANIFEST_KEY
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path

import xxhash
import zstandard

ITEM = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "complex128": 16, "complex64": 8,
    "complex32": 4, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2,
    "uint8": 1, "bool": 1,
}  # fmt: skip


def xxh(data):
    return xxhash.xxh3_128_hexdigest(data)


def plane(mode, body, count):
    if mode == 0:
        return body
    if mode == 1:
        return body * count
    if mode == 2:
        return zstandard.ZstdDecompressor().decompress(body, max_output_size=count)
    groups = (int.from_bytes(body[at : at + 7], "little") for at in range(0, len(body), 7))
    return bytes((group >> (7 * k) & 127) << 1 for group in groups for k in range(8))[:count]


def decode(form, stored, dtype, nbytes):
    if form == "raw":
        return stored
    if form == "fill":
        return stored * (nbytes // ITEM[dtype])
    width, rotate = struct.unpack_from("<BB", stored)
    table = [struct.unpack_from("<BI", stored, 2 + 5 * k) for k in range(width)]
    at, planes = 2 + 5 * width, []
    for mode, length in table:
        planes.append(plane(mode, stored[at : at + length], nbytes // width))
        at += length
    mask = (1 << 8 * width) - 1
    words = (int.from_bytes(word, "little") for word in zip(*planes, strict=True))
    turned = ((word >> rotate | word << (8 * width - rotate)) & mask for word in words)
    return b"".join(word.to_bytes(width, "little") for word in turned)


def index_lines(root, prefix, writer):
    data = (root / prefix / f"{writer['writer']}.index").read_bytes()
    tail = data[-writer["tail_bytes"] :]
    assert len(data) == writer["index_bytes"]
    assert xxh(tail) == writer["tail_hash"]
    magic, version, _, offset, size, _ = struct.unpack("<8sIIQQ16s", tail[-48:])
    assert (magic, version) == (b"RSLINDEX", 1)
    directory = json.loads(data[offset : offset + size])
    for kind in ("tensors", "values"):
        for _, start, length, expected in directory[kind]:
            block = data[start : start + length]
            assert xxh(block) == expected
            yield from ((kind, json.loads(line)) for line in block.decode().splitlines())


def place(tensor, start, shape, raw, size):
    """Put a chunk's bytes into a tensor's, row by row."""
    data, whole = tensor["data"], tensor["shape"] or [1]  # a scalar is a tensor of one element
    start, shape = start or [0], shape or [1]
    run = shape[-1] * size
    for row in range(len(raw) // run):
        index, rest = 0, row
        offsets = []
        for length in reversed(shape[:-1]):
            offsets.append(rest % length)
            rest //= length
        for at, n, extra in zip(start, whole, [*reversed(offsets), 0], strict=True):
            index = index * n + at + extra
        data[index * size : index * size + run] = raw[row * run : (row + 1) * run]


def read(root, manifest_key):
    manifest = json.loads((root / manifest_key).read_bytes())
    assert (manifest["format"], manifest["version"]) == ("resilient-checkpoint", 1)
    tensors, values = {}, {}
    for writer in manifest["writers"]:
        for kind, line in index_lines(root, manifest["prefix"], writer):
            if kind == "values":
                key = line["name"], line["rank"]
                values[key] = values.get(key, "") + line["value"]
                continue
            elements = 1
            for n in line["shape"]:
                elements *= n
            tensor = tensors.setdefault(
                line["name"],
                {"dtype": line["dtype"], "shape": line["shape"], "data": bytearray(elements * ITEM[line["dtype"]])},
            )
            for start, shape, part, offset, length, form, raw_hash, stored_hash in line["chunks"]:
                key = f"{manifest['prefix']}/{writer['writer']}.{part:05d}"
                stored = (root / key).read_bytes()[offset : offset + length]
                assert xxh(stored) == stored_hash
                nbytes = ITEM[line["dtype"]]
                for n in shape:
                    nbytes *= n
                raw = decode(form, stored, line["dtype"], nbytes)
                assert xxh(raw) == raw_hash
                place(tensor, start, shape, raw, ITEM[line["dtype"]])
    return tensors, values


if __name__ == "__main__":
    found, others = read(Path(sys.argv[1]), sys.argv[2])
    json.dump(
        {
            "tensors": {
                name: [tensor["dtype"], tensor["shape"], hashlib.sha256(tensor["data"]).hexdigest()]
                for name, tensor in found.items()
            },
            "values": [[name, rank, text] for (name, rank), text in others.items()],
        },
        sys.stdout,
    )
