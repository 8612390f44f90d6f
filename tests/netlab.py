"""A small internet of network namespaces: a host to run a server on, and a network behind it.

The machine's own interfaces, rules and forwarding are not touched. `Lab.host()` lets the calling
thread, and what it starts, stand on the lab's host.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.server import Server

CLONE_NEWNET = 0x40000000
PUBLIC, PUBLIC6 = "203.0.113.7", "2001:db8:7::7"
RESOLVER, PRIVATE_RESOLVER, RESOLVER6 = "203.0.113.53", "10.9.9.53", "2001:db8:7::53"
HOST, HOST_SECOND, HOST6 = "203.0.113.2", "203.0.113.3", "2001:db8:1::2"
METADATA = ("169.254.169.254", "100.100.100.200", "192.0.0.192", "168.63.129.16")
PRIVATE = ("10.1.2.3", "172.16.5.5", "192.168.7.7", "100.64.1.1", "240.1.1.1")
METADATA6 = ("fd00:ec2::254", "fd20:ce::254")
PRIVATE6 = ("fd12:3456::1", "64:ff9b::a01:203", "2002:a01:203::1", "64:ff9b:1::1")

# Answers on every address and the ports that count: TCP and UDP with the address it was reached at,
# port 53 as a DNS server that says 203.0.113.7 to every question, and 10.1.2.3 to one for
# 10-1-2-3.test.
LISTENER = r"""
import os, select, socket, sys, threading
def answer(query, tcp=False):
    reply = query[:2] + b"\x81\x80" + query[4:6] + b"\0\1\0\0\0\0" + query[12:]
    end = 12
    while query[end]: end += 1 + query[end]
    question = query[12:end + 5]
    kind = int.from_bytes(question[-4:-2], "big")
    data = socket.inet_aton("203.0.113.7")
    label = query[13:13 + query[12]].decode("latin-1").replace("-", ".")
    if label.count(".") == 3: data = socket.inet_aton(label)
    count = b"\0\1" if kind == 1 else b"\0\0"
    record = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + data if kind == 1 else b""
    return query[:2] + b"\x81\x80\0\1" + count + b"\0\0\0\0" + question + record
def tcp(family, address, port):
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6: sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((address, port)); sock.listen(64)
    def serve(client):
        with client:
            client.settimeout(10)
            try:
                if port == 53:
                    size = int.from_bytes(client.recv(2), "big")
                    reply = answer(client.recv(size))
                    client.sendall(len(reply).to_bytes(2, "big") + reply)
                else:
                    text = f"reached {client.getsockname()[0]} from {client.getpeername()[0]}"
                    first = client.recv(4096) if port == 80 else b""
                    if first[:3] == b"BIG":
                        client.sendall(b"x" * 3000000)
                    else:
                        client.sendall(b"HTTP/1.0 200 OK\r\n\r\n" * (port == 80) + text.encode())
            except OSError: pass
    while True:
        client, _ = sock.accept()
        threading.Thread(target=serve, args=(client,), daemon=True).start()
def udp(family, address, port):
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6: sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    level, option = (0, 8) if family == socket.AF_INET else (41, 49)
    sock.setsockopt(level, option, 1)
    sock.bind((address, port))
    while True:
        data, ancillary, _, peer = sock.recvmsg(2048, 256)
        if address.startswith("127.") and not peer[0].startswith("127."): continue  # as unbound
        reply = answer(data) if port == 53 else b"reached by " + peer[0].encode()
        # From the address that was asked, or the asker takes it for somebody else's.
        own = [(a, b, c) for a, b, c in ancillary if (a, b) in ((0, 8), (41, 50))]
        sock.sendmsg([reply], own, 0, peer)
threads = []
addresses = sys.argv[1].split(",")
for address in addresses:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in map(int, sys.argv[2].split(",")):
        for kind in (tcp, udp):
            threads.append(threading.Thread(target=kind, args=(family, address, port), daemon=True))
for thread in threads: thread.start()
print("ready", flush=True)
threads[0].join()
"""


def ip(*words: str) -> str:
    return subprocess.run(("ip", *words), check=True, capture_output=True, text=True).stdout


class Lab:
    """Namespaces `<name>h` (the host) and `<name>n` (the network). Close it."""

    def __init__(self, *, resolver: str = PRIVATE_RESOLVER, v6: bool = True) -> None:
        self.name = f"hvl{secrets.token_hex(3)}"
        self.v6 = v6
        self.tun = f"/run/{self.name}-tun"
        self.processes: list[subprocess.Popen[bytes]] = []
        self._etc: list[Path] = []
        try:
            self._build(resolver)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def host_name(self) -> str:
        return f"{self.name}h"

    @property
    def net_name(self) -> str:
        return f"{self.name}n"

    def _build(self, resolver: str) -> None:
        host, net = self.host_name, self.net_name
        self.set_resolver(resolver)
        for one in (host, net):
            ip("netns", "add", one)
            ip("-n", one, "link", "set", "lo", "up")
        ip("link", "add", "eth0", "netns", host, "mtu", "1400", "type", "veth",
           "peer", "name", "up0", "netns", net, "mtu", "1400")  # fmt: skip
        for one, word in ((host, "eth0"), (net, "up0")):
            if not self.v6:
                self.sysctl(one, f"net.ipv6.conf.{word}.disable_ipv6=1")
            ip("-n", one, "link", "set", word, "up")
        ip("-n", host, "address", "add", f"{HOST}/24", "dev", "eth0")
        ip("-n", host, "address", "add", f"{HOST_SECOND}/24", "dev", "eth0")
        ip("-n", net, "address", "add", "203.0.113.1/24", "dev", "up0")
        ip("-n", host, "route", "add", "default", "via", "203.0.113.1")
        for address in (PUBLIC, RESOLVER, PRIVATE_RESOLVER, *METADATA, *PRIVATE):
            ip("-n", net, "address", "add", f"{address}/32", "dev", "up0")
        if self.v6:
            ip("-n", host, "address", "add", f"{HOST6}/64", "dev", "eth0", "nodad")
            ip("-n", net, "address", "add", "2001:db8:1::1/64", "dev", "up0", "nodad")
            ip("-n", host, "route", "add", "default", "via", "2001:db8:1::1")
            for address in (PUBLIC6, RESOLVER6, *METADATA6, *PRIVATE6):
                ip("-n", net, "address", "add", f"{address}/128", "dev", "up0", "nodad")
        self.listen(net, "0.0.0.0", *(["::"] if self.v6 else []), ports="53,80,853,4000")

    def set_resolver(self, *resolvers: str) -> None:
        """What /etc/resolv.conf says on the host; processes started there see it."""
        directory = Path("/etc/netns", self.host_name)
        if directory not in self._etc:
            directory.mkdir(parents=True)
            self._etc.append(directory)
        text = "".join(f"nameserver {one}\n" for one in resolvers)
        (directory / "resolv.conf").write_text(text)

    def sysctl(self, namespace: str, *words: str) -> None:
        self.run(namespace, "sysctl", "-q", "-w", *words)

    def run(self, namespace: str, *words: str, given: str | None = None) -> str:
        """Run a program in one of the namespaces; what it says."""
        done = subprocess.run(
            ("ip", "netns", "exec", namespace, *words),
            input=given, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def nft(self, text: str) -> str:
        return self.run(self.host_name, "nft", "-f", "-", given=text)

    def listen(self, namespace: str, *addresses: str, ports: str = "80,4000") -> None:
        """Servers on these addresses, TCP and UDP; they listen when this returns."""
        words = [sys.executable, "-I", "-c", LISTENER, ",".join(addresses), ports]
        self.start(namespace, *words, ready=b"ready\n")

    def start(
        self, namespace: str, *words: str, ready: bytes | None = None
    ) -> subprocess.Popen[bytes]:
        """A program in one of the namespaces, ended with the lab."""
        process = subprocess.Popen(
            ("ip", "netns", "exec", namespace, *words), stdout=subprocess.PIPE
        )
        self.processes.append(process)
        if ready is not None:
            assert process.stdout is not None
            assert process.stdout.readline() == ready
            time.sleep(0.2)
        return process

    @contextlib.contextmanager
    def host(self) -> Iterator[None]:
        """The calling thread stands on the lab's host: its sockets and children are there."""
        with standing_in(f"/run/netns/{self.host_name}"):
            yield

    def on_host(self) -> list[str]:
        """What a command is begun with that is started in `host()`, so that it sees the lab's
        resolv.conf, a /dev/net/tun as distributions have it, and otherwise the machine as it is."""
        binds = f"mount --bind /etc/netns/{self.host_name}/resolv.conf /etc/resolv.conf && "
        if os.path.exists("/dev/net/tun") and os.stat("/dev/net/tun").st_mode & 0o666 != 0o666:
            if not os.path.exists(self.tun):
                subprocess.run(("mknod", "-m", "666", self.tun, "c", "10", "200"), check=True)
            binds += f"mount --bind {self.tun} /dev/net/tun && "
        return ["unshare", "--mount", "sh", "-c", f'{binds}exec "$@"', "sh"]

    def close(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for name in (self.host_name, self.net_name):
            if os.path.exists(f"/run/netns/{name}"):
                ip("netns", "delete", name)
        Path(self.tun).unlink(missing_ok=True)
        for directory in self._etc:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def standing_in(path: str) -> Iterator[None]:
    """The calling thread enters a network namespace, and comes back."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(path, os.O_RDONLY)
    try:
        assert libc.setns(there, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        yield
    finally:
        assert libc.setns(own, CLONE_NEWNET) == 0
        os.close(own)
        os.close(there)


class LabServer(Server):
    """A server on the lab's host, of root or of an ordinary user. Start it, and talk to it, while
    standing there."""

    def __init__(self, lab: Lab, uid: int = 0, **environ: str) -> None:
        self.lab, self.uid = lab, uid
        super().__init__(**environ)

    def start(self) -> None:
        os.chown(self.home, self.uid, self.uid)
        super().start()

    def _command(self) -> list[str]:
        own = ["env", f"HOME={self.home}", "XDG_RUNTIME_DIR="]
        if self.uid:
            own += ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]
        return [*self.lab.on_host(), *own, *super()._command()]


# Run inside a sandbox: `{"name": [kind, address, port, {option: value}]}` in, who answered out.
PROBE = r"""
import json, os, socket, struct, sys, threading
def reach(kind, address, port, options):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
    sock.settimeout(options.get("timeout", 2.5))
    if "device" in options:
        sock.setsockopt(socket.SOL_SOCKET, 25, options["device"].encode() + b"\0")
    if "unicast_if" in options:
        index = struct.pack("!I", socket.if_nametoindex(options["unicast_if"]))
        sock.setsockopt(*((41, 76) if family == socket.AF_INET6 else (0, 50)), index)
    if "dont_route" in options:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
    if "source_route" in options:
        hops = b"".join(map(socket.inet_aton, options["source_route"]))
        sock.setsockopt(0, 4, bytes([131, 3 + len(hops), 4]) + hops + b"\0")
    if "from" in options:
        sock.setsockopt(*((41, 78) if family == socket.AF_INET6 else (0, 15)), 1)
        sock.bind((options["from"], 0))
    if kind == "tcp":
        sock.connect((address, port))
    elif "pktinfo" in options:
        index = socket.if_nametoindex(options["pktinfo"])
        if family == socket.AF_INET6: cmsg = (41, 50, bytes(16) + struct.pack("I", index))
        else: cmsg = (0, 8, struct.pack("I8x", index))
        sock.sendmsg([b"?"], [cmsg], 0, (address, port))
    else:
        query = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\1x\4test\0\0\1\0\1" if port in (53, 853) else b"?"
        sock.sendto(query, (address, port))
    if kind == "tcp" and port == 53:
        query = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\1x\4test\0\0\1\0\1"
        sock.sendall(len(query).to_bytes(2, "big") + query)
    elif kind == "tcp" and port == 80:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
    data = b""
    while part := sock.recv(65536):
        data += part
        if kind == "udp" or port == 53: break
    return "reached " + (data.decode("latin-1").split("\r\n\r\n")[-1])
found = {}
def run(name, words):
    try: found[name] = reach(*words[:3], (words[3:] or [{}])[0])
    except OSError as error: found[name] = type(error).__name__ + " " + str(error)
threads = [threading.Thread(target=run, args=one) for one in json.load(sys.stdin).items()]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(found))
"""
