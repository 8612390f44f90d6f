"""Attacks on shells: by clients of tickets, agents, users of the machine, and servers of others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import paramiko
import pytest
from paramiko.common import cMSG_SERVICE_REQUEST, cMSG_USERAUTH_REQUEST
from paramiko.message import Message

from heyvm import frames, guest, ssh, streams, tickets
from heyvm.calls import Calls, Change
from heyvm.errors import HeyvmError, Unavailable
from heyvm.tunnels import MAX_SERVERS, Shares
from tests.server import (
    PATIENCE,
    REPOSITORY,
    Server,
    Session,
    command_line,
    create,
    read_bytes,
    run,
    wait_until,
)
from tests.ws import Refused, Shell, connect

TIMEOUT_S = 20 * PATIENCE
NOBODY = 65534
ESCAPE = b"\x1b]0;mine\x07"


# -- whoever has a ticket --------------------------------------------------------------------------


class Dialler:
    """The client's end of tickets, on a loop of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._links: list[tickets.Link] = []
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def link(self, url: str) -> tickets.Link:
        link: tickets.Link = self._wait(tickets.dial(url, TIMEOUT_S))
        self._links.append(link)
        return link

    def stream(self, link: tickets.Link) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(TIMEOUT_S)
        asyncio.run_coroutine_threadsafe(self._carry(link, theirs), self._loop)
        return ours

    async def _carry(self, link: tickets.Link, sock: socket.socket) -> None:
        try:
            await link.carry(sock)
        except Unavailable:
            sock.close()

    def hang_up(self) -> None:
        for link in self._links:
            self._wait(link.close())
        self._links.clear()

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * TIMEOUT_S)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[Session]:
    with server.http() as session:
        yield session


@pytest.fixture(scope="module")
def box(http: Session) -> str:
    return str(create(http)["id"])


@pytest.fixture
def dialler() -> Iterator[Dialler]:
    made = Dialler()
    yield made
    made.hang_up()


def ticket_of(http: Session, ref: str, **wanted: Any) -> dict[str, Any]:
    answer = http.post(f"/sandboxes/{ref}/shell-session", json=wanted)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def greeting(sock: socket.socket) -> bytes:
    """What an SSH server says first; nothing where there is none."""
    with contextlib.suppress(OSError):
        return sock.recv(5)
    return b""


def tunnels_pid(server: Server) -> int:
    return next(pid for pid in server.server_pids() if b"heyvm.tunnels" in command_line(pid))


@pytest.mark.root
def test_who_takes_all_that_can_be_had_leaves_others_theirs(
    server: Server, http: Session, box: str, dialler: Dialler
) -> None:
    """With several tickets of one sandbox, and connections that say nothing."""
    other = ticket_of(http, create(http)["id"])["connection_url"]
    greedy = []
    for _ in range(3):
        link = dialler.link(ticket_of(http, box)["connection_url"])
        greedy += [dialler.stream(link) for _ in range(MAX_SERVERS // 4)]
    try:
        greeted = [greeting(sock) for sock in greedy].count(b"SSH-2")
        assert greeted == MAX_SERVERS // 2

        with dialler.stream(dialler.link(other)) as sock:
            assert greeting(sock) == b"SSH-2"
    finally:
        for sock in greedy:
            sock.close()


def test_everybody_may_have_as_much_as_is_left() -> None:
    shares = Shares(12)
    taken = [[who for _ in range(12) if shares.take(who)] for who in ("a", "b", "c")]
    assert [len(one) for one in taken] == [6, 3, 2]
    assert shares.take("d") and not shares.take("d")
    for who in "aaaaaa":
        shares.give_back(who)
    assert shares.take("d") and shares.take("a")


@pytest.mark.root
def test_a_ticket_does_not_lead_to_the_next_sandbox_of_its_name(
    http: Session, dialler: Dialler
) -> None:
    first = create(http, name="twin")
    old = ticket_of(http, first["slug"])
    assert http.delete(f"/sandboxes/{first['slug']}").status_code == 204
    second = create(http, name="twin")
    assert second["slug"] == first["slug"]

    new = ticket_of(http, second["slug"])
    assert new["ssh_host_key"] != old["ssh_host_key"]
    with pytest.raises(Unavailable):
        asyncio.run(tickets.dial(old["connection_url"], 1.0))
    with dialler.stream(dialler.link(new["connection_url"])) as sock:
        assert greeting(sock) == b"SSH-2"


@pytest.mark.root
def test_sessions_of_every_kind_leave_nothing_where_tickets_are_served(
    server: Server, http: Session, box: str, dialler: Dialler
) -> None:
    url = ticket_of(http, box)["connection_url"]
    pid = tunnels_pid(server)

    def inside() -> str:
        return str(run(http, box, "ls -d /proc/[0-9]*")["stdout"].count("\n"))

    def held() -> tuple[int, int]:
        return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))

    idle = inside()
    one_of_each(dialler, url)
    wait_until(lambda: inside() == idle, "what the first sessions ran has ended")
    files, threads = held()
    for _ in range(3):
        one_of_each(dialler, url)
    wait_until(lambda: inside() == idle, "what the sessions ran has ended")
    wait_until(lambda: held()[0] <= files and held()[1] <= threads, f"{held()}, {files, threads}")


def one_of_each(dialler: Dialler, url: str) -> None:
    """Sessions, all of which end without a word of farewell."""
    link = dialler.link(url)
    for begin in (begin_shell, begin_command, begin_files):
        client = paramiko.Transport(dialler.stream(link))
        client.start_client(timeout=TIMEOUT_S)
        client.auth_none("any")
        begin(client)
    dialler.hang_up()


def begin_shell(client: paramiko.Transport) -> None:
    channel = client.open_session()
    channel.get_pty()
    channel.invoke_shell()
    assert channel.recv(1)


def begin_command(client: paramiko.Transport) -> None:
    channel = client.open_session()
    channel.exec_command("echo hello; sleep 1000")
    assert channel.recv(6) == b"hello\n"


def begin_files(client: paramiko.Transport) -> None:
    files = paramiko.SFTPClient.from_transport(client)
    assert files is not None and files.listdir("/")


# -- who may log in --------------------------------------------------------------------------------


class Intruder(paramiko.Transport):
    """Says what it likes, and keeps what it is told."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.start_client(timeout=TIMEOUT_S)

    def say(self, kind: bytes, *parts: bytes | bool | int) -> None:
        message = Message()
        message.add_byte(kind)
        for part in parts:
            if isinstance(part, bool):
                message.add_boolean(part)
            elif isinstance(part, int):
                message.add_int(part)
            else:
                message.add_string(part)
        self._send_message(message)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def locked_door(line: str) -> Iterator[Intruder]:
    """A connection to a server that knows this key alone."""
    ours, theirs = socket.socketpair()
    came_in: list[None] = []

    def inside() -> NoReturn:
        came_in.append(None)
        raise Unavailable("somebody came in")

    def serve() -> None:
        ssh.serve(theirs, inside, host_key=bytes(32), authorized=[line])

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        with ours, contextlib.closing(Intruder(ours)) as intruder:
            yield intruder
            with pytest.raises((paramiko.SSHException, EOFError)):
                intruder.open_session(timeout=TIMEOUT_S)
    finally:
        serving.join(TIMEOUT_S)
        theirs.close()
    assert not came_in


def key() -> paramiko.Ed25519Key:
    return ssh.private_key(os.urandom(32))


def line_of(one: paramiko.PKey) -> str:
    return f"{one.get_name()} {one.get_base64()}"


def forgeries(right: paramiko.PKey, wrong: paramiko.PKey) -> Sequence[Sequence[bytes | bool]]:
    name, blob = right.get_name().encode(), right.asbytes()
    signed = wrong.sign_ssh_data(b"anything", right.get_name()).asbytes()
    return [
        [b"none"],
        [b"password", False, b""],
        [b"keyboard-interactive", b"", b""],
        [b"hostbased", name, blob, b"host", b"user", signed],
        [b"gssapi-with-mic", b"\0\0\0\1", b"\6\1\1"],
        [b"gssapi-keyex", signed],
        [b"publickey", False, name, blob],
        [b"publickey", True, name, blob, signed],
        [b"publickey", True, name, blob, b""],
        [b"publickey", True, b"ssh-rsa", blob, signed],
        [b"publickey", True, name, wrong.asbytes(), signed],
    ]


@pytest.mark.parametrize("number", range(len(forgeries(key(), key()))))
def test_no_other_way_leads_past_the_keys(number: int) -> None:
    """Nor does the right key without its signature, nor `none` after something else."""
    right = key()
    with locked_door(line_of(right)) as intruder:
        intruder.say(cMSG_SERVICE_REQUEST, b"ssh-userauth")
        how = forgeries(right, key())[number]
        with contextlib.suppress(paramiko.SSHException, EOFError):
            intruder.say(cMSG_USERAUTH_REQUEST, b"any", b"ssh-connection", *how)
            intruder.say(cMSG_USERAUTH_REQUEST, b"any", b"ssh-connection", b"none")


def test_the_key_itself_comes_in() -> None:
    """Or else the test above would prove nothing."""
    right = key()
    with pytest.raises(pytest.fail.Exception), locked_door(line_of(right)) as client:
        client.auth_publickey("any", right)


# -- an agent that somebody has taken over ---------------------------------------------------------

WORDS = (
    *("ok", "ready", "seq", "lost", "error", "message", "errno", "exit_code", "data", "handle"),
    *("entries", "facts", "path", *("bsize", "frsize", "blocks", "bfree", "bavail", "files")),
)
TEXTS = (b"gone", b"taken", b"failed", b"refused", ESCAPE, b"\xff" * 10, b"", b"/", b"a\r\nb: c")
NUMBERS = (0, -1, 1, 255, 256, 1 << 62, -(1 << 63), (1 << 63) - 1)


def anything(chance: random.Random, depth: int = 0) -> Any:
    match chance.randrange(4 if depth < 3 else 3):
        case 0:
            return chance.choice(NUMBERS)
        case 1:
            return chance.choice(TEXTS)
        case 2:
            return [0o100644, 1, 2, 3, 4, 5]
    return [anything(chance, depth + 1) for _ in range(chance.randrange(8))]


def any_frame(chance: random.Random) -> bytes:
    match chance.randrange(8):
        case 0:
            return chance.randbytes(chance.randrange(1, 30))
        case 1 | 2:
            kind = chance.choice((frames.STDOUT, frames.STDERR, frames.STDIN, frames.END))
            return frames.frame(kind, chance.choice((b"", struct.pack(">Q", 1) + b"x", ESCAPE)))
    fields = {chance.choice(WORDS): anything(chance) for _ in range(chance.randrange(4))}
    if chance.random() < 0.7:
        fields |= {chance.choice(("ok", "ready")): 1}
    return frames.header(fields)


def use_terminal(sock: socket.socket) -> None:
    terminal = streams.Terminal.open(
        sock, session="a" * 16, argv=(), env={}, cwd="/", user="", size=(80, 24), keep=1
    )
    terminal.resize(1, 1)
    terminal.ack(1)
    terminal.send(b"x")
    for _ in range(8):
        terminal.receive(0.01)


def use_command(sock: socket.socket) -> None:
    command = streams.Command.start(sock, argv=("x",), env={}, cwd="/", user="")
    command.send(b"x")
    command.end_input()
    for _ in range(8):
        command.receive(0.01)


def use_files(sock: socket.socket) -> None:
    calls = Calls(sock, user="", cwd="/")
    for call in (
        lambda: calls.open(b"/", 0),
        lambda: calls.read(1, 0, 9),
        lambda: calls.readdir(1),
        lambda: calls.stat(b"/"),
        lambda: calls.realpath(b"/"),
        lambda: calls.space(b"/"),
        lambda: calls.change(b"/", Change(size=1)),
    ):
        try:
            call()
        except OSError as error:
            assert str(error.strerror).isprintable()


USES: Sequence[Callable[[socket.socket], object]] = (
    use_terminal,
    lambda sock: streams.Terminal.attach(sock, "a" * 16).receive(0.01),
    use_command,
    use_files,
    lambda sock: streams.end_terminal(sock, "a" * 16),
    lambda sock: guest.connect_port(sock, 80, "x"),
)


@pytest.mark.parametrize("use", range(len(USES)))
def test_whatever_an_agent_says_is_an_error_of_the_domain_that_can_be_shown(use: int) -> None:
    for seed in range(150):
        chance = random.Random(f"{use}/{seed}")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            begin = (b"", frames.header({"ok": 1}), frames.header({"ready": 1, "seq": 1}))
            theirs.sendall(begin[seed % 3] + b"".join(any_frame(chance) for _ in range(10)))
            theirs.shutdown(socket.SHUT_WR)
            try:
                USES[use](ours)
            except HeyvmError as error:
                assert error.detail.isprintable(), (seed, error.detail)


# -- other users of the machine --------------------------------------------------------------------

PEEK = """
import os, socket, sys
pids, paths = sys.argv[1].split(","), sys.argv[2:]
for path in [f"/proc/{pid}/{what}" for pid in pids for what in ("environ", "mem", "maps")] + paths:
    try:
        os.open(path, os.O_RDONLY)
        print("opened", path)
    except OSError:
        pass
for path in paths:
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        print("connected", path)
    except OSError:
        pass
for pid in pids:
    try:
        print("listed", os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        pass
print("done")
"""


@pytest.mark.root
def test_other_users_of_the_machine_get_at_no_key_and_no_socket(
    server: Server, http: Session, box: str
) -> None:
    url = ticket_of(http, box)["connection_url"]
    pid = tunnels_pid(server)
    held = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    names = ["registry.db", "tunnels.lock"]
    paths = [server.run_dir / "keeper.sock", *(server.data_dir / name for name in names)]
    server.home.chmod(0o755)  # what is below it protects itself
    pids = ",".join(map(str, [pid, *server.keeper_pids(), *server.worker_pids()]))

    done = subprocess.run(
        ["/usr/bin/python3", "-c", PEEK, pids, *map(str, paths)],
        cwd="/",
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )

    assert done.stdout == "done\n", done.stderr
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in paths)
    assert not [name for name in held if "heyo" in name]
    assert url.encode() not in command_line(pid) + read_bytes(f"/proc/{pid}/environ")


# -- servers of others -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def no_http() -> Iterator[str]:
    """An API that speaks something else."""

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    client.recv(65536)
                    client.sendall(b"SSH-2.0-" + ESCAPE + b"OpenSSH\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("words", [["connect", "box", "-p", "0:80"], ["ssh-proxy", "box"]])
def test_an_api_that_speaks_no_http_is_told_in_a_line(no_http: str, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "heyvm.cli", *words, "--api-url", no_http],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 255
    assert done.stderr.startswith(b"heyvm: no API answers at http://127.0.0.1:")
    assert done.stderr.count(b"\n") == 1
    assert b"\x1b" not in done.stderr and b"\x07" not in done.stderr


MEETING = """
import socket, threading
from heyvm import sshclient
from heyvm.errors import HeyvmError
ours, theirs = socket.socketpair()
theirs.sendall(b"SSH-2.0-\\x1b[2J")
sshclient.ANSWER_S = 0.5
try:
    sshclient.open_shell(ours, command=None, terminal=None, identity=None)
except HeyvmError as error:
    print(error.detail)
"""


def test_a_server_that_says_half_a_word_is_told_in_a_line_and_leaves_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEETING],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.stdout.startswith("no shell: ") and done.stdout.rstrip("\n").isprintable()
    assert done.stderr == ""


# -- web pages -------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize(
    "header",
    [
        "Origin: http://evil.example",
        "Origin: null",
        "Origin: http://localhost.evil.example",
        "Origin: file://",
        "Host: evil.example",
        "Host: localhost.evil.example",
    ],
)
def test_no_page_of_others_opens_a_shell(server: Server, box: str, header: str) -> None:
    """Where there is no JWT_SECRET, and a browser is all that it takes."""
    with pytest.raises(Refused) as refused:
        connect(server.port, f"/sandboxes/{box}/shell-stream", header)
    assert refused.value.status in (400, 403, 421)


@pytest.mark.root
def test_what_a_client_calls_its_request_is_no_header_of_ours(server: Server, box: str) -> None:
    path = f"/sandboxes/{box}/shell-stream"
    with connect(server.port, path, "X-Request-Id: a\tb: c\x85d") as client:
        assert client.headers["x-request-id"].isprintable()
        assert set(client.headers) == {"upgrade", "connection", "sec-websocket-accept"} | {
            "x-request-id"
        }


@pytest.mark.root
def test_nobody_finds_a_session_by_trying(server: Server, box: str) -> None:
    with Shell.open(server.port, box) as shell:
        near = shell.id[:-1] + ("A" if shell.id[-1] != "A" else "B")
        for guess in (near, shell.id.swapcase(), "A" * 22, shell.id + "A"):
            with connect(server.port, f"/sandboxes/{box}/shell-stream") as client:
                client.say(type="init", sessionId=guess)
                assert any("session_expired" in str(one) for one in client.end())
        assert len(shell.id) >= 22
        shell.type("echo still he''re\n")
        shell.read_until(b"still here")
