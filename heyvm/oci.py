"""The process that fetches an image and unpacks it: `python -I -S -B oci.py JOB`.

The standard library alone. What it reads is hostile: skopeo moves the bytes and umoci writes the
files; what they are given is looked at first, and what they made is looked at after. It works in
its current directory, which its caller removes: `image/rootfs` is what comes of it. It says lines
of JSON on stdout: any number of `{"says": text}`, then `{"done": {...}}` or `{"failed": kind,
"detail": text, "field": name}`. It ends, with all that it has started, when its stdin ends.

A job: `op` (`pull` or `take`), `name` (for people), `known` (digests of images that are here); a
pull has `repository`, `selector` (`:tag` or `@digest`) and `plain` (TLS is not insisted on); a take
has `descriptor` (of the archive, open for reading) and `sha256` or null. `lock` is a descriptor
that everything started here keeps open.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

MIB = 1024 * 1024
GIB = 1024 * MIB
CONNECT_S = 5.0
ASK_S = 60.0
LOOK_S = 0.25
PIECE_BYTES = MIB
MAX_DOCUMENT_BYTES = 4 * MIB  # what registries and skopeo allow a manifest
MAX_LAYERS = 1000
MAX_ENTRIES = 2_000_000
MAX_HEADER_BYTES = MIB  # of a pax header or a long name; Go's archive/tar has the same
MAX_PATH_BYTES = 4096
MAX_VARIABLES = 10_000
MAX_WORDS_BYTES = MIB
MAX_WORD_BYTES = 128 * 1024 - 1  # MAX_ARG_STRLEN of the kernel
LAST_ID = 65_535
RESERVE_BYTES = 256 * MIB
RESERVE_INODES = 1024
MUST_BE_DIRECTORIES = ("dev", "proc", "sys", "tmp", "run", "etc", ".heyvm")

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
INDEX = "application/vnd.oci.image.index.v1+json"
INDEXES = (INDEX, "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = (MANIFEST, "application/vnd.docker.distribution.manifest.v2+json")
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_ZSTD = (LAYER + "+zstd", DOCKER_LAYER + ".zstd")
LAYERS = (LAYER, LAYER + "+gzip", DOCKER_LAYER, DOCKER_LAYER + ".gzip", *_ZSTD)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "i686": "386",
    "riscv64": "riscv64",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
}
ARCHITECTURE = ARCHITECTURES.get(platform.machine(), platform.machine())
HUB = "docker.io"
HUB_HOST = "registry-1.docker.io"

Json = Mapping[str, Any]


class Refused(Exception):
    """Why there will be no image. `kind`: missing, invalid, full or unavailable."""

    def __init__(self, kind: str, detail: str, field: str = "image") -> None:
        super().__init__(detail)
        self.kind, self.detail, self.field = kind, detail, field


def invalid(detail: str) -> Refused:
    return Refused("invalid", detail)


def main(text: str) -> int:
    job = json.loads(text)
    KEPT.extend((job["lock"], os.dup(1)))
    threading.Thread(target=end_with_caller, daemon=True).start()
    try:
        tell(done=pull(job) if job["op"] == "pull" else take(job))
    except Refused as why:
        tell(failed=why.kind, detail=why.detail, field=why.field)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            tell(failed="full", detail=f"no space for image {job['name']}: {error.strerror}")
        else:
            tell(failed="invalid", detail=f"image {job['name']} cannot be unpacked: {error}")
    # Whatever a hostile image brings about must end as an answer.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        tell(failed="invalid", detail=f"image {job['name']} cannot be read: {error!r:.300}")
    return 0


def end_with_caller() -> None:
    """Nobody waits for what comes of a pull whose caller has died."""
    while os.read(0, 64):
        pass
    os.killpg(0, signal.SIGKILL)


def tell(**line: Any) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


# -- pull ------------------------------------------------------------------------------------------


def pull(job: Json) -> dict[str, Any]:
    demand("skopeo", "umoci")
    tell(says=f"pulling {job['name']}")
    reach(job["repository"].partition("/")[0], plain=job["plain"])
    digest, manifest = choose(job)
    config = manifest["config"]["digest"]
    if config in job["known"]:
        return {"digest": config, "known": True, "source": digest}
    copy(job, digest, manifest)
    return {**unpacked(job), "source": digest}


def reach(host: str, *, plain: bool) -> None:
    """`missing` unless somebody listens there within CONNECT_S: skopeo has more patience."""
    address = HUB_HOST if host == HUB else host
    if is_redirected(host):
        return
    proxy = urllib.request.getproxies().get("https")
    if proxy and not urllib.request.proxy_bypass(address):
        address = proxy.partition("://")[2].rstrip("/").rpartition("@")[2] or proxy
    failures: list[str] = []
    done = threading.Event()
    look = threading.Thread(target=_connect, args=(address, plain, failures, done), daemon=True)
    look.start()
    if not done.wait(CONNECT_S):
        failures.append(f"no answer within {CONNECT_S:g} s")
    if failures:
        raise Refused("missing", f"registry {host} cannot be reached: {failures[0]}")


def is_redirected(host: str) -> bool:
    """Whether containers-registries.conf(5) has a place of its own for it; skopeo knows better."""
    home = os.path.expanduser("~/.config/containers")
    places = [Path(top, "registries.conf") for top in ("/etc/containers", home)]
    places += [one for place in places for one in Path(f"{place}.d").glob("*.conf")]
    texts = [place.read_text(errors="replace") for place in places if place.is_file()]
    pattern = re.compile(rf'^\s*(prefix|location)\s*=\s*"([^"]*\*\.|{re.escape(host)}["/])', re.M)
    return any(pattern.search(text) for text in texts)


def _connect(address: str, plain: bool, failures: list[str], done: threading.Event) -> None:
    found = re.fullmatch(r"\[?([^\]]*?)\]?(?::([0-9]+))?", address)
    host, port = (found[1], found[2]) if found else (address, None)
    ports = [int(port)] if port else [443, 80] if plain else [443]
    wrong = ""
    for one in ports:
        try:
            socket.create_connection((host, one), timeout=CONNECT_S).close()
        except (OSError, ValueError, OverflowError) as error:
            wrong = getattr(error, "strerror", None) or str(error)
        else:
            done.set()
            return
    failures.append(wrong)
    done.set()


def choose(job: Json) -> tuple[str, Json]:
    """The manifest for this machine, and its digest: what is pulled does not change any more."""
    digest, manifest = ask(job, job["selector"])
    if not is_index(manifest):
        return digest, checked(manifest)
    tell(says=f"pulling {job['name']}: looking for {ARCHITECTURE}")
    digest, manifest = ask(job, "@" + for_this_machine(manifest))
    return digest, checked(manifest)


def is_index(manifest: Json) -> bool:
    return manifest.get("mediaType") in INDEXES or (
        "manifests" in manifest and "layers" not in manifest
    )


def ask(job: Json, selector: str) -> tuple[str, Json]:
    """One manifest by tag or digest; what comes by digest has it."""
    told = ["inspect", "--raw", "--retry-times=0", f"--tls-verify={truth(not job['plain'])}"]
    command = skopeo(*told, f"docker://{job['repository']}{selector}")
    raw = run(job, command, Seconds(ASK_S), output=MAX_DOCUMENT_BYTES)
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    if selector.startswith("@") and selector[1:] != digest:
        raise invalid(f"the registry sent {digest} for {job['name']}, not {selector[1:]}")
    return digest, parsed(raw, "manifest")


def for_this_machine(index: Json) -> str:
    """The digest of the image for this machine among those that an index names."""
    offered = []
    for one in objects(index.get("manifests"), "manifests"):
        where = one.get("platform")
        where = where if isinstance(where, dict) else {}
        offered.append((str(where.get("os")), str(where.get("architecture"))))
        if offered[-1] == ("linux", ARCHITECTURE) and where.get("variant") in (None, "", "v8"):
            return digest_of(one)
    listed = ", ".join(f"{system}/{machine}"[:40] for system, machine in offered[:20])
    raise invalid(f"there is no image for linux/{ARCHITECTURE} under this name; for: {listed}")


def checked(manifest: Json) -> Json:
    """The manifest, provided that all that it names is what we fetch, from this registry alone."""
    if manifest.get("schemaVersion") != 2 or manifest.get("mediaType", MANIFEST) not in MANIFESTS:
        raise invalid("the image's manifest is of a kind that is not read here (or very old)")
    layers = objects(manifest.get("layers"), "layers")
    if len(layers) > MAX_LAYERS:
        raise invalid(f"the image has more than {MAX_LAYERS} layers")
    config = manifest.get("config")
    for one in (*layers, *objects([config], "config")):
        digest_of(one)
        if not is_size(one.get("size")):
            raise invalid("the image's manifest has a size that is none")
        if one.get("urls"):
            raise invalid("the image has a layer that lies at another address: nobody fetches it")
    for one in layers:
        if one.get("mediaType") not in LAYERS:
            raise invalid(f"the image has a layer of an unknown kind: {one.get('mediaType')!r:.99}")
    if config is None or config["size"] > MAX_DOCUMENT_BYTES:
        raise invalid("the image's config is too large")
    return manifest


def copy(job: Json, digest: str, manifest: Json) -> None:
    """Fetch what a checked manifest names into `layout`. (To `oci:`, skopeo would write Docker's
    configs anew: the digest that an image is known by would change.)"""
    layers = {one["digest"]: one["size"] for one in manifest["layers"]}
    told = ["copy", "--quiet", "--retry-times=0", "--remove-signatures"]
    told.append(f"--src-tls-verify={truth(not job['plain'])}")
    total = sum(layers.values())
    if total > room():
        raise full(job, total)
    watch = Copying(job["name"], len(layers), total)
    source = f"docker://{job['repository']}@{digest}"
    os.makedirs("layout/blobs")
    run(job, skopeo(*told, source, "dir:layout/blobs/sha256"), watch)
    finish(manifest)


@dataclass
class Copying:
    """Says how far a copy is, and ends one that brings more than was announced."""

    name: str
    layers: int
    total: int

    def __call__(self) -> None:
        sizes = {one.name: size_of(one) for one in Path("layout").rglob("*")}
        done = sum(1 for name in sizes if re.fullmatch("[0-9a-f]{64}", name))
        here = sum(sizes.values())
        if here > self.total + 8 * MIB:
            raise invalid(f"the registry sends more than the {self.total} bytes that it announced")
        number = min(done + 1, self.layers)
        far = f"{min(here, self.total) // MIB} of {-(-self.total // MIB)} MiB"
        tell(says=f"pulling {self.name}: layer {number} of {self.layers}, {far}")


@dataclass
class Seconds:
    """Ends what takes longer."""

    limit: float
    began: float = field(default_factory=time.monotonic)

    def __call__(self) -> None:
        if time.monotonic() - self.began > self.limit:
            raise Refused("missing", f"the registry did not answer within {self.limit:g} s")


# -- take ------------------------------------------------------------------------------------------


def take(job: Json) -> dict[str, Any]:
    demand("skopeo", "umoci")
    archive = Path("archive.tar")
    digest = read_in(job, archive)
    kind = kind_of(archive)
    if kind == "rootfs":
        wrap(archive, digest)
    elif kind == "docker":
        source = "docker-archive:archive.tar"
        os.makedirs("layout/blobs")
        run(job, skopeo("copy", "--quiet", source, "dir:layout/blobs/sha256"), room_left)
        finish(checked(parsed((blobs() / "manifest.json").read_bytes(), "manifest")))
    else:
        take_layout(archive)
    return {**unpacked(job), "source": {"rootfs": "tar", "docker": "docker save"}.get(kind, "OCI")}


def read_in(job: Json, archive: Path) -> str:
    """Copy the archive here, unpacked once: nobody can change it any more. Its tar's digest."""
    plain, seen = hashlib.sha256(), 0
    with open(job["descriptor"], "rb", closefd=False) as file, archive.open("wb") as sink:
        demand_sum(job, file)
        for piece in decompressed(file):
            plain.update(piece)
            seen += sink.write(piece)
            room_left()
            tell_now_and_then(f"reading {job['name']}: {seen // MIB} MiB")
    return f"sha256:{plain.hexdigest()}"


def demand_sum(job: Json, file: IO[bytes]) -> None:
    if job["sha256"] is None:
        return
    found = hashlib.sha256()
    for piece in pieces_of(file):
        found.update(piece)
        tell_now_and_then(f"reading {job['name']}: checking its sha256")
    if found.hexdigest() != job["sha256"]:
        detail = f"the bytes have the sha256 {found.hexdigest()}, not {job['sha256']}"
        raise Refused("invalid", detail, "sha256")


def kind_of(archive: Path) -> str:
    """`rootfs`, `docker` or `oci`, told by what lies at the top."""
    tops, names, empty = set[bytes](), set[bytes](), True
    with archive.open("rb") as file:
        for one in members(Stream(pieces_of(file))):
            tops |= {one.name.partition(b"/")[0]} & TOPS
            names |= {one.name} & MARKS
            empty = False
    if empty:
        raise invalid("the archive holds nothing, or is none")
    if tops or not names:
        return "rootfs"
    return "docker" if b"manifest.json" in names else "oci"


TOPS = {b"bin", b"etc", b"usr", b"lib", b"sbin"}
MARKS = {b"manifest.json", b"index.json", b"oci-layout"}


def wrap(archive: Path, digest: str) -> None:
    """A layout around a root file system; the same bytes make the same image."""
    config = {
        "architecture": ARCHITECTURE,
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    }
    blobs().mkdir(parents=True)
    archive.rename(blobs() / digest.removeprefix("sha256:"))
    size = size_of(blobs() / digest.removeprefix("sha256:"))
    layer = {"mediaType": LAYER, "digest": digest, "size": size}
    raw = json.dumps(config).encode()
    finish({"schemaVersion": 2, "config": put(raw, CONFIG), "layers": [layer]})


def take_layout(archive: Path) -> None:
    """Write out the blobs of an OCI archive, each under the digest that it really has."""
    blobs().mkdir(parents=True)
    index = b""
    with archive.open("rb") as file:
        stream = Stream(pieces_of(file))
        for one in members(stream):
            if one.name == b"index.json" and one.size <= MAX_DOCUMENT_BYTES:
                index = stream.read(one.size)
            elif re.fullmatch(rb"blobs/sha256/[0-9a-f]{64}", one.name) and one.kind in REGULAR:
                save(stream, one)
    offered = objects(parsed(index, "index").get("manifests"), "manifests")
    if len(offered) != 1:
        raise invalid(f"the archive holds {len(offered)} images: one at a time")
    manifest = parsed(document(digest_of(offered[0])), "manifest")
    if is_index(manifest):
        manifest = parsed(document(for_this_machine(manifest)), "manifest")
    finish(checked(manifest))


def save(stream: Stream, member: Member) -> None:
    name, found, left = member.name.decode().rpartition("/")[2], hashlib.sha256(), member.size
    with (blobs() / name).open("wb") as sink:
        while left:
            piece = stream.read(min(left, PIECE_BYTES))
            found.update(piece)
            sink.write(piece)
            left -= len(piece)
            room_left()
    if found.hexdigest() != name:
        raise invalid(f"the archive is corrupt: blob {name} has the digest {found.hexdigest()}")


# -- a layout --------------------------------------------------------------------------------------


def blobs() -> Path:
    return Path("layout/blobs/sha256")


def blob(digest: str) -> Path:
    path = blobs() / digest.removeprefix("sha256:")
    if not path.is_file() or path.is_symlink():
        raise invalid(f"the image is not whole: {digest} is missing")
    return path


def document(digest: str) -> bytes:
    """A small blob; it has its digest."""
    with blob(digest).open("rb") as file:
        raw = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(raw) > MAX_DOCUMENT_BYTES or f"sha256:{hashlib.sha256(raw).hexdigest()}" != digest:
        raise invalid(f"the image is corrupt: {digest} is not what it says")
    return raw


def put(raw: bytes, media_type: str) -> dict[str, Any]:
    digest = hashlib.sha256(raw).hexdigest()
    (blobs() / digest).write_bytes(raw)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(raw)}


def finish(manifest: Json) -> None:
    """Make `manifest` the layout's only image."""
    described = put(json.dumps({**manifest, "mediaType": MANIFEST}).encode(), MANIFEST)
    described["annotations"] = {"org.opencontainers.image.ref.name": "image"}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [described]}
    Path("layout/index.json").write_text(json.dumps(index))
    Path("layout/oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def read_layout() -> Json:
    """The manifest of the layout's only image."""
    raw = Path("layout/index.json").read_bytes()
    described = objects(parsed(raw, "index").get("manifests"), "manifests")
    return checked(parsed(document(digest_of(described[0])), "manifest"))


def readable(manifest: Json) -> Json:
    """The same with layers that umoci reads, and with what they are in truth: what `docker save`
    calls compressed is not."""
    digest = manifest["config"]["digest"]
    config = {"mediaType": CONFIG, "digest": digest, "size": size_of(blob(digest))}
    layers = [_readable(one) for one in manifest["layers"]]
    return {"schemaVersion": 2, "config": config, "layers": layers}


def _readable(layer: Json) -> Json:
    path = blob(layer["digest"])
    with path.open("rb") as file:
        magic = file.read(4)
        if magic == ZSTD_MAGIC:
            return _plain(file)
    packing = "+gzip" if magic.startswith(b"\x1f\x8b") else ""
    return {"mediaType": LAYER + packing, "digest": layer["digest"], "size": size_of(path)}


def _plain(file: IO[bytes]) -> Json:
    found, size, fresh = hashlib.sha256(), 0, blobs() / "fresh"
    with fresh.open("wb") as sink:
        for piece in decompressed(file):
            found.update(piece)
            size += sink.write(piece)
            room_left()
    fresh.rename(blobs() / found.hexdigest())
    return {"mediaType": LAYER, "digest": f"sha256:{found.hexdigest()}", "size": size}


# -- unpack ----------------------------------------------------------------------------------------


def unpacked(job: Json) -> dict[str, Any]:
    """Unpack `layout` into `image/rootfs`; what the store says of it."""
    manifest = readable(read_layout())
    finish(manifest)
    digest = manifest["config"]["digest"]
    whole = parsed(document(digest), "config")
    config = configuration(whole)
    if digest in job["known"]:
        return {"digest": digest, "known": True}
    contents = Contents()
    for number, layer in enumerate(manifest["layers"], 1):
        tell(
            says=f"unpacking {job['name']}: looking at layer {number} of {len(manifest['layers'])}"
        )
        look_at(job, blob(layer["digest"]), contents)
    tell(says=f"unpacking {job['name']}: {contents.size // MIB} MiB, {contents.count} files")
    os.mkdir("image", 0o700)
    rootless = ["--rootless"] if os.geteuid() else []
    run(
        job,
        ["umoci", "raw", "unpack", *rootless, "--image", "layout:image", "image/rootfs"],
        room_left,
    )
    found = survey(contents)
    demand_directories()
    run(job, ["sync", "--file-system", "image/rootfs"], lambda: None)
    if contents.foreign:
        tell(
            says=f"{job['name']}: {contents.foreign} files belong to ids above {LAST_ID}: nobody's"
        )
    return {"digest": digest, "config": config, **found}


@dataclass
class Contents:
    """What the layers' headers say, all layers together."""

    count: int = 0
    size: int = 0
    foreign: int = 0
    devices: set[bytes] = field(default_factory=set)


def look_at(job: Json, layer: Path, contents: Contents) -> None:
    """Refuse a layer that is not to be unpacked; count what it brings."""
    most, inodes = room(), inodes_left()
    with layer.open("rb") as file:
        stream = Stream(decompressed(file))
        for one in members(stream):
            check_name(one)
            contents.count += 1
            contents.size += one.real_size
            contents.foreign += not (0 <= one.uid <= LAST_ID and 0 <= one.gid <= LAST_ID)
            is_device = one.kind in DEVICES or (one.kind == b"1" and one.target in contents.devices)
            (contents.devices.add if is_device else contents.devices.discard)(one.name)
            if contents.count > min(MAX_ENTRIES, inodes):
                raise _too_many(job, inodes)
            if contents.size > most:
                raise full(job, contents.size)
            tell_now_and_then(f"unpacking {job['name']}: looked at {contents.count} files")
        # umoci reads what stands behind the end as well, to see the digest.
        while not stream.ended():
            stream.skip_piece()
            if stream.position > most + GIB:
                raise invalid("a layer has more behind its end than in it")


def _too_many(job: Json, inodes: int) -> Refused:
    if inodes < MAX_ENTRIES:
        return Refused("full", f"no space for the files of image {job['name']}: too few inodes")
    return invalid(f"image {job['name']} has more than {MAX_ENTRIES} files")


def check_name(one: Member) -> None:
    """A name, or the target of a hard link, that is absolute or climbs is refused."""
    _check_path(one.given, one.name)
    if one.kind == b"1":
        _check_path(one.target_given, one.target)
    last = one.name.rpartition(b"/")[2]
    if last.startswith(b".wh.") and last[4:] in (b"", b".", b".."):
        raise invalid(f"a layer removes {_shown(one.given)}, which is no file of its")


def _check_path(given: bytes, name: bytes) -> None:
    if given.startswith(b"/"):
        raise invalid(f"a layer has the absolute name {_shown(given)}")
    if b".." in name.split(b"/"):
        raise invalid(f"a layer has a name with `..`: {_shown(given)}")
    if b"\0" in name or len(given) > MAX_PATH_BYTES:
        raise invalid(f"a layer has a name that is none: {_shown(given)}")


def _shown(name: bytes) -> str:
    return ascii(os.fsdecode(name[:200]))


def survey(contents: Contents) -> dict[str, int]:
    """Take the devices and the host's own attributes out of `image/rootfs`; count and measure."""
    os.chmod("image/rootfs", 0o755)
    devices, size, linked, pending = 0, 0, set(), [b"image/rootfs"]
    while pending:
        top = pending.pop()
        with contextlib.suppress(PermissionError), os.scandir(top) as entries:
            for entry in entries:
                found = entry.stat(follow_symlinks=False)
                if is_device(found, entry.path, contents):
                    os.unlink(entry.path)
                    devices += 1
                    continue
                strip(entry.path)
                if found.st_nlink == 1 or stat.S_ISDIR(found.st_mode) or found.st_ino not in linked:
                    size += found.st_blocks * 512
                    linked.add(found.st_ino)
                if stat.S_ISDIR(found.st_mode):
                    pending.append(entry.path)
        tell_now_and_then("")
    return {"devices": devices, "size_bytes": size}


def is_device(found: os.stat_result, path: bytes, contents: Contents) -> bool:
    """An ordinary user's umoci writes an empty file for each."""
    if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        return True
    name = path.removeprefix(b"image/rootfs/")
    return name in contents.devices and stat.S_ISREG(found.st_mode) and not found.st_size


def strip(path: bytes) -> None:
    """What means something to an overlay of the host's, or to its security modules, is not the
    image's to say; a capability counts only inside."""
    for name in os.listxattr(path, follow_symlinks=False):
        if name.startswith(("trusted.", "security.", "user.overlay.")):
            if name != "security.capability":
                os.removexattr(path, name, follow_symlinks=False)


def demand_directories() -> None:
    for name in MUST_BE_DIRECTORIES:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(f"image/rootfs/{name}").st_mode):
                raise invalid(f"/{name} of the image is not a directory: it cannot be run safely")


# -- config ----------------------------------------------------------------------------------------


def configuration(whole: Json) -> dict[str, Any]:
    """What an image says of how it is run, in the shape of models.ImageConfig."""
    system, machine = whole.get("os") or "linux", whole.get("architecture") or ARCHITECTURE
    if (system, machine) != ("linux", ARCHITECTURE):
        told = f"{system}/{machine}"[:60]
        raise invalid(f"the image is for {told}, this machine is linux/{ARCHITECTURE}")
    config = whole.get("config")
    if not isinstance(config, dict | None):
        raise invalid("the image's config is not an object")
    config = config or {}
    variables = [one.partition("=") for one in words(config, "Env")]
    directory = word(config.get("WorkingDir"), "WorkingDir")
    return {
        # As docker does: what is no NAME=VALUE sets nothing.
        "env": {name: value for name, equals, value in variables if name and equals},
        "working_directory": "/" + directory.strip("/") if directory else None,
        "user": word(config.get("User"), "User"),
        "command": words(config, "Entrypoint") + words(config, "Cmd"),
    }


def words(config: Json, name: str) -> list[str]:
    found = config.get(name)
    if found is None:
        return []
    if not isinstance(found, list) or len(found) > MAX_VARIABLES:
        raise invalid(f"the image's {name} is no list, or a very long one")
    listed = [word(one, name) for one in found]
    if sum(map(len, listed)) > MAX_WORDS_BYTES:
        raise invalid(f"the image's {name} is too long")
    return listed


def word(found: Any, name: str) -> str:
    if found is None:
        return ""
    if not isinstance(found, str) or len(found) > MAX_WORD_BYTES:
        raise invalid(f"the image's {name} holds something that is no text, or a very long one")
    if "\0" in found or any("\ud800" <= letter <= "\udfff" for letter in found):
        raise invalid(f"the image's {name} holds a letter that cannot be passed on")
    if name in ("User", "WorkingDir") and (len(found) > MAX_PATH_BYTES or not found.isprintable()):
        raise invalid(f"the image's {name} is {found!r:.99}, which is none")
    return found


# -- documents -------------------------------------------------------------------------------------


def parsed(raw: bytes, what: str) -> Json:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise invalid(f"the image's {what} is not JSON") from None
    if not isinstance(found, dict):
        raise invalid(f"the image's {what} is not an object")
    return found


def objects(found: Any, what: str) -> list[Json]:
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise invalid(f"the image's {what} is not what it must be")
    return found


def digest_of(described: Json) -> str:
    digest = described.get("digest")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise invalid(f"the image names something by {digest!r:.99}, which is no sha256 digest")
    return digest


def is_size(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 1 << 60


# -- tar -------------------------------------------------------------------------------------------

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")
DEVICES = (b"3", b"4")
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")


@dataclass(frozen=True)
class Member:
    """One entry. `given` is its name as it stands there, `name` without `./` and last slashes.
    `size` is what the archive holds of it, `real_size` what it has when unpacked."""

    given: bytes
    kind: bytes
    size: int
    real_size: int
    target_given: bytes = b""
    uid: int = 0
    gid: int = 0

    @property
    def name(self) -> bytes:
        return _clean(self.given)

    @property
    def target(self) -> bytes:
        return _clean(self.target_given)


def _clean(given: bytes) -> bytes:
    return b"/".join(part for part in given.split(b"/") if part not in (b"", b"."))


class Stream:
    """Bytes that come in pieces, read in order."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""
        self.position = 0

    def read(self, size: int) -> bytes:
        """Exactly that many."""
        return b"".join(self._read(size))

    def skip(self, size: int) -> None:
        for _ in self._read(size):
            pass

    def skip_piece(self) -> None:
        self.position += len(self._rest)
        self._rest = b""

    def ended(self) -> bool:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return True
            self._rest = piece
        return False

    def _read(self, size: int) -> Iterator[bytes]:
        self.position += size
        while size:
            if self.ended():
                raise invalid("the archive ends in the middle, or is no tar")
            piece, self._rest = self._rest[:size], self._rest[size:]
            size -= len(piece)
            yield piece


def members(stream: Stream) -> Iterator[Member]:
    """The entries of a tar. What the caller leaves of an entry's content is skipped."""
    told: dict[bytes, bytes] = {}
    while not stream.ended():
        header = stream.read(BLOCK)
        if not header.strip(b"\0"):
            return
        demand_checksum(header)
        kind, size = header[156:157], number(header[124:136])
        if kind in (b"x", b"g", b"L", b"K"):
            if size > MAX_HEADER_BYTES:
                raise invalid("a layer has a header that is too large")
            content = stream.read(padded(size))[:size]
            if kind == b"x":
                told |= dict(pax_records(content))
            elif kind != b"g":  # which says nothing that matters here
                told[b"path" if kind == b"L" else b"linkpath"] = content.rstrip(b"\0")
            continue
        member = member_of(header, kind, told, stream)
        told = {}
        end = stream.position + padded(member.size)
        yield member
        stream.skip(end - stream.position)


def member_of(header: bytes, kind: bytes, told: Mapping[bytes, bytes], stream: Stream) -> Member:
    size = decimal(told.get(b"size"), number(header[124:136]))
    real = decimal(told.get(b"GNU.sparse.realsize", told.get(b"GNU.sparse.size")), size)
    if kind == b"S":  # GNU's old form of sparse files: more headers may follow
        real, more = number(header[483:495]), header[482:483]
        while more not in (b"", b"\0"):
            more = stream.read(BLOCK)[504:505]
    if kind in WITHOUT_CONTENT:
        size = real = 0
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345:346] != b"\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return Member(
        given=told.get(b"GNU.sparse.name", told.get(b"path", name)),
        kind=kind,
        size=size,
        real_size=real,
        target_given=told.get(b"linkpath", header[157:257].partition(b"\0")[0]),
        uid=decimal(told.get(b"uid"), number(header[108:116])),
        gid=decimal(told.get(b"gid"), number(header[116:124])),
    )


def demand_checksum(header: bytes) -> None:
    if not re.fullmatch(rb"[ \0]*[0-7]+[ \0]*", header[148:156]) or (
        sum(header[:148]) + 8 * 32 + sum(header[156:]) != number(header[148:156])
    ):
        raise invalid("what should be a tar is none, or corrupt")


def number(text: bytes) -> int:
    """A field of a header: octal, or base 256 where its first bit is set."""
    if text[0] & 0x80:
        found = int.from_bytes(bytes([text[0] & 0x7F]) + text[1:], "big")
        if text[0] & 0x40 or found >= 1 << 62:
            raise invalid("a layer has a number that is none")
        return found
    try:
        return int(text.strip(b" \0") or b"0", 8)
    except ValueError:
        raise invalid("a layer has a number that is none") from None


def decimal(text: bytes | None, otherwise: int) -> int:
    if text is None:
        return otherwise
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise invalid("a layer has a number that is none")
    return int(text)


def pax_records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    while content:
        length, _, _ = content[:20].partition(b" ")
        size = decimal(length, 0)
        record = content[len(length) + 1 : size]
        if size <= len(length) or size > len(content) or not record.endswith(b"\n"):
            raise invalid("a layer has a header that cannot be read")
        name, _, value = record[:-1].partition(b"=")
        yield name, value
        content = content[size:]


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def decompressed(file: IO[bytes]) -> Iterator[bytes]:
    """What a file holds, from its start, without what it is compressed with."""
    first = os.pread(file.fileno(), 8, 0)
    file.seek(0)
    os.lseek(file.fileno(), 0, os.SEEK_SET)  # what has been buffered is no concern of a child's
    for magic, tool in TOOLS.items():
        if first.startswith(magic):
            return filtered(file, tool)
    return pieces_of(file)


def pieces_of(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(PIECE_BYTES), b"")


def filtered(file: IO[bytes], tool: str) -> Iterator[bytes]:
    demand(tool)
    command = [*TIED, tool, "-dc"]
    with subprocess.Popen(
        command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=KEPT
    ) as process:
        try:
            assert process.stdout is not None
            yield from pieces_of(process.stdout)
            if process.wait() not in (0, 2):  # 2: a warning
                raise invalid(f"the compressed data is corrupt, says {tool}")
        finally:
            process.kill()


ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
TOOLS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", ZSTD_MAGIC: "zstd"}
PACKAGES = {"xz": "xz-utils"}


# -- processes and space ---------------------------------------------------------------------------

# Dies with this process. (It cannot be said of a thread: none but the first one starts any.)
TIED = ("setpriv", "--pdeathsig", "KILL")
# What everything started here keeps open: the lock of the directory, and our stdout, whose end
# tells the caller that nobody writes here any more. Filled once, by main().
KEPT: list[int] = []
SAID = re.compile(r'msg="((?:[^"\\]|\\.)*)"')


def run(
    job: Json, command: Sequence[str], watch: Callable[[], None], *, output: int = MIB
) -> bytes:
    """Its stdout. `watch` is called four times a second; what it raises ends the command."""
    with open("stdout", "w+b") as out, open("stderr", "w+b") as err:
        with subprocess.Popen(
            [*TIED, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=err, pass_fds=KEPT
        ) as process:
            try:
                while process.poll() is None:
                    wait_for(process)
                    watch()
                    room_left()
                    if size_of(Path("stdout")) > output or size_of(Path("stderr")) > MIB:
                        raise invalid(f"{command[0]} says more than can be: is it a registry?")
            finally:
                process.kill()
        if process.returncode == 0:
            out.seek(0)
            return out.read()
        err.seek(0)
        raise failure(job, command, err.read(MIB).decode(errors="replace"), process.returncode)


def wait_for(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LOOK_S)


def skopeo(command: str, *arguments: str) -> list[str]:
    # skopeo refuses to work where nobody has written down what may be trusted.
    places = ("/etc/containers/policy.json", "~/.config/containers/policy.json")
    policy = any(os.path.exists(os.path.expanduser(place)) for place in places)
    return ["skopeo", *([] if policy else ["--insecure-policy"]), "--tmpdir=.", command, *arguments]


def failure(job: Json, command: Sequence[str], text: str, code: int) -> Refused:
    """What a command's own words mean."""
    said = SAID.findall(text) or [text]
    words = re.sub(r'\\(["\\])', r"\1", said[-1]).replace("\\n", " ").replace("\\t", " ")
    words = re.sub(r'^(Error|FATA)\S* parsing image name "[^"]*": ', "", words)
    words = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    words = words[:500] or f"{command[0]} ended with {code}"
    detail = f"image {job['name']}: {words}"
    if "no space left on device" in words or "disk quota exceeded" in words:
        return Refused("full", detail)
    if code < 0:
        return Refused("unavailable", f"{detail} (killed by signal {-code})")
    if command[0] != "skopeo" or job["op"] != "pull":
        return invalid(detail)
    for kind, pattern in SAYINGS:
        if re.search(pattern, words, re.I):
            return Refused(kind, detail)
    if job["repository"].startswith(HUB + "/") and re.search(HUBS_NO, words, re.I):
        return Refused("missing", detail)
    return invalid(detail)


# What skopeo (containers/image) says, in the order in which it counts.
SAYINGS = (
    ("invalid", r"did not match|corrupt"),
    ("invalid", r"x509|tls: |gave HTTP response to HTTPS"),
    ("invalid", r"incorrect username or password|unable to retrieve auth token|invalid username"),
    ("missing", r"manifest unknown|name unknown|repository name not known|not found|status 404"),
    ("missing", r"no such host|connection refused|no route to host|network is unreachable"),
    ("missing", r"i/o timeout|deadline exceeded|TLS handshake timeout|server misbehaving"),
    ("unavailable", r"toomanyrequests|too many requests|status(?: code)?:? (?:429|5[0-9][0-9])"),
    ("unavailable", r"connection reset|unexpected EOF|broken pipe|: EOF"),
)
# The hub says the same of what does not exist and of what one may not see.
HUBS_NO = r"requested access to the resource is denied|authentication required"


def demand(*commands: str) -> None:
    missing = [one for one in commands if shutil.which(one) is None]
    if missing:
        packages = " ".join(PACKAGES.get(one, one) for one in missing)
        raise Refused(
            "unavailable",
            f"{' and '.join(missing)} not installed; on Debian and Ubuntu: apt install {packages}",
        )


def room() -> int:
    """Bytes that may be written here: some stay free for everybody else."""
    found = os.statvfs(".")
    reserve = min(RESERVE_BYTES, found.f_blocks * found.f_frsize // 20)
    return found.f_bavail * found.f_frsize - reserve


def inodes_left() -> int:
    """File systems that make them as they are needed say 0 of 0."""
    found = os.statvfs(".")
    return found.f_favail - RESERVE_INODES if found.f_files else MAX_ENTRIES


def room_left() -> None:
    if room() < 0 or inodes_left() < 0:
        raise Refused("full", "the disk that images are kept on is almost full: free some space")


def full(job: Json, size: int) -> Refused:
    detail = f"image {job['name']} takes {size // MIB + 1} MiB or more"
    return Refused("full", f"{detail}, there is space for {max(room(), 0) // MIB} MiB")


def size_of(path: Path) -> int:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def truth(value: bool) -> str:
    return str(value).lower()


class _Pace:
    """Lets something happen no more often than every LOOK_S."""

    def __init__(self) -> None:
        self._due = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._due:
            return False
        self._due = now + LOOK_S
        return True


PACE = _Pace()


def tell_now_and_then(text: str) -> None:
    if PACE():
        tell(says=text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
