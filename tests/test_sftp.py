"""SFTP into a sandbox: Debian's `sftp` and `scp`, paramiko's client, and one that means harm."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import paramiko
import pytest

from heyvm import sftp
from heyvm.errors import BackendFailed, BadRequest, Conflict
from heyvm.models import ImageConfig, Limits
from heyvm.shells import Inside
from tests.boxes import Box, Boxes
from tests.server import wait_until
from tests.test_ssh import Door, Here

pytestmark = pytest.mark.root

MIB = 1024 * 1024
TIMEOUT_S = 30
ODD_NAMES = [b"a b", b"new\nline", b"caf\xe9 \xff", b"-rf", b"'\"$(x)\\", b"x" * 255]


@pytest.fixture(scope="module")
def boxes() -> Iterator[Boxes]:
    with Boxes() as made:
        yield made


@pytest.fixture(scope="module")
def box(boxes: Boxes) -> Box:
    """With 16 MiB of space in /run."""
    started = boxes.start(limits=Limits(memory=256 * MIB), working_directory="/workspace")
    started.output("mkdir -p /workspace")
    return started


@pytest.fixture(scope="module")
def inside(boxes: Boxes, box: Box) -> Callable[[], Inside]:
    return lambda: Inside(box.sandbox, Here(boxes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def door(inside: Callable[[], Inside]) -> Iterator[Door]:
    with Door(inside) as made:
        yield made


@pytest.fixture
def there(box: Box, tmp_path: Path) -> str:
    """A directory inside for each test."""
    path = f"/workspace/{tmp_path.name}"
    box.output(f"mkdir {path}")
    return path


def batch(door: Door, *lines: str, fine: bool = True) -> str:
    """What `sftp` says to these commands; with `fine` none of them fails."""
    told = ["sftp", "-b", "-", *door.options_of_ssh, "any@127.0.0.1"]
    done = subprocess.run(told, input="\n".join(lines).encode(), capture_output=True, timeout=60)
    said = (done.stdout + done.stderr).decode(errors="surrogateescape")
    assert (done.returncode == 0) is fine, said
    return said


@contextlib.contextmanager
def client(door: Door) -> Iterator[paramiko.SFTPClient]:
    with door.client() as transport, paramiko.SFTPClient.from_transport(transport) as made:
        yield made


def sums(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


# -- OpenSSH ---------------------------------------------------------------------------------------


def test_files_of_any_size_go_there_and_back(door: Door, there: str, tmp_path: Path) -> None:
    sent, back = tmp_path / "sent", tmp_path / "back"
    back.mkdir()
    (sent / "deep/er").mkdir(parents=True)
    for name, size in {
        "empty": 0,
        "one": 1,
        "deep/big": 5 * MIB,
        "deep/er/odd": 255 * 1024,
    }.items():
        (sent / name).write_bytes(random.randbytes(size))
    (sent / "one").chmod(0o640)
    os.utime(sent / "one", (1_000_000_000, 1_100_000_000))

    batch(door, f"put -rp {sent} {there}/tree", f"get -rp {there}/tree {back}")

    assert sums(back / "tree") == sums(sent)
    state = (back / "tree/one").stat()
    assert (state.st_mode & 0o777, state.st_mtime) == (0o640, 1_100_000_000)


def test_what_broke_off_is_resumed(door: Door, box: Box, there: str, tmp_path: Path) -> None:
    whole = random.randbytes(700_000)
    (tmp_path / "whole").write_bytes(whole)
    (tmp_path / "part").write_bytes(whole[:300_001])
    (tmp_path / "back").write_bytes(whole[:5])

    batch(
        door,
        f"put {tmp_path}/part {there}/file",
        f"reput {tmp_path}/whole {there}/file",
        f"reget {there}/file {tmp_path}/back",
    )

    assert (tmp_path / "back").read_bytes() == whole
    assert box.output(f"stat -c %s {there}/file") == "700000\n"


def test_names_are_managed_as_on_any_server(door: Door, box: Box, there: str) -> None:
    box.output(f"cd {there} && echo 1 > one && echo 2 > two && mkdir full && touch full/x")

    said = batch(
        door,
        f"cd {there}",
        "rename one two",  # in place of the old one: posix-rename@openssh.com
        "symlink two soft",
        "ln two hard",
        "mkdir made",
        "rmdir made",
        "chown 12 two",
        "chmod 4711 two",
        "ls -l",
        "-rmdir full",
        "-rm full",
        "-mkdir full",
        "-get soft/none",
        "pwd",
        "df .",
    )

    state = "cd {} && stat -c '%n %a %u %h' two && readlink soft && cat hard && ls"
    assert box.output(state.format(there)).split() == (
        ["two", "4711", "12", "2", "two", "1", "full", "hard", "soft", "two"]
    )
    assert "-rws--x--x" in said
    assert f"Remote working directory: {there}" in said
    assert "Avail" in said


def test_scp_begins_in_the_working_directory(door: Door, box: Box, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    told = ["scp", "-q", *door.options_of_ssh, tmp_path / "file", "any@127.0.0.1:relative"]
    subprocess.run(told, check=True, timeout=TIMEOUT_S)

    assert box.output("cat /workspace/relative") == "x"


def test_scp_copies_trees_with_links(door: Door, box: Box, there: str, tmp_path: Path) -> None:
    box.output(f"cd {there} && mkdir -p t/a && echo x > t/a/f && ln -s a/f t/l")

    told = ["scp", "-rpq", *door.options_of_ssh, f"any@127.0.0.1:{there}/t", tmp_path / "t"]
    subprocess.run(told, check=True, timeout=TIMEOUT_S)

    assert sums(tmp_path / "t").keys() == {"a/f", "l"}  # followed, as scp does


def test_thousands_of_entries_are_listed(door: Door, box: Box, there: str) -> None:
    box.output(f"cd {there} && seq 5000 | xargs touch")

    said = batch(door, f"ls -1 {there}")

    names = {line.rpartition("/")[2] for line in said.splitlines() if not line.startswith("sftp>")}
    assert names == {str(n) for n in range(1, 5001)}


def test_what_cannot_be_done_is_said(door: Door, box: Box, there: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(17 * MIB))
    (tmp_path / "small").write_bytes(b"x")
    box.output(f"cd {there} && mkfifo fifo && mkdir -p dir && chmod 0 dir")

    for line, words in {
        f"put {tmp_path}/big /run/big": "No space left on device",
        f"put {tmp_path}/small /.heyvm/x": "Read-only file system",
        f"put {tmp_path}/small {there}/fifo": "Permission denied",
        f"put {tmp_path}/small {there}/no/x": "No such file",
        f"get /dev/zero {tmp_path}/zero": "not a regular file",
        f"get /proc/1/mem {tmp_path}/mem": "Permission denied",
        "symlink x /.heyvm/y": "Failure",
    }.items():
        said = batch(door, line, fine=False)
        assert words in said, (line, said)
    box.output("rm -f /run/big")


def test_many_copy_at_once(door: Door, box: Box, there: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(random.randbytes(MIB))

    with ThreadPoolExecutor(4) as pool:
        lines = [
            (
                f"-mkdir {there}/same",
                f"-mkdir {there}/same/deep",
                f"put {tmp_path}/file {there}/{n}",
            )
            for n in range(4)
        ]
        list(pool.map(lambda some: batch(door, *some), lines))

    assert len(set(box.output(f"cd {there} && sha256sum 0 1 2 3 | cut -c-64").split())) == 1


# -- a client that can say more --------------------------------------------------------------------


def test_every_name_survives(inside: Callable[[], Inside], box: Box, there: str) -> None:
    with talking(inside) as talk:
        for name in ODD_NAMES:
            opened = talk.ask(sftp.OPEN, text(there.encode() + b"/" + name), NEW, NO_CHANGE)
            assert opened[0] == sftp.HANDLE
        listed = talk.names(there.encode())
        for name in ODD_NAMES:
            kind, _ = talk.ask(sftp.LSTAT, text(there.encode() + b"/" + name))
            assert kind == sftp.ATTRS

    assert sorted(listed) == sorted(ODD_NAMES)
    assert box.output(f"ls -1 {there} | wc -l") == "7\n"  # one of them has two lines


def test_a_client_reads_and_writes_where_it_likes(door: Door, box: Box, there: str) -> None:
    with client(door) as files, files.open(f"{there}/file", "w+") as file:
        file.write(b"0123456789")
        file.seek(3)
        file.write(b"abc")
        file.truncate(8)
        file.chmod(0o600)
        file.seek(0)

        assert file.read() == b"012abc67"
        assert file.stat().st_size == 8
        with files.open(f"{there}/file", "a") as more:
            more.write(b"+")
        files.rename(f"{there}/file", f"{there}/other")
        with pytest.raises(OSError, match="File exists"):
            files.mkdir(f"{there}/again")
            files.mkdir(f"{there}/again")
        assert files.normalize(".") == "/workspace"
        assert files.listdir_attr(there)[0].longname.startswith(("-rw", "drwx"))
        with pytest.raises(OSError, match="Is a directory"):
            files.open(f"{there}/again")

    assert box.output(f"cat {there}/other") == "012abc67+"


def test_sessions_leave_nothing_behind(door: Door, box: Box) -> None:
    def workers() -> int:
        like_pid_1 = 'cat /proc/[0-9]*/comm | grep -cx "$(cat /proc/1/comm)"'
        return int(box.output(like_pid_1)) - 1

    wait_until(lambda: workers() == 0, "earlier ones have ended", timeout=5)

    with client(door) as files:
        files.listdir("/")
        assert workers() == 1

    wait_until(lambda: workers() == 0, "its worker has ended", timeout=5)


def test_files_belong_to_the_images_user(boxes: Boxes) -> None:
    box = boxes.start(image_config=ImageConfig(user="www-data"), working_directory="/tmp")
    inside = Inside(box.sandbox, Here(boxes))  # type: ignore[arg-type]
    with talking(lambda: inside) as talk:
        talk.ask(sftp.OPEN, text(b"file"), NEW, NO_CHANGE)
        answer = talk.ask(sftp.OPEN, text(b"/root/x"), READ, NO_CHANGE)

        assert status_of(answer)[0] == sftp.PERMISSION_DENIED
        assert box.output("stat -c %U /tmp/file") == "www-data\n"
        assert box.output("cat /proc/[0-9]*/status | grep -c ^Uid:.33") == "1\n"


def test_neither_the_agent_nor_its_worker_can_be_looked_into(
    inside: Callable[[], Inside], box: Box
) -> None:
    with contextlib.closing(inside().calls()) as calls:
        worker = calls.readlink(b"/proc/self").decode()
        owners = ("1", "self", f"self/task/{worker}")
        closed = [f"{of}/{name}" for of in owners for name in ("mem", "environ", "auxv", "pagemap")]
        for name in (*closed, "1/root/x", "1/cwd/x"):
            for flags in (os.O_RDONLY, os.O_WRONLY):
                with pytest.raises(PermissionError):
                    calls.open(f"/proc/{name}".encode(), flags)
        for name in ("fd", "root", "cwd"):
            with pytest.raises(PermissionError):
                calls.opendir(f"/proc/1/{name}".encode())
        tried = box.run(f"head -c 1 /proc/{worker}/mem; ls /proc/{worker}/fd; :")

    assert tried.output.count(b"Permission denied") == 2


def test_a_sandbox_that_stops_is_told(boxes: Boxes, tmp_path: Path) -> None:
    box = boxes.start(working_directory="/tmp")
    inside = Inside(box.sandbox, Here(boxes))  # type: ignore[arg-type]
    with Door(lambda: inside) as door:
        told = ["sftp", "-b", "-", "-l", "80000", *door.options_of_ssh, "any@127.0.0.1"]
        (tmp_path / "big").write_bytes(bytes(64 * MIB))
        with subprocess.Popen(told, stdin=PIPE, stdout=PIPE, stderr=subprocess.STDOUT) as copying:
            assert copying.stdin is not None
            copying.stdin.write(f"put {tmp_path}/big /tmp/big\n".encode())
            copying.stdin.flush()
            wait_until(lambda: box.run("test -s /tmp/big").exit_code == 0, "it has begun")
            box.stop()
            said, _ = copying.communicate(timeout=TIMEOUT_S)

        assert copying.returncode != 0
        assert b"agent" in said, said
        assert b"heyvm: " in batch(door, "ls", fine=False).encode()


def test_a_sandbox_that_does_not_run_is_said() -> None:
    def stopped() -> Inside:
        raise Conflict("sandbox 'sb-1' is stopped: start it first")

    with Door(stopped) as door:
        assert "heyvm: sandbox 'sb-1' is stopped" in batch(door, "ls", fine=False)


# -- requests, byte by byte ------------------------------------------------------------------------

PIPE = subprocess.PIPE
NEW, READ = sftp.u32(0b1011), sftp.u32(1)
NO_CHANGE = sftp.u32(0)
text = sftp.string


class Wire:
    """A socket, as `sftp.serve` wants its channel."""

    def __init__(self, sock: socket.socket) -> None:
        self.recv, self.sock, self.said = sock.recv, sock, b""

    def write(self, piece: bytes, *, is_error: bool = False) -> None:
        if is_error:
            self.said += piece
        else:
            self.sock.sendall(piece)


class Talk:
    """Raw requests, and how serving them ended."""

    def __init__(self, inside: Callable[[], Inside]) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(TIMEOUT_S)
        self.ended: list[BaseException | None] = []
        self.calls = inside().calls()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with self.theirs, contextlib.closing(self.calls):
            try:
                sftp.serve(Wire(self.theirs), self.calls)
                self.ended.append(None)
            except Exception as error:
                self.ended.append(error)

    def begin(self) -> None:
        self.send(sftp.packet(sftp.INIT, sftp.u32(3)))
        kind, self.extensions = self.receive()
        assert kind == sftp.VERSION

    def send(self, request: bytes) -> None:
        self.ours.sendall(request)

    def receive(self) -> tuple[int, bytes]:
        size = int.from_bytes(self.exactly(4), "big")
        answer = self.exactly(size)
        return answer[0], answer[1:]

    def exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            part = self.ours.recv(size - len(found))
            assert part, "it has hung up"
            found += part
        return found

    def ask(self, kind: int, *fields: bytes) -> tuple[int, bytes]:
        self.send(sftp.packet(kind, b"\0\0\0\7", *fields))
        answer, body = self.receive()
        assert body[:4] == b"\0\0\0\7"
        return answer, body[4:]

    def extended(self, name: bytes, *fields: bytes) -> tuple[int, bytes]:
        return self.ask(sftp.EXTENDED, text(name), *fields)

    def handle(self, kind: int, *fields: bytes) -> bytes:
        """With its length before it."""
        answer, handle = self.ask(kind, *fields)
        assert answer == sftp.HANDLE
        return handle

    def names(self, path: bytes) -> list[bytes]:
        handle, found = self.handle(sftp.OPENDIR, text(path)), []
        while (answer := self.ask(sftp.READDIR, handle))[0] == sftp.NAME:
            fields = sftp.Fields(answer[1], 0)
            for _ in range(fields.u32()):
                found.append(fields.string())
                fields.string()
                fields.change()
        return found

    def end(self) -> BaseException | None:
        """What serving raised, once no more requests come."""
        with contextlib.suppress(OSError):
            self.ours.shutdown(socket.SHUT_WR)
        self.thread.join(TIMEOUT_S)
        self.ours.close()
        return self.ended[0]


@contextlib.contextmanager
def talking(inside: Callable[[], Inside]) -> Iterator[Talk]:
    talk = Talk(inside)
    try:
        talk.begin()
        yield talk
    finally:
        ended = talk.end()
    assert ended is None


def status_of(answer: tuple[int, bytes]) -> tuple[int, bytes]:
    kind, body = answer
    assert kind == sftp.STATUS
    fields = sftp.Fields(body, 0)
    return fields.u32(), fields.string()


def test_requests_that_end_too_early_are_refused_one_by_one(inside: Callable[[], Inside]) -> None:
    with talking(inside) as talk:
        for kind in sftp.WORK:
            for rest in (b"", b"\xff", b"\xff\xff\xff\xff", text(b"a")[:-1]):
                code, _ = status_of(talk.ask(kind, rest))
                assert code in (sftp.BAD_MESSAGE, sftp.UNSUPPORTED)
        for name in sftp.EXTENDED_WORK:
            if name != b"limits@openssh.com":
                assert status_of(talk.extended(name))[0] == sftp.BAD_MESSAGE
        for kind in (0, sftp.INIT, 21, 99, 199, 255):
            assert status_of(talk.ask(kind))[0] == sftp.UNSUPPORTED
        for name in (b"", b"check-file", b"copy-data", b"\xff" * 1000):
            assert status_of(talk.extended(name))[0] == sftp.UNSUPPORTED


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(4),
        sftp.packet(sftp.OPENDIR, bytes(8)),
        sftp.packet(sftp.INIT, sftp.u32(3)) + b"\xff\xff\xff\xff",
        sftp.packet(sftp.INIT, sftp.u32(3)) + sftp.packet(sftp.STAT, b"\0"),
        sftp.packet(sftp.INIT, sftp.u32(3)) + sftp.u32(256 * 1024 + 1),
    ],
)
def test_what_is_no_sftp_ends_the_session(inside: Callable[[], Inside], junk: bytes) -> None:
    talk = Talk(inside)
    talk.send(junk)

    assert isinstance(talk.end(), BadRequest)


@pytest.mark.parametrize("cut", [b"", b"\0", sftp.packet(sftp.INIT, sftp.u32(3))[:-1]])
def test_a_client_may_leave_at_any_byte(inside: Callable[[], Inside], cut: bytes) -> None:
    talk = Talk(inside)
    talk.send(cut)

    assert talk.end() is None


def test_handles_are_a_clients_own_and_few(inside: Callable[[], Inside], there: str) -> None:
    file = text(f"{there}/file".encode())
    with talking(inside) as talk:
        handles = [talk.handle(sftp.OPEN, file, NEW, NO_CHANGE) for _ in range(256)]
        code, why = status_of(talk.ask(sftp.OPEN, file, NEW, NO_CHANGE))
        assert (code, why) == (sftp.FAILURE, b"at most 256 files can be open at once")
        assert status_of(talk.ask(sftp.OPENDIR, text(b".")))[0] == sftp.FAILURE

        assert status_of(talk.ask(sftp.CLOSE, handles[0])) == (sftp.OK, b"Success")
        for handle in (handles[0], text(b""), text(b"0"), text(b"\xff"), text(b"9" * 200)):
            for kind in (sftp.CLOSE, sftp.READDIR, sftp.FSTAT):
                assert status_of(talk.ask(kind, handle)) == (
                    sftp.FAILURE,
                    b"there is no such handle",
                )
        assert status_of(talk.ask(sftp.READDIR, handles[1]))[0] == sftp.FAILURE
        scan = talk.handle(sftp.OPENDIR, text(b"/"))
        assert status_of(talk.ask(sftp.READ, scan, bytes(8), sftp.u32(1)))[0] == sftp.FAILURE


def test_numbers_have_bounds(inside: Callable[[], Inside], there: str) -> None:
    path = text(f"{there}/file".encode())
    with talking(inside) as talk:
        handle = talk.handle(sftp.OPEN, path, NEW, NO_CHANGE)
        last = struct.pack(">Q", (1 << 64) - 1)
        far = struct.pack(">Q", 1 << 40)

        assert status_of(talk.ask(sftp.READ, handle, bytes(8), sftp.u32(1 << 31)))[0] == sftp.EOF
        for offset in (last, struct.pack(">Q", 1 << 63)):
            assert status_of(talk.ask(sftp.READ, handle, offset, READ))[0] == sftp.FAILURE
            assert status_of(talk.ask(sftp.WRITE, handle, offset, text(b"x")))[0] == sftp.FAILURE
            size = sftp.u32(sftp.HAS_SIZE) + offset
            assert status_of(talk.ask(sftp.FSETSTAT, handle, size))[0] == sftp.FAILURE
        assert status_of(talk.ask(sftp.WRITE, handle, far, text(b"x")))[0] == sftp.OK
        most = text(bytes(255 * 1024 + 900))
        assert status_of(talk.ask(sftp.WRITE, handle, bytes(8), most))[0] == sftp.OK
        assert talk.ask(sftp.READ, handle, far, sftp.u32(10)) == (sftp.DATA, text(b"x"))
        kind, body = talk.extended(b"limits@openssh.com")
        assert (kind, struct.unpack(">4Q", body)) == (
            sftp.EXTENDED_REPLY,
            (256 * 1024, 255 * 1024, 255 * 1024, 256),
        )
        times = sftp.u32(sftp.HAS_TIMES) + b"\xff" * 8
        assert status_of(talk.ask(sftp.FSETSTAT, handle, times))[0] == sftp.OK
        long_path = text(b"/x" * 60_000)
        assert status_of(talk.ask(sftp.STAT, long_path)) == (sftp.FAILURE, b"File name too long")
        for path in (b"a\0b", b""):
            assert status_of(talk.ask(sftp.STAT, text(path)))[0] in (2, sftp.FAILURE)


def test_a_name_is_what_it_is_and_no_command(inside: Callable[[], Inside], there: str) -> None:
    """The link's own side of the argument order that OpenSSH has the other way round."""
    with talking(inside) as talk:
        link = text(f"{there}/link".encode())
        assert status_of(talk.ask(sftp.SYMLINK, text(b"the target"), link))[0] == sftp.OK
        home = talk.extended(b"expand-path@openssh.com", text(b"~/x"))[1]
        assert home[4:].startswith(text(b"/root/x"))
        assert talk.ask(sftp.READLINK, link)[1][4:].startswith(text(b"the target"))
        assert status_of(talk.ask(sftp.RENAME, link, text(b"/")))[0] == sftp.FAILURE


def test_many_requests_at_once_are_answered_in_order(inside: Callable[[], Inside]) -> None:
    with talking(inside) as talk:
        ask = b"".join(
            sftp.packet(sftp.REALPATH, sftp.u32(n), text(b"/%d" % n)) for n in range(500)
        )
        sender = threading.Thread(target=talk.send, args=(ask,))
        sender.start()

        answers = [talk.receive()[1] for _ in range(500)]
        sender.join()

    assert [answer[:4] for answer in answers] == [sftp.u32(n) for n in range(500)]


def test_random_requests_break_nothing(inside: Callable[[], Inside], there: str) -> None:
    chance = random.Random(5)
    pieces = [text(there.encode() + b"/f"), text(b"1"), text(b"."), bytes(4), bytes(8), b"\xff" * 4]
    pieces += [NEW, sftp.u32(15), text(b"x" * 100), *(text(name) for name in sftp.EXTENDED_WORK)]
    harmless = [kind for kind in range(3, 256) if kind not in (sftp.RMDIR, sftp.REMOVE)]
    with talking(inside) as talk:
        for _ in range(600):
            kind = chance.choice([*sftp.WORK, chance.choice(harmless)])
            talk.ask(kind, *chance.choices(pieces, k=chance.randrange(6)))


def test_the_loss_of_the_sandbox_is_the_last_answer(inside: Callable[[], Inside]) -> None:
    talk = Talk(inside)
    talk.begin()
    talk.calls.hang_up()

    code, why = status_of(talk.ask(sftp.STAT, text(b"/")))

    assert code == sftp.FAILURE
    assert b"agent" in why or b"sandbox" in why
    assert isinstance(talk.end(), BackendFailed)
