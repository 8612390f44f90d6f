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
from fractions import Fraction
from typing import IO, Any, Protocol

from flask import request
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from heyvm.api import limits, paths
from heyvm.api.bodies import CHUNK_BYTES, require_type, stream
from heyvm.api.jsonupload import MAX_AROUND_BYTES, JsonUpload
from heyvm.api.parts import files, settings
from heyvm.errors import BadRequest, Invalid, TooLarge

MAX_BOUNDARY = 200  # RFC 2046 section 5.1.1 says 70
FORM = "multipart/form-data"
TAR = "application/x-tar"
JSON = "application/json"
# A form's own lines on top of the file that it carries.
FORM_ALLOWANCE_BYTES = limits.MAX_PARTS * 2 * limits.MAX_FIELD_BYTES


class Upload(Protocol):
    """A body with a file in it, and with the place where it goes."""

    def until_file(self) -> None: ...

    def settled(self) -> bool: ...

    def place(self) -> tuple[str, str]: ...

    def file(self) -> Iterator[bytes]: ...


@dataclass
class Form:
    """A form as it arrives: the events of its decoder, and the fields seen so far. What the query
    says holds where the form says nothing."""

    events: Iterator[Any]
    query: Mapping[str, str]
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

    def settled(self) -> bool:
        told = {*self.fields, *self.query}
        return "mount_path" in told and bool(told & {"file_path", "path"})

    def place(self) -> tuple[str, str]:
        given = {**self.query, **self.fields}
        mount_path = paths.mount_of(given.get("mount_path") or paths.DEFAULT_MOUNT)
        path = given.get("file_path") or given.get("path") or posixpath.basename(self.file_name)
        return mount_path, paths.file_path(mount_path, path)

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
    return received(ref, Form(events_of_body(max_body(1, FORM_ALLOWANCE_BYTES)), query))


def receive_json(ref: str) -> dict[str, Any]:
    """One upload by POST .../files/upload."""
    require_type(JSON)
    limit = max_body(Fraction(3, 2), 2 * MAX_AROUND_BYTES)
    return received(ref, JsonUpload(stream(limit, "HEYVM_MAX_UPLOAD_BYTES")))


def receive_tar(ref: str, query: Mapping[str, str]) -> dict[str, Any]:
    require_type(TAR)
    mount_path = paths.mount_of(query.get("mount_path", paths.DEFAULT_MOUNT))
    path = paths.within(mount_path, query.get("path") or query.get("file_path") or "")
    chunks = stream(max_body(1, 0), "HEYVM_MAX_UPLOAD_BYTES")
    return uploaded(path, files().upload_tar(ref, mount_path, path, chunks))


def received(ref: str, upload: Upload) -> dict[str, Any]:
    """Hand the file on while it arrives; where it goes may be told only after it, though."""
    upload.until_file()
    if not upload.settled():
        return received_late(ref, upload)
    mount_path, path = upload.place()
    chunks = unmoved(upload, (mount_path, path))
    return uploaded(path, files().upload(ref, mount_path, path, limited(chunks)))


def received_late(ref: str, upload: Upload) -> dict[str, Any]:
    """Kept on disk until all is known, in a file that no crash leaves behind."""
    with tempfile.TemporaryFile(dir=settings().data_dir) as spool:
        for piece in limited(upload.file()):
            spool.write(piece)
        mount_path, path = upload.place()
        spool.seek(0)
        return uploaded(path, files().upload(ref, mount_path, path, read_pieces(spool)))


def unmoved(upload: Upload, place: tuple[str, str]) -> Iterator[bytes]:
    """The file's bytes, provided that what comes after them does not name another place."""
    yield from upload.file()
    if upload.place() != place:
        raise BadRequest("the upload names two places: one before the file, another after it")


def uploaded(path: str, size: int) -> dict[str, Any]:
    return {"status": "created", "path": path, "size": size}


def max_body(growth: Fraction | int, allowance: int) -> int | None:
    """The largest body that can hold a file within HEYVM_MAX_UPLOAD_BYTES."""
    limit = settings().max_upload_bytes
    return None if limit is None else int(limit * growth) + allowance


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
