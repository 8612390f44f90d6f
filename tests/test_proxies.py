"""What becomes of endpoints, on a fake backend: rows, order, and what is left when a step fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from heyvm.errors import BackendFailed, Conflict, NotFound, QuotaExceeded, Unavailable
from heyvm.lifecycle import Lifecycle
from heyvm.models import CreateSpec, Endpoint, Sandbox
from heyvm.proxies import MAX_ENDPOINTS, Proxies
from heyvm.registry import Registry
from heyvm.settings import Settings
from heyvm.sockets import Sockets
from tests.fake_backend import FileBackend


class NoSockets(Sockets):
    """Writes down what is asked for; `broken` refuses to open."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.broken = False

    def open(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        self.said.append(("open", endpoint.subdomain))
        if self.broken:
            raise BackendFailed("no socket")

    def close(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        self.said.append(("close", endpoint.subdomain))

    def change(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        self.said.append(("public" if endpoint.is_public else "private", endpoint.subdomain))

    def open_all(self, sandbox: Sandbox) -> None:
        self.said.append(("open all", sandbox.id))

    def remove_all(self, sandbox_id: str) -> None:
        self.said.append(("remove all", sandbox_id))


@dataclass
class Keeper:
    """Gives each endpoint without a port the next one, when it is asked; `dead` never answers."""

    registry: Registry
    dead: bool = False
    asked: list[str] = field(default_factory=list)

    def sync(self, sandbox_id: str) -> None:
        self.asked.append(sandbox_id)
        if self.dead:
            raise Unavailable("the keeper does not answer")
        known = [*self.registry.endpoints(sandbox_id), *self.registry.unready_endpoints()]
        for number, one in enumerate(known):
            if one.local_port is None:
                self.registry.set_local_port(one.subdomain, 40000 + number)


@dataclass
class Parts:
    lifecycle: Lifecycle
    sockets: NoSockets
    keeper: Keeper
    proxies: Proxies


Make = Callable[..., Parts]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(api_hostname: str | None = None) -> Parts:
        settings = Settings(tmp_path / "data", tmp_path / "run", api_hostname=api_hostname)
        backend = FileBackend(tmp_path / "boxes")
        registry = Registry(settings.data_dir / "registry.db")
        keeper = Keeper(registry)
        lifecycle = Lifecycle(registry, {backend.name: backend}, settings, None, keeper.sync)
        sockets = lifecycle.sockets = NoSockets()
        lifecycle.create(CreateSpec(name="box"))
        return Parts(lifecycle, sockets, keeper, Proxies(lifecycle, keeper.sync))

    return build


@pytest.fixture
def parts(make: Make) -> Parts:
    return make()


def test_an_endpoint_works_before_it_is_shown(parts: Parts) -> None:
    made = parts.proxies.create("box", 80)

    assert made.local_port == 40000
    assert ("open", made.subdomain) in parts.sockets.said
    assert parts.proxies.list("box") == [made]
    assert parts.proxies.find(made.subdomain) == made
    assert len(made.subdomain) == 16


def test_an_endpoint_whose_socket_cannot_be_made_is_not_there(parts: Parts) -> None:
    parts.sockets.broken = True

    with pytest.raises(BackendFailed):
        parts.proxies.create("box", 80)

    (_, subdomain) = next(one for one in parts.sockets.said if one[0] == "open")
    assert parts.proxies.list("box") == []
    assert parts.proxies.registry.unready_endpoints() == []
    assert ("close", subdomain) in parts.sockets.said
    with pytest.raises(NotFound):
        parts.proxies.find(subdomain)


def test_an_endpoint_without_a_keeper_is_not_there(parts: Parts) -> None:
    parts.keeper.dead = True

    with pytest.raises(Unavailable):
        parts.proxies.create("box", 80)

    assert parts.proxies.list("box") == []
    assert parts.proxies.registry.unready_endpoints() == []


def test_with_api_hostname_nobody_asks_the_keeper_for_a_port(make: Make) -> None:
    parts = make("example.com")
    parts.keeper.dead = True

    made = parts.proxies.create("box", 80)
    parts.proxies.change("box", made.subdomain, is_public=False)
    parts.proxies.delete("box", made.subdomain)

    assert made.local_port is None
    assert parts.keeper.asked == []


def test_an_endpoint_is_made_for_a_stopped_sandbox_and_not_for_a_paused_one(parts: Parts) -> None:
    parts.lifecycle.stop("box")
    made = parts.proxies.create("box", 80)
    assert ("open", made.subdomain) not in parts.sockets.said
    with pytest.raises(Unavailable, match="stopped"):
        parts.proxies.connect(made)

    registry = parts.lifecycle.registry
    parts.lifecycle.start("box")
    registry.settle_paused(parts.lifecycle.get("box").id, True)
    with pytest.raises(Conflict, match="paused"):
        parts.proxies.create("box", 80)
    with pytest.raises(Unavailable, match="paused"):
        parts.proxies.connect(made)


def test_a_delete_takes_the_row_first_and_needs_no_keeper(parts: Parts) -> None:
    made = parts.proxies.create("box", 80)
    parts.keeper.dead = True

    parts.proxies.delete("box", made.subdomain)

    assert parts.sockets.said[-1] == ("close", made.subdomain)
    with pytest.raises(NotFound):
        parts.proxies.delete("box", made.subdomain)


def test_an_endpoint_of_another_sandbox_is_not_there(parts: Parts) -> None:
    made = parts.proxies.create("box", 80)
    parts.lifecycle.create(CreateSpec(name="other"))

    for call in (
        lambda: parts.proxies.get("other", made.subdomain),
        lambda: parts.proxies.delete("other", made.subdomain),
        lambda: parts.proxies.change("other", made.subdomain, is_public=False),
    ):
        with pytest.raises(NotFound):
            call()
    assert parts.proxies.list("box") == [made]


def test_endpoints_go_with_their_sandbox(parts: Parts) -> None:
    made = parts.proxies.create("box", 80)
    sandbox = parts.lifecycle.get("box")

    parts.lifecycle.delete("box")

    assert ("remove all", sandbox.id) in parts.sockets.said
    assert parts.keeper.asked[-1] == sandbox.id
    for call in (lambda: parts.proxies.find(made.subdomain), lambda: parts.proxies.connect(made)):
        with pytest.raises(NotFound):
            call()


def test_a_change_of_who_may_use_it_is_done_once(parts: Parts) -> None:
    made = parts.proxies.create("box", 80)

    assert parts.proxies.change("box", made.subdomain, is_public=True) == made
    closed = parts.proxies.change("box", made.subdomain, is_public=False)

    assert (closed.is_public, closed.local_port) == (False, made.local_port)
    assert [one for one in parts.sockets.said if one[0] in ("public", "private")] == [
        ("private", made.subdomain)
    ]


def test_sockets_are_opened_before_a_sandbox_is_said_to_run(parts: Parts) -> None:
    parts.lifecycle.stop("box")
    parts.sockets.said.clear()

    parts.lifecycle.start("box")

    assert parts.sockets.said == [("open all", parts.lifecycle.get("box").id)]


def test_an_internal_port_is_the_same_every_time(parts: Parts) -> None:
    first = parts.proxies.internal("box", 8080)

    assert parts.proxies.internal("box", 8080) == first
    assert parts.proxies.list("box") == []
    parts.lifecycle.update("box", {"open_ports": [90]})
    assert parts.proxies.internal("box", 90).kind == "open"
    parts.lifecycle.stop("box")
    with pytest.raises(Conflict, match="start it"):
        parts.proxies.internal("box", 8080)


def test_open_ports_have_their_ports_when_a_create_or_an_update_answers(parts: Parts) -> None:
    made, _ = parts.lifecycle.create(CreateSpec(name="open", open_ports=(80, 81)))
    assert [one.guest_port for one in made.port_mappings] == [80, 81]

    changed = parts.lifecycle.update("open", {"open_ports": [81, 82]})

    assert [one.guest_port for one in changed.port_mappings] == [81, 82]
    assert changed.port_mappings[0] == made.port_mappings[1]


def test_a_create_waits_for_no_keeper_that_is_gone(parts: Parts) -> None:
    parts.keeper.dead = True

    made, _ = parts.lifecycle.create(CreateSpec(name="open", open_ports=(80,)))

    assert (made.open_ports, made.port_mappings) == ((80,), ())


def test_there_are_only_so_many(parts: Parts) -> None:
    sandbox = parts.lifecycle.get("box")
    for number in range(MAX_ENDPOINTS):
        one = Endpoint(f"{number:016d}", sandbox.id, 80, 1.0)
        parts.proxies.registry.add_endpoint(one, limit=MAX_ENDPOINTS, ready=True)

    with pytest.raises(QuotaExceeded):
        parts.proxies.create("box", 80)
