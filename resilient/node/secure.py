"""Authentication between nodes: keys from a shared secret, a tag on each frame.

    client -> server   {"t": "hello", "nonce": 32 hex bytes}      untagged, at most 4 KB
    server -> client   {"t": "hello", "nonce": 32 hex bytes}      untagged
    from then on       every frame carries HMAC-SHA256(key of its direction, number of the frame, header, body)

Both keys are derived from the secret and both nonces, so nothing of another connection can be played back. Who does
not know the secret cannot make a single tagged frame. Nothing is kept secret from a listener on the network.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Sequence

from resilient.errors import WireError
from resilient.node.wire import TAG_BYTES, Json, Message

SECRET_BYTES = 32
_NONCE = re.compile(r"[0-9a-f]{64}")


class FrameGuard:
    """Tags of one connection's frames, in both directions."""

    def __init__(self, secret: bytes, mine: str, theirs: str, *, server: bool) -> None:
        client_nonce, server_nonce = (theirs, mine) if server else (mine, theirs)
        both = f"{client_nonce}:{server_nonce}".encode()
        to_server = hmac.digest(secret, b"to server:" + both, "sha256")
        to_client = hmac.digest(secret, b"to client:" + both, "sha256")
        self._send_key, self._check_key = (to_client, to_server) if server else (to_server, to_client)
        self._sent = self._checked = 0

    def tag(self, header: bytes, body: Sequence[bytes]) -> bytes:
        """The tag of the next frame to be sent."""
        self._sent += 1
        return _tag(self._send_key, self._sent, header, body)

    def check(self, header: bytes, body: bytes, tag: bytes) -> bool:
        """Whether this is the next frame from the peer, whole and unchanged."""
        self._checked += 1
        return hmac.compare_digest(_tag(self._check_key, self._checked, header, (body,)), tag)


def _tag(key: bytes, number: int, header: bytes, body: Sequence[bytes]) -> bytes:
    mac = hmac.new(key, number.to_bytes(8, "big") + header, "sha256")
    for piece in body:
        mac.update(piece)
    return mac.digest()[:TAG_BYTES]


def new_hello() -> tuple[Json, str]:
    """The untagged first message of either side, and its nonce."""
    nonce = secrets.token_hex(32)
    return {"t": "hello", "nonce": nonce}, nonce


def read_hello(message: Message) -> str:
    """The peer's nonce. Raises WireError."""
    nonce = message.body.get("nonce")
    if message.body.get("t") != "hello" or not isinstance(nonce, str) or not _NONCE.fullmatch(nonce):
        raise WireError("the connection does not begin with a greeting")
    return nonce
