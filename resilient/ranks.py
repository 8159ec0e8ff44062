"""The ranks of a run: who and where they are, and the few small collectives that they agree by.

Everything travels over a gloo group of our own: an asynchronous save that shares the training's group can hang it
for good, and a barrier there would stall it. Messages are bytes (never pickled objects).
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resilient.errors import LoopMisused, PeerLost
from storage.errors import ResilientError

NODE_VARIABLE = "RESILIENT_NODE"
"""Overrides how a rank names its node: ranks with different values are on different nodes."""


HOST_VARIABLE = "RESILIENT_HOST"
"""The address at which rank 0's node listens for the keepers of other nodes."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one rank runs."""

    rank: int
    size: int
    node: int  # nodes are numbered by their lowest rank
    nodes: int
    local_rank: int  # among the ranks of the node, ascending
    local_size: int


class Ranks:
    """This process among the ranks; with no process group it is alone. Making one is collective."""

    def __init__(self, *, timeout_s: float = 600.0) -> None:
        self._group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=dt.timedelta(seconds=timeout_s))
        self.place = self._find_place()

    def exchange(self, data: bytes) -> list[bytes]:
        """What every rank gave, by rank. Collective. Raises PeerLost."""
        if self._group is None:
            return [data]
        try:
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(data)], dtype=torch.int64), group=self._group)
            longest = max(1, *(int(n) for n in lengths))
            # gloo needs equal sizes: pad to the longest.
            mine = torch.zeros(longest, dtype=torch.uint8)
            mine[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, mine, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return [part.numpy()[: int(n)].tobytes() for part, n in zip(parts, lengths, strict=True)]

    def broadcast(self, data: bytes) -> bytes:
        """What rank 0 gave. Collective. Raises PeerLost."""
        return self.exchange(data if self.rank == 0 else b"")[0]

    def together(self, act: Callable[[], Any]) -> list[Any]:
        """What `act` returned on each rank (a JSON value); if it failed anywhere, the lowest such rank's error on all.

        Collective. Nobody goes on alone after another's failure, and nobody waits for one that gave up.
        Raises the ResilientError of that rank, PeerLost.
        """
        mine: dict[str, Any] = {}
        own: ResilientError | None = None
        try:
            mine["answer"] = act()
        except ResilientError as error:
            own = error
            mine["failed"] = error.to_wire()
        replies = [json.loads(reply) for reply in self.exchange(json.dumps(mine).encode())]
        for rank, reply in enumerate(replies):
            if "failed" in reply:
                if rank == self.rank and own is not None:
                    raise own
                raise ResilientError.from_wire(reply["failed"])
        return [reply["answer"] for reply in replies]

    def on_rank_0(self, act: Callable[[], Any]) -> Any:
        """What `act` returned on rank 0 (a JSON value), on every rank; its error likewise. Collective."""
        return self.together(lambda: act() if self.rank == 0 else None)[0]

    def agree(self, values: Sequence[int]) -> tuple[list[int], list[int]]:
        """Smallest and largest of each value over the ranks, in one small reduction. Collective. Raises PeerLost.

        Values must fit into 63 bits.
        """
        if self._group is None:
            return list(values), list(values)
        both = torch.tensor([*values, *(-value for value in values)], dtype=torch.int64)
        try:
            dist.all_reduce(both, op=dist.ReduceOp.MIN, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        low, high = both[: len(values)].tolist(), both[len(values) :].tolist()
        return low, [-value for value in high]

    def close(self) -> None:
        """Leave. Not collective; the ranks' own group must not be used afterwards."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def _find_place(self) -> Place:
        name = os.environ.get(NODE_VARIABLE) or f"{platform.node()}/{_boot_id()}"
        names = [json.loads(text) for text in self.exchange(json.dumps(name).encode())]
        order = list(dict.fromkeys(names))
        local = [rank for rank, other in enumerate(names) if other == name]
        return Place(
            rank=self.rank,
            size=self.size,
            node=order.index(name),
            nodes=len(order),
            local_rank=local.index(self.rank),
            local_size=len(local),
        )

    def _lost(self, error: RuntimeError) -> PeerLost:
        return PeerLost(
            f"rank {self.rank} of {self.size} lost touch with its peers: {str(error).splitlines()[0]}",
            next="look at the first rank that failed; start the run again, it goes on from the newest committed step",
        )


def reachable_host() -> str:
    """An address of this machine that other nodes can reach: RESILIENT_HOST, else MASTER_ADDR if it is ours.

    Raises LoopMisused where neither is: listening on every interface would be the alternative.
    """
    for host in (os.environ.get(HOST_VARIABLE), os.environ.get("MASTER_ADDR"), platform.node()):
        if host and (address := _own_address(host)):
            return address
    raise LoopMisused(
        "no address of this node is known that the other nodes could reach",
        next=f"set {HOST_VARIABLE} on rank 0's node to its address in the cluster's network",
    )


def _own_address(host: str) -> str | None:
    try:
        found = socket.getaddrinfo(host, 0, family=socket.AF_INET, type=socket.SOCK_STREAM)
        address = str(found[0][4][0])
        with socket.create_server((address, 0)):
            return address
    except OSError:
        return None  # not a name that resolves, or not this machine's


def _boot_id() -> str:
    # Two containers on one machine share it, two machines with the same host name do not.
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
