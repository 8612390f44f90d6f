"""A real browser opens what servers inside sandboxes serve, through a real nginx."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import webapp
from tests.browser import Browser
from tests.nginx import HOSTNAME, Nginx, traversable
from tests.server import Server, Session, create, run, wait_until
from tests.ways import expose


@pytest.fixture(scope="module")
def ports() -> Iterator[Path]:
    with traversable() as directory:
        yield directory / "p"


@pytest.fixture(scope="module")
def api(ports: Path) -> Iterator[Session]:
    settings = {"HEYVM_PORTS_DIR": str(ports), "HEYVM_PORTS_GROUP": "www-data"}
    secret = "a secret for tests, of more than 32 bytes"
    with Server(API_HOSTNAME=HOSTNAME, JWT_SECRET=secret, **settings) as front:
        with front.http() as session:
            session.headers.update(front.authorization())
            yield session


@pytest.fixture(scope="module")
def sandbox_id(api: Session) -> str:
    ref = str(create(api, start_command=webapp.command())["id"])
    listens = "until (exec 3<>/dev/tcp/127.0.0.1/8000) 2>/dev/null; do sleep 0.05; done"
    assert run(api, ref, f"timeout 30 bash -c '{listens}'")["exit_code"] == 0
    return ref


@pytest.fixture(scope="module")
def browser(api: Session, ports: Path) -> Iterator[Browser]:
    upstream = api.base.removeprefix("http://")
    with Nginx(upstream=upstream, ports_dir=ports) as nginx, Browser(nginx) as running:
        yield running


def said(browser: Browser) -> str:
    return str(browser.evaluate("document.getElementById('said')?.textContent"))


def await_said(browser: Browser, text: str) -> None:
    wait_until(lambda: said(browser) == text, f"the page says {text!r}", timeout=30, check=False)
    assert said(browser) == text, browser.evaluate("document.documentElement.outerHTML")


def test_a_page_shows_what_came_back_over_its_websocket(
    browser: Browser, api: Session, sandbox_id: str
) -> None:
    endpoint = expose(api, sandbox_id)

    browser.open(f"{endpoint['url']}/page")

    await_said(browser, "back: hello from /page")
    assert browser.evaluate("location.protocol") == "https:"


def test_a_link_opens_a_private_page_and_its_websocket(
    browser: Browser, api: Session, sandbox_id: str
) -> None:
    endpoint = expose(api, sandbox_id, public=False)
    route = f"/sandboxes/{sandbox_id}/proxy/{endpoint['subdomain']}/link"

    browser.open(f"{endpoint['url']}/page")
    assert "urn:heyvm:problem:unauthorized" in browser.evaluate("document.body.textContent")
    link = api.post(route, json={"path": "/page"}).json()["url"]
    browser.open(link)

    await_said(browser, "back: hello from /page")
    # The page sees neither the link nor the cookie.
    assert browser.evaluate("location.href") == f"{endpoint['url']}/page"
    assert browser.evaluate("document.cookie") == ""
    assert browser.evaluate("document.referrer") == ""
    browser.open(f"{endpoint['url']}/page")
    await_said(browser, "back: hello from /page")


def test_a_private_page_is_closed_to_other_endpoints_pages(
    browser: Browser, api: Session, sandbox_id: str
) -> None:
    private, public = (expose(api, sandbox_id, public=one) for one in (False, True))
    route = f"/sandboxes/{sandbox_id}/proxy/{private['subdomain']}/link"
    browser.open(api.post(route, json={"path": "/page"}).json()["url"])
    await_said(browser, "back: hello from /page")
    browser.open(f"{public['url']}/page")
    await_said(browser, "back: hello from /page")

    # To a browser it is of the same site, so its requests carry the cookie.
    read = f"fetch('{private['url']}/x', {{credentials: 'include'}}).then(a => a.text(), e => 'no')"
    send = f"""fetch('{private["url"]}/unwanted', {{
        method: 'POST', mode: 'no-cors', credentials: 'include', body: 'x',
    }}).then(a => a.type)"""
    show = f"""new Promise(done => {{
        const image = new Image();
        image.onload = image.onerror = () => done('over');
        image.src = '{private["url"]}/unwanted';
    }})"""
    opened = f"""new Promise(done => {{
        const socket = new WebSocket('{private["url"].replace("https", "wss")}/ws');
        socket.onopen = () => done('open');
        socket.onerror = () => done('refused');
    }})"""

    assert browser.evaluate(read) == "no"
    assert browser.evaluate(opened) == "refused"
    assert (browser.evaluate(send), browser.evaluate(show)) == ("opaque", "over")
    browser.open(f"{public['url']}/seen")
    assert "unwanted" not in browser.evaluate("document.body.textContent")
    assert "GET /page" in browser.evaluate("document.body.textContent")
