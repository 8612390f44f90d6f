"""A shell in a sandbox over a WebSocket: one connection of one client, and what they tell each
other. docs/api-guide.md has the protocol.

The terminal itself lives in the sandbox's agent, and outlives this by `KEEP_S`.
"""

from __future__ import annotations

import json
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flask import Response, request
from flask.views import MethodView
from marshmallow import EXCLUDE, Schema, pre_load
from marshmallow.validate import Range, Regexp

from heyvm import journal
from heyvm.api.blueprint import STORED, Blueprint, load
from heyvm.api.fields import AbsolutePath, Environment, Text, Whole
from heyvm.api.parts import settings, shells
from heyvm.api.problems import request_id
from heyvm.errors import (
    BackendFailed,
    BadRequest,
    Conflict,
    HeyvmError,
    Invalid,
    NotFound,
    Unavailable,
    Unsupported,
    UpgradeRequired,
)
from heyvm.gateway import early_bytes, socket_of, upgrade_of
from heyvm.models import Status
from heyvm.shells import KEEP_S, Inside
from heyvm.streams import Ended, Output, Taken, Terminal
from heyvm.strictjson import parse_json
from heyvm.tokens import admit
from heyvm.websocket import (
    FAILED,
    GOING_AWAY,
    LOST,
    NORMAL,
    REFUSED,
    RESTARTING,
    Closed,
    Received,
    WebSocket,
    switching,
)

log = logging.getLogger("heyvm.api")

blp = Blueprint("stream", description="A shell in a sandbox, over a WebSocket.")

ENDPOINT = "stream.ShellStream"  # as Flask calls the route
STDIN = 1
SIGNALLED = 128  # and the signal's number: the exit code of what a signal has ended
STDOUT = struct.Struct(">BQ")  # 0x02, and which piece it is
STDOUT_KIND = 2
MOST_SEQ = (1 << 64) - 1
MOST_CELLS = 1000  # columns, and rows
DEFAULT_COLS, DEFAULT_ROWS = 80, 24
INIT_S = 10.0  # until the client has said what it wants
QUIET_S = 20.0  # without a word either way: then one is said, so that nobody takes it for dead
SILENT_S = 60.0  # a client of whom nothing came for so long is gone
TICK_S = 1.0
TOKEN_S = 2.0  # how often the token is looked at again
SAY_S = 1.0  # for the last words, behind what is being sent
GOODBYE_S = 2.0  # for the client's own close
HANG_UP_S = 4.0  # from the client's `close` to the end of the shell: twice what the agent gives it
TYPED_BYTES = 1 << 20  # held while the agent takes none; a message more may come on top
TYPED_AT_ONCE = 64 * 1024
JOIN_S = 10.0
FATE_S = 3.0  # until the registry knows of a sandbox whose agent is gone
CODES: Mapping[str, int] = {
    "bad_message": REFUSED,
    "unauthorized": REFUSED,
    "session_expired": REFUSED,
    "session_taken": REFUSED,
    "sandbox_stopped": GOING_AWAY,
    "internal": FAILED,
}
TOKEN = {
    "in": "query",
    "name": "token",
    "description": "A bearer token, for clients that can send no Authorization header.",
    "schema": {"type": "string"},
}
SWITCH = {"101": {"description": "The WebSocket is open: the client says `init` next."}}
INTERNAL = "the server failed in a way that it did not foresee; its log has more"


class Words(Schema):
    """A message of the client's. What a newer one says beside it is left alone; null says nothing,
    as with clients that always write every field."""

    class Meta:
        unknown = EXCLUDE

    @pre_load
    def drop(self, given: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {name: value for name, value in given.items() if value is not None}


def cells(**options: Any) -> Whole:
    return Whole(validate=Range(1, MOST_CELLS), **options)


class Init(Words):
    """What shell is wanted: a new one, or the one of `sessionId`."""

    cols = cells()
    rows = cells()
    env = Environment()
    cwd = AbsolutePath(metadata={})
    session = Text(
        data_key="sessionId",
        validate=Regexp(r"[A-Za-z0-9_-]{16,64}\Z", error="Must be one that `ready` has named."),
    )


class Resize(Words):
    """The terminal's new size."""

    cols = cells(required=True)
    rows = cells(required=True)


class Ack(Words):
    """Pieces up to this one have arrived."""

    seq = Whole(required=True, validate=Range(0, MOST_SEQ))


INIT, RESIZE, ACK = Init(), Resize(), Ack()


@blp.route("/sandboxes/<ref>/shell-stream")
class ShellStream(MethodView):
    @blp.operation(
        "openShellStream",
        *(*STORED, Conflict, Invalid, UpgradeRequired, BackendFailed, Unsupported),
        headers=[TOKEN],
        responses=SWITCH,
    )
    def get(self, ref: str) -> Response:
        """Open a shell over a WebSocket, or come back to one

        The guide has the protocol. A shell whose connection was lost waits a minute for
        its client, whichever worker that reaches next.
        """
        return Switch(shells().inside(ref))


class Switch(Response):
    """A 101, and the conversation that follows it, for as long as it lasts.

    Made while a refusal can still be an answer like another.
    """

    is_streamed = True  # it is over when it is closed (operations.py)

    def __init__(self, inside: Inside) -> None:
        super().__init__(status=101)
        environ = request.environ
        self._sock = check_upgrade(environ)
        self._head = switching(
            environ.get("HTTP_SEC_WEBSOCKET_KEY"),
            environ.get("HTTP_SEC_WEBSOCKET_VERSION"),
            [("X-Request-Id", request_id())],
        )
        known = settings()
        self._session = Session(
            inside,
            lambda: admit(environ, known),
            environ.get("heyvm.is_ending", lambda: False),
        )

    def __call__(self, environ: dict[str, Any], _start_response: Any) -> Iterable[bytes]:
        """Returns when it is over, with what gunicorn takes for the end of a connection."""
        client = WebSocket(self._sock, self._head, early_bytes(environ))
        try:
            with suppress(Closed), client:
                self._session.talk(client)
        finally:
            self.close()
        raise StopIteration


def check_upgrade(environ: Mapping[str, Any]) -> Any:
    """The client's connection. `UpgradeRequired` where it asks for no WebSocket."""
    if environ["REQUEST_METHOD"] != "GET" or upgrade_of(environ) is None:
        raise UpgradeRequired("this route is a WebSocket: send `Connection: Upgrade` and the rest")
    if environ.get("HTTP_TRANSFER_ENCODING") or environ.get("CONTENT_LENGTH") not in (
        None,
        "",
        "0",
    ):
        raise BadRequest("a request for a WebSocket has no body")
    sock = socket_of(environ)
    if sock is None:
        raise Unsupported("this server cannot hand its connections over")
    return sock


class Over(Exception):
    """The conversation ends: what the client is told last, and the code of the close."""

    def __init__(self, code: int, last: Mapping[str, Any] | None = None) -> None:
        super().__init__(code)
        self.code, self.last = code, last


def failure(name: str, message: str) -> Over:
    return Over(CODES[name], {"type": "error", "code": name, "message": message})


class Typed:
    """What the client has typed and the agent has not taken yet."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._bytes = bytearray()
        self._is_over = False

    def has_room(self, timeout: float) -> bool:
        """Wait so long for it."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._is_over or len(self._bytes) < TYPED_BYTES, timeout
            )

    def add(self, content: bytes) -> None:
        with self._changed:
            if not self._is_over:
                self._bytes += content
                self._changed.notify_all()

    def next(self) -> bytes | None:
        """Some, once there is some; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or bool(self._bytes))
            if self._is_over:
                return None
            some = bytes(self._bytes[:TYPED_AT_ONCE])
            del self._bytes[:TYPED_AT_ONCE]
            self._changed.notify_all()
            return some

    def end(self) -> None:
        """What is left is dropped."""
        with self._changed:
            self._is_over = True
            self._bytes.clear()
            self._changed.notify_all()


@dataclass(frozen=True)
class Wish:
    """What `init` asks for."""

    size: tuple[int, int] | None
    env: Mapping[str, str]
    cwd: str | None
    session: str | None


class Session:
    """One client's time with one terminal.

    Whoever calls `talk` listens to the client, and never waits for anything else for long: a second
    thread shows what the terminal prints, a third types, each at its other side's pace.
    `still_welcome` raises where the client may no longer be here.
    """

    def __init__(
        self, inside: Inside, still_welcome: Callable[[], Any], is_ending: Callable[[], bool]
    ) -> None:
        self._inside = inside
        self._still_welcome, self._is_ending = still_welcome, is_ending
        self._client: WebSocket
        self._terminal: Terminal | None = None
        self._typed = Typed()
        self._threads: list[threading.Thread] = []
        self._telling = threading.Lock()
        self._is_over = False  # the last words were said
        self._is_left = False
        self._due: float | None = None  # by when the shell has to have ended
        self._token_at = time.monotonic()
        self._listens_since = time.monotonic()

    def talk(self, client: WebSocket) -> None:
        """From `init` to the end; the terminal stays, unless that has ended. Raises nothing."""
        self._client = client
        try:
            self._converse()
        except Over as over:
            self._tell(over)
        except Closed:
            pass
        except Exception as error:  # noqa: BLE001  # a worker has many clients
            self._tell(surprise(error))
        finally:
            self._leave()

    def _converse(self) -> None:
        wish = self._init()
        terminal = self._terminal = self._begin(wish)
        self._say({"type": "ready", "sessionId": terminal.session, "lastSeq": terminal.last_seq})
        if terminal.lost:
            self._say({"type": "lost", "upTo": terminal.lost})
        self._threads += [self._spawn(self._show, terminal), self._spawn(self._type, terminal)]
        while not self._is_over:
            self._look()
            if self._typed.has_room(TICK_S):
                self._hear(terminal)
            elif self._client.is_gone():
                raise Closed(LOST)
            else:
                self._listens_since = time.monotonic()

    def _leave(self) -> None:
        """Detach first: from then on the agent keeps what is printed."""
        self._is_left = True
        self._typed.end()
        if self._terminal is not None:
            self._terminal.close()
        if self._is_over:
            self._wait_for_goodbye()
        else:
            self._client.drop()
        self._join()

    def _wait_for_goodbye(self) -> None:
        """A connection that is closed with something unread in it loses what was said last."""
        due = time.monotonic() + GOODBYE_S
        with suppress(Closed):
            while (left := due - time.monotonic()) > 0:
                self._client.receive(left)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(JOIN_S)
            if thread.is_alive():
                log.error("a thread of a shell's stream does not end: %s", thread.name)

    def _spawn(self, work: Callable[[Terminal], None], terminal: Terminal) -> threading.Thread:
        thread = threading.Thread(
            target=journal.carried(self._guarded), args=(work, terminal), daemon=True
        )
        thread.start()
        return thread

    def _guarded(self, work: Callable[[Terminal], None], terminal: Terminal) -> None:
        try:
            work(terminal)
        except Over as over:
            self._tell(over)
        except Closed:
            pass
        except Exception as error:  # noqa: BLE001  # the client is told, as in `talk`
            self._tell(surprise(error))

    # -- the beginning -----------------------------------------------------------------------------

    def _init(self) -> Wish:
        due = time.monotonic() + INIT_S
        message = None
        while message is None:
            self._look()
            if time.monotonic() > due:
                raise failure("bad_message", f"no init within {INIT_S:g} s")
            message = self._client.receive(TICK_S)
        said = words_of(message) if message.is_text else {}
        if said.get("type") != "init":
            raise failure("bad_message", "the first message must be init")
        return wish_of(said)

    def _begin(self, wish: Wish) -> Terminal:
        try:
            return self._attached(wish) if wish.session else self._opened(wish)
        except Invalid as error:
            raise failure("bad_message", error.detail) from None
        except Conflict as error:
            raise failure("sandbox_stopped", error.detail) from None
        except HeyvmError as error:
            raise self._fate(error) from None

    def _opened(self, wish: Wish) -> Terminal:
        cols, rows = wish.size or (DEFAULT_COLS, DEFAULT_ROWS)
        return self._inside.terminal(cols, rows, env=wish.env, cwd=wish.cwd, keep=KEEP_S)

    def _attached(self, wish: Wish) -> Terminal:
        assert wish.session is not None
        try:
            terminal = self._inside.attach(wish.session)
        except NotFound:
            message = "there is no such session, or it waited too long: begin a new one"
            raise failure("session_expired", message) from None
        if wish.size is not None:
            terminal.resize(*wish.size)
        return terminal

    # -- what the client says ----------------------------------------------------------------------

    def _hear(self, terminal: Terminal) -> None:
        message = self._client.receive(TICK_S)
        if message is not None:
            self._obey(message, terminal)
            return
        silent = time.monotonic() - max(self._client.heard_at, self._listens_since)
        if silent > SILENT_S:
            log.debug("a shell's client is silent, and taken for gone")
            raise Closed(LOST)
        if silent > QUIET_S:
            self._client.ping(QUIET_S)

    def _obey(self, message: Received, terminal: Terminal) -> None:
        # Where the agent is gone, whoever shows its output says so.
        with suppress(BackendFailed):
            if message.is_text:
                self._heed(words_of(message), terminal)
            elif message.content[:1] == b"\x01":
                self._typed.add(message.content[1:])
            else:
                raise failure("bad_message", "a binary message must begin with 0x01: stdin")

    def _heed(self, said: Mapping[str, Any], terminal: Terminal) -> None:
        kind = said["type"]
        if kind == "ack":
            terminal.ack(read(ACK, said)["seq"])
        elif kind == "resize":
            size = read(RESIZE, said)
            terminal.resize(size["cols"], size["rows"])
        elif kind == "close":
            self._hang_up(terminal)
        elif kind == "init":
            raise failure("bad_message", "init is for the beginning")
        # What else there is, a newer client says.

    def _hang_up(self, terminal: Terminal) -> None:
        if self._due is not None:
            return
        self._due = time.monotonic() + HANG_UP_S
        # A sandbox that is paused answers when it goes on: nobody waits for that.
        self._spawn(self._end, terminal)

    def _end(self, terminal: Terminal) -> None:
        try:
            self._inside.end(terminal.session)
        except HeyvmError as error:
            if not self._is_left:
                raise self._fate(error) from None

    def _type(self, terminal: Terminal) -> None:
        with suppress(BackendFailed):
            while (some := self._typed.next()) is not None:
                terminal.send(some)

    # -- what the client is told -------------------------------------------------------------------

    def _show(self, terminal: Terminal) -> None:
        while True:
            piece = self._next(terminal)
            if piece is None:
                self._say({"type": "ping"})
            elif isinstance(piece, Output):
                head = STDOUT.pack(STDOUT_KIND, piece.seq)
                self._client.send_bytes(head + piece.data)
                time.sleep(0)  # other requests of this worker have their turn
            elif piece.exit_code > SIGNALLED and self._has_stopped():
                # Of its own accord it would have ended otherwise.
                raise failure("sandbox_stopped", "the sandbox was stopped")
            else:
                raise Over(NORMAL, {"type": "exit", "code": piece.exit_code})

    def _next(self, terminal: Terminal) -> Output | Ended | None:
        try:
            return terminal.receive(QUIET_S)
        except Taken:
            raise failure("session_taken", "another client has taken this session over") from None
        except HeyvmError as error:
            # To leave is to close the terminal under it.
            raise Closed(NORMAL) if self._is_left else self._fate(error) from None

    def _fate(self, error: HeyvmError) -> Over:
        """What it means that the agent cannot be spoken to: most often, that the sandbox is
        stopped, of which the registry may hear a moment later."""
        due = time.monotonic() + FATE_S
        while not self._has_stopped():
            if not isinstance(error, BackendFailed | Unavailable) or time.monotonic() > due:
                return failure("internal", error.detail)
            time.sleep(0.1)
        return failure("sandbox_stopped", "the sandbox was stopped")

    def _has_stopped(self) -> bool:
        """Or was started again since."""
        was = self._inside.sandbox
        try:
            now = self._inside.lifecycle.get(was.id)
        except NotFound:
            return True
        except HeyvmError:
            return False
        return now.status not in (Status.RUNNING, Status.PAUSED) or now.state != was.state

    def _say(self, words: Mapping[str, Any], patience: float | None = None) -> None:
        text = json.dumps(words, separators=(",", ":"))
        if patience is None:
            self._client.send_text(text)
        else:
            self._client.send_text(text, patience)

    def _tell(self, over: Over) -> None:
        """The last words, once."""
        with self._telling, suppress(Closed):
            if self._is_over:
                return
            self._is_over = True
            if over.last is not None:
                self._say(over.last, SAY_S)
            self._client.close(over.code, patience=SAY_S)

    # -- meanwhile ---------------------------------------------------------------------------------

    def _look(self) -> None:
        """Whether this may go on."""
        if self._is_ending():
            raise Over(RESTARTING)
        now = time.monotonic()
        if self._due is not None and now > self._due:
            raise Over(NORMAL)
        if now - self._token_at >= TOKEN_S:
            self._token_at = now
            try:
                self._still_welcome()
            except HeyvmError as error:
                raise failure("unauthorized", error.detail) from None


# -- reading -----------------------------------------------------------------------------------


def words_of(message: Received) -> dict[str, Any]:
    """A text of the client's: an object with a type."""
    try:
        said = parse_json(message.content)
    except BadRequest as error:
        raise failure("bad_message", error.detail) from None
    if not (isinstance(said, dict) and isinstance(said.get("type"), str)):
        raise failure("bad_message", "a text message must be an object with a type")
    return said


def wish_of(said: Mapping[str, Any]) -> Wish:
    """What an `init` asks for. A size of which one half is missing takes the other's default."""
    found = read(INIT, said)
    size = None
    if "cols" in found or "rows" in found:
        size = found.get("cols", DEFAULT_COLS), found.get("rows", DEFAULT_ROWS)
    return Wish(size, found.get("env", {}), found.get("cwd"), found.get("session"))


def read(schema: Schema, said: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = load(schema, dict(said))
    except Invalid as error:
        raise failure("bad_message", error.detail) from None
    return found


def surprise(error: Exception) -> Over:
    log.error("a shell's stream failed", exc_info=error)
    return failure("internal", INTERNAL)
