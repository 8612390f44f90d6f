"""What the system call filter lets through: in an interpreter of BPF for every number, and in
bubblewrap, with a static program, for the calls that matter most."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from heyvm.backends import seccomp

HEADERS = Path("/usr/include/x86_64-linux-gnu/asm")
ATTACKS = Path(__file__).parent / "attacks"
TOKENS = {"64": 0xC000003E, "32": 0x40000003, "x32": 0xC000003E}
FORMS = tuple(TOKENS)
X32_BIT = 0x40000000
ALLOW = 0x7FFF0000

# Called with 1 for every argument: a bad pointer, a wrong magic number, a descriptor of the wrong
# kind. As root of the machine the kernel itself then says anything but EPERM.
REFUSED = """
mount umount2 pivot_root move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr
open_tree_attr setns bpf perf_event_open userfaultfd io_uring_setup io_uring_enter
io_uring_register keyctl add_key request_key kexec_load kexec_file_load init_module finit_module
delete_module open_by_handle_at name_to_handle_at quotactl quotactl_fd acct swapon swapoff reboot
syslog settimeofday clock_settime adjtimex clock_adjtime iopl ioperm modify_ldt lookup_dcookie
nfsservctl process_madvise sethostname setdomainname fanotify_init mbind move_pages sysfs
clock_settime64 clock_adjtime64 umount stime vm86 vm86old
""".split()
NAMESPACES = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
SIGCHLD = 17
Call = tuple[str, Sequence[object]]  # name, arguments
AT_FDCWD = -100
# What the filter must refuse, and the kernel alone would not: name, arguments.
REFUSED_BY_ARGUMENT: list[Call] = [
    *(("unshare", [flag]) for flag in (*NAMESPACES, 0x80)),
    *(("clone", [flag | SIGCHLD]) for flag in NAMESPACES),
    ("personality", [0x0400000]),  # READ_IMPLIES_EXEC
    ("personality", [0x6]),
    ("ioctl", [0, 0x5412, 1]),
    ("ioctl", [0, 0x541C, 1]),
    *(
        (name, [*before, mode])
        for mode in (0o4755, 0o2755, 0o6755, 0o4000, 0o2644, 0o104755)
        for name, before in (
            ("chmod", ["path"]),
            ("fchmod", [77]),
            ("fchmodat", [AT_FDCWD, "path"]),
            ("fchmodat2", [AT_FDCWD, "path"]),
            ("creat", ["path"]),
            ("open", ["path", 0o101]),
            ("openat", [AT_FDCWD, "path", 0o101]),
            ("open", ["path", 0o20200002]),
            ("mknod", ["path"]),
            ("mknodat", [AT_FDCWD, "path"]),
        )
    ),
]
# In 64-bit calls the kernel does not look at the upper half of these arguments.
SLIPS: list[Call] = [
    ("ioctl", [0, 0x5412 | 1 << 32, 1]),
    ("ioctl", [0, 0x541C | 0xABC << 40, 1]),
    ("unshare", [0x10000000 | 1 << 32]),
    ("chmod", ["path", 0o4755 | 1 << 32]),
    ("openat", [AT_FDCWD, "path", 0o101 | 1 << 35, 0o4755 | 1 << 32]),
    ("personality", [0x0400000 | 1 << 32]),
]
PID_1: list[Call] = [
    ("prlimit64", [1, 0, 0, 0]),
    ("sched_setaffinity", [1, 8, 1]),
    ("sched_setattr", [1, 1, 0]),
    ("sched_setparam", [1, 1]),
    ("sched_setscheduler", [1, 0, 1]),
    ("ioprio_set", [1, 1, 0x4000]),
    ("ioprio_set", [2, 0, 0x4000]),
    ("ioprio_set", [3, 0, 0x4000]),
    ("setpriority", [0, 1, 1]),
    ("setpriority", [1, 0, 1]),
    ("setpriority", [2, 0, 1]),
]
# Must not be refused: the kernel's own answer comes back.
LEFT_ALONE: list[tuple[str, Sequence[object], int]] = [
    ("chmod", ["path", 0o755], -errno.ENOENT),
    ("open", ["path", 0, 0o4755], -errno.ENOENT),  # no O_CREAT: the mode is whatever was there
    ("unshare", [0x200], 0),
    ("personality", [0xFFFFFFFF], 0),
    ("ioctl", [0, 0x5401, 0], -errno.ENOTTY),
    ("setpriority", [0, 0, 1], 0),
    ("prlimit64", [0, 0, 0, 0], 0),
    ("clone3", [0, 0], -errno.ENOSYS),
    ("openat2", [AT_FDCWD, "path", 0, 0], -errno.ENOSYS),
    ("listmount", [0, 0, 0, 0], -errno.ENOSYS),
]


def numbers(form: str) -> dict[str, int]:
    """From the kernel's headers: a source other than the one that the filter is built from."""
    text = (HEADERS / f"unistd_{form}.h").read_text()
    found = re.findall(r"#define __NR_(\w+) \(?(?:__X32_SYSCALL_BIT \+ )?(\d+)\)?", text)
    newer = {"fchmodat2": 452, "listmount": 458, "open_tree_attr": 467}
    return newer | {name: int(number) for name, number in found}


needs_headers = pytest.mark.skipif(
    not (HEADERS / "unistd_x32.h").exists(), reason="needs linux-libc-dev on x86_64"
)


# --- in an interpreter of BPF


def evaluate(program: bytes, token: int, number: int, arguments: Iterable[int] = ()) -> int:
    args = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    packed = struct.pack("=IIQ6Q", number, token, 0, *(value & (1 << 64) - 1 for value in args))
    instructions = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, k = instructions[at]
        at += 1
        if code == 0x06:
            return int(k)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", packed, k)
        elif code == 0x54:
            accumulator &= k
        elif code == 0x05:
            at += k
        else:
            holds = accumulator == k if code == 0x15 else accumulator >= k
            assert code in (0x15, 0x35)
            at += if_true if holds else if_false


def answer(form: str, name: str, *arguments: int, single_id: bool = False) -> int:
    bit = X32_BIT if form == "x32" else 0
    program = seccomp.build(single_id=single_id)
    return evaluate(program, TOKENS[form], numbers(form)[name] | bit, arguments)


def expected(rule: seccomp.Rule, arguments: list[int]) -> int:
    """The rules' meaning, said once more and otherwise."""
    return next(
        case.action
        for case in rule
        if all(arguments[t.argument] % 2**32 & t.mask == t.value for t in case.tests)
    )


@needs_headers
@pytest.mark.parametrize("single_id", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_number_gets_what_its_rule_says(form: str, single_id: bool) -> None:
    rules = seccomp.rules(single_id=single_id)
    program = seccomp.build(single_id=single_id)
    names = {number: name for name, number in numbers(form).items()}
    enosys = (seccomp.Case(seccomp.ENOSYS),)
    dice = random.Random(1)
    for number in range(600):
        name = names.get(number, "")
        if name in seccomp.NEWER or number > 450:
            continue  # may be newer than these headers
        for _ in range(10):
            arguments = [dice.choice(INTERESTING) | dice.getrandbits(32) << 32 for _ in range(6)]
            want = expected(rules.get(name, enosys), arguments)
            if form == "x32":
                if number not in names:
                    continue  # a 64-bit number; refused or absent, see below
                want = seccomp.ENOSYS if want == ALLOW else want
                number |= X32_BIT
            assert evaluate(program, TOKENS[form], number, arguments) == want, (name, arguments)


INTERESTING = (
    *(0, 1, 2, 3, 4, 8, 10, 15, 16, 17, 40, 0x5412, 0x541C, 0x20008, 0xFFFFFFFF),
    *(0o4755, 0o2755, 0o2644, 0o755, 0o101, 0o20200000, 0o200000, *NAMESPACES),
)


@pytest.mark.parametrize("number", [*range(470), 2**29, 0xFFFFFFFF, 0x7FFFFFFF])
def test_nothing_is_allowed_as_x32(number: int) -> None:
    program = seccomp.build(single_id=False)
    action = evaluate(program, TOKENS["x32"], number | X32_BIT)
    assert action in (seccomp.EPERM, seccomp.ENOSYS, seccomp.NO_FAMILY)


def test_an_unknown_architecture_is_killed() -> None:
    assert evaluate(seccomp.build(single_id=False), 0xC00000B7, 0) == seccomp.KILL


def test_every_jump_stays_inside_and_every_path_ends() -> None:
    for single_id in (False, True):
        program = list(struct.iter_unpack("=HBBI", seccomp.build(single_id=single_id)))
        assert len(program) <= 4096
        assert program[-1][0] == 0x06
        for at, (code, if_true, if_false, k) in enumerate(program):
            furthest = k if code == 0x05 else max(if_true, if_false)
            assert at + 1 + furthest <= len(program) - (code != 0x06)


def test_the_same_is_built_by_another_process() -> None:
    code = "import sys; from heyvm.backends import seccomp as s\n"
    code += "sys.stdout.buffer.write(s.build(single_id=True))"
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=True
        )
        assert done.stdout == seccomp.build(single_id=True)


def test_importing_it_loads_no_library() -> None:
    code = "import sys; import heyvm.backends.seccomp; assert 'pyseccomp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_headers
@pytest.mark.parametrize("form", ["64", "32"])
def test_sockets_are_of_the_common_families(form: str) -> None:
    for family in (1, 2, 10):
        assert answer(form, "socket", family, 1, 0) == ALLOW
    for family in (3, 17, 21, 29, 30, 31, 38, 40, 44, 45, 40 | 1 << 32, 38 | 1 << 32):
        assert answer(form, "socket", family, 1, 0) == seccomp.NO_FAMILY
    assert answer(form, "socket", 16, 3, 0) == ALLOW
    assert answer(form, "socket", 16, 3, 9) == seccomp.NO_PROTOCOL
    assert answer(form, "socketpair", 1, 1, 0) == ALLOW


@needs_headers
def test_the_32_bit_detour_makes_no_sockets() -> None:
    assert answer("32", "socketcall", 1, 0) == seccomp.EPERM
    assert answer("32", "socketcall", 8, 0) == seccomp.EPERM
    assert answer("32", "socketcall", 3, 0) == ALLOW


@needs_headers
def test_set_id_bits_can_be_made_where_that_is_asked_for() -> None:
    program = seccomp.build(single_id=False, set_id=True)
    assert evaluate(program, TOKENS["64"], numbers("64")["chmod"], [0, 0o4755]) == ALLOW


# --- in bubblewrap


@pytest.fixture(scope="session")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc") or not shutil.which("bwrap"):
        pytest.skip("needs gcc and bwrap")
    program = tmp_path_factory.mktemp("attacks") / "calls"
    source = ATTACKS / "calls.c"
    command = ["gcc", "-O1", "-Wall", "-Werror", "-static", "-no-pie", "-o"]
    subprocess.run([*command, program, source], check=True)
    return program


def confined(
    argv: list[str], filtered: bytes | None, *, stdin: str = "", root: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run it in bwrap; `root` keeps every capability, so that no refusal is the kernel's."""
    memory = os.memfd_create("filter")
    os.write(memory, filtered or b"")
    os.lseek(memory, 0, os.SEEK_SET)
    rights = ["--cap-add", "ALL"] if root and os.geteuid() == 0 else ["--unshare-user"]
    filter_options = ["--seccomp", str(memory)] if filtered else []
    box = ["--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-ipc", "--new-session"]
    mounts = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    places = ["--tmpfs", "/tmp", "--die-with-parent", "--chdir", "/tmp"]
    for directory in [Path(argv[0]).parent] * argv[0].startswith("/tmp/"):
        places += ["--ro-bind", str(directory), str(directory)]
    try:
        return subprocess.run(
            ["bwrap", *box, *mounts, *places, *rights, *filter_options, "--", *argv],
            input=stdin,
            capture_output=True,
            text=True,
            pass_fds=[memory],
            timeout=120,
        )
    finally:
        os.close(memory)


def results(
    calls: Path, asked: list[tuple[str, str, Sequence[object]]], filtered: bytes | None
) -> list[int]:
    """What each (form, name, arguments) answers inside."""
    lines = []
    for form, name, arguments in asked:
        words = [str(word) for word in [*arguments, 1, 1, 1, 1, 1, 1][:6]]
        lines.append(" ".join([form, str(numbers(form)[name]), *words]))
    done = confined([str(calls)], filtered, stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def every_form(cases: Iterable[Call]) -> list[tuple[str, str, Sequence[object]]]:
    return [
        (form, name, arguments)
        for form in FORMS
        for name, arguments in cases
        if name in numbers(form)
    ]


@needs_headers
def test_dangerous_calls_get_the_filters_eperm_in_every_form(calls: Path) -> None:
    asked = every_form([*((name, []) for name in REFUSED), *REFUSED_BY_ARGUMENT])
    filtered = results(calls, asked, seccomp.build(single_id=False))
    wrong = [(*what, got) for what, got in zip(asked, filtered, strict=True) if got != -errno.EPERM]
    assert wrong == []


@needs_headers
@pytest.mark.skipif(os.geteuid() != 0, reason="without root the kernel says EPERM as well")
def test_without_the_filter_the_kernel_alone_would_not_say_eperm(calls: Path) -> None:
    asked = every_form([*((name, []) for name in REFUSED), *REFUSED_BY_ARGUMENT])
    plain = results(calls, asked, None)
    same = {(form, name) for (form, name, _), got in zip(asked, plain, strict=True) if got == -1}
    assert same <= MAY_BE_THE_KERNELS


# TIOCSTI on a descriptor that is no terminal is ENOTTY; anything else that the kernel of a hardened
# machine may refuse to root as well goes here, with the reason.
MAY_BE_THE_KERNELS: set[tuple[str, str]] = set()


@needs_headers
def test_high_bits_do_not_slip_past(calls: Path) -> None:
    asked: list[tuple[str, str, Sequence[object]]] = [("64", name, args) for name, args in SLIPS]
    assert set(results(calls, asked, seccomp.build(single_id=False))) == {-errno.EPERM}


@needs_headers
def test_with_a_single_id_pid_1_cannot_be_named(calls: Path) -> None:
    asked = every_form(PID_1)
    got = results(calls, asked, seccomp.build(single_id=True))
    assert set(got) == {-errno.EPERM}
    native = [what for what in asked if what[0] == "64"]
    shared = results(calls, native, seccomp.build(single_id=False))
    assert shared[0] != -errno.EPERM  # its limits are the kernel's to keep
    assert set(shared[1:]) == {-errno.EPERM}


@needs_headers
@pytest.mark.parametrize("form", ["64", "32"])
def test_the_harmless_half_of_a_call_is_left_alone(calls: Path, form: str) -> None:
    asked: list[tuple[str, str, Sequence[object]]] = [(form, n, args) for n, args, _ in LEFT_ALONE]
    got = results(calls, asked, seccomp.build(single_id=True))
    assert got == [want for _, _, want in LEFT_ALONE]


ORDINARY = {
    "bash jobs": "sleep 0.1 & wait; set -m; (exit 3) & wait %1 || [ $? = 3 ]; echo a | cat | wc -c",
    "python threads and children": "python3 -c 'import threading, subprocess, multiprocessing;"
    " t = threading.Thread(target=print); t.start(); t.join();"
    ' subprocess.run(["true"], check=True);'
    " p = multiprocessing.Process(target=print); p.start(); p.join(); assert p.exitcode == 0'",
    "python servers": "python3 -c 'import asyncio, socket;"
    ' a, b = socket.socketpair(); s = socket.create_server(("127.0.0.1", 0));'
    " asyncio.run(asyncio.sleep(0))'",
    "gcc": "echo 'int main(){return 7;}' > a.c && gcc a.c -o a && (./a || [ $? = 7 ])",
    "tar": "mkdir -p d/e && echo x > d/e/f && tar czf d.tgz d && rm -r d"
    " && tar xzf d.tgz && cat d/e/f",
    "git": "git init -q r && cd r && git -c user.name=a -c user.email=b commit -q --allow-empty"
    " -m c && git clone -q . ../s && git -C ../s log --oneline",
    "dpkg": "mkdir -p p/DEBIAN p/usr/bin && echo x > p/usr/bin/x &&"
    " printf 'Package: x\\nVersion: 1\\nArchitecture: all\\nMaintainer: a <a@b>\\n"
    "Description: x\\n' > p/DEBIAN/control && dpkg-deb -b p x.deb && dpkg-deb -x x.deb q"
    " && cat q/usr/bin/x",
    "apt": "apt-cache policy >/dev/null",
    "find": "find /etc -maxdepth 1 -newer /etc/passwd >/dev/null; mkdir z; find . -name z | grep z",
    "ps": "ps aux | grep -q ps",
    "strace": "strace -f -o t sh -c 'true; :' && grep -q execve t",
    "gdb": "gdb -q -batch -ex starti -ex 'info registers rip' -ex kill /bin/true",
    "node": 'node -e \'require("child_process").execSync("true");'
    ' require("http").createServer().listen(0, function () { this.close(); })\'',
    "perl": "perl -e 'exit(fork ? (wait, $? >> 8)[1] : 0)'",
    "flock": "flock lock true && timeout 5 true && nice -n 1 true && taskset -c 0 true",
    "chmod": "touch m && chmod 755 m && chmod +t . && chown $(id -u) m; ln -s m n; mkfifo o;"
    " touch -d @1 m",
    "sqlite": 'python3 -c \'import sqlite3; sqlite3.connect("x.db").execute("create table t(a)")\'',
}


@pytest.mark.parametrize("what", ORDINARY)
@pytest.mark.parametrize("single_id", [False, True])
def test_ordinary_programs_run(what: str, single_id: bool) -> None:
    tool = what.split()[0].replace("python", "python3").replace("sqlite", "python3")
    if not shutil.which(tool if tool != "apt" else "apt-cache"):
        pytest.skip(f"no {tool} here")
    environment = "export HOME=/tmp PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin; set -e; "
    argv = ["/bin/bash", "-c", environment + ORDINARY[what]]
    done = confined(argv, seccomp.build(single_id=single_id), root=False)
    assert done.returncode == 0, done.stdout + done.stderr
