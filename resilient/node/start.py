"""Starting a keeper process, and telling it who it is over an inherited socket."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from resilient.errors import KeeperLost, TimedOut
from resilient.node.config import KeeperConfig, encode_config
from resilient.node.wire import Channel, ChannelClosed, Message
from storage.errors import ResilientError

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Started:
    """A keeper that runs, and where it listens."""

    process: subprocess.Popen[bytes]
    control: Channel  # to be told where the coordinator is; closed afterwards
    address: str  # abstract Unix address, without the leading zero byte
    port: int | None  # where the coordinator listens for other nodes


def start_keeper(config: KeeperConfig, *, token: str, secret: str, leads: bool) -> Started:
    """Start this node's keeper. Raises KeeperLost when it does not come up in time; then it is gone again."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    environment = dict(os.environ)
    # The package must be found wherever the script was started from, but the working directory must not be
    # searched (-P): a user's own storage.py would be taken for ours.
    paths = [str(_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment.update(PYTHONPATH=os.pathsep.join(paths), OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "resilient.node.keeper", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C or a killed process group is not for the keeper
            env=environment,
        )
    control = Channel(ours)
    try:
        control.send({"t": "start", "config": encode_config(config), "token": token, "secret": secret, "leads": leads})
        reply = expect(control, "listening", config.start_timeout_s)
        port = reply.body.get("port")
        return Started(process=process, control=control, address=reply.text("address"), port=port)
    except (ChannelClosed, TimedOut) as error:
        stop_process(process, 0.0)
        control.close()
        raise KeeperLost(
            f"the keeper of node {config.node} did not start: {error.what}, exit status {process.returncode}",
            next="its messages are on standard error; RESILIENT_KEEPER_LOG=FILE records more",
        ) from error
    except BaseException:
        stop_process(process, 0.0)
        control.close()
        raise


def expect(channel: Channel, kind: str, deadline_s: float) -> Message:
    """The next message, which must be of this kind. Raises the error that came instead, TimedOut, WireError."""
    message = channel.receive(deadline_s)
    if message.body.get("t") != kind:
        message.drop()
        raise ResilientError.from_wire(message.body)
    return message


def stop_process(process: subprocess.Popen[bytes], deadline_s: float) -> None:
    """Wait for the process to end, at most `deadline_s`; then kill it."""
    try:
        process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def new_secret() -> str:
    """32 random bytes as text, for tokens and keys that live as long as a keeper."""
    return secrets.token_hex(32)
