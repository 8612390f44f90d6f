"""Proxy endpoints over HTTP, over a fake domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.fake_domain import fake_app, problem

pytest_plugins = ["tests.fake_domain"]

PROXY = "/sandboxes/box/proxy"


def test_an_endpoint_is_made_listed_got_and_deleted(api: FlaskClient) -> None:
    answer = api.post(PROXY, json={"port": 80})

    assert answer.status_code == 201
    made = answer.json
    assert made == {
        "subdomain": "0" * 16,
        "hostname": "localhost",
        "sandbox_id": made["sandbox_id"],
        "port": 80,
        "is_public": True,
        "local_port": 40000,
        "url": "http://127.0.0.1:40000",
        "created_at": "1970-01-01T00:00:01.000000Z",
        "warnings": [],
    }
    assert api.get(PROXY).json == {"proxies": [made]}
    assert api.get(f"{PROXY}/{made['subdomain']}").json == made
    assert api.delete(f"{PROXY}/{made['subdomain']}").status_code == 204
    made = api.post(PROXY, json={"port": 80}).json
    assert api.delete(f"{PROXY}?subdomain={made['subdomain']}").status_code == 204
    assert api.get(PROXY).json == {"proxies": []}
    problem(api.delete(f"{PROXY}?subdomain={made['subdomain']}"), 404, "not-found")


def test_with_api_hostname_it_has_a_name_and_no_local_port(tmp_path: Path) -> None:
    api = fake_app(tmp_path, api_hostname="example.com").app.test_client()

    made = api.post(PROXY, json={"port": 80}).json

    assert made["hostname"] == "example.com"
    assert made["url"] == f"https://{made['subdomain']}.example.com"
    assert made["local_port"] is None


@pytest.mark.parametrize("port", [0, -1, 65536, 80.5, "80", True, None, [80]])
def test_what_is_no_port_is_a_422(port: Any, api: FlaskClient) -> None:
    found = problem(api.post(PROXY, json={"port": port}), 422, "invalid")

    assert "port" in found["errors"]
    assert api.get(PROXY).json == {"proxies": []}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("post", PROXY, {}),
        ("post", PROXY, {"port": 80, "is_public": "no"}),
        ("post", PROXY, {"port": 80, "is_public": 0}),
        ("patch", f"{PROXY}/{'0' * 16}", {}),
        ("post", f"{PROXY}/{'0' * 16}/link", {"path": "//evil.example"}),
        ("post", f"{PROXY}/{'0' * 16}/link", {"path": "https://evil.example"}),
        ("post", f"{PROXY}/{'0' * 16}/link", {"path": "/\\evil.example"}),
        ("post", f"{PROXY}/{'0' * 16}/link", {"path": "/a\r\nSet-Cookie: b"}),
    ],
)
def test_what_is_wrong_in_a_body_is_a_422(
    method: str, path: str, body: Any, api: FlaskClient
) -> None:
    api.post(PROXY, json={"port": 80, "is_public": False})

    problem(getattr(api, method)(path, json=body), 422, "invalid")


@pytest.mark.parametrize("query", ["", "?subdomain=a&subdomain=b"])
def test_a_delete_names_one_endpoint(query: str, api: FlaskClient) -> None:
    problem(api.delete(PROXY + query), 422, "invalid")


@pytest.mark.parametrize("subdomain", ["x", "../..", "%00", "é", "a" * 300])
def test_an_unknown_endpoint_is_a_404(subdomain: str, api: FlaskClient) -> None:
    assert api.delete(f"{PROXY}?subdomain={subdomain}").status_code in (404, 422)
    assert api.get(f"{PROXY}/{subdomain}").status_code in (400, 404)


def test_a_public_endpoint_needs_no_link(api: FlaskClient) -> None:
    api.post(PROXY, json={"port": 80})

    problem(api.post(f"{PROXY}/{'0' * 16}/link", json={}), 409, "conflict")


def test_an_endpoint_is_closed_and_opened(api: FlaskClient) -> None:
    api.post(PROXY, json={"port": 80})

    closed = api.patch(f"{PROXY}/{'0' * 16}", json={"is_public": False})
    assert (closed.status_code, closed.json["is_public"]) == (200, False)
    problem(api.patch(f"{PROXY}/{'1' * 16}", json={"is_public": True}), 404, "not-found")


def test_an_internal_url_says_where(api: FlaskClient) -> None:
    found = api.get("/sandboxes/box/internal-url?port=8080").json

    assert found == {
        "sandbox_id": found["sandbox_id"],
        "ip": "127.0.0.1",
        "port": 40001,
        "guest_port": 8080,
        "url": "http://127.0.0.1:40001",
    }
    for query in ("", "?port=0", "?port=65536", "?port=x"):
        problem(api.get("/sandboxes/box/internal-url" + query), 422, "invalid")
