"""The SSH server of a sandbox: Debian's OpenSSH against it, and clients that mean harm."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import logging
import os
import pty
import select
import shlex
import signal
import socket
import struct
import subprocess
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest
import requests
from paramiko.auth_handler import AuthHandler
from paramiko.common import (
    MSG_KEXINIT,
    cMSG_CHANNEL_OPEN,
    cMSG_CHANNEL_REQUEST,
    cMSG_EXT_INFO,
    cMSG_KEXINIT,
    cMSG_USERAUTH_INFO_RESPONSE,
)
from paramiko.message import Message
from paramiko.packet import Packetizer

from heyvm import ssh, sshwire
from heyvm.errors import Conflict, Invalid
from heyvm.models import Status
from heyvm.shells import Inside
from heyvm.sshkeys import parse_public_key
from tests.boxes import Box, Boxes
from tests.server import wait_until

pytestmark = pytest.mark.root

SEED = b"s" * 32
ALIAS = "sandbox"  # what known_hosts calls the server
TIMEOUT_S = 20.0
BLOB = os.urandom(3_000_001)


class Door:
    """A TCP listener on loopback with `ssh.serve` behind it, and OpenSSH's client."""

    def __init__(self, inside: Callable[[], Inside], **options: Any) -> None:
        self.inside, self.options = inside, options
        self.home = Path(tempfile.mkdtemp(prefix="hv-ssh-"))
        self.stop = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.serving: list[threading.Thread] = []
        self.faults: list[BaseException] = []
        (self.home / "known").write_text(f"{ALIAS} {ssh.public_line(SEED)}\n")
        self.accepting = threading.Thread(target=self._accept)
        self.accepting.start()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                sock, _ = self.listener.accept()
                thread = threading.Thread(target=self._serve, args=(sock,))
                thread.start()
                self.serving.append(thread)
                continue
            return

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                ssh.serve(sock, self.inside, host_key=SEED, stop=self.stop, **self.options)
            except BaseException as error:
                self.faults.append(error)

    def close(self) -> float:
        """Stop everything; the seconds that it took. Fails where something raised."""
        began = time.monotonic()
        self.stop.set()
        for thread in self.serving:
            thread.join(TIMEOUT_S)
        took = time.monotonic() - began
        self.listener.shutdown(socket.SHUT_RDWR)
        self.accepting.join(TIMEOUT_S)
        self.listener.close()
        subprocess.run(["rm", "-rf", self.home], check=True)
        assert not [thread for thread in self.serving if thread.is_alive()]
        assert self.faults == []
        return took

    def is_idle(self) -> bool:
        """No connection is open."""
        return not any(thread.is_alive() for thread in self.serving)

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    # -- OpenSSH -------------------------------------------------------------------------------

    @property
    def options_of_ssh(self) -> list[str]:
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": self.home / "known",
            "HostKeyAlias": ALIAS,
            "LogLevel": "INFO",
            "IdentityAgent": "none",
            "Port": self.port,
        }
        return ["-F", "/dev/null", *(f"-o{name}={value}" for name, value in options.items())]

    def command(self, *args: str) -> list[str]:
        """`args`: further options, then the command after `HOST`."""
        at = args.index("HOST") if "HOST" in args else len(args)
        return ["ssh", *self.options_of_ssh, *args[:at], "any@127.0.0.1", *args[at + 1 :]]

    def ssh(self, *args: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
        options = {"input": b"", "capture_output": True, "timeout": TIMEOUT_S} | more
        return subprocess.run(self.command(*args), **options)

    @contextlib.contextmanager
    def start(self, *args: str) -> Iterator[subprocess.Popen[bytes]]:
        """A client, which is killed in the end."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(self.command(*args), **pipes) as client:  # type: ignore[call-overload]
            try:
                yield client
            finally:
                client.kill()

    def output(self, *args: str, **more: Any) -> str:
        """What a command prints, which must succeed."""
        done = self.ssh(*args, **more)
        assert done.returncode == 0, done
        return str(done.stdout.decode())

    # -- a client that says what it likes ------------------------------------------------------

    @contextlib.contextmanager
    def client(self) -> Iterator[paramiko.Transport]:
        with self.connect() as sock, contextlib.closing(paramiko.Transport(sock)) as transport:
            transport.start_client(timeout=TIMEOUT_S)
            transport.auth_none("any")
            # paramiko closes a channel that nobody holds.
            held = transport.held = []  # type: ignore[attr-defined]
            opens = transport.open_session
            transport.open_session = lambda **more: held.append(opens(**more)) or held[-1]  # type: ignore[method-assign]
            yield transport
            transport.close()
            transport.join(TIMEOUT_S)


class Here:
    """What `Inside` wants of a lifecycle."""

    def __init__(self, boxes: Boxes) -> None:
        self._boxes = boxes

    def backend_of(self, _: object) -> Any:
        return self._boxes.backend


@pytest.fixture(scope="module")
def boxes() -> Iterator[Boxes]:
    with Boxes() as made:
        yield made


@pytest.fixture(scope="module")
def box(boxes: Boxes) -> Box:
    started = boxes.start()
    started.output("mkdir -p /workspace")
    return started


@pytest.fixture(scope="module")
def inside(box: Box, boxes: Boxes) -> Callable[[], Inside]:
    return lambda: Inside(box.sandbox, Here(boxes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared(inside: Callable[[], Inside]) -> Iterator[Door]:
    """One door for the tests that do it no harm."""
    with Door(inside) as made:
        yield made


@pytest.fixture
def door(inside: Callable[[], Inside], box: Box) -> Iterator[Door]:
    """A door of its own. Nothing is left of what came in by it: threads, files, processes."""
    before = (files(), box.output(PROCESSES))
    with Door(inside) as made:
        yield made
    wait_until(lambda: not strays(), "its threads have ended", timeout=5)
    assert len(files()) <= len(before[0])
    wait_until(lambda: box.output(PROCESSES) == before[1], "its processes have ended", timeout=5)


PROCESSES = "ls /proc | grep -c '^[0-9]'"


def files() -> list[str]:
    return os.listdir("/proc/self/fd")


def strays() -> list[threading.Thread]:
    """Threads of an SSH connection."""
    return [one for one in threading.enumerate() if isinstance(one, sshwire.Line | ssh.Job)]


@contextlib.contextmanager
def quiet() -> Iterator[list[logging.LogRecord]]:
    """All that is logged meanwhile, by anybody."""
    seen: list[logging.LogRecord] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    ear = Ear()
    logging.getLogger().addHandler(ear)
    try:
        yield seen
    finally:
        logging.getLogger().removeHandler(ear)


# -- commands --------------------------------------------------------------------------------------


def test_a_command_has_an_input_two_outputs_and_an_exit_code(shared: Door) -> None:
    done = shared.ssh("HOST", "echo out; echo err >&2; cat; exit 7", input=b"typed")

    assert (done.stdout, done.stderr, done.returncode) == (b"out\ntyped", b"err\n", 7)


def test_bytes_go_through_as_they_are_and_each_way_has_its_own_end(shared: Door) -> None:
    assert shared.ssh("HOST", "cat", input=BLOB).stdout == BLOB

    counted = shared.output("HOST", "wc -c; sleep 0.1; echo after", input=BLOB)

    assert counted.split() == [str(len(BLOB)), "after"]


def test_a_death_by_a_signal_is_128_and_its_number(shared: Door) -> None:
    assert shared.ssh("HOST", "kill -9 $$").returncode == 137


def test_a_command_sees_what_execute_shows_it_and_the_clients_variables(shared: Door) -> None:
    done = shared.output("-oSetEnv=GREETING=hello", "HOST", 'echo "$GREETING $PWD $USER-$(id -u)"')

    assert done == "hello /workspace -0\n" or done == "hello /workspace root-0\n"


def test_without_a_command_and_a_terminal_a_login_shell_reads(shared: Door) -> None:
    done = shared.output("-T", input=b"shopt -q login_shell && echo login\nexit 0\n")

    assert done == "login\n"


def test_a_client_that_goes_away_takes_its_commands_with_it(door: Door, box: Box) -> None:
    with door.start("HOST", "sh -c 'sleep 4711 & echo $$; wait'") as client:
        assert client.stdout is not None and client.stdout.readline()
        assert box.run("pgrep -xf 'sleep 4711'").exit_code == 0
        client.kill()

    wait_until(lambda: box.run("pgrep -xf 'sleep 4711'").exit_code == 1, "the command has ended")


def test_a_command_that_does_not_read_ends_with_its_client(door: Door, box: Box) -> None:
    with door.start("HOST", "echo here; exec sleep 4712") as client:
        assert client.stdout is not None and client.stdin is not None
        assert client.stdout.readline() == b"here\n"
        stuff(client.stdin.fileno())
        client.kill()

    wait_until(lambda: box.run("pgrep -xf 'sleep 4712'").exit_code == 1, "the command has ended")


def stuff(fd: int) -> int:
    """Write until nothing has gone in for half a second; how much has."""
    os.set_blocking(fd, False)
    written = 0
    while select.select([], [fd], [], 0.5)[1]:
        with contextlib.suppress(BlockingIOError):
            written += os.write(fd, bytes(1 << 16))
    return written


def test_errors_are_told_in_words_and_as_255(boxes: Boxes, box: Box) -> None:
    def stopped() -> Inside:
        raise Conflict("sandbox 'x\x1b' is stopped: start it first")

    with Door(stopped) as door:
        plain = door.ssh("HOST", "true")
        shell = door.ssh("-tt")
        port = door.ssh("-W", "localhost:80")

    assert plain.stderr == b"heyvm: sandbox 'x?' is stopped: start it first\n"
    assert plain.returncode == shell.returncode == 255
    assert shell.stderr.startswith(plain.stderr.replace(b"\n", b"\r\n"))
    assert b"is stopped" in port.stderr


def test_what_cannot_be_run_is_told(boxes: Boxes, box: Box) -> None:
    lost = dataclasses.replace(box.sandbox, working_directory="/nowhere")
    with Door(lambda: Inside(lost, Here(boxes))) as door:  # type: ignore[arg-type]
        done = [door.ssh("HOST", "true"), door.ssh("-tt", "HOST", "true")]

    assert [one.returncode for one in done] == [255, 255]
    assert all(b"/nowhere" in one.stderr for one in done)


# -- terminals -------------------------------------------------------------------------------------


class Screen:
    """A user's terminal with a client of `ssh` in it."""

    def __init__(self, command: list[str], cols: int = 91, rows: int = 37) -> None:
        self.master, slave = pty.openpty()
        self.resize(cols, rows)
        self.seen = b""
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=lambda: take_terminal(),
            env={**os.environ, "TERM": "screen-256color"},
        )
        os.close(slave)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def resize(self, cols: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, needle: str) -> str:
        """What came up to this, and it."""
        end = time.monotonic() + TIMEOUT_S
        while needle.encode() not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.master, 1 << 16)
        found, _, self.seen = self.seen.partition(needle.encode())
        return found.decode(errors="replace") + needle


def take_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_has_its_size_its_signals_and_its_exit_code(shared: Door) -> None:
    with Screen(shared.command("-tt")) as screen:
        screen.type("stty size; echo $TERM; tty\n")
        screen.wait_for("37 91")
        screen.wait_for("screen-256color")
        screen.wait_for("/dev/pts/")
        screen.resize(120, 50)
        screen.process.send_signal(signal.SIGWINCH)
        screen.type("while [ \"$(stty size)\" != '50 120' ]; do :; done; echo re''sized\n")
        screen.wait_for("resized")
        screen.type("sh -c 'echo go\"\"ing; exec sleep 100'\n")
        screen.wait_for("going")
        screen.type("\x03")
        screen.wait_for("^C")
        screen.type("echo code $?; exit 9\n")
        screen.wait_for("code 130")
        # A terminal that nobody reads would keep ssh from leaving it.
        screen.wait_for("closed.")
        assert screen.process.wait(TIMEOUT_S) == 9


def test_a_command_may_have_a_terminal(shared: Door) -> None:
    done = shared.ssh("-tt", "HOST", "test -t 0 && test -t 1 && echo yes; exit 3")

    assert (done.stdout, done.returncode) == (b"yes\r\n", 3)


def test_what_is_typed_before_the_shell_answers_is_not_lost(shared: Door) -> None:
    done = shared.ssh("-tt", input=b"echo ea''rly; exit 4\n")

    assert b"early\r\n" in done.stdout
    assert done.returncode == 4


def test_a_storm_of_sizes_holds_nobody_up(door: Door) -> None:
    with door.client() as client:
        channel = client.open_session()
        channel.get_pty(width=80, height=24)
        channel.exec_command("read line; stty size")
        for cols in range(2000):
            channel.resize_pty(width=cols, height=cols % 7)
        channel.resize_pty(width=132, height=43)
        channel.sendall(b"\n")

        said = b"".join(iter(lambda: channel.recv(1 << 16), b""))

    assert b"43 132" in said


# -- ports -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web(box: Box) -> Iterator[int]:
    """A port inside where files of /usr/share are served, on localhost alone."""
    made = box.output(
        "cd /usr/share/doc; python3 -u -m http.server --bind 127.0.0.1 0"
        " >/tmp/web 2>&1 & for i in $(seq 100); do grep -o 'port [0-9]*' /tmp/web && break;"
        " sleep 0.05; done"
    )
    yield int(made.split()[1])
    box.run("pkill -f http.server")


def test_a_port_inside_is_reached_by_forwarding(shared: Door, web: int) -> None:
    with forwarded(shared, f"localhost:{web}") as port:
        assert requests.get(f"http://127.0.0.1:{port}/", timeout=TIMEOUT_S).ok


@contextlib.contextmanager
def forwarded(door: Door, target: str) -> Iterator[int]:
    """`ssh -L` to it, and the local port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with door.start("-N", "-L", f"127.0.0.1:{port}:{target}"):
        wait_until(lambda: listens(port), "ssh listens")
        yield port


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_sandboxs_own_name_is_the_sandbox(shared: Door, box: Box, web: int) -> None:
    request = b"GET / HTTP/1.0\r\n\r\n"
    for name in ("127.0.0.1", "[::1]", box.sandbox.slug):
        done = shared.ssh("-W", f"{name}:{web}", input=request)
        assert done.stdout.startswith(b"HTTP/1.0 200"), done


def test_nothing_else_is_reached_by_forwarding(shared: Door) -> None:
    elsewhere = shared.ssh("-W", "example.com:80")
    nobody = shared.ssh("-W", "localhost:1")

    assert b"forward to localhost, not to 'example.com'" in elsewhere.stderr
    assert b"port 1" in nobody.stderr
    assert elsewhere.returncode == nobody.returncode == 255


def test_nothing_is_forwarded_back(shared: Door, tmp_path: Path) -> None:
    back = shared.ssh("-oExitOnForwardFailure=yes", "-R", "0:localhost:1", "HOST", "true")
    agent = shared.output("-A", "HOST", 'echo "[$SSH_AUTH_SOCK][$DISPLAY]"')

    assert back.returncode == 255
    assert agent == "[][]\n"


def test_sockets_with_names_are_not_reached(shared: Door) -> None:
    with forwarded(shared, "/run/some.sock") as port, pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/", timeout=TIMEOUT_S)


def test_several_channels_share_a_connection(door: Door, web: int) -> None:
    control = f"-oControlPath={door.home}/control"
    with door.start("-MN", control), contextlib.ExitStack() as stack:
        wait_until((door.home / "control").exists, "the master listens")
        lines = [f"sleep 0.2; echo {n}" for n in range(8)]
        clients = [stack.enter_context(door.start(control, "HOST", line)) for line in lines]
        said = [client.communicate(timeout=TIMEOUT_S)[0] for client in clients]
        done = door.ssh(control, "-W", f"localhost:{web}", input=b"GET / HTTP/1.0\r\n\r\n")
        assert len(door.serving) == 1

    assert said == [b"%d\n" % n for n in range(8)]
    assert done.stdout.startswith(b"HTTP/1.0 200")


def test_vs_codes_way_of_connecting_works(shared: Door) -> None:
    """A script on stdin starts a server that stays, and says where; then its port is forwarded."""
    script = b"""
        nohup python3 -u -m http.server --bind 127.0.0.1 0 >/tmp/code 2>&1 </dev/null &
        echo pid=$!
        while ! grep -q port /tmp/code; do sleep 0.05; done
        grep -o 'port [0-9]*' /tmp/code
    """
    said = dict(
        line.replace("=", " ").split()
        for line in shared.output("-T", "HOST", "bash", input=script).splitlines()
    )
    try:
        with forwarded(shared, f"localhost:{said['port']}") as port:
            assert requests.get(f"http://127.0.0.1:{port}/", timeout=TIMEOUT_S).ok
    finally:
        shared.ssh("HOST", f"kill {said['pid']}")


# -- files -----------------------------------------------------------------------------------------


def test_rsync_goes_both_ways(shared: Door, tmp_path: Path) -> None:
    sent, back = tmp_path / "sent", tmp_path / "back"
    sent.mkdir()
    (sent / "blob").write_bytes(BLOB)
    (sent / "ä b").write_text("x")
    through = ["rsync", "-a", "-e", shlex.join(["ssh", *shared.options_of_ssh])]

    for way in ([f"{sent}/", "any@127.0.0.1:/tmp/rsynced/"], ["any@127.0.0.1:/tmp/rsynced/", back]):
        subprocess.run([*through, *way], check=True, timeout=TIMEOUT_S)

    assert {path.name: path.read_bytes() for path in back.iterdir()} == {"blob": BLOB, "ä b": b"x"}


@pytest.mark.parametrize("protocol", ["-O", "-s"])
def test_scp_copies_both_ways(shared: Door, tmp_path: Path, protocol: str) -> None:
    (tmp_path / "sent").write_bytes(BLOB)
    scp = ["scp", protocol, "-q", *shared.options_of_ssh]
    there = f"any@127.0.0.1:/tmp/scp{protocol}"

    subprocess.run([*scp, tmp_path / "sent", there], check=True, timeout=TIMEOUT_S)
    subprocess.run([*scp, there, tmp_path / "back"], check=True, timeout=TIMEOUT_S)

    assert (tmp_path / "back").read_bytes() == BLOB


def test_sftp_lists_and_moves(shared: Door, tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(b"moved")
    batch = (
        f"mkdir /tmp/sf\nput {tmp_path}/sent /tmp/sf/a\nrename /tmp/sf/a /tmp/sf/b\nls -l /tmp/sf\n"
    )
    sftp = ["sftp", "-b", "-", *shared.options_of_ssh, "any@127.0.0.1"]

    done = subprocess.run(sftp, input=batch.encode(), capture_output=True, timeout=TIMEOUT_S)

    assert done.returncode == 0, done
    assert b"/tmp/sf/b" in done.stdout
    assert shared.output("HOST", "cat /tmp/sf/b") == "moved"


# -- keys ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Key pairs as ssh-keygen makes them."""
    home = tmp_path_factory.mktemp("keys")
    kinds = {"ed25519": [], "ecdsa": [], "rsa": ["-b", "2048"], "other": []}
    for name, more in kinds.items():
        kind = "ed25519" if name == "other" else name
        told = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", f"{name} of nobody's", *more]
        subprocess.run([*told, "-f", home / name], check=True)
    return {name: home / name for name in kinds}


def line_of(key: Path) -> str:
    return key.with_suffix(".pub").read_text()


def test_with_keys_only_these_come_in(inside: Callable[[], Inside], keys: dict[str, Path]) -> None:
    allowed = [line_of(keys[name]) for name in ("ed25519", "ecdsa", "rsa")]
    only = "-oIdentitiesOnly=yes"
    with Door(inside, authorized=allowed) as door:
        for name in ("ed25519", "ecdsa", "rsa"):
            assert door.output(only, "-i", str(keys[name]), "HOST", "echo in") == "in\n"
        # A stranger's key first does not spoil the right one.
        both = ["-i", str(keys["other"]), "-i", str(keys["rsa"])]
        assert door.output(only, *both, "HOST", "echo in") == "in\n"
        refused = [
            door.ssh(only, "-i", str(keys["other"]), "HOST", "echo in"),
            door.ssh("-oPubkeyAuthentication=no", "HOST", "echo in"),
            door.ssh(only, "-oPubkeyAcceptedAlgorithms=ssh-rsa", "-i", str(keys["rsa"]), "HOST"),
        ]

    assert [(done.returncode, done.stdout) for done in refused] == [(255, b"")] * 3
    assert b"Permission denied (publickey)" in refused[0].stderr


def test_passwords_are_refused_and_attempts_counted(
    inside: Callable[[], Inside], keys: dict[str, Path]
) -> None:
    with Door(inside, authorized=[line_of(keys["rsa"])]) as door, door.connect() as sock:
        with contextlib.closing(paramiko.Transport(sock)) as client:
            client.start_client(timeout=TIMEOUT_S)
            for attempt in range(sshwire.MAX_ATTEMPTS):
                with pytest.raises(paramiko.SSHException):
                    client.auth_password("any", f"{attempt}", fallback=False)
            client.join(TIMEOUT_S)
            assert not client.is_active()


def test_a_key_that_cannot_be_parsed_stops_the_server_not_the_guard(
    inside: Callable[[], Inside],
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(Invalid):
        ssh.serve(ours, inside, host_key=SEED, authorized=["ssh-ed25519 nonsense"])


def test_the_lines_of_ssh_keygen_are_keys(keys: dict[str, Path]) -> None:
    for key in keys.values():
        blob = base64.b64decode(line_of(key).split()[1])
        assert parse_public_key(line_of(key)) == blob
        assert parse_public_key(" ".join(line_of(key).split()[:2])) == blob
    assert parse_public_key(ssh.public_line(SEED))


def test_the_host_key_is_that_of_its_seed(keys: dict[str, Path]) -> None:
    assert ssh.public_line(SEED) == ssh.public_line(SEED) != ssh.public_line(b"t" * 32)


def fields(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def line(kind: str, *parts: bytes) -> str:
    return f"{kind} {base64.b64encode(fields(*parts)).decode()}"


GOOD = line("ssh-ed25519", b"ssh-ed25519", b"k" * 32)
EXPONENT = b"\1\0\1"
WRONG_LINES = {
    "nothing": "",
    "blank": " \n ",
    "two lines": f"{GOOD}\n{GOOD}",
    "a NUL": f"{GOOD} \0",
    "too long": GOOD + " " + "c" * 8192,
    "no type": GOOD.split()[1],
    "no key": "ssh-ed25519",
    "no base64": "ssh-ed25519 ####",
    "not ASCII": "ssh-ed25519 äöü",
    "an option": f'command="id" {GOOD}',
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "a type of no use": line("ssh-dss", b"ssh-dss", b"k" * 32),
    "another type inside": line("ssh-ed25519", b"ssh-rsa", b"k" * 32),
    "a short key": line("ssh-ed25519", b"ssh-ed25519", b"k" * 31),
    "something behind": line("ssh-ed25519", b"ssh-ed25519", b"k" * 32, b""),
    "cut off": f"ssh-ed25519 {base64.b64encode(fields(b'ssh-ed25519', b'k' * 32)[:-1]).decode()}",
    "another curve": line("ecdsa-sha2-nistp256", b"ecdsa-sha2-nistp256", b"nistp384", b"\4" * 65),
    "no point": line("ecdsa-sha2-nistp256", b"ecdsa-sha2-nistp256", b"nistp256", b"\2" * 65),
    "a weak RSA key": line("ssh-rsa", b"ssh-rsa", EXPONENT, b"\0" + b"\xff" * 128),
    "a giant RSA key": line("ssh-rsa", b"ssh-rsa", EXPONENT, b"\0" + b"\xff" * 4096),
    "a giant exponent": line("ssh-rsa", b"ssh-rsa", b"\1" * 64, b"\0" + b"\xff" * 256),
    "no exponent": line("ssh-rsa", b"ssh-rsa", b"", b"\0" + b"\xff" * 256),
    "an even modulus": line("ssh-rsa", b"ssh-rsa", EXPONENT, b"\0" + b"\xfe" * 256),
    "a negative modulus": line("ssh-rsa", b"ssh-rsa", EXPONENT, b"\xff" * 257),
}


@pytest.mark.parametrize("wrong", WRONG_LINES)
def test_what_is_no_public_key_is_refused_in_words(wrong: str) -> None:
    with pytest.raises(Invalid) as refusal:
        parse_public_key(WRONG_LINES[wrong])

    assert len(refusal.value.detail) > 10


# -- the connection --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "new"),
    [
        (sshwire.Line, paramiko.Transport, "_lowest_free _say_goodbye"),
        (sshwire.Channel, paramiko.Channel, "_spend _message _say"),
        (sshwire.Packets, Packetizer, ""),
        (sshwire.Logins, AuthHandler, ""),
    ],
)
def test_paramiko_has_what_is_overridden(ours: type, theirs: type, new: str) -> None:
    """It is private there: another version may call it something else."""
    names = {name for name in vars(ours) if name.startswith("_") and not name.endswith("__")}

    assert [name for name in names - set(new.split()) if not hasattr(theirs, name)] == []


def test_only_modern_algorithms_are_offered(shared: Door) -> None:
    with shared.connect() as sock:
        stream = sock.makefile("rb")
        assert stream.readline() == b"SSH-2.0-heyvm\r\n"
        sock.sendall(b"SSH-2.0-test\r\n")
        size, _ = struct.unpack(">IB", stream.read(5))
        offer = Message(stream.read(size - 1))
    assert offer.get_byte() == cMSG_KEXINIT
    offer.get_bytes(16)
    kex, keys, *rest = [offer.get_list() for _ in range(8)]
    ciphers, macs, compression = rest[:2], rest[2:4], rest[4:]

    assert {name.partition("-")[0] for name in kex} <= {
        "mlkem768x25519",
        "curve25519",
        "ecdh",
        "kex",
    }
    assert keys == ["ssh-ed25519"]
    assert all(name.startswith(("aes128-", "aes256-")) for names in ciphers for name in names)
    assert not [name for names in ciphers for name in names if "cbc" in name]
    assert all(name.startswith("hmac-sha2-") for names in macs for name in names)
    assert compression == [["none"], ["none"]]


@pytest.mark.parametrize("who", ["client", "server"])
def test_keys_are_exchanged_anew_in_mid_transfer(
    shared: Door, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = []
    took = sshwire.Line._parse_newkeys
    monkeypatch.setattr(
        sshwire.Line, "_parse_newkeys", lambda line, m: (again.append(line), took(line, m))
    )
    options = ["-oRekeyLimit=256K"]
    if who == "server":
        monkeypatch.setattr(sshwire.Packets, "REKEY_BYTES", 1 << 18)
        options = []

    assert shared.ssh(*options, "HOST", "cat", input=BLOB).stdout == BLOB
    assert len(again) > 3


def test_channels_come_and_go_while_keys_are_exchanged(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """paramiko alone stands still for 30 s when a request comes in the midst of it."""
    monkeypatch.setattr(sshwire.Packets, "REKEY_BYTES", 1 << 16)
    control = f"-oControlPath={door.home}/control"
    with door.start("-MN", control), contextlib.ExitStack() as stack:
        wait_until((door.home / "control").exists, "the master listens")
        lines = ["head -c 500000 /dev/zero | wc -c; head -c 500000 /dev/zero"] * 6
        clients = [stack.enter_context(door.start(control, "HOST", line)) for line in lines]
        said = [client.communicate(timeout=TIMEOUT_S)[0] for client in clients]

    assert said == [b"500000\n" + bytes(500000)] * 6


def test_to_stop_cuts_everything_within_a_second(inside: Callable[[], Inside], box: Box) -> None:
    door = Door(inside)
    with (
        door.start("HOST", "echo 1; exec sleep 4713") as command,
        door.start("-tt", "HOST", "echo 1; exec sleep 4713") as terminal,
        door.start("HOST", "echo 1; exec yes") as loud,
        door.connect() as silent,
    ):
        assert all(one.stdout.read(1) == b"1" for one in (command, terminal, loud) if one.stdout)
        assert silent.recv(100).startswith(b"SSH-")
        took = door.close()
        assert took < 1.0
        assert b"the server has ended this connection" in command.communicate(timeout=TIMEOUT_S)[1]

    assert not strays()
    wait_until(lambda: box.run("pgrep -xf 'sleep 4713'").exit_code == 1, "the commands have ended")


def test_an_agent_that_does_not_answer_holds_up_no_end(inside: Callable[[], Inside]) -> None:
    asked, gate = threading.Event(), threading.Event()

    def slow() -> Inside:
        asked.set()
        gate.wait(TIMEOUT_S)
        return inside()

    door = Door(slow)
    with door.start("-tt"), door.start("-W", "localhost:1"):
        assert asked.wait(TIMEOUT_S)
        assert door.close() < 1.0
    gate.set()
    wait_until(lambda: not strays(), "what waited has ended")


def test_a_sandbox_that_stops_is_told_of(inside: Callable[[], Inside], boxes: Boxes) -> None:
    other = boxes.start()
    other.output("mkdir -p /workspace")

    def whatever_runs() -> Inside:
        if other.sandbox.status is not Status.RUNNING:
            raise Conflict("it is stopped: start it first")
        return Inside(other.sandbox, Here(boxes))  # type: ignore[arg-type]

    with (
        Door(whatever_runs) as door,
        door.start("HOST", "echo 1; sleep 100") as command,
        door.start("-tt", "HOST", "echo 1; sleep 100") as terminal,
    ):
        assert all(one.stdout.read(1) == b"1" for one in (command, terminal) if one.stdout)
        other.change(status=Status.STOPPED)
        other.stop()
        told = [one.communicate(timeout=TIMEOUT_S)[1] for one in (command, terminal)]

    assert told[0] == b"heyvm: it is stopped: start it first\n"
    assert told[1].startswith(b"heyvm: it is stopped: start it first\r\n")
    assert command.returncode == terminal.returncode == 255


def test_a_caller_that_closes_the_socket_ends_the_connection(
    inside: Callable[[], Inside],
) -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=lambda: ssh.serve(theirs, inside, host_key=SEED))
    thread.start()
    with ours:
        assert ours.recv(100).startswith(b"SSH-")
        theirs.close()
        thread.join(1.0)
        assert not thread.is_alive()


# -- clients that mean harm ------------------------------------------------------------------------

OPENINGS = {
    "nothing": b"",
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no text": os.urandom(4096),
    "an endless line": b"SSH-2.0-" + b"x" * 100_000,
    "an old version": b"SSH-1.5-old\r\n",
    "lines before the version": b"hello\r\n" * 50 + b"SSH-2.0-x\r\n",
    "no UTF-8": b"SSH-2.0-\xff\xfe\r\n",
    "a giant packet": b"SSH-2.0-x\r\n" + struct.pack(">I", 0xFFFFFFF0) + bytes(100_000),
    "an empty packet": b"SSH-2.0-x\r\n" + struct.pack(">IB", 4, 3) + bytes(64),
    "nonsense for keys": b"SSH-2.0-x\r\n" + struct.pack(">IB", 28, 4) + b"\x14" + b"\xff" * 26,
    "half an exchange": b"SSH-2.0-x\r\n" + struct.pack(">IB", 512, 4) + b"\x14" + b"x" * 100,
}


@pytest.mark.parametrize("opening", OPENINGS)
def test_nonsense_ends_the_connection_and_nothing_is_said(
    door: Door, opening: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sshwire, "LOGIN_S", 0.5)
    with quiet() as said, door.connect() as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(OPENINGS[opening])
        wait_until(lambda: door.serving and door.is_idle(), "it has ended", timeout=5)

    assert said == []
    assert capfd.readouterr().err == ""


def test_who_drips_is_cut_when_the_time_to_log_in_is_over(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sshwire, "LOGIN_S", 0.5)
    with door.connect() as sock, contextlib.suppress(ConnectionError):
        began = time.monotonic()
        for _ in range(100):
            sock.sendall(b"S")
            time.sleep(0.02)
            if door.serving and door.is_idle():
                break

    assert time.monotonic() - began < 1.9


def raw(client: paramiko.Transport, kind: bytes, *parts: Any) -> None:
    """A message of one's own: ints, bools, and bytes as strings."""
    message = Message()
    message.add_byte(kind)
    for part in parts:
        add = {bool: message.add_boolean, int: message.add_int, bytes: message.add_string}
        add[type(part)](part)
    client._send_message(message)


def ends(client: paramiko.Transport) -> bool:
    client.join(5)
    return not client.is_alive()


def test_an_exchange_of_keys_that_stops_half_way_ends_the_connection(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sshwire, "KEYS_S", 0.5)
    with door.client() as client:
        client.open_session().exec_command("yes")
        client._handler_table[MSG_KEXINIT] = lambda m: None
        client._send_kex_init()
        assert ends(client)


def test_a_window_counts(door: Door) -> None:
    with door.client() as client:
        channel = client.open_session()
        channel.exec_command("exec sleep 100")
        channel.out_window_size = 1 << 40
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            for _ in range(512):
                channel.send(bytes(1 << 15))
        assert ends(client)


def test_what_nobody_reads_is_held_up_to_a_bound(door: Door) -> None:
    with door.start("HOST", "exec sleep 100") as client:
        assert client.stdin is not None
        written = stuff(client.stdin.fileno())

    assert 1 << 20 < written < 16 << 20


def test_a_client_that_reads_nothing_holds_up_nobody_and_leaves_nothing(door: Door) -> None:
    with door.client() as client:
        deaf = client.open_session(window_size=1 << 15)
        deaf.exec_command("yes")
        other = client.open_session()
        other.exec_command("echo fine")
        assert other.recv(100) == b"fine\n"
        assert other.recv_exit_status() == 0


def test_a_client_that_goes_in_mid_transfer_leaves_nothing(door: Door) -> None:
    with door.client() as client:
        for line in ("yes", "cat", "yes >&2", "cat /dev/zero"):
            client.open_session().exec_command(line)
        client.open_session().invoke_subsystem("sftp")
        shell = client.open_session()
        shell.get_pty()
        shell.invoke_shell()
        client.sock.close()


def test_channels_have_a_limit(door: Door) -> None:
    with door.client() as client:
        opened = [client.open_session() for _ in range(sshwire.MAX_CHANNELS)]
        with pytest.raises(paramiko.ChannelException):
            client.open_session()
        opened[0].close()
        wait_until(lambda: can_open(client), "there is room for another")
        assert client.is_active()


def can_open(client: paramiko.Transport) -> bool:
    try:
        client.open_session()
    except paramiko.ChannelException:
        return False
    return True


def test_a_flood_of_ports_has_a_limit_and_leaves_nothing(door: Door) -> None:
    with door.client() as client:
        most = 0
        for number in range(600):
            place = (b"localhost", 1, b"", 0)
            raw(client, cMSG_CHANNEL_OPEN, b"direct-tcpip", number, 1 << 20, 1 << 15, *place)
            most = max(most, len(strays()))
        wait_until(lambda: can_open(client), "there is room again")
        assert most <= 2 * sshwire.MAX_CHANNELS


def test_channels_that_come_and_go_leave_nothing(door: Door) -> None:
    with door.client() as client:
        for _ in range(150):
            channel = client.open_session()
            channel.exec_command("exec sleep 100")
            channel.close()
        channel = client.open_session()
        channel.exec_command("echo fine")
        assert channel.recv(100) == b"fine\n"


def test_a_channel_has_one_program(door: Door) -> None:
    with door.client() as client:
        channel = client.open_session()
        channel.exec_command("exec cat")
        for kind, more in ((b"shell", ()), (b"exec", (b"id",)), (b"subsystem", (b"sftp",))):
            raw(client, cMSG_CHANNEL_REQUEST, channel.remote_chanid, kind, False, *more)
        size = (b"xterm", 80, 24, 0, 0, b"")
        raw(client, cMSG_CHANNEL_REQUEST, channel.remote_chanid, b"pty-req", False, *size)
        channel.sendall(b"still one")
        channel.shutdown_write()
        assert channel.recv(100) == b"still one"
        assert channel.recv(100) == b""
        assert channel.recv_exit_status() == 0


def test_an_environment_has_its_bounds(door: Door) -> None:
    with door.client() as client:
        channel = client.open_session()
        for name, value in (
            *((b"V%d" % n, b"x") for n in range(100)),
            *((b"L%d" % n, bytes(60_000).replace(b"\0", b"y")) for n in range(5)),
            *((name, b"x") for name in (b"", b"A=B", b"A B", b"1A", b"\xff", b"NUL")),
            (b"NUL", b"a\0b"),
            (b"BAD", b"\xff"),
        ):
            raw(client, cMSG_CHANNEL_REQUEST, channel.remote_chanid, b"env", False, name, value)
        channel.exec_command("env | grep -c '^[VL][0-9]'; env | grep -cE '^(BAD|NUL|A|1)'")
        assert channel.makefile().read().split()[0] == b"64"


REQUESTS: dict[str, tuple[Any, ...]] = {
    "of no channel": (cMSG_CHANNEL_REQUEST, 63, b"shell", True),
    "no UTF-8": (cMSG_CHANNEL_REQUEST, 0, b"\xff\xfe", True),
    "an answer to no question": (cMSG_USERAUTH_INFO_RESPONSE, 0xFFFFFFFF),
    "no message that there is": (b"\xc8", 1),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_that_is_nonsense_ends_the_connection_alone(door: Door, request_: str) -> None:
    with quiet() as said, door.client() as client:
        assert client.open_session().remote_chanid == 0
        raw(client, *REQUESTS[request_])
        assert ends(client)

    assert said == []


def test_a_number_of_extensions_is_not_counted_to(door: Door) -> None:
    with door.client() as client:
        raw(client, cMSG_EXT_INFO, 0xFFFFFFFF)
        channel = client.open_session()
        channel.exec_command("echo fine")
        assert channel.recv(100) == b"fine\n"


def test_a_window_that_never_opens_ends_with_stop(inside: Callable[[], Inside]) -> None:
    door = Door(inside)
    with door.connect() as sock, contextlib.closing(paramiko.Transport(sock)) as client:
        client.default_window_size = 1 << 15
        client.start_client(timeout=TIMEOUT_S)
        client.auth_none("any")
        for _ in range(4):
            client.open_session(window_size=1 << 15).exec_command("yes")
        took = door.close()

    assert took < 1.0
    assert not strays()
