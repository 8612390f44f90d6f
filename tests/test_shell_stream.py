"""GET /sandboxes/:id/shell-stream: the protocol, what clients do wrong, and what survives what."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jwt
import pytest

from heyvm.api import stream
from heyvm.api.stream import Session
from heyvm.errors import BackendFailed, NotFound
from heyvm.shells import Inside
from heyvm.streams import Ended, Output
from heyvm.websocket import WebSocket, switching
from tests.browser import Browser
from tests.nginx import HOSTNAME, Nginx
from tests.server import Server, wait_until
from tests.ws import Client, Refused, Shell, connect, frame, handshake

Record = dict[str, Any]

SECRET = "a secret of thirty-two bytes, or more"
QUIET = "stty -echo; PS1=; PROMPT_COMMAND=; bind 'set enable-bracketed-paste off' 2>/dev/null\n"
BINARY = 2


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    """A server with tokens that says in JSON what it does, and all that it could say."""
    with Server("--debug", JWT_SECRET=SECRET, HEYVM_LOG="json", API_HOSTNAME=HOSTNAME) as running:
        yield running


@pytest.fixture(scope="module")
def box(guarded: Server) -> str:
    """A sandbox of it."""
    with guarded.http() as http:
        http.headers.update(bearer())
        return str(http.post("/sandboxes", json={"network": "none"}).json()["id"])


def token(**claims: Any) -> str:
    return jwt.encode({"sub": "alice", **claims}, SECRET, algorithm="HS256")


def bearer(**claims: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(**claims)}"}


def authorized(**claims: Any) -> str:
    return f"Authorization: Bearer {token(**claims)}"


def quiet(shell: Shell) -> Shell:
    """Without echo or a prompt: what comes is what programs print."""
    shell.type(QUIET + "echo re''ady\n")
    shell.read_until(b"ready\r\n")
    shell.output.clear()
    return shell


def error_of(client: Client, *sent: bytes) -> tuple[str, str, int | None]:
    """The code and message of the error by which it ends, and the code of the close."""
    client.raw(b"".join(sent))
    texts = [json.loads(one) for one in client.end() if isinstance(one, str)]
    client.sock.close()
    return texts[-1]["code"], texts[-1]["message"], client.closed


def text(**words: Any) -> bytes:
    return frame(1, json.dumps(words).encode())


def path_of(ref: str) -> str:
    return f"/sandboxes/{ref}/shell-stream"


# -- the protocol ----------------------------------------------------------------------------------


def test_a_shell_begins_echoes_and_ends_with_its_code(server: Server, ref: str) -> None:
    with Shell.open(server.port, ref) as shell:
        assert shell.ready == {"type": "ready", "sessionId": shell.id, "lastSeq": 0}
        assert re.fullmatch(r"[A-Za-z0-9_-]{16,64}", shell.id)
        shell.type("stty size; echo $TERM $0 $PWD; exit 7\n")
        assert shell.finish()[-1] == {"type": "exit", "code": 7}
        assert shell.client.closed == 1000
        assert b"24 80\r\n" in shell.output
        assert b"xterm-256color -bash /workspace\r\n" in shell.output
        assert shell.twice == 0


def test_init_says_size_environment_and_directory(server: Server, ref: str) -> None:
    fields = {"cols": 1000, "rows": 1, "env": {"A_B": "c d"}, "cwd": "/tmp", "unknown": [1]}
    with Shell.open(server.port, ref, **fields) as shell:
        shell.type("stty size; echo [$A_B] [$PWD]\n")
        shell.read_until(b"[c d] [/tmp]")
        assert b"1 1000\r\n" in shell.output
        shell.client.say(type="from-the-future", cols="?")
        shell.client.say(type="resize", cols=132, rows=43)
        shell.type("stty size\n")
        shell.read_until(b"43 132")


def test_null_says_nothing(server: Server, ref: str) -> None:
    nothing = dict.fromkeys(("cols", "rows", "env", "cwd", "sessionId"))
    with Shell.open(server.port, ref, **nothing) as shell:
        assert shell.ready["lastSeq"] == 0


def test_a_storm_of_resizes_ends_with_the_last_one(server: Server, ref: str) -> None:
    with Shell.open(server.port, ref) as shell:
        quiet(shell)
        many = [text(type="resize", cols=1 + n % 1000, rows=1 + n % 997) for n in range(5000)]
        shell.client.raw(b"".join([*many, text(type="resize", cols=77, rows=33)]))
        shell.type("stty size; echo ov''er\n")
        assert b"33 77\r\n" in shell.read_until(b"over")


def test_close_hangs_up(server: Server, ref: str) -> None:
    shell = quiet(Shell.open(server.port, ref))
    shell.type("trap 'echo hung up > /tmp/hung-up; exit 4' HUP; echo tr''apped\n")
    shell.read_until(b"trapped")
    shell.client.say(type="close")
    assert shell.finish()[-1]["type"] == "exit"
    assert shell.client.closed == 1000
    late = connect(server.port, path_of(ref))
    assert error_of(late, text(type="init", sessionId=shell.id))[0] == "session_expired"


REFUSED_INITS: dict[str, tuple[Record, str]] = {
    "no cols": ({"cols": 0}, "cols"),
    "many cols": ({"cols": 1001}, "cols"),
    "text": ({"rows": "24"}, "rows"),
    "true": ({"rows": True}, "rows"),
    "half": ({"cols": 1.5}, "cols"),
    "a list": ({"env": ["A=b"]}, "env"),
    "a number": ({"env": {"A": 1}}, "env.A"),
    "a bad name": ({"env": {"A=B": "x"}}, "env"),
    "a NUL": ({"env": {"A": "\0"}}, "env.A"),
    "no path": ({"cwd": "tmp"}, "cwd"),
    "a path that is not": ({"cwd": "/nowhere"}, "/nowhere"),
    "a number for a path": ({"cwd": 1}, "cwd"),
    "another alphabet": ({"sessionId": "../../../../../../etc"}, "sessionId"),
    "a short name": ({"sessionId": "short"}, "sessionId"),
    "a line end": ({"sessionId": "aaaaaaaaaaaaaaaa\n"}, "sessionId"),
}


def test_a_bad_init_is_refused_by_the_field(server: Server, ref: str) -> None:
    for given, named in REFUSED_INITS.values():
        client = connect(server.port, path_of(ref))
        code, message, closed = error_of(client, text(type="init", **given))
        assert (code, closed) == ("bad_message", 1008), given
        assert named in message, (given, message)


NONSENSE = {
    "no init": text(type="resize", cols=1, rows=1),
    "binary first": frame(BINARY, b"\x01ls\n"),
    "broken JSON": frame(1, b'{"type":"init"'),
    "a list": frame(1, b'["init"]'),
    "no type": frame(1, b"{}"),
    "a type that is none": text(type=1),
    "a key twice": frame(1, b'{"type":"init","cols":1,"cols":2}'),
    "too deep": frame(1, b'{"type":"init","env":' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
    "NaN": frame(1, b'{"type":"init","cols":NaN}'),
    "half a pair": frame(1, b'{"type":"init","cwd":"/\\ud800"}'),
    "init twice": text(type="init") + text(type="init"),
    "an unknown kind": text(type="init") + frame(BINARY, b"\x03x"),
    "stdout": text(type="init") + frame(BINARY, b"\x02" + bytes(8) + b"x"),
    "nothing at all": text(type="init") + frame(BINARY),
    "an ack of text": text(type="init") + text(type="ack", seq="1"),
    "an ack below": text(type="init") + text(type="ack", seq=-1),
    "an ack above": text(type="init") + text(type="ack", seq=1 << 64),
    "an ack of nothing": text(type="init") + text(type="ack"),
    "half a size": text(type="init") + text(type="resize", cols=80),
}


def test_nonsense_is_told_and_ends_it(server: Server, ref: str) -> None:
    for name, sent in NONSENSE.items():
        code, _, closed = error_of(connect(server.port, path_of(ref)), sent)
        assert (code, closed) == ("bad_message", 1008), name


def test_what_comes_with_the_handshake_is_read(server: Server, ref: str) -> None:
    early = text(type="init") + frame(BINARY, b"\x01exit 5\n")
    with connect(server.port, path_of(ref), early=early) as client:
        texts = [json.loads(one) for one in client.end() if isinstance(one, str)]
    assert texts[-1] == {"type": "exit", "code": 5}


def test_whatever_comes_it_ends_and_the_server_is_not_surprised(server: Server, ref: str) -> None:
    dice, before = random.Random(59), server.log.count("Traceback")
    good = [text(type="init"), frame(BINARY, b"\x01x"), text(type="ack", seq=1), frame(9), frame(8)]
    for _ in range(80):
        sent = bytearray(b"".join(dice.choices(good, k=6)))
        for _ in range(dice.randrange(6)):
            sent[dice.randrange(len(sent))] = dice.randrange(256)
        with connect(server.port, path_of(ref), early=bytes(sent)) as client:
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_WR)
            client.end()
    assert server.log.count("Traceback") == before


# -- before the upgrade ----------------------------------------------------------------------------

BEFORE: dict[str, tuple[tuple[str, ...], int]] = {
    "no upgrade": (("Upgrade:", "Connection:"), 426),
    "no Connection": (("Connection: keep-alive",), 426),
    "another protocol": (("Upgrade: h2c",), 426),
    "an old version": (("Sec-WebSocket-Version: 8",), 426),
    "no version": (("Sec-WebSocket-Version:",), 426),
    "no key": (("Sec-WebSocket-Key:",), 400),
    "a short key": (("Sec-WebSocket-Key: AAAA",), 400),
    "a body": (("Content-Length: 5",), 400),
    "a body in pieces": (("Transfer-Encoding: chunked",), 400),
    "another page": (("Origin: http://evil.example",), 403),
    "a page of nowhere": (("Origin: null",), 403),
    "another port's page": (("Origin: http://localhost:1",), 403),
}


def refusal(port: int, path: str, *headers: str) -> Refused:
    with pytest.raises(Refused) as refused:
        connect(port, path, *headers)
    return refused.value


@pytest.mark.parametrize(("headers", "status"), BEFORE.values(), ids=BEFORE)
def test_a_bad_handshake_is_an_answer_like_another(
    server: Server, ref: str, headers: tuple[str, ...], status: int
) -> None:
    found = refusal(server.port, path_of(ref), *headers)
    assert found.status == status
    assert found.headers["content-type"] == "application/problem+json"
    if status == 426:
        assert found.headers["upgrade"] == "websocket"
        assert found.headers["sec-websocket-version"] == "13"


def test_no_sandbox_and_a_stopped_one_are_told_before(server: Server, ref: str, http: Any) -> None:
    assert refusal(server.port, path_of("sb-00000000")).status == 404
    http.post(f"/sandboxes/{ref}/stop")
    found = refusal(server.port, path_of(ref))
    assert (found.status, found.problem["type"]) == (409, "urn:heyvm:problem:conflict")
    assert http.head(path_of(ref)).status_code == 409


def test_its_own_pages_may_use_it(server: Server, ref: str) -> None:
    with Shell.open(server.port, ref, f"Origin: http://localhost:{server.port}") as shell:
        assert shell.ready["type"] == "ready"


def test_compression_is_not_agreed_to(server: Server, ref: str) -> None:
    offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
    with connect(server.port, path_of(ref), offer) as client:
        assert "sec-websocket-extensions" not in client.headers
        assert client.headers["x-request-id"]


# -- coming back -----------------------------------------------------------------------------------


def test_who_comes_back_gets_what_was_not_acknowledged(server: Server, ref: str) -> None:
    first = quiet(Shell.open(server.port, ref, acks=False))
    first.type("for n in 1 2 3; do echo line $n; sleep 0.05; done\n")
    first.read_until(b"line 3")
    first.client.say(type="ack", seq=first.last - 1)
    first.type("cat; echo e''nd\n")
    time.sleep(0.1)
    first.client.sock.close()

    with Shell.open(server.port, ref, sessionId=first.id, cols=90, rows=10) as again:
        assert again.ready["sessionId"] == first.id
        assert again.ready["lastSeq"] >= first.last
        again.read_until(b"line 3")
        assert b"line 1" not in again.output
        again.type("\x04stty size\n")
        assert b"10 90" in again.read_until(b"end\r\n10 90")


def test_an_end_that_nobody_saw_waits_too(server: Server, ref: str) -> None:
    first = quiet(Shell.open(server.port, ref))
    first.type("sleep 0.2; echo la''st; exit 9\n")
    first.client.close()
    first.client.sock.close()
    time.sleep(0.5)
    with Shell.open(server.port, ref, sessionId=first.id) as again:
        assert again.finish()[-1] == {"type": "exit", "code": 9}
        assert b"last" in again.output


def test_a_pause_holds_it_and_a_close_does_not_wait_for_its_end(
    server: Server, ref: str, http: Any
) -> None:
    shell, other = quiet(Shell.open(server.port, ref)), quiet(Shell.open(server.port, ref))
    http.post(f"/sandboxes/{ref}/pause")
    shell.type("echo af''ter\n")
    began = time.monotonic()
    other.client.say(type="close")
    other.finish()
    assert other.client.closed == 1000
    assert time.monotonic() - began < 8
    assert refusal(server.port, path_of(ref)).status == 409
    http.post(f"/sandboxes/{ref}/resume")
    with shell:
        shell.read_until(b"after")


def test_a_session_is_one_sandboxes(server: Server, sandbox: Callable[..., Record]) -> None:
    one, other = (sandbox(network="none")["id"] for _ in range(2))
    with Shell.open(server.port, one) as shell:
        for ref, session in ((other, shell.id), (one, "never-there-0000"), (other, "x" * 64)):
            client = connect(server.port, path_of(ref))
            code, _, closed = error_of(client, text(type="init", sessionId=session))
            assert (code, closed) == ("session_expired", 1008)
        shell.type("echo st''ill\n")
        shell.read_until(b"still")


def test_the_last_who_comes_has_it(server: Server, ref: str) -> None:
    first = quiet(Shell.open(server.port, ref))
    with Shell.open(server.port, ref, sessionId=first.id) as second:
        assert first.finish()[-1]["code"] == "session_taken"
        assert first.client.closed == 1008
        second.type("echo mi''ne\n")
        second.read_until(b"mine")


@pytest.mark.parametrize("end", ["stop", "delete", "restart", "killed"])
def test_a_sandbox_that_ends_ends_it(
    server: Server, sandbox: Callable[..., Record], http: Any, end: str
) -> None:
    ref = sandbox(network="none")["id"]
    shell = quiet(Shell.open(server.port, ref))
    began = time.monotonic()
    if end == "delete":
        http.delete(f"/sandboxes/{ref}")
    elif end == "killed":
        shell.type("kill -9 -1\n")  # all but the agent, and then the shell itself
        shell.type("kill -9 $$\n")
    else:
        http.post(f"/sandboxes/{ref}/{end}")
    last = shell.finish()[-1]
    assert last.get("code") == "sandbox_stopped" or last["type"] == "exit", last
    assert shell.client.closed in (1000, 1001)
    assert time.monotonic() - began < 8


# -- much, and slowly ------------------------------------------------------------------------------


def test_a_megabyte_pasted_into_an_echo_comes_back(server: Server, ref: str) -> None:
    with Shell.open(server.port, ref) as shell:
        quiet(shell)
        shell.type("stty raw -echo; echo go; exec cat\n")
        shell.read_until(b"go")
        shell.output.clear()
        paste = b"".join(b"%07d " % n for n in range(125_000))
        # In one message, and before anything of the echo is read: the acks are behind it.
        shell.type(paste)
        shell.read_until(b"0124999 ")
        assert bytes(shell.output).lstrip() == paste.lstrip()


def test_a_reader_that_stops_for_a_while_loses_nothing(server: Server, ref: str) -> None:
    before = memory_of(server)
    with Shell.open(server.port, ref) as shell:
        quiet(shell)
        shell.type("stty raw; seq 1 2000000; echo o''ver\n")
        time.sleep(1.0)
        assert memory_of(server) - before < 40 << 20
        whole = shell.read_until(b"over")
        assert whole.split() == [b"%d" % n for n in range(1, 2_000_001)] + [b"over"]
        assert shell.twice == 0


def test_what_is_typed_and_not_read_has_a_bound_and_others_go_on(server: Server, ref: str) -> None:
    before = memory_of(server)
    shell = quiet(Shell.open(server.port, ref))
    shell.type("stty raw -echo; echo go; exec sleep 100\n")
    shell.read_until(b"go")

    def flood() -> None:
        piece = frame(BINARY, b"\x01" + bytes(1 << 20))
        with contextlib.suppress(OSError):
            for _ in range(200):
                shell.client.raw(piece)

    thread = threading.Thread(target=flood)
    thread.start()
    with Shell.open(server.port, ref) as other:
        began = time.monotonic()
        other.type("echo i''n\n")
        other.read_until(b"in")
        assert time.monotonic() - began < 2
    time.sleep(0.5)
    assert memory_of(server) - before < 60 << 20
    shell.client.sock.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    shell.client.sock.close()
    # Nobody reads what is before its end: it is seen all the same, and the session is free.
    with Shell.open(server.port, ref, sessionId=shell.id) as again:
        assert again.ready["sessionId"] == shell.id


def memory_of(server: Server) -> int:
    """Of the workers together, in bytes."""
    lines = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in server.worker_pids()]
    return sum(int(re.findall(r"^Pss:\s+(\d+)", one, re.M)[0]) * 1024 for one in lines)


def test_nothing_is_left_of_many_that_end_in_every_way(server: Server, ref: str) -> None:
    def descriptors() -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in server.worker_pids())

    for _ in range(3):
        Shell.open(server.port, ref).client.sock.close()
    time.sleep(0.3)
    before = descriptors()
    for number in range(24):
        shell = Shell.open(server.port, ref)
        if number % 4 == 0:
            shell.type("exit\n")
            shell.finish()
        elif number % 4 == 1:
            shell.client.close()
        elif number % 4 == 2:
            shell.client.raw(frame(1, b"nonsense"))
            shell.finish()
        shell.client.sock.close()
    wait_until(lambda: descriptors() <= before, f"{descriptors()} descriptors, {before} before")


# -- tokens ----------------------------------------------------------------------------------------


def test_a_token_is_needed_and_may_be_in_the_query(guarded: Server, box: str) -> None:
    port, path = guarded.port, path_of(box)
    assert refusal(port, path).status == 401
    assert refusal(port, f"{path}?token=").status == 401
    assert refusal(port, f"{path}?token={token()[:-4]}AAAA").status == 401
    assert refusal(port, f"/sandboxes/{box}?token={token()}").status == 401
    assert refusal(port, f"{path}?token={token()}&token={token(sub='b')}").status == 400
    assert refusal(port, f"{path}?token={token()}", authorized(sub="b")).status == 400
    assert refusal(port, f"{path}?token={token()}", "Origin: http://evil.example").status == 403
    for headers, query in (
        ((authorized(),), ""),
        ((), f"?token={token()}"),
        ((authorized(),), f"?token={token()}"),
        ((), f"?x=1&token={token()}"),
    ):
        with Shell.open(port, box, *headers, query=query) as shell:
            assert shell.ready["type"] == "ready"


def test_a_token_that_ends_cuts_it_and_a_new_one_takes_up_again(guarded: Server, box: str) -> None:
    ends = time.time() - 9  # ten seconds are given to clocks that differ
    query = f"?token={token(exp=ends)}"
    shell = Shell.open(guarded.port, box, query=query)
    shell.type("echo ke''pt\n")
    last = shell.finish()[-1]
    assert (last["code"], shell.client.closed) == ("unauthorized", 1008)
    assert time.time() - ends < 10 + 5
    with Shell.open(guarded.port, box, authorized(), sessionId=shell.id) as again:
        again.type("echo on''ce more\n")
        again.read_until(b"once more")


def test_a_token_stands_in_no_log(guarded: Server, box: str) -> None:
    secret = token(jti="look-for-me")
    signature = secret.rpartition(".")[2]
    with Shell.open(guarded.port, box, query=f"?token={secret}"):
        pass
    refusal(guarded.port, f"{path_of(box)}?token={secret}", "Sec-WebSocket-Version: 8")
    refusal(guarded.port, f"{path_of('sb-00000000')}?token={secret}")
    with socket.create_connection(("127.0.0.1", guarded.port)) as sock:
        sock.sendall(f"GET {path_of(box)}?token={secret} NONSENSE\r\n\r\n".encode())
        sock.recv(1000)
    late = connect(guarded.port, f"{path_of(box)}?token={secret}")
    assert error_of(late, text(type="init", cols=0))[0] == "bad_message"
    trail = list((guarded.data_dir / "audit").iterdir())
    files = [guarded.log_path, *guarded.data_dir.glob("registry.db*"), *trail]
    assert len(files) > 2
    assert [path for path in files if signature.encode() in path.read_bytes()] == []
    assert path_of(box) in guarded.log


def test_a_shell_is_in_the_trail_while_it_lasts_and_after(guarded: Server, box: str) -> None:
    def records() -> list[Record]:
        with guarded.http() as http:
            found = http.get(f"/audit?subject={who}", headers=bearer()).json()["records"]
        return cast(list[Record], found)

    who = "carol"
    with Shell.open(guarded.port, box, authorized(sub=who)):
        [one] = records()
        assert (one["action"], one["outcome"]) == ("openShellStream", "in progress")
        time.sleep(0.3)
    wait_until(lambda: records()[0]["outcome"] == "answered", "its end is written")
    [one] = records()
    assert (one["status"], one["sandbox_id"]) == (101, box)
    assert one["duration_ms"] > 300
    accesses = [json.loads(line) for line in guarded.log.splitlines() if '"access"' in line]
    assert [one["status"] for one in accesses if one.get("subject") == who] == [101]


def test_its_hours_are_not_in_the_histogram(guarded: Server, box: str) -> None:
    with Shell.open(guarded.port, box, authorized()):
        time.sleep(0.7)
    with guarded.http() as http:
        lines = http.get("/metrics", headers=bearer()).text.splitlines()
    route = [line for line in lines if "shell-stream" in line and '"1xx"' in line]
    count = next(line for line in route if "_count" in line).split()[-1]
    short = next(line for line in route if 'le="0.5"' in line).split()[-1]
    assert float(count) == float(short) > 0


# -- workers that end ------------------------------------------------------------------------------


def worker_of(server: Server, sock: socket.socket) -> int:
    """The worker at the other end of a connection."""
    ours = f":{sock.getsockname()[1]:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inode = next(row[9] for row in rows if row[2].endswith(ours))
    for pid in server.worker_pids():
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == f"socket:[{inode}]":
                    return pid
    raise AssertionError("no worker has it")


def test_a_session_outlives_its_worker(guarded: Server, box: str) -> None:
    shell = quiet(Shell.open(guarded.port, box, authorized()))
    shell.type("for n in $(seq 1 400); do echo n$n; sleep 0.002; done; echo ov''er\n")
    shell.read_until(b"n50\r\n")
    os.kill(worker_of(guarded, shell.client.sock), signal.SIGKILL)
    shell.finish()
    assert shell.client.closed == 1006

    with Shell.open(guarded.port, box, authorized(), sessionId=shell.id) as again:
        again.last = shell.last
        again.read_until(b"over")
        whole = bytes(shell.output + again.output)
        assert whole.split() == [b"n%d" % n for n in range(1, 401)] + [b"over"]
        assert not [one for one in again.told if one["type"] == "lost"]


def test_a_reload_tells_its_clients_to_come_again(guarded: Server, box: str) -> None:
    shell = quiet(Shell.open(guarded.port, box, authorized()))
    before = set(guarded.worker_pids())
    os.kill(guarded.pid, signal.SIGHUP)
    shell.finish()
    assert shell.client.closed == 1012
    with Shell.open(guarded.port, box, authorized(), sessionId=shell.id) as again:
        again.type("echo he''re\n")
        again.read_until(b"here")
    wait_until(lambda: not before & set(guarded.worker_pids()), "the old workers are gone")


def test_it_works_through_nginx(guarded: Server, box: str, tmp_path: Path) -> None:
    with Nginx(upstream=f"127.0.0.1:{guarded.port}", ports_dir=tmp_path) as nginx:
        for headers, query in (((authorized(),), ""), ((), f"?token={token()}")):
            path = path_of(box) + query
            request = handshake(path, f"api.{HOSTNAME}:{nginx.https_port}", *headers)
            with Shell(Client(nginx.connect(f"api.{HOSTNAME}"), request)) as shell:
                shell.type("echo thr''ough\n")
                shell.read_until(b"through")
        with Browser(nginx) as browser:
            browser.open(f"https://api.{HOSTNAME}/health")
            script = PAGE.replace("/PATH", f"{path_of(box)}?token={token()}")
            found = browser.call("Runtime.evaluate", expression=script, **WHOLE)
        assert json.loads(found["result"]["value"]) == {"code": 1000, "exit": 3, "hello": True}
        origin = "Origin: https://evil.example"
        request = handshake(
            path_of(box), f"api.{HOSTNAME}:{nginx.https_port}", authorized(), origin
        )
        with pytest.raises(Refused) as refused:
            Client(nginx.connect(f"api.{HOSTNAME}"), request)
        assert refused.value.status == 403
        wait_until(lambda: len(nginx.accesses()) >= 5, "nginx has said so")
        assert "eyJ" not in nginx.log


WHOLE = {"awaitPromise": True, "returnByValue": True}


# What a page does with a shell; a promise of what came of it.
PAGE = """new Promise(done => {
  const ws = new WebSocket("wss://" + location.host + "/PATH");
  ws.binaryType = "arraybuffer";
  let output = "", exit = null;
  const encode = text => new TextEncoder().encode(text);
  ws.onopen = () => ws.send(JSON.stringify({type: "init"}));
  ws.onmessage = event => {
    if (typeof event.data === "string") {
      const words = JSON.parse(event.data);
      if (words.type === "ready")
        ws.send(new Uint8Array([1, ...encode("echo he''llo; exit 3\\n")]));
      if (words.type === "exit") exit = words.code;
    } else {
      const seq = Number(new DataView(event.data).getBigUint64(1));
      output += new TextDecoder().decode(event.data.slice(9));
      ws.send(JSON.stringify({type: "ack", seq}));
    }
  };
  ws.onclose = event => done(JSON.stringify(
    {code: event.code, exit, hello: output.includes("hello")}));
})"""


# -- time ------------------------------------------------------------------------------------------


class Mute:
    """A terminal whose program says nothing and reads nothing, until it is told to."""

    session, last_seq, lost = "a-mute-terminal-0", 0, 0

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.pieces: list[Output | Ended] = []

    def receive(self, timeout: float) -> Output | Ended | None:
        if self.pieces:
            return self.pieces.pop(0)
        if self.ended.wait(timeout):
            raise BackendFailed("closed")
        return None

    def send(self, _: bytes) -> None:
        self.ended.wait()
        raise BackendFailed("closed")

    def ack(self, seq: int) -> None: ...

    def resize(self, cols: int, rows: int) -> None: ...

    def close(self) -> None:
        self.ended.set()


class Inn:
    """A sandbox with nothing but a mute terminal, which may have lost something."""

    def __init__(self) -> None:
        self.mute = Mute()

    def terminal(self, *_: Any, **__: Any) -> Mute:
        return self.mute

    def attach(self, session: str) -> Mute:
        if session != self.mute.session:
            raise NotFound(session)
        return self.mute

    def end(self, _: str) -> None: ...


class Stage:
    """A session between a client and a mute terminal, in a thread of its own."""

    def __init__(self, *, is_ending: Callable[[], bool] = lambda: False) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            self.sock, _ = listener.accept()
        self.inn = Inn()
        self.session = Session(cast(Inside, self.inn), lambda: None, is_ending)
        self.before = threading.active_count()
        self.thread = threading.Thread(target=self._talk)
        self.thread.start()
        self.client = Client(ours, b"")

    def _talk(self) -> None:
        head = switching("dGhlIHNhbXBsZSBub25jZQ==", "13")
        with contextlib.suppress(Exception), WebSocket(self.sock, head) as websocket:
            self.session.talk(websocket)
        self.sock.close()

    def over(self) -> None:
        """See that it ends, with every thread that it began."""
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert threading.active_count() <= self.before
        self.client.sock.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """All times are a hundredth."""
    for name in ("INIT_S", "QUIET_S", "SILENT_S", "TICK_S", "GOODBYE_S", "HANG_UP_S"):
        monkeypatch.setattr(stream, name, getattr(stream, name) / 100)


@pytest.mark.usefixtures("hasty")
def test_who_does_not_say_what_he_wants_is_sent_away() -> None:
    stage = Stage()
    assert error_of(stage.client)[0::2] == ("bad_message", 1008)
    stage.over()


@pytest.mark.usefixtures("hasty")
def test_silence_is_broken_by_a_word_and_a_client_that_lives_stays() -> None:
    stage = Stage()
    shell = Shell(stage.client)
    began = time.monotonic()
    while time.monotonic() - began < 3 * stream.SILENT_S:
        assert shell.hear() == {"type": "ping"}  # and pings are answered meanwhile
    assert 4 < len(shell.told) < 30
    stage.client.close()
    stage.over()


@pytest.mark.usefixtures("hasty")
def test_a_client_that_is_silent_is_dropped() -> None:
    stage = Stage()
    stage.client.say(type="init")
    began = time.monotonic()
    stage.thread.join(10)
    assert stream.SILENT_S <= time.monotonic() - began < 5
    assert stage.inn.mute.ended.is_set()
    stage.over()


@pytest.mark.usefixtures("hasty")
def test_a_client_that_is_gone_is_noticed_behind_what_nobody_reads() -> None:
    stage = Stage()
    shell = Shell(stage.client)
    stage.client.sock.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        for _ in range(100):
            shell.type(bytes(1 << 20))
    assert len(stage.session._typed._bytes) < stream.TYPED_BYTES + (4 << 20)
    time.sleep(1.5 * stream.SILENT_S)
    assert stage.thread.is_alive()  # who is not listened to is not silent
    stage.client.sock.close()
    stage.over()


@pytest.mark.usefixtures("hasty")
def test_a_shell_that_does_not_hang_up_is_not_waited_for() -> None:
    stage = Stage()
    shell = Shell(stage.client)
    shell.client.say(type="close")
    shell.finish()
    assert shell.client.closed == 1000
    stage.over()


@pytest.mark.usefixtures("hasty")
def test_a_client_that_does_not_say_goodbye_is_not_waited_for() -> None:
    stage = Stage(is_ending=lambda: True)
    stage.thread.join(5)
    stage.over()


def test_who_comes_back_is_told_what_is_lost() -> None:
    stage = Stage()
    stage.inn.mute.lost, stage.inn.mute.last_seq = 7, 9
    stage.inn.mute.pieces = [Output(b"h", 8), Output(b"i", 9), Ended(0)]
    shell = Shell(stage.client, sessionId=Mute.session)
    assert shell.ready["lastSeq"] == 9
    assert shell.hear() == {"type": "lost", "upTo": 7}
    assert shell.finish()[-1] == {"type": "exit", "code": 0}
    assert bytes(shell.output) == b"hi"
    stage.over()


def test_a_slow_client_does_not_hold_up_the_worker_that_ends() -> None:
    ending = threading.Event()
    stage = Stage(is_ending=ending.is_set)
    stage.inn.mute.pieces = [Output(bytes(1 << 20), n) for n in range(1, 65)]
    stage.client.say(type="init")
    time.sleep(0.3)
    ending.set()
    began = time.monotonic()
    stage.thread.join(10)
    assert time.monotonic() - began < 4.5  # of the five that a worker has
    stage.over()
