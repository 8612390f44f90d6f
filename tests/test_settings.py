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
