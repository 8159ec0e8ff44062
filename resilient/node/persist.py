"""Writing one node's part of a save, and the report of it that travels to the coordinator."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resilient.checkpoint.format import data_prefix, index_ref_json
from resilient.errors import WireError
from resilient.node.choice import CodecChoice
from resilient.node.config import KeeperConfig
from resilient.node.coordinate import Written
from resilient.node.gather import Sealed
from resilient.node.messages import SaveId
from storage.store import Store


class OpenStore:
    """The keeper's store, opened by the first thread that needs it, so that the keeper starts at once."""

    def __init__(self, config: KeeperConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._store: Store | None = None

    def get(self) -> Store:
        """The open store. Raises StoreError."""
        with self._lock:
            if self._store is None:
                from storage.open import open_store  # an object store's client takes long to import

                self._store = open_store(self._config.url, dict(self._config.storage_options))
            return self._store


@dataclass(frozen=True, kw_only=True)
class WriteOrder:
    """One save to be written by this node."""

    save: SaveId
    generation: int
    parts: tuple[Sealed, ...]  # by local rank
    cancelled: Callable[[], bool]
    niceness: Callable[[], int]  # that encoding threads should have now


class Persist:
    """Writes this node's parts, one save at a time."""

    def __init__(self, config: KeeperConfig, store: OpenStore) -> None:
        self._config, self._store = config, store
        self._choice = CodecChoice()
        self._memory: Any = None  # of encoded chunks, kept from save to save

    def warm(self) -> None:
        """Import and open what `write` needs. Raises StoreError, as `write` will."""
        from resilient.checkpoint.writer import rooms

        self._memory = rooms()
        self._store.get()

    def write(self, order: WriteOrder) -> Written:
        """Chunks, parts and index of what the local ranks sealed; durable on return. Raises as writer.persist."""
        from resilient.checkpoint.writer import WriteJob, persist

        begun_s = time.monotonic()
        prefix = data_prefix(order.generation, order.save.step, order.save.nonce)
        raw_bytes = sum(slot.shard.nbytes for part in order.parts for slot in part.slots)
        codec = self._choice.next(raw_bytes) if self._config.codec == "auto" else self._config.codec
        job = WriteJob(
            prefix=prefix,
            writer=self._config.writer,
            snapshots=[(part.memory, part.slots) for part in order.parts],
            values=[value for part in order.parts for value in part.values],
            codec=codec,
        )
        index = persist(
            self._store.get(),
            job,
            threads=self._config.threads,
            cancelled=order.cancelled,
            niceness=order.niceness,
            memory=self._memory,
        )
        persist_s = time.monotonic() - begun_s
        self._choice.note(codec, raw_bytes, persist_s)
        return Written(
            index=index_ref_json(prefix, index),
            raw_bytes=index.raw_bytes,
            stored_bytes=index.stored_bytes,
            persist_s=persist_s,
        )


def encode_written(written: Written) -> dict[str, Any]:
    """As a JSON value."""
    numbers = {
        "raw_bytes": written.raw_bytes,
        "stored_bytes": written.stored_bytes,
        "persist_s": round(written.persist_s, 6),
    }
    return {"index": written.index, "numbers": numbers}


def decode_written(value: Any) -> Written:
    """The report that `encode_written` made; its index is checked when the manifest is. Raises WireError."""
    try:
        numbers = value["numbers"]
        return Written(
            index=value["index"],
            raw_bytes=int(numbers["raw_bytes"]),
            stored_bytes=int(numbers["stored_bytes"]),
            persist_s=float(numbers["persist_s"]),
        )
    except (TypeError, KeyError, ValueError) as error:
        raise WireError(f"a node's report cannot be read: {error!r}") from error
