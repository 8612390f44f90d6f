"""The bubblewrap backend: namespaces, overlays and an agent, started by `launcher.py`.

Owns what a sandbox is on this machine: its directory, its processes, its socket. A sandbox of a
root server has 65,536 ids of its own; an ordinary user's has that user's sub-ids, or the one id.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heyvm import guest
from heyvm.backends import bundle, cgroups, disks, hostdirs, hostfiles, pids, ranges, seccomp, trees
from heyvm.backends import network as networking
from heyvm.backends.base import Backend, Offer, Reading, State
from heyvm.errors import BackendFailed, HeyvmError, Invalid, StorageFull, Unavailable
from heyvm.models import CreateSpec, Limits, Mount, Network, Sandbox
from heyvm.settings import Settings

LAUNCHER = Path(__file__).with_name("launcher.py")
START_TIMEOUT_S = 20.0
KILL_TIMEOUT_S = 4.0
LISTENER_TIMEOUT_S = 10.0
REMOVE_TIMEOUT_S = 600.0
OLDEST_BWRAP = (0, 8, 0)  # the first with --perms on tmpfs and --cap-add for a namespace's root
MKFS = "/usr/sbin:/sbin:/usr/bin:/bin"  # where mkfs.ext4 is; not always in a user's PATH
DISK_GONE_S = 2.0
GIB = 1 << 30
TRIED = Limits(cpus=1, memory=GIB, pids=100)
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
SPARE_UID = 65533  # the agent's real uid where it has a range: prlimit(1) then needs a capability
# Docker's list (moby, oci/caps/defaults.go) without NET_RAW and MKNOD; what each is for:
# docs/isolation.md. Given where there is more than one id.
CAPABILITIES = tuple(
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
        *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
    )
)
# What tells of the host or its keys, and is a plain file; where the kernel has it.
MASKED = ("kcore", "keys", "key-users", "timer_list", "sched_debug", "latency_stats")
ID = re.compile(r"sb-[0-9a-f]{8}")
FULL = {28, 122}  # ENOSPC, EDQUOT


@dataclass(frozen=True)
class Parts:
    """What every box of this server is made from; built once for each process that asks."""

    bundle: bundle.Bundle
    template: str
    masked: tuple[str, ...]


class Bubblewrap(Backend):
    """One for each data directory. Holds nothing that matters: a launcher, and paths."""

    name = "bubblewrap"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.root = os.geteuid() == 0
        self.mark = settings.mark
        self.sandboxes = settings.data_dir / "sandboxes"
        self.trash = settings.data_dir / "trash"
        self.groups = cgroups.Groups(self.mark)
        self.launcher = Launcher(self.groups)
        self.networks = networking.Networks(settings)
        self.policy = hostdirs.Policy(
            settings.mount_roots, (settings.data_dir, settings.run_dir), settings.mount_system_ids
        )
        self._parts: Parts | None = None
        self._working_ids: tuple[ranges.SubIds | None, bool] | None = None
        self._maps_ids: bool | None = None
        self._lock = threading.Lock()

    # --- what is needed -------------------------------------------------------------------------

    def check(self) -> None:
        path = self._bwrap()
        found = os.stat(path)
        if found.st_mode & 0o6000:
            raise Unavailable(
                f"{path} is set-uid (CVE-2020-5291): remove the bit with `chmod u-s {path}`"
            )
        version = bwrap_version(path, (found.st_mtime_ns, found.st_size))
        if version < OLDEST_BWRAP:
            have, want = (".".join(map(str, one)) for one in (version, OLDEST_BWRAP))
            raise Unavailable(f"{path} is version {have}: {want} or later is needed")

    def warm(self) -> None:
        """Do now what the first start would wait for."""
        self.parts()
        self.launcher.warm()
        self.networks.warm()
        single_id = self._offer_ids() == "single"
        for set_id in {False, not single_id}:
            self._filter(single_id=single_id, set_id=set_id)
        self._offer_owners()

    def parts(self) -> Parts:
        with self._lock:
            if self._parts is None:
                self._parts = self._make_parts()
            return self._parts

    def _make_parts(self) -> Parts:
        data = self.settings.data_dir
        for directory in (self.sandboxes, self.trash):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("agents", "visits"):
            (self.settings.run_dir / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        return Parts(
            bundle=bundle.ensure(data / "bundle"),
            template=str(hostfiles.ensure(data / "host")),
            masked=tuple(f"/proc/{one}" for one in MASKED if os.path.isfile(f"/proc/{one}")),
        )

    def _filter(self, *, single_id: bool, set_id: bool) -> str:
        """The file that holds this system call filter."""
        program = seccomp.build(single_id=single_id, set_id=set_id)
        digest = hashlib.sha256(program).hexdigest()[:16]
        path = self.settings.data_dir / f"seccomp-{digest}.bpf"
        if not path.exists():
            new = path.with_suffix(f".{secrets.token_hex(4)}")
            new.write_bytes(program)
            new.rename(path)
        return str(path)

    def _bwrap(self) -> str:
        path = shutil.which("bwrap", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/local/bin")
        if path is None:
            raise Unavailable(
                "bwrap is not installed; on Debian and Ubuntu: apt install bubblewrap"
            )
        return path

    def allocate(self, taken: frozenset[int]) -> int | None:
        return ranges.free(self.mark, taken) if self.root else None

    # --- what can be had ------------------------------------------------------------------------

    def check_spec(self, spec: CreateSpec) -> Offer:
        network, about_network = self._offer_network(spec)
        return Offer(
            network=network,
            ids=self._offer_ids(),
            warnings=(
                *about_network,
                *self._offer_limits(spec),
                *self._offer_disk(spec),
                *self._offer_owners(),
            ),
        )

    def _offer_network(self, spec: CreateSpec) -> tuple[Network, tuple[str, ...]]:
        wanted = spec.network or Network()
        if wanted.mode == "none":
            return wanted, ()
        if (problem := self.networks.problem()) is None:
            return wanted, self.networks.lacks()
        if spec.network is not None:
            text = f"no sandbox can have a network here: {problem}"
            raise Invalid(text, errors={"network": [text]})
        return Network("none"), (f"it has no network: {problem}",)

    def _offer_limits(self, spec: CreateSpec) -> tuple[str, ...]:
        self.launcher.warm()  # it tries them
        return self.groups.offer(Limits(spec.cpus, spec.memory, spec.pids))

    def _offer_ids(self) -> str:
        if self.root:
            return "range"
        return "single" if self._sub_ids() is None else "sub-ids"

    def _sub_ids(self) -> ranges.SubIds | None:
        """This user's sub-ids, where they can be used: tried once for each that are found."""
        found = ranges.sub_ids(os.geteuid())
        if found is None or id_tools() is None:
            return None
        if self._working_ids is None or self._working_ids[0] != found:
            with self.launcher.ask({"action": "try_sub_ids", "sub_ids": with_tools(found)}) as said:
                self._working_ids = (found, said.is_done(START_TIMEOUT_S))
        return found if self._working_ids[1] else None

    def _offer_owners(self) -> tuple[str, ...]:
        """A warning where files cannot be given to the sandbox's own ids (an ordinary user's are
        that user's, whom root inside stands for)."""
        data = self.settings.data_dir
        if self.root and self._maps_ids is None:
            with self.launcher.ask({"action": "try_id_maps", "dir": str(data)}) as words:
                self._maps_ids = words.is_done(START_TIMEOUT_S)
        if self._maps_ids is not False:
            return ()
        return (
            f"the file system of {data} cannot map ids: the files of an image belong to nobody"
            " inside, and cannot be changed",
        )

    def _offer_disk(self, spec: CreateSpec) -> tuple[str, ...]:
        if spec.disk_size_gb is None:
            return ()
        why = self._why_no_disk()
        if why is not None:
            text = f"disk_size_gb cannot be kept to by this server: {why}"
            raise Invalid(text, errors={"disk_size_gb": [text]})
        free = shutil.disk_usage(self.settings.data_dir).free
        if free < spec.disk_size_gb * GIB:
            return (f"disk_size_gb is more than the {free / GIB:.1f} GiB that the disk has free",)
        return ()

    def _why_no_disk(self) -> str | None:
        if not self.root:
            return "it is run by an ordinary user"
        if not os.access("/dev/loop-control", os.R_OK | os.W_OK):
            return "the machine has no loop devices (/dev/loop-control)"
        if shutil.which("mkfs.ext4", path=MKFS) is None:
            return "mkfs.ext4 is not installed; on Debian and Ubuntu: apt install e2fsprogs"
        return None

    # --- starting -------------------------------------------------------------------------------

    def start(
        self, sandbox: Sandbox, record: Callable[[State], None], *, visit: bool = False
    ) -> socket.socket:
        if self.root != (sandbox.id_base is not None):
            raise BackendFailed(
                f"sandbox {sandbox.slug!r} was made by a server run "
                f"{'as an ordinary user' if self.root else 'as root'}: start it with that one"
            )
        self._clear_half_made(sandbox)
        spec = self._specification(sandbox, visit)
        with self.launcher.ask(spec) as words:
            try:
                (first,) = words.expect(b"L", START_TIMEOUT_S)
                return self._meet(sandbox, spec, socket.socket(fileno=first), record, words)
            except BaseException:
                self._kill_untold(sandbox, spec)
                raise

    def _clear_half_made(self, sandbox: Sandbox) -> None:
        """What a launcher that was killed had begun: nobody else makes anything here."""
        half = self.sandboxes / f"{sandbox.id}.new"
        if os.path.lexists(half):
            self._remove_tree(half)

    def _specification(self, sandbox: Sandbox, visit: bool) -> dict[str, Any]:
        parts = self.parts()
        self.launcher.warm()
        sockets = self.settings.run_dir / ("visits" if visit else "agents")
        sub_ids = self._sub_ids_of(sandbox)
        single_id = not self.root and sub_ids is None
        set_id = not single_id and all(mount.read_only for mount in sandbox.mounts)
        return {
            "action": "box",
            "title": self._title(sandbox.id),
            "cgroups": self.groups.specification(sandbox.id, sandbox.limits),
            "rlimits": self.groups.rlimits(sandbox.limits),
            "memory": sandbox.limits.memory,
            "bwrap": self._bwrap(),
            "dir": str(self.sandboxes / sandbox.id),
            "id_base": sandbox.id_base,
            "sub_ids": None if sub_ids is None else with_tools(sub_ids),
            "lowers": self._lowers(sandbox),
            "disk": self._disk(sandbox),
            "bundle": str(parts.bundle.path),
            "agent": [*parts.bundle.argv, "LISTEN_FD", "/.heyvm/log", spare_uid(sandbox, sub_ids)],
            "set_id": set_id,
            "seccomp": self._filter(single_id=single_id, set_id=set_id),
            "masked": parts.masked,
            "capabilities": () if single_id else CAPABILITIES,
            "socket_dir": str(sockets),
            "socket_name": f"{sandbox.id}.sock",
            "hostname": sandbox.slug,
            "files": own_files(sandbox.slug),
            "network": self.networks.specification(sandbox, visit),
            "resolv_conf": self.networks.resolv_conf(sandbox.network),
            "mounts": [self._mount(mount) for mount in by_depth(sandbox.mounts)],
        }

    def _lowers(self, sandbox: Sandbox) -> dict[str, str]:
        """What lies below each overlay of a box."""
        if sandbox.image_resolved == "host":
            return {"root": self.parts().template, "usr": "/usr"}
        found = DIGEST.fullmatch(sandbox.image_resolved)
        if found is None:
            raise BackendFailed(f"sandbox {sandbox.slug!r} has no image: delete it")
        root = self.settings.data_dir / "images" / found[1] / "rootfs"
        if not root.is_dir():
            raise BackendFailed(
                f"the image of sandbox {sandbox.slug!r} is gone ({sandbox.image_resolved})"
            )
        return {"root": str(root)}

    def _disk(self, sandbox: Sandbox) -> dict[str, Any] | None:
        size = sandbox.limits.disk_size_gb
        mkfs = shutil.which("mkfs.ext4", path=MKFS)
        return None if size is None else {"bytes": size * GIB, "mkfs": mkfs or "mkfs.ext4"}

    def _sub_ids_of(self, sandbox: Sandbox) -> ranges.SubIds | None:
        """Its sub-ids, which must still be those that its files were made with."""
        if self.root or sandbox.ids != "sub-ids":
            return None
        now, then = self._sub_ids(), self._ids_of_files(sandbox.id)
        if now is None or (then is not None and not now.hold(then)):
            raise BackendFailed(
                f"sandbox {sandbox.slug!r} was made with sub-ids that /etc/subuid and /etc/subgid"
                " no longer give to this user (or newuidmap is gone): give them back, or delete it"
            )
        return now

    def _ids_of_files(self, sandbox_id: str) -> ranges.SubIds | None:
        try:
            found = json.loads((self.sandboxes / sandbox_id / "ids").read_text())
        except FileNotFoundError:
            return None
        return ranges.SubIds(tuple(found["uid"]), tuple(found["gid"]))

    def _mount(self, mount: Mount) -> dict[str, Any]:
        found = hostdirs.check(mount, self.policy)
        return {
            "path": found.path,
            "inode": found.inode,
            "target": mount.sandbox_path,
            "read_only": mount.read_only,
            "uid": found.uid,
            "gid": found.gid,
        }

    def _meet(
        self,
        sandbox: Sandbox,
        spec: dict[str, Any],
        first: socket.socket,
        record: Callable[[State], None],
        words: Words,
    ) -> socket.socket:
        """Hear the hello, learn from the kernel who said it, have it written down."""
        try:
            first.settimeout(START_TIMEOUT_S)
            agent = sender(first)
            guest.greet(first, START_TIMEOUT_S)
            first.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
            path = os.path.join(spec["socket_dir"], spec["socket_name"])
            note = {"set_id": spec["set_id"], "oom_kills": sandbox.oom_kills}
            record({**note_of(agent, path), **note})
            return first
        except OSError as error:
            first.close()
            complaint = words.rest() or str(error)
            if self.groups.oom_kills(sandbox.id):
                complaint = f"out of memory: its limit of {sandbox.limits.memory} bytes is too low"
            raise BackendFailed(f"sandbox {sandbox.slug!r} did not start: {complaint}") from None
        except BaseException:
            first.close()
            raise

    def _kill_untold(self, sandbox: Sandbox, spec: dict[str, Any]) -> None:
        """Undo a start of which no note may have been made."""
        pids.kill_and_wait(self._boxes().get(sandbox.id, []), KILL_TIMEOUT_S)
        self.networks.end(sandbox.id)
        self._empty_group(sandbox.id)
        self._remove_socket(os.path.join(spec["socket_dir"], spec["socket_name"]))

    def _empty_group(self, sandbox_id: str) -> bool:
        """True: nothing is left in its group, which is gone (or else is when it starts again)."""
        emptied = self.groups.kill(sandbox_id, KILL_TIMEOUT_S)
        if emptied:
            self.groups.remove(sandbox_id)
        return emptied

    # --- living ---------------------------------------------------------------------------------

    def connect(self, sandbox: Sandbox, timeout: float = 5.0) -> socket.socket:
        path = sandbox.state.get("socket")
        if not isinstance(path, str):
            raise BackendFailed(f"sandbox {sandbox.slug!r} has no agent: start it")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise BackendFailed(
                f"the agent of sandbox {sandbox.slug!r} does not answer: {error.strerror or error}"
            ) from None
        return sock

    def poll(self, sandbox: Sandbox) -> str | None:
        if not sandbox.state:
            return "it has no process"
        if sandbox.state.get("boot") != pids.boot_id():
            return "the machine was restarted"
        if pids.Process(sandbox.state["pid"], sandbox.state["start"]).alive():
            return None
        killed = self.groups.oom_kills(sandbox.id)
        out = f" (out of memory: its limit ended {killed} of its processes)" if killed else ""
        return f"its agent (pid 1 of the sandbox) {self._ending(sandbox.id)}{out}"

    def _ending(self, sandbox_id: str) -> str:
        """How bubblewrap saw pid 1 end; it writes that to a file of ours, not of the sandbox."""
        with contextlib.suppress(OSError, ValueError):
            text = (self.sandboxes / sandbox_id / "status").read_text()
            for line in text.splitlines():
                code = json.loads(line).get("exit-code")
                if isinstance(code, int):
                    return f"was killed by signal {code - 128}" if code > 128 else f"exited {code}"
        return "is gone"

    def open_log(self, sandbox: Sandbox) -> int | None:
        directory = self.sandboxes / sandbox.id
        if (directory / "disk.img").exists():
            with self.launcher.ask({"action": "log", "dir": str(directory)}) as words:
                try:
                    (log,) = words.expect(b"L", START_TIMEOUT_S)
                    return log
                except BackendFailed:
                    if directory.exists():
                        raise
                    return None  # deleted meanwhile
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(directory / "log", flags)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def listener(self, place: Path, gid: int | None) -> socket.socket:
        spec = {"action": "listen", "dir": str(place.parent), "name": place.name, "gid": gid}
        with self.launcher.ask(spec) as words:
            (descriptor,) = words.expect(
                b"L", LISTENER_TIMEOUT_S, failing="the endpoint's socket could not be made"
            )
        return socket.socket(fileno=descriptor)

    # --- ending ---------------------------------------------------------------------------------

    def stop(self, sandbox: Sandbox, *, grace: float) -> None:
        agent = self._agent(sandbox)
        if agent is not None and grace > 0 and agent.alive():
            self.groups.thaw(sandbox.id)
            # The agent is not trusted: whatever it does with this, its time is bounded.
            with contextlib.suppress(HeyvmError, OSError), self.connect(sandbox) as sock:
                guest.stop(sock, grace)
        self._kill(sandbox, agent)

    def _agent(self, sandbox: Sandbox) -> pids.Process | None:
        state = sandbox.state
        if not state or state.get("boot") != pids.boot_id():
            return None
        return pids.Process(state["pid"], state["start"])

    def _kill(self, sandbox: Sandbox, agent: pids.Process | None) -> None:
        if agent is None or not agent.alive():
            # Its note may be of an earlier box: whoever started this one died before writing.
            found = self._boxes().get(sandbox.id, [])
        else:
            found = [agent]
            if "outer" in sandbox.state:
                found.append(pids.Process(*sandbox.state["outer"]))
        for process in found:
            process.kill()
        self.groups.thaw(sandbox.id)  # what v1's freezer holds does not die
        left = pids.kill_and_wait(found, KILL_TIMEOUT_S)
        self.networks.end(sandbox.id)
        if left or not self._empty_group(sandbox.id):
            pids_left = {one.pid for one in left} | self.groups.pids(sandbox.id)
            numbers = ", ".join(map(str, sorted(pids_left)))
            raise BackendFailed(f"processes {numbers} of sandbox {sandbox.slug!r} will not die")
        if isinstance(path := sandbox.state.get("socket"), str):
            self._remove_socket(path)

    def destroy(self, sandbox: Sandbox) -> None:
        self._kill(sandbox, self._agent(sandbox))
        self.networks.forget(sandbox)
        self._erase(sandbox.id)

    def _erase(self, sandbox_id: str) -> None:
        for name in (sandbox_id, f"{sandbox_id}.new"):
            goner = self.trash / f"{name}.{secrets.token_hex(4)}"
            try:
                os.rename(self.sandboxes / name, goner)
            except FileNotFoundError:
                continue
            image = _stat(goner / "disk.img")
            self._remove_tree(goner)
            if image is not None:
                _wait_until_free(image)
        for name in ("agents", "visits"):
            self._remove_socket(str(self.settings.run_dir / name / f"{sandbox_id}.sock"))

    def _remove_tree(self, path: Path) -> None:
        """Remove it, as those whose ids its files have."""
        try:
            trees.remove(str(path))
        except PermissionError as error:
            found = ranges.sub_ids(os.geteuid())
            if self.root or found is None or id_tools() is None:
                raise BackendFailed(
                    f"{path} cannot be removed: {error.strerror}; its files belong to sub-ids that"
                    " /etc/subuid and /etc/subgid no longer give to this user"
                ) from None
            program = [trees.__file__, str(path)]
            spec = {"action": "remove", "sub_ids": with_tools(found), "remove": program}
            with self.launcher.ask(spec) as words:
                words.expect(b"D", REMOVE_TIMEOUT_S)

    def _remove_socket(self, path: str) -> None:
        for name in (path, path + ".new"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    # --- halting and measuring ------------------------------------------------------------------

    def pause(self, sandbox: Sandbox) -> None:
        self.groups.freeze(sandbox.id)

    def resume(self, sandbox: Sandbox) -> None:
        self.groups.thaw(sandbox.id)

    def is_paused(self, sandbox: Sandbox) -> bool:
        return self.groups.is_frozen(sandbox.id)

    def usage(self, sandbox: Sandbox) -> Reading:
        return self.groups.usage(sandbox.id)

    def oom_kills(self, sandbox: Sandbox) -> int | None:
        return self.groups.oom_kills(sandbox.id)

    # --- mounts ---------------------------------------------------------------------------------

    def check_mount(self, mount: Mount) -> None:
        hostdirs.check(mount, self.policy)

    def change_mounts(self, sandbox: Sandbox, add: Mount | None, remove: str | None) -> bool:
        if add is not None and not add.read_only and sandbox.state.get("set_id"):
            # Its filter lets set-id files be made and cannot be changed; the next start's will not.
            return False
        spec: dict[str, Any] = {"id_base": sandbox.id_base, "pid": sandbox.state["pid"]}
        if add is not None:
            spec |= {"action": "add_mount", "mounts": [self._mount(add)]}
        else:
            spec |= {"action": "remove_mount", "target": remove}
        with self.launcher.ask(spec) as words:
            try:
                words.expect(b"D", START_TIMEOUT_S)
            except BackendFailed:
                return False
        return True

    # --- left-overs -----------------------------------------------------------------------------

    def inventory(self) -> frozenset[str]:
        names = set(self._boxes()) | {one for one in self.groups.names() if ID.fullmatch(one)}
        places = [self.sandboxes, *(self.settings.run_dir / one for one in ("agents", "visits"))]
        for place in places:
            with contextlib.suppress(FileNotFoundError):
                names |= {found.group() for name in os.listdir(place) if (found := ID.match(name))}
        return frozenset(names)

    def sweep(self, strays: frozenset[str]) -> None:
        boxes = self._boxes() if strays else {}
        for name in strays:
            pids.kill_and_wait(boxes.get(name, []), KILL_TIMEOUT_S)
            self.networks.end(name)
            self._empty_group(name)
            self._erase(name)
        self.networks.sweep()
        self.groups.sweep()
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.trash):
                self._remove_tree(self.trash / name)

    def upkeep(self, running: Sequence[Sandbox]) -> None:
        self.networks.upkeep(running, self._renew_network)

    def _renew_network(self, sandbox: Sandbox, network: dict[str, Any]) -> None:
        network["groups"] = self.groups.paths(sandbox.id)
        spec = {"action": "renew_network", "pid": sandbox.state["pid"], "network": network}
        with self.launcher.ask(spec) as words:
            words.expect(b"D", START_TIMEOUT_S)

    def _title(self, sandbox_id: str) -> str:
        return f"heyvm:{self.mark}:{sandbox_id}"

    def _boxes(self) -> dict[str, list[pids.Process]]:
        """The processes of every box of this server that still runs, by sandbox: found by what
        bubblewrap is called, and its children (pid 1 of a box has bubblewrap for a parent)."""
        outer: dict[int, str] = {}
        children: list[tuple[int, pids.Process]] = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            found = pids.stat_of(pid)
            if found is None or found.letter in "ZX":
                continue
            children.append((found.parent, pids.Process(pid, found.start)))
            if (name := self._sandbox_of(pid)) is not None:
                outer[pid] = name
        boxes: dict[str, list[pids.Process]] = {}
        for parent, process in children:
            name = outer.get(process.pid) or outer.get(parent)
            if name is not None:
                boxes.setdefault(name, []).append(process)
        return boxes

    def _sandbox_of(self, pid: int) -> str | None:
        """Whose box this is. Every user of the machine may give a process whatever title he likes,
        and what is found here is killed and erased: its form and its owner count too."""
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                first = file.read(64).split(b"\0")[0]
            inside = os.stat(f"/proc/{pid}/ns/pid").st_ino != os.stat("/proc/self/ns/pid").st_ino
        except OSError:
            return None
        prefix = self._title("").encode()
        name = first.removeprefix(prefix).decode("ascii", "replace")
        if inside or not first.startswith(prefix) or not ID.fullmatch(name):
            return None
        return name if self._is_own(pids.uid_of(pid)) else None

    def _is_own(self, uid: int | None) -> bool:
        if uid is None or not self.root:
            return uid == os.geteuid()
        return ranges.LOWEST <= uid < ranges.HIGHEST


class Launcher:
    """This process's `launcher.py`, started when first asked, and again when it has died."""

    def __init__(self, groups: cgroups.Groups) -> None:
        self._groups = groups
        self._sock: socket.socket | None = None
        self._owner = 0
        self._child = 0
        self._lock = threading.Lock()

    def warm(self) -> None:
        with self._lock:
            self._running()

    @contextlib.contextmanager
    def ask(self, spec: dict[str, Any]) -> Iterator[Words]:
        """Send a request; what is yielded reads the answer."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                theirs.setblocking(True)  # for what it is there; gevent makes both otherwise
                self._send(json.dumps(spec).encode(), theirs.fileno())
            yield Words(ours)

    def _send(self, request: bytes, descriptor: int) -> None:
        with self._lock:
            for attempt in (1, 2):
                try:
                    socket.send_fds(self._running(), [request], [descriptor])
                    return
                except OSError as error:
                    self._forget()
                    if attempt == 2:
                        raise BackendFailed(f"the launcher does not answer: {error}") from None

    def _running(self) -> socket.socket:
        # A socket carried across fork() would be shared by two workers.
        if self._sock is None or self._owner != os.getpid():
            self._start()
        assert self._sock is not None
        return self._sock

    def _start(self) -> None:
        self._spawn()
        if os.geteuid() == 0 or not self._groups.places:
            return
        try:
            self._try_groups()
        except (HeyvmError, OSError) as error:
            # Who is no root has them by the grace of systemd or of whoever set up the machine: then
            # sandboxes run without limits, and `warnings` says so.
            sys.stderr.write(f"heyvm: sandboxes have no cgroups: {error}\n")
            self._forget()
            self._groups.give_up()
            self._spawn()

    def _try_groups(self) -> None:
        """Raises where a group like a sandbox's cannot be made and joined."""
        assert self._sock is not None
        name = f"spare-{os.getpid()}"
        spec = {"action": "try_groups", "cgroups": self._groups.specification(name, TRIED)}
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                theirs.setblocking(True)
                socket.send_fds(self._sock, [json.dumps(spec).encode()], [theirs.fileno()])
            Words(ours).expect(b"D", START_TIMEOUT_S)
        self._groups.remove(name)

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        os.set_inheritable(theirs.fileno(), True)
        groups = json.dumps(self._groups.launcher)
        options = ["-I", "-S", "-B", str(LAUNCHER), str(theirs.fileno()), groups]
        arguments = [*self._groups.scope, sys.executable, *options]
        # Its environment is empty: nothing of the server's is there for a sandbox to find.
        environment = {} if not self._groups.scope else user_bus()
        self._child = os.posix_spawn(arguments[0], arguments, environment, setsid=True)
        theirs.close()
        self._sock, self._owner = ours, os.getpid()

    def _forget(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._sock = None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, os.WNOHANG)


def user_bus() -> dict[str, str]:
    """What systemd-run has to know to find the user's systemd."""
    return {"XDG_RUNTIME_DIR": f"/run/user/{os.geteuid()}"}


class Words:
    """The answer of a launcher. What comes after its first byte may be the sandbox's."""

    LIMIT = 4096

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def expect(
        self, word: bytes, timeout: float, *, failing: str = "the sandbox could not be started"
    ) -> list[int]:
        """Wait for `word`; the descriptors that came with it. Raises what is said instead."""
        self._sock.settimeout(timeout)
        try:
            said, descriptors, _, _ = socket.recv_fds(self._sock, 1, 1)
        except OSError as error:
            raise BackendFailed(f"the launcher does not answer: {error}") from None
        if said == word:
            return descriptors
        text = (said + self._rest()).decode("utf-8", "replace")
        if text.startswith("R"):
            field, _, why = text[1:].partition(" ")
            raise Invalid(why, errors={field: [why]})
        if text.startswith("E"):
            number, _, why = text[1:].partition(" ")
            if int(number) in FULL:
                raise StorageFull(f"the sandbox could not be made: {why}")
            raise BackendFailed(f"{failing}: {why}")
        raise BackendFailed(f"the launcher died, or said what it never says: {text!r}")

    def is_done(self, timeout: float) -> bool:
        """Whether what was asked for could be done."""
        try:
            self.expect(b"D", timeout)
        except HeyvmError:
            return False
        return True

    def rest(self) -> str:
        """What bubblewrap complained of."""
        return self._rest().decode("utf-8", "replace").strip()

    def _rest(self) -> bytes:
        """What comes until the end of the file, or of our patience."""
        data, end = b"", time.monotonic() + 1.0
        with contextlib.suppress(OSError):
            while len(data) < self.LIMIT:
                self._sock.settimeout(max(0.001, end - time.monotonic()))
                part = self._sock.recv(self.LIMIT)
                if not part:
                    break
                data += part
        return data


@functools.lru_cache(maxsize=4)
def bwrap_version(path: str, stamp: object = None) -> tuple[int, ...]:
    """What `bwrap --version` says; asked again when the file has another `stamp`."""
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0, 0, 0)


def sender(sock: socket.socket) -> pids.Process:
    """Who sent what is next to be read, in the kernel's word (SO_PASSCRED, unix(7))."""
    size = struct.calcsize("3i")
    data, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(size), socket.MSG_PEEK)
    if not data:
        raise ConnectionResetError("its agent ended before it said hello")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            process = pids.identify(struct.unpack("3i", payload[:size])[0])
            if process is not None:
                return process
    raise ConnectionResetError("its agent ended as it said hello")


def note_of(agent: pids.Process, path: str) -> State:
    """What is kept of a box: its processes, of which boot they are, where its agent listens."""
    note: dict[str, Any] = {"pid": agent.pid, "start": agent.start, "socket": path}
    note["boot"] = pids.boot_id()
    found = pids.stat_of(agent.pid)
    outer = pids.identify(found.parent) if found is not None else None
    if outer is not None and outer.pid > 1:
        note["outer"] = [outer.pid, outer.start]
    return note


def own_files(slug: str) -> dict[str, str]:
    """The files of /etc that are each sandbox's own."""
    return {
        "etc/hostname": f"{slug}\n",
        "etc/hosts": f"127.0.0.1 localhost\n127.0.1.1 {slug}\n::1 localhost ip6-localhost\n",
        "etc/machine-id": secrets.token_hex(16) + "\n",
    }


def by_depth(mounts: tuple[Mount, ...]) -> list[Mount]:
    """Those above before those below them, which they would otherwise cover."""
    return sorted(mounts, key=lambda mount: mount.sandbox_path.count("/"))


def id_tools() -> list[str] | None:
    """newuidmap and newgidmap (package uidmap), without which sub-ids cannot be used."""
    found = [shutil.which(name, path="/usr/bin:/bin") for name in ("newuidmap", "newgidmap")]
    return None if None in found else [str(one) for one in found]


def with_tools(ids: ranges.SubIds) -> dict[str, Any]:
    return {"uid": ids.uid, "gid": ids.gid, "tools": id_tools()}


def spare_uid(sandbox: Sandbox, sub_ids: ranges.SubIds | None) -> str:
    """An id that the agent alone has; -1 where there is but one."""
    if sandbox.id_base is not None:
        return str(SPARE_UID)
    return "-1" if sub_ids is None else str(min(SPARE_UID, sub_ids.uid[1]))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _wait_until_free(image: os.stat_result) -> None:
    """The kernel lets go of a disk a moment after the last process that saw it has ended."""
    end = time.monotonic() + DISK_GONE_S
    while disks.in_use(image) and time.monotonic() < end:
        time.sleep(0.01)
