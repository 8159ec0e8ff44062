"""The log's tests in short words: lead, commit, damage."""

from __future__ import annotations

from resilient.log import Leader
from storage.store import Store
from tests.resilient.log.stores import Watched, log_in, ref


def leading(store: Store, **options: int) -> tuple[Leader, int]:
    """A leader and the generation it has opened."""
    leader = log_in(store, **options).lead("test")
    return leader, leader.open_generation(members=2, layout={"shard": 2})


def commit(leader: Leader, generation: int, step: int, name: str = "") -> int:
    """Commit a step; its manifest's name tells generation and step unless given."""
    return leader.commit(generation=generation, step=step, tier="disk", manifest=ref(name or f"{generation}-{step}"))


def damage(store: Watched, key: str) -> None:
    """Flip one bit of an object."""
    data = bytearray(store.inner.get(key))
    data[60] ^= 4
    store.inner.put(key, bytes(data))
