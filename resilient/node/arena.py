"""Snapshot memory that outlives its worker: anonymous files (memfd) mapped by the worker and its keeper.

A memfd has no name: when the last process that holds it is gone, so is the memory. It cannot shrink once made
(F_SEAL_SHRINK), so a reader never runs past its end. It is not sealed against writing: that fails while it is
mapped and could not be undone (facts of the kernel); who may write when is agreed on by messages.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from resilient.errors import WireError

PAGE_BYTES = mmap.PAGESIZE


class Arena:
    """One writable buffer in a memfd; `view` is its memory, `fd` what other processes get."""

    def __init__(self, nbytes: int, *, name: str = "resilient-arena") -> None:
        """Reserve and touch `nbytes` (rounded up to pages), so that no later copy pays for first touches.

        Raises OSError (ENOMEM) where the memory does not exist.
        """
        self.nbytes = max(1, -(-nbytes // PAGE_BYTES)) * PAGE_BYTES
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            # Allocating reports a full machine as an error here; a page fault would be a SIGBUS later.
            os.posix_fallocate(self.fd, 0, self.nbytes)
            self._map = mmap.mmap(self.fd, self.nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except BaseException:
            os.close(self.fd)
            raise
        self.view = memoryview(self._map)

    def close(self) -> None:
        """Give the memory back, as far as this process is concerned. Views of it must be gone."""
        self.view.release()
        self._map.close()
        os.close(self.fd)


class MappedArena:
    """A received arena, mapped for reading only."""

    def __init__(self, fd: int, nbytes: int) -> None:
        """Take over `fd`. Raises WireError if it is not an arena of `nbytes`."""
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            size = os.fstat(fd).st_size
            if not seals & fcntl.F_SEAL_SHRINK or nbytes <= 0 or size < nbytes:
                raise WireError(f"descriptor of {size} bytes is not an arena of {nbytes} bytes that cannot shrink")
            self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except OSError as error:
            raise WireError(f"descriptor cannot be mapped as an arena: {error}") from error
        finally:
            os.close(fd)  # the mapping keeps the memory
        self.nbytes = nbytes
        self.view = memoryview(self._map)

    def close(self) -> None:
        """Unmap."""
        self.view.release()
        self._map.close()
