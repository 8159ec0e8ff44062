"""The workers of a node, as their keeper knows them: who is connected, who is gone, and why."""

from __future__ import annotations

import hmac
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass

from resilient.detect.progress import KeeperPage
from resilient.errors import WireError
from resilient.node.config import KeeperConfig
from resilient.node.loop import Loop
from resilient.node.wire import MAX_BLOB_BYTES, MAX_JSON_BYTES, MAX_STRANGER_BYTES, Channel, Json, Message, peer_of

_GREETING_S = 10.0
_DYING_S = 0.2


@dataclass
class _Member:
    channel: Channel
    rank: int
    pid: int
    pidfd: int


class Members:
    """Accepts this node's workers at an abstract Unix address, and no other process."""

    def __init__(
        self,
        loop: Loop,
        config: KeeperConfig,
        *,
        token: str,
        page: KeeperPage,
        hear: Callable[[int, Message], None],
        gone: Callable[[int, str], None],
    ) -> None:
        """hear(local rank, message); gone(local rank, why), once for each rank, after its last message."""
        self._loop, self._config, self._token, self._page = loop, config, token, page
        self._hear, self._gone = hear, gone
        self._members: dict[int, _Member] = {}
        self.ended: set[int] = set()  # local ranks that are gone, or never came
        # Global by local rank; a guess for those that have not come yet.
        self.ranks = {local: config.rank + local for local in range(config.local_size)}
        # Abstract: no file to leave behind or to attack; who connects, the kernel says.
        self.address = f"resilient-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind("\0" + self.address)
        self._listener.listen(128)
        loop.watch(self._listener.fileno(), self._accept)

    @property
    def everyone_gone(self) -> bool:
        """No worker is there any more, and none will come."""
        return len(self.ended) == self._config.local_size

    @property
    def complete(self) -> bool:
        """Every worker has come."""
        return len(self._members) + len(self.ended) == self._config.local_size

    @property
    def here(self) -> tuple[int, ...]:
        """Local ranks that are connected."""
        return tuple(self._members)

    def tell(self, local: int, body: Json) -> None:
        """Send to one worker; nothing happens if it is gone."""
        member = self._members.get(local)
        if member is not None:
            self._loop.send(member.channel, body)

    def tell_all(self, body: Json) -> None:
        """Send to every worker that is there."""
        for local in self.here:
            self.tell(local, body)

    def give_up_absent(self) -> None:
        """Whoever has not come by now never will."""
        for local in range(self._config.local_size):
            if local not in self._members and local not in self.ended:
                self._end(local, f"did not connect within {self._config.start_timeout_s:g} s")

    def drop(self, local: int, why: str) -> None:
        """End the connection to a worker that broke the protocol."""
        member = self._members.pop(local, None)
        if member is None:
            return
        self._loop.unwatch(member.pidfd)
        os.close(member.pidfd)
        self._loop.remove(member.channel)
        self._end(local, why)

    # ---- inside
    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        pid, uid = peer_of(sock)
        if uid not in (0, os.getuid()):
            sock.close()
            return
        channel = Channel(sock, max_json=MAX_STRANGER_BYTES, max_blob=0)
        self._loop.later(_GREETING_S, lambda: self._loop.remove(channel) if channel.max_blob == 0 else None)
        self._loop.add(channel, lambda m: self._greet(channel, pid, m), lambda _: self._loop.remove(channel))

    def _greet(self, channel: Channel, pid: int, message: Message) -> None:
        message.drop()
        token = str(message.body.get("token")).encode()
        if message.body.get("t") != "hello" or not hmac.compare_digest(token, self._token.encode()):
            self._loop.send(channel, WireError("this keeper serves another run").to_wire())
            self._loop.remove(channel)
            return
        local, rank = message.number("local_rank"), message.number("rank")
        if local >= self._config.local_size or local in self._members or local in self.ended:
            self._loop.send(channel, WireError(f"local rank {local} has no place here").to_wire())
            self._loop.remove(channel)
            return
        channel.max_json, channel.max_blob = MAX_JSON_BYTES, MAX_BLOB_BYTES
        try:
            # The process itself, not its socket, says when it is dead: a forked child may hold the socket open.
            pidfd = os.pidfd_open(pid)
        except OSError:
            self._loop.remove(channel)
            self._end(local, f"(process {pid}) died at once")
            return
        member = _Member(channel=channel, rank=rank, pid=pid, pidfd=pidfd)
        self._members[local], self.ranks[local] = member, rank
        self._loop.watch(pidfd, lambda: self._died(local, member))
        self._loop.rewire(channel, lambda m: self._heard(local, m), lambda e: self._left(local, member, e))
        self._loop.send(channel, {"t": "welcome"}, fds=(self._page.fd,))

    def _heard(self, local: int, message: Message) -> None:
        if message.body.get("t") == "bye":
            message.drop()
            self.drop(local, "closed its connection")
            return
        self._hear(local, message)

    def _left(self, local: int, member: _Member, error: WireError) -> None:
        # The kernel closes a dying process's sockets a moment before it is dead: ask again in a moment.
        self._loop.remove(member.channel)
        self._loop.later(_DYING_S, lambda: self._gone_away(local, member, error))

    def _gone_away(self, local: int, member: _Member, error: WireError) -> None:
        if self._members.get(local) is member:
            self.drop(local, f"(process {member.pid}) went away: {error.what}")

    def _died(self, local: int, member: _Member) -> None:
        self._loop.drain(member.channel)
        self.drop(local, f"(process {member.pid}) died")

    def _end(self, local: int, why: str) -> None:
        if local not in self.ended:
            self.ended.add(local)
            self._gone(local, why)
