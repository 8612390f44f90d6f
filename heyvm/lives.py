"""How processes of ours are started, and a name for the whole life of one: what it leaves behind
can be told from another's.

Knows nothing of what is left behind. The standard library alone.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Mapping


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


def spawn_module(
    module: str, environment: Mapping[str, str], stdin: tuple[object, ...], kept: int | None = None
) -> int:
    """Start a module of ours in a session of its own, with stderr for its stdout; its pid, to be
    reaped by the caller. `stdin` is a file action for descriptor 0; no other is inherited but
    `kept`."""
    actions: list[tuple[object, ...]] = [stdin, (os.POSIX_SPAWN_DUP2, 2, 1)]
    # Most are closed on exec anyhow; the server's listening sockets are not.
    others = {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, kept}
    actions += [(os.POSIX_SPAWN_CLOSE, number) for number in sorted(others)]
    if kept is not None:
        # Onto itself: that takes away its close-on-exec flag (posix_spawn_file_actions_adddup2(3)).
        actions.append((os.POSIX_SPAWN_DUP2, kept, kept))
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", module],
        environment,
        file_actions=actions,
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1),
    )
