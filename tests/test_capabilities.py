"""Each capability that root inside keeps has something that works by it; the others do not.

What is kept is a namespace's, and holds for the sandbox's own ids, files and network alone. Each is
taken away for comparison: where nothing would change, it need not be there.
"""

import os

import pytest

from heyvm.backends.bubblewrap import CAPABILITIES
from tests import images
from tests.boxes import Boxes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="ids of their own need root")

# What only works with it (as root inside), in Python, after whatever has to be there.
KEPT = {
    "CHOWN": "os.chown(f, 33, 33)",
    "DAC_OVERRIDE": "os.chown(f, 33, 33); os.chmod(f, 0); open(f, 'w').write('x')",
    "FOWNER": "os.chown(f, 33, 33); os.chmod(f, 0o600)",
    # Keeps the set-group-id bit of a file whose group is none of ours.
    "FSETID": "os.chown(f, 0, 42); os.chmod(f, 0o2755); assert os.stat(f).st_mode & 0o2000",
    "SETGID": "os.setgroups([33]); os.setgid(33)",
    "SETUID": "os.setuid(33)",
    # What `setcap` writes; a file's capabilities give nothing to whoever runs it (nosuid).
    "SETFCAP": "os.setxattr(f, 'security.capability', struct.pack('<5I', 0x02000000, 1, 0, 0, 0))",
    # Lowers the bounding set, as daemons do to their own children.
    "SETPCAP": "assert prctl(24, 29, 0, 0, 0) == 0",
    "NET_BIND_SERVICE": "socket.socket().bind(('127.0.0.1', 80))",
    "SYS_CHROOT": "os.chroot('/usr')",
    # Ends a process of another user of the sandbox.
    "KILL": "os.kill(other(), 15)",
}
# Docker's default list holds the first two; the rest are what breaks walls.
DROPPED = {
    "NET_RAW": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "MKNOD": "os.mknod('/tmp/disk', 0o60600, os.makedev(8, 0))",
    "SYS_ADMIN": "assert mount(b'none', b'/mnt', b'tmpfs', 0, None) == 0",
    "SYS_PTRACE": "open(f'/proc/{other()}/mem', 'rb')",
    "SYS_MODULE": "assert syscall(175, 0, 0, b'') == 0",
    "SYS_RAWIO": "assert syscall(172, 3) == 0",
    "SYS_BOOT": "assert syscall(169, 0, 0, 0, 0) == 0",
    "SYS_TIME": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "SYS_NICE": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "SYS_RESOURCE": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (9, 9))",
    "SYS_PACCT": "assert syscall(163, 0) == 0",
    "SYS_TTY_CONFIG": "assert syscall(153) == 0",
    "SYSLOG": "assert syscall(103, 3, ctypes.create_string_buffer(99), 99) >= 0",
    "NET_ADMIN": "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 0))",
    "DAC_READ_SEARCH": "assert syscall(304, -100, ctypes.create_string_buffer(64), 0) >= 0",
    "LINUX_IMMUTABLE": "fcntl.ioctl(os.open(f, 0), 0x40086602, struct.pack('q', 16))",
    "IPC_LOCK": "assert lock_much()",
    "IPC_OWNER": "assert syscall(30, theirs(), 0, 0) > 0",
    "LEASE": "os.chown(f, 33, 33); fcntl.fcntl(os.open(f, 0), 1024, 0)",
    "MAC_ADMIN": "os.setxattr(f, 'security.SMACK64', b'x')",
    "AUDIT_CONTROL": "socket.socket(16, socket.SOCK_RAW, 9)",
    "AUDIT_READ": "socket.socket(16, socket.SOCK_RAW, 9)",
    "BPF": "assert syscall(321, 0, 0, 0) >= 0",
    "PERFMON": "assert syscall(298, ctypes.create_string_buffer(128), 0, -1, -1, 0) >= 0",
    "WAKE_ALARM": "assert syscall(283, 8, 0) >= 0",
    "BLOCK_SUSPEND": "open('/proc/sys/kernel/modprobe', 'w')",
    "CHECKPOINT_RESTORE": "os.write(os.open('/proc/sys/kernel/ns_last_pid', 1), b'9')",
}
PROGRAM = """
import ctypes, fcntl, mmap, os, socket, struct, subprocess, sys, time
c = ctypes.CDLL(None, use_errno=True)
prctl, mount, syscall = c.prctl, c.mount, c.syscall
f = "/root/file"
open(f, "w").close()
def other():
    "A process of another user."
    pid = os.fork()
    if pid == 0:
        os.setgid(34); os.setuid(34)
        os.execv("/bin/sleep", ["sleep", "20"])
    while not open(f"/proc/{pid}/cmdline", "rb").read().startswith(b"sleep"): time.sleep(0.01)
    return pid
def theirs():
    "A piece of shared memory that is another user's."
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setgid(34); os.setuid(34)
        os.write(writing, b"%d" % syscall(29, 77, 4096, 0o1600)); os._exit(0)
    return int(os.read(reading, 20))
def lock_much():
    import resource
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
    m = mmap.mmap(-1, 1 << 20)
    return c.mlock(ctypes.addressof(ctypes.c_char.from_buffer(m)), 1 << 20) == 0
"""
DROP = """
class H(ctypes.Structure): _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
drop = NUMBER
h = H(0x20080522, 0); d = (ctypes.c_uint32 * 6)()
assert c.capget(ctypes.byref(h), d) == 0
if drop is not None:
    for i in (0, 1, 2):
        d[i + (3 if drop > 31 else 0)] &= ~(1 << drop % 32)
    assert c.capset(ctypes.byref(h), d) == 0
"""
# linux/capability.h
NUMBERS = {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "FSETID": 4, "KILL": 5, "SETGID": 6}
NUMBERS |= {"SETUID": 7, "SETPCAP": 8, "NET_BIND_SERVICE": 10, "SYS_CHROOT": 18}
NUMBERS |= {"AUDIT_WRITE": 29, "SETFCAP": 31}
HELD = set(NUMBERS.values())


@pytest.fixture(scope="module")
def boxes():
    with Boxes() as made:
        yield made


@pytest.fixture(scope="module")
def box(boxes):
    made = boxes.start("host")
    yield made


def run(box, line, without=None):
    # Another's process is there before: making it needs rights of its own.
    prepared = "pid = other(); other = lambda: pid\n" if "other()" in line else ""
    number = None if without is None else NUMBERS[without]
    program = PROGRAM + prepared + DROP.replace("NUMBER", str(number)) + line.replace("; ", "\n")
    try:
        return box.execute("/usr/bin/python3", "-c", program)
    finally:
        box.run("pkill sleep; rm -f /root/file /tmp/disk; ipcrm --all=shm")


def test_every_one_that_is_kept_is_explained_here():
    # AUDIT_WRITE is the one without an effect: the filter lets nobody speak to the audit system,
    # but PAM's programs ask for it and give up where it is missing.
    assert {f"CAP_{name}" for name in (*KEPT, "AUDIT_WRITE")} == set(CAPABILITIES)


@pytest.mark.parametrize("name", KEPT)
def test_something_works_because_it_is_kept(box, name):
    done = run(box, KEPT[name])
    assert done.exit_code == 0, done.output.decode()


@pytest.mark.parametrize("name", [name for name in KEPT if name != "NET_BIND_SERVICE"])
def test_and_would_not_without(box, name):
    done = run(box, KEPT[name], without=name)
    assert done.exit_code != 0
    assert b"Error" in done.stderr


@pytest.mark.parametrize("name", DROPPED)
def test_what_needs_another_is_refused(box, name):
    done = run(box, DROPPED[name])
    assert done.exit_code != 0
    assert b"Error" in done.stderr and b"NameError" not in done.stderr, done.stderr.decode()


def test_nobody_gains_any_by_a_program(box):
    """Neither by its file's capabilities nor by its bits, nor by the ambient or inheritable set."""
    box.output("cp /usr/bin/python3 /root/p && chmod 755 /root /root/p")
    program = PROGRAM + (
        "os.setxattr('/root/p', 'security.capability',"
        " struct.pack('<5I', 0x02000001, 0xffffffff, 0xffffffff, 0x1ff, 0x1ff))"
    )
    assert box.execute("/usr/bin/python3", "-c", program).exit_code == 0
    line = "/root/p -c 'print(open(\"/proc/self/status\").read())'"
    seen = box.output(line, user="www-data")
    for kind in ("CapPrm", "CapEff", "CapAmb"):
        assert f"{kind}:\t0000000000000000" in seen


def test_it_holds_no_more(box):
    seen = box.output("cat /proc/self/status")
    for kind in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
        (held,) = (line.split()[1] for line in seen.splitlines() if line.startswith(kind))
        assert {number for number in range(64) if int(held, 16) >> number & 1} == HELD, kind


def test_users_inside_have_none(box):
    seen = box.output("grep Cap /proc/self/status", user="www-data")
    for line in seen.splitlines():
        # The inheritable set counts with a program's own alone, and here they give none (below).
        if not line.startswith(("CapBnd", "CapInh")):
            assert line.split()[1] == "0" * 16


def test_an_image_has_the_same(boxes):
    box = boxes.start(boxes.image(images.tiny()))
    assert "CapEff:\t00000000a00405fb" in box.output("cat /proc/self/status")
