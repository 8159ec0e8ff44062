"""Processes that contend for one log on a real disk, some of them killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from resilient.log import EMPTY, Commit, Epoch, RunLog, fold
from resilient.log.entries import decode
from resilient.log.protocol import slot_key
from storage.local import LocalStore

REPOSITORY = Path(__file__).parents[3]


def start(root: Path, name: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.resilient.log.contender", str(root), name, str(seconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


def acknowledged(output: str) -> list[dict[str, object]]:
    """Whole lines only: what a killed process was about to say was not said."""
    return [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith("}\n")]


def contend(root: Path, processes: int, seconds: float, killed: int, rng: Random) -> list[dict[str, object]]:
    running = [start(root, f"p{number}", seconds) for number in range(processes)]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        acks = []
        for process in running[:killed]:
            time.sleep(rng.uniform(0.1, 0.5) * seconds / killed)  # the moment of death is the input of this test
            process.kill()
        for number, process in enumerate(running):
            output, _ = process.communicate(timeout=30 + seconds)
            acks += acknowledged(output)
            assert process.returncode == (-9 if number < killed else 0)
        return acks
    finally:
        for process in running:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


def judge(root: Path, acks: list[dict[str, object]]) -> None:
    store = LocalStore(root)
    view = RunLog(store).read()
    entries = [decode(store.get(slot_key(slot))) for slot in range(view.next_slot)]
    assert not view.damaged
    assert view.invalid == 0  # nobody writes before having read what fences him
    from_start = EMPTY
    for slot, entry in enumerate(entries):
        from_start = fold(from_start, slot, entry)
    assert from_start == view
    live = {commit.slot: commit for commit in view.live}
    for ack in acks:
        slot, epoch = ack["slot"], ack["epoch"]
        assert isinstance(slot, int)
        assert isinstance(epoch, int)
        assert live[slot].manifest.key == ack["key"]
        assert not [number for number in range(epoch + 1, slot) if isinstance(entries[number], Epoch)]
    assert len({ack["slot"] for ack in acks}) == len(acks)
    for slot, entry in enumerate(entries):
        if isinstance(entry, Commit):
            assert isinstance(entries[entry.epoch], Epoch)
            assert slot in live


@pytest.mark.parametrize("killed", [0, 2])
def test_contending_processes_keep_every_acknowledged_commit(tmp_path: Path, killed: int) -> None:
    acks = contend(tmp_path, processes=4, seconds=1.5, killed=killed, rng=Random(killed))
    assert acks
    judge(tmp_path, acks)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_many_contending_processes_keep_every_acknowledged_commit(tmp_path: Path, seed: int) -> None:
    acks = contend(tmp_path, processes=8, seconds=4, killed=4, rng=Random(seed))
    assert acks
    judge(tmp_path, acks)
