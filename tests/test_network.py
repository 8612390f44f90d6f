"""Where a sandbox may connect to, tried from inside, on the host of a small internet of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time

import pytest

from tests import netlab
from tests.netlab import (
    HOST,
    HOST6,
    HOST_SECOND,
    METADATA,
    METADATA6,
    PRIVATE,
    PRIVATE6,
    PRIVATE_RESOLVER,
    PROBE,
    PUBLIC,
    PUBLIC6,
    RESOLVER,
    RESOLVER6,
    LabServer,
)
from tests.server import ORDINARY, all_pids, command_line, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root")

BRIDGE, BRIDGE6 = "172.17.0.1", "fd17::1"
LATER = "203.0.113.4"


@pytest.fixture(scope="module", params=[0, ORDINARY], ids=["root", "ordinary"])
def lab(request):
    """A lab with listeners on every address that its host has, and a bridge like dockerd's."""
    with netlab.Lab() as lab:
        lab.uid = request.param
        host = lab.host_name
        netlab.ip("-n", host, "link", "add", "docker0", "type", "bridge")
        netlab.ip("-n", host, "link", "set", "docker0", "up")
        netlab.ip("-n", host, "address", "add", f"{BRIDGE}/16", "dev", "docker0")
        netlab.ip("-n", host, "address", "add", f"{BRIDGE6}/64", "dev", "docker0", "nodad")
        lab.listen(host, "0.0.0.0", "::", ports="80,4000")
        yield lab


@pytest.fixture(scope="module")
def server(lab):
    with lab.host(), LabServer(lab, lab.uid) as running:
        yield running


@pytest.fixture
def root_server(server):
    if server.uid != 0:
        pytest.skip("of a root server's own way")


@pytest.fixture
def inside(http):
    """`inside(record, "shell line")`, and `inside.probe(record, name=[kind, address, port])`."""

    class Inside:
        def __call__(self, record, line, **fields):
            body = {"command": "sh", "args": ["-c", line], **fields}
            answer = http.post(f"/sandboxes/{record['id']}/execute", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        def probe(self, record, **wanted):
            body = {"command": "/usr/bin/python3", "args": ["-I", "-c", PROBE]}
            body["stdin"] = json.dumps(wanted)
            answer = http.post(f"/sandboxes/{record['id']}/execute", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["exit_code"] == 0, answer.json()
            return json.loads(answer.json()["stdout"])

        def reached(self, record, *addresses, port=80, kinds=("tcp", "udp"), **options):
            """Which of these addresses answered, over TCP or UDP."""
            ports = {"tcp": port, "udp": 4000 if port == 80 else port}
            wanted = {
                f"{kind} {address}": [kind, address, ports[kind], options]
                for kind in kinds
                for address in addresses
            }
            found = self.probe(record, **wanted)
            return sorted(name for name, said in found.items() if said.startswith("reached"))

    return Inside()


def everywhere(*addresses):
    return sorted(f"{kind} {address}" for kind in ("tcp", "udp") for address in addresses)


# --- what is open -------------------------------------------------------------------------------


def test_the_internet_is_reached_over_tcp_udp_and_both_families(sandbox, inside):
    record = sandbox()
    assert record["network"] == "egress"
    assert inside.reached(record, PUBLIC, PUBLIC6) == everywhere(PUBLIC, PUBLIC6)


def test_names_are_resolved_and_fetched(sandbox, inside):
    record = sandbox()
    got = inside(record, "curl -sS -m 5 http://example.test/")
    assert f"reached {PUBLIC}" in got["stdout"], got


def test_it_is_usable_before_the_first_hook_and_the_start_command(sandbox, inside):
    fetch = "curl -sS -m 2 http://example.test/ > /workspace/%s || echo failed > /workspace/%s"
    record = sandbox(
        setup_hooks=[fetch % ("hook", "hook")],
        start_command=fetch % ("start", "start") + "; sleep 1000",
    )
    wait_until(
        lambda: PUBLIC in inside(record, "cat /workspace/start 2>/dev/null")["stdout"], "fetched"
    )
    assert PUBLIC in inside(record, "cat /workspace/hook")["stdout"]


def test_much_passes_through_a_link_with_small_packets(sandbox, inside):
    program = (
        f"import socket;s=socket.create_connection(('{PUBLIC}',80),5);s.sendall(b'BIG');n=0\n"
        "while p:=s.recv(65536): n+=len(p)\nprint(n)"
    )
    got = inside(sandbox(), 'python3 -c "$P"', env={"P": program})
    assert got["stdout"].strip() == "3000000", got


@pytest.mark.usefixtures("root_server")
def test_ping_answers_without_a_capability(sandbox, inside):
    program = f"""
import socket
for family, kind, address, echo in (
    (socket.AF_INET, 1, "{PUBLIC}", b"\\10"), (socket.AF_INET6, 58, "{PUBLIC6}", b"\\200")):
    s = socket.socket(family, socket.SOCK_DGRAM, kind)
    s.settimeout(3)
    s.sendto(echo + bytes(7), (address, 0))
    print(s.recvfrom(100)[1][0])
"""
    got = inside(sandbox(), 'python3 -c "$P"', env={"P": program})
    assert got["stdout"].split() == [PUBLIC, PUBLIC6], got


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_any_port_can_be_bound_by_anybody(sandbox, inside, server, user):
    if server.uid and user != "root":
        pytest.skip("an ordinary user's sandbox has one user")
    program = "import socket;s=socket.create_server(('',80));print(s.getsockname()[1])"
    got = inside(sandbox(), 'python3 -c "$P"', env={"P": program}, user=user)
    assert got["stdout"] == "80\n", got


# --- what is closed -----------------------------------------------------------------------------


def test_private_networks_and_metadata_are_closed(sandbox, inside):
    closed = (*PRIVATE, *PRIVATE6, *METADATA, *METADATA6)
    assert inside.reached(sandbox(), *closed) == []


def test_no_other_spelling_opens_the_metadata_address(sandbox, inside):
    record = sandbox()
    spelt = ("2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "[::ffff:169.254.169.254]",
             "[::ffff:a9fe:a9fe]", "[::a9fe:a9fe]", "169.254.43518")  # fmt: skip
    got = inside(record, f"for a in {' '.join(spelt)}; do curl -gsS -m 1 http://$a/; done")
    assert "reached" not in got["stdout"], got
    mapped = tuple(f"::ffff:{one}" for one in (*METADATA, *PRIVATE, HOST))
    assert inside.reached(record, *mapped) == []


def test_no_address_of_the_hosts_answers(sandbox, inside):
    own = (HOST, HOST_SECOND, HOST6, BRIDGE, BRIDGE6, "127.0.0.1", "::1", "0.0.0.0", "::")
    assert inside.reached(sandbox(), *own, f"::ffff:{HOST}") == []


def test_an_address_that_the_host_gets_later_does_not_answer(lab, sandbox, inside):
    record = sandbox()
    host = lab.host_name
    netlab.ip("-n", host, "address", "add", f"{LATER}/24", "dev", "eth0")
    netlab.ip("-n", host, "address", "add", "198.51.100.99/32", "dev", "docker0")
    try:
        if lab.uid:  # an ordinary user's keeper has to notice; another interface's is kept at once
            assert inside.reached(record, "198.51.100.99") == []
            wait_until(lambda: inside.reached(record, LATER) == [], "closed", timeout=5)
        assert inside.reached(record, LATER, "198.51.100.99") == []
    finally:
        netlab.ip("-n", host, "address", "delete", f"{LATER}/24", "dev", "eth0")
        netlab.ip("-n", host, "address", "delete", "198.51.100.99/32", "dev", "docker0")


def test_no_published_port_of_the_hosts_answers(lab, sandbox, inside):
    """What dockerd does for `-p 80:80`, and a transparent proxy for everybody's port 80."""
    lab.nft(
        "table ip published { chain pre { type nat hook prerouting priority dstnat;\n"
        f"ip daddr {HOST} tcp dport 8080 dnat to 203.0.113.7:80\n"
        f"ip daddr 198.51.100.1 tcp dport 80 dnat to {BRIDGE}:80\n"
        "tcp dport 8081 redirect to :80\n}\n}\n"
    )
    try:
        record = sandbox()
        found = inside.probe(
            record,
            published=["tcp", HOST, 8080],
            elsewhere=["tcp", "198.51.100.1", 80],
            proxy=["tcp", PUBLIC, 8081],
        )
        assert not any(said.startswith("reached") for said in found.values()), found
    finally:
        lab.nft("delete table ip published")


def test_dns_goes_through_our_address_alone(sandbox, inside):
    record = sandbox()
    found = inside.reached(record, PUBLIC, RESOLVER, RESOLVER6, PRIVATE_RESOLVER, PUBLIC6, port=53)
    assert found == []
    assert inside.reached(record, PUBLIC, RESOLVER, RESOLVER6, port=853) == []
    ours = inside(record, "cat /etc/resolv.conf")["stdout"].split()[1]
    assert "udp " + ours in inside.reached(record, ours, port=53)
    assert inside.reached(record, ours, port=80) == []


def test_none_has_nothing_but_loopback(sandbox, inside, lab):
    record = sandbox(network="none")
    everything = (PUBLIC, PUBLIC6, HOST, HOST6, *METADATA, *PRIVATE, RESOLVER, "198.18.0.1")
    assert inside.reached(record, *everything, "127.0.0.1", "::1") == []
    assert inside.reached(record, RESOLVER, "198.18.0.1", port=53) == []
    links = inside(record, "cut -d: -f1 /proc/net/dev | tail -n +3")["stdout"].split()
    assert links == ["lo"]


@pytest.mark.parametrize("network", ["none", "egress"])
def test_nothing_else_of_a_network_is_to_be_had(sandbox, inside, network):
    program = r"""
import os, socket, struct
def tried(what, act):
    try: act()
    except OSError as error: print(what, "refused")
    else: print(what, "DONE")
tried("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
tried("raw6", lambda: socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58))
tried("packet", lambda: socket.socket(17, socket.SOCK_RAW, 0x300))
tried("netfilter", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12))
tried("the host's devices", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15))
def told(kind, flags, body):
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    s.send(struct.pack("IHHII", 16 + len(body), kind, flags | 5, 1, 0) + body)
    code = struct.unpack_from("i", s.recv(4096), 16)[0]
    if code: raise OSError(-code, "")
index = socket.if_nameindex()[-1][0]
tried("link down", lambda: told(16, 0, struct.pack("BxHiII", 0, 0, index, 0, 1)))
tried("address", lambda: told(20, 0x600, struct.pack("BBBBi", 2, 24, 0, 0, index)
      + struct.pack("HH4s", 8, 2, bytes([10, 0, 0, 1]))))
tried("route", lambda: told(24, 0x600, struct.pack("BBBBBBBBI", 2, 32, 0, 0, 254, 4, 253, 1, 0)
      + struct.pack("HH4sHHI", 8, 1, bytes([10, 1, 2, 3]), 8, 4, index)))
tried("neighbour", lambda: told(28, 0x500, struct.pack("BxxxiHBB", 2, index, 128, 0, 0)
      + struct.pack("HH4sHH6s2x", 8, 1, bytes([10, 1, 2, 3]), 10, 2, b"abcdef")))
for path in ("ip_forward", "conf/all/accept_redirects", "ip_unprivileged_port_start"):
    tried(path, lambda: open("/proc/sys/net/ipv4/" + path, "w").write("1"))
"""
    got = inside(sandbox(network=network), 'python3 -c "$P"', env={"P": program})
    assert "DONE" not in got["stdout"] and got["stdout"].count("refused") == 12, got


def test_abstract_sockets_of_the_host_are_not_seen(lab, sandbox, inside):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0heyvm-test-{lab.name}")
    listener.listen()
    line = f"import socket;socket.socket(socket.AF_UNIX).connect('\\0heyvm-test-{lab.name}')"
    with listener:
        for network in ("none", "egress"):
            got = inside(sandbox(network=network), 'python3 -c "$P"', env={"P": line})
            assert "refused" in got["stderr"], got


# --- other sandboxes ----------------------------------------------------------------------------


def test_a_neighbour_is_not_reached_nor_used_as_a_relay(server, sandbox, inside):
    listen = (
        "import socket\ns=socket.create_server(('::',7000),family=socket.AF_INET6,"
        "dualstack_ipv6=True)\nprint('up',flush=True)\n"
        "while 1: c,_=s.accept(); c.sendall(b'neighbour'); c.close()"
    )
    closed = sandbox(network={"allow": ["198.51.100.0/24"]})
    relay = sandbox(start_command=f'python3 -c "{listen}"')
    wait_until(
        lambda: inside.reached(relay, "127.0.0.1", port=7000, kinds=["tcp"]), "the relay listens"
    )
    own = inside(relay, "ip -o address show dev eth0 scope global")["stdout"]
    addresses = re.findall(r"inet6? ([0-9a-f.:]+)/", own)
    assert len(addresses) == 2
    if server.uid == 0:
        # An ordinary user's namespaces all have the same addresses: there, this is one's own.
        assert inside.reached(closed, *addresses, port=7000, kinds=["tcp"]) == []
    gateways = re.findall(r"via ([0-9a-f.:]+)", inside(relay, "ip route; ip -6 route")["stdout"])
    assert inside.reached(closed, *gateways, port=7000) == []
    with server.lab.host():
        for address in addresses if server.uid == 0 else []:
            with pytest.raises(OSError), socket.create_connection((address, 7000), 1):
                pass


# --- allow and deny -----------------------------------------------------------------------------


def test_an_allow_opens_a_private_network_and_closes_the_rest(sandbox, inside):
    record = sandbox(network={"allow": ["10.1.0.0/16", "fd12:3456::/32"]})
    assert record["network"]["allow"] == ["10.1.0.0/16", "fd12:3456::/32"]
    wanted = ("10.1.2.3", "fd12:3456::1")
    others = (PUBLIC, PUBLIC6, *PRIVATE[1:], *METADATA, *METADATA6, HOST, HOST6, BRIDGE)
    assert inside.reached(record, *wanted, *others) == everywhere(*wanted)


def test_deny_wins(sandbox, inside):
    network = {"allow": ["10.0.0.0/8", "203.0.113.0/24"], "deny": ["10.1.2.0/24"]}
    record = sandbox(network=network)
    found = inside.reached(record, PUBLIC, "10.1.2.3", PRIVATE_RESOLVER)
    assert found == everywhere(PUBLIC, PRIVATE_RESOLVER)


def test_a_deny_alone_is_taken_from_the_default(sandbox, inside):
    record = sandbox(network={"deny": ["203.0.113.7/32", "2001:db8:7::7/128"]})
    found = inside.reached(record, PUBLIC, RESOLVER, PUBLIC6, RESOLVER6, "10.1.2.3")
    assert found == everywhere(RESOLVER, RESOLVER6)


def test_nothing_opens_the_host_the_link_and_the_metadata_addresses(sandbox, inside):
    wide = ["0.0.0.0/0", "::/0", "169.254.0.0/16", "127.0.0.0/8", "172.16.0.0/12"]
    wide += [f"{one}/32" for one in (*METADATA, HOST, HOST_SECOND)] + [f"{HOST6}/128"]
    record = sandbox(network={"allow": wide})
    closed = (*METADATA, *METADATA6, HOST, HOST_SECOND, HOST6, BRIDGE, "127.0.0.1", "10.1.2.3")
    found = inside.reached(record, *closed, PUBLIC, PUBLIC6, "172.16.5.5")
    assert found == everywhere(PUBLIC, PUBLIC6, "172.16.5.5")


def test_rules_of_its_own_hold_after_a_restart(sandbox, inside, http):
    record = sandbox(network={"allow": ["10.1.0.0/16"]})
    assert http.post(f"/sandboxes/{record['id']}/restart").status_code == 200
    assert inside.reached(record, "10.1.2.3", PUBLIC, HOST) == everywhere("10.1.2.3")


# --- tricks -------------------------------------------------------------------------------------

TRICKS = [
    {"device": "eth0"},
    {"unicast_if": "eth0"},
    {"pktinfo": "eth0"},
    {"dont_route": True},
    {"device": "eth0", "dont_route": True},
]


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: "+".join(trick))
def test_a_socket_that_picks_the_interface_gets_no_further(sandbox, inside, trick):
    record = sandbox()
    closed = (*PRIVATE, *PRIVATE6, *METADATA, *METADATA6, HOST, HOST_SECOND, HOST6, BRIDGE)
    assert inside.reached(record, *closed, **trick) == []
    if "dont_route" not in trick:
        kinds = ["udp"] if "pktinfo" in trick else ["tcp", "udp"]
        open_ = inside.reached(record, PUBLIC, PUBLIC6, kinds=kinds, **trick)
        assert open_ == [f"{kind} {one}" for kind in kinds for one in sorted((PUBLIC, PUBLIC6))], (
            "no trick"
        )


def test_a_source_route_leads_nowhere(sandbox, inside):
    record = sandbox()
    gateway = re.search(r"via (\S+)", inside(record, "ip route")["stdout"])[1]
    for hops in ((HOST,), (gateway,), (PUBLIC,)):
        found = inside.reached(record, "10.1.2.3", HOST, source_route=hops)
        assert found == []


def test_nobody_sends_with_anothers_address(lab, sandbox, inside):
    record = sandbox()
    for source in ("2001:db8:bad::1", HOST6, PUBLIC6, "fd68::1"):
        assert inside.reached(record, PUBLIC6, **{"from": source}) == []
    for source in (HOST, "203.0.113.99", "198.18.0.1"):
        assert inside.reached(record, PUBLIC, **{"from": source}) == []


# --- a root server's machine --------------------------------------------------------------------


@pytest.mark.usefixtures("root_server")
def test_a_network_costs_no_process(server, sandbox):
    sandbox(network="none")
    before = len(server.sandbox_pids())
    sandbox(network="none")
    alone = len(server.sandbox_pids()) - before
    before = len(server.sandbox_pids())
    sandbox()
    assert len(server.sandbox_pids()) - before == alone


@pytest.mark.usefixtures("root_server")
def test_rules_that_somebody_flushed_come_back_and_private_networks_stay_closed(
    lab, server, sandbox, inside
):
    record, own = sandbox(), sandbox(network={"allow": ["10.1.0.0/16"]})
    server_keeper = [pid for pid in all_pids() if b"heyvm.keeper" in command_line(pid)]
    keeper = [pid for pid in server_keeper if pid in server.server_pids()]
    for pid in keeper:
        os.kill(pid, signal.SIGSTOP)
    try:
        lab.nft("flush ruleset")
        closed = (*PRIVATE, *PRIVATE6, *METADATA, *METADATA6, HOST, HOST_SECOND, HOST6, BRIDGE)
        assert inside.reached(record, *closed) == []
        assert inside.reached(record, *closed, device="eth0") == []
        assert inside.reached(record, *closed, unicast_if="eth0") == []
        assert inside.reached(record, *closed, pktinfo="eth0") == []
    finally:
        for pid in keeper:
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: inside.reached(record, PUBLIC) == everywhere(PUBLIC), "restored", timeout=6)
    wait_until(lambda: inside.reached(own, "10.1.2.3") == everywhere("10.1.2.3"), "own", timeout=6)
    assert inside.reached(own, PUBLIC) == []


@pytest.mark.usefixtures("root_server")
def test_a_rule_that_somebody_removed_comes_back(lab, server, sandbox, inside):
    sandbox()
    table = f"inet heyvm_{server.mark}"
    time.sleep(1.5)  # the keeper has seen them whole
    lab.nft(f"flush chain {table} default_rules")
    wait_until(
        lambda: "192.168.0.0/16" in lab.nft(f"list chain {table} default_rules"),
        "the keeper has put it back",
        timeout=6,
    )


@pytest.mark.usefixtures("root_server")
def test_the_machine_becomes_nobodys_router(lab, sandbox):
    """Somebody behind the host is not reached through it because there are sandboxes."""
    sandbox()
    name = f"{lab.name}l"
    netlab.ip("netns", "add", name)
    try:
        netlab.ip("link", "add", "lan0", "netns", lab.host_name, "type", "veth",
                  "peer", "name", "eth0", "netns", name)  # fmt: skip
        for one, link, end in ((lab.host_name, "lan0", 1), (name, "eth0", 2)):
            netlab.ip("-n", one, "address", "add", f"192.168.50.{end}/24", "dev", link)
            netlab.ip("-n", one, "address", "add", f"2001:db8:50::{end}/64", "dev", link, "nodad")
            netlab.ip("-n", one, "link", "set", link, "up")
        netlab.ip("-n", name, "route", "add", "default", "via", "192.168.50.1")
        netlab.ip("-n", name, "route", "add", "default", "via", "2001:db8:50::1")
        netlab.ip("-n", lab.net_name, "route", "add", "192.168.50.0/24", "via", HOST)
        netlab.ip("-n", lab.net_name, "route", "add", "2001:db8:50::/64", "via", HOST6)
        lab.listen(name, "0.0.0.0", ports="80")
        time.sleep(1.5)  # a round of the keeper
        with netlab.standing_in(f"/run/netns/{lab.net_name}"):
            with pytest.raises(OSError), socket.create_connection(("192.168.50.2", 80), 1.5):
                pass
    finally:
        netlab.ip("-n", lab.net_name, "route", "delete", "192.168.50.0/24")
        netlab.ip("-n", lab.net_name, "route", "delete", "2001:db8:50::/64")
        netlab.ip("netns", "delete", name)


@pytest.mark.usefixtures("root_server")
@pytest.mark.skipif(shutil.which("iptables") is None, reason="iptables is not installed")
def test_another_firewalls_drop_is_passed(lab, sandbox, inside):
    """dockerd and ufw leave the FORWARD chain with the policy DROP."""
    record = sandbox()
    for tool in ("iptables", "ip6tables"):
        lab.run(lab.host_name, tool, "-P", "FORWARD", "DROP")
    try:
        wanted = everywhere(PUBLIC, PUBLIC6)
        wait_until(lambda: inside.reached(record, PUBLIC, PUBLIC6) == wanted, "passed", timeout=8)
        assert inside.reached(record, "10.1.2.3", HOST) == []
        lab.run(lab.host_name, "iptables", "-F", "FORWARD")
        wait_until(lambda: inside.reached(record, PUBLIC) == everywhere(PUBLIC), "again", timeout=8)
    finally:
        for tool in ("iptables", "ip6tables"):
            lab.run(lab.host_name, tool, "-P", "FORWARD", "ACCEPT")


@pytest.mark.usefixtures("root_server")
def test_fifty_quick_restarts_each_have_their_network(http, sandbox, inside, server):
    record = sandbox()
    for _ in range(50):
        answer = http.post(f"/sandboxes/{record['id']}/restart")
        assert answer.status_code == 200, answer.text
    assert inside.reached(record, PUBLIC) == everywhere(PUBLIC)
    wait_until(lambda: len(server.interfaces()) == 1, "the others are reaped")


@pytest.mark.usefixtures("root_server")
def test_a_killed_launcher_leaves_no_interface(http, sandbox, server):
    sandbox()
    for pid in server.launcher_pids():
        os.kill(pid, signal.SIGKILL)
    record = sandbox()
    assert http.delete(f"/sandboxes/{record['id']}").status_code == 204
    wait_until(lambda: len(server.interfaces()) == 1, "one sandbox, one interface")


# --- an ordinary user's pasta -------------------------------------------------------------------


@pytest.fixture
def pastas(server):
    if server.uid == 0:
        pytest.skip("of an ordinary user's own way")

    def find(record):
        title = f"heyvm-pasta:{server.mark}:{record['id']}:".encode()
        return [pid for pid in all_pids() if command_line(pid).startswith(title)]

    return find


def test_a_pasta_that_dies_is_attached_anew(pastas, sandbox, inside):
    record = sandbox()
    (pid,) = pastas(record)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pastas(record), "another is there", timeout=8)
    wait_until(lambda: inside.reached(record, PUBLIC) == everywhere(PUBLIC), "it serves", timeout=8)
    assert inside.reached(record, HOST, "10.1.2.3") == []


def test_a_pasta_ends_with_its_sandbox(pastas, sandbox, http):
    record = sandbox()
    # What it starts looks like another one for a moment.
    wait_until(lambda: len(pastas(record)) == 1, "there is one")
    assert http.post(f"/sandboxes/{record['id']}/stop").status_code == 200
    assert pastas(record) == []


def test_a_pasta_whose_sandbox_was_killed_is_found(pastas, sandbox, server):
    record = sandbox()
    for pid in server.sandbox_pids():
        if record["id"].encode() in command_line(pid):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pastas(record) == [], "swept", timeout=10)


# --- taking it back -----------------------------------------------------------------------------

SWITCHES = (
    *("net.ipv4.conf.eth0.forwarding", "net.ipv6.conf.all.forwarding"),
    "net.ipv6.conf.eth0.accept_ra",
)


def test_forwarding_is_as_it_was_when_the_last_table_is_gone():
    with netlab.Lab() as lab:
        lab.sysctl(lab.host_name, "net.ipv6.conf.eth0.accept_ra=1")

        def found():
            return lab.run(lab.host_name, "sysctl", "-n", *SWITCHES).split()

        assert found() == ["0", "0", "1"]
        with lab.host(), LabServer(lab) as server, LabServer(lab) as other:
            for one in (server, other):
                with one.http() as http:
                    assert http.post("/sandboxes", json={}).status_code == 201
            assert found() == ["1", "1", "2"]
            lab.sysctl(lab.host_name, f"{SWITCHES[0]}=0", f"{SWITCHES[1]}=0")
            wait_until(lambda: found() == ["1", "1", "2"], "the keepers have seen it", timeout=6)
            server.delete_all()
            other.delete_all()
            other.stop()
            other.table().remove()
            assert found() == ["1", "1", "2"]  # the first still needs it
            server.stop()
            server.table().remove()
            assert found() == ["0", "0", "1"]
            server.start()
            other.start()
