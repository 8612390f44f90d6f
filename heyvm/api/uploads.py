"""Uploads on their way in: constant memory, whatever the size.

A form is taken apart while it arrives and its file handed on piece by piece. The iterator that the
domain pulls from ends only when the whole body has been seen to be well formed, and raises
otherwise: an upload that was cut off, at whatever byte, is never committed.
"""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from flask import request
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from heyvm.api import limits, paths
from heyvm.api.bodies import CHUNK_BYTES, require_type, stream
from heyvm.api.parts import files, settings
from heyvm.api.schemas import from_base64
from heyvm.errors import BadRequest, Invalid, TooLarge

MAX_JSON_UPLOAD_BYTES = 64 * limits.MIB
MAX_BOUNDARY = 200  # RFC 2046 section 5.1.1 says 70
FORM = "multipart/form-data"
TAR = "application/x-tar"
# A form's own lines on top of the file that it carries.
FORM_ALLOWANCE_BYTES = limits.MAX_PARTS * 2 * limits.MAX_FIELD_BYTES


@dataclass
class Form:
    """A form as it arrives: the events of its decoder, and the fields seen so far."""

    events: Iterator[Any]
    fields: dict[str, str] = field(default_factory=dict)
    file_name: str = ""

    def until_file(self) -> None:
        """Read up to the file's first byte."""
        for event in self.events:
            if is_file(event):
                self.file_name = getattr(event, "filename", "")
                return
            if isinstance(event, Field):
                self.take(event)
        raise Invalid("the form has no part named file", errors={"file": ["is missing"]})

    def file(self) -> Iterator[bytes]:
        """The file's bytes; then the rest of the form is read and checked, before this ends."""
        yield from pieces(self.events)
        for event in self.events:
            if is_file(event):
                raise BadRequest("the form has two files: send one at a time")
            if isinstance(event, Field):
                self.take(event)

    def take(self, event: Field) -> None:
        value = b"".join(bounded(pieces(self.events), limits.MAX_FIELD_BYTES, event.name))
        if event.name in self.fields:
            raise BadRequest(f"the form has the field {event.name} twice")
        self.fields[event.name] = value.decode("utf-8", "surrogateescape")


def receive(ref: str, query: Mapping[str, str]) -> dict[str, Any]:
    """One upload by POST .../files, as a form or as a tar."""
    if query.get("format") == "tar":
        return receive_tar(ref, query)
    require_type(FORM)
    form = Form(events_of_body(max_body(FORM_ALLOWANCE_BYTES)))
    form.until_file()
    if names_place(form.fields, query):
        mount_path, path = place(query, form)
        return uploaded(path, files().upload(ref, mount_path, path, limited(form.file())))
    return receive_late(ref, query, form)


def receive_late(ref: str, query: Mapping[str, str], form: Form) -> dict[str, Any]:
    """A form whose file comes before the fields that say where it goes: kept on disk meanwhile."""
    with tempfile.TemporaryFile(dir=settings().data_dir) as spool:
        for piece in limited(form.file()):
            spool.write(piece)
        mount_path, path = place(query, form)
        spool.seek(0)
        return uploaded(path, files().upload(ref, mount_path, path, read_pieces(spool)))


def receive_tar(ref: str, query: Mapping[str, str]) -> dict[str, Any]:
    require_type(TAR)
    mount_path = paths.mount_of(query.get("mount_path", paths.DEFAULT_MOUNT))
    path = paths.within(mount_path, query.get("path") or query.get("file_path") or "")
    chunks = stream(max_body(0), "HEYVM_MAX_UPLOAD_BYTES")
    return uploaded(path, files().upload_tar(ref, mount_path, path, chunks))


def receive_json(ref: str, body: Mapping[str, str]) -> dict[str, Any]:
    """One upload by POST .../files/upload."""
    content = from_base64(body["content"], "content")
    mount_path = paths.mount_of(body["mount_path"])
    path = file_path(mount_path, body["file_path"])
    return uploaded(path, files().upload(ref, mount_path, path, limited(iter([content]))))


def uploaded(path: str, size: int) -> dict[str, Any]:
    return {"status": "created", "path": path, "size": size}


def names_place(fields: Mapping[str, str], query: Mapping[str, str]) -> bool:
    """Whether all is known that a later field could say."""
    both = {*fields, *query}
    return "mount_path" in both and bool(both & {"file_path", "path"})


def place(query: Mapping[str, str], form: Form) -> tuple[str, str]:
    """The mount and the path in it; the form's fields win, then the query, then defaults."""
    given = {**query, **form.fields}
    mount_path = paths.mount_of(given.get("mount_path") or paths.DEFAULT_MOUNT)
    path = given.get("file_path") or given.get("path") or posixpath.basename(form.file_name)
    return mount_path, file_path(mount_path, path)


def file_path(mount_path: str, path: str) -> str:
    found = paths.within(mount_path, path)
    if not found:
        raise Invalid("file_path names no file", errors={"file_path": ["is missing"]})
    return found


def max_body(allowance: int) -> int | None:
    limit = settings().max_upload_bytes
    return None if limit is None else limit + allowance


def limited(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same, up to HEYVM_MAX_UPLOAD_BYTES."""
    limit = settings().max_upload_bytes
    return chunks if limit is None else bounded(chunks, limit, "the file")


def bounded(chunks: Iterator[bytes], limit: int, name: str) -> Iterator[bytes]:
    seen = 0
    for chunk in chunks:
        seen += len(chunk)
        if seen > limit:
            raise TooLarge(f"{name} has more than {limit} bytes")
        yield chunk


def events_of_body(limit: int | None) -> Iterator[Any]:
    """What the decoder sees in the body. Its buffer never holds more than two pieces."""
    boundary = request.mimetype_params.get("boundary", "").encode("latin-1", "replace")
    if not 0 < len(boundary) <= MAX_BOUNDARY:
        raise BadRequest("the Content-Type names no boundary, or one that is too long")
    decoder = MultipartDecoder(boundary, 2 * CHUNK_BYTES, max_parts=limits.MAX_PARTS)
    return decoded(decoder, stream(limit, "HEYVM_MAX_UPLOAD_BYTES"))


def decoded(decoder: MultipartDecoder, chunks: Iterator[bytes]) -> Iterator[Any]:
    for chunk in chunks:
        decoder.receive_data(chunk)
        yield from drained(decoder)
    decoder.receive_data(None)
    yield from drained(decoder)


def drained(decoder: MultipartDecoder) -> Iterator[Any]:
    while True:
        event = next_event(decoder)
        if isinstance(event, NeedData):
            return
        yield event
        if isinstance(event, Epilogue):
            return


def next_event(decoder: MultipartDecoder) -> Any:
    try:
        return decoder.next_event()
    except ValueError as error:
        raise BadRequest(f"the form is malformed, or ended early: {error}") from None


def is_file(event: Any) -> bool:
    """curl's `-F file=<name` sends the same bytes without a file name."""
    return isinstance(event, File) or (isinstance(event, Field) and event.name == "file")


def pieces(events: Iterator[Any]) -> Iterator[bytes]:
    """The bytes of the part that has just begun."""
    for event in events:
        if isinstance(event, Data):
            yield event.data
            if not event.more_data:
                return


def read_pieces(spool: IO[bytes]) -> Iterator[bytes]:
    while piece := spool.read(CHUNK_BYTES):
        yield piece
