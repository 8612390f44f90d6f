"""What a create makes of images, limits and pauses, with boxes that are files and a store that does
as it is told; the real ones are in test_images.py, test_rootfs.py, test_limits.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heyvm.errors import Conflict, HeyvmError, ImageMissing, Invalid, NotFound, StorageFull
from heyvm.lifecycle import Lifecycle, limits_of
from heyvm.models import CreateSpec, Image, ImageConfig, Limits, Sandbox, Status
from heyvm.registry import Registry
from heyvm.settings import Settings
from tests.fake_backend import FileBackend, wait_for

CONFIG = ImageConfig(
    env={"PATH": "/opt/bin", "COLOUR": "red"},
    working_directory="/srv",
    user="www",
    command=("nginx", "-g", "daemon off;"),
)
IMAGE = Image("sha256:" + "a" * 64, ("web:1",), 1, 1.0, config=CONFIG)


class Pausable(FileBackend):
    """Writes down what it is told to halt and to let go on. Its sandboxes have sub-ids."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.halted: list[str] = []

    def check_spec(self, spec: CreateSpec) -> Any:
        return replace(super().check_spec(spec), ids="sub-ids")

    def pause(self, sandbox: Sandbox) -> None:
        self.halted.append(f"pause {sandbox.status}")

    def resume(self, sandbox: Sandbox) -> None:
        self.halted.append(f"resume {sandbox.status}")


class SingleId(Pausable):
    def check_spec(self, spec: CreateSpec) -> Any:
        return replace(super().check_spec(spec), ids="single")


class Store:
    """Has nothing until it is asked for; then what `answer` gives or raises."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.answer: Callable[[Callable[[str], None]], Image] = lambda tell: IMAGE
        self.fetched = 0

    def find(self, name: str) -> Image | None:
        if name.startswith("-"):
            raise Invalid("no name", errors={"image": ["no name"]})
        return self.registry.image(name)

    def known(self, name: str) -> bool:
        return self.registry.had_image(name)

    def ensure(self, name: str, tell: Callable[[str], None]) -> Image:
        here = self.find(name)
        if here is not None:
            return here
        self.fetched += 1
        return self.registry.add_image(replace(self.answer(tell), names=(name,)))


def build(
    where: Path, backend: type[FileBackend] = Pausable, **settings: Any
) -> tuple[Lifecycle, Any, Store]:
    made = backend(where / "boxes")
    chosen = Settings(data_dir=where / "data", run_dir=where / "run", **settings)
    registry = Registry(chosen.data_dir / "registry.db")
    store = Store(registry)
    return Lifecycle(registry, {made.name: made}, chosen, store), made, store


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Lifecycle, Any, Store]:
    return build(tmp_path)


def missing(tell: Callable[[str], None]) -> Image:
    raise ImageMissing("manifest unknown", errors={"image": ["manifest unknown"]})


def create(lifecycle: Lifecycle, **fields: Any) -> Sandbox:
    return lifecycle.create(CreateSpec(name="a", **fields))[0]


def test_an_image_is_fetched_once_and_its_wishes_are_honoured(parts: Any) -> None:
    lifecycle, backend, store = parts
    first = create(lifecycle, image="web:1", env_vars={"COLOUR": "blue"})
    second = create(lifecycle, image="web:1", working_directory="/home", start_command="serve")

    assert store.fetched == 1
    assert first.image_resolved == second.image_resolved == IMAGE.digest
    assert (first.working_directory, second.working_directory) == ("/srv", "/home")
    own, given = backend.orders("start")
    assert own["argv"] == [b"nginx", b"-g", b"daemon off;"]
    assert (own["user"], own["command"]) == (b"www", b"")
    assert (own["env"]["PATH"], own["env"]["COLOUR"]) == (b"/opt/bin", b"blue")
    assert (given["argv"], given["command"]) == ([], b"serve")
    assert second.image_config == CONFIG


def test_hooks_run_as_root_whoever_the_images_user_is(parts: Any) -> None:
    lifecycle, backend, _ = parts
    create(lifecycle, image="web:1", setup_hooks=("print hi",))
    assert [order["user"] for order in backend.orders("exec")] == [b""]


def test_a_user_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    lifecycle, backend, _ = build(tmp_path, SingleId)
    for made in (create(lifecycle, image="web:1"), create(lifecycle, image="web:1")):
        assert "the image's user 'www'" in " ".join(made.warnings)
        assert made.image_config.user == ""
    assert {order["user"] for order in backend.orders("start")} == {b""}


def test_the_default_image_of_a_type_is_a_setting(tmp_path: Path) -> None:
    lifecycle, _, store = build(tmp_path, images={"shell": "host", "python": "py:9"})
    assert create(lifecycle, sandbox_type="python").image_resolved == IMAGE.digest
    assert create(lifecycle).image_resolved == "host"
    assert store.registry.image("py:9") is not None


def test_an_image_that_never_was_here_and_cannot_be_had_gives_way_to_host(parts: Any) -> None:
    lifecycle, _, store = parts
    store.answer = missing
    sandbox = create(lifecycle, image="web:1", unknown_fields=("colour",))
    assert (sandbox.image, sandbox.image_resolved) == ("web:1", "host")
    assert sandbox.warnings == (
        "unknown field 'colour' was ignored",
        "it runs on 'host', as image 'web:1' cannot be had: manifest unknown",
    )


@pytest.mark.parametrize("why", ["named backend", "strict", "was here once", "other problem"])
def test_else_it_is_a_problem_that_leaves_nothing(why: str, tmp_path: Path) -> None:
    lifecycle, backend, store = build(tmp_path, strict_images=why == "strict")
    fields: dict[str, Any] = {"backend_type": "file"} if why == "named backend" else {}
    if why == "was here once":
        create(lifecycle, image="web:1")
        lifecycle.delete("a")
        store.registry.remove_image("web:1")
    store.answer = missing
    if why == "other problem":

        def corrupt(tell: Callable[[str], None]) -> Image:
            raise Invalid("layer 2 is corrupt", errors={"image": ["layer 2 is corrupt"]})

        store.answer = corrupt

    with pytest.raises(Invalid) as caught:
        create(lifecycle, image="web:1", **fields)
    assert "image" in caught.value.errors
    assert lifecycle.registry.known_ids() == frozenset()
    assert backend.inventory() == frozenset()


def test_an_image_name_that_is_none_is_refused_before_there_is_a_row(parts: Any) -> None:
    lifecycle, _, _ = parts
    with pytest.raises(Invalid, match="no name"):
        create(lifecycle, image="-v")


def test_a_full_disk_while_fetching_is_told(parts: Any) -> None:
    lifecycle, _, store = parts

    def full(tell: Callable[[str], None]) -> Image:
        raise StorageFull("no space for image 'web:1'")

    store.answer = full
    with pytest.raises(StorageFull):
        create(lifecycle, image="web:1")
    assert lifecycle.get("a").status is Status.FAILED


def test_progress_is_seen_and_a_delete_cuts_the_fetch_short(parts: Any) -> None:
    lifecycle, _, store = parts
    seen: list[HeyvmError] = []

    def slow(tell: Callable[[str], None]) -> Image:
        try:
            for number in range(1000):
                tell(f"pulling web:1: {number} of 1000 MiB")
                time.sleep(0.01)
        except HeyvmError as error:
            seen.append(error)
            raise
        return IMAGE

    store.answer = slow
    lifecycle.create(CreateSpec(name="a", image="web:1"), wait=False)
    assert wait_for(lambda: "of 1000 MiB" in (lifecycle.get("a").status_detail or ""))
    assert lifecycle.get("a").image_resolved == ""
    began = time.monotonic()
    lifecycle.delete("a")
    assert time.monotonic() - began < 4
    assert len(seen) == 1
    with pytest.raises(NotFound):
        lifecycle.get("a")


def test_what_nobody_waits_for_stays_and_says_why_and_start_makes_it_good(parts: Any) -> None:
    lifecycle, backend, store = parts
    store.answer = missing
    spec = CreateSpec(name="a", image="web:1", backend_type="file", setup_hooks=("print hi",))
    lifecycle.create(spec, wait=False)
    failed = lifecycle.wait("a", "running", 5)
    assert (failed.status, failed.error_message) == (Status.FAILED, "manifest unknown")
    with pytest.raises(Conflict, match="has no files"), lifecycle.visit("a"):
        pass
    store.answer = lambda tell: IMAGE
    assert lifecycle.start("a").image_resolved == IMAGE.digest
    assert len(backend.orders("exec")) == 1
    lifecycle.restart("a")
    assert len(backend.orders("exec")) == 1


def test_an_image_removed_in_between_is_fetched_again(parts: Any) -> None:
    lifecycle, _, store = parts
    create(lifecycle, image="web:1")
    lifecycle.delete("a")
    admit = lifecycle.registry.add
    removed = threading.Event()

    def add(*args: Any, **options: Any) -> Any:
        if not removed.is_set():
            removed.set()
            store.registry.remove_image("web:1")
        return admit(*args, **options)

    lifecycle.registry.add = add
    sandbox = create(lifecycle, image="web:1")
    assert (sandbox.image_resolved, store.fetched) == (IMAGE.digest, 2)


def test_an_image_in_use_stays(parts: Any) -> None:
    lifecycle, _, store = parts
    create(lifecycle, image="web:1")
    with pytest.raises(Conflict, match="used by 'a'"):
        store.registry.remove_image("web:1")
    store.registry.add_image(replace(IMAGE, names=("other",)))
    assert store.registry.remove_image("web:1") is None
    with pytest.raises(Conflict, match="used by 'a'"):
        store.registry.remove_image(IMAGE.digest)
    assert store.registry.prune_images(nameless=False) == []
    lifecycle.delete("a")
    assert store.registry.remove_image("other") == IMAGE.digest
    with pytest.raises(NotFound):
        store.registry.remove_image("other")


# -- limits ------------------------------------------------------------------------------------

GIB = 1 << 30


@pytest.mark.parametrize(
    "asked, given",
    [
        ({}, Limits(2.0, GIB, 100)),
        ({"size_class": "micro"}, Limits(0.25, GIB // 2, 100)),
        ({"size_class": "micro", "cpus": 1.5}, Limits(1.5, GIB // 2, 100)),
        ({"memory": 12345, "pids": 7}, Limits(2.0, 12345, 7)),
        ({"disk_size_gb": 3}, Limits(2.0, GIB, 100, 3)),
    ],
)
def test_limits_are_asked_for_or_of_a_class_or_the_default(
    asked: dict[str, Any], given: Limits, tmp_path: Path
) -> None:
    settings = Settings(tmp_path, tmp_path, default_limits=Limits(2.0, GIB, 100))
    assert limits_of(CreateSpec(**asked), settings) == given


@pytest.mark.parametrize(
    "asked, field",
    [
        ({"cpus": 3.0}, "cpus"),
        ({"memory": 5 * GIB}, "memory"),
        ({"pids": 1000}, "pids"),
        ({"disk_size_gb": 11}, "disk_size_gb"),
        ({"size_class": "xlarge", "cpus": 1.0}, "size_class"),
    ],
)
def test_more_than_the_server_gives_is_refused_by_name(
    asked: dict[str, Any], field: str, tmp_path: Path
) -> None:
    settings = Settings(tmp_path, tmp_path, max_limits=Limits(2.0, 4 * GIB, 500, 10))
    with pytest.raises(Invalid) as caught:
        limits_of(CreateSpec(**asked), settings)
    assert list(caught.value.errors) == [field]
    # What is not asked for is what may be had at most.
    assert limits_of(CreateSpec(), settings) == Limits(2.0, 4 * GIB, 500)


# -- pause and resume --------------------------------------------------------------------------


def test_a_paused_one_says_so_and_goes_on(parts: Any) -> None:
    lifecycle, backend, _ = parts
    create(lifecycle, ttl_seconds=100)
    assert lifecycle.pause("a").status is Status.PAUSED
    assert lifecycle.pause("a").expires_at is not None
    assert lifecycle.uptime(lifecycle.get("a")) > 0
    assert lifecycle.start("a").status is Status.RUNNING
    assert lifecycle.resume("a").status is Status.RUNNING
    lifecycle.pause("a")
    assert lifecycle.resume("a").status is Status.RUNNING
    assert backend.halted == ["pause running", "resume paused"] * 2


def test_a_paused_one_can_be_stopped_and_deleted_but_not_visited(parts: Any) -> None:
    lifecycle, backend, _ = parts
    create(lifecycle)
    lifecycle.pause("a")
    with pytest.raises(Conflict, match="resume it first"), lifecycle.visit("a"):
        pass
    assert lifecycle.stop("a").status is Status.STOPPED
    assert backend.halted == ["pause running", "resume paused"]
    for act in (lifecycle.pause, lifecycle.resume):
        with pytest.raises(Conflict, match="stopped"):
            act("a")
    lifecycle.start("a")
    lifecycle.pause("a")
    lifecycle.delete("a")
    assert backend.inventory() == frozenset()


def test_a_pause_that_fails_leaves_it_running(parts: Any) -> None:
    lifecycle, backend, _ = parts
    create(lifecycle)
    backend.pause = lambda sandbox: FileBackend.pause(backend, sandbox)
    with pytest.raises(HeyvmError, match="cannot pause"):
        lifecycle.pause("a")
    assert lifecycle.get("a").status is Status.RUNNING


def test_a_paused_one_that_dies_is_noticed_and_one_that_expires_goes(parts: Any) -> None:
    lifecycle, backend, _ = parts
    made = create(lifecycle)
    lifecycle.pause("a")
    backend.kill_from_outside(made.id)
    assert [entry.sandbox.id for entry in lifecycle.registry.running()] == [made.id]
    lifecycle.attend(made.id)
    assert lifecycle.get("a").status is Status.FAILED
    lifecycle.start("a")
    lifecycle.pause("a")
    lifecycle.update("a", {"ttl_seconds": 1})
    assert wait_for(lambda: lifecycle.expire_due() == [made.id])
