"""Five steps of SFT and five of RL reproduce a recorded trajectory: a change that should not alter numbers
does not.

Recorded by ``python tests/golden/test_trajectory.py``; do it again only for a change that is meant to alter
them, and say so in the change.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep import rundir
from truestep.checkpoint.store import load_latest
from truestep.pipeline.prepare import prepare
from truestep.pipeline.run import open_run_folder, run
from truestep.settings import load_settings
from truestep.train.parallel import Ranks

RECORDED = Path(__file__).with_name("trajectory.json")
# float64, so that no sampled token hangs on a rounding; what is left between machines comes from sines in
# float32.
RECIPE = """
name = "golden"
[model]
path = "tiny"
tiny = { hidden_size = 32, num_layers = 2, num_heads = 2, intermediate_size = 64 }
[compute]
threads = 1
dtype = "float64"
[data.train]
source = "train.jsonl"
[[stages]]
kind = "sft"
data = "train"
steps = 20
sequences_per_step = 8
tokens_per_microbatch = 40
optimizer = { lr = 2e-2, schedule = "cosine", warmup_fraction = 0.2 }
[[stages]]
kind = "rl"
data = "train"
steps = 5
prompts_per_step = 4
samples_per_prompt = 6
tokens_per_microbatch = 40
method_options = { entropy_bonus = 0.01 }
optimizer = { lr = 5e-3 }
sampling = { max_new_tokens = 4 }
"""
KEYS = {
    "sft": ("loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "nll"),
    "rl": (
        "loss",
        "grad_norm",
        "num_tokens",
        "entropy",
        "reward",
        "mixed_groups",
        "clip_ratio/high",
        "approx_kl",
    ),
}
TOLERANCE = 1e-4  # relative


class Silent:
    def say(self, text: str) -> None:
        pass

    def begin(self, what: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, done: int, note: str = "") -> None:
        pass


def trajectory(folder: Path) -> dict[str, Any]:
    """Losses, gradient norms and the size of the whole parameter change, of every step that is recorded."""
    rows = [
        {
            "id": f"q{i}",
            "problem": f"{i}+{i * 7 % 4}",
            "answer": str(i * 7 % 2),
            "checker": "exact",
            "solution": s,
        }
        for i in range(12)
        for s in [str(i % 2)]
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "golden.toml").write_text(RECIPE)
    settings = load_settings(folder / "golden.toml")
    out = folder / "run"
    prepared = prepare(settings, base_dir=folder)
    open_run_folder(prepared, out, resume=False, rank=0)
    run(prepared, out, ranks=Ranks(), reporter=Silent())
    found: dict[str, Any] = {}
    for name, home in (("sft", out / "stages/01-sft"), ("rl", out / "stages/02-rl")):
        steps = rundir.read_jsonl(home / "metrics.jsonl")
        found[name] = [{key: row.get(f"{name}/{key}", 0.0) for key in KEYS[name]} for row in steps[:5]]
        last = load_latest(home / "checkpoints", warn=print)
        assert last is not None
        found[f"{name}/parameters"] = {
            key: float(tensor.double().norm()) for key, tensor in sorted(last.tensors["parameters"].items())
        }
    return found


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    threads = torch.get_num_threads()
    found = trajectory(tmp_path_factory.mktemp("golden"))
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORDED.read_text())["trajectory"]
    return found


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_every_step_is_the_recorded_one(now: dict[str, Any], recorded: dict[str, Any], stage: str) -> None:
    assert len(now[stage]) == len(recorded[stage]) == 5
    for step, (got, expected) in enumerate(zip(now[stage], recorded[stage], strict=True), start=1):
        assert got == pytest.approx(expected, rel=TOLERANCE, abs=1e-9), f"step {step}"


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_parameters_end_where_they_did(now: dict[str, Any], recorded: dict[str, Any], stage: str) -> None:
    assert now[f"{stage}/parameters"] == pytest.approx(recorded[f"{stage}/parameters"], rel=TOLERANCE)


def test_the_recording_has_something_to_say(recorded: dict[str, Any]) -> None:
    assert all(step["grad_norm"] > 0 for stage in ("sft", "rl") for step in recorded[stage])
    assert any(step["mixed_groups"] > 0 for step in recorded["rl"])
    assert recorded["sft"][4]["loss"] < recorded["sft"][0]["loss"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = trajectory(Path(folder))
    stamp = {"machine": platform.machine(), "torch": torch.__version__, "python": platform.python_version()}
    rundir.write_json(RECORDED, {"recorded with": stamp, "trajectory": made})
    print(f"wrote {RECORDED}")
