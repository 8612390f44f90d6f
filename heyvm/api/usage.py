"""What the machine and its sandboxes use now."""

from __future__ import annotations

from typing import Any

from flask.views import MethodView
from marshmallow import Schema, fields

from heyvm.api.blueprint import Blueprint
from heyvm.api.parts import usages
from heyvm.api.schemas import about, always

blp = Blueprint("usage", description="What the machine and its sandboxes use.")


class HostUsage(Schema):
    """The machine that the server runs on."""

    cpu_percent = always(
        fields.Float,
        "Of all its processors, 0 to 100.",
        12.5,
        attribute="cpuPercent",
        data_key="cpuPercent",
    )
    cpu_count = always(
        fields.Integer, "How many there are.", 8, attribute="cpuCount", data_key="cpuCount"
    )
    memory_total = always(
        fields.Integer,
        "Bytes.",
        16 << 30,
        attribute="memoryTotalBytes",
        data_key="memoryTotalBytes",
    )
    memory_used = always(
        fields.Integer, "Bytes.", 4 << 30, attribute="memoryUsedBytes", data_key="memoryUsedBytes"
    )
    memory_available = always(
        fields.Integer,
        "Bytes that could be had.",
        12 << 30,
        attribute="memoryAvailableBytes",
        data_key="memoryAvailableBytes",
    )
    memory_reserve = always(
        fields.Integer,
        "Bytes that all sandboxes together leave to the machine.",
        1 << 30,
        attribute="memoryReserveBytes",
        data_key="memoryReserveBytes",
    )


class SandboxUsage(Schema):
    """One running sandbox. Null: it cannot be known on this machine."""

    sandbox_id = always(
        fields.String, "Its id.", "sb-1a2b3c4d", attribute="sandboxId", data_key="sandboxId"
    )
    name = always(fields.String, "Its name.", "api-demo")
    cpu_percent = always(
        fields.Float,
        "Of one processor; may pass 100.",
        3.2,
        attribute="cpuPercent",
        data_key="cpuPercent",
        allow_none=True,
    )
    memory_bytes = always(
        fields.Integer,
        "Without file pages that can be dropped.",
        42 << 20,
        attribute="memoryBytes",
        data_key="memoryBytes",
        allow_none=True,
    )
    pids = always(fields.Integer, "Processes and threads.", 7, allow_none=True)


class UsageSnapshot(Schema):
    """One look at everything."""

    sampled_at_ms = always(
        fields.Integer,
        "Milliseconds since the epoch.",
        1_760_000_000_000,
        attribute="sampledAtMs",
        data_key="sampledAtMs",
    )
    host = fields.Nested(HostUsage, required=True, metadata=about("The machine."))
    sandboxes = fields.List(
        fields.Nested(SandboxUsage), required=True, metadata=about("Those that run.")
    )


class SystemUsage(Schema):
    """`snapshot` is null until the first look, a moment after the server has started."""

    available = always(fields.Boolean, "Whether this server looks at all.", True)
    snapshot = fields.Nested(
        UsageSnapshot, required=True, allow_none=True, metadata=about("The latest.")
    )


@blp.route("/system/usage")
class Use(MethodView):
    @blp.operation("getSystemUsage")
    @blp.response(200, SystemUsage)
    def get(self) -> dict[str, Any]:
        """What the machine and its running sandboxes use

        Looked at about every 5 seconds.
        """
        return {"available": True, "snapshot": usages().snapshot()}
