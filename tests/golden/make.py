"""Writes the golden checkpoints: `python -m tests.golden.make DIRECTORY` (only when a new format version is born).

Those of a version are never written again: they stand for what users have on their disks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from resilient.checkpoint import writer
from storage.local import LocalStore
from tests.golden.content import VALUES, tensors
from tests.resilient.checkpoint.saved import save

CODECS = ("raw", "fast")


def make(directory: Path) -> None:
    """One run directory per codec, of two writers, with small chunks and parts so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK_BYTES", 8 << 10)
        patch.setattr(writer, "PART_BYTES", 24 << 10)
        patch.setattr(writer, "MIN_PART_BYTES", 24 << 10)
        for codec in CODECS:
            store = LocalStore(directory / codec)
            ref = save(store, tensors(), values=VALUES, generation=3, step=1200, writers=2, codec=codec)
            (directory / codec / "manifest-ref.json").write_text(
                json.dumps({"key": ref.key, "hash": ref.hash, "size": ref.size}, indent=1) + "\n"
            )
            store.close()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
