"""The system call filter that every sandbox runs under, as the BPF program that bwrap loads.

An allow-list in the spirit of Docker's default profile: known good calls pass, known dangerous ones
give EPERM, and what is not named here gives ENOSYS, as on a kernel that is too old to have it.
libseccomp (through pyseccomp) knows the calls' numbers. The program is laid out here rather than
there, because a rule of libseccomp is a conjunction without an order: "EPERM if the low 32 bits
equal TIOCSTI, else allow" cannot be said in it.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from heyvm.errors import Unavailable

# linux/seccomp.h and linux/bpf_common.h
ALLOW = 0x7FFF0000
KILL = 0x80000000
ERRNO = 0x00050000
EPERM = ERRNO | errno.EPERM
ENOSYS = ERRNO | errno.ENOSYS
NO_FAMILY = ERRNO | errno.EAFNOSUPPORT
NO_PROTOCOL = ERRNO | errno.EPROTONOSUPPORT
LOAD, AND, RETURN = 0x20, 0x54, 0x06
JUMP, JUMP_EQUAL, JUMP_AT_LEAST = 0x05, 0x15, 0x35
NR_OFFSET, ARCH_OFFSET, ARGS_OFFSET = 0, 4, 16
X32_BIT = 0x40000000
SOCKADDR_IN_BYTES = 16  # IPv4's alone
LONGEST_CONDITIONAL_JUMP = 255
LONGEST_PROGRAM = 4096  # BPF_MAXINSNS
INT = 0xFFFFFFFF


@dataclass(frozen=True)
class Test:
    """Holds when `argument & mask == value`, on the low 32 bits.

    The kernel takes each argument that is tested here as an int, or has no flag above bit 31: a
    comparison of all 64 bits would be slipped past by setting one that the kernel does not look at.
    """

    argument: int
    value: int
    mask: int = INT


@dataclass(frozen=True)
class Case:
    """What to answer when every test holds; without tests, always."""

    action: int
    tests: tuple[Test, ...] = ()


Rule = tuple[Case, ...]  # the first case that holds; the last has no tests
Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, k
Program = list[Instruction]


def always(action: int) -> Rule:
    return (Case(action),)


def refuse(*tests: tuple[Test, ...]) -> Rule:
    """EPERM when all of any one of the `tests` hold, else allow."""
    return (*(Case(EPERM, each) for each in tests), Case(ALLOW))


def flags(argument: int, bits: int) -> Test:
    """All of `bits` are set."""
    return Test(argument, bits, bits)


ALLOWED = """
accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir chown chown32 chroot
clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
clock_nanosleep_time64 close close_range connect copy_file_range dup dup2 dup3 epoll_create
epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 execve execveat exit
exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fchdir fchown fchown32 fchownat
fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64
fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64
futex_wait futex_waitv futex_wake futimesat getcpu getcwd getdents getdents64 getegid getegid32
geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp
getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit
get_robust_list getrusage getsid getsockname getsockopt get_thread_area gettid gettimeofday getuid
getuid32 getxattr inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel
io_destroy io_getevents io_pgetevents io_pgetevents_time64 ioprio_get ioprio_set io_setup
io_submit ipc kcmp kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown
lchown32 lgetxattr link linkat listen listxattr llistxattr _llseek lremovexattr lseek lsetxattr
lstat lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat
mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive
mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget
msgrcv msgsnd msync munlock munlockall munmap nanosleep newfstatat _newselect nice pause
pidfd_getfd pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll
ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease process_vm_readv
process_vm_writev pselect6 pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead
readlink readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages
removexattr rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending
rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64
rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam sched_get_priority_max
sched_get_priority_min sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64
sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select
semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto
setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid
setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32
setrlimit set_robust_list setsid setsockopt set_thread_area set_tid_address setuid setuid32
setxattr shmat shmctl shmdt shmget shutdown sigaction sigaltstack signal signalfd signalfd4
sigpending sigprocmask sigreturn sigsuspend splice stat stat64 statfs statfs64 statx symlink
symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create
timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64
timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill
truncate truncate64 ugetrlimit umask uname unlink unlinkat utime utimensat utimensat_time64 utimes
vfork vmsplice wait4 waitid waitpid write writev
arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls
""".split()

# EPERM rather than ENOSYS: they exist, and programs take the one for "not for you" and the other
# for "fall back to something older".
REFUSED = """
acct add_key adjtimex bpf clock_adjtime clock_adjtime64 clock_settime clock_settime64
create_module delete_module fanotify_init fanotify_mark finit_module fsconfig fsmount fsopen
fspick get_kernel_syms get_mempolicy init_module ioperm iopl io_uring_enter io_uring_register
io_uring_setup kexec_file_load kexec_load keyctl lookup_dcookie mbind migrate_pages modify_ldt
mount mount_setattr move_mount move_pages name_to_handle_at nfsservctl open_by_handle_at open_tree
open_tree_attr perf_event_open pivot_root process_madvise query_module quotactl quotactl_fd reboot
request_key setdomainname sethostname set_mempolicy set_mempolicy_home_node setns settimeofday
stime swapoff swapon _sysctl sysfs syslog umount umount2 uselib userfaultfd ustat vhangup vm86
vm86old
""".split()

# clone3 keeps its flags, openat2 its mode behind a pointer, where a filter cannot look. Every C
# library falls back to clone and openat.
ABSENT = ("clone3", "openat2")

CLONE_NEWTIME = 0x80  # in clone this bit belongs to the exit signal; there is no such flag there
NAMESPACES = (
    0x00020000,  # CLONE_NEWNS
    0x02000000,  # CLONE_NEWCGROUP
    0x04000000,  # CLONE_NEWUTS
    0x08000000,  # CLONE_NEWIPC
    0x10000000,  # CLONE_NEWUSER
    0x20000000,  # CLONE_NEWPID
    0x40000000,  # CLONE_NEWNET
)
TTY_INJECTION = (
    0x5412,  # TIOCSTI
    0x541C,  # TIOCLINUX: pastes into a console
    0x5423,  # TIOCSETD: loads line disciplines, a steady source of kernel faults
)
# PER_LINUX, PER_LINUX32, UNAME26, both, ADDR_NO_RANDOMIZE (what gdb sets on the program that it
# starts) and "tell me". READ_IMPLIES_EXEC and the personalities of other systems stay out.
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
# ROUTE and SOCK_DIAG (ss). The rest gets the answer of a kernel without them, which libaudit
# (useradd, sudo) takes for "no audit here" while an EPERM stops it. KOBJECT_UEVENT would tell of
# every device of the host's: the namespace of a network is the host's own, where root runs us.
NETLINK_PROTOCOLS = (0, 4)
S_ISUID, S_ISGID = 0o4000, 0o2000
O_CREAT, O_TMPFILE = 0o100, 0o20000000  # the bit of O_TMPFILE that is not O_DIRECTORY
SYS_SOCKET, SYS_SOCKETPAIR = 1, 8  # socketcall's own numbers, linux/net.h
PRIO_PROCESS = 0
IOPRIO_WHO_PROCESS = 1


def _family(*families: int) -> tuple[Case, ...]:
    return tuple(Case(ALLOW, (Test(0, family),)) for family in families)


def _argument_rules() -> dict[str, Rule]:
    netlink = tuple(
        Case(ALLOW, (Test(0, AF_NETLINK), Test(2, protocol))) for protocol in NETLINK_PROTOCOLS
    )
    return {
        "clone": refuse(*((flags(0, bit),) for bit in NAMESPACES)),
        "unshare": refuse(*((flags(0, bit),) for bit in (*NAMESPACES, CLONE_NEWTIME))),
        "ioctl": refuse(*((Test(1, request),) for request in TTY_INJECTION)),
        "personality": (
            *(Case(ALLOW, (Test(0, value),)) for value in PERSONALITIES),
            Case(EPERM),
        ),
        "socket": (
            *_family(AF_UNIX, AF_INET, AF_INET6),
            *netlink,
            Case(NO_PROTOCOL, (Test(0, AF_NETLINK),)),
            Case(NO_FAMILY),
        ),
        "socketpair": (*_family(AF_UNIX), Case(NO_FAMILY)),
        # 32-bit only, with the family behind a pointer: sockets are used through it, not made. A
        # 32-bit program whose C library knows no other way has no sockets here.
        "socketcall": refuse((Test(0, SYS_SOCKET),), (Test(0, SYS_SOCKETPAIR),)),
    }


def _set_id_rules() -> dict[str, Rule]:
    """No set-id bit is ever made: through a host mount it would be one on the host.

    (Set-group-id without the group's execute bit is refused too: an access list, which a filter
    cannot read, adds that bit afterwards.)
    """
    modes = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1}
    modes |= {"mknod": 1, "mknodat": 2}
    plain = {name: refuse(*_set_id(argument)) for name, argument in modes.items()}
    return plain | {"open": _open_rule(1), "openat": _open_rule(2)}


def _set_id(argument: int) -> tuple[tuple[Test, ...], ...]:
    return (flags(argument, S_ISUID),), (flags(argument, S_ISGID),)


def _open_rule(how: int) -> Rule:
    """The mode counts only where a file is made; elsewhere its register holds anything."""
    return refuse(
        *(
            (flags(how, making), *set_id)
            for making in (O_CREAT, O_TMPFILE)
            for set_id in _set_id(how + 1)
        )
    )


def _allow_set_id() -> dict[str, Rule]:
    return {name: always(ALLOW) for name in _set_id_rules()}


def _pid_1_rules(*, single_id: bool) -> dict[str, Rule]:
    """The agent's share of the machine is kept from its equals; naming it is enough to be refused,
    and so is naming everybody. Its limits are the kernel's to keep, but where there is one uid."""
    first = ("sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler")
    limits = ("prlimit64",) if single_id else ()
    return {name: refuse((Test(0, 1),)) for name in (*first, *limits)} | {
        "setpriority": _priority_rule(PRIO_PROCESS),
        "ioprio_set": _priority_rule(IOPRIO_WHO_PROCESS),
    }


def _priority_rule(one_process: int) -> Rule:
    return (
        Case(EPERM, (Test(0, one_process), Test(1, 1))),
        Case(ALLOW, (Test(0, one_process),)),
        Case(EPERM),
    )


def rules(*, single_id: bool, set_id: bool = False) -> dict[str, Rule]:
    """What is answered to each call, by name; a call that is not in it gets ENOSYS."""
    table = dict.fromkeys(ALLOWED, always(ALLOW))
    table |= dict.fromkeys(REFUSED, always(EPERM))
    table |= dict.fromkeys(ABSENT, always(ENOSYS))
    table |= _argument_rules() | (_allow_set_id() if set_id else _set_id_rules())
    return table | _pid_1_rules(single_id=single_id)


@functools.cache
def build(*, single_id: bool, set_id: bool = False) -> bytes:
    """The program for this machine: an array of `struct sock_filter`, as bwrap's --seccomp reads.

    `single_id`: the sandbox has one uid, which the agent shares. `set_id`: set-id bits may be made
    (dpkg cannot unpack sudo or ssh-agent without); only where no host directory is writable. The
    same arguments give the same bytes. Raises `Unavailable` without libseccomp or on a machine
    whose calls are not known here.
    """
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise Unavailable(f"there is no system call filter for {machine} processors")
    table = rules(single_id=single_id, set_id=set_id)
    program: Program = [(LOAD, 0, 0, ARCH_OFFSET)]
    for architecture in ARCHITECTURES[machine]:
        block = architecture.block(table)
        program += [(JUMP_EQUAL, 1, 0, architecture.token), (JUMP, 0, 0, len(block)), *block]
    program.append((RETURN, 0, 0, KILL))
    assert len(program) <= LONGEST_PROGRAM
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


# Calls newer than the libseccomp of Debian 12 (2.5.4): one number on every architecture.
NEWER = {
    "cachestat": 451,
    "fchmodat2": 452,
    "map_shadow_stack": 453,
    "futex_wake": 454,
    "futex_wait": 455,
    "futex_requeue": 456,
    "mseal": 462,
    "open_tree_attr": 467,
}
# libseccomp gives these no number on i386, since they can also be reached through socketcall and
# ipc (which have the rest of their kind). asm/unistd_32.h.
I386_DIRECT = {
    name: number
    for first, names in {
        337: "recvmmsg",
        345: "sendmmsg",
        359: "socket socketpair bind connect listen accept4 getsockopt setsockopt getsockname"
        " getpeername sendto sendmsg recvfrom recvmsg shutdown",
        393: "semget semctl shmget shmctl shmat shmdt msgget msgsnd msgrcv msgctl",
    }.items()
    for number, name in enumerate(names.split(), first)
}


@dataclass(frozen=True)
class Architecture:
    """One way of making system calls; `token` is its AUDIT_ARCH, linux/audit.h."""

    token: int
    direct: Mapping[str, int]
    x32: bool = False

    def block(self, table: Mapping[str, Rule]) -> Program:
        """Instructions that never fall through."""
        native = _dispatch(self._by_number(self.token, table))
        if not self.x32:
            return [(LOAD, 0, 0, NR_OFFSET), *native]
        # Nothing ships for x32 and few kernels have it: what is refused elsewhere is refused there
        # too, and all else is as if the kernel had none.
        x32 = _dispatch({nr: _without_allow(rule) for nr, rule in self._x32(table).items()})
        return [(LOAD, 0, 0, NR_OFFSET), *_branch(X32_BIT, native, x32)]

    def _x32(self, table: Mapping[str, Rule]) -> dict[int, Rule]:
        return self._by_number(X32_TOKEN, table, bit=X32_BIT) | {
            # Kernels before 5.4 also took the 64-bit numbers with the bit set.
            nr | X32_BIT: rule
            for nr, rule in self._by_number(self.token, table).items()
        }

    def _by_number(self, token: int, table: Mapping[str, Rule], bit: int = 0) -> dict[int, Rule]:
        numbered = ((self._number(token, name, bit), rule) for name, rule in table.items())
        return {number: rule for number, rule in numbered if number is not None}

    def _number(self, token: int, name: str, bit: int) -> int | None:
        if name in NEWER:
            return NEWER[name] | bit
        if name in self.direct:
            return self.direct[name]
        number = _resolve(token, name)
        return number if number >= 0 else None  # negative: not on this architecture


X32_TOKEN = 0x4000003E
ARCHITECTURES: dict[str, tuple[Architecture, ...]] = {
    "x86_64": (Architecture(0xC000003E, {}, x32=True), Architecture(0x40000003, I386_DIRECT)),
    "aarch64": (Architecture(0xC00000B7, {}), Architecture(0x40000028, {})),
}


def _resolve(token: int, name: str) -> int:
    try:
        # Here and not above: importing it searches for the library with ldconfig, which takes long.
        import pyseccomp
    except (ImportError, RuntimeError) as error:
        raise Unavailable(
            f"the system call filter cannot be built ({error});"
            " on Debian and Ubuntu: apt install libseccomp2"
        ) from error
    return int(pyseccomp.resolve_syscall(token, name))


def forbid_addressed_datagrams() -> None:
    """From now on sendto(2) to an IPv4 address gives EPERM in this process, whose only thread this
    is; connected sockets and sendmsg(2) work. Raises `Unavailable` where there is no libseccomp."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        raise Unavailable(f"libseccomp cannot be used: {error}") from None
    own = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    length = pyseccomp.Arg(5, pyseccomp.EQ, SOCKADDR_IN_BYTES)
    own.add_rule(pyseccomp.ERRNO(errno.EPERM), "sendto", length)
    own.load()


def _without_allow(rule: Rule) -> Rule:
    return tuple(Case(ENOSYS if case.action == ALLOW else case.action, case.tests) for case in rule)


def _dispatch(by_number: Mapping[int, Rule]) -> Program:
    """From the call's number in the accumulator to its rule, by halving."""
    return _search(_runs(sorted(by_number.items())))


def _runs(numbered: Iterable[tuple[int, Rule]]) -> list[tuple[int, Rule]]:
    """The numbers from which on another rule holds, gaps included."""
    runs: list[tuple[int, Rule]] = [(0, always(ENOSYS))]
    following = 0
    for number, rule in numbered:
        if number != following and runs[-1][1] != always(ENOSYS):
            runs.append((following, always(ENOSYS)))
        if runs[-1][1] != rule:
            runs.append((number, rule))
        following = number + 1
    return [*runs, (following, always(ENOSYS))]


def _search(runs: list[tuple[int, Rule]]) -> Program:
    if len(runs) == 1:
        return _answer(runs[0][1])
    middle = len(runs) // 2
    return _branch(runs[middle][0], _search(runs[:middle]), _search(runs[middle:]))


def _branch(number: int, below: Program, at_least: Program) -> Program:
    if len(below) <= LONGEST_CONDITIONAL_JUMP:
        return [(JUMP_AT_LEAST, len(below), 0, number), *below, *at_least]
    return [(JUMP_AT_LEAST, 0, 1, number), (JUMP, 0, 0, len(below)), *below, *at_least]


def _answer(rule: Rule) -> Program:
    return [instruction for case in rule for instruction in _case(case)]


def _case(case: Case) -> Program:
    """Returns the action, or falls through behind its end where a test does not hold."""
    program: Program = [(RETURN, 0, 0, case.action)]
    for test in reversed(case.tests):
        program = [*_load(test), (JUMP_EQUAL, 0, len(program), test.value), *program]
    return program


def _load(test: Test) -> Program:
    low_word = (LOAD, 0, 0, ARGS_OFFSET + 8 * test.argument)  # both architectures: little-endian
    return [low_word] if test.mask == INT else [low_word, (AND, 0, 0, test.mask)]
