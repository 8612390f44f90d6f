"""The domain objects that views call, and the way in which a view finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from flask import current_app

if TYPE_CHECKING:
    from heyvm.backends.base import Backend
    from heyvm.files import Files
    from heyvm.gateway import Gateway
    from heyvm.images import Images
    from heyvm.lifecycle import Lifecycle
    from heyvm.logs import Logs
    from heyvm.mounts import Mounts
    from heyvm.processes import Processes
    from heyvm.proxies import Proxies
    from heyvm.settings import Settings
    from heyvm.shells import Shells
    from heyvm.usage import Usages

EXTENSION = "heyvm"
USAGES = "heyvm.usages"
GATEWAY = "heyvm.gateway"


@dataclass(frozen=True)
class Services:
    """What one server is made of. Built by `app.create_app`, kept in `app.extensions["heyvm"]`."""

    settings: Settings
    lifecycle: Lifecycle
    processes: Processes
    files: Files
    logs: Logs
    mounts: Mounts
    proxies: Proxies
    shells: Shells
    images: Images
    backends: Mapping[str, Backend]


def services() -> Services:
    return cast(Services, current_app.extensions[EXTENSION])


def settings() -> Settings:
    return services().settings


def lifecycle() -> Lifecycle:
    return services().lifecycle


def processes() -> Processes:
    return services().processes


def files() -> Files:
    return services().files


def logs() -> Logs:
    return services().logs


def mounts() -> Mounts:
    return services().mounts


def proxies() -> Proxies:
    return services().proxies


def shells() -> Shells:
    return services().shells


def gateway() -> Gateway:
    return cast("Gateway", current_app.extensions[GATEWAY])


def images() -> Images:
    return services().images


def usages() -> Usages:
    return cast("Usages", current_app.extensions[USAGES])
