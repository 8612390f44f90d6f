"""The routes of a sandbox's life, and execute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from flask import g, request
from flask.views import MethodView
from werkzeug.http import parse_list_header

from heyvm.api import results
from heyvm.api.blueprint import STORED, Blueprint
from heyvm.api.bodies import MAX_EXECUTE_BYTES
from heyvm.api.parts import lifecycle, processes
from heyvm.api.schemas import (
    CreateHeaders,
    CreateRequest,
    ExecuteRequest,
    ExecuteResult,
    Execution,
    InactivePage,
    InactiveQuery,
    Listing,
    ListQuery,
    PatchRequest,
    SandboxInfo,
    WaitQuery,
)
from heyvm.errors import (
    BackendFailed,
    Conflict,
    HookFailed,
    Invalid,
    QuotaExceeded,
    StorageFull,
    TooLarge,
    Unavailable,
    Unsupported,
    UnsupportedMedia,
)
from heyvm.models import CreateSpec, Page, Sandbox, Status

blp = Blueprint("sandboxes", description="Sandboxes, from create to delete.")

BODY = (UnsupportedMedia, TooLarge, Invalid)
ACT = (*STORED, Conflict, BackendFailed)
RETRY_AFTER_S = "1"
CREATED_HEADERS = {
    "Location": {"schema": {"type": "string"}, "description": "The sandbox."},
    "Idempotent-Replayed": {
        "schema": {"type": "string"},
        "description": "`true`: an earlier request with this key made it.",
    },
}
ACCEPTED_HEADERS = {
    **CREATED_HEADERS,
    "Retry-After": {"schema": {"type": "string"}, "description": "When to look again."},
    "Preference-Applied": {"schema": {"type": "string"}, "description": "`respond-async`."},
}
LINK_HEADER = {
    "Link": {
        "schema": {"type": "string"},
        "description": 'The next page: `<...>; rel="next"`; absent on the last.',
    }
}


@blp.route("/sandboxes")
class Sandboxes(MethodView):
    @blp.operation("listSandboxes", Invalid, Unavailable)
    @blp.arguments(ListQuery, location="query")
    @blp.response(200, SandboxInfo(many=True), headers=LINK_HEADER)
    def get(self, listing: Listing) -> Any:
        """List sandboxes

        Those provisioning, running, stopping or paused, unless `status` says otherwise. Complete
        without `limit`.
        """
        page = page_of(listing)
        return list(page.sandboxes), links(page)

    @blp.operation(
        "createSandbox",
        *BODY,
        HookFailed,
        Conflict,
        QuotaExceeded,
        BackendFailed,
        Unavailable,
        StorageFull,
    )
    @blp.arguments(CreateHeaders, location="headers")
    @blp.arguments(CreateRequest)
    @blp.response(201, SandboxInfo, headers=CREATED_HEADERS)
    @blp.alt_response(202, schema=SandboxInfo, headers=ACCEPTED_HEADERS, success=True)
    def post(self, headers: Mapping[str, str], spec: CreateSpec) -> Any:
        """Create a sandbox

        Answers when the agent has answered and the setup hooks have run; with
        `Prefer: respond-async`, at once. Unknown fields are named in the record's `warnings`.
        """
        sandbox, replayed = lifecycle().create(
            spec,
            idempotency_key=headers.get("key"),
            body_hash=fingerprint(g.sent),
            wait=not wants_async(headers),
        )
        return sandbox, created_status(sandbox), created_headers(sandbox, replayed)


@blp.route("/sandboxes/inactive")
class Inactive(MethodView):
    @blp.operation("listInactiveSandboxes", Invalid, Unavailable)
    @blp.arguments(InactiveQuery, location="query")
    @blp.response(200, InactivePage)
    def get(self, listing: Listing) -> dict[str, Any]:
        """List sandboxes that are stopped or failed"""
        page = page_of(listing)
        return {
            "sandboxes": list(page.sandboxes),
            "cursor": listing.cursor,
            "next_cursor": page.cursor,
        }


@blp.route("/sandboxes/<ref>")
class OneSandbox(MethodView):
    @blp.operation("getSandbox", *STORED, Invalid)
    @blp.arguments(WaitQuery, location="query")
    @blp.response(200, SandboxInfo)
    def get(self, wish: tuple[Status | None, float], ref: str) -> Sandbox:
        """Get a sandbox by id or slug

        With `wait`, once it is in that state (or cannot come to it), or after `timeout`.
        """
        return look(ref, *wish)

    @blp.operation("updateSandbox", *BODY, *ACT)
    @blp.arguments(PatchRequest)
    @blp.response(200, SandboxInfo)
    def patch(self, changes: Mapping[str, Any], ref: str) -> Sandbox:
        """Update a sandbox

        Each field sent replaces the one there is.
        """
        return lifecycle().update(ref, changes)

    @blp.operation("deleteSandbox", *ACT)
    @blp.response(204)
    def delete(self, ref: str) -> None:
        """Delete a sandbox

        From every state; its disk is free when this answers.
        """
        lifecycle().delete(ref)


@blp.route("/sandboxes/<ref>/start")
class Start(MethodView):
    @blp.operation("startSandbox", *ACT, Invalid)
    @blp.response(200, SandboxInfo)
    def post(self, ref: str) -> Sandbox:
        """Start a sandbox"""
        return lifecycle().start(ref)


@blp.route("/sandboxes/<ref>/stop")
class Stop(MethodView):
    @blp.operation("stopSandbox", *ACT)
    @blp.response(200, SandboxInfo)
    def post(self, ref: str) -> Sandbox:
        """Stop a sandbox

        SIGTERM, 10 seconds, SIGKILL. Its files stay, except for `/tmp`, `/run` and `/dev/shm`.
        """
        return lifecycle().stop(ref)


@blp.route("/sandboxes/<ref>/restart")
class Restart(MethodView):
    @blp.operation("restartSandbox", *ACT, Invalid)
    @blp.response(200, SandboxInfo)
    def post(self, ref: str) -> Sandbox:
        """Restart a sandbox"""
        return lifecycle().restart(ref)


@blp.route("/sandboxes/<ref>/force-stop")
class ForceStop(MethodView):
    @blp.operation("forceStopSandbox", *ACT)
    @blp.response(200, SandboxInfo)
    def post(self, ref: str) -> Sandbox:
        """Stop a sandbox with SIGKILL, whatever is under way"""
        return lifecycle().force_stop(ref)


@blp.route("/sandboxes/<ref>/pause")
class Pause(MethodView):
    @blp.operation("pauseSandbox", *ACT, Unsupported)
    @blp.response(200, SandboxInfo)
    def post(self, ref: str) -> Sandbox:
        """Pause a sandbox

        Every process halts where it stands, and keeps its memory. Execute is a 409 meanwhile.
        """
        return lifecycle().pause(ref)


@blp.route("/sandboxes/<ref>/resume")
class Resume(MethodView):
    @blp.operation("resumeSandbox", *ACT, Unsupported)
    @blp.response(200, SandboxInfo)
    def post(self, ref: str) -> Sandbox:
        """Let a paused sandbox go on"""
        return lifecycle().resume(ref)


@blp.route("/sandboxes/<ref>/execute")
class Execute(MethodView):
    @blp.operation("executeCommand", *BODY, *ACT)
    @blp.arguments(ExecuteRequest, limit=MAX_EXECUTE_BYTES)
    @blp.response(200, ExecuteResult)
    def post(self, execution: Execution, ref: str) -> Any:
        """Run a command to its end

        A non-zero exit code is a 200 too. A client that goes away takes its command with it.
        """
        client = request.environ.get("gunicorn.socket")
        result = processes().execute(ref, execution.request, client=client)
        return results.answer(result, execution.encoding)


def page_of(listing: Listing) -> Page:
    return lifecycle().list(
        statuses=listing.statuses, name=listing.name, limit=listing.limit, cursor=listing.cursor
    )


def links(page: Page) -> dict[str, str]:
    """RFC 8288. The next page is asked for with what this one was asked for with."""
    if page.cursor is None:
        return {}
    query = urlencode({**request.args.to_dict(), "cursor": page.cursor})
    return {"Link": f'</sandboxes?{query}>; rel="next"'}


def look(ref: str, status: Status | None, timeout: float) -> Sandbox:
    if status is None:
        return lifecycle().get(ref)
    return lifecycle().wait(ref, status, timeout)


def fingerprint(sent: Any) -> str:
    """The same for bodies that say the same, in whatever order and spacing."""
    return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()


def wants_async(headers: Mapping[str, str]) -> bool:
    """RFC 7240: preferences stand in a list, with parameters after semicolons."""
    wishes = parse_list_header(headers.get("prefer", ""))
    return any(wish.split(";")[0].strip().lower() == "respond-async" for wish in wishes)


def created_status(sandbox: Sandbox) -> int:
    return 202 if sandbox.status is Status.PROVISIONING else 201


def created_headers(sandbox: Sandbox, replayed: bool) -> dict[str, str]:
    headers = {"Location": f"/sandboxes/{sandbox.id}"}
    if replayed:
        headers["Idempotent-Replayed"] = "true"
    if sandbox.status is Status.PROVISIONING:
        headers |= {"Retry-After": RETRY_AFTER_S, "Preference-Applied": "respond-async"}
    return headers
