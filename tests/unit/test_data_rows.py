"""Every kind of broken row is refused with one line that names the file, the row and the field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from truestep.data import row_schema, rows
from truestep.data.problems import load_problems
from truestep.errors import UserError
from truestep.grade import score
from truestep.records import Problem
from truestep.settings import DataSettings

GOOD = b'{"problem": "1+1=?", "answer": "2"}\n'


def load(path: Path, needs: tuple[str, ...] = ("answer",), **settings: Any) -> list[Problem]:
    return load_problems(
        "d", DataSettings(source=str(path), **settings), seed=0, base_dir=Path("/nonexistent"), needs=needs
    )


def row(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


BROKEN = {
    "not JSON": (b'{"problem": "x", answer}', "JSON", "expected a JSON object on one line"),
    "cut off": (b'{"problem": "x", "ans', "JSON", "character"),
    "an array": (b'["x", "2"]', "JSON", "expected an object"),
    "a pretty-printed array": (b"[", "JSON", "write one object per line"),
    "a bare string": (b'"x"', "JSON", "expected an object"),
    "null": (b"null", "JSON", "got nothing"),
    "bad UTF-8": (b'{"problem": "caf\xe9", "answer": "2"}', "JSON", "0xe9 at byte 17"),
    "UTF-16": ('{"problem": "x"}'.encode("utf-16"), "JSON", "UTF-8"),
    "nested too deeply": (b'{"problem": ' + b"[" * 200_000, "JSON", "too deeply"),
    "an endless number": (b'{"problem": "x", "answer": ' + b"9" * 5000 + b"}", "JSON", "4300 digits"),
    "a key twice": (b'{"problem": "x", "answer": "2", "answer": "3"}', "answer", "got it twice"),
    "no prompt": (row(answer="2"), "problem", "got none"),
    "a misspelt prompt": (row(promt="x", answer="2"), "problem", 'did you mean "prompt"'),
    "another name for it": (
        row(query="x", answer="2"), "problem", 'has "query"; did you mean "problem"? Set columns = { problem = "query" }',
    ),
    "two prompts": (row(problem="x", prompt="y", answer="2"), "prompt", "problem and prompt; keep one"),
    "a null prompt": (row(problem=None, answer="2"), "problem", "got none"),
    "a number as problem": (row(problem=5, answer="2"), "problem", "expected text, got 5"),
    "a list as problem": (row(problem=["x"], answer="2"), "problem", "expected text"),
    "an empty problem": (row(problem=" \n", answer="2"), "problem", "empty"),
    "a NUL": (row(problem="a\0b", answer="2"), "problem", "NUL character at character 2"),
    "a lone surrogate": (b'{"problem": "a\\ud800", "answer": "2"}', "problem", "surrogate U+D800 at character 2"),
    "a LaTeX command that is no escape": (rb'{"problem": "\alpha", "answer": "2"}', "JSON", r"write \\ for every \ "),
    "a form feed in an answer": (rb'{"problem": "x", "answer": "\frac{1}{2}"}', "answer", r"\frac as \f and text; write \\frac"),
    "a backspace in a problem": (rb'{"problem": "in \boxed{}", "answer": "2"}', "problem", r"U+0008 at character 4: JSON"),
    "a tab in a solution": (
        rb'{"problem": "x", "answer": "6", "solution": "2\times 3"}', "solution", r"write \\times",
    ),
    "a line break in a solution": (
        rb'{"problem": "x", "answer": "6", "solution": "2\neq 3"}', "solution", r"write \\neq",
    ),
    "a carriage return in a turn": (
        rb'{"messages": [{"role": "user", "content": "\left( \right)"}], "answer": "6"}', "JSON", r"write \\",
    ),
    "a carriage return": (
        rb'{"messages": [{"role": "user", "content": "( \right)"}], "answer": "6"}',
        "messages[0].content", r"write \\right",
    ),
    "a form feed in a column of no use": (
        rb'{"problem": "x", "answer": "6", "extra": {"a": ["\frac"]}}', "extra.a[0]", r"write \\frac",
    ),
    "a delete": (row(problem="x\x7f", answer="2"), "problem", "U+007F at character 2; remove it"),
    "a dash of another encoding": (row(problem="x \x80\x94 y", answer="2"), "problem", "U+0080 at character 3; remove"),
    "a thought beside the content": (
        row(messages=[*turns(("user", "x")), {"role": "assistant", "content": "y", "reasoning_content": "z"}]),
        "answer", "the row has messages, but no answer",
    ),
    "a turn's weight": (
        row(messages=[*turns(("user", "x")), {"role": "assistant", "content": "y", "weight": 0.5}], answer="2"),
        "messages[1].weight", "expected 0 or 1",
    ),
    "only turns of weight 0": (
        row(messages=[*turns(("user", "x")), {"role": "assistant", "content": "y", "weight": 0}], answer="2"),
        "messages", "all have the weight 0",
    ),
    "a call of an old kind": (
        row(messages=[*turns(("user", "x")), {"role": "assistant", "content": "y", "function_call": {"name": "f"}}]),
        "messages[1].function_call", "not supported",
    ),
    "a tool call": (
        row(messages=[*turns(("user", "x")), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]),
        "messages[1].tool_calls[0]", 'expected {"function"',
    ),
    "a thought without a solution": (
        row(problem="x", answer="2", reasoning_content="y"), "reasoning_content", "beside the thought",
    ),
    "tools": (row(problem="x", answer="2", tools=["f"]), "tools", "a list of tools"),
    "a tool's turn after the user's": (
        row(messages=turns(("user", "x"), ("tool", "y")), answer="2"), "messages[1].role", "after the assistant's",
    ),
    "choices without a checker": (row(problem="x", answer="A", choices=["1", "2"]), "choices", "no checker; set"),
    "a letter beyond the choices": (
        row(problem="x", answer="C", choices=["1", "2"], checker="choice"), "answer", "2 choices, got",
    ),
    "a marked letter beyond the choices": (
        row(problem="x", answer="(d) d", choices=["1", "2", "3"], checker="choice"), "answer", "3 choices, got",
    ),
    "a number beyond the choices": (
        row(problem="x", answer=0, choices=["1", "2"], checker="choice"), "answer", "from 1",
    ),
    "no answer": (row(problem="x"), "answer", "the row has problem, but no answer"),
    "turns under another name": (
        row(msgs=1), "problem", 'the row has "msgs"; did you mean "messages"? Set columns = { messages = "msgs" }',
    ),
    "turns under any name": (
        row(anwser="2", xyz=turns(("user", "x"), ("assistant", "y"))), "problem", 'columns = { messages = "xyz" }',
    ),
    "a misspelt answer": (row(problem="x", anwser="2"), "answer", 'did you mean "answer"'),
    "an empty answer": (row(problem="x", answer=""), "answer", "empty"),
    "a boolean answer": (row(problem="x", answer=True), "answer", "expected text or a number, got True"),
    "a list answer": (row(problem="x", answer=["2"]), "answer", "expected text or a number"),
    "NaN": (row(problem="x", answer=float("nan")), "answer", "finite"),
    "Infinity": (row(problem="x", answer=float("inf")), "answer", "finite"),
    "an overflowing number": (b'{"problem": "x", "answer": 1e999}', "answer", "finite"),
    "a prompt of the wrong type": (row(prompt=3, answer="2"), "prompt", "expected a list"),
    "messages as text": (row(messages="x", answer="2"), "messages", "expected a list"),
    "no turns": (row(messages=[], answer="2"), "messages", "empty list"),
    "a turn that is text": (row(messages=["x"], answer="2"), "messages[0]", "expected {"),
    "a turn without role": (row(messages=[{"content": "x"}], answer="2"), "messages[0].role", "got nothing"),
    "an unknown ShareGPT role": (
        row(messages=[{"from": "narrator", "value": "x"}], answer="2"), "messages[0].from", 'got "narrator"',
    ),
    "a ShareGPT turn without text": (
        row(messages=[{"from": "human", "text": "x"}], answer="2"), "messages[0].value", "got nothing",
    ),
    "an unknown role": (row(messages=turns(("critic", "x")), answer="2"), "messages[0].role", 'got "critic"'),
    "a misspelt role": (row(messages=turns(("User", "x")), answer="2"), "messages[0].role", 'did you mean "user"'),
    "a late system turn": (
        row(messages=turns(("user", "x"), ("system", "y")), answer="2"), "messages[1].role", "first",
    ),
    "an empty turn": (row(messages=turns(("user", "")), answer="2"), "messages[0].content", "empty"),
    "a turn of parts": (row(messages=turns(("user", [{"text": "x"}])), answer=2), "messages[0].content", "text, got"),
    "the system's turn last": (row(messages=turns(("system", "x")), answer="2"), "messages", "the system's"),
    "an answered prompt": (
        row(prompt=turns(("user", "x"), ("assistant", "y")), answer="2"), "prompt", "the assistant's",
    ),
    "only an assistant": (row(messages=turns(("assistant", "y")), answer="2"), "messages", "got none"),
    "two assistants": (
        row(messages=turns(("user", "x"), ("assistant", "y"), ("assistant", "z")), answer="2"),
        "messages", "user's turn",
    ),
    "an empty solution": (row(problem="x", answer="2", solution=""), "solution", "empty"),
    "a solution as list": (row(problem="x", answer="2", solution=["y"]), "solution", "expected text"),
    "two solutions": (
        row(messages=turns(("user", "x"), ("assistant", "y")), answer="2", solution="z"), "solution", "keep one",
    ),
    "a target of two turns": (
        row(problem="x", answer="2", target=turns(("assistant", "y"), ("user", "z"))), "target", "one assistant turn",
    ),
    "a reward model as text": (row(problem="x", reward_model="2"), "reward_model", "ground_truth"),
    "a learned reward model": (
        row(problem="x", reward_model={"ground_truth": "2", "style": "model"}), "reward_model.style", "rule",
    ),
    "a reward model without answer": (
        row(problem="x", reward_model={"style": "rule"}), "reward_model.ground_truth", "got nothing",
    ),
    "a ground truth of the wrong type": (
        row(problem="x", reward_model={"ground_truth": {"target": 3}}), "reward_model.ground_truth", "text or a number",
    ),
    "two different answers": (row(problem="x", answer="3", reward_model={"ground_truth": "2"}), "answer", "keep one"),
    "an unknown checker": (row(problem="x", answer="2", checker="maths"), "checker", 'did you mean "math"'),
    "a checker of the wrong type": (row(problem="x", answer="2", checker=["math"]), "checker", "expected one of"),
    "countdown without numbers": (row(problem="x", answer="2", checker="countdown", target=2), "numbers", "whole"),
    "countdown without target": (row(problem="x", answer="2", checker="countdown", numbers=[2]), "target", "whole"),
    "an empty id": (row(problem="x", answer="2", id=""), "id", "empty"),
    "a fractional id": (row(problem="x", answer="2", id=1.5), "id", "whole number"),
    "an id twice": (row(problem="x", answer="2", id="first"), "id", "data.jsonl:1 also has"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_row_is_named(kind: str, tmp_path: Path) -> None:
    line, field, expected = BROKEN[kind]
    path = tmp_path / "data.jsonl"
    good_with_id = row(problem="0+0=?", answer="0", id="first")
    path.write_bytes(good_with_id + b"\n\n" + line + b"\n" + GOOD)
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: {field}: "), message
    assert expected in message
    assert "\n" not in message
    assert "more bad row" not in message
    assert len(message) < len(str(path)) + 400


@pytest.mark.parametrize(("needs", "said"), [(("solution",), "to train on, got none"), ((), "got neither")])
def test_turns_without_the_assistants_are_named(needs: tuple[str, ...], said: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(row(messages=turns(("user", "x"))))
    with pytest.raises(UserError, match=f"jsonl:1: messages: expected an assistant turn .*{said}"):
        load(path, needs)
    path.write_bytes(row(problem="x"))
    with pytest.raises(UserError, match=f"jsonl:1: {'solution' if needs else 'answer'}: "):
        load(path, needs)


UNBROKEN = {
    "tabs and line breaks": row(problem="a\tb\r\nnot c\n\tnext", answer="2", solution="so\n\ttext: 2\r\nright"),
    "letters of other scripts": row(problem="é日本\u00a0\u2028x", answer="2"),
    "keys that say nothing": row(
        messages=[{"role": "user", "content": "x", "weight": None, "tool_calls": [], "reasoning_content": ""}],
        answer="2", tools=None,
    ),
    "the last choice": row(problem="x", answer="(B)", choices=["1", "2"], checker="choice"),
    "the number of a choice": row(problem="x", answer=2, choices=["1", "2"], checker="choice"),
    "the text of a choice": row(problem="x", answer="a dog", choices=["a cat", "a dog"], checker="choice"),
    "choices, but another checker": row(problem="x", answer="2", choices=["1", "2"], checker="math"),
    "empty choices": row(problem="x", answer="2", choices=[]),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNBROKEN)
def test_similar_rows_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(UNBROKEN[kind] + b"\n" + GOOD)
    assert len(load(path)) == 2


EATEN = [
    r"\tan 45", r"\tau", r"x \to 0", r"\top", r"\tag{1}", r"\times 3", r"\theta", r"\tfrac12", r"\text{cm}", r"\textbf{a}",
    r"\tbinom{3}{2}", r"\tilde x", r"\tanh x", r"\triangleq", r"\nabla f", r"x \neq 3", r"\notin A", r"\not= 3", r"a \nleq b",
    r"a \ngeq b", r"\right)", r"\rho", r"\rangle", r"{\rm d}", r"\root 3", r"\frac12", r"\beta", r"\boxed{3}", r"{\nu}",
    r"x_\nu", r"(\neg p)",
]  # fmt: skip


@pytest.mark.parametrize("latex", EATEN)
def test_a_command_that_json_has_eaten_is_refused(latex: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    command = next(part for part in latex.split("\\") if part[:1] in "bfnrt")
    for text in (f"What is ${latex}$?", f"Let \\\\( {latex} \\\\)."):
        path.write_text(f'{{"problem": "{text}", "answer": "2"}}')
        with pytest.raises(UserError, match=rf"data\.jsonl:1: problem: .*{re.escape(command[:2])}"):
            load(path)
        path.write_text(row(problem=text.replace("\\\\", "\\"), answer="2").decode())
        assert load(path)


@pytest.mark.parametrize("latex", [*EATEN, r"2\tan x", r"\nu", r"\ne 3"])
def test_an_answer_with_an_eaten_command_is_refused(latex: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"problem": "x", "answer": "{latex}"}}')
    with pytest.raises(UserError, match=r"data\.jsonl:1: answer: "):
        load(path)
    path.write_bytes(row(problem="x", answer=latex))
    assert load(path)[0].answer == latex


@pytest.mark.parametrize(
    "text",
    [
        "name\textra fee\nA\t3", "part\texternal\textension", "a\tfraction", "one\tan apple\top\to", "so\nu = 2\nexists",
        "$$\nu = 3\ni = 2$$", "x\nnot so\nneither\nnorth", "red\ttext\ttimes\nblue\tthe", "old\rmore\rrules",
        "$x =\nu$ or\nless than $5",
        "x\ttax\ttop\n\tto", "egg\negg\note\nother",
        "a\nsubset of b\textra {c}",
    ],
)  # fmt: skip
def test_a_tab_or_line_break_before_a_word_is_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(row(problem=text, answer="2", solution=text))
    assert load(path)[0].messages[0].content == text


def test_an_answer_of_several_lines_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(row(problem="x", answer="x = 1\nu = 2"))
    assert load(path)[0].answer == "x = 1\nu = 2"


COLOURS = ["red", "blue", "2", "Green"]


@pytest.mark.parametrize(
    ("answer", "choices", "read"),
    [
        ("B", COLOURS, "B"), ("(b)", COLOURS, "(b)"), ("B. blue", COLOURS, "B. blue"), ("option B", COLOURS, "option B"),
        (1, COLOURS, "A"), (4.0, COLOURS, "D"), ("4.0", COLOURS, "D"), (" blue ", COLOURS, "B"), ("GREEN", COLOURS, "D"),
        (4, ["5", "4"], "B"), (2, ["3", "2"], "B"), ("A", ["A", "B"], "A"), ("x", ["x", "y"], "A"), ("AC", COLOURS, "AC"),
        ("2.5", ["1.5", "2.5"], "B"),
    ],
)  # fmt: skip
def test_the_number_or_text_of_a_choice_is_its_letter(
    answer: Any, choices: list[str], read: str, tmp_path: Path
) -> None:
    assert load(with_choices(tmp_path, answer, choices))[0].answer == read


def with_choices(folder: Path, answer: Any, choices: list[str]) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(row(problem="x", answer=answer, choices=choices, checker="choice"))
    return path


@pytest.mark.parametrize(
    ("answer", "choices", "said"),
    [
        (2, COLOURS, "can mean B and C"), ("A", ["B", "A"], "can mean A and B"), ("red", ["red", "Red"], "can mean A and B"),
        (5, COLOURS, "4 choices"), (0, COLOURS, "4 choices"), (-1, COLOURS, "4 choices"), (2.5, COLOURS, "4 choices"),
        ("3.0", ["1", "2"], "2 choices"),
    ],
)  # fmt: skip
def test_a_number_of_two_choices_or_of_none_is_refused(
    answer: Any, choices: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"data\.jsonl:1: answer: .*{said}"):
        load(with_choices(tmp_path, answer, choices))


def test_row_over_the_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 2**20)
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + row(problem="x" * 3 * 2**20, answer="2") + b"\n" + b"nonsense\n")
    with pytest.raises(
        UserError,
        match=r"data\.jsonl:2: row: expected a row of at most 1 MB.*and 1 more bad row; truestep data check lists them\)",
    ):
        load(path)
    path.write_bytes(row(problem="x" * 2**19, answer="2") + b"\n" + GOOD)
    assert len(load(path)) == 2


def test_other_bad_rows_are_counted_and_nothing_is_returned(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + row(problem="x") + b"\n" + b"{\n" + GOOD + row(answer="1") + b"\n")
    with pytest.raises(
        UserError, match=r"data\.jsonl:2: answer: .*\(and 2 more bad rows; truestep data check lists them\)$"
    ):
        load(path)


def test_needs_decides_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(row(problem="x", solution="so y") + b"\n")
    assert load(path, needs=("solution",))[0].answer == ""
    assert load(path, needs=())[0].solution == "so y"
    with pytest.raises(UserError, match=r":1: answer: "):
        load(path, needs=("solution", "answer"))
    path.write_bytes(row(problem="x", answer="y", soluton="z") + b"\n")
    with pytest.raises(UserError, match=r':1: solution: .*has "soluton"; did you mean "solution"'):
        load(path, needs=("solution",))
    path.write_bytes(row(problem="x") + b"\n")
    with pytest.raises(UserError, match=r":1: answer: expected an answer or a solution, got neither"):
        load(path, needs=())


def test_bom_crlf_blank_lines_and_a_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n  \n" + GOOD.rstrip())
    problems = load(path)
    assert [p.id for p in problems] == ["data-1", "data-4"]
    assert [p.row for p in problems] == [f"{path}:1", f"{path}:4"]
    assert problems[0].messages[0].content == "1+1=?"


@pytest.mark.parametrize(
    ("given", "text"),
    [(3, "3"), (3.0, "3"), (0.1, "0.1"), (1e-5, "0.00001"), (-2.5, "-2.5"), (1e22, "1" + "0" * 22), (" 1/2", " 1/2"),
     (10**400, "1" + "0" * 400), (1e23, "1" + "0" * 23), (123456789.125, "123456789.125")],
)  # fmt: skip
def test_answers_become_plain_text(given: Any, text: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(row(problem="x", answer=given))
    assert load(path)[0].answer == text


@pytest.mark.parametrize(
    ("literal", "text"),
    [("3.14159265358979323846", None), ("12345678901234567890.5", None), ("0.1000000000000000055511151231257827", None),
     ("-12345678901234567890.0", "-12345678901234567890"), ("1.50", "1.5"), ("0.1", None), ("1.5E3", "1500"),
     ("1234567890.123456789E3", "1234567890123.456789")],
)  # fmt: skip
def test_a_number_keeps_the_digits_that_are_written(literal: str, text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [f'{{"problem": "x", "answer": {literal}, "other": {literal}}}',
             f'{{"problem": "x", "reward_model": {{"ground_truth": {literal}}}}}']  # fmt: skip
    path.write_text("\n".join(lines))
    problems = load(path)
    assert [p.answer for p in problems] == [text or literal] * 2
    assert type(problems[0].columns["other"]) is float  # for reward functions


@pytest.mark.parametrize("literal", ["1e999", "1e-999", "1e999999999", "1e-999999999"])
def test_a_number_out_of_range_is_refused(literal: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"problem": "x", "answer": {literal}}}')
    with pytest.raises(UserError, match=r"data\.jsonl:1: answer: expected a finite number"):
        load(path)


def test_every_shape_of_a_good_row(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    chat = turns(("system", "s"), ("user", "u"))
    lines = [
        row(problem="p", answer=2, difficulty=float("nan"), source={"any": [1]}),
        row(prompt="p", answer="2", solution="s", checker="exact", id=7),
        row(
            prompt=chat,
            reward_model={"ground_truth": 2, "style": "rule-math"},
            target=turns(("assistant", "t")),
        ),
        row(messages=[*chat, *turns(("assistant", "a"), ("user", "v"), ("assistant", "b"))], answer="2"),
        row(problem="p", answer="3*8", checker="countdown", numbers=[3, 8], target=24),
    ]
    path.write_bytes(b"\n".join(lines))
    bare, exact, verl, multi, countdown = load(path)
    assert (bare.answer, bare.checker, bare.solution, dict(bare.meta)) == ("2", "math", "", {})
    assert (exact.id, exact.checker, exact.solution, dict(exact.meta)) == ("7", "exact", "s", {})
    assert (verl.answer, verl.solution, [m.role for m in verl.messages]) == ("2", "t", ["system", "user"])
    assert verl.meta["turns_given"]
    assert (multi.solution, [m.content for m in multi.messages]) == ("b", ["s", "u", "a", "v"])
    assert countdown.meta == {"numbers": [3, 8], "target": 24}
    assert {p.checker for p in load(path, checker="exact")} == {"exact"}


def test_a_row_may_name_every_checker_that_there_is() -> None:
    assert set(row_schema.CHECKERS) == set(score.CHECKERS)


def write_parquet(path: Path, table: dict[str, Any]) -> Path:
    pq.write_table(pa.table(table), path)
    return path


def test_parquet_is_read_as_jsonl_is(tmp_path: Path) -> None:
    columns = {
        "prompt": [turns(("user", "a")), turns(("system", "s"), ("user", "b"))],
        "reward_model": [{"ground_truth": "1", "style": "rule"}, {"ground_truth": "2", "style": "rule"}],
        "target": [turns(("assistant", "x")), turns(("assistant", "y"))],
        "ignored": [float("nan"), 1.0],
    }
    path = write_parquet(tmp_path / "data.parquet", columns)
    as_jsonl = tmp_path / "data.jsonl"
    as_jsonl.write_bytes(b"\n".join(row(**{k: v[i] for k, v in columns.items()}) for i in range(2)))
    strip = [(p.id, p.messages, p.answer, p.solution, p.meta) for p in load(path)]
    assert strip == [(p.id, p.messages, p.answer, p.solution, p.meta) for p in load(as_jsonl)]
    assert load(path)[1].row == f"{path}:2"


def test_broken_parquet_rows_are_named(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", {"problem": ["x", "y", None], "answer": [1.5, float("nan"), 2.0]}
    )
    with pytest.raises(
        UserError,
        match=r"a\.parquet:2: answer: .*finite.*and 1 more bad row; truestep data check lists them\)",
    ):
        load(path)
    not_text = pa.Array.from_buffers(pa.binary(), 2, pa.array([b"ok", b"\xff"]).buffers()).view(pa.string())
    path = write_parquet(tmp_path / "b.parquet", {"problem": not_text, "answer": ["1", "2"]})
    with pytest.raises(UserError, match=r"b\.parquet:2: problem: expected UTF-8"):
        load(path)


def test_parquet_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"data\.parquet: expected a parquet file"):
        load(path)
    write_parquet(path, {"problem": pa.array([], pa.string()), "answer": pa.array([], pa.string())})
    with pytest.raises(UserError, match=r"data\.parquet: expected at least one row"):
        load(path)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_numbers_of_a_column_are_the_shortest_in_its_type(kind: Any, tmp_path: Path) -> None:
    import numpy as np

    numbers = np.array([0.1, 3.3, 2.5, -1e-3, 7.0], dtype=kind.to_pandas_dtype())
    answers = pa.array(numbers, kind)
    inside = pa.StructArray.from_arrays([answers], ["ground_truth"])
    texts = ["0.1", "3.3", "2.5", "-0.001", "7"]
    for name, column in (("answer", answers), ("reward_model", inside)):
        path = write_parquet(tmp_path / f"{name}.parquet", {"problem": ["x"] * 5, name: column})
        assert [p.answer for p in load(path)] == texts
