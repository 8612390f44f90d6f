"""gunicorn's gevent worker and logger, mended: how a worker ends, and what is said in JSON.

The only module that imports gunicorn. As gunicorn 27 comes, a worker that ends writes a 500 into
every connection that waits for its next request, and a configuration that cannot be read ends the
whole server at SIGHUP.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import gevent
from gevent import get_hub
from gunicorn import glogging
from gunicorn.workers import ggevent

from heyvm import journal

LOOK_S = 0.05
# A connection that has had an answer may be used again at any moment; one that has not for so long
# is closed as soon as the worker is to end, between two requests, as HTTP allows (RFC 9112, 9.5).
QUIET_S = 1.0
SERVED = "heyvm_served"
QUERY = re.compile(r"\?[^\s'\"]*")
# What is wrong, without what was sent.
REFUSED = re.compile(r"(Invalid request from ip=\S*: [A-Za-z ]*).*", re.DOTALL)


class Worker(ggevent.GeventWorker):  # type: ignore[misc]  # gunicorn has no types
    """Ends without a word to who waits, and without waiting for who is idle."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.wsgi: Any = None
        self._heads: set[_Head] = set()

    def run(self) -> None:
        gevent.spawn(self._close_idle)
        self.wsgi = partial(self._answer, self.wsgi)
        super().run()

    def _answer(self, application: Any, environ: Any, start_response: Any) -> Any:
        """gunicorn decides when a request begins whether its connection stays; one that takes its
        time may end in a worker that is to end by then."""

        def start(*args: Any) -> Any:
            if not self.alive:
                start_response.__self__.force_close()
            return start_response(*args)

        environ["heyvm.is_ending"] = self._is_ending
        return application(environ, start)

    def _is_ending(self) -> bool:
        """For what lasts longer than a request: it has some seconds to say goodbye."""
        return not self.alive

    def timeout_ctx(self) -> _Head:
        """gunicorn waits for each request's head within it."""
        return _Head(self._heads, self.cfg.keepalive)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        # The time for requests in flight is over: there is nothing to be said any more.
        if not isinstance(exc, gevent.GreenletExit):
            super().handle_error(req, client, addr, exc)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        done = super().handle_request(listener_name, req, sock, addr)
        setattr(gevent.getcurrent(), SERVED, True)
        return done

    def _close_idle(self) -> None:
        """Once it is to end: hang up on those that have had an answer and ask for nothing. A
        connection that is new keeps the time that requests in flight have."""
        while self.alive:
            gevent.sleep(LOOK_S)
        ending = time.monotonic()
        while True:
            if time.monotonic() - ending > QUIET_S:
                for head in list(self._heads):
                    if head.served:
                        head.give_up()
            gevent.sleep(LOOK_S)


class _Head:
    """The wait for one request's head: for so long, or until it is given up."""

    def __init__(self, heads: set[_Head], seconds: float) -> None:
        self._heads = heads
        # `False`: its end is an end of the block, not an error.
        self._timeout: Any = gevent.Timeout(seconds, False)  # type: ignore[arg-type]
        self._greenlet = gevent.getcurrent()
        self.served = getattr(self._greenlet, SERVED, False)

    def __enter__(self) -> _Head:
        self._heads.add(self)
        self._timeout.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Any:
        self._heads.discard(self)
        return self._timeout.__exit__(kind, error, traceback)

    def give_up(self) -> None:
        """As if its time were over."""
        get_hub().loop.run_callback(self._throw)

    def _throw(self) -> None:
        # In the loop, so that nothing comes between the look and the throw: a request whose head
        # has come meanwhile is served.
        if self in self._heads:
            self._heads.discard(self)
            self._greenlet.throw(self._timeout)


class Log(glogging.Logger):  # type: ignore[misc]
    """gunicorn's own lines, without queries and without what could not be read."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        if journal.wanted():
            journal.begin_json("server")
        for handler in self.error_log.handlers:
            if not any(isinstance(one, _Harmless) for one in handler.filters):
                handler.addFilter(_Harmless())
            if journal.writes_json():
                handler.emit = journal.log


class _Harmless(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        said = REFUSED.sub(r"\1...", QUERY.sub("?...", record.getMessage()))
        record.msg, record.args = said, ()
        return True


def survive_bad_reloads(application: Any, say: Callable[[str], None]) -> None:
    """What gunicorn calls at SIGHUP leaves the process where the configuration cannot be read:
    have it keep the one that it has."""
    reload = application.reload

    def careful() -> None:
        before = application.cfg
        try:
            reload()
        except SystemExit:
            application.cfg = before
            say("the new configuration cannot be read: the one of before is kept")

    application.reload = careful
