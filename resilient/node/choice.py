"""Which codec `auto` takes next: whichever of compressed and raw was durable sooner here, as measured (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field

SMALL_BYTES = 64 << 20
"""Below this a save takes no time worth measuring, and compression only saves space."""
TRY_AGAIN_SAVES = 20
"""After so many saves the other codec is measured again: disks and their neighbours change."""
TOLERANCE = 1.05
"""Compression may take this much longer than raw: it also saves space, and bytes at every restore."""


@dataclass
class CodecChoice:
    """Measures saves and chooses; one per keeper, so each node adapts to its own disk and cores."""

    seconds_per_byte: dict[str, float] = field(default_factory=dict)  # of raw data, the last save by each codec
    since: dict[str, int] = field(default_factory=dict)  # saves since each codec was measured

    def next(self, raw_bytes: int) -> str:
        """The codec for a save of so many bytes: "fast" or "raw"."""
        if raw_bytes < SMALL_BYTES:
            return "fast"
        for codec in ("fast", "raw"):
            if codec not in self.seconds_per_byte or self.since[codec] >= TRY_AGAIN_SAVES:
                return codec
        return "fast" if self.seconds_per_byte["fast"] <= TOLERANCE * self.seconds_per_byte["raw"] else "raw"

    def note(self, codec: str, raw_bytes: int, seconds: float) -> None:
        """A save by this codec became durable in so many seconds."""
        if raw_bytes < SMALL_BYTES:
            return
        self.since = {name: count + 1 for name, count in self.since.items()}
        self.seconds_per_byte[codec], self.since[codec] = seconds / raw_bytes, 0
