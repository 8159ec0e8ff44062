"""An acknowledged step survives SIGKILL of everything at any moment; nothing else is ever visible."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from resilient.checkpoint.verify import verify
from resilient.log.run_log import RunLog
from storage.open import open_store
from tests.worlds import World

LOOP = "tests.resilient.loops:acknowledge"


def kill_once(world: Callable[..., World], url: str, source: random.Random, expected: dict[int, dict[str, str]]) -> int:
    """Start the ranks, check what they restored, kill everything at a random moment.

    expected  digests of every step that was ever handed over, by step
    Returns the newest step that was acknowledged before the end.
    """
    handle = world(2).start(LOOP, url=url, layout="fsdp2", total=10_000)
    begun = handle.event(60, rank=0)["restored"]
    handle.event(30, rank=0, acknowledged=begun + source.randint(1, 3))
    time.sleep(source.uniform(0.0, 0.05))  # the moment is what is random
    handle.kill_all()
    handle.close()
    newest = begun
    for _, event in handle.events:
        if "saving" in event:
            expected[event["saving"]] = event["digests"]
        newest = max(newest, event.get("acknowledged", 0))
    return newest


def sweep(world: Callable[..., World], folder: Path, kills: int, seed: int) -> None:
    source, url = random.Random(seed), str(folder / "run")
    expected: dict[int, dict[str, str]] = {}
    acknowledged = 0
    for _ in range(kills):
        acknowledged = kill_once(world, url, source, expected)
        view = RunLog(open_store(url)).read()
        assert view.newest is not None
        assert view.newest.step >= acknowledged, "an acknowledged step is gone"
        findings = [verify(open_store(url), commit.manifest, deep=True) for commit in view.commits]
        assert not any(findings), "a step is listed that is not whole"
        (came,) = world(1).run("tests.resilient.loops:restored", url=url, layout="fsdp1")
        assert came["step"] == view.newest.step
        assert came["digests"] == expected[came["step"]], "what came back is not what was saved"


def test_the_acknowledged_step_survives_kills_at_random_moments(world: Callable[..., World], tmp_path: Path) -> None:
    sweep(world, tmp_path, kills=6, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_acknowledged_step_survives_200_kills_at_random_moments(
    world: Callable[..., World], tmp_path: Path
) -> None:
    sweep(world, tmp_path, kills=200, seed=2)
