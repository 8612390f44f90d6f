"""The API under repetition, races and restarts: every answer is a documented one, and true."""

from __future__ import annotations

import contextlib
import io
import random
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.server import (
    Server,
    Session,
    create,
    wait_until,
)

Make = Callable[..., dict[str, Any]]
SCHEDULE_S = 15.0
PLAYERS = 8
PARALLEL = 50
ACTIONS = ("start", "stop", "restart", "force-stop", "execute", "list", "upload", "get", "patch")
# 409: its end was wanted meanwhile, or it does not run. 502: its agent was killed beneath the call.
# 503: it waited longer for its turn than it may.
DOCUMENTED = {200, 201, 204, 404, 409, 502, 503}
SETTLED = {"running", "stopped", "failed"}


@pytest.fixture
def own() -> Iterator[Server]:
    with Server() as running:
        yield running


def run(http: Session, ref: str, command: str) -> str:
    answer = http.post(f"/sandboxes/{ref}/execute", json={"command": command})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


# -- everything at once --------------------------------------------------------------------------


class Player(threading.Thread):
    """Asks for anything that can be done with one sandbox until its time is over."""

    def __init__(self, server: Server, ref: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.server, self.path, self.dice = server, f"/sandboxes/{ref}", random.Random(seed)
        self.wrong: list[str] = []
        self.calls = 0
        self.start()

    def run(self) -> None:
        end = time.monotonic() + SCHEDULE_S
        with self.server.http() as http:
            while time.monotonic() < end:
                action = self.dice.choice(ACTIONS)
                answer = self.act(http, action)
                self.calls += 1
                if answer.status_code not in DOCUMENTED:
                    self.wrong.append(f"{action}: {answer.status_code} {answer.text}")

    def act(self, http: Session, action: str) -> requests.Response:
        if action == "execute":
            return http.post(f"{self.path}/execute", json={"command": "echo x; sleep 0.05"})
        if action == "list":
            return http.get(f"{self.path}/files")
        if action == "upload":
            form = {"file_path": (None, "f"), "file": ("f", b"x" * 1000)}
            return http.post(f"{self.path}/files", files=form)
        if action == "get":
            return http.get(self.path)
        if action == "patch":
            return http.patch(self.path, json={"env_vars": {"A": str(self.dice.random())}})
        return http.post(f"{self.path}/{action}")


@pytest.mark.parametrize("with_delete", [False, True])
def test_anything_at_any_time_ends_well(with_delete: bool, own: Server) -> None:
    with own.http() as http:
        ref = create(http, start_command="sleep 1000")["id"]
        players = [Player(own, ref, seed) for seed in range(PLAYERS)]
        if with_delete:
            time.sleep(SCHEDULE_S / 3)  # in the middle of it
            began = time.monotonic()
            assert http.delete(f"/sandboxes/{ref}").status_code == 204
            assert time.monotonic() - began < 5 + 2  # and what a busy machine takes
            assert http.get(f"/sandboxes/{ref}").status_code == 404
        for player in players:
            player.join(90)
            assert not player.is_alive(), "a call never came back"

        assert [line for player in players for line in player.wrong] == []
        assert sum(player.calls for player in players) > 50
        if with_delete:
            assert http.get("/sandboxes?status=all").json() == []
            wait_until(lambda: not own.sandbox_pids(), "nothing of it runs")
        else:
            assert http.get(f"/sandboxes/{ref}").json()["status"] in SETTLED
            assert http.post(f"/sandboxes/{ref}/start").json()["status"] == "running"
            assert run(http, ref, "echo fine") == "fine\n"
            starts = run(http, ref, "pgrep -c -x -f 'sleep 1000'")
            assert starts == "1\n"
    assert "Traceback" not in own.log


def test_of_many_deletes_at_once_each_is_a_204_or_a_404(server: Server, http: Session) -> None:
    ref = create(http, start_command="trap '' TERM; while :; do sleep 1; done")["id"]

    def delete(_: int) -> int:
        with server.http() as each:
            return each.delete(f"/sandboxes/{ref}").status_code

    with ThreadPoolExecutor(10) as pool:
        statuses = list(pool.map(delete, range(10)))

    assert set(statuses) <= {204, 404}
    assert 204 in statuses
    again = http.delete(f"/sandboxes/{ref}")
    assert again.status_code == 404
    assert "deleted" in again.json()["detail"]
    for verb in ("start", "stop", "restart", "force-stop"):
        assert http.post(f"/sandboxes/{ref}/{verb}").status_code == 404


def test_fifty_creates_of_one_name_have_slugs_of_their_own(server: Server) -> None:
    def make(_: int) -> dict[str, Any]:
        with server.http() as each:
            return create(each, name="Of One Name")

    with ThreadPoolExecutor(PARALLEL) as pool:
        made = list(pool.map(make, range(PARALLEL)))

    expected = {"of-one-name", *(f"of-one-name-{number}" for number in range(2, PARALLEL + 1))}
    assert {one["slug"] for one in made} == expected
    assert len({one["id"] for one in made}) == PARALLEL
    with server.http() as http:
        for one in made:
            assert http.get(f"/sandboxes/{one['slug']}").json()["id"] == one["id"]
            assert http.delete(f"/sandboxes/{one['id']}").status_code == 204


def test_of_many_creates_with_one_slug_one_wins(server: Server, http: Session) -> None:
    def make(_: int) -> requests.Response:
        with server.http() as each:
            return each.post("/sandboxes", json={"slug": "only-one"})

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(make, range(20)))

    assert sorted(answer.status_code for answer in answers) == [201, *[409] * 19]
    assert http.delete("/sandboxes/only-one").status_code == 204


def test_a_limit_holds_whoever_comes_at_once() -> None:
    with Server(HEYVM_MAX_SANDBOXES="3") as small, small.http() as http:

        def make(_: int) -> requests.Response:
            with small.http() as each:
                return each.post("/sandboxes", json={})

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(make, range(20)))

        assert sorted(answer.status_code for answer in answers) == [*[201] * 3, *[429] * 17]
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert "HEYVM_MAX_SANDBOXES" in refused.json()["detail"]
        assert len(http.get("/sandboxes").json()) == 3


# -- said again ----------------------------------------------------------------------------------


def test_a_key_is_one_sandbox_at_once_and_after_a_restart(own: Server) -> None:
    key = {"Idempotency-Key": "order-66"}
    body = {"name": "one", "ttl_seconds": 3600}

    def make(_: int) -> requests.Response:
        with own.http() as each:
            return each.post("/sandboxes", json=body, headers=key)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(make, range(8)))
    assert [answer.status_code for answer in answers] == [201] * 8
    (ref,) = {answer.json()["id"] for answer in answers}
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1

    own.kill()
    own.start()

    again = make(0)
    assert (again.status_code, again.json()["id"]) == (201, ref)
    assert again.headers["Idempotent-Replayed"] == "true"
    with own.http() as http:
        reordered = dict(reversed(body.items()))
        same = http.post("/sandboxes", json=reordered, headers=key)
        assert same.json()["id"] == ref
        assert http.post("/sandboxes", json={"name": "two"}, headers=key).status_code == 409
        assert len(http.get("/sandboxes?status=all").json()) == 1
        assert http.delete(f"/sandboxes/{ref}").status_code == 204
        assert make(0).status_code == 409


def test_a_create_that_is_not_waited_for_can_be_waited_for(http: Session, server: Server) -> None:
    answer = http.post(
        "/sandboxes", json={"setup_hooks": ["sleep 1"]}, headers={"Prefer": "respond-async"}
    )
    assert (answer.status_code, answer.json()["status"]) == (202, "provisioning")
    assert int(answer.headers["Retry-After"]) >= 1
    path = answer.headers["Location"]

    early = http.get(f"{path}?wait=running&timeout=0.1")
    assert (early.status_code, early.json()["status"]) == (200, "provisioning")
    assert http.get(f"{path}?wait=running&timeout=30").json()["status"] == "running"
    assert http.get(f"{path}?wait=stopped&timeout=0.1").json()["status"] == "running"
    assert http.get(f"{path}?wait=nonsense").status_code == 422
    assert http.delete(path).status_code == 204


def test_a_create_that_fails_unseen_says_why_in_its_record(http: Session) -> None:
    answer = http.post(
        "/sandboxes",
        json={"setup_hooks": ["echo the reason; exit 7"]},
        headers={"Prefer": "respond-async"},
    )
    path = answer.headers["Location"]

    record = http.get(f"{path}?wait=running&timeout=30").json()

    assert record["status"] == "failed"
    assert "exit code 7" in record["error_message"]
    assert "the reason" in record["error_message"]
    assert http.delete(path).status_code == 204


def test_a_server_that_is_killed_during_a_create_leaves_no_half_of_it(own: Server) -> None:
    with own.http() as http:
        path = http.post(
            "/sandboxes", json={"setup_hooks": ["sleep 600"]}, headers={"Prefer": "respond-async"}
        ).headers["Location"]
        wait_until(lambda: own.sandbox_pids(), "its hook runs")
    own.kill()

    own.start()

    with own.http() as http:
        wait_until(lambda: http.get(path).json()["status"] == "failed", "failed", timeout=5)
        wait_until(lambda: not own.sandbox_pids(), "nothing of it runs", timeout=5)
        assert http.post(f"{path}/start").json()["status"] == "running"


# -- reading -------------------------------------------------------------------------------------


def test_pages_show_each_that_stays_once_while_others_come_and_go(own: Server) -> None:
    with own.http() as http:
        staying = [create(http, name=f"stays-{number}")["id"] for number in range(7)]
        going = [create(http, name=f"goes-{number}")["id"] for number in range(4)]
        seen: list[str] = []
        url: str | None = "/sandboxes?limit=2"
        while url:
            answer = http.get(url)
            assert answer.status_code == 200
            seen += [one["id"] for one in answer.json()]
            if going:
                http.delete(f"/sandboxes/{going.pop()}")
                http.delete(f"/sandboxes/{create(http)['id']}")
            url = answer.links["next"]["url"] if "next" in answer.links else None

        assert [ref for ref in seen if ref in staying] == staying
        assert len(seen) == len(set(seen))
        cursor = requests.utils.unquote(http.get("/sandboxes?limit=2").links["next"]["url"])
        for wrong in (cursor[:-1], cursor + "A", cursor[:-3] + "AAA"):
            assert http.get(wrong).status_code == 400, wrong


GETS = (
    "/health", "/capabilities", "/openapi.json", "/docs", "/sandboxes", "/sandboxes?status=all",
    "/sandboxes/inactive", "{}", "{}/files", "{}/files/f", "{}/logs", "{}/mounts",
    "/sandboxes/none", "{}/files/none", "/none",
)  # fmt: skip


def test_head_is_get_without_its_body_and_get_changes_nothing(http: Session, sandbox: Make) -> None:
    path = f"/sandboxes/{sandbox()['id']}"
    run(http, path.rpartition("/")[2], "echo content > f")
    http.post(f"{path}/force-stop")
    before = http.get(path).json()
    for route in GETS:
        url = route.format(path)
        get, head = http.get(url), http.head(url)
        assert (head.status_code, head.content) == (get.status_code, b""), url
        assert head.headers["Content-Type"] == get.headers["Content-Type"], url
        if get.ok:  # a problem tells its method
            length = head.headers.get("Content-Length", len(get.content))
            assert int(length) == len(get.content), url
    assert http.get(path).json() == before


def test_a_compressed_body_is_not_unpacked(http: Session) -> None:
    import gzip

    bomb = gzip.compress(b'{"name": "' + b"x" * 50_000_000 + b'"}')
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert http.post("/sandboxes", data=bomb, headers=headers).status_code == 415


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    ["/etc/passwd", "../../../../etc/passwd", "/proc/self/root/etc/passwd", "/proc/1/root",
     "/proc/self/cwd/../etc/passwd", "/proc/self/fd/0", "/dev/zero", "/dev/full", "/"],
)  # fmt: skip
def test_no_link_leads_out_of_a_mount(target: str, http: Session, sandbox: Make) -> None:
    ref = sandbox()["id"]
    path = f"/sandboxes/{ref}/files"
    run(http, ref, f"ln -s {target} link; md5sum /etc/passwd > /tmp/sum")

    for below in ("link", "link/passwd", "link/etc/passwd"):
        answer = http.get(f"{path}/{below}")
        assert answer.status_code in (400, 404, 409), (below, answer.text)
        assert "root:" not in answer.text
    assert http.get(f"{path}?path=link").status_code in (400, 404, 409)
    (entry,) = http.get(path).json()["files"]
    assert entry["type"] == "symlink"
    below = {"mount_path": "/workspace", "file_path": "link/new", "content": "eA=="}
    assert http.post(f"{path}/upload", json=below).status_code in (400, 404, 409)
    assert http.post(f"{path}/upload", json={**below, "file_path": "link"}).status_code == 201
    assert run(http, ref, "stat -c %F link; md5sum -c /tmp/sum") == (
        "regular file\n/etc/passwd: OK\n"
    )


def test_a_directory_that_is_swapped_for_a_link_does_not_aim_uploads(
    server: Server, http: Session, sandbox: Make
) -> None:
    ref = sandbox()["id"]
    swap = "mkdir -p real /etc/aim; ln -s /etc/aim out; mv -T real d; while :; do mv -T d r; mv -T out d; mv -T d out; mv -T r d; done"  # noqa: E501
    started = http.patch(f"/sandboxes/{ref}", json={"start_command": swap})
    assert started.status_code == 200

    statuses = set()
    for number in range(150):
        body = {"file_path": f"d/{number}", "content": "eA==", "mount_path": "/workspace"}
        statuses.add(http.post(f"/sandboxes/{ref}/files/upload", json=body).status_code)

    assert statuses <= {201, 400, 404, 409}
    assert run(http, ref, "ls /etc/aim") == ""


@pytest.mark.parametrize(
    "make", ["mkfifo x", "perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new(Local => q(x))'"]
)
def test_what_is_no_file_is_refused_at_once_and_can_be_deleted(
    make: str, http: Session, sandbox: Make
) -> None:
    ref = sandbox()["id"]
    run(http, ref, f"{make} || mkfifo x")
    began = time.monotonic()

    assert http.get(f"/sandboxes/{ref}/files/x").status_code == 400

    assert time.monotonic() - began < 5
    assert http.delete(f"/sandboxes/{ref}/files/x").status_code == 204
    assert http.get(f"/sandboxes/{ref}/files").json()["files"] == []


def test_a_place_that_cannot_take_a_file_is_a_409(http: Session, sandbox: Make) -> None:
    ref = sandbox()["id"]
    run(http, ref, "mkdir dir; echo x > file; echo x > dir/file")

    def upload(path: str) -> int:
        body = {"mount_path": "/workspace", "file_path": path, "content": "eA=="}
        return http.post(f"/sandboxes/{ref}/files/upload", json=body).status_code

    assert [upload(path) for path in ("dir", "file/below")] == [409, 409]
    assert upload("") in (400, 422)
    assert http.delete(f"/sandboxes/{ref}/files/dir").status_code == 409
    assert http.delete(f"/sandboxes/{ref}/files/").status_code >= 400
    assert http.delete(f"/sandboxes/{ref}/files/dir?recursive=true").status_code == 204
    assert run(http, ref, "ls; cat file") == "file\nx\n"


@pytest.mark.parametrize(
    "name", ["nul\0", "line\nfeed", "car\rriage", "x" * 256, "/".join(["x" * 200] * 25), "a/../b"]
)
def test_a_name_that_cannot_be_is_a_400_by_every_door(
    name: str, http: Session, sandbox: Make
) -> None:
    path = f"/sandboxes/{sandbox()['id']}/files"
    quoted = requests.utils.quote(name, safe="")
    body = {"mount_path": "/workspace", "file_path": name, "content": "eA=="}

    for answer in (
        http.get(f"{path}/{quoted}"),
        http.delete(f"{path}/{quoted}"),
        http.get(f"{path}?path={quoted}"),
        http.post(f"{path}/upload", json=body),
    ):
        assert answer.status_code in (400, 422), answer.text
        assert answer.headers["Content-Type"] == "application/problem+json"


def test_names_that_differ_in_little_are_different_files(http: Session, sandbox: Make) -> None:
    ref = sandbox()["id"]
    names = ["a", "A", "a.", "a ", " a", "a\t", ".a", "ａ", "é", "e\u0301", "a%2Fb", "-a", "~a"]
    for name in names:
        content = requests.utils.quote(name)
        form = {"file_path": (None, name), "file": ("f", content)}
        assert http.post(f"/sandboxes/{ref}/files", files=form).status_code == 201

    listed = {one["name"] for one in http.get(f"/sandboxes/{ref}/files").json()["files"]}

    assert listed == set(names)
    for name in names:
        quoted = requests.utils.quote(name, safe="")
        content = http.get(f"/sandboxes/{ref}/files/{quoted}").content
        assert content.decode() == requests.utils.quote(name)


def test_of_uploads_at_once_one_whole_one_wins(
    server: Server, http: Session, sandbox: Make
) -> None:
    ref = sandbox()["id"]

    def upload(number: int) -> int:
        with server.http() as each:
            form = {"file_path": (None, "f"), "file": ("f", bytes([number]) * 2_000_000)}
            return each.post(f"/sandboxes/{ref}/files", files=form).status_code

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(upload, range(8))) == [201] * 8

    content = http.get(f"/sandboxes/{ref}/files/f").content
    assert len(content) == 2_000_000
    assert len(set(content)) == 1
    assert run(http, ref, "ls -A") == "f\n"


def entry(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    "entries",
    [
        [entry("../slip")],
        [entry("/etc/slip")],
        [entry("a/../../slip")],
        [entry("d", type=tarfile.SYMTYPE, linkname="/etc"), entry("d/slip")],
        [entry("l", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
        [entry("l", type=tarfile.LNKTYPE, linkname="../../etc/passwd")],
        [entry("b", type=tarfile.BLKTYPE, devmajor=8)],
        [entry("c", type=tarfile.CHRTYPE, devmajor=1, devminor=1)],
    ],
    ids=["climbs", "absolute", "climbs later", "through a link", "hard link", "climbing hard link",
         "block device", "character device"],
)  # fmt: skip
def test_an_archive_that_reaches_out_changes_nothing(
    entries: list[tarfile.TarInfo], http: Session, sandbox: Make
) -> None:
    ref = sandbox()["id"]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for info in (entry("first"), *entries):
            tar.addfile(info)

    answer = http.post(
        f"/sandboxes/{ref}/files?format=tar",
        data=packed.getvalue(),
        headers={"Content-Type": "application/x-tar"},
    )

    assert answer.status_code in (400, 409), answer.text
    assert run(http, ref, "find /workspace -mindepth 1; ls -d /slip /etc/slip 2>/dev/null") == ""


def test_nothing_of_the_servers_directory_is_in_reach(
    server: Server, http: Session, sandbox: Make
) -> None:
    ref = sandbox()["id"]
    look = f"ls -d {server.home} {server.data_dir}; ls -d root.work /root.work"
    assert run(http, ref, f"({look}) 2>/dev/null; true") == ""
    found = "find / -xdev \\( -name registry.db -o -name keeper.lock -o -name '*.sock' \\)"
    assert run(http, ref, f"{found} 2>/dev/null; true") == ""


def test_clients_that_leave_during_a_create_leave_one_sandbox_or_none(own: Server) -> None:
    with own.http() as http:
        for _ in range(5):
            with contextlib.suppress(requests.ReadTimeout):
                http.post("/sandboxes", json={"setup_hooks": ["sleep 0.5"]}, timeout=0.15)

        def settled() -> bool:
            found = http.get("/sandboxes?status=all").json()
            return all(one["status"] in SETTLED for one in found)

        wait_until(settled, "each is settled")
        rows = http.get("/sandboxes?status=all").json()
        assert len(rows) <= 5
        for row in rows:
            assert http.delete(f"/sandboxes/{row['id']}").status_code == 204
        wait_until(lambda: not own.sandbox_pids(), "nothing is left")
