"""A user's own loop: right and wrong ones, by the fixture, and from a file through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from truestep.audit.inside import subject_module

RIGHT = """
import torch

def total(microbatches):
    return sum(int((m["labels"][:, 1:] != -100).sum()) for m in microbatches)

def loss(model, m):
    logits = model(input_ids=m["input_ids"])[:, :-1]
    labels = m["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )

def step(model, optimizer, microbatches):
    for m in microbatches:
        (loss(model, m) / total(microbatches)).backward()
    optimizer.step()
    optimizer.zero_grad()

def mean_of_means(model, optimizer, microbatches):
    for m in microbatches:
        (loss(model, m) / max(1, total([m])) / len(microbatches)).backward()
    optimizer.step()
    optimizer.zero_grad()

def forgetful(model, optimizer, microbatches):
    for m in microbatches:
        optimizer.zero_grad()
        (loss(model, m) / total(microbatches)).backward()
    optimizer.step()
    optimizer.zero_grad()

def broken(model, optimizer, microbatches):
    raise RuntimeError("this loop has <b>no</b> end")
"""


@pytest.fixture
def loops(tmp_path: Path) -> dict[str, object]:
    file = tmp_path / "loops.py"
    file.write_text(RIGHT)
    load = subject_module("user_loop").load
    return {name: load(str(file), name) for name in ("step", "mean_of_means", "forgetful")}


def test_a_right_step_passes(audit_step, loops) -> None:
    assert audit_step(loops["step"]).verdict == "RIGHT"


@pytest.mark.parametrize(("name", "code"), [("mean_of_means", "micro_mean"), ("forgetful", "kept")])
def test_a_wrong_step_is_named(audit_step, loops, name: str, code: str) -> None:
    finding = audit_step(loops[name], fail=False)
    assert finding.verdict == "FAULT"
    assert finding.codes[0] == code


def test_a_wrong_step_fails_the_test(audit_step, loops) -> None:
    with pytest.raises(pytest.fail.Exception, match="mean of micro-batch means"):
        audit_step(loops["mean_of_means"])


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "truestep", "audit", *words], capture_output=True, text=True, check=False, timeout=200
    )


def test_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "loops.py"
    file.write_text(RIGHT)
    done = command(f"{file}:forgetful", "--json")
    assert done.returncode == 1, done.stderr
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["verdict"] == "FAULT"
    assert [[round(w, 3) for w in rank] for rank in finding["weights"]] == [[0, 0, 0, 1]]
    done = command(f"{file}:broken")
    assert done.returncode == 3
    assert "this loop has <b>no</b> end" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.py:step"], "nowhere.py"),
        (["deepspeed"], "NAME==VERSION"),
        (["--python", "/no/such/python"], "no such program"),
        (["--only", "nonsense"], "nothing to audit"),
        (["deepspeed", "--bisect", "1-2"], "write two versions"),
        (["--past", "/no/such/folder"], "/no/such/folder"),
        (["--arch", "nonsense", "--only", "torch loop"], "nonsense"),
    ],
)
def test_bad_words_are_one_line(words: list[str], said: str) -> None:
    done = command(*words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
