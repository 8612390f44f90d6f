"""The ways of running sandboxes, by the name that a request uses."""

from __future__ import annotations

from heyvm.backends.base import Backend
from heyvm.settings import Settings


def build(settings: Settings) -> dict[str, Backend]:
    """Every backend that this server has. The first is the default."""
    # Here, so that who needs one small module of this package does not load all of it.
    from heyvm.backends.bubblewrap import Bubblewrap

    return {Bubblewrap.name: Bubblewrap(settings)}
