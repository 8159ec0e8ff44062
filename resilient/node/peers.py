"""Connections between the keepers of several nodes: authenticated, watched for silence."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from resilient.errors import TimedOut, WireError
from resilient.node.loop import Loop
from resilient.node.secure import FrameGuard, new_hello, read_hello
from resilient.node.wire import MAX_STRANGER_BYTES, Channel, ChannelClosed, Json, Message

_GREETING_S = 10.0
MAX_PEER_BYTES = 16 << 20
_PINGS = 6  # within the time after which silence counts as loss


@dataclass(eq=False)
class Peer:
    """The connection to another node's keeper."""

    loop: Loop
    channel: Channel
    hear: Callable[[Json], None]
    lost: Callable[[WireError], None]
    silence_s: float
    node: int = -1
    _quiet: int = field(default=0)
    over: bool = field(default=False)

    def send(self, body: Json) -> None:
        """Send without waiting."""
        self.loop.send(self.channel, body)

    def heard(self, message: Message) -> None:
        """A frame that has passed its authentication."""
        self._quiet = 0
        message.drop()
        if message.body.get("t") != "ping":
            self.hear(message.body)

    def ping(self) -> None:
        """Show that we live; count the peer's silence in our own ticks, so that a frozen machine blames nobody."""
        if self.over:
            return
        self._quiet += 1
        if self._quiet > _PINGS:
            self.end(WireError(f"the keeper of the other node was silent for {self.silence_s:g} s"))
            return
        self.send({"t": "ping"})
        self.loop.later(self.silence_s / _PINGS, self.ping)

    def end(self, error: WireError) -> None:
        """Close; `lost` is called once."""
        if not self.over:
            self.over = True
            self.loop.remove(self.channel)
            self.lost(error)


class Gate:
    """Where the coordinator listens for the other nodes' keepers; it knows them by the secret."""

    def __init__(
        self,
        loop: Loop,
        host: str,
        *,
        secret: bytes,
        nodes: int,
        silence_s: float,
        hear: Callable[[int, Json], None],
        lost: Callable[[int, WireError], None],
    ) -> None:
        """hear(node, message), lost(node, why). Raises OSError where `host` is no address of this machine."""
        self._loop, self._secret, self._nodes, self._silence_s = loop, secret, nodes, silence_s
        self._hear, self._lost = hear, lost
        self.peers: dict[int, Peer] = {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        loop.watch(self._listener.fileno(), self._accept)

    def tell(self, node: int, body: Json) -> None:
        """Send to one node; nothing happens if it is gone."""
        peer = self.peers.get(node)
        if peer is not None:
            peer.send(body)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = Channel(sock, max_json=MAX_STRANGER_BYTES, max_blob=0)
        self._loop.later(_GREETING_S, lambda: self._still_stranger(channel))
        self._loop.add(channel, lambda m: self._greet(channel, m), lambda _: self._loop.remove(channel))

    def _still_stranger(self, channel: Channel) -> None:
        if all(peer.channel is not channel for peer in self.peers.values()):
            self._loop.remove(channel)

    def _greet(self, channel: Channel, message: Message) -> None:
        message.drop()
        theirs = read_hello(message)
        hello, mine = new_hello()
        self._loop.send(channel, hello)
        channel.guard = FrameGuard(self._secret, mine, theirs, server=True)
        self._loop.rewire(channel, lambda m: self._join(channel, m), lambda _: self._loop.remove(channel))

    def _join(self, channel: Channel, message: Message) -> None:
        """Its first frame that carries a tag: whoever made it knows the secret."""
        node = message.number("node")
        if message.body.get("t") != "join" or not 0 <= node < self._nodes or node in self.peers:
            raise WireError(f"node {node} cannot join")
        channel.max_json = MAX_PEER_BYTES
        peer = Peer(
            loop=self._loop,
            channel=channel,
            hear=lambda body: self._hear(node, body),
            lost=lambda error: self._lost(node, error),
            silence_s=self._silence_s,
            node=node,
        )
        self.peers[node] = peer
        self._loop.rewire(channel, peer.heard, peer.end)
        peer.send({"t": "joined"})
        peer.ping()


def dial(host: str, port: int, *, node: int, secret: bytes, deadline_s: float) -> Channel:
    """Connect to the coordinator and prove who we are; blocks, at most `deadline_s`.

    Raises WireError where the other side does not know the secret, ChannelClosed, TimedOut.
    """
    until = time.monotonic() + deadline_s
    try:
        sock = socket.create_connection((host, port), timeout=deadline_s)
    except OSError as error:
        raise ChannelClosed(f"the coordinator at {host}:{port} cannot be reached: {error}") from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel = Channel(sock, max_json=MAX_PEER_BYTES, max_blob=0)
    try:
        hello, mine = new_hello()
        channel.send(hello)
        theirs = read_hello(channel.receive(max(0.0, until - time.monotonic())))
        channel.guard = FrameGuard(secret, mine, theirs, server=False)
        channel.send({"t": "join", "node": node})
        # Only who knows the secret can send a frame that passes; it says "joined" or closes.
        channel.receive(max(0.0, until - time.monotonic()))
    except (WireError, TimedOut):
        channel.close()
        raise
    return channel
