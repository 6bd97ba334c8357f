"""``truestep data check`` and ``truestep data show``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from truestep.cli.data import app
from truestep.data.describe import not_used
from truestep.errors import UserError, count, verb
from truestep.pipeline.prepare import prepare
from truestep.settings import load_settings

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
        '{"problem": "1+1=?", "answer": 2}\n{"problem": "2+2=?", "answer": "\\\\frac{1}{"}\n'
    )
    (tmp_path / "run.toml").write_text(RECIPE)
    return tmp_path / "run.toml"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def document(result: Result) -> Any:
    return json.loads(result.stdout)


def test_check_a_file(recipe: Path) -> None:
    result = run("check", recipe.parent / "train.jsonl", "--json")
    assert result.exit_code == 0, result.output
    described = document(result)["data"]["train"]
    assert (described["num_problems"], described["num_answers"], described["num_solutions"]) == (2, 0, 2)
    counts = {"n": 0, "correct": 0, "incorrect": 0, "unscored": 0, "refused": []}
    assert described["gold"] == {**counts, "num_text_only": 0, "text_only_examples": []}
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
    assert r"test.jsonl:2: answer '\\frac{1}{' is incorrect no answer found" in text.stdout
    assert "overlap of train with test: 1 of 2 has the same text, 0 share 13 words" in text.stdout
    unjudged = run("check", recipe, "--no-gold", "--json")
    assert unjudged.exit_code == 0
    assert "gold" not in document(unjudged)["data"]["test"]


def test_check_names_texts_with_two_answers(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text('{"problem": "1+1=?", "answer": 2}\n{"problem": " 1+1=?", "answer": 3}\n')
    result = run("check", path)
    assert result.exit_code == 0
    assert f"twice: problem texts with different answers: 1, e.g. {path}:1 and {path}:2" in result.stdout


@pytest.mark.parametrize("as_json", [True, False])
def test_check_counts_all_bad_rows_and_shows_ten_faults(tmp_path: Path, as_json: bool) -> None:
    path = tmp_path / "many.jsonl"
    good, bad = '{"problem": "1+1=?", "answer": 2}\n', '{"problem": "x", "c%d": 1}\n'
    path.write_text(good + bad % 0 + "".join(bad % n for n in range(11)) + good.replace("2", "3"))
    result = run("check", path, "--no-gold", *["--json"] * as_json)
    assert isinstance(result.exception, UserError)
    assert str(result.exception).endswith("(and 11 more bad rows)")
    shown = [f"{path}:{number}: answer: expected an answer or a solution" for number in (2, *range(4, 13))]
    if as_json:
        found = document(result)["data"]["many"]
        assert (found["bad_rows"]["count"], found["num_problems"]) == (12, 2)
        lines = found["bad_rows"]["first"]
    else:
        lines = [line.partition("bad row: ")[2] for line in result.stdout.splitlines() if "bad row: " in line]
    assert len(lines) == 10
    assert all(line.startswith(expected) for line, expected in zip(lines, shown, strict=True))


def test_check_with_only_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"problem": "x"}\n[]\n')
    result = run("check", tmp_path / "bad.jsonl", "--json")
    assert isinstance(result.exception, UserError)
    assert document(result)["data"]["bad"]["bad_rows"]["count"] == 2


def test_check_and_plan_name_the_files_of_a_folder(recipe: Path) -> None:
    folder = recipe.parent / "all"
    folder.mkdir()
    (recipe.parent / "train.jsonl").rename(folder / "my_train.jsonl")
    (folder / "my_test.jsonl").write_text("not read\n")
    said = "read my_train.jsonl; not read: my_test.jsonl"
    assert said in run("check", folder).stdout
    assert said in run("check", recipe, "--set", "data.train.source=all").stdout
    found = document(run("check", folder, "--json"))["data"]["all"]
    assert (found["files"], found["files_not_read"]) == (
        [str(folder / "my_train.jsonl")],
        [str(folder / "my_test.jsonl")],
    )
    pytest.importorskip("torch", reason="the plan needs the training extra")
    from truestep.pipeline.prepare import prepare

    (recipe.parent / "test.jsonl").write_text('{"problem": "3+3=?", "answer": 6}\n')
    settings = load_settings(recipe, ["data.train.source=all", "evaluate.sampling.max_new_tokens=4"])
    assert any(note.endswith(said) for note in prepare(settings, base_dir=recipe.parent).notes)


JUNK = ["proof", "???", r"\frac{1}{", "N/A", "see solution", "$", "{", "None", "nan", "x^", "pending", "...", r"\sqrt{",
        "(A", "image.png", "-", "the answer", r"\left(1,2", "=", "[]"]  # fmt: skip
READ = ["12", "1/2", r"\frac{\pi}{2}", "(1,2)", "[0,1)", "x=5", "5 cm", r"\text{(E)}", "C", "x>3", "three", "12:30",
        "AB", r"2\sqrt{3}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "2, 3", "1011_2", r"so \boxed{7}", "x\n#### 7"]  # fmt: skip


def test_check_counts_golds_that_only_the_same_text_matches(tmp_path: Path) -> None:
    path = tmp_path / "golds.jsonl"
    lines = [json.dumps({"problem": f"{i}?", "answer": gold}) for i, gold in enumerate([*READ, *JUNK])]
    path.write_text("\n".join(lines))
    result = run("check", path, "--json")
    gold = document(result)["data"]["golds"]["gold"]
    refused = [found["answer"] for found in gold["refused"]]
    assert refused == [r"\frac{1}{", "{", r"\sqrt{"]
    assert gold["num_text_only"] == len(JUNK) - len(refused)
    assert [found["answer"] for found in gold["text_only_examples"]] == [g for g in JUNK if g not in refused][
        :10
    ]
    assert "17 of 39 gold answers are not a number, formula" in run("check", path).stdout


def test_check_refuses_a_letter_beyond_the_choices_in_any_spelling(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    bad = [
        "AD",
        "A,D",
        "$D$",
        r"\text{D}",
        r"\boxed{D}",
        "option D",
        "Answer: D",
        "**D**",
        "d)",
        "A and D",
        "green",
        "K",
    ]
    good = ["AB", "A, B", "$B$", r"\text{B}", r"\boxed{B}", "option B", "Answer: B", "(b)", "b)", "blue", "2"]
    rows = [{"problem": f"{i}?", "answer": answer, "checker": "choice", "choices": ["red", "blue"]}
            for i, answer in enumerate([*bad[:-1], *good])]  # fmt: skip
    rows.append({"problem": "11?", "answer": "twelve", "checker": "choice", "choices": list("lmnopqrstuvw")})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = document(run("check", path, "--json"))["data"]["choices"]
    assert found["bad_rows"]["count"] == 0
    assert [gold["answer"] for gold in found["gold"]["refused"]] == [*bad[:-1], "twelve"]
    reasons = {gold["reason"] for gold in found["gold"]["refused"]}
    assert any("names none of the 2 choices; write its letter, A to B" in reason for reason in reasons)
    assert any("12 choices; write its letter, A to J" in reason for reason in reasons)


def test_check_says_what_is_not_used(recipe: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "id": 1}]
    rows = [
        {
            "messages": [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}],
            "level": 1,
        },
        {"problem": "x", "solution": "y", "answer": "2", "level": None},
    ]
    (recipe.parent / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (recipe.parent / "test.jsonl").write_text(json.dumps({"problem": "x", "answer": "2", "solution": "y"}))
    found = document(run("check", recipe, "--json"))["data"]
    assert found["train"]["unused_columns"] == {"level": 1, "messages[].id": 1, "answer": 1}
    counts = ("num_dialogues", "num_trained_turns", "num_context_turns")
    assert [found["train"][key] for key in counts] == [1, 2, 0]
    assert found["test"]["unused_columns"] == {"solution": 1}
    assert found["rl"]["unused_columns"] == {}
    text = run("check", recipe).stdout
    assert "train: not used (only your own reward functions get them): " in text
    several = "is a dialogue with several assistant turns that are trained on, 2 in all"
    assert f'train: 1 of 2 rows {several} (train_turns = "all")' in text
    last = "data.train.train_turns=last"
    found = document(run("check", recipe, "--json", "--set", last))["data"]
    assert [found["train"][key] for key in counts] == [0, 0, 1]
    context = "train: earlier assistant turns of 1 row are context and are not trained on"
    assert context in run("check", recipe, "--set", last).stdout
    alone = document(run("check", recipe.parent / "train.jsonl", "--json"))["data"]["train"]
    assert alone["unused_columns"] == {"level": 1, "messages[].id": 1}


def test_show_of_one_set_or_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": f"p{n}", "answer": "1"}) + "\n" for n in range(12)))
    assert re.findall(r"p\d+", run("show", path, "--row", "1", "--data", "rows").stdout) == ["p0"]
    assert re.findall(r"p\d+", run("show", path, "--row", "12").stdout) == ["p11"]
    assert "rows has no row with this number" in str(run("show", path, "--row", "13").exception)
    assert "--data row: expected one of rows" in str(run("show", path, "--data", "row").exception)


def test_a_turn_that_nobody_answers_is_said_to_be_left_out(tmp_path: Path) -> None:
    """Only at the end of a dialogue that is trained on; an added system turn and a separate solution are none."""
    turns = [{"role": role, "content": c} for role, c in zip(("user", "assistant") * 2, "abcd", strict=True)]
    whole = [
        {"messages": turns},
        {"messages": turns[:2], "system": "x"},
        {"messages": turns[:3], "solution": "y"},
    ]
    asked = [{"messages": turns[:3]}, {"messages": turns[:3], "system": "x"}]
    said = "with a turn that no assistant's turn follows; it is left out (the first:"
    path = tmp_path / "rows.jsonl"
    for rows, expected in ((whole, ""), (whole + asked, f"2 dialogues end {said} {path}:4)")):
        path.write_text("\n".join(map(json.dumps, rows)))
        for command in ("check", "show"):
            text = run(command, path).stdout
            assert (said in text) == bool(expected)
            assert expected in text
    path.write_text(json.dumps({"messages": turns[:3], "answer": "2"}))  # a prompt
    assert said not in run("check", path).stdout


def test_a_validation_set_is_measured_and_compared_with_the_training_sets(recipe: Path) -> None:
    turns = [{"role": role, "content": c} for role, c in zip(("user", "assistant") * 2, "abcd", strict=True)]
    (recipe.parent / "train.jsonl").write_text(json.dumps({"messages": turns}))
    (recipe.parent / "held.jsonl").write_text(json.dumps({"messages": turns}))
    held = ["data.held.source=held.jsonl", 'stages.sft.validation={ data = "held", every_steps = 1 }']
    words = [word for item in held for word in ("--set", item)]
    text = run("check", recipe, *words).stdout
    for name, use in (("train", "trained on"), ("held", "measured (validation loss)")):
        several = f"{name}: 1 of 1 row is a dialogue with several assistant turns that are {use}, 2 in all"
        assert several in text
    assert "overlap of train with held: 1 of 1 has the same text" in text
    assert "overlap of train with test: 0 of 2 have the same text" in text
    pytest.importorskip("torch", reason="the tokenizer comes with the training extra")
    shown = run("show", recipe, *words).stdout
    for name, use in (("train", "trained on"), ("held", "measured (validation loss)")):
        assert re.search(rf"{name} \S+ \(\S+\): \d+ of \d+ tokens are {re.escape(use)}\n", shown)
        assert f"dialogue with several assistant turns that are {use}, 2 in all" in shown


def test_a_named_column_that_is_not_used_has_our_name(recipe: Path) -> None:
    (recipe.parent / "train.jsonl").write_text(json.dumps({"problem": "x", "solution": "y", "number": 2}))
    text = run("check", recipe, "--set", 'data.train.columns={ answer = "number" }').stdout
    assert "not used (only your own reward functions get them): number = answer (1 row)" in text


def test_answers_that_no_checker_reads_are_said_to_be_unused() -> None:
    columns = {"number": 2, "level": 1}
    read = {"own": {"answer": ["number"], "problem": ["problem"]}}
    described = {
        "columns": read,
        "unused_columns": columns,
        "num_dialogues": 0,
        "num_context_turns": 0,
        "num_left_turns": 0,
    }
    others = "not used (only your own reward functions get them): level (1 row)"
    assert not_used(described, needs={"problem", "solution"}) == [
        "the answers (number, 2 rows) are not graded, because no stage's reward has the checker; your own reward "
        "functions get them",
        others,
    ]
    assert not_used(described) == [others.replace("level", "number = answer (2 rows), level")]


OWN_REWARD = """
[[stages.rewards]]
function = "mine.py:reward"
"""


def test_answers_are_neither_graded_nor_counted_as_used_if_no_reward_has_the_checker(recipe: Path) -> None:
    (recipe.parent / "mine.py").write_text("def reward(samples):\n    return [0.0 for _ in samples]\n")
    (recipe.parent / "rl.jsonl").write_text('{"problem": "2+2=?", "answer": "\\\\frac{1}{"}\n')
    (recipe.parent / "test.jsonl").write_text('{"problem": "1+1=?", "answer": 2}\n')
    text = recipe.read_text().replace('source = "procedural:addition"\nlimit = 4', 'source = "rl.jsonl"')
    recipe.write_text(text)
    checked = run("check", recipe)
    assert checked.exit_code == 1
    assert "are not graded" not in checked.stdout
    recipe.write_text(text.replace("[evaluate]", OWN_REWARD + "[evaluate]"))
    checked = run("check", recipe)
    assert checked.exit_code == 0
    assert "rl: the answers (answer, 1 row) are not graded, because no stage's reward has" in checked.stdout
    assert "gold" not in document(run("check", recipe, "--json"))["data"]["rl"]


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
    turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)]
    (recipe.parent / "turns.jsonl").write_text(json.dumps({"messages": turns}))
    dialogue = run("show", recipe, "--set", "data.train.source=turns.jsonl").stdout
    assert "⟦b<|end|>⟧<|user|>c<|end|><|assistant|>⟦d<|end|>⟧" in dialogue
    assert result.stdout.count("tokens are trained on") == 1
    assert len(re.findall(r"\(\S+\): a prompt of \d+ tokens", result.stdout)) == 2
    examples = {e["data"]: e for e in document(run("show", recipe, "--num", "1", "--json"))["examples"]}
    assert examples["train"]["num_trained"] == len("#### 2") + 1
    assert examples["test"]["num_trained"] == 0
    for example in examples.values():
        trained = [span for span in example["spans"] if span["trained"]]
        assert all(span["role"] == "assistant" and span["text"].endswith("<|end|>") for span in trained)


@pytest.mark.parametrize(("method", "trained"), [("", False), ('method = "luffy"', True)])
def test_show_shows_a_solution_only_where_it_is_trained_on(
    method: str, trained: bool, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="the tokenizer comes with the training extra")
    never_closed = '{"problem": "1+1=?", "answer": 2, "solution": "<think>1+1=2"}\n'
    closed = never_closed.replace("1+1=2", "1+1=2</think>2")
    (tmp_path / "rl.jsonl").write_text(closed if trained else never_closed)
    (tmp_path / "test.jsonl").write_text(never_closed)
    stage = RECIPE[RECIPE.rindex("[[stages]]") :].replace("[evaluate]", f"{method}\n[evaluate]")
    sources = '[data.rl]\nsource = "rl.jsonl"\n[data.test]\nsource = "test.jsonl"\n'
    (tmp_path / "run.toml").write_text(f'name = "r"\nmodel.path = "tiny"\n{sources}{stage}')
    result = run("show", tmp_path / "run.toml", "--json")
    assert result.exit_code == 0, result.exception
    examples = {e["data"]: e["num_trained"] for e in document(result)["examples"]}
    assert (examples["rl"] > 0) == trained
    assert examples["test"] == 0


def test_reading_data_needs_neither_torch_nor_the_network() -> None:
    code = (
        "import sys, truestep.cli.data, truestep.data.chat\n"
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'datasets', 'reasoning_gym') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_validation_set_needs_solutions_and_shows_what_is_measured(recipe: Path) -> None:
    text = recipe.read_text().replace("[[stages]]", '[data.held]\nsource = "held.jsonl"\n[[stages]]', 1)
    recipe.write_text(
        text.replace('data = "train"', 'data = "train"\nvalidation = { data = "held", every_steps = 1 }')
    )
    held = recipe.parent / "held.jsonl"
    held.write_text('{"problem": "3+3=?", "solution": "6"}\n')
    shown = run("show", recipe)
    assert "held.jsonl:1): 2 of 10 tokens are measured (validation loss)\n" in shown.stdout
    assert "⟦6<|end|>⟧" in shown.stdout
    held.write_text('{"problem": "3+3=?", "answer": "6"}\n')
    for command in ("show", "check"):
        refused = run(command, recipe)
        assert "held.jsonl:1: solution: expected a worked solution, got none" in str(refused.exception)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (count(1, "row"), "1 row"), (count(0, "row"), "0 rows"), (count(1, "row", 2), "1 of 2 rows"),
        (count(1, "row", 1), "1 of 1 row"), (verb(1, "have"), "has"), (verb(0, "have"), "have"),
    ],
)  # fmt: skip
def test_one_thing_is_not_several(said: str, expected: str) -> None:
    assert said == expected


def test_check_refuses_what_the_tokenizer_refuses(recipe: Path) -> None:
    """With a recipe, rows are checked with its tokenizer; the fault has the row's own column, the turn, and the count."""
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "a — b"}]
    good = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    rows = [good, {"messages": turns}, {"messages": [{"role": "system", "content": "é"}, *good["messages"]]}]
    (recipe.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("check", recipe, "--json", "--no-gold")
    train = document(result)["data"]["train"]
    assert (train["num_problems"], train["bad_rows"]["count"]) == (1, 2)
    second, third = train["bad_rows"]["first"]
    assert (
        "train.jsonl:2: messages: turn 2 (assistant): the tokenizer does not know the character '—'" in second
    )
    assert "train.jsonl:3: messages: turn 1 (system): the tokenizer does not know the character 'é'" in third
    assert "(and 1 more bad row)" in str(result.exception)
    with pytest.raises(
        UserError, match=r"turn 2 \(assistant\).*\(and 1 more bad row; truestep data check lists them\)"
    ):
        prepare(load_settings(recipe), base_dir=recipe.parent)
    assert run("check", recipe.parent / "train.jsonl").exit_code == 0, "a file has no tokenizer"
    (recipe.parent / "train.jsonl").write_text('{"question": "é", "solution": "y"}\n')
    assert "train.jsonl:1: question: the tokenizer does not know" in str(run("check", recipe).exception)
    (recipe.parent / "train.jsonl").write_text('{"problem": "x", "solution": "y"}\n')
    told = str(run("check", recipe, "--set", "chat.system=é").exception)
    assert "train.jsonl:1: chat.system: the tokenizer does not know" in told
    (recipe.parent / "gone").mkdir()
    offline = run("check", recipe, "--no-gold", "--set", "model.path=./gone")
    assert offline.exit_code == 0, offline.output
    assert "the rows are not checked with the tokenizer: model.path" in offline.stderr


def test_show_a_file(recipe: Path) -> None:
    """As texts, or as tokens with a model; a recipe has its own model and columns."""
    file = recipe.parent / "train.jsonl"
    shown = run("show", file).stdout
    assert "user: 1+1=?\nassistant: ⟦#### 2⟧" in shown
    assert shown.count("⟦") == 2
    (plain, _) = document(run("show", file, "--json"))["examples"]
    assert [(s["role"], s["trained"]) for s in plain["spans"]] == [("user", False), ("assistant", True)]
    (tokens, _) = document(run("show", file, "--model", "tiny", "--json"))["examples"]
    assert tokens["num_trained"] == len("#### 2") + 1
    file.write_text('{"q": "1", "gold": "2"}\n')
    assert "user: 1" in run("show", file, "--column", "problem=q", "--column", "answer=gold").stdout
    for words, said in (
        (["--model", "tiny"], "--model is for data files"),
        (["--column", "a=b"], "--column applies"),
    ):
        assert said in str(run("show", recipe, *words).exception)
