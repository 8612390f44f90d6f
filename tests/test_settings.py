"""What the environment says, and what is said of it."""

from __future__ import annotations

import pytest

from heyvm.errors import Misconfigured
from heyvm.settings import from_env


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("example.com", "example.com"),
        (" Example.COM. ", "example.com"),
        ("localhost", "localhost"),
        ("a-b.my_net.test", "a-b.my_net.test"),
        ("", None),
    ],
)
def test_the_api_s_name(given: str, taken: str | None) -> None:
    assert from_env({"API_HOSTNAME": given}).api_hostname == taken


@pytest.mark.parametrize(
    "given",
    [
        "https://example.com",
        "example.com:443",
        "example.com/api",
        "*.example.com",
        "a b",
        "a..b",
        "-a.test",
        "münchen.test",
        "a" * 254,
    ],
)
def test_what_is_no_host_name_is_refused(given: str) -> None:
    with pytest.raises(Misconfigured, match=r"API_HOSTNAME is .*: say a host name alone"):
        from_env({"API_HOSTNAME": given})


def test_a_group_that_is_not_there_is_refused() -> None:
    with pytest.raises(Misconfigured, match="HEYVM_PORTS_GROUP is 'no-such-group'.*www-data"):
        from_env({"HEYVM_PORTS_GROUP": "no-such-group"})


@pytest.mark.parametrize(
    ("environ", "host"),
    [
        ({}, "127.0.0.1"),
        ({"HEYVM_HOST": "0.0.0.0"}, "127.0.0.1"),  # the API answers this machine alone
        ({"JWT_SECRET": "s" * 32}, "0.0.0.0"),
        ({"HEYVM_ALLOW_OPEN": "1", "HEYVM_HOST": "192.0.2.7"}, "192.0.2.7"),
        ({"JWT_SECRET": "s" * 32, "HEYVM_HOST": "127.0.0.1"}, "127.0.0.1"),
        ({"JWT_SECRET": "s" * 32, "HEYVM_HOST": "localhost"}, "127.0.0.1"),
        ({"JWT_SECRET": "s" * 32, "HEYVM_HOST": "[::]"}, "::"),
        ({"JWT_SECRET": "s" * 32, "HEYVM_HOST": "box.example.com"}, "0.0.0.0"),
        ({"HEYVM_TUNNEL_HOST": "0.0.0.0"}, "0.0.0.0"),
        ({"HEYVM_TUNNEL_HOST": "2001:db8::5", "HEYVM_HOST": "127.0.0.1"}, "2001:db8::5"),
    ],
)
def test_where_tickets_listen(environ: dict[str, str], host: str) -> None:
    assert from_env(environ).tunnel_host == host


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HEYVM_TUNNEL_HOST", "box.example.com"),
        ("HEYVM_TUNNEL_PORTS", "49200"),
        ("HEYVM_TUNNEL_PORTS", "49400-49200"),
        ("HEYVM_TUNNEL_PORTS", "0-10"),
        ("HEYVM_TUNNEL_PORTS", "49200-70000"),
        ("HEYO_IROH_RELAY_URL", "relay.example.com"),
        ("HEYO_IROH_RELAY_URL", "https://relay.example.com/a b"),
    ],
)
def test_what_tickets_cannot_have_is_refused(name: str, value: str) -> None:
    with pytest.raises(Misconfigured, match=f"{name} is '{value}': say "):
        from_env({name: value})


def test_tickets_ports_and_relay() -> None:
    given = {"HEYVM_TUNNEL_PORTS": " 49200-49400 ", "HEYO_IROH_RELAY_URL": "https://relay.test/"}
    found = from_env(given)

    assert found.tunnel_ports == (49200, 49400)
    assert found.iroh_relay == "https://relay.test/"
