"""The route of a sandbox's logs."""

from __future__ import annotations

from typing import Any

from flask.views import MethodView

from heyvm.api.blueprint import STORED, Blueprint
from heyvm.api.parts import logs
from heyvm.api.schemas import LogPageInfo, LogsQuery
from heyvm.errors import Invalid
from heyvm.models import LogPage

blp = Blueprint("logs", description="What start command, setup hooks and execute printed.")


@blp.route("/sandboxes/<ref>/logs")
class Logs(MethodView):
    @blp.operation("getLogs", *STORED, Invalid)
    @blp.arguments(LogsQuery, location="query")
    @blp.response(200, LogPageInfo)
    def get(self, wanted: dict[str, Any], ref: str) -> LogPage:
        """Get log entries

        The newest `limit` that match, oldest first.
        """
        return logs().read(ref, **wanted)
