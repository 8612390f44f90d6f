"""The store of images over HTTP and on the command line, against a real server and registry."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests import images
from tests.images import ImageRegistry, directory, file, tar_of
from tests.server import REPOSITORY, Server, Session, wait_until
from tests.stores import store

ROOT = tar_of(directory("etc"), file("etc/hostname", b"box\n"))


@pytest.fixture
def name(http: Session, image_registry: ImageRegistry) -> Iterator[str]:
    """One that the registry has; gone from the server when the test ends."""
    made = image_registry.push(images.tiny(), "api/tiny:1")
    yield made
    http.delete(f"/images/{made}")


def problem(answer: Any, status: int, slug: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    assert body["type"] == f"urn:heyvm:problem:{slug}"
    return body


def test_pull_get_list_remove(http: Session, name: str) -> None:
    answer = http.post("/images/pull", json={"image": name})
    assert answer.status_code == 200, answer.text
    shown = answer.json()
    assert shown["name"] == name
    assert shown["names"] == [name]
    assert shown["config"]["command"] == ["/bin/sh"]
    assert shown["used_by"] == []
    assert shown["size_bytes"] > 1_000_000
    assert os.path.exists(shown["path"] + "/bin/busybox")

    for spelling in (name, quote(name, safe=""), shown["digest"], quote(shown["digest"])):
        assert http.get(f"/images/{spelling}").json() == shown
    assert shown in http.get("/images").json()
    assert http.delete(f"/images/{quote(name, safe='')}").status_code == 204
    problem(http.get(f"/images/{name}"), 404, "not-found")
    problem(http.delete(f"/images/{name}"), 404, "not-found")
    assert not os.path.exists(shown["path"])


def test_what_cannot_be_pulled_is_said(http: Session, name: str) -> None:
    host = name.partition("/")[0]
    missing = problem(http.post("/images/pull", json={"image": f"{host}/no"}), 422, "image-missing")
    assert "unknown" in missing["errors"]["image"][0]
    for wrong in ("host", "-x", "../x", "A B", "docker://x"):
        body = problem(http.post("/images/pull", json={"image": wrong}), 422, "invalid")
        assert body["errors"]["image"]
    problem(http.post("/images/pull", json={"image": 5}), 422, "invalid")
    problem(http.post("/images/pull", json={}), 422, "invalid")


def test_names_that_are_none_are_not_found(http: Session) -> None:
    body = problem(http.get("/images/host"), 404, "not-found")
    assert "this machine's own system" in body["detail"]
    for odd in ("..", "%2e%2e%2fx", "x%00", "%ff", "-x", "a//b", "%0a", "x" * 300):
        assert http.get(f"/images/{odd}").status_code in (400, 404)
        assert http.delete(f"/images/{odd}").status_code in (400, 404)


def test_pull_is_a_route_and_no_name(http: Session) -> None:
    answer = http.get("/images/pull")
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == {"POST", "OPTIONS"}
    problem(http.get("/images/pull:latest"), 404, "not-found")
    problem(http.get("/images/pull/x"), 404, "not-found")


def test_import(http: Session, server: Server) -> None:
    digest = hashlib.sha256(ROOT).hexdigest()
    answer = http.put("/images/my/root:1", data=ROOT, headers={"x-heyo-sha256": digest})
    assert answer.status_code == 201, answer.text
    assert Path(answer.json()["path"], "etc/hostname").read_text() == "box\n"
    chunked = http.put("/images/my/root:2", data=iter([ROOT[:700], ROOT[700:]]))
    assert chunked.status_code == 201, chunked.text
    assert chunked.json()["names"] == ["my/root:1", "my/root:2"]
    assert http.delete(f"/images/{answer.json()['digest']}").status_code == 204
    assert_tidy(server)


def test_an_import_that_is_wrong_leaves_nothing(http: Session, server: Server) -> None:
    wrong = http.put("/images/bad", data=ROOT, headers={"x-heyo-sha256": "0" * 64})
    assert "sha256" in problem(wrong, 422, "invalid")["errors"]
    odd = http.put("/images/bad", data=ROOT, headers={"x-heyo-sha256": "xyz"})
    assert problem(odd, 422, "invalid")["errors"]["x-heyo-sha256"]
    for body in (b"no tar", b"no tar " * 1000):
        said = problem(http.put("/images/bad", data=body), 422, "invalid")["errors"]["image"]
        assert "tar" in said[0]
    assert problem(http.put("/images/bad", data=b""), 422, "invalid")["errors"]["image"]
    assert problem(http.put("/images/-bad", data=ROOT), 422, "invalid")["errors"]["image"]
    assert problem(http.put("/images/host", data=ROOT), 422, "invalid")["errors"]["image"]
    packed = http.put("/images/bad", data=ROOT, headers={"Content-Encoding": "gzip"})
    problem(packed, 415, "unsupported-media")
    problem(http.get("/images/bad"), 404, "not-found")
    assert_tidy(server)


def test_an_import_that_is_cut_off_leaves_nothing(http: Session, server: Server) -> None:
    with socket.create_connection(("localhost", server.port)) as client:
        head = "PUT /images/cut HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
        client.sendall(head.encode() + ROOT[:5000])
    problem(http.get("/images/cut"), 404, "not-found")
    assert_tidy(server)


def test_the_largest_upload_holds(image_registry: ImageRegistry) -> None:
    with Server(HEYVM_MAX_UPLOAD_BYTES="2000") as small, small.http() as http:
        problem(http.put("/images/x", data=ROOT), 413, "too-large")
        problem(http.put("/images/x", data=iter([ROOT])), 413, "too-large")
        assert_tidy(small)


def test_several_pulls_at_once_answer_alike(http: Session, server: Server, name: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def pull(_: int) -> str:
        with server.http() as own:
            return str(own.post("/images/pull", json={"image": name}).json()["digest"])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(pull, range(8)))) == 1


def test_the_keeper_sweeps(server: Server) -> None:
    """What a killed pull has left; the lock that it held is gone."""
    left = server.data_dir / "images/.work-0123"
    (left / "layout").mkdir(parents=True)
    wait_until(lambda: not left.exists(), "swept")
    assert_tidy(server)


# -- the command line ------------------------------------------------------------------------------


def heyvm(home: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HEYVM_DATA_DIR": str(home / "data")}
    return subprocess.run(
        [sys.executable, "-m", "heyvm.cli", "images", *words],
        cwd=REPOSITORY, env=environ, capture_output=True, text=options.pop("text", True), **options,
    )  # fmt: skip


def test_the_command_line(image_registry: ImageRegistry, tmp_path: Path) -> None:
    name = image_registry.push(images.tiny(), "cli:1")
    with store() as there:
        done = heyvm(there.home, "pull", name)
        assert done.returncode == 0, done.stderr
        assert name in done.stdout
        assert f"pulling {name}" in done.stderr
        assert "\r" not in done.stderr
        listed = json.loads(heyvm(there.home, "list", "--json").stdout)
        assert [one["names"] for one in listed] == [[name]]
        shown = json.loads(heyvm(there.home, "show", name, "--json").stdout)
        assert shown == listed[0]
        assert f"digest: {shown['digest']}" in heyvm(there.home, "show", name).stdout

        there.use(there.get(name), "web")
        refused = heyvm(there.home, "rm", name)
        assert refused.returncode == 1
        assert "web" in refused.stderr
        there.registry.remove("sb-web")
        assert json.loads(heyvm(there.home, "prune", "--json").stdout) == listed
        gone = heyvm(there.home, "rm", name)
        assert (gone.returncode, gone.stderr) == (1, f"heyvm: Image not found: {name}\n")


def test_import_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "root.tar"
    path.write_bytes(ROOT)
    with store() as there:
        assert heyvm(there.home, "import", "mine", str(path)).returncode == 0
        done = heyvm(there.home, "import", "piped", "-", input=ROOT, text=False)
        assert done.returncode == 0, done.stderr
        assert there.get("piped").names == ("mine:latest", "piped:latest")
        wrong = heyvm(there.home, "import", "bad", str(path), "--sha256", "0" * 64)
        assert (wrong.returncode, "sha256" in wrong.stderr) == (1, True)
        assert heyvm(there.home, "import", "bad", str(path), "--sha256", "x").returncode == 2
        assert heyvm(there.home, "import", "bad", str(tmp_path / "missing")).returncode == 1


def test_the_command_line_tells_what_is_wrong(tmp_path: Path) -> None:
    assert "COMMAND" in heyvm(tmp_path).stdout
    assert heyvm(tmp_path, "pull").returncode == 2
    missing = heyvm(tmp_path, "pull", "127.0.0.1:1/x")
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].startswith("heyvm: registry 127.0.0.1:1 cannot be")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make it somebody else's")
def test_another_users_data_directory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    os.chown(tmp_path / "data", 1234, 1234)
    done = heyvm(tmp_path, "list")
    assert done.returncode == 2
    assert "belongs to user 1234" in done.stderr


def assert_tidy(server: Server) -> None:
    """Nothing is under way, and nothing lies about."""
    assert list((server.data_dir / "images").glob(".work-*")) == []
    trash = server.data_dir / "trash"
    wait_until(lambda: not list(trash.glob("image.*")), "the trash is empty")
    assert [p.name for p in server.data_dir.glob("tmp*")] == []
