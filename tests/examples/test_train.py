"""The example of a user's own script: under python and torchrun it is stopped, started again, and goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilient.log.run_log import RunLog
from storage.open import open_store
from tests.processes import descendants, send

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FOR_EVER = 10**9


@pytest.fixture
def begin(tmp_path) -> Iterator:
    """Start the script as a user does, from a directory of the user's."""
    started: list[subprocess.Popen[str]] = []

    def start(steps: int, *launcher: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(SCRIPT), "run", str(steps)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in [*descendants(process.pid), process.pid]:
            send(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """The first line that matches; fails if the script ends before it."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"no line like {pattern!r} in {seen}")


def saved_step(directory: Path) -> int:
    newest = RunLog(open_store(str(directory / "run"))).read().newest
    return newest.step if newest else 0


def test_it_is_short_and_knows_little_of_us():
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 40
    assert set(re.findall(r"resilient\.(\w+)", "\n".join(lines))) == {"Sampler", "context", "Every"}
    assert [line for line in lines if re.match(r"\s*(from|import) (resilient|runtime|storage)", line)] == [
        "import resilient"
    ]


@pytest.mark.timeout(240)
def test_it_is_stopped_and_goes_on_under_python_and_torchrun(begin, tmp_path):
    first = begin(FOR_EVER)
    assert read_until(first, r"begins at step (\d+)")[1] == "0"
    read_until(first, r"^step 40 ")
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 75
    stopped_at = saved_step(tmp_path)
    assert stopped_at > 40

    second = begin(FOR_EVER, *TORCHRUN)
    assert read_until(second, r"rank \d begins at step (\d+)")[1] == str(stopped_at)
    read_until(second, rf"^step {stopped_at + 40 - stopped_at % 20} ")
    # As a scheduler does: to torchrun, which passes it on. Its ranks exit with 75, it with 1 whatever they do.
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 1
    stopped_again_at = saved_step(tmp_path)
    assert stopped_again_at > stopped_at

    third = begin(stopped_again_at + 30)
    assert read_until(third, r"begins at step (\d+)")[1] == str(stopped_again_at)
    assert third.wait(60) == 0
    assert saved_step(tmp_path) == stopped_again_at + 30


@pytest.mark.long
@pytest.mark.timeout(240)
def test_under_torchrun_it_goes_on_to_the_end(begin, tmp_path):
    for begins_at, ends_at in ((0, 50), (50, 90)):
        process = begin(ends_at, *TORCHRUN)
        assert read_until(process, r"rank \d begins at step (\d+)")[1] == str(begins_at)
        assert process.wait(60) == 0
        assert saved_step(tmp_path) == ends_at
