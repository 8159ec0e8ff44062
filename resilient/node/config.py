"""What a keeper and its clients are told when they start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from resilient.errors import LoopMisused, WireError
from storage.url import redact, split


@dataclass(frozen=True, kw_only=True)
class KeeperConfig:
    """One rank's view of the keepers; only the fields `rank` .. `local_size` differ between ranks.

    url, storage_options  the store; the options can hold secrets and travel over an inherited socket only
    codec                 "auto", "raw" or "fast"
    keep                  a retention.Keep or its fields, or None: nothing is ever dropped
    node, nodes           this rank's node and how many there are; the keeper of rank 0's node coordinates
    bind_host             where the coordinator listens for other nodes' keepers; unused with one node
    threads               threads that encode and write, per node
    save_every_s          the coordinator asks for a save this often, by its own clock; None: never
    seal_timeout_s        how long a save may wait for its last rank, from the first
    linger_s              how long sealed saves may take after the last worker of the node has gone
    silence_s             a keeper that shows no sign of life for so long is ended by its workers
    start_timeout_s       for a keeper to start and for all its workers to connect
    """

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    codec: str = "auto"
    keep: Any | Mapping[str, Any] | None = None
    rank: int = 0
    world_size: int = 1
    node: int = 0
    local_rank: int = 0
    local_size: int = 1
    nodes: int = 1
    bind_host: str = "127.0.0.1"
    threads: int = 2
    save_every_s: float | None = None
    seal_timeout_s: float = 600.0
    linger_s: float = 60.0
    silence_s: float = 30.0
    start_timeout_s: float = 60.0
    torch_version: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or not 0 <= self.local_rank < self.local_size <= self.world_size:
            raise LoopMisused(
                f"rank {self.rank} of {self.world_size}, local rank {self.local_rank} of {self.local_size}"
            )
        if not 0 <= self.node < self.nodes <= self.world_size or self.threads < 1:
            raise LoopMisused(f"node {self.node} of {self.nodes}, {self.threads} threads")
        if min(self.seal_timeout_s, self.linger_s, self.silence_s, self.start_timeout_s) <= 0:
            raise LoopMisused("a keeper's deadlines are positive")

    @property
    def writer(self) -> str:
        """The name that this node's objects carry."""
        return f"n{self.node:05d}"

    @property
    def tier(self) -> str:
        """Where commits go, in the log's words: "disk" or "object"."""
        return "disk" if split(self.url)[0] == "file" else "object"

    @property
    def where(self) -> str:
        """The store, fit for messages."""
        return redact(self.url)


def encode_config(config: KeeperConfig) -> dict[str, Any]:
    """As a JSON value. Raises LoopMisused where storage_options cannot be one, or the store is of one process."""
    if split(config.url)[0] == "memory":
        raise LoopMisused(
            "a memory:// store is seen by one process only, the keeper is another",
            where=config.where,
            next="use a path (a tmpfs such as /dev/shm/run serves for tests)",
        )
    value = asdict(config)  # a Keep becomes a dict too
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LoopMisused(
            f"storage_options must be plain JSON values to reach the keeper: {error}",
            next="give credentials as text, a profile or the environment",
        ) from error
    return value


def decode_config(value: Any) -> KeeperConfig:
    """The configuration that `encode_config` wrote. Raises WireError."""
    names = {item.name for item in fields(KeeperConfig)}
    if not isinstance(value, dict) or not value.keys() <= names:
        raise WireError("the keeper's configuration is of another version", next="use one version on all ranks")
    return KeeperConfig(**value)
