from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.open import open_store
from tests.s3 import S3Server

PROCESSES = 3


def race(url: str, options: dict[str, object], turns: int, apart_s: float) -> list[list[int]]:
    """Which turns each process won."""
    script = str(Path(__file__).with_name("contender.py"))
    contenders = [
        subprocess.Popen(
            [sys.executable, script, str(me), str(turns), str(apart_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for me in range(PROCESSES)
    ]
    try:
        for each in contenders:
            assert each.stdin is not None
            each.stdin.write(json.dumps({"url": url, "options": options}) + "\n")
            each.stdin.flush()
        for each in contenders:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        begin_s = time.monotonic() + 0.05
        for each in contenders:
            assert each.stdin is not None
            each.stdin.write(f"{begin_s}\n")
            each.stdin.flush()
        return [json.loads(each.communicate(timeout=60)[0]) for each in contenders]
    finally:
        for each in contenders:
            each.kill()
            each.communicate()


def check(url: str, options: dict[str, object], turns: int, apart_s: float) -> None:
    won = race(url, options, turns, apart_s)
    assert sorted(turn for each in won for turn in each) == list(range(turns)), won
    store = open_store(url, options)
    for me, each in enumerate(won):
        for turn in each:
            assert store.get(f"log/{turn}") == f"by {me} in {turn} ".encode() * 50


def test_of_processes_that_race_on_a_disk_one_wins_each_key(tmp_path: Path) -> None:
    check(str(tmp_path / "run"), {}, 100, 0.002)


@pytest.mark.s3
def test_of_processes_that_race_on_s3_one_wins_each_key(s3_server: S3Server, s3_url: str) -> None:
    check(s3_url, s3_server.options(), 25, 0.02)
