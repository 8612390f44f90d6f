"""A data directory on a file system that fills up: no bytes left, or no inodes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server import Server, Session, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
MIB = 1024 * 1024
ROOM = "size=128m,nr_inodes=12000,mode=755"
# Below what the registry keeps in reserve for deletes.
SPARE_INODES = 12000


class Confined(Server):
    """A server whose data directory lies on a file system of its own, `volume`."""

    def __init__(self, volume: Path) -> None:
        self.volume = volume
        super().__init__()

    def start(self) -> None:
        self.data_dir = self.volume / "data"
        super().start()


class Hog:
    """Takes all that a file system has left, and gives it back."""

    def __init__(self, volume: Path) -> None:
        self.directory = volume / "hog"
        self.directory.mkdir()

    def take_bytes(self) -> None:
        with (self.directory / "bytes").open("ab", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(MIB))
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x")

    def take_inodes(self) -> None:
        with contextlib.suppress(OSError):
            for number in range(SPARE_INODES):
                os.mknod(self.directory / str(number))

    def give_back(self) -> None:
        for path in self.directory.iterdir():
            path.unlink()


@pytest.fixture
def volume() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="hvv-"))
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", ROOM, "heyvm-test", place], check=True)
    except (OSError, subprocess.CalledProcessError):
        place.rmdir()
        pytest.skip("this root may not mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
        place.rmdir()


@pytest.fixture
def confined(volume: Path) -> Iterator[Confined]:
    with Confined(volume) as server:
        yield server


@pytest.fixture
def hog(volume: Path, confined: Confined) -> Iterator[Hog]:
    taker = Hog(volume)
    yield taker
    taker.give_back()


def create(http: Session) -> str:
    answer = http.post("/sandboxes", json={"start_command": "sleep 1000"})
    assert answer.status_code == 201, answer.text
    return f"/sandboxes/{answer.json()['id']}"


def run(http: Session, path: str, command: str) -> dict[str, Any]:
    answer = http.post(f"{path}/execute", json={"command": command})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def upload(http: Session, path: str, size: int, name: str = "new") -> Any:
    form = {"mount_path": (None, "/workspace"), "file_path": (None, name)}
    return http.post(f"{path}/files", files={**form, "file": ("f", bytes(size))})


def assert_full(answer: Any) -> None:
    assert answer.status_code == 507, answer.text
    problem = answer.json()
    assert problem["type"] == "urn:heyvm:problem:storage-full"
    assert "Traceback" not in answer.text


def assert_unharmed(server: Confined) -> None:
    with contextlib.closing(sqlite3.connect(server.data_dir / "registry.db")) as registry:
        assert registry.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def assert_all_is_well(server: Confined) -> None:
    """After there is room again."""
    assert_unharmed(server)
    with server.http() as http:
        path = create(http)
        assert upload(http, path, MIB).status_code == 201
        assert run(http, path, "wc -c < new")["stdout"].strip() == str(MIB)
        assert http.patch(path, json={"metadata": {"a": "b"}}).status_code == 200
        assert http.post(f"{path}/restart").json()["status"] == "running"
        assert http.delete(path).status_code == 204
    wait_until(lambda: not list((server.data_dir / "trash").iterdir()), "the trash is empty")
    assert not server.sandbox_pids()


def test_a_full_disk_is_a_507_and_delete_mends_it(confined: Confined, hog: Hog) -> None:
    with confined.http() as http:
        kept, filled = create(http), create(http)
        run(http, kept, "echo before > kept")
        run(http, filled, f"head -c {8 * MIB} /dev/urandom > ballast")
        hog.take_bytes()

        assert_full(upload(http, kept, 2 * MIB))
        assert_full(http.post("/sandboxes", json={}))
        written = run(http, kept, "head -c 1000000 /dev/zero > more; echo $?")
        assert "No space left" in written["stderr"]
        assert http.get("/health").ok
        assert len(http.get("/sandboxes").json()) == 2
        names = [one["name"] for one in http.get(f"{kept}/files").json()["files"]]
        assert "new" not in names
        assert http.get(f"{kept}/files/kept").text == "before\n"

        assert http.delete(filled).status_code == 204
        assert http.get(filled).status_code == 404
        assert upload(http, kept, 2 * MIB).status_code == 201
        assert http.delete(kept).status_code == 204
    hog.give_back()
    assert_all_is_well(confined)


def test_every_change_on_a_full_disk_is_done_or_a_507(confined: Confined, hog: Hog) -> None:
    with confined.http() as http:
        paths = [create(http) for _ in range(3)]
        hog.take_bytes()

        # Each of these writes to the registry, some in so few bytes that there is room for them.
        for round_ in range(40):
            answer = http.patch(paths[0], json={"metadata": {"x": f"{round_}" * 5000}})
            assert answer.status_code in (200, 507), answer.text
            hog.take_bytes()
        assert_full(http.patch(paths[0], json={"metadata": {"x": "y" * 500_000}}))
        for verb in ("stop", "start", "restart", "force-stop"):
            answer = http.post(f"{paths[1]}/{verb}")
            assert answer.status_code in (200, 507), (verb, answer.text)
        assert http.get(paths[0]).json()["status"] == "running"
        assert run(http, paths[2], "echo still here")["stdout"] == "still here\n"

        for path in paths:
            assert http.delete(path).status_code == 204
        assert http.get("/sandboxes?status=all").json() == []
    hog.give_back()
    assert_all_is_well(confined)


def test_without_inodes_it_is_a_507_and_delete_mends_it(confined: Confined, hog: Hog) -> None:
    with confined.http() as http:
        kept, filled = create(http), create(http)
        run(http, filled, "for i in $(seq 500); do : > $i; done")
        hog.take_inodes()

        assert_full(upload(http, kept, 10))
        assert_full(http.post("/sandboxes", json={}))
        assert "No space left" in run(http, kept, "touch more")["stderr"]
        assert http.patch(kept, json={"name": "needs no inode"}).status_code == 200
        assert http.delete(filled).status_code == 204
        assert upload(http, kept, 10).status_code == 201
        assert http.delete(kept).status_code == 204
    hog.give_back()
    assert_all_is_well(confined)


def test_a_server_that_is_killed_on_a_full_disk_comes_back(confined: Confined, hog: Hog) -> None:
    with confined.http() as http:
        path = create(http)
        hog.take_bytes()
        assert_full(upload(http, path, MIB))
    confined.kill()

    confined.start()

    with confined.http() as http:
        assert http.get(path).json()["status"] == "running"
        assert run(http, path, "echo still here")["stdout"] == "still here\n"
        assert http.delete(path).status_code == 204
    hog.give_back()
    assert_all_is_well(confined)


def test_a_sparse_file_of_a_petabyte_costs_nothing(confined: Confined, volume: Path) -> None:
    with confined.http() as http:
        path = create(http)
        before = os.statvfs(volume).f_bavail
        run(http, path, "truncate -s 1P sparse 2>/dev/null || truncate -s 7E sparse")
        (entry,) = http.get(f"{path}/files").json()["files"]
        assert entry["size"] >= 1 << 50

        head = http.head(f"{path}/files/sparse")
        part = http.get(f"{path}/files/sparse", headers={"Range": "bytes=-3"})

        assert int(head.headers["Content-Length"]) == entry["size"]
        assert (part.status_code, part.content) == (206, b"\0\0\0")
        assert before - os.statvfs(volume).f_bavail < 1000
        assert http.delete(f"{path}/files/sparse").status_code == 204


def test_what_a_sandbox_wrote_is_free_again_when_delete_answers(
    confined: Confined, volume: Path
) -> None:
    with confined.http() as http:
        http.delete(create(http))  # what the first one makes for all
        wait_until(lambda: list(volume.glob("*/*.ballast")), "the keeper has put room aside")
        before = os.statvfs(volume)
        path = create(http)
        run(
            http, path, f"head -c {40 * MIB} /dev/zero > big; for i in $(seq 2000); do : > $i; done"
        )

        assert http.delete(path).status_code == 204

        after = os.statvfs(volume)
        assert (before.f_bavail - after.f_bavail) * after.f_bsize < MIB
        assert before.f_favail - after.f_favail < 50
