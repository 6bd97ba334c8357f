"""A checkpoint survives every kill and a full disk: what loads is, bit for bit, what was saved before or
now."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_cases import make, same, silent
from safetensors.torch import load_file

from truestep.checkpoint.layout import every_row
from truestep.checkpoint.manifest import MANIFEST_LIMIT
from truestep.checkpoint.reader import read_checkpoint
from truestep.checkpoint.store import Checkpoint, OutOfSpace, list_checkpoints, load_latest, save_checkpoint

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: waiting for the disk would only be slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# ------------------------------------------------------------------------------------------------- round trip


def test_what_is_loaded_is_what_was_saved_and_any_safetensors_reader_agrees(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none", warn=silent) is None
    path = save_checkpoint(tmp_path, make(12), keep=2)
    loaded = load_latest(tmp_path, warn=silent)
    assert same(loaded, make(12))
    assert path.name == "step_00000012"
    assert sorted(p.name for p in path.iterdir()) == [
        "buffer.replay.rank00000-of-00001.safetensors", "manifest.json",
        "optimizer.rank00000-of-00001.safetensors", "parameters.rank00000-of-00001.safetensors",
    ]  # fmt: skip
    other = load_file(path / "optimizer.rank00000-of-00001.safetensors")
    assert all(torch.equal(other[name], tensor) for name, tensor in make(12).tensors["optimizer"].items())
    assert (tmp_path / "latest").read_text().strip() == path.name


def test_every_tensor_is_aligned_in_its_file(tmp_path: Path) -> None:
    """Readers that map a file cannot view bytes at an odd place as numbers."""
    path = save_checkpoint(tmp_path, make(1), keep=1)
    for group, tensors in make(1).tensors.items():
        raw = (path / f"{group}.rank00000-of-00001.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        assert length % 8 == 0
        header = json.loads(raw[8 : 8 + length])
        assert header.keys() == tensors.keys()
        assert all(header[name]["data_offsets"][0] % t.element_size() == 0 for name, t in tensors.items())


def test_what_is_loaded_does_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make(1), keep=1)
    loaded = load_latest(tmp_path, warn=silent)
    for file in path.iterdir():
        os.truncate(file, 0)
    assert same(loaded, make(1))


def test_only_the_newest_are_kept_and_strangers_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step_notes").mkdir(parents=True)
    (tmp_path / "mine.tmp-write").mkdir()
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000003", "step_00000010"]
    (tmp_path / "step_00000010" / "stray.safetensors").write_bytes(b"not listed")
    assert same(load_latest(tmp_path, warn=silent), make(10))
    assert {"step_notes", "mine.tmp-write"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("tensors", "state", "expected"),
    [
        ({"../x": {}}, {}, "cannot name"),
        ({"": {}}, {}, "cannot name"),
        ({"a": {"w": torch.zeros(2, dtype=torch.complex64)}}, {}, "cannot be stored"),
        ({"a": {"w": torch.zeros(2, device="meta")}}, {}, "cannot be stored"),
        ({"a": {"w": torch.zeros(2).to_sparse()}}, {}, "cannot be stored"),
        ({}, {"best": float("nan")}, "JSON"),
        ({}, {"big": "x" * (MANIFEST_LIMIT // 4)}, "tensor group"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_the_disk_is_touched(
    tmp_path: Path, tensors, state, expected
) -> None:
    with pytest.raises(ValueError, match=expected):
        save_checkpoint(tmp_path / "new", Checkpoint(step=1, tensors=tensors, state=state), keep=1)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------ kills


class Killed(BaseException):
    """The process dies here."""


class Disk:
    """Counts what is done to the disk, dies at operation ``fatal`` and at every later one, and then, as a
    power loss would, cuts what was written but never synced. A write that dies has written half."""

    NAMES = ("write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open")

    def __init__(
        self, patch: pytest.MonkeyPatch, fatal: int, error: Callable[[], BaseException] = Killed
    ) -> None:
        self.fatal, self.error, self.trace, self.unsynced = fatal, error, [], set()
        self.real = {name: getattr(os, name) for name in self.NAMES}
        for name in self.NAMES:
            patch.setattr(os, name, lambda *a, _name=name, **k: self.act(_name, *a, **k))

    def act(self, name: str, *args, **kwargs):
        changes = name != "open" or args[1] & os.O_CREAT
        if not changes:
            return self.real[name](*args, **kwargs)
        self.trace.append(
            (name, str(args[0]) if name != "fsync" else os.readlink(f"/proc/self/fd/{args[0]}"))
        )
        if len(self.trace) >= self.fatal:
            if name == "write" and len(self.trace) == self.fatal:
                self.real["write"](args[0], args[1][: len(args[1]) // 2])
            raise self.error()
        if name == "write":
            self.unsynced.add(os.fstat(args[0]).st_ino)
        if name == "fsync":
            self.unsynced.discard(os.fstat(args[0]).st_ino)
        return self.real[name](*args, **kwargs)

    def lose_power(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_ino in self.unsynced:
                os.truncate(path, path.stat().st_size // 2)


def _first(folder: Path) -> tuple[Checkpoint | None, Checkpoint]:
    return None, make(1)


def _deleting(folder: Path) -> tuple[Checkpoint | None, Checkpoint]:
    save_checkpoint(folder, make(1), keep=2)
    save_checkpoint(folder, make(2), keep=2)
    return make(2), make(3)


def _overwriting(folder: Path) -> tuple[Checkpoint | None, Checkpoint]:
    save_checkpoint(folder, make(2), keep=2)
    other = make(7)
    return make(2), Checkpoint(step=2, tensors=other.tensors, state=other.state)


def _after_a_kill(folder: Path) -> tuple[Checkpoint | None, Checkpoint]:
    """Leftovers of all kinds are there to be removed."""
    save_checkpoint(folder, make(2), keep=1)
    shutil.copytree(folder / "step_00000002", folder / "step_00000003.tmp-write")
    shutil.copytree(folder / "step_00000002", folder / "step_00000001.tmp-discard")
    shutil.copytree(folder / "step_00000002", folder / "step_00000002.aside")
    (folder / ".latest.abc").write_text("")
    return make(2), make(3)


SCENES = {"first": _first, "deleting": _deleting, "overwriting": _overwriting, "after a kill": _after_a_kill}


@pytest.mark.parametrize("scene", SCENES)
def test_a_kill_at_any_operation_leaves_the_old_checkpoint_or_the_new(tmp_path: Path, scene: str) -> None:
    for fatal in range(1, 200):
        folder = tmp_path / str(fatal)
        folder.mkdir()
        before, after = SCENES[scene](folder)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, fatal)
            try:
                save_checkpoint(folder, after, keep=1)
                finished = True
            except Killed:
                finished = False
        disk.lose_power(folder)
        loaded = load_latest(folder, warn=silent)
        assert same(loaded, after) or (not finished and same(loaded, before)), (
            f"{scene}: killed at {disk.trace[-1]}"
        )
        for path in list_checkpoints(folder):
            read_checkpoint(path, every_row)  # none stands there half deleted
        again = after if fatal % 2 else make(after.step + 1)
        save_checkpoint(folder, again, keep=1)
        assert same(load_latest(folder, warn=silent), again)
        assert sorted(p.name for p in folder.iterdir()) == ["latest", f"step_{again.step:08d}"], (
            "something was left over"
        )
        if finished:
            break
    assert finished
    assert fatal > 20, "too few operations were seen: the hooks miss what the store does"


def test_nothing_is_deleted_before_the_new_checkpoint_is_durable(tmp_path: Path) -> None:
    after = _deleting(tmp_path)[1]
    with pytest.MonkeyPatch.context() as patch:
        trace = Disk(patch, 10**9).trace
        save_checkpoint(tmp_path, after, keep=1)
    commit = trace.index(("rename", str(tmp_path / "step_00000003.tmp-write")))
    assert trace[commit + 1] == ("fsync", str(tmp_path))
    deleted = min(
        i for i, (_, path) in enumerate(trace) if "step_00000002" in path or "step_00000001" in path
    )
    assert commit + 1 < deleted
    written = {path for name, path in trace[:commit] if name == "open"}
    synced = {path for name, path in trace[:commit] if name == "fsync"}
    assert written <= synced
    assert str(tmp_path / "step_00000003.tmp-write") in synced


def _save_for_ever(folder: str, done) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # a kill loses nothing that the kernel has
    for step in range(done.value + 1, 10**6):
        save_checkpoint(Path(folder), make(step), keep=1)
        done.value = step


@pytest.fixture(scope="module")
def spawn():
    """Processes that fork from a server which has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["truestep.checkpoint.store", "safetensors.torch"])
    return context


def test_a_writer_that_is_really_killed_at_random_moments(tmp_path: Path, spawn) -> None:
    # No lock: a writer that is killed while it holds one would never give it back.
    moments, done = random.Random(5), spawn.Value("q", 0, lock=False)
    for _ in range(10):
        start = done.value
        writer = spawn.Process(target=_save_for_ever, args=(str(tmp_path), done))
        writer.start()
        deadline = time.monotonic() + 60
        while done.value == start and writer.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        writer.kill()
        writer.join()
        assert writer.exitcode == -9, "the writer ended by itself"
        loaded = load_latest(tmp_path, warn=silent)
        assert loaded is not None
        assert loaded.step >= done.value > start
        assert same(loaded, make(loaded.step))
        done.value = loaded.step
        assert not [p for p in tmp_path.iterdir() if ".tmp-" in p.name]


# -------------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_at_any_write_keeps_the_previous_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1), keep=1)
    for fatal in range(1, 200):
        with pytest.MonkeyPatch.context() as patch:
            real, count = os.write, iter(range(1, 10**6))

            def write(descriptor: int, data, real=real, count=count, fatal=fatal) -> int:
                if next(count) < fatal:
                    return real(descriptor, data[: max(1, len(data) // 2)])  # short writes are legal
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, "write", write)
            try:
                save_checkpoint(tmp_path, make(2), keep=1)
                break
            except OutOfSpace as error:
                message = str(error)
        assert "\n" not in message
        assert str(tmp_path) in message
        assert same(load_latest(tmp_path, warn=silent), make(1))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"], (
            "space was not given back"
        )
    assert fatal > 20
    assert same(load_latest(tmp_path, warn=silent), make(2))


def _save_limited(folder: str, limit: int, answer) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_checkpoint(Path(folder), make(2), keep=1)
    except OutOfSpace:
        answer.value = 1


@pytest.mark.parametrize("limit", [0, 8, 400, 700])
def test_a_limit_of_the_operating_system_is_reported_as_no_space(tmp_path: Path, spawn, limit: int) -> None:
    save_checkpoint(tmp_path, make(1), keep=1)
    answer = spawn.Value("i", 0)
    process = spawn.Process(target=_save_limited, args=(str(tmp_path), limit, answer))
    process.start()
    process.join(60)
    assert (process.exitcode, answer.value) == (0, 1)
    assert same(load_latest(tmp_path, warn=silent), make(1))


def test_too_little_space_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, make(1), keep=1)
    size = sum(t.nbytes for group in make(2).tensors.values() for t in group.values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size - 1))
    with pytest.raises(OutOfSpace, match="GiB are free"):
        save_checkpoint(tmp_path, make(2), keep=1)
    assert same(load_latest(tmp_path, warn=silent), make(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size))
    save_checkpoint(tmp_path, make(2), keep=1)
