"""Every failure is one kind of body."""

from __future__ import annotations

import errno
import inspect
import logging

import pytest
from flask.testing import FlaskClient

from heyvm import errors
from heyvm.problems import PROBLEMS
from tests.fake_domain import Fake, problem

pytest_plugins = ["tests.fake_domain"]

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.HeyvmError)
]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_domain_error_has_a_row(cls: type[errors.HeyvmError]) -> None:
    assert cls in PROBLEMS


@pytest.mark.parametrize("cls", CLASSES)
def test_every_domain_error_reaches_the_wire(
    cls: type[errors.HeyvmError], fake: Fake, api: FlaskClient
) -> None:
    more = {"size": 9} if cls is errors.RangeNotSatisfiable else {}
    fake.lifecycle.fail_next = cls("what is wrong, and what to do", **more)
    kind = PROBLEMS[cls]
    body = problem(api.get("/sandboxes/box"), kind.status, kind.slug)
    assert body["detail"] == "what is wrong, and what to do"


def test_a_subclass_of_elsewhere_takes_the_row_of_its_base(fake: Fake, api: FlaskClient) -> None:
    class TakenTwice(errors.Conflict):
        pass

    fake.lifecycle.fail_next = TakenTwice("again")
    problem(api.get("/sandboxes/box"), 409, "conflict")


def test_a_hook_that_failed_tells_the_id_of_what_it_left(api: FlaskClient) -> None:
    answer = api.post("/sandboxes", json={"name": "x", "setup_hooks": ["false"]})
    body = problem(answer, 422, "hook-failed")
    assert api.get(f"/sandboxes/{body['id']}").json["status"] == "failed"


def test_invalid_names_the_fields(fake: Fake, api: FlaskClient) -> None:
    fake.lifecycle.fail_next = errors.Invalid("no such backend", errors={"backend_type": ["no"]})
    body = problem(api.post("/sandboxes", json={}), 422, "invalid")
    assert body["errors"] == {"backend_type": ["no"]}


def test_unavailable_says_when_to_come_back(fake: Fake, api: FlaskClient) -> None:
    fake.lifecycle.fail_next = errors.Unavailable("busy", retry_after=7)
    answer = api.get("/sandboxes/box")
    problem(answer, 503, "unavailable")
    assert answer.headers["Retry-After"] == "7"


def test_a_quota_says_when_to_come_back(fake: Fake, api: FlaskClient) -> None:
    fake.lifecycle.fail_next = errors.QuotaExceeded("HEYVM_MAX_SANDBOXES is 3")
    answer = api.post("/sandboxes", json={})
    problem(answer, 429, "quota-exceeded")
    assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize(
    ("number", "status", "slug"),
    [
        (errno.ENOSPC, 507, "storage-full"),
        (errno.EDQUOT, 507, "storage-full"),
        (errno.EMFILE, 503, "unavailable"),
        (errno.ENFILE, 503, "unavailable"),
        (errno.EIO, 500, "internal"),
    ],
)
def test_the_machine_s_own_lack_is_told_apart(
    number: int, status: int, slug: str, fake: Fake, api: FlaskClient
) -> None:
    fake.lifecycle.fail_next = OSError(number, "no")
    problem(api.get("/sandboxes/box"), status, slug)


def test_a_surprise_is_logged_under_its_id_and_not_told(
    fake: Fake, api: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    fake.lifecycle.fail_next = ZeroDivisionError("a secret")
    with caplog.at_level(logging.ERROR):
        answer = api.get("/sandboxes/box", headers={"X-Request-Id": "mine-1"})
    body = problem(answer, 500, "internal")
    assert "a secret" not in answer.get_data(as_text=True)
    assert "mine-1" in body["detail"]
    assert "mine-1" in caplog.text
    assert "ZeroDivisionError: a secret" in caplog.text


def test_an_unknown_route_is_a_problem(api: FlaskClient) -> None:
    assert "/nope" in problem(api.get("/nope"), 404, "not-found")["detail"]


@pytest.mark.parametrize("path", ["/sandboxes", "/sandboxes/box/files/upload", "/health"])
def test_a_405_keeps_allow(path: str, api: FlaskClient) -> None:
    answer = api.put(path)
    problem(answer, 405, "method-not-allowed")
    assert {"HEAD", "GET"} <= set(answer.headers["Allow"].split(", "))


@pytest.mark.parametrize("given", ["mine", "01J9:a/b+c=d@e.f-g_h", "x" * 128])
def test_a_sane_request_id_is_echoed(given: str, api: FlaskClient) -> None:
    assert api.get("/health", headers={"X-Request-Id": given}).headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "ü", '"><script>'])
def test_an_odd_request_id_is_replaced(given: str, api: FlaskClient) -> None:
    echoed = api.get("/health", headers={"X-Request-Id": given}).headers["X-Request-Id"]
    assert echoed != given
    assert len(echoed) == 16


def test_answers_are_neither_sniffed_nor_stored_nor_shared(api: FlaskClient) -> None:
    headers = api.get("/sandboxes", headers={"Origin": "http://localhost"}).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert not [name for name in headers.keys() if name.lower().startswith("access-control")]


@pytest.mark.parametrize("path", ["/health", "/sandboxes", "/sandboxes/box", "/capabilities"])
def test_head_is_get_without_the_body(path: str, api: FlaskClient) -> None:
    answer = api.head(path)
    assert answer.status_code == 200
    assert answer.data == b""
    assert answer.content_length == len(api.get(path).data)
