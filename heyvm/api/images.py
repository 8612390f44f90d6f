"""The routes of the store of images. Their names hold `/` and `:`, encoded or not."""

from __future__ import annotations

import tempfile
from typing import Any

from flask import request
from flask.views import MethodView

from heyvm.api.blueprint import STORED, Blueprint
from heyvm.api.bodies import stream
from heyvm.api.parts import images, settings
from heyvm.api.paths import rest_of_path
from heyvm.api.schemas import ImageInfo, PullRequest, TakeHeaders
from heyvm.api.uploads import max_body
from heyvm.errors import Conflict, Invalid, TooLarge, UnsupportedMedia
from heyvm.models import Image

blp = Blueprint("images", description="Root file systems that sandboxes are made from.")

BINARY = {"schema": {"type": "string", "format": "binary"}}
ARCHIVE = {
    "required": True,
    "content": {"application/octet-stream": BINARY, "application/x-tar": BINARY},
}


@blp.route("/images")
class Images(MethodView):
    @blp.operation("listImages", *STORED)
    @blp.response(200, ImageInfo(many=True))
    def get(self) -> list[dict[str, Any]]:
        """List images

        Those that are here, oldest first; `host` is always there, and not listed.
        """
        return [shown(image) for image in images().list()]


@blp.route("/images/pull")
class Pull(MethodView):
    @blp.operation("pullImage", *STORED, Invalid, TooLarge, UnsupportedMedia)
    @blp.arguments(PullRequest)
    @blp.response(200, ImageInfo)
    def post(self, wanted: dict[str, str]) -> dict[str, Any]:
        """Pull an image

        What its registry has under this name now. Answers when it is here; several at once are one.
        """
        return shown(images().pull(wanted["image"], unheard))


@blp.route("/images/<image:name>")
class OneImage(MethodView):
    @blp.operation("getImage", *STORED)
    @blp.response(200, ImageInfo)
    def get(self, name: str) -> dict[str, Any]:
        """Get an image

        By its name or its digest.
        """
        return shown(images().get(rest_of_path(1)))

    @blp.operation("importImage", *STORED, Invalid, TooLarge, UnsupportedMedia, requestBody=ARCHIVE)
    @blp.arguments(TakeHeaders, location="headers")
    @blp.response(201, ImageInfo)
    def put(self, told: dict[str, str], name: str) -> dict[str, Any]:
        """Import an image

        The body is a tar, plain or compressed: a root file system, or what `docker save` or an OCI
        archive holds. An image of that name loses it.
        """
        return shown(received(rest_of_path(1), told.get("sha256")))

    @blp.operation("removeImage", *STORED, Conflict)
    @blp.response(204)
    def delete(self, name: str) -> None:
        """Remove an image

        By its name, or by its digest with all its names. Not while a sandbox uses it.
        """
        images().remove(rest_of_path(1))


def received(name: str, sha256: str | None) -> Image:
    """Import the request's body, kept meanwhile in a file that no crash leaves behind."""
    if "HTTP_CONTENT_ENCODING" in request.environ:
        raise UnsupportedMedia("send the archive as it is, without a Content-Encoding")
    images().demand_name(name)
    with tempfile.TemporaryFile(dir=settings().data_dir) as spool:
        for piece in stream(max_body(1, 0), "HEYVM_MAX_UPLOAD_BYTES"):
            spool.write(piece)
        spool.flush()
        return images().take(name, f"/proc/self/fd/{spool.fileno()}", sha256, unheard)


def unheard(_: str) -> None:
    """Who waits for the answer sees no progress."""


def shown(image: Image) -> dict[str, Any]:
    return {
        **vars(image),
        "name": image.names[0] if image.names else image.digest,
        "path": str(images().rootfs(image)),
        "modified_at": image.created_at,
        "used_by": images().users(image),
    }
