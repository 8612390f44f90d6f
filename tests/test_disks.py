"""`disk_size_gb`: a sandbox fills its own disk and no other, and nothing of it is left behind."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from heyvm import guest, logs
from heyvm.backends import disks
from heyvm.errors import Invalid
from heyvm.models import CreateSpec, Limits
from tests import images
from tests.boxes import Boxes
from tests.server import wait_until

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK),
    reason="only root with loop devices limits a disk",
)
MIB = 1 << 20


@pytest.fixture(scope="module")
def boxes():
    with Boxes() as made:
        yield made
        wait_until(lambda: not loops(made.home), "no loop device is left")


@pytest.fixture(scope="module")
def tiny(boxes):
    return boxes.image(images.tiny())


@pytest.fixture
def box(boxes, tiny):
    made = boxes.start(tiny, limits=Limits(disk_size_gb=1))
    yield made
    boxes.backend.destroy(made.sandbox)


def loops(home):
    """What loop devices hold that lies below a directory."""
    found = [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    needle = f"/{home.name}"  # a backing file on a tmpfs is named from there on
    return [one for one in found if needle in one]


def used(boxes):
    """Bytes on the host's disk, of this data directory alone: other tests write to it too."""
    return sum(
        os.lstat(os.path.join(above, name)).st_blocks * 512
        for above, _, names in os.walk(boxes.settings.data_dir)
        for name in names
    )


def log_of(box):
    directory = box.backend.open_log(box.sandbox)
    return [line.message for line in logs.lines(directory)]


@pytest.mark.parametrize("image", ["host", "tiny"])
def test_it_has_that_size_inside(boxes, tiny, image):
    box = boxes.start(tiny if image == "tiny" else "host", limits=Limits(disk_size_gb=2))
    for place in ("/", "/workspace", "/.heyvm/log", *(["/usr"] if image == "host" else [])):
        blocks = int(box.output(f"df -k {place} | tail -1").split()[1])
        assert 1.8 * MIB < blocks <= 2 * MIB, place
    assert box.output("id -u; touch /etc/x /workspace/x; stat -c %u /workspace/x").split() == [
        *("0", "0")
    ]
    boxes.backend.destroy(box.sandbox)


def test_a_full_disk_is_full_inside_alone(boxes, box):
    before = used(boxes)
    done = box.run("cat /dev/zero > /workspace/big")
    assert done.exit_code != 0 and b"No space left" in done.stderr
    for place in ("/.heyvm/log/more", "/etc/more"):
        assert box.run(f"head -c 5000000 /dev/zero > {place}").exit_code != 0
    os.sync()
    assert used(boxes) - before < 1100 * MIB
    assert box.output("rm /workspace/big /etc/more; echo fine > /workspace/small; cat /workspace/*")
    wait_until(lambda: used(boxes) - before < 200 * MIB, "what was deleted inside is free outside")


def test_a_full_one_can_be_started_and_mended(box):
    box.run("cat /dev/zero > /workspace/big; cat /dev/zero > /workspace/rest")
    box.restart()
    box.output("rm /workspace/big; echo fine > /workspace/small")


def test_empty_files_are_bounded(box):
    inodes = int(box.output("df -i /workspace | tail -1").split()[1])
    assert inodes < 100_000
    program = "cd /workspace; for i in $(seq 70000); do echo >f$i || exit 9; done 2>/dev/null"
    assert box.run(program).exit_code != 0
    assert box.run("touch /workspace/one-more").exit_code != 0


def test_files_stay_over_a_stop_and_a_kill(box):
    box.output("echo kept > /workspace/file")
    box.restart()
    os.kill(box.sandbox.state["pid"], signal.SIGKILL)
    wait_until(lambda: box.backend.poll(box.sandbox) is not None, "it is dead")
    box.stop()
    box.start()
    assert box.output("cat /workspace/file") == "kept\n"


def test_no_device_and_no_mount_is_left_of_a_stopped_one(boxes, box):
    assert loops(box.directory) and "disk.img" in loops(box.directory)[0]
    for end in (box.stop, lambda: os.kill(box.sandbox.state["pid"], signal.SIGKILL)):
        end()
        wait_until(lambda: not loops(box.directory), "its loop device is gone")
        assert str(box.directory) not in Path("/proc/self/mountinfo").read_text()
        box.start()


def test_delete_frees_it(boxes, tiny):
    before = used(boxes)
    box = boxes.start(tiny, limits=Limits(disk_size_gb=1))
    box.output("head -c 300000000 /dev/zero > /workspace/big; sync")
    assert used(boxes) - before > 250 * MIB
    boxes.backend.destroy(box.sandbox)
    assert not loops(box.directory) and not box.directory.exists()
    assert abs(used(boxes) - before) < 100 * MIB


def test_its_log_is_read_while_it_runs_and_after(boxes, box):
    box.output("echo one", log="execute")
    assert b"one" in log_of(box)
    box.stop()
    assert b"one" in log_of(box)
    wait_until(lambda: not loops(box.directory), "the log is closed, and its device gone")
    box.start()
    assert b"one" in log_of(box)


def test_a_log_that_is_being_read_and_a_start_share_one_device(box):
    """Two file systems on one image would ruin it."""
    box.output("echo kept > /workspace/file", log="execute")
    box.stop()
    directory = box.backend.open_log(box.sandbox)
    box.start()
    assert len(loops(box.directory)) == 1
    os.close(directory)
    assert box.output("cat /workspace/file") == "kept\n"


def test_logs_read_by_many_during_starts_and_stops(box):
    box.output("echo one", log="execute")
    over, wrong = threading.Event(), []

    def read():
        while not over.is_set():
            try:
                assert b"one" in log_of(box)
                assert len(loops(box.directory)) <= 1
            except BaseException as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(8):
            box.output(f"echo {number} > /workspace/{number}")
            box.restart()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert box.output("cat /workspace/[0-7]").split() == [str(one) for one in range(8)]
    box.stop()
    wait_until(lambda: not loops(box.directory), "its device is gone")
    checked = subprocess.run(["e2fsck", "-fn", box.directory / "disk.img"], capture_output=True)
    assert checked.returncode == 0, checked.stdout


def test_its_files_are_reached_while_it_is_stopped(box):
    box.output("echo kept > /workspace/file")
    box.stop()
    with box.visit() as connect, connect() as sock:
        head, chunks = guest.read(sock, "/workspace", "file", offset=0, length=None)
        assert b"".join(chunks) == b"kept\n"
    wait_until(lambda: not loops(box.directory), "its device is gone")


def test_nothing_that_it_writes_lies_outside(box):
    box.output(
        "for d in / /workspace /etc /root /.heyvm/log /home/app /tmp /run /dev/shm;"
        "do head -c 100000 /dev/zero > $d/written; done"
    )
    outside = [path for path in box.directory.rglob("*") if path.name == "written"]
    assert outside == []
    assert sorted(os.listdir(box.directory)) == ["disk", "disk.img", "status"]


def test_a_new_one_takes_next_to_no_disk(boxes, tiny):
    box = boxes.start(tiny, limits=Limits(disk_size_gb=250))
    assert (box.directory / "disk.img").stat().st_blocks * 512 < 32 * MIB
    boxes.backend.destroy(box.sandbox)


def test_many_at_once_get_a_device_each(boxes, tiny):
    made = [boxes.draft(tiny, limits=Limits(disk_size_gb=1)) for _ in range(12)]
    wrong = []

    def start(box):
        try:
            box.start()
            box.output(f"echo {box.sandbox.id} > /workspace/name")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=start, args=(box,)) for box in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(set(loops(boxes.home))) == 12
    for box in made:
        assert box.output("cat /workspace/name").strip() == box.sandbox.id
        boxes.backend.destroy(box.sandbox)


def test_a_maker_that_was_killed_halfway_is_made_good(boxes, tiny):
    box = boxes.draft(tiny, limits=Limits(disk_size_gb=1))
    half = Path(f"{box.directory}.new")
    half.mkdir(parents=True)
    (half / "disk.img").write_bytes(b"half" * 1000)
    (half / "disk").mkdir()
    box.start()
    assert int(box.output("df -k / | tail -1").split()[1]) > 900 * 1024
    boxes.backend.destroy(box.sandbox)


def test_more_than_the_disk_has_is_made_with_a_warning(boxes):
    offer = boxes.backend.check_spec(CreateSpec(disk_size_gb=10**6))
    assert any("disk_size_gb" in warning for warning in offer.warnings)
    offer = boxes.backend.check_spec(CreateSpec(disk_size_gb=1))
    assert not any("disk_size_gb" in warning for warning in offer.warnings)


def test_where_it_cannot_be_kept_to_it_is_refused(boxes, monkeypatch):
    monkeypatch.setattr(boxes.backend, "root", False)
    with pytest.raises(Invalid) as refused:
        boxes.backend.check_spec(CreateSpec(disk_size_gb=1))
    assert list(refused.value.errors) == ["disk_size_gb"]


def test_a_device_is_found_again_and_goes_with_its_last_user(tmp_path):
    image = tmp_path / "image"
    disks.make(str(image), 64 * MIB, "/usr/sbin/mkfs.ext4", 0)
    first, path = disks.attach(str(image))
    second, again = disks.attach(str(image))
    assert path == again and disks.in_use(image.stat())
    os.close(first)
    assert disks.in_use(image.stat())
    os.close(second)
    wait_until(lambda: not disks.in_use(image.stat()), "it is free")
