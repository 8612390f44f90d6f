"""The routes of a sandbox's mounts."""

from __future__ import annotations

from flask.views import MethodView

from heyvm.api.blueprint import STORED, Blueprint
from heyvm.api.parts import mounts
from heyvm.api.paths import mount_of, rest_of_path
from heyvm.api.schemas import MountInfo, MountRequest
from heyvm.errors import BackendFailed, Conflict, Invalid, TooLarge, UnsupportedMedia
from heyvm.models import Mount

blp = Blueprint("mounts", description="Directories of the host inside a sandbox.")


@blp.route("/sandboxes/<ref>/mounts")
class Mounts(MethodView):
    @blp.operation("listMounts", *STORED)
    @blp.response(200, MountInfo(many=True))
    def get(self, ref: str) -> list[Mount]:
        """List mounts"""
        return list(mounts().list(ref))

    @blp.operation(
        "addMount", *STORED, Conflict, BackendFailed, Invalid, TooLarge, UnsupportedMedia
    )
    @blp.arguments(MountRequest)
    @blp.response(201, MountInfo)
    def post(self, mount: Mount, ref: str) -> Mount:
        """Add a mount

        At once where the kernel and the server's rights allow it, else with `pending: true` until
        the next start.
        """
        return mounts().add(ref, mount)


@blp.route("/sandboxes/<ref>/mounts/<rest:sandbox_path>")
class OneMount(MethodView):
    @blp.operation("removeMount", *STORED, Conflict, BackendFailed, Invalid)
    @blp.response(204)
    def delete(self, ref: str, sandbox_path: str) -> None:
        """Remove a mount

        By its path inside, with or without its first slash: `/mounts/%2Fworkspace`,
        `/mounts//workspace` and `/mounts/workspace` are one.
        """
        mounts().remove(ref, mount_of(rest_of_path(3)))
