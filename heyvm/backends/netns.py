"""A sandbox's network namespace, made by the launcher: rtnetlink by hand, standard library only.

It imports nothing of the server. Where the launcher is the host's root, the namespace belongs to
the host, so that no capability that somebody inside has or gets reaches it. What a sandbox may
connect to is decided on the host's side (`network.py`); the routes made here are a second fence.
For an ordinary user the rules lie in the namespace itself, and pasta carries the packets.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterable
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_EXCL, NLM_F_CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_NEWROUTE, RTM_NEWNEIGH = 20, 24, 28
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU = 1, 3, 4
IFLA_LINKINFO, IFLA_AF_SPEC, IFLA_NET_NS_FD = 18, 26, 28
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFLA_INET_CONF, IFLA_INET6_ADDR_GEN_MODE = 1, 8
ADDR_GEN_NONE = b"\1"
# linux/ip.h, IPV4_DEVCONF_*. No ARP reply but to nobody (arp_ignore 8): both ends know each other,
# and who claims that an address is on this link gets no further.
HOST_END = {1: 1, 4: 0, 6: 0, 8: 1, 9: 0, 19: 8, 23: 0}
ROUTE_LOCALNET = 26
IFA_LOCAL, IFA_ADDRESS, IFA_F_NODAD, IFA_F_PERMANENT = 2, 1, 0x02, 0x80
NDA_DST, NDA_LLADDR, NUD_PERMANENT = 1, 2, 0x80
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY = 1, 4, 5, 6
RT_TABLE_MAIN, RTPROT_STATIC, RTN_UNICAST, RTN_PROHIBIT = 254, 4, 1, 8
SIOCGIFINDEX, SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8933, 0x8913, 0x8914, 0x1
INSIDE = "eth0"
REAP_TIMEOUT_S = 10.0
PASTA_TIMEOUT_S = 10.0

Spec = dict[str, Any]
libc = ctypes.CDLL(None, use_errno=True)


AT_ONCE = 64


class Netlink:
    """One netlink socket, of the network namespace in which it is made."""

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_NETLINK, kind, protocol)
        # A kernel that does not answer is not waited for.
        self._sock.settimeout(20.0)
        self._number = 0

    def close(self) -> None:
        self._sock.close()

    def index(self, name: str) -> int:
        """The index of an interface in the socket's namespace (netdevice(7))."""
        request = struct.pack("16sI20x", name.encode(), 0)
        return int(struct.unpack_from("I", fcntl.ioctl(self._sock, SIOCGIFINDEX, request), 16)[0])

    def tell(self, *messages: tuple[int, int, bytes]) -> list[int]:
        """Send `(type, flags, body)`; the errno of each, 0 where it was done."""
        told: list[int] = []
        # Not all at once: the socket has room for so many answers (socket(7), SO_RCVBUF).
        for at in range(0, len(messages), AT_ONCE):
            told += self._tell(*messages[at : at + AT_ONCE])
        return told

    def _tell(self, *messages: tuple[int, int, bytes]) -> list[int]:
        first = self._number + 1
        data = b"".join(self._packed(*one) for one in messages)
        self._sock.send(data)
        answers: dict[int, int] = {}
        while len(answers) < len(messages):
            for kind, number, body in self._receive():
                if kind == NLMSG_ERROR and number >= first:
                    answers[number] = -struct.unpack_from("i", body)[0]
        return [answers[number] for number in sorted(answers)]

    def do(self, *messages: tuple[int, int, bytes]) -> None:
        """The same, where all must be done."""
        for number in self.tell(*messages):
            if number:
                raise OSError(number, f"network of the sandbox: {os.strerror(number)}")

    def ask(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        """The bodies of the answers to a question. Raises OSError where the kernel says no."""
        self._sock.send(self._packed(kind, flags, body))
        found: list[bytes] = []
        while True:
            for kind_, number, answer in self._receive():
                if number != self._number:
                    continue
                if kind_ in (NLMSG_ERROR, NLMSG_DONE):
                    code = -struct.unpack_from("i", answer)[0] if len(answer) >= 4 else 0
                    if code:
                        raise OSError(code, os.strerror(code))
                    return found
                found.append(answer)

    def _packed(self, kind: int, flags: int, body: bytes) -> bytes:
        self._number += 1
        flags |= NLM_F_REQUEST | NLM_F_ACK
        body += bytes(-len(body) % 4)
        return struct.pack("IHHII", 16 + len(body), kind, flags, self._number, 0) + body

    def _receive(self) -> Iterable[tuple[int, int, bytes]]:
        data = self._sock.recv(1 << 18)
        while len(data) >= 16:
            length, kind, _, number, _ = struct.unpack_from("IHHII", data)
            yield kind, number, data[16:length]
            data = data[(length + 3) & ~3 :]


def attribute(kind: int, value: bytes | int | str) -> bytes:
    if isinstance(value, int):
        value = struct.pack("I", value)
    elif isinstance(value, str):
        value = value.encode() + b"\0"
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("HH", data)
        found[kind & 0x3FFF] = data[4:length]
        data = data[(max(length, 4) + 3) & ~3 :]
    return found


def link(index: int, rest: bytes, *, flags: int = 0) -> bytes:
    return struct.pack("BxHiII", socket.AF_UNSPEC, 0, index, flags, flags) + rest


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def packed(address: str) -> bytes:
    return socket.inet_pton(family_of(address), address)


def address_message(index: int, address: str, bits: int) -> tuple[int, int, bytes]:
    head = struct.pack("BBBBi", family_of(address), bits, IFA_F_NODAD | IFA_F_PERMANENT, 0, index)
    both = attribute(IFA_LOCAL, packed(address)) + attribute(IFA_ADDRESS, packed(address))
    return RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, head + both


def neighbour_message(index: int, address: str, mac: bytes) -> tuple[int, int, bytes]:
    head = struct.pack("BxxxiHBB", family_of(address), index, NUD_PERMANENT, 0, 0)
    body = attribute(NDA_DST, packed(address)) + attribute(NDA_LLADDR, mac)
    return RTM_NEWNEIGH, NLM_F_CREATE, head + body


def route_message(
    network: str, *, index: int = 0, gateway: str = "", metric: int = 0
) -> tuple[int, int, bytes]:
    """A route through `gateway`, or onto the link; without `index` one that refuses."""
    address, _, bits = network.partition("/")
    kind = RTN_UNICAST if index else RTN_PROHIBIT
    scope = 253 if index and not gateway and ":" not in address else 0  # RT_SCOPE_LINK
    head = struct.pack(
        "BBBBBBBBI",
        *(family_of(address), int(bits), 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, kind, 0),
    )
    body = attribute(RTA_DST, packed(address)) if int(bits) else b""
    if gateway:
        body += attribute(RTA_GATEWAY, packed(gateway))
    if index:
        body += attribute(RTA_OIF, index)
    if metric:
        body += attribute(RTA_PRIORITY, metric)
    return RTM_NEWROUTE, NLM_F_CREATE, head + body


class Network:
    """The network that `spec["network"]` asks for: None, or what `Networks.specification` gives.

    Made while the launcher is still in the host's namespaces; `make` then enters the new one.
    """

    def __init__(self, spec: Spec | None) -> None:
        self.spec = spec or {}
        self.host = Netlink() if "name" in self.spec else None
        self.pasta = Pasta(self.spec, os.getpid()) if self.spec.get("pasta") else None

    def make(self) -> None:
        """Leave for a network namespace of its own: all of it usable when this returns."""
        if libc.unshare(CLONE_NEWNET) < 0:
            raise failure("unshare network")
        settings()
        loopback_up()
        if self.host is not None:
            connect(self.spec, self.host)
            self.host.close()
        if "rules" in self.spec:
            set_rules(self.spec)
        if self.pasta is not None:
            self.pasta.attach()


def renew(spec: Spec, target: int) -> None:
    """Give the running sandbox whose process is `target` new rules and, where `spec` has one, the
    pasta that it has lost."""
    pasta = Pasta(spec, target) if spec["pasta"] else None
    for name, flag in (("user", CLONE_NEWUSER), ("net", CLONE_NEWNET)):
        namespace = os.open(f"/proc/{target}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        if libc.setns(namespace, flag) < 0:
            raise failure(f"setns {name}")
        os.close(namespace)
    set_rules(spec)
    if pasta is not None:
        pasta.attach()


def failure(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def settings() -> None:
    """What is the namespace's own below /proc/sys/net. Those that a kernel lacks do not matter."""
    for name, value in (
        ("ipv4/ip_unprivileged_port_start", "0"),
        # The most that ping(8) without a capability can be given (GROUP_RANGE_MAX).
        ("ipv4/ping_group_range", "0 2147483647"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv6/conf/default/addr_gen_mode", "1"),
        ("ipv4/conf/all/accept_redirects", "0"),
        ("ipv4/conf/default/accept_redirects", "0"),
        ("ipv6/conf/default/accept_redirects", "0"),
    ):
        try:
            with open(f"/proc/sys/net/{name}", "w") as file:
                file.write(value)
        except OSError:
            pass


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        request = bytearray(struct.pack("16s24x", b"lo"))
        fcntl.ioctl(sock, SIOCGIFFLAGS, request, True)
        (flags,) = struct.unpack_from("h", request, 16)
        struct.pack_into("h", request, 16, flags | IFF_UP)
        fcntl.ioctl(sock, SIOCSIFFLAGS, request, True)


def connect(spec: Spec, host: Netlink) -> None:
    """Join this namespace to the host's: a pair of interfaces that ends with the namespace.

    The host's end is without an address until everything inside is in place.
    """
    if not spec["address6"]:
        with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as file:
            file.write("1")
    make_pair(spec, host)
    inside = Netlink()
    furnish_inside(spec, inside, inside.index(INSIDE))
    inside.close()
    furnish_host(spec, host, host.index(spec["name"]))


def make_pair(spec: Spec, host: Netlink) -> None:
    here = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    peer = (
        attribute(IFLA_IFNAME, INSIDE)
        + attribute(IFLA_ADDRESS, bytes.fromhex(spec["mac_inside"]))
        + attribute(IFLA_MTU, spec["mtu"])
        + attribute(IFLA_NET_NS_FD, here)
    )
    info = attribute(IFLA_INFO_KIND, "veth") + attribute(
        IFLA_INFO_DATA, attribute(VETH_INFO_PEER, link(0, peer))
    )
    pair = link(
        0,
        attribute(IFLA_IFNAME, spec["name"])
        + attribute(IFLA_ADDRESS, bytes.fromhex(spec["mac_host"]))
        + attribute(IFLA_MTU, spec["mtu"])
        + attribute(IFLA_LINKINFO, info),
    )
    end = time.monotonic() + REAP_TIMEOUT_S
    while True:
        # What an earlier namespace of this slot has left; the kernel takes a while to reap it.
        gone = [(RTM_DELLINK, 0, link(0, attribute(IFLA_IFNAME, name))) for name in spec["names"]]
        for number in host.tell(*gone):
            if number not in (0, errno.ENODEV):
                raise OSError(number, f"network of the sandbox: {os.strerror(number)}")
        (number,) = host.tell((RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, pair))
        if number == 0:
            break
        if number not in (errno.EEXIST, errno.ENODEV) or time.monotonic() > end:
            raise OSError(number, f"network of the sandbox: {os.strerror(number)}")
        time.sleep(0.005)
    os.close(here)


def furnish_inside(spec: Spec, inside: Netlink, index: int) -> None:
    messages = [
        (RTM_NEWLINK, 0, link(index, b"", flags=IFF_UP)),
        *furniture(spec, index, own="address", other="gateway", mac=spec["mac_host"]),
    ]
    for network in spec["closed"]:
        messages.append(route_message(network))
        if ":" in network and spec["address6"]:
            # A socket bound to the interface sees no route that refuses: it is let onto the link,
            # where nobody answers (for IPv4 the kernel does that by itself).
            messages.append(route_message(network, index=index, metric=4096))
    families = ("4", "6") if spec["address6"] else ("4",)
    ask_for_no_neighbour(families)
    for family in families:
        gateway = spec["gateway" + family]
        for network in ("0.0.0.0/0" if family == "4" else "::/0", *spec["open" + family]):
            messages.append(route_message(network, index=index, gateway=gateway))
    inside.do(*(one for one in messages if spec["address6"] or not speaks_v6(one)))


def ask_for_no_neighbour(families: Iterable[str]) -> None:
    """Both ends know each other. The kernel's table of neighbours (1024) is one for all namespaces:
    those that a socket bound to the interface looks for would fill it, were they waited for."""
    for family in families:
        for name in ("mcast_solicit", "app_solicit"):
            with open(f"/proc/sys/net/ipv{family}/neigh/{INSIDE}/{name}", "w") as file:
                file.write("0")


def speaks_v6(message: tuple[int, int, bytes]) -> bool:
    return message[2][0] == socket.AF_INET6


def furniture(
    spec: Spec, index: int, *, own: str, other: str, mac: str
) -> list[tuple[int, int, bytes]]:
    """Addresses of one end, and the way to the other: permanent, so that nobody asks for it."""
    messages = []
    for family, bits in (("4", 31), ("6", 127)):
        if spec["address6"] or family == "4":
            messages.append(address_message(index, spec[own + family], bits))
            messages.append(neighbour_message(index, spec[other + family], bytes.fromhex(mac)))
    return messages


def furnish_host(spec: Spec, host: Netlink, index: int) -> None:
    conf = HOST_END | {ROUTE_LOCALNET: int(spec["route_localnet"])}
    v4 = attribute(IFLA_INET_CONF, b"".join(attribute(key, one) for key, one in conf.items()))
    v6 = attribute(IFLA_INET6_ADDR_GEN_MODE, ADDR_GEN_NONE)
    both = attribute(socket.AF_INET, v4) + attribute(socket.AF_INET6, v6)
    plain = link(index, attribute(IFLA_AF_SPEC, attribute(socket.AF_INET, v4)))
    if os.path.exists("/proc/sys/net/ipv6"):
        plain = link(index, attribute(IFLA_AF_SPEC, both))
    host.do(
        (RTM_NEWLINK, 0, plain),
        (RTM_NEWLINK, 0, link(index, b"", flags=IFF_UP)),
        *furniture(spec, index, own="gateway", other="address", mac=spec["mac_inside"]),
    )


def set_rules(spec: Spec) -> None:
    """The rules of this namespace: whole or not at all, while it is still ours to change."""
    done = subprocess.run(
        [spec["nft"], "-f", "-"], input=spec["rules"].encode(), capture_output=True, env={}
    )
    if done.returncode:
        raise OSError(errno.EPERM, "nft: " + done.stderr.decode(errors="replace")[:300])


class Pasta:
    """The process that carries an ordinary user's packets: forked now, in the host's namespaces,
    attached to `target`'s when they are there and have their rules.

    Its pid is in `spec["note"]` before it is attached to anything; what it is called names the
    target too, so that one whose sandbox is gone is found. It is in the sandbox's cgroups: born
    there with the box, or moved to `spec["groups"]` before it is pasta.
    """

    def __init__(self, spec: Spec, target: int) -> None:
        self.spec = spec
        self.target = target
        go, self.go = os.pipe()
        self.failed, failed = os.pipe()
        middle = os.fork()
        if middle == 0:
            # Or it would hold the end that tells it that the launcher is gone.
            os.close(self.go)
            os.close(self.failed)
            # Nobody's child: bubblewrap, which the caller becomes, knows of no other than its own.
            if os.fork() == 0:
                self._become(go, failed)
            os._exit(0)
        os.close(go)
        os.close(failed)
        os.waitpid(middle, 0)

    def _become(self, go: int, failed: int) -> None:
        try:
            os.setsid()
            for path in self.spec.get("groups", ()):
                with open(f"{path}/cgroup.procs", "w") as file:
                    file.write("0")
            write_note(self.spec["note"], os.getpid())
            if os.read(go, 1) == b"1":
                exec_pasta(self.spec, self.target, failed)
        except BaseException as error:  # noqa: BLE001 - said to whoever waits, then ended
            os.write(failed, str(error).encode()[:500])
        os._exit(1)

    def attach(self) -> None:
        """Back when the interface that it makes in this namespace has its addresses."""
        os.write(self.go, b"1")
        os.close(self.go)
        os.set_blocking(self.failed, False)
        end = time.monotonic() + PASTA_TIMEOUT_S
        said = b""
        while not has_address(self.spec["families"]):
            if time.monotonic() > end:
                raise OSError(errno.ETIMEDOUT, "pasta did not bring up the network")
            try:
                part = os.read(self.failed, 500)
            except BlockingIOError:
                time.sleep(0.002)
                continue
            said += part  # it complains of much that is no fault
            if not part:
                raise OSError(errno.EIO, "pasta ended: " + said.decode(errors="replace").strip())
        # Pasta inherits that SIGPIPE is ignored.
        os.close(self.failed)


def write_note(path: str, pid: int) -> None:
    """`pid start`, whole or not at all."""
    with open(path + ".new", "w") as file:
        file.write(f"{pid} {started(pid)}")
    os.rename(path + ".new", path)


def started(pid: int) -> int:
    """When it began, in clock ticks since the boot (proc(5), stat, field 22)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b") ")[2].split()[19])


def exec_pasta(spec: Spec, target: int, failed: int) -> None:
    """Become the pasta of `target`'s namespaces; what it complains of goes to `failed`."""
    null = os.open("/dev/null", os.O_RDWR)
    for number, source in ((0, null), (1, null), (2, failed)):
        os.dup2(source, number)
    os.closerange(3, 4096)
    title = f"{spec['title']}:{target}:{started(target)}"
    names = ["--userns", f"/proc/{target}/ns/user", "--netns", f"/proc/{target}/ns/net"]
    os.execve(spec["pasta"], [title, *spec["arguments"], *names], {})


def has_address(families: list[int]) -> bool:
    """Whether some interface besides loopback has a usable address of each family."""
    netlink = Netlink()
    try:
        return all(_family_is_up(netlink, family) for family in families)
    finally:
        netlink.close()


def _family_is_up(netlink: Netlink, family: int) -> bool:
    body = struct.pack("BBBBi", family, 0, 0, 0, 0)
    for one in netlink.ask(22, NLM_F_DUMP, body):  # RTM_GETADDR
        _, _, flags, scope, index = struct.unpack_from("BBBBi", one)
        if index > 1 and scope == 0 and not flags & 0x48:  # not tentative, not failed
            return True
    return False
