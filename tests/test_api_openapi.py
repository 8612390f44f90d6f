"""The document is valid, complete, and true of what the server answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.fake_domain import Fake

pytest_plugins = ["tests.fake_domain"]

# The guide's quick reference, all but what is not built yet.
GUIDE = """
    GET /health
    GET /sandboxes
    POST /sandboxes
    GET /sandboxes/{ref}
    PATCH /sandboxes/{ref}
    DELETE /sandboxes/{ref}
    POST /sandboxes/{ref}/start
    POST /sandboxes/{ref}/stop
    POST /sandboxes/{ref}/restart
    POST /sandboxes/{ref}/force-stop
    POST /sandboxes/{ref}/execute
    GET /sandboxes/{ref}/files
    POST /sandboxes/{ref}/files
    POST /sandboxes/{ref}/files/upload
    GET /sandboxes/{ref}/files/{path}
    DELETE /sandboxes/{ref}/files/{path}
    GET /sandboxes/{ref}/logs
    GET /sandboxes/{ref}/mounts
    POST /sandboxes/{ref}/mounts
    DELETE /sandboxes/{ref}/mounts/{sandbox_path}
    GET /sandboxes/inactive
    GET /capabilities
"""
ROWS = [tuple(line.split()) for line in GUIDE.strip().splitlines()]
VERBS = {"get", "post", "put", "patch", "delete"}
# A browser's own requests, which no client generates.
OUTSIDE = {"/openapi.json", "/docs", "/docs/{name}", "/auth/{path}"}


@pytest.fixture
def document(api: FlaskClient) -> dict[str, Any]:
    return dict(api.get("/openapi.json").json)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, found in document["paths"].items():
        for verb in VERBS & set(found):
            yield verb, path, found[verb]


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": document["components"]})


def test_it_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    assert [str(error) for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


@pytest.mark.parametrize(("verb", "path"), ROWS)
def test_every_row_of_the_guide_stands_in_it(
    verb: str, path: str, document: dict[str, Any]
) -> None:
    assert verb.lower() in document["paths"][path]


def test_every_route_stands_in_it(fake: Fake, document: dict[str, Any]) -> None:
    routes = {
        re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule) for rule in fake.app.url_map.iter_rules()
    }
    assert routes - OUTSIDE == set(document["paths"])


def test_every_operation_has_an_id_a_summary_and_its_problems(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    for verb, path, operation in operations(document):
        assert operation["summary"], (verb, path)
        answers = set(operation["responses"])
        assert answers & {"101", "200", "201", "204"}, (verb, path)
        assert {"400", "401", "403", "500"} <= answers, (verb, path)
        assert ("{ref}" not in path) or {"404", "503", "507"} <= answers, (verb, path)
        assert ("requestBody" not in operation) or {"413", "415", "422"} <= answers, (verb, path)
        assert ("parameters" not in operation) or "422" in answers, (verb, path)


def test_every_problem_is_one(document: dict[str, Any]) -> None:
    for name, response in document["components"]["responses"].items():
        assert list(response["content"]) == ["application/problem+json"], name
    for _, _, operation in operations(document):
        for status, response in operation["responses"].items():
            assert (status < "400") or response["$ref"].endswith(f"Problem{status}")


def test_a_token_is_optional(document: dict[str, Any]) -> None:
    assert document["security"] == [{}, {"bearer": []}]
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert document["paths"]["/health"]["get"]["security"] == [{}]


def test_every_example_is_of_its_schema(document: dict[str, Any]) -> None:
    seen = 0
    for verb, path, operation in operations(document):
        bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
        for content in (one for body in bodies for one in body.get("content", {}).values()):
            if "example" in content:
                errors = list(
                    validator(document, content["schema"]).iter_errors(content["example"])
                )
                assert errors == [], (verb, path)
                seen += 1
    assert seen > 20


def test_every_property_is_described(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        for field, told in schema["properties"].items():
            assert told.get("description") or told.get("items"), f"{name}.{field}"


def test_no_word_is_a_closed_set(document: dict[str, Any]) -> None:
    assert "'enum'" not in str(document)


def test_an_answer_always_has_every_field(document: dict[str, Any]) -> None:
    info = document["components"]["schemas"]["SandboxInfo"]
    assert set(info["required"]) == set(info["properties"])
    create = document["components"]["schemas"]["CreateRequest"]
    assert "required" not in create


def test_a_form_is_described_as_one(document: dict[str, Any]) -> None:
    content = document["paths"]["/sandboxes/{ref}/files"]["post"]["requestBody"]["content"]
    assert set(content) == {"multipart/form-data", "application/x-tar"}
    form = document["components"]["schemas"]["UploadForm"]
    assert form["properties"]["file"]["format"] == "binary"
    assert form["required"] == ["file"]


def test_records_are_as_described(document: dict[str, Any], api: FlaskClient) -> None:
    schema = {"$ref": "#/components/schemas/SandboxInfo"}
    check = validator(document, schema)
    check.validate(api.get("/sandboxes/box").json)
    full = api.post(
        "/sandboxes",
        json={
            "ttl_seconds": 5,
            "image": "x",
            "mounts": [{"host_path": "/srv", "sandbox_path": "/data"}],
            "metadata": {"a": [1]},
        },
    )
    check.validate(full.json)


def test_problems_are_as_described(document: dict[str, Any], api: FlaskClient) -> None:
    check = validator(document, {"$ref": "#/components/schemas/Problem"})
    check.validate(api.get("/nope").json)
    check.validate(api.post("/sandboxes", json={"open_ports": [0]}).json)
    check.validate(api.post("/sandboxes", json={"setup_hooks": ["false"]}).json)


@pytest.mark.parametrize("path", ["/docs", "/docs/docs.js", "/docs/docs.css"])
def test_the_page_is_all_ours(path: str, api: FlaskClient) -> None:
    answer = api.get(path)
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not re.search(r"https?://", answer.text)
    assert "innerHTML" not in answer.text
    answer.close()


@pytest.mark.parametrize("name", ["../openapi.py", "%2e%2e/openapi.py", "nope", "docs.html%00"])
def test_the_page_is_nothing_else(name: str, api: FlaskClient) -> None:
    assert api.get(f"/docs/{name}").status_code == 404


def test_every_script_and_style_of_the_page_is_there(api: FlaskClient) -> None:
    page = api.get("/docs").text
    for name in re.findall(r'(?:src|href)="(/docs/[^"]+)"', page):
        assert api.get(name).status_code == 200
