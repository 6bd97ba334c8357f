"""Past runs whose files are broken, huge or hostile: an answer with a reason, never a traceback."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from past_folders import STATE, deepspeed, look_back, offload, write

from truestep.audit.postmortem.measured import MEASURED
from truestep.errors import UserError


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("ds.json", '{"zero_optimization": {"stage": 2,', "ds.json: not valid JSON"),
        ("ds.json", '{"deepspeed": ' + "[" * 100_000, "ds.json: not read: nested too deeply"),
        ("ds.json", '{"zero_optimization": {"stage": 2}}' + " " * (2 << 20), "ds.json: larger than 1024 KiB"),
        ("acc.yaml", "distributed_type: DEEPSPEED\n\t- [broken", "acc.yaml: not valid YAML"),
        ("acc.yaml", "distributed_type: " + "[" * 20_000, "acc.yaml: not valid YAML"),
        ("acc.yaml", "distributed_type: 2024-99-99", "acc.yaml: not valid YAML"),
        (
            "acc.yaml",
            "deepspeed: !!python/object/apply:os.system ['touch owned']",
            "acc.yaml: not valid YAML",
        ),
        ("uv.lock", "[[package]\nname=", "uv.lock: not valid TOML"),
        ("poetry.lock", "x = " + "[" * 100_000, "poetry.lock: not valid TOML"),
        ("trainer_state.json", "\x00\x01", "trainer_state.json: not a trainer state"),
    ],
)
def test_what_cannot_be_read_is_unknown_and_named(tmp_path: Path, name: str, text: str, reason: str) -> None:
    if name.endswith("yaml"):
        pytest.importorskip("yaml", reason="YAML needs pyyaml")
    (tmp_path / name).write_text(text)
    found = offload(write(tmp_path, freeze__txt="deepspeed==0.18.9\n"))
    assert found.answer == "unknown"
    assert any(r.startswith(reason) for r in found.reasons), found.reasons
    assert not (tmp_path / "owned").exists()


def test_yaml_that_nobody_can_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    found = offload(
        write(tmp_path, acc__yaml="distributed_type: DEEPSPEED\n", freeze__txt="deepspeed==0.18.9\n")
    )
    assert "acc.yaml: not read: YAML needs the pyyaml package" in " ".join(found.reasons)


ODD: list[Any] = [None, [], {}, [[]], "x", "", -1, 1e300, float("nan"), 10**400, True, {"a": [1]}, "9" * 400]


@pytest.mark.parametrize("odd", ODD)
def test_odd_values_anywhere_end_in_an_answer(tmp_path: Path, odd: Any) -> None:
    write(
        tmp_path,
        ds__json={"zero_optimization": odd, "gradient_accumulation_steps": odd, "train_batch_size": odd},
        ds2__json={"zero_optimization": {"stage": odd, "offload_optimizer": odd}},
        ds3__json={"zero_optimization": {"stage": 2, "offload_optimizer": {"device": odd}}},
        args__json={
            "deepspeed": odd,
            "per_device_train_batch_size": odd,
            "average_tokens_across_devices": odd,
        },
        acc__json={"distributed_type": odd, "num_processes": odd, "deepspeed_config": odd},
        acc2__json={
            "distributed_type": "DEEPSPEED",
            "num_processes": 1,
            "deepspeed_config": {
                "zero_stage": odd,
                "offload_optimizer_device": odd,
                "deepspeed_config_file": odd,
            },
        },
        list__json=[{"deepspeed": odd}],
        trainer_state__json=STATE,
        config__json={"architectures": odd, "transformers_version": odd},
    )
    (tmp_path / "uv.lock").write_text("package = [1]\npackages = 3\n")
    assert len(look_back(tmp_path)) == len(MEASURED)


def test_large_files_that_are_no_configuration_are_passed_over(tmp_path: Path) -> None:
    write(
        tmp_path,
        **deepspeed(),
        tokenizer__json='{"vocab": "' + "x" * (3 << 20) + '"}',
        log__txt="y" * (3 << 20),
    )
    assert offload(tmp_path).answer == "affected"
    unknown = offload(write(tmp_path, freeze__txt="deepspeed==0.14.0\n"))
    assert unknown.answer == "unknown"
    assert "tokenizer" not in " ".join(unknown.reasons)


def test_links_pipes_and_pickles_are_left_alone(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", **deepspeed())
    run = write(tmp_path / "run", keep__txt="nothing")
    (run / "ds.json").symlink_to(outside / "ds.json")
    (run / "link").symlink_to(outside)
    os.mkfifo(run / "freeze.txt")
    (run / "training_args.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    found = offload(run)
    assert found.answer == "unknown"
    assert not any("0.18.9" in r for r in found.reasons)


def test_hostile_names_show_as_text(tmp_path: Path) -> None:
    version = "0.18.9\u001b[31m<script>\u202e"
    (tmp_path / "a\x1b[2J\udcff.json").write_text('{"zero_optimization": ')
    write(tmp_path, uv__lock=f'[[package]]\nname = "deepspeed"\nversion = {json.dumps(version)}\n')
    told = " ".join(offload(tmp_path).reasons)
    assert not set("\x1b\u202e\udcff") & set(told)
    assert "⟨U+001B⟩" in told
    told.encode()


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        look_back(tmp_path / "gone")


def test_an_empty_folder_is_unknown(tmp_path: Path) -> None:
    assert {a.answer for a in look_back(tmp_path)} == {"unknown"}


def test_looking_back_imports_nothing_that_runs_a_framework(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from truestep.audit.postmortem.answers import look_back;"
        "look_back(Path(sys.argv[1]));"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'pickle5', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
