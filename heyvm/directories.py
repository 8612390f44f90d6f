"""The server's own directories: nobody else's, and closed to everybody else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from heyvm.errors import Misconfigured


def make_private(path: Path) -> None:
    """Make it where missing, with mode 0700. `Misconfigured` where it is not ours."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise Misconfigured(
            f"{path} cannot be made: {error.filename}: {error.strerror}; set HEYVM_DATA_DIR or"
            " HEYVM_RUN_DIR to a place where it can"
        ) from None
    if found.st_uid != os.geteuid():
        raise Misconfigured(f"{path} belongs to user {found.st_uid}, not to the server's")
    if found.st_mode & 0o077:
        path.chmod(0o700)


def demand_safe(path: Path) -> None:
    """`Misconfigured` where another user could put something else in the place of `path`."""
    # Links on the way count for themselves: who owns one may aim it elsewhere.
    for above in (*path.parents, *Path(os.path.realpath(path)).parents):
        found = above.lstat()
        if found.st_uid not in (0, os.geteuid()):
            raise Misconfigured(f"{path} lies in {above}, which belongs to user {found.st_uid}")
        if not stat.S_ISLNK(found.st_mode) and is_everybodys(found.st_mode):
            raise Misconfigured(f"{path} lies in {above}, which everybody can write")


def is_everybodys(mode: int) -> bool:
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX
