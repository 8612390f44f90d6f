"""`heyvm doctor`: what a sandbox needs of this machine, tried by running one. Changes nothing.

Each check says what is and what to do about it; none of them guesses where it can try.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from heyvm.errors import HeyvmError
from heyvm.settings import Settings

if TYPE_CHECKING:
    from heyvm.api.parts import Services
    from heyvm.backends.cgroups import Groups
    from heyvm.backends.network import Networks

T = TypeVar("T")

OK, WARN, FAIL = "ok", "warn", "FAIL"
SOCKET_PATH_BYTES = 107  # unix(7): sun_path has 108, the last one is a zero
LONGEST_SOCKET = "agents/sb-00000000.sock.new"
ENOUGH_BYTES = 1024**3
ENOUGH_INODES = 20_000
NEWEST_PYTHON = (3, 13)
IDMAPPED_OVERLAY = (5, 19)  # overlayfs takes idmapped layers from there
USERNS_CURE = "sysctl -w user.max_user_namespaces=15000, and in /etc/sysctl.d to keep it"

APPARMOR_PROFILE = """\
abi <abi/4.0>,
include <tunables/global>
profile heyvm {programs} flags=(unconfined) {{
  userns,
}}"""


@dataclass(frozen=True)
class Check:
    """One line: `name`, how it stands (`ok`, `warn`, `FAIL`), what is, and what to do."""

    level: str
    name: str
    what: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.level:4} {self.name}: {self.what}" + (f" - {self.cure}" if self.cure else "")


@dataclass(frozen=True)
class Machine:
    """Where the facts are read; tests give another root, or another user."""

    root: Path = Path("/")
    euid: int = os.geteuid()
    release: str = platform.release()

    def text(self, path: str) -> str | None:
        """What a file holds, without white space around it; None where it is not there."""
        try:
            return (self.root / path.lstrip("/")).read_text().strip()
        except OSError:
            return None


def run(settings: Settings, *, as_json: bool = False) -> int:
    """Print every check. 0 where a sandbox ran, else 1."""
    checks: list[Check] = []
    for check in every_check(settings, Machine()):
        checks.append(check)
        if not as_json:
            print(check, flush=True)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    return int(any(check.level == FAIL for check in checks))


def every_check(settings: Settings, machine: Machine) -> Iterator[Check]:
    """What is needed first, then what is good to have, then a sandbox's whole life."""
    yield python()
    yield seccomp(machine)
    yield bubblewrap(settings)
    yield user_namespaces(machine)
    yield apparmor(machine)
    yield idmapped_mounts(machine)
    yield image_tools()
    yield tickets(settings)
    yield run_directory(settings)
    yield data_directory(settings, machine)
    yield space(settings)
    try:
        with _a_server(settings) as services:
            yield from _what_can_be_had(services, machine)
            yield from _whole_life(services)
    except HeyvmError as wrong:
        yield Check(FAIL, "a sandbox", wrong.detail)
    except OSError as error:
        yield Check(FAIL, "a sandbox", str(error), _cure_of(error))


def python() -> Check:
    """Which one; pip has refused those that are too old."""
    version = platform.python_version()
    if sys.version_info[:2] > NEWEST_PYTHON:
        return Check(WARN, "python", version, "newer than any that heyvm was tried with")
    return Check(OK, "python", f"{version}, {sys.executable}")


def seccomp(machine: Machine) -> Check:
    """The filter of system calls, built with libseccomp for this processor."""
    from heyvm.backends import seccomp

    try:
        program = seccomp.build(single_id=machine.euid != 0)
    except HeyvmError as wrong:
        return Check(FAIL, "seccomp", wrong.detail)
    return Check(OK, "seccomp", f"a filter of {len(program) // 8} instructions")


def bubblewrap(settings: Settings) -> Check:
    """There, new enough, and not set-uid."""
    from heyvm.backends.bubblewrap import Bubblewrap, bwrap_version

    try:
        Bubblewrap(settings).check()
    except HeyvmError as wrong:
        return Check(FAIL, "bubblewrap", wrong.detail)
    path = shutil.which("bwrap") or "/usr/bin/bwrap"
    return Check(OK, "bubblewrap", f"{'.'.join(map(str, bwrap_version(path)))}, {path}")


def user_namespaces(machine: Machine) -> Check:
    """Sandboxes are user namespaces, whoever runs the server."""
    name = "user namespaces"
    most = machine.text("/proc/sys/user/max_user_namespaces")
    if most is None:
        return Check(FAIL, name, "this kernel has none", "a kernel with CONFIG_USER_NS")
    if most == "0":
        return Check(FAIL, name, "user.max_user_namespaces is 0", USERNS_CURE)
    clone = machine.text("/proc/sys/kernel/unprivileged_userns_clone")
    if clone == "0" and machine.euid != 0:
        cure = "sysctl -w kernel.unprivileged_userns_clone=1, and in /etc/sysctl.d to keep it"
        return Check(FAIL, name, "kernel.unprivileged_userns_clone is 0", cure)
    return Check(OK, name, f"up to {most}")


def apparmor(machine: Machine) -> Check:
    """Ubuntu 24.04 takes an ordinary user's namespaces their rights unless a profile says not."""
    name = "AppArmor"
    restricted = machine.text("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    if restricted != "1":
        return Check(OK, name, "does not restrict user namespaces")
    if machine.euid == 0:
        return Check(OK, name, "restricts the user namespaces of ordinary users, not root's")
    programs = f"{{{os.path.realpath(sys.executable)},{shutil.which('bwrap') or '/usr/bin/bwrap'}}}"
    profile = APPARMOR_PROFILE.format(programs=programs)
    cure = (
        "as root, write the profile below to /etc/apparmor.d/heyvm and load it with"
        f" `apparmor_parser -r /etc/apparmor.d/heyvm`:\n{profile}"
    )
    return Check(WARN, name, "kernel.apparmor_restrict_unprivileged_userns is 1", cure)


def idmapped_mounts(machine: Machine) -> Check:
    """What gives each sandbox of a root server its own ids over one shared system."""
    name = "idmapped mounts"
    if machine.euid != 0:
        return Check(OK, name, "not needed: an ordinary user's sandbox has ids of that user's")
    number = tuple(int(part) for part in machine.release.split("-")[0].split(".")[:2])
    if number < IDMAPPED_OVERLAY:
        return Check(FAIL, name, f"kernel {machine.release}", "they need Linux 5.19 or newer")
    return Check(OK, name, f"kernel {machine.release}")


def image_tools() -> Check:
    """What fetches and unpacks images; the host's own files do without."""
    name, packages = "image tools", {"skopeo": "skopeo", "umoci": "umoci"}
    packages |= {"gzip": "gzip", "bzip2": "bzip2", "xz": "xz-utils", "zstd": "zstd"}
    missing = [tool for tool in packages if shutil.which(tool) is None]
    if not missing:
        return Check(OK, name, ", ".join(packages))
    needed = {"skopeo", "umoci"}.intersection(missing)
    what = "only `host` and images that are here" if needed else "no layers packed with it"
    cure = f"on Debian and Ubuntu: apt install {' '.join(packages[one] for one in missing)}"
    return Check(WARN, name, f"no {', no '.join(missing)}: {what}", cure)


def _what_can_be_had(services: Services, machine: Machine) -> Iterator[Check]:
    """The answers that a create would get from the backend."""
    from heyvm.backends.bubblewrap import Bubblewrap

    backend = services.backends[Bubblewrap.name]
    assert isinstance(backend, Bubblewrap)
    backend.warm()
    yield ids(backend._offer_ids(), machine)
    for warning in backend._offer_owners():
        yield Check(WARN, "image files", warning, "put HEYVM_DATA_DIR on ext4, xfs or btrfs")
    yield groups(backend.groups)
    yield network(backend.networks)
    yield disks(backend._why_no_disk())


def ids(offered: str, machine: Machine) -> Check:
    """Whose ids a sandbox has: `offered` is `ids` of its record."""
    if offered == "sub-ids":
        return Check(OK, "ids", "this user's of /etc/subuid and /etc/subgid, for all sandboxes")
    if machine.euid != 0:
        return Check(
            WARN,
            "ids",
            "one id, this user's: what needs a second one (apt-get, su, `user`) fails inside",
            "for more, a line for this user in /etc/subuid and /etc/subgid (usermod --add-subuids"
            " 100000-165535 --add-subgids 100000-165535 NAME, a part that nobody else has) and"
            " the package uidmap, or a server run as root",
        )
    for path in ("/etc/subuid", "/etc/subgid"):
        place = machine.root / path.lstrip("/")
        place = place if place.exists() else place.parent
        if not os.access(place, os.W_OK):
            cure = "sandboxes' ids are reserved there: make it writable"
            return Check(FAIL, "ids", f"{path} cannot be written", cure)
    return Check(OK, "ids", "65,536 for each sandbox, reserved in /etc/subuid and /etc/subgid")


def groups(found: Groups) -> Check:
    """Limits, pause and usage are theirs."""
    from heyvm.backends.cgroups import LIMITED

    if not found.places:
        what = "none that may be written: memory is limited by process, cpus not, and no pause"
        cure = "run the server as root, or in a session of systemd with cgroup v2"
        return Check(WARN, "cgroups", what, cure)
    limited = ", ".join(one for one in LIMITED if one in found.controllers) or "nothing"
    where = ", ".join(f"{place.path} (v{place.version})" for place in found.places)
    what = f"limit {limited}{'' if found.can_freeze else ', cannot pause'}: {where}"
    if missing := [one for one in LIMITED if one not in found.controllers]:
        cure = f"have the controllers {', '.join(missing)} delegated, or run the server as root"
        return Check(WARN, "cgroups", f"{what}, without {', '.join(missing)}", cure)
    return Check(OK, "cgroups", what)


def network(networks: Networks) -> Check:
    """What carries a sandbox's packets, and which resolvers it is given."""
    from heyvm.backends.network import resolvers

    problem = networks.problem()
    if problem is not None:
        return Check(WARN, "network", f"sandboxes have none: {problem}")
    kind = "interface pairs and nftables" if networks.root else "pasta and nftables"
    asked = ", ".join(resolvers()) or "nobody (no nameserver in /etc/resolv.conf)"
    return Check(OK, "network", f"{kind}; names are asked of {asked}")


def disks(why_not: str | None) -> Check:
    """Whether `disk_size_gb` can be kept to."""
    if why_not is not None:
        return Check(WARN, "disk limits", f"none, disk_size_gb is refused: {why_not}")
    return Check(OK, "disk limits", "a file system of its own for a sandbox with disk_size_gb")


def tickets(settings: Settings) -> Check:
    """What shell sessions and TCP tunnels need beside a sandbox."""
    from heyvm.tickets import is_there

    if not is_there():
        return Check(WARN, "tickets", "iroh cannot be imported: no shell sessions, no TCP tunnels")
    return Check(OK, "tickets", f"iroh, UDP at {settings.tunnel_host} (HEYVM_TUNNEL_HOST)")


def run_directory(settings: Settings) -> Check:
    """The path of a unix socket is short."""
    length = len(os.fsencode(settings.run_dir / LONGEST_SOCKET))
    if length > SOCKET_PATH_BYTES:
        what = f"{settings.run_dir} makes socket paths of {length} bytes, {SOCKET_PATH_BYTES} fit"
        return Check(FAIL, "run directory", what, "set HEYVM_RUN_DIR to a shorter one")
    return Check(OK, "run directory", str(settings.run_dir))


def data_directory(settings: Settings, machine: Machine) -> Check:
    """A sandbox's files are an overlay, and the kernel refuses one on another."""
    kind = file_system_of(_existing(settings.data_dir), machine)
    what = f"{settings.data_dir} on {kind}"
    if kind == "overlay":
        cure = "put HEYVM_DATA_DIR on a volume (docker run -v heyvm:/var/lib/heyvm)"
        return Check(FAIL, "data directory", f"{what}: overlay on overlay does not work", cure)
    return Check(OK, "data directory", what)


def file_system_of(path: Path, machine: Machine) -> str:
    """The type of the file system that `path` lies on, as mountinfo has it (proc(5))."""
    best, kind = "", "an unknown file system"
    for line in (machine.text("/proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].replace("\\040", " ")
        if len(point) >= len(best) and path.is_relative_to(point):
            best, kind = point, after.split(" ")[0]
    return kind


def space(settings: Settings) -> Check:
    """Enough for sandboxes to write something."""
    place = os.statvfs(_existing(settings.data_dir))
    free = place.f_bavail * place.f_frsize
    what = f"{free / 1024**3:.1f} GiB free"
    if free < ENOUGH_BYTES:
        return Check(WARN, "space", what, f"sandboxes need some on {settings.data_dir}")
    if place.f_files and place.f_favail < ENOUGH_INODES:
        return Check(WARN, "space", f"{what}, but {place.f_favail} inodes", "delete small files")
    return Check(OK, "space", what)


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(place for place in (path, *path.parents) if place.is_dir())


@contextlib.contextmanager
def _a_server(settings: Settings) -> Iterator[Services]:
    """The parts of a server that has a data directory of its own beside the real data: on its file
    system, for that is the one that has to be able to."""
    from app import build
    from heyvm.backends import trees

    data = tempfile.mkdtemp(prefix=".heyvm-doctor-", dir=_existing(settings.data_dir))
    try:
        with tempfile.TemporaryDirectory(prefix="hv-") as run_dir:
            own = replace(settings, data_dir=Path(data), run_dir=Path(run_dir), notices=())
            services = build(own)
            try:
                yield services
            finally:
                _give_back(services)
    finally:
        trees.remove(data)


def _give_back(services: Services) -> None:
    from heyvm import purge

    for sandbox_id in services.lifecycle.registry.known_ids():
        with contextlib.suppress(HeyvmError, OSError):
            services.lifecycle.delete(sandbox_id)
    purge.give_back(services)


def _cure_of(error: OSError) -> str:
    if isinstance(error, PermissionError) and isinstance(error.filename, str):
        where = os.path.dirname(error.filename)
        return f"ask as the user that the server runs as, who has to be able to write to {where}"
    return ""


def _whole_life(services: Services) -> Iterator[Check]:
    """Create, execute and delete."""
    from heyvm.models import CreateSpec, ExecRequest

    print("making what the first sandbox needs, in a directory of its own ...", file=sys.stderr)
    try:
        made, took = _timed(lambda: services.lifecycle.create(CreateSpec(name="doctor")))
    except HeyvmError as wrong:
        yield Check(FAIL, "create", wrong.detail, "mend what is said above, then ask again")
        return
    sandbox, _ = made
    yield Check(OK, "create", f"{took * 1000:.0f} ms, with what the first one makes for all")
    try:
        result, took = _timed(
            lambda: services.processes.execute(sandbox.id, ExecRequest("echo", ("hello",)))
        )
        said = result.stdout.decode(errors="replace")
        level = OK if said == "hello\n" else FAIL
        yield Check(level, "execute", f"{took * 1000:.0f} ms, echo said {said!r}")
    except HeyvmError as wrong:
        yield Check(FAIL, "execute", wrong.detail)
    finally:
        _, took = _timed(lambda: services.lifecycle.delete(sandbox.id))
    yield Check(OK, "delete", f"{took * 1000:.0f} ms")


def _timed(act: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    return act(), time.monotonic() - began
