"""What code in a sandbox sees, and what it must not be able to do: tried from inside."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from heyvm.backends import ranges
from tests.server import ORDINARY, Server, all_pids, read_bytes, wait_until

# System calls by hand.
CALL = "import ctypes,os,sys;c=ctypes.CDLL(None,use_errno=True)\n"


USERS = [0, ORDINARY] if os.geteuid() == 0 else [os.geteuid()]


@pytest.fixture(scope="module", params=USERS, ids=lambda uid: "root" if uid == 0 else "ordinary")
def server(request):
    """Every test runs against a server of root and one of an ordinary user."""
    with Server(user=request.param if request.param != os.geteuid() else None) as running:
        running.uid = request.param
        yield running


@pytest.fixture
def root_server(server):
    if server.uid != 0:
        pytest.skip("an ordinary user's sandbox has one id and no capabilities (docs/isolation.md)")


@pytest.fixture
def box(http, sandbox):
    """A running sandbox, and a way to run a shell line in it."""

    class Box:
        record = sandbox()
        id = record["id"]

        def run(self, line, **options):
            answer = http.post(
                f"/sandboxes/{self.id}/execute",
                json={"command": "sh", "args": ["-c", line], **options},
            )
            assert answer.status_code == 200, answer.text
            return answer.json()

        def python(self, program):
            return self.run('exec /usr/bin/python3 -c "$P"', env={"P": CALL + program})

    return Box()


@pytest.fixture
def processes(server, box):
    """Every process of that sandbox, as the host sees it."""

    def find():
        return [pid for pid in server.sandbox_pids() if box.id in mountinfo(pid)]

    return find


def mountinfo(pid):
    return read_bytes(f"/proc/{pid}/mountinfo").decode(errors="replace")


def uids(pid):
    line = next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Uid:" in line
    )
    return {int(word) for word in line.split()[1:]}


# --- what it sees -------------------------------------------------------------------------------


def test_the_surroundings_are_as_documented(box):
    lines = box.run(
        "echo $HOME; echo $PATH; echo $LANG; hostname; id -un; pwd; ls -d /workspace;"
        "stat -c %a /tmp /dev/shm;"
        "getent hosts localhost | head -1; cat /etc/hostname"
    )["stdout"].split("\n")
    slug = box.record["slug"]
    assert lines[:7] == [
        "/root",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "C.UTF-8",
        slug,
        "root",
        "/workspace",
        "/workspace",
    ]
    assert lines[7:9] == ["1777", "1777"]
    assert lines[9].split()[0] in ("::1", "127.0.0.1")
    assert lines[10] == slug


def test_nothing_of_the_hosts_homes_and_secrets_is_in_sight(box):
    seen = box.run(
        "ls -A /root /home /srv /mnt /media /opt; cat /etc/shadow /etc/gshadow /etc/sudoers"
    )
    assert "No such file" in seen["stderr"] and seen["stderr"].count("No such file") >= 3
    names = [line for line in seen["stdout"].split() if not line.endswith(":")]
    assert names == []
    found = box.run("ls /etc/ssh /etc/ssl/private /var/lib/heyvm 2>/dev/null")
    assert found["stdout"] == ""


def test_no_accounts_of_people_are_told(box):
    users = box.run("cut -d: -f1,3 /etc/passwd")["stdout"].split()
    assert "root:0" in users
    assert all(int(line.split(":")[1]) < 1000 or line.startswith("nobody") for line in users)


@pytest.mark.usefixtures("root_server")
def test_system_files_are_changed_for_this_sandbox_alone(box, sandbox, http):
    name = f"/usr/bin/heyvm-test-{box.id}"
    assert box.run(f"echo '#!/bin/sh' > {name}; chmod +x {name}; {name}")["exit_code"] == 0
    assert not os.path.exists(name)
    other = sandbox()["id"]
    answer = http.post(f"/sandboxes/{other}/execute", json={"command": "ls", "args": [name]})
    assert answer.json()["exit_code"] != 0


def test_a_command_has_three_descriptors(box):
    assert box.run("ls /proc/$$/fd")["stdout"].split() == ["0", "1", "2"]


def test_no_process_variable_or_argument_of_the_server_is_seen(box, server):
    seen = box.run("cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'")["stdout"]
    for needle in (str(server.home), "gunicorn", "HEYVM_", "JWT_"):
        assert needle not in seen


def test_other_sandboxes_processes_are_not_seen(box, sandbox, http):
    other = sandbox(start_command="exec sleep 7654")["id"]
    answer = http.post(f"/sandboxes/{other}/execute", json={"command": "pgrep -f 'sleep 765[4]'"})
    assert answer.json()["exit_code"] == 0
    assert "7654" not in box.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")["stdout"]


def test_without_a_network_only_loopback_is_there(sandbox, http):
    ref = sandbox(network="none")["id"]

    def run(line):
        return http.post(f"/sandboxes/{ref}/execute", json={"command": line}).json()

    assert run("sh -c 'cut -d: -f1 /proc/net/dev | tail -n +3'")["stdout"].split() == ["lo"]
    assert "refused" in run("bash -c 'echo > /dev/tcp/127.0.0.1/22'")["stderr"]


def test_a_server_inside_is_reached_inside(box):
    line = (
        "cd /tmp; echo hello > x; python3 -m http.server 8080 --bind 127.0.0.1 >/dev/null 2>&1 & "
        "for i in $(seq 100); do "
        'python3 -c "import urllib.request as u;'
        " print(u.urlopen('http://127.0.0.1:8080/x').read())\" "
        "2>/dev/null && exit; done; exit 1"
    )
    assert "hello" in box.run(line, timeout_seconds=30)["stdout"]


@pytest.mark.usefixtures("root_server")
def test_low_ports_can_be_bound(box):
    program = "import socket; s=socket.socket(); s.bind(('127.0.0.1', 80)); print('bound')"
    assert box.python(program)["stdout"] == "bound\n"


# --- who it is ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("root_server")
def test_root_inside_is_nobody_outside(box, processes):
    assert box.run("id -u")["stdout"] == "0\n"
    with contextlib.closing(long_command(box)):
        seen = set().union(*(uids(pid) for pid in processes()))
    assert seen and all(uid >= ranges.LOWEST for uid in seen)


def long_command(box):
    """Something that runs in the background until closed."""
    box.run("sleep 600 >/dev/null 2>&1 &")

    class Running:
        def close(self):
            box.run("pkill sleep")

    return Running()


@pytest.mark.usefixtures("root_server")
def test_each_sandbox_has_65536_ids_of_its_own(box, sandbox, http):
    def map_of(ref):
        command = {"command": "cat", "args": ["/proc/self/uid_map", "/proc/self/gid_map"]}
        words = http.post(f"/sandboxes/{ref}/execute", json=command).json()["stdout"].split()
        assert words[:3] == words[3:]
        return [int(word) for word in words[:3]]

    one, two = map_of(box.id), map_of(sandbox()["id"])
    assert one[0] == two[0] == 0
    assert one[2] == two[2] == 65536
    assert abs(one[1] - two[1]) >= 65536


@pytest.mark.usefixtures("root_server")
def test_the_range_is_reserved_for_this_server(box, server, processes):
    (uid,) = {uid for pid in processes() for uid in uids(pid) if uid % 65536 == 0}
    for name in ("subuid", "subgid"):
        owners = [
            owner
            for owner, start, count in (line.split(":") for line in Path("/etc", name).open())
            if int(start) <= uid < int(start) + int(count)
        ]
        assert owners == [f"heyvm-{server.mark}"]


@pytest.mark.usefixtures("root_server")
def test_capabilities_are_dockers_without_raw_sockets_and_devices(box):
    held = int(box.run("grep CapEff /proc/self/status")["stdout"].split()[1], 16)
    names = {number for number in range(64) if held >> number & 1}
    # capability.h: CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE
    # SYS_CHROOT AUDIT_WRITE SETFCAP
    assert names == {0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 29, 31}


def test_no_new_privileges_and_a_filter_are_on(box):
    status = box.run("cat /proc/self/status")["stdout"]
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status


@pytest.mark.usefixtures("root_server")
def test_other_users_of_the_sandbox_can_be_used(box):
    assert box.run("id -u; id -g", user="www-data")["stdout"] == "33\n33\n"
    assert box.run("id -u", user="1234")["stdout"] == "1234\n"


# --- pid 1 --------------------------------------------------------------------------------------


def still_answers(box):
    return box.run("echo fine")["stdout"] == "fine\n"


def test_no_signal_ends_pid_1(box):
    box.run("for s in $(seq 1 64); do kill -$s 1 2>/dev/null; done")
    assert still_answers(box)
    assert box.run("head -c 300 /proc/1/status | grep State")["stdout"].split()[1] in "RS"


def test_no_resource_limit_ends_pid_1(box):
    limits = "cpu=0", "nofile=0", "as=0", "nproc=0", "fsize=0", "data=0"
    for limit in limits:
        box.run(f"prlimit --pid 1 --{limit}")
    denied = box.run("prlimit --pid 1 --cpu=0:0")
    assert denied["exit_code"] != 0
    assert still_answers(box)


def test_pid_1_cannot_be_read(box):
    for name in ("mem", "environ", "maps", "auxv", "root/", "cwd/", "fd/0", "fd/3", "exe"):
        seen = box.run(f"ls /proc/1/{name}" if name.endswith("/") else f"head -c 1 /proc/1/{name}")
        assert seen["exit_code"] != 0, name
        assert "ermission denied" in seen["stderr"], (name, seen["stderr"])
    assert box.run("echo 1000 > /proc/1/oom_score_adj")["exit_code"] != 0


def test_pid_1_cannot_be_traced(box):
    program = """
PTRACE_ATTACH, PTRACE_SEIZE, EPERM = 16, 0x4206, 1
def refused(result): assert result == -1 and ctypes.get_errno() in (1, 3, 13), ctypes.get_errno()
refused(c.ptrace(PTRACE_ATTACH, 1, 0, 0))
refused(c.ptrace(PTRACE_SEIZE, 1, 0, 0))
class V(ctypes.Structure): _fields_ = [("p", ctypes.c_void_p), ("n", ctypes.c_size_t)]
b = ctypes.create_string_buffer(8)
v = V(ctypes.cast(b, ctypes.c_void_p), 8)
refused(c.process_vm_readv(1, ctypes.byref(v), 1, ctypes.byref(v), 1, 0))
fd = os.pidfd_open(1)
for number in range(12): refused(c.syscall(438, fd, number, 0))
print("held")
"""
    seen = box.python(program)
    assert seen["stdout"] == "held\n", seen["stderr"]
    assert still_answers(box)


def test_the_agents_program_cannot_be_changed(box):
    for line in (
        "echo x > /.heyvm/python3",
        "rm -f /.heyvm/python3",
        "chmod u+r /.heyvm/lib/ld-linux-*",
        "mv /.heyvm /heyvm",
        "mount -o remount,rw /.heyvm",
        "cp /dev/null /proc/1/exe",
    ):
        assert box.run(line)["exit_code"] != 0, line
    assert still_answers(box)


def test_pid_1_outlives_a_hog_of_its_neighbours(box, server):
    # Raised from outside just after the exec, so wait for it.
    line = "until [ $(cat /proc/$$/oom_score_adj) = 500 ]; do :; done; cat /proc/self/oom_score_adj"
    assert box.run(line, timeout_seconds=5)["stdout"] == "500\n"
    assert int(box.run("cat /proc/1/oom_score_adj")["stdout"] or 0) < 500
    box.run("for f in /proc/1/oom*adj /proc/1/task/1/oom*adj; do echo 15 > $f; done")
    assert read_bytes(f"/proc/{agent_pid(server, box.id)}/oom_score_adj") == b"0\n"


# --- ways out -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "unshare -U true",
        "unshare -n true",
        "unshare -m true",
        "nsenter -t 1 -m true",
        "mount -t tmpfs x /mnt",
        "mount --bind /usr /mnt",
        "umount /proc/keys",
        "umount /proc",
        "mknod /tmp/sda b 8 0",
        "mknod /tmp/mem c 1 1",
        "chroot /proc/1/root true",
        "echo b > /proc/sysrq-trigger",
        "echo x > /proc/sys/kernel/core_pattern",
        "echo 1 > /proc/sys/vm/drop_caches",
        "hostname other",
        "date -s 2000-01-01",
        "dmesg",
        "cat /proc/kcore",
        "swapon /tmp/x",
        "ls /sys/fs/cgroup",
        "ls /proc/1/root/",
        "ping -c1 127.0.0.1",
    ],
)
def test_it_is_refused(box, line):
    seen = box.run(line)
    assert seen["exit_code"] != 0, seen


def test_keys_and_timers_of_the_kernel_are_hidden(box):
    seen = box.run("cat /proc/keys /proc/timer_list 2>/dev/null | wc -c")
    assert seen["stdout"] == "0\n"


def test_a_device_that_was_made_elsewhere_opens_no_disk(box):
    seen = box.run("for d in /dev/*; do [ -b $d ] && echo $d; done; true")
    assert seen["stdout"] == ""


def test_a_crash_calls_no_handler_of_the_host(box):
    assert box.run("ulimit -c; ulimit -Hc")["stdout"].split() == ["0", "0"]
    limits = box.run("grep 'core file' /proc/self/limits")["stdout"].split()
    # 1 byte is the value with which the kernel calls no pipe handler (core(5)); 0 would.
    assert limits[4:6] == ["1", "1"]


def test_set_id_bits_cannot_be_made_beside_a_writable_mount(box, http, server):
    path = server.home / "mounted"
    path.mkdir(exist_ok=True)
    os.chown(path, ORDINARY, ORDINARY)
    wanted = {"host_path": str(path), "sandbox_path": "/data"}
    assert http.post(f"/sandboxes/{box.id}/mounts", json=wanted).status_code == 201
    http.post(f"/sandboxes/{box.id}/restart")
    for line in (
        "cp /bin/sh s; chmod 4755 s",
        "cp /bin/sh s; chmod g+s s",
        "install -m 4755 /bin/sh s",
        "cp --preserve=mode /usr/bin/passwd s 2>/dev/null && test -u s",
    ):
        box.run(line)
    assert (
        box.run("find / -xdev -newer /etc/hostname -perm /6000 -type f 2>/dev/null")["stdout"] == ""
    )


@pytest.mark.usefixtures("root_server")
def test_a_set_user_id_program_of_the_host_gains_nothing(box):
    seen = box.run("/usr/bin/su -c id; /usr/bin/mount --bind / /mnt", user="www-data")
    assert "uid=0" not in seen["stdout"]
    assert seen["exit_code"] != 0


def test_a_core_of_the_filter_the_terminal_ioctl_is_refused(box):
    program = """
import pty, fcntl
m, s = pty.openpty()
for request in (0x5412, 0x541c, 0x5412 | 1 << 32):
    r = c.ioctl(s, ctypes.c_ulong(request), b"x")
    assert r == -1 and ctypes.get_errno() == 1, (hex(request), ctypes.get_errno())
print("refused")
"""
    seen = box.python(program)
    assert seen["stdout"] == "refused\n", seen["stderr"]


def test_a_zombie_storm_is_reaped(box):
    box.run("for i in $(seq 2000); do (true &) ; done; wait")
    wait_until(
        lambda: (
            box.run("cat /proc/[0-9]*/stat 2>/dev/null | grep -c ' Z '")["stdout"].strip() == "0"
        ),
        "the orphans are reaped",
    )


# --- what went wrong elsewhere -------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 3, 7, 8, 100])
def test_no_descriptor_is_a_directory_to_begin_in(box, http, number):
    """CVE-2024-21626: a directory of the host that was left open, as working directory."""
    for cwd in (
        f"/proc/self/fd/{number}",
        f"/proc/1/fd/{number}",
        f"/proc/self/task/1/fd/{number}",
    ):
        answer = http.post(
            f"/sandboxes/{box.id}/execute", json={"command": "pwd", "args": [], "cwd": cwd}
        )
        assert answer.status_code == 422 or answer.json()["exit_code"] != 0, answer.text


def test_the_programs_that_start_it_cannot_be_overwritten(box, server):
    """CVE-2019-5736: the runtime's own program, reached through /proc/self/exe."""
    paths = [shutil.which("bwrap"), sys.executable, *map(str, server.data_dir.glob("bundle/*/*"))]
    before = {path: os.stat(path) for path in paths if os.path.isfile(path)}
    box.python(
        """
for path in ("/proc/self/exe", "/proc/1/exe", "/usr/bin/bwrap", "/.heyvm/python3",
             "/proc/1/root/usr/bin/bwrap", "/proc/1/cwd/usr/bin/bwrap"):
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        try: os.write(os.open(path, flags), b"#!/bin/sh")
        except OSError: pass
"""
    )
    # A script whose interpreter is whatever runs it, while we wait with a descriptor of that.
    box.run(
        "printf '#!/proc/self/exe' > x; chmod +x x; (for i in $(seq 50); do for p in /proc/[0-9]*;"
        " do echo x > $p/exe; done; done) 2>/dev/null & ./x; wait",
        timeout_seconds=20,
    )
    for path, old in before.items():
        now = os.stat(path)
        assert (now.st_size, now.st_mtime_ns, now.st_ino) == (
            old.st_size,
            old.st_mtime_ns,
            old.st_ino,
        )
    assert still_answers(box)


def test_nothing_that_is_asked_for_is_an_option(http, sandbox, server):
    """CVE-2024-32462: a name with which a command line goes on."""
    path = server.home / "--dev-bind"
    path.mkdir(exist_ok=True)
    os.chown(path, ORDINARY, ORDINARY)
    ref = sandbox(
        name="--bind / /host",
        working_directory="/--bind",
        env_vars={"--setenv": "x", "-c": "y"},
        mounts=[{"host_path": str(path), "sandbox_path": "/--ro-bind"}],
    )["id"]
    for request in (
        {"command": "--bind", "args": ["/", "/host"]},
        {"command": "true", "args": ["--bind", "/", "/host"]},
        {"command": "ls", "args": ["-d", "/host"]},
        {"command": "pwd", "user": "--bind"},
    ):
        answer = http.post(f"/sandboxes/{ref}/execute", json=request)
        assert answer.status_code in (200, 422), answer.text
    seen = http.post(f"/sandboxes/{ref}/execute", json={"command": "pwd; ls -d /host /--ro-bind"})
    assert seen.json()["stdout"] == "/--bind\n/--ro-bind\n"
    refused = http.post("/sandboxes", json={"slug": "--bind"})
    assert refused.status_code == 422


def test_a_mount_lands_where_it_was_asked_for_or_nowhere(box, http, server):
    """CVE-2024-45310 and its kind: the place is swapped for a link while it is being mounted on."""
    path = server.home / "raced"
    path.mkdir(exist_ok=True)
    (path / "file").write_text("host's")
    os.chown(path, ORDINARY, ORDINARY)
    before = set(os.listdir("/etc")), set(os.listdir("/tmp"))
    swap = (
        "mkdir -p /a/b; while :; do rm -rf /a/b; ln -s /etc /a/b; rm -f /a/b; ln -s /oldroot/tmp"
        " /a/b; rm -f /a/b; mkdir /a/b; done"
    )
    box.run(f"sh -c '{swap}' >/dev/null 2>&1 & echo $! > /root/pid")
    try:
        for _ in range(30):
            wanted = {"host_path": str(path), "sandbox_path": "/a/b/deep", "read_only": True}
            answer = http.post(f"/sandboxes/{box.id}/mounts", json=wanted)
            assert answer.status_code in (201, 422), answer.text
            if answer.status_code == 201:
                seen = box.run("grep -c deep /proc/self/mountinfo; grep deep /proc/self/mountinfo")
                assert {line.split()[4] for line in seen["stdout"].splitlines()[1:]} <= {
                    "/a/b/deep"
                }
                http.delete(f"/sandboxes/{box.id}/mounts/a/b/deep")
    finally:
        box.run("kill $(cat /root/pid)")
    assert before[0] == set(os.listdir("/etc"))
    assert "deep" not in set(os.listdir("/tmp"))
    assert not box.run("ls /etc/deep")["stdout"]


def test_no_hard_link_leads_out_of_a_mount(box, http, server):
    path = server.home / "linked"
    path.mkdir(exist_ok=True)
    (path / "file").write_text("host's")
    for one in (path, path / "file"):
        os.chown(one, ORDINARY, ORDINARY)
    wanted = {"host_path": str(path), "sandbox_path": "/data"}
    http.post(f"/sandboxes/{box.id}/mounts", json=wanted)
    http.post(f"/sandboxes/{box.id}/restart")
    assert box.run("cat /data/file")["stdout"] == "host's"
    for line in ("ln /data/file /root/x", "ln /etc/hostname /data/x", "ln /.heyvm/log/log /data/x"):
        assert "ross-device" in box.run(line)["stderr"], line


# --- endings ------------------------------------------------------------------------------------


def agent_pid(server, ref):
    """Pid 1 of a sandbox, by its number on the host."""
    for pid in all_pids():
        status = read_bytes(f"/proc/{pid}/status")
        if ref in mountinfo(pid) and b"NSpid:" in status:
            numbers = status.split(b"NSpid:")[1].split(b"\n")[0].split()
            if len(numbers) > 1 and numbers[-1] == b"1":
                return pid
    raise AssertionError(f"{ref} has no pid 1")


def test_an_agent_that_died_is_a_failure_with_its_reason_and_start_works(server, http, sandbox):
    ref = sandbox(start_command="sleep 600")["id"]
    http.post(f"/sandboxes/{ref}/execute", json={"command": "echo kept > /workspace/file"})
    os.kill(agent_pid(server, ref), signal.SIGKILL)
    wait_until(lambda: http.get(f"/sandboxes/{ref}").json()["status"] == "failed", "it is noticed")
    record = http.get(f"/sandboxes/{ref}").json()
    assert "pid 1" in record["error_message"] and "signal 9" in record["error_message"]
    assert http.post(f"/sandboxes/{ref}/execute", json={"command": "true"}).status_code == 409
    assert http.post(f"/sandboxes/{ref}/start").json()["status"] == "running"
    answer = http.post(f"/sandboxes/{ref}/execute", json={"command": "cat /workspace/file"})
    assert answer.json()["stdout"] == "kept\n"


def test_nothing_is_left_of_a_sandbox_that_was_deleted(server, http):
    ref = http.post("/sandboxes", json={"start_command": "sleep 600"}).json()["id"]
    http.post(
        f"/sandboxes/{ref}/execute", json={"command": "mkdir -p a/b/c; touch a/b/c/d; mkfifo f"}
    )
    assert http.delete(f"/sandboxes/{ref}").status_code == 204
    assert not (server.data_dir / "sandboxes" / ref).exists()
    assert os.listdir(server.data_dir / "trash") == []
    assert not [pid for pid in server.sandbox_pids() if ref in mountinfo(pid)]
    assert not any(ref in name for name in os.listdir(server.run_dir / "agents"))


def test_files_stay_over_a_stop_and_temporary_ones_do_not(http, sandbox):
    ref = sandbox()["id"]
    places = "/workspace /root /etc /tmp /run /dev/shm"
    line = f"for d in {places}; do touch $d/mark; done"
    http.post(f"/sandboxes/{ref}/execute", json={"command": line})
    http.post(f"/sandboxes/{ref}/restart")
    line = f"for d in {places}; do test -e $d/mark && echo $d; done; true"
    seen = http.post(f"/sandboxes/{ref}/execute", json={"command": line}).json()["stdout"]
    assert seen.split() == ["/workspace", "/root", "/etc"]


def test_the_hosts_own_processes_are_untouched_by_a_kill_of_everything(box):
    marker = subprocess.Popen(["sleep", "60"])
    try:
        box.run("kill -9 -1", timeout_seconds=5)
        assert marker.poll() is None
        assert still_answers(box)
    finally:
        marker.kill()
        marker.wait()


def test_a_start_after_a_failed_hook_says_that_hooks_are_missing(http):
    made = http.post("/sandboxes", json={"setup_hooks": ["exit 3", "true"]})
    assert made.status_code == 422
    path = f"/sandboxes/{made.json()['id']}"
    started = http.post(f"{path}/start").json()
    assert started["status"] == "running"
    assert any("setup hook" in warning for warning in started["warnings"])
    http.delete(path)
