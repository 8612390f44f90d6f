"""The contract between the domain and a way of running sandboxes. Knows no HTTP, SQL or slug."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heyvm.errors import Unsupported
from heyvm.models import CreateSpec, Mount, Network, Sandbox

State = Mapping[str, Any]


@dataclass(frozen=True)
class Offer:
    """What a sandbox will have. `ids` as in `Sandbox.ids`."""

    network: Network
    ids: str = "single"
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """Counters of one sandbox: CPU time in seconds, bytes and processes now, and how many of its
    processes the memory limit has ended since its box came up. None: cannot be known."""

    cpu_s: float | None = None
    memory_bytes: int | None = None
    pids: int | None = None
    oom_kills: int | None = None


class Backend(ABC):
    """A backend keeps nothing in memory that it could not lose: `sandbox.state` is its note.

    Every method may be called from several processes; the caller holds the sandbox's lock for all
    but `poll`, `connect` and `stop(grace=0)`, which may be called at any time.
    """

    name: str

    @abstractmethod
    def check(self) -> None:
        """Raise `Unavailable`, naming what is missing and the command that mends it."""

    @abstractmethod
    def allocate(self, taken: frozenset[int]) -> int | None:
        """A free base for the sandbox's range of ids, or None where it has none of its own."""

    @abstractmethod
    def start(
        self, sandbox: Sandbox, record: Callable[[State], None], *, visit: bool = False
    ) -> socket.socket:
        """Bring up a box whose agent has said hello and waits for *go*; return that connection.

        `record(state)` is called once, before this returns and before anything in the box runs:
        it must write the note durably (or raise, which ends the box). Directories are made where
        missing. `visit`: the same layers and mounts with no claim to be the running sandbox, for
        work on the files of a stopped one; it dies with the returned connection.
        Undoes its half-work before raising `BackendFailed`, `Unavailable` or `StorageFull`.
        """

    @abstractmethod
    def stop(self, sandbox: Sandbox, *, grace: float) -> None:
        """Ask every process to end, wait `grace` seconds, kill what is left; files stay.

        `grace=0` kills at once. Returns when no process of it is left. Twice is fine.
        """

    @abstractmethod
    def destroy(self, sandbox: Sandbox) -> None:
        """Kill it and remove every trace, found from the id alone; the disk is free on return."""

    @abstractmethod
    def poll(self, sandbox: Sandbox) -> str | None:
        """None while the agent's process lives, else the reason why it does not (for a person)."""

    @abstractmethod
    def connect(self, sandbox: Sandbox, timeout: float = 5.0) -> socket.socket:
        """A fresh byte stream to the agent. Raises `BackendFailed` where nobody answers."""

    @abstractmethod
    def open_log(self, sandbox: Sandbox) -> int | None:
        """A descriptor of the directory that the agent writes its log files in, None where there is
        none; the caller closes it. Hostile: open beneath it."""

    def check_mount(self, mount: Mount) -> None:
        """Raise `Invalid` where this mount may not be, for what its host directory is now."""
        raise Unsupported(f"backend {self.name} cannot mount directories of the host")

    def warm(self) -> None:  # noqa: B027 - there may be nothing to do
        """Do now what the first start would otherwise wait for."""

    def change_mounts(self, sandbox: Sandbox, add: Mount | None, remove: str | None) -> bool:
        """Change a running sandbox's mounts now: True; False: only a start can."""
        raise Unsupported(f"backend {self.name} cannot change the mounts of a running sandbox")

    def check_spec(self, spec: CreateSpec) -> Offer:
        """What of this request can be had on this machine. Raises `Invalid` for what was asked for
        by name and cannot; for what is only a default, the offer's warnings say so."""
        return Offer(network=spec.network or Network("none"))

    def pause(self, sandbox: Sandbox) -> None:
        """Halt every process of a running sandbox where it stands; twice is fine."""
        raise Unsupported(f"backend {self.name} cannot pause a sandbox")

    def resume(self, sandbox: Sandbox) -> None:
        """Let every process of a paused sandbox go on; twice is fine."""
        raise Unsupported(f"backend {self.name} cannot pause a sandbox")

    def is_paused(self, sandbox: Sandbox) -> bool:
        """Whether it has come to stand still. Never raises."""
        return False

    def usage(self, sandbox: Sandbox) -> Reading:
        """What a running sandbox has used until now. Never raises: what is unknown is None."""
        return Reading()

    def oom_kills(self, sandbox: Sandbox) -> int | None:
        """That of its reading alone, which the keeper asks for more often."""
        return self.usage(sandbox).oom_kills

    def listener(self, place: Path, gid: int | None) -> socket.socket:
        """A new unix socket at this path that listens, for an agent (`guest.listen`). Whoever may
        use its directory may connect to it: the group, where one is given, else our user alone.
        What is at the path already goes; nothing is left there when it raises."""
        raise Unsupported(f"backend {self.name} has no sockets for proxy endpoints")

    @abstractmethod
    def sweep(self, strays: frozenset[str]) -> None:
        """Remove every trace of these ids, which belong to no sandbox: left-overs of a crash.

        Called by the keeper only. What was being removed when somebody died is removed as well.
        """

    def upkeep(self, running: Sequence[Sandbox]) -> None:  # noqa: B027 - there may be nothing to do
        """The keeper's, every few seconds: put back what these sandboxes need of the machine and
        somebody has taken away."""

    @abstractmethod
    def inventory(self) -> frozenset[str]:
        """The ids of which there is any trace on this machine (directory, socket, cgroup, box)."""
