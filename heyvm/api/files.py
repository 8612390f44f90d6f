"""The routes of files in a sandbox's mounts."""

from __future__ import annotations

from typing import Any

from flask import Response
from flask.views import MethodView

from heyvm.api import downloads, uploads
from heyvm.api.blueprint import STORED, Blueprint
from heyvm.api.parts import files
from heyvm.api.paths import mount_of, rest_of_path, within
from heyvm.api.schemas import (
    DeleteQuery,
    DownloadQuery,
    FileListing,
    ListFilesQuery,
    Place,
    Uploaded,
    UploadForm,
    UploadJson,
    UploadQuery,
)
from heyvm.errors import (
    BackendFailed,
    Conflict,
    Invalid,
    RangeNotSatisfiable,
    TooLarge,
    UnsupportedMedia,
)

blp = Blueprint("files", description="Files in the mounts of a sandbox, running or stopped.")

REACH = (*STORED, Conflict, BackendFailed, Invalid)
BINARY = {"schema": {"type": "string", "format": "binary"}}
UPLOAD_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": UploadForm},
        "application/x-tar": BINARY,
    },
}
JSON_BODY = {"required": True, "content": {"application/json": {"schema": UploadJson}}}
AS_TAR = {200: {"content": {"application/x-tar": BINARY}}}
RANGE_PARAMETERS = [
    {
        "in": "header",
        "name": "Range",
        "schema": {"type": "string"},
        "description": "One range of bytes, as `bytes=0-99`.",
        "required": False,
    },
    {
        "in": "header",
        "name": "If-Range",
        "schema": {"type": "string"},
        "description": "The ETag that the range belongs to.",
        "required": False,
    },
    {
        "in": "header",
        "name": "If-None-Match",
        "schema": {"type": "string"},
        "description": "ETags that the client has.",
        "required": False,
    },
]
FILE_HEADERS = {
    "ETag": {"schema": {"type": "string"}, "description": "Changes with the file."},
    "Content-Disposition": {"schema": {"type": "string"}, "description": "An attachment."},
}
RANGE_HEADERS = {
    **FILE_HEADERS,
    "Content-Range": {"schema": {"type": "string"}, "description": "Which bytes of how many."},
}


@blp.route("/sandboxes/<ref>/files")
class Files(MethodView):
    @blp.operation("listFiles", *REACH)
    @blp.arguments(ListFilesQuery, location="query")
    @blp.response(200, FileListing)
    def get(self, place: Place, ref: str) -> dict[str, Any]:
        """List files"""
        found = files().list(ref, place.mount_path, place.path, place.recursive)
        return {"mount_path": place.mount_path, "path": place.path, "files": found}

    @blp.operation("uploadFile", *REACH, TooLarge, UnsupportedMedia, requestBody=UPLOAD_BODY)
    @blp.arguments(UploadQuery, location="query")
    @blp.response(201, Uploaded)
    def post(self, query: dict[str, str], ref: str) -> dict[str, Any]:
        """Upload a file

        As a form, streamed, with no limit but the server's own; the fields before the file. Or a
        tar (`application/x-tar` with `?format=tar`) that is unpacked in `path`. It appears whole
        or not at all; directories above it are made.
        """
        return uploads.receive(ref, query)


@blp.route("/sandboxes/<ref>/files/upload")
class UploadInJson(MethodView):
    @blp.operation("uploadFileJson", *REACH, TooLarge, UnsupportedMedia, requestBody=JSON_BODY)
    @blp.response(201, Uploaded)
    def post(self, ref: str) -> dict[str, Any]:
        """Upload a file in JSON, as base64

        Streamed too, and with no other limit; `content` comes last if it is large.
        """
        return uploads.receive_json(ref)


@blp.route("/sandboxes/<ref>/files/<rest:path>")
class OneFile(MethodView):
    @blp.operation(
        "downloadFile", *REACH, RangeNotSatisfiable, headers=RANGE_PARAMETERS, responses=AS_TAR
    )
    @blp.arguments(DownloadQuery, location="query")
    @blp.response(
        200, BINARY["schema"], content_type="application/octet-stream", headers=FILE_HEADERS
    )
    @blp.alt_response(
        206, schema=BINARY["schema"], content_type="application/octet-stream", headers=RANGE_HEADERS
    )
    @blp.alt_response(304, headers=FILE_HEADERS)
    def get(self, query: dict[str, str], ref: str, path: str) -> Response:
        """Download a file

        With HEAD, Range and ETag. A directory comes as a tar, with `?format=tar`.
        """
        mount_path = mount_of(query["mount_path"])
        place = Place(mount_path, within(mount_path, rest_of_path(3)), format=query.get("format"))
        return downloads.send(ref, place)

    @blp.operation("deleteFile", *REACH)
    @blp.arguments(DeleteQuery, location="query")
    @blp.response(204)
    def delete(self, query: dict[str, Any], ref: str, path: str) -> None:
        """Delete a file

        A directory with something in it only with `recursive=true`.
        """
        mount_path = mount_of(query["mount_path"])
        files().delete(ref, mount_path, within(mount_path, rest_of_path(3)), query["recursive"])
