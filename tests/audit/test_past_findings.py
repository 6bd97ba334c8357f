"""Every measured fault is found by a lock file and a configuration inside of it, and by none outside."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from past_folders import freeze, look_back

from truestep.audit.postmortem.measured import CLASSES, KEYS, MEASURED, TRAINERS, Measured, load, numbers
from truestep.audit.postmortem.run_files import MARKS, TRAINER

PARAMETERS = pytest.mark.parametrize(
    "place", range(len(MEASURED)), ids=[f"{m.package}-{'+'.join(m.kinds)}" for m in MEASURED]
)


def shown_as(key: str, value: Any) -> dict[str, dict[str, Any]]:
    """The file and the entries of it that show a configuration's key."""
    many = 4 if value == 2 else value
    stage = {"zero_optimization": {"stage": value}}
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu" if value is True else "none"}}}
    arch = {"architectures": [next((c for c, name in CLASSES.items() if name == value), "")]}
    return {
        "stage": {"ds.json": stage},
        "zero_stage": {"ds.json": stage},
        "offload": {"ds.json": offload},
        "processes": {
            "acc.json": {"distributed_type": "MULTI_GPU", "num_processes": many, "compute_environment": "x"}
        },
        "arch": {"out/config.json": arch},
    }.get(key) or ({"args.json": {KEYS[key].argument: value}} if KEYS[key].argument else {})


def write_run(folder: Path, measured: Measured, *, differing: str = "", to: Any = None) -> None:
    """Write files that meet every condition that files can show, with at most one key of a different value."""
    files: dict[str, dict[str, Any]] = {}

    def add(name: str, entries: dict[str, Any]) -> None:
        for key, value in entries.items():
            old = files.setdefault(name, {}).get(key)
            files[name][key] = {**old, **value} if isinstance(old, dict) else value

    for need in measured.needs:
        value = to if need.key == differing else next(iter(need.faulty))
        for name, entries in shown_as(need.key, value).items():
            add(name, entries)
    trainer = TRAINERS[measured.subject]
    for mark in (mark for mark, name in MARKS.items() if name == trainer):
        add("args.json", {mark: "x"})
    if trainer.startswith("verl"):
        (folder / "run.sh").write_text(f"python3 -m verl.trainer.{trainer.split()[1]} data.x=1\n")
    if trainer == TRAINER:
        add("out/trainer_state.json", {"global_step": 1})
    steps = 1 if differing == "accumulation" else 4
    add("ds.json" if "ds.json" in files else "args.json", {"gradient_accumulation_steps": steps})
    if trainer.startswith("OpenRLHF"):
        (folder / "run.sh").write_text(f"python -m openrlhf.cli.train_{trainer.split()[1]} --max_len 1\n")
    for name, entries in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(entries))


def pin(folder: Path, package: str, version: str) -> None:
    (folder / "uv.lock").write_text(f'[[package]]\nname = "{package}"\nversion = "{version}"\n')


def hidden(measured: Measured) -> bool:
    return bool(measured.hidden) or any(not KEYS[need.key].setting for need in measured.needs)


@PARAMETERS
def test_a_run_inside_is_affected_and_one_outside_is_not(tmp_path: Path, place: int) -> None:
    measured = MEASURED[place]
    write_run(tmp_path, measured)
    for version in measured.faulty:
        pin(tmp_path, measured.package, version)
        found = look_back(tmp_path)[place]
        assert found.answer == ("affected if" if hidden(measured) else "affected"), found.reasons
    for version in measured.right:
        pin(tmp_path, measured.package, version)
        assert look_back(tmp_path)[place].answer == "not affected"
    (tmp_path / "uv.lock").unlink()
    (tmp_path / "freeze.txt").write_text(freeze())
    assert look_back(tmp_path)[place].answer == "not affected"


@PARAMETERS
def test_a_lock_file_inside_is_affected_under_conditions_and_one_outside_is_not(
    tmp_path: Path, place: int
) -> None:
    measured = MEASURED[place]
    for version in measured.faulty:
        pin(tmp_path, measured.package, version)
        found = look_back(tmp_path / "uv.lock")[place]
        assert found.answer == "affected if"
        assert any(reason.startswith("if ") for reason in found.reasons)
    for version in measured.right:
        pin(tmp_path, measured.package, version)
        assert look_back(tmp_path / "uv.lock")[place].answer == "not affected"


@PARAMETERS
def test_between_two_releases_that_agree_the_answer_is_theirs(tmp_path: Path, place: int) -> None:
    measured = MEASURED[place]
    write_run(tmp_path, measured)
    every = sorted([*measured.faulty, *measured.right], key=numbers)
    for low, high in pairwise(every):
        pin(tmp_path, measured.package, f"{low}.1")  # such as 0.19.0.1
        answer = look_back(tmp_path)[place].answer
        if (low in measured.faulty) != (high in measured.faulty):
            assert answer == "unknown"
        else:
            assert (answer == "not affected") == (low in measured.right)
    pin(tmp_path, measured.package, "0.0.1")
    assert look_back(tmp_path)[place].answer == "unknown"
    pin(tmp_path, measured.package, "999.0")
    assert look_back(tmp_path)[place].answer == "unknown"


@PARAMETERS
def test_each_condition_alone_decides(tmp_path: Path, place: int) -> None:
    measured = MEASURED[place]
    differing = [
        (need.key, value) for need in measured.needs for value in need.right if KEYS[need.key].setting
    ]
    if measured.least > 1 and not measured.single.get(2):
        differing.append(("accumulation", 1))
    for key, value in differing:
        folder = tmp_path / f"{key}-{value}"
        folder.mkdir()
        pin(folder, measured.package, measured.faulty[0])
        write_run(folder, measured, differing=key, to=value)
        found = look_back(folder)[place]
        assert found.answer == "not affected", (key, value, found.reasons)


def test_every_faulty_measurement_is_in_a_fault_or_hidden_by_its_optimizer() -> None:
    held = {id(m) for fault in MEASURED for m in (*fault.shown, *fault.bisected, *fault.through)}
    every = [m for fault in MEASURED for m in (*fault.shown, *fault.bisected, *fault.through)]
    assert len(held) >= len(MEASURED)
    for m in load():
        if m.kinds and "optimizer" not in m.configuration:
            assert any(
                (m.file, m.version, m.configuration) == (o.file, o.version, o.configuration) for o in every
            ), m


def test_the_faults_have_different_names_and_no_release_is_both() -> None:
    keys = [(m.package, m.subject, m.kinds, m.needs) for m in MEASURED]
    assert len({str(key) for key in keys}) == len(keys)
    for measured in MEASURED:
        assert not set(measured.faulty) & set(measured.right)
        assert measured.faulty
