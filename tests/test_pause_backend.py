"""Pausing on bubblewrap: nothing inside notices, and every way out still works."""

from __future__ import annotations

import time

import pytest

from heyvm.backends.cgroups import Groups
from tests.server import Server, wait_until

ROUNDS = 50
# Counts without a gap into one file, and keeps a tree whose sums it checks again and again.
WORK = (
    "import hashlib, os, time\n"
    "os.makedirs('/workspace/tree', exist_ok=True)\n"
    "for i in range(50): open(f'/workspace/tree/{i}', 'wb').write(os.urandom(4096))\n"
    "def total():\n"
    "  return hashlib.sha256(b''.join(open(f'/workspace/tree/{i}', 'rb').read()"
    " for i in range(50))).hexdigest()\n"
    "first, n = total(), 0\n"
    "out = open('/workspace/counted', 'w', 1)\n"
    "while True:\n"
    "  assert total() == first\n"
    "  n += 1\n"
    "  out.write(f'{n}\\n')\n"
    "  time.sleep(0.001)\n"
)


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        if not Groups(running.mark).can_freeze:
            pytest.skip("no freezer that this user may write")
        yield running


@pytest.fixture
def paused(http, sandbox):
    ref = sandbox(network="none", start_command="while :; do date +%s%N > /workspace/now; done")
    answer = http.post(f"/sandboxes/{ref['id']}/pause")
    assert answer.status_code == 200 and answer.json()["status"] == "paused", answer.text
    return ref["id"]


def run(http, ref, line):
    body = {"command": "sh", "args": ["-c", line]}
    answer = http.post(f"/sandboxes/{ref}/execute", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def counted(http, ref):
    return [int(one) for one in run(http, ref, "cat /workspace/counted")["stdout"].split()]


def test_fifty_rounds_change_nothing_inside(http, server, sandbox):
    ref = sandbox(network="none")["id"]
    quoted = WORK.replace("'", "'\\''")
    run(http, ref, f"setsid python3 -c '{quoted}' >/dev/null 2>/workspace/complaint </dev/null &")
    wait_until(lambda: run(http, ref, "test -s /workspace/counted")["exit_code"] == 0, "it counts")
    processes = Groups(server.mark).pids(ref)

    for _ in range(ROUNDS):
        assert http.post(f"/sandboxes/{ref}/pause").json()["status"] == "paused"
        assert http.post(f"/sandboxes/{ref}/resume").json()["status"] == "running"

    assert Groups(server.mark).pids(ref) == processes
    last = counted(http, ref)[-1]
    wait_until(lambda: counted(http, ref)[-1] > last + 20, "it counts on")
    numbers = counted(http, ref)
    assert numbers == list(range(1, len(numbers) + 1))
    assert run(http, ref, "cat /workspace/complaint")["stdout"] == ""


def test_a_paused_sandbox_uses_no_processor(http, server, paused):
    groups = Groups(server.mark)
    before = groups.usage(paused).cpu_s

    time.sleep(0.5)

    assert groups.usage(paused).cpu_s == before
    assert http.post(f"/sandboxes/{paused}/resume").status_code == 200
    wait_until(lambda: groups.usage(paused).cpu_s > before, "it goes on")


def test_a_command_that_was_halted_halfway_comes_to_its_end(http, sandbox):
    from concurrent.futures import ThreadPoolExecutor

    ref = sandbox(network="none")["id"]
    with ThreadPoolExecutor() as pool:
        going = pool.submit(run, http, ref, "for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done")
        time.sleep(0.25)
        assert http.post(f"/sandboxes/{ref}/pause").status_code == 200
        time.sleep(0.5)
        assert not going.done()
        assert http.post(f"/sandboxes/{ref}/resume").status_code == 200
        assert going.result(20)["stdout"] == "1\n2\n3\n4\n5\n6\n"


@pytest.mark.parametrize("way", ["stop", "force-stop", "restart"])
def test_a_paused_sandbox_can_be(http, server, paused, way):
    answer = http.post(f"/sandboxes/{paused}/{way}")

    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == ("running" if way == "restart" else "stopped")
    assert (paused in Groups(server.mark).names()) == (way == "restart")


def test_a_paused_sandbox_can_be_deleted(http, server, paused):
    assert http.delete(f"/sandboxes/{paused}").status_code == 204
    assert paused not in Groups(server.mark).names()


def test_a_paused_sandbox_stays_so_when_the_server_is_killed(sandbox):
    with Server() as server:
        groups = Groups(server.mark)
        with server.http() as http:
            ref = http.post("/sandboxes", json={"network": "none"}).json()["id"]
            assert http.post(f"/sandboxes/{ref}/pause").status_code == 200
        server.kill()
        server.start()
        with server.http() as http:
            assert http.get(f"/sandboxes/{ref}").json()["status"] == "paused"
            assert groups.is_frozen(ref)
            assert http.post(f"/sandboxes/{ref}/resume").json()["status"] == "running"
            assert run(http, ref, "echo back")["stdout"] == "back\n"


def test_a_paused_sandbox_whose_agent_is_killed_is_failed_and_gone(http, server, paused):
    import os
    import signal

    groups = Groups(server.mark)
    for pid in groups.pids(paused):
        os.kill(pid, signal.SIGKILL)
    groups.thaw(paused)

    wait_until(
        lambda: http.get(f"/sandboxes/{paused}").json()["status"] == "failed", "it is failed"
    )
    wait_until(lambda: paused not in groups.names(), "its group is gone")
