"""Named model sizes (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PRESETS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        # 0.8M: learns byte-level Python in a minute on two cores.
        "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2},
        # For tests: every feature, almost no arithmetic.
        "test": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
        "125m": {
            "vocab_size": 32_000,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_layers": 12,
            "num_heads": 12,
            "num_kv_heads": 12,
        },
        "llama3-8b": {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_layers": 32,
            "num_heads": 32,
            "num_kv_heads": 8,
            "rope_theta": 500_000.0,
            "tie_embeddings": False,
        },
    }
)
