"""The template of `/` for the `host` image: complete enough to work in, and nobody's secrets."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from heyvm.backends import hostfiles
from heyvm.errors import Unavailable

MERGED = Path("/bin").is_symlink()
pytestmark = pytest.mark.skipif(not MERGED, reason="needs a merged /usr")
NEVER = """
shadow shadow- gshadow gshadow- passwd- group- machine-id hostname hosts ssh sudoers sudoers.d
subuid subgid environment gitconfig npmrc pip.conf wgetrc ssl/private apt/auth.conf
apt/auth.conf.d apt/sources.list security/opasswd cron.d systemd fstab .pwd.lock
ldap NetworkManager wireguard letsencrypt docker kubernetes krb5.keytab networks
""".split()
MADE = {
    *("passwd", "group", "nsswitch.conf", "resolv.conf", "profile", "mtab", "debconf.conf"),
    *("apt/sources.list.d/system.sources", "apt/apt.conf.d/50user"),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostfiles.ensure(tmp_path_factory.mktemp("host"))


def files(top: Path) -> list[str]:
    """Everything below that is not a directory."""
    return [
        os.path.relpath(os.path.join(directory, name), top)
        for directory, directories, names in os.walk(top)
        for name in [*names, *(d for d in directories if os.path.islink(f"{directory}/{d}"))]
    ]


def test_it_is_a_root_without_usr(template: Path) -> None:
    assert os.listdir(template / "usr") == []
    assert os.readlink(template / "bin") == os.readlink("/bin").lstrip("/")
    for place in ("proc", "dev", "sys", "run", "home", "srv", "workspace", ".heyvm", "var/log"):
        assert os.listdir(template / place) == []
        assert stat.S_IMODE((template / place).stat().st_mode) == 0o755
    for place in ("tmp", "var/tmp"):
        assert stat.S_IMODE((template / place).stat().st_mode) == 0o1777
    assert stat.S_IMODE((template / "root").stat().st_mode) == 0o700


def test_no_secret_is_in_it(template: Path) -> None:
    present = [name for name in NEVER if os.path.lexists(template / "etc" / name)]
    assert present == []
    for name in files(template):
        path = template / name
        if not path.is_symlink():
            assert b"PRIVATE KEY-----" not in path.read_bytes(), name


def test_nothing_is_in_it_that_the_host_keeps_from_anybody(template: Path) -> None:
    for name in files(template):
        if name.removeprefix("etc/") in MADE or not os.path.lexists(f"/{name}"):
            continue
        if not os.path.islink(f"/{name}"):
            assert os.stat(f"/{name}").st_mode & stat.S_IROTH, name


def test_nothing_is_in_it_that_is_not_on_the_list(template: Path) -> None:
    trees = tuple(f"{tree}/" for tree in hostfiles.DIRECTORIES)
    for name in files(template / "etc"):
        listed = name in hostfiles.FILES or name in MADE or name.startswith(trees)
        listed |= any(Path(name.split("/")[0]).match(each) for each in hostfiles.PATTERNS)
        assert listed, name
    outside = {name.split("/")[0] for name in files(template)}
    assert outside <= {"etc", "var", *hostfiles.MERGED}
    for name in files(template / "var"):
        assert name in ("run", "lock") or name.startswith("lib/dpkg/"), name


def test_it_is_owned_by_whoever_made_it_and_writable_by_nobody_else(template: Path) -> None:
    for directory, directories, names in os.walk(template):
        for name in (*directories, *names):
            status = os.lstat(os.path.join(directory, name))
            assert status.st_uid == os.geteuid()
            if not stat.S_ISLNK(status.st_mode) and name != "tmp":
                assert not status.st_mode & 0o6022, name


def test_no_user_of_the_host_is_in_it(template: Path) -> None:
    inside = {line.split(":")[0] for line in (template / "etc/passwd").read_text().splitlines()}
    people = {user.pw_name for user in pwd.getpwall() if 1000 <= user.pw_uid < 65000}
    assert "root" in inside
    assert not inside & people
    assert "root:*:0:0:root:/root:/bin/" in (template / "etc/passwd").read_text()


def test_its_links_stay_inside(template: Path) -> None:
    for name in files(template / "etc"):
        path = template / "etc" / name
        if not path.is_symlink() or name == "mtab":
            continue
        target = os.path.normpath(os.path.join("/etc", os.path.dirname(name), os.readlink(path)))
        assert target.startswith(("/usr/", "/proc/")) or os.path.lexists(f"{template}{target}")


def test_the_second_call_finds_what_the_first_made(template: Path) -> None:
    before = template.stat().st_mtime_ns
    assert hostfiles.ensure(template.parent) == template
    assert template.stat().st_mtime_ns == before


def test_four_at_once_make_one_once(tmp_path: Path) -> None:
    with (
        mock.patch.object(hostfiles, "_build", wraps=hostfiles._build) as builds,
        ThreadPoolExecutor(4) as pool,
    ):
        found = set(pool.map(hostfiles.ensure, [tmp_path] * 4))
    assert builds.call_count == 1
    assert os.listdir(tmp_path) == [found.pop().name]
    assert not found


# --- on a host made for the purpose


@pytest.fixture
def host(tmp_path: Path) -> Path:
    root = tmp_path / "machine"
    for directory in ("etc/ssl/certs", "etc/skel", "usr/lib", "usr/bin"):
        (root / directory).mkdir(parents=True)
    for name in ("bin", "lib", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc/issue").write_text("hello\n")
    return root


def made_from(host: Path) -> Path:
    return hostfiles.ensure(host.parent / "templates", host=host) / "etc"


def test_what_is_not_public_is_passed_over(host: Path) -> None:
    secret = host / "etc/ssl/certs/secret.pem"
    secret.write_text("-----BEGIN RSA PRIVATE KEY-----\n")
    closed = host / "etc/skel/closed"
    closed.write_text("x")
    closed.chmod(0o640)
    (host / "etc/skel/deep").mkdir(mode=0o700)
    (host / "etc/skel/deep/file").write_text("x")
    os.mkfifo(host / "etc/skel/pipe")
    (host / "etc/shadow").write_text("root:x")
    (host / "etc/skel/link").symlink_to("/etc/shadow")
    (host / "etc/skel/out").symlink_to("/home/somebody")
    (host / "etc/skel/kept").symlink_to("../issue")
    etc = made_from(host)
    assert (etc / "issue").read_text() == "hello\n"
    assert [path.name for path in (etc / "skel").iterdir()] == ["kept"]
    assert not (etc / "ssl/certs").exists() or not os.listdir(etc / "ssl/certs")


def test_a_change_of_the_host_makes_another_template(host: Path) -> None:
    before = made_from(host)
    assert made_from(host) == before
    (host / "etc/issue").write_text("something else\n")
    assert made_from(host) != before
    assert before.exists()


def test_a_machine_without_merged_usr_is_told_so(host: Path) -> None:
    (host / "sbin").unlink()
    (host / "sbin").mkdir()
    with pytest.raises(Unavailable, match="/sbin is not a link into /usr"):
        made_from(host)


@pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bwrap")
@pytest.mark.parametrize(
    "command",
    [
        "getent passwd root && id && ls -ld ~",
        "bash -lc 'echo $PATH'",
        "python3 -c 'import ssl; assert ssl.create_default_context().get_ca_certs()'",
        "dpkg -s bash && dpkg -L bash | grep /bash$ && ! dpkg -s bash 2>&1 | grep warning",
        "cc=$(command -v gcc) || exit 0; readlink -f $cc",
        "awk 'BEGIN { exit }'",
        '[ -z "$(apt-get check 2>&1 >/dev/null)" ]',
    ],
)
def test_ordinary_programs_find_what_they_look_for(template: Path, command: str) -> None:
    box = ["bwrap", "--unshare-all", "--unshare-user", "--uid", "0", "--gid", "0"]
    root = ["--bind", str(template), "/", "--ro-bind", "/usr", "/usr", "--proc", "/proc"]
    places = ["--dev", "/dev", "--tmpfs", "/tmp", "--setenv", "HOME", "/root", "--chdir", "/"]
    argv = [*box, *root, *places, "--", "/bin/sh", "-ec", command]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
