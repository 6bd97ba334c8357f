"""A user's own loop: right and wrong ones, by the fixture, and from a file through the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from truestep.audit.environments.in_process import subject_module
from truestep.audit.present.words import row_of

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

def skipping(model, optimizer, microbatches):
    step(model, optimizer, [m for m in microbatches if total([m])])

def rows_of(microbatches):
    for m in microbatches:
        for i, length in enumerate(m["attention_mask"].sum(1)):
            yield {key: value[i : i + 1, :length] for key, value in m.items()}

def row_by_row(model, optimizer, microbatches):
    step(model, optimizer, list(rows_of(microbatches)))

def in_one_pass(model, optimizer, microbatches):
    rows, fillers = list(rows_of(microbatches)), {"input_ids": 0, "attention_mask": 0, "labels": -100}
    longest = max(row["input_ids"].shape[1] for row in rows)
    pad = lambda x, filler: torch.nn.functional.pad(x, (0, longest - x.shape[1]), value=filler)
    step(model, optimizer, [{k: torch.cat([pad(r[k], fillers[k]) for r in rows]) for k in fillers}])

def in_one_line(model, optimizer, microbatches):
    rows = list(rows_of(microbatches))
    for row in rows:
        row["labels"][:, 0] = -100  # nothing predicts it
    step(model, optimizer, [{k: torch.cat([r[k] for r in rows], 1) for k in rows[0]}])

def step_after_each(model, optimizer, microbatches):
    for m in microbatches:
        (loss(model, m) / total(microbatches)).backward()
        optimizer.step()
        optimizer.zero_grad()

def last_row_lost(model, optimizer, microbatches):
    step(model, optimizer, list(rows_of(microbatches))[:-1])

def with_mask(model, optimizer, microbatches):
    masked = lambda m: lambda input_ids: model(input_ids=input_ids, attention_mask=m["attention_mask"])
    for m in microbatches:
        (loss(masked(m), m) / total(microbatches)).backward()
    optimizer.step()
    optimizer.zero_grad()

def without_last_token(model, optimizer, microbatches):
    for m in microbatches:
        logits, labels = model(m["input_ids"][:, :-1]), m["labels"][:, 1:]
        summed = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (summed / total(microbatches)).backward()
    optimizer.step()
    optimizer.zero_grad()

def under_autocast(model, optimizer, microbatches):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, optimizer, microbatches)

def in_one_pass_under_autocast(model, optimizer, microbatches):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_one_pass(model, optimizer, microbatches)

def mean_of_means_under_autocast(model, optimizer, microbatches):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean_of_means(model, optimizer, microbatches)

def clipped(model, optimizer, microbatches):
    for m in microbatches:
        (loss(model, m) / total(microbatches)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()

def own_optimizer(model, optimizer, microbatches):
    step(model, torch.optim.AdamW(model.parameters()), microbatches)

def strange_rows(model, optimizer, microbatches):
    step(model, optimizer, [{**m, "input_ids": m["input_ids"] * 0 + 1} for m in microbatches])

def divided_by_zero(model, optimizer, microbatches):
    1 / 0

def with_loss(model, optimizer, microbatches):
    for m in microbatches:
        model(**m).loss.backward()

def broken(model, optimizer, microbatches):
    raise RuntimeError("this loop has <b>no</b> end")
"""


@pytest.fixture
def loops(tmp_path: Path) -> dict[str, object]:
    file = tmp_path / "loops.py"
    file.write_text(RIGHT)
    load = subject_module("user_loop").load
    return {
        name: load(str(file), name)
        for name in re.findall(r"^def (\w+)\(model, optimizer", RIGHT, re.MULTILINE)
    }


def test_a_misspelt_function_is_named(tmp_path: Path) -> None:
    (tmp_path / "misspelt_loop.py").write_text(RIGHT)
    load = subject_module("user_loop").load
    with pytest.raises(AttributeError, match='has no function stp; did you mean "step"'):
        load(str(tmp_path / "misspelt_loop.py"), "stp")
    assert callable(load(str(tmp_path / "misspelt_loop.py"), "step"))


@pytest.mark.parametrize(
    "name",
    ["step", "skipping", "row_by_row", "in_one_pass", "in_one_line", "with_mask", "without_last_token"],
)
def test_a_right_step_passes(audit_step, loops, name: str) -> None:
    """However it runs the rows of its window through the model."""
    assert audit_step(loops[name]).verdict == "RIGHT"


def test_the_documented_step_is_right(audit_step, tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs/audit.md").read_text(encoding="utf-8")
    example = document.partition("```python\n")[2].partition("```")[0]
    file = tmp_path / "documented.py"
    file.write_text("from torch.nn.functional import cross_entropy\n" + example)
    assert audit_step(subject_module("user_loop").load(str(file), "step")).verdict == "RIGHT"


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("mean_of_means", "micro_mean"),
        ("forgetful", "kept"),
        ("step_after_each", "grouping"),
        ("last_row_lost", "grouping data_lost"),
    ],
)
def test_a_wrong_step_is_named(audit_step, loops, name: str, codes: str) -> None:
    finding = audit_step(loops[name], fail=False)
    assert finding.verdict == "FAULT"
    assert list(finding.codes)[: len(codes.split())] == codes.split()


def test_autocast_is_judged_by_its_own_precision(audit_step, loops) -> None:
    finding = audit_step(loops["under_autocast"])
    assert finding.verdict == "RIGHT"
    assert finding.configuration["autocast"] == "bfloat16"
    assert 1e-4 < finding.noise < 0.02  # of the products alone: the parameters are stored in float32
    assert audit_step(loops["in_one_pass_under_autocast"]).verdict == "RIGHT"
    assert audit_step(loops["mean_of_means_under_autocast"], fail=False).codes[0] == "micro_mean"


def test_a_step_that_depends_on_no_split_passes(audit_step, loops) -> None:
    assert audit_step(loops["clipped"]).verdict == "DEFAULT"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("own_optimizer", "does not use the optimizer"), ("strange_rows", "none of the case's rows")],
)
def test_what_cannot_be_read_is_no_fault(audit_step, loops, name: str, reason: str) -> None:
    finding = audit_step(loops[name], fail=False)
    assert finding.verdict == "NOT OBSERVABLE"
    assert reason in row_of(finding)["reason"]


def test_the_loss_of_logits_is_explained(audit_step, loops) -> None:
    reason = row_of(audit_step(loops["with_loss"], fail=False))["reason"]
    assert "returns logits [B, T, V], without .loss; pass --arch llama" in reason


@pytest.mark.parametrize(
    ("name", "error"), [("broken", RuntimeError), ("divided_by_zero", ZeroDivisionError)]
)
def test_a_step_that_fails(audit_step, loops, name: str, error: type[Exception]) -> None:
    finding = audit_step(loops[name], fail=False)
    assert finding.verdict == "NOT RUN"
    assert row_of(finding)["reason"].startswith(error.__name__)
    with pytest.raises(error):
        audit_step(loops[name])


def test_random_numbers_go_on_as_if_nothing_was_audited(audit_step, loops) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        before = torch.random.get_rng_state()
        audit_step(loops["step"])
        assert torch.equal(torch.random.get_rng_state(), before)


def test_wrong_windows_are_said_once(audit_step, loops) -> None:
    """And not in how far each of their steps is off."""
    finding = audit_step(loops["step_after_each"], fail=False)
    assert row_of(finding)["fault"] == "steps were taken after 1, 1, 1, 1, 1, 1 … rows; expected 4, 4, 4"
    assert finding.codes == ("grouping",)


def test_a_wrong_step_fails_the_test(audit_step, loops) -> None:
    with pytest.raises(pytest.fail.Exception, match="mean of micro-batch means"):
        audit_step(loops["mean_of_means"])


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "truestep", "audit", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.mark.slow
def test_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "loops.py"
    file.write_text(RIGHT)
    done = command(f"{file}:forgetful", "--json")
    assert done.returncode == 1, done.stderr
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["verdict"] == "FAULT"
    assert [[round(w, 3) for w in rank] for rank in finding["weights"]] == [[0, 0, 0, 1]]
    runs_the_model = next(i for i, line in enumerate(RIGHT.splitlines(), 1) if "= model(" in line)
    assert finding["location"] == f"{file}:{runs_the_model}"
    done = command(f"{file}:broken")
    assert done.returncode == 3
    assert "this loop has <b>no</b> end" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.py:step"], "nowhere.py"),
        (["deepspeed"], "NAME==VERSION"),
        (["--python", "/no/such/python"], "does not exist; pass a virtual environment"),
        (["--only", "nonsense"], "nothing to audit whose name contains"),
        (["deepspeed", "--bisect", "1-2"], "pass two versions"),
        (["--past", "/no/such/folder"], "/no/such/folder"),
        (["--arch", "nonsense", "--only", "torch loop"], "nonsense"),
        (["--arch", "gpt2", "--only", "torch loop"], "does not apply to"),
        (["deepspeed==0.18.9", "--arch", "gpt2", "--dry-run"], "does not apply to"),
        (["models", "--dry-run"], "configurations; remove --dry-run"),
        (["loops.py"], "FILE.py:FUNCTION"),
        (["deepspeed", "--bisect", "0.19.8..0.15.0"], "the older release must come first"),
    ],
)
def test_bad_words_are_one_line(words: list[str], said: str) -> None:
    done = command(*words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    *before_it, line = done.stderr.strip().splitlines()  # a command says first what it is doing
    assert line.startswith("error: ")
    assert all(text.startswith("truestep audit: ") for text in before_it)
