"""Worlds of plain processes around a store in a directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resilient.checkpoint.geometry import Box
from resilient.checkpoint.items import Shard
from resilient.checkpoint.plan_load import plan_load
from resilient.checkpoint.reader import open_checkpoint
from resilient.log.run_log import RunLog
from resilient.log.validity import LogView
from resilient.node.client import KeeperConfig
from storage.open import open_store
from tests.resilient.node.actors import Ranks, content


class Run:
    """A store, and what can be read back from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = open_store(str(path))

    def configs(self, ranks: int, *, nodes: int = 1, **more: Any) -> list[KeeperConfig]:
        per_node = ranks // nodes
        config = KeeperConfig(
            url=str(self.path), world_size=ranks, local_size=per_node, nodes=nodes, **{"threads": 1, **more}
        )
        return [
            dataclasses.replace(config, rank=rank, node=rank // per_node, local_rank=rank % per_node)
            for rank in range(ranks)
        ]

    def log(self) -> LogView:
        return RunLog(self.store).read()

    def steps(self) -> list[int]:
        return [commit.step for commit in self.log().commits]

    def objects(self, nonce: str) -> list[str]:
        """Keys of what an attempt has left in the store."""
        return [item.key for item in self.store.list("data/") if f"/{nonce}/" in item.key]

    def check(self, step: int, ranks: int, elements: int) -> None:
        """The committed step holds exactly what each rank had at it."""
        commit = self.log().find(step)
        assert commit is not None
        checkpoint = open_checkpoint(self.store, commit.manifest)
        stored = checkpoint.stored()
        info = stored["model/w"].info
        out = np.zeros(info.shape, np.uint32)
        plan = plan_load(stored, [Shard(tensor=info, box=Box((0,), info.shape))])
        checkpoint.load(plan, [out], threads=1)
        expected = np.concatenate([content(step, rank, elements) for rank in range(ranks)])
        assert np.array_equal(out, expected.view(np.uint32))
        values = checkpoint.values()
        assert values["epoch", None] == b"7"
        assert {key for key in values if key[0] == "rng"} == {("rng", rank) for rank in range(ranks)}
        assert values["rng", ranks - 1] == f"rng of {ranks - 1} at {step}".encode()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def fork() -> Iterator[Callable[..., Ranks]]:
    """Ranks(configs, ...) whose processes are gone after the test."""
    made: list[Ranks] = []

    def make(*arguments: Any, **more: Any) -> Ranks:
        made.append(Ranks(*arguments, **more))
        return made[-1]

    yield make
    for ranks in made:
        ranks.end()
