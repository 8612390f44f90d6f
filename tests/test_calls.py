"""System calls in a sandbox, one after another: a real agent does them, a false one lies."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heyvm import calls, frames, guest
from heyvm.calls import MAX_DATA_BYTES, Calls, Change, Facts
from heyvm.errors import BackendFailed, HeyvmError, Invalid
from tests.agents import AgentProcess, alive, children, own_box, running_agent, wait_until

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user id: run as root")
BOXED = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
NEW = os.O_RDWR | os.O_CREAT
HOSTILE = b"\xff \n\x1b[2J'\"" + b"x" * 240


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("agent")) as made:
        yield made.ready()


@contextlib.contextmanager
def talking(agent: AgentProcess, cwd: Path, user: str = "") -> Iterator[Calls]:
    with contextlib.closing(Calls(agent.connect(), user=user, cwd=str(cwd))) as made:
        yield made


@pytest.fixture
def call(agent: AgentProcess, tmp_path: Path) -> Iterator[Calls]:
    """Calls with `tmp_path` as their directory."""
    with talking(agent, tmp_path) as made:
        yield made


@contextlib.contextmanager
def fails(number: int, words: str = ".") -> Iterator[None]:
    with pytest.raises(OSError, match=words) as caught:
        yield
    assert caught.value.errno == number


def everything(call: Calls, path: bytes) -> list[bytes]:
    handle, found = call.opendir(path), []
    while entries := call.readdir(handle):
        found += [entry.name for entry in entries]
    call.close_handle(handle)
    return found


# -- files -----------------------------------------------------------------------------------------


def test_what_is_written_is_read(call: Calls, tmp_path: Path) -> None:
    handle = call.open(b"file", NEW, 0o600)
    most = os.urandom(MAX_DATA_BYTES)

    call.write(handle, 0, b"one")
    call.write(handle, 10, most)
    call.sync(handle)

    assert (tmp_path / "file").read_bytes() == b"one" + bytes(7) + most
    assert call.read(handle, 0, 5) == b"one\0\0"
    assert call.read(handle, 10, 1 << 30) == most
    assert call.read(handle, len(most) + 10, 10) == b""
    assert call.stat_handle(handle).size == len(most) + 10
    assert stat.S_IMODE(call.stat(b"file").mode) == 0o600
    call.close_handle(handle)
    with fails(errno.EBADF):
        call.read(handle, 0, 1)


def test_flags_are_those_of_open(call: Calls, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")

    with fails(errno.EEXIST):
        call.open(b"file", NEW | os.O_EXCL)
    call.write(call.open(b"file", os.O_WRONLY | os.O_APPEND), 0, b"6")
    assert (tmp_path / "file").read_bytes() == b"123456"
    call.open(b"file", os.O_WRONLY | os.O_TRUNC)
    assert (tmp_path / "file").read_bytes() == b""
    with fails(errno.ENOENT):
        call.open(b"missing", os.O_RDWR)
    with fails(errno.EBADF):
        call.write(call.open(b"file", os.O_RDONLY), 0, b"x")


def test_what_is_no_file_is_not_opened(call: Calls, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))

    for name in (b"fifo", b"link", b"socket", b"/dev/zero", b"/dev/tty"):
        for flags in (os.O_RDONLY, os.O_WRONLY, NEW | os.O_TRUNC):
            with fails(errno.EACCES, "it is no file"):
                call.open(name, flags)
    with fails(errno.EISDIR):
        call.open(b".", os.O_RDONLY)


def test_a_fifo_that_takes_a_files_place_holds_nothing_up(call: Calls, tmp_path: Path) -> None:
    fifo, file, there = tmp_path / "fifo", tmp_path / "file", tmp_path / "there"
    os.mkfifo(fifo)
    file.touch()
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for source in (fifo, file):
                os.link(source, tmp_path / "new")
                os.rename(tmp_path / "new", there)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(300):
            with contextlib.suppress(PermissionError, FileNotFoundError, OSError):
                call.close_handle(call.open(b"there", os.O_RDWR))
    finally:
        stop.set()
        thread.join()
    assert call.realpath(b".") == os.fsencode(tmp_path)


def test_its_own_memory_is_closed_to_it(call: Calls, agent: AgentProcess, tmp_path: Path) -> None:
    own = children(agent.process.pid)
    (tmp_path / "link").symlink_to("/proc/self/mem")
    names = [b"/proc/self/mem", b"/proc/thread-self/mem", b"link", b"/dev/fd/../mem"]
    names += [b"/proc/%d/mem" % pid for pid in own]

    for name in names:
        for flags in (os.O_RDONLY, os.O_WRONLY):
            with fails(errno.EACCES):
                call.open(name, flags)


def test_it_holds_no_descriptor_but_its_connection(call: Calls) -> None:
    links = {}
    for name in everything(call, b"/proc/self/fd"):
        path = b"/proc/self/fd/" + name
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            links[path] = call.readlink(path)

    (connection,) = [path for path, link in links.items() if link != b"/dev/null"]
    assert links[connection].startswith(b"socket:")
    assert len(links) == 4
    with fails(errno.EACCES):
        call.open(connection, os.O_RDWR)


def test_handles_are_bounded(call: Calls, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    taken = [call.open(b"file", os.O_RDONLY) for _ in range(255)]
    scan = call.opendir(b".")

    for again in (lambda: call.open(b"file", os.O_RDONLY), lambda: call.opendir(b".")):
        with fails(errno.EMFILE):
            again()

    call.close_handle(scan)
    assert call.open(b"file", os.O_RDONLY) not in taken


# -- directories and names -------------------------------------------------------------------------


def test_every_name_that_can_be_is_listed(call: Calls, tmp_path: Path) -> None:
    for name in (HOSTILE, b"plain", b".hidden", b" "):
        call.close_handle(call.open(name, NEW))

    assert sorted(everything(call, b".")) == sorted([HOSTILE, b"plain", b".hidden", b" "])
    assert call.stat(HOSTILE).size == 0
    with fails(errno.ENAMETOOLONG):
        call.open(HOSTILE + b"yyyyyyyyyyyy", NEW)


def test_thousands_of_entries_come_in_batches(call: Calls, tmp_path: Path) -> None:
    for n in range(3000):
        (tmp_path / f"{n:060}").touch()

    assert len(set(everything(call, b"."))) == 3000


def test_names_are_made_moved_and_removed(call: Calls, tmp_path: Path) -> None:
    call.mkdir(b"a", 0o700)
    call.mkdir(b"a/b")
    call.symlink(b"a/b", b"soft")
    call.close_handle(call.open(b"a/file", NEW))
    call.link(b"a/file", b"hard")

    assert call.readlink(b"soft") == b"a/b"
    assert stat.S_ISLNK(call.stat(b"soft", follow=False).mode)
    assert stat.S_ISDIR(call.stat(b"soft").mode)
    assert (tmp_path / "hard").stat().st_nlink == 2
    with fails(errno.ENOTEMPTY):
        call.rmdir(b"a")
    with fails(errno.EEXIST):
        call.mkdir(b"a")
    with fails(errno.EISDIR):
        call.remove(b"a")
    call.remove(b"soft")
    call.rmdir(b"a/b")
    assert everything(call, b"a") == [b"file"]


def test_a_rename_replaces_only_where_it_was_told_to(call: Calls, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        (tmp_path / f"d{name}").mkdir()

    for old, new in ((b"one", b"two"), (b"done", b"dtwo"), (b"one", b"dtwo")):
        with fails(errno.EEXIST):
            call.rename(old, new, replace=False)
    assert (tmp_path / "two").read_text() == "two"
    call.rename(b"one", b"two", replace=True)
    assert (tmp_path / "two").read_text() == "one"
    call.rename(b"two", b"three", replace=False)
    call.rename(b"done", b"dthree", replace=False)
    assert {path.name for path in tmp_path.iterdir()} == {"three", "dthree", "dtwo"}


def test_a_path_has_one_name(call: Calls, agent: AgentProcess, tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "link").symlink_to("a b")
    here = os.fsencode(tmp_path)

    for path in (b".", b"", b"link/..", b"./a b/../"):
        assert call.realpath(path) == here
    assert call.realpath(b"link") == here + b"/a b"
    assert call.realpath(b"link/new") == here + b"/a b/new"
    assert call.realpath(b"/../..") == b"/"
    assert call.realpath(b"/new") == b"/new"
    assert call.realpath(b"~/x", expand=True).endswith(b"/x")
    for path in (b"no/new", b"no/..", b"no/"):
        with fails(errno.ENOENT):
            call.realpath(path)
    with fails(errno.EINVAL):
        call.realpath(b"a\0b")


def test_what_was_removed_has_no_name(agent: AgentProcess, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with talking(agent, tmp_path / "here") as call:
        (tmp_path / "here").rmdir()

        for path in (b".", b"new/..", b"new/x"):
            with fails(errno.ENOENT):
                call.realpath(path)
        with fails(errno.ENOENT):
            call.open(b"file", NEW)


def test_one_that_was_killed_or_halted_is_an_end(
    agent: AgentProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "CALL_TIMEOUT_S", 0.2)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
        with talking(agent, tmp_path) as call:
            worker = int(call.readlink(b"/proc/self"))
            os.kill(worker, number)
            with pytest.raises(BackendFailed):
                call.stat(b".")
        os.kill(worker, signal.SIGCONT) if number == signal.SIGSTOP else None
        wait_until(lambda: not alive(worker))


def test_a_directory_that_is_gone_is_left_for_the_root(agent: AgentProcess, tmp_path: Path) -> None:
    with talking(agent, tmp_path / "missing") as call:
        assert call.realpath(b".") == b"/"


# -- attributes ------------------------------------------------------------------------------------


def test_attributes_change_one_by_one_and_all_at_once(call: Calls, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    handle = call.open(b"file", os.O_RDWR)

    call.change(b"file", Change(size=3, owner=(os.getuid(), os.getgid()), mode=0o4711))
    assert (path.read_bytes(), path.stat().st_mode & 0o7777) == (b"123", 0o4711)
    call.change_handle(handle, Change(size=4, times=(1, 4294967295)))

    assert call.stat_handle(handle) == Facts(
        *(stat.S_IFREG | path.stat().st_mode & 0o7777, 4, os.getuid(), os.getgid(), 1, 4294967295)
    )


def test_the_rest_is_changed_when_a_part_cannot_be(call: Calls, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()

    with fails(errno.EISDIR):
        call.change(b"directory", Change(size=0, mode=0o711, times=(5, 6)))

    state = (tmp_path / "directory").stat()
    assert (state.st_mode & 0o777, state.st_mtime) == (0o711, 6)


def test_a_links_own_times_are_not_its_targets(call: Calls, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")

    call.change(b"link", Change(times=(5, 6)), follow=False)
    with fails(errno.ENOTSUP):
        call.change(b"link", Change(mode=0o700), follow=False)

    assert (tmp_path / "link").lstat().st_mtime == 6
    assert (tmp_path / "file").stat().st_mtime != 6


def test_space_is_told(call: Calls, tmp_path: Path) -> None:
    found = call.space(b".")

    assert (found.frsize, found.namemax) == (os.statvfs(tmp_path).f_frsize, 255)


# -- whose calls they are --------------------------------------------------------------------------


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody can come to; pytest's own are for root alone."""
    with tempfile.TemporaryDirectory(prefix="hv-calls-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@AS_ROOT
def test_it_is_the_user_that_it_was_told_to_be(public: Path) -> None:
    (public / "closed").mkdir(0o700)
    (public / "open").mkdir()
    (public / "open").chmod(0o777)
    with (
        running_agent(public, spare=54320) as agent,
        talking(agent.ready(), public, "nobody") as call,
    ):
        call.close_handle(call.open(b"open/file", NEW))
        status = call.read(call.open(b"/proc/self/status", os.O_RDONLY), 0, 4096)

        with fails(errno.EACCES):
            call.open(b"closed/file", NEW)
        for path in (b"open/file", b"closed"):
            with fails(errno.EPERM):
                call.change(path, Change(owner=(0, 0)))
    assert (public / "open/file").stat().st_uid == 65534
    assert b"Uid:\t65534\t65534\t65534\t65534\n" in status
    assert b"CapEff:\t0000000000000000\n" in status


@AS_ROOT
def test_roots_calls_keep_nothing_of_the_agents_ids(tmp_path: Path) -> None:
    with running_agent(tmp_path, spare=54320) as agent, talking(agent.ready(), tmp_path) as call:
        status = call.read(call.open(b"/proc/self/status", os.O_RDONLY), 0, 4096)

    assert b"Uid:\t0\t0\t0\t0\n" in status


def test_a_user_that_is_not_there_is_refused(agent: AgentProcess, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="user"):
        Calls(agent.connect(), user="no-such", cwd=str(tmp_path))
    with pytest.raises(Invalid, match="cwd"):
        Calls(agent.connect(), user="", cwd="/proc/self/cwd")


def test_there_is_room_left_for_other_operations(agent: AgentProcess, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            stack.enter_context(talking(agent, tmp_path))
        with pytest.raises(BackendFailed, match="too many SFTP sessions"):
            Calls(agent.connect(), user="", cwd="/")
        with agent.connect() as sock:
            assert guest.list_files(sock, str(tmp_path), "", recursive=False) == []
    wait_until(lambda: not children(agent.process.pid))


def test_its_end_is_the_end_of_the_one_who_did_it(agent: AgentProcess, tmp_path: Path) -> None:
    with talking(agent, tmp_path) as call:
        call.open(b"file", NEW)
        (worker,) = children(agent.process.pid)

    wait_until(lambda: not alive(worker))
    with pytest.raises(BackendFailed):
        call.stat(b".")


# -- hostile agents --------------------------------------------------------------------------------


@pytest.fixture
def false() -> Iterator[Callable[..., Calls]]:
    """`false(answer, ...)`: calls to an agent that says these, one for each request, and no more.
    An answer of None is silence."""
    with contextlib.ExitStack() as stack:

        def make(*answers: bytes | None) -> Calls:
            host, inside = socket.socketpair()
            thread = threading.Thread(target=play, args=(inside, answers))
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(host.close)
            return Calls(host, user="", cwd="/")

        yield make


def play(sock: socket.socket, answers: tuple[bytes | None, ...]) -> None:
    with sock, contextlib.suppress(OSError):
        for answer in (GOOD, *answers):
            sock.recv(1 << 20)
            if answer is None:
                while sock.recv(1 << 20):
                    pass
            sock.sendall(answer or b"")


def said(**fields: frames.Writable) -> bytes:
    return frames.header(fields)


GOOD = said(ok=1)
WELL = [0o100644, 1, 0, 0, 0, 0]
LIES: list[tuple[str, bytes]] = [
    ("stat", said(ok=1)),
    ("stat", said(ok=1, facts=[0])),
    ("stat", said(ok=1, facts=[b"x"] * 6)),
    ("stat", said(ok=1, facts=[1 << 32, *WELL[1:]])),
    ("stat", said(ok=1, facts=[0o100644, -1, 0, 0, 0, 0])),
    ("stat", said(ok=1, facts=[0o100644, 1, 1 << 32, 0, 0, 0])),
    ("stat", said(ok=1, facts=[0o100644, 1, 0, -1, 0, 0])),
    ("stat", said(ok=2, facts=WELL)),
    ("stat", said(error="failed")),
    ("stat", said(error="failed", errno=0, message="")),
    ("stat", said(error="failed", errno=1 << 40, message="")),
    ("stat", said(error="failed", errno=2, message=b"x" * 5000)),
    ("stat", b"junk!"),
    ("stat", b""),
    ("stat", frames.frame(frames.DATA, b"x")),
    ("stat", b"\xff\xff\xff\xffH"),
    ("read", said(ok=1, data=b"more than was asked for")),
    ("read", said(ok=1, data=1)),
    ("open", said(ok=1, handle=0)),
    ("open", said(ok=1, handle=1 << 32)),
    ("open", said(ok=1, handle=b"1")),
    ("readdir", said(ok=1, entries=b"")),
    ("readdir", said(ok=1, entries=[[b"a"]])),
    ("readdir", said(ok=1, entries=[[1, *WELL]])),
    *(
        ("readdir", said(ok=1, entries=[[name, *WELL]]))
        for name in (b"", b".", b"..", b"a/b", b"../../etc/cron.d/x", b"a\0", b"x" * 256)
    ),
    ("readlink", said(ok=1, path=b"")),
    ("readlink", said(ok=1, path=b"a\0")),
    ("readlink", said(ok=1, path=b"x" * 5000)),
    ("realpath", said(ok=1, path=b"relative")),
    ("space", said(ok=1)),
]
ASKED: dict[str, Callable[[Calls], object]] = {
    "stat": lambda call: call.stat(b"a"),
    "read": lambda call: call.read(1, 0, 5),
    "open": lambda call: call.open(b"a", 0),
    "readdir": lambda call: call.readdir(1),
    "readlink": lambda call: call.readlink(b"a"),
    "realpath": lambda call: call.realpath(b"a"),
    "space": lambda call: call.space(b"a"),
}


@pytest.mark.parametrize(("asked", "answer"), LIES)
def test_what_cannot_be_is_refused(false: Callable[..., Calls], asked: str, answer: bytes) -> None:
    call = false(answer)

    with pytest.raises(BackendFailed):
        ASKED[asked](call)


def test_what_it_says_of_an_error_is_fit_to_be_shown(false: Callable[..., Calls]) -> None:
    call = false(said(error="failed", errno=28, message=b"\x1b[2Jfull\r\n\xff"))

    with fails(errno.ENOSPC, r"\?\[2Jfull\?\?\?"):
        call.mkdir(b"a")


def test_one_that_says_nothing_is_waited_for_so_long(
    false: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "CALL_TIMEOUT_S", 0.2)
    call = false(None)
    began = time.monotonic()

    with pytest.raises(BackendFailed, match="no answer"):
        call.stat(b"a")

    assert time.monotonic() - began < 5


def test_a_call_under_way_ends_when_another_thread_hangs_up(false: Callable[..., Calls]) -> None:
    call = false(None)
    timer = threading.Timer(0.1, call.hang_up)
    timer.start()

    with pytest.raises(BackendFailed):
        call.stat(b"a")
    timer.join()
    call.hang_up()
    call.close()
    call.close()


def test_one_that_does_not_begin_well_is_an_error_of_the_domain() -> None:
    for answer in (b"", said(ok=0), said(error="failed", message="no"), said(error="bad-user")):
        host, inside = socket.socketpair()
        with host, inside:
            inside.sendall(answer)
            inside.shutdown(socket.SHUT_WR)
            with pytest.raises(HeyvmError):
                Calls(host, user="", cwd="/")


@BOXED
def test_a_worker_is_no_way_to_the_agent(tmp_path: Path) -> None:
    """As pid 1 of its own process table, as in a sandbox."""
    with running_agent(tmp_path, box=own_box()) as agent, talking(agent.ready(), tmp_path) as call:
        for name in (b"/proc/self/mem", b"/proc/self/task/../mem"):
            with fails(errno.EACCES):
                call.open(name, os.O_RDWR)
        assert call.readlink(b"/proc/self") != b"1"
