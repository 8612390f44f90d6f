"""What schemathesis is told about this server (SCHEMATHESIS_HOOKS): which things are there to be
asked about, and that no request is to take long.

Not imported by tests: it registers itself with schemathesis for the whole process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from zlib import crc32

import requests
import schemathesis

URL = os.environ["SERVER_URL"]
PROJECT = os.environ["PROJECT_DIR"]  # a directory of the host that may be mounted
SANDBOX = {"name": "box", "slug": "box"}
# The document's examples.
EXAMPLES = {
    "ref": "api-demo",
    "path": "index.html",
    "sandbox_path": "/workspace",
    "mount_path": "/workspace",
    "host_path": "/home/user/project",
}
WAIT_S, LONGEST_WAIT_S, LONGEST_COMMAND_S = 0.5, 300, 365 * 24 * 60 * 60
KEEP = 5  # sandboxes made by create, so that other calls meet some

http = requests.Session()
http.trust_env = False
made: list[str] = []


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: dict[str, Any]) -> None:
    """Not the `map_` hooks: those see nothing of the phases "examples" and "coverage"."""
    path, query = case.path_parameters or {}, case.query or {}
    # A form that is changed is taken for an invalid one: its bytes are no JSON string.
    body = case.body if case.media_type == "application/json" else None
    # A stateful phase has sandboxes of its own, and looks whether what it deleted is gone.
    if case.meta is None or case.meta.phase.name.value != "stateful":
        name_what_is_there(path)
    if case.meta is None or case.meta.generation.mode.is_positive:
        name_what_is_there(query)
        see_to_format(query, case.media_type)
        name_directories(body)
    shorten(query, "timeout", LONGEST_WAIT_S, beside="wait")
    shorten(body, "timeout_seconds", LONGEST_COMMAND_S, beside="command")
    if path.get("ref") == SANDBOX["slug"]:
        see_to_sandbox()
        PREPARED.get(case.operation.definition.raw["operationId"], nothing)()


@schemathesis.hook
def after_call(_context: Any, case: Any, response: Any) -> None:
    """Delete what create made a while ago: sandboxes pile up otherwise."""
    if case.operation.label != "POST /sandboxes" or response.status_code not in (201, 202, 422):
        return
    ref = response.json().get("id")
    if ref and ref not in made:
        made.append(ref)
    if len(made) > KEEP:
        http.delete(f"{URL}/sandboxes/{made.pop(0)}")


def name_what_is_there(given: dict[str, Any]) -> None:
    """Most requests are about a sandbox that is there, and many about a file or mount that is."""
    if is_text(given.get("ref"), but_one_in=4):
        given["ref"] = SANDBOX["slug"]
    for name in ("path", "sandbox_path", "mount_path"):
        if is_text(given.get(name), but_one_in=2):
            given[name] = EXAMPLES[name]


def see_to_format(query: dict[str, Any], media_type: str | None) -> None:
    """Words that are not `tar` are refused: seldom is enough."""
    if media_type == "application/x-tar":
        query["format"] = "tar"
    elif is_text(query.get("format"), but_one_in=3):
        del query["format"]


def name_directories(body: Any) -> None:
    """Many mounts are of a directory that is there."""
    if not isinstance(body, dict):
        return
    if is_text(body.get("mount_path"), but_one_in=2):
        body["mount_path"] = EXAMPLES["mount_path"]
    for mount in [body, *(body.get("mounts") or ())]:
        if is_text(mount.get("host_path"), but_one_in=2):
            mount["host_path"] = PROJECT


def shorten(given: Any, name: str, longest: float, *, beside: str) -> None:
    """No request takes long. What is no number, or out of range, stays so."""
    if not isinstance(given, dict) or beside not in given:
        return
    seconds = given.setdefault(name, longest)
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if is_number and WAIT_S < seconds <= longest:
        given[name] = WAIT_S


def is_text(given: Any, *, but_one_in: int) -> bool:
    """True for an example of the document, and for all but one in so many other texts; always the
    same for the same text."""
    if not isinstance(given, str) or not given:
        return False
    return given in EXAMPLES.values() or crc32(given.encode("utf-8", "replace")) % but_one_in != 0


def see_to_sandbox() -> None:
    found = http.get(f"{URL}/sandboxes/{SANDBOX['slug']}")
    if found.status_code == 404:
        http.post(f"{URL}/sandboxes", json=SANDBOX)
    elif found.json()["status"] != "running":
        http.post(f"{URL}/sandboxes/{SANDBOX['slug']}/start")


def put_file() -> None:
    http.post(f"{URL}/sandboxes/{SANDBOX['slug']}/files/upload",
              json={"file_path": EXAMPLES["path"], "content": "SGVsbG8gd29ybGQh"})  # fmt: skip


def put_mount() -> None:
    http.post(f"{URL}/sandboxes/{SANDBOX['slug']}/mounts",
              json={"host_path": PROJECT, "sandbox_path": EXAMPLES["sandbox_path"]})  # fmt: skip


def nothing() -> None:
    """For operations that need no more than a sandbox."""


PREPARED: dict[str, Callable[[], None]] = {
    "downloadFile": put_file,
    "deleteFile": put_file,
    "removeMount": put_mount,
}
