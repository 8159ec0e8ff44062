"""Marked processes are found and killed, stopped ones too, and no others."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys

import pytest

from examples.demo.marked import RUN, kill_marked, marked, state


@pytest.fixture
def sleeper():
    started = []

    def start(**environment: str) -> subprocess.Popen[str]:
        code = "import sys, time; print('up', flush=True); time.sleep(60)"
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "up\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_only_what_carries_the_mark_is_killed(sleeper):
    mark = secrets.token_hex(8)
    ours, stopped = sleeper(**{RUN: mark}), sleeper(**{RUN: mark})
    others = [sleeper(), sleeper(**{RUN: mark + "0"}), sleeper(**{"X_" + RUN: mark}), sleeper(NOTE=f"{RUN}={mark}")]
    stopped.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
    assert state(stopped.pid) == "T"
    assert sorted(marked(RUN, mark)) == sorted([ours.pid, stopped.pid])
    assert kill_marked(RUN, mark, quiet_s=0.0) == []
    assert [ours.wait(10), stopped.wait(10)] == [-signal.SIGKILL] * 2
    assert [process.poll() for process in others] == [None] * 4


def test_a_zombie_is_not_found(sleeper):
    mark = secrets.token_hex(8)
    process = sleeper(**{RUN: mark})
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert state(process.pid) == "Z"
    assert marked(RUN, mark) == []


def test_the_caller_is_spared(monkeypatch):
    mark = secrets.token_hex(8)
    code = (
        "import os, sys; from examples.demo.marked import RUN, kill_marked\n"
        "sys.exit(42 if kill_marked(RUN, os.environ[RUN], quiet_s=0.0) == [] else 1)"
    )
    monkeypatch.setenv(RUN, mark)
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 42
