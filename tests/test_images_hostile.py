"""Images made to do harm: each is refused, or does none; nothing is left of those refused."""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heyvm.errors import ImageMissing, Invalid, StorageFull
from tests import images
from tests.images import ImageRegistry, device, directory, entry, file, hard_link, layer, link
from tests.stores import Store, store

BAIT = f"heyvm-bait-{os.getpid()}"


@pytest.fixture
def here() -> Iterator[Store]:
    with store() as made:
        yield made


@pytest.fixture
def bait() -> Iterator[Path]:
    """A file of the host's that nothing may touch."""
    path = Path(f"/var/tmp/{BAIT}")
    path.write_text("untouched")
    yield path
    assert path.read_text() == "untouched"
    assert path.stat().st_nlink == 1
    path.unlink()


OUT = f"../../../../../../../../../../var/tmp/{BAIT}"


@pytest.mark.parametrize(
    "entries",
    [
        [file("../escaped", b"x")],
        [file("a/../../escaped", b"x")],
        [file("..", b"x")],
        [directory("..")],
        [file(f"/var/tmp/{BAIT}", b"x")],
        [file("//x", b"x")],
        [file("x\n/../y", b"x")],
        [hard_link("h", OUT)],
        [hard_link("h", f"/var/tmp/{BAIT}")],
        [file(".wh...")],
        [file("a/.wh..")],
        [file(".wh.")],
        [file("a/../.wh.x")],
        [file("x", pax_headers={"path": "../escaped"})],
        [file("x" * 5000)],
    ],
    ids=lambda entries: entries[0][0].name[:20],
)
def test_a_name_that_leads_out_is_refused(
    here: Store, image_registry: ImageRegistry, tmp_path: Path, bait: Path, entries: Any
) -> None:
    refused(here, image_registry, images.write_layout(tmp_path / "l", [layer(*entries)]))


@pytest.mark.parametrize("name", ["dev", "proc", "sys", "tmp", "run", "etc", ".heyvm"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_mounted_over_must_be_a_directory(
    here: Store, image_registry: ImageRegistry, tmp_path: Path, name: str, kind: str
) -> None:
    odd = link(name, "/var/tmp") if kind == "link" else file(name)
    refused(here, image_registry, images.write_layout(tmp_path / "l", [layer(odd)]), f"/{name}")


def test_nothing_is_written_through_a_link(
    here: Store, image_registry: ImageRegistry, tmp_path: Path, bait: Path
) -> None:
    layers = [
        layer(link("out", "/var/tmp"), link("up", "../../../../../../../var/tmp"), link("me", OUT)),
        layer(
            file(f"out/{BAIT}", b"x"), file(f"up/{BAIT}", b"x"), file("me", b"x"),
            file(f"out/.wh.{BAIT}"), hard_link("linked", f"up/{BAIT}"),
        ),
    ]  # fmt: skip
    try:
        here.have(image_registry.push(images.write_layout(tmp_path / "l", layers), "through"))
    except Invalid:
        pass  # umoci may refuse what it cannot find inside


def test_devices_are_left_out_and_counted(
    here: Store, image_registry: ImageRegistry, tmp_path: Path
) -> None:
    whole = layer(
        device("disk", 8, 0), device("null"), hard_link("also", "null"),
        entry("block", tarfile.BLKTYPE, devmajor=8), entry("fifo", tarfile.FIFOTYPE),
        device("replaced"), file("replaced"),
    )  # fmt: skip
    image = here.have(image_registry.push(images.write_layout(tmp_path / "l", [whole]), "devices"))

    assert image.devices == 4
    assert sorted(one.name for one in here.rootfs(image).iterdir()) == ["fifo", "replaced"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has such attributes")
def test_attributes_that_the_hosts_overlay_reads_are_taken_out(
    here: Store, image_registry: ImageRegistry, tmp_path: Path
) -> None:
    odd = {f"SCHILY.xattr.{name}": "y" for name in ("trusted.overlay.opaque", "user.fine")}
    whole = layer(directory("d", pax_headers=odd), file("f", pax_headers=odd))
    image = here.have(image_registry.push(images.write_layout(tmp_path / "l", [whole]), "xattrs"))

    for name in ("d", "f"):
        assert os.listxattr(here.rootfs(image) / name) == ["user.fine"]


def test_odd_names_are_only_names(
    here: Store, image_registry: ImageRegistry, tmp_path: Path
) -> None:
    names = ["a\nb", "-rf", "a b", "\x1b[2J", "\udce9", "...", "..a", "a" * 255, "Etc", "ETC", "é"]
    whole = layer(*[file(name) for name in names])
    image = here.have(image_registry.push(images.write_layout(tmp_path / "l", [whole]), "odd"))

    assert sorted(os.listdir(here.rootfs(image))) == sorted(names)


@pytest.mark.parametrize("form", ["old", "pax"])
def test_a_sparse_file_counts_with_all_its_bytes(
    here: Store, image_registry: ImageRegistry, tmp_path: Path, form: str
) -> None:
    size = 1 << 50
    if form == "old":
        info = tarfile.TarInfo("sparse")
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[156:157] = b"S"
        header[386:410] = b"%011o\0%011o\0" % (0, 0)
        header[483:495] = struct.pack(">I", 0x80000000) + size.to_bytes(8, "big")
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
        tar = bytes(header) + bytes(1024)
    else:
        told = {
            "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "sparse",
            "GNU.sparse.size": str(size), "GNU.sparse.numblocks": "0", "GNU.sparse.map": "",
        }  # fmt: skip
        tar = images.tar_of(file("sparse", pax_headers=told))
    packed = gzip.compress(tar)
    name = image_registry.push(images.write_layout(tmp_path / "l", [packed]), f"sparse-{form}")
    with pytest.raises((StorageFull, Invalid)):
        here.have(name)
    assert here.left() == []


def test_a_bomb_is_stopped_by_its_headers(
    here: Store, image_registry: ImageRegistry, tmp_path: Path
) -> None:
    """A terabyte that is announced, and not even sent."""
    info = tarfile.TarInfo("huge")
    info.size = 1 << 42
    packed = gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    name = image_registry.push(images.write_layout(tmp_path / "l", [packed]), "bomb")
    with pytest.raises(StorageFull):
        here.have(name)
    assert here.left() == []


@pytest.mark.parametrize(
    "tar",
    [
        b"not a tar at all" * 64,
        bytes(100),
        tarfile.TarInfo("x").tobuf()[:300],
        tarfile.TarInfo("x").tobuf()[:140] + b"zzz" + tarfile.TarInfo("x").tobuf()[143:],
        images.tar_of(file("x", b"y" * 5000))[:2000],
    ],
)
def test_a_broken_tar(
    here: Store, image_registry: ImageRegistry, tmp_path: Path, tar: bytes
) -> None:
    packed = gzip.compress(tar)
    refused(here, image_registry, images.write_layout(tmp_path / "l", [packed]))


@pytest.mark.parametrize("size", [2 << 20, 1 << 40])
@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_huge_header(
    here: Store, image_registry: ImageRegistry, tmp_path: Path, kind: bytes, size: int
) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    packed = gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(4 << 20))
    refused(here, image_registry, images.write_layout(tmp_path / "l", [packed]))


@pytest.mark.parametrize(
    "config",
    [
        {"Env": "A=1"},
        {"Env": [1]},
        {"Env": ["A=\0"]},
        {"Env": ["A=\ud800"]},
        {"Env": ["A=" + "x" * 200_000]},
        {"Env": ["A=1"] * 20_000},
        {"Env": {"A": "1"}},
        {"User": 0},
        {"User": "a\nb"},
        {"User": "x" * 5000},
        {"WorkingDir": ["/"]},
        {"WorkingDir": "/a\0b"},
        {"Cmd": "sh -c x"},
        {"Cmd": [None, {}]},
        {"Entrypoint": [["sh"]]},
        {"Entrypoint": 1e400},
    ],
    ids=lambda config: json.dumps(config)[:30],
)
def test_a_config_of_wrong_types(
    here: Store, image_registry: ImageRegistry, tmp_path: Path, config: Any
) -> None:
    refused(here, image_registry, images.write_layout(tmp_path / "l", [layer(file("x"))], config))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"{", b'"\xff"', b"9" * 10_000],
    ids=lambda content: repr(content[:8]),
)
def test_a_config_that_is_none(
    here: Store, image_registry: ImageRegistry, tmp_path: Path, content: bytes
) -> None:
    layout = images.write_layout(tmp_path / "l", [layer(file("x"))])
    (tmp_path / "config").write_bytes(content)
    digest = images.digest_of(content)
    images.blob(layout, digest).write_bytes(content)
    manifest = images.manifest_of(layout)
    manifest["config"] |= {"digest": digest, "size": len(content)}
    refused(here, image_registry, images.finish_layout(layout, manifest))


def test_what_lies_elsewhere_is_never_fetched(here: Store, tmp_path: Path) -> None:
    """A layer with an address of its own: a server of ours, which nobody may ask."""
    asked: list[Any] = []
    with ImageRegistry() as registry, socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.5)
        host = f"127.0.0.1:{trap.getsockname()[1]}"

        def listen() -> None:
            try:
                asked.append(trap.accept())
            except OSError:
                pass

        listener = threading.Thread(target=listen)
        layout = images.write_layout(tmp_path / "l", [layer(file("x"))])
        registry.push(layout, "foreign")
        manifest = images.manifest_of(layout)
        manifest["layers"][0] |= {"urls": [f"http://{host}/layer"]}
        foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
        for number, media_type in enumerate((None, foreign)):
            manifest["layers"][0]["mediaType"] = media_type or images.LAYER + "+gzip"
            registry.push_manifest("foreign", f"{number}", json.dumps(manifest).encode())
        listener.start()
        for number in range(2):
            with pytest.raises(Invalid, match="address"):
                here.have(f"{registry.host}/foreign:{number}")
        listener.join()
    assert asked == []


@pytest.mark.parametrize(
    "change",
    [
        {"layers": {}},
        {"layers": None},
        {"layers": ["x"]},
        {"layers": [{"digest": "../../etc/passwd", "size": 1}]},
        {"layers": [{"digest": "sha512:" + "0" * 128, "size": 1}]},
        {"layers": [{"digest": 7, "size": 1}]},
        {"config": None},
        {"config": []},
        {"config": {"digest": "sha256:x"}},
        {"schemaVersion": 1},
        {"mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws"},
        {"size": -1},
        {"size": 1 << 62},
        {"size": "1"},
        {"size": True},
        {"type": "application/vnd.oci.image.layer.v1.tar+lz4"},
        {"type": "text/html"},
        {"type": None},
        {"manifests": 5, "layers": None},
        {"mediaType": images.INDEX, "manifests": [{"digest": "sha256:0", "platform": []}]},
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_a_manifest_that_is_none(here: Store, tmp_path: Path, change: dict[str, Any]) -> None:
    """From a registry that lets everything through."""
    manifest = images.manifest_of(images.write_layout(tmp_path / "l", [layer(file("x"))]))
    if "size" in change:
        manifest["layers"][0]["size"] = change["size"]
    elif "type" in change:
        manifest["layers"][0]["mediaType"] = change["type"]
    else:
        manifest |= change
    with liar(json.dumps(manifest).encode()) as host:
        check(here, f"{host}/x")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"[" * 200_000, b"{}", b"x" * (5 << 20), b"<html>", b'{"manifests":[]}']
)
def test_a_registry_that_talks_nonsense(here: Store, content: bytes) -> None:
    with liar(content) as host:
        check(here, f"{host}/x")


def test_a_registry_that_sends_another_manifest_than_asked_for(here: Store) -> None:
    with liar(b'{"schemaVersion": 2}') as host:
        check(here, f"{host}/x@sha256:{'0' * 64}", "sent|digest|match")


def test_an_archive_with_devices_and_links_in_it(here: Store, tmp_path: Path, bait: Path) -> None:
    """An OCI archive: only its blobs are written out, each if it has its digest."""
    layout = images.write_layout(tmp_path / "l", [layer(file("x", b"1"))])
    parts = [
        file(str(p.relative_to(layout)), p.read_bytes()) for p in layout.rglob("*") if p.is_file()
    ]
    odd = [link("blobs/sha256/" + "0" * 64, str(bait)), device("disk", 8, 0), link("lnk", "/")]
    path = tmp_path / "a.tar"
    path.write_bytes(images.tar_of(*odd, *parts))
    assert here.take("fine", path, None, here.tell)

    path.write_bytes(images.tar_of(*parts, file("blobs/sha256/" + "1" * 64, b"another")))
    with pytest.raises(Invalid, match="corrupt"):
        here.take("corrupt", path, None, here.tell)
    path.write_bytes(images.tar_of(*[one for one in parts if "blobs" not in one[0].name]))
    with pytest.raises(Invalid, match="missing"):
        here.take("empty", path, None, here.tell)
    assert here.left() == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"[[]]",
        b'[{"Config":"../../etc/passwd","Layers":["/etc/passwd"]}]',
        b"[" * 10**5,
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_docker_archive_that_is_none(here: Store, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(images.tar_of(file("manifest.json", content), link("x", "/etc/passwd")))
    with pytest.raises(Invalid):
        here.take("mine", path, None, here.tell)
    assert here.left() == []


# -- helpers ---------------------------------------------------------------------------------------


def refused(here: Store, registry: ImageRegistry, layout: Path, words: str = "") -> None:
    check(here, registry.push(layout, "hostile"), words)


def check(here: Store, name: str, words: str = "") -> None:
    with pytest.raises(Invalid, match=words or None) as wrong:
        here.have(name)
    assert not isinstance(wrong.value, ImageMissing), wrong.value
    assert list(wrong.value.errors) == ["image"]
    assert "\n" not in wrong.value.detail
    assert here.left() == []
    assert here.list() == []


class liar:  # noqa: N801 - reads as a verb where it is used
    """A registry that answers every question for a manifest with these bytes."""

    def __init__(self, content: bytes) -> None:
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = content if "/manifests/" in self.path else b"{}"
                self.send_response(200)
                self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
                self.send_header("Content-Type", images.MANIFEST)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return f"127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
