"""The predicted memory is that of a step of fake tensors, for each setting that changes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import memory_measure
import memory_table

from truestep.pipeline import memory
from truestep.pipeline.paper_plan import declared_plan
from truestep.settings import load_settings
from truestep.stage_settings import LoraSettings

WITHIN = 0.15  # measured: 0.06
LORA = LoraSettings(rank=8)
SIZES = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": False, "max_position_embeddings": 2048,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "recomputed": {"checkpointing": True},
    "selective": {"checkpointing": "selective"},
    "float32": {"dtype": torch.float32},
    "adapters": {"lora": LORA},
    "adapters, recomputed": {"lora": LORA, "checkpointing": True},
    "offload": {"offload": True, "checkpointing": True},
    "tied": {"tied": True},
}


def ratio(options: dict[str, Any]) -> float:
    own = {"lengths": (511,) * 2, "checkpointing": False, **options}
    config = {**SIZES, "tie_word_embeddings": own.pop("tied", False)}
    return float(memory_measure.compared("", config, own)["ratio"])


@pytest.mark.parametrize("name", CASES)
def test_the_prediction_is_that_of_fake_tensors(name: str) -> None:
    assert ratio(CASES[name]) == pytest.approx(1, abs=WITHIN)


@pytest.mark.parametrize(
    ("changed", "name"), [({"saved_bytes": lambda *a: 0}, "whole"), ({"CHUNK_BYTES": 36}, "recomputed")]
)
def test_a_wrong_term_would_be_seen(
    changed: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for term, value in changed.items():
        monkeypatch.setattr(memory, term, value)
    assert abs(ratio(CASES[name]) - 1) > WITHIN


def planned(*changes: str, recipe: str = memory_table.SFT) -> dict[str, Any]:
    path = memory_table.RECIPES / f"{recipe}.toml"
    row: dict[str, Any] = declared_plan(load_settings(path, changes), path.parent, str(path))["stages"][-1]
    return row


def test_offload_moves_masters_and_moments_to_the_host() -> None:
    one, moved = planned(memory_table.ONE), planned(memory_table.ONE, memory_table.OFFLOAD)
    size = one["gib"].pop("masters and moments")
    assert moved["gib"] == one["gib"]
    assert moved["host_gib"]["masters and moments"] == size
    assert moved["host_gib_per_rank"] > one["host_gib_per_rank"] + size
    assert one["assumed seconds of offload"] == 0 < moved["assumed seconds of offload"]


def test_adapters_need_little_beside_the_weights() -> None:
    whole = planned(memory_table.ONE)
    small = planned(memory_table.ONE, f"stages.sft.{memory_table.LORA}")
    assert small["gib"]["weights"] >= whole["gib"]["weights"]
    for kind in ("gradients", "masters and moments"):
        assert small["gib"][kind] < whole["gib"][kind] / 50
    assert small["flops_full"] < 0.75 * whole["flops_full"]
    assert small["assumed tokens/s"]["training"] > whole["assumed tokens/s"]["training"]


def test_vllm_takes_the_engine_to_another_card() -> None:
    torch_engine = planned(memory_table.ONE, recipe=memory_table.RL)
    served = planned(memory_table.ONE, 'stages.rl.engine="vllm"', recipe=memory_table.RL)
    assert "cache" in torch_engine["gib"]
    assert "cache" not in served["gib"]
    assert served["server_gib"]["weights"] == served["gib"]["weights"]
    assert served["assumed tokens/s"]["sampling"] > torch_engine["assumed tokens/s"]["sampling"]
    assert "files for vLLM" in served["host_gib"]


def test_shards_divide_the_state() -> None:
    """Shards are float32 and their own masters: 4 + 8 bytes a parameter, and 2 + 4 + 8 in one piece."""
    one, many = planned(memory_table.ONE), planned()
    for kind, share in (("weights", 2), ("gradients", 1), ("masters and moments", 2 / 3)):
        assert many["gib"][kind] == pytest.approx(share * one["gib"][kind] / 16, abs=0.01)


def test_the_tables_are_up_to_date() -> None:
    for path, text in memory_table.files().items():
        assert path.read_text(encoding="utf-8") == text, "run benchmarks/memory_table.py"


def test_the_comparison_of_the_page_holds() -> None:
    import json

    document = json.loads(memory_table.MEASURED.read_text(encoding="utf-8"))
    assert len(document["fake"]) == len(memory_measure.FAKE)
    assert len(document["real"]) == len(memory_measure.REAL)
    for one in (*document["fake"], *document["real"]):
        assert one["ratio"] == pytest.approx(1, abs=WITHIN)


@pytest.mark.slow
def test_a_real_step_takes_what_is_predicted() -> None:
    for options in memory_measure.REAL:
        assert memory_measure.in_child(options)["ratio"] == pytest.approx(1, abs=WITHIN)


def test_the_sizes_of_adapters_are_counted_as_on_the_meta_device() -> None:
    from truestep.pipeline.paper_plan import shape_of, sizes_of

    path = memory_table.RECIPES / f"{memory_table.SFT}.toml"
    settings = load_settings(path, ("stages.sft.lora={ rank = 16 }",))
    made, shape = sizes_of(settings, memory_measure.QWEN, settings.stages[0])
    own = memory.Sizes.of(memory_measure.QWEN, shape_of(memory_measure.QWEN).num_parameters)
    assert made == memory_measure.adapters(own, 16)
    assert 0.5 < shape.backward_share < 0.51
