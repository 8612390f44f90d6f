"""How a worker asks the keeper for something now: one line of JSON each way over a unix socket.

Knows the socket and the form of question and answer, and nothing of what is asked.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from heyvm import errors
from heyvm.errors import HeyvmError, Unavailable

SOCKET_NAME = "keeper.sock"
MAX_LINE_BYTES = 64 * 1024
RECEIVE_BYTES = 16 * 1024
# Between two tries to reach a keeper that is just being started.
PAUSE_S = 0.05
# A worker writes its line at once: who does not is stopped, or not one of ours.
CLIENT_TIMEOUT_S = 5.0
AT_ONCE = 64
BACKLOG = 1024

Operation = Callable[[Mapping[str, Any]], Mapping[str, Any]]

log = logging.getLogger(__name__)


class Broken(Exception):
    """There is no keeper, or it ended before it answered."""


def ask(run_dir: Path, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """What the keeper answers to `request`, which names its operation: `{"op": "ports", ...}`.

    Waits for a keeper that is being started, and asks the next one where one was killed before it
    answered, so that what is asked for must be fine to do twice. Raises the domain error that the
    keeper answered with, and `Unavailable` after `timeout` seconds without an answer.
    """
    deadline = time.monotonic() + timeout
    while True:
        with suppress(Broken, TimeoutError):
            return result_of(_asked(str(run_dir / SOCKET_NAME), request, deadline))
        if time.monotonic() + PAUSE_S >= deadline:
            raise Unavailable(f"the keeper does not answer (within {timeout:g} s): try again")
        time.sleep(PAUSE_S)


def _asked(path: str, request: Mapping[str, Any], deadline: float) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            # A gevent process cannot wait for room in a full queue of connections: EAGAIN.
            sock.settimeout(_left(deadline))
            sock.connect(path)
            return exchange(sock, request, deadline)
        except TimeoutError:
            raise
        except OSError as error:
            raise Broken from error


def exchange(sock: socket.socket, request: Mapping[str, Any], deadline: float) -> bytes:
    """The line that answers a request on this connection, for `result_of`. Raises `Broken`,
    `OSError` and, beyond the deadline (time.monotonic), `TimeoutError`."""
    sock.settimeout(_left(deadline))
    sock.sendall(json.dumps(request).encode() + b"\n")
    return _read_line(sock, deadline)


def _read_line(sock: socket.socket, deadline: float) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        sock.settimeout(_left(deadline))
        chunk = sock.recv(RECEIVE_BYTES)
        received += chunk
        if not chunk or len(received) > MAX_LINE_BYTES:
            raise Broken
    return bytes(received)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def result_of(line: bytes) -> dict[str, Any]:
    """What an answer says. Raises the domain's error that it holds."""
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Unavailable("the keeper's answer cannot be read: is it of another version?")
    if "error" in answer:
        raise _error(answer["error"])
    return answer


def _error(told: Mapping[str, Any]) -> HeyvmError:
    """The domain's error of this name; one that needs more than a text is a plain one."""
    kind = getattr(errors, str(told.get("kind")), HeyvmError)
    detail, sandbox_id = str(told.get("detail")), told.get("sandbox_id")
    try:
        found = kind(detail, sandbox_id=sandbox_id)
    except TypeError:
        found = HeyvmError(detail, sandbox_id=sandbox_id)
    return found if isinstance(found, HeyvmError) else HeyvmError(detail, sandbox_id=sandbox_id)


class Server:
    """The keeper's side. Only for the process that holds the keeper's lock, patched by gevent.

    An operation gets the whole request, and answers with what can be JSON. It runs in a greenlet
    of its own, however long; what it raises of the domain is the caller's.
    """

    def __init__(self, run_dir: Path, operations: Mapping[str, Operation]) -> None:
        self._path = run_dir / SOCKET_NAME
        self._operations = operations
        self._listening: Any = None
        self._made: os.stat_result | None = None

    def listen(self) -> None:
        """Be reachable, again where somebody removed the socket. Raises `OSError`.

        The socket is never removed here: by the time that a keeper ends, it may be the next one's.
        """
        if not self._is_there():
            self.close()
            listener = self._bind()
            from gevent.pool import Pool
            from gevent.server import StreamServer

            self._listening = StreamServer(listener, self._serve, spawn=Pool(AT_ONCE))
            self._listening.start()

    def close(self) -> None:
        """Answer no more; what is being answered goes on."""
        if self._listening is not None:
            self._listening.close()
            self._listening = self._made = None

    def _is_there(self) -> bool:
        try:
            return self._made is not None and os.path.samestat(os.stat(self._path), self._made)
        except OSError:
            return False

    def _bind(self) -> socket.socket:
        """What a killed keeper left is replaced in one step: there is always one to connect to."""
        new = f"{self._path}.new"
        with suppress(FileNotFoundError):
            os.unlink(new)
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(new)
            os.chmod(new, 0o600)
            listener.listen(BACKLOG)
            listener.setblocking(False)
            self._made = os.stat(new)
            os.rename(new, self._path)
        except BaseException:
            listener.close()
            raise
        return listener

    def _serve(self, sock: socket.socket, _address: object) -> None:
        # A client that went away, or is too slow, has nobody to tell.
        with sock, suppress(OSError, Broken):
            line = _read_line(sock, time.monotonic() + CLIENT_TIMEOUT_S)
            answer = json.dumps(self._answer(line)).encode() + b"\n"
            sock.settimeout(CLIENT_TIMEOUT_S)
            sock.sendall(answer)

    def _answer(self, line: bytes) -> Mapping[str, Any]:
        try:
            return self._operation(line)()
        except HeyvmError as error:
            return {"error": told(error)}
        # The caller must learn of every fault, or it would wait for its whole time.
        except Exception as fault:
            log.exception("a request of the control socket failed")
            return {"error": told(HeyvmError(f"the keeper failed: {type(fault).__name__}"))}

    def _operation(self, line: bytes) -> Callable[[], Mapping[str, Any]]:
        try:
            request = json.loads(line)
            operation = self._operations[request["op"]]
        except (ValueError, TypeError, KeyError):
            raise errors.Unsupported("the keeper does not know this request") from None
        return partial(operation, request)


def told(error: HeyvmError) -> dict[str, Any]:
    """An error as an answer holds it, under `error`."""
    return {
        "kind": type(error).__name__,
        "detail": error.detail,
        "sandbox_id": error.sandbox_id,
    }
