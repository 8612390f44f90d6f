"""File operations of a real agent: nothing leads out of the mount, nothing is left half done."""

from __future__ import annotations

import io
import os
import random
import socket
import tarfile
import time
from pathlib import Path

import pytest

from heyvm import guest
from heyvm.errors import BackendFailed, BadRequest, Conflict, HeyvmError, NotFound
from tests.agents import running_agent, wait_until

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    with running_agent(tmp_path_factory.mktemp("agent")) as agent:
        yield agent.ready()


@pytest.fixture
def mount(agent, tmp_path):
    """A mount of its own for each test, as `Mount`."""
    path = tmp_path / "mount"
    path.mkdir()
    return Mount(agent, path)


class Mount:
    """The operations on one mount, each on a connection of its own."""

    def __init__(self, agent, path):
        self.agent, self.path = agent, path

    def list(self, path="", recursive=False):
        with self.agent.connect() as sock:
            return guest.list_files(sock, str(self.path), path, recursive=recursive)

    def paths(self, path="", recursive=True):
        return [info.path for info in self.list(path, recursive)]

    def read(self, path, **span):
        with self.agent.connect() as sock:
            return b"".join(guest.read(sock, str(self.path), path, **span)[1])

    def tar(self, path=""):
        with self.agent.connect() as sock:
            return b"".join(guest.read_tar(sock, str(self.path), path)[1])

    def write(self, path, *chunks, tar=False):
        with self.agent.connect() as sock:
            return guest.write(sock, str(self.path), path, iter(chunks), tar=tar)

    def delete(self, path, recursive=False):
        with self.agent.connect() as sock:
            guest.delete(sock, str(self.path), path, recursive=recursive)


@pytest.fixture
def outside(tmp_path):
    """What must never be read, changed or removed."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "secret").write_text("secret")
    return path


@pytest.fixture
def leads_out(mount, outside):
    """Ways out of the mount, by name."""
    (mount.path / "absolute").symlink_to(outside)
    (mount.path / "relative").symlink_to("../outside")
    (mount.path / "file").symlink_to(outside / "secret")
    (mount.path / "proc").symlink_to("/proc/self/root" + str(outside))
    (mount.path / "deep").mkdir()
    (mount.path / "deep" / "up").symlink_to("../../outside")
    (mount.path / "chain").symlink_to("deep/up")
    return mount


# -- list ------------------------------------------------------------------------------------------


def test_a_listing_says_what_each_entry_is(mount):
    (mount.path / "file").write_bytes(b"12345")
    (mount.path / "file").chmod(0o640)
    os.utime(mount.path / "file", ns=(0, 1_600_000_000_250_000_000))
    (mount.path / "directory").mkdir()
    (mount.path / "link").symlink_to("nowhere")
    os.mkfifo(mount.path / "fifo")

    found = {info.name: info for info in mount.list()}

    assert {name: info.type for name, info in found.items()} == {
        "file": "file",
        "directory": "directory",
        "link": "symlink",
        "fifo": "fifo",
    }
    info = found["file"]
    assert (info.size, info.mode, info.modified_at) == (5, 0o640, 1_600_000_000.25)


def test_a_recursive_listing_has_every_path_from_the_mount_on(mount):
    (mount.path / "a/b").mkdir(parents=True)
    (mount.path / "a/b/c").touch()
    (mount.path / "x").touch()

    assert mount.paths() == ["a", "a/b", "a/b/c", "x"]
    assert mount.paths("a") == ["a/b", "a/b/c"]
    assert mount.paths(recursive=False) == ["a", "x"]


def test_names_that_are_not_utf_8_survive_listing_and_reading(mount):
    name = b"caf\xe9 \xff\n"
    with open(bytes(mount.path) + b"/" + name, "wb") as file:
        file.write(b"found")

    listed = mount.paths()[0]

    assert os.fsencode(listed) == name
    assert mount.read(listed) == b"found"
    mount.delete(listed)
    assert mount.paths() == []


def test_thousands_of_entries_arrive(mount):
    for n in range(3000):
        (mount.path / f"{n:05}{'x' * 60}").touch()

    assert len(mount.list()) == 3000


def test_what_is_no_directory_cannot_be_listed(mount):
    (mount.path / "file").touch()

    with pytest.raises(Conflict, match="not a directory"):
        mount.list("file")
    with pytest.raises(NotFound):
        mount.list("missing")


def test_a_mount_that_is_not_there_is_not_found(mount):
    mount.path.rmdir()

    with pytest.raises(NotFound):
        mount.list()


# -- read ------------------------------------------------------------------------------------------


def test_a_file_is_read_whole_or_in_part(mount):
    content = os.urandom(2 * MIB + 5)
    (mount.path / "file").write_bytes(content)

    assert mount.read("file") == content
    assert mount.read("file", offset=100, length=5) == content[100:105]
    assert mount.read("file", offset=2 * MIB) == content[-5:]
    assert mount.read("file", offset=9 * MIB) == b""
    assert mount.read("file", length=0) == b""
    assert mount.read("./file") == content


def test_links_within_the_mount_are_followed(mount):
    (mount.path / "a").mkdir()
    (mount.path / "a/file").write_text("hi")
    (mount.path / "relative").symlink_to("a/../a/file")
    (mount.path / "absolute").symlink_to(mount.path / "a")
    (mount.path / "a/top").symlink_to("..")

    assert mount.read("relative") == b"hi"
    assert mount.read("absolute/file") == b"hi"
    assert mount.read("a/top/a/top/relative") == b"hi"
    assert [info.path for info in mount.list("absolute")] == ["absolute/file", "absolute/top"]


@pytest.mark.parametrize("path", ["absolute", "relative", "proc", "deep/up", "chain"])
def test_no_link_leads_out(leads_out, outside, path):
    mount = leads_out
    for attempt in (
        lambda: mount.read(f"{path}/secret"),
        lambda: mount.list(path),
        lambda: mount.tar(path),
        lambda: mount.write(f"{path}/new", b"x"),
        lambda: mount.write(path, tar_of(("new", b"x")), tar=True),
        lambda: mount.delete(f"{path}/secret"),
        lambda: mount.delete(f"{path}/secret", recursive=True),
    ):
        with pytest.raises(BadRequest, match="leads out"):
            attempt()

    assert os.listdir(outside) == ["secret"]


def test_a_link_to_a_file_outside_is_not_read(leads_out):
    with pytest.raises(BadRequest, match="leads out"):
        leads_out.read("file")


def test_links_in_a_circle_end(mount):
    (mount.path / "a").symlink_to("b")
    (mount.path / "b").symlink_to("a")

    with pytest.raises(BadRequest):
        mount.read("a")


@pytest.mark.parametrize(
    "path", ["../outside/secret", "a/../../outside/secret", "/etc/passwd", ".."]
)
def test_paths_that_climb_are_refused_by_the_agent_too(mount, outside, path):
    for attempt in (mount.read, mount.list, mount.delete, lambda path: mount.write(path, b"")):
        with pytest.raises(BadRequest):
            attempt(path)


def test_what_is_no_file_is_refused_at_once(mount):
    os.mkfifo(mount.path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(mount.path / "socket"))
    (mount.path / "null").symlink_to("fifo")
    began = time.monotonic()

    for name in ("fifo", "socket", "null"):
        with pytest.raises(BadRequest, match="cannot be read"):
            mount.read(name)
    with pytest.raises(Conflict, match="is a directory"):
        mount.read("")

    assert time.monotonic() - began < 2
    mount.delete("fifo")
    mount.delete("socket")


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device needs root")
def test_a_device_is_not_opened(mount):
    os.mknod(mount.path / "zero", 0o666 | 0o020000, os.makedev(1, 5))

    with pytest.raises(BadRequest, match="device"):
        mount.read("zero")
    mount.delete("zero")


def test_a_file_that_shrinks_while_it_is_read_is_never_padded(agent, mount):
    (mount.path / "file").write_bytes(bytes(8 * MIB))

    with agent.connect() as sock:
        head, chunks = guest.read(sock, str(mount.path), "file")
        next(chunks)
        os.truncate(mount.path / "file", MIB)
        with pytest.raises(BackendFailed, match="shorter"):
            for _ in chunks:
                pass

    assert head.size == 8 * MIB


# -- write -----------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_parents(mount):
    assert mount.write("a/b/c", b"one", b"", b"two" * MIB) == 3 + 3 * MIB

    assert (mount.path / "a/b/c").read_bytes() == b"one" + b"two" * MIB
    assert (mount.path / "a/b/c").stat().st_mode & 0o7777 == 0o644
    assert mount.write("empty") == 0


def test_a_file_that_is_replaced_keeps_its_mode_but_no_setuid(mount):
    (mount.path / "tool").write_text("old")
    (mount.path / "tool").chmod(0o4750)

    mount.write("tool", b"new")

    assert (mount.path / "tool").read_text() == "new"
    assert (mount.path / "tool").stat().st_mode & 0o7777 == 0o750


def test_an_upload_that_breaks_off_leaves_nothing(agent, mount):
    (mount.path / "file").write_text("old")

    def broken():
        yield b"half"
        wait_until(lambda: len(os.listdir(mount.path)) == 2)
        assert mount.paths() == ["file"]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        write_from(agent, mount, broken())

    wait_until(lambda: os.listdir(mount.path) == ["file"])
    assert (mount.path / "file").read_text() == "old"


def write_from(agent, mount, chunks):
    with agent.connect() as sock:
        return guest.write(sock, str(mount.path), "file", chunks)


def test_a_link_is_replaced_not_written_through(leads_out, outside):
    leads_out.write("file", b"mine")

    assert (outside / "secret").read_text() == "secret"
    assert not (leads_out.path / "file").is_symlink()


def test_what_cannot_be_written_to_is_refused_before_all_is_sent(mount):
    (mount.path / "directory").mkdir()
    (mount.path / "file").touch()

    def endless():
        while True:
            yield bytes(MIB)

    for path in ("directory", "", "file/below"):
        with pytest.raises(Conflict), mount.agent.connect() as sock:
            guest.write(sock, str(mount.path), path, endless())
    assert sorted(os.listdir(mount.path)) == ["directory", "file"]


def test_a_name_that_is_too_long_is_refused(mount):
    with pytest.raises(BadRequest):
        mount.write("x" * 256, b"")
    assert mount.write("x" * 255, b"") == 0


def test_of_two_uploads_at_once_one_whole_one_wins(agent, mount):
    with agent.connect() as one, agent.connect() as two:

        def pausing():
            yield b"1" * MIB
            assert guest.write(two, str(mount.path), "file", iter([b"2" * MIB])) == MIB
            assert (mount.path / "file").read_bytes() == b"2" * MIB
            yield b"1"

        guest.write(one, str(mount.path), "file", pausing())

    assert (mount.path / "file").read_bytes() == b"1" * (MIB + 1)


# -- delete ----------------------------------------------------------------------------------------


def test_delete_removes_one_entry_and_follows_nothing(leads_out, outside):
    leads_out.delete("absolute", recursive=True)
    leads_out.delete("file")

    assert not os.path.lexists(leads_out.path / "absolute")
    assert (outside / "secret").exists()


def test_a_directory_goes_when_it_is_empty_or_when_asked_for_with_all(mount, outside):
    (mount.path / "a/b").mkdir(parents=True)
    (mount.path / "a/link").symlink_to(outside)

    with pytest.raises(Conflict, match="recursive=true"):
        mount.delete("a")
    mount.delete("a/b")
    mount.delete("a", recursive=True)

    assert os.listdir(mount.path) == []
    assert (outside / "secret").exists()


def test_what_is_not_there_cannot_be_deleted(mount):
    with pytest.raises(NotFound):
        mount.delete("missing")
    with pytest.raises(NotFound):
        mount.delete("missing/below", recursive=True)


def test_the_mount_itself_stays(mount):
    (mount.path / "file").touch()

    for path in ("", ".", "./"):
        with pytest.raises(BadRequest):
            mount.delete(path, recursive=True)
    assert (mount.path / "file").exists()


def test_a_very_deep_tree_is_listed_and_deleted(mount):
    at = os.open(mount.path, os.O_RDONLY)
    for _ in range(2100):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)

    assert len(mount.paths()) == 2048  # as deep as a path can say
    mount.delete("d", recursive=True)

    assert os.listdir(mount.path) == []


# -- tar -------------------------------------------------------------------------------------------


def tar_of(*entries, form=tarfile.PAX_FORMAT):
    """Pairs of name and content; or ready-made TarInfo for the rest."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size, info.mtime = len(entry[1]), 1_600_000_000
                archive.addfile(info, io.BytesIO(entry[1]))
    return stream.getvalue()


def entry(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_a_directory_comes_as_a_tar_that_others_can_read(mount, tmp_path):
    (mount.path / "a/b").mkdir(parents=True)
    (mount.path / "a/b/file").write_bytes(b"x" * 70_001)
    (mount.path / "a/b/file").chmod(0o755)
    (mount.path / ("n" * 120)).write_text("long name")
    (mount.path / "a/link").symlink_to("t" * 150)
    with open(bytes(mount.path) + b"/\xe9", "wb") as file:
        file.write(b"odd name")
    os.mkfifo(mount.path / "fifo")

    with tarfile.open(fileobj=io.BytesIO(mount.tar())) as archive:
        members = {member.name: member for member in archive}
        content = archive.extractfile("a/b/file").read()

    assert set(members) == {"a", "a/b", "a/b/file", "n" * 120, "a/link", "\udce9"}
    assert content == b"x" * 70_001
    assert members["a/b/file"].mode == 0o755
    assert members["a/link"].linkname == "t" * 150


def test_numbers_beyond_octal_are_written_too(mount):
    with (mount.path / "huge").open("wb") as file:
        file.truncate(9 << 30)

    with mount.agent.connect() as sock:
        _, chunks = guest.read_tar(sock, str(mount.path), "")
        info = tarfile.TarInfo.frombuf(next(chunks)[:512], "utf-8", "surrogateescape")

    assert info.size == 9 << 30


def test_a_tar_of_nothing_is_one(mount):
    with tarfile.open(fileobj=io.BytesIO(mount.tar())) as archive:
        assert archive.getnames() == []


def test_a_file_is_no_directory_to_make_a_tar_of(mount):
    (mount.path / "file").touch()

    with pytest.raises(Conflict, match="not a directory"):
        mount.tar("file")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_unpacked_whatever_its_form(mount, form):
    long = "d" * 90 + "/" + "f" * 90
    odd = "" if form == tarfile.USTAR_FORMAT else "ä" * 100
    archive = tar_of(("a/file", b"content"), (long, b"long"), ("odd" + odd, b""), form=form)

    size = mount.write("into/here", archive[:700], archive[700:], tar=True)

    top = mount.path / "into/here"
    assert size == 11
    assert (top / "a/file").read_bytes() == b"content"
    assert (top / "a/file").stat().st_mtime == 1_600_000_000
    assert (top / long).read_bytes() == b"long"
    assert (top / ("odd" + odd)).exists()
    assert sorted(os.listdir(top)) == sorted(["a", "d" * 90, "odd" + odd])


def test_what_was_downloaded_can_be_uploaded(mount):
    (mount.path / "from/sub").mkdir(parents=True)
    (mount.path / "from/sub/file").write_bytes(os.urandom(100_000))
    (mount.path / "from/link").symlink_to("sub/file")

    mount.write("to", mount.tar("from"), tar=True)

    assert (mount.path / "to/link").read_bytes() == (mount.path / "from/sub/file").read_bytes()
    assert os.readlink(mount.path / "to/link") == "sub/file"


def test_an_archive_is_merged_into_what_is_there(mount):
    (mount.path / "a").mkdir()
    (mount.path / "a/old").write_text("old")
    (mount.path / "a/same").write_text("old")

    mount.write("", tar_of(("a/same", b"new"), ("a/new", b"new")), tar=True)

    assert {path.name: path.read_text() for path in (mount.path / "a").iterdir()} == {
        "old": "old",
        "same": "new",
        "new": "new",
    }
    assert os.listdir(mount.path) == ["a"]


def test_hard_links_within_an_archive_are_made(mount):
    mount.write("", tar_of(("a", b"x"), entry("b", tarfile.LNKTYPE, "a")), tar=True)

    assert (mount.path / "a").samefile(mount.path / "b")


HOSTILE = {
    "climbs": [("../evil", b"x")],
    "climbs inside": [("a/../../evil", b"x")],
    "absolute": [("/tmp/evil", b"x")],
    "link out": [entry("l", tarfile.SYMTYPE, "../outside")],
    "absolute link": [entry("l", tarfile.SYMTYPE, "/etc")],
    "link out by a detour": [entry("l", tarfile.SYMTYPE, "a/../../outside")],
    "through a link": [entry("l", tarfile.SYMTYPE, "."), ("l/evil", b"x")],
    "hard link out": [entry("h", tarfile.LNKTYPE, "../outside/secret")],
    "hard link absolute": [entry("h", tarfile.LNKTYPE, "/etc/passwd")],
    "hard link to what was there": [entry("h", tarfile.LNKTYPE, "kept")],
    "hard link through a link": [
        entry("l", tarfile.SYMTYPE, "."),
        entry("h", tarfile.LNKTYPE, "l/x"),
    ],
    "device": [entry("zero", tarfile.CHRTYPE)],
    "block device": [entry("sda", tarfile.BLKTYPE)],
    "fifo": [entry("fifo", tarfile.FIFOTYPE)],
    "NUL": [("a", b"x"), entry("", tarfile.REGTYPE)],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_changes_nothing(mount, outside, name):
    (mount.path / "kept").write_text("kept")

    with pytest.raises(BadRequest):
        mount.write("", tar_of(("good", b"x"), *HOSTILE[name]), tar=True)

    assert os.listdir(mount.path) == ["kept"]
    assert os.listdir(outside) == ["secret"]
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"no tar at all" * 100,
        bytes(700),
        tar_of(("a", b"x" * 2000))[:1500],
        tar_of(("a", b"x"))[:1024],
        b"\x1f\x8b" + bytes(1000),
    ],
)
def test_what_is_no_whole_archive_changes_nothing(mount, broken):
    if broken == bytes(700):
        assert mount.write("", broken, tar=True) == 0
        return
    with pytest.raises(BadRequest, match="archive"):
        mount.write("", broken, tar=True)

    assert os.listdir(mount.path) == []


def test_an_archive_that_would_put_a_file_over_a_directory_changes_nothing(mount):
    (mount.path / "a").mkdir()
    (mount.path / "b").touch()

    for archive in (tar_of(("0", b""), ("a", b"")), tar_of(("0", b""), ("b/c", b""))):
        with pytest.raises(Conflict):
            mount.write("", archive, tar=True)

    assert sorted(os.listdir(mount.path)) == ["a", "b"]


def test_an_archive_brings_no_setuid(mount):
    info = tarfile.TarInfo("tool")
    info.mode = 0o6755

    mount.write("", tar_of(info), tar=True)

    assert (mount.path / "tool").stat().st_mode & 0o7777 == 0o755


def test_random_archives_do_no_harm(mount, outside):
    generator = random.Random(3)
    whole = tar_of(("a/b", b"x" * 600), entry("l", tarfile.SYMTYPE, "a"), ("ä" * 120, b"y"))
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 6)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            mount.write("into", bytes(data), tar=True)
        except HeyvmError as error:
            assert not isinstance(error, BackendFailed), error

    assert os.listdir(mount.path) == ["into"]
    assert os.listdir(outside) == ["secret"]


def test_mkdir_makes_parents_and_may_be_repeated(agent, tmp_path):
    for _ in range(2):
        with agent.connect() as sock:
            guest.mkdir(sock, str(tmp_path / "a/b"))

    assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with agent.connect() as sock, pytest.raises(Conflict):
        guest.mkdir(sock, str(tmp_path / "file"))
