"""The routes of shell sessions and tunnels: tickets for `heyvm connect`."""

from __future__ import annotations

from typing import Any

from flask.views import MethodView
from marshmallow import Schema, ValidationError, fields
from marshmallow.validate import Length

from heyvm import sshkeys
from heyvm.api import limits
from heyvm.api.blueprint import STORED, Blueprint
from heyvm.api.fields import Items, Moment, Text, Whole, between
from heyvm.api.parts import shells
from heyvm.api.schemas import PORT, Request, about, always
from heyvm.errors import (
    BackendFailed,
    Conflict,
    Invalid,
    QuotaExceeded,
    TooLarge,
    Unsupported,
    UnsupportedMedia,
)
from heyvm.models import Tunnel
from heyvm.shells import Way

blp = Blueprint("shells", description="Shells and ports of a sandbox, for `heyvm connect`.")

BODY = (Invalid, TooLarge, UnsupportedMedia)
OPENED = (Conflict, BackendFailed, QuotaExceeded, Unsupported)
A_TIME = "2026-01-31T12:00:00.000000Z"


class PublicKey(Text):
    """A line of an authorized_keys file, or of a `.pub` file."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        line = super()._deserialize(value, attr, data, **kwargs)
        try:
            sshkeys.parse_public_key(line)
        except Invalid as error:
            raise ValidationError(error.detail) from None
        return line


class ShellSessionRequest(Request):
    """For how long, and for whom."""

    ttl_seconds = Whole(
        load_default=limits.DAY_S,
        validate=between(limits.LEAST_SESSION_S, limits.MAX_SESSION_S),
        metadata=about("How long the ticket works; what is open by it is cut then.", limits.DAY_S),
    )
    ssh_public_keys = Items(
        PublicKey(),
        load_default=(),
        validate=Length(max=limits.MAX_SSH_KEYS),
        metadata=about(
            "Who may log in. Without, whoever has the ticket.", ["ssh-ed25519 AAAAC3Nz... me@here"]
        ),
    )


class TunnelRequest(Request):
    """Where to."""

    port = Whole(required=True, validate=PORT, metadata=about("A port inside.", 5432))


def moment(text: str, *, optional: bool = False) -> Moment:
    kind: Any = ["string", "null"] if optional else "string"
    return Moment(
        required=True,
        allow_none=optional,
        metadata={**about(text, A_TIME), "type": kind, "format": "date-time"},
    )


class SessionInfo(Schema):
    """A ticket that was given out; the ticket itself is not shown again."""

    session_id = always(fields.String, "Its name, for DELETE.", "shell-5f0c2f9f34a1b7d2")
    sandbox_id = always(fields.String, "Whose shell it is.", "sb-066157a9")
    created_at = moment("When it was made.")
    expires_at = moment("When it ends.")
    ssh_public_keys = fields.List(
        fields.String(), required=True, metadata=about("Who may log in; empty: whoever has it.", [])
    )


class ShellSession(SessionInfo):
    """A ticket for the sandbox's SSH server."""

    connection_url = always(
        fields.String, "For `heyvm connect <url> --shell`. It is a secret.", "heyo://endpointaab..."
    )
    ssh_host_key = always(
        fields.String, "The SSH server's key, for known_hosts.", "ssh-ed25519 AAAAC3Nz..."
    )


class SessionListing(Schema):
    """The shell sessions of a sandbox."""

    sessions = fields.List(fields.Nested(SessionInfo), required=True)


class TunnelInfo(Schema):
    """A ticket for a port, which was given out; the ticket itself is shown by POST."""

    tunnel_id = always(fields.String, "Its name, for DELETE.", "tcp-5f0c2f9f34a1b7d2")
    sandbox_id = always(fields.String, "Whose port it is.", "sb-066157a9")
    port = always(fields.Integer, "The port inside.", 5432)
    created_at = moment("When it was made.")


class TcpTunnel(TunnelInfo):
    """A ticket for a port."""

    connection_url = always(
        fields.String, "For `heyvm connect <url> -p 5432`. It is a secret.", "heyo://endpointaab..."
    )


class TunnelListing(Schema):
    """The tunnels of a sandbox."""

    tunnels = fields.List(fields.Nested(TunnelInfo), required=True)


@blp.route("/sandboxes/<ref>/shell-session")
class ShellSessions(MethodView):
    @blp.operation("listShellSessions", *STORED)
    @blp.response(200, SessionListing)
    def get(self, ref: str) -> dict[str, Any]:
        """List shell sessions

        Oldest first, without their tickets.
        """
        return {"sessions": [shown(one) for one in shells().list(ref, "shell")]}

    @blp.operation("createShellSession", *STORED, *OPENED, *BODY)
    @blp.arguments(ShellSessionRequest, required=False)
    @blp.response(200, ShellSession)
    def post(self, wanted: dict[str, Any], ref: str) -> dict[str, Any]:
        """Make a ticket for a shell

        It works when this answers, over stop and start of the sandbox and restarts of the server,
        until it expires or is deleted. Whoever has it has the sandbox.
        """
        way = shells().create(ref, wanted["ttl_seconds"], wanted["ssh_public_keys"])
        return opened(way) | {"ssh_host_key": way.host_key}


@blp.route("/sandboxes/<ref>/shell-session/<session_id>")
class OneShellSession(MethodView):
    @blp.operation("deleteShellSession", *STORED)
    @blp.response(204)
    def delete(self, ref: str, session_id: str) -> None:
        """End a shell session

        Its ticket leads nowhere when this answers, and shells that are open by it are cut.
        """
        shells().remove(ref, "shell", session_id)


@blp.route("/sandboxes/<ref>/tcp-tunnel")
class Tunnels(MethodView):
    @blp.operation("listTunnels", *STORED)
    @blp.response(200, TunnelListing)
    def get(self, ref: str) -> dict[str, Any]:
        """List tunnels

        Oldest first, without their tickets.
        """
        return {"tunnels": [shown(one) for one in shells().list(ref, "tcp")]}

    @blp.operation("createTunnel", *STORED, *OPENED, *BODY)
    @blp.arguments(TunnelRequest)
    @blp.response(200, TcpTunnel)
    def post(self, wanted: dict[str, int], ref: str) -> dict[str, Any]:
        """Make a ticket for a port

        The same for the same port, until it is deleted or the sandbox is.
        """
        return opened(shells().tunnel_to(ref, wanted["port"]))


@blp.route("/sandboxes/<ref>/tcp-tunnel/<tunnel_id>")
class OneTunnel(MethodView):
    @blp.operation("deleteTunnel", *STORED)
    @blp.response(204)
    def delete(self, ref: str, tunnel_id: str) -> None:
        """End a tunnel

        Its ticket leads nowhere when this answers, and what is open by it is cut.
        """
        shells().remove(ref, "tcp", tunnel_id)


def shown(tunnel: Tunnel) -> dict[str, Any]:
    return {**vars(tunnel), "session_id": tunnel.id, "tunnel_id": tunnel.id}


def opened(way: Way) -> dict[str, Any]:
    return shown(way.tunnel) | {"connection_url": way.url}
