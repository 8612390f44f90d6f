"""How gunicorn serves heyvm: its settings and hooks, for deploy/gunicorn.conf.py and `heyvm --api`.

gunicorn reads the names below out of this module; a setting's meaning stands in its own manual.
Runs in the arbiter, before any worker exists: it imports nothing that a worker should load itself.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
from typing import Any

from heyvm import __version__, journal, metrics
from heyvm.errors import HeyvmError, Misconfigured
from heyvm.settings import Settings, from_env

DEFAULT_HOST = "0.0.0.0"
DEFAULT_PORT = 3000
DEFAULT_WORKERS = 2
EXIT_CANNOT_LISTEN = 1
EXIT_MISCONFIGURED = 2


def authority(host: str, port: int | str) -> str:
    """`host:port` as gunicorn and URLs write it: an IPv6 address goes in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _number(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isascii() or not value.isdigit():
        _give_up(f"{name} is {value!r}: say a whole number", EXIT_MISCONFIGURED)
    return int(value)


def _say(text: str) -> None:
    print(f"heyvm: {text}", file=sys.stderr, flush=True)


def _give_up(message: str, code: int) -> None:
    _say(message)
    raise SystemExit(code)


_debug = os.environ.get("HEYVM_DEBUG", "").strip().lower() in ("1", "true", "yes", "on")

bind = [
    authority(
        os.environ.get("HEYVM_HOST") or DEFAULT_HOST,
        _number("HEYVM_PORT", DEFAULT_PORT),
    )
]
worker_class = "heyvm.worker.Worker"
logger_class = "heyvm.worker.Log"
workers = _number("HEYVM_WORKERS", DEFAULT_WORKERS) or DEFAULT_WORKERS
worker_connections = 2000
proc_name = "heyvm"

# The heartbeat is a greenlet of its own: a request may take hours (tests/test_server.py). Only a
# worker whose whole loop stands still for so long is killed.
timeout = 60
# What SIGTERM waits for requests in flight; then their commands end with them.
graceful_timeout = 5
# Also how long a client may take over a request's head, so it bounds slow ones.
keepalive = 20
# A heartbeat on a disk that is busy would look like a worker that hangs.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

limit_request_line = 8190
limit_request_fields = 64
limit_request_field_size = 8190
# A header with an underscore could pass for one with a hyphen that a proxy has checked.
header_map = "refuse"
forwarder_headers = ""
forwarded_allow_ips = "127.0.0.1,::1"
# gunicorn 27 would open a socket of its own through which it can be commanded.
control_socket_disable = True

loglevel = "info" if _debug else "warning"
accesslog = None


def on_starting(server: Any) -> None:
    """Say what is odd about the settings, or stop; make the pipe that tells the keeper the end."""
    from heyvm import localports, worker

    # A request that is forwarded takes up to four descriptors: of the usual 1,024, a few hundred
    # clients of one endpoint would leave none for the API. Here, so that every process, and what
    # starts in a sandbox, has the same.
    localports.raise_file_limit()
    # Parts of what is made here are for a sandbox's ids too, which a stricter one would keep out.
    os.umask(0o022)
    settings = _settings()
    for line in (*settings.notices, *exposure_notices(settings, server.cfg.address)):
        _say(line)
    if not _listens_already():
        for address in server.cfg.address:
            _refuse_a_taken_address(address)
    _try_registry(settings)
    metrics.clear(settings.run_dir)
    worker.survive_bad_reloads(server.app, _say)
    _make_alive_pipe()


def _try_registry(settings: Settings) -> None:
    """A data directory that this server may not use is told now, and in one line. Nothing stays
    open: a connection that is carried over a fork would harm the file."""
    from heyvm.lifecycle import Lifecycle
    from heyvm.registry import Registry

    registry = Registry(settings.data_dir / "registry.db")
    try:
        Lifecycle(registry, {}, settings).open()
    except HeyvmError as wrong:
        _give_up(wrong.detail, EXIT_MISCONFIGURED)
    finally:
        registry.close()


def when_ready(server: Any) -> None:
    """Say where it listens."""
    for listener in server.LISTENERS:
        print(f"heyvm {__version__} listens on {listener}", file=sys.stderr, flush=True)
    journal.event("server.started", version=__version__)


def on_reload(_: Any) -> None:
    """SIGHUP: new workers take the place of those that there are."""
    journal.event("server.reloaded")


def on_exit(_: Any) -> None:
    """The workers are gone."""
    journal.event("server.stopped")


def post_worker_init(worker: Any) -> None:
    """Each worker sees to it that there is a keeper; only one at a time can be."""
    import gevent

    from heyvm import keeper

    # Ctrl-C reaches the whole group. The arbiter hears it too, and ends its workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = from_env(os.environ)
    if settings.log_json:
        journal.begin_json("worker")
        logging.getLogger("heyvm").setLevel(logging.DEBUG if settings.debug else logging.WARNING)
    elif settings.debug:
        _log_to_stderr()
    metrics.begin(settings.run_dir)
    worker.keeper_watch = gevent.spawn(keeper.watch, settings)
    _warm(worker)


def _warm(worker: Any) -> None:
    """Make what the first sandbox would wait for, and every other request with it: some of that
    work holds the whole worker up. A machine that cannot do it is told so, and served."""
    for backend in worker.wsgi.extensions["heyvm"].backends.values():
        try:
            backend.check()
            backend.warm()
        except (HeyvmError, OSError) as error:
            if worker.age == 1:
                _say(f"no sandbox can be started here: {error} (`heyvm doctor` says more)")


def _log_to_stderr() -> None:
    """What `--debug` shows; the modules see to it that no secret is in what they log."""
    heyvm = logging.getLogger("heyvm")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(name)s: %(message)s"))
    heyvm.addHandler(handler)
    heyvm.setLevel(logging.DEBUG)


def exposure_notices(settings: Settings, addresses: list[Any]) -> list[str]:
    """What to know about listening on an address that other machines reach."""
    if settings.jwt_secret or all(_is_local(address) for address in addresses):
        return []
    if settings.allow_open:
        return [
            "HEYVM_ALLOW_OPEN=1 without JWT_SECRET: whoever reaches this port runs commands here"
        ]
    return [
        "without JWT_SECRET only this machine is answered; others get a 403 (set JWT_SECRET,"
        " or HEYVM_ALLOW_OPEN=1 where the network is trusted)"
    ]


def _settings() -> Settings:
    try:
        return from_env(os.environ)
    except Misconfigured as wrong:
        _give_up(wrong.detail, EXIT_MISCONFIGURED)
        raise


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):
        return True  # a unix socket, or a descriptor that was handed over
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return bool(address[0] == "localhost")


def _listens_already() -> bool:
    """By systemd's socket activation or gunicorn's own re-exec, which hand the socket over."""
    return "LISTEN_FDS" in os.environ or "GUNICORN_FD" in os.environ


def _refuse_a_taken_address(address: Any) -> None:
    """One line and an end; gunicorn itself would try for five seconds and print ten."""
    if not isinstance(address, tuple):
        return
    host, port = address[0], address[1]
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        _give_up(_why_not_listen(host, port, error), EXIT_CANNOT_LISTEN)


def _why_not_listen(host: str, port: int, error: OSError) -> str:
    where = authority(host, port)
    if error.errno == errno.EADDRINUSE:
        return f"cannot listen on {where}: something else does (another port: --port {port + 1})"
    if error.errno == errno.EACCES:
        return f"cannot listen on {where}: ports below 1024 are for root"
    return f"cannot listen on {where}: {error.strerror or error}"


def _make_alive_pipe() -> None:
    """Arbiter and workers hold the writing end and nobody writes: end of file on the other means
    that all of them are gone. Neither crosses an exec unless the keeper is handed its end."""
    reading, _writing = os.pipe()
    os.environ["HEYVM_ALIVE_FD"] = str(reading)
