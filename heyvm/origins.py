"""Where a request comes from and which name it was sent to: peers, Host and Origin.

Against pages that a browser on this machine has open: by DNS rebinding they can send anything here
under a name of theirs, and without it, forms and WebSockets under their own origin.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heyvm.errors import BadRequest, Forbidden, NotFound

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
ORIGIN = re.compile(r"(https?)://([^/?#@\s]+)")
DEFAULT_PORTS = {"http": "80", "https": "443"}
ADDRESSES_S = 5.0  # an address that has just been added works after at most this
FIB_TRIE = Path("/proc/net/fib_trie")
IF_INET6 = Path("/proc/net/if_inet6")
# A proxy that says nothing of whom it speaks for must not make the whole world local.
FORWARDED_BY = ("HTTP_FORWARDED", "HTTP_X_REAL_IP", "HTTP_VIA")


class Machine:
    """The addresses of this machine, read again when they are some seconds old."""

    def __init__(self) -> None:
        self._addresses: frozenset[Address] = frozenset()
        self._read_at = float("-inf")

    def has(self, address: Address) -> bool:
        if time.monotonic() - self._read_at > ADDRESSES_S:
            self._addresses = local_addresses()
            self._read_at = time.monotonic()
        return address in self._addresses


def local_addresses() -> frozenset[Address]:
    """Every address of every interface, from the kernel's own tables (proc(5))."""
    return frozenset({*_ipv4(_text(FIB_TRIE)), *_ipv6(_text(IF_INET6))})


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # a kernel without IPv6 has no such file
        return ""


def _ipv4(table: str) -> list[Address]:
    """In fib_trie an address stands on one line (`|-- ADDRESS`), and what it is on the next ones:
    `/32 host LOCAL`, once for each interface that has it."""
    found = dict[str, None]()
    address = ""
    for line in table.splitlines():
        if "|-- " in line:
            address = line.split()[-1]
        elif "/32 host LOCAL" in line:
            found[address] = None
    return [ipaddress.IPv4Address(text) for text in found]


def _ipv6(table: str) -> list[Address]:
    return [ipaddress.IPv6Address(int(line.split()[0], 16)) for line in table.splitlines()]


def check_host(environ: Mapping[str, Any], hostname: str | None, machine: Machine) -> None:
    """The Host header must name this machine: localhost, an address of it, or API_HOSTNAME.

    Below API_HOSTNAME, `api.` is this server too, and no other name: those are endpoints'.
    """
    given = environ.get("HTTP_HOST")
    if given is None and environ.get("SERVER_PROTOCOL") == "HTTP/1.0":
        return  # no browser sends that; health checks of load balancers do
    name = host_name(given or "")
    check_target(environ.get("RAW_URI", "/"), given or "")
    if label_of(name, hostname) is not None and name != f"api.{hostname}":
        raise NotFound(f"there is nothing under the name {name!r}")
    if not (name == "localhost" or is_below(name, hostname) or is_own(name, machine)):
        raise Forbidden(
            f"the Host {given!r} is not this machine: use localhost or an address of it, or set"
            " API_HOSTNAME to a name that it should answer to"
        )


def check_target(target: str, host: str) -> None:
    """`GET http://other/ HTTP/1.1` names a host too (RFC 9112 section 3.2.2): the same one."""
    if target.startswith("/") or target == "*":
        return
    authority = target.partition("://")[2].partition("/")[0].partition("?")[0]
    if authority.lower() != host.lower():
        raise BadRequest("the request line names another host than the Host header")


def host_name(authority: str) -> str:
    """The name in `name:port`, in lower case. `BadRequest` for what is none."""
    found = AUTHORITY.fullmatch(authority)
    if found is None:
        raise BadRequest("the Host header is missing or malformed")
    return found[1].lower().removesuffix(".")


def is_below(name: str, hostname: str | None) -> bool:
    return hostname is not None and (name == hostname or name.endswith("." + hostname))


def label_of(name: str, base: str | None) -> str | None:
    """What stands before `.base`; None for a name that is not below it."""
    if base is None or not name.endswith("." + base):
        return None
    return name.removesuffix("." + base)


def is_own(name: str, machine: Machine) -> bool:
    address = address_of(name.strip("[]"))
    if address is None:
        return False
    return address.is_loopback or address.is_unspecified or machine.has(address)


def check_origin(environ: Mapping[str, Any]) -> None:
    """Only pages that this server itself served may call it from a browser. `null` is none."""
    origin = environ.get("HTTP_ORIGIN")
    if origin is None:
        return
    found = ORIGIN.fullmatch(origin)
    if found is None or not same(found[2], environ.get("HTTP_HOST", ""), DEFAULT_PORTS[found[1]]):
        raise Forbidden(f"the Origin {origin[:200]!r} is another one than this server's")


def same(one: str, other: str, default_port: str) -> bool:
    return split(one, default_port) == split(other, default_port)


def split(authority: str, default_port: str) -> tuple[str, str]:
    found = AUTHORITY.fullmatch(authority)
    if found is None:
        return authority, ""
    return found[1].lower().removesuffix("."), found[2] or default_port


def is_local(environ: Mapping[str, Any]) -> bool:
    """Whether the client is a process of this machine, and not merely a proxy of it.

    127.0.0.0/8, ::1 and unix sockets alone: a sandbox's own connections come from the machine's
    other addresses. X-Forwarded-For counts from those only, and its last entry, which the proxy
    itself added.
    """
    if not is_loopback(environ.get("REMOTE_ADDR")):
        return False
    forwarded = environ.get("HTTP_X_FORWARDED_FOR")
    if forwarded is None:
        return not any(header in environ for header in FORWARDED_BY)
    last = forwarded.rpartition(",")[2].strip()
    return bool(last) and is_loopback(last)


def client_of(environ: Mapping[str, Any]) -> str:
    """The address of whoever asks: of this connection, or of whom our own proxy speaks for."""
    peer = environ.get("REMOTE_ADDR") or "127.0.0.1"
    if is_loopback(peer):
        last = environ.get("HTTP_X_FORWARDED_FOR", "").rpartition(",")[2].strip()
        peer = last if address_of(last) is not None else peer
    address = address_of(peer)
    return peer if address is None else str(address)


def came_by_https(environ: Mapping[str, Any]) -> bool:
    """Whether the client spoke TLS to our own proxy."""
    said = environ.get("HTTP_X_FORWARDED_PROTO", "").rpartition(",")[2].strip().lower()
    return is_loopback(environ.get("REMOTE_ADDR")) and said == "https"


def is_loopback(peer: str | None) -> bool:
    """A unix socket's peer has no name: gunicorn says that as the empty string."""
    if peer in ("", "127.0.0.1"):
        return True
    address = address_of(peer or "-")
    return address is not None and address.is_loopback


def address_of(text: str) -> Address | None:
    """An address; `::ffff:127.0.0.1`, as a socket of both kinds has it, is the one of IPv4."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
