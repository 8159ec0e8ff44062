"""The warm process that ranks are forked from; it kills all of them when the demonstration is gone.

Importing torch takes each process seconds, forking one that has imported it takes 10 ms. A session is asked for by a
JSON line on stdin: {"ranks": [environment, ...], "arguments": [...], "logs": [path, ...]}. Answers are JSON lines on
stdout: {"pids": [...]}, and {"pid": ..., "code": ...} for each rank that ends. When stdin closes, the demonstration
has ended, or was killed: then every process that carries its mark is killed, stopped ones too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import select
import signal
import sys
from typing import Any

from examples.demo.marked import RUN, kill_marked

PRELOAD = (
    "runtime.trainer",
    "torch._dynamo",  # what optimizers import when they are made
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "resilient.context_manager",
    "storage.retry",
)


def serve(requests: int, answers: int) -> list[str] | None:
    """Fork ranks as asked. Returns the arguments in a rank, and None in the template once `requests` has closed."""
    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    pending = b""
    while True:
        ready, _, _ = select.select([requests, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            _report_exits(answers)
        if requests not in ready:
            continue
        received = os.read(requests, 1 << 16)
        if not received:
            return None
        *lines, pending = (pending + received).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if _fork_ranks(request, answers, (requests, answers, wake_read, wake_write)):
                return list(request["arguments"])


def _fork_ranks(request: dict[str, Any], answers: int, ours: tuple[int, ...]) -> bool:
    """Whether this is a rank."""
    pids = []
    for environment, log in zip(request["ranks"], request["logs"], strict=True):
        pid = os.fork()
        if pid == 0:
            _become_rank(environment, log, ours)
            return True
        pids.append(pid)
    _answer(answers, {"pids": pids})
    return False


def _become_rank(environment: dict[str, str], log: str, ours: tuple[int, ...]) -> None:
    """What a launcher's child would be: a session, an environment and files of its own."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for fd in ours:
        os.close(fd)
    os.environ.update(environment)
    nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    random.seed()


def _report_exits(answers: int) -> None:
    with contextlib.suppress(ChildProcessError):  # no child at all
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            _answer(answers, {"pid": pid, "code": os.waitstatus_to_exitcode(status)})


def _answer(answers: int, answer: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody is there to be told; then `requests` closes too
        os.write(answers, json.dumps(answer).encode() + b"\n")


def main() -> int:
    """Serve; in a rank, train. Ranks leave through the outermost frame, so that exit handlers run."""
    for module in PRELOAD:
        importlib.import_module(module)
    # Not stdin and stdout themselves: those become the ranks' own.
    arguments = serve(os.dup(0), os.dup(1))
    if arguments is None:
        left = kill_marked(RUN, os.environ[RUN])
        return 1 if left else 0
    from runtime.__main__ import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
