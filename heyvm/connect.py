"""`heyvm connect` and `heyvm ssh-proxy`: from the user's own machine into a sandbox.

Needs no server here and nothing of its settings; a ticket is all. What is slow to load is loaded
when it is needed: what is typed waits for it, and ssh does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from heyvm.errors import HeyvmError, Invalid, Unavailable

if TYPE_CHECKING:
    from heyvm.sandboxapi import Api
    from heyvm.tickets import Link

SCHEME = "heyo://"
URL_VARIABLE = "HEYVM_CONNECTION_URL"
LOCAL_HOST = "127.0.0.1"
FAILED = 255  # as ssh: it is not the command that has failed
SIGNALLED = 128
DIAL_S = 10.0
CLOSE_S = 1.0
RETRY_S = 0.1
LOOK_S = 0.1
REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
LONGEST_URL = 16 * 1024
PIECE_BYTES = 256 * 1024
BACKLOG = 128
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
RESET = struct.pack("ii", 1, 0)  # linger for no time: the peer is reset


def connect(options: argparse.Namespace) -> int:
    """`heyvm connect`"""
    return _told(lambda: _shell(options) if options.shell else _ports(options))


def ssh_proxy(options: argparse.Namespace) -> int:
    """`heyvm ssh-proxy`"""
    return _told(lambda: _proxy(options))


def _told(job: Callable[[], int]) -> int:
    try:
        return job()
    except HeyvmError as error:
        say(error.detail)
        return FAILED


def say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"heyvm: {text}\n".encode(errors="replace"))


# -- what is connected to --------------------------------------------------------------------------


class Target:
    """A connection URL, or a sandbox that the API is asked for one."""

    def __init__(self, options: argparse.Namespace, remote: int | None = None) -> None:
        self._url = _url(options)
        self._remote = remote
        self._ref = options.target
        self._session: str | None = None
        self._api: Api | None = None
        if self._url is None:
            from heyvm.sandboxapi import api_of

            self._api = api_of(options)

    @property
    def is_sandbox(self) -> bool:
        return self._url is None

    def url(self) -> str:
        """Asks the API once; `HeyvmError` says what it says."""
        if self._url is None:
            assert self._api is not None
            if self._remote is not None:
                self._url = self._api.tunnel(self._ref, self._remote)
            else:
                self._url, self._session = self._api.begin_session(self._ref)
        return self._url

    def release(self) -> None:
        """End what was begun for this."""
        session, self._session = self._session, None
        if self._api is not None and session is not None:
            self._api.end_session(self._ref, session)


def _url(options: argparse.Namespace) -> str | None:
    given = options.target or os.environ.get(URL_VARIABLE)
    if given == "-":
        given = _first_line()
    elif not given:
        raise Invalid(f"say what to connect to: a connection URL or a sandbox, or {URL_VARIABLE}")
    given = given.strip().strip("'\"")
    if given.startswith(SCHEME):
        return given
    # Not said again, and not asked for: it may be a ticket, which is a secret.
    if not REF.fullmatch(given):
        raise Invalid(f"this is neither a connection URL ({SCHEME}...) nor a sandbox's id or slug")
    return None


def _first_line() -> str:
    """Of stdin, and not a byte more: the rest is for the shell."""
    line = b""
    while not line.endswith(b"\n") and len(line) < LONGEST_URL:
        if not (byte := os.read(0, 1)):
            break
        line += byte
    text = line.decode("ascii", "replace").strip()
    if not text.startswith(SCHEME):
        raise Invalid(f"the first line of stdin is no connection URL ({SCHEME}...)")
    return text


# -- tickets ---------------------------------------------------------------------------------------


class Tunnel:
    """The connection to a target, for threads: made when the first stream is asked for."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._link: Link | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._refusal = ""
        self._over = threading.Event()

    def stream(self) -> socket.socket:
        """A new stream, as a socket. Raises `HeyvmError`."""
        from heyvm import tickets

        url = self.target.url()
        loop = self._loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()

        async def begin() -> socket.socket:
            self._link = await tickets.dial(url, DIAL_S)
            ours, theirs = socket.socketpair()
            self._carrying = loop.create_task(self._carry(theirs))
            return ours

        return asyncio.run_coroutine_threadsafe(begin(), loop).result()

    async def _carry(self, sock: socket.socket) -> None:
        assert self._link is not None
        try:
            await self._link.carry(sock)
        except HeyvmError as error:
            self._refusal = error.detail
            sock.close()
        finally:
            self._over.set()

    def ended(self) -> None:
        """Wait a moment for what is known of the stream's end."""
        self._over.wait(CLOSE_S)

    def why(self) -> str:
        """Why the connection has ended, if it has and somebody said it."""
        if self._link is None:
            return ""
        return self._link.why() or self._refusal

    def close(self) -> None:
        """Tell the other end, and the API. Takes a few seconds at most."""
        if self._link is not None and self._loop is not None:
            closing = asyncio.run_coroutine_threadsafe(self._link.close(), self._loop)
            with suppress(TimeoutError, HeyvmError):
                closing.result(CLOSE_S)
        self.target.release()


# -- a shell ---------------------------------------------------------------------------------------


def _shell(options: argparse.Namespace) -> int:
    from heyvm.usershell import Session, Wanted
    from heyvm.usertty import Screen

    if options.target == "-" and os.isatty(0):
        raise Invalid(f"- is for a pipe: give the URL in {URL_VARIABLE}")
    command = " ".join(options.words) or None
    has_screen = os.isatty(0) and (command is None or options.tty)
    if options.tty and not has_screen:
        say("stdin is no terminal, so there is none inside")
    tunnel = Tunnel(Target(options))
    wanted = Wanted(command, Screen(0) if has_screen else None, options.identity)
    try:
        return Session(wanted, tunnel.stream, tunnel.why).run()
    finally:
        tunnel.close()


# -- ssh's ProxyCommand ----------------------------------------------------------------------------


def _proxy(options: argparse.Namespace) -> int:
    if options.target == "-":
        raise Invalid(f"stdin is ssh's: give the URL in {URL_VARIABLE}")
    tunnel = Tunnel(Target(options))
    try:
        with _ended_by_signals():
            return _copy_both(tunnel)
    except Signalled as signalled:
        return SIGNALLED + signalled.number
    finally:
        tunnel.close()


def _copy_both(tunnel: Tunnel) -> int:
    sock = tunnel.stream()
    all_sent = threading.Event()
    threading.Thread(target=_copy_in, args=(sock, all_sent), daemon=True).start()
    try:
        while data := _received(sock):
            _write(1, data)
    except OSError:  # nobody reads stdout any more
        return FAILED
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _wait_for_end(sock, all_sent, tunnel)
    tunnel.ended()
    if why := tunnel.why():
        say(f"the connection is closed: {why}")
        return FAILED
    return 0


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(PIECE_BYTES)
    except OSError:  # reset
        return b""


def _wait_for_end(sock: socket.socket, all_sent: threading.Event, tunnel: Tunnel) -> None:
    """Nothing more comes; what is read from stdin still goes, while somebody may take it."""
    taken = select.poll()
    taken.register(sock, 0)  # POLLHUP comes unasked
    while not all_sent.wait(LOOK_S) and not taken.poll(0) and not tunnel.why():
        pass


def _copy_in(sock: socket.socket, all_sent: threading.Event) -> None:
    with suppress(OSError):
        while data := os.read(0, PIECE_BYTES):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    all_sent.set()


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # whoever shares the descriptor has made it so
            select.select([], [fd], [])


class Signalled(BaseException):
    """Told to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    def end(number: int, _: object) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)  # what is left to do is short
        raise Signalled(number)

    before = {number: signal.signal(number, end) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# -- a local port ----------------------------------------------------------------------------------


def _ports(options: argparse.Namespace) -> int:
    local, remote = _port_pair(options)
    target = Target(options, remote)
    if target.is_sandbox and remote is None:
        raise Invalid("say which port inside: -p LOCAL:REMOTE, or --to REMOTE (or --shell)")
    if not target.is_sandbox and remote is not None:
        raise Invalid("the ticket says which port inside: -p LOCAL")
    with _listener(options.host, local) as listener:
        # No asyncio.run: what is still carried at the end ends with the process.
        return asyncio.new_event_loop().run_until_complete(Ports(target, listener).run())


def _port_pair(options: argparse.Namespace) -> tuple[int, int | None]:
    local, remote = options.port or (0, None)
    if options.to is None:
        return local, remote
    if remote not in (None, options.to):
        raise Invalid("-p and --to name two ports inside: say one")
    return local, options.to


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise Invalid(f"cannot listen on {host}:{port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def _settle(future: asyncio.Future[int], number: int) -> None:
    if not future.done():
        future.set_result(number)


class Ports:
    """A local port, each of whose connections is one stream."""

    def __init__(self, target: Target, listener: socket.socket) -> None:
        self.target, self.listener = target, listener
        self._link: Link | None = None
        self._dialling = asyncio.Lock()
        self._tasks = set[asyncio.Task[None]]()
        self._gone = asyncio.Event()

    async def run(self) -> int:
        """Until a signal comes; the exit code."""
        # An exception out of a signal handler may end in one of iroh's callbacks, which drop it.
        loop = asyncio.get_running_loop()
        signalled: asyncio.Future[int] = loop.create_future()
        for number in ENDING:
            loop.add_signal_handler(number, _settle, signalled, number)
        serving = loop.create_task(self._serve())
        gone = loop.create_task(self._gone.wait())
        await asyncio.wait((serving, signalled, gone), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        if gone.done():
            from heyvm import tickets

            raise Unavailable(tickets.GONE)
        if self._link is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._link.close(), CLOSE_S)
        return SIGNALLED + signalled.result()

    async def _serve(self) -> None:
        """The first link is made before the port is named: a ticket that leads nowhere is said at
        once."""
        await self._linked()
        host, port = self.listener.getsockname()[:2]
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(name, flush=True)
        say(f"{name} leads into the sandbox; Ctrl-C ends it")
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self.listener)
            except OSError:  # no descriptor is left, or whoever connected is gone again
                await asyncio.sleep(RETRY_S)
                continue
            self._keep(self._carry(sock))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = await self._linked()
            await link.carry(sock)
        except HeyvmError as error:
            say(error.detail)
            with suppress(OSError):  # the link may have closed it
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()

    async def _linked(self) -> Link:
        from heyvm import tickets

        async with self._dialling:
            if self._link is not None and self._link.is_closed():
                say(f"the connection was lost ({self._link.why()}): dialling again")
                self._link = None
            if self._link is None:
                self._link = await tickets.dial(self.target.url(), DIAL_S)
                self._keep(self._watch(self._link))
            return self._link

    async def _watch(self, link: Link) -> None:
        """A ticket that is no more is no reason to listen any longer."""
        from heyvm import tickets

        if await link.ended() == tickets.GONE:
            self._gone.set()
