"""Which requests a view gets to see: by their host, their origin, and whose they are.

Knows neither routes nor sandboxes.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

from heyvm.errors import BadRequest
from heyvm.origins import Machine, check_host, check_origin
from heyvm.settings import Settings
from heyvm.tokens import admit, prepare, subject_of

MAX_FIELDS = 10  # of a query in which a token is looked for
SUBJECT = "heyvm.subject"  # in the environ: whose token it was; None without one


class Guard:
    """Decides on each request before any view sees it. One per server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._machine = Machine()
        if settings.jwt_secret is not None:
            prepare(settings.jwt_secret)

    def check(
        self, environ: dict[str, Any], *, bearer: bool = True, in_query: bool = False
    ) -> None:
        """Raise `BadRequest`, `Forbidden` or `Unauthorized`; `bearer=False`: no token is needed,
        `in_query`: it may be `?token=` too.

        Writes the token's subject into `environ`, under `SUBJECT`.
        """
        environ[SUBJECT] = None
        if in_query:
            move_token(environ)
        check_host(environ, self._settings.api_hostname, self._machine)
        check_origin(environ)
        if bearer or self._settings.jwt_secret is None:
            environ[SUBJECT] = subject_of(admit(environ, self._settings))


def move_token(environ: dict[str, Any]) -> None:
    """Make of `?token=` the header that stands for it, and leave no query for anybody to log."""
    query = environ.get("QUERY_STRING", "")
    environ["QUERY_STRING"] = ""
    if "RAW_URI" in environ:
        environ["RAW_URI"] = environ["RAW_URI"].partition("?")[0]
    header = environ.get("HTTP_AUTHORIZATION")
    given = set(tokens_in(query))
    if len(given | ({header.strip().partition(" ")[2].strip()} if header else set())) > 1:
        raise BadRequest("more than one token: say it in Authorization or as ?token=")
    if given and header is None:
        environ["HTTP_AUTHORIZATION"] = f"Bearer {given.pop()}"


def tokens_in(query: str) -> list[str]:
    try:
        return parse_qs(query, keep_blank_values=True, max_num_fields=MAX_FIELDS).get("token", [])
    except ValueError:
        raise BadRequest(f"a query of more than {MAX_FIELDS} fields") from None
