"""Typed errors for the error numbers of the operating system."""

from __future__ import annotations

import errno

from storage.errors import (
    KeyInvalid,
    KeyMissing,
    StoreDenied,
    StoreError,
    StoreFailed,
    StoreFull,
    StoreUnavailable,
)

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP})
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EMFILE,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)


def typed(error: OSError, where: str) -> StoreError:
    """The store's error for an OSError; `where` names the object. Carries the number's name, never the error's text.

    The text of a foreign error is left out on purpose: file systems over the network put addresses into it, and
    some of them credentials.
    """
    number = error.errno
    if number is None and isinstance(error, FileNotFoundError):
        number = errno.ENOENT
    if number is None and isinstance(error, PermissionError):
        number = errno.EACCES
    if number is None and isinstance(error, (TimeoutError, ConnectionError)):
        number = errno.ETIMEDOUT
    name = errno.errorcode.get(number or 0, type(error).__name__)
    if number in _MISSING:
        return KeyMissing(f"there is no such object ({name})", where=where, next="check the key")
    if number in _NO_SPACE:
        return StoreFull(
            f"no space left, or a quota or file-size limit is reached ({name})",
            where=where,
            next="free space, keep fewer checkpoints (keep=), or choose another store",
        )
    if number in _DENIED:
        return StoreDenied(
            f"not permitted ({name})", where=where, next="check owner, mode, mount options and symbolic links"
        )
    if number in _PASSING:
        return StoreUnavailable(f"the file system did not answer ({name})", where=where, next="try again")
    if number == errno.ENAMETOOLONG:
        return KeyInvalid(f"the name is too long for this file system ({name})", where=where, next="use a shorter path")
    return StoreFailed(f"the file system failed ({name})", where=where, next="check the disk and the kernel's log")
