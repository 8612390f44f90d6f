"""Mounts and logs over HTTP, over a fake domain."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from heyvm.models import LogEntry
from tests.fake_domain import Fake, problem

pytest_plugins = ["tests.fake_domain"]

MOUNTS = "/sandboxes/box/mounts"
MOUNT = {"host_path": "/srv/data", "sandbox_path": "/data/set", "read_only": True}


def test_a_mount_is_added_listed_and_taken(api: FlaskClient) -> None:
    answer = api.post(MOUNTS, json=MOUNT)
    assert answer.status_code == 201
    assert answer.json == {**MOUNT, "pending": False}
    assert api.get(MOUNTS).json == [answer.json]
    problem(api.post(MOUNTS, json=MOUNT), 409, "conflict")


@pytest.mark.parametrize(
    "path",
    ["%2Fdata%2Fset", "/data/set", "data/set", "/data%2Fset", "%2Fdata/set", "//data//set/",
     "data/./set"],
)  # fmt: skip
def test_a_mount_is_removed_by_any_spelling_of_its_path(path: str, api: FlaskClient) -> None:
    api.post(MOUNTS, json=MOUNT)
    answer = api.delete(f"{MOUNTS}/{path}")
    assert answer.status_code == 204
    assert api.get(MOUNTS).json == []
    problem(api.delete(f"{MOUNTS}/{path}"), 404, "not-found")


@pytest.mark.parametrize("path", ["../x", "%2e%2e/x", "%252e%252e", "a%00b"])
def test_a_mount_path_that_climbs_is_a_400(path: str, api: FlaskClient) -> None:
    problem(api.delete(f"{MOUNTS}/{path}"), 400, "bad-request")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"host_path": "/srv"},
        {"sandbox_path": "/data"},
        {**MOUNT, "host_path": "srv"},
        {**MOUNT, "host_path": "/srv/../etc"},
        {**MOUNT, "host_path": "/srv\0"},
        {**MOUNT, "sandbox_path": "/proc/x"},
        {**MOUNT, "read_only": 1},
        {**MOUNT, "pending": True},
        [MOUNT],
    ],
)
def test_a_wrong_mount_is_a_422(body: Any, api: FlaskClient) -> None:
    problem(api.post(MOUNTS, json=body), 422, "invalid")


def test_logs_are_as_the_guide_says(fake: Fake, api: FlaskClient) -> None:
    fake.logs.entries.append(LogEntry(1742659200.75, "stdout", "Server started on port 80"))
    fake.logs.entries.append(LogEntry(1742659201.0, "stderr", "error: no", "error"))
    answer = api.get("/sandboxes/box/logs?limit=50").json
    assert answer == {
        "logs": [
            {
                "timestamp": 1742659200,
                "source": "stdout",
                "message": "Server started on port 80",
            },
            {
                "timestamp": 1742659201,
                "source": "stderr",
                "message": "error: no",
                "level": "error",
            },
        ],
        "total": 2,
        "limit": 50,
        "offset": 0,
    }
    one = api.get("/sandboxes/box/logs?source=stderr&level=error").json
    assert (one["total"], one["limit"]) == (1, 100)


@pytest.mark.parametrize("query", ["limit=0", "limit=-1", "limit=x", "limit=1e3", "offset=-1"])
def test_a_page_of_logs_that_makes_no_sense_is_a_422(query: str, api: FlaskClient) -> None:
    problem(api.get(f"/sandboxes/box/logs?{query}"), 422, "invalid")
