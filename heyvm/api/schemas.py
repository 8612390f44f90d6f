"""What goes over the wire: requests become the domain's values, the domain's values become JSON.

Requests and answers have schemas of their own: a generated client then has every field of an
answer, and need not send every field of a request. Words with a fixed set of values are plain
strings with the set told beside them, so that a new value does not break an old client.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from marshmallow import (
    EXCLUDE,
    INCLUDE,
    RAISE,
    Schema,
    ValidationError,
    fields,
    post_dump,
    post_load,
    validates_schema,
)

from heyvm.api import limits, paths
from heyvm.api.fields import (
    AbsolutePath,
    Environment,
    FileName,
    Flag,
    Form,
    Items,
    Known,
    Many,
    Moment,
    NetworkField,
    Number,
    Shown,
    Text,
    Whole,
    at_most,
    between,
)
from heyvm.api.parts import lifecycle, usages
from heyvm.errors import BadRequest
from heyvm.lifecycle import SIZE_CLASSES
from heyvm.models import INACTIVE, LIVE, CreateSpec, ExecRequest, Mount, Status
from heyvm.settings import LEAST_CPUS

RESERVED_TARGETS = (
    *("/proc", "/sys", "/dev", "/run", "/usr", "/etc", "/.heyvm"),
    *("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"),
)
NETWORK_DOCUMENT: dict[str, Any] = {
    "oneOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {
                name: {"type": "array", "items": {"type": "string"}} for name in ("allow", "deny")
            },
            "additionalProperties": False,
        },
    ]
}
SANDBOX_TYPES = ("shell", "python", "node")
ENCODINGS = ("utf-8", "base64")
LEVELS = ("debug", "info", "warning", "error")
SLUG = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
SLUG_RULE = "Must be lower-case letters, digits and hyphens, at most 63, none at either end."
KEY = rf"[!-~]{{1,{limits.MAX_KEY}}}"
KEY_RULE = f"Must be 1 to {limits.MAX_KEY} printable ASCII characters without spaces."


def about(text: str, example: Any = None, *, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """A field's lines in the document."""
    found: dict[str, Any] = {"description": text}
    if words:
        found["description"] = f"{text} One of {', '.join(words)}; later versions may add more."
        found["x-extensible-enum"] = list(words)
    if example is not None:
        found["examples"] = [example]
    return found


# --- values that views take apart -----------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """Which sandboxes are asked for."""

    statuses: frozenset[Status]
    name: str | None
    limit: int | None
    cursor: str | None


@dataclass(frozen=True)
class Place:
    """A mount, and what is meant within it. `path` is None where the URL's own path says it."""

    mount_path: str
    path: str
    recursive: bool = False
    format: str | None = None


@dataclass(frozen=True)
class Execution:
    """A command, and how its bytes are written in JSON."""

    request: ExecRequest
    encoding: str


# --- requests -------------------------------------------------------------------------------------


class Body(Schema):
    """A JSON object."""

    error_messages: dict[str, str] = {
        "type": "The body must be a JSON object.",
        "unknown": "There is no such field.",
    }


class Request(Body):
    """A field that is not known is told, not dropped: it would seem to have had an effect."""

    class Meta:
        unknown = RAISE


class Query(Schema):
    """Query arguments and headers: strings. Unknown ones never get here."""

    class Meta:
        unknown = EXCLUDE


class MountRequest(Request):
    """A directory of the host, to appear inside."""

    host_path = AbsolutePath(
        required=True, metadata=about("A directory of the host.", "/home/user/project")
    )
    sandbox_path = AbsolutePath(
        required=True, metadata=about("Where it appears inside.", "/workspace")
    )
    read_only = Flag(load_default=False, metadata=about("Whether writing is refused inside."))

    @post_load
    def build(self, given: dict[str, Any], **_: Any) -> Mount:
        check_target(given["sandbox_path"])
        return Mount(**given)


def check_target(sandbox_path: str) -> None:
    below = any(
        sandbox_path == taken or sandbox_path.startswith(taken + "/") for taken in RESERVED_TARGETS
    )
    if sandbox_path == "/" or below:
        raise ValidationError(f"{sandbox_path} belongs to the sandbox itself.", "sandbox_path")


def ports(**options: Any) -> fields.Field[Any]:
    return Items(Whole(validate=PORT), validate=at_most(limits.MAX_PORTS), **options)


PORT = between(1, 65535)


def time_to_live(**options: Any) -> Whole:
    return Whole(
        allow_none=True,
        validate=between(0, limits.MAX_TTL_S),
        metadata=about("Seconds until it is deleted; null or 0: never.", 3600),
        **options,
    )


class CreateRequest(Body):
    """What a new sandbox should be. Every field may be left out or null."""

    class Meta:
        # Named in the record's `warnings`: clients of newer versions send more than we know.
        unknown = INCLUDE

    name = Text(
        allow_none=True,
        validate=at_most(limits.MAX_NAME),
        metadata=about("For people; need not be unique.", "api-demo"),
    )
    slug = Text(
        allow_none=True,
        validate=Form(SLUG, SLUG_RULE),
        metadata={
            **about("A name for URLs, unique; made from `name` unless given.", "api-demo"),
            "pattern": f"^{SLUG}$",
        },
    )
    sandbox_type = Text(
        allow_none=True,
        validate=Known(SANDBOX_TYPES),
        metadata=about("What it is for.", "shell", words=SANDBOX_TYPES),
    )
    image = Text(
        allow_none=True,
        validate=at_most(limits.MAX_NAME),
        metadata=about("The root file system; `host` unless given.", "ubuntu:24.04"),
    )
    backend_type = Text(
        allow_none=True,
        validate=at_most(limits.MAX_NAME),
        metadata=about("How it is run; see GET /capabilities."),
    )
    ttl_seconds = time_to_live()
    start_command = Text(
        allow_none=True,
        validate=at_most(limits.MAX_TEXT),
        metadata=about(
            "A shell command that runs in the background from every start on.",
            "nginx -g 'daemon off;'",
        ),
    )
    working_directory = AbsolutePath(
        allow_none=True,
        metadata=about("Where commands run; made where missing.", "/workspace"),
    )
    open_ports = ports(
        allow_none=True,
        metadata=about(
            "Ports that listen inside: each gets one of 127.0.0.1, shown in `port_mappings`.",
            [80, 8080],
        ),
    )
    env_vars = Environment(
        allow_none=True,
        validate=at_most(limits.MAX_ITEMS),
        metadata=about("Environment of every command.", {"NODE_ENV": "production"}),
    )
    setup_hooks = Items(
        Text(validate=at_most(limits.MAX_TEXT)),
        allow_none=True,
        validate=at_most(limits.MAX_ITEMS),
        metadata=about("Shell commands, run once and in order at create.", ["make deps"]),
    )
    mounts = Items(
        fields.Nested(MountRequest),
        allow_none=True,
        validate=at_most(limits.MAX_MOUNTS),
        metadata=about("Directories of the host.", []),
    )
    network = NetworkField(
        allow_none=True,
        metadata={
            **about(
                "Where it may connect to: `egress` (the default: everywhere but private networks"
                " and this machine), `none`, or lists of CIDRs: with an `allow` the rest is closed,"
                " and `deny` wins.",
                "egress",
            ),
            **NETWORK_DOCUMENT,
        },
    )
    size_class = Text(
        allow_none=True,
        validate=Known(tuple(SIZE_CLASSES)),
        metadata=about("`cpus` and `memory` in one word.", "small", words=tuple(SIZE_CLASSES)),
    )
    cpus = Number(
        allow_none=True,
        validate=between(LEAST_CPUS, limits.MAX_CPUS),
        metadata=about("Cores; fractions too.", 0.5),
    )
    memory = Whole(
        allow_none=True,
        validate=between(limits.LEAST_MEMORY, limits.MOST_MEMORY),
        metadata=about("Bytes; a process that would need more is ended.", 512 * limits.MIB),
    )
    pids = Whole(
        allow_none=True,
        validate=between(limits.LEAST_PIDS, limits.MOST_PIDS),
        metadata=about("Processes and threads.", 256),
    )
    disk_size_gb = Whole(
        allow_none=True,
        validate=between(1, limits.MOST_DISK_GB),
        metadata=about("GiB of everything that it keeps on disk; unlimited unless sent.", 10),
    )
    metadata = fields.Dict(
        keys=fields.String(),
        allow_none=True,
        metadata=about("Anything of your own.", {"team": "search"}),
    )

    @validates_schema
    def no_target_twice(self, given: Mapping[str, Any], **_: Any) -> None:
        targets = [mount.sandbox_path for mount in given.get("mounts") or ()]
        if len(set(targets)) != len(targets):
            raise ValidationError("Two mounts have the same sandbox_path.", "mounts")

    @post_load
    def build(self, given: dict[str, Any], **_: Any) -> CreateSpec:
        known = {name: value for name, value in given.items() if name in self.fields}
        unknown = sorted(set(given) - set(known))
        return CreateSpec(
            **frozen({name: value for name, value in known.items() if value is not None}),
            unknown_fields=tuple(unknown),
        )


def frozen(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tuples for lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


class PatchRequest(Request):
    """Each field sent replaces the one there is."""

    name = Text(validate=at_most(limits.MAX_NAME), metadata=about("The slug stays.", "renamed"))
    start_command = Text(
        allow_none=True,
        validate=at_most(limits.MAX_TEXT),
        metadata=about(
            "Takes the running one's place at once; null or empty: none.", "nginx -g 'daemon off;'"
        ),
    )
    env_vars = Environment(
        allow_none=True,
        validate=at_most(limits.MAX_ITEMS),
        metadata=about("For the next execute and the next start.", {"DEBUG": "true"}),
    )
    open_ports = ports(
        allow_none=True,
        metadata=about("Ports that listen inside; their local ports change with them.", [8080]),
    )
    ttl_seconds = time_to_live()
    metadata = fields.Dict(
        keys=fields.String(), allow_none=True, metadata=about("Anything of your own.")
    )

    @post_load
    def build(self, given: dict[str, Any], **_: Any) -> dict[str, Any]:
        emptied = {
            name: EMPTY.get(name) if value is None else value for name, value in given.items()
        }
        return frozen(emptied)


EMPTY: Mapping[str, Any] = {"env_vars": {}, "open_ports": (), "metadata": {}}


class ExecuteRequest(Request):
    """One command, run to its end."""

    command = Text(
        required=True,
        validate=at_most(limits.MAX_TEXT),
        metadata=about("A program, with `args`; or, alone, a line for the shell.", "echo"),
    )
    args = Items(
        Text(validate=at_most(limits.MAX_TEXT)),
        allow_none=True,
        validate=at_most(limits.MAX_ARGS),
        metadata=about("Its arguments, passed on as they are.", ["hello from the sandbox"]),
    )
    cwd = AbsolutePath(allow_none=True, metadata=about("Unless sent: `working_directory`.", "/tmp"))
    env = Environment(
        allow_none=True,
        validate=at_most(limits.MAX_ITEMS),
        metadata=about("Added to the sandbox's `env_vars`.", {"LANG": "C"}),
    )
    user = Text(
        allow_none=True,
        validate=at_most(limits.MAX_NAME),
        metadata=about("A user name or number of the sandbox.", "root"),
    )
    stdin = Text(
        allow_none=True, metadata=about("What it reads, written as `encoding` says.", "a\nb\n")
    )
    timeout_seconds = Number(
        allow_none=True,
        validate=between(0.001, limits.MAX_TIMEOUT_S),
        metadata=about("When it is killed, with all that it started; null: never.", 60),
    )
    max_output_bytes = Whole(
        allow_none=True,
        validate=between(0, limits.MAX_OUTPUT_BYTES),
        metadata=about("Kept of each stream; more is read and dropped.", limits.MIB),
    )
    encoding = Text(
        allow_none=True,
        validate=Known(ENCODINGS),
        metadata=about("How stdin and the streams are written.", "utf-8", words=ENCODINGS),
    )

    @post_load
    def build(self, given: dict[str, Any], **_: Any) -> Execution:
        sent = {name: value for name, value in given.items() if value is not None}
        encoding = sent.pop("encoding", "utf-8")
        if "stdin" in sent:
            sent["stdin"] = encoded(sent["stdin"], encoding)
        return Execution(ExecRequest(**frozen(sent)), encoding)


def encoded(text: str, encoding: str) -> bytes:
    return from_base64(text, "stdin") if encoding == "base64" else text.encode()


def from_base64(text: str, field: str) -> bytes:
    """Standard alphabet, padded; line breaks are fine, as `base64` prints them."""
    try:
        return base64.b64decode("".join(text.split()).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise BadRequest(f"{field} is not base64: {error}") from None


class CreateHeaders(Query):
    """What a create may say beside its body."""

    prefer = Text(
        data_key="Prefer",
        metadata=about("`respond-async`: answer 202 while it is being made.", "respond-async"),
    )
    key = Text(
        data_key="Idempotency-Key",
        validate=Form(KEY, KEY_RULE),
        metadata=about("The same key and body give the same sandbox, for 24 h.", "order-4711"),
    )


def digits(name: str, low: int, high: int, **options: Any) -> fields.Integer:
    return fields.Integer(
        validate=between(low, high),
        error_messages={"invalid": f"{name} must be a whole number."},
        **options,
    )


class WaitQuery(Query):
    """For a state, instead of polling."""

    wait = Text(
        validate=Known([status.value for status in Status]),
        metadata=about(
            "Answer when it is in this state.",
            "running",
            words=tuple(status.value for status in Status),
        ),
    )
    timeout = fields.Float(
        load_default=float(limits.DEFAULT_WAIT_S),
        validate=between(0, limits.MAX_WAIT_S),
        metadata=about("Seconds after which the record is given as it is.", 5),
    )

    @post_load
    def build(self, given: dict[str, Any], **_: Any) -> tuple[Status | None, float]:
        return (Status(given["wait"]) if "wait" in given else None), given["timeout"]


class ListQuery(Query):
    """Which sandboxes."""

    status = Text(
        metadata=about("`all`, or states with commas between them; else the live ones.", "all")
    )
    name = Text(metadata=about("Only those of exactly this name.", "api-demo"))
    limit = digits("limit", 1, limits.MAX_PAGE, metadata=about("How many; else all.", 100))
    cursor = Text(metadata=about("From the `Link` of the page before."))

    @post_load
    def build(self, given: dict[str, Any], **_: Any) -> Listing:
        return Listing(
            statuses_of(given.get("status")),
            given.get("name"),
            given.get("limit"),
            given.get("cursor"),
        )


def statuses_of(text: str | None) -> frozenset[Status]:
    if text is None:
        return LIVE
    if text == "all":
        return frozenset(Status)
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if word not in set(Status)]
    if wrong:
        states = ", ".join(Status)
        raise ValidationError(f"{wrong[0]!r} is no status: say all, or some of {states}", "status")
    return frozenset(Status(word) for word in words)


class InactiveQuery(Query):
    """A page of what is stopped or failed."""

    count = digits(
        "count",
        1,
        limits.MAX_PAGE,
        load_default=limits.INACTIVE_PAGE,
        metadata=about("How many.", 10),
    )
    cursor = Text(metadata=about("`next_cursor` of the page before."))

    @post_load
    def build(self, given: dict[str, Any], **_: Any) -> Listing:
        return Listing(INACTIVE, None, given["count"], given.get("cursor"))


def mount_argument() -> FileName:
    return FileName(
        load_default=paths.DEFAULT_MOUNT,
        metadata=about("The mount, by its path inside.", "/workspace"),
    )


class ListFilesQuery(Query):
    """A directory of a mount."""

    mount_path = mount_argument()
    path = FileName(load_default="", metadata=about("A directory in it; else the mount.", "src"))
    recursive = fields.Boolean(load_default=False, metadata=about("With all that lies below."))

    @post_load
    def build(self, given: dict[str, Any], **_: Any) -> Place:
        mount = paths.mount_of(given["mount_path"])
        return Place(mount, paths.within(mount, given["path"]), given["recursive"])


class DownloadQuery(Query):
    """How a file comes."""

    mount_path = mount_argument()
    format = Text(
        validate=Known(["tar"]), metadata=about("`tar`: a directory (or a file) as a tar.", "tar")
    )


class DeleteQuery(Query):
    """What is deleted with it."""

    mount_path = mount_argument()
    recursive = fields.Boolean(
        load_default=False, metadata=about("A directory with all that is in it.")
    )


class UploadQuery(Query):
    """The fields of the form may stand here as well."""

    mount_path = FileName(metadata=about("The mount, by its path inside.", "/workspace"))
    file_path = FileName(metadata=about("Where in it; else the name of the file sent.", "a/b.txt"))
    path = FileName(metadata=about("The same as `file_path`."))
    format = Text(
        validate=Known(["tar"]), metadata=about("`tar`: unpack the body, a tar, there.", "tar")
    )


class UploadForm(Schema):
    """For the document; uploads.py reads the form as it arrives."""

    mount_path = fields.String(metadata=about("The mount, by its path inside.", "/workspace"))
    file_path = fields.String(metadata=about("Where in it.", "index.html"))
    file = fields.String(
        required=True, metadata={"format": "binary", **about("The file's bytes.", "Hello world!")}
    )


class UploadJson(Request):
    """A file in JSON."""

    mount_path = FileName(
        load_default=paths.DEFAULT_MOUNT,
        metadata=about("The mount, by its path inside.", "/workspace"),
    )
    file_path = FileName(
        required=True, metadata={**about("Where in it.", "hello.txt"), "minLength": 1}
    )
    content = FileName(
        required=True,
        metadata={
            **about("The file's bytes in base64.", "SGVsbG8gd29ybGQh"),
            "contentEncoding": "base64",
        },
    )


class LogsQuery(Query):
    """Which log entries."""

    limit = digits(
        "limit",
        1,
        limits.MAX_LOGS,
        load_default=limits.DEFAULT_LOGS,
        metadata=about("How many, the newest.", 50),
    )
    offset = digits(
        "offset", 0, 10**9, load_default=0, metadata=about("How many of the newest to leave out.")
    )
    source = Text(
        load_default=None, metadata=about("Only this stream.", "stderr", words=("stdout", "stderr"))
    )
    level = Text(load_default=None, metadata=about("Only this level.", "error", words=LEVELS))


# --- answers --------------------------------------------------------------------------------------


def always(kind: type[fields.Field[Any]], text: str, example: Any, **options: Any) -> Any:
    """A field of an answer that is there every time."""
    words = options.pop("words", ())
    return kind(required=True, metadata=about(text, example, words=words), **options)


class MountInfo(Schema):
    """A directory of the host inside a sandbox."""

    host_path = always(fields.String, "A directory of the host.", "/home/user/project")
    sandbox_path = always(fields.String, "Where it appears inside.", "/workspace")
    read_only = always(fields.Boolean, "Whether writing is refused inside.", False)
    pending = always(fields.Boolean, "Whether it waits for the next start.", False)


class Duration(Schema):
    """A span of time, as heyvm writes it."""

    secs = always(fields.Integer, "Whole seconds.", 12)
    nanos = always(fields.Integer, "Nanoseconds beside them.", 345_000_000)


class Uptime(fields.Nested):
    """How long the sandbox has run, counted now."""

    def get_value(self, obj: Any, attr: str, **_: Any) -> dict[str, int]:  # type: ignore[override]
        secs, rest = divmod(lifecycle().uptime(obj), 1)
        return {"secs": int(secs), "nanos": int(rest * 1e9)}


class UptimeSeconds(fields.Integer):
    """The same in whole seconds."""

    def get_value(self, obj: Any, attr: str, **_: Any) -> int:  # type: ignore[override]
        return int(lifecycle().uptime(obj))


class CpuUsage(fields.Float):
    """Of the latest sample."""

    def get_value(self, obj: Any, attr: str, **_: Any) -> float | None:  # type: ignore[override]
        return usages().of(obj.id).cpu_percent


class MemoryUsage(fields.Integer):
    """Of the latest sample."""

    def get_value(self, obj: Any, attr: str, **_: Any) -> int | None:  # type: ignore[override]
        return usages().of(obj.id).memory_bytes


STATUS_WORDS = tuple(status.value for status in Status)


class Resolved(fields.String):
    """Null for what is not known yet."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **_: Any) -> str | None:
        return value or None


class PortMappingInfo(Schema):
    """A TCP port of 127.0.0.1 that leads to one inside."""

    host_port = always(fields.Integer, "On this machine.", 40123)
    guest_port = always(fields.Integer, "Inside.", 80)


class SandboxInfo(Schema):
    """A sandbox. Every field is always there, null or empty where it is not set."""

    id = always(fields.String, "Its id.", "sb-066157a9")
    name = always(fields.String, "Its name.", "api-demo")
    slug = always(fields.String, "Its name for URLs.", "api-demo")
    status = always(fields.String, "Where it is in its life.", "running", words=STATUS_WORDS)
    status_changed_at = Moment(
        required=True,
        metadata={
            **about("Since when.", "2026-01-31T12:00:00.000000Z"),
            "type": "string",
            "format": "date-time",
        },
    )
    sandbox_type = always(fields.String, "What it is for.", "shell", words=SANDBOX_TYPES)
    image = always(fields.String, "The image asked for.", "ubuntu:24.04", allow_none=True)
    image_resolved = always(
        Resolved,
        "The image that it runs on: `host` or a digest; null until that is here.",
        "host",
        allow_none=True,
    )
    backend_type = always(fields.String, "How it is run.", "bubblewrap")
    ttl_seconds = always(
        fields.Integer, "Its time to live; null: unlimited.", 3600, allow_none=True
    )
    expires_at = Moment(
        required=True,
        allow_none=True,
        metadata={
            **about(
                "When it is deleted; null: never, or the clock stands still.",
                "2026-01-31T13:00:00.000000Z",
            ),
            "type": "string",
            "format": "date-time",
        },
    )
    created_at = Moment(
        required=True,
        metadata={
            **about("When it was made.", "2026-01-31T12:00:00.000000Z"),
            "type": "string",
            "format": "date-time",
        },
    )
    uptime = Uptime(Duration, required=True, metadata=about("How long it has run."))
    uptime_secs = UptimeSeconds(required=True, metadata=about("The same in seconds.", 12))
    cpu_usage = CpuUsage(
        required=True,
        allow_none=True,
        metadata=about("Percent of one core, some seconds ago; null: not known.", 3.5),
    )
    memory_usage = MemoryUsage(
        required=True,
        allow_none=True,
        metadata=about("Bytes, some seconds ago; null: not known.", 12_582_912),
    )
    start_command = always(fields.String, "What runs in the background.", None, allow_none=True)
    working_directory = always(fields.String, "Where commands run.", "/workspace")
    open_ports = fields.List(
        fields.Integer(), required=True, metadata=about("Ports that listen inside.", [80])
    )
    port_mappings = fields.List(
        fields.Nested(PortMappingInfo),
        required=True,
        metadata=about("Where they are reached from this machine."),
    )
    env_vars = fields.Dict(
        keys=fields.String(),
        values=fields.String(),
        required=True,
        metadata=about("Environment of every command.", {"NODE_ENV": "production"}),
    )
    setup_hooks = fields.List(
        fields.String(), required=True, metadata=about("What ran at create.", ["make deps"])
    )
    mounts = fields.List(
        fields.Nested(MountInfo), required=True, metadata=about("Directories of the host.")
    )
    network = NetworkField(
        required=True,
        metadata={**about("Where it may connect to.", "egress"), **NETWORK_DOCUMENT},
    )
    size_class = always(fields.String, "The one asked for.", "small", allow_none=True)
    cpus = always(
        fields.Float, "Cores; null: unlimited.", 0.5, allow_none=True, attribute="limits.cpus"
    )
    memory = always(
        fields.Integer,
        "Bytes; null: unlimited.",
        536870912,
        allow_none=True,
        attribute="limits.memory",
    )
    pids = always(
        fields.Integer,
        "Processes and threads; null: unlimited.",
        256,
        allow_none=True,
        attribute="limits.pids",
    )
    disk_size_gb = always(
        fields.Integer,
        "GiB on disk; null: unlimited.",
        None,
        allow_none=True,
        attribute="limits.disk_size_gb",
    )
    ids = always(
        fields.String,
        "Whose user ids it has: 65,536 of its own (`range`), its owner's, or a `single` one.",
        "range",
        words=("range", "sub-ids", "single"),
    )
    oom_kills = always(fields.Integer, "Processes that its memory limit has ended.", 0)
    status_detail = always(
        fields.String,
        "What is being done just now.",
        "pulling ubuntu:24.04: 12 of 29 MiB",
        allow_none=True,
    )
    error_message = always(fields.String, "Why it is `failed`.", None, allow_none=True)
    warnings = fields.List(
        fields.String(), required=True, metadata=about("What was asked for and is not so.", [])
    )
    metadata = fields.Dict(
        keys=fields.String(), required=True, metadata=about("Your own.", {"team": "search"})
    )


class InactivePage(Schema):
    """A page of sandboxes that are stopped or failed."""

    sandboxes = fields.List(fields.Nested(SandboxInfo), required=True)
    cursor = always(fields.String, "The cursor that was sent.", None, allow_none=True)
    next_cursor = always(
        fields.String, "For the next page; null on the last.", None, allow_none=True
    )


class ExecuteResult(Schema):
    """What became of a command. Streams are written as `encoding` says."""

    output = always(fields.String, "Both streams, as they arrived.", "hello from the sandbox\n")
    stdout = always(fields.String, "What it printed.", "hello from the sandbox\n")
    stderr = always(fields.String, "What it complained of.", "")
    exit_code = always(
        fields.Integer, "127 not found, 126 not executable, 128+n signal, 124 time limit.", 0
    )
    duration_ms = always(fields.Integer, "How long it ran.", 2)
    timed_out = always(fields.Boolean, "Whether the time limit ended it.", False)
    truncated = always(fields.Boolean, "Whether more was printed than is kept.", False)


class FileEntry(Schema):
    """One entry of a directory."""

    name = Shown(required=True, metadata={"type": "string", **about("Its name.", "index.html")})
    path = Shown(
        required=True,
        metadata={"type": "string", **about("Its path in the mount.", "www/index.html")},
    )
    path_encoded = fields.Function(
        lambda info: paths.url_form(info.path),
        required=True,
        metadata={
            "type": "string",
            **about(
                "The same for a URL, byte for byte, also where the name is not UTF-8.",
                "www/index.html",
            ),
        },
    )
    type = always(
        fields.String,
        "What it is.",
        "file",
        words=("file", "directory", "symlink", "fifo", "socket", "device"),
    )
    size = always(fields.Integer, "Bytes.", 612)
    mode = fields.Function(
        lambda info: f"{info.mode & 0o7777:04o}",
        required=True,
        metadata={"type": "string", **about("Permissions, octal.", "0644")},
    )
    modified_at = Moment(
        required=True,
        metadata={
            **about("When it was last written.", "2026-01-31T12:00:00.000000Z"),
            "type": "string",
            "format": "date-time",
        },
    )


class FileListing(Schema):
    """A directory of a mount."""

    mount_path = Shown(
        required=True, metadata={"type": "string", **about("The mount.", "/workspace")}
    )
    path = Shown(required=True, metadata={"type": "string", **about("The directory in it.", "")})
    files = Many(fields.Nested(FileEntry), required=True)


class Uploaded(Schema):
    """What was written."""

    status = always(fields.String, "Always `created`.", "created")
    path = Shown(
        required=True, metadata={"type": "string", **about("Its path in the mount.", "hello.txt")}
    )
    size = always(fields.Integer, "Bytes.", 12)


class LogEntryInfo(Schema):
    """Something that was printed."""

    timestamp = always(fields.Integer, "Seconds since the epoch.", 1742659200)
    source = always(fields.String, "The stream.", "stdout", words=("stdout", "stderr"))
    message = always(fields.String, "The line.", "Server started on port 80")
    level = fields.String(metadata=about("Absent where the line names none.", "info", words=LEVELS))

    @post_dump
    def drop_no_level(self, shown: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {name: value for name, value in shown.items() if value is not None}


class LogPageInfo(Schema):
    """The newest entries that match, oldest first."""

    logs = Many(fields.Nested(LogEntryInfo), required=True)
    total = always(fields.Integer, "How many match.", 1)
    limit = always(fields.Integer, "As asked for.", 50)
    offset = always(fields.Integer, "As asked for.", 0)


class Health(Schema):
    """That the server answers."""

    status = always(fields.String, "Always `ok`.", "ok")


class LimitInfo(Schema):
    """A default or limit."""

    name = always(fields.String, "Its name, with the unit.", "json_depth")
    value = fields.Raw(
        required=True,
        allow_none=True,
        metadata={**about("null: unlimited.", 64), "type": ["integer", "string"]},
    )
    meaning = always(fields.String, "What it bounds.", "levels of nesting in a JSON body")


class Capabilities(Schema):
    """What this server can do."""

    version = always(fields.String, "Of heyvm.", "1.0.0")
    target_os = always(fields.String, "The kernel of sandboxes.", "linux", data_key="targetOs")
    supported_drivers = fields.List(
        fields.String(),
        required=True,
        data_key="supportedDrivers",
        metadata=about("Values of `backend_type` that work here.", ["bubblewrap"]),
    )
    archive_supported_drivers = fields.List(
        fields.String(),
        required=True,
        data_key="archiveSupportedDrivers",
        metadata=about("Those that can be made from an archive.", []),
    )
    default_driver = always(
        fields.String,
        "The backend unless one is named; null: none works.",
        "bubblewrap",
        data_key="defaultDriver",
        allow_none=True,
    )
    limits = fields.List(fields.Nested(LimitInfo), required=True)


class ProblemInfo(Schema):
    """RFC 9457. `error` and `message` repeat `detail`."""

    type = always(fields.String, "A name for this kind of problem.", "urn:heyvm:problem:not-found")
    title = always(fields.String, "The kind in words.", "There is no such thing")
    status = always(fields.Integer, "The HTTP status.", 404)
    detail = always(fields.String, "What is wrong, and what to do.", "there is no sandbox 'x'")
    request_id = always(
        fields.String, "As in the X-Request-Id header and the server's log.", "4f1c"
    )
    error = always(fields.String, "As `detail`.", "there is no sandbox 'x'")
    message = always(fields.String, "As `detail`.", "there is no sandbox 'x'")
    id = fields.String(metadata=about("A sandbox that was left to be looked at.", "sb-066157a9"))
    errors = fields.Dict(
        keys=fields.String(),
        values=fields.List(fields.String()),
        metadata=about("Complaints by field.", {"open_ports.0": ["Must be at most 65535."]}),
    )


# --- images ---------------------------------------------------------------------------------------


class PullRequest(Request):
    """Which image."""

    image = Text(
        required=True,
        validate=at_most(limits.MAX_NAME),
        metadata=about("Its name, with a tag or a digest.", "debian:12"),
    )


class TakeHeaders(Query):
    """What an import may say beside its body."""

    sha256 = Text(
        data_key="x-heyo-sha256",
        validate=Form("[0-9a-f]{64}", "Must be 64 hexadecimal digits, in small letters."),
        metadata=about("What the body must have.", "0" * 64),
    )


class ImageConfigInfo(Schema):
    """What an image says of how it is run."""

    env = fields.Dict(
        keys=fields.String(),
        values=fields.String(),
        required=True,
        metadata=about("Variables.", {"LANG": "C.UTF-8"}),
    )
    working_directory = always(fields.String, "Where commands run.", "/srv", allow_none=True)
    user = always(fields.String, "Who runs them; empty: root.", "app")
    command = Many(
        fields.String(), required=True, metadata=about("What it runs by itself.", ["bash"])
    )


class ImageInfo(Schema):
    """A root file system that is here."""

    name = always(fields.String, "Its first name, else its digest.", "debian:12")
    names = Many(fields.String(), required=True, metadata=about("All its names.", ["debian:12"]))
    digest = always(fields.String, "The sha256 of its config.", f"sha256:{'0' * 64}")
    path = Shown(
        required=True, metadata={"type": "string", **about("Where it lies.", "/var/lib/heyvm/...")}
    )
    size_bytes = always(fields.Integer, "What it takes on disk.", 186040320)
    created_at = Moment(
        required=True,
        metadata={
            **about("Since when it is here.", "2026-01-31T12:00:00.000000Z"),
            "type": "string",
            "format": "date-time",
        },
    )
    modified_at = Moment(
        required=True,
        metadata={
            **about("As `created_at`.", "2026-01-31T12:00:00.000000Z"),
            "type": "string",
            "format": "date-time",
        },
    )
    source = always(fields.String, "Where it came from.", "docker://docker.io/library/debian@...")
    devices = always(fields.Integer, "Device nodes that were left out.", 0)
    config = fields.Nested(
        ImageConfigInfo, required=True, metadata=about("What it says of how it is run.")
    )
    used_by = Many(fields.String(), required=True, metadata=about("Slugs of sandboxes.", ["demo"]))
