"""The `heyvm` command: serves, keeps, connects, checks the machine, keeps images, makes tokens."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from heyvm import __version__
from heyvm.errors import HeyvmError, Misconfigured

EPILOG = """\
settings come from the environment: JWT_SECRET, HEYVM_DATA_DIR and more (README.md)

exit codes:
  0  done; for --api: it was asked to end (Ctrl-C, SIGTERM)
  1  it could not: the port is taken, no sandbox can run (doctor), no such image
  2  called wrongly, or a setting has a value with which nothing may start
"""
UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
DEFAULT_EXPIRY = "30d"
PAUSE_FOR_EVER_S = 30 * 86400
EXIT_MISCONFIGURED = 2
CLIENTS = ("connect", "ssh-proxy")
CONNECT_ABOUT = """\
With --shell: a shell in this terminal. With a COMMAND (joined by spaces and read
by a shell, as ssh does it): that; what is piped in is its stdin. ~. after a
newline ends the connection, ~? says what else there is.

Without: a port of this machine that leads to where the ticket does. HOST:PORT
is printed once it listens.
"""
CONNECT_EPILOG = """\
environment:
  HEYVM_CONNECTION_URL  the URL, where no TARGET is given. A URL is a secret, and
                        a command line is seen by whoever may call ps
  HEYVM_URL             where the API is (default: http://localhost:3000)
  HEYVM_API_KEY, HEYO_API_KEY
                        the token for it

The exit code is the shell's, or the command's; 255 where the connection failed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. What it returns is the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in CLIENTS:
        return be_client(words)
    parser = make_parser()
    options = parser.parse_args(words)
    command: Callable[[argparse.Namespace], int] | None = options.command
    try:
        if command is not None:
            return command(options)
        if options.api:
            return serve(options)
    except HeyvmError as wrong:
        print(f"heyvm: {wrong.detail}", file=sys.stderr)
        return EXIT_MISCONFIGURED
    if needless := _server_flags(options):
        parser.error(f"{needless} is for the server: add --api")
    parser.print_help()
    return 0


def be_client(words: Sequence[str]) -> NoReturn:
    """`heyvm connect`, `heyvm ssh-proxy`. Nothing that a server is made of is loaded: until the
    terminal is raw, what is typed is echoed twice."""
    fill_descriptors()
    try:
        options, command = parse_client(words)
        code = command(options)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 1
    # Threads are under way, some of them in no Python: nothing may be taken apart around them.
    os._exit(code)


def fill_descriptors() -> None:
    """Whoever closed stdin, stdout or stderr shall not find a connection in its place."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def parse_client(
    words: Sequence[str],
) -> tuple[argparse.Namespace, Callable[[argparse.Namespace], int]]:
    """`words` of the options: what follows `--`, which is a command's and not ours."""
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="heyvm")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_connect(commands)
    _add_ssh_proxy(commands)
    options, unknown = parser.parse_known_args(words[:cut])
    if unknown:
        options.refuse(f"unrecognized: {' '.join(unknown)} (a command comes behind --)")
    options.words = words[cut + 1 :]
    if options.command is proxy_to:
        if options.words:
            options.refuse("it runs no command: ssh does")
        return options, options.command
    options.shell = options.shell or bool(options.words)
    if options.shell and (options.port is not None or options.to is not None):
        options.refuse("a shell and a port exclude each other: say --shell, or -p and --to")
    return options, options.command


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; docs/operating.md prints its help, and a test compares them."""
    from heyvm import imagecli
    from heyvm.serving import DEFAULT_HOST, DEFAULT_PORT, DEFAULT_WORKERS

    parser = argparse.ArgumentParser(
        prog="heyvm",
        description="Sandboxes over HTTP, on one machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=None)
    parser.add_argument("--version", action="version", version=f"heyvm {__version__}")
    server = parser.add_argument_group("server")
    server.add_argument("--api", action="store_true", help="start the API server")
    server.add_argument(
        "--port", type=_port, metavar="PORT", help=f"port to listen on (default: {DEFAULT_PORT})"
    )
    server.add_argument(
        "--host", metavar="ADDRESS", help=f"address to listen on (default: {DEFAULT_HOST}, all)"
    )
    server.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help=f"processes that answer requests (default: {DEFAULT_WORKERS})",
    )
    server.add_argument(
        "--debug",
        action="store_true",
        help="say each request, agent call and lifecycle step on stderr, without secrets",
    )
    server.add_argument(
        "--dev", action="store_true", help="AUTH_SERVER_URL defaults to http://localhost:3001"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_keeper(commands)
    _add_doctor(commands)
    _add_connect(commands)
    _add_ssh_proxy(commands)
    imagecli.add_to(commands)
    _add_token(commands)
    _add_backup(commands)
    _add_restore(commands)
    _add_purge(commands)
    return parser


def _add_keeper(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    keeper = commands.add_parser(
        "keeper",
        help="keep what the server has made, in a process of its own",
        description="Expire sandboxes, mend what a crash left and listen on local ports, until"
        " SIGTERM. A server starts a keeper itself where there is none; this one, for a service"
        " manager, goes on while the server is restarted. Where there is a keeper already it waits"
        " as a spare.",
    )
    keeper.set_defaults(command=keep)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check that this machine can run sandboxes, by running one",
        description="Check everything that a sandbox needs, then make one, run a command in it"
        " and delete it. Each line says what is, and what to do about it. Exit code 0: the"
        " sandbox ran; 1: it did not.",
    )
    doctor.add_argument("--json", action="store_true", help="print the checks as a JSON array")
    doctor.set_defaults(command=diagnose)


def _add_connect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    connect = commands.add_parser(
        "connect",
        help="open a shell in a sandbox, or a port of it here",
        usage="%(prog)s [options] [TARGET] [--shell] [-- COMMAND...]",
        description=CONNECT_ABOUT,
        epilog=CONNECT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_target(connect, "a connection URL (heyo://...), or - for the first line of stdin")
    shell = connect.add_argument_group("shell")
    shell.add_argument("--shell", action="store_true", help="open a shell, or run COMMAND")
    shell.add_argument(
        "-t", "--tty", action="store_true", help="run COMMAND in a terminal, as a shell is"
    )
    _add_identity(shell)
    port = connect.add_argument_group("port")
    port.add_argument(
        "-p",
        "--port",
        type=_port_pair,
        metavar="LOCAL[:REMOTE]",
        help="port to listen on (default: a free one); REMOTE is inside, where TARGET is a sandbox",
    )
    port.add_argument("--to", type=_port, metavar="REMOTE", help="as in -p 0:REMOTE")
    port.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1)",
    )
    connect.set_defaults(command=connect_to, words=[], refuse=connect.error)


def _add_ssh_proxy(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    proxy = commands.add_parser(
        "ssh-proxy",
        help="reach a sandbox with ssh, as its ProxyCommand",
        description="Carry stdin and stdout to a sandbox's SSH server:\n\n"
        "  ssh -o ProxyCommand='heyvm ssh-proxy TARGET' sandbox",
        epilog=CONNECT_EPILOG.partition("\nThe exit code")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_target(proxy, "a connection URL (heyo://...)")
    proxy.set_defaults(command=proxy_to, refuse=proxy.error)


def _add_target(parser: argparse.ArgumentParser, url: str) -> None:
    parser.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help=f"{url}, or a sandbox's id or slug, for which the API is asked",
    )
    parser.add_argument("--api-url", metavar="URL", help="where the API is (default: $HEYVM_URL)")
    parser.add_argument("--token-file", metavar="FILE", help="a file with the token for the API")


def _add_identity(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-i",
        "--identity",
        metavar="FILE",
        help="the SSH key of a session that was made for some (default: ssh-agent's, ~/.ssh/id_*)",
    )


def _add_token(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    token = commands.add_parser(
        "token",
        help="print a bearer token signed with JWT_SECRET",
        description="Print a bearer token (a JWT, HS256) signed with JWT_SECRET.",
    )
    token.add_argument("--subject", metavar="S", help="whose token it is (claim sub)")
    token.add_argument(
        "--audience", metavar="A", help="what it is for (claim aud; default: JWT_AUDIENCE)"
    )
    token.add_argument(
        "--expires-in",
        type=_duration,
        default=DEFAULT_EXPIRY,
        metavar="TIME",
        help=f"how long it is good: 90s, 15m, 12h, {DEFAULT_EXPIRY} (default), 4w, or never",
    )
    token.set_defaults(command=print_token)


def _add_backup(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    backup = commands.add_parser(
        "backup",
        help="write sandboxes, images and settings of them into one file",
        description="Write the data directory into FILE (mode 0600), or to stdout for -, while the"
        " server runs: the registry, images, each sandbox's files, the trail of calls. Each running"
        " sandbox is halted while its files are copied. For root. The file holds whatever secrets"
        " sandboxes have.",
    )
    backup.add_argument("file", metavar="FILE", help="a file that is not there yet, or -")
    backup.add_argument(
        "--no-pause",
        action="store_true",
        help="halt nothing: files may be of different moments",
    )
    backup.add_argument(
        "--pause-limit",
        type=_duration,
        default="30s",
        metavar="TIME",
        help="how long a sandbox may be halted; one that takes longer goes on, and this is said"
        " (default: 30s)",
    )
    backup.set_defaults(command=back_up)


def _add_restore(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    restore = commands.add_parser(
        "restore",
        help="make a data directory out of a backup",
        description="Unpack FILE, or stdin for -, into a HEYVM_DATA_DIR that is empty, with the"
        " server stopped. Every sandbox is stopped then. Its ids are reserved in /etc/subuid and"
        " /etc/subgid as they were. For root. Whoever wrote the file says what sandboxes mount and"
        " may connect to: restore none that you do not trust.",
    )
    restore.add_argument("file", metavar="FILE", help="what `heyvm backup` has written, or -")
    restore.set_defaults(command=restore_all)


def _add_purge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    purge = commands.add_parser(
        "purge",
        help="delete every sandbox and image, and all else that the server has made",
        description="Delete every sandbox and image of HEYVM_DATA_DIR, with whatever else its"
        " server has made there, in HEYVM_RUN_DIR and on this machine: nftables rules, cgroups,"
        " reserved ids. For the user that the server ran as, once it is stopped. Without --yes it"
        " only says what would go.",
    )
    purge.add_argument("--yes", action="store_true", help="do it")
    purge.set_defaults(command=purge_all)


def serve(options: argparse.Namespace) -> int:
    """Become gunicorn. Does not return unless that fails."""
    given = {
        "HEYVM_HOST": options.host,
        "HEYVM_PORT": options.port,
        "HEYVM_WORKERS": options.workers,
        "HEYVM_DEBUG": "1" if options.debug else None,
        "HEYVM_DEV": "1" if options.dev else None,
    }
    return _become(["gunicorn", "-c", "python:heyvm.serving", "wsgi:app"], given)


def keep(options: argparse.Namespace) -> int:
    """`heyvm keeper`: become it. Does not return unless that fails."""
    from heyvm import settings

    for notice in settings.from_env(os.environ).notices:
        print(f"heyvm keeper: {notice}", file=sys.stderr)
    # Parts of what is made are for a sandbox's ids too: as in serving.on_starting.
    os.umask(0o022)
    # It ends by itself alone, whoever's child it is.
    os.environ.pop("HEYVM_ALIVE_FD", None)
    return _become(["heyvm.keeper", "--spare"], {})


def _become(module: Sequence[str], given: Mapping[str, object]) -> int:
    environ = _server_environ(given)
    # `app` and `wsgi` are found from here, whatever lies in the directory that it was called in.
    os.chdir(Path(__file__).resolve().parent.parent)
    os.execve(sys.executable, [sys.executable, "-m", *module], environ)


def connect_to(options: argparse.Namespace) -> int:
    """`heyvm connect`"""
    from heyvm import connect

    return connect.connect(options)


def proxy_to(options: argparse.Namespace) -> int:
    """`heyvm ssh-proxy`"""
    from heyvm import connect

    return connect.ssh_proxy(options)


def diagnose(options: argparse.Namespace) -> int:
    """`heyvm doctor`"""
    from heyvm import doctor, settings

    return doctor.run(settings.from_env(os.environ), as_json=options.json)


def back_up(options: argparse.Namespace) -> int:
    """`heyvm backup`"""
    from heyvm import backup, settings

    return backup.run(
        settings.from_env(os.environ),
        options.file,
        pause=not options.no_pause,
        pause_limit=PAUSE_FOR_EVER_S if options.pause_limit is None else options.pause_limit,
    )


def restore_all(options: argparse.Namespace) -> int:
    """`heyvm restore`"""
    from heyvm import restore, settings

    return restore.run(settings.from_env(os.environ), options.file)


def purge_all(options: argparse.Namespace) -> int:
    """`heyvm purge`"""
    from heyvm import purge, settings

    return purge.run(settings.from_env(os.environ), sure=options.yes)


def print_token(options: argparse.Namespace) -> int:
    """`heyvm token`"""
    from heyvm import settings, tokens

    known = settings.from_env(os.environ)
    if known.jwt_secret is None:
        raise Misconfigured("JWT_SECRET is not set: give the one that the server has")
    for notice in known.notices:
        print(f"heyvm: {notice}", file=sys.stderr)
    token = tokens.make_token(
        known.jwt_secret,
        audience=options.audience or known.jwt_audience,
        subject=options.subject,
        ttl_seconds=options.expires_in,
    )
    print(token)
    return 0


def _server_environ(given: Mapping[str, object]) -> dict[str, str]:
    environ = dict(os.environ)
    environ.update({name: str(value) for name, value in given.items() if value is not None})
    # Paths of sandboxes are UTF-8, whatever locale the server is started in.
    environ["PYTHONUTF8"] = "1"
    for name in ("HEYVM_DATA_DIR", "HEYVM_RUN_DIR"):
        if environ.get(name):
            environ[name] = os.path.abspath(environ[name])
    return environ


def _server_flags(options: argparse.Namespace) -> str | None:
    """The first flag that was given and means nothing without --api."""
    for name in ("port", "host", "workers", "debug", "dev"):
        if getattr(options, name):
            return f"--{name}"
    return None


def _port(text: str) -> int:
    number = _positive(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: say 1 to 65535")
    return number


def _port_pair(text: str) -> tuple[int, int | None]:
    """LOCAL, 0 for a free one, and REMOTE if it is there."""
    local, colon, remote = text.partition(":")
    return 0 if local in ("", "0") else _port(local), _port(remote) if colon else None


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _duration(text: str) -> int | None:
    """Seconds, or None for `never`."""
    if text == "never":
        return None
    found = re.fullmatch(r"([0-9]{1,9})([smhdw]?)", text)
    if not found or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: say 90s, 15m, 12h, 30d or never")
    return int(found[1]) * UNITS_S[found[2]]


if __name__ == "__main__":
    sys.exit(main())
