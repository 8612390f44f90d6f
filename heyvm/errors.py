"""What can go wrong, in the domain's words. HTTP statuses are the API package's business."""

from __future__ import annotations


class HeyvmError(Exception):
    """A refusal or failure whose text is meant for whoever sent the request.

    `detail` names the thing, what it is now and what to do. `sandbox_id` is set where a record was
    left behind that can be looked at (a failed setup hook, say).
    """

    def __init__(self, detail: str, *, sandbox_id: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.sandbox_id = sandbox_id


class BadRequest(HeyvmError):
    """The request cannot be read: broken JSON, a bad path, a bad encoding."""


class Invalid(HeyvmError):
    """Readable, but a value is wrong. `errors` maps a field to its complaints."""

    def __init__(
        self,
        detail: str,
        *,
        errors: dict[str, list[str]] | None = None,
        sandbox_id: str | None = None,
    ) -> None:
        super().__init__(detail, sandbox_id=sandbox_id)
        self.errors = errors or {}


class HookFailed(Invalid):
    """A setup hook ended with a non-zero exit code; the sandbox is kept as `failed`."""


class ImageMissing(Invalid):
    """The registry says that there is no such image, or cannot be reached.

    Bad credentials, a wrong digest and a broken layer are plain `Invalid`.
    """


class Unauthorized(HeyvmError):
    """No token, or not a good one."""


class Forbidden(HeyvmError):
    """Understood, and refused whoever asks (an open server asked from another machine)."""


class NotFound(HeyvmError):
    """There is no such thing, or there is no longer."""


class Conflict(HeyvmError):
    """The thing is in a state, or a name is taken, so that this cannot be done."""


class UpgradeRequired(HeyvmError):
    """What is there is spoken over a WebSocket only."""


class TooLarge(HeyvmError):
    """More bytes than a setting allows."""


class UnsupportedMedia(HeyvmError):
    """A body of another media type than the route reads."""


class RangeNotSatisfiable(HeyvmError):
    """A byte range outside the file. `size` is the file's size in bytes."""

    def __init__(self, detail: str, *, size: int) -> None:
        super().__init__(detail)
        self.size = size


class QuotaExceeded(HeyvmError):
    """A limit on how many there may be; the detail names the setting."""


class Unavailable(HeyvmError):
    """Something needed is missing or busy; may be tried again after `retry_after` seconds."""

    def __init__(self, detail: str, *, retry_after: int = 1, sandbox_id: str | None = None) -> None:
        super().__init__(detail, sandbox_id=sandbox_id)
        self.retry_after = retry_after


class BackendFailed(HeyvmError):
    """A sandbox could not be started, or its agent answered nonsense or not at all."""


class PortClosed(HeyvmError):
    """Nobody listens on that port inside the sandbox (yet)."""


class StorageFull(HeyvmError):
    """No space (or no inodes, or no quota) where it had to be written."""


class Unsupported(HeyvmError):
    """This backend cannot do that."""


class Misconfigured(HeyvmError):
    """A setting has a value with which the server must not start."""


TO_RUN = {
    "paused": "resume it first",
    "stopping": "start it when it has stopped, unless it was deleted",
    "provisioning": "wait until it runs",
}


def not_running(slug: str, status: str) -> Conflict:
    """For what needs a sandbox that runs."""
    return Conflict(f"sandbox {slug!r} is {status}: {TO_RUN.get(status, 'start it first')}")
