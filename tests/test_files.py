"""Files of a sandbox: which mount, which path, and that nothing is held longer than needed."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest

from heyvm.errors import BackendFailed, BadRequest, Conflict, NotFound
from heyvm.files import Files, mount_of, relative
from heyvm.models import Mount, Sandbox, Status
from tests.agents import running_agent

NOW = 1_700_000_000.0
SANDBOX = Sandbox("sb-1", "a", "a", Status.RUNNING, NOW, NOW, "fake", "host")


class OneSandbox:
    """A lifecycle whose only sandbox is one agent; `visits` counts those that are not over."""

    def __init__(self, agent, *mounts):
        self.agent = agent
        self.sandbox = replace(SANDBOX, mounts=mounts)
        self.visits = 0

    def get(self, ref):
        return self.sandbox

    @contextmanager
    def visit(self, ref):
        self.visits += 1
        try:
            yield self.agent.connect
        finally:
            self.visits -= 1


@pytest.fixture
def mount(tmp_path):
    path = tmp_path / "shared"
    path.mkdir()
    return path


@pytest.fixture
def one(tmp_path, mount):
    with running_agent(tmp_path) as agent:
        yield OneSandbox(agent.ready(), Mount("/host", str(mount)))


@pytest.fixture
def files(one):
    return Files(one)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a", "a"),
        ("a//b/./c/", "a/b/c"),
        ("", ""),
        ("/workspace/a", "a"),
        ("/workspace", ""),
        ("//workspace//a/", "a"),
        (" a ", " a "),
        ("\udcff", "\udcff"),
        ("x" * 255, "x" * 255),
    ],
)
def test_a_path_is_relative_to_its_mount_or_below_it(path, found):
    assert relative("/workspace", path) == found


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "a/../b",
        "../a",
        "/workspace/../etc/passwd",
        "/etc/passwd",
        "/workspaces",
        "/",
        "a\0b",
        "a\nb",
        "x" * 256,
        "ä" * 128,
        "/".join(["x" * 200] * 21),
        "\ud800",
    ],
)
def test_every_other_path_is_refused(path):
    with pytest.raises(BadRequest):
        relative("/workspace", path)


def test_a_mount_is_known_by_its_path_in_the_sandbox():
    sandbox = replace(
        SANDBOX, mounts=(Mount("/h", "/mnt/x"), Mount("/h2", "/mnt/later", pending=True))
    )

    assert mount_of(sandbox, "/workspace/") == "/workspace"
    assert mount_of(sandbox, "/mnt/x") == "/mnt/x"
    for wrong in ("/mnt/later", "/mnt", "/", "", "/mnt/x/y", "workspace", "/workspace/../etc"):
        with pytest.raises(NotFound) as caught:
            mount_of(sandbox, wrong)
        assert caught.value.detail == (
            f"Mount not found: {wrong} (available mounts: ['/workspace', '/mnt/x'])"
        )


def test_a_file_goes_up_is_listed_comes_down_and_goes(files, mount):
    at = str(mount)
    assert files.upload("a", at, "b/c", iter([b"con", b"tent"])) == 7

    assert [info.path for info in files.list("a", at, "", True)] == ["b", "b/c"]
    download = files.open("a", at, "b/c")
    assert (download.info.name, download.size) == ("c", 7)
    assert b"".join(download.chunks) == b"content"
    assert b"".join(files.open("a", at, f"{at}/b/c", 3, 2).chunks) == b"te"
    files.delete("a", at, "b", True)
    with pytest.raises(NotFound):
        files.open("a", at, "b/c")


def test_a_directory_goes_both_ways_as_a_tar(files, mount):
    files.upload("a", str(mount), "from/file", iter([b"x"]))

    tar = files.open_tar("a", str(mount), "from")
    assert tar.size is None
    files.upload_tar("a", str(mount), "to", tar.chunks)

    assert (mount / "to/file").read_bytes() == b"x"


def test_an_etag_changes_with_the_file(files, mount):
    at = str(mount)
    files.upload("a", at, "f", iter([b"1"]))
    before = files.stat("a", at, "f")
    assert files.stat("a", at, "f").etag == before.etag

    files.upload("a", at, "f", iter([b"2"]))

    assert files.stat("a", at, "f").etag != before.etag
    assert list(before.chunks) == []


def test_a_visit_lasts_as_long_as_its_download(one, files, mount):
    (mount / "f").write_bytes(bytes(3 << 20))

    whole = files.open("a", str(mount), "f")
    assert one.visits == 1
    assert sum(map(len, whole.chunks)) == 3 << 20
    assert one.visits == 0

    closed = files.open("a", str(mount), "f")
    next(closed.chunks)
    closed.chunks.close()
    assert one.visits == 0

    cut = files.open("a", str(mount), "f")
    next(cut.chunks)
    (mount / "f").write_bytes(b"")
    with pytest.raises(BackendFailed):
        list(cut.chunks)
    assert one.visits == 0

    with pytest.raises(NotFound):
        files.open("a", str(mount), "missing")
    files.stat("a", str(mount), "f")
    assert one.visits == 0


def test_a_read_only_mount_is_not_written_to(one, mount):
    one.sandbox = replace(one.sandbox, mounts=(Mount("/host", str(mount), read_only=True),))
    (mount / "f").touch()
    files = Files(one)

    for attempt in (
        lambda: files.upload("a", str(mount), "g", iter([])),
        lambda: files.upload_tar("a", str(mount), "", iter([])),
        lambda: files.delete("a", str(mount), "f", False),
    ):
        with pytest.raises(Conflict, match="read-only"):
            attempt()
    assert files.list("a", str(mount), "", False)[0].name == "f"


def test_a_mount_itself_is_not_deleted(files, mount):
    for path in ("", ".", str(mount)):
        with pytest.raises(BadRequest):
            files.delete("a", str(mount), path, True)
