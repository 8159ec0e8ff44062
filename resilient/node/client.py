"""Connecting the ranks of a run to their keepers, one keeper per node, started here."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resilient.detect.progress import ProgressPage
from resilient.errors import KeeperLost, RanksDisagree, WireError
from resilient.node.config import KeeperConfig
from resilient.node.handover import KeeperClient
from resilient.node.messages import CommitInfo
from resilient.node.pending import Pending
from resilient.node.start import Started, expect, new_secret, start_keeper, stop_process
from resilient.node.wire import Channel, Json, peer_of
from storage.errors import ResilientError

__all__ = ["CommitInfo", "KeeperClient", "KeeperConfig", "Pending", "connect"]

Exchange = Callable[[bytes], list[bytes]]
"""all_gather of bytes over the ranks, by rank; the caller's own collective."""


def connect(config: KeeperConfig, exchange: Exchange) -> KeeperClient:
    """Start the keepers and connect to them. Collective: either every rank gets a client, or every rank raises.

    Raises KeeperLost where a keeper does not start, RanksDisagree where the ranks' configurations do not fit.
    """
    ranks = _Ranks(config, exchange)
    first = ranks.tell({"node": config.node, "local": config.local_rank, "secret": new_secret()})
    leader_node = int(first[0]["node"])
    started: Started | None = None
    client: KeeperClient | None = None
    try:
        answer: Json = {}
        try:
            _check(config, first)
            if config.local_rank == 0:
                leads = config.node == leader_node
                token = new_secret()
                started = start_keeper(config, token=token, secret=str(first[0]["secret"]), leads=leads)
                answer = {
                    "node": config.node,
                    "address": started.address,
                    "host": config.bind_host,
                    "port": started.port,
                    "token": token,
                }
        except ResilientError as error:
            answer = {"failed": error.to_wire()}
        places = {place["node"]: place for place in ranks.tell(answer) if place}
        answer = {}
        try:
            if started is not None:
                leader = places[leader_node]
                started.control.send({"t": "join", "host": leader["host"], "port": leader["port"]})
                expect(started.control, "joined", config.start_timeout_s)
                started.control.close()
            client = _attach(config, places[config.node], started)
        except ResilientError as error:
            answer = {"failed": error.to_wire()}
        ranks.tell(answer)
    except BaseException:
        if client is not None:
            client.close(0.0)
        if started is not None:
            started.control.close()
            stop_process(started.process, 0.0)
        raise
    assert client is not None  # noqa: S101  (a rank without one has told so, and all have raised)
    return client


@dataclass(frozen=True)
class _Ranks:
    config: KeeperConfig
    exchange: Exchange

    def tell(self, value: Json) -> list[Any]:
        """What every rank said. Raises the first failure among it, on every rank."""
        said = [json.loads(data) for data in self.exchange(json.dumps(value).encode())]
        for item in said:
            if "failed" in item:
                raise ResilientError.from_wire(item["failed"])
        return said


def _check(config: KeeperConfig, ranks: list[Any]) -> None:
    if len(ranks) != config.world_size:
        raise RanksDisagree(f"{len(ranks)} ranks connect, the configuration says {config.world_size}")
    local = sorted(item["local"] for item in ranks if item["node"] == config.node)
    if local != list(range(config.local_size)) or len({item["node"] for item in ranks}) != config.nodes:
        raise RanksDisagree(
            f"node {config.node} has local ranks {local}, the configuration says {config.local_size} ranks "
            f"on each of {config.nodes} nodes",
            next="give every rank of a node the same node number and local size",
        )


def _attach(config: KeeperConfig, place: Json, started: Started | None) -> KeeperClient:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = Channel(sock)
    try:
        sock.settimeout(config.start_timeout_s)
        sock.connect("\0" + place["address"])
        keeper_pid, uid = peer_of(sock)
        if uid not in (0, os.getuid()):
            raise WireError(f"user {uid} listens at our keeper's address")
        channel.send({"t": "hello", "token": place["token"], "rank": config.rank, "local_rank": config.local_rank})
        welcome = expect(channel, "welcome", config.start_timeout_s)
    except OSError as error:
        channel.close()
        raise KeeperLost(f"the keeper of node {config.node} cannot be reached: {error}") from error
    except ResilientError:
        channel.close()
        raise
    page = ProgressPage(welcome.fds[0], config.local_rank, alone=config.nodes == 1)
    process = started.process if started is not None else None
    try:
        client = KeeperClient(config, channel, page, keeper_pid=keeper_pid, process=process)
    except KeeperLost:
        channel.close()
        page.close()
        raise
    page.alive = lambda: client.alive
    return client
