"""Every setting that the environment can give, read once into one frozen value."""

from __future__ import annotations

import difflib
import grp
import hashlib
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from heyvm.errors import Misconfigured
from heyvm.models import Limits

TRUE = frozenset({"1", "true", "yes", "on"})
FALSE = frozenset({"", "0", "false", "no", "off"})
DEFAULT_MOUNT_ROOTS = ("/home", "/srv", "/mnt", "/media", "/opt", "/tmp", "/var/tmp")
DEFAULT_IMAGES: Mapping[str, str] = {
    "shell": "host",
    "python": "python:3.12-slim",
    "node": "node:22-slim",
}
# An underscore is in no name of the Internet's, but in some that networks of containers give.
LABEL = "[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?"
HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){LABEL}(?:\.{LABEL})*")
LEAST_CPUS = 0.01
SHORT_SECRET_BYTES = 32  # RFC 7518 section 3.2: a key for HS256 has at least the hash's size


@dataclass(frozen=True)
class Setting:
    """One environment variable: what it is called, what it is without, what it does."""

    name: str
    default: str
    meaning: str


KNOWN = (
    Setting("JWT_SECRET", "", "HS256 key; set, every route but /health needs a bearer token"),
    Setting("JWT_AUDIENCE", "", "the `aud` that a token must carry"),
    Setting("API_HOSTNAME", "", "the API's own name; proxy endpoints are `<subdomain>.` of it"),
    Setting("AUTH_SERVER_URL", "", "`/auth/*` is forwarded there"),
    Setting("HEYVM_DATA_DIR", "/var/lib/heyvm, or ~/.heyo", "registry, sandboxes, logs"),
    Setting("HEYVM_RUN_DIR", "/run/heyvm, or $XDG_RUNTIME_DIR/heyvm", "sockets and locks"),
    Setting("HEYVM_PORTS_DIR", "`ports` in HEYVM_RUN_DIR", "where nginx finds endpoints' sockets"),
    Setting("HEYVM_PORTS_GROUP", "", "the group that may use them: that of nginx (`www-data`)"),
    Setting("HEYVM_TUNNEL_HOST", "the API's, or 127.0.0.1", "the IP address of tickets' UDP ports"),
    Setting("HEYVM_TUNNEL_PORTS", "any", "`first-last`: tickets' UDP ports, for a firewall"),
    Setting("HEYVM_STRICT_TICKETS", "0", "1: tickets that heyvm's own client alone can use"),
    Setting("HEYO_IROH_RELAY_URL", "", "an iroh relay of your own, for clients without a way here"),
    Setting("HEYVM_LOG", "text", "json: each request and event as a line of JSON on stderr"),
    Setting("HEYVM_ALLOW_OPEN", "0", "1: answer other machines without JWT_SECRET"),
    Setting("HEYVM_STRICT_IMAGES", "0", "1: never run on `host` for an image that cannot be had"),
    Setting("HEYVM_IMAGE_SHELL", "host", "the image of a `shell` that names none"),
    Setting("HEYVM_IMAGE_PYTHON", "python:3.12-slim", "the image of a `python` that names none"),
    Setting("HEYVM_IMAGE_NODE", "node:22-slim", "the image of a `node` that names none"),
    Setting("HEYVM_INSECURE_REGISTRIES", "", "registries (host:port, commas) without TLS"),
    Setting(
        "HEYVM_SUBNET", "198.18.0.0/15", "the sandboxes' own addresses; yours use no part of it"
    ),
    Setting("HEYVM_DEFAULT_CPUS", "unlimited", "cores of a sandbox that asks for none"),
    Setting("HEYVM_DEFAULT_MEMORY", "half of the machine's", "its memory: 512m, 2g, bytes"),
    Setting("HEYVM_DEFAULT_PIDS", "4096", "its processes and threads"),
    Setting("HEYVM_MAX_CPUS", "unlimited", "the most cores that may be asked for"),
    Setting("HEYVM_MAX_MEMORY", "unlimited", "the most memory"),
    Setting("HEYVM_MAX_PIDS", "unlimited", "the most processes and threads"),
    Setting("HEYVM_MAX_DISK_GB", "250", "the most `disk_size_gb`"),
    Setting("HEYVM_MAX_SANDBOXES", "unlimited", "how many sandboxes may exist"),
    Setting("HEYVM_MAX_UPLOAD_BYTES", "unlimited", "the largest upload, in bytes"),
    Setting("HEYVM_MOUNT_ROOTS", ":".join(DEFAULT_MOUNT_ROOTS) + " and ~", "where mounts may lie"),
    Setting("HEYVM_MOUNT_SYSTEM_IDS", "0", "1: directories of system users (uid 1-999) writable"),
)
# Asked for by the guide or by earlier configurations; what they turn on is not built yet.
NOT_YET = {
    "S3_ENABLED": "mounts are not kept in S3",
    "S3_BUCKET": "mounts are not kept in S3",
    "MSB_API_KEY": "there is no msb backend",
    "MSB_SERVER_HOST": "there is no msb backend",
}


@dataclass(frozen=True)
class Settings:
    """What the server was told. Build it with `from_env`; tests may build it field by field."""

    data_dir: Path
    run_dir: Path
    ports_dir: Path | None = None
    ports_group: int | None = None
    tunnel_host: str = "0.0.0.0"
    tunnel_ports: tuple[int, int] | None = None
    strict_tickets: bool = False
    iroh_relay: str | None = None
    log_json: bool = False
    jwt_secret: str | None = None
    jwt_audience: str | None = None
    api_hostname: str | None = None
    auth_server_url: str | None = None
    allow_open: bool = False
    strict_images: bool = False
    images: Mapping[str, str] = field(default_factory=lambda: DEFAULT_IMAGES)
    insecure_registries: tuple[str, ...] = ()
    subnet: str = "198.18.0.0/15"
    default_limits: Limits = field(default_factory=lambda: Limits(pids=4096))
    max_limits: Limits = field(default_factory=lambda: Limits(disk_size_gb=250))
    max_sandboxes: int | None = None
    max_upload_bytes: int | None = None
    mount_roots: tuple[Path, ...] = tuple(Path(root) for root in DEFAULT_MOUNT_ROOTS)
    mount_system_ids: bool = False
    debug: bool = False
    notices: tuple[str, ...] = ()

    @property
    def ports(self) -> Path:
        """Where the sockets of proxy endpoints lie."""
        return self.ports_dir or self.run_dir / "ports"

    @property
    def mark(self) -> str:
        """A short name for this data directory, for what is machine-wide: cgroups, id blocks."""
        return mark_of(self.data_dir)


def from_env(environ: Mapping[str, str]) -> Settings:
    """Read the environment. Raises `Misconfigured` for a value with which nobody may start.

    `notices` are lines to print at start: unknown names, weak secrets, what is not built yet.
    """
    data_dir = Path(environ.get("HEYVM_DATA_DIR") or default_data_dir(environ)).absolute()
    secret = environ.get("JWT_SECRET")
    if secret is not None and not secret.strip():
        raise Misconfigured("JWT_SECRET is set but empty: give it a value, or unset it")
    dev = _flag(environ, "HEYVM_DEV")
    run_dir = _run_dir(environ, data_dir)
    return Settings(
        data_dir=data_dir,
        run_dir=run_dir,
        ports_dir=_directory(environ, "HEYVM_PORTS_DIR"),
        ports_group=_group(environ, "HEYVM_PORTS_GROUP"),
        tunnel_host=_tunnel_host(environ),
        tunnel_ports=_port_range(environ, "HEYVM_TUNNEL_PORTS"),
        strict_tickets=_flag(environ, "HEYVM_STRICT_TICKETS"),
        iroh_relay=_relay(environ, "HEYO_IROH_RELAY_URL"),
        log_json=_choice(environ, "HEYVM_LOG", ("text", "json")) == "json",
        jwt_secret=secret,
        jwt_audience=environ.get("JWT_AUDIENCE") or None,
        api_hostname=_host_name(environ, "API_HOSTNAME"),
        auth_server_url=environ.get("AUTH_SERVER_URL")
        or ("http://localhost:3001" if dev else None),
        allow_open=_flag(environ, "HEYVM_ALLOW_OPEN"),
        strict_images=_flag(environ, "HEYVM_STRICT_IMAGES"),
        images=_images(environ),
        insecure_registries=_list(environ, "HEYVM_INSECURE_REGISTRIES"),
        subnet=_subnet(environ),
        default_limits=Limits(
            cpus=_cores(environ, "HEYVM_DEFAULT_CPUS"),
            memory=_bytes(environ, "HEYVM_DEFAULT_MEMORY", machine_memory() // 2),
            pids=_count(environ, "HEYVM_DEFAULT_PIDS", 4096),
        ),
        max_limits=Limits(
            cpus=_cores(environ, "HEYVM_MAX_CPUS"),
            memory=_bytes(environ, "HEYVM_MAX_MEMORY", None),
            pids=_count(environ, "HEYVM_MAX_PIDS"),
            disk_size_gb=_count(environ, "HEYVM_MAX_DISK_GB", 250),
        ),
        max_sandboxes=_count(environ, "HEYVM_MAX_SANDBOXES"),
        max_upload_bytes=_count(environ, "HEYVM_MAX_UPLOAD_BYTES"),
        mount_roots=_mount_roots(environ),
        mount_system_ids=_flag(environ, "HEYVM_MOUNT_SYSTEM_IDS"),
        debug=_flag(environ, "HEYVM_DEBUG"),
        notices=tuple(_notices(environ, secret)),
    )


def default_data_dir(environ: Mapping[str, str]) -> str:
    """`/var/lib/heyvm` for root, else `.heyo` in the user's home."""
    if os.geteuid() == 0:
        return "/var/lib/heyvm"
    return os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".heyo")


def _run_dir(environ: Mapping[str, str], data_dir: Path) -> Path:
    """Sockets and locks: short (a unix socket's path has at most 107 bytes), gone after a reboot,
    and one for each data directory, so that two servers never meet."""
    if given := environ.get("HEYVM_RUN_DIR"):
        return Path(given).absolute()
    mark = mark_of(data_dir)
    if os.geteuid() == 0:
        return Path("/run/heyvm", mark)
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, "heyvm", mark)
    return Path(f"/tmp/heyvm-{os.geteuid()}", mark)


def mark_of(data_dir: Path) -> str:
    """8 hex digits that name a data directory."""
    return hashlib.sha256(os.fsencode(os.path.realpath(data_dir))).hexdigest()[:8]


def _mount_roots(environ: Mapping[str, str]) -> tuple[Path, ...]:
    given = environ.get("HEYVM_MOUNT_ROOTS")
    if given is not None:
        return tuple(Path(root) for root in given.split(":") if root)
    home = os.path.expanduser("~")
    return tuple(Path(root) for root in (*DEFAULT_MOUNT_ROOTS, home))


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value not in TRUE | FALSE:
        raise Misconfigured(f"{name} is {value!r}: say 1 or 0")
    return value in TRUE


def _choice(environ: Mapping[str, str], name: str, words: tuple[str, ...]) -> str:
    """One of `words`, the first where nothing is said."""
    value = environ.get(name, "").strip().lower() or words[0]
    if value not in words:
        raise Misconfigured(f"{name} is {value!r}: say {' or '.join(words)}")
    return value


def _host_name(environ: Mapping[str, str], name: str) -> str | None:
    value = environ.get(name, "").strip()
    found = value.strip(".").lower()
    if found and not HOST_NAME.fullmatch(found):
        raise Misconfigured(
            f"{name} is {value!r}: say a host name alone (example.com), without https://, a port,"
            " a path or *"
        )
    return found or None


def _directory(environ: Mapping[str, str], name: str) -> Path | None:
    return Path(environ[name]).absolute() if environ.get(name) else None


def _tunnel_host(environ: Mapping[str, str]) -> str:
    """Where the API listens, as far as it says so: a socket that systemd hands over does not.

    Where the API answers this machine alone, so do tickets: whoever reaches one's UDP port can get
    in without the ticket (docs/operating.md).
    """
    name = "HEYVM_TUNNEL_HOST"
    given = environ.get(name, "").strip().strip("[]")
    host = given or environ.get("HEYVM_HOST", "").strip().strip("[]") or "0.0.0.0"
    is_for_all = bool(environ.get("JWT_SECRET")) or _flag(environ, "HEYVM_ALLOW_OPEN")
    if host == "localhost" or not (given or is_for_all):
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        if given:
            raise Misconfigured(f"{name} is {given!r}: say an IP address of this machine") from None
        return "0.0.0.0"


def _port_range(environ: Mapping[str, str], name: str) -> tuple[int, int] | None:
    value = environ.get(name, "").strip()
    if not value:
        return None
    found = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", value)
    if not found or not 1 <= int(found[1]) <= int(found[2]) <= 65535:
        raise Misconfigured(f"{name} is {value!r}: say two ports, as 49200-49400")
    return int(found[1]), int(found[2])


def _relay(environ: Mapping[str, str], name: str) -> str | None:
    value = environ.get(name, "").strip()
    if value and not re.fullmatch(r"https?://[^\s/]+/?", value):
        raise Misconfigured(f"{name} is {value!r}: say a URL, as https://relay.example.com")
    return value or None


def _group(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "").strip()
    if not value:
        return None
    try:
        return int(value) if value.isdigit() else grp.getgrnam(value).gr_gid
    except KeyError:
        raise Misconfigured(
            f"{name} is {value!r}: there is no such group here; say that of nginx (www-data)"
        ) from None


def _count(environ: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    value = environ.get(name, "").strip()
    if value == "":
        return default
    if value == "unlimited":
        return None
    if not value.isascii() or not value.isdigit():
        raise Misconfigured(f"{name} is {value!r}: say a whole number, or leave it out")
    return int(value)


def _cores(environ: Mapping[str, str], name: str) -> float | None:
    value = environ.get(name, "").strip()
    if value in ("", "unlimited"):
        return None
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", value) or float(value) < LEAST_CPUS:
        raise Misconfigured(f"{name} is {value!r}: say a number of cores, {LEAST_CPUS} or more")
    return float(value)


def _bytes(environ: Mapping[str, str], name: str, default: int | None) -> int | None:
    value = environ.get(name, "").strip().lower()
    if value in ("", "unlimited"):
        return None if value else default
    found = re.fullmatch(r"([0-9]{1,15})([kmgt]?)i?b?", value)
    if not found or int(found[1]) == 0:
        raise Misconfigured(f"{name} is {value!r}: say bytes, or 512m, 2g")
    return int(found[1]) << (10 * " kmgt".index(found[2] or " "))


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _images(environ: Mapping[str, str]) -> Mapping[str, str]:
    return {
        kind: environ.get(f"HEYVM_IMAGE_{kind.upper()}", "").strip() or image
        for kind, image in DEFAULT_IMAGES.items()
    }


def _list(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[,\s]+", environ.get(name, "")) if word)


def _subnet(environ: Mapping[str, str]) -> str:
    value = environ.get("HEYVM_SUBNET", "").strip() or "198.18.0.0/15"
    try:
        network = ipaddress.IPv4Network(value)
    except ValueError as error:
        raise Misconfigured(f"HEYVM_SUBNET is {value!r}: {error}") from None
    if not 8 <= network.prefixlen <= 24:
        raise Misconfigured(f"HEYVM_SUBNET is {value!r}: say a network of /8 to /24")
    return str(network)


def _notices(environ: Mapping[str, str], secret: str | None) -> list[str]:
    lines = [f"{name} is set, but {why}" for name, why in NOT_YET.items() if environ.get(name)]
    known = {setting.name for setting in KNOWN} | {"HEYVM_DEBUG", "HEYVM_DEV"} | INTERNAL | CLIENTS
    for name in sorted(environ):
        if name.startswith("HEYVM_") and name not in known:
            near = difflib.get_close_matches(name, [one.name for one in KNOWN], 1, cutoff=0.75)
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"{name} is not a setting that heyvm knows{hint}")
    if secret is not None and len(secret.encode()) < SHORT_SECRET_BYTES:
        lines.append(
            f"JWT_SECRET has {len(secret.encode())} bytes: fine to try things with, but a key that"
            f" cannot be guessed has at least {SHORT_SECRET_BYTES} (openssl rand -hex 32)"
        )
    return lines


# Set by heyvm for its own processes.
INTERNAL = frozenset({"HEYVM_HOST", "HEYVM_PORT", "HEYVM_WORKERS", "HEYVM_ALIVE_FD"})
# Of `heyvm connect` and `heyvm ssh-proxy`.
CLIENTS = frozenset({"HEYVM_URL", "HEYVM_API_KEY", "HEYVM_CONNECTION_URL"})
