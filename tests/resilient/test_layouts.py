"""A checkpoint of any layout of DP, FSDP2 and HSDP loads in any other, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.resilient.training import LAYOUTS
from tests.worlds import World

FEW_SOURCES = ("dp3", "fsdp2", "fsdp3", "hsdp2x2")
FEW_TARGETS = ("dp1", "fsdp4", "hsdp2x2")


def check_pairs(world: Callable[..., World], folder: Path, sources: tuple[str, ...], targets: tuple[str, ...]) -> int:
    urls = {source: str(folder / source) for source in sources}
    saved = {
        source: world(LAYOUTS[source][1]).run("tests.resilient.training:save_one", url=urls[source], layout=source)[0]
        for source in sources
    }
    pairs = 0
    for target in targets:
        size = LAYOUTS[target][1]
        for found in world(size).run("tests.resilient.training:restore_many", urls=urls, layout=target):
            for source in sources:
                wrong = {
                    n
                    for n in saved[source].keys() | found[source].keys()
                    if saved[source].get(n) != found[source].get(n)
                }
                assert not wrong, f"{source} -> {target}: {sorted(wrong)}"
        pairs += len(sources)
    return pairs


def test_a_dozen_pairs_of_layouts_restore_bit_for_bit(world: Callable[..., World], tmp_path: Path) -> None:
    assert check_pairs(world, tmp_path, FEW_SOURCES, FEW_TARGETS) == 12


@pytest.mark.long
@pytest.mark.timeout(600)
def test_all_81_pairs_of_layouts_restore_bit_for_bit(world: Callable[..., World], tmp_path: Path) -> None:
    assert check_pairs(world, tmp_path, tuple(LAYOUTS), tuple(LAYOUTS)) == 81


def test_two_nodes_write_one_checkpoint_through_their_own_keepers(world: Callable[..., World], tmp_path: Path) -> None:
    saved = world(4, local_size=2).run(
        "tests.resilient.training:save_one", url=str(tmp_path), layout="hsdp2x2", ranks_per_node=2
    )[0]
    assert len(list(tmp_path.glob("data/**/*.index"))) == 2, "one index per node"
    (found,) = world(1).run("tests.resilient.training:restore_many", urls={"a": str(tmp_path)}, layout="dp1")
    assert found["a"] == saved
