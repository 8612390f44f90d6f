"""The values that the domain speaks in. All frozen; times are seconds since the epoch (UTC)."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Status(enum.StrEnum):
    """The public word for where a sandbox is in its life."""

    PROVISIONING = "provisioning"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    PAUSED = "paused"
    FAILED = "failed"


LIVE = frozenset({Status.PROVISIONING, Status.RUNNING, Status.STOPPING, Status.PAUSED})
UP = frozenset({Status.RUNNING, Status.PAUSED})
INACTIVE = frozenset({Status.STOPPED, Status.FAILED})


@dataclass(frozen=True)
class Mount:
    """A directory of the host inside a sandbox. `pending`: it takes effect at the next start."""

    host_path: str
    sandbox_path: str
    read_only: bool = False
    pending: bool = False


@dataclass(frozen=True)
class Network:
    """Where a sandbox may connect to. `allow` and `deny` are CIDRs in their canonical form; with an
    `allow` the rest is closed, and `deny` wins. Both are empty where `mode` is `none`."""

    mode: str = "egress"
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """None: not limited. `cpus` counts cores, `memory` bytes, `pids` processes and threads;
    `disk_size_gb` GiB of everything that it keeps on disk."""

    cpus: float | None = None
    memory: int | None = None
    pids: int | None = None
    disk_size_gb: int | None = None


@dataclass(frozen=True)
class ImageConfig:
    """What an image says of how it is run. A sandbox keeps the one that it was made with."""

    env: Mapping[str, str] = field(default_factory=dict)
    working_directory: str | None = None
    user: str = ""
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Image:
    """An unpacked root file system in the local store.

    `digest` (`sha256:<hex>`) names its content and its directory; `names` are what it is called
    here, none for one that is only still in use. `size_bytes` is what it takes on disk,
    `devices` how many device nodes were left out, `source` where it came from.
    """

    digest: str
    names: tuple[str, ...]
    size_bytes: int
    created_at: float
    source: str = ""
    devices: int = 0
    config: ImageConfig = field(default_factory=ImageConfig)


@dataclass(frozen=True)
class Usage:
    """What a sandbox used when last looked at. `cpu_percent` is of one core, and may pass 100;
    `memory_bytes` is what its cgroup is charged; None where it cannot be known."""

    cpu_percent: float | None = None
    memory_bytes: int | None = None
    pids: int | None = None


@dataclass(frozen=True)
class PortMapping:
    """A TCP port of 127.0.0.1 on the host that leads to one inside."""

    host_port: int
    guest_port: int


@dataclass(frozen=True)
class Endpoint:
    """A way in from outside to one port of a sandbox.

    `kind`: `proxy`, made by a call and known by its subdomain; `open`, one of `open_ports`; or
    `internal`. The last two are local ports alone, and their subdomain is only a name.
    `local_port`: the TCP port of 127.0.0.1; None where there is none (yet). `warnings` say what of
    it could not stay as it was.
    """

    subdomain: str
    sandbox_id: str
    port: int
    created_at: float
    kind: str = "proxy"
    is_public: bool = True
    local_port: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sandbox:
    """One row of the registry. `state` is its backend's private note (JSON), never shown.

    `image_resolved` is `host` or an image's digest; empty while its image is still to come.
    `ids` says whose user ids it has: `range` (65,536 of its own), `sub-ids` (its owner's) or
    `single`. `oom_kills` counts processes that its memory limit has ended since it was made.
    """

    id: str
    name: str
    slug: str
    status: Status
    status_changed_at: float
    created_at: float
    backend_type: str
    image_resolved: str
    sandbox_type: str = "shell"
    image: str | None = None
    ttl_seconds: int | None = None
    expires_at: float | None = None
    started_at: float | None = None
    start_command: str | None = None
    working_directory: str = "/workspace"
    open_ports: tuple[int, ...] = ()
    env_vars: Mapping[str, str] = field(default_factory=dict)
    setup_hooks: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    error_message: str | None = None
    warnings: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id_base: int | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    network: Network = field(default_factory=Network)
    limits: Limits = field(default_factory=Limits)
    size_class: str | None = None
    image_config: ImageConfig = field(default_factory=ImageConfig)
    ids: str = "single"
    status_detail: str | None = None
    oom_kills: int = 0
    port_mappings: tuple[PortMapping, ...] = ()


@dataclass(frozen=True)
class CreateSpec:
    """What a create asked for, already checked for type and form by the API."""

    name: str | None = None
    slug: str | None = None
    sandbox_type: str = "shell"
    image: str | None = None
    backend_type: str | None = None
    ttl_seconds: int | None = None
    start_command: str | None = None
    working_directory: str | None = None
    open_ports: tuple[int, ...] = ()
    env_vars: Mapping[str, str] = field(default_factory=dict)
    setup_hooks: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    network: Network | None = None
    size_class: str | None = None
    cpus: float | None = None
    memory: int | None = None
    pids: int | None = None
    disk_size_gb: int | None = None
    unknown_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tunnel:
    """A way in for `heyvm connect`: an iroh endpoint that leads to a sandbox's SSH server (kind
    `shell`) or to a port inside (`tcp`). `secret` is its private key, 32 bytes; `udp_port` is where
    it was last reached. Without `ssh_public_keys` whoever has the ticket may log in."""

    id: str
    sandbox_id: str
    kind: str
    secret: bytes = field(repr=False)
    created_at: float
    expires_at: float | None = None
    port: int | None = None
    udp_port: int | None = None
    ssh_public_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExecRequest:
    """One command. `args` empty or None: see processes.argv_of for when a shell reads `command`."""

    command: str
    args: tuple[str, ...] | None = None
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    stdin: bytes | None = None
    timeout_seconds: float | None = None
    max_output_bytes: int = 10 * 1024 * 1024


@dataclass(frozen=True)
class ExecResult:
    """What became of a command. Streams are the raw bytes; `output` is both as they arrived."""

    output: bytes
    stdout: bytes
    stderr: bytes
    exit_code: int
    duration_ms: int
    timed_out: bool
    truncated: bool


@dataclass(frozen=True)
class FileInfo:
    """One entry of a listing. `path` is relative to the mount; names are raw bytes decoded with
    surrogateescape. `type`: file, directory, symlink, fifo, socket, device."""

    name: str
    path: str
    type: str
    size: int
    mode: int
    modified_at: float


@dataclass(frozen=True)
class Download:
    """A file or a tar on its way out. `size` is None for a tar. Close `chunks` when done early."""

    info: FileInfo
    size: int | None
    etag: str | None
    chunks: Iterator[bytes]


@dataclass(frozen=True)
class LogEntry:
    """`level` is None where the message names none."""

    timestamp: float
    source: str
    message: str
    level: str | None = None


@dataclass(frozen=True)
class LogPage:
    """`total` counts the entries that match, before paging; `logs` are oldest first."""

    logs: Sequence[LogEntry]
    total: int
    limit: int
    offset: int


@dataclass(frozen=True)
class Page:
    """`cursor` asks for the next page; None on the last."""

    sandboxes: Sequence[Sandbox]
    cursor: str | None = None
