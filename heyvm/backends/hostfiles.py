"""The template of `/` for the `host` image: what a machine has besides `/usr`, without its owner.

An explicit list of harmless files is copied from `/etc`; accounts, name service and package sources
are made. A copy and not an overlay: root inside would read `/etc/shadow` through an id-mapped one.
What differs from sandbox to sandbox (host name, hosts, machine id) is not in it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from heyvm.backends.bundle import aside, flush, make_once
from heyvm.errors import Unavailable

# Read by libraries and common programs, and the same on any machine of the kind. Left out on
# purpose: whatever may hold a password, a token or a name of this place (gitconfig, npmrc,
# pip.conf, wgetrc, apt's auth.conf, proxies and sources, environment, networks, ldap, ssh, sudoers,
# security/opasswd).
FILES = """
adduser.conf bash.bashrc ca-certificates.conf debian_version default/locale
default/nss default/useradd deluser.conf gai.conf host.conf inputrc issue issue.net ld.so.cache
ld.so.conf locale.alias locale.conf locale.gen localtime login.defs lsb-release magic magic.mime
mailcap manpath.config mime.types mke2fs.conf nanorc netconfig os-release pam.conf
protocols rpc security/access.conf security/group.conf security/limits.conf
security/pam_env.conf security/time.conf services shells ssl/openssl.cnf timezone ucf.conf
xattr.conf
""".split()
DIRECTORIES = """
ImageMagick-6 ImageMagick-7 alternatives apt/trusted.gpg.d ca-certificates dpkg fonts gdb groff
ld.so.conf.d pam.d perl python3 skel ssl/certs terminfo vim
""".split()
PATTERNS = ("python3.*", "java-*-openjdk")
LARGEST_BYTES = 16 * 1024 * 1024
SECRET = b"PRIVATE KEY-----"

# dpkg's account of /usr, which is the host's: without it apt would fetch and unpack all of it again
# to install one package, and a package's name tells no more than /usr/share/doc does. The
# maintainers' scripts stay out, having run already.
PACKAGES = "var/lib/dpkg"

MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
PLACES = """
.heyvm boot dev etc etc/apt etc/apt/apt.conf.d etc/apt/preferences.d etc/opt etc/profile.d home
media mnt opt proc run srv sys usr var var/backups var/cache var/lib var/lib/misc var/local var/log
var/mail var/opt var/spool workspace
""".split()
STICKY = ("tmp", "var/tmp")
LINKS = {"etc/mtab": "../proc/self/mounts", "var/lock": "../run/lock", "var/run": "../run"}

NOLOGIN = "/usr/sbin/nologin"
# Debian's base-passwd, without `_apt`: apt changes to it where it is, which fails where a sandbox
# has a single id.
USERS = (
    *((0, "root", 0, "/root", ""), (1, "daemon", 1, "/usr/sbin", NOLOGIN)),
    *((2, "bin", 2, "/bin", NOLOGIN), (3, "sys", 3, "/dev", NOLOGIN)),
    *((4, "sync", 65534, "/bin", "/bin/sync"), (5, "games", 60, "/usr/games", NOLOGIN)),
    *((6, "man", 12, "/var/cache/man", NOLOGIN), (7, "lp", 7, "/var/spool/lpd", NOLOGIN)),
    *((8, "mail", 8, "/var/mail", NOLOGIN), (9, "news", 9, "/var/spool/news", NOLOGIN)),
    *((10, "uucp", 10, "/var/spool/uucp", NOLOGIN), (13, "proxy", 13, "/bin", NOLOGIN)),
    *((33, "www-data", 33, "/var/www", NOLOGIN), (34, "backup", 34, "/var/backups", NOLOGIN)),
    *((38, "list", 38, "/var/list", NOLOGIN), (39, "irc", 39, "/run/ircd", NOLOGIN)),
    (65534, "nobody", 65534, "/nonexistent", NOLOGIN),
)
GROUPS = """
root:0 daemon:1 bin:2 sys:3 adm:4 tty:5 disk:6 lp:7 mail:8 news:9 uucp:10 man:12 proxy:13 kmem:15
dialout:20 fax:21 voice:22 cdrom:24 floppy:25 tape:26 sudo:27 audio:29 dip:30 www-data:33 backup:34
operator:37 list:38 irc:39 src:40 shadow:42 utmp:43 video:44 sasl:45 plugdev:46 staff:50 games:60
users:100 nogroup:65534
""".split()
NSSWITCH = """\
passwd: files
group: files
shadow: files
hosts: files dns
networks: files
protocols: files
services: files
ethers: files
rpc: files
"""
RESOLV = "# This sandbox has no name server.\n"
PROFILE = """\
# What a login shell of a sandbox starts with.
if [ "$(id -u)" -eq 0 ]; then
  PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
else
  PATH="/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
fi
export PATH
export LANG="${LANG:-C.UTF-8}"
if [ "${BASH-}" ] && [ "${PS1-}" ] && [ -r /etc/bash.bashrc ]; then
  . /etc/bash.bashrc
fi
for file in /etc/profile.d/*.sh; do
  [ ! -r "$file" ] || . "$file"
done
unset file
"""
APT = 'APT::Sandbox::User "root";\n'
DEBIAN = """\
Types: deb
URIs: http://deb.debian.org/debian
Suites: {codename} {codename}-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://deb.debian.org/debian-security
Suites: {codename}-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
UBUNTU = """\
Types: deb
URIs: {mirror}
Suites: {codename} {codename}-updates {codename}-security
Components: main universe
Signed-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg
"""


def ensure(directory: Path, *, host: Path = Path("/")) -> Path:
    """The template for the host as it is now, made below `directory` where missing.

    As `bundle.ensure`: any number of callers at once, whole or not at all, never changed once it is
    there; a changed host makes another one. Owned by whoever makes it. `host` is where the machine
    is looked at. Raises `Unavailable` where /bin and the like are not links into /usr.
    """
    path = directory / _digest(host)
    make_once(path, lambda: _build(path, host))
    return path


def _digest(host: Path) -> str:
    mark = hashlib.sha256(Path(__file__).read_bytes())
    for name, target in _merged(host).items():
        mark.update(f"{name} {target}\n".encode())
    packages = (f"../{PACKAGES}/{name}" for name in ("status", "info", "alternatives"))
    for name in (*_wanted(host / "etc"), *packages):
        if status := _status(f"{host}/etc/{name}"):
            what = (status.st_mtime_ns, status.st_size, status.st_mode, status.st_ino)
            mark.update(os.fsencode(f"{name} {what}\n"))
    return mark.hexdigest()[:16]


def _merged(host: Path) -> dict[str, str]:
    """The links of `/` that lead into `/usr`."""
    links = {}
    for name in MERGED:
        place = host / name
        if place.is_symlink():
            links[name] = os.readlink(place).lstrip("/")
        elif place.exists():
            raise Unavailable(
                f"/{name} is not a link into /usr, so this machine cannot be the `host` image:"
                " merge them (on Debian: apt install usrmerge), or name an image"
            )
    return links


def _wanted(etc: Path) -> Iterator[str]:
    """The names below /etc that are on the list, there or not, in a fixed order."""
    yield from FILES
    trees = [*DIRECTORIES, *(path.name for each in PATTERNS for path in sorted(etc.glob(each)))]
    for tree in trees:
        yield from _below(etc, tree)


def _below(etc: Path, tree: str) -> Iterator[str]:
    """Everything but directories, in order; what not everybody may enter is passed over."""
    try:
        with os.scandir(f"{etc}/{tree}") as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        return
    if os.stat(f"{etc}/{tree}").st_mode & 0o005 != 0o005:
        return
    for entry in entries:
        name = f"{tree}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _below(etc, name)
        else:
            yield name


def _status(path: str | Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:  # not on this machine, or not for us to see: then it is not for a sandbox
        return None


def _build(path: Path, host: Path) -> None:
    with aside(path) as made:
        for place in PLACES:
            _directory(made / place, 0o755)
        for place in STICKY:
            _directory(made / place, 0o1777)
        _directory(made / "root", 0o700)
        for name, target in (_merged(host) | LINKS).items():
            os.symlink(target, made / name)
        for name in _wanted(host / "etc"):
            _take(host / "etc" / name, made / "etc" / name, made)
        for name, text in _made(host).items():
            _write(made / "etc" / name, text.encode())
        _packages(host / PACKAGES, made / PACKAGES, made)
        _drop_dangling(made / "etc")
        os.chmod(made, 0o755)
        flush(made)


def _directory(path: Path, mode: int) -> None:
    path.mkdir(exist_ok=True)
    os.chmod(path, mode)  # whatever the umask is


def _parents(path: Path, made: Path) -> None:
    if path.parent.is_dir():
        return
    for parent in reversed(path.relative_to(made).parents):
        if not (made / parent).exists():
            _directory(made / parent, 0o755)


def _take(source: Path, target: Path, made: Path) -> None:
    """Copy what everybody may read and nobody would miss; anything else is passed over."""
    status = _status(source)
    if status is None:
        return
    if stat.S_ISLNK(status.st_mode):
        _parents(target, made)
        os.symlink(os.readlink(source), target)
    elif (content := _public(source)) is not None:
        _parents(target, made)
        _write(target, content, executable=bool(status.st_mode & 0o001))


def _public(source: Path) -> bytes | None:
    """The content of a regular file that any user of the host can read, and that is no key."""
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        entered = source.parent.stat().st_mode & stat.S_IXOTH
        if not stat.S_ISREG(status.st_mode) or not status.st_mode & stat.S_IROTH or not entered:
            return None
        content = file.read(LARGEST_BYTES + 1)
    return None if len(content) > LARGEST_BYTES or SECRET in content else content


def _write(target: Path, content: bytes, *, executable: bool = False) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    os.chmod(target, 0o755 if executable else 0o644)


def _drop_dangling(etc: Path) -> None:
    """A link is kept where it leads into /usr, /proc or to something that was copied."""
    for top, directories, names in os.walk(etc):
        for name in (*directories, *names):
            path = Path(top, name)
            if path.is_symlink() and not _leads_somewhere(path, etc):
                path.unlink()


def _leads_somewhere(link: Path, etc: Path) -> bool:
    inside = "/" + os.path.relpath(link.parent, etc.parent)
    target = os.path.normpath(os.path.join(inside, os.readlink(link)))
    if target.startswith(("/usr/", "/proc/")):
        return True
    return target.startswith("/etc/") and os.path.lexists(etc.parent / target.lstrip("/"))


def _made(host: Path) -> dict[str, str]:
    """The files of /etc that say who there is and where to ask."""
    texts = {
        "passwd": _passwd(host),
        "group": "".join(f"{name}:x:{gid}:\n" for name, _, gid in _split(GROUPS)),
        "nsswitch.conf": NSSWITCH,
        "resolv.conf": RESOLV,
        "profile": PROFILE,
        "apt/apt.conf.d/50user": APT,
    }
    if sources := _sources(host):
        texts["apt/sources.list.d/system.sources"] = sources
    # The packaged one: the host's own may name a database with its password.
    if debconf := _public(host / "usr/share/debconf/debconf.conf"):
        texts["debconf.conf"] = debconf.decode()
    return texts


def _split(words: list[str]) -> list[tuple[str, str, str]]:
    return [word.partition(":") for word in words]


def _passwd(host: Path) -> str:
    # No password is right; with an x, su(1) and PAM would miss the shadow file that tells of it.
    shell = "/bin/bash" if (host / "usr/bin/bash").exists() else "/bin/sh"
    return "".join(
        f"{name}:*:{uid}:{gid}:{name}:{home}:{login or shell}\n"
        for uid, name, gid, home, login in USERS
    )


def _sources(host: Path) -> str | None:
    """The distribution's own packages. The host's list may hold passwords, in more forms than can
    be told from a path, and so does not come in."""
    release = _release(host)
    codename = release.get("VERSION_CODENAME", "")
    if not codename.isalnum():
        return None
    if release.get("ID") == "debian":
        return DEBIAN.format(codename=codename)
    if release.get("ID") == "ubuntu":
        return UBUNTU.format(codename=codename, mirror=_ubuntu_mirror())
    return None


def _ubuntu_mirror() -> str:
    if platform.machine() == "x86_64":
        return "http://archive.ubuntu.com/ubuntu"
    return "http://ports.ubuntu.com/ubuntu-ports"


def _release(host: Path) -> Mapping[str, str]:
    content = _public(host / "usr/lib/os-release") or b""
    found = re.findall(r'^([A-Z_]+)="?([^"\n]*)"?$', content.decode("utf-8", "replace"), re.M)
    return dict(found)


def _packages(source: Path, target: Path, made: Path) -> None:
    for name in ("info", "updates", "triggers", "alternatives", "parts"):
        _parents(target / name / "x", made)
    _write(target / "available", b"")
    for name in ("status", "diversions", "info/format", "triggers/File", "triggers/Unincorp"):
        _take(source / name, target / name, made)
    for tree in ("alternatives", "info"):
        for path in sorted(source.glob(f"{tree}/*")):
            if tree == "alternatives" or path.suffix in (".list", ".triggers"):
                _take(path, target / tree / path.name, made)
