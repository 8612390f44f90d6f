"""The process in which tickets are served: `python -m heyvm.tunnels`, a child of the keeper's.

asyncio for iroh and a thread for each SSH connection, without gevent. Its stdin is a socket of the
keeper's: a line of JSON is a question, and answered with one (control.py's form). When that socket
ends, so has the keeper: every client is told, and this process ends too.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import hmac
import ipaddress
import json
import os
import random
import resource
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from heyvm import backends, control, journal, origins, tickets
from heyvm.backends import seccomp
from heyvm.errors import (
    Conflict,
    HeyvmError,
    NotFound,
    PortClosed,
    StorageFull,
    Unavailable,
    Unsupported,
)
from heyvm.lifecycle import Lifecycle
from heyvm.models import Tunnel
from heyvm.registry import Registry
from heyvm.settings import Settings, from_env
from heyvm.shells import Inside, Shells

T = TypeVar("T")

QUESTIONS = 0  # the descriptor
MAX_CONNECTIONS = 64  # of one ticket
MAX_STREAMS = 256  # of one ticket
MAX_STREAMS_OF_ALL = 1024
FILES_OF_A_STREAM = 4  # a pair of sockets, and what SSH opens in the sandbox
RESERVED_FILES = 256
# That wait for agents; one sandbox's must not keep those of others from theirs.
MAX_THREADS = 256
MAX_THREADS_OF_A_SANDBOX = 8
MAX_SERVERS = 256  # SSH connections of all tickets: each has threads of its own
TRIES = 50  # ports for one ticket
# What the kernel gives to whoever sends datagrams begins above: a port from there could be in use
# at the moment in which the next process wants it back.
LOWEST_PORT = 20000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOCK_NAME = "tunnels.lock"
# struct flock of 64-bit Linux: type, whence, start, length, pid (fcntl(2)).
FLOCK = struct.Struct("hhqqi4x")
PREDECESSOR_S = 3.0  # longer than ENDING_S: who has not ended by then hangs
POLL_S = 0.02
ENDING_S = 2.0
LOOK_S = 0.5
# A client can have some hundred MB kept by not reading: of all processes, end this one.
OOM_SCORE_ADJ = "500"
HOST_KEY = b"ssh host key "
GONE = tickets.GONE.encode()
KEEPER_GONE = b"the server's keeper has ended: connect again in a moment"


class Tunnels:
    """One endpoint for each row, and none besides."""

    def __init__(self, settings: Settings, registry: Registry, shells: Shells) -> None:
        self._settings = settings
        self._registry = registry
        self._shells = shells
        self._doors: dict[str, _Door] = {}
        self._failures: dict[str, HeyvmError] = {}
        self._turn = asyncio.Lock()
        self._threads = ThreadPoolExecutor(MAX_THREADS)
        self._waiting: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(MAX_THREADS_OF_A_SANDBOX)
        )
        self._servers = Shares(MAX_SERVERS)
        self._streams = Shares(streams_of_all())
        self._subnet = ipaddress.ip_network(settings.subnet)

    async def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One of the keeper's questions."""
        await self.sync()
        match request.get("op"):
            case "sync":
                return {"ok": True}
            case "tunnel":
                return await self._tell(str(request.get("id")))
        raise Unavailable("the tunnels' process does not know this question")

    async def sync(self) -> None:
        """Be what the rows say. What cannot be opened is tried again here, and by `look`."""
        async with self._turn:
            rows = {row.id: row for row in await asyncio.to_thread(self._registry.tunnels)}
            gone = [self._doors.pop(name) for name in self._doors.keys() - rows.keys()]
            await asyncio.gather(*(door.close(GONE) for door in gone))
            self._failures = {name: why for name, why in self._failures.items() if name in rows}
            for row in rows.values():
                if row.id not in self._doors:
                    await self._try_open(row, rows.values())

    async def _try_open(self, row: Tunnel, rows: Iterable[Tunnel]) -> None:
        try:
            self._doors[row.id] = await self._open(row, rows)
            self._failures.pop(row.id, None)
        except HeyvmError as error:
            if str(self._failures.get(row.id)) != str(error):
                say(f"{row.id}: {error.detail}")
            self._failures[row.id] = error

    async def _open(self, row: Tunnel, rows: Iterable[Tunnel]) -> _Door:
        taken = {one.udp_port for one in rows} | {door.port for door in self._doors.values()}
        served = await self._listen(row, taken)
        try:
            port = served.port(self._settings.tunnel_host)
            if port != row.udp_port:
                # Before anybody is told of it: a ticket has to be found there again.
                await asyncio.to_thread(self._registry.set_udp_port, row.id, port)
        except BaseException:
            await served.close(GONE)
            raise
        return _Door(row, served, port, self)

    async def _listen(self, row: Tunnel, taken: Collection[int | None]) -> tickets.Served:
        """On the port of before, and no other: tickets that were given out name it."""
        host, relay = self._settings.tunnel_host, self._settings.iroh_relay
        why = "all are taken"
        for port in _candidates(row, self._settings.tunnel_ports, taken):
            try:
                return await tickets.Served.open(
                    row.secret, host, port, relay, strict=self._settings.strict_tickets
                )
            except OSError as error:
                why = str(error)
        if row.udp_port is None and self._settings.tunnel_ports:
            first, last = self._settings.tunnel_ports
            why = f"no UDP port of HEYVM_TUNNEL_PORTS ({first}-{last}) is free: {why}"
        raise Unavailable(why)

    async def _tell(self, name: str) -> dict[str, Any]:
        door = self._doors.get(name)
        if door is None and name in self._failures:
            raise _refusal(self._failures[name])
        if door is None:
            raise NotFound(f"there is no tunnel {name[:64]!r} (any more)")
        ticket = door.served.ticket(await asyncio.to_thread(self._addresses), door.port)
        host_key = ""
        if door.row.kind == "shell":
            from heyvm import ssh

            host_key = ssh.public_line(await asyncio.to_thread(self.host_key, door.row.sandbox_id))
        strict = self._settings.strict_tickets
        proof = tickets.proof_of(door.row.secret) if strict else None
        return {"url": tickets.url_of(ticket, proof), "host_key": host_key}

    def _addresses(self) -> list[str]:
        """Where this machine is reached; not by the sandboxes' own network, by loopback last."""
        host = ipaddress.ip_address(self._settings.tunnel_host)
        if not host.is_unspecified:
            return [str(host)]
        found = [
            one
            for one in origins.local_addresses()
            if one.version == host.version
            and not (one.is_loopback or one.is_link_local or one.is_multicast)
            and one not in self._subnet
        ]
        outer = [str(one) for one in sorted(found, key=int)]
        return [*outer[: tickets.ADDRESSES - 1], tickets.LOOPBACKS[host.version]]

    def host_key(self, sandbox_id: str) -> bytes:
        """The seed of its SSH server's key: one for each sandbox, for ever."""
        about = HOST_KEY + sandbox_id.encode()
        return hmac.digest(self._registry.link_key(), about, hashlib.sha256)

    def inside(self, sandbox_id: str) -> Inside:
        return self._shells.inside(sandbox_id)

    async def serve(self, row: Tunnel, stream: tickets.Stream) -> None:
        """One stream of a client's."""
        if not self._streams.take(row.sandbox_id):
            await stream.refuse()
            return
        try:
            sock = await self._far_end(row)
        except PortClosed:
            await stream.refuse(tickets.NOBODY_LISTENS)
        except Conflict:
            await stream.refuse(tickets.NOT_RUNNING)
        except (HeyvmError, OSError):
            await stream.refuse()
        else:
            await stream.carry(sock)
        finally:
            self._streams.give_back(row.sandbox_id)

    async def _far_end(self, row: Tunnel) -> socket.socket:
        if row.port is None:
            return await self._in_thread(row, self._be_server)
        return await self._in_thread(row, self._dial)

    def _dial(self, row: Tunnel) -> socket.socket:
        assert row.port is not None
        return self.inside(row.sandbox_id).port(row.port)

    def _be_server(self, row: Tunnel) -> socket.socket:
        """The client's end of a connection to an SSH server, which runs in a thread."""
        from heyvm import ssh

        seed = self.host_key(row.sandbox_id)
        if not self._servers.take(row.sandbox_id):
            raise Unavailable("there are too many SSH connections")
        ours, theirs = socket.socketpair()

        def run() -> None:
            try:
                with theirs, suppress(HeyvmError, OSError, EOFError):
                    ssh.serve(
                        theirs,
                        lambda: self.inside(row.sandbox_id),
                        host_key=seed,
                        authorized=row.ssh_public_keys,
                    )
            finally:
                self._servers.give_back(row.sandbox_id)

        try:
            threading.Thread(target=run, daemon=True).start()
        except RuntimeError as error:
            self._servers.give_back(row.sandbox_id)
            ours.close()
            theirs.close()
            raise Unavailable(str(error)) from None
        return ours

    async def _in_thread(self, row: Tunnel, work: Callable[[Tunnel], T]) -> T:
        async with self._waiting[row.sandbox_id]:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, row)

    async def look(self) -> None:
        """For ever: try again what could not be opened, and end what has expired."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self._failures or self._has_expired():
                with suppress(HeyvmError):
                    await self.sync()

    def _has_expired(self) -> bool:
        now = self._registry.clock.wall()
        ends = (door.row.expires_at for door in self._doors.values())
        return any(end is not None and end <= now for end in ends)

    async def close(self) -> None:
        """Tell everybody. It may be that this is not needed any more, its last row being gone."""
        names = set(self._doors)
        with suppress(HeyvmError):
            names = {row.id for row in await asyncio.to_thread(self._registry.tunnels)}
        doors = self._doors.items()
        told = ((door, KEEPER_GONE if name in names else GONE) for name, door in doors)
        await asyncio.gather(*(door.close(why) for door, why in told))


class _Door:
    """A row's endpoint."""

    def __init__(self, row: Tunnel, served: tickets.Served, port: int, tunnels: Tunnels) -> None:
        self.row, self.served, self.port = row, served, port

        async def stream(one: tickets.Stream) -> None:
            await tunnels.serve(row, one)

        self._task = asyncio.ensure_future(served.serve(stream, MAX_CONNECTIONS, MAX_STREAMS))

    async def close(self, reason: bytes) -> None:
        await self.served.close(reason)
        self._task.cancel()


class Shares:
    """So many of something, of which each sandbox may have as many as are left: one that takes what
    it can get leaves half, two leave a third, and so there is always some for the next. Safe from
    any thread."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._taken: defaultdict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def take(self, sandbox_id: str) -> bool:
        """One, if there is one for this sandbox."""
        with self._lock:
            if self._taken.get(sandbox_id, 0) >= self._left:
                return False
            self._left -= 1
            self._taken[sandbox_id] += 1
            return True

    def give_back(self, sandbox_id: str) -> None:
        with self._lock:
            self._left += 1
            self._taken[sandbox_id] -= 1
            if not self._taken[sandbox_id]:
                del self._taken[sandbox_id]


def streams_of_all() -> int:
    """As many as there are descriptors for."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fit = (files - RESERVED_FILES) // FILES_OF_A_STREAM
    return max(1, min(MAX_STREAMS_OF_ALL, fit))


def main() -> int:
    """Serve until the keeper is gone."""
    settings = from_env(os.environ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJ)
    # Keys of tickets are in this memory, and shall not come into a file of it.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings.iroh_relay is None:
        ask_no_router()
    if settings.log_json:
        journal.begin_json("tunnels")
    succeed(settings.data_dir)
    registry = Registry(settings.data_dir / "registry.db")
    lifecycle = Lifecycle(registry, backends.build(settings), settings)
    asyncio.run(_run(Tunnels(settings, registry, Shells(lifecycle, _nobody))))
    # Threads of SSH connections may still wait for agents: nobody waits for them.
    os._exit(0)


def ask_no_router() -> None:
    """iroh looks for a router by UPnP for each endpoint, and has it let in the Internet: to shells,
    which need no password. There is no switch, but nothing else in this process sends datagrams in
    that way, unless it looks up the name of a relay."""
    try:
        seccomp.forbid_addressed_datagrams()
    except (Unavailable, OSError) as error:
        say(f"a router with UPnP may be asked to let clients in: {error}")


def succeed(data_dir: Path) -> int:
    """Wait until the process of the last keeper's, which has the UDP ports, is gone; one that hangs
    is killed. The descriptor has the lock until this process ends."""
    descriptor = os.open(data_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + PREDECESSOR_S
    while not _try_lock(descriptor):
        if time.monotonic() > deadline:
            _kill_holder(descriptor)
        time.sleep(POLL_S)
    return descriptor


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _kill_holder(descriptor: int) -> None:
    question = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
    if kind != fcntl.F_UNLCK and pid > 0:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _candidates(
    row: Tunnel, given: tuple[int, int] | None, taken: Collection[int | None]
) -> Sequence[int]:
    """UDP ports to try for a ticket; 0 is any."""
    if row.udp_port is not None:
        return [row.udp_port]
    first, last = given or (LOWEST_PORT, _lowest_ephemeral() - 1)
    free = [port for port in range(first, last + 1) if port not in taken]
    if given:
        return free[:TRIES]
    return [*random.sample(free, min(TRIES, len(free))), 0]


def _lowest_ephemeral() -> int:
    try:
        return int(EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _refusal(why: HeyvmError) -> HeyvmError:
    """For whoever asked for a ticket."""
    kind = type(why) if isinstance(why, (StorageFull, Unsupported)) else Unavailable
    return kind(f"the ticket cannot be served: {why.detail}")


def _nobody(_request: Mapping[str, Any]) -> Mapping[str, Any]:
    raise Unavailable("tickets are made by the API")


async def _run(tunnels: Tunnels) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    keeper = socket.socket(fileno=os.dup(QUESTIONS))
    reader, writer = await asyncio.open_connection(sock=keeper)
    tasks = [
        asyncio.ensure_future(_answer(tunnels, reader, writer)),
        asyncio.ensure_future(over.wait()),
        asyncio.ensure_future(tunnels.look()),
    ]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for fault in filter(None, (task.exception() for task in done)):
        say(f"it ends: {_where(fault)}")
    threading.Timer(ENDING_S, os._exit, (0,)).start()
    await tunnels.close()


async def _answer(
    tunnels: Tunnels, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Until there is nobody who asks."""
    with suppress(OSError):
        while line := await reader.readline():
            try:
                answer = await tunnels.answer(json.loads(line))
            except HeyvmError as error:
                answer = {"error": control.told(error)}
            except Exception as fault:  # noqa: BLE001 - the keeper must learn of every fault
                say(f"a question failed: {_where(fault)}")
                answer = {"error": control.told(HeyvmError(f"tunnels: {type(fault).__name__}"))}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()


def _where(fault: BaseException) -> str:
    """Not what it says: that may be a key."""
    frames = traceback.extract_tb(fault.__traceback__)[-3:]
    return " < ".join([type(fault).__name__, *(f"{one.name}:{one.lineno}" for one in frames[::-1])])


def say(text: str) -> None:
    # Its stderr is the server's; where that is gone, there is nobody to tell.
    with suppress(OSError):
        print(f"heyvm tunnels: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
