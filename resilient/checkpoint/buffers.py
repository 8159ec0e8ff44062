"""The snapshot memory of one rank: which buffer the next save is copied into, and waiting until it is free."""

from __future__ import annotations

import time
from collections.abc import Sequence

from resilient.checkpoint.items import Slot
from resilient.checkpoint.snapshot import copy_into
from resilient.checkpoint.tensors import LocalTensor
from resilient.errors import TimedOut
from resilient.node.arena import Arena
from resilient.node.client import KeeperClient
from resilient.node.pending import Pending
from resilient.ranks import Ranks
from storage.failpoint import failpoint


class Buffers:
    """At most `count` arenas, used in turn; they outlive a keeper, and the next one is told of them.

    skip       whether `take` gives up rather than wait while the next buffer is still being persisted
    timeout_s  how long it waits at most
    where      the store, for messages
    """

    def __init__(self, ranks: Ranks, *, count: int, skip: bool, timeout_s: float, where: str) -> None:
        self._ranks, self._count, self._skip, self._timeout_s, self._where = ranks, count, skip, timeout_s, where
        self._arenas: list[Arena] = []
        self._using: dict[int, Pending] = {}  # arena -> the save that was last copied into it
        self._filled = 0  # how often, all together

    def attach(self, client: KeeperClient) -> None:
        """Tell a new keeper of the buffers that there are."""
        for index in range(len(self._arenas)):
            self._tell(index, client)

    def take(self, nbytes: int, client: KeeperClient) -> int | None:
        """The buffer that this save is copied into, made or enlarged if need be; None to skip. Collective.

        Raises TimedOut.
        """
        if len(self._arenas) < self._count:
            self._arenas.append(Arena(nbytes))
            index = len(self._arenas) - 1
            self._tell(index, client)
            return index
        # All ranks take their buffers in the same order, so they wait for, or skip because of, the same save.
        index = self._filled % self._count
        if self._skip:
            if not self._ranks.agree([int(client.arena_free(index))])[0][0]:
                return None
        else:
            self._wait_until_free(index, client)
        if self._arenas[index].nbytes < nbytes:
            self._arenas[index].close()
            self._arenas[index] = Arena(nbytes)
            self._tell(index, client)
        return index

    def fill(self, index: int, slots: Sequence[Slot], tensors: Sequence[LocalTensor]) -> None:
        """Copy the tensors into a buffer that was taken."""
        copy_into(self._arenas[index].view, slots, tensors)
        failpoint("snapshot.copied")
        self._filled += 1

    def use(self, index: int, pending: Pending) -> None:
        """From now on this save reads the buffer."""
        self._using[index] = pending

    def settle(self) -> None:
        """Wait until no save reads a buffer, each at most `timeout_s`."""
        for pending in self._using.values():
            pending.wait(self._timeout_s)

    def close(self) -> None:
        """Give the memory back, as far as this process is concerned."""
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()

    def _tell(self, index: int, client: KeeperClient) -> None:
        client.attach(index, self._arenas[index].fd, self._arenas[index].nbytes)

    def _wait_until_free(self, index: int, client: KeeperClient) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        pending = self._using.get(index)
        if pending is not None and not client.arena_free(index):
            client.hurry()
        while not client.arena_free(index):
            if time.monotonic() > deadline_s:
                raise TimedOut(
                    f"the save before is still being written after {self._timeout_s:g} s",
                    where=self._where,
                    next="look at the store; a larger busy_timeout_s waits longer",
                )
            if pending is None or pending.wait(0.01):
                time.sleep(0.001)  # done, and the message that frees the buffer is on its way
