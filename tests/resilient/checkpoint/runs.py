"""A run with committed steps on a store, without processes (used by the tests of damage and of the commands)."""

from __future__ import annotations

from resilient.log.run_log import RunLog
from tests.resilient.checkpoint.saved import load, save, some_state


def commit_run(store, steps=(10, 20, 30), *, state=some_state, metrics=lambda step: {"loss": 1 / step}, **options):
    """Saves and commits `state(step)` at each step, as one leader; the log."""
    log = RunLog(store)
    leader = log.lead("127.0.0.1:1")
    generation = leader.open_generation(members=2, layout={"shard": 2})
    for step in steps:
        ref = save(store, state(step), generation=generation, step=step, nonce=f"{step:016x}", **options)
        leader.commit(generation=generation, step=step, tier="disk", manifest=ref, metrics=metrics(step))
    return log


def restore(store, damage):
    """(step, tensors) of the newest step that can be read, as a restore does it; None if the log commits nothing.

    `damage`: the errors that mean "try an older step"; any other ends it.
    """
    for commit in reversed(RunLog(store, report=lambda _: None).read().commits):
        try:
            return commit.step, load(store, commit.manifest, threads=1)[0]
        except damage:
            continue
    return None
