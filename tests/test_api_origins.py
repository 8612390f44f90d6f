"""Where a request comes from, and which name it was sent to."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from heyvm.origins import local_addresses
from tests.fake_domain import fake_app, problem
from tests.server import REPOSITORY

pytest_plugins = ["tests.fake_domain"]

ELSEWHERE = "203.0.113.7"


def own_address() -> str:
    """An address of this machine that is not a loopback one, if it has any."""
    for address in sorted(map(str, local_addresses())):
        if not ipaddress.ip_address(address).is_loopback:
            return address
    pytest.skip("this machine has no address but the loopback")


def ask(client: FlaskClient, path: str = "/sandboxes", **environ: Any) -> Any:
    return client.get(path, environ_overrides=environ)


@pytest.fixture
def named(tmp_path: Path) -> FlaskClient:
    return fake_app(tmp_path, api_hostname="example.com").app.test_client()


@pytest.mark.parametrize(
    "peer",
    ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "0:0:0:0:0:0:0:1", ""],
)
def test_the_machine_itself_is_answered(peer: str, api: FlaskClient) -> None:
    assert ask(api, REMOTE_ADDR=peer).status_code == 200


@pytest.mark.parametrize(
    "peer",
    [ELSEWHERE, "10.0.0.1", "2001:db8::1", "::ffff:203.0.113.7", "fe80::1%eth0", "0.0.0.0", "x"],
)
@pytest.mark.parametrize("path", ["/sandboxes", "/nope", "/health", "/auth/login"])
def test_another_machine_is_told_what_to_set(peer: str, path: str, api: FlaskClient) -> None:
    detail = problem(ask(api, path, REMOTE_ADDR=peer), 403, "forbidden")["detail"]
    assert "JWT_SECRET" in detail
    assert "HEYVM_ALLOW_OPEN=1" in detail


def test_an_address_of_the_machine_is_not_the_machine_itself(api: FlaskClient) -> None:
    problem(ask(api, REMOTE_ADDR=own_address()), 403, "forbidden")


def test_an_open_server_answers_everybody(tmp_path: Path) -> None:
    opened = fake_app(tmp_path, allow_open=True).app.test_client()
    assert ask(opened, REMOTE_ADDR=ELSEWHERE).status_code == 200


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", ""])
@pytest.mark.parametrize(
    ("forwarded", "status"),
    [
        ("127.0.0.1", 200),
        (f"{ELSEWHERE}, ::1", 200),
        (ELSEWHERE, 403),
        (f"127.0.0.1, {ELSEWHERE}", 403),
        (f"127.0.0.1,{ELSEWHERE}", 403),
        ("127.0.0.1,", 403),
        ("", 403),
        ("unknown", 403),
        ("127.0.0.1:80", 403),
        ("localhost", 403),
    ],
)
def test_behind_a_proxy_the_client_counts(
    peer: str, forwarded: str, status: int, api: FlaskClient
) -> None:
    answer = ask(api, REMOTE_ADDR=peer, HTTP_X_FORWARDED_FOR=forwarded)
    assert answer.status_code == status


def test_another_machine_cannot_say_who_it_is(api: FlaskClient) -> None:
    answer = ask(api, REMOTE_ADDR=ELSEWHERE, HTTP_X_FORWARDED_FOR="127.0.0.1")
    problem(answer, 403, "forbidden")


@pytest.mark.parametrize("header", ["HTTP_FORWARDED", "HTTP_X_REAL_IP", "HTTP_VIA"])
def test_a_proxy_that_does_not_say_for_whom_is_not_trusted(header: str, api: FlaskClient) -> None:
    problem(ask(api, REMOTE_ADDR="127.0.0.1", **{header: "127.0.0.1"}), 403, "forbidden")


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:3000", "localhost.", "127.0.0.1", "127.0.0.1:80", "127.8.8.8", "[::1]",
     "[::1]:3000", "0.0.0.0:3000", "[::ffff:127.0.0.1]"],
)  # fmt: skip
def test_these_hosts_are_this_machine(host: str, api: FlaskClient) -> None:
    assert ask(api, HTTP_HOST=host).status_code == 200


def test_an_address_of_the_machine_is_a_host(api: FlaskClient) -> None:
    address = own_address()
    host = f"[{address}]" if ":" in address else address
    assert ask(api, HTTP_HOST=f"{host}:3000").status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "evillocalhost", "sub.localhost", ELSEWHERE,
     f"{ELSEWHERE}:3000", "example.com", "[2001:db8::1]", "127.1", "2130706433", "0x7f000001"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/sandboxes", "/health", "/nope"])
def test_another_host_is_refused(host: str, path: str, api: FlaskClient) -> None:
    assert "API_HOSTNAME" in problem(ask(api, path, HTTP_HOST=host), 403, "forbidden")["detail"]


@pytest.mark.parametrize(
    "host",
    ["", "localhost,localhost", "localhost, evil.example", "local host", "localhost:", "a:b",
     "localhost:123456", "user@localhost", "localhost/x", "[::1", "::1", "localhost\t", "ü"],
)  # fmt: skip
def test_a_host_that_is_none_is_a_400(host: str, api: FlaskClient) -> None:
    problem(ask(api, HTTP_HOST=host), 400, "bad-request")


@pytest.mark.parametrize(
    "host", ["example.com", "EXAMPLE.com:443", "api.example.com", "Api.Example.com.", "localhost"]
)
def test_api_hostname_and_api_below_it_are_hosts(host: str, named: FlaskClient) -> None:
    assert ask(named, HTTP_HOST=host).status_code == 200


@pytest.mark.parametrize("host", ["a.example.com", "a.api.example.com", "xapi.example.com:80"])
def test_any_other_name_below_api_hostname_is_nothing(host: str, named: FlaskClient) -> None:
    problem(ask(named, HTTP_HOST=host), 404, "not-found")


@pytest.mark.parametrize("host", ["xexample.com", "example.com.evil", "com", ".example.com.x"])
def test_api_hostname_is_matched_by_label(host: str, named: FlaskClient) -> None:
    problem(ask(named, HTTP_HOST=host), 403, "forbidden")


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:3000", "http://localhost:3000"),
        ("localhost", "http://localhost"),
        ("localhost", "http://localhost:80"),
        ("localhost:80", "http://LOCALHOST"),
        ("example.com", "https://example.com"),
        ("example.com:443", "https://example.com"),
        ("[::1]:3000", "http://[::1]:3000"),
    ],
)
def test_the_server_s_own_pages_may_call(host: str, origin: str, named: FlaskClient) -> None:
    assert ask(named, HTTP_HOST=host, HTTP_ORIGIN=origin).status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["null", "", "http://evil.example", "http://localhost:3001", "http://localhost",
     "https://localhost", "http://localhost:3000/", "http://localhost:3000@evil.example",
     "file://", "chrome-extension://abc", "http://127.0.0.1:3000", "http://localhost:3000, null",
     "javascript:alert(1)", "x" * 5000],
)  # fmt: skip
def test_any_other_origin_is_refused(origin: str, api: FlaskClient) -> None:
    answer = ask(api, HTTP_HOST="localhost:3000", HTTP_ORIGIN=origin)
    problem(answer, 403, "forbidden")
    preflight = api.options(
        "/sandboxes", environ_overrides={"HTTP_HOST": "localhost:3000", "HTTP_ORIGIN": origin}
    )
    assert preflight.status_code == 403


def test_a_request_line_must_name_the_same_host(api: FlaskClient) -> None:
    same = ask(api, HTTP_HOST="localhost:3000", RAW_URI="http://localhost:3000/sandboxes")
    assert same.status_code == 200
    other = ask(api, HTTP_HOST="localhost:3000", RAW_URI="http://evil.example/sandboxes")
    problem(other, 400, "bad-request")


def test_a_health_check_of_http_1_0_needs_no_host(api: FlaskClient) -> None:
    from heyvm.origins import Machine, check_host

    check_host({"SERVER_PROTOCOL": "HTTP/1.0"}, None, Machine())


def test_the_machine_s_addresses_are_all_found() -> None:
    found = {str(address) for address in local_addresses()}
    assert "127.0.0.1" in found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ELSEWHERE, 9))  # sends nothing; the kernel picks a source address
        except OSError:
            pytest.skip("this machine has no route to anywhere")
        assert probe.getsockname()[0] in found


ON_TWO_INTERFACES = """
ip link add v1 type veth peer name v2
ip link set v1 up; ip link set v2 up
for at in 9:v1 9:v2 8:v2; do ip addr add 192.0.2.${at%:*}/32 dev ${at#*:}; done
exec "$0" -c 'from heyvm.origins import local_addresses; print(*local_addresses())'
"""


def test_an_address_that_two_interfaces_have_is_one_of_the_machines() -> None:
    unshare = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    done = subprocess.run(
        [*unshare, "bash", "-ec", ON_TWO_INTERFACES, sys.executable],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert {"192.0.2.8", "192.0.2.9"} <= set(done.stdout.split())
