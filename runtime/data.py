"""Real text as samples: bytes of files, split by file into training and validation, cut into windows."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from runtime.config import DataConfig
from runtime.errors import DataMissing

BORDER = 0
"""The token between two files; a NUL byte is in no text."""

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"})


class Sample(TypedDict):
    """One window, and which one it is: so that what was consumed can be proved, not only what was asked for."""

    index: int
    tokens: torch.Tensor  # (T + 1,) int64


class Windows(Dataset[Sample]):
    """Text cut into windows of `length` predicted tokens; window i starts where window i - 1 was last predicted."""

    def __init__(self, tokens: npt.NDArray[np.uint8], length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, index: int) -> Sample:
        return Sample(index=index, tokens=self.take([index])[0])

    def take(self, indices: Sequence[int]) -> torch.Tensor:
        """The windows `indices`, (n, T + 1) int64."""
        starts = np.asarray(indices, dtype=np.int64)[:, None] * self.length
        return torch.from_numpy(self.tokens[starts + np.arange(self.length + 1)].astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class Text:
    """The two parts of what was read; no file is in both, not even under two names."""

    train: Windows
    validation: Windows


def load_text(config: DataConfig) -> Text:
    """Reads the files that `config` names. The same on every rank and every machine that has the same files.

    Raises DataMissing: nothing found, or too little for one sample on either side.
    """
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    left = int(config.max_megabytes * 1e6) or None
    for path in files(config):
        content = path.read_bytes()
        if left is not None:
            if left <= 0:
                break
            left -= len(content)
        parts[held_out(content, config.validation_percent)] += (content, bytes([BORDER]))
    sides = {}
    for held, name in ((False, "training"), (True, "validation")):
        windows = Windows(np.frombuffer(b"".join(parts[held]), dtype=np.uint8), config.sequence_length)
        if len(windows) < 1:
            raise DataMissing(
                f"{len(windows.tokens)} bytes for {name}, fewer than one sample of {config.sequence_length} + 1",
                where=f"data.source={config.source} data.pattern={config.pattern}",
                next="give more files (each is held out whole or not at all), or a smaller data.sequence_length",
            )
        sides[held] = windows
    return Text(train=sides[False], validation=sides[True])


def held_out(content: bytes, percent: int) -> bool:
    """Whether a file is for validation: by the hash of its content, so that copies fall on the same side."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % 100 < percent


def files(config: DataConfig) -> Iterator[Path]:
    """The files to read, in an order that depends on their names only. Raises DataMissing."""
    root = Path(sysconfig.get_path("stdlib") if config.source == "stdlib" else config.source)
    if root.is_file():
        return iter([root])
    if not root.is_dir():
        raise DataMissing(f"no such file or directory: {root}", where="data.source", next="or use data.source=stdlib")
    left_out = _LEFT_OUT if config.source == "stdlib" else frozenset({"__pycache__"})
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in left_out]  # not walked at all: they can be huge
        found += [(Path(folder) / name).relative_to(root) for name in fnmatch.filter(names, config.pattern)]
    # By the hash of the name: a run that stops after some megabytes has a fair sample, not the first letters.
    chosen = sorted(found, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    if not chosen:
        raise DataMissing(f"no file matches {config.pattern}", where=str(root))
    return (root / path for path in chosen)
