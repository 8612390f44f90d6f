"""`heyvm connect` and `heyvm ssh-proxy`, as a user's terminal, a pipe and OpenSSH have them."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from heyvm.usertty import Escape, Escapes
from tests.seats import TIMEOUT_S, Seat
from tests.server import (
    OWN_SETTINGS,
    REPOSITORY,
    Server,
    Session,
    command_line,
    create,
    free_port,
    run,
    wait_until,
)

pytestmark = pytest.mark.root

SECRET = "a secret of at least thirty-two bytes"
HEYVM = [sys.executable, "-m", "heyvm.cli"]
BLOB = os.urandom(1_000_001)
# Says how much it has got when that has ended.
COUNTER = """
import socket, threading
def serve(sock):
    data = b""
    while piece := sock.recv(65536):
        data += piece
    sock.sendall(b"%d" % len(data))
    sock.close()
listener = socket.create_server(("127.0.0.1", 7000))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"""


@dataclass
class Place:
    """A sandbox of a server, and a ticket for it."""

    server: Server
    http: Session
    ref: str
    url: str

    def environ(self, **more: str) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)
        }
        own = {"PYTHONPATH": str(REPOSITORY), "TERM": "vt220", "HEYVM_CONNECTION_URL": self.url}
        own |= {"HEYVM_URL": self.server.url, "HEYVM_API_KEY": self.token}
        return {**kept, **own, **more}

    @property
    def token(self) -> str:
        return self.server.authorization()["Authorization"].removeprefix("Bearer ")

    def seat(self, *words: str, **options: Any) -> Seat:
        return Seat([*HEYVM, "connect", "--shell", *words], self.environ(), **options)

    def heyvm(self, *words: str, stdin: bytes = b"", **more: str) -> Any:
        return subprocess.run(
            [*HEYVM, *words],
            input=stdin,
            capture_output=True,
            env=self.environ(**more),
            timeout=3 * TIMEOUT_S,
        )

    def shell(self, *words: str, stdin: bytes = b"") -> Any:
        return self.heyvm("connect", "--shell", *words, stdin=stdin)

    def session(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post(f"/sandboxes/{self.ref}/shell-session", json=fields)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    @contextlib.contextmanager
    def port(self, *words: str, **more: str) -> Iterator[Port]:
        """`heyvm connect` with a local port, until it is left."""
        with subprocess.Popen(
            [*HEYVM, "connect", *words],
            env=self.environ(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                yield Port(process)
            finally:
                process.kill()


class Port:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        assert process.stdout is not None
        self.address = process.stdout.readline().decode().strip()
        assert self.address.startswith("127.0.0.1:"), process.stderr and process.stderr.read()

    def connect(self) -> socket.socket:
        host, _, port = self.address.partition(":")
        return socket.create_connection((host, int(port)), TIMEOUT_S)

    def end(self) -> str:
        """Ctrl-C; what it has said on stderr."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.stderr is not None
        assert self.process.wait(TIMEOUT_S) == 130
        return self.process.stderr.read().decode()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with Server(JWT_SECRET=SECRET) as server, server.http() as http:
        http.headers.update(server.authorization())
        ref = create(http, network="none")["id"]
        place = Place(server, http, ref, "")
        place.url = place.session()["connection_url"]
        run(http, ref, f"python3 -c {shlex.quote(COUNTER)} >/dev/null 2>&1 &")
        yield place


# -- a terminal -----------------------------------------------------------------------------------


def test_what_is_typed_at_once_reaches_the_shell_once(place: Place) -> None:
    with place.seat(typed=b"echo typed-$((6*7)) >> early; exit 7\n") as seat:
        assert seat.exit_code() == 7

    assert run(place.http, place.ref, "cat early; rm early")["output"] == "typed-42\n"


def test_a_shell_has_the_users_terminal(place: Place) -> None:
    with place.seat(size=(91, 33)) as seat:
        seat.wait_until_raw()
        seat.type(b"echo mark-$TERM\r")
        seat.until(b"mark-vt220\r\n")
        assert seat.shown.count(b"mark-$TERM") == 1  # echoed by the shell alone
        seat.type(b"stty size\r")
        seat.until(b"33 91\r\n")
        seat.resize(120, 40)
        seat.type(b"until [ \"$(stty size)\" = '40 120' ]; do sleep 0.01; done; echo re''sized\r")
        seat.until(b"resized\r\n")
        seat.type(b"sh -c 'echo slee\"\"ping; exec sleep 1000'\r")  # said when it has the terminal
        seat.until(b"sleeping\r\n")
        seat.type(b"\x03")
        seat.type(b"echo end-$?\r")
        seat.until(b"end-130\r\n")
        seat.type(b"~~.\x15")
        seat.type(b"kill -9 $$\r")
        assert seat.exit_code() == 128 + 9


def test_a_command_gets_a_terminal_where_it_asks_for_one(place: Place) -> None:
    with place.seat("-t", "--", "tty; read line; echo got $line; exit 4") as seat:
        seat.until(b"/dev/pts/")
        seat.type(b"this\r")
        seat.until(b"got this\r\n")
        assert seat.exit_code() == 4
    with place.seat("--", "tty; echo err >&2; exit 5") as seat:
        assert seat.exit_code() == 5
        assert b"not a tty\r\n" in seat.shown and b"err\r\n" in seat.shown


def test_an_escape_ends_the_connection(place: Place) -> None:
    with place.seat() as seat:
        seat.until(b"# ")
        seat.type(b"~?")
        seat.until(b"~.   end the connection\r\n")
        seat.type(b"\r~.")
        assert seat.exit_code() == 255
        assert seat.shown.endswith(b"heyvm: disconnected\r\n")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_a_terminal_that_works(place: Place, sign: int) -> None:
    with place.seat() as seat:
        seat.until(b"# ")
        seat.process.send_signal(sign)
        assert seat.exit_code() == 128 + sign


def test_ctrl_c_ends_it_while_nobody_answers(place: Place) -> None:
    with silent_url(place.url) as url:
        with Seat([*HEYVM, "connect", url, "--shell"], place.environ()) as seat:
            seat.wait_until_raw()
            began = time.monotonic()
            seat.type(b"ls\r\x03")
            assert seat.exit_code() == 130
            assert time.monotonic() - began < 3
            assert b"Traceback" not in seat.shown


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ([b"ls ~.\r"], [b"ls ~.\r"]),
        ([b"~", b"."], [Escape.DISCONNECT]),
        ([b"ls\r~.more"], [b"ls\r", Escape.DISCONNECT, b"more"]),
        ([b"\n~?~~x~."], [b"\n", Escape.HELP, b"~x~."]),
        ([b"~x\r", b"~\x1a"], [b"~x\r", Escape.SUSPEND]),
        ([b"~\r~."], [b"~\r", Escape.DISCONNECT]),
    ],
)
def test_escapes_are_found_after_a_newline_only(
    typed: list[bytes], found: list[bytes | Escape]
) -> None:
    escapes = Escapes()

    assert [piece for keys in typed for piece in escapes.take(keys)] == found


# -- pipes ----------------------------------------------------------------------------------------


def test_pipes_are_carried_byte_for_byte(place: Place) -> None:
    done = place.shell("--", "cat; echo error >&2; exit 3", stdin=BLOB)

    assert (done.returncode, done.stdout, done.stderr) == (3, BLOB, b"error\n")


def test_a_shell_reads_a_script_from_a_pipe(place: Place) -> None:
    done = place.heyvm(
        *("connect", "-", "--shell"),
        stdin=f"{place.url}\ntest -t 0 || echo no terminal\nexit 6\n".encode(),
        HEYVM_CONNECTION_URL="",
    )

    assert (done.returncode, done.stdout) == (6, b"no terminal\n")


def test_who_reads_no_more_ends_the_command(place: Place) -> None:
    line = shlex.join([*HEYVM, "connect", "--", "yes"])
    done = subprocess.run(
        ["bash", "-c", f"{line} </dev/null | head -n 1; exit $PIPESTATUS"],
        env=place.environ(),
        capture_output=True,
        timeout=TIMEOUT_S,
    )

    assert (done.returncode, done.stdout, done.stderr) == (141, b"y\n", b"")


def test_descriptors_that_are_closed_are_no_way_in(place: Place) -> None:
    line = shlex.join([*HEYVM, "connect", "--shell", "--", "cat; echo out; exit 3"])
    options: dict[str, Any] = {"env": place.environ(), "capture_output": True}
    done = subprocess.run(f"{line} <&-", shell=True, timeout=TIMEOUT_S, **options)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"")
    done = subprocess.run(f"{line} </dev/null >&-", shell=True, timeout=TIMEOUT_S, **options)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"")


# -- what is no way in ----------------------------------------------------------------------------


def test_what_is_no_ticket_is_told_in_a_line(place: Place) -> None:
    cases = {
        ("connect", "--shell", "heyo://"): "there is no ticket",
        ("connect", "--shell", "heyo://abc"): "short code",
        # It may be a secret, and is neither said again nor sent to the API.
        ("connect", "--shell", place.url.removeprefix("heyo://")): "neither a connection URL",
        ("connect", "--shell", "http://there"): "neither a connection URL",
        ("ssh-proxy", place.url[:-9]): "no ticket",
        ("connect", place.url[:-9]): "no ticket",
    }
    with ThreadPoolExecutor(3) as pool:
        for done, text in zip(pool.map(lambda one: place.heyvm(*one), cases), cases.values()):
            assert_told(done, text)


def assert_told(done: Any, text: str) -> None:
    """It has failed, for this reason, and says so in one line and nothing else."""
    assert done.returncode == 255
    assert text in done.stderr.decode() and done.stderr.count(b"\n") == 1, done.stderr
    assert done.stdout == b""


@contextlib.contextmanager
def silent_url(url: str) -> Iterator[str]:
    """A ticket for a port on which somebody is, and says nothing."""
    iroh = pytest.importorskip("iroh")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        address = iroh.EndpointTicket.from_string(url.removeprefix("heyo://")).endpoint_addr()
        there = f"127.0.0.1:{silent.getsockname()[1]}"
        moved = iroh.EndpointAddr(address.id(), None, [there])
        yield f"heyo://{iroh.EndpointTicket.from_addr(moved)}"


# -- a sandbox by its name ------------------------------------------------------------------------


def test_a_sandboxs_name_is_enough(place: Place) -> None:
    before = place.http.get(f"/sandboxes/{place.ref}/shell-session").json()

    done = place.shell(place.ref, "--", "echo here")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"here\n", b"")
    with place.port(place.ref, "--to", "7000") as port, port.connect() as sock:
        sock.sendall(b"four")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(9) == b"4"
        port.end()

    assert place.http.get(f"/sandboxes/{place.ref}/shell-session").json() == before


def test_an_api_that_says_no_is_quoted(place: Place) -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    cases = [
        (place.shell("no-such"), "no-such"),
        (place.shell("no-such", "--api-url", closed), f"no API answers at {closed}"),
        (place.heyvm("ssh-proxy", place.ref, HEYVM_API_KEY=""), "asks for a token"),
        (place.heyvm("ssh-proxy", place.ref, HEYVM_API_KEY="wrong"), "does not take this token"),
        (place.heyvm("ssh-proxy", place.ref, "--token-file", "/none"), "/none"),
        (place.heyvm("connect", place.ref), "say which port inside"),
        (place.heyvm("connect", "-p", "0:7000"), "the ticket says which port"),
        (place.heyvm("connect", "--shell", HEYVM_CONNECTION_URL=""), "say what to connect to"),
    ]

    for done, text in cases:
        assert_told(done, text)


def test_a_session_for_a_key_takes_that_key_alone(place: Place, tmp_path: Path) -> None:
    for name in ("right", "wrong"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(make, check=True)
    public = (tmp_path / "right.pub").read_text().strip()
    words = ("connect", place.session(ssh_public_keys=[public])["connection_url"], "--shell")
    alone = {"HOME": str(tmp_path), "SSH_AUTH_SOCK": ""}

    assert_told(place.heyvm(*words, **alone), "-i FILE")
    assert_told(place.heyvm(*words, "-i", str(tmp_path / "wrong"), **alone), "does not know")
    done = place.heyvm(*words, "-i", str(tmp_path / "right"), stdin=b"echo in", **alone)
    assert (done.returncode, done.stdout) == (0, b"in\n")


# -- a port ---------------------------------------------------------------------------------------


def test_a_local_port_carries_each_connection_to_its_end(place: Place) -> None:
    tunnel = place.http.post(f"/sandboxes/{place.ref}/tcp-tunnel", json={"port": 7000}).json()
    with place.port(tunnel["connection_url"], "-p", "0") as port:
        socks = [port.connect() for _ in range(20)]
        for number, sock in enumerate(socks):
            sock.sendall(b"x" * number * 1000)
            sock.shutdown(socket.SHUT_WR)
        assert [sock.recv(9) for sock in socks] == [b"%d" % (n * 1000) for n in range(20)]
        for sock in socks:
            sock.close()
        assert port.end() == f"heyvm: {port.address} leads into the sandbox; Ctrl-C ends it\n"


def test_a_local_port_ends_with_its_ticket(place: Place) -> None:
    path = f"/sandboxes/{place.ref}/tcp-tunnel"
    made = place.http.post(path, json={"port": 7002}).json()
    with place.port(f' "{made["connection_url"]}"', "-p", "0") as port:
        told = place.shell(made["connection_url"])
        assert place.http.delete(f"{path}/{made['tunnel_id']}").status_code == 204
        assert port.process.wait(TIMEOUT_S) == 255
        assert port.process.stderr is not None
        assert b"the ticket has expired or was deleted" in port.process.stderr.read()
    assert_told(told, "the ticket of a TCP tunnel is for")


def test_a_command_line_that_says_two_things_is_refused(place: Place) -> None:
    cases = {
        ("connect", "x", "uname"): "a command comes behind --",
        ("connect", "x", "--to", "80", "--", "ls"): "exclude each other",
        ("ssh-proxy", "x", "--", "ls"): "it runs no command",
    }
    for words, text in cases.items():
        done = place.heyvm(*words)
        assert done.returncode == 2
        assert f"usage: heyvm {words[0]}" in done.stderr.decode() and text in done.stderr.decode()


def test_a_local_port_that_leads_to_no_server_resets_who_connects_and_says_why(
    place: Place,
) -> None:
    with place.port(place.ref, "-p", "0:7001") as port:
        for _ in range(2):
            with port.connect() as sock, pytest.raises(ConnectionResetError):
                sock.recv(9)
        assert port.end().count("heyvm: nobody listens on that port inside (yet)\n") == 2


# -- ends -----------------------------------------------------------------------------------------


def test_a_ticket_that_is_deleted_ends_its_shell_at_once(place: Place) -> None:
    session = place.session()
    with place.seat(session["connection_url"]) as seat:
        seat.until(b"# ")
        began = time.monotonic()
        place.http.delete(f"/sandboxes/{place.ref}/shell-session/{session['session_id']}")
        assert seat.exit_code() == 255
        assert time.monotonic() - began < 5
        assert b"expired or was deleted" in seat.shown.splitlines()[-1]


def test_a_shell_is_told_that_its_sandbox_was_stopped(place: Place) -> None:
    ref = create(place.http, network="none")["id"]
    with place.seat(ref) as seat, place.port(ref, "-p", "0:7000") as port:
        seat.until(b"# ")
        assert place.http.post(f"/sandboxes/{ref}/stop").status_code == 200
        assert seat.exit_code() == 129
        assert b"is stop" in seat.shown.splitlines()[-1]
        with port.connect() as sock, pytest.raises(ConnectionResetError):
            sock.recv(9)
        assert "the sandbox does not run" in port.end()
    place.http.delete(f"/sandboxes/{ref}")


def test_a_ticket_that_is_deleted_ends_ssh_proxy(place: Place) -> None:
    session = place.session()
    with subprocess.Popen(
        [*HEYVM, "ssh-proxy", session["connection_url"]],
        env=place.environ(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as proxy:
        assert proxy.stdout is not None and proxy.stderr is not None
        assert proxy.stdout.readline().startswith(b"SSH-2.0-")
        place.http.delete(f"/sandboxes/{place.ref}/shell-session/{session['session_id']}")
        assert proxy.wait(5) == 255
        assert b"expired or was deleted" in proxy.stderr.read()


def test_a_keeper_that_is_killed_is_told_and_its_tickets_work_again(place: Place) -> None:
    tunnel = place.http.post(f"/sandboxes/{place.ref}/tcp-tunnel", json={"port": 7000}).json()
    with place.port(tunnel["connection_url"]) as port, place.seat() as seat:
        with port.connect() as sock:
            seat.until(b"# ")
            (keeper,) = place.server.keeper_pids()
            os.kill(keeper, signal.SIGKILL)
            assert seat.exit_code() == 255
            assert seat.shown.splitlines()[-1].startswith(b"heyvm: the connection is ")
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(9) == b""

        wait_until(lambda: place.shell("--", "true").returncode == 0, "the ticket works again")
        with port.connect() as sock:
            sock.sendall(b"again")
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(9) == b"5"
        assert port.end().count("dialling again") == 1


def test_a_server_that_falls_silent_is_told_within_ten_seconds(place: Place) -> None:
    gone = place.session()
    place.http.delete(f"/sandboxes/{place.ref}/shell-session/{gone['session_id']}")
    with place.seat() as seat, ThreadPoolExecutor(3) as pool:
        seat.until(b"# ")
        (tunnels,) = tunnel_pids(place.server)
        os.kill(tunnels, signal.SIGSTOP)
        try:
            began = time.monotonic()
            words = [("--shell",), ("--shell", gone["connection_url"])]
            others = [pool.submit(place.heyvm, "connect", *one) for one in words]
            others += [pool.submit(place.heyvm, "ssh-proxy")]
            assert seat.exit_code() == 255
            assert b"does not answer any more" in seat.shown.splitlines()[-1]
            for other in others:
                assert_told(other.result(), "nobody answers at this ticket")
            assert time.monotonic() - began < 15
        finally:
            os.kill(tunnels, signal.SIGCONT)


def tunnel_pids(server: Server) -> list[int]:
    ours = server.server_pids()
    return [pid for pid in ours if b"heyvm.tunnels" in command_line(pid)]


# -- OpenSSH --------------------------------------------------------------------------------------


class OpenSsh:
    """Debian's client behind `heyvm ssh-proxy`; `sandbox` is its host."""

    def __init__(self, place: Place, home: Path) -> None:
        self.environ = place.environ(HEYVM_CONNECTION_URL="")
        self.config = home / "config"
        (home / "known").write_text(f"sandbox {place.session()['ssh_host_key']}\n")
        self.config.write_text(
            f"Host sandbox\n ProxyCommand {shlex.join([*HEYVM, 'ssh-proxy', place.ref])}\n"
            f" UserKnownHostsFile {home}/known\n StrictHostKeyChecking yes\n"
            f" BatchMode yes\n IdentityAgent none\n ControlPath {home}/master\n"
        )

    def run(self, program: str, *words: str, stdin: bytes = b"") -> bytes:
        """What it prints; it must succeed."""
        done = subprocess.run(
            [program, *words],
            input=stdin,
            capture_output=True,
            env=self.environ,
            timeout=3 * TIMEOUT_S,
        )
        assert done.returncode == 0, done
        return done.stdout

    def ssh(self, *words: str, stdin: bytes = b"") -> bytes:
        return self.run("ssh", "-F", str(self.config), *words, stdin=stdin)


@pytest.fixture
def openssh(place: Place) -> Iterator[OpenSsh]:
    with tempfile.TemporaryDirectory(prefix="hv-") as home:
        yield OpenSsh(place, Path(home))


def test_openssh_runs_commands_and_leaves_no_session(place: Place, openssh: OpenSsh) -> None:
    before = place.http.get(f"/sandboxes/{place.ref}/shell-session").json()

    assert openssh.ssh("sandbox", "cat", stdin=BLOB) == BLOB
    failed = subprocess.run(
        ["ssh", "-F", openssh.config, "sandbox", "echo no >&2; exit 9"],
        capture_output=True,
        env=openssh.environ,
        timeout=TIMEOUT_S,
    )

    assert (failed.returncode, failed.stderr) == (9, b"no\n")
    wait_until(
        lambda: place.http.get(f"/sandboxes/{place.ref}/shell-session").json() == before,
        "ssh-proxy has deleted its sessions",
    )


def test_openssh_copies_files(openssh: OpenSsh) -> None:
    home, here, there = openssh.config.parent, str(openssh.config.parent / "blob"), "/tmp/blob"
    Path(here).write_bytes(BLOB)

    openssh.run("scp", "-q", "-F", str(openssh.config), here, f"sandbox:{there}")
    assert openssh.ssh("sandbox", f"cat {there}") == BLOB
    batch = f"get {there} {here}.sftp\nrm {there}\n".encode()
    openssh.run("sftp", "-q", "-F", str(openssh.config), "-b", "-", "sandbox", stdin=batch)
    assert (home / "blob.sftp").read_bytes() == BLOB

    ssh = shlex.join(["ssh", "-F", str(openssh.config)])
    openssh.run("rsync", "-e", ssh, "-a", here, "sandbox:/tmp/copied")
    openssh.run("rsync", "-e", ssh, "-a", "sandbox:/tmp/copied", f"{here}.rsync")
    assert (home / "blob.rsync").read_bytes() == BLOB


def test_an_editors_way_in(openssh: OpenSsh) -> None:
    """VS Code's: one connection, on which it starts a server and then forwards a port to it."""
    home, port = openssh.config.parent, free_port()
    control = ["-F", str(openssh.config), "-oControlMaster=yes", "-oControlPersist=yes"]
    with subprocess.Popen(
        ["ssh", *control, "-N", f"-L127.0.0.1:{port}:127.0.0.1:7100", "sandbox"],
        env=openssh.environ,
    ) as master:
        try:
            wait_until((home / "master").exists, "ssh is connected")
            start = "nohup python3 -m http.server -b 127.0.0.1 7100 >/dev/null 2>&1 & echo $!"
            pid = openssh.ssh("sandbox", f"cd /etc; {start}").decode()
            wait_until(lambda: is_served(f"http://127.0.0.1:{port}/hostname"), "it is served")
            openssh.ssh("sandbox", f"kill {pid}")
        finally:
            openssh.ssh("-O", "exit", "sandbox")
            master.wait(TIMEOUT_S)


def is_served(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(url, timeout=5).ok
    return False
