"""flask-smorest's Blueprint with our own reading of requests, and problems in the document.

Its parser (webargs) takes a body of another type for no body at all, answers in a shape of its own
and costs more than the schema itself; this one is a few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from flask import g, request
from flask_smorest import Blueprint as SmorestBlueprint
from marshmallow import Schema, ValidationError

from heyvm import errors
from heyvm.api.bodies import MAX_JSON_BYTES, has_no_body, read_json
from heyvm.errors import Invalid
from heyvm.problems import PROBLEMS

F = TypeVar("F", bound=Callable[..., Any])
EVERYWHERE = (errors.Unauthorized, errors.Forbidden, errors.BadRequest, errors.HeyvmError)
# What any call about one sandbox can end in: the registry is busy, or the disk is full.
STORED = (errors.NotFound, errors.Unavailable, errors.StorageFull)


def path_parameter(name: str, text: str, example: str) -> dict[str, Any]:
    return {
        "in": "path",
        "name": name,
        "required": True,
        "description": text,
        "schema": {"type": "string", "examples": [example]},
    }


PATH_PARAMETERS = {
    "<ref>": path_parameter("ref", "A sandbox's id or slug.", "api-demo"),
    ":path>": path_parameter("path", "A path in the mount; it may hold slashes.", "index.html"),
    ":name>": path_parameter("name", "An image's name or digest.", "ubuntu:24.04"),
    ":sandbox_path>": path_parameter("sandbox_path", "A mount's path inside.", "/workspace"),
}


class Reader:
    """What stands in for webargs: loads a part of the request and appends it to the arguments."""

    DEFAULT_VALIDATION_STATUS = 422

    def use_args(
        self, schema: Schema | type[Schema], *, location: str, limit: int = MAX_JSON_BYTES
    ) -> Callable[[F], F]:
        loader = schema() if isinstance(schema, type) else schema
        read = READERS[location]

        def decorate(view: F) -> F:
            @wraps(view)
            def loading(*args: Any, **kwargs: Any) -> Any:
                return view(*args, load(loader, read(loader, limit)), **kwargs)

            return loading  # type: ignore[return-value]

        return decorate


def load(schema: Schema, given: Any) -> Any:
    """What `schema` makes of `given`; `Invalid` with every complaint, by dotted path."""
    try:
        return schema.load(given)
    except ValidationError as error:
        complaints = dict(flatten(error.messages))
        raise Invalid(sentence(complaints), errors=complaints) from None


def flatten(messages: Any, path: str = "") -> list[tuple[str, list[str]]]:
    """marshmallow's nested complaints, each under a path such as `mounts.0.host_path`."""
    if not isinstance(messages, Mapping):
        return [(path, [str(line) for line in messages])]
    found = []
    for key, inner in messages.items():
        step = path if key == "_schema" else f"{path}.{key}".lstrip(".")
        found += flatten(inner, step)
    return found


def sentence(complaints: Mapping[str, list[str]]) -> str:
    """The first complaints as one line, for people who read nothing but `detail`."""
    parts = [f"{path}: {lines[0]}" if path else lines[0] for path, lines in complaints.items()]
    more = f" (and {len(parts) - 3} more)" if len(parts) > 3 else ""
    return "; ".join(part.rstrip(".") for part in parts[:3]) + more


def _json(schema: Schema, limit: int) -> Any:
    g.sent = {} if _may_say_nothing(schema) and has_no_body() else read_json(limit)
    return g.sent


def _may_say_nothing(schema: Schema) -> bool:
    """`curl -X POST` without a body is a request that leaves everything as it is by default."""
    return request.method == "POST" and not any(one.required for one in schema.fields.values())


def _query(schema: Schema, _limit: int) -> dict[str, str]:
    """Arguments that the route does not know are left alone, as everywhere on the web."""
    args = request.args
    known = {field.data_key or name for name, field in schema.load_fields.items()}
    twice = sorted(name for name in known if len(args.getlist(name)) > 1)
    if twice:
        raise Invalid(f"{twice[0]} is given more than once", errors={twice[0]: ["given twice"]})
    return {name: args[name] for name in known if name in args}


def _headers(schema: Schema, _limit: int) -> dict[str, str]:
    names = [field.data_key or name for name, field in schema.load_fields.items()]
    return {name: request.headers[name] for name in names if name in request.headers}


READERS: Mapping[str, Callable[[Schema, int], Any]] = {
    "json": _json,
    "query": _query,
    "headers": _headers,
}


class Blueprint(SmorestBlueprint):  # type: ignore[misc]  # flask-smorest has no types
    """`arguments` and `response` as flask-smorest's, typed; `problems` says what can go wrong."""

    ARGUMENTS_PARSER = Reader()

    def __init__(self, name: str, *, description: str = "") -> None:
        super().__init__(name, __name__, description=description)
        self._prepare_doc_cbks.append(self._prepare_problems_doc)

    def route(self, rule: str, **options: Any) -> Callable[[F], F]:
        told = [PATH_PARAMETERS[name] for name in PATH_PARAMETERS if name in rule]
        return super().route(rule, parameters=told, **options)  # type: ignore[no-any-return]

    def arguments(
        self, schema: Schema | type[Schema], *, location: str = "json", **options: Any
    ) -> Callable[[F], F]:
        return super().arguments(schema, location=location, **options)  # type: ignore[no-any-return]

    def response(self, status_code: int, schema: Any = None, **options: Any) -> Callable[[F], F]:
        return super().response(status_code, schema, **options)  # type: ignore[no-any-return]

    def alt_response(self, status_code: int, **options: Any) -> Callable[[F], F]:
        return super().alt_response(status_code, **options)  # type: ignore[no-any-return]

    def operation(
        self, name: str, *problems: type[errors.HeyvmError], **doc: Any
    ) -> Callable[[F], F]:
        """Name an operation and its problems, besides those that every route knows.

        `headers`: parameters that the view reads by itself. The rest goes into the document as is.
        """
        headers = doc.pop("headers", [])

        def decorate(view: F) -> F:
            apidoc = getattr(view, "_apidoc", None)
            if apidoc is None:
                apidoc = view._apidoc = {}  # type: ignore[attr-defined]
            apidoc["manual_doc"] = {"operationId": name, **doc}
            apidoc["problems"] = (*EVERYWHERE, *problems)
            apidoc["headers"] = headers
            return view

        return decorate

    def _prepare_problems_doc(
        self, doc: dict[str, Any], doc_info: Mapping[str, Any], **_: Any
    ) -> dict[str, Any]:
        """Runs after flask-smorest's own callbacks, whose bare errors it replaces."""
        responses = doc.setdefault("responses", {})
        responses.pop(422, None)
        responses.pop("default", None)
        for status in sorted({PROBLEMS[cls].status for cls in doc_info.get("problems", ())}):
            responses[str(status)] = {"$ref": f"#/components/responses/Problem{status}"}
        if doc_info.get("headers"):
            doc["parameters"] = [*doc.get("parameters", []), *doc_info["headers"]]
        return doc
