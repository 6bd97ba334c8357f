"""Forty-odd ways to get a recipe, a data row or a path wrong: each is one line that names the place (or a list of
such lines, if more than one thing becomes wrong), exit code 2, and comes before any model is built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from truestep.cli.main import main

RECIPE = """
name = "bad"

[model]
path = "tiny"
tiny = { hidden_size = 16, num_layers = 1, num_heads = 2, intermediate_size = 16 }

[compute]
threads = 1

[data.train]
source = "train.jsonl"

[data.test]
source = "procedural:addition"
split = "test"
limit = 3

[[stages]]
kind = "sft"
data = "train"
steps = 2
sequences_per_step = 2
tokens_per_microbatch = 400
optimizer = { lr = 1e-3 }

[[stages]]
kind = "rl"
data = "train"
steps = 2
prompts_per_step = 2
samples_per_prompt = 2
tokens_per_microbatch = 400
optimizer = { lr = 1e-3 }
sampling = { max_new_tokens = 8 }

[evaluate]
data = ["test"]
sampling = { temperature = 0.6, max_new_tokens = 8 }
"""

ROWS = [
    {"problem": "1+1=?", "answer": "2", "solution": "#### 2"},
    {"problem": "2+1=?", "answer": "3", "solution": "#### 3"},
    {"problem": "2+2=?", "answer": "4", "solution": "#### 4"},
]


@dataclass(frozen=True)
class Case:
    """How a good folder is broken, and the words that the one line must hold."""

    name: str
    break_it: Callable[[Path], object]
    expect: tuple[str, ...]
    words: tuple[str, ...] = ()
    recipe: str = "run.toml"


def recipe(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "run.toml"
        text = path.read_text()
        assert old in text, old
        path.write_text(text.replace(old, new, 1))

    return edit


def rl(old: str, new: str) -> Callable[[Path], None]:
    """The same after the line that begins the rl stage."""

    def edit(folder: Path) -> None:
        path = folder / "run.toml"
        before, stage, after = path.read_text().partition('kind = "rl"')
        assert old in after, old
        path.write_text(before + stage + after.replace(old, new, 1))

    return edit


def row(number: int, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "train.jsonl"
        lines = path.read_text().splitlines()
        lines[number - 1] = text
        path.write_text("\n".join(lines) + "\n")

    return edit


def nothing(folder: Path) -> None:
    del folder


def _folder(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).mkdir()


def _taken(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "resolved.toml").write_text('name = "x"\n')


def _not_a_run(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")


def _not_writable(folder: Path) -> None:
    (folder / "out").write_text("a file, where a folder is wanted")


CASES = [
    # the recipe itself
    Case(
        "missing recipe",
        nothing,
        ("rum.toml", "no such recipe", 'did you mean "', "run.toml"),
        recipe="rum.toml",
    ),
    Case(
        "recipe is a folder", _folder("folder"), ("folder is a folder", "pass a recipe file"), recipe="folder"
    ),
    Case("TOML syntax", recipe('name = "bad"', "name = bad"), ("run.toml", "not valid TOML", "line 2")),
    Case(
        "duplicate key",
        recipe('name = "bad"', 'name = "bad"\nname = "b"'),
        ("run.toml", "not valid TOML", "line 3"),
    ),
    Case("not UTF-8", lambda f: (f / "run.toml").write_bytes(b'name = "\xff"'), ("run.toml", "UTF-8")),
    Case(
        "unknown key",
        recipe("steps = 2", "stepz = 2"),
        ("stages.sft.stepz", "unknown key", 'did you mean "steps"'),
    ),
    Case(
        "unknown table",
        recipe("[compute]", "[computer]"),
        ("computer", "unknown key", 'did you mean "compute"'),
    ),
    Case("wrong type", recipe("threads = 1", 'threads = "two"'), ("compute.threads", "integer", "'two'")),
    Case("missing key", recipe('data = "train"\n', ""), ("stages.sft.data", "missing")),
    Case("missing table", recipe('[model]\npath = "tiny"\n', "[model]\n"), ("model.path", "missing")),
    Case(
        "negative number",
        recipe("lr = 1e-3", "lr = -1e-3"),
        ("stages.sft.optimizer.lr", "greater than 0", "-0.001"),
    ),
    Case("not a number", recipe("lr = 1e-3", "lr = nan"), ("stages.sft.optimizer.lr", "nan")),
    Case(
        "epochs and steps",
        recipe("steps = 2", "steps = 2\nepochs = 1"),
        ("stages.sft", "exactly one of epochs and steps"),
    ),
    Case(
        "neither epochs nor steps",
        recipe("steps = 2\n", ""),
        ("stages.sft", "exactly one of epochs and steps"),
    ),
    Case(
        "two stages of one name",
        rl('data = "train"', 'name = "sft"\ndata = "train"'),
        ('two stages are called "sft"',),
    ),
    Case("no such kind", recipe('kind = "sft"', 'kind = "stf"'), ("stages.stf", "'stf'", '"sft"')),
    Case(
        "unknown data set",
        rl('data = "train"', 'data = "trian"'),
        ("stages.rl.data", '"trian"', 'did you mean "train"'),
    ),
    Case(
        "unknown test set",
        recipe('data = ["test"]', 'data = ["tset"]'),
        ("evaluate.data", 'did you mean "test"'),
    ),
    Case(
        "dev without every_steps",
        recipe("steps = 2", 'steps = 2\ndev = { data = "test" }'),
        ("stages.sft", "dev", "every_steps"),
    ),
    Case(
        "chat.user without problem",
        recipe("[compute]", '[chat]\nuser = "Hi"\n[compute]'),
        ("chat", "{problem}"),
    ),
    Case("bad name", recipe('name = "bad"', 'name = "../up"'), ("name", "../up")),
    Case(
        "learning rate by its long name",
        rl("lr = 1e-3", "learning_rate = 1e-3"),
        ("stages.rl.optimizer.learning_rate", 'did you mean "lr"'),
    ),
    Case(
        "learning rate of a stage",
        recipe("steps = 2", "steps = 2\nlearning_rate = 1e-3"),
        ("stages.sft.learning_rate", 'did you mean "stages.sft.optimizer.lr"'),
    ),
    Case(
        "batch size of an rl stage",
        rl("steps = 2", "steps = 2\nbatch_size = 4"),
        ("stages.rl.batch_size", 'did you mean "prompts_per_step"'),
    ),
    Case(
        "batch size of an sft stage",
        recipe("steps = 2", "steps = 2\nbatch_size = 4"),
        ("stages.sft.batch_size", 'did you mean "sequences_per_step"'),
    ),
    Case("max_steps", rl("steps = 2", "max_steps = 2"), ("stages.rl.max_steps", 'did you mean "steps"')),
    Case(
        "a name for a list",
        recipe('data = ["test"]', 'data = "test"'),
        ("evaluate.data", "expected a list, got 'test'", 'write ["test"]'),
    ),
    Case(
        "a number for a table",
        rl("optimizer = { lr = 1e-3 }", "optimizer = 1e-3"),
        ("stages.rl.optimizer", "expected a table, got 0.001"),
    ),
    # batches and sampling that contradict each other
    Case(
        "prompts not divisible",
        rl("prompts_per_step = 2", "prompts_per_step = 3"),
        ("stages.rl", "prompts_per_step = 3", "set prompts_per_step = 4"),
    ),
    Case(
        "temperature 0 in rl",
        rl("8 }", "8, temperature = 0 }"),
        ("stages.rl", "temperature 0", "set temperature = 1.0"),
    ),
    Case("top_p in rl", rl("8 }", "8, top_p = 0.9 }"), ("stages.rl", "top_p", "set top_p = 1.0")),
    Case("top_k in rl", rl("8 }", "8, top_k = 5 }"), ("stages.rl", "top_k", "top_k = 0")),
    Case(
        "pass_at too great",
        recipe("[evaluate]", "[evaluate]\npass_at = [1, 8]\nsamples_per_problem = 4"),
        ("evaluate", "pass_at = 8", "samples_per_problem >= 8"),
    ),
    Case(
        "greedy more than once",
        recipe("temperature = 0.6,", "temperature = 0,"),
        ("evaluate", "temperature 0"),
        ("--set", "evaluate.samples_per_problem=2"),
    ),
    Case(
        "micro-batch too small",
        recipe("tokens_per_microbatch = 400", "tokens_per_microbatch = 5"),
        ("stages.sft.tokens_per_microbatch = 5", "longest", "or more"),
    ),
    Case(
        "micro-batch too small for a rollout",
        rl("tokens_per_microbatch = 400", "tokens_per_microbatch = 9"),
        ("stages.rl.tokens_per_microbatch = 9", "or more"),
    ),
    Case(
        "more sequences than the stage has",
        recipe("steps = 2\nsequences_per_step = 2", "epochs = 1\nsequences_per_step = 99"),
        ("stages.sft.sequences_per_step = 99", "3 sequences"),
    ),
    Case(
        "more prompts than problems",
        rl("prompts_per_step = 2", "prompts_per_step = 98"),
        ("stages.rl.prompts_per_step = 98", "3 problems"),
    ),
    Case(
        "context too small",
        recipe('path = "tiny"', 'path = "tiny"\ncontext_length = 20'),
        ("max_new_tokens = 99", "of 20 tokens", "set max_new_tokens = "),
        ("--set", "stages.rl.sampling.max_new_tokens=99"),
    ),
    Case(
        "no demonstration fits",
        recipe('path = "tiny"', 'path = "tiny"\ncontext_length = 8'),
        ("demonstrations", "8 tokens", "model.context_length"),
    ),
    # methods and tasks
    Case(
        "unknown method",
        rl("steps = 2", 'steps = 2\nmethod = "gpro"'),
        ("stages.rl", "method = 'gpro'", "grpo"),
    ),
    Case(
        "unknown method option",
        rl("steps = 2", "steps = 2\nmethod_options = { clip = 0.2 }"),
        ("stages.rl", "method_options.clip", "clip_low"),
    ),
    Case(
        "method option of another type",
        rl("steps = 2", 'steps = 2\nmethod_options = { clip_low = "much" }'),
        ("stages.rl", "clip_low", "much"),
    ),
    Case(
        "part of a number",
        rl("steps = 2", 'steps = 2\nmethod = "dapo"\nmethod_options = { refill_rounds = 2.5 }'),
        ("stages.rl", "refill_rounds", "2.5"),
    ),
    Case(
        "method does not fit",
        rl("steps = 2", 'steps = 2\nmethod = "dft"'),
        ('stages.rl.method = "dft"', 'kind = "rl"'),
    ),
    Case(
        "unknown task",
        recipe("procedural:addition", "procedural:adition"),
        ("data.test", 'did you mean "addition"'),
    ),
    Case(
        "unknown task option",
        recipe("limit = 3", "limit = 3\noptions = { digit = 2 }"),
        ("data.test", "options.digit", 'did you mean "digits"'),
    ),
    Case(
        "unknown split",
        recipe('split = "test"', 'split = "tests"'),
        ("data.test", "split", 'did you mean "test"'),
    ),
    Case("a task has no end", recipe("limit = 3\n", ""), ("data.test.limit", "set limit = N")),
    Case(
        "no such kind of source",
        recipe("procedural:addition", "procedual:addition"),
        ("data.test.source", 'did you mean "procedural'),
    ),
    # data files and rows
    Case(
        "missing data file",
        recipe("train.jsonl", "trian.jsonl"),
        ("trian.jsonl", "no such file", "data.train.source", "did you mean", "train.jsonl"),
    ),
    Case(
        "hub id without hub:",
        recipe("train.jsonl", "openai/gsm8k"),
        ("openai/gsm8k", "data.train.source", 'did you mean "hub:openai/gsm8k"'),
    ),
    Case("bad JSON", row(2, '{"problem": "2+1=?", '), ("train.jsonl:2", "JSON")),
    Case("not an object", row(2, "[1, 2]"), ("train.jsonl:2", "JSON", "object")),
    Case(
        "wrong field type",
        row(3, '{"problem": 5, "answer": "4", "solution": "#### 4"}'),
        ("train.jsonl:3", "problem", "5"),
    ),
    Case(
        "no problem",
        row(3, '{"problm": "x", "answer": "4", "solution": "#### 4"}'),
        ("train.jsonl:3", "problem", "problm"),
    ),
    Case("missing answer", row(1, '{"problem": "1+1=?", "solution": "#### 2"}'), ("train.jsonl:1", "answer")),
    Case("missing solution", row(1, '{"problem": "1+1=?", "answer": "2"}'), ("train.jsonl:1", "solution")),
    Case(
        "duplicate ids",
        lambda f: (f / "train.jsonl").write_text(
            "".join(json.dumps({**r, "id": "same"}) + "\n" for r in ROWS)
        ),
        ("train.jsonl:2", "id", "same", "train.jsonl:1"),
    ),
    Case("empty file", lambda f: (f / "train.jsonl").write_text(""), ("train.jsonl", "empty")),
    Case("no file format", recipe("train.jsonl", "run.toml"), ("run.toml", ".jsonl")),
    Case(
        "a gold that is no number",
        row(2, '{"problem": "2+1=?", "answer": "", "solution": "#### 3"}'),
        ("train.jsonl:2", "answer"),
    ),
    Case(
        "a gold that its checker refuses",
        row(2, '{"problem": "2+1=?", "answer": "three", "solution": "#### 3", "checker": "integer"}'),
        ("train.jsonl:2", "answer", "three", "integer"),
    ),
    Case(
        "a gold that no box can contain",
        row(2, json.dumps({"problem": "2+1=?", "answer": r"\frac{3}{", "solution": "#### 3"})),
        ("train.jsonl:2", "answer", "math", "no answer found"),
    ),
    Case(
        "a special token in the text",
        row(2, '{"problem": "2+1<|end|>", "answer": "3", "solution": "#### 3"}'),
        ("train.jsonl:2", "problem", "<|end|>"),
    ),
    # models
    Case(
        "model folder missing",
        recipe('path = "tiny"', 'path = "./nowhere"'),
        ("model.path", "./nowhere", "no such folder"),
    ),
    Case(
        "folder without config",
        lambda f: (_folder("weights")(f), recipe('path = "tiny"', f'path = "{f}/weights"')(f)),
        ("model.path", "weights", "config.json"),
    ),
    Case("missing GGUF", recipe('path = "tiny"', 'path = "./m.gguf"'), ("model.path", "m.gguf")),
    # the command line
    Case("run directory taken", _taken, ("out", "--resume", "--out")),
    Case("no run directory", _not_a_run, ("out", "not a truestep run directory", "--out")),
    Case("run directory is a file", _not_writable, ("out", "--out")),
    Case("--set without =", nothing, ("--set stages.rl.steps", "KEY=VALUE"), ("--set", "stages.rl.steps")),
    Case("--set unknown stage", nothing, ("--set stages.lr.steps=5", '"lr"'), ("--set", "stages.lr.steps=5")),
    Case("--set unknown key", nothing, ("sead", 'did you mean "seed"'), ("--set", "sead=5")),
    Case("key of another table", nothing, ('did you mean "compute.threads"',), ("--set", "threads=1")),
    Case(
        "unknown key of a named table", nothing, ('did you mean "source"',), ("--set", "data.test.sourze=x")
    ),
    Case("key like no other", nothing, ("expected one of system, user, gen",), ("--set", "chat.zzz=1")),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(RECIPE)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return tmp_path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever builds a model fails."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was built before the input was checked")

    monkeypatch.setattr("truestep.model.load.load_model", never)
    monkeypatch.setattr("truestep.pipeline.models.load_model", never)


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["truestep", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "-"))
def test_bad_input_is_one_line(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case.break_it(folder)
    before = sorted(folder.rglob("*"))
    code = call(monkeypatch, "run", str(folder / case.recipe), "--out", str(folder / "out"), *case.words)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    before_it, is_error, line = err.partition("error: ")  # a command says first what it is doing
    assert is_error
    assert all(said.startswith("truestep ") for said in before_it.splitlines())
    count, *others = line.splitlines()
    assert not others or (count == f"{len(others)} faults:" and all(said.startswith("  ") for said in others))
    for words in case.expect:
        assert words in line
    assert sorted(folder.rglob("*")) == before, "something was written"


@pytest.mark.usefixtures("no_model")
def test_an_unknown_key_of_a_stage_names_the_stage_and_only_its_keys(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, other in (("rl", "sequences_per_step"), ("sft", "prompts_per_step")):
        assert call(monkeypatch, "run", str(folder / "run.toml"), "--set", f"stages.{name}.qqq=1") == 2
        line = capsys.readouterr().err.splitlines()[-1]
        listed = line.partition("expected one of ")[2].split(", ")
        assert f"stages.{name}.qqq: unknown key" in line
        assert len(listed) == len(set(listed))
        assert other not in listed
        assert {"kind", "data", "optimizer"} < set(listed)


@pytest.mark.usefixtures("no_model")
def test_the_unbroken_folder_is_accepted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every case breaks what works: without this the cases could all fail for another reason."""
    assert call(monkeypatch, "run", str(folder / "run.toml"), "--out", str(folder / "out"), "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "out")
    assert not (folder / "out").exists()


@pytest.mark.usefixtures("no_model")
def test_a_dry_run_says_what_is_not_used_or_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row(2, json.dumps({"problem": "2+1=?", "answer": "proof", "solution": "#### 3", "level": 1}))(folder)
    words = ("run", str(folder / "run.toml"), "--out", str(folder / "out"), "--dry-run", "--json")
    assert call(monkeypatch, *words) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any(note.startswith("data.train: not used") and "level (1 row)" in note for note in notes)
    assert any(note.startswith("data.train: 1 of 3 gold answers is not a number, formula") for note in notes)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("verb", ["sft", "rl", "eval"])
def test_the_other_verbs_check_as_well(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe("limit = 3", "limit = 0")(folder)
    assert call(monkeypatch, verb, str(folder / "run.toml"), "--out", str(folder / "out")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "data.test" in line
    assert "limit" in line


@pytest.mark.parametrize("name", ["missing recipe", "bad JSON", "unknown method"])
def test_bad_input_in_a_real_process(name: str, folder: Path) -> None:
    (case,) = [c for c in CASES if c.name == name]
    case.break_it(folder)
    done = subprocess.run(
        [sys.executable, "-m", "truestep", "run", case.recipe, "--out", "out"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert all(words in line for words in case.expect)
