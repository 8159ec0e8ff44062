"""A checkpoint on disk, damaged at a hundred places: a typed error, or an older step, and never a wrong tensor."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from resilient.checkpoint.reader import open_checkpoint
from resilient.checkpoint.verify import verify
from resilient.errors import CheckpointDamaged, LogDamaged
from resilient.log.run_log import RunLog
from storage.local import LocalStore
from tests.resilient.checkpoint.runs import commit_run, restore
from tests.resilient.checkpoint.saved import load, same, some_state

SEED = 20_240_229
PLACES = 112
STEPS = (10, 20, 30)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    store = LocalStore(root)
    commit_run(store, STEPS, writers=2)
    store.close()
    return root


@pytest.fixture(scope="module")
def kinds(root):
    """The files of the newest step and of the log, by kind of object."""
    store = LocalStore(root)
    newest = RunLog(store).read().newest
    keys = open_checkpoint(store, newest.manifest).manifest.keys
    found = {
        "part": [key for key in keys if not key.endswith((".index", "manifest"))],
        "index": [key for key in keys if key.endswith(".index")],
        "manifest": [newest.manifest.key],
        "log": sorted(item.key for item in store.list("log/")),
    }
    store.close()
    return found


def damage(path: Path, how: str, choices: random.Random) -> str:
    """Do it to the file; what was done."""
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return "gone"
    if how == "cut":
        keep = choices.randrange(len(data))
        path.write_bytes(data[:keep])
        return f"cut to {keep} of {len(data)} bytes"
    at, bit = choices.randrange(len(data)), choices.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} flipped"


def places():
    """(kind, how, seed) of each case: every kind in every way, evenly."""
    every = [(kind, how) for kind in ("part", "index", "manifest", "log") for how in ("flip", "cut", "gone")]
    choices = random.Random(SEED)
    return [(*every[n % len(every)], choices.randrange(2**32)) for n in range(PLACES)]


@pytest.mark.parametrize(("kind", "how", "seed"), places())
def test_damage_is_an_error_or_an_older_step(root, kinds, kind, how, seed):
    choices = random.Random(seed)
    key = choices.choice(kinds[kind])
    path = root / key
    whole = path.read_bytes()
    done = damage(path, how, choices)
    try:
        check(root, kind, key, how)
    except AssertionError as error:
        pytest.fail(f"{key} {done} (seed {seed}): {error}")
    finally:
        path.write_bytes(whole)


def check(root, kind, key, how):
    store = LocalStore(root)
    try:
        if kind == "log":
            check_log(store, how)
            return
        newest = RunLog(store).read().newest
        with pytest.raises(CheckpointDamaged) as caught:
            load(store, newest.manifest, threads=1)
        assert key in caught.value.where
        findings = verify(store, newest.manifest, deep=True)
        assert findings, "verify finds nothing"
        assert all(key in finding.where for finding in findings)
        step, tensors = restore(store, CheckpointDamaged)
        assert step == STEPS[-2]
        assert same(tensors, some_state(step))
    finally:
        store.close()


def check_log(store, how):
    """Whatever of the log is lost: what is restored is what was saved under that step."""
    try:
        restored = restore(store, CheckpointDamaged)
    except LogDamaged:
        return
    if restored is None:
        assert how == "gone", "an entry that is there, but damaged, must not make the run look empty"
        return
    step, tensors = restored
    assert same(tensors, some_state(step))


def test_the_places_are_enough_and_the_run_is_whole_without_damage(root):
    assert len(places()) >= 100
    store = LocalStore(root)
    step, tensors = restore(store, CheckpointDamaged)
    assert step == STEPS[-1]
    assert same(tensors, some_state(step))
    store.close()
