"""The store of images: what is here, what it is called, and how more comes in.

`data_dir/images/<64 hex>/rootfs` is the unpacked tree of the image whose *config* has that sha256
(docker's image id): the config holds the digests of the layers' plain tars, which umoci checks, so
the same content is the same directory whatever registry, compression or archive it came in. What
is under way has `data_dir/images/.work-*`, with a lock that everything that works there holds.
`oci.py` does the work, in a process of its own. Knows no sandbox, no backend, no HTTP.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import secrets
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heyvm import journal, locks, metrics
from heyvm.backends import trees
from heyvm.errors import HeyvmError, ImageMissing, Invalid, NotFound, StorageFull, Unavailable
from heyvm.models import Image, ImageConfig
from heyvm.registry import HOST_IMAGE, Registry
from heyvm.settings import Settings

Tell = Callable[[str], None]

TELL_S = 0.4
NICE = 15
PATIENCE_S = 60.0  # for the store's lock, which is held for a rename and a commit
MAX_NAME = 255
WORKER = Path(__file__).with_name("oci.py")
WORK = ".work-"
LOCK = ".lock"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Nothing of the server's own for programs that talk to strangers.
KEPT_BACK = ("HEYVM_", "JWT_", "S3_", "MSB_", "AWS_", "GUNICORN_", "PYTHON", "LD_")

HUB = "docker.io"
HUBS = (HUB, "index.docker.io", "registry-1.docker.io")
DIGEST = r"sha256:[0-9a-f]{64}"
# https://github.com/distribution/reference has the grammar.
HOST = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
NAME = re.compile(
    rf"(?:(?P<host>{HOST})/)??(?P<path>{COMPONENT}(?:/{COMPONENT})*)"
    rf"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}))?(?:@(?P<digest>{DIGEST}))?"
)


@dataclass(frozen=True)
class Reference:
    """An image's name, taken apart. `host` is a registry's, `path` all of the repository in it;
    `selector` is `:tag` or `@digest`."""

    host: str
    path: str
    selector: str

    @property
    def short(self) -> str:
        """As a person writes it, with its tag: what names are stored as."""
        if self.host != HUB:
            return f"{self.host}/{self.path}{self.selector}"
        return self.path.removeprefix("library/") + self.selector


def reference(name: str) -> Reference:
    """Read a name as docker does. `Invalid`, also for the host's own system."""
    if name == HOST_IMAGE:
        raise _invalid(f"{HOST_IMAGE} is this machine's own system, not an image")
    found = NAME.fullmatch(name) if len(name) <= MAX_NAME else None
    if found is None or re.fullmatch(DIGEST, name):
        raise _invalid(f"{name[:MAX_NAME]!r} is no name of an image: say ubuntu:24.04, or"
                       " registry.example:5000/some/name@sha256:...")  # fmt: skip
    host, path = found["host"], found["path"]
    first, slash, rest = path.partition("/")
    if host is None and slash and (first == "localhost" or "." in first):
        host, path = first, rest
    elif host is not None and not _is_host(host):
        raise _invalid(f"{name!r} is no name of an image: {host!r} is no registry's address")
    if host in (None, *HUBS):
        host, path = HUB, path if "/" in path else f"library/{path}"
    selector = f"@{found['digest']}" if found["digest"] else f":{found['tag'] or 'latest'}"
    return Reference(host or HUB, path, selector)


def canonical(name: str) -> str:
    """What an image of this name is stored under; a bare digest is its own name. `Invalid`."""
    return name if re.fullmatch(DIGEST, name) else reference(name).short


def _is_host(first: str) -> bool:
    """Not a namespace of the hub's, which is written in small letters and holds none of these."""
    _, _, port = first.rpartition("]")[2].partition(":")
    return int(port or 0) <= 65535 and (first == "localhost" or any(c in first for c in ".:["))


class Images:
    """Any number of processes may use one store at once; whichever of them dies, what it had begun
    is gone once another one has called `sweep`."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry, self._settings = registry, settings
        self._directory = settings.data_dir / "images"
        self._trash = settings.data_dir / "trash"

    # -- what is here ------------------------------------------------------------------------------

    def list(self) -> Sequence[Image]:
        """Every image, oldest first."""
        return self._registry.images()

    def find(self, name: str) -> Image | None:
        """The image of this name or digest, if it is here. `Invalid` for what is no name."""
        return self._registry.image(canonical(name))

    def get(self, name: str) -> Image:
        """The image of this name or digest. `NotFound`."""
        found = self._registry.image(_findable(name))
        if found is None:
            raise NotFound(f"Image not found: {name}")
        return found

    def known(self, name: str) -> bool:
        """Whether an image of this name is here, or was once."""
        return self._registry.had_image(canonical(name))

    def demand_name(self, name: str) -> None:
        """`Invalid` unless an image can have this name."""
        reference(name)

    def users(self, image: Image) -> Sequence[str]:
        """The slugs of the sandboxes that use it."""
        return self._registry.image_users(image.digest)

    def rootfs(self, image: Image) -> Path:
        """Its unpacked tree."""
        return self._place(image.digest) / "rootfs"

    # -- more comes in -----------------------------------------------------------------------------

    def ensure(self, name: str, tell: Tell) -> Image:
        """The image that is here, else `pull`."""
        return self.find(name) or self._shared(name, tell, fresh=False)

    def pull(self, name: str, tell: Tell) -> Image:
        """Fetch what the registry has under this name now; one fetch for all who ask meanwhile.

        `tell(text)` is called at least twice a second; what it raises ends the work of this caller.
        `ImageMissing`, `Invalid` (naming `image`), `StorageFull`; `Unavailable` where a tool is not
        installed or the registry broke off.
        """
        return self._shared(name, tell, fresh=True)

    def take(self, name: str, path: Path | str, sha256: str | None, tell: Tell) -> Image:
        """Import a tar: a root file system, or what `docker save` or an OCI archive holds, plain or
        compressed. `sha256` (hex) is what the file's bytes must have. Errors as of `pull`."""
        wanted = reference(name)
        descriptor = _open_archive(path)
        job = {
            "op": "take",
            "name": wanted.short,
            "sha256": sha256,
            "known": self._here(),
            "descriptor": descriptor,
        }
        try:
            with self._begin(secrets.token_hex(16)) as work:
                result = self._run(work, job, tell, descriptor)
                image = self._keep(work, result, wanted.short, f"imported ({result['source']})")
        finally:
            os.close(descriptor)
        if image is None:
            raise Unavailable(f"image {wanted.short} was removed while it came in: try again")
        return image

    # -- what goes ---------------------------------------------------------------------------------

    def remove(self, name: str) -> None:
        """Take a name away, and the image with its last one. `NotFound`; `Conflict` naming the
        sandboxes that use it."""
        with self._locked():
            digest = self._registry.remove_image(_findable(name))
            goners = [self._to_trash(self._place(digest))] if digest else []
        self._erase(goners)

    def prune(self, *, nameless: bool = False) -> Sequence[Image]:
        """Remove every image that no sandbox uses (`nameless`: of those, the ones without a name);
        what is gone."""
        with self._locked():
            images = self._registry.prune_images(nameless=nameless)
            goners = [self._to_trash(self._place(image.digest)) for image in images]
        self._erase(goners)
        return images

    def sweep(self) -> None:
        """Remove what killed pulls and removals left, and images that lost their last name."""
        if not self._directory.is_dir():
            return
        goners = [self._trash_if_dead(one) for one in self._directory.glob(WORK + "*")]
        images = {_hexadecimal(image.digest): image for image in self._registry.images()}
        strays = [name for name in self._stored() if name not in images]
        if strays:
            with self._locked():
                known = {_hexadecimal(image.digest) for image in self._registry.images()}
                goners += [self._to_trash(self._directory / n) for n in strays if n not in known]
        self._erase(goners)
        if any(not image.names and not self.users(image) for image in images.values()):
            self.prune(nameless=True)

    # -- one pull for all who want it --------------------------------------------------------------

    def _shared(self, name: str, tell: Tell, *, fresh: bool) -> Image:
        wanted = reference(name)
        key = hashlib.sha256(wanted.short.encode()).hexdigest()[:32]
        while True:
            work = self._try_begin(key)
            if work is None:
                image = self._follow(key, tell)
            else:
                with work:
                    here = None if fresh else self._registry.image(wanted.short)
                    image = here or self._fetch(work, wanted, tell)
            if image is not None:
                return image

    def _fetch(self, work: Work, wanted: Reference, tell: Tell) -> Image | None:
        job = {
            "op": "pull",
            "name": wanted.short,
            "repository": f"{wanted.host}/{wanted.path}",
            "selector": wanted.selector,
            "plain": self._is_plain(wanted.host),
            "known": self._here(),
        }
        with metrics.here().timed("image_pull"):
            result = self._run(work, job, tell)
        source = f"docker://{wanted.host}/{wanted.path}@{result['source']}"
        image = self._keep(work, result, wanted.short, source)
        if image is not None:
            work.say({"image": image.digest})
            journal.event("image.pulled", image=wanted.short, digest=image.digest)
        return image

    def _follow(self, key: str, tell: Tell) -> Image | None:
        """Wait for somebody else's pull: its image, or its failure. None: it was not finished."""
        for line in follow(self._directory / (WORK + key)):
            if "failed" in line:
                raise failure(line)
            if "image" in line:
                return self._registry.image(line["image"])
            tell(line.get("says") or "waiting")
        return None

    def _is_plain(self, host: str) -> bool:
        """Whether it may be spoken to without TLS."""
        if host in self._settings.insecure_registries:
            return True
        alone = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        with suppress(ValueError):
            return ipaddress.ip_address(alone).is_loopback
        return alone == "localhost"

    # -- the worker --------------------------------------------------------------------------------

    def _run(
        self, work: Work, job: Mapping[str, Any], tell: Tell, *descriptors: int
    ) -> Mapping[str, Any]:
        """Have oci.py do a job in `work`; what it says of the image. It is gone on return."""
        said, ended = "", None
        with _worker(work, job, descriptors) as process:
            for line in _lines(process):
                if "done" in line or "failed" in line:
                    ended = line
                if "says" in line or "failed" in line:
                    work.say(line)
                said = line.get("says") or said
                tell(said)
        if ended is None:
            raise Unavailable(f"the process that brought in image {job['name']} was killed")
        if "failed" in ended:
            raise failure(ended)
        done: Mapping[str, Any] = ended["done"]
        return done

    def _keep(self, work: Work, result: Mapping[str, Any], name: str, source: str) -> Image | None:
        """Put what has been unpacked in its place, and write it down. None: it was taken for one
        that is here, and is not here any more."""
        digest = result["digest"]
        place, goners = self._place(digest), []
        with self._locked():
            here = self._registry.image(digest)
            if here is None or not place.is_dir():
                if result.get("known"):
                    return None
                if os.path.lexists(place):
                    goners.append(self._to_trash(place))
                _sync(work.path / "image")
                os.rename(work.path / "image", place)
                _sync(self._directory)
            image = here or _image(result, source)
            try:
                kept = self._registry.add_image(_renamed(image, name))
            except BaseException:
                if here is None:
                    goners.append(self._to_trash(place))
                raise
        self._erase(goners)
        return kept

    def _here(self) -> Sequence[str]:
        return [one.digest for one in self._registry.images() if self._place(one.digest).is_dir()]

    # -- directories -------------------------------------------------------------------------------

    def _place(self, digest: str) -> Path:
        return self._directory / _hexadecimal(digest)

    def _stored(self) -> Sequence[str]:
        return [one for one in os.listdir(self._directory) if re.fullmatch("[0-9a-f]{64}", one)]

    @contextmanager
    def _begin(self, key: str) -> Iterator[Work]:
        """A directory of one's own to work in."""
        work = self._try_begin(key)
        if work is None:
            raise Unavailable("two imports drew the same name: try again")
        with work:
            yield work

    def _try_begin(self, key: str) -> Work | None:
        """None where somebody works there. What a dead one left there goes."""
        path = self._directory / (WORK + key)
        while True:
            with _full_disk_told():
                path.parent.mkdir(mode=0o700, exist_ok=True)
                with suppress(FileExistsError):
                    path.mkdir(mode=0o700)
            descriptor = _try_hold(path)
            if descriptor is None:
                if path.exists():
                    return None
                continue
            if not os.listdir(descriptor):
                return Work(path, descriptor, self._discard)
            self._discard(path, descriptor)

    def _trash_if_dead(self, path: Path) -> Path | None:
        descriptor = _try_hold(path)
        if descriptor is None:
            return None
        try:
            return self._to_trash(path)
        finally:
            os.close(descriptor)

    def _discard(self, path: Path, descriptor: int) -> None:
        """Remove a directory whose lock we hold."""
        goner = self._to_trash(path)
        os.close(descriptor)
        self._erase([goner])

    def _to_trash(self, path: Path) -> Path | None:
        """Out of sight at once; a crash from here on leaves it for the keeper."""
        goner = self._trash / f"image.{secrets.token_hex(8)}"
        self._trash.mkdir(mode=0o700, exist_ok=True)
        try:
            path.rename(goner)
        except FileNotFoundError:
            return None
        return goner

    def _erase(self, goners: Sequence[Path | None]) -> None:
        for goner in goners:
            if goner is not None:
                trees.remove(str(goner))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Between rows and directories nobody else changes anything."""
        with _full_disk_told():
            self._directory.mkdir(mode=0o700, exist_ok=True)
        end = time.monotonic() + PATIENCE_S
        while (held := locks.try_lock(self._directory, LOCK)) is None:
            if time.monotonic() > end:
                raise Unavailable("the store of images is busy")
            time.sleep(0.01)
        with held:
            yield


class Work:
    """A directory in which one image comes in, and its lock: the descriptor is handed on to all who
    write there. What has been said there is read by those who wait."""

    def __init__(self, path: Path, descriptor: int, discard: Callable[[Path, int], None]) -> None:
        self.path, self.descriptor, self._discard = path, descriptor, discard
        self._said: Mapping[str, Any] = {}

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        self._discard(self.path, self.descriptor)

    def say(self, line: Mapping[str, Any]) -> None:
        if line == self._said:
            return
        self._said = line
        # On a full disk those who wait hear nothing, and try for themselves.
        with suppress(OSError), (self.path / "says").open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")


def follow(path: Path) -> Iterator[Mapping[str, Any]]:
    """What is said in a directory where somebody works, an empty line at least every TELL_S; ends
    when nobody works there any more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with _Said(descriptor) as said:
        over = False
        while not over:
            over = _is_free(descriptor)
            yield from said.lines() or ({},)
            if not over:
                time.sleep(TELL_S / 2)


class _Said:
    """What is written in `says` of a directory. Once seen, it stays open: its last line is read by
    those who waited, though the directory is gone by then."""

    def __init__(self, directory: int) -> None:
        self._directory, self._file, self._position = directory, -1, 0

    def __enter__(self) -> _Said:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._directory)
        if self._file >= 0:
            os.close(self._file)

    def lines(self) -> Sequence[Mapping[str, Any]]:
        """Those that are new."""
        if self._file < 0:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                self._file = os.open("says", flags, dir_fd=self._directory)
            except FileNotFoundError:
                return ()
        whole, newline, _ = os.pread(self._file, 1 << 20, self._position).rpartition(b"\n")
        self._position += len(whole) + len(newline)
        return [json.loads(one) for one in whole.splitlines()]


def failure(line: Mapping[str, Any]) -> HeyvmError:
    """The error that oci.py told of."""
    detail, fields = line["detail"], {line["field"]: [line["detail"]]}
    kind = line["failed"]
    if kind == "missing":
        return ImageMissing(detail, errors=fields)
    if kind == "full":
        return StorageFull(detail)
    return (
        Unavailable(detail, retry_after=10)
        if kind == "unavailable"
        else Invalid(detail, errors=fields)
    )


@contextmanager
def _worker(
    work: Work, job: Mapping[str, Any], descriptors: Sequence[int]
) -> Iterator[subprocess.Popen[bytes]]:
    """oci.py at work; on leaving, it and all that it started are gone."""
    told = json.dumps({**job, "lock": work.descriptor})
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(WORKER), told],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=work.path,
        env=_environment(),
        pass_fds=(work.descriptor, *descriptors),
        start_new_session=True,
        umask=0o022,
    )
    _let_requests_come_first(process.pid)
    try:
        yield process
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        # Its end comes when nobody is left who could write in the directory.
        while process.stdout.read(1 << 16):
            pass
        process.stdout.close()
        process.wait()


def _let_requests_come_first(pid: int) -> None:
    """From its first moment: the interpreters of fifty pulls at once are much work by themselves.
    Where sessions are scheduled as groups (sched(7), autogroups), it is the session's share."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICE)
        Path(f"/proc/{pid}/autogroup").write_text(str(NICE))


def _lines(process: subprocess.Popen[bytes]) -> Iterator[Mapping[str, Any]]:
    """What it says, an empty line at least every TELL_S, until its end."""
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    while True:
        if not waiting.poll(TELL_S * 1000):
            yield {}
            continue
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        yield from map(json.loads, lines)


def _environment() -> dict[str, str]:
    """What skopeo finds credentials, proxies and certificates by."""
    kept = {name: one for name, one in os.environ.items() if not name.startswith(KEPT_BACK)}
    kept.setdefault("HOME", os.path.expanduser("~"))
    kept["PATH"] = f"{kept.get('PATH', os.defpath)}:/usr/sbin:/usr/bin:/sbin:/bin"
    return kept


def _image(result: Mapping[str, Any], source: str) -> Image:
    config = result["config"]
    return Image(
        digest=result["digest"],
        names=(),
        size_bytes=result["size_bytes"],
        created_at=time.time(),
        source=source,
        devices=result["devices"],
        config=ImageConfig(**{**config, "command": tuple(config["command"])}),
    )


def _renamed(image: Image, name: str) -> Image:
    return replace(image, names=(name,))


def _findable(name: str) -> str:
    """As `canonical`, for what is only looked for. `NotFound`."""
    try:
        return canonical(name)
    except Invalid as wrong:
        raise NotFound(wrong.detail) from None


def _hexadecimal(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _open_archive(path: Path | str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _invalid(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _invalid(f"{path} is not a regular file")
    return descriptor


def _try_hold(path: Path) -> int | None:
    """Its lock, as an open descriptor. None: somebody has it, or the directory is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _full_disk_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise StorageFull(f"no space for an image: {error.strerror}") from error
        raise Unavailable(f"the store of images cannot be written: {error}") from error


def _invalid(detail: str) -> Invalid:
    return Invalid(detail, errors={"image": [detail]})
