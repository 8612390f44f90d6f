"""Images for tests, and a registry that serves them: real ones, with no docker and no other machine
but the one that apt packages come from.

    with ImageRegistry() as registry:                       # or the fixture `image_registry`
        name = registry.push(debian(), "debian:12")         # '127.0.0.1:PORT/debian:12'
        name = registry.push(tiny(), "tiny")                # busybox and nothing else, 2 MB
        layout = write_layout(tmp_path / "my", [layer(file("hello", b"hi"), link("l", "hello"))],
                              {"Env": ["A=1"], "User": "app", "WorkingDir": "/srv", "Cmd": ["sh"]})
        name = registry.push(layout, "mine:1")
        name = registry.push(derived(debian(), tmp_path / "d", layer(...), {"Env": [...]}), "d")

A *layout* is a directory with an image in OCI layout (`oci:DIRECTORY:latest` for skopeo).
`debian()` and `tiny()` are made once per machine and kept in CACHE; any number may ask at once.
`debian()` has the machine's own apt sources, so that apt-get works in it: minbase, root alone.
`tiny()` has `/bin/busybox` with all its names, `/etc/{passwd,group}` with a user `app` (1000),
`/root`, `/tmp`, `/home/app`; no `/dev`, `/proc`, `/sys`, `/run`, `/usr`. Needs the packages
docker-registry, mmdebstrap, busybox-static and apache2-utils.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import requests

from tests.server import free_port, wait_until

CACHE = Path(f"/var/tmp/heyvm-test-images-{os.geteuid()}")
RECIPE = "1"  # change it where what is kept in CACHE is made in another way
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "amd64")
Json = dict[str, Any]
Entry = tuple[tarfile.TarInfo, bytes]


# -- layers ----------------------------------------------------------------------------------------


def entry(name: str, kind: bytes, data: bytes = b"", **attributes: Any) -> Entry:
    """One member of a tar; `attributes` are tarfile.TarInfo's (mode, uid, gid, pax_headers...)."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mtime = kind, len(data), 1_700_000_000
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, data


def file(name: str, data: bytes = b"", **attributes: Any) -> Entry:
    return entry(name, tarfile.REGTYPE, data, **attributes)


def directory(name: str, **attributes: Any) -> Entry:
    return entry(name, tarfile.DIRTYPE, **{"mode": 0o755, **attributes})


def link(name: str, target: str, **attributes: Any) -> Entry:
    return entry(name, tarfile.SYMTYPE, linkname=target, **{"mode": 0o777, **attributes})


def hard_link(name: str, target: str) -> Entry:
    return entry(name, tarfile.LNKTYPE, linkname=target)


def device(name: str, major: int = 1, minor: int = 3) -> Entry:
    return entry(name, tarfile.CHRTYPE, devmajor=major, devminor=minor, mode=0o666)


def tar_of(*entries: Entry) -> bytes:
    """A tar with these members, just as they are."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return made.getvalue()


def layer(*entries: Entry) -> bytes:
    """The same as a layer: with gzip around it."""
    return gzip.compress(tar_of(*entries), 1, mtime=0)


# -- layouts ---------------------------------------------------------------------------------------


def write_layout(
    directory: Path,
    layers: Sequence[bytes | Path],
    config: Mapping[str, Any] | None = None,
    *,
    media_type: str = LAYER + "+gzip",
    **whole: Any,
) -> Path:
    """An image in OCI layout, of layers that are gzipped tars. `config` is its `config` (Env, User,
    WorkingDir, Entrypoint, Cmd); `whole` replaces members of the document that it stands in."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)
    described = [_put(blobs, one, media_type) for one in layers]
    document = {
        "architecture": ARCHITECTURE,
        "os": "linux",
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [_diff_id(one) for one in layers]},
        **whole,
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _put(blobs, json.dumps(document).encode(), CONFIG),
        "layers": described,
    }
    return finish_layout(directory, manifest)


def finish_layout(directory: Path, manifest: Json) -> Path:
    """Write `manifest` and what leads to it; a second time, it takes the first one's place."""
    described = _put(directory / "blobs/sha256", json.dumps(manifest).encode(), MANIFEST)
    described["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [described]}
    (directory / "index.json").write_text(json.dumps(index))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return directory


def manifest_of(layout: Path) -> Json:
    described = json.loads((layout / "index.json").read_text())["manifests"][0]
    return json_blob(layout, described["digest"])


def json_blob(layout: Path, digest: str) -> Json:
    return dict(json.loads(blob(layout, digest).read_bytes()))


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def derived(
    layout: Path, directory: Path, *layers: bytes, config: Mapping[str, Any] | None = None
) -> Path:
    """An image made of another's layers and some more; `config` takes the place of the other's."""
    manifest = manifest_of(layout)
    below = [blob(layout, one["digest"]) for one in manifest["layers"]]
    own = json_blob(layout, manifest["config"]["digest"])["config"]
    return write_layout(directory, [*below, *layers], own if config is None else config)


def _put(blobs: Path, content: bytes | Path, media_type: str) -> Json:
    if isinstance(content, Path):
        digest, size = content.name, content.stat().st_size
        with contextlib.suppress(FileExistsError):
            os.link(content, blobs / digest) if _is_beside(content, blobs) else shutil.copy(
                content, blobs / digest
            )
    else:
        digest, size = hashlib.sha256(content).hexdigest(), len(content)
        (blobs / digest).write_bytes(content)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size}


def _is_beside(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _diff_id(content: bytes | Path) -> str:
    """The digest of a layer without its gzip; of what is no gzip (a broken layer), some digest."""
    found = hashlib.sha256()
    opened = content.open("rb") if isinstance(content, Path) else io.BytesIO(content)
    with opened as raw, contextlib.suppress(OSError, EOFError):
        with gzip.open(raw) as plain:
            while piece := plain.read(1 << 20):
                found.update(piece)
    return f"sha256:{found.hexdigest()}"


# -- what is made once per machine -----------------------------------------------------------------


def debian() -> Path:
    """A layout of a minimal Debian (or whatever the machine itself is); 17 s the first time."""
    sources = apt_sources()
    return _made_once("debian", "".join(one.read_text() for one in sources), _make_debian)


def tiny() -> Path:
    """A layout of busybox alone; it unpacks in some milliseconds."""
    return _made_once("tiny", platform.machine(), _make_tiny)


def apt_sources() -> list[Path]:
    """Where the machine's own distribution comes from, without what was added to it."""
    places = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    pattern = re.compile(r"^(deb|URIs:)\s.*/(debian|ubuntu)(-security|-ports)?/?(\s|$)", re.M)
    return [one for one in places if one.is_file() and pattern.search(one.read_text())]


def _make_debian(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        made, packed = Path(scratch, "root.tar"), Path(scratch, "root.tar.gz")
        told = ["--quiet", "--variant=minbase", "--format=tar", _codename(), str(made)]
        subprocess.run(["mmdebstrap", *told, *map(str, apt_sources())], check=True)
        with made.open("rb") as source, gzip.GzipFile(packed, "wb", 1, mtime=0) as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        with packed.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
        config = {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}
        write_layout(target, [packed.rename(packed.with_name(digest))], {**config, "Cmd": ["bash"]})


def _codename() -> str:
    told = re.search(r"^VERSION_CODENAME=(.*)$", Path("/etc/os-release").read_text(), re.M)
    assert told is not None
    return told[1].strip('"')


def _make_tiny(target: Path) -> None:
    found = shutil.which("busybox", path="/bin:/usr/bin")
    assert found is not None, "apt install busybox-static"
    names = subprocess.run([found, "--list"], check=True, capture_output=True, text=True)
    applets = [name for name in names.stdout.split() if name != "busybox"]
    root = layer(
        directory("bin"),
        file("bin/busybox", Path(found).read_bytes(), mode=0o755),
        *[hard_link(f"bin/{name}", "bin/busybox") for name in applets],
        directory("etc"),
        file("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"),
        file("etc/group", b"root:x:0:\napp:x:1000:\n"),
        directory("root", mode=0o700),
        directory("tmp", mode=0o1777),
        directory("home"),
        directory("home/app", uid=1000, gid=1000),
    )
    write_layout(target, [root], {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]})


def _made_once(name: str, depends_on: str, make: Any) -> Path:
    mark = hashlib.sha256(f"{RECIPE} {depends_on}".encode()).hexdigest()[:12]
    made = CACHE / f"{name}-{mark}"
    if made.exists():
        return made
    CACHE.mkdir(mode=0o755, exist_ok=True)
    assert CACHE.stat().st_uid == os.geteuid(), f"{CACHE} is somebody else's"
    with (CACHE / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        half = CACHE / f".{name}-{mark}.half"
        if not made.exists():
            shutil.rmtree(half, ignore_errors=True)
            make(half)
            half.rename(made)
    return made


# -- the registry ----------------------------------------------------------------------------------


class ImageRegistry:
    """A docker-registry on loopback, in a directory of its own. `user`: it wants a password."""

    def __init__(self, *, user: str | None = None, password: str = "secret") -> None:
        self.home = Path(tempfile.mkdtemp(prefix="heyvm-registry-"))
        self.user, self.password = user, password
        self.host = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def blobs(self) -> Path:
        """What it stores: `<2 hex>/<digest>/data`."""
        return self.home / "store/docker/registry/v2/blobs/sha256"

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    def answered(self, needle: str) -> list[str]:
        """The requests that it answered whose line (method, path, user agent) holds `needle`."""
        return [
            line for line in self.log.splitlines() if re.match(r"\S+ - ", line) and needle in line
        ]

    def start(self) -> None:
        """Start (again), at the same address."""
        self.host = self.host or f"127.0.0.1:{free_port()}"
        (self.home / "config.yml").write_text(self._config())
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(self.home / "config.yml")],
                env={"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._answers, "the registry answers")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.home, ignore_errors=True)

    def push(self, layout: Path, name: str) -> str:
        """Bring an image in, every byte as it is; its name, with the tag, by which to pull it."""
        repository, _, tag = name.partition(":")
        manifest = manifest_of(layout)
        for one in (manifest["config"], *manifest["layers"]):
            self.push_blob(repository, blob(layout, one["digest"]))
        self.push_manifest(repository, tag or "latest", json.dumps(manifest).encode())
        return f"{self.host}/{repository}:{tag or 'latest'}"

    def push_blob(self, repository: str, content: Path) -> None:
        with self._session() as http:
            url = f"http://{self.host}/v2/{repository}/blobs/"
            if http.head(url + f"sha256:{content.name}").status_code == 200:
                return
            begun = http.post(url + "uploads/")
            assert begun.status_code == 202, begun.text
            place = begun.headers["Location"] + f"&digest=sha256:{content.name}"
            with content.open("rb") as stream:
                done = http.put(place, data=stream)
            assert done.status_code == 201, done.text

    def push_manifest(
        self, repository: str, reference: str, manifest: bytes, media_type: str = MANIFEST
    ) -> str:
        """Its digest."""
        with self._session() as http:
            done = http.put(
                f"http://{self.host}/v2/{repository}/manifests/{reference}",
                data=manifest,
                headers={"Content-Type": media_type},
            )
        assert done.status_code == 201, done.text
        return f"sha256:{hashlib.sha256(manifest).hexdigest()}"

    def stored(self, digest: str) -> Path:
        """The file that it keeps a blob in."""
        hexadecimal = digest.removeprefix("sha256:")
        return self.blobs / hexadecimal[:2] / hexadecimal / "data"

    def _session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False
        if self.user is not None:
            session.auth = (self.user, self.password)
        return session

    def _answers(self) -> bool:
        try:
            with self._session() as http:
                return http.get(f"http://{self.host}/v2/", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def _config(self) -> str:
        lines = [
            "version: 0.1",
            "log: {level: error, accesslog: {disabled: false}}",
            f"storage: {{filesystem: {{rootdirectory: {self.home}/store}}}}",
            f"http: {{addr: '{self.host}', secret: none}}",
            # Layers with addresses of their own, for tests that nobody fetches them.
            "validation: {manifests: {urls: {allow: ['^https?://']}}}",
        ]
        if self.user is not None:
            told = ["htpasswd", "-Bbn", self.user, self.password]
            made = subprocess.run(told, check=True, capture_output=True)
            (self.home / "htpasswd").write_bytes(made.stdout)
            lines.append(f"auth: {{htpasswd: {{realm: test, path: {self.home}/htpasswd}}}}")
        return "\n".join(lines) + "\n"


@contextlib.contextmanager
def served(*names: str) -> Iterator[ImageRegistry]:
    """A registry that has `debian` or `tiny`, as `<host>/debian` and `<host>/tiny`."""
    makers = {"debian": debian, "tiny": tiny}
    with ImageRegistry() as registry:
        for name in names:
            registry.push(makers[name](), name)
        yield registry
