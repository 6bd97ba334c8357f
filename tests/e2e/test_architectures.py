"""docs/reference/architectures.md: the page is that of the recorded runs, they hold their bars, and each architecture's packed
step is still the one of transformers' own forward passes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import architectures

from truestep.rundir import read_json, read_jsonl

STEP, GAP, RANKS = 1e-12, 1e-4, 2e-3
ONE_BY_ONE = {"Gemma 2", "gpt-oss (MoE)"}
WHOLE_LOGITS = {"Gemma 2", "Granite"}
TESTED_ELSEWHERE = {
    "Llama",
    "Qwen2",
    "Qwen3",
    "Gemma 2",
    "Gemma 3",
    "Mistral",
    "GPT-2",
}  # tests/numerics/test_packing.py


def hold(name: str, row: dict[str, Any]) -> None:
    assert row["run"] == "ran"
    assert max(row["logprob_difference"], row["gradient_difference"]) < STEP
    assert row["engine_gap"] < GAP
    assert row["moved"] > 0.01
    assert row["export"] == {"same_tensors": True, "logit_difference": 0.0}
    assert max(row["ddp"], row["fsdp2"]) < RANKS
    assert len(row["notes"]) == (name in ONE_BY_ONE) + (name in WHOLE_LOGITS)
    assert row["shares_prompts"] == (name not in ONE_BY_ONE)
    assert row["chunked_head"] == (name not in WHOLE_LOGITS)


def test_the_page_is_of_the_recorded_runs() -> None:
    recorded = read_json(architectures.RESULT)
    assert architectures.PAGE.read_text(encoding="utf-8") == architectures.page(recorded)
    assert list(recorded["architectures"]) == list(architectures.ARCHITECTURES)
    for name, row in recorded["architectures"].items():
        hold(name, row)


@pytest.mark.parametrize(
    "name", [name for name in architectures.ARCHITECTURES if name not in TESTED_ELSEWHERE]
)
def test_the_packed_step_is_that_of_transformers(name: str) -> None:
    found = architectures.step(name)
    assert max(found["logprob_difference"], found["gradient_difference"]) < STEP
    assert found["shares_prompts"] == (name not in ONE_BY_ONE)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(architectures.ARCHITECTURES))
def test_each_architecture_runs(name: str) -> None:
    hold(name, architectures.of_architecture(name))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sharded_model_that_is_not_packed_is_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks have micro-batches with different numbers of rows; without equally many passes, they wait for ever."""
    recipe = architectures.RECIPE.replace("[data.test]", '[data.held]\nsource = "held.jsonl"\n[data.test]')
    watched = 'kind = "sft"\nvalidation = { data = "held", every_steps = 4 }\n'
    recipe = recipe.replace('kind = "sft"\n', watched).replace("microbatch = 96", "microbatch = 40")
    monkeypatch.setattr(architectures, "RECIPE", recipe)
    architectures.write_inputs("Gemma 2", tmp_path)
    rows = [{"problem": "1" * (1 + 5 * i % 23), "solution": "2" * (1 + i % 5)} for i in range(13)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    for parallel in ("", "ddp", "fsdp2"):
        assert architectures.run(tmp_path, f"out{parallel}", parallel) == ""
        metrics = read_jsonl(tmp_path / f"out{parallel}/stages/01-sft/metrics.jsonl")
        losses[parallel] = [row["sft/validation/loss"] for row in metrics if "sft/validation/loss" in row]
    assert len(losses[""]) == 2
    assert losses["ddp"] == pytest.approx(losses[""], rel=1e-4)
    assert losses["fsdp2"] == pytest.approx(losses[""], rel=1e-4)
