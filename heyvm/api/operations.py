"""What whoever runs the server asks of it: what it counts, and who has changed what.

Here each request is counted, said and, where it changes something, recorded; see metrics.py,
journal.py and audit.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, cast

from flask import Flask, Response, current_app, g, request
from flask.views import MethodView
from marshmallow import Schema, ValidationError, fields, post_load

from heyvm import __version__, audit, journal, metrics
from heyvm.api.auth import SUBJECT
from heyvm.api.blueprint import Blueprint
from heyvm.api.fields import Text
from heyvm.api.limits import DEFAULT_AUDIT, MAX_PAGE
from heyvm.api.parts import lifecycle, settings
from heyvm.api.schemas import Query, about, always, digits
from heyvm.errors import HeyvmError, Invalid, Unavailable
from heyvm.origins import client_of

log = logging.getLogger("heyvm.api")

blp = Blueprint("operations", description="For whoever runs the server.")

TRAIL = "heyvm.audit"
MUTATING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
# A shell changes what it likes; its record ends when it does.
MUTATING_TOO = frozenset({"openShellStream"})
SWITCHED = 101
# What frees the disk, or ends what fills it, goes on where not a line can be written any more.
WITHOUT_RECORD = frozenset({"stopSandbox", "forceStopSandbox"})
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRICS_BODY = {
    "200": {
        "description": "Prometheus's text format.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}
NO_ROUTE = "(none)"
# Its paths are the auth server's own, and may be links with a secret in them.
FORWARDED = "auth_forward.auth"
A_TIME = "2026-01-31T12:00:00.250Z"


class Instant(Text):
    """A moment in a query, as RFC 3339; kept as seconds since the epoch."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **_: Any) -> Any:
        # A plus sign in a query is a space, unless it is encoded.
        try:
            found = datetime.fromisoformat(str(value).replace(" ", "+"))
        except ValueError:
            raise ValidationError("Must be a time, as 2026-01-31T12:00:00Z.") from None
        if found.tzinfo is None:
            raise ValidationError("Must say its time zone, as 2026-01-31T12:00:00Z does.")
        return found.timestamp()


class AuditQuery(Query):
    """Which records."""

    limit = digits(
        "limit", 1, MAX_PAGE, load_default=DEFAULT_AUDIT, metadata=about("How many at most.", 50)
    )
    cursor = Text(metadata=about("`next_cursor` of the page before."))
    sandbox = Text(metadata=about("Only of the sandbox of this id or slug.", "api-demo"))
    subject = Text(metadata=about("Only with tokens of this subject.", "alice"))
    since = Instant(metadata=about("Only those begun then or later.", A_TIME))
    until = Instant(metadata=about("Only those begun then or before.", A_TIME))

    @post_load
    def build(self, given: dict[str, Any], **_: Any) -> audit.Wanted:
        return audit.Wanted(**given)


class AuditRecord(Schema):
    """A call that changes something, or would have."""

    id = always(fields.String, "The record's.", "1f0c9be2a713")
    time = always(fields.String, "When the call came.", A_TIME)
    request_id = always(fields.String, "Its `X-Request-Id`.", "10561cd49342af41", allow_none=True)
    subject = always(
        fields.String, "Whose token it was (`sub`); null without one.", "alice", allow_none=True
    )
    client = always(
        fields.String, "The client's address, if it has one.", "203.0.113.7", allow_none=True
    )
    action = always(
        fields.String,
        "The operation's name in this document; null where there is no such route.",
        "executeCommand",
        allow_none=True,
    )
    method = always(fields.String, "The request's method.", "POST")
    path = always(fields.String, "Its path, without the query.", "/sandboxes/api-demo/execute")
    sandbox_id = always(
        fields.String, "The sandbox that it was about, where known.", "sb-1a2b3c4d", allow_none=True
    )
    sandbox_slug = always(fields.String, "Its slug then.", "api-demo", allow_none=True)
    outcome = always(
        fields.String,
        "`interrupted`: the server was killed in the middle of it.",
        audit.ANSWERED,
        words=(audit.ANSWERED, audit.UNDER_WAY, audit.INTERRUPTED),
    )
    status = always(fields.Integer, "Of the answer.", 200, allow_none=True)
    duration_ms = always(fields.Float, "Until the answer.", 12.5, allow_none=True)


class AuditPage(Schema):
    """Records, newest first. It may be short, even empty, before the last page."""

    records = fields.List(
        fields.Nested(AuditRecord), required=True, metadata=about("Newest first.")
    )
    next_cursor = always(
        fields.String, "For the next page; null on the last.", None, allow_none=True
    )


@blp.route("/metrics")
class Metrics(MethodView):
    @blp.operation("getMetrics", Unavailable, responses=METRICS_BODY)
    def get(self) -> Response:
        """What the server counts, for Prometheus

        Of all its processes together, since it was started.
        """
        return Response(metrics.text_of(everything()), content_type=METRICS_TYPE)


@blp.route("/audit")
class Audit(MethodView):
    @blp.operation("listAudit", Invalid, Unavailable)
    @blp.arguments(AuditQuery, location="query")
    @blp.response(200, AuditPage)
    def get(self, wanted: audit.Wanted) -> dict[str, Any]:
        """Who has changed what

        Each call that changes something, refused ones too. No route changes this.
        """
        page = trail().page(wanted)
        return {"records": page.records, "next_cursor": page.cursor}


def trail() -> audit.Trail:
    return cast(audit.Trail, current_app.extensions[TRAIL])


def everything() -> list[Any]:
    counts = {str(status): float(number) for status, number in lifecycle().counts().items()}
    return [
        metrics.gauge("heyvm_build_info", "1, for this version", {__version__: 1.0}, "version"),
        metrics.gauge("heyvm_sandboxes", "Sandboxes in each state", counts, "status"),
        *metrics.families(settings().run_dir),
    ]


# -- each request ----------------------------------------------------------------------------------


@dataclass
class Seen:
    """A request, for when its answer has been sent and Flask has forgotten it."""

    call: journal.Call
    began: float
    wall: float
    method: str
    path: str
    route: str
    action: str | None
    ref: str | None
    begun: audit.Begun | None = None

    @property
    def is_recorded(self) -> bool:
        return self.method in MUTATING or self.action in MUTATING_TOO

    def entry(self) -> audit.Entry:
        return audit.Entry(
            time=self.wall,
            request_id=self.call.request_id,
            method=self.method,
            path=self.path,
            action=self.action,
            client=self.call.client,
            subject=self.call.subject,
            ref=self.ref,
        )

    def ending(self, status: int) -> audit.Ending:
        call = self.call
        return audit.Ending(status, self.elapsed() * 1000, call.sandbox_id, call.slug)

    def elapsed(self) -> float:
        return time.monotonic() - self.began


def receive(request_id: str) -> None:
    """The first thing that is done with a request."""
    call = journal.begin(request_id)
    call.client = client_of(request.environ)
    route = NO_ROUTE if request.url_rule is None else request.url_rule.rule
    g.seen = Seen(
        call=call,
        began=g.began,
        wall=time.time(),
        method=request.method,
        path=route if request.endpoint == FORWARDED else path_of(request.environ),
        route=route,
        action=action_of(current_app, request.endpoint, request.method),
        ref=(request.view_args or {}).get("ref"),
    )


def watch(app: Flask, recorded: audit.Trail) -> None:
    """Record what passes the guard before it acts; count, say and record each answer."""
    app.extensions[TRAIL] = recorded

    @app.before_request
    def begin() -> None:
        seen: Seen = g.seen
        seen.call.subject = request.environ.get(SUBJECT)
        if seen.is_recorded:
            seen.begun = begun(recorded, seen)

    @app.after_request
    def finish(response: Response) -> Response:
        seen: Seen | None = g.get("seen")
        if seen is None:
            return response
        if seen.is_recorded:
            # One that streams is over when the last byte has gone, or the client has.
            if response.is_streamed:
                response.call_on_close(partial(end, recorded, seen, response.status_code))
            else:
                end(recorded, seen, response.status_code)
        if response.status_code == SWITCHED:
            # What follows may last for days, and is no part of the answer.
            count(seen, response.status_code)
        response.call_on_close(partial(say, seen, response.status_code, response.content_length))
        return response


def begun(recorded: audit.Trail, seen: Seen) -> audit.Begun | None:
    try:
        return recorded.begin(seen.entry())
    except HeyvmError:
        if seen.method == "DELETE" or seen.action in WITHOUT_RECORD:
            return None
        raise


def end(recorded: audit.Trail, seen: Seen, status: int) -> None:
    ending = seen.ending(status)
    if seen.begun is not None:
        written = recorded.end(seen.begun, ending)
    else:
        written = recorded.refuse(seen.entry(), ending)
    if not written:
        log.warning(
            "%s: no room in the audit trail yet for: %s %s %d by %s",
            seen.call.request_id,
            seen.action or seen.method,
            ascii(seen.path),
            status,
            ascii(seen.call.subject),
        )


def count(seen: Seen, status: int) -> None:
    metrics.here().answered(seen.route, seen.method, status, seen.elapsed())


def say(seen: Seen, status: int, size: int | None) -> None:
    if status != SWITCHED:
        count(seen, status)
    if journal.writes_json():
        fields = {
            "method": seen.method,
            "path": seen.path,
            "status": status,
            "bytes": size,
            "duration_ms": round(seen.elapsed() * 1000, 1),
        }
        journal.access(seen.call, fields)
    journal.end()


def path_of(environ: Mapping[str, Any]) -> str:
    """As it was sent, percent signs and all, without the query."""
    target = str(environ.get("RAW_URI") or environ.get("PATH_INFO") or "/")
    if not target.startswith("/"):
        target = "/" + target.partition("://")[2].partition("/")[2]
    return target.partition("?")[0].partition("#")[0]


def action_of(app: Flask, endpoint: str | None, method: str) -> str | None:
    """The operation's name; of what does not stand in the API's document, the view's."""
    view = app.view_functions.get(endpoint or "")
    found = getattr(getattr(view, "view_class", None), method.lower(), None)
    told: dict[str, Any] = getattr(found, "_apidoc", {}).get("manual_doc", {})
    return told.get("operationId", endpoint)
