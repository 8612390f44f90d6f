"""The server as processes: how it starts, what it prints, how it ends, what outlives it."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heyvm import serving
from heyvm.settings import Settings
from tests.server import OWN_SETTINGS, REPOSITORY, Server, Session, free_port, wait_until

PATIENCE_S = 15.0
LISTENING_UNIX = "00010000"
LISTENING_TCP = "0A"


@pytest.fixture
def own() -> Iterator[Server]:
    """A server that a test may harm."""
    with Server() as running:
        yield running


def create(http: Session, **fields: Any) -> str:
    answer = http.post("/sandboxes", json=fields)
    assert answer.status_code == 201, answer.text
    return f"/sandboxes/{answer.json()['id']}"


def execute(http: Session, path: str, command: str) -> str:
    answer = http.post(f"{path}/execute", json={"command": command})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


def start_and_wait(*flags: str, **environ: str) -> tuple[int, str]:
    """Start a server that is not to come up; its exit code and what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
    done = subprocess.run(
        [sys.executable, "-m", "heyvm.cli", "--api", "--host", "127.0.0.1", *flags],
        env={**kept, "PYTHONPATH": str(REPOSITORY), **environ},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.returncode, done.stderr


# -- starting ------------------------------------------------------------------------------------


def test_a_taken_port_is_one_line_and_an_exit_code() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        began = time.monotonic()
        code, said = start_and_wait(f"--port={port}")

    assert code == 1
    assert said.count("\n") == 1
    assert f"127.0.0.1:{port}" in said
    assert time.monotonic() - began < 4


def test_an_empty_secret_stops_it_and_says_so() -> None:
    code, said = start_and_wait(f"--port={free_port()}", JWT_SECRET="")

    assert code == 2
    assert "JWT_SECRET is set but empty" in said
    assert "Traceback" not in said


def test_what_is_odd_about_the_settings_is_told() -> None:
    with Server(HEYVM_DATADIR="/x", S3_ENABLED="true", JWT_SECRET="short") as server:
        assert "HEYVM_DATADIR is not a setting that heyvm knows; did you mean" in server.log
        assert "S3_ENABLED is set, but" in server.log
        assert "JWT_SECRET has 5 bytes" in server.log
        assert "short\n" not in server.log


@pytest.mark.parametrize(
    ("address", "given", "word"),
    [
        ("0.0.0.0", {}, "set JWT_SECRET"),
        ("0.0.0.0", {"allow_open": True}, "whoever reaches this port"),
        ("0.0.0.0", {"jwt_secret": "s" * 32}, ""),
        ("127.0.0.1", {}, ""),
        ("127.0.0.1", {"allow_open": True}, ""),
        ("::", {}, "set JWT_SECRET"),
        ("::1", {}, ""),
    ],
)
def test_being_open_to_other_machines_is_told(address: str, given: Any, word: str) -> None:
    settings = Settings(data_dir=Path("/x"), run_dir=Path("/x"), **given)

    notices = serving.exposure_notices(settings, [(address, 3000)])

    assert bool(notices) == bool(word)
    assert word in "".join(notices)


def test_it_starts_in_a_directory_with_modules_of_the_same_names(tmp_path: Path) -> None:
    for name in ("app.py", "wsgi.py", "heyvm.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong one')\n")

    # PYTHONPATH comes before the working directory with -m, as an installed heyvm's script does.
    with Server(cwd=tmp_path, PYTHONSAFEPATH="1") as server, server.http() as http:
        assert http.get("/health").json() == {"status": "ok"}


def test_gunicorn_with_our_file_is_the_same_server() -> None:
    with Server(with_gunicorn=True) as server, server.http() as http:
        assert len(server.worker_pids()) == 2
        wait_until(lambda: len(server.keeper_pids()) == 1, "a keeper")
        assert execute(http, create(http), "echo hello") == "hello\n"


def test_it_listens_on_one_address_and_on_nothing_else(own: Server) -> None:
    wait_until(lambda: (own.run_dir / "keeper.sock").exists(), "a keeper")

    tcp = listening(own, "/proc/net/tcp", 3, 9, LISTENING_TCP)
    tcp |= listening(own, "/proc/net/tcp6", 3, 9, LISTENING_TCP)
    unix = listening(own, "/proc/net/unix", 3, 6, LISTENING_UNIX)

    assert len(tcp) == 1
    assert len(unix) == 1  # the keeper's: only the server's own user may enter its directory
    assert stat.S_IMODE(own.run_dir.stat().st_mode) == 0o700


def test_a_command_has_the_usual_limit_of_open_files(own: Server) -> None:
    with own.http() as http:
        ref = http.post("/sandboxes", json={"network": "none"}).json()["id"]
        said = http.post(f"/sandboxes/{ref}/execute", json={"command": "ulimit -Sn"}).json()

    assert said["stdout"] == "1024\n"  # the server's is raised for its clients


def listening(server: Server, table: str, state: int, inode: int, word: str) -> set[str]:
    """The inodes of the server's own listening sockets."""
    ours = set()
    for pid in server.server_pids():
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                ours.add(os.readlink(f"/proc/{pid}/fd/{name}"))
            except OSError:
                continue
    rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
    found = {row[inode] for row in rows if row[state] == word}
    return {number for number in found if f"socket:[{number}]" in ours}


# -- ending --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_in_seconds_and_its_sandboxes_do_not(own: Server, sign: int) -> None:
    with own.http() as http:
        path = create(http, start_command="sleep 1000")
        execute(http, path, "echo $$ > /tmp/mark")
        before = own.sandbox_pids()

        # The whole group, as a terminal does it.
        os.killpg(own.pid, sign)
        took = own.stop(sign)

    assert took < 10
    assert own.process is not None and own.process.returncode == 0
    assert set(own.sandbox_pids()) == set(before)
    own.start()
    with own.http() as http:
        assert http.get(path).json()["status"] == "running"
        assert execute(http, path, "cat /tmp/mark").strip().isdigit()


def test_a_client_that_keeps_its_connection_does_not_hold_it_up(own: Server) -> None:
    with own.http() as http:
        http.get("/health")

        assert own.stop() < 10


def test_an_execute_in_flight_ends_with_the_server(own: Server) -> None:
    with own.http() as http:
        path = create(http)
    with socket.create_connection(("127.0.0.1", own.port)) as client:
        body = b'{"command": "sleep 1234"}'
        client.sendall(
            b"POST %s/execute HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (path.encode(), len(body), body)
        )
        with own.http() as http:
            wait_until(lambda: sleeping(http, path), "the command runs")

        own.stop()

    own.start()
    with own.http() as http:
        wait_until(lambda: not sleeping(http, path), "the command has ended")


def sleeping(http: Session, path: str) -> bool:
    """Whether `sleep 1234` runs inside; the bracket keeps grep from finding itself."""
    look = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -o 'sleep 123[4]'"
    return "sleep" in execute(http, path, look)


# -- surviving -----------------------------------------------------------------------------------


def test_a_dead_worker_is_replaced_and_the_others_serve_on(own: Server) -> None:
    before = own.worker_pids()

    os.kill(before[0], signal.SIGKILL)

    wait_until(
        lambda: len(own.worker_pids()) == 2 and set(own.worker_pids()) != set(before),
        "a new worker",
    )
    with own.http() as http:
        assert http.get("/health").json() == {"status": "ok"}


def test_when_the_arbiter_dies_nothing_of_the_server_stays(own: Server) -> None:
    with own.http() as http:
        path = create(http)
    launchers = own.launcher_pids()

    assert own.process is not None
    own.process.kill()
    own.process.wait()
    own._wait_until_gone(launchers)

    own.start()
    with own.http() as http:
        assert execute(http, path, "echo still here") == "still here\n"


def test_a_killed_server_comes_back_to_its_sandboxes(own: Server) -> None:
    with own.http() as http:
        path = create(http)
        before = own.sandbox_pids()
    own.kill()

    own.start()

    with own.http() as http:
        assert execute(http, path, "echo still here") == "still here\n"
    assert set(own.sandbox_pids()) == set(before)


def test_two_servers_share_a_data_directory(own: Server) -> None:
    shared = {"HEYVM_DATA_DIR": str(own.data_dir), "HEYVM_RUN_DIR": str(own.run_dir)}
    with own.http() as http:
        path = create(http)
    with Server(**shared) as second:
        with second.http() as http:
            assert execute(http, path, "echo shared") == "shared\n"
        second.stop()
        second.environ = {}
    with own.http() as http:
        assert http.get(path).json()["status"] == "running"


# -- serving -------------------------------------------------------------------------------------


def test_a_request_may_outlast_the_heartbeats_timeout() -> None:
    with Server(GUNICORN_CMD_ARGS="--timeout 2") as server, server.http() as http:
        before = server.worker_pids()

        assert execute(http, create(http), "sleep 6; echo done") == "done\n"

        assert server.worker_pids() == before


def test_a_header_with_an_underscore_is_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX_Forwarded_For: 1\r\n\r\n")

        assert b" 400 " in client.recv(4096).partition(b"\r\n")[0]


def test_a_client_that_never_finishes_its_headers_is_cut_off() -> None:
    with Server(GUNICORN_CMD_ARGS="--keep-alive 1") as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localh")

            assert client.recv(4096) == b""


def test_debug_says_requests_and_keeps_secrets() -> None:
    secret = "a secret of at least thirty-two bytes"
    with Server("--debug", JWT_SECRET=secret) as server, server.http() as http:
        http.headers.update(server.authorization())
        path = create(http, env_vars={"PASSWORD": "hunter2"})
        execute(http, path, "echo the-output-of-it")
        token = server.authorization()["Authorization"].split()[1]

        assert f"POST '{path}/execute' 200" in server.log
        for hidden in (secret, token, "hunter2", "the-output-of-it"):
            assert hidden not in server.log


def test_ctrl_c_ends_the_server_quietly_and_no_sandbox() -> None:
    """As a terminal sends it: to every process of the group."""
    with Server() as server:
        with server.http() as http:
            path = create(http)
        os.killpg(server.pid, signal.SIGINT)
        assert server.process is not None
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log
        server.start()
        with server.http() as http:
            assert http.get(path).json()["status"] == "running"
            execute(http, path, "true")
