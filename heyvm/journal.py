"""What the server says of its work: who called, and what happened to sandboxes.

With HEYVM_LOG=json each access, each event and whatever else is logged is one JSON object on a
line of stderr; otherwise accesses and events are not said. Never said: queries, headers, bodies,
commands, environments. Knows neither routes nor the registry.
"""

from __future__ import annotations

import contextvars
import io
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from heyvm import metrics
from heyvm.origins import client_of

P = ParamSpec("P")
R = TypeVar("R")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
STDERR = 2
MOST_CHARS = 16 * 1024


@dataclass(slots=True)
class Call:
    """A request while it is worked at. Whoever finds out more about it writes that in."""

    request_id: str
    subject: str | None = None
    client: str | None = None
    sandbox_id: str | None = None
    slug: str | None = None


_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("heyvm_call", default=None)


def request_id_of(given: str | None) -> str:
    """The client's own, where it can stand in a header and a log line; else a new one."""
    if given is not None and REQUEST_ID.fullmatch(given):
        return given
    return os.urandom(8).hex()


def begin(request_id: str) -> Call:
    """What is said from here on, in this greenlet or thread, is said of this request."""
    call = Call(request_id)
    _call.set(call)
    return call


def end() -> None:
    """What is said from here on belongs to no request."""
    _call.set(None)


def current() -> Call | None:
    """The request that is being worked at, if there is one."""
    return _call.get()


def about(sandbox_id: str, slug: str) -> None:
    """The request turns out to be about this sandbox."""
    call = _call.get()
    if call is not None:
        call.sandbox_id, call.slug = sandbox_id, slug


def carried(work: Callable[P, R]) -> Callable[P, R]:
    """`work` for another thread, as a part of the request that it is begun by."""
    return partial(contextvars.copy_context().run, work)


class _Here:
    """How this process speaks: as with logging, there is one way."""

    writes = False
    process = "heyvm"


def wanted() -> bool:
    """Whether HEYVM_LOG asks for JSON; for those who speak before the settings are read."""
    return os.environ.get("HEYVM_LOG", "").strip().lower() == "json"


def begin_json(process: str) -> None:
    """From now on this process's stderr is lines of JSON, whoever writes to it. Twice is fine."""
    _Here.writes, _Here.process = True, process
    if isinstance(sys.stderr, Lines):
        return
    sys.stderr = Lines()
    sys.excepthook = _untold
    threading.excepthook = _untold_of_thread
    handler = logging.Handler(logging.NOTSET)
    handler.emit = log  # type: ignore[method-assign]
    root = logging.getLogger()
    root.handlers[:] = [handler]
    logging.captureWarnings(True)


def writes_json() -> bool:
    """Whether this process speaks JSON."""
    return _Here.writes


def event(name: str, sandbox_id: str | None = None, slug: str | None = None, **more: Any) -> None:
    """Say that something has happened. `more` must hold no secret."""
    if _Here.writes:
        sandbox = {"sandbox_id": sandbox_id, "slug": slug} if sandbox_id else {}
        _write("event", "info", {"event": name, **sandbox, **more})


def access(call: Call, fields: dict[str, Any]) -> None:
    """Say that a request was answered."""
    if _Here.writes:
        who = {"subject": call.subject, "client": call.client}
        sandbox = {"sandbox_id": call.sandbox_id, "slug": call.slug} if call.sandbox_id else {}
        _write("access", "info", {**fields, **who, **sandbox}, call.request_id)


class Witness:
    """The answer of a WSGI application that is not the API, for as long as it lasts: counted and
    said at its end, once. Hand `start` to the application, and its answer to `witness`."""

    def __init__(self, environ: dict[str, Any], start_response: Any, route: str) -> None:
        self._environ, self._start_response, self._route = environ, start_response, route
        self._began = time.monotonic()
        self._answer: Any = ()
        self._status: int | None = None

    def start(self, status: str, headers: Any, *more: Any) -> Any:
        """PEP 3333's `start_response`."""
        self._status = int(status[:3])
        return self._start_response(status, headers, *more)

    def witness(self, application: Callable[[dict[str, Any], Any], Any]) -> Witness:
        """Call it, and be its answer."""
        try:
            self._answer = application(self._environ, self.start)
        except StopIteration:  # the connection was upgraded, and has ended
            self._status = self._status or 101
            self._end()
            raise
        except BaseException:
            self._end()
            raise
        return self

    def __iter__(self) -> Any:
        return iter(self._answer)

    def close(self) -> None:
        """As PEP 3333 has it: at the end, however that came."""
        try:
            if hasattr(self._answer, "close"):
                self._answer.close()
        finally:
            self._end()

    def _end(self) -> None:
        seconds = time.monotonic() - self._began
        method = self._environ["REQUEST_METHOD"]
        metrics.here().answered(self._route, method, self._status or 499, seconds)
        if _Here.writes:
            call = Call(self._environ.get("HTTP_X_REQUEST_ID", "")[:128])
            call.client = client_of(self._environ)
            fields = {
                "method": method,
                "host": self._environ.get("HTTP_HOST", "")[:255],
                "path": self._environ.get("RAW_URI", "/").partition("?")[0],
                "status": self._status,
                "duration_ms": round(seconds * 1000, 1),
            }
            access(call, fields)


def log_line(level: str, message: str, **more: Any) -> None:
    """Say whatever it is."""
    _write("log", level, {"message": message[:MOST_CHARS], **more})


class Lines(io.TextIOBase):
    """What stands in for stderr, for those who print there: each of their lines is a record."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                log_line("warning", line.rstrip())
        if len(self._begun) > MOST_CHARS:
            log_line("warning", self._begun)
            self._begun = ""
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return STDERR


def moment(seconds: float) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    whole, rest = divmod(round(seconds * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{rest:03}Z"


def _write(kind: str, level: str, fields: dict[str, Any], request_id: str | None = None) -> None:
    call = _call.get()
    record = {
        "time": moment(time.time()),
        "level": level,
        "kind": kind,
        "request_id": request_id or (call.request_id if call else None),
        "process": _Here.process,
        "pid": os.getpid(),
        **fields,
    }
    # ASCII: what is no letter, digit or sign of it is escaped, control characters among it.
    line = json.dumps(record, separators=(",", ":"), default=str) + "\n"
    # In one piece, so that those of several processes do not mix. Where stderr is gone, there is
    # nobody to tell.
    with suppress(OSError):
        os.write(STDERR, line.encode("ascii"))


def log(record: logging.LogRecord) -> None:
    """What a handler does with a record of `logging`."""
    try:
        message = record.getMessage()
    except (TypeError, ValueError):  # its arguments do not fit its text
        message = str(record.msg)
    told = {"logger": record.name}
    if record.exc_info and record.exc_info[0]:
        told["traceback"] = "".join(traceback.format_exception(*record.exc_info))[-MOST_CHARS:]
    log_line(record.levelname.lower(), message, **told)


def _untold(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    told = "".join(traceback.format_exception(kind, error, where))[-MOST_CHARS:]
    log_line("error", f"{kind.__name__}: {error}", traceback=told)


def _untold_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _untold(args.exc_type, args.exc_value, args.exc_traceback)
