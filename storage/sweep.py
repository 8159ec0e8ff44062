"""Removal of temporary files whose writers are gone."""

from __future__ import annotations

import contextlib
import os

from storage.directories import Directories
from storage.store import is_segment
from storage.temporary import PREFIX, is_dead, owner_of


def sweep(directories: Directories, before_s: float) -> int:
    """Removes temporary files below the root; returns how many.

    A file goes at once when its writer ran on this machine and has ended, stays while that writer lives, and goes by
    its modification time (older than `before_s`, seconds since 1970) when its writer cannot be seen from here.
    A writer whose file was taken away in error begins again. Raises OSError.
    """
    removed = 0
    todo: list[tuple[str, ...]] = [()]
    while todo:
        path = todo.pop()
        try:
            here = directories.open(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name.startswith(PREFIX):
                        removed += _remove_if_stale(here, entry, before_s)
                    elif is_segment(entry.name) and entry.is_dir(follow_symlinks=False):
                        todo.append((*path, entry.name))
        finally:
            os.close(here)
    return removed


def _remove_if_stale(here: int, entry: os.DirEntry[str], before_s: float) -> bool:
    owner = owner_of(entry.name)
    dead = is_dead(owner) if owner else None
    with contextlib.suppress(FileNotFoundError):
        if dead or (dead is None and entry.stat(follow_symlinks=False).st_mtime < before_s):
            os.unlink(entry.name, dir_fd=here)
            return True
    return False
