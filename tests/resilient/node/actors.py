"""Worker processes without torch, told what to do one command at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resilient.checkpoint.geometry import Box
from resilient.checkpoint.items import Shard, Slot, TensorInfo
from resilient.node.arena import Arena
from resilient.node.client import KeeperClient, KeeperConfig, Pending, connect
from resilient.node.wire import Channel, ChannelClosed
from storage.errors import ResilientError

ELEMENTS = 10_000  # float32 per rank
DEADLINE_S = 20.0


def content(step: int, rank: int, elements: int = ELEMENTS) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What a rank's part of the tensor holds at a step."""
    return np.random.default_rng([step, rank]).standard_normal(elements, dtype=np.float32)


class Actor:
    """One rank. Its methods are the commands."""

    def __init__(self, config: KeeperConfig, exchange: Callable[[bytes], list[bytes]], elements: int) -> None:
        self.config, self.exchange, self.elements = config, exchange, elements
        self.client: KeeperClient | None = None
        self.arenas: list[Arena] = []
        self.pending: dict[str, Pending] = {}

    def connect(self, buffers: int = 2) -> dict[str, int]:
        self.client = connect(self.config, self.exchange)
        while len(self.arenas) < buffers:
            self.arenas.append(Arena(self.elements * 4))
        for index, arena in enumerate(self.arenas):
            self.client.attach(index, arena.fd, arena.nbytes)
        info = TensorInfo(name="model/w", dtype="float32", shape=(self.elements * self.config.world_size,))
        box = Box((self.elements * self.config.rank,), (self.elements,))
        self.client.describe("plan", [Slot(shard=Shard(tensor=info, box=box), offset=0)])
        return {"pid": os.getpid(), "keeper": self.client.keeper_pid}

    def fill(self, step: int, arena: int = 0) -> None:
        np.frombuffer(self.arenas[arena].view, np.float32, self.elements)[:] = content(
            step, self.config.rank, self.elements
        )

    def seal(self, step: int, nonce: str, arena: int = 0, fill: bool = True, **facts: Any) -> None:
        assert self.client is not None
        if fill:
            self.fill(step, arena)
        rank = self.config.rank
        values: list[tuple[str, int | None, bytes]] = [("rng", rank, f"rng of {rank} at {step}".encode())]
        if rank == 0:
            values.append(("epoch", None, b"7"))
        if facts.get("restored"):
            facts["restored"] = tuple(facts["restored"])
        self.pending[nonce] = self.client.seal(
            step=step, nonce=nonce, plan_id="plan", arena=arena, values=values, members=self.config.world_size, **facts
        )

    def result(self, nonce: str, timeout: float = DEADLINE_S) -> dict[str, Any]:
        pending = self.pending[nonce]
        step = pending.result(timeout)
        assert pending.commit is not None
        return {"step": step, "generation": pending.commit.generation, "slot": pending.commit.slot}

    def state(self, nonce: str, arena: int = 0) -> dict[str, bool]:
        assert self.client is not None
        pending = self.pending[nonce]
        return {
            "staged": pending.staged(),
            "sealed": pending.sealed(),
            "done": pending.done(),
            "free": self.client.arena_free(arena),
            "alive": self.client.alive,
        }

    def wait_free(self, arena: int) -> None:
        assert self.client is not None
        until = time.monotonic() + DEADLINE_S
        while not self.client.arena_free(arena):
            assert time.monotonic() < until
            time.sleep(0.002)

    def wait_lost(self) -> None:
        assert self.client is not None
        assert self.client.wait_lost(DEADLINE_S)

    def void(self, step: int, nonce: str, what: str) -> None:
        from resilient.errors import SnapshotTorn

        assert self.client is not None
        self.client.void(step, nonce, SnapshotTorn(what))

    def request(self, kind: str) -> None:
        assert self.client is not None
        self.client.request(kind)

    def loop(self, first: int, until_s: float = 10.0, step_s: float = 0.001) -> list[Any]:
        """Run steps until a decision comes: [boundary, kind]."""
        assert self.client is not None
        page, step, deadline = self.client.page, first, time.monotonic() + until_s
        if first:
            page.begin(first - 1)
        while time.monotonic() < deadline:
            page.publish(step)
            kind = page.decision_at(step)
            if kind is not None:
                return [step, kind]
            time.sleep(step_s)
            step += 1
        return [step, None]

    def fork_child(self) -> int:
        """As a DataLoader does: a child that lives on when this rank is dead."""
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        return child

    def close(self, deadline_s: float = 10.0) -> None:
        assert self.client is not None
        self.client.close(deadline_s)
        for arena in self.arenas:
            arena.close()
        self.arenas.clear()

    def descriptors(self) -> list[str]:
        return sorted(str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())


class Failed(Exception):
    """A command raised; `error` is the ResilientError, `rank` who."""

    def __init__(self, rank: int, error: ResilientError) -> None:
        super().__init__(f"rank {rank}: {type(error).__name__}: {error}")
        self.rank, self.error = rank, error


class Ranks:
    """Forked workers. `each` runs a command on all of them at once, `one` on one."""

    def __init__(self, configs: Sequence[KeeperConfig], *, elements: int = ELEMENTS, env: dict[str, str] | None = None):
        self.configs = configs
        self.channels: list[Channel] = []
        self.pids: list[int] = []
        self.keepers: set[int] = set()
        for config in configs:
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                ours.close()
                for channel in self.channels:
                    channel.sock.close()
                os.environ.update(env or {})
                _serve(config, Channel(theirs), elements)
            theirs.close()
            self.channels.append(Channel(ours))
            self.pids.append(pid)

    def start(self, rank: int, command: str, **arguments: Any) -> None:
        """Send a command; `finish` gets what it returns."""
        self.channels[rank].send({"do": command, "with": arguments})

    def replies(self, ranks: Sequence[int]) -> dict[int, Any]:
        """What the commands answer, serving collectives among them meanwhile."""
        results: dict[int, Any] = {}
        while len(results) < len(ranks):
            gathered: dict[int, str] = {}
            for rank in ranks:
                if rank in results:
                    continue
                body = self.channels[rank].receive(DEADLINE_S + 5.0).body
                if "exchange" in body:
                    gathered[rank] = body["exchange"]
                else:
                    results[rank] = body
            for rank in gathered:
                self.channels[rank].send({"gathered": [gathered[r] for r in sorted(gathered)]})
        for rank, body in results.items():
            if "crashed" in body:
                raise AssertionError(f"rank {rank}: {body['crashed']}")
        return results

    def finish(self, ranks: Sequence[int]) -> list[Any]:
        """What the commands returned. Raises Failed."""
        results = self.replies(ranks)
        for rank in ranks:
            if "failed" in results[rank]:
                raise Failed(rank, ResilientError.from_wire(results[rank]["failed"]))
        return [results[rank]["result"] for rank in ranks]

    def errors(self, command: str, **arguments: Any) -> list[ResilientError]:
        """The typed errors of a command that must fail on every rank."""
        for rank in range(len(self.pids)):
            self.start(rank, command, **arguments)
        replies = self.replies(range(len(self.pids)))
        return [ResilientError.from_wire(replies[rank]["failed"]) for rank in sorted(replies)]

    def each(self, command: str, ranks: Sequence[int] | None = None, **arguments: Any) -> list[Any]:
        """Run on all these ranks at once."""
        chosen = range(len(self.pids)) if ranks is None else ranks
        for rank in chosen:
            self.start(rank, command, **arguments)
        return self.finish(list(chosen))

    def one(self, rank: int, command: str, **arguments: Any) -> Any:
        """Run on one rank."""
        return self.each(command, [rank], **arguments)[0]

    def error(self, rank: int, command: str, **arguments: Any) -> ResilientError:
        """The typed error of a command that must fail."""
        try:
            result = self.one(rank, command, **arguments)
        except Failed as failed:
            return failed.error
        raise AssertionError(f"rank {rank}: {command} returned {result}")

    def connect(self, **arguments: Any) -> list[int]:
        """Connect all ranks; the keepers' process ids by rank."""
        keepers = [reply["keeper"] for reply in self.each("connect", **arguments)]
        self.keepers.update(keepers)
        return keepers

    def kill(self, rank: int) -> None:
        """SIGKILL a rank, and wait for its end."""
        os.kill(self.pids[rank], signal.SIGKILL)
        os.waitpid(self.pids[rank], 0)
        self.pids[rank] = 0

    def end(self) -> None:
        """Nothing is left running, whatever the test did."""
        for pid in [*self.pids, *self.keepers]:
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            if pid:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        for channel in self.channels:
            channel.close()


def _serve(config: KeeperConfig, channel: Channel, elements: int) -> None:
    def exchange(data: bytes) -> list[bytes]:
        channel.send({"exchange": data.hex()})
        return [bytes.fromhex(text) for text in channel.receive(DEADLINE_S).body["gathered"]]

    actor = Actor(config, exchange, elements)
    try:
        while True:
            message = channel.receive(120.0).body
            try:
                answer: dict[str, Any] = {"result": getattr(actor, message["do"])(**message["with"])}
            except ResilientError as error:
                answer = {"failed": error.to_wire()}
            except Exception:
                answer = {"crashed": traceback.format_exc()}
            channel.send(answer)
    except ChannelClosed:
        pass
    finally:
        os._exit(0)


def gone(pid: int, deadline_s: float) -> bool:
    """Whether the process ends within the deadline (a zombie has ended)."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] in "ZX":
                    return True
        except OSError:
            return True
        time.sleep(0.01)
    return False
