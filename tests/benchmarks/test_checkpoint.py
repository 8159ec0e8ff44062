"""The short form of the checkpoint benchmark: it runs, and every system gives back the bits it was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_benchmark_runs_and_every_system_gives_back_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint.main(["--gib", "0.1", "--rounds", "1", "--dir", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["system"] for row in result["rows"]} >= {"resilient, auto", "DCP save", "DCP async_save"}
    assert all(row["equal"] for row in result["rows"])
    assert list(tmp_path.iterdir()) == []
