"""The routes of a sandbox's life, over a fake domain."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from heyvm.api.limits import MAX_TTL_S
from heyvm.models import CreateSpec, Limits, Mount, Network, Status
from tests.fake_domain import Fake, fake_app, problem

pytest_plugins = ["tests.fake_domain"]

FIELDS = """id name slug status status_changed_at sandbox_type image image_resolved backend_type
    ttl_seconds expires_at created_at uptime uptime_secs cpu_usage memory_usage start_command
    working_directory open_ports port_mappings
    env_vars setup_hooks mounts network size_class cpus memory pids disk_size_gb ids oom_kills
    status_detail error_message warnings metadata""".split()
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
EVERYTHING: dict[str, Any] = {
    "name": "my-sandbox",
    "slug": "mine",
    "sandbox_type": "python",
    "image": "ubuntu:24.04",
    "backend_type": "bubblewrap",
    "ttl_seconds": 3600,
    "start_command": "nginx -g 'daemon off;'",
    "working_directory": "/work//./dir/",
    "open_ports": [80, 8080],
    "env_vars": {"NODE_ENV": "production"},
    "setup_hooks": ["true"],
    "mounts": [{"host_path": "/home/user", "sandbox_path": "/data/", "read_only": True}],
    "metadata": {"a": [1, {"b": None}]},
    "network": {"allow": ["203.0.113.7", "2001:DB8::/32"], "deny": []},
    "size_class": "small",
    "cpus": 0.5,
    "memory": 64 << 20,
    "pids": 99,
    "disk_size_gb": 2,
}


def test_a_record_has_every_field_in_order(api: FlaskClient) -> None:
    for record in (
        api.post("/sandboxes", json={}).json,
        api.get("/sandboxes").json[0],
        api.get("/sandboxes/box").json,
        api.patch("/sandboxes/box", json={}).json,
        api.post("/sandboxes/box/restart").json,
        api.post("/sandboxes/box/stop").json,
        api.get("/sandboxes/inactive").json["sandboxes"][0],
        api.post("/sandboxes/box/force-stop").json,
        api.post("/sandboxes/box/start").json,
    ):
        assert list(record) == FIELDS


def test_what_was_asked_for_is_what_the_domain_gets(fake: Fake, api: FlaskClient) -> None:
    seen: list[CreateSpec] = []
    create = fake.lifecycle.create
    fake.lifecycle.create = lambda spec, **more: seen.append(spec) or create(spec, **more)  # type: ignore[method-assign,func-returns-value]
    assert api.post("/sandboxes", json=EVERYTHING).status_code == 201
    assert seen == [
        CreateSpec(
            name="my-sandbox",
            slug="mine",
            sandbox_type="python",
            image="ubuntu:24.04",
            backend_type="bubblewrap",
            ttl_seconds=3600,
            start_command="nginx -g 'daemon off;'",
            working_directory="/work/dir",
            open_ports=(80, 8080),
            env_vars={"NODE_ENV": "production"},
            setup_hooks=("true",),
            mounts=(Mount("/home/user", "/data", True),),
            metadata={"a": [1, {"b": None}]},
            network=Network("egress", ("203.0.113.7/32", "2001:db8::/32")),
            size_class="small",
            cpus=0.5,
            memory=64 << 20,
            pids=99,
            disk_size_gb=2,
        )
    ]


def test_a_record_shows_what_is_set(api: FlaskClient) -> None:
    record = api.post("/sandboxes", json=EVERYTHING).json
    assert record["mounts"] == [
        {"host_path": "/home/user", "sandbox_path": "/data", "read_only": True, "pending": False}
    ]
    assert record["uptime"] == {"secs": 12, "nanos": 250_000_000}
    assert record["uptime_secs"] == 12
    for name in ("status_changed_at", "created_at", "expires_at"):
        assert MOMENT.fullmatch(record[name])
    for name in ("name", "slug", "open_ports", "env_vars", "setup_hooks", "metadata"):
        assert record[name] == EVERYTHING[name]


@pytest.mark.parametrize(
    ("network", "shown"),
    [
        (Network(), "egress"),
        (Network("none"), "none"),
        (
            Network("egress", ("10.0.0.0/8",), ("10.1.0.0/16",)),
            {"allow": ["10.0.0.0/8"], "deny": ["10.1.0.0/16"]},
        ),
    ],
)
def test_a_network_is_shown_as_it_is_asked_for(
    network: Network, shown: object, fake: Fake, api: FlaskClient
) -> None:
    (row,) = fake.lifecycle.rows.values()
    limits = Limits(0.5, 1 << 30, 99, None)
    fake.lifecycle.rows[row.id] = replace(row, network=network, limits=limits, image_resolved="")
    record = api.get("/sandboxes/box").json
    assert record["network"] == shown
    assert [record[name] for name in ("cpus", "memory", "pids", "disk_size_gb")] == [
        *(0.5, 1 << 30, 99, None)
    ]
    assert record["image_resolved"] is None


@pytest.mark.parametrize("word", ["egress", "none"])
def test_a_network_in_one_word(word: str, fake: Fake, api: FlaskClient) -> None:
    seen: list[CreateSpec] = []
    create = fake.lifecycle.create
    fake.lifecycle.create = lambda spec, **more: seen.append(spec) or create(spec, **more)  # type: ignore[method-assign,func-returns-value]
    assert api.post("/sandboxes", json={"network": word}).status_code == 201
    assert seen[0].network == Network(word)


def test_null_is_the_same_as_nothing(api: FlaskClient) -> None:
    answer = api.post("/sandboxes", json=dict.fromkeys(EVERYTHING))
    assert answer.status_code == 201
    assert answer.json["working_directory"] == "/workspace"
    assert answer.json["sandbox_type"] == "shell"


def test_unknown_fields_of_create_are_named_not_refused(api: FlaskClient) -> None:
    answer = api.post("/sandboxes", json={"name": "x", "colour": 2, "zeal": {}})
    assert answer.status_code == 201
    assert answer.json["warnings"] == ["unknown field 'colour'", "unknown field 'zeal'"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 1),
        ("name", "a\0b"),
        ("name", "x" * 256),
        ("slug", ""),
        ("slug", "Upper"),
        ("slug", "-x"),
        ("slug", "x" * 64),
        ("slug", "x\n"),
        ("slug", "grüße"),
        ("sandbox_type", "perl"),
        ("image", []),
        ("ttl_seconds", -1),
        ("ttl_seconds", 1.5),
        ("ttl_seconds", "60"),
        ("ttl_seconds", True),
        ("ttl_seconds", 2**63),
        ("ttl_seconds", MAX_TTL_S + 1),
        ("start_command", "a\0b"),
        ("start_command", 7),
        ("working_directory", "relative"),
        ("working_directory", "/a/../b"),
        ("working_directory", "/" + "x" * 256),
        ("working_directory", "/x" * 2100),
        ("open_ports", [0]),
        ("open_ports", [65536]),
        ("open_ports", [-1]),
        ("open_ports", ["80"]),
        ("open_ports", [80.5]),
        ("open_ports", 80),
        ("open_ports", [True]),
        ("env_vars", {"": "x"}),
        ("env_vars", {"a=b": "x"}),
        ("env_vars", {"a\0": "x"}),
        ("env_vars", {"a": "x\0"}),
        ("env_vars", {"a": 1}),
        ("env_vars", ["a"]),
        ("setup_hooks", "true"),
        ("setup_hooks", [1]),
        ("mounts", {}),
        ("mounts", [{}]),
        ("mounts", [{"host_path": "x", "sandbox_path": "/x"}]),
        ("mounts", [{"host_path": "/x", "sandbox_path": "x"}]),
        ("mounts", [{"host_path": "/x/../etc", "sandbox_path": "/x"}]),
        ("mounts", [{"host_path": "/x", "sandbox_path": "/x", "read_only": "no"}]),
        ("mounts", [{"host_path": "/x", "sandbox_path": "/x", "tree_id": "t"}]),
        ("mounts", [{"host_path": "/x", "sandbox_path": "/x"}] * 2),
        ("mounts", [{"host_path": "/x", "sandbox_path": p} for p in ("/x", "//x/.")]),
        *(
            ("mounts", [{"host_path": "/x", "sandbox_path": path}])
            for path in ("/", "//", "/proc", "/sys/fs", "/dev", "/run", "/usr", "/etc/x", "/.heyvm")
        ),
        ("metadata", []),
        ("metadata", "x"),
        *(
            ("network", value)
            for value in (
                *("open", "", [], 1, True, {"allow": "10.0.0.0/8"}, {"allow": [1]}, {"mode": "x"}),
                *(
                    {"deny": [text]}
                    for text in ("", "x", "10.0.0.0/33", "10.0.0.1/8", "1.2.3", "010.0.0.1")
                ),
                *(
                    {"allow": [text]}
                    for text in ("::ffff:10.0.0.1", "::/129", "fe80::1%eth0", "*", "example.com")
                ),
                {"allow": ["10.0.0.0/8"] * 257},
            )
        ),
        *(("cpus", value) for value in (0, -1, "1", True, 1e9, 0.001)),
        *(("memory", value) for value in (0, -1, "512m", 1 << 60, 1.5, 1000)),
        *(("pids", value) for value in (0, -1, 1, 1 << 30, "9")),
        *(("disk_size_gb", value) for value in (0, -1, 0.5, 1 << 20, "10G")),
        *(("size_class", value) for value in ("huge", "", 1, "SMALL")),
    ],
)
def test_a_wrong_value_is_a_422_that_names_the_field(
    field: str, value: object, api: FlaskClient
) -> None:
    body = problem(api.post("/sandboxes", json={field: value}), 422, "invalid")
    assert any(path.split(".")[0] == field for path in body["errors"]), body["errors"]
    assert len(api.get("/sandboxes").json) == 1


@pytest.mark.parametrize("value", [0, None, 1, 60.0, MAX_TTL_S])
def test_these_are_times_to_live(value: object, api: FlaskClient) -> None:
    assert api.post("/sandboxes", json={"ttl_seconds": value}).status_code == 201


def test_respond_async_answers_at_once(api: FlaskClient) -> None:
    answer = api.post(
        "/sandboxes", json={"name": "x"}, headers={"Prefer": "foo; bar, Respond-Async, wait=10"}
    )
    assert answer.status_code == 202
    assert answer.json["status"] == "provisioning"
    assert answer.headers["Location"] == f"/sandboxes/{answer.json['id']}"
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.headers["Preference-Applied"] == "respond-async"
    waited = api.get(f"{answer.headers['Location']}?wait=running&timeout=30")
    assert waited.json["status"] == "running"


def test_another_preference_changes_nothing(api: FlaskClient) -> None:
    answer = api.post("/sandboxes", json={}, headers={"Prefer": "return=minimal"})
    assert answer.status_code == 201
    assert "Preference-Applied" not in answer.headers


def test_the_same_key_and_body_give_the_same_sandbox(api: FlaskClient) -> None:
    headers = {"Idempotency-Key": "order-4711"}
    first = api.post("/sandboxes", json={"name": "x", "open_ports": [1, 2]}, headers=headers)
    again = api.post(
        "/sandboxes",
        data='{ "open_ports": [1,2], "name":"\\u0078" }',
        headers={**headers, "Content-Type": "application/json"},
    )
    assert "Idempotent-Replayed" not in first.headers
    assert again.status_code == 201
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json["id"] == first.json["id"]
    other = api.post("/sandboxes", json={"name": "x", "open_ports": [2, 1]}, headers=headers)
    problem(other, 409, "conflict")


@pytest.mark.parametrize("key", ["", "a b", "ü", "x" * 256])
def test_an_odd_key_is_a_422(key: str, api: FlaskClient) -> None:
    problem(api.post("/sandboxes", json={}, headers={"Idempotency-Key": key}), 422, "invalid")


@pytest.mark.parametrize(
    "query",
    [
        "wait=sunny",
        "wait=running&timeout=-1",
        "wait=running&timeout=nan",
        "wait=running&timeout=inf",
        "wait=running&timeout=1e9",
        "wait=running&timeout=soon",
        "wait=running&wait=stopped",
    ],
)
def test_a_wait_that_makes_no_sense_is_a_422(query: str, api: FlaskClient) -> None:
    problem(api.get(f"/sandboxes/box?{query}"), 422, "invalid")


def test_the_list_is_of_live_sandboxes_unless_told(fake: Fake, api: FlaskClient) -> None:
    fake.lifecycle.create(CreateSpec(name="off"))
    fake.lifecycle.stop("off")

    def names(query: str) -> list[str]:
        return [one["name"] for one in api.get(f"/sandboxes{query}").json]

    assert names("") == ["box"]
    assert names("?status=all") == ["box", "off"]
    assert names("?status=stopped,%20failed") == ["off"]
    assert names("?status=all&name=off") == ["off"]
    assert names("?name=nobody&colour=red") == []
    inactive = api.get("/sandboxes/inactive").json
    assert [one["name"] for one in inactive["sandboxes"]] == ["off"]
    assert (inactive["cursor"], inactive["next_cursor"]) == (None, None)


@pytest.mark.parametrize(
    "query",
    ["status=", "status=sunny", "limit=0", "limit=-1", "limit=x", "limit=10000", "name=%ff"],
)
def test_a_list_that_makes_no_sense_is_a_422(query: str, api: FlaskClient) -> None:
    problem(api.get(f"/sandboxes?{query}"), 422, "invalid")


def test_pages_are_linked(fake: Fake, api: FlaskClient) -> None:
    for number in range(4):
        fake.lifecycle.create(CreateSpec(name=f"n{number}"))
    path, seen = "/sandboxes?status=all&limit=2", []
    while path:
        page = api.get(path)
        seen += [one["name"] for one in page.json]
        found = re.fullmatch(r'<(.+)>; rel="next"', page.headers.get("Link", ""))
        path = found[1] if found else ""
    assert seen == ["box", "n0", "n1", "n2", "n3"]
    assert "Link" not in api.get("/sandboxes").headers


def test_inactive_pages_by_count_and_cursor(fake: Fake, api: FlaskClient) -> None:
    for number in range(3):
        fake.lifecycle.stop(fake.lifecycle.create(CreateSpec(name=f"n{number}"))[0].id)
    first = api.get("/sandboxes/inactive?count=2").json
    rest = api.get(f"/sandboxes/inactive?count=2&cursor={first['next_cursor']}").json
    assert len(first["sandboxes"]) == 2
    assert rest["cursor"] == first["next_cursor"]
    assert rest["next_cursor"] is None


def test_patch_hands_over_what_was_sent_and_no_more(fake: Fake, api: FlaskClient) -> None:
    fake.lifecycle.update("box", {"env_vars": {"A": "1"}, "ttl_seconds": 9})
    record = api.patch(
        "/sandboxes/box", json={"start_command": "sleep 1", "open_ports": [8080]}
    ).json
    assert record["start_command"] == "sleep 1"
    assert record["open_ports"] == [8080]
    assert record["env_vars"] == {"A": "1"}
    cleared = api.patch(
        "/sandboxes/box",
        json={"start_command": None, "open_ports": None, "env_vars": None, "ttl_seconds": None},
    ).json
    assert cleared["start_command"] is None
    assert cleared["open_ports"] == []
    assert cleared["env_vars"] == {}
    assert cleared["ttl_seconds"] is None


@pytest.mark.parametrize(
    "body",
    [{"image": "x"}, {"slug": "x"}, {"status": "running"}, {"name": None}, {"ttl_seconds": -1}],
)
def test_what_patch_cannot_change_is_told(body: dict[str, object], api: FlaskClient) -> None:
    problem(api.patch("/sandboxes/box", json=body), 422, "invalid")


def test_delete_answers_204_and_then_404(api: FlaskClient) -> None:
    answer = api.delete("/sandboxes/box")
    assert (answer.status_code, answer.data) == (204, b"")
    problem(api.delete("/sandboxes/box"), 404, "not-found")


@pytest.mark.parametrize("ref", ["%00", "%ff%fe", "..", "%252e", "x" * 5000, "a%20b", "é"])
def test_no_ref_is_more_than_unknown(ref: str, api: FlaskClient) -> None:
    assert api.get(f"/sandboxes/{ref}").status_code == 404


def test_a_trailing_slash_is_the_same_route(api: FlaskClient) -> None:
    assert api.get("/sandboxes/").json == api.get("/sandboxes").json


def test_execute_answers_as_the_guide_says(fake: Fake, api: FlaskClient) -> None:
    answer = api.post(
        "/sandboxes/box/execute", json={"command": "echo", "args": ["hello from the sandbox"]}
    )
    assert answer.json == {
        "output": "hello from the sandbox\n",
        "stdout": "hello from the sandbox\n",
        "stderr": "",
        "exit_code": 0,
        "duration_ms": 2,
        "timed_out": False,
        "truncated": False,
    }


def test_execute_hands_over_all_that_it_was_given(fake: Fake, api: FlaskClient) -> None:
    answer = api.post(
        "/sandboxes/box/execute",
        json={
            "command": "cat",
            "args": ["-"],
            "cwd": "/tmp/",
            "env": {"A": "1"},
            "user": "1000",
            "stdin": "grüße",
            "timeout_seconds": 1.5,
            "max_output_bytes": 0,
        },
    )
    assert answer.status_code == 200
    asked = fake.processes.asked[0]
    assert (asked.command, asked.args, asked.cwd, asked.user) == ("cat", ("-",), "/tmp", "1000")
    assert (asked.env, asked.stdin) == ({"A": "1"}, "grüße".encode())
    assert (asked.timeout_seconds, asked.max_output_bytes) == (1.5, 0)


@pytest.mark.parametrize("args", [{}, {"args": None}, {"args": []}])
def test_args_may_be_absent_null_or_empty(
    args: dict[str, Any], fake: Fake, api: FlaskClient
) -> None:
    answer = api.post("/sandboxes/box/execute", json={"command": "true", **args})
    assert answer.json["exit_code"] == 0
    assert not fake.processes.asked[0].args


def test_bytes_that_are_not_utf8_are_replaced_or_encoded(api: FlaskClient) -> None:
    raw = bytes(range(256))
    sent = {"command": "cat", "stdin": base64.b64encode(raw).decode(), "encoding": "base64"}
    answer = api.post("/sandboxes/box/execute", json=sent)
    assert base64.b64decode(answer.json["stdout"]) == raw
    text = api.post("/sandboxes/box/execute", json={"command": "printf", "args": ["a\\377b"]}).json[
        "output"
    ]
    assert text == "a\ufffdb"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"command": None},
        {"command": 1},
        {"command": "a\0b"},
        {"command": ["echo"]},
        {"command": "x", "args": "y"},
        {"command": "x", "args": [1]},
        {"command": "x", "args": ["\0"]},
        {"command": "x", "args": [None]},
        {"command": "x", "cwd": "tmp"},
        {"command": "x", "env": {"A": None}},
        {"command": "x", "user": 0},
        {"command": "x", "stdin": 1},
        {"command": "x", "timeout_seconds": 0},
        {"command": "x", "timeout_seconds": -1},
        {"command": "x", "timeout_seconds": "1"},
        {"command": "x", "timeout_seconds": True},
        {"command": "x", "timeout_seconds": 1e300},
        {"command": "x", "max_output_bytes": -1},
        {"command": "x", "max_output_bytes": 2**40},
        {"command": "x", "encoding": "latin-1"},
        {"command": "x", "timeout": 5},
        {"command": "x" * (128 * 1024 + 1)},
    ],
)
def test_a_wrong_execute_is_a_422(body: dict[str, Any], fake: Fake, api: FlaskClient) -> None:
    problem(api.post("/sandboxes/box/execute", json=body), 422, "invalid")
    assert fake.processes.asked == []


@pytest.mark.parametrize("text", ["***", "YQ", "YQ=", "Y-_=", "ü", "YQ==YQ=="])
def test_bad_base64_is_a_400(text: str, api: FlaskClient) -> None:
    body = {"command": "cat", "stdin": text, "encoding": "base64"}
    problem(api.post("/sandboxes/box/execute", json=body), 400, "bad-request")


def test_health_needs_nothing_of_the_domain(fake: Fake, api: FlaskClient) -> None:
    fake.lifecycle.fail_next = RuntimeError()
    assert api.get("/health").json == {"status": "ok"}


def test_capabilities_name_what_works(fake: Fake, api: FlaskClient) -> None:
    there = api.get("/capabilities").json
    assert there["supportedDrivers"] == ["bubblewrap"]
    assert there["defaultDriver"] == "bubblewrap"
    assert there["targetOs"] == "linux"
    assert there["archiveSupportedDrivers"] == []
    assert {"name", "value", "meaning"} == set(there["limits"][0])
    fake.backend.missing = True
    missing = api.get("/capabilities").json
    assert (missing["supportedDrivers"], missing["defaultDriver"]) == ([], None)


def test_capabilities_tell_this_server_s_own_limits(tmp_path: Path) -> None:
    told = fake_app(tmp_path, max_upload_bytes=7, max_sandboxes=3).app.test_client()
    limits = {one["name"]: one["value"] for one in told.get("/capabilities").json["limits"]}
    assert (limits["upload_bytes"], limits["sandboxes"]) == (7, 3)
    assert limits["ttl_seconds_default"] is None


def test_every_status_has_a_word() -> None:
    assert {status.value for status in Status} == {
        "provisioning",
        "running",
        "stopping",
        "stopped",
        "paused",
        "failed",
    }
