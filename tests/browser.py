"""Debian's chromium without a screen, driven by the DevTools protocol over two pipes.

with Browser(nginx) as browser:
    browser.open("https://x.sandbox.test/")
    assert browser.evaluate("document.title") == "..."
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from heyvm.backends import trees
from tests.nginx import HOSTNAME, Nginx
from tests.server import PATIENCE, wait_until

DEADLINE_S = 60 * PATIENCE  # its first start reads 300 MB from the disk


class Browser:
    """One page of a browser of its own, for which every name below sandbox.test is `nginx`, and
    which takes its certificate alone for a good one. Starts at once."""

    def __init__(self, nginx: Nginx) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="hb-"))
        self._numbers, self._buffer, self._session = 0, b"", ""
        its_input, self._input = os.pipe()
        self._output, its_output = os.pipe()
        self.process = self._spawn(nginx, its_input, its_output)
        os.close(its_input)
        os.close(its_output)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spawn(self, nginx: Nginx, reads: int, writes: int) -> subprocess.Popen[bytes]:
        # The protocol's own numbers for the two: 3 and 4.
        shell = f'exec 3<&{reads} 4>&{writes}; exec "$@"'
        flags = [
            "--headless=new",
            "--no-sandbox",  # it refuses to be root's with one
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--remote-debugging-pipe",
            f"--user-data-dir={self.home}",
            f"--host-resolver-rules=MAP *.{HOSTNAME}:443 127.0.0.1:{nginx.https_port}",
            f"--ignore-certificate-errors-spki-list={nginx.certificate.pin()}",
        ]
        with (self.home / "log").open("wb") as log:
            return subprocess.Popen(
                ["bash", "-c", shell, "-", "chromium", *flags],
                pass_fds=(reads, writes),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8"},
            )

    def close(self) -> None:
        """End it with all of its processes, some of which write to its directory to the last."""
        for descriptor in (self._input, self._output):
            os.close(descriptor)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        wait_until(self._is_gone, "chromium's processes are gone")
        trees.remove(str(self.home))

    def _is_gone(self) -> bool:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return True
        return False

    def open(self, url: str) -> None:
        """Go there. The page may still be loading when this returns."""
        problem = self.call("Page.navigate", url=url).get("errorText")
        assert problem is None, f"{url}: {problem}"

    def evaluate(self, expression: str) -> Any:
        """What JavaScript on the page makes of it; the value of a promise is waited for."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        return found["result"].get("value")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One call of the protocol."""
        self._numbers += 1
        message = {"id": self._numbers, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._input, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._numbers:
            pass
        assert "error" not in answer, answer["error"]
        return dict(answer["result"])

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + DEADLINE_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._output], [], [], max(0, end - time.monotonic()))
            piece = os.read(self._output, 1 << 20) if ready else b""
            assert piece, f"chromium says nothing:\n{(self.home / 'log').read_text()}"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))
