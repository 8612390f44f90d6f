"""The cgroup of sandboxes: one of our own, beside and never below the server's.

systemd stops a unit by its cgroup, whatever sessions its processes made: no sandbox may be in it.
"""

from __future__ import annotations

import contextlib
import os


def hierarchies() -> list[str]:
    """Where a group can be made: the v2 tree and, where systemd uses v1, its named one."""
    found = []
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, _, options = after.split(" ", 2)
            named = kind == "cgroup" and "name=systemd" in options
            if kind == "cgroup2" or named:
                found.append(before.split(" ")[4])
    return [path for path in found if os.access(path, os.W_OK)]


def tree(mark: str) -> list[str]:
    """The groups, one in each hierarchy, of one data directory's sandboxes."""
    return [os.path.join(path, f"heyvm-{mark}") for path in hierarchies()]


def remove_tree(mark: str) -> None:
    """Remove the groups, where nothing is left in them."""
    for path in tree(mark):
        with contextlib.suppress(OSError):
            os.rmdir(path)
