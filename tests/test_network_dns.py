"""Whom a sandbox asks for names, whatever the host's resolver is."""

from __future__ import annotations

import json
import os

import pytest

from heyvm.backends import network
from tests import netlab
from tests.netlab import (
    HOST,
    PRIVATE_RESOLVER,
    PROBE,
    PUBLIC,
    PUBLIC6,
    RESOLVER,
    RESOLVER6,
    LabServer,
)
from tests.server import ORDINARY, wait_until

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root")
BOTH = pytest.mark.parametrize("uid", [0, ORDINARY], ids=["root", "ordinary"])


def ask(http, fields=None):
    """What a new sandbox gets to hear: its resolv.conf, an address, what it could reach."""
    answer = http.post("/sandboxes", json=fields or {})
    assert answer.status_code == 201, answer.text
    ref = answer.json()["id"]
    got = execute(
        http, ref, "sh", "-c", "getent ahostsv4 some.test | head -1; cat /etc/resolv.conf"
    )
    return ref, got["stdout"]


def execute(http, ref, command, *args, **fields):
    body = {"command": command, "args": list(args), **fields}
    answer = http.post(f"/sandboxes/{ref}/execute", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module", params=[0, ORDINARY], ids=["root", "ordinary"])
def lab(request):
    """A lab whose host has resolvers of its own too, and other things to protect beside them."""
    with netlab.Lab() as lab:
        lab.uid = request.param
        lab.listen(lab.host_name, "127.0.0.1", "127.0.0.2", HOST, ports="53,80,4000")
        yield lab


@pytest.fixture(scope="module")
def server(lab):
    with lab.host(), LabServer(lab, lab.uid) as running:
        yield running


@root_only
@pytest.mark.parametrize("resolver", [RESOLVER, PRIVATE_RESOLVER, "127.0.0.1", "127.0.0.2", HOST])
def test_names_are_found_by_whatever_resolver_the_host_has(lab, http, sandbox, resolver):
    lab.set_resolver(resolver)
    ref = sandbox()["id"]
    wait_until(
        lambda: execute(http, ref, "getent", "ahostsv4", "a.test")["stdout"].startswith(PUBLIC),
        "a name is found",
        timeout=8,
    )
    said = execute(http, ref, "cat", "/etc/resolv.conf")["stdout"]
    assert said.startswith("nameserver 198.18.0.1\n")
    # The way to the resolver is the way to port 53 of it, and no more.
    wanted = {
        f"{address} {port}": ["tcp", address, port]
        for address in ("198.18.0.1", "127.0.0.1", HOST, PRIVATE_RESOLVER)
        for port in (80, 853, 4000)
    }
    found = execute(http, ref, "/usr/bin/python3", "-I", "-c", PROBE, stdin=json.dumps(wanted))[
        "stdout"
    ]
    assert "reached" not in found


@root_only
def test_a_resolver_of_ipv6_alone_is_asked(lab, http, sandbox):
    lab.set_resolver(RESOLVER6)
    ref = sandbox()["id"]
    wait_until(
        lambda: execute(http, ref, "getent", "ahostsv4", "a.test")["stdout"].startswith(PUBLIC),
        "a name is found",
        timeout=8,
    )
    assert "nameserver fd68:" in execute(http, ref, "cat", "/etc/resolv.conf")["stdout"]


@root_only
def test_another_resolver_is_asked_when_the_host_has_another(lab, http, sandbox, server):
    if lab.uid:
        pytest.skip("a pasta asks whom the host asked when it began")
    lab.set_resolver(RESOLVER)
    ref = sandbox()["id"]
    lab.set_resolver("203.0.113.250")  # nobody
    table = f"inet heyvm_{server.mark}"
    wait_until(lambda: "203.0.113.250" in lab.nft(f"list chain {table} names"), "noticed")
    lab.set_resolver(PRIVATE_RESOLVER)
    wait_until(
        lambda: execute(http, ref, "getent", "ahostsv4", "b.test")["exit_code"] == 0,
        "answered again",
    )


QUESTIONS = """
import socket
for port in range(20000, 26200):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", port))
        for number in (1, 2, 3):
            sock.sendto(b"?", (f"198.18.0.{number}", 53))
"""


@root_only
def test_questions_do_not_fill_the_hosts_table_of_connections(lab, http, sandbox):
    if lab.uid:
        pytest.skip("pasta's are sockets of the user's")
    lab.set_resolver("127.0.0.2")
    ref = sandbox()["id"]
    execute(http, ref, "/usr/bin/python3", "-I", "-c", QUESTIONS)
    with open("/proc/sys/net/netfilter/nf_conntrack_count") as file:  # of the lab's host
        assert 1000 < int(file.read()) < network.MOST_FLOWS + 1000


@root_only
@BOTH
def test_a_host_without_ipv6_gives_none(uid):
    with netlab.Lab(v6=False) as lab:
        with lab.host(), LabServer(lab, uid) as server, server.http() as http:
            ref, said = ask(http)
            assert said.startswith(PUBLIC), said
            seen = execute(http, ref, "ip", "-6", "address", "show", "dev", "eth0")["stdout"]
            assert seen == "" or uid != 0, seen


@root_only
@BOTH
def test_a_host_without_a_network_starts_sandboxes_all_the_same(uid):
    with netlab.Lab() as lab:
        netlab.ip("-n", lab.host_name, "route", "delete", "default")
        netlab.ip("-n", lab.host_name, "-6", "route", "delete", "default")
        with lab.host(), LabServer(lab, uid) as server, server.http() as http:
            ref, _ = ask(http)
            netlab.ip("-n", lab.host_name, "route", "add", "default", "via", "203.0.113.1")
            fetch = f"curl -sS -m 2 http://{PUBLIC}/"
            wait_until(
                lambda: PUBLIC in execute(http, ref, "sh", "-c", fetch)["stdout"],
                "the sandbox has a network as soon as the host has",
            )
            got = execute(http, ref, "getent", "ahostsv4", "later.test")
            assert got["stdout"].startswith(PUBLIC), got


@root_only
@BOTH
@pytest.mark.parametrize(
    ("gone", "resolver", "names"),
    [
        (("route", "delete", "default"), RESOLVER, False),
        (("-6", "route", "delete", "default"), RESOLVER6, False),
        (("route", "delete", "default"), "127.0.0.53", False),
        (("route", "list"), None, None),
    ],
    ids=["v4 resolver, v6 route", "v6 resolver, v4 route", "stub, v6 route", "no resolver"],
)
def test_a_host_whose_resolver_cannot_be_asked_starts_sandboxes(uid, gone, resolver, names):
    with netlab.Lab() as lab:
        netlab.ip("-n", lab.host_name, *gone)
        lab.set_resolver(*([resolver] if resolver else []))
        with lab.host(), LabServer(lab, uid) as server, server.http() as http:
            answer = http.post("/sandboxes", json={})
            assert answer.status_code == 201, answer.text
            record = answer.json()
            told = "no names are found" in " ".join(record["warnings"])
            assert told is (uid != 0 and names is False)
            way = PUBLIC6 if gone[:2] == ("route", "delete") else PUBLIC
            wanted = json.dumps({"out": ["tcp", way, 80]})
            probe = ["/usr/bin/python3", "-I", "-c", PROBE]
            said = execute(http, record["id"], *probe, stdin=wanted)["stdout"]
            assert "reached" in said, said


# --- words --------------------------------------------------------------------------------------


def resolvers_of(tmp_path, text, resolved=None):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/resolv.conf").write_text(text)
    if resolved is not None:
        (tmp_path / "run/systemd/resolve").mkdir(parents=True)
        (tmp_path / "run/systemd/resolve/resolv.conf").write_text(resolved)
    return network.resolvers(f"{tmp_path}/")


def test_who_is_behind_systemd_resolved_is_asked(tmp_path):
    stub = "nameserver 127.0.0.53\noptions edns0\n"
    assert resolvers_of(tmp_path, stub, "nameserver 192.0.2.9\n") == ["192.0.2.9"]


def test_at_most_three_resolvers_and_none_of_one_link(tmp_path):
    text = "# c\nnameserver fe80::1%eth0\n" + "".join(f"nameserver 192.0.2.{n}\n" for n in range(5))
    assert resolvers_of(tmp_path, text)[-2:] == ["192.0.2.0", "192.0.2.1"]


def test_no_resolver_means_the_host_itself(tmp_path):
    assert resolvers_of(tmp_path, "search example.test\n") == ["127.0.0.1"]
