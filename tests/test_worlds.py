"""The harness that the tests of several ranks stand on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import alive
from tests.worlds import WorldFailed

HERE = "tests.test_worlds"


def all_reduced(rank, add):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor([float(rank.rank + add)])
    dist.all_reduce(value)
    dist.destroy_process_group()
    return [value.item(), os.environ["LOCAL_RANK"]]


def raises_in_rank_1(rank):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if rank.rank == 1:
        raise ValueError("the culprit")
    dist.barrier()


def sleeps_for_ever(rank):
    rank.emit({"ready": True})
    time.sleep(1000)


def starts_a_child_in_its_own_session(rank):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    rank.emit({"child": child.pid})
    return rank.receive()


def test_a_script_that_calls_init_process_group_just_works(world):
    began = time.monotonic()
    results = world(3, local_size=2).run(f"{HERE}:all_reduced", add=1, deadline_s=30)
    assert results == [[6.0, "0"], [6.0, "1"], [6.0, "0"]]
    assert time.monotonic() - began < 20


def test_the_failing_ranks_traceback_comes_first(world):
    with pytest.raises(WorldFailed) as caught:
        world(2).run(f"{HERE}:raises_in_rank_1", deadline_s=20)
    text = str(caught.value)
    assert text.startswith("rank 1 failed")
    assert text.index("the culprit") < text.index("---- rank 0")


def test_past_the_deadline_the_stacks_of_every_rank_are_shown_and_all_are_gone(world):
    handle = world(2).start(f"{HERE}:sleeps_for_ever")
    handle.event(rank=0, ready=True)
    handle.event(rank=1, ready=True)
    with pytest.raises(WorldFailed, match="not within") as caught:
        handle.wait(deadline_s=0.1)
    assert str(caught.value).count("sleeps_for_ever") == 2
    assert not any(alive(pid) for pid in handle.pids)


def test_a_killed_rank_is_told_apart_and_the_others_go_on(world):
    handle = world(2).start(f"{HERE}:starts_a_child_in_its_own_session")
    children = [handle.event(rank=r)["child"] for r in (0, 1)]
    handle.kill(1)
    assert handle.wait_exit(1, deadline_s=10).status == -signal.SIGKILL
    assert sorted(handle.others()) == sorted(children)
    handle.send(0, {"go": "on"})
    first = handle.outcomes(deadline_s=10)[0]
    assert (first.status, first.result) == (0, {"go": "on"})
    handle.close()
    assert not any(alive(pid) for pid in children)


def test_kill_all_leaves_nothing_alive(world):
    handle = world(2).start(f"{HERE}:starts_a_child_in_its_own_session")
    children = [handle.event(rank=r)["child"] for r in (0, 1)]
    handle.kill_all()
    assert [outcome.status for outcome in handle.outcomes(deadline_s=10)] == [-9, -9]
    assert not any(alive(pid) for pid in [*handle.pids, *children, handle.store_pid])
