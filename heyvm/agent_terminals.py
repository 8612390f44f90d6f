"""Terminals, for the agent: shells that outlive the connection of whoever types.

A terminal is a master that is read and written in the agent's loop, and a session of processes at
its other end. What they print becomes numbered pieces, kept (where the terminal is to outlive its
connection) until they are acknowledged. docs/architecture.md, "Shells", is the contract.
"""

from __future__ import annotations

import errno
import fcntl
import posix
import select
import sys

from heyvm import agent as agents
from heyvm import frames
from heyvm.agent import (
    DEFAULT_PATH,
    DRAIN_BYTES,
    KILL_LIMIT_S,
    MAX_FILES,
    Plan,
    Refused,
    close_all,
    exit_code,
    number,
    octets,
    refuse_while_stopping,
)

TYPE_CHECKING = False  # as in `agent`
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    from heyvm.agent import Agent, Connection, Fields
else:
    import _signal

MAX_TERMINALS = 128
NAME_BYTES = range(16, 65)
NAME_LETTERS = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
SIDES = range(1, 65536)  # of a window, in characters
USUAL_SIZE = (80, 24)

PIECE_BYTES = 32 * 1024
PIECES_PER_EVENT = 8
# What is kept for clients, and what programs have not read yet. Each terminal may keep so much,
# until all together have plenty: then little, which for all of them is as much again as is missing
# from 32 MiB (and from 16).
KEPT_BYTES, KEPT_PLENTY = 4 * 1024 * 1024, 24 * 1024 * 1024
TYPED_BYTES, TYPED_PLENTY = 1024 * 1024, 8 * 1024 * 1024
LITTLE_BYTES = 64 * 1024
PIECE_COST = 128  # the memory that a piece takes besides its bytes
ACK_PATIENCE_S = 1.0
HANG_UP_GRACE_S = 2.0
FAREWELL_S = 10.0  # for whoever was taken over to read what there still is
MAX_KEEP_S = 7 * 24 * 60 * 60.0

# asm-generic/ioctls.h, asm-generic/termbits.h
TCGETS, TCSETS = 0x5401, 0x5402
TIOCSCTTY, TIOCSWINSZ = 0x540E, 0x5414
TIOCSPTLCK, TIOCGPTPEER = 0x40045431, 0x5441
TERMIOS_BYTES = 36
IUTF8 = 0o40000
PTMX = (5, 2)  # admin-guide/devices.txt
# The first is of the file system of terminals itself: nobody inside can put another in its place.
MASTERS = (b"/dev/pts/ptmx", b"/dev/ptmx")


def operate(agent: Agent, connection: Connection, request: Fields) -> None:
    """One of the operations on terminals."""
    if agent.terminals is None:
        agent.terminals = Terminals(agent)
    OPERATIONS[octets(request, "op", b"")](agent.terminals, connection, request)


class Terminals:
    """All of them, by the names that the host gave them, and what they hold together."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self.loop = agent, agent.loop
        self.named: dict[bytes, Terminal] = {}
        self.kept = self.typed = 0
        self.crowded = False

    def make_room(self) -> None:
        """For one more, in place of one that has ended if need be."""
        if len(self.named) < MAX_TERMINALS:
            return
        for terminal in self.named.values():
            if terminal.ended and terminal.connection is None:
                terminal.forget()
                return
        raise Refused("failed", f"there are {MAX_TERMINALS} terminals already: end one first")

    def may_keep(self) -> int:
        """How much each of them may keep now."""
        if self.kept < KEPT_PLENTY:
            return KEPT_BYTES
        self.crowded = True
        return LITTLE_BYTES

    def may_be_typed(self) -> int:
        return TYPED_BYTES if self.typed < TYPED_PLENTY else LITTLE_BYTES

    def keep(self, change: int) -> None:
        self.kept += change
        if self.crowded and self.kept < KEPT_PLENTY:
            self.crowded = False
            self.loop.after_turn.append(self._go_on)

    def _go_on(self) -> None:
        for terminal in list(self.named.values()):
            terminal.pump()

    def hang_up(self) -> None:
        """All of them: an interactive shell takes no SIGTERM for an order to end."""
        for terminal in list(self.named.values()):
            terminal.hang_up()


class Terminal:
    """One terminal, from its opening until nobody can want to know of it any more."""

    def __init__(self, all_of_them: Terminals, name: bytes, keep_s: float) -> None:
        self.all, self.agent, self.loop = all_of_them, all_of_them.agent, all_of_them.loop
        self.name, self.keep_s = name, keep_s
        self.connection: Connection | None = None
        self.master = self.slave = -1
        self.watched = 0  # the events that the loop looks for
        self.size: tuple[int, int] | None = None  # to be set
        self.typed = bytearray()  # and not read by the program yet
        # The pieces from `first` to `last` are kept, those up to `sent` have gone to the
        # connection, those up to `shown` to any, and those up to `lost` went away without being
        # acknowledged.
        self.pieces: dict[int, bytes] = {}
        self.kept = 0
        self.first, self.last, self.sent, self.shown, self.lost = 1, 0, 0, 0, 0
        self.careless = False  # the client was waited for, and does not acknowledge
        self.patience: object = None
        # As a `Command` has them, for `Birth`.
        self.pid = self.marker = 0
        self.failure = b""
        self.status: int | None = None
        self.refusal: Refused | None = None
        self.born = self.ended = self.hung_up = self.forgotten = False
        self.drain_left = DRAIN_BYTES
        self.timer: object = None

    # -- its beginning ---------------------------------------------------------------------------

    def start(self, plan: Plan, login: bool, size: tuple[int, int]) -> None:
        """Raises `Refused` and `OSError`, with nothing left behind."""
        self.master = open_master()
        try:
            self.slave = open_slave(self.master, plan)
            self.set_size(size)
            self._fork(plan, login)
        except BaseException:
            close_all([fd for fd in (self.master, self.slave) if fd >= 0])
            raise
        self.all.named[self.name] = self

    def _fork(self, plan: Plan, login: bool) -> None:
        """As `Agent.spawn`, which cannot make the terminal the session's own."""
        report, told = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        limits = self.agent.limits
        try:
            self.marker = limits.lower()
            self.pid = posix.fork()
            if self.pid == 0:
                become(self.slave, told, plan, login)
        except BaseException:
            posix.close(report)
            raise
        finally:
            posix.close(told)
            limits.restore()
        self.agent.commands[self.marker] = self
        birth = Birth(self.agent, self, plan, (self.pid, report))
        self.agent.children[self.pid] = birth.ended
        birth.told()

    def begin(self) -> None:
        """It is another program now (or has failed to become it, which `exited` tells)."""
        if not self.failure:
            self.born = True
            self._greet()

    def explain(self, plan: Plan) -> int:
        """What a failed start comes to, as a status of waitpid's."""
        status, self.refusal, line = agents.explain_failure(self.failure, plan.argv[0])
        self.failure = line.replace(b"\n", b"\r\n")[:PIECE_BYTES]
        return status

    # -- who is attached -------------------------------------------------------------------------

    def attach(self, connection: Connection) -> None:
        """In place of who is. What is kept is sent again."""
        self._turn_out()
        self.connection, self.careless = connection, False
        connection.on_frame, connection.on_gone = self.frame, self.detached
        connection.on_room = self.pump
        if not self.ended:
            self.loop.cancel(self.timer)
        if self.born:
            self._greet()

    def _greet(self) -> None:
        if self.connection is None:
            return
        ready = {"ready": 1, "seq": self.last, "lost": self.lost}
        self.connection.send(frames.header({**ready}))
        self.sent = self.first - 1
        self.connection.hear(len(self.typed) < self.all.may_be_typed())
        self.pump()

    def _turn_out(self) -> None:
        former, self.connection = self.connection, None
        self._calm()
        if former is None:
            return
        former.fail("taken", "another client has attached to this terminal")
        former.flush()
        if not former.closed:
            self.loop.after(FAREWELL_S, former.close)

    def detached(self) -> None:
        """The client is gone, without a word."""
        self.connection = None
        self._calm()
        if self.ended or self.hung_up:
            return
        if not self.keep_s:
            self.hang_up()
            return
        self.timer = self.loop.after(self.keep_s, self.hang_up)
        self.pump()

    def frame(self, _connection: Connection, kind: int, payload: bytes) -> None:
        if kind == frames.STDIN:
            self.type(payload)
            return
        if kind != frames.HEADER:
            raise frames.FrameError("not what a terminal takes")
        fields = frames.decode_header(payload)
        if "ack" in fields:
            self.acknowledged(number(fields, "ack", 0))
        if "resize" in fields:
            self.resize(fields["resize"])

    # -- what is typed ---------------------------------------------------------------------------

    def type(self, some: bytes) -> None:
        if self.master < 0 or self.status is not None:
            return
        self._apply_size()
        self.typed += some
        self.all.typed += len(some)
        self.write()

    def write(self) -> None:
        before = len(self.typed)
        try:
            while self.typed:
                del self.typed[: posix.write(self.master, self.typed[: frames.CHUNK_BYTES])]
        except BlockingIOError:
            pass
        except OSError:  # the terminal was hung up by a process inside
            self.typed.clear()
        self.all.typed += len(self.typed) - before
        self.watch()
        if self.connection is not None:
            self.connection.hear(len(self.typed) < self.all.may_be_typed())

    def resize(self, size: frames.Value) -> None:
        """At the end of the turn: of a thousand sizes that came at once the last one counts."""
        if not isinstance(size, list) or len(size) != 2:
            raise frames.FrameError("not a size")
        cols, rows = size
        if not isinstance(cols, int) or not isinstance(rows, int):
            raise frames.FrameError("not a size")
        if cols not in SIDES or rows not in SIDES:
            return
        if self.size is None:
            self.loop.after_turn.append(self._apply_size)
        self.size = (cols, rows)

    def _apply_size(self) -> None:
        size, self.size = self.size, None
        if size is not None and self.master >= 0:
            self.set_size(size)

    def set_size(self, size: tuple[int, int]) -> None:
        """The kernel tells the processes in front (SIGWINCH), where it is another one."""
        cols, rows = size
        sides = [side.to_bytes(2, sys.byteorder) for side in (rows, cols, 0, 0)]
        fcntl.ioctl(self.master, TIOCSWINSZ, b"".join(sides))

    # -- what is printed -------------------------------------------------------------------------

    def ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.write()
        if events & ~select.EPOLLOUT and self.master >= 0:
            self.read()

    def read(self) -> None:
        """So many pieces at a time that others have their turn; all there is once it has ended."""
        left = PIECES_PER_EVENT if self.status is None else DRAIN_BYTES
        while left and self.willing():
            left -= 1
            if not self._read_piece():
                return
        self.watch()

    def willing(self) -> bool:
        """To take another piece from the program, which waits otherwise."""
        if self.master < 0 or not self.born:
            return False
        connection = self.connection
        if connection is not None and (connection.full or self.sent < self.last):
            return False
        if not self.keep_s or self.kept < self.all.may_keep():
            return True
        if connection is None:
            return False
        if not self.careless and self.patience is None:
            self.patience = self.loop.after(ACK_PATIENCE_S, self._lose_patience)
        return self.careless

    def _read_piece(self) -> bool:
        """False where there is nothing more for now."""
        # A read gives no more than 4 KiB, however much there is.
        parts, size, broken = [], 0, False
        try:
            while size < PIECE_BYTES:
                part = posix.read(self.master, PIECE_BYTES - size)
                parts.append(part)
                size += len(part)
                if not part:
                    break
        except BlockingIOError:
            pass
        except OSError:  # EIO: every other end of it is closed, or was hung up
            broken = True
        if size:
            self.deliver(b"".join(parts))
        if size == PIECE_BYTES:
            return self._may_drain(size)
        if self.status is not None:
            self.end()
        elif broken:
            # By a process inside, somehow: it would be told for ever.
            self.close_terminal()
        else:
            self.watch()
        return False

    def _may_drain(self, size: int) -> bool:
        """Who is left behind in the background may print for ever."""
        if self.status is None:
            return True
        self.drain_left -= size
        if self.drain_left > 0:
            return True
        self.end()
        return False

    def deliver(self, piece: bytes) -> None:
        if self._lengthened(piece):
            return
        self.last += 1
        if self.keep_s:
            self.pieces[self.last] = piece
            self._count(len(piece) + PIECE_COST)
            while self.careless and self.kept > self.all.may_keep():
                self.lost = self.first
                self._drop()
        else:
            self.first = self.last + 1
        # Whoever is attached has all that came before, or else nothing would have been read.
        if self.connection is not None:
            self._send(self.last, piece)

    def _lengthened(self, some: bytes) -> bool:
        """The last piece, where nobody has seen it: a program that prints bytes one by one while
        nobody is there would fill the memory with pieces."""
        if self.last <= self.shown or len(self.pieces[self.last]) + len(some) > PIECE_BYTES:
            return False
        self.pieces[self.last] += some
        self._count(len(some))
        return True

    def _send(self, seq: int, piece: bytes) -> None:
        assert self.connection is not None
        self.sent, self.shown = seq, max(self.shown, seq)
        self.connection.send(frames.frame(frames.STDOUT, seq.to_bytes(8, "big") + piece))

    def _drop(self) -> None:
        """The oldest piece."""
        piece = self.pieces.pop(self.first)
        self.first += 1
        self._count(-len(piece) - PIECE_COST)

    def _count(self, change: int) -> None:
        self.kept += change
        self.all.keep(change)

    def acknowledged(self, seq: int) -> None:
        seq = min(seq, self.sent)
        if seq >= self.first:
            self._calm()
            self.careless = False
        while self.pieces and self.first <= seq:
            self._drop()
        if seq >= self.lost:
            self.lost = 0
        self.pump()

    def _calm(self) -> None:
        self.loop.cancel(self.patience)
        self.patience = None

    def _lose_patience(self) -> None:
        self.patience, self.careless = None, True
        self.pump()

    def pump(self) -> None:
        """Hand on what is kept and was not sent; then what the terminal has, or the end."""
        connection = self.connection
        while connection is not None and self.sent < self.last and not connection.full:
            self._send(self.sent + 1, self.pieces[self.sent + 1])
        if self.ended:
            self._tell_the_end()
        elif self.status is not None:
            self.read()
        else:
            self.watch()

    def watch(self) -> None:
        """What is to be looked for now."""
        if self.master < 0:
            return
        wanted = select.EPOLLIN if self.willing() else 0
        if self.typed:
            wanted |= select.EPOLLOUT
        if wanted == self.watched:
            return
        self.watched = wanted
        if wanted:
            self.loop.watch(self.master, wanted, self.ready)
        else:
            self.loop.forget(self.master)

    # -- its end ---------------------------------------------------------------------------------

    def exited(self, status: int) -> None:
        """The session's leader has ended, and with it the terminal: whoever it has left in the
        background has lost it."""
        if self.status is not None:
            return
        if self.failure and self.refusal is None:
            self._say(self.failure)
        self.status = status
        if self.refusal is not None:
            self._refuse(self.refusal)
            return
        self.read()
        if self.master < 0:
            self.end()

    def _say(self, line: bytes) -> None:
        """In place of a program that could not be started."""
        self.born = True
        self._greet()
        self.deliver(line)

    def _refuse(self, refusal: Refused) -> None:
        connection, self.connection = self.connection, None
        self.forget()
        if connection is not None:
            connection.fail(refusal.code, refusal.message)

    def end(self) -> None:
        """All is read: tell who is attached, or will be."""
        if self.ended:
            return
        self.ended = True
        self.close_terminal()
        self._calm()
        self.loop.cancel(self.timer)
        self._tell_the_end()
        if self.hung_up or not self.keep_s:
            self.forget()
        else:
            self._expire_later()

    def _expire_later(self) -> None:
        """Once nobody has attached for so long, or reads what was kept for him."""

        def expire() -> None:
            if self.connection is None:
                self.forget()
            else:
                self._expire_later()

        self.timer = self.loop.after(self.keep_s, expire)

    def _tell_the_end(self) -> None:
        connection = self.connection
        if connection is not None and (self.sent == self.last or self.forgotten):
            self.connection = None
            connection.finish({"ok": 1, "exit_code": exit_code(self.status or 0)})

    def close_terminal(self) -> None:
        """To its processes that is the line going dead."""
        for fd in (self.master, self.slave):
            if fd >= 0:
                self.loop.close(fd)
        self.master = self.slave = -1
        self.watched = 0
        self.all.typed -= len(self.typed)
        self.typed.clear()

    def hang_up(self) -> None:
        """As sshd does: who ignores SIGHUP stays, but not the leader."""
        if self.hung_up or self.forgotten:
            return
        self.hung_up = True
        self.loop.cancel(self.timer)
        self.close_terminal()
        if self.status is not None:
            self.end()
            self.forget()
            return
        self._signal(_signal.SIGHUP)
        self._signal(_signal.SIGCONT)
        self.timer = self.loop.after(HANG_UP_GRACE_S, self._kill)

    def _signal(self, number: int) -> None:
        # It is not reaped yet, or else its status would be known: the number is its own.
        if self.status is None:
            posix.kill(self.pid, number)

    def _kill(self) -> None:
        self._signal(_signal.SIGKILL)
        # One that is stuck in the kernel is waited for by nobody.
        self.timer = self.loop.after(KILL_LIMIT_S, lambda: self.exited(_signal.SIGKILL))

    def forget(self) -> None:
        if self.forgotten:
            return
        self.forgotten = True
        self.close_terminal()
        self._calm()
        self.loop.cancel(self.timer)
        self.pieces.clear()
        self._count(-self.kept)
        self._tell_the_end()
        if self.all.named.get(self.name) is self:
            del self.all.named[self.name]


class Birth(agents.Birth):
    """Of a session's leader."""

    def __init__(
        self, agent: Agent, terminal: Terminal, plan: Plan, child: tuple[int, int]
    ) -> None:
        super().__init__(agent, terminal, plan, child)
        self.terminal = terminal

    def _finish(self) -> None:
        super()._finish()
        self.terminal.begin()


# -- the device ------------------------------------------------------------------------------------


def open_master() -> int:
    """Of a new terminal. Opened with care: whoever is root inside can put anything at /dev/ptmx."""
    failure: OSError | None = None
    flags = posix.O_RDWR | posix.O_NOCTTY | posix.O_CLOEXEC | posix.O_NONBLOCK
    for path in MASTERS:
        try:
            fd = posix.open(path, flags)
        except OSError as error:
            failure = error
            continue
        device = posix.fstat(fd).st_rdev
        if (posix.major(device), posix.minor(device)) == PTMX:
            return fd
        posix.close(fd)
    if failure is not None and failure.errno == errno.ENOSPC:
        raise Refused("failed", "there are no terminals left in this sandbox, or on this machine")
    raise failure or Refused("failed", "/dev/ptmx is not the maker of terminals")


def open_slave(master: int, plan: Plan) -> int:
    """Not by its name: that is only as good as who is root inside."""
    fcntl.ioctl(master, TIOCSPTLCK, bytes(4))
    flags = posix.O_RDWR | posix.O_NOCTTY | posix.O_CLOEXEC
    slave = fcntl.ioctl(master, TIOCGPTPEER, flags)
    try:
        modes = fcntl.ioctl(slave, TCGETS, bytes(TERMIOS_BYTES))
        inputs = int.from_bytes(modes[:4], sys.byteorder) | IUTF8
        fcntl.ioctl(slave, TCSETS, inputs.to_bytes(4, sys.byteorder) + modes[4:])
        if plan.account.ids is not None:
            posix.fchown(slave, plan.account.ids[0], -1)
    except BaseException:
        posix.close(slave)
        raise
    return slave


# -- the child -------------------------------------------------------------------------------------


def become(slave: int, told: int, plan: Plan, login: bool) -> NoReturn:
    """In the forked child: what `_posixsubprocess` does, in its order and with its way of telling
    what went wrong, and the terminal made the session's own."""
    try:
        enter(slave, told, plan)
    except BaseException as failure:  # noqa: BLE001 - nothing may go on as a second agent
        tell(told, failure, b"noexec")
    try:
        tell(told, execute_first(starts(plan, login)), b"")
    except BaseException as failure:  # noqa: BLE001 - as above
        tell(told, failure, b"")


def enter(slave: int, told: int, plan: Plan) -> None:
    _signal.set_wakeup_fd(-1)
    for fd in range(3):
        posix.dup2(slave, fd)
    posix.closerange(3, told)
    posix.closerange(told + 1, MAX_FILES)
    posix.chdir(plan.cwd)
    for ignored in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(ignored, _signal.SIG_DFL)
    posix.setsid()
    fcntl.ioctl(0, TIOCSCTTY, 0)
    if plan.account.ids is not None:
        uid, gid = plan.account.ids
        posix.setgroups(plan.account.groups)
        posix.setregid(gid, gid)
        posix.setreuid(uid, uid)


def tell(told: int, failure: BaseException, where: bytes) -> NoReturn:
    number = failure.errno if isinstance(failure, OSError) else None
    try:
        posix.write(told, b"OSError:%x:%b" % (number or errno.EINVAL, where))
    finally:
        posix._exit(255)


def starts(plan: Plan, login: bool) -> Iterator[tuple[bytes, list[bytes], dict[bytes, bytes]]]:
    """What to execute: the first that is there."""
    shells = shells_of(plan)
    if login:  # a leading dash has them read the profile
        for shell in shells:
            variables = {b"SHELL": shell, **plan.environment}
            yield shell, [b"-" + shell.rpartition(b"/")[2]], variables
        return
    usable = [shell for shell in shells if posix.access(shell, posix.X_OK)]
    variables = {b"SHELL": (usable or shells)[0], **plan.environment}
    for file in plan.candidates():
        yield file, plan.argv, variables


def shells_of(plan: Plan) -> list[bytes]:
    """bash where there is one, else sh."""
    path = plan.environment.get(b"PATH", DEFAULT_PATH)
    places = [place for place in path.split(b":") if place.startswith(b"/")]
    return [*(place + b"/bash" for place in places), b"/bin/sh"]


def execute_first(files: Iterator[tuple[bytes, list[bytes], dict[bytes, bytes]]]) -> OSError:
    """What was in the way of all of them, as execvp(3) chooses it."""
    missing = refused = None
    for file, argv, variables in files:
        try:
            if not file:
                raise FileNotFoundError(errno.ENOENT, "no name")
            posix.execve(file, argv, variables)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                missing = error
            else:
                refused = refused or error
    return refused or missing or OSError(errno.ENOENT, "nothing to execute")


# -- operations ------------------------------------------------------------------------------------


def terminal(terminals: Terminals, connection: Connection, request: Fields) -> None:
    name = name_of(request)
    if number(request, "new", 0):
        opened(terminals, name, request).attach(connection)
        return
    found = terminals.named.get(name)
    if found is None or found.hung_up:
        raise Refused("gone", "there is no such terminal, or there is no longer")
    found.attach(connection)


def opened(terminals: Terminals, name: bytes, request: Fields) -> Terminal:
    refuse_while_stopping(terminals.agent)
    if name in terminals.named:
        raise Refused("failed", "there is a terminal of this name already")
    login = not request.get("argv")
    if login:
        request = {**request, "argv": [b"/bin/sh"]}
    plan = Plan(terminals.agent, {**terminals.agent.environment, **request})
    variables = (*plan.environment, *plan.environment.values())
    if b"\0" in b"".join((plan.cwd, *plan.argv, *variables)):
        raise ValueError("embedded null byte")  # as for a command
    keep_s = min(max(0, number(request, "keep_ms", 0)) / 1000, MAX_KEEP_S)
    terminals.make_room()
    made = Terminal(terminals, name, keep_s)
    made.start(plan, login, size_of(request))
    return made


def hangup(terminals: Terminals, connection: Connection, request: Fields) -> None:
    found = terminals.named.get(name_of(request))
    if found is not None:
        found.hang_up()
    connection.finish({"ok": 1})


def name_of(request: Fields) -> bytes:
    name = octets(request, "session", b"")
    if len(name) not in NAME_BYTES or not NAME_LETTERS.issuperset(name):
        raise Refused("failed", "not a name for a terminal")
    return name


def size_of(request: Fields) -> tuple[int, int]:
    cols, rows = number(request, "cols", 0), number(request, "rows", 0)
    return (cols, rows) if cols in SIDES and rows in SIDES else USUAL_SIZE


OPERATIONS: dict[bytes, Callable[[Terminals, Connection, Fields], None]] = {
    b"terminal": terminal,
    b"hangup": hangup,
}
