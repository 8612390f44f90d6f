"""The process that starts boxes: one small interpreter per worker, asked over a socket.

Run as `python -I -S -B launcher.py FD GROUPS` (JSON: `cgroups.Groups.launcher`). It stands alone:
no import of the server, none of its environment, descriptors or memory. Each request is served by a
fork of it (which has one thread and holds nothing else): 1 ms where a fresh interpreter takes 10. A
box's parent is this process or init, never a worker, so no box notices that a worker came or went.

A request is one datagram: JSON, with a stream socket attached for the answer: `L` and a connection
to the agent once its socket listens, then whatever bubblewrap or the agent complain of; `D` where
something else was done; or `R` (the user's doing) or `E` (an errno) and a reason.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heyvm.backends import disks, netns
else:
    # Behind everything else: nothing of the standard library's is to be found here instead.
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import disks
    import netns

REQUEST_BYTES = 1 << 20
AT_FDCWD, AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW = -100, 0x1000, 0x100
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
BACKLOG = 4096  # or as many as net.core.somaxconn allows: what waits there, waits for the agent
PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP = 28, 0x4
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x4000, 0x40000
MNT_DETACH, UMOUNT_NOFOLLOW = 0x2, 0x8
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_OPENAT2, SYS_MOUNT_SETATTR = 428, 429, 437, 442
SYS_CLONE3, CLONE_INTO_CGROUP = 435, 0x200000000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, 0o2000000
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_IDMAP = 0x1, 0x2, 0x4, 0x100000
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 0x2, 0x4, 0x8
# bubblewrap covers /tmp with a tree of its own, so our parts stand under another path that every
# machine has. Only this box's private mount namespace sees it.
STAGE = "/run"
IDS = 65536
USUAL_FILES = 1024
TERMINALS = 256  # of a sandbox: those that are asked for from outside, and as many again
CALM_S = 0.03
# What bubblewrap mounts on, the agent's place, and where names and the resolver are looked up.
# CVE-2026-41579 and its kind: where one of them is a link, a mount lands elsewhere.
PLACES = ("proc", "dev", "tmp", "run", "etc", ".heyvm")

libc = ctypes.CDLL(None, use_errno=True)


Spec = dict[str, Any]


class Refused(Exception):
    """Something about the sandbox's own files or mounts: the text is for the user, and `field` is
    the one of the request that it is about."""

    def __init__(self, text: str, field: str = "mounts") -> None:
        super().__init__(text)
        self.field = field


def checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int, what: str) -> None:
    checked(libc.unshare(flags), f"unshare {what}")


def mount(
    source: str | None, target: str, kind: str | None, flags: int = 0, options: str | None = None
) -> None:
    words = (None if one is None else os.fsencode(one) for one in (source, target, kind, options))
    first, second, third, last = words
    call = libc.mount(first, second, third, ctypes.c_ulong(flags), last)
    checked(call, f"mount {kind or source} on {target}")


def own_mounts() -> None:
    """A mount namespace of our own: nothing that is mounted from here on outlives its processes."""
    unshare(CLONE_NEWNS, "mounts")
    mount(None, "/", None, MS_REC | MS_PRIVATE)


def clone(path: str) -> int:
    """A detached copy of the mount at `path` (open_tree(2)): nothing sees it until it is moved."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_SYMLINK_NOFOLLOW
    return checked(libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags), f"clone {path}")


def set_attributes(tree: int, attributes: int, user_namespace: int = 0) -> None:
    packed = struct.pack("QQQQ", attributes, 0, 0, user_namespace)
    call = libc.syscall(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, packed, len(packed))
    checked(call, "mount_setattr")


def attach(tree: int, target: str | int) -> None:
    """Move a detached mount onto `target`: a path, or a descriptor of the directory itself."""
    flags = MOVE_MOUNT_F_EMPTY_PATH
    if isinstance(target, int):
        flags |= MOVE_MOUNT_T_EMPTY_PATH
        where = (target, b"")
    else:
        where = (AT_FDCWD, os.fsencode(target))
    checked(libc.syscall(SYS_MOVE_MOUNT, tree, b"", *where, flags), f"attach to {target}")
    os.close(tree)


def open_beneath(directory: int, path: str) -> int:
    """Open a directory below `directory` without following any link, or raise OSError."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
    resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    how = struct.pack("QQQ", flags, 0, resolve)
    call = libc.syscall(SYS_OPENAT2, directory, os.fsencode(path), how, len(how))
    return checked(call, f"open {path}")


def make_directories(root: int, path: str) -> int:
    """Open `path` below `root`, making what is missing.

    The tree is the sandbox's to change, now too: no link is followed, and we have the rights of the
    sandbox's root and no others, so that nothing is gained by swapping things meanwhile.
    """
    here = os.dup(root)
    done = []
    for name in path.strip("/").split("/"):
        done.append(name)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=here)
            below = open_beneath(here, name)
        except OSError as error:
            raise Refused(
                f"mount point /{'/'.join(done)} in the sandbox: {error.strerror}"
            ) from None
        os.close(here)
        here = below
    return here


class UserNamespace:
    """A new user namespace with these maps: made by a child, while the caller does other things.

    `tools`: newuidmap and newgidmap, which write maps that an ordinary user may not. `owner`: whom
    the kernel takes for its maker, where that is to be another than the host's root. What there is
    so much of for each user (inotify, waiting signals) is counted for the maker as well, and one
    sandbox took all that the machine's root had.
    """

    def __init__(
        self, uid_map: str, gid_map: str, *, tools: list[str] | None = None, owner: int = 0
    ) -> None:
        self.maps = {"uid_map": uid_map, "gid_map": gid_map}
        self.tools = tools
        self.ready, ready = os.pipe()
        go, self.go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            # Only system calls: this is a fork that never execs.
            os.close(self.go)
            # With all capabilities kept: who has none may not everywhere make a user namespace.
            if owner and libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) == 0:
                os.seteuid(owner)
            os.write(ready, b"0" if libc.unshare(CLONE_NEWUSER) == 0 else b"1")
            os.read(go, 1)
            os._exit(0)
        os.close(ready)
        os.close(go)

    def open(self) -> int:
        """Its descriptor. The child is gone when this returns."""
        try:
            if os.read(self.ready, 1) != b"0":
                raise Refused("the kernel refused a user namespace")
            self._map()
            return os.open(f"/proc/{self.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(self.ready)
            os.close(self.go)
            os.waitpid(self.pid, 0)

    def _map(self) -> None:
        if self.tools is None:
            for name, text in self.maps.items():
                write_file(f"/proc/{self.pid}/{name}", text)
            return
        for tool, text in zip(self.tools, self.maps.values()):
            told = [tool, str(self.pid), *text.split()]
            _, status = os.waitpid(os.posix_spawn(tool, told, {}), 0)
            if status != 0:
                raise OSError(errno.EPERM, f"{tool} refused the ids of /etc/subuid or /etc/subgid")


def namespace_of_sub_ids(spec: Spec) -> UserNamespace:
    """0 is the user who runs this, 1 and up are that user's sub-ids."""
    ids = spec["sub_ids"]
    own = {"uid": os.getuid(), "gid": os.getgid()}
    maps = (f"0 {own[one]} 1 1 {ids[one][0]} {ids[one][1]}" for one in ("uid", "gid"))
    return UserNamespace(*maps, tools=ids["tools"])


class Spare:
    """A fork of us for the next box, already in v1 groups of its own, which it then renames: at a
    first move of a process the kernel waits for every CPU, 5 to 30 ms."""

    def __init__(self, parents: list[str], control: socket.socket) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_BYTES)
        self.pid = os.fork()
        if self.pid == 0:
            control.close()
            self.sock.close()
            wait_as_spare(theirs, parents)
        theirs.close()

    def give(self, data: bytes, say: int) -> None:
        """Raises OSError where somebody has killed it."""
        with self.sock:
            socket.send_fds(self.sock, [data], [say])

    def end(self) -> None:
        self.sock.close()
        with contextlib.suppress(ChildProcessError):  # nobody reaps: this only waits
            os.waitpid(self.pid, 0)


def wait_as_spare(sock: socket.socket, parents: list[str]) -> None:
    """Until there is a box to be made, or the launcher ends."""
    ours = [os.path.join(parent, f"spare-{os.getpid()}") for parent in parents]
    # A move holds up every other change of a cgroup: not while the box before is being made.
    select.select([sock], [], [], CALM_S)
    with contextlib.suppress(OSError):  # what is amiss is told to whoever asks for a box
        join_groups(ours)
    request = receive(sock)
    if request is None:
        leave_groups(ours)
        os._exit(0)
    sock.close()
    data, say = request
    serve(json.loads(data), say, ours)


def join_groups(paths: list[str]) -> None:
    for path in paths:
        make_group(path)
        write_file(os.path.join(path, "cgroup.procs"), "0")


def leave_groups(paths: list[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            write_file(os.path.join(os.path.dirname(path), "cgroup.procs"), "0")
            remove_group(path)


def remove_group(path: str) -> None:
    """A process that has just ended is in it a moment longer; whoever stays, keeps it."""
    for _ in range(25):
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)


def take_groups(wanted: Spec, ours: list[str]) -> None:
    """Make the groups that we are in the sandbox's."""
    set_parents(wanted["parents"])
    for path, _ in wanted["groups"]:
        (own,) = (one for one in ours if os.path.dirname(one) == os.path.dirname(path))
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)
        os.rename(own, path)
    set_limits(wanted["groups"])


def fork_into_group(wanted: Spec) -> int:
    """fork(2) whose child is born in a new v2 group (clone3(2))."""
    set_parents(wanted["parents"])
    ((path, _),) = wanted["groups"]
    make_group(path)
    set_limits(wanted["groups"])
    group = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        arguments = struct.pack("11Q", CLONE_INTO_CGROUP, *[0] * 3, signal.SIGCHLD, *[0] * 5, group)
        return checked(libc.syscall(SYS_CLONE3, arguments, len(arguments)), "clone3")
    finally:
        os.close(group)


def set_parents(parents: list[Any]) -> None:
    """What cannot be set there is missed by the sandbox's own group, or by nobody."""
    for path, files in parents:
        with contextlib.suppress(OSError):
            os.makedirs(path, exist_ok=True)
        for name, text in files:
            with contextlib.suppress(OSError):
                write_file(os.path.join(path, name), text)


def set_limits(groups: list[Any]) -> None:
    for path, files in groups:
        for name, text, must in files:
            with contextlib.nullcontext() if must else contextlib.suppress(OSError):
                write_file(os.path.join(path, name), text)


def make_group(path: str) -> None:
    """A fresh one: what an earlier one counted is not this box's."""
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)
    os.makedirs(path)


def write_file(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def make_sandbox_directory(spec: Spec) -> None:
    """Made under another name and renamed: there is a whole one or none."""
    new = spec["dir"] + ".new"
    # Not one that is there already: whose would it be?
    os.mkdir(new, 0o700)
    if spec["sub_ids"] is not None:
        with open(os.path.join(new, "ids"), "x") as file:
            json.dump(spec["sub_ids"], file)
    if spec["disk"] is not None:
        image = os.path.join(new, "disk.img")
        disks.make(image, spec["disk"]["bytes"], spec["disk"]["mkfs"], spec["id_base"])
    fill(spec, storage(new))
    os.rename(new, spec["dir"])


def storage(directory: str) -> str:
    """Where what the sandbox writes is kept: its directory, or its disk, which is mounted there for
    us and whom we start."""
    image, disk = os.path.join(directory, "disk.img"), os.path.join(directory, "disk")
    if not os.path.exists(image):
        return directory
    if not os.path.ismount(disk):
        with contextlib.suppress(FileExistsError):
            os.mkdir(disk, 0o700)
        device, path = disks.attach(image)
        mount(path, disk, "ext4", MS_NOSUID | MS_NODEV, disks.OPTIONS)
        os.close(device)
    return disk


def fill(spec: Spec, place: str) -> None:
    """The directories of a new sandbox, and the files that are its own from the beginning."""
    lower_root = spec["lowers"]["root"]
    missing = [name for name in PLACES if not os.path.lexists(os.path.join(lower_root, name))]
    owned = ["log", *spec["lowers"]]
    owned += [f"root/{name}" for name in dict.fromkeys((*missing, "etc", "workspace"))]
    for name in (*owned, *(f"{one}.work" for one in spec["lowers"])):
        os.mkdir(os.path.join(place, name))
    for name, path in (("root", lower_root), ("root/etc", f"{lower_root}/etc")):
        with contextlib.suppress(FileNotFoundError):
            os.chmod(os.path.join(place, name), stat.S_IMODE(os.lstat(path).st_mode) & 0o1777)
    if "tmp" in missing:
        os.chmod(os.path.join(place, "root/tmp"), 0o1777)
    for name, text in spec["files"].items():
        with open(os.path.join(place, "root", name), "x") as file:
            file.write(text)
        owned.append(f"root/{name}")
    if spec["id_base"] is not None:
        for name in owned:
            os.chown(os.path.join(place, name), spec["id_base"], spec["id_base"])


def lower(path: str, namespace: int) -> int:
    """A read-only copy of `path` whose owners are the sandbox's, where kernel and file system can
    map ids; else as it is (its files then belong to nobody inside, and cannot be changed)."""
    tree = clone(path)
    demand_directories(tree, "of its image")
    attributes = ATTR_NOSUID | ATTR_NODEV | ATTR_RDONLY
    try:
        set_attributes(tree, attributes | ATTR_IDMAP, namespace)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        set_attributes(tree, attributes)
    return tree


def demand_directories(tree: int, whose: str) -> None:
    """What is mounted on is a directory, or missing; never a link, which leads anywhere."""
    for name in PLACES:
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=tree, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                raise Refused(f"/{name} {whose} is not a directory: it cannot be run", "image")


def stage(*names: str) -> None:
    mount("stage", STAGE, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for name in (*names, "pts"):
        os.mkdir(f"{STAGE}/{name}")
    os.close(os.open(f"{STAGE}/empty", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444))


def overlay(name: str, lower_path: str, extra: str = "") -> None:
    # Relative to the sandbox's directory: any character may stand in its path, and none of it shows
    # in /proc/self/mountinfo inside.
    options = f"lowerdir={lower_path},upperdir={name},workdir={name}.work{extra}"
    mount("overlay", f"{STAGE}/{name}", "overlay", MS_NOSUID | MS_NODEV, options)


def demand_same(entry: Spec, tree: int) -> None:
    """The directory that was checked, and no other that was put in its place since."""
    found = os.fstat(tree)
    if [found.st_dev, found.st_ino] != entry["inode"] or not stat.S_ISDIR(found.st_mode):
        raise Refused(f"{entry['path']} is no longer the directory that was checked")


def host_mount(entry: Spec, base: int) -> int:
    """A detached clone of a host directory, its owner mapped to root inside."""
    tree = clone(entry["path"])
    demand_same(entry, tree)
    attributes = ATTR_NOSUID | ATTR_NODEV | (ATTR_RDONLY if entry["read_only"] else 0)
    if entry["uid"] is None:
        set_attributes(tree, attributes)
        return tree
    maps = (f"{entry[owner]} {base} 1" for owner in ("uid", "gid"))
    namespace = UserNamespace(*maps).open()
    try:
        set_attributes(tree, attributes | ATTR_IDMAP, namespace)
    except OSError as error:
        raise Refused(
            f"{entry['path']} lies on a file system that cannot map ids ({error.strerror})"
        ) from None
    finally:
        os.close(namespace)
    return tree


def assemble_as_root(spec: Spec, namespace: int) -> list[int]:
    """Put the box's file system together below STAGE, in our own mount namespace."""
    os.chdir(storage(spec["dir"]))
    trees = {f"{name}-lower": lower(path, namespace) for name, path in spec["lowers"].items()}
    bundle, log = clone(spec["bundle"]), clone("log")
    set_attributes(bundle, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    set_attributes(log, ATTR_NOSUID | ATTR_NODEV)
    mounts = [host_mount(entry, spec["id_base"]) for entry in spec["mounts"]]
    stage(*spec["lowers"], *trees)
    for name, tree in trees.items():
        attach(tree, f"{STAGE}/{name}")
    for name in spec["lowers"]:
        # The same whatever the kernel's own defaults are: an image's attributes lead nowhere.
        overlay(name, f"{STAGE}/{name}-lower", ",redirect_dir=nofollow,metacopy=off")
    attach_agent(bundle, log)
    return mounts


def attach_agent(bundle: int, log: int) -> None:
    root = os.open(f"{STAGE}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    demand_directories(root, "in the sandbox")
    attach(bundle, open_beneath(root, ".heyvm"))
    attach(log, open_beneath(root, ".heyvm/log"))
    os.close(root)


def own_terminals() -> None:
    """So many at most: the kernel has 3072 for all sandboxes together (kernel.pty), which the first
    of them could take otherwise."""
    options = f"newinstance,ptmxmode=0666,mode=620,max={TERMINALS}"
    mount("devpts", f"{STAGE}/pts", "devpts", MS_NOSUID | MS_NOEXEC, options)


def attach_mounts(entries: list[Spec], trees: list[int], path: str) -> None:
    root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for entry, tree in zip(entries, trees):
        attach(tree, make_directories(root, entry["target"]))
    os.close(root)


def assemble_as_user(spec: Spec, own: UserNamespace | None) -> list[int]:
    """The same without the host's root: plain bind mounts, an overlay of our own."""
    if own is None:
        single_id_namespaces()
    else:
        enter(own)
        unshare(CLONE_NEWNS, "mounts")
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    os.chdir(spec["dir"])
    below = {name: directory_below(path) for name, path in spec["lowers"].items()}
    bundle, log = tree_of_user(spec["bundle"], True), tree_of_user("log", False)
    mounts = [mount_of_user(entry) for entry in spec["mounts"]]
    stage(*spec["lowers"])
    for name in spec["lowers"]:
        # By descriptor: in a path a comma or a colon would end it, and it would show inside.
        overlay(name, f"/proc/self/fd/{below[name]}", ",userxattr")
    attach_agent(bundle, log)
    return mounts


def directory_below(path: str) -> int:
    below = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    demand_directories(below, "of its image")
    return below


def single_id_namespaces() -> None:
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER | CLONE_NEWNS, "user and mounts")
    write_file("/proc/self/setgroups", "deny")
    write_file("/proc/self/uid_map", f"0 {uid} 1")
    write_file("/proc/self/gid_map", f"0 {gid} 1")


def enter(own: UserNamespace) -> None:
    """Become root in a user namespace."""
    namespace = own.open()
    checked(libc.setns(namespace, CLONE_NEWUSER), "setns user")
    os.close(namespace)
    become_root_inside()


def mount_of_user(entry: Spec) -> int:
    tree = tree_of_user(entry["path"], entry["read_only"])
    demand_same(entry, tree)
    return tree


def tree_of_user(path: str, read_only: bool) -> int:
    # Recursive: what is mounted below was locked to it when this user namespace was made.
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | 0x8000
    call = libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags)
    tree = checked(call, f"clone {path}")
    set_attributes(tree, ATTR_NOSUID | ATTR_NODEV | (ATTR_RDONLY if read_only else 0))
    return tree


def become_root_inside() -> None:
    """In a user namespace that we have just joined, with ids that it does not map yet."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def write_resolver(text: str | None) -> None:
    """Make /etc/resolv.conf a plain file with this in it, whatever the sandbox or its image has put
    there: with the rights of the sandbox's own root, and following nothing."""
    if text is None:
        return
    try:
        root = os.open(f"{STAGE}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        etc = open_beneath(root, "etc")
        os.close(root)
        if not holds(etc, "resolv.conf", text):
            replace(etc, "resolv.conf", text)
        os.close(etc)
    except OSError as error:
        # A full disk is the sandbox's own, and starting it is how it is mended.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise Refused(f"/etc/resolv.conf in the sandbox: {error.strerror}", "image") from None


def holds(directory: int, name: str, text: str) -> bool:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=directory)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return False
        return os.read(descriptor, len(text.encode()) + 1) == text.encode()
    finally:
        os.close(descriptor)


def replace(directory: int, name: str, text: str) -> None:
    mark = os.urandom(8).hex()
    new = f".{name}.{mark}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(new, flags, 0o644, dir_fd=directory), "w") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text)
    try:
        os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
    except IsADirectoryError:
        os.rename(name, f"{new}.old", src_dir_fd=directory, dst_dir_fd=directory)
        os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)


def listen(directory: int, name: str) -> tuple[socket.socket, socket.socket]:
    """The agent's socket, made in the sandbox's network namespace: its ioctls tell nothing of the
    host's interfaces. Renamed into place, since a left-over file would be EADDRINUSE.

    With it a first connection, for the worker: should that die, at whatever moment, the agent finds
    this one ended, and ends.
    """
    os.fchdir(directory)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.unlink(name + ".new")
    except FileNotFoundError:
        pass
    old = os.umask(0o177)
    sock.bind(name + ".new")
    os.umask(old)
    sock.listen(1024)
    os.rename(name + ".new", name)
    first = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Whoever reads from it learns from the kernel who wrote.
    first.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    first.connect(name)
    os.chdir("/")
    os.set_inheritable(sock.fileno(), True)
    return sock, first


def join_cgroups(leaves: list[list[str]]) -> None:
    """Leave the server's groups: systemd stops a unit by its group, whatever sessions it made.

    Once, here: what is forked inherits it. Limits are those of each sandbox's own group.
    """
    for path, _ in leaves:
        try:
            os.makedirs(path, exist_ok=True)
            write_file(os.path.join(path, "cgroup.procs"), "0")
        except OSError as error:
            sys.stderr.write(f"heyvm: sandboxes stay in the server's cgroup: {path}: {error}\n")


def leave_cgroups(leaves: list[list[str]], parents: list[str]) -> None:
    """Back to where no group is ours, and away with ours unless a sandbox is still in it."""
    for path, home in leaves:
        with contextlib.suppress(OSError):
            write_file(os.path.join(home, "cgroup.procs"), "0")
            remove_group(path)
    for path in {*parents, *(os.path.dirname(leaf) for leaf, _ in leaves)}:
        with contextlib.suppress(OSError):
            os.rmdir(path)


def bubblewrap_arguments(spec: Spec, seccomp: int, status: int, agent_fd: int) -> list[str]:
    arguments = [
        # What `ps` shows; the keeper finds a crashed server's boxes by it.
        spec["title"],
        *("--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try"),
        *("--bind", f"{STAGE}/root", "/"),
        *(("--bind", f"{STAGE}/usr", "/usr") if "usr" in spec["lowers"] else ()),
        *("--proc", "/proc", "--dev", "/dev", "--dev-bind", f"{STAGE}/pts", "/dev/pts"),
        *memory_mounts(spec["memory"]),
        *("--hostname", spec["hostname"], "--chdir", "/", "--clearenv", "--as-pid-1"),
        *("--seccomp", str(seccomp), "--json-status-fd", str(status), "--cap-drop", "ALL"),
    ]
    for path in spec["masked"]:
        arguments += ["--ro-bind", "/dev/null", path]
    if spec["id_base"] is None:
        # Where pid 1 has its neighbours' id, or its root has ours, these are theirs to write.
        scores = ("oom_score_adj", "oom_adj", "task/1/oom_score_adj", "task/1/oom_adj")
        for path in (*scores, "autogroup"):
            if os.path.exists(f"/proc/self/{path.removeprefix('task/1/')}"):
                arguments += ["--ro-bind", f"{STAGE}/empty", f"/proc/1/{path}"]
    for name in spec["capabilities"]:
        arguments += ["--cap-add", name]
    agent = [str(agent_fd) if word == "LISTEN_FD" else word for word in spec["agent"]]
    return [*arguments, "--", *agent]


def memory_mounts(memory: int | None) -> list[str]:
    """What lies in memory. With a limit, all of it together leaves room for processes: it is not
    given back when they are killed, and the agent would be the last that there is to kill."""
    arguments = []
    for path, mode, share in (("/dev/shm", "1777", 4), ("/tmp", "1777", 2), ("/run", "0755", 16)):
        if memory is not None:
            arguments += ["--size", str(memory // share)]
        arguments += ["--perms", mode, "--tmpfs", path]
    return arguments


def memory_file(content: bytes) -> int:
    descriptor = os.memfd_create("seccomp")
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def start_box(spec: Spec, say: int) -> None:
    base = spec["id_base"]
    network = netns.Network(spec["network"])
    own = None
    if base is not None:
        own = UserNamespace(f"0 {base} {IDS}", f"0 {base} {IDS}", owner=base)
        own_mounts()
    elif spec["sub_ids"] is not None:
        own = namespace_of_sub_ids(spec)
    if not os.path.lexists(spec["dir"]):
        make_sandbox_directory(spec)
    found = os.lstat(spec["dir"])
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise OSError(errno.ENOTDIR, f"{spec['dir']} is not a directory of this server's")
    with open(spec["seccomp"], "rb") as file:
        seccomp = memory_file(file.read())
    sockets = os.open(spec["socket_dir"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    status_flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    status = os.open(os.path.join(spec["dir"], "status"), status_flags, 0o600)
    if base is None or own is None:
        mounts = assemble_as_user(spec, own)
        network.make()
    else:
        namespace = own.open()
        mounts = assemble_as_root(spec, namespace)
        # Before the sandbox's user namespace: it belongs to the host's, and nobody inside can
        # have any capability over it.
        network.make()
        checked(libc.setns(namespace, CLONE_NEWUSER), "setns user")
        os.close(namespace)
    agent, first = listen(sockets, spec["socket_name"])
    os.close(sockets)
    if base is not None:
        become_root_inside()
    write_resolver(spec["resolv_conf"])
    if mounts or base is not None:
        # Mounts of the sandbox's own user namespace: only there it may mount, and what comes from
        # the host's is locked there, and could not be taken out again while it runs.
        unshare(CLONE_NEWNS, "mounts")
    own_terminals()
    if mounts:
        attach_mounts(spec["mounts"], mounts, f"{STAGE}/root")
    for descriptor in (seccomp, status):
        os.set_inheritable(descriptor, True)
    arguments = bubblewrap_arguments(spec, seccomp, status, agent.fileno())
    socket.send_fds(socket.socket(fileno=say), [b"L"], [first.fileno()])
    settle_process(say, {seccomp, status, agent.fileno()})
    limit_resources(spec["rlimits"])
    os.execve(spec["bwrap"], arguments, {})


def settle_process(say: int, keep: set[int]) -> None:
    """Our stderr is the answer's socket; nothing else but `keep` goes on to bubblewrap."""
    null = os.open("/dev/null", os.O_RDWR)
    for number, source in ((0, null), (1, null), (2, say)):
        os.dup2(source, number)
    low = 3
    for descriptor in sorted(keep):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, 4096)
    os.umask(0o022)
    # A core of at most 1 byte is no core, and is never piped to a handler on the host (core(5)).
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def limit_resources(wanted: Spec) -> None:
    """What is inherited by everything in the box, and raised by nobody there."""
    for name, value in wanted.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (least, least))


def enter_user_namespace(spec: Spec) -> int:
    """Become the sandbox's root. A descriptor of its mounts, which can then be joined."""
    mounts = os.open(f"/proc/{spec['pid']}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    namespace = os.open(f"/proc/{spec['pid']}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    checked(libc.setns(namespace, CLONE_NEWUSER), "setns user")
    if spec["id_base"] is not None:
        become_root_inside()
    return mounts


def add_mount(spec: Spec, say: int) -> None:
    """Show one more host directory in a running sandbox."""
    (entry,) = spec["mounts"]
    if spec["id_base"] is None:
        inside = enter_user_namespace(spec)
        unshare(CLONE_NEWNS, "mounts")
        tree = mount_of_user(entry)
    else:
        tree = host_mount(entry, spec["id_base"])
        inside = enter_user_namespace(spec)
    checked(libc.setns(inside, CLONE_NEWNS), "setns mnt")
    attach_mounts([entry], [tree], "/")


def renew_network(spec: Spec, say: int) -> None:
    """An ordinary user's sandbox has lost its pasta, or the host has another address."""
    netns.renew(spec["network"], spec["pid"])


def remove_mount(spec: Spec, say: int) -> None:
    """Take a mount out of a running sandbox; who stands in it keeps it until they leave."""
    inside = enter_user_namespace(spec)
    checked(libc.setns(inside, CLONE_NEWNS), "setns mnt")
    above, name = os.path.split(spec["target"].strip("/"))
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Its /proc knows nothing of us, so stand beside it: in it we may have no right to.
        os.fchdir(open_beneath(root, above) if above else root)
        gone = libc.umount2(os.fsencode(name), MNT_DETACH | UMOUNT_NOFOLLOW)
        checked(gone, f"unmount {spec['target']}")
    except OSError as error:
        # Nothing is mounted there, or nothing is there: a removal cut short is being repeated.
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def open_log(spec: Spec, say: int) -> None:
    """Hand over a descriptor of a sandbox's log directory, which keeps its disk for as long as it
    is open."""
    own_mounts()
    place = os.open(storage(spec["dir"]), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    log = open_beneath(place, "log")
    socket.send_fds(socket.socket(fileno=os.dup(say)), [b"L"], [log])


def open_listener(spec: Spec, say: int) -> None:
    """Make a listening unix socket, for an agent to have. Nobody can connect to it before its owner
    and mode are right. Its ioctls tell of an empty network namespace."""
    os.chdir(spec["dir"])
    name, gid = spec["name"], spec["gid"]
    sock = socket_of_nowhere()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    # The owner's x bit, which a socket has no use for, is what nginx can see of one: it tests for
    # files by -x alone whatever their type (deploy/nginx/heyvm.conf).
    os.umask(0o077)
    sock.bind(name)
    try:
        if gid is not None:
            os.chown(name, -1, gid, follow_symlinks=False)
            os.chmod(name, 0o760)
        sock.listen(BACKLOG)
        socket.send_fds(socket.socket(fileno=os.dup(say)), [b"L"], [sock.fileno()])
    except BaseException:
        os.unlink(name)
        raise


def socket_of_nowhere() -> socket.socket:
    if os.geteuid() == 0:
        unshare(CLONE_NEWNET, "network")
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A child makes it: in the user namespace that this takes, a group could not be given to a file.
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        number = 0
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) < 0:
            number = ctypes.get_errno()
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        socket.send_fds(theirs, [bytes([number])], [made.fileno()])
        os._exit(0)
    theirs.close()
    said, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(pid, 0)
    ours.close()
    if said != b"\0":
        number = said[0] if said else errno.EPERM
        raise OSError(number, f"unshare network: {os.strerror(number)}")
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptors[0])


def try_groups(spec: Spec, say: int) -> None:
    """Nothing is left to be done: we are in them."""


def try_sub_ids(spec: Spec, say: int) -> None:
    enter(namespace_of_sub_ids(spec))


def try_id_maps(spec: Spec, say: int) -> None:
    """Whether the file system of a directory can be shown with other owners."""
    namespace = UserNamespace(f"0 {IDS} 1", f"0 {IDS} 1").open()
    set_attributes(clone(spec["dir"]), ATTR_IDMAP, namespace)


def remove_tree(spec: Spec, say: int) -> None:
    """Remove what belongs to sub-ids, as those who may: it says the rest itself."""
    enter(namespace_of_sub_ids(spec))
    settle_process(say, set())
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-B", *spec["remove"]], {})


ACTIONS = {
    "box": start_box,
    "add_mount": add_mount,
    "remove_mount": remove_mount,
    "log": open_log,
    "listen": open_listener,
    "try_groups": try_groups,
    "try_sub_ids": try_sub_ids,
    "try_id_maps": try_id_maps,
    "remove": remove_tree,
    "renew_network": renew_network,
}


def serve(spec: Spec, say: int, ours: list[str] = []) -> None:  # noqa: B006 - is only read
    """In the child: do what is asked, tell the outcome, never return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.setsid()
    code = 1
    try:
        if ours:
            take_groups(spec["cgroups"], ours)
        ACTIONS[spec["action"]](spec, say)
        os.write(say, b"D")
        code = 0
    except Refused as error:
        os.write(say, f"R{error.field} {error}".encode())
    except OSError as error:
        number = error.errno or 0
        os.write(say, b"E%d " % number + str(error.strerror or error).encode())
    except BaseException as error:  # noqa: BLE001 - a child that fails must say so, then end
        os.write(say, b"E0 " + repr(error).encode())
    os._exit(code)


def receive(sock: socket.socket) -> tuple[bytes, int] | None:
    """The next request and where to answer, or None when the worker is gone."""
    size = array.array("i").itemsize
    while True:
        try:
            data, ancillary, _, _ = sock.recvmsg(REQUEST_BYTES, socket.CMSG_SPACE(size))
        except ConnectionResetError:
            return None
        if not data:
            return None
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                return data, array.array("i", payload[:size])[0]


class Forks:
    """How a process for a request comes to be."""

    def __init__(self, control: socket.socket, parents: list[str]) -> None:
        self.control, self.parents = control, parents
        self.spare: Spare | None = Spare(parents, control) if parents else None

    def serve(self, data: bytes, say: int) -> None:
        """Have it done, and close `say`."""
        spec = json.loads(data)
        try:
            if "cgroups" in spec and self.parents:
                self.hand_on(data, say)
            elif "cgroups" in spec and spec["cgroups"]["groups"]:
                self.fork(fork_into_group(spec["cgroups"]), spec, say)
            else:
                self.fork(os.fork(), spec, say)
        except OSError as error:
            os.write(say, b"E0 its cgroup: " + repr(error).encode())
        finally:
            # Before there is another spare, which would hold it: that the box was killed is told by
            # its end alone.
            os.close(say)
        if self.parents and self.spare is None:
            self.spare = Spare(self.parents, self.control)

    def fork(self, pid: int, spec: Spec, say: int) -> None:
        if pid == 0:
            self.control.close()
            serve(spec, say)

    def hand_on(self, data: bytes, say: int) -> None:
        spare, self.spare = self.spare, None
        try:
            if spare is None:
                raise BrokenPipeError
            spare.give(data, say)
        except OSError:  # somebody has killed it
            Spare(self.parents, self.control).give(data, say)


def main() -> None:
    control = int(sys.argv[1])
    os.closerange(3, control)
    os.closerange(control + 1, 4096)
    os.chdir("/")
    os.umask(0o022)
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children need no reaping
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a spare that was killed is an error to us
    # The server's own may be raised for its clients; a command would close that many at its start.
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(files, USUAL_FILES), most))
    groups = json.loads(sys.argv[2])
    join_cgroups(groups["leaves"])
    sock = socket.socket(fileno=control)
    sock.setblocking(True)  # gevent has made the pair otherwise
    forks = Forks(sock, groups["spares"])
    while (request := receive(sock)) is not None:
        data, say = request
        forks.serve(data, say)
    if forks.spare is not None:
        forks.spare.end()
    leave_cgroups(groups["leaves"], groups["spares"])


main()
