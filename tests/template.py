"""The warm process that ranks of a test are forked from; run as `python -m tests.template CONTROL_FD`.

It imports torch and its distributed parts once (2 s), then stays single-threaded and forks a *supervisor* per run,
which forks the ranks (10 ms). The supervisor is a child subreaper: whatever a rank starts, in its own session or not,
stays below it and ends with it. Ranks return from the outermost frame, so that atexit handlers run.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any

from tests.processes import kill_descendants

MESSAGE_BYTES_MAX = 128 << 10
STACKS_SIGNAL = signal.SIGRTMIN + 6
_PR_SET_CHILD_SUBREAPER = 36
PRELOAD = (
    "numpy",
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.device_mesh",
    "torch.nn.parallel",
    "torch.utils.data",
    "torch._dynamo",  # what DDP and optimizers import when they are made, 1 s
    "xxhash",
    "zstandard",
    "pytest",
)


@dataclasses.dataclass
class Rank:
    """What a function that runs in a rank is given first."""

    rank: int
    size: int
    directory: Path  # of the run, shared by all ranks
    _channel: socket.socket

    def emit(self, event: dict[str, Any]) -> None:
        """Tell the test; it reads events with `handle.event(...)`."""
        self._channel.send(json.dumps({"rank": self.rank, "event": event}).encode())

    def receive(self, timeout_s: float = 30.0) -> Any:
        """The next message that the test sent with `handle.send(rank, message)`; TimeoutError if none comes."""
        self._channel.settimeout(timeout_s)
        return json.loads(self._channel.recv(MESSAGE_BYTES_MAX))


@dataclasses.dataclass
class Job:
    """One run, as the test asked for it."""

    function: str
    arguments: dict[str, Any]
    size: int
    local_size: int
    env: dict[str, str]
    directory: Path
    supervisor: socket.socket
    channels: list[socket.socket]


def serve(control: socket.socket) -> Job | None:
    """Fork a supervisor per job. Returns the job in the supervisor, and None in the template at its end."""
    while True:
        text, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES_MAX, 200)
        if not text:
            kill_descendants(os.getpid())
            return None
        _flush()
        if os.fork() == 0:
            control.close()
            request = json.loads(text)
            request["directory"] = Path(request["directory"])
            sockets = [socket.socket(fileno=fd) for fd in fds]
            return Job(**request, supervisor=sockets[0], channels=sockets[1:])
        for fd in fds:
            os.close(fd)


def supervise(job: Job) -> tuple[int, str] | None:
    """Fork the store and the ranks, report exits. Returns (rank, port) in a rank, None in the supervisor at its end."""
    _become_subreaper()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    listener = socket.create_server(("127.0.0.1", 0))
    port = str(listener.getsockname()[1])
    store = _fork()
    if store == 0:
        _host_store(listener)
    ranks: dict[int, int] = {}
    for rank in range(job.size):
        pid = _fork()
        if pid == 0:
            listener.close()
            job.supervisor.close()
            for other, channel in enumerate(job.channels):
                if other != rank:
                    channel.close()
            return rank, port
        ranks[pid] = rank
    listener.close()
    for channel in job.channels:
        channel.close()
    _say(job, {"started": list(ranks), "store": store})
    while True:
        readable, _, _ = select.select([job.supervisor, wake_read], [], [])
        if wake_read in readable:
            os.read(wake_read, 4096)
            while pid := _reap(job, ranks):
                ranks.pop(pid, None)
        if job.supervisor in readable and not job.supervisor.recv(MESSAGE_BYTES_MAX):
            kill_descendants(os.getpid())
            return None


def _reap(job: Job, ranks: dict[int, int]) -> int:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0
    if pid in ranks:
        _say(job, {"exit": ranks[pid], "status": os.waitstatus_to_exitcode(status)})
    return pid


def _say(job: Job, message: dict[str, Any]) -> None:
    try:
        job.supervisor.send(json.dumps(message).encode())
    except (BrokenPipeError, ConnectionResetError):
        return  # the test is gone: the next select sees it and ends the run


def _fork() -> int:
    _flush()
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
    return pid


def _host_store(listener: socket.socket) -> None:
    """Host the rendezvous store of this run on a socket that is bound already, so no port can be lost to a race."""
    from torch.distributed import TCPStore

    _store = TCPStore(
        "127.0.0.1",
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    while True:
        signal.pause()


def run_rank(job: Job, rank: int, port: str) -> int:
    """Run the job's function as one rank; its result or traceback goes to a file. Returns the exit status."""
    _own_identity(job, rank, port)
    me = Rank(rank=rank, size=job.size, directory=job.directory, _channel=job.channels[rank])
    try:
        module, _, name = job.function.partition(":")
        result = getattr(importlib.import_module(module), name)(me, **job.arguments)
        _write(job.directory / f"rank{rank}.result", json.dumps(result))
    except SystemExit as stop:
        _write(job.directory / f"rank{rank}.result", json.dumps(None))
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        failed_ns = time.monotonic_ns()
        _write(job.directory / f"rank{rank}.error", f"{failed_ns}\n{traceback.format_exc()}")
        return 1
    return 0


def _own_identity(job: Job, rank: int, port: str) -> None:
    """Everything a forked process must not share: output, __main__, random state, environment."""
    log = os.open(job.directory / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable(file=2)
    stacks = open(job.directory / f"rank{rank}.stacks", "w")  # noqa: SIM115  (lives as long as the rank)
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
    sys.modules["__main__"] = types.ModuleType("__main__")
    random.seed(rank)
    sys.modules["numpy"].random.seed(rank)
    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(job.size),
            "LOCAL_RANK": str(rank % job.local_size),
            "LOCAL_WORLD_SIZE": str(job.local_size),
            "GROUP_RANK": str(rank // job.local_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # every rank is a client: the store has its own process
            "GLOO_SOCKET_IFNAME": "lo",
            **job.env,
        }
    )


def run_script(rank: Rank, path: str, argv: list[str]) -> None:
    """Run a script as `python PATH ARGV...` would, in this rank."""
    sys.argv = [path, *argv]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def run_module(rank: Rank, name: str, argv: list[str]) -> None:
    """Run a module as `python -m NAME ARGV...` would, in this rank."""
    sys.argv = [name, *argv]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.rename(path)


def _become_subreaper() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def main() -> int:
    control = socket.socket(fileno=int(sys.argv[1]))
    _become_subreaper()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test session's; its end is seen on the socket
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collections in the ranks leave these pages alone, so they stay shared
    threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    control.send(json.dumps({"ready": os.getpid(), "threads": threads}).encode())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended supervisors, and orphans of theirs, need no reaping
    job = serve(control)
    if job is None:
        return 0
    role = supervise(job)
    if role is None:
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return run_rank(job, *role)


if __name__ == "__main__":
    sys.exit(main())
