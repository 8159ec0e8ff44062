"""The error tree: every error of the project derives from `ResilientError` and says what, where and what next."""

from __future__ import annotations

from typing import ClassVar


class ResilientError(Exception):
    """Root of every error that this project raises on purpose.

    what   what happened, with the numbers that show it
    where  the object, key, rank or step concerned ("" where `what` already says it)
    next   what the reader can do about it
    """

    _by_name: ClassVar[dict[str, type[ResilientError]]] = {}

    def __init__(self, what: str, *, where: str = "", next: str = "") -> None:  # noqa: A002  (the reader's word)
        self.what, self.where, self.next = what, where, next
        super().__init__(what)

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        ResilientError._by_name[cls.__name__] = cls

    def __str__(self) -> str:
        text = self.what
        if self.where:
            text += f" ({self.where})"
        if self.next:
            text += f". Next: {self.next}"
        return text

    def to_wire(self) -> dict[str, str]:
        """A JSON value from which `from_wire` makes the same error in another process."""
        return {"error": type(self).__name__, "what": self.what, "where": self.where, "next": self.next}

    @staticmethod
    def from_wire(value: dict[str, str]) -> ResilientError:
        """The error that `to_wire` described; an unknown name becomes a plain `ResilientError`, text kept."""
        kind = ResilientError._by_name.get(str(value.get("error")), ResilientError)
        error = kind.__new__(kind)
        ResilientError.__init__(
            error,
            str(value.get("what", "")),
            where=str(value.get("where", "")),
            next=str(value.get("next", "")),
        )
        return error


class StoreError(ResilientError):
    """A store could not do what was asked."""


class KeyInvalid(StoreError):
    """The key is not of the form that stores accept; it could leave the root or collide with a temporary file."""


class KeyMissing(StoreError):
    """There is no object under this key."""


class KeyExists(StoreError):
    """put_if_absent: the key already holds other bytes. Nothing was changed."""


class RangeMissing(StoreError):
    """The object is shorter than the range that was asked for."""


class TooLarge(StoreError):
    """The object is larger than the bound that the reader gave."""


class StoreUnavailable(StoreError):
    """A passing fault (time-out, throttling, connection lost); *not* done, and worth another try."""


class OutcomeUnknown(StoreUnavailable):
    """The request may or may not have been carried out; repeat it with the same bytes until it is known."""


class StoreFull(StoreError):
    """No space (or quota) left. Nothing was acknowledged."""


class StoreDenied(StoreError):
    """Credentials are missing, wrong or not sufficient."""


class StoreUnsupported(StoreError):
    """The store lacks what shared writing needs: an atomic put-if-absent."""


class StoreFailed(StoreError):
    """A lasting fault of the store (an I/O error of the disk, a broken configuration); trying again will not help."""
