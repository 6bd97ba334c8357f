"""``truestep data check`` and ``truestep data show``."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Self

import pytest
from typer.testing import CliRunner, Result

from truestep.cli.data import app
from truestep.errors import UserError
from truestep.records import Problem, Score, Verdict, judged

RECIPE = """
name = "r"
model.path = "tiny"
[data.train]
source = "train.jsonl"
[data.rl]
source = "procedural:addition"
limit = 4
[data.test]
source = "test.jsonl"
[[stages]]
kind = "sft"
data = "train"
sequences_per_step = 1
steps = 1
tokens_per_microbatch = 100
optimizer.lr = 0.1
[[stages]]
kind = "rl"
data = "rl"
steps = 1
prompts_per_step = 2
tokens_per_microbatch = 100
optimizer.lr = 0.1
sampling.max_new_tokens = 5
[evaluate]
data = ["test"]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text(
        '{"problem": "1+1=?", "solution": "#### 2"}\n{"problem": "x", "solution": "y"}\n'
    )
    (tmp_path / "test.jsonl").write_text(
        '{"problem": "1+1=?", "answer": 2}\n{"problem": "2+2=?", "answer": "bad"}\n'
    )
    (tmp_path / "run.toml").write_text(RECIPE)
    return tmp_path / "run.toml"


@pytest.fixture(autouse=True)
def grader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that refuses the gold "bad", so that these tests are about what the command does with
    verdicts."""

    class Stub:
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *exc: object) -> None: ...

        def check_gold(self, problem: Problem) -> Score:
            return judged(Verdict.INCORRECT if problem.answer == "bad" else Verdict.CORRECT)

    monkeypatch.setitem(sys.modules, "truestep.grade.score", types.SimpleNamespace(Grader=Stub))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def document(result: Result) -> Any:
    return json.loads(result.stdout)


def test_check_a_file(recipe: Path) -> None:
    result = run("check", recipe.parent / "train.jsonl", "--json")
    assert result.exit_code == 0, result.output
    described = document(result)["data"]["train"]
    assert (described["num_problems"], described["num_answers"], described["num_solutions"]) == (2, 0, 2)
    assert described["gold"] == {"n": 0, "correct": 0, "incorrect": 0, "unscored": 0, "refused": []}
    assert "train" in run("check", recipe.parent / "train.jsonl").stdout


def test_check_a_recipe_finds_refused_golds_and_overlap(recipe: Path) -> None:
    result = run("check", recipe, "--json")
    assert result.exit_code == 1
    found = document(result)
    assert set(found["data"]) == {"train", "rl", "test"}
    assert found["num_refused_golds"] == 1
    assert found["data"]["test"]["gold"]["refused"][0]["row"].endswith("test.jsonl:2")
    overlap = {(p["train"], p["evaluation"]): p["exact"]["num_evaluation"] for p in found["overlap"]}
    assert overlap == {("train", "test"): 1, ("rl", "test"): 0}
    text = run("check", recipe)
    assert text.exit_code == 1
    assert "test.jsonl:2: answer 'bad' is incorrect" in text.stdout
    assert "overlap of train with test: of 2 problems, 1 have the same text, 0 share 13 words" in text.stdout
    unjudged = run("check", recipe, "--no-gold", "--json")
    assert unjudged.exit_code == 0
    assert "gold" not in document(unjudged)["data"]["test"]


def test_check_names_texts_with_two_answers(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text('{"problem": "1+1=?", "answer": 2}\n{"problem": " 1+1=?", "answer": 3}\n')
    result = run("check", path)
    assert result.exit_code == 0
    assert f"twice: problem texts with different answers: 1, e.g. {path}:1 and {path}:2" in result.stdout


def test_check_asks_of_a_row_what_the_stages_need(recipe: Path) -> None:
    for name, field in (("train", "solution"), ("test", "answer")):
        path = recipe.parent / f"{name}.jsonl"
        before = path.read_text()
        path.write_text(
            before + json.dumps({"problem": "x", {"solution": "answer", "answer": "solution"}[field]: "1"})
        )
        result = run("check", recipe)
        assert isinstance(result.exception, UserError)
        assert f"{path}:3: {field}: " in str(result.exception)
        path.write_text(before)
    result = run("check", recipe.parent / "train.jsonl", "--set", "seed=1")
    assert "--set" in str(result.exception)


def test_show_prints_what_is_trained(recipe: Path) -> None:
    pytest.importorskip("torch", reason="the tokenizer comes with the training extra")
    result = run("show", recipe, "--num", "1")
    assert result.exit_code == 0, result.exception
    assert "<|user|>1+1=?<|end|><|assistant|>⟦#### 2<|end|>⟧" in result.stdout
    assert result.stdout.count("tokens are trained on") == 3
    examples = {e["data"]: e for e in document(run("show", recipe, "--num", "1", "--json"))["examples"]}
    assert examples["train"]["num_trained"] == len("#### 2") + 1
    assert examples["test"]["num_trained"] == 0
    for example in examples.values():
        trained = [span for span in example["spans"] if span["trained"]]
        assert all(span["role"] == "assistant" and span["text"].endswith("<|end|>") for span in trained)
    assert "pass a recipe" in str(run("show", recipe.parent / "test.jsonl").exception)


def test_reading_data_needs_neither_torch_nor_the_network() -> None:
    code = (
        "import sys, truestep.cli.data, truestep.data.chat\n"
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'datasets', 'reasoning_gym') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
