"""Who may import whom: docs/architecture.md, "Layers", held by a look at every import statement."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import REPOSITORY

# From the top to the bottom; a module may import from its own layer and from those below.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset(
        {"wsgi", "heyvm.cli", "heyvm.doctor", "heyvm.imagecli", "heyvm.purge", "heyvm.serving"}
        | {"heyvm.worker", "heyvm.backup", "heyvm.restore", "heyvm.connect", "heyvm.usershell"}
    ),
    frozenset({"app", "heyvm.keeper", "heyvm.tunnels"}),
    frozenset({"heyvm.api"}),
    frozenset(
        {
            "heyvm.lifecycle",
            "heyvm.processes",
            "heyvm.files",
            "heyvm.gateway",
            "heyvm.mounts",
            "heyvm.localports",
            "heyvm.logs",
            "heyvm.proxies",
            "heyvm.shells",
            "heyvm.usage",
        }
    ),
    frozenset({"heyvm.registry", "heyvm.backends", "heyvm.guest", "heyvm.images", "heyvm.sockets"}),
    frozenset(
        {
            "heyvm.models",
            "heyvm.errors",
            "heyvm.origins",
            "heyvm.problems",
            "heyvm.settings",
            "heyvm.frames",
            "heyvm.directories",
            "heyvm.journal",
            "heyvm.metrics",
            "heyvm.strictjson",
            "heyvm.tokens",
        }
    ),
)
# Small parts with one subject that a layer keeps to itself or shares with those above it.
BESIDE = {
    "heyvm.localhttp": 4,
    "heyvm.ssh": 3,
    "heyvm.sshkeys": 5,
    "heyvm.sshwire": 5,
    "heyvm.sftp": 4,
    "heyvm.calls": 4,
    "heyvm.streams": 4,
    "heyvm.sandboxapi": 4,
    "heyvm.sshclient": 4,
    "heyvm.usertty": 5,
    "heyvm.tickets": 5,
    "heyvm.tunnelproc": 4,
    "heyvm.websocket": 4,
    "heyvm.agent_terminals": 5,
    "heyvm.agent_calls": 5,
    "heyvm.upstream": 4,
    "heyvm.audit": 4,
    "heyvm.locks": 4,
    "heyvm.slugs": 4,
    "heyvm.control": 5,
    "heyvm.lives": 5,
    "heyvm.oci": 5,
    "heyvm.relay": 5,
    "heyvm.agent": 5,
    "heyvm.agent_files": 5,
    "heyvm.agent_ports": 5,
    "heyvm": 5,
}
# What runs inside a sandbox: these files are copied there, and nothing else of ours.
INSIDE = {
    *("heyvm.agent", "heyvm.agent_files", "heyvm.agent_ports", "heyvm.frames"),
    *("heyvm.agent_terminals", "heyvm.agent_calls"),
}
# The keeper stands beside the API: neither knows the other.
STRANGERS = (("heyvm.keeper", "heyvm.api"), ("heyvm.keeper", "app"), ("app", "heyvm.keeper"))
# Each of these has one door.
DOORS = {
    "sqlite3": {"heyvm.registry"},
    "pyseccomp": {"heyvm.backends.seccomp"},
    "jwt": {"heyvm.tokens"},
    "itsdangerous": {"heyvm.tokens"},
    "flask": {"app", "heyvm.api"},
    "flask_smorest": {"app", "heyvm.api"},
    "marshmallow": {"heyvm.api"},
    "werkzeug": {"app", "heyvm.api"},
    "gunicorn": {"heyvm.worker"},
    "prometheus_client": {"heyvm.metrics"},
    "iroh": {"heyvm.tickets"},
    "paramiko": {"heyvm.ssh", "heyvm.sshwire", "heyvm.sftp", "heyvm.sshclient"},
    "wsproto": {"heyvm.websocket"},
}


def test_nobody_imports_upwards() -> None:
    wrong = [
        f"{importer} imports {imported}"
        for importer, imported in own_imports()
        if layer_of(imported) < layer_of(importer)
    ]

    assert wrong == []


def test_the_keeper_and_the_api_do_not_know_each_other() -> None:
    wrong = [
        f"{importer} imports {imported}"
        for importer, imported in own_imports()
        for here, there in STRANGERS
        if is_part_of(importer, here) and is_part_of(imported, there)
    ]

    assert wrong == []


@pytest.mark.parametrize("module", sorted(INSIDE))
def test_the_agent_knows_frames_and_the_standard_library_alone(module: str) -> None:
    found = set(imports_of(REPOSITORY / f"{module.replace('.', '/')}.py"))
    own = {name for name in found if name in modules()}
    foreign = {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}

    assert own - {"heyvm"} <= INSIDE
    assert {name.partition(".")[0] for name in foreign} <= {"heyvm"}


@pytest.mark.parametrize("package", DOORS)
def test_a_package_has_one_door(package: str) -> None:
    users = {
        importer for importer, imported in all_imports() if imported.partition(".")[0] == package
    }
    strangers = {
        user for user in users if not any(is_part_of(user, door) for door in DOORS[package])
    }

    assert strangers == set()


def test_every_module_is_in_a_layer() -> None:
    for module in modules():
        layer_of(module)


def layer_of(module: str) -> int:
    for number, layer in enumerate(LAYERS):
        if any(is_part_of(module, name) for name in layer):
            return number
    assert module in BESIDE, f"{module}: say in docs/architecture.md and here which layer it is in"
    return BESIDE[module]


def is_part_of(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def own_imports() -> Iterator[tuple[str, str]]:
    known = set(modules())
    return ((here, there) for here, there in all_imports() if there in known and there != "heyvm")


def all_imports() -> Iterator[tuple[str, str]]:
    for module, path in modules().items():
        for imported in imports_of(path):
            yield module, imported


def modules() -> dict[str, Path]:
    paths = [*(REPOSITORY / "heyvm").rglob("*.py"), REPOSITORY / "app.py", REPOSITORY / "wsgi.py"]
    return {name_of(path): path for path in paths if path.exists()}


def name_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, those for type checkers only left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
