"""An S3 server for tests, and addresses on it."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from storage.s3 import S3Store

BUCKET = "runs"


@dataclass(frozen=True, kw_only=True)
class S3Server:
    endpoint: str
    connected: list[S3Store] = field(default_factory=list)

    def store(self, url: str) -> S3Store:
        """A store on the one connection of this session: making a client costs half a second."""
        store = S3Store(url, self.options())
        if not self.connected:
            self.connected.append(S3Store(url, self.options()))
            assert list(self.connected[0].list()) == []
        store._opened = self.connected[0]._opened
        return store

    def options(self, **config: object) -> dict[str, object]:
        return options(self.endpoint, **config)


def options(endpoint: str, **config: object) -> dict[str, object]:
    return {
        "key": "test-access-key",
        "secret": "test-secret-key",
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"s3": {"addressing_style": "path"}, **config},
    }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """moto's server, started once, with one bucket."""
    script = Path(__file__).parent / "storage" / "s3_server.py"
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        endpoint = process.stdout.readline().strip()
        assert endpoint.startswith("http://127.0.0.1:"), f"the S3 server did not start: {endpoint!r}"
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
        with urllib.request.urlopen(request, timeout=20):
            pass
        yield S3Server(endpoint=endpoint)
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@pytest.fixture
def s3_url(s3_server: S3Server, request: pytest.FixtureRequest) -> str:
    """An address of this test's own."""
    return f"s3://{BUCKET}/{abs(hash(request.node.nodeid)):x}/run"
