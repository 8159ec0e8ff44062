"""Text: the split, its determinism, windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.config import DataConfig
from runtime.data import BORDER, Windows, files, held_out, load_text
from runtime.errors import DataMissing


def test_a_window_begins_where_the_last_one_was_last_predicted() -> None:
    windows = Windows(np.arange(23, dtype=np.uint8), 5)
    assert len(windows) == 4
    assert windows[1]["index"] == 1
    assert windows[1]["tokens"].tolist() == [5, 6, 7, 8, 9, 10]
    assert windows.take([3, 0])[:, 0].tolist() == [15, 0]


def test_the_split_is_by_content_whole_and_disjoint(tmp_path: Path) -> None:
    contents = [f"text number {n} ".encode() * 20 for n in range(60)]
    for number, content in enumerate(contents):
        (tmp_path / f"f{number}.txt").write_bytes(content)
    (tmp_path / "copy.txt").write_bytes(contents[0])
    config = DataConfig(source=str(tmp_path), pattern="*.txt", validation_percent=30, sequence_length=16)
    text = load_text(config)
    train, validation = (
        set(bytes(side.tokens).split(bytes([BORDER]))) - {b""} for side in (text.train, text.validation)
    )
    assert train | validation == set(contents)
    assert not train & validation
    assert validation == {content for content in contents if held_out(content, 30)}
    assert bytes(load_text(config).train.tokens) == bytes(text.train.tokens)


def test_the_standard_library_is_there_in_an_order_of_its_own() -> None:
    config = DataConfig(max_megabytes=0.3, validation_percent=20)
    text = load_text(config)
    assert 200_000 < len(text.train.tokens) + len(text.validation.tokens) < 1_500_000
    assert b"import" in bytes(text.train.tokens)
    names = [path.name for path in files(config)]
    assert names != sorted(names)
    assert not any("test" in path.parts or "site-packages" in path.parts for path in files(config))


@pytest.mark.parametrize(("source", "message"), [("nowhere", "no such file"), ("empty", "no file matches")])
def test_missing_text_is_told(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataMissing, match=message):
        load_text(DataConfig(source=str(tmp_path / source)))


def test_too_little_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(DataMissing, match=r"fewer than one sample of 128 \+ 1"):
        load_text(DataConfig(source=str(tmp_path)))
