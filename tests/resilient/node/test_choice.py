"""The codec that `auto` takes."""

from __future__ import annotations

from resilient.node.choice import SMALL_BYTES, TRY_AGAIN_SAVES, CodecChoice

BIG = 10 * SMALL_BYTES


def play(choice: CodecChoice, saves: int, seconds: dict[str, float]) -> list[str]:
    taken = []
    for _ in range(saves):
        codec = choice.next(BIG)
        taken.append(codec)
        choice.note(codec, BIG, seconds[codec])
    return taken


def test_both_are_measured_once_and_the_sooner_one_is_taken() -> None:
    assert play(CodecChoice(), 6, {"fast": 3.0, "raw": 1.0}) == ["fast", "raw", "raw", "raw", "raw", "raw"]
    assert play(CodecChoice(), 6, {"fast": 1.0, "raw": 1.2}) == ["fast", "raw", "fast", "fast", "fast", "fast"]


def test_compression_may_take_a_little_longer_since_it_saves_space() -> None:
    assert play(CodecChoice(), 4, {"fast": 1.04, "raw": 1.0})[2:] == ["fast", "fast"]
    assert play(CodecChoice(), 4, {"fast": 1.06, "raw": 1.0})[2:] == ["raw", "raw"]


def test_a_disk_that_changes_is_noticed() -> None:
    choice = CodecChoice()
    assert play(choice, 3, {"fast": 3.0, "raw": 1.0})[-1] == "raw"
    later = play(choice, 2 * TRY_AGAIN_SAVES + 2, {"fast": 3.0, "raw": 5.0})
    assert later.count("fast") >= TRY_AGAIN_SAVES - 2
    assert later[-1] == "fast"


def test_small_saves_are_compressed_and_measure_nothing() -> None:
    choice = CodecChoice()
    assert choice.next(SMALL_BYTES - 1) == "fast"
    choice.note("fast", SMALL_BYTES - 1, 100.0)
    assert choice.seconds_per_byte == {}
