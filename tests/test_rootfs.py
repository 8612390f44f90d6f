"""A root file system from an image: its own for each sandbox, and no way out of it."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from heyvm import guest
from heyvm.errors import BackendFailed, Invalid
from heyvm.models import CreateSpec
from tests import images
from tests.boxes import Boxes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="unpacks images with their owners")


@pytest.fixture(scope="module")
def boxes():
    with Boxes() as made:
        yield made


@pytest.fixture(scope="module")
def tiny(boxes):
    return boxes.image(images.tiny())


@pytest.fixture
def tree(tmp_path):
    """Busybox in a directory of its own, to be made hostile."""
    root = tmp_path / "tree"
    for name in ("bin", "etc"):
        (root / name).mkdir(parents=True)
    busybox = images.shutil.which("busybox", path="/bin:/usr/bin")
    subprocess.run(["cp", busybox, root / "bin/busybox"], check=True)
    for name in "sh cat ls ln mkdir mv rm stat chmod touch id cp find mount du readlink".split():
        os.link(root / "bin/busybox", root / "bin" / name)
    return root


def test_the_images_files_are_there_as_roots_and_can_be_changed(boxes, tiny):
    box = boxes.start(tiny)
    assert box.output("stat -c %u:%g /bin/busybox /home/app") == "0:0\n1000:1000\n"
    assert box.output("id -u; stat -c %U /home/app; cat /etc/hostname").split() == [
        *("0", "app", box.sandbox.slug)
    ]
    box.output("echo x > /home/app/new; chown 1000:1000 /home/app/new; rm /bin/vi; mkdir /made")
    other = boxes.start(tiny)
    assert other.output("ls /home/app; ls /bin/vi") == "/bin/vi\n"


def test_they_stay_over_a_stop_and_go_with_it(boxes, tiny):
    box = boxes.start(tiny)
    box.output("echo kept > /root/file; rm /bin/vi")
    box.restart()
    assert box.output("cat /root/file; ls /bin/vi || true") == "kept\n"
    boxes.backend.destroy(box.sandbox)
    assert not box.directory.exists()
    rootfs = boxes.settings.data_dir / "images" / tiny.removeprefix("sha256:") / "rootfs"
    assert (rootfs / "bin/vi").exists() and not (rootfs / "root/file").exists()


def test_a_second_sandbox_of_an_image_takes_next_to_no_disk(boxes, tiny):
    box = boxes.start(tiny)
    used = subprocess.run(["du", "-sk", box.directory], capture_output=True, text=True, check=True)
    assert int(used.stdout.split()[0]) < 1024


def test_what_every_box_has_is_there(boxes, tiny):
    box = boxes.start(tiny)
    seen = box.output(
        "stat -c '%a %F' /proc /dev /tmp /run /dev/shm /workspace; cat /proc/self/uid_map;"
        "echo x > /tmp/a; echo x > /run/a; echo x > /dev/null; ls /dev/pts /proc/self/fd"
    )
    assert "1777 directory" in seen and "65536" in seen


def test_a_user_of_the_image_can_be_used(boxes, tiny):
    box = boxes.start(tiny)
    assert box.output("id -u; id -g; echo $HOME; touch ~/mine", user="app").split() == [
        *("1000", "1000", "/home/app")
    ]


def test_an_image_without_a_shell_runs_commands(boxes, tree):
    (tree / "bin/sh").unlink()
    box = boxes.start(boxes.image(tree))
    assert box.execute("/bin/cat", "/etc/hostname").stdout.decode().strip() == box.sandbox.slug
    assert box.execute("/bin/sh", "-c", "true").exit_code == 127


def test_an_empty_image_has_a_box_and_files(boxes, tmp_path):
    (tmp_path / "empty").mkdir()
    box = boxes.start(boxes.image(tmp_path / "empty"))
    with box.backend.connect(box.sandbox) as sock:
        guest.write(sock, "/workspace", "hello", iter([b"hi"]), tar=False)
    with box.backend.connect(box.sandbox) as sock:
        assert [one.name for one in guest.list_files(sock, "/workspace", "", recursive=False)] == [
            "hello"
        ]
    assert box.execute("/nothing").exit_code == 127


def test_files_are_reached_while_it_is_stopped(boxes, tiny):
    box = boxes.start(tiny)
    box.output("echo kept > /workspace/file")
    box.stop()
    with box.visit() as connect, connect() as sock:
        head, chunks = guest.read(sock, "/workspace", "file", offset=0, length=None)
        assert b"".join(chunks) == b"kept\n"


def test_it_goes_on_where_a_launcher_that_was_killed_left_off(boxes, tiny):
    box = boxes.draft(tiny)
    half = Path(f"{box.directory}.new")
    (half / "root").mkdir(parents=True)
    (half / "root" / "stray").touch()
    box.start()
    assert box.output("ls /") and not half.exists()
    assert box.run("ls /stray").exit_code != 0


def test_a_directory_that_is_a_link_in_its_place_is_refused(boxes, tiny, tmp_path):
    for suffix in (".new", ""):
        box = boxes.draft(tiny)
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        link = Path(f"{box.directory}{suffix}")
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path / "elsewhere")
        try:
            with pytest.raises((BackendFailed, OSError)):
                box.start()
            assert list((tmp_path / "elsewhere").iterdir()) == []
        finally:
            link.unlink()


@pytest.mark.parametrize("name", ["proc", "dev", "tmp", "run", "etc", ".heyvm"])
@pytest.mark.parametrize("target", ["/", "/etc", "../../oldroot/tmp", "usr", "file"])
def test_an_image_whose_directory_is_a_link_is_refused(boxes, tree, name, target):
    place = tree / name
    if place.is_dir():
        place.rmdir()
    if target == "file":
        place.touch()
    else:
        place.symlink_to(target)
    box = boxes.draft(boxes.image(tree))
    with pytest.raises(Invalid) as refused:
        box.start()
    assert f"/{name} " in refused.value.detail and list(refused.value.errors) == ["image"]
    boxes.backend.destroy(box.sandbox)
    assert not box.directory.exists()


def test_a_link_in_place_of_sys_or_of_a_device_aims_nothing(boxes, tree):
    """CVE-2025-31133: /dev/null of the image, with which something would be masked, is a link."""
    (tree / "sys").symlink_to("/proc")
    (tree / "dev").mkdir()
    for name in ("null", "console", "pts", "shm", "tty"):
        (tree / "dev" / name).symlink_to("/proc/sys/kernel/core_pattern")
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    box = boxes.start(boxes.image(tree))
    assert box.output("stat -c %F /dev/null; readlink /sys") == "character special file\n/proc\n"
    box.run("echo x > /dev/null; echo x > /dev/console")
    for masked in box.backend.parts().masked:
        assert box.run(f"stat -c '%t %T' {masked}; cat {masked}").stdout == b"1 3\n", masked
        assert box.run(f"echo x > {masked}").exit_code in (0, 1)
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


def test_the_resolver_is_written_at_each_start_whatever_is_there(
    boxes, tree, tmp_path, monkeypatch
):
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    (tree / "etc/resolv.conf").symlink_to(secret)
    specification = boxes.backend._specification
    text = "nameserver 192.0.2.1\n"
    monkeypatch.setattr(
        boxes.backend, "_specification", lambda *one: {**specification(*one), "resolv_conf": text}
    )
    box = boxes.start(boxes.image(tree))
    tricks = (
        "true",
        f"rm /etc/resolv.conf; ln -s {secret} /etc/resolv.conf",
        "rm /etc/resolv.conf; ln -s ../../../../etc/passwd /etc/resolv.conf",
        "rm /etc/resolv.conf; mkdir -p /etc/resolv.conf/full",
        "rm -r /etc/resolv.conf; busybox mkfifo /etc/resolv.conf",
        "rm /etc/resolv.conf; echo mine > /etc/resolv.conf; ln /etc/resolv.conf /etc/other",
        "rm /etc/resolv.conf; echo mine > /etc/resolv.conf; chmod 0 /etc/resolv.conf",
    )
    for trick in tricks:
        box.output(trick)
        box.restart()
        assert box.output("cat /etc/resolv.conf; stat -c '%F %a %u' /etc/resolv.conf") == (
            f"{text}regular file 644 0\n"
        ), trick
    assert box.output("cat /etc/other") == "mine\n"
    assert secret.read_text() == "untouched"
    box.output("mv /etc /etc2; ln -s /tmp /etc")
    with pytest.raises(Invalid, match="/etc in the sandbox"):
        box.restart()


def test_a_mount_point_cannot_be_replaced_from_inside(boxes, tree):
    box = boxes.start(boxes.image(tree))
    for name in ("proc", "dev", "tmp", "run", ".heyvm"):
        assert box.run(f"mv /{name} /{name}2").exit_code != 0
        assert box.run(f"rm -rf /{name}; ln -sfn /etc /{name}; test -L /{name}").exit_code != 0
    assert box.output("id -u") == "0\n"
    box.restart()
    assert box.output("id -u") == "0\n"


def test_names_that_look_like_options_are_names(boxes, tree):
    for name in ("--bind", "-c", "--help"):
        os.link(tree / "bin/busybox", tree / "bin" / name)
    box = boxes.start(boxes.image(tree))
    done = box.execute("--bind", "/", "/host")
    assert b"applet not found" in done.output and done.exit_code == 127
    assert box.execute("/bin/cat", "--", "/etc/hostname").exit_code == 0


def test_the_data_directorys_paths_are_nobodys_outside(boxes, tiny):
    """Hosts' users reach nothing of a sandbox: not by its directory, nor by its processes."""
    box = boxes.start(tiny)
    pid = box.sandbox.state["pid"]
    box.output("cp /bin/busybox /workspace/busybox; chmod 6755 /workspace/busybox")
    box.output("cp /bin/busybox /.heyvm/log/busybox; chmod 6755 /.heyvm/log/busybox")
    made = box.directory / "root/workspace/busybox"
    assert stat.S_IMODE(made.stat().st_mode) == 0o6755
    assert made.stat().st_uid == box.sandbox.id_base != 0
    for path in (
        made,
        box.directory / "log/busybox",
        f"/proc/{pid}/root/workspace/busybox",
        f"/proc/{pid}/root/.heyvm/log/busybox",
        f"/proc/{pid}/cwd/workspace/busybox",
    ):
        with pytest.raises(PermissionError):
            subprocess.run([path, "id"], user=23450, group=23450, extra_groups=[])


def test_set_id_bits_have_no_effect_inside(boxes, tiny):
    box = boxes.start(tiny)
    box.output("chmod 6755 /bin/id; test -u /bin/id -a -g /bin/id")
    assert box.output("id -u; id -g", user="app") == "1000\n1000\n"


def test_an_image_of_a_file_system_without_id_maps_can_still_be_read(boxes, tree):
    """ramfs cannot map: its files belong to nobody inside."""
    digest = boxes.image(tree)
    rootfs = boxes.settings.data_dir / "images" / digest.removeprefix("sha256:") / "rootfs"
    subprocess.run(["mount", "-t", "ramfs", "ramfs", rootfs], check=True)
    try:
        subprocess.run(["cp", "-a", f"{tree}/.", rootfs], check=True)
        box = boxes.start(digest)
        assert box.output("stat -c %u /bin/busybox") == "65534\n"
        assert box.run("echo x > /bin/new").exit_code != 0
        assert box.output("echo x > /workspace/new; cat /workspace/new") == "x\n"
        box.stop()
    finally:
        subprocess.run(["umount", "-l", rootfs], check=True)


def test_a_file_system_without_id_maps_is_told_of_before(boxes):
    assert not any("map ids" in one for one in boxes.backend.check_spec(CreateSpec()).warnings)
    with Boxes() as others:
        data = others.settings.data_dir
        subprocess.run(["mount", "-t", "ramfs", "ramfs", data], check=True)
        try:
            warnings = others.backend.check_spec(CreateSpec()).warnings
        finally:
            subprocess.run(["umount", "-l", data], check=True)
    assert any(str(data) in one and "map ids" in one for one in warnings)
