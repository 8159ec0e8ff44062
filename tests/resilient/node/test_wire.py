"""Frames and their authentication: what is not the protocol is refused, before anything is done with it."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.errors import TimedOut, WireError
from resilient.node.loop import Loop
from resilient.node.peers import Gate, dial
from resilient.node.secure import FrameGuard, new_hello, read_hello
from resilient.node.wire import HEADER, MAGIC, VERSION, Channel, ChannelClosed, Json

SECRET = b"s" * 32
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair()
    channels = Channel(left), Channel(right)
    yield channels
    for channel in channels:
        if not channel.closed:
            channel.close()


def guarded(pair: tuple[Channel, Channel], *, secrets: tuple[bytes, bytes] = (SECRET, SECRET)) -> None:
    (_, left_nonce), (_, right_nonce) = new_hello(), new_hello()
    pair[0].guard = FrameGuard(secrets[0], left_nonce, right_nonce, server=False)
    pair[1].guard = FrameGuard(secrets[1], right_nonce, left_nonce, server=True)


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(), st.none() | st.integers() | st.text() | st.lists(st.floats(allow_nan=False, allow_infinity=False))
    ),
    st.binary(max_size=1000),
    st.booleans(),
    st.integers(min_value=1, max_value=7),
)
def test_what_is_sent_arrives_however_it_is_cut(body: Json, blob: bytes, tagged: bool, cut: int) -> None:
    left, right = socket.socketpair()
    pair = Channel(left), Channel(right)
    if tagged:
        guarded(pair)
    try:
        for _ in range(2):
            pair[0].queue(body, blob)
        frames = b"".join(bytes(piece) for piece, _ in pair[0]._outbox)
        pair[0]._outbox.clear()
        received = []
        for at in range(0, len(frames), max(1, len(frames) // cut)):
            pair[0].sock.sendall(frames[at : at + max(1, len(frames) // cut)])
            pair[1].feed()
            while (message := pair[1].next()) is not None:
                received.append((message.body, message.blob))
        assert received == [(body, blob)] * 2
    finally:
        pair[0].close()
        pair[1].close()


def test_descriptors_travel_with_their_frame(pair: tuple[Channel, Channel]) -> None:
    fd = os.memfd_create("x")
    os.write(fd, b"hello")
    pair[0].send({"t": "first"})
    pair[0].send({"t": "second"}, fds=(fd,))
    pair[0].send({"t": "third"})
    os.close(fd)
    messages = [pair[1].receive(1.0) for _ in range(3)]
    assert [len(message.fds) for message in messages] == [0, 1, 0]
    (received,) = messages[1].fds
    assert os.pread(received, 5, 0) == b"hello"
    assert not os.get_inheritable(received)
    messages[1].drop()


def test_descriptors_that_nobody_took_are_closed(pair: tuple[Channel, Channel]) -> None:
    before = open_descriptors()
    fd = os.memfd_create("x")
    for _ in range(3):
        pair[0].send({"t": "take"}, fds=(fd,))
    pair[1].feed()
    os.close(fd)
    pair[1].close()
    assert open_descriptors() == before - 1


@pytest.mark.parametrize(
    "frame",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        HEADER.pack(b"XX", VERSION, 0, 2, 0) + b"{}",
        HEADER.pack(MAGIC, VERSION + 1, 0, 2, 0) + b"{}",
        HEADER.pack(MAGIC, VERSION, 0, 1 << 31, 0),  # refused by its header
        HEADER.pack(MAGIC, VERSION, 0, 2, 1 << 31) + b"{}",
        HEADER.pack(MAGIC, VERSION, 200, 2, 0) + b"{}",
        HEADER.pack(MAGIC, VERSION, 1, 2, 0) + b"{}",  # a descriptor that did not come
        HEADER.pack(MAGIC, VERSION, 0, 2, 0) + b"[]",
        HEADER.pack(MAGIC, VERSION, 0, 2, 0) + b"{x",
        HEADER.pack(MAGIC, VERSION, 0, 2, 0) + b"\xff\xff",
        HEADER.pack(MAGIC, VERSION, 0, 200_000, 0) + b'{"a":' + b"[" * 199_995,
    ],
)
def test_what_is_no_frame_is_refused(pair: tuple[Channel, Channel], frame: bytes) -> None:
    pair[0].sock.sendall(frame)
    with pytest.raises(WireError):
        pair[1].receive(1.0)


def test_waiting_for_a_message_ends(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimedOut):
        pair[1].receive(0.02)
    pair[0].close()
    with pytest.raises(ChannelClosed):
        pair[1].receive(1.0)


def test_a_frame_too_large_to_be_taken_is_not_sent(pair: tuple[Channel, Channel]) -> None:
    pair[0].max_json = 100
    with pytest.raises(WireError, match="too large to send"):
        pair[0].send({"t": "x" * 200})


def tampered(pair: tuple[Channel, Channel], change: Callable[[list[bytes]], list[bytes]]) -> None:
    guarded(pair)
    frames = []
    for number in range(3):
        pair[0].queue({"t": "n", "number": number})
        frames.append(bytes(pair[0]._outbox.popleft()[0]))
    pair[0].sock.sendall(b"".join(change(frames)))
    for number in range(3):
        assert pair[1].receive(0.2).body["number"] == number


def test_tagged_frames_pass(pair: tuple[Channel, Channel]) -> None:
    tampered(pair, lambda frames: frames)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: [f[0], f[0], f[1], f[2]],  # repeated
        lambda f: [f[1], f[0], f[2]],  # swapped
        lambda f: [f[0], f[2]],  # dropped
        lambda f: [f[0], f[1].replace(b'"number":1', b'"number":2'), f[2]],  # changed
        lambda f: [f[0], f[1][:12] + bytes(16) + f[1][28:], f[2]],  # no tag
        lambda f: [f[0], HEADER.pack(MAGIC, VERSION, 0, 2, 0) + b"{}" + f[1], f[2]],  # slipped in
    ],
)
def test_tampered_frames_are_refused(
    pair: tuple[Channel, Channel], change: Callable[[list[bytes]], list[bytes]]
) -> None:
    with pytest.raises((WireError, TimedOut)):
        tampered(pair, change)


def test_another_secret_does_not_pass(pair: tuple[Channel, Channel]) -> None:
    guarded(pair, secrets=(SECRET, b"t" * 32))
    pair[0].send({"t": "x"})
    with pytest.raises(WireError, match="authentication"):
        pair[1].receive(1.0)


def test_a_recorded_connection_cannot_be_played_back(pair: tuple[Channel, Channel]) -> None:
    guarded(pair)
    pair[0].queue({"t": "join", "node": 1})
    recorded = bytes(pair[0]._outbox.popleft()[0])
    left, right = socket.socketpair()
    again = Channel(left), Channel(right)
    guarded(again)  # new nonces
    again[0].sock.sendall(recorded)
    with pytest.raises(WireError, match="authentication"):
        again[1].receive(1.0)
    again[0].close()
    again[1].close()


@pytest.mark.parametrize("body", [{"t": "hello"}, {"t": "hello", "nonce": "xyz"}, {"t": "hi", "nonce": "0" * 64}])
def test_what_is_no_greeting_is_refused(pair: tuple[Channel, Channel], body: Json) -> None:
    pair[0].send(body)
    with pytest.raises(WireError, match="greeting"):
        read_hello(pair[1].receive(1.0))


class Listening:
    """A gate in a loop in a thread."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.heard: list[tuple[int, Json]] = []
        self.lost: list[int] = []
        self.event = threading.Event()
        self.gate = Gate(
            self.loop,
            "127.0.0.1",
            secret=SECRET,
            nodes=3,
            silence_s=1.2,
            hear=self._hear,
            lost=lambda node, _: self._note(node),
        )
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def _hear(self, node: int, body: Json) -> None:
        self.heard.append((node, body))
        self.event.set()

    def _note(self, node: int) -> None:
        self.lost.append(node)
        self.event.set()

    def stop(self) -> None:
        self.loop.post(lambda: setattr(self.loop, "stopped", True))
        self.thread.join(5.0)


@pytest.fixture
def listening() -> Iterator[Listening]:
    made = Listening()
    yield made
    made.stop()


def test_a_node_that_knows_the_secret_is_heard(listening: Listening) -> None:
    channel = dial("127.0.0.1", listening.gate.port, node=2, secret=SECRET, deadline_s=5.0)
    channel.send({"t": "request", "kind": "save"})
    assert listening.event.wait(5.0)
    assert listening.heard == [(2, {"t": "request", "kind": "save"})]
    listening.event.clear()
    channel.close()
    assert listening.event.wait(5.0)
    assert listening.lost == [2]


def test_a_stranger_is_never_heard(listening: Listening) -> None:
    with pytest.raises(WireError):
        dial("127.0.0.1", listening.gate.port, node=1, secret=b"w" * 32, deadline_s=5.0)
    plain = Channel(socket.create_connection(("127.0.0.1", listening.gate.port)))
    plain.send({"t": "join", "node": 1})  # without a greeting
    with pytest.raises(WireError):
        plain.receive(5.0)
    plain.close()
    untagged = Channel(socket.create_connection(("127.0.0.1", listening.gate.port)))
    untagged.send(new_hello()[0])
    untagged.receive(5.0)
    for _ in range(2):  # after it, without a tag
        untagged.send({"t": "request", "kind": "save"})
    with pytest.raises(WireError):
        untagged.receive(5.0)
    untagged.close()
    large = Channel(socket.create_connection(("127.0.0.1", listening.gate.port)))
    large.sock.sendall(HEADER.pack(MAGIC, VERSION, 0, 1 << 20, 0))  # more than a stranger may say
    with pytest.raises(WireError):
        large.receive(5.0)
    large.close()
    assert listening.heard == []


def test_a_node_cannot_join_twice_or_be_none_of_ours(listening: Listening) -> None:
    first = dial("127.0.0.1", listening.gate.port, node=1, secret=SECRET, deadline_s=5.0)
    for node in (1, 3):
        with pytest.raises(WireError):
            dial("127.0.0.1", listening.gate.port, node=node, secret=SECRET, deadline_s=5.0)
    first.close()


def test_a_node_that_falls_silent_is_lost(listening: Listening) -> None:
    channel = dial("127.0.0.1", listening.gate.port, node=1, secret=SECRET, deadline_s=5.0)
    assert listening.event.wait(5.0)
    assert listening.lost == [1]
    channel.close()


def test_the_header_is_twelve_bytes_as_written_down() -> None:
    assert HEADER.pack(MAGIC, VERSION, 1, 2, 3) == b"RK\x01\x01" + struct.pack(">II", 2, 3)
    left, right = socket.socketpair()
    with left, right:
        Channel(left).send({"t": "a"}, b"blob")
        text = json.dumps({"t": "a"}, separators=(",", ":")).encode()
        assert right.recv(100) == HEADER.pack(MAGIC, VERSION, 0, len(text), 4) + text + b"blob"
