"""Which requests a view gets to see: by their host, their origin, and whose they are.

Knows neither routes nor sandboxes.
"""

from __future__ import annotations

from typing import Any

from heyvm.origins import Machine, check_host, check_origin
from heyvm.settings import Settings
from heyvm.tokens import admit, prepare, subject_of

SUBJECT = "heyvm.subject"  # in the environ: whose token it was; None without one


class Guard:
    """Decides on each request before any view sees it. One per server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._machine = Machine()
        if settings.jwt_secret is not None:
            prepare(settings.jwt_secret)

    def check(self, environ: dict[str, Any], *, bearer: bool = True) -> None:
        """Raise `BadRequest`, `Forbidden` or `Unauthorized`; `bearer=False`: no token is needed.

        Writes the token's subject into `environ`, under `SUBJECT`.
        """
        environ[SUBJECT] = None
        check_host(environ, self._settings.api_hostname, self._machine)
        check_origin(environ)
        if bearer or self._settings.jwt_secret is None:
            environ[SUBJECT] = subject_of(admit(environ, self._settings))
