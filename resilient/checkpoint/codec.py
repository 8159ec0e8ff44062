"""Codecs: how the bytes of one chunk are stored, losslessly for every dtype (pure).

Stored forms, named per chunk in the index (docs/checkpoint-format.md gives the bytes):

    raw      the bytes themselves
    fill     one element, repeated
    planes   byte planes, each raw, constant, packed, or a Zstandard frame

The choice "fast" takes whichever of them pays; its parameters come from measurements on trained weights: exponents
carry all the gain there, so the other planes are looked at in a sample and then left alone.
"""

from __future__ import annotations

import struct
import threading
from typing import Final

import numpy as np
import zstandard

from resilient.checkpoint import planes
from resilient.checkpoint.items import ITEM_BYTES
from resilient.checkpoint.planes import Bytes, Words
from resilient.errors import CheckpointDamaged, DtypeUnknown, StateInvalid

CODECS = ("auto", "raw", "fast")
"""What a caller may choose."""
RAW, FILL, PLANES = "raw", "fill", "planes"
STORED_FORMS = (RAW, FILL, PLANES)
"""What the index may name."""

MODE_RAW, MODE_FILL, MODE_ZSTD, MODE_PACK7 = range(4)
_HEADER = struct.Struct("<BB")  # bytes of a word, bits rotated left
_PLANE = struct.Struct("<BI")  # mode, stored bytes

MIN_BYTES = 256
"""Shorter chunks are stored raw (or as a fill): a header and a table would eat the gain."""
MIN_GAIN = 1 / 64
"""A form that saves less than this share is not worth the decoder's time."""
_NOISE_BITS = 7.75  # a plane of more bits per byte than this is left raw; a sample of 8,192 reads noise as 7.98

_FLOATS = frozenset(name for name in ITEM_BYTES if "float" in name or "complex" in name)

Piece = memoryview | bytes

# No search for repeats worth the name, Huffman on literals: what an exponent plane needs. zstd's level 1 takes three
# times as long for less, because its matches in noise cost more than they save.
_HUFFMAN: Final = zstandard.ZstdCompressionParameters(
    strategy=1,
    min_match=7,
    hash_log=6,
    window_log=17,
    target_length=0,
    search_log=1,
    chain_log=6,
    write_content_size=True,
)
_MATCHES: Final = zstandard.ZstdCompressionParameters.from_level(1, window_log=20, write_content_size=True)


class _PerThread(threading.local):
    """Zstandard contexts: fast to use, costly to make, not to be shared by two threads at once."""

    def __init__(self) -> None:
        self.huffman = zstandard.ZstdCompressor(compression_params=_HUFFMAN)
        self.matches = zstandard.ZstdCompressor(compression_params=_MATCHES)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _PerThread()


def word_bytes(dtype: str) -> int:
    """Bytes of the words that a dtype is split into: a complex number is two of them."""
    if dtype not in ITEM_BYTES:
        raise DtypeUnknown(f"dtype {dtype!r} is not one that checkpoints hold")
    return ITEM_BYTES[dtype] // 2 if dtype.startswith("complex") else ITEM_BYTES[dtype]


def check_codec(codec: str) -> str:
    """`codec` itself. Raises StateInvalid if it is not one of CODECS."""
    if codec not in CODECS:
        raise StateInvalid(f"codec {codec!r} is unknown", next=f"choose one of {', '.join(CODECS)}")
    return codec


def encode(raw: memoryview, dtype: str, codec: str, room: Bytes | None = None) -> tuple[str, list[Piece]]:
    """The stored form of a chunk and its bytes in pieces, never more of them than `raw` has.

    raw    the chunk's bytes in C order, whole elements, contiguous; pieces may be views of it
    codec  one of CODECS; "auto" is "fast" here (a keeper replaces it by what it has measured: node/choice.py)
    room   as many bytes as `raw`, for the pieces to lie in; not to be used again while the pieces are
    """
    raw = raw.cast("B")
    if check_codec(codec) == "raw" or not raw.nbytes:
        return RAW, [raw]
    width = word_bytes(dtype)
    items = planes.as_words(raw, min(ITEM_BYTES[dtype], 8))
    if ITEM_BYTES[dtype] > 8:
        items = items.reshape(-1, ITEM_BYTES[dtype] // 8)
    if planes.all_equal(items):
        return FILL, [raw[: ITEM_BYTES[dtype]]]
    if raw.nbytes < MIN_BYTES:
        return RAW, [raw]
    pieces = _encode_planes(planes.as_words(raw, width), real=dtype in _FLOATS, room=room)
    if pieces is None or sum(len(piece) for piece in pieces) > raw.nbytes * (1 - MIN_GAIN):
        return RAW, [raw]
    return PLANES, pieces


def decode(form: str, stored: memoryview, dtype: str, out: memoryview) -> None:
    """Fill `out` (writable, contiguous, exactly the chunk's raw bytes) from its stored form.

    Nothing is ever allocated beyond the size of `out`, whatever `stored` claims.
    Raises CheckpointDamaged when `stored` is not a stored form of that many bytes.
    """
    stored, out = stored.cast("B"), out.cast("B")
    if form == RAW:
        _require(stored.nbytes == out.nbytes, f"{stored.nbytes} raw bytes stored, {out.nbytes} declared")
        out[:] = stored
    elif form == FILL:
        size = ITEM_BYTES[dtype]
        _require(stored.nbytes == size, f"a fill of {stored.nbytes} bytes for elements of {size}")
        _require(out.nbytes % size == 0, f"{out.nbytes} bytes are not whole elements of {size}")
        planes.fill(out, stored)
    elif form == PLANES:
        _decode_planes(stored, dtype, out)
    else:
        raise CheckpointDamaged(
            f"stored form {form[:40]!r} is unknown", next=f"this reader knows {', '.join(STORED_FORMS)}"
        )


def _require(good: bool, what: str) -> None:
    if not good:
        raise CheckpointDamaged(what)


def _encode_planes(words: Words, *, real: bool, room: Bytes | None) -> list[Piece] | None:
    """Header, table and planes; None if the sample says that no plane pays. `real`: IEEE words, not integers."""
    rotate = int(real and words.dtype.itemsize > 1)
    worth = [_worth(plane, real=real) for plane in planes.split(planes.sample(words), rotate)]
    if not any(worth):
        return None
    modes: list[int] = []
    bodies: list[Piece] = []
    for plane, pays in zip(planes.split(words, rotate, room), worth, strict=True):
        mode, body = _encode_plane(plane, real=real) if pays else (MODE_RAW, plane.data)
        modes.append(mode)
        bodies.append(body)
    head = _HEADER.pack(words.dtype.itemsize, rotate) + b"".join(
        _PLANE.pack(mode, len(body)) for mode, body in zip(modes, bodies, strict=True)
    )
    return [head, *bodies]


def _worth(part: Bytes, *, real: bool) -> bool:
    """Whether a plane of which `part` is a sample looks worth encoding."""
    if planes.entropy_bits(part) < _NOISE_BITS:
        return True
    if real:
        return False
    # Integers may repeat in a pattern (counters, tables) that a count of bytes does not see.
    return len(_contexts.matches.compress(part.data)) < part.size * (1 - MIN_GAIN)


def _encode_plane(plane: Bytes, *, real: bool) -> tuple[int, Piece]:
    if planes.all_equal(plane):
        return MODE_FILL, plane[:1].tobytes()
    some = plane[:: max(1, plane.size // 4096)]
    if not (some & 1).any() and planes.entropy_bits(some) > 6.5 and not (plane & 1).any():
        # The sign of a square: packing takes a tenth of the time that Huffman needs for the same eighth.
        return MODE_PACK7, planes.pack7(plane).data
    frame = (_contexts.huffman if real else _contexts.matches).compress(plane.data)
    if len(frame) > plane.size * (1 - MIN_GAIN):
        return MODE_RAW, plane.data
    return MODE_ZSTD, frame


def _decode_planes(stored: memoryview, dtype: str, out: memoryview) -> None:
    _require(stored.nbytes >= _HEADER.size, f"{stored.nbytes} bytes are no header of planes")
    width, rotate = _HEADER.unpack_from(stored)
    expected = word_bytes(dtype)
    _require(width == expected, f"planes of {width}-byte words, {dtype} has {expected}")
    _require(rotate in (0, 1) and (width > 1 or not rotate), f"words rotated by {rotate} bits")
    _require(out.nbytes % width == 0, f"{out.nbytes} bytes are not whole words of {width}")
    size = out.nbytes // width
    at = _HEADER.size + width * _PLANE.size
    _require(stored.nbytes >= at, f"{stored.nbytes} bytes end within the table of planes")
    parts: list[Bytes | int] = []
    for k in range(width):
        mode, length = _PLANE.unpack_from(stored, _HEADER.size + k * _PLANE.size)
        _require(length <= stored.nbytes - at, f"plane {k} claims {length} bytes, {stored.nbytes - at} are left")
        parts.append(_decode_plane(mode, stored[at : at + length], size, k))
        at += length
    _require(at == stored.nbytes, f"{stored.nbytes - at} bytes follow the last plane")
    planes.merge(parts, rotate, planes.as_words(out, width))


def _decode_plane(mode: int, body: memoryview, size: int, k: int) -> Bytes | int:
    if mode == MODE_RAW:
        _require(body.nbytes == size, f"raw plane {k} has {body.nbytes} bytes instead of {size}")
        return np.frombuffer(body, np.uint8)
    if mode == MODE_FILL:
        _require(body.nbytes == 1, f"constant plane {k} has {body.nbytes} bytes")
        return body[0]
    if mode == MODE_PACK7:
        packed = 7 * -(-size // 8)
        _require(body.nbytes == packed, f"packed plane {k} has {body.nbytes} bytes instead of {packed}")
        return planes.unpack7(np.frombuffer(body, np.uint8), size)
    _require(mode == MODE_ZSTD, f"plane {k} has the unknown mode {mode}")
    return np.frombuffer(_decompress(body, size, k), np.uint8)


def _decompress(frame: memoryview, size: int, k: int) -> bytes:
    """One Zstandard frame of exactly `size` bytes; the declared size is compared before anything is allocated."""
    try:
        declared = zstandard.get_frame_parameters(frame).content_size
        _require(declared == size, f"plane {k} declares {declared} bytes instead of {size}")
        data = _contexts.decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CheckpointDamaged(f"plane {k} is not a Zstandard frame: {error}") from error
    _require(len(data) == size, f"plane {k} has {len(data)} bytes instead of {size}")
    return data
