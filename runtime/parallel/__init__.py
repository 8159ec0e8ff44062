"""How a model is laid out on a mesh: one way per file, put together in build.py."""
