"""`/auth/*`, forwarded to a real HTTP server that behaves as each test wants."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from heyvm.api import forward
from heyvm.api.limits import FORWARD_BYTES
from tests.fake_domain import fake_app, problem

pytest_plugins = ["tests.fake_domain"]


@dataclass
class AuthServer:
    """Answers as `answer` says, and remembers what it was asked."""

    url: str
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    status: int = 200
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b"{}"
    stall: threading.Event | None = None


@pytest.fixture
def auth_server() -> Iterator[AuthServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            told.seen.append((self.command, self.path, dict(self.headers.items()), body))
            if told.stall is not None:
                told.stall.wait(20)
            self.send_response(told.status)
            for name, value in told.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(told.body)))
            self.end_headers()
            self.wfile.write(told.body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    told = AuthServer(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield told
    server.shutdown()
    server.server_close()


@pytest.fixture
def through(auth_server: AuthServer, tmp_path: Path) -> FlaskClient:
    """A server that wants tokens and forwards to `auth_server`."""
    told = fake_app(tmp_path, jwt_secret="s", auth_server_url=f"{auth_server.url}/base/")
    return told.app.test_client()


def test_a_request_goes_and_comes_as_it_is(through: FlaskClient, auth_server: AuthServer) -> None:
    auth_server.status = 418
    auth_server.headers = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("X-Own", "yes")]
    auth_server.body = b'{"access_token": "t"}'
    answer = through.post(
        "/auth/login/%C3%BC?next=%2Fa%20b&x", json={"email": "a@b"}, headers={"X-Mine": "1"}
    )
    assert answer.status_code == 418
    assert answer.data == b'{"access_token": "t"}'
    assert answer.headers.getlist("Set-Cookie") == ["a=1", "b=2"]
    assert answer.headers["X-Own"] == "yes"
    ((method, path, headers, body),) = auth_server.seen
    assert (method, path) == ("POST", "/base/auth/login/%C3%BC?next=%2Fa%20b&x")
    assert json.loads(body) == {"email": "a@b"}
    assert headers["X-Mine"] == "1"
    assert headers["Content-Type"] == "application/json"
    assert headers["Host"] == auth_server.url.removeprefix("http://")


def test_what_belongs_to_the_connection_stays_here(
    through: FlaskClient, auth_server: AuthServer
) -> None:
    auth_server.headers = [("Connection", "X-Hop"), ("X-Hop", "1"), ("Keep-Alive", "timeout=5")]
    answer = through.get(
        "/auth/me",
        headers={"Connection": "X-Secret", "X-Secret": "1", "TE": "trailers", "Upgrade": "h2c"},
    )
    seen = {name.lower() for name in auth_server.seen[0][2]}
    assert not seen & {"x-secret", "te", "upgrade"}
    assert not {"X-Hop", "Keep-Alive", "Connection"} & set(answer.headers.keys())


def test_a_redirect_is_handed_on_not_followed(
    through: FlaskClient, auth_server: AuthServer
) -> None:
    auth_server.status, auth_server.headers = 302, [("Location", f"{auth_server.url}/elsewhere")]
    answer = through.get("/auth/go")
    assert answer.status_code == 302
    assert len(auth_server.seen) == 1


def test_too_much_either_way_is_refused(through: FlaskClient, auth_server: AuthServer) -> None:
    problem(through.post("/auth/x", data=b"x" * (FORWARD_BYTES + 1)), 413, "too-large")
    assert auth_server.seen == []
    auth_server.body = b"x" * (FORWARD_BYTES + 1)
    problem(through.get("/auth/x"), 502, "bad-gateway")


def test_a_slow_answer_is_a_504(
    through: FlaskClient, auth_server: AuthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "FORWARD_S", 0.3)
    auth_server.stall = threading.Event()
    problem(through.get("/auth/x"), 504, "gateway-timeout")
    auth_server.stall.set()


def test_nobody_there_is_a_502(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        client = fake_app(tmp_path, auth_server_url=url).app.test_client()
        problem(client.get("/auth/x"), 502, "bad-gateway")


def test_tls_that_nobody_vouches_for_is_a_502(tmp_path: Path, auth_server: AuthServer) -> None:
    url = auth_server.url.replace("http:", "https:")
    client = fake_app(tmp_path, auth_server_url=url).app.test_client()
    problem(client.get("/auth/x"), 502, "bad-gateway")


def test_unset_there_is_no_such_route(api: FlaskClient) -> None:
    assert "AUTH_SERVER_URL" in problem(api.get("/auth/login"), 404, "not-found")["detail"]


@pytest.mark.parametrize("path", ["../admin", "%2e%2e/admin", "x/%252e%252e/admin", "a%0d%0ab"])
def test_no_path_leads_out_of_auth(
    path: str, through: FlaskClient, auth_server: AuthServer
) -> None:
    problem(through.get(f"/auth/{path}"), 400, "bad-request")
    assert auth_server.seen == []
