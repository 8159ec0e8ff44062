from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from storage import failpoint as failpoints
from storage.errors import ResilientError
from storage.failpoint import FailpointReached, FailpointSyntax, arm, failpoint
from tests.storage.processes import REPOSITORY, python

PASS = """
from storage.failpoint import failpoint
for turn in range(4):
    failpoint("here")
    print(turn, flush=True)
"""


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    arm("")
    yield
    arm("")


def test_nothing_happens_unless_armed() -> None:
    failpoint("here")
    arm("elsewhere=raise")
    failpoint("here")


def test_an_armed_one_raises_at_every_passage() -> None:
    arm("here=raise")
    for _ in range(3):
        with pytest.raises(FailpointReached, match="here"):
            failpoint("here")


def test_a_number_chooses_the_passage() -> None:
    arm(" a=raise@2 ; b=raise@1;")
    failpoint("a")
    with pytest.raises(FailpointReached):
        failpoint("a")
    failpoint("a")
    with pytest.raises(FailpointReached):
        failpoint("b")


def test_arming_again_replaces_and_counts_anew() -> None:
    arm("a=raise@2")
    failpoint("a")
    arm("a=raise@2;b=raise")
    failpoint("a")
    arm("")
    failpoint("a")
    failpoint("b")


@pytest.mark.parametrize("text", ["here", "=kill", "here=", "here=explode", "here=kill@", "here=kill@x", "here=kill@0"])
def test_what_cannot_be_read_is_refused_and_arms_nothing(text: str) -> None:
    arm("other=raise")
    with pytest.raises(FailpointSyntax):
        arm(text)
    with pytest.raises(FailpointReached):
        failpoint("other")


def test_disarmed_it_costs_next_to_nothing() -> None:
    assert failpoints._armed == {}
    assert issubclass(FailpointReached, ResilientError)


@pytest.mark.parametrize(("action", "status"), [("kill", -signal.SIGKILL), ("exit", 41), ("raise", 1)])
def test_the_environment_arms_a_process(action: str, status: int) -> None:
    done = python(PASS, RESILIENT_FAILPOINTS=f"here={action}@3")
    assert (done.returncode, done.stdout.split()) == (status, ["0", "1"]), done.stderr


def test_a_stopped_process_goes_on_when_it_is_continued() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PASS],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "RESILIENT_FAILPOINTS": "here=stop@2"},
    )
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=20)
        assert (process.returncode, out.split()) == (0, ["0", "1", "2", "3"])
    finally:
        process.kill()
        process.wait()
