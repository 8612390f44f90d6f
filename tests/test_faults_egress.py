"""What a sandbox may connect to, of every kind of server: with busybox alone, from an image.

Each way in breadth, from `host`, is in test_network.py; who is asked for names in
test_network_dns.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import kinds, netlab
from tests.netlab import (
    HOST,
    HOST6,
    HOST_SECOND,
    METADATA,
    METADATA6,
    PRIVATE,
    PRIVATE6,
    PRIVATE_RESOLVER,
    PUBLIC,
    PUBLIC6,
    RESOLVER,
    LabServer,
)
from tests.server import Session, wait_until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root"),
    pytest.mark.skipif(not os.path.exists("/usr/bin/busybox"), reason="apt install busybox-static"),
]
FETCH = (
    "for a in {}; do ((echo; sleep 1) | busybox nc -w 2 $a 80 2>/dev/null"
    " | grep -o 'reached [^ ]*') & done; wait"
)
# nc cannot ask for names everywhere: it is static.
LOOK_UP = "for n in {}; do busybox nslookup -type=a $n | tail -n +3 | grep -o '[0-9.]*[0-9]$'; done"
Execute = Callable[..., str]


@pytest.fixture(scope="module", params=kinds.SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[LabServer]:
    with kinds.user(request.param) as uid, netlab.Lab() as lab, lab.host():
        lab.listen(lab.host_name, "0.0.0.0", "::", ports="80,4000")
        with LabServer(lab, uid or 0) as running:
            with running.http() as http:
                kinds.bring(http)
            yield running


@pytest.fixture
def start(http: Session) -> Iterator[Callable[..., Execute]]:
    """`start(network=...)` makes a sandbox and gives what runs a line in it."""
    made = []

    def create(**fields: Any) -> Execute:
        answer = http.post("/sandboxes", json={**kinds.wanted("image"), **fields})
        assert answer.status_code == 201, answer.text
        path = f"/sandboxes/{answer.json()['id']}"
        made.append(path)

        def execute(line: str) -> str:
            body = {"command": "sh", "args": ["-c", line]}
            done = http.post(f"{path}/execute", json=body)
            assert done.status_code == 200, done.text
            return str(done.json()["stdout"])

        return execute

    yield create
    for path in made:
        assert http.delete(path).status_code == 204


def reached(execute: Execute, *names: str) -> set[str]:
    """Which addresses answered when they were connected to."""
    spelt = " ".join(f"[{one}]" if ":" in one else one for one in names)
    lines = execute(FETCH.format(spelt)).splitlines()
    return {line.removeprefix("reached ").removeprefix("::ffff:") for line in lines}


def looked_up(execute: Execute, *addresses: str) -> list[str]:
    """What the names of these addresses lead to."""
    names = " ".join(f"{one.replace('.', '-')}.test" for one in addresses)
    return execute(LOOK_UP.format(names)).split()


def test_the_internet_is_open_and_everything_else_is_closed(start: Any) -> None:
    execute = start()
    closed = (*PRIVATE, *PRIVATE6, *METADATA, *METADATA6, HOST, HOST_SECOND, HOST6)
    spelt = ("2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "::ffff:169.254.169.254")

    assert reached(execute, PUBLIC, PUBLIC6, *closed, *spelt) == {PUBLIC, PUBLIC6}


def test_a_name_opens_nothing_that_its_address_does_not(start: Any) -> None:
    """DNS rebinding, and names that lead to private addresses: the address decides."""
    execute = start()
    own = execute("busybox ip -o -4 address show dev eth0").split("inet ")[1].split("/")[0]
    private = (*PRIVATE, *METADATA, HOST, HOST_SECOND, "127.0.0.1", own)
    led_to = looked_up(execute, *private)

    assert sorted(led_to) == sorted(private)
    assert reached(execute, *led_to) == set()
    assert reached(execute, *looked_up(execute, PUBLIC)) == {PUBLIC}


def test_names_are_asked_for_at_our_address_alone(start: Any) -> None:
    execute = start()
    ours = execute("cat /etc/resolv.conf").split()[1]
    servers = (ours, RESOLVER, PRIVATE_RESOLVER, PUBLIC, HOST, "169.254.169.253")
    ask = (
        "for a in {}; do (busybox timeout 3 busybox nslookup -type=a 1-2-3-4.test $a 2>&1"
        " | grep -q 1.2.3.4 && echo $a) & done; wait"
    )

    assert execute(ask.format(" ".join(servers))).split() == [ours]


def test_none_is_none(start: Any) -> None:
    execute = start(network="none")

    assert reached(execute, PUBLIC, PUBLIC6, HOST, *METADATA, *PRIVATE) == set()
    assert execute("cut -d: -f1 /proc/net/dev | tail -n +3").split() == ["lo"]


def test_lists_open_and_close(start: Any) -> None:
    allow = ["10.1.0.0/16", "169.254.169.254/32", f"{HOST}/32", "0.0.0.0/0"]
    execute = start(network={"allow": allow, "deny": [f"{RESOLVER}/32"]})
    asked = (PUBLIC, RESOLVER, *PRIVATE, *METADATA, HOST, HOST_SECOND)

    assert reached(execute, *asked) == {"10.1.2.3", PUBLIC}


def test_its_network_cannot_be_changed_from_inside(start: Any) -> None:
    execute = start()
    lines = (
        "busybox ip link set eth0 down",
        "busybox ip address add 10.1.2.9/8 dev eth0",
        f"busybox ip route add 10.0.0.0/8 via {HOST}",
        "busybox ip route flush table main",
        "busybox ip rule add table local",
        "busybox ip tuntap add dev t0 mode tun",
        "busybox arp -s 10.1.2.3 02:00:00:00:00:01",
        "nft flush ruleset",
        "iptables -F",
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
        "busybox ping -c 1 -I eth0 10.1.2.3 -w 1",
        "busybox arping -c 1 -I eth0 10.1.2.3",
    )
    for line in lines:
        assert execute(f"{line} >/dev/null 2>&1 && echo DONE") == "", line
    assert reached(execute, PUBLIC, "10.1.2.3", HOST) == {PUBLIC}


def test_a_relay_inside_goes_where_its_sandbox_may(start: Any) -> None:
    """claude-code #87381: what a program inside forwards is still the sandbox's."""
    execute = start()
    relay = "busybox nc -ll -p 8{0} -e busybox timeout 4 busybox nc -w 2 {1} 80 >/dev/null 2>&1 &"
    targets = {"001": PUBLIC, "002": "10.1.2.3", "003": HOST, "004": "169.254.169.254"}
    execute("".join(relay.format(*one) for one in targets.items()) + "sleep 0.3")

    ask = (
        "for p in {}; do (echo; sleep 1) | busybox timeout 5 busybox nc -w 3 127.0.0.1 8$p"
        " 2>/dev/null; done | grep -o 'reached [^ ]*'"
    )
    answered = execute(ask.format(" ".join(targets)))
    assert answered == f"reached {PUBLIC}\n"


def test_two_sandboxes_do_not_reach_each_other(start: Any) -> None:
    one, two = start(), start()
    listen = "(while :; do echo reached neighbour | busybox nc -l -p 80; done) >/dev/null 2>&1 &"
    ask = "sleep 1 | busybox timeout 3 busybox nc -w 2 {} 80"
    one(listen)
    wait_until(lambda: "reached" in one(ask.format("127.0.0.1")), "it listens")
    address = "busybox ip -o address show dev eth0 scope global"
    own, others = addresses(one(address)), addresses(two(address))

    assert own
    for each in own - others:  # an ordinary user's namespaces all have the same ones
        assert "reached" not in two(ask.format(f"[{each}]" if ":" in each else each))
    if own == others:
        assert reached(two, *own) == set()


def addresses(text: str) -> set[str]:
    return {
        part.split("/")[0].split(" ")[0]
        for part in text.replace("inet6", "inet").split("inet ")[1:]
    }


def test_a_transfer_outlives_pauses(start: Any, server: LabServer, http: Session) -> None:
    if server.uid:
        pytest.skip("an ordinary user's sandboxes cannot be paused here")
    execute = start()
    (record,) = http.get("/sandboxes").json()
    path = f"/sandboxes/{record['id']}"
    fetch = f"(echo BIG; sleep 3) | busybox nc {PUBLIC} 80 | (sleep 1; cat) | wc -c > got"
    execute(f"({fetch}; mv got whole) >/dev/null 2>&1 &")

    for _ in range(10):
        assert http.post(f"{path}/pause").json()["status"] == "paused"
        assert http.post(f"{path}/resume").json()["status"] == "running"

    wait_until(lambda: "3000000" in execute("cat whole 2>/dev/null"), "it came whole")
