"""Every default and limit of the API, in one table: README and GET /capabilities show the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from heyvm.api.bodies import (
    MAX_EXECUTE_BYTES,
    MAX_JSON_BYTES,
    MAX_JSON_TOKENS,
)
from heyvm.api.fields import MOST_CIDRS
from heyvm.files import MAX_NAME_BYTES, MAX_PATH_BYTES
from heyvm.lifecycle import STOP_GRACE_S, TURN_PATIENCE_S
from heyvm.logs import MAX_MESSAGE_BYTES
from heyvm.settings import Settings
from heyvm.shells import MAX_TUNNELS
from heyvm.strictjson import MAX_JSON_DEPTH
from heyvm.tokens import MAX_TOKEN_BYTES

DAY_S = 24 * 60 * 60
MAX_TTL_S = 10 * 365 * DAY_S
MAX_TIMEOUT_S = 365 * DAY_S
LEAST_SESSION_S = 1
MAX_SESSION_S = 365 * DAY_S
MAX_SSH_KEYS = 64
MIB = 1024 * 1024
DEFAULT_OUTPUT_BYTES = 10 * MIB
MAX_OUTPUT_BYTES = 64 * MIB
DEFAULT_WAIT_S = 30
MAX_WAIT_S = 300
MAX_PAGE = 1000
INACTIVE_PAGE = 10
DEFAULT_LOGS = 100
MAX_LOGS = 10_000
DEFAULT_AUDIT = 100
MAX_TEXT = 128 * 1024
MAX_NAME = 255
MAX_ITEMS = 10_000
MAX_PORTS = 128
MAX_ARGS = 100_000
MAX_MOUNTS = 64
MAX_KEY = 255
MAX_CPUS = 10_000
LEAST_MEMORY = 16 * MIB  # the agent and a small command
MOST_MEMORY = 1 << 46
LEAST_PIDS = 16
MOST_PIDS = 1 << 22  # the kernel's own (PID_MAX_LIMIT)
MOST_DISK_GB = 16 * 1024
LOG_FILE_BYTES = 2 * MIB  # the agent's own number; see docs/architecture.md
MAX_PARTS = 16
MAX_FIELD_BYTES = 16 * 1024
FORWARD_S = 10
FORWARD_BYTES = MIB


@dataclass(frozen=True)
class Limit:
    """A number that a user may run into. `value` is in the unit that `name` ends in."""

    name: str
    value: float | str | None
    meaning: str


LIMITS = (
    Limit("json_body_bytes", MAX_JSON_BYTES, "JSON body of every route but execute"),
    Limit("execute_body_bytes", MAX_EXECUTE_BYTES, "JSON body of execute, its stdin included"),
    Limit("json_depth", MAX_JSON_DEPTH, "levels of nesting in a JSON body"),
    Limit("json_tokens", MAX_JSON_TOKENS, "values, commas and brackets in a JSON body"),
    Limit("working_directory", "/workspace", "of a sandbox, unless create names another"),
    Limit("sandbox_type", "shell", "of a sandbox, unless create names another"),
    Limit("ttl_seconds_default", None, "time to live when create names none: unlimited"),
    Limit("ttl_seconds_max", MAX_TTL_S, "the longest time to live (ten years)"),
    Limit("timeout_seconds_default", None, "time limit of execute unless sent: none"),
    Limit("timeout_seconds_max", MAX_TIMEOUT_S, "the longest time limit of execute (a year)"),
    Limit("output_bytes_default", DEFAULT_OUTPUT_BYTES, "kept of each stream of execute"),
    Limit("output_bytes_max", MAX_OUTPUT_BYTES, "the largest `max_output_bytes` of execute"),
    Limit("text_characters", MAX_TEXT, "a command, an argument, a hook, a variable"),
    Limit("name_characters", MAX_NAME, "a sandbox's name or image"),
    Limit("arguments", MAX_ARGS, "`args` of execute"),
    Limit("items", MAX_ITEMS, "variables or hooks of a sandbox"),
    Limit("open_ports", MAX_PORTS, "ports of a sandbox that are forwarded from the start"),
    Limit("mounts", MAX_MOUNTS, "mounts of a sandbox"),
    Limit("cpus_default", None, "cores of a sandbox; HEYVM_DEFAULT_CPUS sets it"),
    Limit("cpus_max", None, "the most `cpus`; HEYVM_MAX_CPUS sets it"),
    Limit("memory_default", None, "bytes of memory; HEYVM_DEFAULT_MEMORY sets it"),
    Limit("memory_max", None, "the most `memory`; HEYVM_MAX_MEMORY sets it"),
    Limit("pids_default", 4096, "processes and threads; HEYVM_DEFAULT_PIDS sets it"),
    Limit("pids_max", None, "the most `pids`; HEYVM_MAX_PIDS sets it"),
    Limit("disk_size_gb_max", 250, "the most `disk_size_gb`; HEYVM_MAX_DISK_GB sets it"),
    Limit("cidrs", MOST_CIDRS, "networks in each list of `network`"),
    Limit("wait_seconds_default", DEFAULT_WAIT_S, "`timeout` of GET /sandboxes/:id?wait="),
    Limit("wait_seconds_max", MAX_WAIT_S, "the longest `timeout` of a wait"),
    Limit("session_seconds_default", DAY_S, "a shell session's ticket works, unless sent"),
    Limit("session_seconds_max", MAX_SESSION_S, "the longest `ttl_seconds` of a shell session"),
    Limit("ssh_public_keys", MAX_SSH_KEYS, "keys of a shell session"),
    Limit("tunnels", MAX_TUNNELS, "shell sessions and tunnels of a sandbox, together"),
    Limit("page_max", MAX_PAGE, "sandboxes on a page (`limit`, `count`)"),
    Limit("inactive_page_default", INACTIVE_PAGE, "`count` of GET /sandboxes/inactive"),
    Limit("audit_default", DEFAULT_AUDIT, "records in an answer, unless `limit` is sent"),
    Limit("logs_default", DEFAULT_LOGS, "log entries in an answer, unless `limit` is sent"),
    Limit("logs_max", MAX_LOGS, "the largest `limit` of logs"),
    Limit("slug_characters", 63, "a slug"),
    Limit("path_bytes", MAX_PATH_BYTES, "a path, of the API as of the kernel"),
    Limit("file_name_bytes", MAX_NAME_BYTES, "a name in a path"),
    Limit("upload_bytes", None, "a file uploaded; HEYVM_MAX_UPLOAD_BYTES sets it"),
    Limit("sandboxes", None, "sandboxes not yet deleted; HEYVM_MAX_SANDBOXES sets it"),
    Limit("stop_grace_seconds", int(STOP_GRACE_S), "between SIGTERM and SIGKILL in a stop"),
    Limit("turn_seconds", int(TURN_PATIENCE_S), "a lifecycle call waits for others, then 503"),
    Limit("log_message_bytes", MAX_MESSAGE_BYTES, "a log entry; longer lines become several"),
    Limit("log_file_bytes", LOG_FILE_BYTES, "each of the two files that hold a sandbox's log"),
    Limit("idempotency_key_characters", MAX_KEY, "an Idempotency-Key"),
    Limit("idempotency_seconds", DAY_S, "how long an Idempotency-Key is remembered"),
    Limit("multipart_parts", MAX_PARTS, "parts of a multipart upload"),
    Limit("multipart_field_bytes", MAX_FIELD_BYTES, "a part that is not the file, or its headers"),
    Limit("token_bytes", MAX_TOKEN_BYTES, "a bearer token"),
    Limit("auth_forward_seconds", FORWARD_S, "an answer of AUTH_SERVER_URL"),
    Limit("auth_forward_bytes", FORWARD_BYTES, "a body forwarded to or from AUTH_SERVER_URL"),
)


def in_force(settings: Settings) -> tuple[Limit, ...]:
    """The table with what this server's settings say."""
    default, most = settings.default_limits, settings.max_limits
    said = {
        "upload_bytes": settings.max_upload_bytes,
        "sandboxes": settings.max_sandboxes,
        "cpus_default": default.cpus,
        "cpus_max": most.cpus,
        "memory_default": default.memory,
        "memory_max": most.memory,
        "pids_default": default.pids,
        "pids_max": most.pids,
        "disk_size_gb_max": most.disk_size_gb,
    }
    return tuple(replace(one, value=said[one.name]) if one.name in said else one for one in LIMITS)
