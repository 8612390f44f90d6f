"""HEYVM_LOG=json: one object on each line of stderr, whoever writes there, and no secret in it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heyvm.tokens import make_token
from tests.server import REPOSITORY, Server, Session, create, run, wait_until

SECRET = "hush-of-the-tokens-0123456789abcdef"
RUDE = r"\n\x1b[31m{\"forged\":1}\r\x00\x7f\u2028"


def spoken(script: str) -> list[dict[str, Any]]:
    """What a process that speaks JSON says."""
    begin = "from gevent import monkey; monkey.patch_all()\nfrom heyvm import journal\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{begin}journal.begin_json('test')\n{script}"],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=60,
    )
    assert all(byte == 10 or 32 <= byte < 127 for byte in done.stderr), done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()]


@pytest.mark.parametrize(
    "script",
    [
        f'import logging; logging.getLogger("x").warning("a%s", "{RUDE}")',
        f'import logging; logging.getLogger("x").warning("%d", "{RUDE}")',
        f'journal.event("{RUDE}", "sb-1", "{RUDE}", more="{RUDE}", odd=object())',
        f'import sys; print("{RUDE}", "b", file=sys.stderr)',
        f'import sys; sys.stderr.write("no end {RUDE}"); sys.stderr.write("x" * 40000)',
        f'import warnings; warnings.warn("{RUDE}")',
        f'raise ValueError("{RUDE}")',
        f'import threading\ndef f(): raise ValueError("{RUDE}")\n'
        "t = threading.Thread(target=f); t.start(); t.join()",
        f'import gevent\ndef f(): raise ValueError("{RUDE}")\ngevent.joinall([gevent.spawn(f)])',
        'import logging; logging.getLogger("x").error("\\ud800")',
    ],
)
def test_whatever_is_said_is_lines_of_json(script: str) -> None:
    found = spoken(script)

    assert found
    for one in found:
        assert {"time", "level", "kind", "request_id"} <= set(one)
        assert "forged" not in one


def test_what_a_request_begins_is_said_of_it_in_threads_too() -> None:
    found = spoken(
        "import threading\n"
        "def work(name): journal.event(name)\n"
        "journal.begin('r1'); journal.about('sb-1', 'one')\n"
        "threads = [threading.Thread(target=journal.carried(work), args=('a',))]\n"
        "journal.begin('r2')\n"
        "threads.append(threading.Thread(target=journal.carried(work), args=('b',)))\n"
        "journal.end(); work('c')\n"
        "for t in threads: t.start(); t.join()\n"
    )

    assert {one["event"]: one["request_id"] for one in found} == {"a": "r1", "b": "r2", "c": None}


# -- the server ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    with Server("--debug", HEYVM_LOG="json", JWT_SECRET=SECRET) as server:
        yield server


@pytest.fixture
def alice(own: Server) -> Iterator[Session]:
    with own.http() as session:
        session.headers["Authorization"] = f"Bearer {make_token(SECRET, subject='alice')}"
        yield session


def lines(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.splitlines()]


def said(server: Server, **fields: Any) -> list[dict[str, Any]]:
    return [one for one in lines(server) if fields.items() <= one.items()]


def test_a_call_is_said_with_who_where_and_how_long(own: Server, alice: Session) -> None:
    made = create(alice, slug="told")
    call = {"X-Request-Id": "call-1", "X-Forwarded-For": "10.9.9.9, 203.0.113.7"}

    alice.get("/sandboxes/told?x=1", headers=call)

    wait_until(lambda: said(own, kind="access", request_id="call-1"), "it is said")
    (one,) = said(own, kind="access", request_id="call-1")
    assert one["method"] == "GET"
    assert one["path"] == "/sandboxes/told"
    assert one["status"] == 200
    assert one["bytes"] > 100
    assert 0 < one["duration_ms"] < 5000
    assert (one["client"], one["subject"]) == ("203.0.113.7", "alice")
    assert (one["sandbox_id"], one["slug"]) == (made["id"], "told")


def test_events_carry_the_request_that_caused_them(own: Server, alice: Session) -> None:
    later = {"X-Request-Id": "later-1", "Prefer": "respond-async"}
    answer = alice.post("/sandboxes", json={"slug": "eventful"}, headers=later)
    assert answer.status_code == 202
    wait_until(lambda: said(own, event="sandbox.started", slug="eventful"), "it runs")
    for number, verb in enumerate(("pause", "resume", "stop", "start", "force-stop")):
        path = f"/sandboxes/eventful/{verb}"
        assert alice.post(path, headers={"X-Request-Id": f"verb-{number}"}).ok
    alice.delete("/sandboxes/eventful", headers={"X-Request-Id": "end-1"})

    found = [(one["event"], one["request_id"]) for one in said(own, kind="event", slug="eventful")]

    assert found == [
        ("sandbox.created", "later-1"),
        ("sandbox.started", "later-1"),
        ("sandbox.paused", "verb-0"),
        ("sandbox.resumed", "verb-1"),
        ("sandbox.stopped", "verb-2"),
        ("sandbox.started", "verb-3"),
        ("sandbox.stopped", "verb-4"),
        ("sandbox.deleted", "end-1"),
    ]


def test_the_keeper_says_what_it_does(own: Server, alice: Session) -> None:
    create(alice, slug="short", ttl_seconds=1)
    wait_until(lambda: said(own, event="sandbox.expired", slug="short"), "it has expired")
    create(alice, slug="killed")
    assert said(own, event="keeper.started")
    agents = [
        pid for pid in own.sandbox_pids() if b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    for pid in agents:
        os.kill(pid, signal.SIGKILL)

    wait_until(lambda: said(own, event="sandbox.failed", slug="killed"), "it has failed")
    (one,) = said(own, event="sandbox.expired", slug="short")
    assert (one["process"], one["request_id"]) == ("keeper", None)


def test_no_secret_is_said(own: Server, alice: Session) -> None:
    create(alice, slug="still", env_vars={"K": "hush-env"}, setup_hooks=["echo hush-hook"])
    run(alice, "still", "echo hush-command; exit 3", env={"K": "hush-e"}, stdin="hush-stdin")
    alice.post("/sandboxes", json={"setup_hooks": ["echo hush-failed; exit 1"], "slug": "fails"})
    alice.get("/sandboxes?token=hush-query", headers={"Cookie": "heyvm=hush-cookie"})
    alice.get("/sandboxes", headers={"Authorization": "Bearer hush-token"})
    alice.get("/auth/verify/hush-link")
    for line in (
        b"GET /x?token=hush-line HTTP/9.9\r\n\r\n",
        b"GET /x?token=hush line HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nAuthorization Bearer hush-header\r\n\r\n",
        b"GET / HTTP/1.1\r\nX\x1b[31m-hush: hush-name\r\n\r\n",
        b"\x00\xffhush\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", own.port)) as raw:
            raw.sendall(line)
            raw.recv(1000)

    wait_until(lambda: said(own, kind="access", path="/auth/<rest:path>"), "all is said")
    assert "hush" not in own.log
    assert len(said(own, logger="gunicorn.error")) >= 3
    assert lines(own)


def test_what_goes_to_an_endpoint_is_said_but_not_recorded(own: Server, alice: Session) -> None:
    create(alice, slug="behind")
    endpoint = alice.post("/sandboxes/behind/proxy", json={"port": 8000}).json()
    host = f"{endpoint['subdomain']}.localhost"
    made = said(own, event="endpoint.made", slug="behind")
    assert [(one["subdomain"], one["port"]) for one in made] == [(endpoint["subdomain"], 8000)]
    records = len(alice.get("/audit?limit=1000").json()["records"])

    answer = alice.post("/page?token=hush-app", headers={"Host": host})

    assert answer.status_code == 502
    wait_until(lambda: said(own, kind="access", host=host), "it is said")
    (one,) = said(own, kind="access", host=host)
    assert (one["method"], one["path"], one["status"]) == ("POST", "/page", 502)
    assert len(alice.get("/audit?limit=1000").json()["records"]) == records
    assert 'route="(endpoint)"' in alice.get("/metrics").text
    assert "hush" not in own.log
