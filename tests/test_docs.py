"""What the documents list is what there is. `python -m tests.test_docs` writes the lists anew."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heyvm import __version__
from heyvm.settings import KNOWN
from tests.server import REPOSITORY

README = REPOSITORY / "README.md"
OPERATING = REPOSITORY / "docs" / "operating.md"


def settings_table() -> str:
    rows = [
        f"| `{one.name}` | {one.default or 'unset'} | {one.meaning} |".replace("~", "\\~")
        for one in KNOWN
    ]
    return "\n".join(["| variable | default | |", "|---|---|---|", *rows])


def limits_table() -> str:
    from heyvm.api.limits import LIMITS

    rows = [f"| `{one.name}` | {shown(one.value)} | {one.meaning} |" for one in LIMITS]
    return "\n".join(["| limit | value | |", "|---|---|---|", *rows])


def shown(value: int | str | None) -> str:
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


COMMANDS = (
    *("keeper", "doctor", "connect", "ssh-proxy", "images", "token"),
    *("backup", "restore", "purge"),
)


def help_text() -> str:
    return "\n\n".join(
        f"```text\n$ heyvm {' '.join([*words, '--help'])}\n{help_of(*words)}\n```"
        for words in ((), *((one,) for one in COMMANDS))
    )


def help_of(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "heyvm.cli", *words, "--help"],
        env={**os.environ, "COLUMNS": "80"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


LISTS: tuple[tuple[Path, str, Callable[[], str]], ...] = (
    (README, "settings", settings_table),
    (README, "limits", limits_table),
    (OPERATING, "help", help_text),
)


@pytest.mark.parametrize(("document", "name", "make"), LISTS, ids=[row[1] for row in LISTS])
def test_a_list_is_what_there_is(document: Path, name: str, make: Callable[[], str]) -> None:
    written = re.search(place(name), document.read_text(), re.DOTALL)

    assert written is not None
    # Python 3.13 sets the lines of a usage otherwise than 3.11: words are what counts.
    assert written[2].split() == make().split()


def test_links_within_the_repository_lead_somewhere() -> None:
    broken = [
        f"{document.relative_to(REPOSITORY)}: {target}"
        for document in documents()
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
        if not (document.parent / target).exists()
    ]

    assert broken == []


def test_every_test_that_a_promise_names_is_there() -> None:
    tests = REPOSITORY / "tests"
    there = {
        name
        for module in tests.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", module.read_text(), re.M)
    }
    text = (REPOSITORY / "docs" / "isolation.md").read_text()
    named = re.findall(r"`(test_\w+)`", text)
    files = re.findall(r"`(tests/[\w.]+)`", text)

    assert len(named) > 50
    assert [one for one in named if one not in there] == []
    assert [one for one in files if not (REPOSITORY / one).exists()] == []


def test_the_changelog_has_the_version() -> None:
    assert f"## {__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def documents() -> Iterator[Path]:
    yield from REPOSITORY.glob("*.md")
    yield from (REPOSITORY / "docs").rglob("*.md")
    yield from (REPOSITORY / "bench").glob("*.md")


def place(name: str) -> str:
    return rf"(<!-- {name} -->\n)(.*?)(<!-- /{name} -->)"


def write() -> None:
    """Write every list into its document."""
    for document, name, make in LISTS:
        made = make()
        text = re.sub(
            place(name),
            lambda found, made=made: found[1] + made + "\n" + found[3],
            document.read_text(),
            flags=re.DOTALL,
        )
        document.write_text(text)


if __name__ == "__main__":
    write()
