"""Models, one family per file; presets name their published sizes."""
