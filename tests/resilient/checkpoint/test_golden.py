"""The golden checkpoints of format version 1: what is on users' disks stays readable, bit for bit."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from resilient.checkpoint.codec import STORED_FORMS
from resilient.checkpoint.format import MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES, MAX_NAME_BYTES
from resilient.checkpoint.index import FOOTER, MAX_BLOCK_BYTES
from resilient.checkpoint.items import ITEM_BYTES
from resilient.checkpoint.reader import open_checkpoint
from resilient.checkpoint.verify import verify
from resilient.log.entries import Ref
from storage.local import LocalStore
from tests.golden.content import VALUES, tensors
from tests.golden.make import CODECS, make
from tests.resilient.checkpoint.saved import load, same

GOLDEN = Path(__file__).parents[2] / "golden"
V1 = GOLDEN / "v1"


def manifest_ref(run):
    return Ref(**json.loads((run / "manifest-ref.json").read_text()))


@pytest.fixture(params=CODECS)
def run(request):
    return V1 / request.param


def test_a_golden_checkpoint_is_read_bit_for_bit(run):
    store = LocalStore(run)
    loaded, values = load(store, manifest_ref(run))
    assert same(loaded, tensors())
    assert values == VALUES
    assert verify(store, manifest_ref(run), deep=True) == ()


def test_a_golden_checkpoint_has_every_stored_form_and_several_parts():
    stored = open_checkpoint(LocalStore(V1 / "fast"), manifest_ref(V1 / "fast"))
    forms = {chunk.codec for tensor in stored.stored().values() for chunk in tensor.chunks}
    assert forms == {"raw", "fill", "planes"}
    assert all(len(writer.parts) > 1 for writer in stored.manifest.writers)
    modes = {mode for tensor in stored.stored().values() for chunk in tensor.chunks for mode in _modes(stored, chunk)}
    assert modes == {0, 1, 2, 3}


def _modes(checkpoint, chunk):
    """The modes of a chunk's planes."""
    if chunk.codec != "planes":
        return []
    data = (V1 / "fast" / checkpoint.part(chunk).key).read_bytes()[chunk.offset :]
    return [data[2 + 5 * k] for k in range(data[0])]


def test_today_s_writer_writes_the_golden_bytes(tmp_path):
    """All but Zstandard's frames, whose bytes are the library's choice: those of `raw` have none."""
    make(tmp_path)
    expected = {path.relative_to(V1 / "raw"): path.read_bytes() for path in (V1 / "raw").rglob("*") if path.is_file()}
    written = {path.relative_to(tmp_path / "raw"): path for path in (tmp_path / "raw").rglob("*") if path.is_file()}
    assert set(written) == set(expected)
    for name, path in written.items():
        assert path.read_bytes() == expected[name], name


def test_a_reader_made_from_the_specification_alone_reads_the_same(run):
    reader = GOLDEN / "independent_reader.py"
    command = [sys.executable, reader, run, manifest_ref(run).key]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60, cwd="/")
    found = json.loads(done.stdout)
    assert found["tensors"] == {
        item.info.name: [item.info.dtype, list(item.info.shape), hashlib.sha256(item.bits.tobytes()).hexdigest()]
        for item in tensors()
    }
    assert {(name, rank): text.encode() for name, rank, text in found["values"]} == VALUES


def test_the_second_reader_imports_nothing_of_the_project():
    assert "resilient" not in (GOLDEN / "independent_reader.py").read_text().replace("resilient-checkpoint", "")


def test_the_specification_names_every_dtype_form_and_bound():
    text = (GOLDEN.parents[1] / "docs" / "checkpoint-format.md").read_text()
    for row in text.split("## Dtypes")[1].split("##")[0].splitlines():
        if row.startswith("| ") and row[2].isdigit():
            size = int(row.split("|")[1])
            assert set(re.findall(r"`(\w+)`", row)) == {dtype for dtype, n in ITEM_BYTES.items() if n == size}
    for form in STORED_FORMS:
        assert f"\n`{form}`: " in text
    assert f"above {MAX_CHUNK_BYTES >> 20} MiB" in text
    assert f"{MAX_BLOCK_BYTES >> 10} KiB at most" in text
    assert f"Names have 1 to {MAX_NAME_BYTES} bytes" in text
    assert f"at most {MAX_MANIFEST_BYTES >> 20} MiB" in text
    assert f"footer, {FOOTER.size} bytes" in text
