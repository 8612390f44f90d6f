"""What a request's body may be."""

from __future__ import annotations

import json

import pytest
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st

from heyvm.api.bodies import MAX_JSON_BYTES
from heyvm.errors import BadRequest
from heyvm.strictjson import MAX_JSON_DEPTH, parse_json
from tests.fake_domain import problem

pytest_plugins = ["tests.fake_domain"]

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"name": "x"',
        b"{'name': 'x'}",
        b'{"name": "x"} {"name": "y"}',
        b'{"name": "x", "name": "y"}',
        b'{"metadata": {"a": 1, "a": 2}}',
        b'{"ttl_seconds": NaN}',
        b'{"metadata": {"a": Infinity}}',
        b'{"metadata": {"a": 1e400}}',
        b'{"ttl_seconds": 1' + b"0" * 400 + b"}",
        b'{"ttl_seconds": 1' + b"0" * 100_000 + b"}",
        b'{"name": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"metadata": ["\\ud83d\\u0020"]}',
        b'{"name": "\xff"}',
        b"\xef\xbb\xbf{}",
        '{"name": "x"}'.encode("utf-16"),
        b"[" * 100_000,
        b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1),
        b'{"a":' * 100_000,
        b'{"name": "a\nb"}',
    ],
)
def test_what_is_not_strict_json_is_a_400(body: bytes, api: FlaskClient) -> None:
    problem(api.post("/sandboxes", data=body, headers=JSON), 400, "bad-request")


@pytest.mark.parametrize("body", ["[]", '"x"', "1", "null", "true"])
def test_json_that_is_no_object_is_a_422(body: str, api: FlaskClient) -> None:
    problem(api.post("/sandboxes", data=body, headers=JSON), 422, "invalid")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": ""},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
@pytest.mark.parametrize("route", ["", "/box/execute", "/box/files/upload", "/box/mounts"])
def test_another_type_is_a_415(headers: dict[str, str], route: str, api: FlaskClient) -> None:
    answer = api.post(f"/sandboxes{route}", data='{"name": "x"}', headers=headers)
    problem(answer, 415, "unsupported-media")


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON", "application/json; charset=UTF-8"]
)
def test_json_by_any_spelling_is_read(kind: str, api: FlaskClient) -> None:
    headers = {"Content-Type": kind}
    assert api.post("/sandboxes", data="{}", headers=headers).status_code == 201


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "force-stop"])
def test_verbs_need_no_body_and_mind_none(verb: str, api: FlaskClient) -> None:
    assert api.post(f"/sandboxes/box/{verb}").status_code == 200
    assert api.post(f"/sandboxes/box/{verb}", data="x").status_code == 200
    assert api.post(f"/sandboxes/box/{verb}", json={}).status_code == 200


def test_a_body_over_the_limit_is_refused_unread(api: FlaskClient) -> None:
    length = {"CONTENT_LENGTH": str(MAX_JSON_BYTES + 1)}
    answer = api.post("/sandboxes", headers=JSON, data=b"", environ_overrides=length)
    problem(answer, 413, "too-large")


def test_a_body_that_ended_early_is_a_400(api: FlaskClient) -> None:
    length = {"CONTENT_LENGTH": "40"}
    answer = api.post("/sandboxes", headers=JSON, data=b"{}", environ_overrides=length)
    assert "2 of 40" in problem(answer, 400, "bad-request")["detail"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_strict_json_is_json(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(text: bytes) -> None:
    try:
        parse_json(text)
    except BadRequest:
        pass
