"""A keeper starts quickly, without what it does not need, and cannot be reached by strangers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from resilient.errors import KeeperLost, LoopMisused, RanksDisagree
from resilient.node.client import connect
from resilient.node.config import KeeperConfig, decode_config, encode_config
from resilient.node.wire import Channel
from tests.resilient.node.actors import Ranks, gone
from tests.resilient.node.conftest import Run

Fork = Callable[..., Ranks]


def test_the_keeper_and_its_client_import_neither_torch_nor_fsspec() -> None:
    code = (
        "import sys, resilient.node.keeper, resilient.node.client, resilient.detect.progress;"
        "print([m for m in ('torch', 'fsspec', 's3fs', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_keeper_is_there_within_a_second(run: Run) -> None:
    """0.2 s on an idle machine; the bound leaves room for a busy one."""
    best = 10.0
    for _ in range(3):
        begun = time.monotonic()
        client = connect(run.configs(1)[0], lambda data: [data])
        best = min(best, time.monotonic() - begun)
        client.close(5.0)
    assert best < 1.0


def test_nothing_secret_is_on_its_command_line_or_in_its_environment(run: Run) -> None:
    config = KeeperConfig(url=str(run.path), storage_options={"secret": "hunter2hunter2"})
    assert "hunter2" not in repr(config)
    client = connect(config, lambda data: [data])
    for name in ("cmdline", "environ"):
        assert b"hunter2" not in Path(f"/proc/{client.keeper_pid}/{name}").read_bytes()
    client.close(5.0)


def test_its_address_is_no_file_and_refuses_who_lacks_the_token(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(1))
    (keeper,) = ranks.connect()
    (address,) = _addresses(keeper)
    channel = Channel(socket.socket(socket.AF_UNIX))
    channel.sock.connect("\0" + address)
    channel.send({"t": "hello", "token": "guess", "rank": 0, "local_rank": 0})
    assert channel.receive(5.0).body["error"] == "WireError"
    channel.close()
    assert ranks.one(0, "close") is None
    assert gone(keeper, 2.0)


def test_a_node_listens_where_it_is_told_and_nowhere_else(run: Run, fork: Fork) -> None:
    assert KeeperConfig(url="x").bind_host == "127.0.0.1"
    ranks = fork(run.configs(2, nodes=2, bind_host="127.0.0.3"))
    keepers = ranks.connect()
    assert _listening(keepers[0]) == {"127.0.0.3"}
    assert _listening(keepers[1]) == set()


def test_one_node_listens_on_no_network_at_all(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2))
    (keeper, _) = ranks.connect()
    assert _listening(keeper) == set()


def test_a_keeper_that_cannot_listen_fails_on_every_rank(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2, nodes=2, bind_host="192.0.2.1"))  # nobody's address
    assert ["assign" in str(error) for error in ranks.errors("connect")] == [True, True]


def test_a_keeper_that_dies_while_it_starts_is_an_error_with_its_exit_status(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(KeeperLost, match="exit status 7"):
        connect(run.configs(1)[0], lambda data: [data])


def test_ranks_whose_configurations_do_not_fit_are_told(run: Run) -> None:
    config = KeeperConfig(url=str(run.path), world_size=2, local_size=2)
    with pytest.raises(RanksDisagree):
        connect(config, lambda data: [data])


def test_a_user_file_called_like_one_of_ours_does_no_harm(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "storage.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    connect(run.configs(1)[0], lambda data: [data]).close(5.0)


def test_configurations_travel_and_strange_ones_are_refused() -> None:
    config = KeeperConfig(url="s3://bucket/run", storage_options={"key": "x"}, keep={"last": 2})
    assert decode_config(json.loads(json.dumps(encode_config(config)))) == config
    assert (config.tier, KeeperConfig(url="/tmp/x").tier) == ("object", "disk")
    with pytest.raises(LoopMisused, match="plain JSON"):
        encode_config(KeeperConfig(url="x", storage_options={"session": object()}))
    with pytest.raises(LoopMisused, match="one process only"):
        encode_config(KeeperConfig(url="memory://x"))
    for wrong in ({"rank": 1}, {"local_rank": 1}, {"nodes": 2}, {"threads": 0}, {"linger_s": 0}):
        with pytest.raises(LoopMisused):
            KeeperConfig(url="x", **wrong)


def test_a_keeper_whose_starter_dies_before_anyone_came_ends(run: Run) -> None:
    code = (
        "import os\n"
        "from resilient.node.start import start_keeper\n"
        "from resilient.node.config import KeeperConfig\n"
        f"config = KeeperConfig(url={str(run.path)!r})\n"
        "started = start_keeper(config, token='t', secret='00', leads=True)\n"
        "print(started.process.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )  # returns only when the keeper has closed its standard error, too
    assert gone(int(done.stdout), 2.0)


def _inodes(pid: int) -> set[str]:
    links = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(str(path.readlink()))
        except OSError:
            continue
    return {link.split("[")[1][:-1] for link in links if link.startswith("socket:")}


def _addresses(pid: int) -> set[str]:
    inodes = _inodes(pid)
    with open("/proc/net/unix") as file:
        rows = [line.split() for line in file if "@resilient-" in line]
    return {row[7][1:] for row in rows if row[6] in inodes}


def _listening(pid: int) -> set[str]:
    """Addresses that a process listens on, IPv4 and IPv6."""
    inodes, found = _inodes(pid), set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as file:
            for row in (line.split() for line in list(file)[1:]):
                if row[3] == "0A" and row[9] in inodes:
                    host = row[1].split(":")[0]
                    found.add(socket.inet_ntoa(bytes.fromhex(host)[::-1]) if table == "tcp" else host)
    return found
