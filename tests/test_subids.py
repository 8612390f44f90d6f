"""An ordinary user's sub-ids: more than one user inside, and nothing that nobody may remove."""

import contextlib
import os
import pwd
import secrets
import subprocess
from pathlib import Path

import pytest

from heyvm.backends import ranges
from tests import images
from tests.server import Server, all_pids, command_line, wait_until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="makes users"),
    pytest.mark.skipif(not os.path.exists("/usr/bin/newuidmap"), reason="apt install uidmap"),
]


@pytest.fixture(scope="module")
def user():
    """A real one, as useradd makes it: with a line in /etc/subuid and /etc/subgid."""
    name = f"hv{secrets.token_hex(4)}"
    told = ["useradd", "--no-create-home", "--home-dir", "/nonexistent", name]
    subprocess.run(told, check=True)
    yield name
    subprocess.run(["userdel", name], check=True, capture_output=True)


@pytest.fixture(scope="module")
def server(user):
    with Server(user=pwd.getpwnam(user).pw_uid) as running:
        yield running


@pytest.fixture
def sandbox(sandbox):
    """These are not about the network, which has needs of its own."""
    return lambda **fields: sandbox(network="none", **fields)


def sh(line):
    return f"sh -c '{line}'"


def test_inside_are_the_user_and_the_users_sub_ids(sandbox, run, user):
    ids = ranges.sub_ids(pwd.getpwnam(user).pw_uid)
    ref = sandbox()["id"]
    for name, own in (("uid", ids.uid), ("gid", ids.gid)):
        words = run(ref, f"cat /proc/self/{name}_map")["stdout"].split()
        assert words == ["0", str(pwd.getpwnam(user).pw_uid), "1", "1", *map(str, own)]
    assert ids.uid[1] == 65535


def test_the_record_says_so(http, sandbox):
    assert http.get(f"/sandboxes/{sandbox()['id']}").json()["ids"] == "sub-ids"


def test_users_and_owners_work(sandbox, run):
    ref = sandbox()["id"]
    assert run(ref, "id -u", user="www-data")["stdout"] == "33\n"
    assert run(ref, "id -u", user="1234")["stdout"] == "1234\n"
    line = 'touch f; chown 33:33 f; stat -c %u:%g f; su -s /bin/sh www-data -c "id -u"'
    assert run(ref, sh(line))["stdout"] == "33:33\n33\n"


def test_it_has_the_capabilities_of_a_root_servers_sandbox(sandbox, run):
    words = run(sandbox()["id"], "grep CapEff /proc/self/status")["stdout"].split()
    held = {number for number in range(64) if int(words[1], 16) >> number & 1}
    assert held == {0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 29, 31}


def test_a_package_manager_drops_its_rights(sandbox, run):
    """What apt does before it fetches: change to a user of its own, for good."""
    program = "import os; os.setgroups([65534]); os.setresgid(42, 42, 42); os.setresuid(42, 42, 42)"
    line = f"{program}; print(os.getresuid(), os.getgroups())"
    answer = run(sandbox()["id"], f'/usr/bin/python3 -c "{line}"')
    assert answer["stdout"] == "(42, 42, 42) [65534]\n", answer


def test_delete_removes_what_belongs_to_sub_ids(http, run, server):
    ref = http.post("/sandboxes", json={"network": "none"}).json()["id"]
    run(
        ref,
        sh("mkdir -p /root/a/b/c; touch /root/a/b/c/f; chown -R 33:33 /root/a; chmod 0 /root/a/b"),
    )
    owner = (server.data_dir / "sandboxes" / ref / "root/root/a").stat().st_uid
    assert owner not in (server.user, 0)
    assert http.delete(f"/sandboxes/{ref}").status_code == 204
    assert not (server.data_dir / "sandboxes" / ref).exists()
    assert os.listdir(server.data_dir / "trash") == []


def test_a_removal_cut_short_is_finished(http, run, server, sandbox):
    ref = sandbox()["id"]
    run(ref, sh("mkdir -p /root/a/b; touch /root/a/b/f; chown -R 33:33 /root/a; chmod 700 /root/a"))
    http.post(f"/sandboxes/{ref}/stop")
    server.kill()
    # As whoever was removing it left it: moved away, and not yet gone.
    os.rename(server.data_dir / "sandboxes" / ref, server.data_dir / "trash" / f"{ref}.0")
    server.start()
    wait_until(lambda: os.listdir(server.data_dir / "trash") == [], "the trash is emptied")
    assert "cannot be removed" not in server.log


def test_files_stay_over_a_stop_and_are_reached_by_a_visit(http, sandbox, run):
    ref = sandbox()["id"]
    run(ref, sh("touch f; chown 33:33 f /workspace; chmod 700 /workspace; echo kept > f"))
    http.post(f"/sandboxes/{ref}/stop")
    assert http.get(f"/sandboxes/{ref}/files/f").content == b"kept\n"
    http.post(f"/sandboxes/{ref}/start")
    assert run(ref, "stat -c %u f")["stdout"] == "33\n"


def test_one_sandbox_cannot_touch_anothers_processes(sandbox, run, server):
    """They have the same ids outside; their namespaces keep them apart."""
    one, two = sandbox(start_command="exec sleep 6543")["id"], sandbox()["id"]
    wait_until(lambda: sleepers(), "it sleeps")
    (pid,) = sleepers()
    assert "6543" not in run(two, sh("cat /proc/[0-9]*/cmdline"))["stdout"]
    for line in ("kill -9 -1", f"kill -9 {pid}", f"cat /proc/{pid}/root/etc/hostname"):
        run(two, sh(line))
    program = f"import os, ctypes; print(ctypes.CDLL(None).ptrace(16, {pid}, 0, 0))"
    assert run(two, f'/usr/bin/python3 -c "{program}"')["stdout"] == "-1\n"
    assert sleepers() == [pid]
    assert run(one, "echo fine")["stdout"] == "fine\n"


def sleepers():
    return [pid for pid in all_pids() if command_line(pid) == b"sleep 6543 "]


def test_pid_1_is_not_its_neighbours(sandbox, run):
    ref = sandbox()["id"]
    for user in ("0", "33"):
        for line in (
            "for s in $(seq 1 64); do kill -$s 1; done",
            "prlimit --pid 1 --nofile=0:0",
            "prlimit --pid 1 --cpu=0:0",
            "echo 1000 > /proc/1/oom_score_adj",
            "head -c 1 /proc/1/mem",
            "ls /proc/1/root/",
        ):
            answer = run(ref, sh(line), user=user)
            assert answer["exit_code"] != 0 or line.startswith("for"), (user, line, answer)
    assert run(ref, "echo fine")["stdout"] == "fine\n"


def test_a_set_id_file_helps_nobody(sandbox, run, server):
    ref = sandbox()["id"]
    run(ref, sh("cp /bin/sh s; chown 33:33 s; chmod 6755 s; cp /bin/sh t; chmod 6755 t"))
    for name in "st":
        path = server.data_dir / "sandboxes" / ref / "root/workspace" / name
        assert path.stat().st_mode & 0o6000 == 0o6000
        with pytest.raises(PermissionError):
            subprocess.run([path, "-c", "id"], user=23451, group=23451, extra_groups=[])
    assert run(ref, './s -pc "id -u"', user="1234")["stdout"] == "1234\n"


def test_mounts_belong_to_the_user_alone(sandbox, run, server):
    path = server.home / "shared"
    path.mkdir()
    os.chown(path, server.user, server.user)
    mounts = [{"host_path": str(path), "sandbox_path": "/data"}]
    ref = sandbox(mounts=mounts)["id"]
    run(ref, sh("echo x > /data/file; cp /bin/sh /data/s; chmod 4755 /data/s"))
    assert (path / "file").stat().st_uid == server.user
    assert not (path / "s").stat().st_mode & 0o6000


def test_ids_that_changed_are_refused_until_they_are_back(http, sandbox, user, run):
    ref = sandbox()["id"]
    run(ref, sh("touch /root/f; chown 33:33 /root/f"))
    http.post(f"/sandboxes/{ref}/stop")
    ids = ranges.sub_ids(pwd.getpwnam(user).pw_uid)
    with sub_ids_elsewhere(user):
        answer = http.post(f"/sandboxes/{ref}/start")
        assert answer.status_code == 502 and "/etc/subuid" in answer.json()["detail"]
        other = http.post("/sandboxes", json={"network": "none"}).json()
        assert http.get(f"/sandboxes/{other['id']}").json()["ids"] == "single"
        assert run(other["id"], "cat /proc/self/uid_map")["stdout"].split()[2:] == ["1"]
    with sub_ids_elsewhere(user, ids.uid[0] + 10_000_000):
        assert http.post(f"/sandboxes/{ref}/start").status_code == 502
    assert http.post(f"/sandboxes/{ref}/start").json()["status"] == "running"
    # One with a single id goes on with it.
    assert http.post(f"/sandboxes/{other['id']}/restart").json()["status"] == "running"
    assert run(other["id"], "cat /proc/self/uid_map")["stdout"].split()[2:] == ["1"]
    assert http.delete(f"/sandboxes/{other['id']}").status_code == 204


@contextlib.contextmanager
def sub_ids_elsewhere(user, start=None):
    """The user's lines are gone, or begin elsewhere, for a while."""
    before = {name: Path("/etc", name).read_text() for name in ranges.FILES}
    lines = [] if start is None else [f"{user}:{start}:65536\n"]

    def put(name, mine):
        others = [line for line in Path("/etc", name).open() if not line.startswith(f"{user}:")]
        Path("/etc", name).write_text("".join([*others, *mine]))

    ranges._change("/etc", lambda: [put(name, lines) for name in ranges.FILES])
    try:
        yield
    finally:
        old = {
            name: [line for line in text.splitlines(True) if line.startswith(f"{user}:")]
            for name, text in before.items()
        }
        ranges._change("/etc", lambda: [put(*one) for one in old.items()])


def test_lines_are_found_by_name_and_number(tmp_path, user):
    uid = pwd.getpwnam(user).pw_uid
    (tmp_path / "subuid").write_text(f"ann:1:2\n{user}:500000:1000\n{user}:900000:65536\n")
    (tmp_path / "subgid").write_text(f"{uid}:700000:200000\n")
    found = ranges.sub_ids(uid, str(tmp_path))
    assert found == ranges.SubIds((500000, 1000), (700000, 65535))
    (tmp_path / "subgid").write_text(f"{user}:x:10\n{user}:5:0\n")
    assert ranges.sub_ids(uid, str(tmp_path)) is None
    assert not Path(tmp_path, "passwd").exists()


def test_an_image_of_an_ordinary_users_store_has_users(http, run):
    layout = images.tiny()
    packed = subprocess.run(["tar", "-C", layout, "-c", "."], stdout=subprocess.PIPE, check=True)
    assert http.put("/images/tiny:1", data=packed.stdout).status_code == 201
    made = http.post("/sandboxes", json={"image": "tiny:1", "network": "none"}).json()
    assert made["image_resolved"].startswith("sha256:"), made
    line = (
        "echo bob:x:1001:1001::/home:/bin/sh >> /etc/passwd; chown 1001 /home;"
        " su bob -c 'id -u; touch /home/f; stat -c %u /home/f'"
    )
    seen = run(made["id"], "sh", args=["-c", line])
    assert seen["stdout"].split() == ["1001", "1001"], seen
    assert http.delete(f"/sandboxes/{made['id']}").status_code == 204
    assert http.delete("/images/tiny:1").status_code == 204
