"""What the server counts: right over all of its processes, and over their deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from heyvm import metrics
from tests.server import REPOSITORY, Server, Session, create, run, wait_until

COUNTING = """
import sys
from pathlib import Path
from heyvm import metrics
metrics.begin(Path(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    metrics.here().answered("/x/<ref>", "GET", 200, 0.01)
    metrics.here().agent_failed("nonsense")
"""


def count(run_dir: Path, times: int) -> None:
    """A process that counts, and dies."""
    subprocess.run(
        [sys.executable, "-c", COUNTING, run_dir, str(times)], cwd=REPOSITORY, check=True
    )


def values(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    """The sum of all samples of this name with these labels."""
    wanted = set(labels.items())
    return sum(found for (one, has), found in values(text).items() if one == name and wanted <= has)


def scraped(run_dir: Path) -> str:
    return metrics.text_of(metrics.families(run_dir)).decode()


def files(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "metrics").glob("*.db")}


def test_the_dead_are_summed_up_and_leave_no_files(tmp_path: Path) -> None:
    for number in range(1, 5):
        count(tmp_path, 10)
        assert value(scraped(tmp_path), "heyvm_http_request_seconds_count") == 10 * number
        assert value(scraped(tmp_path), "heyvm_agent_errors_total", kind="nonsense") == 10 * number
        assert files(tmp_path) == {"counter_past.db", "histogram_past.db"}
    text = scraped(tmp_path)
    assert value(text, "heyvm_http_request_seconds_bucket", le="0.005") == 0
    assert value(text, "heyvm_http_request_seconds_bucket", le="0.02") == 40
    assert value(text, "heyvm_http_request_seconds_bucket", le="+Inf") == 40


def test_a_death_between_summing_up_and_tidying_counts_nothing_twice(tmp_path: Path) -> None:
    count(tmp_path, 10)
    kept = {path: path.read_bytes() for path in (tmp_path / "metrics").glob("*.db")}
    metrics.tidy(tmp_path)
    for path, content in kept.items():
        path.write_bytes(content)

    assert value(scraped(tmp_path), "heyvm_agent_errors_total") == 10
    count(tmp_path, 5)
    assert value(scraped(tmp_path), "heyvm_agent_errors_total") == 15


def test_a_spoilt_file_hides_nothing_else(tmp_path: Path) -> None:
    count(tmp_path, 10)
    for number, content in enumerate((b"", b"\xff" * 100, bytes(65536))):
        (tmp_path / "metrics" / f"counter_{number}-1-x.db").write_bytes(content)

    assert value(scraped(tmp_path), "heyvm_agent_errors_total") == 10


def test_a_server_begins_at_nought_unless_another_one_counts(tmp_path: Path) -> None:
    count(tmp_path, 10)
    metrics.clear(tmp_path)
    assert value(scraped(tmp_path), "heyvm_agent_errors_total") == 0

    waiting = COUNTING + "print('counted', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", waiting, tmp_path, "7"],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        metrics.clear(tmp_path)
        assert value(scraped(tmp_path), "heyvm_agent_errors_total") == 7
        other.communicate()


def test_a_directory_that_cannot_be_had_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("a file")

    count(tmp_path, 3)

    assert list(metrics.families(tmp_path)) == []


def test_counting_is_cheap(tmp_path: Path) -> None:
    script = COUNTING + (
        "import time; meter = metrics.here(); began = time.process_time()\n"
        "for _ in range(20000):\n"
        "    with meter.timed('execute'): pass\n"
        "    meter.answered('/x', 'GET', 200, 0.01)\n"
        "print((time.process_time() - began) / 20000)"
    )
    took = subprocess.run(
        [sys.executable, "-c", script, tmp_path, "1"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    assert float(took.stdout) < 100e-6  # 10 µs, on a machine with nothing else to do


# -- the server ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    with Server(with_gunicorn=True) as server:
        yield server


@pytest.fixture
def asker(own: Server) -> Iterator[Session]:
    with own.http() as session:
        yield session


def text(http: Session) -> str:
    answer = http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return answer.text


def test_all_workers_are_in_it(own: Server, asker: Session) -> None:
    create(asker, slug="counted")
    executed = value(text(asker), "heyvm_execute_seconds_count", outcome="ok")
    for _ in range(30):
        with own.http() as http:  # a connection of its own: whichever worker takes it
            run(http, "counted", "true")
    found = text(asker)

    assert value(found, "heyvm_execute_seconds_count", outcome="ok") == executed + 30
    route = "/sandboxes/<ref>/execute"
    answered = {"route": route, "method": "POST", "status": "2xx"}
    wait_until(
        lambda: value(text(asker), "heyvm_http_request_seconds_count", **answered) == 30,
        "the last answer is counted too",
    )
    assert value(found, "heyvm_sandboxes", status="running") == 1
    assert value(found, "heyvm_create_seconds_count", outcome="ok") == 1
    pids = {dict(has).get("pid") for name, has in values(found) if "process_cpu" in name}
    assert {str(pid) for pid in own.worker_pids() + own.keeper_pids()} == pids


def test_paths_do_not_make_labels(asker: Session) -> None:
    for number in range(20):
        asker.get(f"/sandboxes/box-{number}")
        asker.get(f"/nowhere-{number}")
        asker.request(f"METHOD{number}", "/health")

    names = {dict(has)["route"] for name, has in values(text(asker)) if "http_request" in name}

    assert {"/sandboxes/<ref>", "(none)"} <= names
    assert not any("box-" in name or "nowhere" in name for name in names)
    methods = {dict(has).get("method") for name, has in values(text(asker)) if "http_" in name}
    assert not any("METHOD" in str(method) for method in methods)


def test_what_goes_wrong_is_told_apart(asker: Session) -> None:
    before = text(asker)
    create(asker, slug="wrong")
    asker.post("/sandboxes/wrong/execute", json={"command": "sleep 9", "timeout_seconds": 1})
    asker.post("/sandboxes/wrong/execute", json={"command": "true", "cwd": "/none"})
    asker.post("/sandboxes", json={"setup_hooks": ["false"]})
    after = text(asker)

    def more(name: str, outcome: str) -> float:
        return value(after, name, outcome=outcome) - value(before, name, outcome=outcome)

    assert more("heyvm_execute_seconds_count", "timed-out") == 1
    assert more("heyvm_execute_seconds_count", "refused") == 1
    assert more("heyvm_create_seconds_count", "failed") == 1


def test_a_keeper_that_is_dead_shows(own: Server, asker: Session) -> None:
    name = "heyvm_keeper_last_tick_age_seconds"
    wait_until(lambda: value(text(asker), name) < 1, "the keeper ticks")
    assert value(text(asker), "heyvm_keeper_lag_seconds") < 1
    (keeper,) = own.keeper_pids()

    os.kill(keeper, signal.SIGSTOP)
    try:
        wait_until(lambda: value(text(asker), name) > 1.5, "it is seen that it does not")
    finally:
        os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: value(text(asker), name) < 1, "the next one ticks")


def test_counters_do_not_go_back_over_reloads_and_kills(own: Server, asker: Session) -> None:
    def requests() -> float:
        return value(text(asker), "heyvm_http_request_seconds_count")

    last = requests()
    for sign in (signal.SIGKILL, signal.SIGHUP, signal.SIGKILL):
        before = set(own.worker_pids())
        for pid in [own.pid] if sign == signal.SIGHUP else before:
            os.kill(pid, sign)
        end = time.monotonic() + 20
        while before & set(own.worker_pids()) or len(own.worker_pids()) < 2:
            assert time.monotonic() < end
            with own.http() as http:
                try:
                    now = value(http.get("/metrics").text, "heyvm_http_request_seconds_count")
                except OSError:  # in flight when its worker was killed
                    continue
                assert now >= last
                last = now
            time.sleep(0.05)
    with own.http() as http:
        assert value(http.get("/metrics").text, "heyvm_http_request_seconds_count") >= last
    alive = len(own.worker_pids()) + len(own.keeper_pids())
    assert len(files(own.run_dir)) <= 2 * alive + 2
