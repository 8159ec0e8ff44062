"""Servers on the loopback that answer badly: canned errors, silence, lost replies."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """`serve` runs in a thread for each connection; gives the endpoint."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def one(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            serve(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                threads.append(threading.Thread(target=one, args=(connection,), daemon=True))
                threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in [acceptor, *threads]:
            thread.join(5)


def read_request(connection: socket.socket) -> bytes:
    """One whole request; answers "Expect: 100-continue"."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    if fields.get(b"expect") == b"100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    while len(body) < int(fields.get(b"content-length", b"0")):
        body += _receive(connection)
    return head


@dataclass
class Answering:
    """Every request gets this error of S3's; it can be changed between requests."""

    status: int
    code: str
    message: str = "on purpose"

    def __call__(self, connection: socket.socket) -> None:
        while True:
            request = read_request(connection)
            text = f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>"
            head = f"HTTP/1.1 {self.status} x\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n"
            connection.sendall((head if request.startswith(b"HEAD") else head + text).encode())


def silent(connection: socket.socket) -> None:
    """Takes every request and never answers."""
    while connection.recv(65_536):
        pass


def losing_replies(upstream: str, times: int, *, method: bytes = b"PUT") -> Callable[[socket.socket], None]:
    """A proxy that passes requests on, and cuts the connection at the reply to the first `times` of this method."""
    host, port = upstream.removeprefix("http://").split(":")
    lost = threading.Semaphore(times)

    def serve(connection: socket.socket) -> None:
        with socket.create_connection((host, int(port))) as server:
            cut = threading.Event()

            def forward() -> None:
                with contextlib.suppress(OSError):
                    while data := connection.recv(65_536):
                        if data.startswith(method) and lost.acquire(blocking=False):
                            cut.set()
                        server.sendall(data)
                    server.shutdown(socket.SHUT_WR)

            thread = threading.Thread(target=forward, daemon=True)
            thread.start()
            while data := server.recv(65_536):
                if cut.is_set() and not data.startswith(b"HTTP/1.1 100"):
                    break  # the server has done it and says so, but nobody hears it
                connection.sendall(data)
            connection.shutdown(socket.SHUT_RDWR)
            thread.join(5)

    return serve


def _receive(connection: socket.socket) -> bytes:
    data = connection.recv(65_536)
    if not data:
        raise ConnectionResetError("the client has gone")
    return data
