"""The store of images, against a real registry: what comes in, what goes, and what is left when
something is killed on the way."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from heyvm.errors import Conflict, ImageMissing, Invalid, NotFound, StorageFull, Unavailable
from heyvm.images import canonical, reference
from tests import images
from tests.images import ImageRegistry, directory, file, hard_link, layer, link, tar_of
from tests.server import ORDINARY, REPOSITORY, wait_until
from tests.stores import Store, command_of, store


@pytest.fixture
def here() -> Iterator[Store]:
    with store() as made:
        yield made


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("ubuntu", "ubuntu:latest"),
        ("ubuntu:24.04", "ubuntu:24.04"),
        ("docker.io/library/ubuntu:24.04", "ubuntu:24.04"),
        ("index.docker.io/someone/tool", "someone/tool:latest"),
        ("ghcr.io/a/b:c", "ghcr.io/a/b:c"),
        ("localhost:5000/a__b/c-d", "localhost:5000/a__b/c-d:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("foo:5000", "foo:5000"),
        (f"x:1@sha256:{'a' * 64}", f"x@sha256:{'a' * 64}"),
        (f"sha256:{'a' * 64}", f"sha256:{'a' * 64}"),
    ],
)
def test_a_name_is_kept_as_a_person_writes_it(name: str, short: str) -> None:
    assert canonical(name) == short
    assert canonical(short) == short


@pytest.mark.parametrize(
    "name",
    [
        *("", "host", "-x", "--help", "a//b", "a/../b", "../x", "/x", "x/", "x y", "x\n", "x\0"),
        *("docker://x", "oci:/etc", "A/b", "a:b/c", "x:", "x:" + "t" * 129, "x@sha256:12", "é"),
        *("x" * 256, f"sha256:{'a' * 64}", "r.x:99999/y", "x:-t", "a@b", "%2e%2e", "x;id", "$(id)"),
    ],
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(Invalid) as refused:
        reference(name)
    assert list(refused.value.errors) == ["image"]


# -- pull ------------------------------------------------------------------------------------------


def test_pull_by_tag_and_by_digest(here: Store, image_registry: ImageRegistry) -> None:
    name = image_registry.push(images.tiny(), "tiny:1")
    by_tag = here.have(name)
    digest = by_tag.source.rpartition("@")[2]
    by_digest = here.have(f"{image_registry.host}/tiny@{digest}")

    assert by_tag.names == (name,)
    assert by_digest.digest == by_tag.digest
    assert by_digest.names == tuple(sorted((name, f"{image_registry.host}/tiny@{digest}")))
    assert os.access(here.tree(name) / "bin/busybox", os.X_OK)
    assert by_tag.config.command == ("/bin/sh",)
    assert by_tag.size_bytes > 1_000_000
    assert here.find(by_tag.digest) == here.find(name)


def test_ensure_asks_nobody_where_it_is_here(here: Store, image_registry: ImageRegistry) -> None:
    name = image_registry.push(images.tiny(), "ensured")
    first = here.ensure(name, here.tell)
    before = len(image_registry.answered("/v2/ensured"))

    assert here.ensure(name, here.tell) == first
    assert len(image_registry.answered("/v2/ensured")) == before


def test_pull_takes_what_the_registry_has_now(
    here: Store, image_registry: ImageRegistry, tmp_path: Path
) -> None:
    name = image_registry.push(one_file(tmp_path / "1", b"one"), "moving")
    old = here.have(name)
    here.use(old)
    image_registry.push(one_file(tmp_path / "2", b"two"), "moving")
    new = here.have(name)

    assert (here.tree(name) / "what").read_bytes() == b"two"
    assert new.digest != old.digest
    assert here.get(old.digest).names == ()
    here.sweep()
    assert here.get(old.digest)  # a sandbox has it
    forget(here, "sb-user")
    here.sweep()
    assert here.find(old.digest) is None
    assert here.left() == []


def test_the_config_is_honoured(here: Store, image_registry: ImageRegistry, tmp_path: Path) -> None:
    layout = images.write_layout(
        tmp_path / "l",
        [layer(file("x"))],
        {
            "Env": ["A=1", "B=x=y", "nothing", "=odd", "EMPTY="],
            "User": "app:staff",
            "WorkingDir": "srv/app",
            "Entrypoint": ["/start"],
            "Cmd": ["now", "é"],
        },
    )
    config = here.have(image_registry.push(layout, "config")).config

    assert config.env == {"A": "1", "B": "x=y", "EMPTY": ""}
    assert config.user == "app:staff"
    assert config.working_directory == "/srv/app"
    assert config.command == ("/start", "now", "é")
    [image] = here.list()
    assert image.config == config


def test_layers_hide_and_replace(
    here: Store, image_registry: ImageRegistry, tmp_path: Path
) -> None:
    layers = [
        layer(
            directory("d"), file("d/a", b"a"), file("d/b", b"b"), file("gone", b"x"),
            directory("full"), file("full/old", b"old"), link("odd", "../../../etc/passwd"),
            file("first", b"same", uid=1000, gid=7, mode=0o4755),
            file("colour", pax_headers={"SCHILY.xattr.user.colour": "red"}),
        ),
        layer(
            file("d/.wh.a"), file(".wh.gone"), file("full/.wh..wh..opq"), file("full/new", b"new"),
            file("second"), hard_link("second", "first"), link("d/b", "/nowhere"),
        ),
    ]  # fmt: skip
    name = image_registry.push(images.write_layout(tmp_path / "l", layers), "layers")
    here.have(name)
    tree = here.tree(name)

    assert sorted(p.name for p in tree.iterdir()) == [
        *("colour", "d", "first", "full", "odd", "second")
    ]
    assert [p.name for p in (tree / "d").iterdir()] == ["b"]
    assert [p.name for p in (tree / "full").iterdir()] == ["new"]
    assert os.readlink(tree / "odd") == "../../../etc/passwd"
    assert os.readlink(tree / "d/b") == "/nowhere"
    assert (tree / "first").samefile(tree / "second")
    assert os.getxattr(tree / "colour", "user.colour") == b"red"
    found = (tree / "first").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1000, 7, 0o4755)


def test_a_real_debian(here: Store, image_registry: ImageRegistry) -> None:
    image = here.have(image_registry.push(images.debian(), "debian"))
    tree = here.rootfs(image)

    assert image.devices == 8
    assert not list((tree / "dev").glob("n*"))
    assert (tree / "etc/debian_version").read_text().strip()
    done = subprocess.run(["du", "-s", "-B1", tree], capture_output=True, text=True, check=True)
    assert abs(int(done.stdout.split()[0]) - image.size_bytes) < 100_000
    assert any("MiB" in text and "layer 1 of 1" in text for text in here.told)
    assert stat.S_IMODE(tree.parent.stat().st_mode) == 0o700  # set-id programs lie in it


def test_it_tells_all_the_time(here: Store, image_registry: ImageRegistry) -> None:
    name = image_registry.push(images.debian(), "debian")
    times = [time.monotonic()]
    here.pull(name, lambda _: times.append(time.monotonic()))
    times.append(time.monotonic())
    gaps = [after - before for before, after in zip(times, times[1:])]

    assert max(gaps[1:-1]) < 0.7, gaps


def test_an_index_is_read_for_this_machine(
    here: Store, image_registry: ImageRegistry, tmp_path: Path
) -> None:
    name = image_registry.push(images.tiny(), "many:one")
    digest = here.have(name).source.rpartition("@")[2]
    size = len(json.dumps(images.manifest_of(images.tiny())))

    def entry(machine: str, digest: str) -> images.Json:
        where = {"os": "linux", "architecture": machine}
        return {"mediaType": images.MANIFEST, "digest": digest, "size": size, "platform": where}

    other = image_registry.push(one_file(tmp_path / "other", b"other"), "many:other")
    other_digest = here.have(other).source.rpartition("@")[2]
    both = [entry("s390x", other_digest), entry(images.ARCHITECTURE, digest)]
    push_index(image_registry, "many", "both", both)
    push_index(image_registry, "many", "foreign", both[:1])

    assert here.have(f"{image_registry.host}/many:both").digest == here.get(name).digest
    with pytest.raises(Invalid, match="s390x"):
        here.have(f"{image_registry.host}/many:foreign")


def test_an_image_for_another_machine_is_refused(
    here: Store, image_registry: ImageRegistry, tmp_path: Path
) -> None:
    layout = images.write_layout(tmp_path / "l", [layer(file("x"))], architecture="s390x")
    assert_invalid(here, image_registry.push(layout, "foreign"), "s390x")


@pytest.mark.parametrize("kind", ["plain", "zstd"])
def test_other_compressions(
    here: Store, image_registry: ImageRegistry, tmp_path: Path, kind: str
) -> None:
    tar = tar_of(file("hello", b"hello"))
    packed = tar if kind == "plain" else zstd(tar)
    media_type = images.LAYER + ("" if kind == "plain" else "+zstd")
    layout = images.write_layout(
        tmp_path / "l", [packed], media_type=media_type,
        rootfs={"type": "layers", "diff_ids": [images.digest_of(tar)]},
    )  # fmt: skip
    name = image_registry.push(layout, f"packed-{kind}")
    here.have(name)

    assert (here.tree(name) / "hello").read_bytes() == b"hello"


# -- what cannot be had ----------------------------------------------------------------------------


def test_an_unknown_image_is_missing(here: Store, image_registry: ImageRegistry) -> None:
    image_registry.push(images.tiny(), "known")
    for name in ("known:nosuch", "nosuch", f"known@sha256:{'0' * 64}"):
        with pytest.raises(ImageMissing) as missing:
            here.have(f"{image_registry.host}/{name}")
        assert "unknown" in missing.value.errors["image"][0]
        assert "\n" not in missing.value.detail


@pytest.mark.parametrize("host", ["127.0.0.1:1", "nosuch.invalid", "localhost:1"])
def test_an_unreachable_registry_is_missing(here: Store, host: str) -> None:
    with pytest.raises(ImageMissing, match="cannot be reached") as missing:
        here.have(f"{host}/x")
    assert host in missing.value.errors["image"][0]


def test_a_registry_that_never_answers_is_given_up(here: Store) -> None:
    began = time.monotonic()
    with silent() as port, pytest.raises(ImageMissing, match="within 5 s"):
        here.have(f"127.0.0.1:{port}/x")
    assert time.monotonic() - began < 7


def test_credentials(here: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auth = tmp_path / "auth.json"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(auth))
    with ImageRegistry(user="me", password="right") as registry:
        name = registry.push(images.tiny(), "private")
        assert_invalid(here, name, "unauthorized|authentication")
        for password in ("wrong", "right"):
            login = ["skopeo", "login", "--tls-verify=false", "-u", "me", "--password-stdin"]
            if password == "right":
                subprocess.run([*login, registry.host], input=b"right", check=True, stdout=-3)
                assert here.have(name).names == (name,)
            else:
                auth.write_text(json.dumps({"auths": {registry.host: {"auth": "bWU6d3Jvbmc="}}}))
                assert_invalid(here, name, "unauthorized|authentication")


def test_dockers_own_credentials(
    here: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with ImageRegistry(user="me", password="right") as registry:
        name = registry.push(images.tiny(), "private")
        (tmp_path / ".docker").mkdir()
        auths = {"auths": {registry.host: {"auth": "bWU6cmlnaHQ="}}}
        (tmp_path / ".docker/config.json").write_text(json.dumps(auths))
        assert here.have(name)


def test_a_corrupt_layer(tmp_path: Path, here: Store) -> None:
    with ImageRegistry() as registry:
        layout = one_file(tmp_path / "l", os.urandom(100_000))
        name = registry.push(layout, "corrupt")
        stored = registry.stored(images.manifest_of(layout)["layers"][0]["digest"])
        content = bytearray(stored.read_bytes())
        content[50_000] ^= 1
        stored.write_bytes(content)
        assert_invalid(here, name, "digest|corrupt")


def test_a_layer_with_another_tar_in_it_than_the_config_says(
    here: Store, image_registry: ImageRegistry, tmp_path: Path
) -> None:
    wrong = {"type": "layers", "diff_ids": [f"sha256:{'0' * 64}"]}
    layout = images.write_layout(tmp_path / "l", [layer(file("x"))], rootfs=wrong)
    assert_invalid(here, image_registry.push(layout, "mixed"), "mismatch")


# -- one for all -----------------------------------------------------------------------------------

PULLER = """
import sys
from pathlib import Path
from tests.stores import Store
told = []
print(Store(Path(sys.argv[1])).pull(sys.argv[2], told.append).digest)
assert told
"""


def puller(here: Store, name: str, code: str = PULLER) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(here.home), name],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_twenty_at_once_are_one_pull(here: Store, tmp_path: Path) -> None:
    with ImageRegistry() as registry:
        layout = images.write_layout(tmp_path / "l", [layer(file("big", os.urandom(40 << 20)))])
        name = registry.push(layout, "once")
        blob = images.manifest_of(layout)["layers"][0]["digest"]
        found: list[str] = []

        def pull() -> None:
            found.append(here.ensure(name, here.tell).digest)

        threads = [threading.Thread(target=pull) for _ in range(14)]
        others = [puller(here, name) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers = [other.communicate(timeout=60) for other in others]
        fetched = [one for one in registry.answered(blob) if '"GET' in one]

    assert len(fetched) == 1
    assert all(other.returncode == 0 for other in others), answers
    assert {*found, *(out.decode().strip() for out, _ in answers)} == {here.get(name).digest}
    assert len(found) == 14


def test_who_waits_hears_of_the_failure_too(here: Store, tmp_path: Path) -> None:
    failures: list[str] = []
    with silent() as port:

        def pull() -> None:
            with pytest.raises(ImageMissing) as missing:
                here.have(f"127.0.0.1:{port}/x")
            failures.append(missing.value.detail)

        began = time.monotonic()
        threads = [threading.Thread(target=pull) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(failures) == 5
    assert time.monotonic() - began < 8  # not one after the other


def test_one_that_gives_up_does_not_end_it_for_others(here: Store, slow_layout: Path) -> None:
    with ImageRegistry() as registry:
        name = registry.push(slow_layout, "shared")
        given_up = threading.Event()

        def first() -> None:
            with pytest.raises(ZeroDivisionError):
                here.pull(name, lambda text: None if "looking" not in text else print(1 / 0))
            given_up.set()

        thread = threading.Thread(target=first)
        thread.start()
        wait_until(lambda: list((here.data_dir / "images").glob(".work-*/says")), "it works")
        image = here.ensure(name, here.tell)
        thread.join()

    assert given_up.is_set()
    assert here.get(name) == image


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["layer 1", "looking", "files"])
def test_what_tell_raises_ends_it_at_once(
    here: Store, image_registry: ImageRegistry, slow_layout: Path, phase: str
) -> None:
    name = image_registry.push(slow_layout, "ended")

    def tell(text: str) -> None:
        if phase in text:
            assert here.workers()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.pull(name, tell)
    assert here.left() == []  # at once, with no sweep
    assert here.list() == []


@pytest.mark.parametrize("phase", ["layer 1", "looking", "files"])
def test_a_killed_pull_leaves_nothing_after_a_sweep(
    here: Store, image_registry: ImageRegistry, slow_layout: Path, phase: str
) -> None:
    name = image_registry.push(slow_layout, "killed")
    code = PULLER.replace(
        "told = []", f"told = []; here = lambda t: print(t, flush=True) if {phase!r} in t else 0"
    ).replace("told.append", "here")
    process = puller(here, name, code)
    assert process.stdout is not None
    process.stdout.readline()
    assert here.workers()
    here.sweep()
    assert here.left() != []  # it lives: nobody takes its directory away
    process.kill()
    process.communicate()

    here.wait_until_clean()
    assert here.list() == []
    assert here.have(name)


@pytest.mark.parametrize("program", ["skopeo copy", "umoci", "oci.py"])
def test_a_killed_helper_is_a_failure_that_leaves_nothing(
    here: Store, image_registry: ImageRegistry, slow_layout: Path, program: str
) -> None:
    name = image_registry.push(slow_layout, "helpless")

    def tell(_: str) -> None:
        needle = program.split()[0].encode()
        for pid in here.workers():
            told = command_of(pid)
            if needle in told and b"setpriv" not in told and b"inspect" not in told:
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(Unavailable, match="killed"):
        here.pull(name, tell)
    assert here.left() == []
    assert here.have(name)


def test_a_full_disk(image_registry: ImageRegistry, tmp_path: Path) -> None:
    big = images.write_layout(tmp_path / "b", [layer(file("zeros", bytes(80 << 20)))])
    fat = images.write_layout(tmp_path / "f", [layer(file("noise", os.urandom(80 << 20)))])
    many = layer(*[file(f"{number}") for number in range(20_000)])
    crowd = images.write_layout(tmp_path / "c", [many])
    names = [
        image_registry.push(one, f"large-{number}") for number, one in enumerate((big, fat, crowd))
    ]
    tiny = image_registry.push(images.tiny(), "tiny")
    with small_disk(tmp_path) as where:
        small = Store(where)
        for name in names:
            with pytest.raises(StorageFull):
                small.have(name)
            assert small.left() == []
        assert small.have(tiny)  # there is space again
        small.registry.close()


# -- what goes -------------------------------------------------------------------------------------


def test_an_image_in_use_stays(here: Store, image_registry: ImageRegistry) -> None:
    name = image_registry.push(images.tiny(), "used")
    image = here.have(name)
    here.use(image, "web")

    with pytest.raises(Conflict, match="web"):
        here.remove(name)
    with pytest.raises(Conflict, match="web"):
        here.remove(image.digest)
    assert here.prune() == []
    assert (here.tree(name) / "bin/busybox").exists()
    forget(here, "sb-web")
    here.remove(name)
    assert here.left() == []
    with pytest.raises(NotFound):
        here.get(name)
    assert here.known(name)


def test_an_image_goes_with_its_last_name(here: Store, image_registry: ImageRegistry) -> None:
    one, two = (image_registry.push(images.tiny(), name) for name in ("first", "second"))
    here.have(one)
    here.have(two)
    here.remove(one)
    assert here.get(two).names == (two,)
    here.remove(two)
    assert here.list() == []
    assert here.left() == []


def test_prune(here: Store, image_registry: ImageRegistry, tmp_path: Path) -> None:
    used = here.have(image_registry.push(images.tiny(), "used"))
    here.use(used)
    unused = here.have(image_registry.push(one_file(tmp_path / "l", b"x"), "unused"))

    assert here.prune(nameless=True) == []
    assert [image.digest for image in here.prune()] == [unused.digest]
    assert [image.digest for image in here.list()] == [used.digest]


def test_a_directory_without_a_row_is_swept(here: Store, image_registry: ImageRegistry) -> None:
    name = image_registry.push(images.tiny(), "tiny")
    here.have(name)
    stray = here.data_dir / "images" / ("0" * 64)
    (stray / "rootfs").mkdir(parents=True)
    here.sweep()

    assert not stray.exists()
    assert here.get(name)


def test_pulls_and_removals_at_once(here: Store, image_registry: ImageRegistry) -> None:
    """Whatever the order: a row has its directory, and a directory its row."""
    names = [image_registry.push(images.tiny(), f"churn-{number}") for number in range(3)]
    over = time.monotonic() + 4

    def churn(number: int) -> None:
        while time.monotonic() < over:
            name = names[number % 3]
            try:
                assert (here.rootfs(here.ensure(name, here.tell))).parent
                here.remove(name) if number % 2 else here.prune()
                here.sweep()
            except NotFound:
                pass

    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            churn(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    here.sweep()
    assert here.left() == []
    for image in here.list():
        assert (here.rootfs(image) / "bin/busybox").exists()


# -- import ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["", "gz", "xz", "bz2", "zst"])
def test_import_a_root_file_system(here: Store, tmp_path: Path, packing: str) -> None:
    tar = tar_of(directory("./"), directory("./etc"), file("./etc/hostname", b"box\n"))
    packers = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstd}
    path = tmp_path / "root.tar"
    path.write_bytes(packers[packing](tar) if packing else tar)
    image = here.take("mine:1", path, images.digest_of(path.read_bytes())[7:], here.tell)

    assert (here.tree("mine:1") / "etc/hostname").read_text() == "box\n"
    assert image.names == ("mine:1",)
    assert here.take("mine:2", path, None, here.tell).digest == image.digest


def test_import_what_docker_save_and_oci_archives_hold(
    here: Store, image_registry: ImageRegistry, tmp_path: Path
) -> None:
    layout = images.write_layout(tmp_path / "l", [layer(file("x", b"1"))], {"Env": ["A=1"]})
    name = image_registry.push(layout, "same")
    docker = f"{image_registry.host}/same:docker"
    skopeo_copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]
    subprocess.run(
        [*skopeo_copy, "--format=v2s2", f"docker://{name}", f"docker://{docker}"], check=True
    )
    for kind, source in (("docker-archive", docker), ("oci-archive", name)):
        pulled = here.have(source)
        made = tmp_path / f"{kind}.tar"
        subprocess.run(
            [*skopeo_copy, f"docker://{source}", f"{kind}:{made}:some/name:1"], check=True
        )
        for path in (made, packed(made)):
            image = here.take(f"from/{kind}", path, None, here.tell)
            assert image.digest == pulled.digest
            assert image.config.env == {"A": "1"}


def test_import_with_the_wrong_sum(here: Store, tmp_path: Path) -> None:
    path = tmp_path / "root.tar"
    path.write_bytes(tar_of(file("etc/x")))
    with pytest.raises(Invalid, match="sha256") as wrong:
        here.take("mine", path, "0" * 64, here.tell)
    assert list(wrong.value.errors) == ["sha256"]
    assert here.left() == []


@pytest.mark.parametrize(
    "content", [b"", b"hello", bytes(1024), b"\x1f\x8b broken", b"\x28\xb5\x2f\xfd"]
)
def test_import_of_what_is_no_archive(here: Store, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "root.tar"
    path.write_bytes(content)
    with pytest.raises(Invalid):
        here.take("mine", path, None, here.tell)
    for odd in (tmp_path, tmp_path / "missing", "/dev/zero"):
        with pytest.raises(Invalid):
            here.take("mine", odd, None, here.tell)


# -- an ordinary user ------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_an_ordinary_user_pulls_and_removes(tmp_path: Path, image_registry: ImageRegistry) -> None:
    layout = images.write_layout(
        tmp_path / "l",
        [layer(
            directory("dev"), images.device("dev/null"), hard_link("dev/also", "dev/null"),
            directory("shut", mode=0), file("etc/x", b"1", uid=33, gid=33, mode=0o600),
        )],
    )  # fmt: skip
    name = image_registry.push(layout, "ordinary")
    home = Path(tempfile.mkdtemp(prefix="heyvm-store-"))
    code = PULLER + "i = Store(Path(sys.argv[1])); print(i.get(sys.argv[2]).devices);" \
        "print(*sorted(p.name for p in i.tree(sys.argv[2]).rglob('*')));" \
        "i.remove(sys.argv[2]); print(i.left())"  # fmt: skip
    try:
        os.chown(home, ORDINARY, ORDINARY)
        done = subprocess.run(
            [sys.executable, "-B", "-c", code, str(home), name],
            cwd=REPOSITORY, user=ORDINARY, group=ORDINARY, extra_groups=[], text=True,
            env={"HOME": str(home), "PATH": os.environ["PATH"]}, capture_output=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["2", "dev etc shut x", "[]"]


# -- helpers ---------------------------------------------------------------------------------------


def assert_invalid(here: Store, name: str, words: str) -> None:
    with pytest.raises(Invalid) as refused:
        here.have(name)
    assert not isinstance(refused.value, ImageMissing), refused.value
    assert list(refused.value.errors) == ["image"]
    assert re.search(words, refused.value.detail), refused.value.detail
    assert here.left() == []
    assert here.find(name) is None


def one_file(where: Path, content: bytes) -> Path:
    return images.write_layout(where, [layer(file("what", content))])


@pytest.fixture(scope="session")
def slow_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes some tenths of a second in each phase."""
    files = [file(f"d/{number}", b"x" * 3000) for number in range(3000)]
    where = tmp_path_factory.mktemp("slow") / "l"
    return images.write_layout(where, [layer(file("noise", os.urandom(60 << 20)), *files)])


def push_index(registry: ImageRegistry, name: str, tag: str, entries: list[images.Json]) -> None:
    whole = {"schemaVersion": 2, "mediaType": images.INDEX, "manifests": entries}
    registry.push_manifest(name, tag, json.dumps(whole).encode(), images.INDEX)


def zstd(content: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=content, check=True, capture_output=True).stdout


def packed(path: Path) -> Path:
    with gzip.open(f"{path}.gz", "wb", 1) as sink:
        sink.write(path.read_bytes())
    return Path(f"{path}.gz")


def forget(here: Store, sandbox_id: str) -> None:
    here.registry.remove(sandbox_id)


@contextmanager
def silent() -> Iterator[int]:
    """A port that takes no connection: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        time.sleep(0.05)
        yield int(listener.getsockname()[1])


@contextmanager
def small_disk(where: Path) -> Iterator[Path]:
    """60 MB of ext4 with few inodes."""
    image, mount = where / "disk", where / "mounted"
    mount.mkdir()
    with image.open("wb") as disk:
        disk.truncate(60 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-N", "4000", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)
