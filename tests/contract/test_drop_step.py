"""A step that is interrupted after its first optimizer update is dropped: the state before it is put back and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import differing, fingerprint, go, interrupted_at, prepared, write_recipe

from truestep import rundir
from truestep.checkpoint.store import list_checkpoints
from truestep.signals import Interrupted
from truestep.train import undo

torch.set_num_threads(1)
# The separate optimizer of its buffer has its first update in the middle of the run.
RELIFT = ("stages.rl.method=relift", "stages.rl.method_options={ buffer_size = 3, buffer_lr = 1e-3 }")


@pytest.mark.parametrize(("dtype", "method"), [("float32", RELIFT), ("bfloat16", ())])
def test_dropped_anywhere_and_resumed_is_never_stopped(
    dtype: str, method: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(undo, "WORTH_SECONDS", 0.0)
    # No step but the last is saved, so each dropped step must be put back from memory.
    more = ["stages.rl.save_every=100", "stages.sft.steps=6", "evaluate.data=[]", f"compute.dtype={dtype}"]
    made = prepared(write_recipe(tmp_path), *more, *method)
    with monkeypatch.context() as patch:
        alarm = interrupted_at(patch, 10**9)
        go(made, tmp_path / "whole")
    looks = [number for number, place in enumerate(alarm.looks) if place == "micro-batch"]
    undone = 0
    for look in looks[-7:-1:2]:
        folder, put_back = tmp_path / f"stopped at {look}", []
        with monkeypatch.context() as patch:
            patch.setattr(undo.Undo, "put_back", counted(undo.Undo.put_back, put_back))
            interrupted_at(patch, look)
            with pytest.raises(Interrupted):
                go(made, folder)
        (newest,) = list_checkpoints(folder / "stages/02-rl/checkpoints")[-1:]
        logged = rundir.read_jsonl(folder / "stages/02-rl/metrics.jsonl")
        assert newest.name == f"step_{len(logged):08d}"
        assert 1 <= len(logged) <= 4
        undone += len(put_back)
        go(made, folder, resume=True)
        assert differing(fingerprint(folder), fingerprint(tmp_path / "whole")) == []
    assert undone == 3


def counted(function, calls):  # type: ignore[no-untyped-def]
    def call(self):  # type: ignore[no-untyped-def]
        calls.append(1)
        return function(self)

    return call
