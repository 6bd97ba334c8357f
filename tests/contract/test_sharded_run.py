"""A Qwen2 of 24 layers on ranks with shards: the memory of loading and exporting it, and a whole run in bfloat16."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import memory_worker
import pytest
import torch
from checkpoint_cases import same
from method_runs import recipe_of
from safetensors.torch import load_file
from test_elastic import STAGE, checkpoint, run, state_of
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from truestep.model.tiny import tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LAYERS, STEPS, SAVED = 24, 4, 2


def save_model(folder: Path, *, width: int, inner: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Random weights, in several files."""
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="100MB")
    tiny_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_rank_holds_the_whole_model(dtype: str, tmp_path: Path) -> None:
    """Of 76 M parameters. What grows is the rank's shard and one tensor; an export holds one tensor in two dtypes, and
    what is sent."""
    save_model(tmp_path / "model", width=512, inner=1408, vocabulary=8192, dtype=getattr(torch, dtype))
    words = [str(memory_worker.__file__), str(tmp_path), dtype]
    launch_ranks(words)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{dtype}-{rank}.json").read_text())
        print(dtype, rank, {name: f"{size / 2**20:.1f} MiB" for name, size in found.items()})
        assert found["shard"] == pytest.approx(4 * 76e6 / 2, rel=0.01)
        assert found["load"] <= 1.2 * found["shard"] + found["tensor"]
        assert found["export"] <= 4 * found["tensor"] < 0.5 * found["shard"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype).save_pretrained(tmp_path / "whole")
    files = [tmp_path / folder / "model.safetensors" for folder in ("whole", f"export-{dtype}")]
    assert filecmp.cmp(*files, shallow=False)


def launch_ranks(words: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]


def test_a_whole_run_of_shards_in_bfloat16(tmp_path: Path) -> None:
    """Two ranks load, train and save; one and three resume what they saved; all exports open in transformers."""
    save_model(tmp_path / "model", width=64, inner=96, vocabulary=102, dtype=torch.bfloat16)
    recipe = recipe_of(tmp_path, str(tmp_path / "model"), "sft", steps=STEPS)
    shared: dict[str, Any] = {
        "recipe": str(recipe), "parallel": "fsdp2",
        "overrides": ["compute.dtype=bfloat16", "stages.sft.save_every=2", "stages.sft.keep_checkpoints=9"],
    }  # fmt: skip
    whole = tmp_path / "two"
    jobs = [{**shared, "ranks": 2, "out": str(whole)}]
    for ranks in (1, 3, 2):
        jobs.append(
            {**shared, "ranks": ranks, "out": str(tmp_path / f"on-{ranks}"), "cut": str(whole), "step": SAVED}
        )
    run(tmp_path, jobs, seconds=900)
    stage = STAGE.replace("rl", "sft")
    before = checkpoint(whole / stage / "checkpoints", SAVED)
    started = load_file(tmp_path / "model/model.safetensors")
    assert any(
        not torch.equal(before.tensors["parameters"][f"model.{name}"], t) for name, t in started.items()
    )
    ids = torch.arange(3, 40)[None]
    logits = {}
    for name in ("two", "on-1", "on-3", "on-2"):
        if name != "two":
            assert same(
                state_of(before), state_of(checkpoint(tmp_path / name / stage / "again/checkpoints", SAVED))
            )
        trained = checkpoint(tmp_path / name / stage / "checkpoints", STEPS).tensors["parameters"]
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name / stage / "export")
        plain = AutoModelForCausalLM.from_config(exported.config, dtype=torch.bfloat16)
        plain.load_state_dict({key.removeprefix("model."): value for key, value in trained.items()})
        with torch.no_grad():
            logits[name] = exported(ids).logits
            assert torch.equal(logits[name], plain.eval()(ids).logits)
    assert torch.equal(logits["two"], logits["on-2"])
    for name in ("on-1", "on-3"):
        assert not torch.equal(logits[name], exported(ids + 1).logits)
        gap = float((logits[name] - logits["two"]).norm() / logits["two"].norm())
        print(name, f"{gap:.1e}")
        assert gap < 2e-2  # the rounding of bfloat16
    shutil.rmtree(tmp_path / "model")
