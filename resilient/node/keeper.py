"""The keeper process: `python -m resilient.node.keeper FD`, told everything else over that inherited socket."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

from resilient.errors import WireError
from resilient.node.commit import Committer
from resilient.node.config import KeeperConfig, decode_config
from resilient.node.lead import Lead
from resilient.node.loop import Loop, unexpected
from resilient.node.node import NodeKeeper
from resilient.node.peers import Gate, Peer, dial
from resilient.node.persist import OpenStore, Persist
from resilient.node.trace import VARIABLE, Trace
from resilient.node.wire import Channel, Json, Message
from storage.errors import ResilientError

_CHECK_S = 0.05
_LAST_WORDS_S = 5.0  # after the deadline, before the process ends whatever its threads do
_DIAL_S = 10.0


class Keeper:
    """Puts the parts together, and decides when it is time to end."""

    def __init__(self, config: KeeperConfig, start: Message, control: Channel) -> None:
        self.loop = Loop()
        self._config, self._control = config, control
        self._secret = bytes.fromhex(start.text("secret"))
        self._trace = Trace(os.environ.get(VARIABLE), config.node)
        store = OpenStore(config)
        self._node = NodeKeeper(
            self.loop, config, token=start.text("token"), persist=Persist(config, store), trace=self._trace
        )
        self._lead: Lead | None = None
        self._gate: Gate | None = None
        if start.body.get("leads") is True:
            self._lead = Lead(self.loop, config, Committer(config, store), tell=self._tell, trace=self._trace)
            self._node.up = lambda body: self.loop.post(lambda: self._hear_own(body))
            if config.nodes > 1:
                self._gate = Gate(
                    self.loop,
                    config.bind_host,
                    secret=self._secret,
                    nodes=config.nodes,
                    silence_s=config.silence_s,
                    hear=self._lead.hear,
                    lost=self._lead.lost,
                )
        self._until_s: float | None = None  # the end, once the last worker has gone
        self._joined = False

    def run(self) -> None:
        """Serve until the workers are gone and what they sealed is finished, or `linger_s` has passed."""
        self.loop.add(self._control, self._told, self._control_gone)
        port = self._gate.port if self._gate is not None else None
        self.loop.send(self._control, {"t": "listening", "address": self._node.members.address, "port": port})
        self._trace.event("listening")
        self.loop.later(self._config.start_timeout_s, self._node.members.give_up_absent)
        self.loop.every(_CHECK_S, self._check_end)
        self.loop.run()
        self._trace.event("end")

    # ---- the rank that started us
    def _told(self, message: Message) -> None:
        message.drop()
        if message.body.get("t") != "join":
            raise WireError("expected to be told where the coordinator is")
        try:
            if self._lead is None:
                self._join(message.body)
            self._joined = True  # from here on the workers come by themselves, or the start times out
            self.loop.send(self._control, {"t": "joined"})
        except ResilientError as error:
            self.loop.send(self._control, error.to_wire())

    def _control_gone(self, error: WireError) -> None:
        self.loop.remove(self._control)
        if not self._joined:
            self._trace.event("starter_gone", why=error.what)
            self.loop.stopped = True

    def _join(self, body: Json) -> None:
        config, host, port = self._config, str(body.get("host")), body.get("port")
        if not isinstance(port, int):
            raise WireError("the coordinator listens nowhere", next="see why its keeper did not start")
        channel = dial(host, port, node=config.node, secret=self._secret, deadline_s=_DIAL_S)
        peer = Peer(
            loop=self.loop, channel=channel, hear=self._node.down, lost=self._link_lost, silence_s=config.silence_s
        )
        self.loop.add(channel, peer.heard, peer.end)
        self._node.up = peer.send
        peer.ping()

    # ---- between this node and the coordinator
    def _hear_own(self, body: Json) -> None:
        if self._lead is not None:
            self._lead.hear(self._config.node, body)

    def _tell(self, node: int, body: Json) -> None:
        if node == self._config.node:
            self._node.down(body)
        elif self._gate is not None:
            self._gate.tell(node, body)

    def _link_lost(self, error: WireError) -> None:
        why = f"the coordinator's keeper is gone: {error.what}"
        self._trace.event("link_lost", why=why)
        self._node.abandon(why)
        self._node.members.tell_all({"t": "lost", "what": why})
        self.loop.later(_CHECK_S, self._stop)  # once the workers have been told

    # ---- the end
    def _check_end(self) -> None:
        if not self._node.members.everyone_gone:
            return
        now_s = time.monotonic()
        if self._until_s is None:
            self._until_s = now_s + self._config.linger_s
            self._trace.event("everyone_gone")
            _end_for_sure(self._config.linger_s + _LAST_WORDS_S)
        busy = self._node.busy or (self._lead is not None and self._lead.busy)
        if not busy and not self._awaited_by_nodes():
            self._stop()
        elif now_s >= self._until_s:
            self._trace.event("linger_over")
            self._node.abandon(f"not finished within {self._config.linger_s:g} s after the last worker had gone")
            self._stop()

    def _awaited_by_nodes(self) -> bool:
        return self._gate is not None and any(not peer.over for peer in self._gate.peers.values())

    def _stop(self) -> None:
        self.loop.stopped = True


def _end_for_sure(after_s: float) -> None:
    """Whatever happens, this process is gone after so many seconds."""

    def end() -> None:
        time.sleep(after_s)
        os._exit(3)

    threading.Thread(target=end, name="deadline", daemon=True).start()


def main() -> NoReturn:
    """Run one keeper; never returns."""
    # A scheduler that ends a job signals every process of it: just then the last save must still be finished. The
    # keeper ends when its workers have, within `linger_s`.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = Channel(socket.socket(fileno=int(sys.argv[1])))
    control.sock.set_inheritable(False)
    try:
        start = control.receive(30.0)
        keeper = Keeper(decode_config(start.body.get("config")), start, control)
    except (ResilientError, OSError) as error:
        known = error if isinstance(error, ResilientError) else unexpected(error)
        control.send(known.to_wire())
        os._exit(2)
    keeper.run()
    # Not sys.exit: a thread that hangs in a store's call must not keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
