"""The routes of tickets, on a domain in memory."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.fake_domain import problem

pytest_plugins = ["tests.fake_domain"]

SESSIONS = "/sandboxes/box/shell-session"
TUNNELS = "/sandboxes/box/tcp-tunnel"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGsvr+3IrDJpaP/Q4SHukcS3X/h4k1+v59muI6c3uGk8 me@here"


@pytest.mark.parametrize("sent", [{}, {"json": {}}])
def test_a_session_needs_no_body(api: FlaskClient, sent: dict[str, Any]) -> None:
    answer = api.post(SESSIONS, **sent)
    assert answer.status_code == 200, answer.json
    assert answer.json["connection_url"].startswith("heyo://")
    assert answer.json["expires_at"] > answer.json["created_at"]


@pytest.mark.parametrize("sent", [{"data": b"x"}, {"data": b"", "content_type": "text/plain"}])
def test_a_body_that_is_none_of_json_is_told(api: FlaskClient, sent: dict[str, Any]) -> None:
    problem(api.post(SESSIONS, **sent), 415, "unsupported-media")


def test_a_list_shows_no_ticket(api: FlaskClient) -> None:
    made = api.post(SESSIONS, json={"ssh_public_keys": [KEY], "ttl_seconds": 60}).json
    api.post(TUNNELS, json={"port": 80})

    (listed,) = api.get(SESSIONS).json["sessions"]

    assert listed["session_id"] == made["session_id"]
    assert listed["ssh_public_keys"] == [KEY]
    assert not {"connection_url", "secret", "ssh_host_key"} & listed.keys()


def test_a_port_has_one_tunnel(api: FlaskClient) -> None:
    first, second = (api.post(TUNNELS, json={"port": 80}).json for _ in range(2))

    assert first == second
    (listed,) = api.get(TUNNELS).json["tunnels"]
    assert (listed["port"], listed["tunnel_id"]) == (80, first["tunnel_id"])
    assert "connection_url" not in listed


def test_what_was_deleted_is_gone(api: FlaskClient) -> None:
    session = api.post(SESSIONS).json["session_id"]
    # A session is no tunnel, whatever its id.
    problem(api.delete(f"{TUNNELS}/{session}"), 404, "not-found")
    assert api.delete(f"{SESSIONS}/{session}").status_code == 204
    problem(api.delete(f"{SESSIONS}/{session}"), 404, "not-found")
    assert api.get(SESSIONS).json == {"sessions": []}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"ttl_seconds": 365 * 86400 + 1}, "ttl_seconds"),
        ({"ttl_seconds": "60"}, "ttl_seconds"),
        ({"ssh_public_keys": KEY}, "ssh_public_keys"),
        ({"ssh_public_keys": ["ssh-ed25519 AAAA"]}, "ssh_public_keys.0"),
        ({"ssh_public_keys": ["-----BEGIN OPENSSH PRIVATE KEY-----"]}, "ssh_public_keys.0"),
        ({"ssh_public_keys": [KEY] * 65}, "ssh_public_keys"),
        ({"ttl": 60}, "ttl"),
    ],
)
def test_bad_sessions(api: FlaskClient, body: dict[str, Any], field: str) -> None:
    told = problem(api.post(SESSIONS, json=body), 422, "invalid")
    assert list(told["errors"]) == [field]
    assert api.get(SESSIONS).json == {"sessions": []}


@pytest.mark.parametrize("body", [{}, {"port": 0}, {"port": 65536}, {"port": "80"}, {"port": None}])
def test_bad_tunnels(api: FlaskClient, body: dict[str, Any]) -> None:
    problem(api.post(TUNNELS, json=body), 422, "invalid")
