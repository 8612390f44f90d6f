"""What the agent forwards: connections from outside to ports inside, byte for byte."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heyvm import agent_ports, frames, guest
from heyvm.errors import BackendFailed, PortClosed
from tests.agents import AgentProcess, running_agent, wait_until

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs a network namespace: run as root")
MIB = 1024 * 1024
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close is a reset


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """One for all; none of its descriptors may be left over by the end of a test."""
    with running_agent(tmp_path_factory.mktemp("agent")) as running:
        running.ready().sh("echo its log is open")
        yield running


@pytest.fixture(autouse=True)
def nothing_left(agent: AgentProcess) -> Iterator[None]:
    before = descriptors(agent)
    yield
    wait_until(lambda: descriptors(agent) <= before)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path."""
    with tempfile.TemporaryDirectory(prefix="hv-") as directory:
        yield Path(directory)


class Inside:
    """A TCP server: `act` has each connection, which is closed afterwards."""

    def __init__(self, act: Callable[[socket.socket], None], host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.create_server((host, 0), family=family, backlog=4096)
        self.port: int = self.sock.getsockname()[1]
        self.act = act
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                there, _ = self.sock.accept()
                threading.Thread(target=self._one, args=(there,), daemon=True).start()

    def _one(self, there: socket.socket) -> None:
        with there, contextlib.suppress(OSError):
            self.act(there)


def echo(there: socket.socket) -> None:
    while some := there.recv(256 * 1024):
        there.sendall(some)


def count(there: socket.socket) -> None:
    there.sendall(b"%d" % len(everything(there)))


def everything(sock: socket.socket) -> bytes:
    parts = []
    while some := sock.recv(MIB):
        parts.append(some)
    return b"".join(parts)


def exactly(sock: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (some := sock.recv(size - len(found))):
        found += some
    return found


def descriptors(agent: AgentProcess) -> int:
    return len(os.listdir(f"/proc/{agent.process.pid}/fd"))


def status_bytes(agent: AgentProcess) -> int:
    text = Path(f"/proc/{agent.process.pid}/statm").read_text()
    return int(text.split()[1]) * resource.getpagesize()


def cpu_ticks(agent: AgentProcess) -> int:
    words = Path(f"/proc/{agent.process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(words[11]) + int(words[12])


def connected(agent: AgentProcess, port: int, name: str = "one") -> socket.socket:
    sock = agent.connect()
    try:
        guest.connect_port(sock, port, name)
    except BaseException:
        sock.close()
        raise
    sock.settimeout(20)
    return sock


def listening(agent: AgentProcess, port: int, path: Path, name: str = "one") -> None:
    with socket.socket(socket.AF_UNIX) as listener, agent.connect() as sock:
        listener.bind(str(path))
        listener.listen(512)
        guest.listen(sock, port, name, listener.fileno())


def client(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


def unlisten(agent: AgentProcess, name: str = "one", *, keep: bool = False) -> None:
    with agent.connect() as sock:
        guest.unlisten(sock, name, keep=keep)


@pytest.fixture(params=["connect", "listen"])
def dial(request, agent, place) -> Iterator[Callable[[int], socket.socket]]:
    """A connection to a port inside, by either of the two ways."""
    if request.param == "connect":
        yield lambda port: connected(agent, port)
        return

    def accepted(port: int) -> socket.socket:
        listening(agent, port, place / "s")
        return client(place / "s")

    yield accepted
    unlisten(agent)


# -- bytes -----------------------------------------------------------------------------------------


def test_what_is_said_goes_there_and_back(dial):
    with Inside(echo) as server, dial(server.port) as sock:
        for said in (b"a", b"bc", b"d" * 1000):
            sock.sendall(said)
            assert exactly(sock, len(said)) == said


def test_who_has_said_all_can_still_be_answered(dial):
    with Inside(count) as server, dial(server.port) as sock:
        sock.sendall(b"x" * 300_000)
        sock.shutdown(socket.SHUT_WR)

        assert everything(sock) == b"300000"


def test_who_has_answered_can_still_be_told_more(dial):
    told = []

    def first_say_then_hear(there: socket.socket) -> None:
        there.sendall(b"all that I have to say")
        there.shutdown(socket.SHUT_WR)
        told.append(everything(there))

    with Inside(first_say_then_hear) as server, dial(server.port) as sock:
        assert everything(sock) == b"all that I have to say"
        sock.sendall(b"y" * 300_000)
        sock.shutdown(socket.SHUT_WR)

        assert wait_until(lambda: told)[0] == b"y" * 300_000


def test_fifty_megabytes_each_way_at_once_are_the_same(dial):
    sent = os.urandom(MIB) * 50
    got = hashlib.sha256()

    with Inside(echo) as server, dial(server.port) as sock:
        writer = threading.Thread(
            target=lambda: (sock.sendall(sent), sock.shutdown(socket.SHUT_WR)), daemon=True
        )
        writer.start()
        while some := sock.recv(MIB):
            got.update(some)
        writer.join(20)

    assert got.digest() == hashlib.sha256(sent).digest()


def test_an_answer_is_seen_whole_by_who_was_still_sending_the_request(dial):
    # No more than the kernel has sent by the time that the server hangs up.
    answer = b"413 " + b"z" * 10_000

    def refuse(there: socket.socket) -> None:
        there.recv(10)
        there.sendall(answer)

    with Inside(refuse) as server, dial(server.port) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):
                sock.sendall(b"w" * 50_000)

        assert everything(sock) == answer


# -- ends ------------------------------------------------------------------------------------------


def test_a_server_learns_that_its_client_went_away(dial):
    ended = threading.Event()

    def tell_for_ever(there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                there.sendall(b"event\n")
                time.sleep(0.01)
        ended.set()

    with Inside(tell_for_ever) as server:
        with dial(server.port) as sock:
            assert sock.recv(6) == b"event\n"

        assert ended.wait(10)


def test_a_client_that_waits_with_half_a_connection_and_goes_is_missed_too(dial):
    ended = threading.Event()

    def hold(there: socket.socket) -> None:
        everything(there)
        with contextlib.suppress(OSError):
            while True:
                there.sendall(b"still here\n")
                time.sleep(0.01)
        ended.set()

    with Inside(hold) as server:
        with dial(server.port) as sock:
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(5) == b"still"

        assert ended.wait(10)


def test_a_reset_inside_ends_it_outside(dial):
    def reset(there: socket.socket) -> None:
        there.recv(1)
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    with Inside(reset) as server, dial(server.port) as sock:
        sock.sendall(b"x")

        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(10) == b""


def test_ends_and_half_ends_cost_no_time(agent):
    gates = threading.Event()

    def linger(there: socket.socket) -> None:
        there.sendall(b"hello")
        there.shutdown(socket.SHUT_WR)
        gates.wait(20)

    with Inside(linger) as server, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connected(agent, server.port)) for _ in range(20)]
        for at, sock in enumerate(socks):
            assert everything(sock) == b"hello"
            if at % 2:
                sock.sendall(b"x" * 1000)
        began = cpu_ticks(agent)
        time.sleep(0.5)

        assert cpu_ticks(agent) - began <= 2
        gates.set()


def test_a_reader_that_does_not_read_holds_up_the_writer_and_fills_no_memory(agent):
    written = []

    def pour(there: socket.socket) -> None:
        there.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        at = len(written)
        written.append(0)
        while True:
            written[at] += there.send(b"p" * 65536)

    with Inside(pour) as server, contextlib.ExitStack() as stack:
        before = status_bytes(agent)
        socks = [stack.enter_context(connected(agent, server.port)) for _ in range(100)]
        wait_until(lambda: len(written) == 100 and all(written))
        total = -1
        while total != sum(written):
            total = sum(written)
            time.sleep(0.2)

        assert status_bytes(agent) - before < 100 * agent_ports.CHUNK_BYTES + 4 * MIB
        assert exactly(socks[7], 4 * MIB) == b"p" * 4 * MIB


def test_beyond_plenty_it_takes_little_at_a_time(agent):
    quiet = threading.Event()
    sides = agent_ports.PLENTY_BYTES // agent_ports.CHUNK_BYTES + 150

    with Inside(lambda there: quiet.wait(30)) as server, contextlib.ExitStack() as stack:
        before = status_bytes(agent)
        for _ in range(sides):
            sock = stack.enter_context(connected(agent, server.port))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(b"q" * 65536)
        time.sleep(0.3)
        grown = status_bytes(agent) - before
        quiet.set()

    assert grown < agent_ports.PLENTY_BYTES + 8 * MIB


# -- who is there ----------------------------------------------------------------------------------


def test_where_nobody_listens_it_is_refused(agent):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]

        with pytest.raises(PortClosed, match=f"nobody listens on port {port}"):
            connected(agent, port)


def test_a_connection_to_a_socket_of_a_port_where_nobody_listens_is_closed(agent, place):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        listening(agent, nobody.getsockname()[1], place / "s")
        with client(place / "s") as sock:
            assert sock.recv(1) == b""
    unlisten(agent)


def test_a_server_on_the_other_loopback_address_is_found(dial):
    with Inside(echo, "::1") as server, dial(server.port) as sock:
        sock.sendall(b"six")
        assert sock.recv(3) == b"six"


@AS_ROOT
def test_a_port_is_not_its_own_client(tmp_path):
    """With two ports to choose from, the kernel soon connects a socket to itself."""
    narrow = (
        "ip link set lo up; echo 40000 40001 >/proc/sys/net/ipv4/ip_local_port_range;"
        ' echo 1 >/proc/sys/net/ipv4/tcp_tw_reuse; exec "$@"'
    )
    with running_agent(tmp_path, box=["unshare", "-n", "sh", "-c", narrow, "sh"]) as alone:
        alone.ready()
        for port in (40000, 40001) * 5:
            with pytest.raises(PortClosed):
                connected(alone, port)


def test_a_server_that_is_behind_is_waited_for(agent):
    """Its queue is full: the kernel drops what comes, and the client tries again after a second."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), agent.connect() as sock:
            asked = threading.Thread(target=guest.connect_port, args=(sock, port, "slow"))
            asked.start()
            time.sleep(0.2)
            assert agent.run("true").exit_code == 0
            server.accept()[0].close()
            there, _ = server.accept()
            asked.join(10)
            sock.settimeout(10)
            sock.sendall(b"at last")
            with there:
                assert there.recv(7) == b"at last"


# -- how many --------------------------------------------------------------------------------------


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_so_many_at_once_and_all_else_goes_on(agent, place):
    with many_files(), Inside(echo) as server, contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        port = silent.getsockname()[1]
        open_ = [stack.enter_context(connected(agent, port)) for _ in range(agent_ports.MAX_RELAYS)]
        listening(agent, server.port, place / "s")
        waiting = stack.enter_context(client(place / "s"))
        waiting.sendall(b"let me in")

        with pytest.raises(BackendFailed, match="too many connections"):
            connected(agent, port)
        began = cpu_ticks(agent)
        assert agent.sh("echo fine").stdout == b"fine\n"
        assert cpu_ticks(agent) - began < 20
        waiting.settimeout(0.2)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
        open_[3].close()
        waiting.settimeout(10)
        assert waiting.recv(9) == b"let me in"
    unlisten(agent)


# -- listeners -------------------------------------------------------------------------------------


def test_to_unlisten_is_to_cut(agent, place):
    with Inside(echo) as server:
        listening(agent, server.port, place / "s")
        ways = (client(place / "s"), connected(agent, server.port), client(place / "s"))
        with connected(agent, server.port, "another") as other:
            for sock in (*ways, other):
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"

            unlisten(agent)

            for sock in ways:
                with sock:
                    assert sock.recv(1) == b""
            with pytest.raises(ConnectionRefusedError):
                client(place / "s")
            other.sendall(b"y")
            assert other.recv(1) == b"y"


def test_it_can_cut_and_go_on_listening(agent, place):
    with Inside(echo) as server:
        listening(agent, server.port, place / "s")
        with client(place / "s") as before:
            before.sendall(b"x")
            assert before.recv(1) == b"x"

            unlisten(agent, keep=True)

            assert before.recv(1) == b""
        with client(place / "s") as after:
            after.sendall(b"y")
            assert after.recv(1) == b"y"
    unlisten(agent)


def test_a_new_listener_takes_the_place_of_the_old_one_and_its_guests_stay(agent, place):
    with Inside(echo) as server, Inside(count) as second:
        listening(agent, server.port, place / "s")
        with client(place / "s") as guest_of_old:
            guest_of_old.sendall(b"x")
            assert guest_of_old.recv(1) == b"x"

            listening(agent, second.port, place / "t")

            with pytest.raises(ConnectionRefusedError):
                client(place / "s")
            guest_of_old.sendall(b"y")
            assert guest_of_old.recv(1) == b"y"
        with client(place / "t") as new:
            new.shutdown(socket.SHUT_WR)
            assert everything(new) == b"0"
    unlisten(agent)


def test_to_unlisten_what_never_was_is_fine(agent):
    unlisten(agent, "nobody")


def tcp_listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def idle_unix_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX)


def datagrams() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


@pytest.mark.parametrize(
    "make", [tcp_listener, idle_unix_socket, datagrams, tempfile.TemporaryFile]
)
def test_what_is_no_listening_unix_socket_is_refused(agent, make):
    with make() as wrong, agent.connect() as sock:
        with pytest.raises(BackendFailed):
            guest.listen(sock, 80, "wrong", wrong.fileno())


@pytest.mark.parametrize(("said", "how_many"), [(b"L", 0), (b"L", 3), (b"LL", 1)])
def test_anything_but_one_byte_with_one_descriptor_leaves_nothing(agent, said, how_many):
    """Of several the kernel closes all but the first."""
    with contextlib.ExitStack() as stack, agent.connect() as sock:
        sock.settimeout(10)
        sock.sendall(frames.header({"op": "listen", "port": 80, "name": "odd"}))
        assert sock.recv(100).endswith(frames.encode({"ready": 1}))
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(how_many)]
        socket.send_fds(sock, [said], [file.fileno() for file in files])

        assert b"error" in everything(sock)
    assert agent.run("true").exit_code == 0


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "connect", "port": 0, "name": "x"},
        {"op": "connect", "port": 65536, "name": "x"},
        {"op": "connect", "port": -1, "name": "x"},
        {"op": "connect", "port": b"80", "name": "x"},
        {"op": "connect", "port": 80},
        {"op": "connect", "port": 80, "name": "x" * 65},
        {"op": "connect", "port": 80, "name": 5},
        {"op": "listen", "port": 80, "name": ""},
        {"op": "unlisten"},
        {"op": "unlisten", "name": "x", "keep": "yes"},
    ],
)
def test_a_request_that_makes_no_sense_ends_its_connection_alone(agent, request_):
    with agent.connect() as sock:
        sock.settimeout(10)
        sock.sendall(frames.header(request_))

        said = everything(sock)
    assert said == b"" or b"error" in said
    assert agent.run("true").exit_code == 0


@pytest.mark.parametrize("op", ["connect", "listen"])
def test_who_does_not_wait_for_the_answer_is_cut_off(agent, op):
    with Inside(echo) as server, agent.connect() as sock:
        sock.settimeout(10)
        sock.sendall(frames.header({"op": op, "port": server.port, "name": "x"}) + b"too soon")

        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
