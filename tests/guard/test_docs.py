"""The code in docs/guard.md runs as it is printed, and the guard finds no fault in it; if the loss in it is
broken, the guard finds that."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_blocks import PAGE, blocks, names, run

from truestep.guard.runs import Run, read

TOKENIZER = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def one_run(folder: Path, log: str = "guard.jsonl") -> Run:
    (found,) = read(folder / log)
    assert found.off is None, found.off
    assert len(found.steps) == 3
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


@pytest.mark.parametrize("heading", ["Own loop", "accelerate"])
def test_a_loop(heading: str, folder: Path) -> None:
    run(heading, names())
    found = one_run(folder)
    assert found.verdict == "RIGHT"
    assert all(abs(w - 1) < 1e-3 for one in found.steps for rank in one["weights"] for w in rank)


@pytest.mark.parametrize("heading", ["Own loop", "accelerate"])
def test_a_loop_with_a_broken_loss(heading: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {name: code.replace('reduction="sum"', 'reduction="mean"') for name, code in blocks().items()}
    monkeypatch.setattr("docs_blocks.blocks", lambda: broken)
    run(heading, names())
    found = one_run(folder)
    assert found.first_fault is not None
    assert found.first_fault["step"] == 1
    assert "micro_mean" in found.first_fault["codes"]


def test_transformers(folder: Path) -> None:
    run("transformers Trainer", names())
    found = one_run(folder, "out/truestep_guard.jsonl")
    assert found.verdict == "RIGHT"
    assert found.header is not None
    assert found.header["model"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "heading", ["FSDP2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("DDP", "FSDP1"))]
)
def test_two_processes(heading: str, folder: Path) -> None:
    here = Path(__file__).parent
    words = [sys.executable, str(here / "docs_blocks.py"), heading, str(folder / "store")]
    how: dict[str, Any] = {
        "cwd": folder,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    started = [subprocess.Popen([*words, str(rank), "2"], env=dict(os.environ), **how) for rank in (0, 1)]
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said[0][-3000:]
    found = one_run(folder)
    assert found.verdict == "RIGHT"
    assert found.header is not None
    assert found.header["ranks"] == 2
    assert [len(rank) for rank in found.steps[0]["weights"]] == [4, 4]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(61))])}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TOKENIZER, **special)


def text(length: int) -> str:
    return " ".join(f"w{1 + (7 * n + length) % 60}" for n in range(length))


@needs("trl")
def test_trl_sft(folder: Path) -> None:
    import datasets

    rows = [{"text": text(n)} for n in (2, 27, 3, 17, 40, 5, 22, 9, 33, 4, 14, 30)]
    run("TRL SFTTrainer", {**names(), "dataset": datasets.Dataset.from_list(rows), "tokenizer": tokenizer()})
    assert one_run(folder, "out/truestep_guard.jsonl").verdict == "RIGHT"


@needs("trl")
def test_trl_grpo(folder: Path) -> None:
    import datasets

    prompts = datasets.Dataset.from_list([{"prompt": text(n)} for n in (2, 7, 3, 9, 4, 5, 6, 8)])
    reward = lambda completions, **more: [float(len(c)) + n for n, c in enumerate(completions)]  # noqa: E731
    run("TRL GRPOTrainer", {**names(), "prompts": prompts, "tokenizer": tokenizer(), "reward": reward})
    found = one_run(folder, "out/truestep_guard.jsonl")
    assert found.verdict == "RIGHT"
    assert len(found.steps[0]["weights"][0]) == 4


@needs("deepspeed")
def test_deepspeed(folder: Path) -> None:
    code = (
        "import deepspeed.ops, sys\n"
        "deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False\n"
        "from docs_blocks import names, run\n"
        "run('DeepSpeed engine', names())\n"
    )
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "LOCAL_SIZE": "1"}
    alone |= {"MASTER_PORT": str(20000 + os.getpid() % 20000), "DS_ACCELERATOR": "cpu"}
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=240,
        env={**os.environ, **alone, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert one_run(folder).verdict == "RIGHT"


def test_every_example_is_run_or_marked() -> None:
    tests = Path(__file__).read_text()
    parts = re.split(r"^### ", PAGE.read_text().partition("## Options")[0], flags=re.MULTILINE)[1:]
    assert len(parts) >= 11
    for part in parts:
        heading, _, body = part.partition("\n")
        if heading in blocks():
            assert f'"{heading}"' in tests or f"'{heading}'" in tests, heading
            assert body.strip().startswith("Tested"), heading
        else:
            assert body.strip().startswith(("Not run.", "Run with")), heading


def test_the_cost_of_the_example_follows_from_the_code() -> None:
    transformers = pytest.importorskip("transformers")
    from truestep.guard.modules import choose

    config = transformers.Qwen2Config(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, vocab_size=152064,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    watched = choose(model, torch.Generator().manual_seed(0))
    width = sum(one.left.shape[1] + one.right.shape[1] for one in watched)
    page = PAGE.read_text()
    assert f"the sum of d_in + d_out is {width:,}" in page
    size = sum(p.numel() for p in model.parameters())
    assert f"N = {size:.1e}".replace("e+0", "e") in page
    assert f"{2 * 4096 * 32 * width:.1e}".replace("e+0", "e") in page
    assert f"{4 * 32 * width / 1e6:.1f} MB" in page
    assert f"{4 * 32 * 4096 * len(watched) / 1e6:.1f} MB" in page
    kept = sum(2 * 32 * one.left.shape[1] * one.right.shape[1] for one in watched)
    assert f"{kept:.1e}".replace("e+0", "e") in page
