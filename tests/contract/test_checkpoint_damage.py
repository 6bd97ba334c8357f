"""Damaged, forged and foreign checkpoints are named and passed over; several ranks save as one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import make, on_ranks, rows_of, same, silent, split

from truestep.checkpoint import store
from truestep.checkpoint.layout import Share
from truestep.checkpoint.store import Checkpoint, OutOfSpace, list_checkpoints, load_latest, save_checkpoint
from truestep.errors import UserError

torch.set_num_threads(1)
NUM_FLIPS = 150


@pytest.fixture(autouse=True)
def _no_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: waiting for the disk would only be slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good checkpoints, of step 1 and step 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, make(step), keep=2)
    return tmp_path


def newest(folder: Path) -> Path:
    return list_checkpoints(folder)[-1]


def assert_passed_over(folder: Path, says: str = "") -> None:
    """The newest is reported and the one before it is loaded."""
    said: list[str] = []
    loaded = load_latest(folder, warn=said.append)
    assert same(loaded, make(1))
    assert len(said) == 1
    assert str(newest(folder)) in said[0]
    assert says in said[0]
    assert "\n" not in said[0]


FILES = (
    "manifest.json",
    *(f"{g}.rank00000-of-00001.safetensors" for g in ("parameters", "optimizer", "buffer.replay")),
)


@pytest.mark.parametrize("name", FILES)
def test_no_cut_or_missing_or_swapped_file_is_loaded(folder: Path, name: str) -> None:
    file = newest(folder) / name
    good = file.read_bytes()
    for size in (0, 1, 7, 8, 9, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:size])
        assert_passed_over(folder, name)
    file.write_bytes(good + b"\0")
    assert_passed_over(folder, name)
    file.unlink()
    assert_passed_over(folder, name)
    other = folder / "step_00000001" / name
    if other.read_bytes() != good:  # the empty group is the same in both
        shutil.copy(other, file)
        assert_passed_over(folder, name)
    file.write_bytes(good)
    assert same(load_latest(folder, warn=silent), make(2))


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_is_loaded(folder: Path, name: str) -> None:
    file = newest(folder) / name
    good = file.read_bytes()
    draw = random.Random(name)
    harmless = 0
    for _ in range(NUM_FLIPS):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        said: list[str] = []
        loaded = load_latest(folder, warn=said.append)
        if said:
            assert same(loaded, make(1))
        else:  # only white space of the manifest may change without a meaning changing
            harmless += 1
            assert name == "manifest.json"
            assert json.loads(bad) == json.loads(good)
            assert same(loaded, make(2))
    assert harmless < NUM_FLIPS / 2


def test_a_wrong_pointer_to_the_latest_misleads_nobody(folder: Path) -> None:
    for text in ("step_00000001\n", "../../etc/passwd", ""):
        (folder / "latest").write_text(text)
        assert same(load_latest(folder, warn=silent), make(2))
    (folder / "latest").unlink()
    assert same(load_latest(folder, warn=silent), make(2))


def test_a_renamed_checkpoint_is_not_taken_for_another_step(folder: Path) -> None:
    os.rename(newest(folder), folder / "step_00000009")
    assert_passed_over(folder, "that of step 2")


def test_when_none_is_intact_it_says_so_and_never_begins_again_silently(folder: Path) -> None:
    for path in list_checkpoints(folder):
        (path / "manifest.json").unlink()
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"none of its 2 checkpoints is intact; .*delete the folder"
    ) as caught:
        load_latest(folder, warn=said.append)
    assert "\n" not in str(caught.value)
    assert len(said) == 2


def test_training_goes_on_past_a_damaged_one_and_replaces_it(folder: Path) -> None:
    (newest(folder) / "manifest.json").write_bytes(b"{}")
    assert_passed_over(folder)
    save_checkpoint(folder, make(2), keep=2)
    assert same(load_latest(folder, warn=silent), make(2))
    assert len(list_checkpoints(folder)) == 2


# ----------------------------------------------------------------------------------------------------- forged


def forge(path: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest and sign it anew, as somebody would who knows the format."""
    body = json.loads((path / "manifest.json").read_bytes())
    del body["sha256"]
    change(body)
    (path / "manifest.json").write_text(json.dumps({"sha256": store._digest(body), **body}))


def forge_file(path: Path, data: bytes) -> None:
    name = FILES[1]
    (path / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    declared = {"a": {"dtype": "F32", "shape": [2], "starts": []}}

    def change(body: dict) -> None:
        body["files"][name] = entry
        body["tensors"]["parameters"] = declared

    forge(path, change)


def shard(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str = "F32", shape: tuple = (2,), offsets: tuple = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = {
    "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "header of 8 exabytes": struct.pack("<Q", 2**63 - 1) + b"{}",
    "header length of all ones": b"\xff" * 64,
    "no JSON": shard(b"hello"),
    "nested without end": shard(b"[" * 100_000),
    "data past the end": shard({"a": tensor(shape=(2**40,), offsets=(0, 2**42))}),
    "shape that overflows": shard({"a": tensor(shape=(2**33, 2**33))}),
    "negative shape": shard({"a": tensor(shape=(-2,))}),
    "shape that is not the data": shard({"a": tensor(shape=(3,))}),
    "overlap": shard({"a": tensor(), "b": tensor()}),
    "hole": shard({"a": tensor("F32", (1,), (4, 8))}),
    "offsets turned round": shard({"a": tensor(offsets=(8, 0))}),
    "unknown dtype": shard({"a": tensor("F99")}),
    "dtype without a torch": shard({"a": tensor("F6_E2M3", (4,), (0, 3))}, bytes(3)),
    "pickle": b"\x80\x04cposix\nsystem\n(S'touch /tmp/owned'\ntR.",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_reported_even_if_its_hash_is_right(folder: Path, lie: str) -> None:
    forge_file(newest(folder), LIES[lie])
    assert_passed_over(folder, "not a valid safetensors file")


def test_the_forger_of_the_tests_can_also_tell_the_truth(folder: Path) -> None:
    forge_file(newest(folder), shard({"a": tensor()}))
    loaded = load_latest(folder, warn=silent)
    assert loaded is not None
    assert loaded.tensors["parameters"]["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "name",
    ["../step_00000001/" + FILES[1], "/etc/passwd", "..", "", "manifest.json", "a/../" + FILES[1], FILES[1] + "\n",
     "x.pt", "parameters.rank00001-of-00002.safetensors", "parameters.rank00001-of-00001.safetensors"],
)  # fmt: skip
def test_no_manifest_leads_out_of_its_folder(folder: Path, name: str) -> None:
    def change(body: dict) -> None:
        body["files"][name] = body["files"].pop(FILES[1])

    path = newest(folder)
    if "/" not in name and name not in ("", "..", "manifest.json"):
        shutil.copy(path / FILES[1], path / name)
    forge(path, change)
    assert_passed_over(folder)


def head_of(body: dict) -> dict:
    return body["tensors"]["parameters"]["head"]


@pytest.mark.parametrize("change", [
    lambda body: body.update(files=[]),
    lambda body: body.update(step="2"),
    lambda body: body.update(world_size=0),
    lambda body: body.update(world_size=2**70),
    lambda body: body.update(extra=1),
    lambda body: body.pop("state"),
    lambda body: body["files"][FILES[1]].update(bytes=-1),
    lambda body: body["files"][FILES[1]].update(bytes=2**62),
    lambda body: body["files"][FILES[1]].update(sha256="0"),
    lambda body: body.pop("tensors"),
    lambda body: body.update(tensors={"../x": {}}),
    lambda body: body["tensors"].update(more={}),
    lambda body: body["tensors"]["parameters"].pop("head") and body["tensors"]["parameters"].update(hat={}),
    lambda body: head_of(body).update(shape=[6]),
    lambda body: head_of(body).update(shape=[2**40, 5]),
    lambda body: head_of(body).update(shape=[-6, 5]),
    lambda body: head_of(body).update(dtype="F64"),
    lambda body: head_of(body).update(starts=[1]),
    lambda body: head_of(body).update(starts=[0, 3]),
    lambda body: head_of(body).update(shape=[], starts=[0]),
    lambda body: body["tensors"]["parameters"]["nothing"].update(dtype="F99"),
])  # fmt: skip
def test_a_manifest_of_another_shape_is_reported(folder: Path, change: Callable[[dict], None]) -> None:
    forge(newest(folder), change)
    assert_passed_over(folder)


@pytest.mark.parametrize(
    "raw", [b"[" * 10**6, b"null", b"[]", b"\xff\xfe", b'{"sha256": 1}', b'{"step": NaN}', b"1" * 5000]
)
def test_a_manifest_that_is_none_is_reported(folder: Path, raw: bytes) -> None:
    (newest(folder) / "manifest.json").write_bytes(raw)
    assert_passed_over(folder, "manifest.json")


def test_an_endless_manifest_is_not_read(folder: Path) -> None:
    os.truncate(newest(folder) / "manifest.json", 2**40)  # sparse
    assert_passed_over(folder, "manifest.json")


def test_links_and_pipes_are_not_followed(folder: Path) -> None:
    for name in (FILES[0], FILES[1]):
        file = newest(folder) / name
        os.rename(file, folder / "elsewhere")
        file.symlink_to(folder / "elsewhere")
        assert_passed_over(folder, name)
        file.unlink()
        os.mkfifo(file)
        assert_passed_over(folder, name)
        file.unlink()
        file.mkdir()
        assert_passed_over(folder, name)
        file.rmdir()
        os.rename(folder / "elsewhere", file)
    assert same(load_latest(folder, warn=silent), make(2))
    (folder / "step_00000003").symlink_to(newest(folder))
    assert same(load_latest(folder, warn=silent), make(2))


def test_another_format_is_named_and_not_called_damaged(folder: Path) -> None:
    forge(newest(folder), lambda body: body.update(format=3))
    with pytest.raises(UserError, match="a different version of truestep"):
        load_latest(folder, warn=silent)


# ------------------------------------------------------------------------------------------------------ ranks


def save_by_ranks(folder: Path, step: int, world_size: int) -> list[Any]:
    """Save with a thread for each rank; what each of them raised, or the path."""

    def one(rank: int, gather) -> Path:
        part = split(make(step), rank, world_size, saves=True)
        place = {"rank": rank, "world_size": world_size}
        return save_checkpoint(folder, part, keep=2, **place, gather=gather)

    return on_ranks(world_size, one)


def load_by_ranks(folder: Path, world_size: int, said: list[str]) -> list[Any]:
    def one(rank: int, gather) -> Checkpoint | None:
        rows = rows_of(rank, world_size)
        return load_latest(folder, rank=rank, gather=gather, rows_of=rows, warn=said.append)

    return on_ranks(world_size, one)


@pytest.mark.parametrize("saved", [1, 2, 3, 7])
def test_any_number_of_ranks_gets_its_rows_back(tmp_path: Path, saved: int) -> None:
    """6, 5 and 4 rows on up to 7 ranks: parts of different sizes, and parts without rows."""
    for step in (1, 2, 3):
        assert save_by_ranks(tmp_path, step, saved) == [tmp_path / f"step_{step:08d}"] * saved
    assert len(list_checkpoints(tmp_path)) == 2
    assert same(load_latest(tmp_path, warn=silent), make(3))
    for world_size in (2, 3, 4, 7):
        said: list[str] = []
        for rank, found in enumerate(load_by_ranks(tmp_path, world_size, said)):
            assert same(found, split(make(3), rank, world_size))
        assert said == []


def test_what_all_ranks_have_is_saved_once(tmp_path: Path) -> None:
    (path, *_) = save_by_ranks(tmp_path, 1, 3)
    names = {p.name for p in path.glob("*.safetensors")}
    parts = {f"parameters.rank{rank:05d}-of-00003.safetensors" for rank in range(3)}
    assert names == parts | {f"{g}.rank00000-of-00003.safetensors" for g in ("optimizer", "buffer.replay")}


@pytest.mark.parametrize("shift", [-1, 1])
def test_parts_that_overlap_or_leave_a_row_out_are_not_saved(tmp_path: Path, shift: int) -> None:
    def one(rank: int, gather) -> Path:
        part = split(make(1), rank, 2, saves=True)
        share = part.shares["parameters"]["head"]
        part.shares["parameters"]["head"] = Share(shape=share.shape, start=share.start + rank * shift)
        return save_checkpoint(tmp_path, part, keep=1, rank=rank, world_size=2, gather=gather)

    raised = on_ranks(2, one)
    assert "'head' are not its 6 rows" in str(raised[0])
    assert "rank 0 failed" in str(raised[1])
    assert list_checkpoints(tmp_path) == []


def test_a_rank_reads_only_the_files_with_its_rows(tmp_path: Path) -> None:
    save_by_ranks(tmp_path, 1, 2)
    (newest(tmp_path) / "parameters.rank00001-of-00002.safetensors").unlink()
    found = load_latest(tmp_path, rows_of=rows_of(0, 2), warn=silent)
    assert same(found, split(make(1), 0, 2))
    with pytest.raises(UserError, match="none of its 1 checkpoints is intact"):
        load_latest(tmp_path, rows_of=rows_of(1, 2), warn=lambda text: None)


def test_damage_to_one_rank_moves_all_ranks_to_the_same_older_step(tmp_path: Path) -> None:
    for step in (1, 2):
        save_by_ranks(tmp_path, step, 2)
    os.truncate(newest(tmp_path) / "parameters.rank00001-of-00002.safetensors", 9)
    said: list[str] = []
    for rank, found in enumerate(load_by_ranks(tmp_path, 2, said)):
        assert same(found, split(make(1), rank, 2))
    assert len(said) == 2
    assert all("rank00001-of-00002.safetensors has 9 bytes" in text for text in said)


@pytest.mark.parametrize("failing", [0, 1])
def test_one_ranks_full_disk_stops_all_ranks_and_hangs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    first = tmp_path / "step_00000001"
    assert save_by_ranks(tmp_path, 1, 2) == [first, first]
    real = os.write

    def write(descriptor: int, data) -> int:
        if threading.current_thread().name == str(failing):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    raised = save_by_ranks(tmp_path, 1, 2)  # the same step: the older one is there and is another
    assert isinstance(raised[failing], OutOfSpace)
    assert isinstance(raised[1 - failing], RuntimeError)
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
    assert same(load_latest(tmp_path, warn=silent), make(1))
    monkeypatch.undo()
    assert save_by_ranks(tmp_path, 2, 2) == [tmp_path / "step_00000002"] * 2
    assert same(load_latest(tmp_path, warn=silent), make(2))


def test_a_rank_that_writes_nothing_sees_that_the_others_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas: only rank 0 writes."""

    def one(rank: int, gather) -> Path:
        return save_checkpoint(tmp_path, make(1), keep=1, rank=rank, world_size=2, gather=gather)

    assert on_ranks(2, one) == [tmp_path / "step_00000001"] * 2
    monkeypatch.setattr(store, "write_atomic", full)
    raised = on_ranks(2, one)
    assert [type(error) for error in raised] == [OutOfSpace, RuntimeError]


def full(*given: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ----------------------------------------------------------------------------------------- the format before


def as_before(path: Path) -> None:
    """What version 1 of the format wrote: the same files, and a manifest without shapes."""

    def change(body: dict) -> None:
        del body["tensors"]
        body["format"] = 1

    forge(path, change)


def test_what_one_process_saved_in_the_format_before_any_ranks_continue(folder: Path) -> None:
    as_before(newest(folder))
    assert same(load_latest(folder, warn=silent), make(2))
    said: list[str] = []
    for rank, found in enumerate(load_by_ranks(folder, 3, said)):
        assert same(found, split(make(2), rank, 3))
    assert said == []
    for name in FILES[1:]:
        os.truncate(newest(folder) / name, 9)
        assert_passed_over(folder, name)
        shutil.copy(folder / "step_00000001" / name, newest(folder) / name)
        if name != FILES[3]:  # the empty group is the same in both
            assert_passed_over(folder, name)
        shutil.rmtree(newest(folder))
        save_checkpoint(folder, make(2), keep=2)
        as_before(newest(folder))


def test_what_several_processes_saved_in_the_format_before_is_refused_with_a_remedy(tmp_path: Path) -> None:
    save_by_ranks(tmp_path, 1, 2)
    as_before(newest(tmp_path))
    for world_size in (1, 2):
        for refused in load_by_ranks(tmp_path, world_size, []):
            assert isinstance(refused, UserError)
            assert "saved by 2 processes of an older version" in str(refused)
            assert "finish the stage with that version and 2 processes" in str(refused)


def test_a_second_writer_is_refused_and_a_reader_leaves_a_living_writers_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PATIENCE", 0.1)
    writing = folder / "step_00000003.tmp-write"
    writing.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert same(load_latest(folder, warn=silent), make(2))
    with pytest.raises(UserError, match="another process is saving"):
        save_checkpoint(folder, make(3), keep=1)
    assert writing.exists()
    os.close(descriptor)
    load_latest(folder, warn=silent)
    assert not writing.exists()


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    empty = Checkpoint(step=0, tensors={}, state={})
    for options in ({"keep": 0}, {"keep": 1, "rank": 2, "world_size": 2}, {"keep": 1, "rank": -1}):
        with pytest.raises(ValueError, match="out of range"):
            save_checkpoint(tmp_path, empty, **options)
    save_checkpoint(tmp_path, empty, keep=1)
    assert same(load_latest(tmp_path, warn=silent), empty)
