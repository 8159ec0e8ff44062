"""Frames between processes: JSON with an optional blob and file descriptors, bounded in size.

    header   magic "RK", version, number of descriptors, JSON bytes, blob bytes     (12 bytes, network order)
    tag      16 bytes of HMAC-SHA256, on authenticated channels only (see secure.py)
    body     the JSON object, then the blob

A channel never unpickles, never runs what it reads, and refuses a frame by its header before it holds the body.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from resilient.errors import TimedOut, WireError

Json = dict[str, Any]
HEADER = struct.Struct(">2sBBII")
MAGIC, VERSION = b"RK", 1
TAG_BYTES = 16
MAX_FDS = 8
MAX_JSON_BYTES = 64 << 20
MAX_BLOB_BYTES = 256 << 20
MAX_STRANGER_BYTES = 4096  # until a peer has shown who it is
_READ_BYTES = 1 << 18


class ChannelClosed(WireError):
    """The other end of a channel is gone."""


class Guard(Protocol):
    """Makes and checks the tag of each frame; both count frames, so none can be dropped, repeated or swapped."""

    def tag(self, header: bytes, body: Sequence[bytes]) -> bytes:
        """The tag of the next frame to be sent."""

    def check(self, header: bytes, body: bytes, tag: bytes) -> bool:
        """Whether this is the next frame from the peer."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One frame: its JSON object, the blob, and descriptors that now belong to the receiver."""

    body: Json
    blob: bytes = b""
    fds: tuple[int, ...] = ()

    def text(self, name: str) -> str:
        """A text field. Raises WireError."""
        value = self.body.get(name)
        if not isinstance(value, str):
            raise WireError(f"message {self.body.get('t')!r} has no text {name!r}")
        return value

    def number(self, name: str) -> int:
        """A whole number that is not negative. Raises WireError."""
        value = self.body.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise WireError(f"message {self.body.get('t')!r} has no number {name!r}")
        return value

    def drop(self) -> None:
        """Close the descriptors that came with it."""
        for fd in self.fds:
            os.close(fd)


class Channel:
    """A stream socket as a sequence of messages. One thread reads and one writes; they may be the same."""

    def __init__(self, sock: socket.socket, *, max_json: int = MAX_JSON_BYTES, max_blob: int = MAX_BLOB_BYTES) -> None:
        self.sock = sock
        self.guard: Guard | None = None
        self.max_json, self.max_blob = max_json, max_blob
        self._inbox = bytearray()
        self._fds: deque[int] = deque()
        self._outbox: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self.closed = False

    # ---- sending
    def queue(self, body: Json, blob: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Append one frame to what `flush` sends; the descriptors are duplicated and stay the caller's."""
        text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        if len(text) > self.max_json or len(blob) > self.max_blob or len(fds) > MAX_FDS:
            raise WireError(
                f"a frame of {len(text)} + {len(blob)} bytes is too large to send", where=str(body.get("t"))
            )
        header = HEADER.pack(MAGIC, VERSION, len(fds), len(text), len(blob))
        tag = self.guard.tag(header, (text, blob)) if self.guard else b""
        self._outbox.append((memoryview(header + tag + text), tuple(os.dup(fd) for fd in fds)))
        if blob:
            self._outbox.append((memoryview(blob), ()))

    @property
    def waiting_bytes(self) -> int:
        """Bytes queued and not yet given to the kernel."""
        return sum(piece.nbytes for piece, _ in self._outbox)

    def flush(self) -> bool:
        """Send what the socket takes now; whether all is sent. Raises ChannelClosed."""
        while self._outbox:
            piece, fds = self._outbox[0]
            try:
                sent = socket.send_fds(self.sock, [piece], list(fds)) if fds else self.sock.send(piece)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                raise ChannelClosed(f"the peer is gone: {error}") from error
            for fd in fds:
                os.close(fd)
            if sent == piece.nbytes:
                self._outbox.popleft()
            else:
                self._outbox[0] = (piece[sent:], ())
        return True

    def send(self, body: Json, blob: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Queue one frame and send everything, waiting as long as the socket's own timeout allows."""
        self.queue(body, blob, fds)
        if not self.flush():
            raise TimedOut("the peer takes no more bytes", where=str(body.get("t")))

    # ---- receiving
    def feed(self) -> bool:
        """Read what is there once; False if nothing was. Raises ChannelClosed at the end of the stream."""
        try:
            if self.sock.family == socket.AF_UNIX:
                room = socket.CMSG_LEN(MAX_FDS * 4)
                data, extra, _, _ = self.sock.recvmsg(_READ_BYTES, room, socket.MSG_CMSG_CLOEXEC)
                for level, kind, payload in extra:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        self._fds.extend(struct.unpack(f"{len(payload) // 4}i", payload[: len(payload) // 4 * 4]))
            else:
                data = self.sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError, TimeoutError):
            return False
        except OSError as error:
            raise ChannelClosed(f"the peer is gone: {error}") from error
        if not data:
            raise ChannelClosed("the peer has closed the connection")
        self._inbox += data
        return True

    def next(self) -> Message | None:
        """The next whole frame that was fed. Raises WireError for anything that is not one."""
        if len(self._inbox) < HEADER.size:
            return None
        header = bytes(self._inbox[: HEADER.size])
        magic, version, fds, json_bytes, blob_bytes = HEADER.unpack(header)
        if magic != MAGIC or version != VERSION:
            raise WireError(f"{header[:3]!r} does not begin a frame of version {VERSION}")
        if json_bytes > self.max_json or blob_bytes > self.max_blob or fds > MAX_FDS:
            raise WireError(f"a frame of {json_bytes} + {blob_bytes} bytes, {fds} descriptors is over the bounds")
        start = HEADER.size + (TAG_BYTES if self.guard else 0)
        end = start + json_bytes + blob_bytes
        if len(self._inbox) < end:
            return None
        tag, payload = bytes(self._inbox[HEADER.size : start]), bytes(self._inbox[start:end])
        if self.guard and not self.guard.check(header, payload, tag):
            raise WireError("a frame fails its authentication", next="see who else can reach this address")
        if len(self._fds) < fds:
            raise WireError(f"{len(self._fds)} of {fds} descriptors came with a frame")
        del self._inbox[:end]
        return Message(
            body=_parse(payload[:json_bytes]),
            blob=payload[json_bytes:],
            fds=tuple(self._fds.popleft() for _ in range(fds)),
        )

    def receive(self, deadline_s: float) -> Message:
        """The next message, waiting at most `deadline_s` seconds. Raises TimedOut, ChannelClosed, WireError."""
        until = time.monotonic() + deadline_s
        while True:
            message = self.next()
            if message is not None:
                return message
            left = until - time.monotonic()
            if left <= 0:
                raise TimedOut(f"no message within {deadline_s:g} s")
            self.sock.settimeout(left)
            self.feed()

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took."""
        self.closed = True
        self.sock.close()
        for fd in (*self._fds, *(fd for _, fds in self._outbox for fd in fds)):
            os.close(fd)
        self._fds.clear()
        self._outbox.clear()


def _parse(text: bytes) -> Json:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a frame's JSON cannot be read: {error}") from error
    if not isinstance(body, dict):
        raise WireError(f"a frame holds a {type(body).__name__}, not an object")
    return body


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """(process id, user id) of the process at the other end of a Unix socket, as the kernel saw it connect."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid
