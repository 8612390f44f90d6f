"""docs/api-guide.md, run as it stands: real curl, a real server, real sandboxes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.server import REPOSITORY, Server, wait_until

GUIDE = REPOSITORY / "docs" / "api-guide.md"
CONNECT = (sys.executable, "-m", "heyvm.cli", "connect")
INDEX_HTML = "<h1>hello there</h1>\n"

# The commands that the contract prints, section by section, to the letter.
HEALTH = "curl http://localhost:3000/health"
CREATE = """\
curl -X POST http://localhost:3000/sandboxes \\
  -H "Content-Type: application/json" \\
  -d '{
    "name": "api-demo",
    "sandbox_type": "shell",
    "image": "ubuntu:24.04",
    "ttl_seconds": 3600
  }'"""
CONTRACT = {
    "1": [HEALTH],
    "2": [CREATE],
    "3": [
        "curl http://localhost:3000/sandboxes",
        "curl http://localhost:3000/sandboxes/api-demo",
    ],
    "4": [
        """\
curl -X POST http://localhost:3000/sandboxes/api-demo/execute \\
  -H "Content-Type: application/json" \\
  -d '{"command": "echo", "args": ["hello from the sandbox"]}'""",
        """\
curl -X POST http://localhost:3000/sandboxes/api-demo/execute \\
  -H "Content-Type: application/json" \\
  -d '{"command": "ls", "args": ["-la", "/workspace"]}'""",
    ],
    "5": [
        "curl -X POST http://localhost:3000/sandboxes/api-demo/stop",
        "curl -X POST http://localhost:3000/sandboxes/api-demo/start",
        "curl -X POST http://localhost:3000/sandboxes/api-demo/restart",
        "curl -X POST http://localhost:3000/sandboxes/api-demo/force-stop",
        "curl -X DELETE http://localhost:3000/sandboxes/api-demo",
    ],
    "6": [
        'curl "http://localhost:3000/sandboxes/api-demo/files?mount_path=/workspace"',
        """\
curl -X POST http://localhost:3000/sandboxes/api-demo/files \\
  -F "mount_path=/workspace" \\
  -F "file_path=index.html" \\
  -F "file=@./index.html\"""",
        """\
curl -X POST http://localhost:3000/sandboxes/api-demo/files/upload \\
  -H "Content-Type: application/json" \\
  -d '{
    "mount_path": "/workspace",
    "file_path": "hello.txt",
    "content": "SGVsbG8gd29ybGQh"
  }'""",
        'curl "http://localhost:3000/sandboxes/api-demo/files/index.html?mount_path=/workspace"',
        "curl -X DELETE "
        '"http://localhost:3000/sandboxes/api-demo/files/old-file.txt?mount_path=/workspace"',
    ],
    "7": [
        """\
curl -X POST http://localhost:3000/sandboxes/api-demo/proxy \\
  -H "Content-Type: application/json" \\
  -d '{"port": 80}'""",
        "curl http://localhost:3000/sandboxes/api-demo/proxy",
        'curl -X DELETE "http://localhost:3000/sandboxes/api-demo/proxy?subdomain=abc123"',
    ],
    "8": [
        'curl "http://localhost:3000/sandboxes/api-demo/logs?limit=50"',
        'curl "http://localhost:3000/sandboxes/api-demo/logs?source=stderr&level=error"',
    ],
    "9": [
        """\
curl -X PATCH http://localhost:3000/sandboxes/api-demo \\
  -H "Content-Type: application/json" \\
  -d '{
    "start_command": "nginx -g '\\''daemon off;'\\''",
    "env_vars": { "DEBUG": "true" },
    "open_ports": [8080]
  }'"""
    ],
    "10": ["curl -X POST http://localhost:3000/sandboxes/api-demo/shell-session"],
    "Authentication": [
        """\
curl http://localhost:3000/sandboxes \\
  -H "Authorization: Bearer <your-jwt-token>\""""
    ],
}
OURS = ("Images", "Limits and usage", "Pause and resume", "Audit and metrics")
# Sections 2 to 9 start from what section 2 makes; it makes it itself.
NEED_THE_SANDBOX = ("3", "4", "5", "6", "8", "9", "10")
# Printed for their kind, not for their value.
OF_THE_MOMENT = {
    *("id", "timestamp", "duration_ms", "total", "message", "source", "image_resolved"),
    *("subdomain", "sandbox_id", "local_port", "url", "created_at"),
    *("session_id", "expires_at", "connection_url", "ssh_host_key"),
}


@dataclass(frozen=True)
class Step:
    """A command of the guide and the JSON that the guide prints below it, if it does."""

    section: str
    command: str
    printed: str | None


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """The directory that the commands run in. A .curlrc makes curl fail on an error's status."""
    (tmp_path / "index.html").write_text(INDEX_HTML)
    (tmp_path / ".curlrc").write_text("silent\nshow-error\nfail-with-body\nmax-time = 60\n")
    return tmp_path


@pytest.fixture
def demo(server: Server, desk: Path) -> Iterator[None]:
    """Section 2's create, before a later section; and its end."""
    curl(CREATE, server, desk)
    yield
    server.http().delete("/sandboxes/api-demo")


def test_the_guides_commands_are_the_contracts() -> None:
    found: dict[str, list[str]] = {}
    for step in steps():
        found.setdefault(step.section, []).append(step.command)

    assert {name: found[name][: len(CONTRACT[name])] for name in CONTRACT} == CONTRACT
    assert set(found) == {*CONTRACT, *OURS}


@pytest.mark.parametrize("section", OURS)
def test_what_the_contract_does_not_have_runs_too(
    section: str, server: Server, desk: Path, demo: None
) -> None:
    for step in steps(section):
        json.loads(curl(step.command, server, desk))


def test_section_1_health(server: Server, desk: Path) -> None:
    (step,) = steps("1")

    assert curl(step.command, server, desk) == '{"status":"ok"}'


def test_section_2_create(server: Server, desk: Path) -> None:
    (step,) = steps("2")
    try:
        assert_as_printed(step, curl(step.command, server, desk))
    finally:
        server.http().delete("/sandboxes/api-demo")


def test_section_3_list_and_inspect(server: Server, desk: Path, demo: None) -> None:
    listing, one = (json.loads(curl(step.command, server, desk)) for step in steps("3"))

    assert [sandbox["slug"] for sandbox in listing] == ["api-demo"]
    assert one["id"] == listing[0]["id"]
    assert one["status"] == "running"


def test_section_4_execute(server: Server, desk: Path, demo: None) -> None:
    echo, ls = steps("4")

    assert_as_printed(echo, curl(echo.command, server, desk))
    assert json.loads(curl(ls.command, server, desk))["exit_code"] == 0


def test_section_5_lifecycle(server: Server, desk: Path, demo: None) -> None:
    *changes, delete = steps("5")

    words = [json.loads(curl(step.command, server, desk))["status"] for step in changes]

    assert words == ["stopped", "running", "running", "stopped"]
    assert curl(delete.command, server, desk) == ""
    assert server.http().get("/sandboxes/api-demo").status_code == 404


def test_section_6_files(server: Server, desk: Path, demo: None) -> None:
    listing, form, document, download, delete = steps("6")

    assert json.loads(curl(listing.command, server, desk))["files"] == []
    assert_as_printed(form, curl(form.command, server, desk))
    assert_as_printed(document, curl(document.command, server, desk))
    assert curl(download.command, server, desk) == INDEX_HTML
    curl(document.command.replace("hello.txt", "old-file.txt"), server, desk)
    assert curl(delete.command, server, desk) == ""
    names = [file["name"] for file in json.loads(curl(listing.command, server, desk))["files"]]
    assert sorted(names) == ["hello.txt", "index.html"]


def test_section_7_proxy_endpoints(server: Server, desk: Path, demo: None) -> None:
    create, listing, delete, private, internal = steps("7")
    serve = {"command": "python3 -m http.server -b 127.0.0.1 80 >/dev/null 2>&1 &"}
    server.http().post("/sandboxes/api-demo/execute", json=serve)

    made = curl(create.command, server, desk)
    assert_as_printed(create, made)
    endpoint = json.loads(made)
    wait_until(lambda: requests.get(endpoint["url"], timeout=5).ok, "the page is served")
    assert json.loads(curl(listing.command, server, desk)) == {"proxies": [endpoint]}
    assert curl(delete.command.replace("abc123", endpoint["subdomain"]), server, desk) == ""
    with pytest.raises(requests.ConnectionError):
        requests.get(endpoint["url"], timeout=5)
    assert json.loads(curl(private.command, server, desk))["is_public"] is False
    assert internal.printed is not None
    where = json.loads(curl(internal.command, server, desk))
    assert where.keys() == json.loads(internal.printed).keys()
    assert where["url"] == f"http://127.0.0.1:{where['port']}"


def test_section_8_logs(server: Server, desk: Path, demo: None) -> None:
    say = {"command": "echo Server started on port 80; echo error: no disk >&2"}
    server.http().post("/sandboxes/api-demo/execute", json=say)
    newest, errors = steps("8")

    assert_as_printed(newest, curl(newest.command, server, desk))
    (entry,) = json.loads(curl(errors.command, server, desk))["logs"]
    assert (entry["source"], entry["level"]) == ("stderr", "error")


def test_section_9_update(server: Server, desk: Path, demo: None) -> None:
    (step,) = steps("9")

    sandbox = json.loads(curl(step.command, server, desk))

    assert sandbox["start_command"] == "nginx -g 'daemon off;'"
    assert sandbox["env_vars"] == {"DEBUG": "true"}
    assert sandbox["open_ports"] == [8080]


def test_section_10_shell_sessions(server: Server, desk: Path, demo: None) -> None:
    create, listing, tunnel = steps("10")

    made = curl(create.command, server, desk)
    assert_as_printed(create, made)
    session = json.loads(made)
    assert session["connection_url"].startswith("heyo://endpoint")
    (listed,) = json.loads(curl(listing.command, server, desk))["sessions"]
    assert listed["session_id"] == session["session_id"]
    assert "connection_url" not in listed
    assert json.loads(curl(tunnel.command, server, desk))["port"] == 5432

    done = subprocess.run(
        [*CONNECT, session["connection_url"], "--shell", "--", "echo hello; exit 7"],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == (b"hello\n", 7), done.stderr


def test_authentication(desk: Path) -> None:
    (step,) = steps("Authentication")
    with Server(JWT_SECRET="my-secret-key") as server:
        token = heyvm_token("my-secret-key")

        with pytest.raises(subprocess.CalledProcessError):
            curl(step.command, server, desk)
        assert curl(step.command.replace("<your-jwt-token>", token), server, desk) == "[]"
        assert curl(HEALTH, server, desk) == '{"status":"ok"}'


def curl(command: str, server: Server, desk: Path) -> str:
    """Run a command of the guide with this server's address; what it printed."""
    done = subprocess.run(
        ["bash", "-c", command.replace("localhost:3000", f"localhost:{server.port}")],
        cwd=desk,
        env={**os.environ, "CURL_HOME": str(desk), "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    if done.returncode:
        print(done.stdout, done.stderr, server.log[-3000:], sep="\n")
    done.check_returncode()
    return done.stdout.removesuffix("\n") if done.stdout.startswith(("{", "[")) else done.stdout


def heyvm_token(secret: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "heyvm.cli", "token"],
        env={**os.environ, "JWT_SECRET": secret},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def assert_as_printed(step: Step, answer: str) -> None:
    assert step.printed is not None
    more = re.search(r",?\s*\.\.\.\s*}", step.printed) is not None
    printed = json.loads(re.sub(r",?\s*\.\.\.\s*}", "}", step.printed))
    actual = json.loads(answer)
    if not more:
        assert set(actual) == set(printed)
    assert_like(printed, actual)


def assert_like(printed: Any, actual: Any, key: str = "") -> None:
    """The same keys, types and values; of what is `OF_THE_MOMENT` the types."""
    if isinstance(printed, dict):
        assert set(printed) <= set(actual)
        for name, value in printed.items():
            assert_like(value, actual[name], name)
    elif isinstance(printed, list):
        assert bool(actual) is bool(printed)
        for value in actual:
            assert_like(printed[0], value)
    elif key in OF_THE_MOMENT:
        assert type(actual) is type(printed)
    else:
        assert actual == printed, key


def steps(section: str | None = None) -> list[Step]:
    """The curl commands of the guide (of one section), in order."""
    found: list[Step] = []
    title = ""
    for heading, language, text in blocks(GUIDE.read_text()):
        title = heading
        if language == "bash":
            found += [Step(title, command, None) for command in commands(text)]
        elif language == "json" and found and found[-1].section == title:
            if found[-1].printed is None:
                found[-1] = Step(title, found[-1].command, text)
    return [step for step in found if section in (None, step.section)]


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """(section, language, text) of each fenced block; a section is its number or its title."""
    pattern = re.compile(r"^## (.*?)$|^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    section = ""
    for match in pattern.finditer(text):
        if match[1] is not None:
            number = re.match(r"(\d+)\. ", match[1])
            section = number[1] if number else match[1]
        else:
            yield section, match[2], match[3]


def commands(block: str) -> Iterator[str]:
    """The curl commands of a block: a command ends where its quotes and backslashes do."""
    pending = ""
    for line in block.splitlines():
        if not pending and (not line.strip() or line.startswith("#")):
            continue
        pending += line + "\n"
        if not line.endswith("\\") and is_complete(pending):
            if shlex.split(pending)[0] == "curl":
                yield pending.rstrip("\n")
            pending = ""


def is_complete(text: str) -> bool:
    try:
        shlex.split(text)
    except ValueError:
        return False
    return True
