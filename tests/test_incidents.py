"""What went wrong in programs of this kind elsewhere, tried here; faults that have a place of their
own in another file are there (each names its CVE)."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heyvm.backends.bubblewrap import Bubblewrap
from heyvm.errors import Unavailable
from heyvm.settings import Settings
from tests import images, kinds
from tests.boxes import Boxes
from tests.images import directory, file, layer, link
from tests.server import REPOSITORY, Server, Session


@pytest.fixture(scope="module", params=kinds.SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with kinds.user(request.param) as uid, Server(user=uid) as running:
        yield running


def run(http: Session, ref: str, line: str) -> dict[str, Any]:
    body = {"command": "sh", "args": ["-c", line]}
    answer = http.post(f"/sandboxes/{ref}/execute", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_an_image_cannot_begin_in_a_directory_of_the_hosts(
    server: Server, http: Session, tmp_path: Path
) -> None:
    """CVE-2024-21626: an image whose working directory is a descriptor that was left open."""
    tiny = images.tiny()
    below = [images.blob(tiny, one["digest"]) for one in images.manifest_of(tiny)["layers"]]
    places = ("/proc/self/fd/7", "/proc/self/fd/8/../..", "/proc/1/cwd", "../../../proc/1/root")
    for number, place in enumerate(places):
        config = {"WorkingDir": place, "Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]}
        kinds.bring(http, images.write_layout(tmp_path / str(number), below, config), "cwd:1")
        answer = http.post("/sandboxes", json={"image": "cwd:1", "network": "none"})
        made = answer.json()
        if answer.status_code == 201:
            done = http.post(f"/sandboxes/{made['id']}/execute", json={"command": "ls -a ."})
            assert done.status_code == 422 or done.json()["exit_code"] != 0, (place, done.text)
        else:
            assert 400 <= answer.status_code < 500, answer.text
        if "id" in made:
            assert http.delete(f"/sandboxes/{made['id']}").status_code == 204


def test_links_of_an_image_lead_the_server_nowhere(
    server: Server, http: Session, tmp_path: Path
) -> None:
    """CVE-2026-34078, CVE-2024-42472: links where mounts, homes and files are looked up."""
    bait = server.home / "bait"
    bait.mkdir(mode=0o777, exist_ok=True)
    bait.chmod(0o777)
    links = layer(
        link("workspace", str(bait)),
        link("var", str(bait)),
        directory("srv"),
        link("srv/deep", f"../../../../..{bait}"),
        file("etc/hostname", b"image"),
    )
    kinds.bring(http, images.derived(images.tiny(), tmp_path / "l", links), "links:1")
    asked = {"image": "links:1", "network": "none", "working_directory": "/srv/deep/x"}
    answer = http.post("/sandboxes", json=asked)
    made = answer.json()
    if answer.status_code == 201:
        run(http, made["id"], "echo x > x; echo x > /workspace/y; mkdir -p /var/z")
        http.post(f"/sandboxes/{made['id']}/files", data={"file_path": "f"}, files={"file": b"x"})
        mount = {"host_path": "/usr/share", "sandbox_path": "/var/lib", "read_only": True}
        assert http.post(f"/sandboxes/{made['id']}/mounts", json=mount).status_code == 422
    if "id" in made:
        assert http.delete(f"/sandboxes/{made['id']}").status_code == 204

    assert os.listdir(bait) == []


def test_a_sandbox_has_no_directory_of_the_hosts_unless_asked_for(
    server: Server, http: Session, sandbox: Any
) -> None:
    """OpenSandbox #750: mounts of the host's that were there by default."""
    record = sandbox(network="none")

    assert record["mounts"] == []
    table = run(http, record["id"], "cat /proc/self/mountinfo")["stdout"].splitlines()
    writable = {line.split()[4] for line in table if line.split()[5].startswith("rw")}
    own = {"/", "/usr", "/.heyvm/log", "/tmp", "/run"}
    assert {one for one in writable if not one.startswith(("/proc", "/dev"))} <= own
    assert {line.split(" - ")[1].split()[0] for line in table} <= {
        *("overlay", "tmpfs", "proc", "devpts", "mqueue", "devtmpfs"),
        *(kind_of(server.data_dir), kind_of(Path("/dev"))),
    }


def kind_of(path: Path) -> str:
    """The file system that it lies on."""
    best = max(
        (line.split() for line in Path("/proc/self/mounts").read_text().splitlines()),
        key=lambda words: len(words[1]) if path.is_relative_to(words[1]) else -1,
    )
    return best[2]


def test_a_set_uid_bubblewrap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2020-5291."""
    found = shutil.which("bwrap")
    assert found is not None
    copy = tmp_path / "bwrap"
    shutil.copy(found, copy)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = Settings(data_dir=tmp_path / "data", run_dir=tmp_path / "run")
    copy.chmod(0o755)
    Bubblewrap(settings).check()
    for mode in (0o4755, 0o2755):
        copy.chmod(mode)
        with pytest.raises(Unavailable, match="CVE-2020-5291"):
            Bubblewrap(settings).check()


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as the host's root")
def test_a_link_in_place_of_a_file_of_the_servers_is_not_written_through(tmp_path: Path) -> None:
    """CVE-2026-1386: a link in a directory that was made beforehand aims a write of root's."""
    bait = tmp_path / "bait"
    bait.write_text("precious")
    with Boxes() as boxes:
        box = boxes.start("host")
        box.stop()
        for path in (
            box.directory / "status",
            boxes.settings.run_dir / "agents" / f"{box.sandbox.id}.sock.new",
            boxes.settings.run_dir / "agents" / f"{box.sandbox.id}.sock",
        ):
            path.unlink(missing_ok=True)
            path.symlink_to(bait)
            try:
                box.start()
                box.stop()
            except Exception as error:  # a refusal is as good; what it is called does not matter
                assert "status" in str(path), error
            path.unlink(missing_ok=True)
            assert bait.read_text() == "precious", path


def test_what_is_known_to_be_broken_is_not_installed() -> None:
    """CVE-2024-1135 (gunicorn), CVE-2023-41419 (gevent), CVE-2023-25577 and 46136 (Werkzeug)."""
    mended = {"gunicorn": (22, 0), "gevent": (23, 9), "Werkzeug": (3, 0, 1)}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    floors = dict(
        found.groups()
        for one in project["dependencies"]
        if (found := re.match(r"([\w-]+)>=([\d.]+)", one))
    )
    for name, least in mended.items():
        for version in (floors[name], importlib.metadata.version(name)):
            assert tuple(map(int, re.findall(r"\d+", version)))[:3] >= least, (name, version)
