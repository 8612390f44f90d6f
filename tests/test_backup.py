"""`heyvm backup` of a server that runs, and `heyvm restore` of it elsewhere: everything is there,
nothing stays halted, and a file from a stranger cannot reach beyond the data directory."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from heyvm.backends import cgroups, ranges
from heyvm.settings import mark_of
from tests.server import REPOSITORY, Server, wait_until
from tests.test_cli import heyvm

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root's sandboxes have own ids")

FILES = """set -e
mkdir -p /root/w && cd /root/w && echo hello >a && ln a b && ln -s /etc/passwd link && mkfifo pipe
chown 33:34 a && chmod 4755 a && rm /usr/bin/tac /etc/nsswitch.conf
rm -r /usr/share/common-licenses && mkdir /usr/share/common-licenses
truncate -s 300M hole && echo end >>hole && mkdir -m 0 shut
python3 -c 'import os; os.setxattr("a", "user.mine", b"1")'
"""
LOOK = """set -e
cd /root/w && stat -c '%n %a %h %u:%g %F %s' a link pipe shut hole && readlink link && cat b
ls /usr/bin/tac /etc/nsswitch.conf 2>&1 || ls /usr/share/common-licenses | wc -l
du -m hole | cut -f1
python3 -c 'import os; print(os.getxattr("a", "user.mine"))'
"""


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="hv-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def source() -> Iterator[Server]:
    with Server() as running:
        # Ids that no other server of the tests takes between a purge and a restore.
        last = 16 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        ranges.claim(running.mark, frozenset({ranges.LOWEST + last * ranges.BLOCK}))
        yield running


@pytest.fixture(scope="module")
def filled(source: Server) -> dict[str, dict[str, Any]]:
    """Sandboxes of every kind, by name."""
    made = {}
    kinds: dict[str, dict[str, Any]] = {
        "busy": {"ttl_seconds": 5000, "env_vars": {"A": "1"}, "open_ports": [80]},
        "disk": {"disk_size_gb": 1},
        "still": {},
    }
    with source.http() as http:
        for name, fields in kinds.items():
            answer = http.post("/sandboxes", json={"name": name, **fields})
            assert answer.status_code == 201, answer.text
            made[name] = dict(answer.json())
            run(source, made[name]["id"], FILES)
        run(source, made["busy"]["id"], "while :; do date +%s%N >/tick; sleep 0.05; done &")
        http.post(f"/sandboxes/{made['still']['id']}/stop")
    return made


@pytest.fixture(scope="module")
def made(source: Server, filled: dict[str, dict[str, Any]], home: Path) -> tuple[Path, str]:
    """A backup, and what was said about it."""
    path = home / "backup"
    done = heyvm("backup", str(path), **environ_of(source))
    assert done.returncode == 0, done.stderr
    return path, done.stderr


def environ_of(server: Server) -> dict[str, str]:
    return {"HEYVM_DATA_DIR": str(server.data_dir), "HEYVM_RUN_DIR": str(server.run_dir)}


def run(server: Server, ref: str, command: str) -> str:
    with server.http() as http:
        answer = http.post(f"/sandboxes/{ref}/execute", json={"command": command})
    assert answer.status_code == 200, answer.text
    assert answer.json()["exit_code"] == 0, answer.text
    return str(answer.json()["output"])


def groups_of(server: Server) -> cgroups.Groups:
    return cgroups.Groups(server.mark)


def test_a_backup_is_for_its_owner_and_says_that_it_holds_secrets(
    made: tuple[Path, str],
) -> None:
    path, said = made

    assert path.stat().st_mode & 0o777 == 0o600
    assert "holds secrets" in said and "3 sandboxes" in said
    assert said.count("halted for") == 2, said
    assert not path.with_name("backup.part").exists()


def test_sandboxes_go_on_after_a_backup(
    source: Server, filled: dict[str, dict[str, Any]], made: tuple[Path, str]
) -> None:
    ref = filled["busy"]["id"]
    before = run(source, ref, "cat /tick")

    wait_until(lambda: run(source, ref, "cat /tick") != before, "it writes on")
    assert list(source.data_dir.glob(".backup.*")) == []


def test_a_backup_by_a_pipe_and_a_killed_one_leave_nothing_halted(
    source: Server, made: tuple[Path, str], home: Path
) -> None:
    with source.http() as http:
        ref = http.post("/sandboxes", json={}).json()["id"]
        run(source, ref, "head -c 40M /dev/urandom >/root/large")
        groups = groups_of(source)
        backup = subprocess.Popen(
            [sys.executable, "-m", "heyvm.cli", "backup", "-"],
            env={**os.environ, **environ_of(source), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert backup.stdout is not None and backup.stderr is not None
        try:
            # Nobody reads: it stands in the middle of the sandbox.
            wait_until(lambda: groups.is_frozen(ref), "it is halted")
        finally:
            backup.kill()
            backup.communicate()

        wait_until(lambda: not groups.is_frozen(ref), "the keeper lets it go on", timeout=10)
        assert run(source, ref, "echo fine") == "fine\n"
        slow = subprocess.Popen(
            [sys.executable, "-m", "heyvm.cli", "backup", "--pause-limit", "1s", "-"],
            env={**os.environ, **environ_of(source), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            wait_until(lambda: groups.is_frozen(ref), "it is halted")
            wait_until(lambda: not groups.is_frozen(ref), "its time is over", timeout=5)
            assert slow.poll() is None, slow.communicate()
            # A delete does not wait for the rest.
            assert http.delete(f"/sandboxes/{ref}").status_code == 204
            packed, said = slow.communicate(timeout=60)
        finally:
            slow.kill()
        assert slow.returncode == 0, said
        assert b"deleted meanwhile: left out" in said
        # Its sandboxes have ids that are in use here.
        done = restore(packed, home / "piped")
        assert (done.returncode, "somebody else has" in done.stderr) == (1, True), done.stderr
        assert set(os.listdir(home / "piped")) <= {"keeper.lock"}
        forget(home / "piped")


def restore(packed: bytes, data_dir: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "heyvm.cli", "restore", "-"],
        input=packed,
        env={
            **os.environ,
            "HEYVM_DATA_DIR": str(data_dir),
            "HEYVM_RUN_DIR": str(data_dir) + ".run",
            "PYTHONPATH": str(REPOSITORY),
        },
        capture_output=True,
        timeout=60,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def forget(data_dir: Path) -> None:
    ranges.release(mark_of(data_dir))
    shutil.rmtree(data_dir, ignore_errors=True)


def tar(*members: tuple[str, Any]) -> bytes:
    """`(name, bytes)`, or `(name, {field: value})` of a TarInfo."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            one = tarfile.TarInfo(name)
            one.mode = 0o755
            if isinstance(content, bytes):
                one.size = len(content)
                archive.addfile(one, io.BytesIO(content))
                continue
            for field, value in content.items():
                setattr(one, field, value)
            archive.addfile(one)
    return out.getvalue()


DIRECTORY = {"type": tarfile.DIRTYPE}
HEAD = ("backup.json", json.dumps({"format": 1, "made_at": 1.0, "made": "then"}).encode())
END = ("complete.json", b'{"sandboxes": ["sb-00000001"]}')


def link(target: str, hard: bool = False) -> dict[str, Any]:
    return {"type": tarfile.LNKTYPE if hard else tarfile.SYMTYPE, "linkname": target}


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "nothing": lambda out: b"",
    "noise": lambda out: b"\0" * 700 + b"x" * 9000,
    "cut short": lambda out: tar(HEAD),
    "another format": lambda out: tar((HEAD[0], b'{"format": 2}'), END),
    "no time": lambda out: tar((HEAD[0], b'{"format": 1, "made_at": 1e300}'), END),
    "no registry": lambda out: tar(HEAD, END),
    "dots": lambda out: tar(HEAD, (f"../../{out.name}/x", b"x"), END),
    "absolute": lambda out: tar(HEAD, (f"{out}/x", b"x"), END),
    "through a link": lambda out: tar(HEAD, ("l", link(str(out))), ("l/x", b"x"), END),
    "through two links": lambda out: tar(
        HEAD, ("d", DIRECTORY), ("d/l", link("..")), ("d/l/m", link(str(out))), ("m/x", b"x"), END
    ),
    "a hard link out": lambda out: tar(HEAD, ("audit/x", link(f"{out}/there", True)), END),
    "a linked part": lambda out: tar(HEAD, ("sandboxes", link(str(out))), END),
    "a linked root": lambda out: tar(
        HEAD, ("sandboxes/sb-00000001", DIRECTORY), ("sandboxes/sb-00000001/root", link("/")), END
    ),
    "a linked disk": lambda out: tar(
        HEAD,
        *(("sandboxes/sb-00000001", DIRECTORY), ("sandboxes/sb-00000001/disk.img", link("/x"))),
        END,
    ),
    "an odd name": lambda out: tar(HEAD, ("sandboxes/sb-1", DIRECTORY), END),
    "a linked trail": lambda out: tar(HEAD, ("audit/2026-01.jsonl", link("/etc/shadow")), END),
    "a linked registry": lambda out: tar(HEAD, ("registry.db", link(f"{out}/there")), END),
    "a device": lambda out: tar(
        HEAD,
        ("sandboxes/sb-00000001", DIRECTORY),
        ("sandboxes/sb-00000001/root", DIRECTORY),
        ("sandboxes/sb-00000001/root/sda", {"type": tarfile.BLKTYPE, "devmajor": 8}),
        END,
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_strangers_file_is_refused_and_reaches_nothing(home: Path, what: str) -> None:
    out = home / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out / "there").write_bytes(b"before")
    data_dir = home / "victim"

    done = restore(HOSTILE[what](out), data_dir)

    assert done.returncode == 1, done.stderr
    assert "nothing was restored" in done.stderr and "Traceback" not in done.stderr
    assert [one.name for one in out.iterdir()] == ["there"]
    assert ((out / "there").read_bytes(), (out / "there").stat().st_nlink) == (b"before", 1)
    assert set(os.listdir(data_dir)) <= {"keeper.lock"}
    forget(data_dir)


def test_ids_that_somebody_else_has_are_not_taken(tmp_path: Path) -> None:
    from heyvm.errors import Unavailable

    etc = tmp_path
    for name in ("passwd", "group", "subgid"):
        (etc / name).write_text("")
    base = ranges.LOWEST + 3 * ranges.BLOCK + 5 * ranges.SIZE
    (etc / "subuid").write_text(f"eve:{base}:1\n")

    with pytest.raises(Unavailable, match=str(base)):
        ranges.claim("aaaa", frozenset({base}), str(etc))
    assert "heyvm" not in (etc / "subuid").read_text()

    ranges.claim("aaaa", frozenset({base + ranges.BLOCK}), str(etc))
    ranges.claim("aaaa", frozenset({base + ranges.BLOCK + ranges.SIZE}), str(etc))

    line = f"heyvm-aaaa:{ranges.LOWEST + 4 * ranges.BLOCK}:{ranges.BLOCK}"
    assert (etc / "subuid").read_text().splitlines() == [f"eve:{base}:1", line]
    assert (etc / "subgid").read_text().splitlines() == [line]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_backup_goes_into_nothing_that_somebody_has_laid_there(
    source: Server, home: Path, kind: str
) -> None:
    """In /tmp, say: root would write over whatever the link leads to, or into another's file."""
    trap, there = home / f"laid-{kind}.part", home / f"precious-{kind}"
    there.write_bytes(b"before")
    if kind == "link":
        trap.symlink_to(there)
    else:
        trap.hardlink_to(there)

    done = heyvm("backup", str(trap.with_suffix("")), **environ_of(source))

    assert (done.returncode, "is there already" in done.stderr) == (1, True)
    assert there.read_bytes() == b"before"
    assert os.path.lexists(trap) and not trap.with_suffix("").exists()


@pytest.mark.parametrize("where", ["inside", "there"])
def test_a_backup_is_refused_where_it_would_do_harm(source: Server, home: Path, where: str) -> None:
    target = {"inside": source.data_dir / "b", "there": home}[where]

    done = heyvm("backup", str(target), **environ_of(source))

    assert (done.returncode, "no backup was made" in done.stderr) == (1, True)
    assert not (source.data_dir / "b").exists()


def test_a_restore_is_refused_beside_a_server(source: Server) -> None:
    done = restore_into(source)

    assert (done.returncode, "stop it first" in done.stderr) == (1, True), done.stderr


def purge(server: Server) -> None:
    done = heyvm("purge", "--yes", **environ_of(server))
    assert done.returncode == 0, done.stderr


def restore_into(server: Server) -> subprocess.CompletedProcess[str]:
    return heyvm("restore", "/dev/null", **environ_of(server))


def test_an_ended_backup_leaves_no_file(
    source: Server, filled: dict[str, dict[str, Any]], home: Path
) -> None:
    target = home / "ended"
    backup = subprocess.Popen(
        [sys.executable, "-m", "heyvm.cli", "backup", str(target)],
        env={**os.environ, **environ_of(source), "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: target.with_name("ended.part").exists(), "it has begun")
    backup.send_signal(signal.SIGTERM)
    _, said = backup.communicate(timeout=30)

    assert (backup.returncode, "no backup was made" in said) == (1, True), said
    assert not target.exists() and not target.with_name("ended.part").exists()
    assert not list(source.data_dir.glob(".backup.*"))


def test_everything_is_there_after_a_restore(
    source: Server, filled: dict[str, dict[str, Any]], made: tuple[Path, str]
) -> None:
    before = {name: run(source, one["id"], LOOK) for name, one in filled.items() if name != "still"}
    before["still"] = before["busy"]
    assert "a 4755 2 33:34 regular file 6" in before["busy"], before
    assert before["busy"].splitlines()[-3:] == ["0", "1", "b'1'"], before
    source.stop()
    busy = restore_into(source)
    assert (busy.returncode, "is not empty" in busy.stderr) == (1, True), busy.stderr
    purge(source)
    # Elsewhere, with another mark: as on another machine.
    source.data_dir = source.home / "elsewhere"

    done = heyvm("restore", str(made[0]), **environ_of(source))

    assert done.returncode == 0, done.stderr
    assert not list(source.data_dir.glob(".restore*"))
    with open("/etc/subuid") as file:
        assert f"heyvm-{source.mark}:" in file.read()
    source.start()
    with source.http() as http:
        found = {one["name"]: one for one in http.get("/sandboxes?status=all").json()}
        assert {one["status"] for one in found.values()} == {"stopped"}
        assert "it was running when the backup" in found["busy"]["error_message"]
        assert found["still"]["error_message"] is None
        assert found["busy"]["env_vars"] == {"A": "1"}
        for name, one in filled.items():
            assert found[name]["id"] == one["id"]
            started = http.post(f"/sandboxes/{one['id']}/start")
            assert started.status_code == 200, started.text
            assert run(source, one["id"], LOOK) == before[name]
        left = http.get(f"/sandboxes/{filled['busy']['id']}").json()
        assert left["expires_at"] is not None
