"""A process's name for its whole life: what it leaves behind can be told from another's.

Knows nothing of what is left behind. The standard library alone.
"""

from __future__ import annotations

import functools
import os


def own() -> str:
    """This process: `<pid>-<start>-<boot>`, its start in clock ticks since the boot (proc_stat(5)).
    After a fork it is the child's."""
    return _name_of(os.getpid())


def is_alive(name: str) -> bool:
    """Whether the process of this name still runs. What is no name is nobody's."""
    pid, _, rest = name.partition("-")
    if not pid.isascii() or not pid.isdigit():
        return False
    start, _, boot = rest.partition("-")
    return boot == _boot() and start == _start(int(pid))


def pid_of(name: str) -> int:
    """The number in such a name."""
    return int(name.partition("-")[0])


@functools.lru_cache(maxsize=1)
def _name_of(pid: int) -> str:
    return f"{pid}-{_start(pid)}-{_boot()}"


def _start(pid: int) -> str | None:
    """None for one that is gone; a zombie is."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


@functools.cache
def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read(8)
