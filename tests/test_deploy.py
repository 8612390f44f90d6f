"""What of deploy/ can be tried without a machine of its own; tests/deploy/run tries the rest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
UNITS = sorted(path.name for path in (DEPLOY / "systemd").iterdir())
SERVICES = [name for name in UNITS if name.endswith(".service")]
SCRIPTS = ("deploy/install", "deploy/need", "deploy/nginx/render", "tests/deploy/run")
# What is measured (`systemd-analyze security`); more would mean that a directive was lost.
MOST_EXPOSED = 8.3
WRONG = {
    "--domain": "takes a value",
    "--domain localhost": "has no dot",
    "--domain a..b.example": "no host name",
    "--domain x;y.example": "no host name",
    "--self-signed": "goes with --domain",
    "--purge": "goes with --uninstall",
    "--upgrade --rollback": "one of",
    "--upgrade --domain a.example": "settings stay",
    "--domain a.example --self-signed --certificate /dev/null --key /dev/null": "one kind",
    "--domain a.example --certbot-dns ovh": "goes with",
    "--domain a.example --certificate /dev/null": "goes with",
    "--root relative": "absolute",
    "--nonsense": "unknown",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as it is now, which others may be changing."""
    copy = tmp_path_factory.mktemp("tree")
    listed = ["git", "-c", f"safe.directory={REPOSITORY}", "ls-files", "-z", "-co"]
    names = subprocess.run(
        [*listed, "--exclude-standard", "--", "*.py", "*.md", "*.txt", "*.toml", "deploy"],
        cwd=REPOSITORY,
        capture_output=True,
    ).stdout
    if not names:  # no git here
        return REPOSITORY
    for name in filter(None, names.decode().split("\0")):
        if name.startswith(("tests/", "bench/")) or not (REPOSITORY / name).exists():
            continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def installed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with everything that an install writes."""
    root = tmp_path_factory.mktemp("root")
    done = install(tree, "--root", str(root), "--domain", "Sandbox.Test")
    assert done.returncode == 0, done.stderr
    yield root


def install(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tree / "deploy" / "install", *arguments], capture_output=True, text=True, timeout=60
    )


def contents(root: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(root))] = (path.stat().st_mode, path.read_bytes())
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_one_that_sh_reads(script: str) -> None:
    subprocess.run(["sh", "-n", REPOSITORY / script], check=True)
    assert os.access(REPOSITORY / script, os.X_OK)


def test_help_names_every_option(tree: Path) -> None:
    done = install(tree, "--help")

    assert done.returncode == 0
    cases = re.findall(r"^ *(--[a-z| -]+)\)", (DEPLOY / "install").read_text(), re.M)
    known = {one.strip() for case in cases for one in case.split("|") if one.strip() != "-h"}
    assert len(known) > 12
    assert known <= set(re.findall(r"--[a-z-]+", done.stdout))


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_called_wrongly_is_told_and_does_nothing(tree: Path, arguments: str) -> None:
    done = install(tree, *arguments.split(" "))

    assert done.returncode == 2
    assert WRONG[arguments] in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tree: Path, tmp_path: Path) -> None:
    done = install(tree, "--dry-run", "--root", str(tmp_path), "--domain", "sandbox.test")

    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    for what in ("heyvm.env (mode 600)", "heyvm.service", "conf.d/heyvm.conf", "certificate"):
        assert f"{what}" in done.stderr


def test_the_settings_are_secret_and_what_a_server_reads(installed: Path) -> None:
    from heyvm.settings import from_env

    path = installed / "etc/heyvm/heyvm.env"
    lines = [one for one in path.read_text().splitlines() if one and not one.startswith("#")]
    environ = dict(one.split("=", 1) for one in lines)
    settings = from_env(environ)

    assert path.stat().st_mode & 0o777 == 0o600
    assert len(environ["JWT_SECRET"]) == 64
    assert settings.api_hostname == "sandbox.test"
    assert str(settings.data_dir) == "/var/lib/heyvm"
    assert settings.log_json
    assert settings.notices == ()


def test_a_second_install_changes_nothing_and_another_domain_one_line(
    tree: Path, installed: Path
) -> None:
    before = contents(installed)

    again = install(tree, "--root", str(installed))
    assert again.returncode == 0, again.stderr
    assert contents(installed) == before
    assert "wrote" not in again.stderr

    other = install(tree, "--root", str(installed), "--domain", "other.test")
    assert other.returncode == 0, other.stderr
    env = "etc/heyvm/heyvm.env"
    old, new = (set(one[env][1].splitlines()) for one in (before, contents(installed)))
    assert (old - new, new - old) == ({b"API_HOSTNAME=sandbox.test"}, {b"API_HOSTNAME=other.test"})
    back = install(tree, "--root", str(installed), "--domain", "sandbox.test")
    assert back.returncode == 0, back.stderr


def test_an_upgrade_keeps_the_old_version_for_a_rollback(
    tree: Path, installed: Path, tmp_path: Path
) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(tree, newer, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    (newer / "heyvm" / "__init__.py").write_text('"""heyvm"""\n\n__version__ = "99.0"\n')
    current = installed / "opt/heyvm/current"
    first, settings = os.readlink(current), (installed / "etc/heyvm/heyvm.env").read_bytes()

    assert "say --upgrade" in install(newer, "--root", str(installed)).stderr
    assert os.readlink(current) == first
    done = install(newer, "--root", str(installed), "--upgrade")
    assert done.returncode == 0, done.stderr
    assert os.readlink(current).startswith("releases/99.0-")
    assert "99.0" in (current / "heyvm" / "__init__.py").read_text()
    assert (installed / "etc/heyvm/heyvm.env").read_bytes() == settings

    back = install(tree, "--root", str(installed), "--rollback")
    assert back.returncode == 0, back.stderr
    assert os.readlink(current) == first


def test_an_install_that_was_cut_short_is_made_whole(tree: Path, tmp_path: Path) -> None:
    first = install(tree, "--root", str(tmp_path))
    assert first.returncode == 0, first.stderr
    release = (tmp_path / "opt/heyvm/current").resolve()
    (release / ".complete").unlink()
    (release / "wsgi.py").unlink()

    again = install(tree, "--root", str(tmp_path))

    assert again.returncode == 0, again.stderr
    assert (release / "wsgi.py").exists() and (release / ".complete").exists()


def test_an_uninstall_leaves_the_settings_and_a_purge_nothing(tree: Path, tmp_path: Path) -> None:
    assert install(tree, "--root", str(tmp_path), "--domain", "a.test").returncode == 0
    assert install(tree, "--root", str(tmp_path), "--uninstall").returncode == 0
    assert {name.split("/")[1] for name in contents(tmp_path)} == {"heyvm"}
    assert "etc/heyvm/heyvm.env" in contents(tmp_path)

    assert install(tree, "--root", str(tmp_path), "--uninstall", "--purge").returncode == 0
    assert contents(tmp_path) == {}


def test_a_release_holds_what_the_service_needs_and_no_more(installed: Path) -> None:
    release = installed / "opt/heyvm/current"

    names = {path.name for path in release.iterdir()}
    assert {"heyvm", "app.py", "wsgi.py", "deploy", "docs", "requirements.txt"} <= names
    assert not names & {"tests", "bench", ".git", ".venv", "node_modules"}
    assert not list(release.rglob("__pycache__/")) or release.resolve() == REPOSITORY
    modes = {path.stat().st_mode & 0o022 for path in release.rglob("*")}
    assert modes == {0}


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units, with programs that there are in the place of those that an install makes."""
    if shutil.which("systemd-analyze") is None:
        subprocess.run([DEPLOY / "need", "systemd-analyze:systemd"], check=True)
    directory = tmp_path_factory.mktemp("units")
    for name in UNITS:
        text = (DEPLOY / "systemd" / name).read_text()
        (directory / name).write_text(
            re.sub(r"/opt/heyvm/current/.venv/bin/\w+", "/bin/true", text)
        )
    return directory


def test_the_units_are_valid(units: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(units / name for name in UNITS)],
        capture_output=True,
        text=True,
        timeout=60,
    )

    said = [line for line in done.stderr.splitlines() if str(units) in line or "heyvm" in line]
    assert (done.returncode, said) == (0, [])


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_is_as_closed_as_was_measured(units: Path, name: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", units / name],
        capture_output=True,
        text=True,
        timeout=60,
    )

    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= MOST_EXPOSED


def test_both_services_are_closed_alike() -> None:
    def closed(name: str) -> list[str]:
        text = (DEPLOY / "systemd" / name).read_text()
        known = r"^(?:NoNew|Protect|Private|Keyring|Capability|Restrict|Lock|System|UMask|Limit).*$"
        return re.findall(known, text, re.M)

    assert closed("heyvm.service") == closed("heyvm-keeper.service") != []


def test_a_restart_of_the_service_leaves_sandboxes_and_their_sockets() -> None:
    for name in SERVICES:
        text = (DEPLOY / "systemd" / name).read_text()
        assert "RuntimeDirectoryPreserve=yes" in text
        assert "PrivateTmp" not in text and "ProtectHome" not in text


def test_nginx_takes_the_site_as_it_is_installed(installed: Path, tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin")
    if nginx is None:
        subprocess.run([DEPLOY / "need", "nginx:nginx"], check=True)
        nginx = "/usr/sbin/nginx"
    etc = installed / "etc/nginx"
    site = (etc / "conf.d/heyvm.conf").read_text()
    # Nothing of the machine's own is touched: its paths and ports are those of this test.
    site = site.replace("/etc/heyvm/tls", f"{installed}/etc/heyvm/tls")
    site = re.sub(r"listen (\[::\]:)?(80|443)", r"listen unix:" + str(tmp_path) + r"/\2", site)
    lines: list[str] = []
    for line in site.splitlines():  # both families have become one address
        if "listen unix:" not in line or line not in lines[-1:]:
            lines.append(line)
    (tmp_path / "heyvm.conf").write_text("\n".join(lines))
    shutil.copy(etc / "heyvm-server.conf", tmp_path)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; include {tmp_path}/heyvm.conf; }}\n"
    )

    done = subprocess.run(
        [nginx, "-t", "-q", "-p", tmp_path, "-c", tmp_path / "nginx.conf"],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert not re.search(r"@[A-Z_]+@", re.sub(r"^ *#.*$", "", site, flags=re.M))


def test_the_certificate_is_for_the_name_and_those_below(installed: Path) -> None:
    tls = installed / "etc/heyvm/tls"
    for name in ("sandbox.test", "abc.sandbox.test"):
        told = ["openssl", "x509", "-noout", "-in", tls / "fullchain.pem", "-checkhost", name]
        said = subprocess.run(told, capture_output=True, text=True).stdout
        assert "does match" in said
    assert (tls / "privkey.pem").stat().st_mode & 0o777 == 0o600


def test_packages_are_named_once() -> None:
    for name in ("packages.must", "packages.may"):
        lines = [one for one in (DEPLOY / name).read_text().splitlines() if one[:1] != "#"]
        assert lines and all(re.fullmatch(r"\S+:[a-z0-9.+-]+", one) for one in lines)
        assert f"@deploy/{name}" in (REPOSITORY / "Makefile").read_text()
