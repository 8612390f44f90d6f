"""A real nginx before a real server, and before servers inside sandboxes, some of them hostile.

What does not depend on nginx is tried along every way in: through nginx, to gunicorn by Host, and
by a local port.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from heyvm.problems import MEDIA_TYPE
from tests import webapp
from tests.nginx import HOSTNAME, Answer, Nginx, traversable
from tests.server import Server, Session, create, run, wait_until
from tests.ways import Connection, Way, everything, expose, lines_of

GIB = 1024 * 1024 * 1024
SECRET = "a secret for tests, of more than 32 bytes"
WAYS = ("nginx", "host", "local")
ANSWER_S = 2


@dataclass(frozen=True)
class Site:
    """A sandbox with a web server in it, and a public and a private endpoint that lead there."""

    id: str
    public: str
    private: str

    @property
    def public_name(self) -> str:
        return f"{self.public}.{HOSTNAME}"

    @property
    def private_name(self) -> str:
        return f"{self.private}.{HOSTNAME}"


@pytest.fixture(scope="module")
def ports() -> Iterator[Path]:
    with traversable() as directory:
        yield directory / "p"


@pytest.fixture(scope="module")
def front(ports: Path) -> Iterator[Server]:
    """The server behind nginx."""
    settings = {"HEYVM_PORTS_DIR": str(ports), "HEYVM_PORTS_GROUP": "www-data"}
    settings["HEYVM_LOG"] = "json"
    with Server(API_HOSTNAME=HOSTNAME, JWT_SECRET=SECRET, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def nginx(front: Server, ports: Path) -> Iterator[Nginx]:
    upstream = f"127.0.0.1:{front.port}"
    with Nginx(upstream=upstream, ports_dir=ports, ANSWER_TIMEOUT=f"{ANSWER_S}s") as running:
        yield running


@pytest.fixture(scope="module")
def api(front: Server) -> Iterator[Session]:
    with front.http() as session:
        session.headers.update(front.authorization())
        yield session


@pytest.fixture(scope="module")
def site(api: Session, nginx: Nginx, front: Server) -> Site:
    made = make_site(api)
    await_site(host_way(front, made.public))
    return made


@pytest.fixture
def another(api: Session, front: Server) -> Iterator[Site]:
    """One that a test may stop, pause, delete."""
    made = make_site(api)
    await_site(host_way(front, made.public))
    yield made
    assert api.delete(f"/sandboxes/{made.id}").status_code in (204, 404)


def make_site(http: Session) -> Site:
    ref = create(http, start_command=webapp.command())["id"]
    public, private = (expose(http, ref, public=one)["subdomain"] for one in (True, False))
    return Site(ref, public, private)


def await_site(way: Way) -> None:
    wait_until(lambda: way.request("/").status == 200, "the server inside answers")


def nginx_way(nginx: Nginx, subdomain: str) -> Way:
    name = f"{subdomain}.{HOSTNAME}"
    return Way("nginx", name, lambda: nginx.connect(name))


def host_way(server: Server, subdomain: str) -> Way:
    return Way(
        "host",
        f"{subdomain}.{HOSTNAME}",
        lambda: socket.create_connection(("127.0.0.1", server.port), timeout=10),
    )


@pytest.fixture(scope="module")
def local_way(server: Server) -> Iterator[Way]:
    """A local port of a server without API_HOSTNAME."""
    with server.http() as http:
        ref = create(http, start_command=webapp.command())["id"]
        port = expose(http, ref)["local_port"]
        way = Way(
            "local",
            f"localhost:{port}",
            lambda: socket.create_connection(("127.0.0.1", port), timeout=10),
        )
        await_site(way)
        yield way
        assert http.delete(f"/sandboxes/{ref}").status_code == 204


@pytest.fixture
def way(request: pytest.FixtureRequest, site: Site, nginx: Nginx, front: Server) -> Way:
    """By `@pytest.mark.parametrize("way", [...], indirect=True)`; to the public endpoint."""
    if request.param == "local":
        found: Way = request.getfixturevalue("local_way")
        return found
    if request.param == "host":
        return host_way(front, site.public)
    return nginx_way(nginx, site.public)


def every_way(*names: str) -> Any:
    return pytest.mark.parametrize("way", names or WAYS, indirect=True)


def assert_problem(status: int, answer: Any, kind: str) -> dict[str, Any]:
    """Of http.client's answer, or curl's."""
    is_curl = isinstance(answer, Answer)
    text = answer.body if is_curl else answer.read()
    assert answer.status == status, text
    assert answer.headers["content-type"] == MEDIA_TYPE
    problem = json.loads(text)
    assert problem["type"] == f"urn:heyvm:problem:{kind}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"] == problem["error"] == problem["message"]
    return dict(problem)


# -- what passes -----------------------------------------------------------------------------------


@every_way()
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE", "PATCH"])
def test_a_request_arrives_as_it_was_sent(way: Way, method: str) -> None:
    target = "/a//b/%2F/..;x/%41?q=%26&r=;s"
    body = b"\0\r\n" * 1000 if method in ("POST", "PATCH") else None

    got = json.loads(way.request(target, method, body).read())

    assert (got["method"], got["target"]) == (method, target)
    assert got["sha256"] == hashlib.sha256(body or b"").hexdigest()


@every_way()
def test_head_has_the_headers_and_no_body(way: Way) -> None:
    connection = Connection(way)

    answer = connection.ask("/refusal?404", "HEAD")

    assert (answer.status, answer.read()) == (404, b"")
    assert answer.headers["content-length"] == str(len(b"my own words"))
    assert connection.ask("/").status == 200


@every_way()
@pytest.mark.parametrize("status", [404, 500, 502, 503, 504])
def test_an_application_s_own_error_is_its_own(way: Way, status: int) -> None:
    answer = way.request(f"/refusal?{status}")

    assert (answer.status, answer.read()) == (status, b"my own words")


@every_way()
def test_a_websocket_says_and_hears(way: Way) -> None:
    websocket = way.websocket()

    assert websocket.status == 101
    assert websocket.ask(b"one") == b"one"
    assert websocket.ask(b"two") == b"two"
    websocket.say(b"", opcode=8)
    assert (websocket.hear(), websocket.hear()) == (b"", b"")
    websocket.close()


@every_way("nginx")
def test_a_websocket_may_be_silent_for_longer_than_an_answer(way: Way) -> None:
    websocket = way.websocket()
    websocket.ask(b"one")

    time.sleep(ANSWER_S + 0.5)

    assert websocket.ask(b"two") == b"two"
    websocket.close()


@every_way()
def test_an_event_arrives_before_the_next_is_sent(way: Way) -> None:
    lines = lines_of(way.send(b"GET /events HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n"))

    assert any(line == b"data: first\n" for line in lines)
    assert way.request("/go-on").status == 200
    assert any(line == b"data: second\n" for line in lines)


@every_way()
def test_chunks_go_both_ways_at_once(way: Way) -> None:
    sock = way.send(
        b"POST /there-and-back HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n"
        b"Connection: close\r\n\r\n"
    )
    lines = lines_of(sock)

    for number in range(3):
        sock.sendall(b"6\r\nline%d\n\r\n" % number)
        assert any(line == b"line%d\n" % number for line in lines)
    sock.sendall(b"0\r\n\r\n")
    assert any(line == b"0\r\n" for line in lines)


@every_way()
def test_requests_share_a_connection(way: Way) -> None:
    connection = Connection(way)

    for number in range(5):
        answer = connection.ask(f"/x?{number}", "POST", b"x" * number)
        assert json.loads(answer.read())["size"] == number
        assert not answer.will_close


@every_way()
def test_a_client_that_waits_for_100_is_told_to_go_on(way: Way) -> None:
    sock = way.send(
        b"POST /x HTTP/1.1\r\nHost: HOST\r\nExpect: 100-continue\r\nContent-Length: 5\r\n"
        b"Connection: close\r\n\r\n"
    )
    assert sock.recv(25).startswith(b"HTTP/1.1 100 Continue\r\n")

    sock.sendall(b"hello")

    assert b'"size": 5' in everything(sock)


@every_way("host", "local")
def test_a_client_may_end_its_side_first(way: Way) -> None:
    sock = way.send(b"POST /x HTTP/1.1\r\nHost: HOST\r\nContent-Length: 5\r\n\r\nhello")
    sock.shutdown(socket.SHUT_WR)

    assert b'"size": 5' in everything(sock)


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_a_gigabyte_down(nginx: Nginx, site: Site, version: str) -> None:
    url = f"https://{site.public_name}/zeros?{GIB}"
    wanted = ["-o", "/dev/null", "-w", "%{size_download}", version, url]

    done = subprocess.run(
        [*nginx.curl_command(), *wanted], capture_output=True, check=True, timeout=60
    )

    assert int(done.stdout) == GIB


def test_a_gigabyte_up_of_unknown_length(nginx: Nginx, site: Site) -> None:
    url = f"https://{site.public_name}/count"
    upload = [*nginx.curl_command(), "--http1.1", "-T", "-", url]
    with subprocess.Popen(["head", "-c", str(GIB), "/dev/zero"], stdout=subprocess.PIPE) as source:
        done = subprocess.run(
            upload, stdin=source.stdout, capture_output=True, check=True, timeout=60
        )

    assert json.loads(done.stdout) == {"size": GIB}
    files = [path for path in nginx.home.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < GIB / 100


# -- whom they come from ---------------------------------------------------------------------------


# gunicorn believes a client on loopback, which nginx is.
@every_way("nginx")
def test_what_a_client_says_of_its_address_is_replaced(way: Way) -> None:
    lies = {
        "X-Forwarded-For": "192.0.2.1",
        "X-Real-IP": "192.0.2.2",
        "Forwarded": "for=192.0.2.3",
        "X-Forwarded-Host": "bank.example",
        "X-Forwarded-Proto": "gopher",
        "X_Forwarded_For": "192.0.2.4",
        "Proxy": "192.0.2.5",
        "Connection": "X-Forwarded-For, X-Real-IP",
    }

    seen = json.loads(way.request("/x", headers=lies).read())["headers"]

    said = [(name.lower(), value) for name, value in seen]
    assert "192.0.2." not in repr(seen)
    assert ("x-forwarded-for", "127.0.0.1") in said
    assert ("x-real-ip", "127.0.0.1") in said
    assert ("x-forwarded-host", way.host) in said
    assert ("x-forwarded-proto", "https") in said
    assert len([name for name, _ in said if name == "x-forwarded-for"]) == 1


@every_way("nginx", "host")
def test_a_request_id_is_passed_on_and_logged(way: Way, nginx: Nginx) -> None:
    mark = f"mine-{secrets.token_hex(8)}"

    seen = json.loads(way.request("/x", headers={"X-Request-Id": mark}).read())["headers"]

    assert ["x-request-id", mark] in [[name.lower(), value] for name, value in seen]
    if way.name == "nginx":
        wait_until(lambda: any(one["request_id"] == mark for one in nginx.accesses()), "logged")
        [entry] = [one for one in nginx.accesses() if one["request_id"] == mark]
        assert (entry["path"], entry["status"], entry["client"]) == ("/x", 200, "127.0.0.1")


# -- credentials -----------------------------------------------------------------------------------


@pytest.fixture(params=["nginx", "host"])
def private(request: pytest.FixtureRequest, site: Site, nginx: Nginx, front: Server) -> Way:
    """A way to the private endpoint."""
    if request.param == "nginx":
        return nginx_way(nginx, site.private)
    return host_way(front, site.private)


def cookie_from(way: Way, api: Session, site: Site, path: str = "/") -> str:
    """Follow a fresh link; the cookie that it gives, as a browser would send it."""
    answer = api.post(f"/sandboxes/{site.id}/proxy/{site.private}/link", json={"path": path})
    assert answer.status_code == 201, answer.text
    entered = way.request(answer.json()["url"].partition(HOSTNAME)[2])
    assert entered.status == 303, entered.read()
    assert entered.headers["location"] == path
    return str(entered.headers["set-cookie"].partition(";")[0])


def headers_seen(answer: Any) -> dict[str, str]:
    text = answer.read()
    assert answer.status == 200, text
    return {name.lower(): value for name, value in json.loads(text)["headers"]}


def test_a_stranger_is_refused(private: Way) -> None:
    answer = private.request("/x", "POST", b"hello")

    assert_problem(401, answer, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_stranger_is_refused_a_websocket(private: Way) -> None:
    websocket = private.websocket()

    assert websocket.status == 401
    websocket.close()


def test_a_bearer_opens_a_private_endpoint_and_stays_outside(private: Way, front: Server) -> None:
    headers = {**front.authorization(), "Cookie": "heyvm=old; theirs=1; __Host-heyvm=old"}

    seen = headers_seen(private.request("/x", "POST", b"hello", headers=headers))

    assert "authorization" not in seen
    assert seen["cookie"] == "theirs=1"


def test_a_link_s_cookie_opens_a_private_endpoint_and_stays_outside(
    private: Way, api: Session, site: Site
) -> None:
    cookie = cookie_from(private, api, site, "/docs?page=2")
    headers = {"Cookie": f"a=1; {cookie}; b=2", "Authorization": "Basic dGhlaXJzOm93bg=="}

    seen = headers_seen(private.request("/x", headers=headers))

    assert seen["cookie"] == "a=1; b=2"
    assert seen["authorization"] == "Basic dGhlaXJzOm93bg=="
    websocket = private.websocket({"Cookie": cookie})
    assert websocket.ask(b"hello") == b"hello"
    websocket.close()


def test_a_cookie_is_good_for_one_endpoint(
    private: Way, api: Session, site: Site, another: Site, nginx: Nginx, front: Server
) -> None:
    cookie = cookie_from(private, api, site)
    make = nginx_way if private.name == "nginx" else host_way

    answer = make(nginx if private.name == "nginx" else front, another.private).request(  # type: ignore[arg-type]
        "/x", headers={"Cookie": cookie}
    )

    assert_problem(401, answer, "unauthorized")


def test_a_cookie_is_for_pages_of_the_endpoint_s_own(
    private: Way, api: Session, site: Site, front: Server
) -> None:
    """To a browser all endpoints are one site, so it sends the cookie with their requests."""
    cookie = {"Cookie": cookie_from(private, api, site)}
    scheme = "https" if private.name == "nginx" else "http"
    own = {"Origin": f"{scheme}://{private.host}", "Sec-Fetch-Site": "same-origin"}
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}
    others = [
        {"Origin": f"{scheme}://{site.public_name}"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "image"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "iframe"},
    ]

    for headers in (own, link):
        assert private.request("/x", headers={**cookie, **headers}).status == 200
    for headers in others:
        assert_problem(403, private.request("/x", headers={**cookie, **headers}), "forbidden")
        assert private.websocket({**cookie, **headers}).status == 403
    assert private.request("/x", headers={**front.authorization(), **others[0]}).status == 200


@pytest.mark.parametrize(
    ("sent", "passed"),
    [
        ("__Host-heyvm=OURS", None),
        ("heyvm=OURS; a=1", "a=1"),
        ("a=1; heyvm=OURS", "a=1"),
        ("a=1;__Host-heyvm=OURS;b=2", "a=1;b=2"),
        ("myheyvm=1; heyvmx=2", "myheyvm=1; heyvmx=2"),
        ("a=1", "a=1"),
    ],
)
@every_way("nginx", "host")
def test_our_cookie_stays_outside_of_public_endpoints_too(
    way: Way, sent: str, passed: str | None
) -> None:
    headers = {"Cookie": sent, "Authorization": "Bearer theirs"}

    seen = headers_seen(way.request("/x", headers=headers))

    assert seen.get("cookie") == passed
    assert seen["authorization"] == "Bearer theirs"


@every_way("nginx", "host")
def test_no_number_of_cookies_hides_ours(way: Way) -> None:
    lines = b"Cookie: heyvm=1; heyvm=2; heyvm=3\r\nCookie: __Host-heyvm=OURS; heyvm=4\r\n"

    sock = way.send(b"GET /x HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n" + lines + b"\r\n")

    answer = everything(sock)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"heyvm=" not in answer


def test_no_log_holds_a_token(nginx: Nginx, site: Site, front: Server, api: Session) -> None:
    mark = secrets.token_hex(16)
    names = [HOSTNAME, site.public_name, site.private_name, f"other.{HOSTNAME}"]
    paths = ["/x", "/never", "/reset", "/headers", "/.heyvm/enter", "/" + "x" * 9000]
    sent = b"".join(
        b"GET %b?token=%b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n"
        % (path.encode(), mark.encode(), name.encode())
        for name in names
        for path in paths
    )

    for request in sent.split(b"GET ")[1:]:
        sock = nginx.connect()
        sock.sendall(b"GET " + request)
        assert everything(sock)

    assert "/.heyvm/enter" in nginx.log
    assert mark not in nginx.log
    assert mark not in front.log


# -- what nginx or gunicorn says instead -----------------------------------------------------------


@pytest.mark.parametrize("name", ["nginx", "host"])
def test_an_unknown_endpoint(name: str, nginx: Nginx, front: Server) -> None:
    unknown = "0123456789abcdef"
    way = nginx_way(nginx, unknown) if name == "nginx" else host_way(front, unknown)

    assert_problem(404, way.request("/x"), "not-found")
    assert_problem(404, way.request("/x", "POST", iter([b"hello"])), "not-found")
    head = way.request("/x", "HEAD")
    assert (head.status, head.read()) == (404, b"")
    websocket = way.websocket()
    assert websocket.status == 404
    websocket.close()


@pytest.mark.parametrize("name", ["nginx", "host"])
@pytest.mark.parametrize("public", [True, False], ids=["public", "private"])
def test_nobody_listens(
    name: str, public: bool, nginx: Nginx, front: Server, api: Session, site: Site
) -> None:
    subdomain = expose(api, site.id, 1, public=public)["subdomain"]
    way = nginx_way(nginx, subdomain) if name == "nginx" else host_way(front, subdomain)
    headers = front.authorization()

    assert_problem(502, way.request("/x", headers=headers), "port-closed")
    for body in (b"hello", iter([b"hello"])):
        answer = way.request("/x", "POST", body, headers=headers)
        assert_problem(502, answer, "port-closed")
    api.delete(f"/sandboxes/{site.id}/proxy", params={"subdomain": subdomain})


def test_the_life_of_a_sandbox_as_its_endpoints_tell(
    another: Site, nginx: Nginx, front: Server, api: Session
) -> None:
    ways = [nginx_way(nginx, another.public), host_way(front, another.public)]
    ways += [nginx_way(nginx, another.private), host_way(front, another.private)]
    headers = front.authorization()

    def assert_all(status: int, kind: str) -> None:
        for way in ways:
            assert_problem(status, way.request("/x", headers=headers), kind)

    assert api.post(f"/sandboxes/{another.id}/pause").status_code == 200
    assert_all(503, "unavailable")
    assert api.post(f"/sandboxes/{another.id}/resume").status_code == 200
    assert [way.request("/x", headers=headers).status for way in ways] == [200] * 4
    assert api.post(f"/sandboxes/{another.id}/stop").status_code == 200
    assert_all(503, "unavailable")
    assert api.post(f"/sandboxes/{another.id}/start").status_code == 200
    wait_until(lambda: ways[0].request("/x").status == 200, "the same name works again")
    assert [way.request("/x", headers=headers).status for way in ways] == [200] * 4
    assert api.delete(f"/sandboxes/{another.id}").status_code == 204
    assert_all(404, "not-found")


def test_who_may_use_it_is_changed_while_it_is_used(
    another: Site, nginx: Nginx, front: Server, api: Session
) -> None:
    way = nginx_way(nginx, another.public)
    route = f"/sandboxes/{another.id}/proxy/{another.public}"
    websocket = way.websocket()
    assert websocket.ask(b"hello") == b"hello"

    assert api.patch(route, json={"is_public": False}).status_code == 200

    assert websocket.hear() == b""
    websocket.close()
    assert_problem(401, way.request("/x"), "unauthorized")
    assert way.request("/x", headers=front.authorization()).status == 200
    assert api.patch(route, json={"is_public": True}).status_code == 200
    assert way.request("/x").status == 200


def test_delete_cuts_what_is_open(another: Site, nginx: Nginx, front: Server, api: Session) -> None:
    ways = (nginx_way(nginx, another.public), host_way(front, another.public))
    websockets = [way.websocket() for way in ways]
    assert [websocket.ask(b"hello") for websocket in websockets] == [b"hello"] * 2

    answer = api.delete(f"/sandboxes/{another.id}/proxy", params={"subdomain": another.public})

    assert answer.status_code == 204
    assert [websocket.hear() for websocket in websockets] == [b""] * 2
    for websocket, way in zip(websockets, ways):
        websocket.close()
        assert_problem(404, way.request("/x"), "not-found")


def test_a_sandbox_sees_nothing_of_its_sockets(
    api: Session, site: Site, ports: Path, nginx: Nginx
) -> None:
    assert (ports / "public" / f"{site.public}.sock").is_socket()

    found = run(api, site.id, f"ls -d {ports} {ports.parent}; cat /proc/net/unix; mount")

    assert site.public not in found["stdout"]
    assert str(ports.parent) not in found["stdout"]
    run(
        api,
        site.id,
        f"mkdir -p {ports}/public && ln -s /etc/passwd {ports}/public/{site.public}.sock",
    )
    assert nginx_way(nginx, site.public).request("/x").status == 200


# -- servers inside that misbehave -----------------------------------------------------------------


@every_way("nginx", "host")
@pytest.mark.parametrize("path", ["/reset", "/nothing", "/headers"])
def test_an_answer_that_is_none(way: Way, path: str) -> None:
    began = time.monotonic()

    assert_problem(502, way.request(path), "bad-gateway")
    assert_problem(502, way.request(path, "POST", iter([b"hello"])), "bad-gateway")
    assert time.monotonic() - began < 10


@every_way("nginx")
def test_an_answer_that_never_comes(way: Way) -> None:
    assert_problem(504, way.request("/never"), "gateway-timeout")


@every_way("nginx", "host")
def test_an_answer_that_breaks_off_is_seen_to_break_off(way: Way) -> None:
    answer = everything(way.send(b"GET /short HTTP/1.1\r\nHost: HOST\r\n\r\n"))

    assert b"Content-Length: 1000\r\n" in answer or b"content-length: 1000\r\n" in answer
    assert answer.endswith(b"only this")


@every_way()
@pytest.mark.parametrize("path", ["/body", "/headers", "/1xx", "/never"])
def test_an_endless_answer_ends_with_its_client(way: Way, path: str) -> None:
    mark = f"{path}?{secrets.token_hex(8)}"
    sock = way.send(b"GET %b HTTP/1.1\r\nHost: HOST\r\n\r\n" % mark.encode())
    wait_until(lambda: seen_inside(way, "lines", mark), "it is under way")

    sock.close()

    wait_until(lambda: seen_inside(way, "gone", mark), "it has ended")


def seen_inside(way: Way, what: str, mark: str) -> bool:
    return any(mark in one for one in json.loads(way.request("/seen").read())[what])


@every_way("nginx", "host")
@pytest.mark.parametrize("target", ["/.heyvm/authorize", "/.heyvm/private/http", "/.heyvm/problem"])
def test_no_header_of_an_answer_moves_the_request_elsewhere(way: Way, target: str) -> None:
    answer = way.request(f"/accelerated?{target}")

    assert (answer.status, answer.read()) == (200, b"here")


def test_with_no_connections_kept_no_answer_is_taken_for_the_next(
    site: Site, front: Server, ports: Path
) -> None:
    """See @KEEPALIVE@ in deploy/nginx/heyvm.conf: what nginx does not frame ends the connection."""
    two = (
        b"GET /nonsense HTTP/1.1\r\nHost: HOST\r\n\r\nGET /x?second HTTP/1.1\r\nHost: HOST\r\n\r\n"
    )

    with Nginx(upstream=f"127.0.0.1:{front.port}", ports_dir=ports, KEEPALIVE="0") as careful:
        answer = everything(nginx_way(careful, site.public).send(two))

    assert b"what?" in answer
    assert b"second" not in answer


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"foo.{HOSTNAME}", f"a.b.{HOSTNAME}", f"{'x' * 17}.{HOSTNAME}"])
def test_another_name_below_is_nobody_s(nginx: Nginx, name: str) -> None:
    answer = nginx.curl(f"https://{HOSTNAME}/x", "-H", f"Host: {name}")

    assert_problem(404, answer, "not-found")


@pytest.mark.parametrize(
    "name", ["localhost", "example.com", f"{HOSTNAME}.example.com", "127.0.0.1"]
)
def test_a_name_of_others_is_misdirected(nginx: Nginx, name: str) -> None:
    answer = nginx.curl(f"https://{HOSTNAME}/x", "-H", f"Host: {name}")

    assert_problem(421, answer, "misdirected-request")


@pytest.mark.parametrize("name", [HOSTNAME, f"api.{HOSTNAME}", HOSTNAME.upper()])
def test_the_api_answers_to_its_names(nginx: Nginx, front: Server, name: str) -> None:
    bearer = f"Authorization: {front.authorization()['Authorization']}"

    assert nginx.curl(f"https://{name}/health").json()["status"] == "ok"
    assert nginx.curl(f"https://{name}/sandboxes", "-H", bearer).status == 200
    assert_problem(401, nginx.curl(f"https://{name}/sandboxes"), "unauthorized")


HOSTS = {
    "two": b"GET /x HTTP/1.1\r\nHost: HOST\r\nHost: HOST\r\n\r\n",
    "two different": b"GET /x HTTP/1.1\r\nHost: HOST\r\nHost: sandbox.test\r\n\r\n",
    "none": b"GET /x HTTP/1.1\r\n\r\n",
    "an empty one": b"GET /x HTTP/1.1\r\nHost:\r\n\r\n",
    "another in the target": b"GET https://sandbox.test/x HTTP/1.1\r\nHost: HOST\r\n\r\n",
    "the other way round": b"GET https://HOST/x HTTP/1.1\r\nHost: sandbox.test\r\n\r\n",
    "a user": b"GET https://user@HOST/x HTTP/1.1\r\nHost: HOST\r\n\r\n",
    "a slash": b"GET /x HTTP/1.1\r\nHost: HOST/..\r\n\r\n",
    "a NUL": b"GET /x HTTP/1.1\r\nHost: HOST\0\r\n\r\n",
    "a space": b"GET /x HTTP/1.1\r\nHost: HOST HOST\r\n\r\n",
    "a list": b"GET /x HTTP/1.1\r\nHost: HOST, HOST\r\n\r\n",
}


@pytest.mark.parametrize("sent", HOSTS.values(), ids=list(HOSTS))
@every_way("nginx", "host")
def test_a_host_that_can_be_read_in_two_ways(way: Way, sent: bytes) -> None:
    mark = secrets.token_hex(8).encode()

    sent = sent.replace(b"/x ", b"/x?%b " % mark).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    answer = everything(way.send(sent))

    assert re.match(rb"HTTP/1\.1 4(00|03|04|21) ", answer), answer
    assert not seen_inside(way, "lines", mark.decode())


def test_without_tls_one_is_sent_to_where_it_is(nginx: Nginx, site: Site) -> None:
    plain = f"127.0.0.1:{nginx.http_port}"
    for name in (HOSTNAME, site.public_name):
        answer = curl_plain(nginx, plain, name, "/x?y=1", "-X", "POST")
        assert (answer.status, answer.headers["location"]) == (308, f"https://{name}/x?y=1")
    assert_problem(421, curl_plain(nginx, plain, "example.com", "/x"), "misdirected-request")
    challenge = curl_plain(nginx, plain, site.public_name, "/.well-known/acme-challenge/none")
    assert_problem(404, challenge, "not-found")


def curl_plain(nginx: Nginx, address: str, name: str, path: str, *options: str) -> Answer:
    done = subprocess.run(
        ["curl", "-q", "-sSi", "--noproxy", "*", "-H", f"Host: {name}", *options]
        + [f"http://{address}{path}"],
        capture_output=True,
        check=True,
        timeout=20,
    )
    return Answer(done.returncode, done.stdout)


@pytest.mark.parametrize(
    "path", ["/.heyvm/authorize", "/.heyvm/why", "/.heyvm/private/http", "/.heyvm/nothing"]
)
@pytest.mark.parametrize("spelled", ["{}", "/{}", "/x/..{}", "/%2eheyvm{}"])
def test_our_own_paths_are_no_application_s_nor_the_world_s(
    nginx: Nginx, site: Site, path: str, spelled: str
) -> None:
    target = spelled.format(path.removeprefix("/.heyvm") if "%2e" in spelled else path)

    answer = nginx.curl(f"https://{site.public_name}{target}", "--path-as-is")

    assert_problem(404, answer, "not-found")


# -- smuggling -------------------------------------------------------------------------------------

SMUGGLED = {
    "CL.TE": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
    "TE.CL": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 50\r\n\r\n",
    "a list of lengths": b"Content-Length: 0, 50\r\n\r\n",
    "a signed length": b"Content-Length: +5\r\n\r\nhello",
    "TE.TE": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "an unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding in a list": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a quoted coding": b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "a tab before a coding": b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded coding": b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "an underscore": b"Transfer_Encoding: chunked\r\nContent_Length: 4\r\n\r\n0\r\n\r\n",
    "a carriage return": b"X: x\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a NUL": b"X: \0\r\n\r\n",
    "a chunk with a sign": b"Transfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
    "a chunk that is too long": b"Transfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n",
    "a chunk's line feed": b"Transfer-Encoding: chunked\r\n\r\n5;\nhello\r\n0\r\n\r\n",
    "a huge chunk": b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff0\r\nhello\r\n",
    "two requests": b"Content-Length: 5\r\n\r\nhello",
}
# nginx takes a line feed for the end of a chunk's first line, and writes the chunk anew.
HONEST = (SMUGGLED["two requests"], SMUGGLED["a chunk's line feed"])


@pytest.mark.parametrize("rest", SMUGGLED.values(), ids=list(SMUGGLED))
@pytest.mark.parametrize("to", ["the API", "an endpoint"])
def test_what_is_one_request_to_nginx_is_one_behind_it(
    nginx: Nginx, site: Site, front: Server, rest: bytes, to: str
) -> None:
    host = HOSTNAME if to == "the API" else site.public_name
    mark = secrets.token_hex(8)
    first = f"POST /first-{mark} HTTP/1.1\r\nHost: {host}\r\n".encode()
    hidden = f"GET /hidden-{mark} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()

    sock = nginx.connect(host)
    sock.sendall(first + rest + hidden)
    answers = re.findall(rb"HTTP/1\.1 (\d{3}) ", everything(sock))

    lines = json.loads(nginx_way(nginx, site.public).request("/seen").read())["lines"]
    heard = Counter(line.split(" ")[1] for line in lines if mark in line)
    heard += Counter(entry["path"] for entry in accesses_of(front) if mark in entry["path"])
    wait_until(lambda: heard <= paths_known(nginx, mark), "nginx knows of all that was heard")
    assert heard.total() <= len(answers)
    if rest in HONEST:
        assert sorted(heard) == [f"/first-{mark}", f"/hidden-{mark}"]
    else:
        assert f"/hidden-{mark}" not in heard


def paths_known(nginx: Nginx, mark: str) -> Counter[str]:
    return Counter(one["path"] for one in nginx.accesses() if mark in one["path"])


def accesses_of(server: Server) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    # What is forwarded is told without its path.
    return [entry for entry in entries if entry["kind"] == "access" and "path" in entry]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /x\r\n\r\n",
        b"GET /x HTTP/3.0\r\nHost: HOST\r\n\r\n",
        b"get /x http/1.1\r\nHost: HOST\r\n\r\n",
        b"GET\t/x\tHTTP/1.1\r\nHost: HOST\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT HOST:443 HTTP/1.1\r\nHost: HOST\r\n\r\n",
        b"TRACE /x HTTP/1.1\r\nHost: HOST\r\n\r\n",
        b"GET /%00 HTTP/1.1\r\nHost: HOST\r\n\r\n",
        b"GET /../../etc HTTP/1.1\r\nHost: HOST\r\n\r\n",
    ],
    ids=["0.9", "3.0", "lower case", "tabs", "a preface", "CONNECT", "TRACE", "a NUL", "above /"],
)
def test_a_head_that_nginx_does_not_take(nginx: Nginx, site: Site, head: bytes) -> None:
    before = everything_seen(nginx, site)

    answer = everything(nginx_way(nginx, site.public).send(head))

    assert answer == b"" or re.search(rb'"status":(4\d\d|50[15]),', answer), answer
    assert everything_seen(nginx, site) == before + 1


def everything_seen(nginx: Nginx, site: Site) -> int:
    return len(json.loads(nginx_way(nginx, site.public).request("/seen").read())["lines"])


# -- nginx itself ----------------------------------------------------------------------------------


def test_heads_without_bounds_are_refused(nginx: Nginx) -> None:
    url = f"https://{HOSTNAME}/health"
    long, many = ["-H", "X-Long: " + "x" * 9000], [f"-HX-{i}: {'x' * 1000}" for i in range(80)]

    assert_problem(431, nginx.curl(url, "--http1.1", *long), "request-header-fields-too-large")
    assert_problem(431, nginx.curl(url, "--http1.1", *many), "request-header-fields-too-large")
    answer = nginx.curl(f"{url}?{'x' * 9000}", "--http1.1")
    assert_problem(414, answer, "uri-too-long")


def test_a_server_that_is_down_is_a_problem_for_all(ports: Path, site: Site) -> None:
    with Nginx(upstream="127.0.0.1:1", ports_dir=ports) as lonely:
        for name in (HOSTNAME, site.private_name, f"{'0' * 16}.{HOSTNAME}"):
            answer = lonely.curl(f"https://{name}/x", "-d", "hello")
            assert_problem(502, answer, "bad-gateway")
            assert answer.headers["retry-after"]
        # Public endpoints need nobody but nginx.
        assert lonely.curl(f"https://{site.public_name}/x").status == 200


def test_nginx_finds_nothing_odd_in_its_configuration(nginx: Nginx) -> None:
    assert not re.search(r"\[(warn|error|crit|alert|emerg)\]", nginx.log), nginx.log


@pytest.mark.parametrize(
    "values",
    [
        ["API_HOSTNAME=a b", "CERTIFICATE=/c", "KEY=/k"],
        ["API_HOSTNAME=a.b;", "CERTIFICATE=/c", "KEY=/k"],
        ["API_HOSTNAME=a.b", "CERTIFICATE=/c; include /etc/passwd", "KEY=/k"],
        ["API_HOSTNAME=a.b", "CERTIFICATE=/c"],
        ["API_HOSTNAME=a.b", "CERTIFICATE=/c", "KEY=/k", "NOBODY=1"],
    ],
)
def test_a_value_that_would_not_stay_a_value_is_not_written(values: list[str]) -> None:
    done = subprocess.run(["deploy/nginx/render", *values], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("render: ")
