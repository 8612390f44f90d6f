"""What `heyvm doctor` says of machines that this one is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from heyvm import doctor
from heyvm.backends.cgroups import Groups, Hierarchy
from heyvm.doctor import FAIL, OK, WARN, Machine
from heyvm.settings import Settings

ROOT, SOMEBODY = 0, 1000


def machine(
    tmp_path: Path, *, euid: int = SOMEBODY, release: str = "6.8.0", **files: str
) -> Machine:
    """A machine that has these files; `__` stands for a slash."""
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return Machine(tmp_path, euid, release)


def test_user_namespaces_that_are_off(tmp_path: Path) -> None:
    here = machine(tmp_path, proc__sys__user__max_user_namespaces="0")

    check = doctor.user_namespaces(here)

    assert check.level == FAIL
    assert "sysctl -w user.max_user_namespaces=" in check.cure


def test_user_namespaces_for_root_only(tmp_path: Path) -> None:
    files = {
        "proc__sys__user__max_user_namespaces": "100",
        "proc__sys__kernel__unprivileged_userns_clone": "0",
    }

    assert doctor.user_namespaces(machine(tmp_path, **files)).level == FAIL
    assert doctor.user_namespaces(machine(tmp_path, euid=ROOT, **files)).level == OK


def test_apparmor_of_ubuntu_24_04_comes_with_the_profile_that_mends_it(tmp_path: Path) -> None:
    name = "proc__sys__kernel__apparmor_restrict_unprivileged_userns"

    check = doctor.apparmor(machine(tmp_path, **{name: "1"}))

    assert check.level == WARN
    assert "userns," in check.cure
    assert "apparmor_parser -r" in check.cure
    assert doctor.apparmor(machine(tmp_path, euid=ROOT, **{name: "1"})).level == OK
    assert doctor.apparmor(machine(tmp_path, **{name: "0"})).level == OK


@pytest.mark.parametrize(
    ("release", "level"), [("5.15.0-91-generic", FAIL), ("5.19.0", OK), ("6.18.44-x", OK)]
)
def test_a_root_server_needs_idmapped_mounts(tmp_path: Path, release: str, level: str) -> None:
    assert doctor.idmapped_mounts(machine(tmp_path, euid=ROOT, release=release)).level == level
    assert doctor.idmapped_mounts(machine(tmp_path, release=release)).level == OK


def test_an_ordinary_users_single_id_is_told(tmp_path: Path) -> None:
    check = doctor.ids("single", machine(tmp_path))

    assert (check.level, check.name) == (WARN, "ids")
    assert "one id" in check.what
    assert "usermod --add-subuids" in check.cure
    assert doctor.ids("sub-ids", machine(tmp_path)).level == OK


def test_tools_for_images_that_are_missing_come_with_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.image_tools().level == OK
    for name in ("skopeo", "umoci", "gzip", "bzip2", "zstd"):
        (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))

    check = doctor.image_tools()

    assert (check.level, check.what) == (WARN, "no xz: no layers packed with it")
    assert check.cure.endswith("apt install xz-utils")


def test_what_groups_cannot_limit_is_named() -> None:
    some = Hierarchy("/sys/fs/cgroup", 2, frozenset({"memory", "pids"}))

    check = doctor.groups(Groups("0", (some,)))

    assert (check.level, check.name) == (WARN, "cgroups")
    assert check.what == "limit memory, pids: /sys/fs/cgroup (v2), without cpu"
    assert "no pause" in doctor.groups(Groups("0", ())).what


def test_disk_limits_that_cannot_be_had_say_why() -> None:
    assert "no loop devices" in doctor.disks("the machine has no loop devices").what
    assert doctor.disks(None).level == OK


def test_overlay_on_overlay_is_told_before_it_is_tried(tmp_path: Path) -> None:
    mounts = "22 1 0:21 / / rw - overlay overlay rw\n23 22 8:1 / /vol rw - ext4 /dev/sda1 rw"
    here = machine(tmp_path, proc__self__mountinfo=mounts)
    settings = Settings(data_dir=Path("/nowhere/heyvm"), run_dir=Path("/run/heyvm"))

    check = doctor.data_directory(settings, here)

    assert check.level == FAIL
    assert "HEYVM_DATA_DIR on a volume" in check.cure
    assert doctor.file_system_of(Path("/vol/heyvm"), here) == "ext4"


def test_a_run_directory_whose_sockets_would_not_fit(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, run_dir=Path("/run", "x" * 90))

    check = doctor.run_directory(settings)

    assert check.level == FAIL
    assert "HEYVM_RUN_DIR" in check.cure


def test_tickets_need_iroh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data_dir=tmp_path, run_dir=tmp_path, tunnel_host="192.0.2.7")
    with_it = doctor.tickets(settings)
    monkeypatch.setitem(sys.modules, "iroh", None)
    without = doctor.tickets(settings)

    assert (with_it.level, without.level) == (OK, WARN)
    assert "192.0.2.7" in with_it.what
