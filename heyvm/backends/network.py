"""What sandboxes may connect to, and the host's side of it: nftables, forwarding, pasta.

One table for each data directory, whole or not at all, written by whoever needs it first. What is
set up for one sandbox ends with its network namespace; only rules of its own are taken back.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heyvm.backends import netns, pids, ranges
from heyvm.errors import BackendFailed, Unavailable
from heyvm.models import Network, Sandbox
from heyvm.settings import Settings

NONE = Network("none")
KEPT_ADDRESSES = 8  # of the subnet: those at which DNS answers, and room for more
MOST_RESOLVERS = 3  # resolv.conf(5), MAXNS
MOST_FLOWS = 16384  # of one sandbox; the kernel's table of them is the whole machine's
TOOL_TIMEOUT_S = 20.0
FORWARDING6 = "ipv6/conf/all/forwarding"
PATHS = "/usr/sbin:/usr/bin:/sbin:/bin"
ULA = "fd68::/16"  # the sandboxes' own IPv6 addresses, of every server: fd68:<mark>::/48
# Written out: what the standard library calls private holds 192.0.2.0/24, 198.51.100.0/24 and
# 203.0.113.0/24 as well, where package mirrors live.
PRIVATE4 = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),
)
# Whatever is allowed: this host, this link, many hosts, and where clouds tell a machine's secrets
# (Alibaba, Oracle, Azure; AWS and GCP over IPv6; 169.254.169.254 is link-local).
NEVER4 = (
    *("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),
    *("100.100.100.200/32", "192.0.0.192/32", "168.63.129.16/32"),
)
# ::/96 holds loopback and "IPv4-compatible" addresses; 64:ff9b:1::/48 is NAT64 of one's own site.
NEVER6 = (
    "::/96",
    "::ffff:0:0/96",
    "fe80::/10",
    "ff00::/8",
    "fd00:ec2::254/128",
    "fd20:ce::254/128",
)
PRIVATE6 = ("fc00::/7", "64:ff9b:1::/48")


def as_v6(network: str) -> tuple[str, ...]:
    """The IPv6 addresses that are this IPv4 network to a translator: NAT64, 6to4."""
    v4 = ipaddress.IPv4Network(network)
    number, bits = int(v4.network_address), v4.prefixlen
    nat64 = ipaddress.IPv6Network(((0x64FF9B << 96) | number, 96 + bits))
    six_to_four = ipaddress.IPv6Network(((0x2002 << 112) | (number << 80), 16 + bits))
    return str(nat64), str(six_to_four)


NEVER = (*NEVER4, *NEVER6, *(one for v4 in NEVER4 for one in as_v6(v4)))
PRIVATE = (*PRIVATE4, *PRIVATE6, *(one for v4 in PRIVATE4 for one in as_v6(v4)))


@dataclass(frozen=True)
class Policy:
    """A sandbox's rules in the order in which they are looked at: `closed` refuses, `opened` (of
    the private networks) accepts, the private networks refuse, `allowed` accepts, `rest` decides.

    An `allow` opens a private network only where it lies within it: 0.0.0.0/0 opens none.
    """

    closed: tuple[str, ...]
    opened: tuple[str, ...]
    allowed: tuple[str, ...]
    rest: bool

    @classmethod
    def of(cls, network: Network) -> Policy:
        own = tuple(one for one in network.allow if within(one, PRIVATE))
        others = tuple(one for one in network.allow if one not in own)
        return cls(network.deny, own, others, not network.allow)

    def rules(self) -> list[str]:
        return [
            *refuse(self.closed),
            *accept(self.opened),
            *refuse(PRIVATE),
            *accept(self.allowed),
            "accept" if self.rest else REJECT,
        ]

    def fence(self) -> tuple[list[str], list[str]]:
        """For the routes inside: what is refused there, and what is open again within that."""
        opened = [one for one in self.opened if not within(one, NEVER)]
        return [one for one in dict.fromkeys((*NEVER, *PRIVATE)) if one not in opened], opened


REJECT = "reject with icmpx admin-prohibited"


def within(network: str, others: Iterable[str]) -> bool:
    one = ipaddress.ip_network(network)
    for other in map(ipaddress.ip_network, others):
        if isinstance(one, ipaddress.IPv4Network) and isinstance(other, ipaddress.IPv4Network):
            if one.subnet_of(other):
                return True
        elif isinstance(one, ipaddress.IPv6Network) and isinstance(other, ipaddress.IPv6Network):
            if one.subnet_of(other):
                return True
    return False


def by_family(networks: Iterable[str]) -> list[tuple[str, str]]:
    """`("ip", "{ ... }")` and `("ip6", ...)`, for those that there are. Nothing overlaps."""
    found = []
    for family, version in (("ip", 4), ("ip6", 6)):
        parsed = [ipaddress.ip_network(one) for one in networks]
        own = list(ipaddress.collapse_addresses(one for one in parsed if one.version == version))  # type: ignore[type-var]
        if own:
            found.append((family, "{ " + ", ".join(map(str, own)) + " }"))
    return found


def refuse(networks: Iterable[str], how: str = REJECT) -> list[str]:
    return [f"{family} daddr {listed} {how}" for family, listed in by_family(list(networks))]


def accept(networks: Iterable[str]) -> list[str]:
    return refuse(networks, "accept")


# --- the host as it is --------------------------------------------------------------------------


def read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def nameservers(text: str) -> list[str]:
    """The addresses that resolv.conf(5) names, without those of one link."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            with contextlib.suppress(ValueError):
                found.append(str(ipaddress.ip_address(words[1])))
    return found


def resolvers(root: str = "/") -> list[str]:
    """Whom the host asks. Its own stub is passed over where systemd-resolved says who is behind it:
    the stub answers nobody but the host."""
    found = nameservers(read(f"{root}etc/resolv.conf"))
    if any(one in ("127.0.0.53", "127.0.0.54") for one in found):
        found = nameservers(read(f"{root}run/systemd/resolve/resolv.conf")) or found
    return found[:MOST_RESOLVERS] or ["127.0.0.1"]  # what resolv.conf(5) says for none


def resolvers_of_host() -> list[str]:
    """Those that a program of the host's asks, as pasta does: the stub itself, if any."""
    return nameservers(read("/etc/resolv.conf"))[:MOST_RESOLVERS] or ["127.0.0.1"]


def uplink4() -> str | None:
    """The interface of the default route."""
    for line in read("/proc/net/route").splitlines()[1:]:
        words = line.split()
        if len(words) > 7 and words[1] == words[7] == "00000000":
            return words[0]
    return None


def uplink6() -> str | None:
    for line in read("/proc/net/ipv6_route").splitlines():
        words = line.split()
        refuses = int(words[8], 16) & 0x200  # RTF_REJECT, ipv6_route.h
        if int(words[0], 16) == 0 and words[1] == "00" and words[9] != "lo" and not refuses:
            return words[9]
    return None


def mtu_of(names: Iterable[str | None]) -> int:
    """The smallest of these interfaces' (netdevice(7)); 1500 where there are none."""
    import fcntl

    least = 1500
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        for name in filter(None, names):
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(sock, 0x8921, struct.pack("16si20x", name.encode(), 0))
                least = min(least, struct.unpack_from("i", answer, 16)[0])
    return max(least, 1280)


def addresses() -> list[str]:
    """Every address that the host has now, of any interface."""
    netlink = netns.Netlink()
    try:
        found = netlink.ask(22, netns.NLM_F_DUMP, struct.pack("BBBBi", 0, 0, 0, 0, 0))
    finally:
        netlink.close()
    seen = set()
    for one in found:
        parts = netns.attributes(one[8:])
        raw = parts.get(netns.IFA_LOCAL) or parts.get(netns.IFA_ADDRESS)
        if raw is not None:
            seen.add(str(ipaddress.ip_address(raw)))
    return sorted(seen)


class Ruleset:
    """The kernel's nftables, looked at without a process (linux/netfilter/nf_tables.h)."""

    GETTABLE, GETCHAIN, GETGEN = 0xA01, 0xA04, 0xA10
    INET, IP, IP6 = 1, 2, 10

    def __init__(self) -> None:
        self._netlink = netns.Netlink(12)  # NETLINK_NETFILTER

    def close(self) -> None:
        self._netlink.close()

    def has_table(self, name: str, family: int = INET) -> bool:
        try:
            return bool(self._ask(self.GETTABLE, netns.attribute(1, name), family))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise

    def tables(self) -> list[str]:
        """The names of all tables of the family inet."""
        found = self._ask(self.GETTABLE, b"", self.INET, netns.NLM_F_DUMP)
        return [netns.attributes(one[4:])[1].rstrip(b"\0").decode() for one in found]

    def chains(self, table: str) -> list[str]:
        """The names of a table's chains."""
        found = []
        for one in self._ask(self.GETCHAIN, b"", self.INET, netns.NLM_F_DUMP):
            parts = netns.attributes(one[4:])
            if parts.get(1, b"").rstrip(b"\0") == table.encode():
                found.append(parts.get(3, b"").rstrip(b"\0").decode())
        return found

    def generation(self) -> bytes:
        """What changes whenever anybody changes anything."""
        (answer,) = self._ask(self.GETGEN, b"", 0)
        return netns.attributes(answer[4:]).get(1, b"")

    def _ask(self, kind: int, body: bytes, family: int, flags: int = 0) -> list[bytes]:
        return self._netlink.ask(kind, flags, struct.pack("BBH", family, 0, 0) + body)


def tool(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":" + PATHS)


def run(*arguments: str, given: str = "") -> str:
    """What a tool says on its standard output. Raises `BackendFailed` with its complaint."""
    try:
        done = subprocess.run(
            arguments,
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=TOOL_TIMEOUT_S,
            env={"PATH": PATHS, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendFailed(f"{arguments[0]}: {error}") from None
    if done.returncode:
        raise BackendFailed(f"{' '.join(arguments[:3])}: {done.stderr.strip()[:500]}")
    return done.stdout


# --- a root server ------------------------------------------------------------------------------


class Table:
    """The host's rules for the sandboxes of one data directory."""

    def __init__(self, mark: str, subnet: str, run_dir: Path) -> None:
        self.mark = mark
        self.name = f"heyvm_{mark}"
        self.ours = f"h{mark}"  # what our interfaces' names begin with
        self.subnet = ipaddress.IPv4Network(subnet)
        self.prefix6 = self.prefix6_of(mark)
        self._kept = run_dir / "forwarding.json"
        self._checked = False
        self._written: str | None = None
        self._stuck: dict[str, str] = {}  # what cannot be switched here
        self._seen: tuple[bytes, str] | None = None

    @staticmethod
    def prefix6_of(mark: str) -> ipaddress.IPv6Network:
        return ipaddress.IPv6Network(f"fd68:{mark[:4]}:{mark[4:]}::/48")

    def dns(self) -> dict[str, list[tuple[str, str]]]:
        """`{family: [(our address, resolver)]}`: every one of ours leads to some resolver."""
        found = resolvers()
        v4 = [one for one in found if ":" not in one]
        v6 = [one for one in found if ":" in one and one != "::1" and not within(one, NEVER6)]
        own4 = [str(self.subnet[number]) for number in range(1, MOST_RESOLVERS + 1)]
        own6 = [str(self.prefix6[number]) for number in range(1, MOST_RESOLVERS + 1)]
        return {
            "ip": [(own, v4[n % len(v4)]) for n, own in enumerate(own4)] if v4 else [],
            "ip6": [(own, v6[n % len(v6)]) for n, own in enumerate(own6)] if v6 else [],
        }

    def text(self) -> str:
        """The whole of it but rules of single sandboxes, which a second writing leaves alone."""
        chains = self._chains()
        lines = [
            f"add table inet {self.name}",
            f"add map inet {self.name} own {{ type ifname : verdict; }}",
            f"add set inet {self.name} flows {{ type ifname; size 65535; flags dynamic; }}",
        ]
        for name, (hook, _) in chains.items():
            lines.append(f"add chain inet {self.name} {name} {hook}")
        for name, (_, rules) in chains.items():
            lines.append(f"flush chain inet {self.name} {name}")
            lines += [f"add rule inet {self.name} {name} {rule}" for rule in rules]
        return "\n".join(lines) + "\n"

    def _chains(self) -> dict[str, tuple[str, list[str]]]:
        ours = f'"{self.ours}*"'
        dns = self.dns()
        answered = [(family, own) for family, pairs in dns.items() for own, _ in pairs]
        # Since it is looked at before any translation of addresses: what is the host's own is
        # refused whatever port is published on it.
        inside = [
            "fib saddr . iif oif missing drop",
            *(f"{f} daddr {own} meta l4proto {{ tcp, udp }} th dport 53 accept"
              for f, own in answered),
            "meta l4proto { tcp, udp } th dport { 53, 853 } drop",
            "fib daddr type != unicast drop",
            *refuse((str(self.subnet), ULA, *NEVER), "drop"),
        ]  # fmt: skip
        translated = [
            f"ct status dnat ct original {family} daddr {own} accept" for family, own in answered
        ]
        too_many = f"ct state new add @flows {{ iifname ct count over {MOST_FLOWS} }} drop"
        outgoing = [
            "ct state invalid drop",
            too_many,
            "tcp flags syn tcp option maxseg size set rt mtu",
            *translated,
            f'iifname "{self.ours}d*" jump default_rules',
            "iifname vmap @own",
            "drop",
        ]
        names = {
            family: "{ " + ", ".join(f"{own} : {asked}" for own, asked in pairs) + " }"
            for family, pairs in dns.items()
            if pairs
        }
        to_us = [asked for _, asked in dns["ip"] if within(asked, ["127.0.0.0/8"])]
        hook = "{ type %s hook %s priority %d; policy accept; }"
        return {
            "inside": ("", inside),
            "default_rules": ("", Policy.of(Network()).rules()),
            "outgoing": ("", outgoing),
            "guard": (hook % ("filter", "prerouting", -300), [f"iifname {ours} jump inside"]),
            "names": (
                hook % ("nat", "prerouting", -110),
                [
                    f"iifname {ours} meta l4proto {{ tcp, udp }} dnat {f} to {f} daddr map {m}"
                    for f, m in names.items()
                ],
            ),
            # A resolver on loopback sees its own host ask.
            "resolver": (
                hook % ("nat", "input", 90),
                [f"iifname {ours} ip daddr {one} snat ip to {one}" for one in sorted(set(to_us))],
            ),
            "input": (
                hook % ("filter", "input", 0),
                [f"iifname {ours} {rule}" for rule in (too_many, *translated, "drop")],
            ),
            "forward": (
                hook % ("filter", "forward", 0),
                [
                    f"oifname {ours} ct state established,related accept",
                    f"oifname {ours} drop",
                    f"iifname {ours} goto outgoing",
                    *self._no_router(),
                ],
            ),
            "leaving": (
                hook % ("nat", "postrouting", 90),
                [
                    f"ip saddr {self.subnet} oifname != {ours} masquerade",
                    f"ip6 saddr {self.prefix6} oifname != {ours} masquerade",
                ],
            ),
        }

    def _no_router(self) -> list[str]:
        """This machine forwards for sandboxes, not for whoever else sends it something."""
        others = 'iifname != "h*" oifname != "h*"'
        rules = []
        if read("/proc/sys/net/ipv4/ip_forward").strip() == "0":
            rules.append(f"meta nfproto ipv4 {others} drop")
        if old := self._old_interfaces():
            listed = "{ " + ", ".join(f'"{name}"' for name in old) + " }"
            rules.append(f"meta nfproto ipv6 iifname {listed} oifname {listed} ct state new drop")
        return rules

    def _old_interfaces(self) -> list[str]:
        """Those that there were when we turned on IPv6 forwarding: it has one switch for all, which
        does not tell who has turned it."""
        return list(self._remembered().get("interfaces", ()))

    def _remembered(self) -> dict[str, Any]:
        try:
            kept: dict[str, Any] = json.loads(self._kept.read_text())
        except (OSError, ValueError):
            return {}
        return kept if kept["boot"] == pids.boot_id() else {}

    def write(self) -> None:
        """Put it there as it should be; twice is fine, and so is anybody else who does it too."""
        self._remember()
        text = self.text()
        nft = tool("nft") or "nft"
        try:
            run(nft, "-f", "-", given=text)
        except BackendFailed:
            # Another version's, with other hooks under the same names.
            run(nft, "-f", "-", given=f"add table inet {self.name}\n"
                f"delete table inet {self.name}\n{text}")  # fmt: skip
        self._written = text
        self._seen = None
        self._forward()
        pass_iptables(self.ours)

    def _remember(self) -> None:
        """What is about to be switched, and how it was before the first time."""
        switches = self._switches()
        if not switches:
            return
        kept = {"interfaces": [], "switches": {}} | self._remembered() | {"boot": pids.boot_id()}
        if FORWARDING6 in switches:
            names = [name for _, name in socket.if_nameindex() if re.fullmatch(r"[\w.@-]+", name)]
            kept["interfaces"] = [one for one in names if not one.startswith(("h", "lo"))]
        kept["switches"] = {name: setting(name) for name in switches} | kept["switches"]
        self._kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._kept.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(kept))
        new.rename(self._kept)

    def _switches(self) -> dict[str, str]:
        """What has to be switched for packets to be passed on. IPv4 knows that by interface, so the
        machine's own switch stays as it is."""
        found = {}
        if setting("ipv4/ip_forward") == "0":
            names = [
                f"ipv4/conf/{one}/forwarding"
                for one in os.listdir("/proc/sys/net/ipv4/conf")
                if one not in ("all", "default", "lo") and not one.startswith("h")
            ]
            found = {name: "1" for name in names if setting(name) == "0"}
        if uplink6() is not None and setting(FORWARDING6) == "0":
            # A host that forwards ignores router advertisements, its own default route's too.
            names = [f"ipv6/conf/{one}/accept_ra" for one in os.listdir("/proc/sys/net/ipv6/conf")]
            found |= {name: "2" for name in names if setting(name) == "1"}
            found[FORWARDING6] = "1"
        return found

    def _forward(self) -> None:
        """With the rules in place first: at no moment is the machine a router for others."""
        for name, value in self._switches().items():
            switch(name, value)
        self._stuck = self._switches()

    def _set_back(self) -> None:
        """Whoever has since turned on all of IPv4's forwarding needs that of each interface."""
        switches = self._remembered().get("switches", {})
        for name, value in reversed(switches.items()):
            if name.startswith("ipv6/") or setting("ipv4/ip_forward") == "0":
                switch(name, value)
        self._kept.unlink(missing_ok=True)

    def is_there(self) -> bool:
        with contextlib.closing(Ruleset()) as ruleset:
            return ruleset.has_table(self.name)

    def check(self) -> None:
        """Raise where this kernel, or this server's rights, would not let it be written."""
        if not self._checked and not self.is_there():
            run(tool("nft") or "nft", "--check", "-f", "-", given=self.text())
        self._checked = True

    def ensure(self) -> None:
        """Write it where it is missing. A look costs 0.1 ms. What an earlier version wrote is
        replaced at the keeper's first look."""
        if not self.is_there():
            self.write()

    def keep(self) -> bool:
        """The keeper's look: put back what somebody has changed. Whether anything was put back."""
        with contextlib.closing(Ruleset()) as ruleset:
            generation = ruleset.generation()
        text = self.text()
        # An interface may have come, and `sysctl --system` sets others back.
        same = text == self._written and self._switches() == self._stuck
        seen = self._seen if same else None
        if seen is not None and seen[0] == generation:
            return False
        listing = self._listing()
        if seen is not None and seen[1] == listing:
            self._seen = (generation, listing)
            pass_iptables(self.ours)
            return False
        self.write()
        self._seen = (generation, self._listing())
        return True

    def _listing(self) -> str:
        """Our chains as the kernel has them, without those of single sandboxes."""
        try:
            listed = run(tool("nft") or "nft", "-n", "list", "table", "inet", self.name)
        except BackendFailed:
            return ""
        blocks = re.findall(r"^\tchain (\w+) \{\n(.*?)^\t\}", listed, re.S | re.M)
        return "".join(f"{name} {body}" for name, body in blocks if not self._is_own(name))

    # --- rules of one sandbox

    def _is_own(self, chain: str) -> bool:
        return re.fullmatch(f"{self.ours}c[0-9a-f]{{4}}", chain) is not None

    def add_own(self, interface: str, policy: Policy) -> None:
        """Give an interface rules of its own, in place of those that an earlier one of that name
        had. Without any, nothing that it sends passes."""
        chain = f"inet {self.name} {interface}"
        lines = [f"add chain {chain}", f"flush chain {chain}"]
        lines += [f"add rule {chain} {rule}" for rule in policy.rules()]
        lines.append(f'add element inet {self.name} own {{ "{interface}" : jump {interface} }}')
        run(tool("nft") or "nft", "-f", "-", given="\n".join(lines) + "\n")

    def own(self) -> list[str]:
        """The interfaces that have rules of their own."""
        with contextlib.closing(Ruleset()) as ruleset:
            return [name for name in ruleset.chains(self.name) if self._is_own(name)]

    def remove_own(self, interface: str) -> None:
        with contextlib.suppress(BackendFailed):  # a flush was faster
            run(
                *(tool("nft") or "nft", "-f", "-"),
                given=f'delete element inet {self.name} own {{ "{interface}" }}\n'
                f"delete chain inet {self.name} {interface}\n",
            )

    def remove(self) -> None:
        """Take everything back; forwarding where no other server's table is there."""
        if self.is_there():
            run(tool("nft") or "nft", "delete", "table", "inet", self.name)
        pass_iptables(self.ours, remove=True)
        netlink = netns.Netlink()
        try:
            for _, name in socket.if_nameindex():
                if re.fullmatch(f"{self.ours}[dc][0-9a-f]{{4}}", name):
                    body = netns.link(0, netns.attribute(netns.IFLA_IFNAME, name))
                    netlink.tell((netns.RTM_DELLINK, 0, body))
        finally:
            netlink.close()
        with contextlib.closing(Ruleset()) as ruleset:
            others = any(name.startswith("heyvm_") for name in ruleset.tables())
        if not others:
            self._set_back()


def setting(name: str) -> str:
    return read(f"/proc/sys/net/{name}").strip()


def switch(name: str, value: str) -> None:
    with contextlib.suppress(OSError):
        Path("/proc/sys/net", name).write_text(value)


def pass_iptables(ours: str, *, remove: bool = False) -> None:
    """Where another firewall's FORWARD chain ends in DROP (dockerd's, ufw's), an accept of ours
    does not end theirs: let our interfaces through. What may pass is decided in our own chains."""
    with contextlib.closing(Ruleset()) as ruleset:
        for name, family in (("iptables", Ruleset.IP), ("ip6tables", Ruleset.IP6)):
            if ruleset.has_table("filter", family):
                _pass(name, ours, remove)
    for name, file in (("iptables", "ip_tables_names"), ("ip6tables", "ip6_tables_names")):
        if "filter" in read(f"/proc/net/{file}").split():
            _pass(f"{name}-legacy", ours, remove)


def _pass(name: str, ours: str, remove: bool) -> None:
    path = tool(name)
    if path is None:
        return
    try:
        listed = run(path, "-w", "5", "-S", "FORWARD")
    except BackendFailed:
        return
    closed = re.search(r"^-P FORWARD DROP|^-A FORWARD -j (DROP|REJECT)", listed, re.M)
    rules = (
        ("-o", f"{ours}+", "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"),
        ("-i", f"{ours}+", "-j", "ACCEPT"),
    )
    for rule in rules:
        there = f"-A FORWARD {' '.join(rule)}" in listed
        if there and remove:
            run(path, "-w", "5", "-D", "FORWARD", *rule)
        elif closed and not there and not remove:
            run(path, "-w", "5", "-I", "FORWARD", "1", *rule)


# --- an ordinary user ---------------------------------------------------------------------------


def inner_rules(network: Network, dns: Sequence[str], host: Sequence[str]) -> str:
    """The rules of a namespace that pasta serves: the same as a root server's, with the addresses
    that the host has now (`host`). DNS answers at `dns`, over UDP: older pastas know no other."""
    rules = [
        'oifname "lo" accept',
        *(f"{'ip6' if ':' in one else 'ip'} daddr {one} udp dport 53 accept" for one in dns),
        "meta l4proto { tcp, udp } th dport { 53, 853 } drop",
        # Neighbours are asked for, or there is no IPv6.
        "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept",
        "fib daddr type != unicast drop",
        *refuse((*NEVER, ULA, *(as_network(one) for one in host))),
        *Policy.of(network).rules(),
    ]
    lines = [
        "add table inet heyvm",
        "add chain inet heyvm output { type filter hook output priority -300; policy drop; }",
        "flush chain inet heyvm output",
        *(f"add rule inet heyvm output {rule}" for rule in rules),
    ]
    return "\n".join(lines) + "\n"


def as_network(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"


class Pastas:
    """The pastas of an ordinary user's sandboxes, known by notes and by what they are called."""

    def __init__(self, settings: Settings) -> None:
        self.title = f"heyvm-pasta:{settings.mark}:"
        self.notes = settings.run_dir / "pasta"
        subnet = ipaddress.IPv4Network(settings.subnet)
        prefix6 = Table.prefix6_of(settings.mark)
        # Every namespace has the same ones, and none of the host's.
        self.own4, self.gateway4 = str(subnet[KEPT_ADDRESSES + 1]), str(subnet[KEPT_ADDRESSES])
        self.own6, self.gateway6 = str(prefix6[KEPT_ADDRESSES + 1]), str(prefix6[KEPT_ADDRESSES])
        self.dns4, self.dns6 = str(subnet[1]), str(prefix6[1])

    def dns(self) -> list[str]:
        """Where DNS answers: pasta asks the host's first resolver of that family. Without a way out
        there is no telling which of them will, once there is one."""
        up4, up6 = self._ways_out()
        if not (up4 or up6):
            return [self.dns4, self.dns6]
        found = resolvers_of_host()
        v4 = [self.dns4] if up4 and any(":" not in one for one in found) else []
        v6 = [self.dns6] if up6 and any(":" in one for one in found) else []
        return v4 + v6

    def lacks(self) -> tuple[str, ...]:
        """What a sandbox's network has not got on this machine as it is, in words."""
        if not any(self._ways_out()):
            return (
                "it reaches nothing: this machine has no default route (it does when there is)",
            )
        if not self.dns():
            return (
                "no names are found inside: over the family that has a default route, this machine"
                " has no resolver (/etc/resolv.conf)",
            )
        return ()

    def specification(self, sandbox: Sandbox, *, carried: bool = True) -> dict[str, Any]:
        """What `netns.Network` and `netns.renew` take; no pasta where there is no way out."""
        self.notes.mkdir(mode=0o700, parents=True, exist_ok=True)
        up4, up6 = self._ways_out()
        wanted = carried and (up4 or up6)
        return {
            "nft": tool("nft") or "nft",
            "rules": inner_rules(sandbox.network, (self.dns4, self.dns6), addresses()),
            "pasta": (tool("pasta") or "pasta") if wanted else None,
            "title": self.title + sandbox.id,
            "note": str(self.notes / sandbox.id),
            "arguments": self._arguments(up4, up6),
            "families": [socket.AF_INET] * bool(up4) + [socket.AF_INET6] * bool(up6),
        }

    def _ways_out(self) -> tuple[str | None, str | None]:
        """The interfaces to bind to. A resolver on loopback is not reached by a pasta (2023) that
        was given one for IPv6: then names are worth more."""
        up4 = uplink4()
        on_loopback = all(within(one, ("127.0.0.0/8", "::1/128")) for one in resolvers_of_host())
        return up4, None if up4 and on_loopback else uplink6()

    def _arguments(self, up4: str | None, up6: str | None) -> list[str]:
        words = ["--foreground", "--quiet", "--config-net", "--ns-ifname", netns.INSIDE]
        words += ["--mtu", str(mtu_of((up4, up6))), "--no-map-gw"]
        for option in ("-t", "-u", "-T", "-U"):
            words += [option, "none"]
        if up4:
            words += ["-a", self.own4, "-n", "31", "-g", self.gateway4]
            words += ["--outbound-if4", up4, "--dns-forward", self.dns4]
        if up6:
            words += ["-a", self.own6, "-g", self.gateway6]
            words += ["--outbound-if6", up6, "--dns-forward", self.dns6]
        if not (up4 and up6):
            words.append("-4" if up4 else "-6")
        return words

    def of(self, sandbox_id: str) -> pids.Process | None:
        """The pasta of a sandbox, if it lives."""
        try:
            pid, start = map(int, (self.notes / sandbox_id).read_text().split())
        except (OSError, ValueError):
            return None
        process = pids.Process(pid, start)
        return process if process.alive() else None

    def end(self, sandbox_id: str) -> None:
        """No pasta of this sandbox is left when this returns."""
        if (process := self.of(sandbox_id)) is not None:
            pids.kill_and_wait([process], TOOL_TIMEOUT_S)
        for name in (sandbox_id, f"{sandbox_id}.new"):
            (self.notes / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """End those whose sandbox is gone, and forget what is noted of none."""
        pids.kill_and_wait(list(self._orphans()), TOOL_TIMEOUT_S)
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.notes):
                if self.of(name) is None and not name.endswith(".new"):
                    (self.notes / name).unlink(missing_ok=True)

    def _orphans(self) -> Iterable[pids.Process]:
        """Anybody may call a process so: only this user's own are looked at."""
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    first = file.read(128).split(b"\0")[0].decode("ascii", "replace")
            except OSError:
                continue
            if not first.startswith(self.title) or pids.uid_of(pid) != os.geteuid():
                continue
            target = re.fullmatch(r"sb-[0-9a-f]{8}:(\d+):(\d+)", first.removeprefix(self.title))
            process = pids.identify(pid)
            if target is not None and process is not None:
                if not pids.Process(int(target[1]), int(target[2])).alive():
                    yield process


# --- the door -----------------------------------------------------------------------------------


class Networks:
    """The networks of one server's sandboxes. Holds nothing that matters."""

    def __init__(self, settings: Settings) -> None:
        self.root = os.geteuid() == 0
        self.mark = settings.mark
        self.table = Table(settings.mark, settings.subnet, settings.run_dir)
        self.pastas = Pastas(settings)
        self._addresses: list[str] | None = None
        self._idle: set[str] = set()

    def problem(self) -> str | None:
        """Why no sandbox can connect to anything on this machine, and what mends it."""
        if tool("nft") is None:
            return "nft is not installed; on Debian and Ubuntu: apt install nftables"
        if not self.root:
            if tool("pasta") is None:
                return "pasta is not installed; on Debian and Ubuntu: apt install passt"
            if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
                return "/dev/net/tun is not there or not for you: modprobe tun; chmod 0666 on it"
            return None
        try:
            self.table.check()
        except (OSError, BackendFailed) as error:
            return f"the server may not change the machine's packet filter ({error})"
        return None

    def lacks(self) -> tuple[str, ...]:
        """What a sandbox's network has not got on this machine as it is, in words."""
        return () if self.root else self.pastas.lacks()

    def warm(self) -> None:
        """Do now what the first start would wait for."""
        self.problem()

    def specification(self, sandbox: Sandbox, visit: bool) -> dict[str, Any] | None:
        """What the launcher is told: `spec["network"]`. With rules of its own they are there when
        this returns."""
        network = NONE if visit else sandbox.network
        if network.mode == "none":
            return None
        if (problem := self.problem()) is not None:
            raise Unavailable(f"sandbox {sandbox.slug!r} cannot have a network: {problem}")
        if not self.root:
            return self.pastas.specification(sandbox)
        self.table.ensure()
        return self._of_root(sandbox)

    def _of_root(self, sandbox: Sandbox) -> dict[str, Any]:
        slot = self._slot(sandbox)
        names = [f"h{self.mark}{kind}{slot:04x}" for kind in "dc"]
        own = bool(sandbox.network.allow or sandbox.network.deny)
        policy = Policy.of(sandbox.network)
        if own:
            self.table.add_own(names[1], policy)
        closed, opened = policy.fence()
        dns = self.table.dns()
        up4, up6 = uplink4(), uplink6()
        first = KEPT_ADDRESSES + 2 * slot
        # Our own ends of pairs are among these, as many as there are sandboxes.
        closed = [*closed, str(self.table.subnet), ULA]
        host = [as_network(one) for one in addresses()]
        host = [one for one in host if not within(one, closed)]
        return {
            "name": names[own],
            "names": names,
            "mac_host": f"0268{self.mark[:4]}{slot:04x}",
            "mac_inside": f"0669{self.mark[:4]}{slot:04x}",
            "mtu": mtu_of((up4, up6)),
            "gateway4": str(self.table.subnet[first]),
            "address4": str(self.table.subnet[first + 1]),
            "gateway6": str(self.table.prefix6[first]),
            "address6": str(self.table.prefix6[first + 1]) if up6 else None,
            "closed": list(dict.fromkeys((*closed, *host))),
            "open4": [one for one in opened if ":" not in one] + [f"{a}/32" for a, _ in dns["ip"]],
            "open6": [one for one in opened if ":" in one] + [f"{a}/128" for a, _ in dns["ip6"]],
            "route_localnet": any(within(asked, ["127.0.0.0/8"]) for _, asked in dns["ip"]),
        }

    def _slot(self, sandbox: Sandbox) -> int:
        assert sandbox.id_base is not None
        slot = (sandbox.id_base - ranges.LOWEST) // ranges.SIZE
        if KEPT_ADDRESSES + 2 * slot + 1 >= self.table.subnet.num_addresses - 1:
            raise Unavailable(f"{self.table.subnet} has no address left: set a larger HEYVM_SUBNET")
        return slot

    def resolv_conf(self, network: Network) -> str:
        """The text of /etc/resolv.conf in a sandbox with this network."""
        if network.mode == "none":
            return ""
        if not self.root:
            own = self.pastas.dns()
        else:
            dns = self.table.dns()
            own = [one for one, _ in dns["ip"] or dns["ip6"]]
        return "".join(f"nameserver {one}\n" for one in own)

    def forget(self, sandbox: Sandbox) -> None:
        """Take back what was made for one sandbox alone; its interface goes by itself."""
        own = sandbox.network.allow or sandbox.network.deny
        if self.root and own and sandbox.id_base is not None:
            slot = (sandbox.id_base - ranges.LOWEST) // ranges.SIZE
            self.table.remove_own(f"h{self.mark}c{slot:04x}")

    def end(self, sandbox_id: str) -> None:
        """Nothing carries packets for this sandbox any more when this returns."""
        if not self.root:
            self.pastas.end(sandbox_id)

    def sweep(self) -> None:
        """Remove what belongs to no sandbox that runs."""
        if not self.root:
            self.pastas.sweep()

    def upkeep(
        self, running: Sequence[Sandbox], renew: Callable[[Sandbox, dict[str, Any]], None]
    ) -> None:
        """The keeper's look, every second or two. `renew` has the launcher do to a running sandbox
        what `netns.renew` does."""
        connected = [one for one in running if one.network.mode != "none"]
        if not connected:
            return
        if self.root:
            self._keep_table(connected)
            return
        # A new address of the host's is the host's from now on: what pasta keeps from it by itself
        # are the addresses of other interfaces.
        host = addresses()
        for sandbox in connected:
            lost = self.pastas.of(sandbox.id) is None and bool(uplink4() or uplink6())
            if lost or host != self._addresses:
                renew(sandbox, self.pastas.specification(sandbox, carried=lost))
        self._addresses = host

    def _keep_table(self, connected: Sequence[Sandbox]) -> None:
        self.table.keep()
        own = set(self.table.own())
        # Rules that no interface has had for two looks are of a sandbox that is stopped or gone:
        # they are written anew at each start.
        idle = own - {name for _, name in socket.if_nameindex()}
        for name in idle & self._idle:
            self.table.remove_own(name)
        self._idle = idle
        for sandbox in connected:
            name = f"h{self.mark}c{self._slot(sandbox):04x}"
            if (sandbox.network.allow or sandbox.network.deny) and name not in own:
                self.table.add_own(name, Policy.of(sandbox.network))

    def remove(self) -> None:
        """Take back everything that this data directory's server has made."""
        if self.root:
            with contextlib.suppress(OSError, BackendFailed):
                self.table.remove()
