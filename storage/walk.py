"""Objects below a root directory, in the order of their keys."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from storage.directories import Directories
from storage.store import ObjectInfo, is_segment


def walk(directories: Directories, above: Sequence[str], start: str) -> Iterator[ObjectInfo]:
    """Objects in the directory `above` and below it whose next segment begins with `start`.

    Files whose names cannot be keys (temporary ones, strangers) and links are left out; so is what vanishes
    meanwhile. Raises OSError.
    """
    try:
        found = _entries(directories, above, start)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, size in sorted(found):
        if size is None:
            yield from walk(directories, [*above, name[:-1]], "")
        else:
            yield ObjectInfo(key="/".join([*above, name]), size=size)


def _entries(directories: Directories, above: Sequence[str], start: str) -> list[tuple[str, int | None]]:
    """(name, bytes) of files, (name + "/", None) of directories: with the slash they sort as keys do."""
    found: list[tuple[str, int | None]] = []
    here = directories.open(above)
    try:
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith(start) and is_segment(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_dir(follow_symlinks=False):
                            found.append((entry.name + "/", None))
                        elif entry.is_file(follow_symlinks=False):
                            found.append((entry.name, entry.stat(follow_symlinks=False).st_size))
    finally:
        os.close(here)
    return found
