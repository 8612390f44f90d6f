"""Logs that hostile code writes to, by printing and behind the agent's back; what stays bounded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.server import Server, Session, wait_until

Make = Callable[..., dict[str, Any]]
MIB = 1024 * 1024
HOSTILE = {
    "escapes": r"printf '\033[2J\033]0;title\007\033[31mred\n'",
    "a forged line": r"printf '1000000000.000 e forged\n'",
    "JSON": """printf '{"timestamp": 1, "source": "stderr", "message": "forged"}\\n'""",
    "a carriage return": r"printf 'shown\rhidden\n'",
    "a header": r"printf 'x\r\nSet-Cookie: a=b\r\n\r\n<script>\n'",
    "bytes that are no text": r"printf '\377\376\0 \355\240\200\n'",
    "a text direction": r"printf '\342\200\256gnp.exe\n'",
}


def wait_for_logs(http: Session, ref: str, least: int = 1) -> list[dict[str, Any]]:
    def page() -> Any:
        answer = http.get(f"/sandboxes/{ref}/logs?limit=10000")
        assert answer.status_code == 200, answer.text
        return answer.json()["logs"]

    wait_until(lambda: len(page()) >= least, f"{least} log entries")
    return list(page())


def run(http: Session, ref: str, command: str) -> str:
    answer = http.post(f"/sandboxes/{ref}/execute", json={"command": command})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


@pytest.mark.parametrize("command", HOSTILE.values(), ids=list(HOSTILE))
def test_whatever_is_printed_is_one_entry_of_its_stream_and_time(
    command: str, http: Session, sandbox: Make
) -> None:
    before = time.time()
    ref = sandbox()["id"]
    expected = run(http, ref, command)
    lines = expected.rstrip("\n").split("\n")

    entries = wait_for_logs(http, ref, len(lines))

    assert [one["message"] for one in entries] == lines
    for entry in entries:
        assert entry["source"] == "stdout"
        assert before - 2 <= entry["timestamp"] <= time.time() + 2
        assert set(entry) >= {"timestamp", "source", "message"}


def test_what_is_written_behind_the_agents_back_is_read_as_a_strangers(
    http: Session, sandbox: Make, server: Server
) -> None:
    ref = sandbox()["id"]
    run(http, ref, "echo honest")
    wait_for_logs(http, ref)
    log = server.data_dir / "sandboxes" / ref / "log" / "log"
    future = f"{time.time() + 1e6:.3f}"
    with log.open("ab") as file:
        for line in (
            b"no line of an agent's",
            b"99999999999.999 o from the year 5138",
            f"{future} e from the future".encode(),
            b"-1.000 o before all time",
            b"1e999 o not a number",
            b"1.000 x of no stream",
            b"\xff\xfe\x00",
            b"1.000 o " + b"x" * 100_000,
        ):
            file.write(line + b"\n")

    entries = wait_for_logs(http, ref, 9)

    assert entries[0]["message"] == "honest"
    for entry in entries:
        assert entry["source"] in ("stdout", "stderr")
        assert 0 <= entry["timestamp"] <= time.time() + 1
        assert len(entry["message"]) <= 16 * 1024


@pytest.mark.parametrize(
    "replace",
    [
        "rm -rf LOG && ln -s /etc/passwd LOG",
        "rm -f LOG/log && ln -s /etc/passwd LOG/log",
        "rm -f LOG/log && mkfifo LOG/log",
        "rm -f LOG/log && mkdir LOG/log",
        "rm -f LOG/log && truncate -s 1T LOG/log",
    ],
    ids=["a link for the directory", "a link", "a fifo", "a directory", "a terabyte"],
)
def test_a_log_that_is_something_else_is_neither_followed_nor_waited_for(
    replace: str, http: Session, sandbox: Make
) -> None:
    ref = sandbox()["id"]
    run(http, ref, "echo honest")
    wait_for_logs(http, ref)
    # /.heyvm/log is the agent's place; what the sandbox may do to it is its own loss.
    run(http, ref, f"({replace.replace('LOG', '/.heyvm/log')}) 2>&1; true")
    began = time.monotonic()

    answer = http.get(f"/sandboxes/{ref}/logs")

    assert time.monotonic() - began < 5
    assert answer.status_code == 200
    assert "root:" not in answer.text
    assert run(http, ref, "echo still running") == "still running\n"
    assert http.get("/health").ok


def test_a_flood_is_bounded_on_disk_and_the_newest_is_kept(
    http: Session, sandbox: Make, server: Server
) -> None:
    ref = sandbox(start_command="seq 2000000; echo the last; sleep 1000")["id"]
    directory = server.data_dir / "sandboxes" / ref / "log"

    def newest() -> str:
        logs = http.get(f"/sandboxes/{ref}/logs?limit=1").json()["logs"]
        return logs[0]["message"] if logs else ""

    biggest = 0
    end = time.monotonic() + 60
    while newest() != "the last" and time.monotonic() < end:
        biggest = max(biggest, sum(path.stat().st_size for path in directory.glob("*")))
        assert http.get("/health").ok

    assert newest() == "the last"
    assert MIB < biggest < 5 * MIB
    page = http.get(f"/sandboxes/{ref}/logs?limit=1000").json()
    numbers = [int(one["message"]) for one in page["logs"][:-1]]
    assert numbers == list(range(numbers[0], 2_000_001))


def test_logs_stay_over_stop_start_and_a_restart_of_the_server() -> None:
    with Server() as own:
        with own.http() as http:
            start = "echo begun; sleep 1000"
            ref = http.post("/sandboxes", json={"start_command": start}).json()["id"]
            run(http, ref, "echo first; echo an error >&2")
            wait_for_logs(http, ref, 3)
            http.post(f"/sandboxes/{ref}/force-stop")
            before = wait_for_logs(http, ref, 3)
        own.kill()
        own.start()
        with own.http() as http:
            assert wait_for_logs(http, ref, 3) == before
            http.post(f"/sandboxes/{ref}/start")
            wait_until(
                lambda: [one["message"] for one in wait_for_logs(http, ref)].count("begun") == 2,
                "it logs on",
            )
            after = wait_for_logs(http, ref)
            assert after[: len(before)] == before
            errors = http.get(f"/sandboxes/{ref}/logs?source=stderr&level=error").json()
            assert [one["message"] for one in errors["logs"]] == ["an error"]


def test_nothing_from_inside_reaches_the_servers_own_log() -> None:
    with Server("--debug") as own, own.http() as http:
        forged = "\n2026-01-01 00:00:00 FORGED \x1b[31m"
        made = http.post("/sandboxes", json={"name": forged, "metadata": {"a": forged}}).json()
        ref = made["id"]
        http.post(f"/sandboxes/{ref}/execute", json={"command": f"echo '{forged}' >&2"})
        http.post(f"/sandboxes/{ref}/execute", json={"command": forged, "args": ["x"]})
        http.get("/sandboxes/%0AFORGED%1B%5B31m")
        http.get(f"/sandboxes/{ref}/files/FORGED%1b", headers={"X-Request-Id": "a\x1b[31mFORGED"})
        http.post(f"/sandboxes/{ref}/execute", json={"command": "ls", "cwd": "/\x1b[31m"})

        assert f"/sandboxes/{ref}/execute" in own.log
        assert "\x1b" not in own.log
        assert not [line for line in own.log.splitlines() if "FORGED" in line[:30]]
        assert json.loads(http.get(f"/sandboxes/{ref}").text)["name"] == forged
