"""``truestep run`` in processes of its own: what it leaves, what it prints, and how it takes Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

RECIPE = """
name = "small"

[model]
path = "tiny"
tiny = { hidden_size = 32, num_layers = 1, num_heads = 2, intermediate_size = 64 }

[compute]
threads = 1

[data.train]
source = "procedural:addition"
limit = 30
options = { digits = 1 }

[data.test]
source = "procedural:addition"
split = "test"
limit = 4
options = { digits = 1 }

[[stages]]
kind = "sft"
data = "train"
steps = 4
sequences_per_step = 4
tokens_per_microbatch = 200
optimizer = { lr = 1e-2 }

[[stages]]
kind = "rl"
data = "train"
steps = 2
prompts_per_step = 2
samples_per_prompt = 2
tokens_per_microbatch = 200
optimizer = { lr = 1e-3 }
sampling = { max_new_tokens = 6 }

[evaluate]
data = ["test"]
sampling = { temperature = 0.6, max_new_tokens = 6 }
"""
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    (path / "run.toml").write_text(RECIPE)
    return path


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "truestep", *words]


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    done = call(folder, "run", "run.toml")
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1], done


def test_the_last_line_of_stdout_is_the_run_directory(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, done = finished
    assert run.parent.name == "runs"
    assert run.name.startswith("small-")
    for name in ("resolved.toml", "provenance.json", "summary.json", "report.html"):
        assert (run / name).stat().st_size > 0
    assert "<html" in (run / "report.html").read_text()
    assert "Traceback" not in done.stderr
    assert f"model: {run.relative_to(run.parents[1])}/stages/02-rl/export" in done.stdout.splitlines()
    table = done.stdout.splitlines()[:-1]
    for checkpoint in ("base", "sft", "rl"):
        assert any(checkpoint in line for line in table)


def test_the_record_says_how_it_was_made(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, _ = finished
    resolved = tomllib.loads((run / "resolved.toml").read_text())
    assert resolved["stages"][1]["samples_per_prompt"] == 2
    assert resolved["stages"][1]["optimizer"]["eps"] == 1e-8, "defaults are written out"
    stamp = json.loads((run / "provenance.json").read_text())
    assert stamp["command"][1:] == ["run", "run.toml"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done"
    assert [s["checkpoint"] for s in summary["scores"]] == ["base", "sft", "rl"]
    for score in summary["scores"]:
        assert score["correct"] + score["incorrect"] + score["unscored"] == score["n"] == 4


@pytest.mark.parametrize("stage", ["01-sft", "02-rl"])
def test_the_export_opens_in_transformers(
    finished: tuple[Path, subprocess.CompletedProcess[str]], stage: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = finished[0] / "stages" / stage / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+4=?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**ids, max_new_tokens=5, do_sample=False)
    num_new = out.shape[1] - ids["input_ids"].shape[1]
    assert 1 <= num_new <= 5
    assert tokenizer.decode(ids["input_ids"][0]) == "<|user|>3+4=?<|end|><|assistant|>"


def test_dry_run_writes_nothing(folder: Path) -> None:
    done = call(folder, "run", "run.toml", "--dry-run", "--json", "--out", "dry")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["run_dir"] == "dry"
    assert [s["steps"] for s in document["stages"]] == [4, 2]
    assert [s["method"] for s in document["stages"]] == ["sft", "grpo_token_mean"]
    assert "optimizer updates" in done.stderr
    assert any("method" in line and "grpo_token_mean" in line for line in done.stderr.splitlines())
    assert not (folder / "dry").exists()


def stopped(
    folder: Path, words: list[str], stage: Path, number: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Run, and send a signal as soon as the stage has logged a step."""
    process = subprocess.Popen(
        command(*words),
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = stage / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while (
            not (log.exists() and log.stat().st_size)
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert stdout == ""
    assert "Traceback" not in stderr
    steps = len(log.read_text().splitlines())
    assert steps > 0
    saved = (stage / "checkpoints/latest").read_text().strip()
    assert saved == f"step_{steps:08d}", "every finished step is saved"
    (line,) = [x for x in stderr.splitlines() if "--resume" in x]
    assert number.name in line
    assert line.endswith(f"Continue with: truestep {shlex.join(words)} --resume")
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def test_sigterm_saves_and_says_how_to_go_on(folder: Path) -> None:
    words = [
        "sft",
        "run.toml",
        "--out",
        "terminated",
        "--set",
        "stages.sft.steps=100000",
        "--set",
        "evaluate.data=[]",
    ]
    assert stopped(folder, words, folder / "terminated/stages/01-sft", signal.SIGTERM).returncode == 143


def test_after_ctrl_c_the_command_that_was_named_finishes_the_same_run(
    folder: Path, finished: tuple[Path, object]
) -> None:
    whole, _ = finished
    words = ["run", "run.toml", "--out", "resumed", "--json"]
    assert stopped(folder, words, folder / "resumed/stages/01-sft", signal.SIGINT).returncode == 130
    again = call(folder, *words, "--resume")
    assert again.returncode == 0, again.stderr
    document = json.loads(again.stdout)  # one document alone
    assert document["run_dir"] == "resumed"
    assert document["status"] == "done"
    assert Path(folder / document["report"]).exists()
    assert document["trained_model"] == "resumed/stages/02-rl/export"
    for stage in ("01-sft", "02-rl"):
        for name in ("metrics.jsonl", "export/model.safetensors"):
            path = Path("stages") / stage / name
            assert (folder / "resumed" / path).read_bytes() == (whole / path).read_bytes()
