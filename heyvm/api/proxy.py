"""The routes of proxy endpoints and of the addresses that lead to a sandbox's ports."""

from __future__ import annotations

from typing import Any

from flask.views import MethodView
from marshmallow import Schema, fields

from heyvm.api import limits
from heyvm.api.blueprint import STORED, Blueprint
from heyvm.api.fields import Flag, Form, Moment, Text, Whole, at_most
from heyvm.api.parts import gateway, proxies, settings
from heyvm.api.schemas import PORT, Query, Request, about, always, digits
from heyvm.errors import BackendFailed, Conflict, Invalid, QuotaExceeded, TooLarge, UnsupportedMedia
from heyvm.models import Endpoint

blp = Blueprint("proxy", description="Ways in to the ports of a sandbox.")

BODY = (Invalid, TooLarge, UnsupportedMedia)
# What a browser takes for a path of the same host, whatever it makes of backslashes.
LOCAL_PATH = r"/([^/\\\s][^\\\s]*)?"


class ProxyRequest(Request):
    """Which port is to be reached, and by whom."""

    port = Whole(required=True, validate=PORT, metadata=about("A port inside.", 80))
    is_public = Flag(
        load_default=True,
        metadata=about("False: only for those who may call the API, or have a link.", True),
    )


class ProxyChange(Request):
    """Who may reach it."""

    is_public = Flag(required=True, metadata=about("See POST.", False))


class LinkRequest(Request):
    """Where the link leads to."""

    path = Text(
        load_default="/",
        validate=[at_most(limits.MAX_NAME), Form(LOCAL_PATH, "Must begin with /, as /docs?page=2")],
        metadata=about("A path of the endpoint's.", "/"),
    )


class SubdomainQuery(Query):
    """Which endpoint."""

    subdomain = Text(
        required=True,
        validate=at_most(limits.MAX_NAME),
        metadata=about("The endpoint's subdomain.", "k3v9x2m4p7q1w8zt"),
    )


class PortQuery(Query):
    """Which port."""

    port = digits("port", 1, 65535, required=True, metadata=about("A port inside.", 8080))


class ProxyInfo(Schema):
    """A way in to one port of a sandbox."""

    subdomain = always(fields.String, "Its name, never given out again.", "k3v9x2m4p7q1w8zt")
    hostname = always(fields.String, "API_HOSTNAME, or localhost.", "localhost")
    sandbox_id = always(fields.String, "Whose port it is.", "sb-066157a9")
    port = always(fields.Integer, "The port inside.", 80)
    is_public = always(fields.Boolean, "Whether everybody may use it.", True)
    local_port = always(
        fields.Integer,
        "The TCP port of 127.0.0.1; null with API_HOSTNAME.",
        40123,
        allow_none=True,
    )
    url = always(fields.String, "Where it is reached.", "http://127.0.0.1:40123")
    created_at = Moment(
        required=True,
        metadata={
            **about("When it was made.", "2026-01-31T12:00:00.000000Z"),
            "type": "string",
            "format": "date-time",
        },
    )
    warnings = fields.List(
        fields.String(), required=True, metadata=about("What is not as it was.", [])
    )


class ProxyListing(Schema):
    """The proxy endpoints of a sandbox."""

    proxies = fields.List(fields.Nested(ProxyInfo), required=True)


class LinkInfo(Schema):
    """A link that opens a private endpoint to a browser."""

    url = always(fields.String, "It is a secret.", "https://k3v9x2m4p7q1w8zt.example.com/...")
    expires_at = Moment(
        required=True,
        metadata={
            **about("Until when it may be followed.", "2026-01-31T12:05:00.000000Z"),
            "type": "string",
            "format": "date-time",
        },
    )


class InternalUrl(Schema):
    """Where this machine reaches a port of a sandbox."""

    sandbox_id = always(fields.String, "Whose port it is.", "sb-066157a9")
    ip = always(fields.String, "An address of this machine.", "127.0.0.1")
    port = always(fields.Integer, "The port to connect to there.", 40124)
    guest_port = always(fields.Integer, "The port inside.", 8080)
    url = always(fields.String, "Both.", "http://127.0.0.1:40124")


@blp.route("/sandboxes/<ref>/proxy")
class ProxyEndpoints(MethodView):
    @blp.operation("listProxies", *STORED)
    @blp.response(200, ProxyListing)
    def get(self, ref: str) -> dict[str, Any]:
        """List proxy endpoints

        Oldest first.
        """
        return {"proxies": [shown(one) for one in proxies().list(ref)]}

    @blp.operation("createProxy", *STORED, Conflict, BackendFailed, QuotaExceeded, *BODY)
    @blp.arguments(ProxyRequest)
    @blp.response(201, ProxyInfo)
    def post(self, wanted: dict[str, Any], ref: str) -> dict[str, Any]:
        """Create a proxy endpoint

        It accepts connections when this answers. It stays over stop, start and restarts of the
        server, and goes with the sandbox; several may lead to one port.
        """
        return shown(proxies().create(ref, wanted["port"], is_public=wanted["is_public"]))

    @blp.operation("deleteProxy", *STORED, Invalid)
    @blp.arguments(SubdomainQuery, location="query")
    @blp.response(204)
    def delete(self, wanted: dict[str, str], ref: str) -> None:
        """Delete a proxy endpoint

        It refuses when this answers, and open connections are cut.
        """
        proxies().delete(ref, wanted["subdomain"])


@blp.route("/sandboxes/<ref>/proxy/<subdomain>")
class OneProxy(MethodView):
    @blp.operation("getProxy", *STORED)
    @blp.response(200, ProxyInfo)
    def get(self, ref: str, subdomain: str) -> dict[str, Any]:
        """Get a proxy endpoint"""
        return shown(proxies().get(ref, subdomain))

    @blp.operation("changeProxy", *STORED, BackendFailed, *BODY)
    @blp.arguments(ProxyChange)
    @blp.response(200, ProxyInfo)
    def patch(self, wanted: dict[str, bool], ref: str, subdomain: str) -> dict[str, Any]:
        """Open or close a proxy endpoint

        To everybody, or to those alone who may call the API. What is open through it is cut.
        """
        return shown(proxies().change(ref, subdomain, is_public=wanted["is_public"]))

    @blp.operation("deleteOneProxy", *STORED)
    @blp.response(204)
    def delete(self, ref: str, subdomain: str) -> None:
        """Delete a proxy endpoint by its path

        As with `?subdomain=`.
        """
        proxies().delete(ref, subdomain)


@blp.route("/sandboxes/<ref>/proxy/<subdomain>/link")
class ProxyLink(MethodView):
    @blp.operation("createProxyLink", *STORED, Conflict, *BODY)
    @blp.arguments(LinkRequest)
    @blp.response(201, LinkInfo)
    def post(self, wanted: dict[str, str], ref: str, subdomain: str) -> dict[str, Any]:
        """Make a link for a browser

        Who follows it within five minutes gets a cookie that opens this endpoint for twelve hours.
        """
        endpoint = proxies().get(ref, subdomain)
        if endpoint.is_public:
            raise Conflict(f"endpoint {subdomain!r} is public: {shown(endpoint)['url']}")
        url, expires_at = gateway().link_for(endpoint, base_url(endpoint), wanted["path"])
        return {"url": url, "expires_at": expires_at}


@blp.route("/sandboxes/<ref>/internal-url")
class Internal(MethodView):
    @blp.operation("getInternalUrl", *STORED, Conflict, QuotaExceeded, Invalid)
    @blp.arguments(PortQuery, location="query")
    @blp.response(200, InternalUrl)
    def get(self, wanted: dict[str, int], ref: str) -> dict[str, Any]:
        """Get an address of a port for this machine alone

        Made at the first call for a port, and the same from then on.
        """
        endpoint = proxies().internal(ref, wanted["port"])
        return {
            "sandbox_id": endpoint.sandbox_id,
            "ip": "127.0.0.1",
            "port": endpoint.local_port,
            "guest_port": endpoint.port,
            "url": f"http://127.0.0.1:{endpoint.local_port}",
        }


def shown(endpoint: Endpoint) -> dict[str, Any]:
    hostname = settings().api_hostname
    return {
        **vars(endpoint),
        "hostname": hostname or "localhost",
        "local_port": None if hostname else endpoint.local_port,
        "url": f"https://{endpoint.subdomain}.{hostname}"
        if hostname
        else f"http://127.0.0.1:{endpoint.local_port}",
    }


def base_url(endpoint: Endpoint) -> str:
    """Under its own name, which a cookie is bound to: 127.0.0.1 has the same ones on every port."""
    hostname = settings().api_hostname
    if hostname:
        return f"https://{endpoint.subdomain}.{hostname}"
    return f"http://{endpoint.subdomain}.localhost:{endpoint.local_port}"
