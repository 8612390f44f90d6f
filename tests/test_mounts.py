"""Directories of the host inside a sandbox: whose they are, and what nobody may gain by them."""

import io
import os
import shutil
import socket
import stat
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

ANN, BOB, DAEMON = 23456, 23457, 1
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="makes directories of several owners")


@pytest.fixture
def shared():
    """A directory below a mount root, and `shared(owner)` to make one of `owner`'s in it."""
    top = Path(tempfile.mkdtemp(prefix="hv-mounts-"))
    top.chmod(0o755)

    def make(owner=ANN, name="own", mode=0o755):
        path = top / name
        path.mkdir()
        (path / "file").write_text("content")
        path.chmod(mode)
        if os.geteuid() == 0:
            for one in (path, path / "file"):
                os.chown(one, owner, owner)
        return path

    yield make
    shutil.rmtree(top)


def mount(path, inside="/data", **options):
    return {"host_path": str(path), "sandbox_path": inside, **options}


def test_what_is_made_inside_belongs_to_the_directorys_owner_outside(sandbox, shared, run):
    path = shared()
    ref = sandbox(mounts=[mount(path)])["id"]
    seen = run(ref, "cat /data/file; echo new > /data/made; mkdir /data/dir; stat -c %u /data/made")
    assert seen["stdout"] == "content0\n"
    owner = path.stat().st_uid
    assert [one.stat().st_uid for one in (path / "made", path / "dir")] == [owner] * 2
    assert (path / "made").read_text() == "new\n"


def test_a_read_only_one_is_never_written(sandbox, shared, run):
    path = shared()
    ref = sandbox(mounts=[mount(path, read_only=True)])["id"]
    for line in (
        "echo x > /data/file",
        "touch /data/new",
        "rm -f /data/file",
        "mv /data /else",
        "chmod 777 /data/file",
        "mount -o remount,rw,bind /data",
        "mount --bind /tmp /data",
    ):
        assert run(ref, f"sh -c '{line}'")["exit_code"] != 0, line
    assert (path / "file").read_text() == "content"


@ROOT
@pytest.mark.parametrize("owner", [0, DAEMON])
def test_roots_and_the_systems_directories_are_refused_as_writable(
    http, sandbox, shared, run, owner
):
    path = shared(owner)
    answer = http.post("/sandboxes", json={"mounts": [mount(path)]})
    assert answer.status_code == 422
    assert "read_only" in answer.json()["detail"]
    ref = sandbox(mounts=[mount(path, read_only=True)])["id"]
    assert run(ref, "cat /data/file")["stdout"] == "content"
    assert run(ref, "sh -c 'echo x > /data/new'")["exit_code"] != 0


@ROOT
@pytest.mark.parametrize("owner", [0, DAEMON, ANN])
def test_a_planted_set_id_file_helps_no_other_user(http, sandbox, shared, run, owner):
    path = shared(owner)
    read_only = owner != ANN
    ref = sandbox(mounts=[mount(path, read_only=read_only)])["id"]
    for number, line in enumerate(
        (
            "cp /bin/sh /data/s{0} && chmod 4755 /data/s{0}",
            "install -m 6755 /bin/sh /data/s{0}",
            "python3 -c 'import os; os.open(\"/data/s{0}\", os.O_CREAT, 0o4755)'",
            "python3 -c 'import os; os.mknod(\"/data/s{0}\", 0o104755)'",
            "cp /bin/sh /data/s{0} && chmod g+s /data/s{0}",
        )
    ):
        run(ref, line.format(number))
    for found in path.iterdir():
        assert not found.stat().st_mode & (stat.S_ISUID | stat.S_ISGID), found
        if found.name.startswith("s"):
            seen = subprocess.run(
                [
                    "setpriv",
                    f"--reuid={BOB}",
                    f"--regid={BOB}",
                    "--clear-groups",
                    found,
                    "-pc",
                    "id -u; id -g",
                ],
                capture_output=True,
                text=True,
            )
            assert seen.stdout.split() in ([], [str(BOB)] * 2)


@ROOT
def test_files_of_others_in_it_stay_theirs(sandbox, shared, run):
    path = shared()
    secret = path / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    ref = sandbox(mounts=[mount(path)])["id"]
    for line in (
        "cat /data/secret",
        "chown 0 /data/secret",
        "chmod 666 /data/secret",
        "sh -c 'echo x >> /data/secret'",
    ):
        assert run(ref, line)["exit_code"] != 0, line
    assert secret.read_text() == "root's"
    assert secret.stat().st_uid == 0


@ROOT
def test_a_hard_link_to_a_file_of_root_gives_nothing(sandbox, shared, run):
    path = shared()
    outside = path.parent / "roots"
    outside.write_text("root's")
    outside.chmod(0o600)
    os.link(outside, path / "link")
    ref = sandbox(mounts=[mount(path)])["id"]
    assert run(ref, "cat /data/link")["exit_code"] != 0
    assert run(ref, "sh -c 'echo x > /data/link'")["exit_code"] != 0
    assert outside.read_text() == "root's"


@pytest.mark.parametrize(
    "path",
    ["/", "/etc", "/proc", "/sys", "/dev", "/run", "/usr", "/var", "/proc/self/root/tmp", "/boot"],
)
def test_places_of_the_system_are_refused(http, path):
    answer = http.post("/sandboxes", json={"mounts": [mount(path, read_only=True)]})
    assert answer.status_code == 422, answer.text
    assert path in answer.json()["detail"]


def test_the_data_directory_and_what_holds_it_are_refused(http, server):
    for path in (server.data_dir, server.data_dir / "sandboxes", server.home, server.run_dir):
        answer = http.post("/sandboxes", json={"mounts": [mount(path, read_only=True)]})
        assert answer.status_code == 422, path


def test_a_link_is_judged_by_where_it_leads(http, shared, tmp_path):
    path = shared()
    (path / "link").symlink_to("/etc")
    answer = http.post("/sandboxes", json={"mounts": [mount(path / "link", read_only=True)]})
    assert answer.status_code == 422
    assert "/etc" in answer.json()["detail"]


def test_a_missing_one_and_a_file_are_refused(http, shared):
    path = shared()
    for name in ("missing", "file"):
        answer = http.post("/sandboxes", json={"mounts": [mount(path / name)]})
        assert answer.status_code == 422
        assert name in answer.json()["detail"]


def test_a_directory_with_a_listening_socket_is_refused(http, shared):
    path = shared()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path / "door.sock"))
        door.listen()
        answer = http.post("/sandboxes", json={"mounts": [mount(path, read_only=True)]})
    assert answer.status_code == 422
    assert "door.sock" in answer.json()["detail"]


def with_one(sandbox, shared):
    """A sandbox with a writable mount: it was started so that more can come."""
    return sandbox(mounts=[mount(shared(name="first"), "/first")])


@ROOT
def test_the_first_writable_one_waits_for_the_next_start(http, sandbox, shared, run):
    """Until then set-id files may be made inside, and so that filter stays."""
    path = shared()
    ref = sandbox()["id"]
    run(ref, "sh -c 'cp /bin/sh /root/s; chmod 4755 /root/s'")
    added = http.post(f"/sandboxes/{ref}/mounts", json=mount(path))
    assert added.status_code == 201 and added.json()["pending"] is True
    assert run(ref, "ls /data/file")["exit_code"] != 0
    seen = http.post(f"/sandboxes/{ref}/mounts", json=mount(path, "/seen", read_only=True))
    assert seen.json()["pending"] is False
    assert run(ref, "cat /seen/file")["stdout"] == "content"
    http.post(f"/sandboxes/{ref}/restart")
    assert run(ref, "cat /data/file")["stdout"] == "content"
    for line in (
        "cp -p /root/s /data/s",
        "cp --preserve=all /root/s /data/s2",
        "mv /root/s /data/s3",
        "ln /root/s /data/s4",
        "tar -C /root -c s | tar -C /data -xp",
        "chmod u+s /data/file",
    ):
        run(ref, f"sh -c '{line}'")
    assert [one for one in path.iterdir() if one.stat().st_mode & 0o6000] == []


@ROOT
def test_a_visit_with_a_writable_mount_makes_no_set_id_file(http, sandbox, shared):
    path = shared()
    ref = sandbox()["id"]
    http.post(f"/sandboxes/{ref}/stop")
    http.post(f"/sandboxes/{ref}/mounts", json=mount(path))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo("planted")
        member.mode, member.size = 0o6755, 2
        tar.addfile(member, io.BytesIO(b"x\n"))
    sent = http.post(
        f"/sandboxes/{ref}/files?format=tar&path=/data/new&mount_path=/data",
        headers={"Content-Type": "application/x-tar"},
        data=packed.getvalue(),
    )
    assert (path / "new/planted").exists() or sent.status_code >= 400, sent.text
    for one in path.rglob("*"):
        assert not one.stat().st_mode & 0o6000, one


def test_one_is_added_to_and_removed_from_a_running_sandbox(http, sandbox, shared, run):
    path = shared()
    ref = with_one(sandbox, shared)["id"]
    added = http.post(f"/sandboxes/{ref}/mounts", json=mount(path))
    assert added.status_code == 201, added.text
    assert added.json()["pending"] is False
    assert http.get(f"/sandboxes/{ref}/mounts").json()[1:] == [added.json()]
    assert run(ref, "cat /data/file")["stdout"] == "content"
    assert http.post(f"/sandboxes/{ref}/mounts", json=mount(path)).status_code == 409
    assert http.delete(f"/sandboxes/{ref}/mounts/data").status_code == 204
    assert run(ref, "ls /data/file")["exit_code"] != 0
    assert len(http.get(f"/sandboxes/{ref}/mounts").json()) == 1
    assert http.delete(f"/sandboxes/{ref}/mounts/data").status_code == 404
    assert (path / "file").read_text() == "content"


def test_one_of_create_is_removed_and_stays_away(http, sandbox, shared, run):
    path = shared()
    ref = sandbox(mounts=[mount(path)])["id"]
    assert http.delete(f"/sandboxes/{ref}/mounts/%2Fdata").status_code == 204
    assert run(ref, "ls /data/file")["exit_code"] != 0
    http.post(f"/sandboxes/{ref}/restart")
    assert run(ref, "ls /data/file")["exit_code"] != 0


@ROOT
def test_one_that_nobody_inside_may_enter_is_removed_too(http, sandbox, shared):
    path = shared(0, mode=0o700)
    ref = sandbox(mounts=[mount(path, read_only=True)])["id"]
    assert http.delete(f"/sandboxes/{ref}/mounts/data").status_code == 204


def test_one_that_was_added_comes_back_with_a_restart(http, sandbox, shared, run):
    path = shared()
    ref = sandbox()["id"]
    http.post(f"/sandboxes/{ref}/mounts", json=mount(path))
    http.post(f"/sandboxes/{ref}/restart")
    assert run(ref, "cat /data/file")["stdout"] == "content"


def test_a_link_of_the_sandboxs_own_never_aims_a_mount(http, sandbox, shared, run):
    path = shared()
    ref = with_one(sandbox, shared)["id"]
    run(ref, "sh -c 'ln -s /etc /data; ln -s /oldroot/tmp /deep; mkdir /a; ln -s / /a/b'")
    for inside in ("/data", "/deep/x", "/a/b/c"):
        added = http.post(f"/sandboxes/{ref}/mounts", json=mount(path, inside))
        assert added.status_code == 422, (inside, added.text)
        assert "mount point" in added.json()["detail"]
    http.post(f"/sandboxes/{ref}/stop")
    assert len(http.get(f"/sandboxes/{ref}/mounts").json()) == 1
    assert http.post(f"/sandboxes/{ref}/start").json()["status"] == "running"


def test_a_directory_that_was_swapped_is_not_mounted_at_the_next_start(http, sandbox, shared):
    path = shared()
    ref = sandbox(mounts=[mount(path)])["id"]
    http.post(f"/sandboxes/{ref}/stop")
    path.rename(path.parent / "moved")
    path.symlink_to("/etc")
    answer = http.post(f"/sandboxes/{ref}/start")
    assert answer.status_code == 422
    assert "/etc" in answer.json()["detail"]
    path.unlink()
    (path.parent / "moved").rename(path)
    assert http.post(f"/sandboxes/{ref}/start").json()["status"] == "running"


def test_a_mount_over_the_workspace_is_the_workspace(http, sandbox, shared):
    path = shared()
    ref = sandbox(mounts=[mount(path, "/workspace")])["id"]
    answer = http.get(f"/sandboxes/{ref}/files/file")
    assert answer.content == b"content"
    http.post(f"/sandboxes/{ref}/files", data={"file_path": "up"}, files={"file": b"loaded"})
    assert (path / "up").read_bytes() == b"loaded"
    assert (path / "up").stat().st_uid == path.stat().st_uid


def test_delete_leaves_the_hosts_side_alone(http, shared):
    path = shared()
    ref = http.post("/sandboxes", json={"mounts": [mount(path)]}).json()["id"]
    assert http.delete(f"/sandboxes/{ref}").status_code == 204
    assert (path / "file").read_text() == "content"
