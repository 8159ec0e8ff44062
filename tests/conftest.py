"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.s3 import s3_server, s3_url  # noqa: F401  (fixtures)
from tests.worlds import Handle, Template, World


@pytest.fixture(scope="session")
def world_template() -> Iterator[Template]:
    template = Template()
    yield template
    template.close()


@pytest.fixture
def world(world_template: Template, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., World]]:
    """`world(n, local_size=None, env=None)`: a world of n ranks; see tests/worlds.py."""
    handles: list[Handle] = []

    def directory() -> Path:
        return tmp_path_factory.mktemp("world")

    def make(size: int, *, local_size: int | None = None, env: dict[str, str] | None = None) -> World:
        return World(world_template, directory, handles, size, local_size, env)

    yield make
    for handle in handles:
        handle.close()
