"""What a log asks of its store, and a log on disk as another process sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from resilient.log import EMPTY, RunLog, SingleWriterWarning
from storage.errors import StoreUnsupported
from storage.local import LocalStore
from tests.resilient.log.runs import commit, leading
from tests.resilient.log.stores import Watched


class Weak(Watched):
    conditional = False


def test_a_store_without_put_if_absent_is_refused() -> None:
    store = Weak()
    with pytest.raises(StoreUnsupported, match="no atomic put-if-absent"):
        RunLog(store).lead("test")
    assert store.calls == []
    assert RunLog(store).read() == EMPTY


def test_a_single_writer_may_use_it_and_is_told_what_is_weaker() -> None:
    with pytest.warns(SingleWriterWarning, match="not fenced"):
        leader = RunLog(Weak(), single_writer=True).lead("test")
    generation = leader.open_generation(members=1, layout={})
    commit(leader, generation, 1)


def test_a_log_on_disk_is_found_by_another_process(tmp_path: Path) -> None:
    leader, generation = leading(LocalStore(tmp_path))
    commit(leader, generation, 3)
    code = "import sys; from resilient.log import RunLog; from storage.local import LocalStore; print("
    code += "RunLog(LocalStore(sys.argv[1])).read().newest.step, 'torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["3", "False", "False"]
