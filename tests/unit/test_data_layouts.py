"""The layouts in which data sets are published: each is read from a file as it is, checked, shown and trained on.

The rows are made here. Only the names of the columns, and how a file is written, are those of the field."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from truestep.cli.data import app
from truestep.data.convert import TARGETS
from truestep.data.files import absolute_source
from truestep.data.problems import load_problems
from truestep.errors import UserError
from truestep.model.tiny import tiny_model, tiny_tokenizer
from truestep.pipeline.prepare import prepare
from truestep.pipeline.run import open_run_folder
from truestep.pipeline.run import run as run_pipeline
from truestep.records import Problem
from truestep.settings import DataSettings, TinySettings, load_settings
from truestep.train.parallel import Ranks

Q, S, A = "What is 1+2?", "1+2 is 3", "3"
USER = {"role": "user", "content": Q}
REPLY = {"role": "assistant", "content": S}
TURNS = [USER, REPLY]
SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": S}]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
CALLS = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "tool", "tool_call_id": "c1", "content": "3"}, REPLY]  # fmt: skip


class Case:
    """A file of one layout: its name and rows, what it is recognized as, and what is read from it."""

    def __init__(
        self, file: str, row: dict[str, Any], layout: str, *, reads: tuple[str, str, str] = (Q, S, ""),
        unread: Sequence[str] = (), columns: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.file, self.row, self.layout, self.reads = file, row, layout, reads
        self.unread, self.columns = {*unread}, columns or {}


CASES = {
    "TRL language modeling": Case("a.jsonl", {"text": S}, "text (TRL)", reads=("", S, "")),
    "TRL conversational language modeling": Case("a.jsonl", {"messages": TURNS}, "messages (OpenAI, TRL)"),
    "TRL prompt-completion": Case("a.jsonl", {"prompt": Q, "completion": S}, "prompt-completion (TRL)"),
    "TRL conversational prompt-completion": Case(
        "a.jsonl", {"prompt": [USER], "completion": [REPLY]}, "prompt-completion (TRL)"
    ),
    "TRL for GRPO": Case("a.parquet", {"prompt": [USER], "answer": A}, "truestep", reads=(Q, "", A)),
    "OpenAI fine-tuning": Case("a.jsonl", {"messages": [SYSTEM, *TURNS]}, "messages (OpenAI, TRL)", reads=("Be brief." + Q, S, "")),
    "OpenAI with weights": Case(
        "a.jsonl", {"messages": [USER, {**REPLY, "weight": 0}, USER, {**REPLY, "weight": 1}]}, "messages (OpenAI, TRL)",
        reads=(Q + S + Q, S, ""),
    ),
    "OpenAI with tools": Case(
        "a.jsonl", {"messages": CALLS, "tools": [TOOL], "parallel_tool_calls": False}, "messages (OpenAI, TRL)",
        reads=(Q + "3", S, ""), unread=["parallel_tool_calls"],
    ),
    "OpenAI with parts": Case(
        "a.jsonl", {"messages": [{"role": "developer", "content": "Be brief."},
                                 {"role": "user", "content": [{"type": "text", "text": Q}]}, REPLY]},
        "messages (OpenAI, TRL)", reads=("Be brief." + Q, S, ""),
    ),
    "messages with thoughts": Case(
        "a.jsonl", {"messages": [USER, {**REPLY, "reasoning_content": "add them"}]}, "messages (OpenAI, TRL)"
    ),
    "Alpaca": Case(
        "a.json", {"instruction": Q, "input": "", "output": S, "text": "Below is " + Q}, "Alpaca", unread=["text"]
    ),
    "Alpaca with an input": Case(
        "a.json", {"instruction": "Add", "input": "1 and 2", "output": S}, "Alpaca", reads=("Add\n\n1 and 2", S, "")
    ),
    "Alpaca with history (LLaMA-Factory)": Case(
        "a.json", {"instruction": "And?", "input": "", "output": S, "system": "Be brief.", "history": [[Q, "3"]]},
        "Alpaca", reads=("Be brief." + Q + "3And?", S, ""),
    ),
    "MathInstruct": Case(
        "a.json", {"instruction": Q, "output": S, "source": "x.json"}, "Alpaca", unread=["source"]
    ),
    "Dolly": Case(
        "a.jsonl", {"instruction": "Add", "context": "1 and 2", "response": S, "category": "qa"}, "Dolly",
        reads=("Add\n\n1 and 2", S, ""), unread=["category"],
    ),
    "ShareGPT": Case("a.json", {"id": "x_0", "conversations": SHAREGPT}, "ShareGPT"),
    "OpenThoughts": Case(
        "a.parquet", {"system": "Be brief.", "conversations": [{"from": "user", "value": Q}, {"from": "assistant", "value": S}]},
        "ShareGPT", reads=("Be brief." + Q, S, ""),
    ),
    "ShareGPT with tools": Case(
        "a.jsonl", {"tools": json.dumps([TOOL]), "conversations": [
            SHAREGPT[0], {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"}, SHAREGPT[1]]}, "ShareGPT", reads=(Q + "3", S, ""),
    ),
    "ShareGPT that ends with a question": Case("a.jsonl", {"conversations": [*SHAREGPT, SHAREGPT[0]]}, "ShareGPT"),
    "LMSYS": Case(
        "a.parquet", {"conversation_id": "y", "model": "m", "conversation": TURNS}, "conversation (LMSYS)",
        unread=["conversation_id", "model"],
    ),
    "GSM8K": Case("a.jsonl", {"question": Q, "answer": f"{S}\n#### 3"}, "GSM8K", reads=(Q, f"{S}\n#### 3", A)),
    "MetaMathQA": Case(
        "a.json", {"query": Q, "response": S, "type": "GSM_SV", "original_question": Q}, "MetaMathQA",
        unread=["type", "original_question"],
    ),
    "MATH": Case(
        "a.jsonl", {"problem": Q, "level": "Level 1", "type": "Algebra", "solution": S}, "truestep", unread=["level", "type"]
    ),
    "NuminaMath": Case(
        "a.parquet", {"source": "synthetic", "problem": Q, "solution": S, "messages": TURNS},
        "problem and messages (NuminaMath, OpenR1)", unread=["source", "solution"],
    ),
    "OpenR1": Case(
        "a.parquet", {"problem": Q, "solution": "another one", "answer": A, "generations": [S], "messages": TURNS},
        "problem and messages (NuminaMath, OpenR1)", reads=(Q, S, A), unread=["solution", "generations"],
    ),
    "OpenR1, the reference solutions": Case(
        "a.parquet", {"problem": Q, "solution": "another one", "answer": A, "messages": TURNS},
        "problem and messages (NuminaMath, OpenR1), with named columns", reads=(Q, "another one", A),
        unread=["messages"], columns={"solution": "solution"},
    ),
    "UltraChat": Case(
        "a.jsonl", {"prompt": Q, "prompt_id": "z", "messages": TURNS}, "prompt and messages (UltraChat)",
        unread=["prompt_id"],
    ),
    "OpenMathInstruct": Case(
        "a.jsonl", {"problem": Q, "generated_solution": S, "expected_answer": A, "problem_source": "x"},
        "OpenMathInstruct", reads=(Q, S, A), unread=["problem_source"],
    ),
    "OpenOrca": Case(
        "a.jsonl", {"id": "o.1", "system_prompt": "Be brief.", "question": Q, "response": S}, "OpenOrca",
        reads=("Be brief." + Q, S, ""),
    ),
    "LIMO": Case("a.jsonl", {"question": Q, "solution": S, "answer": A}, "question-answer", reads=(Q, S, A)),
    "DeepMath": Case(
        "a.parquet", {"question": Q, "final_answer": A, "difficulty": 4.5, "r1_solution_1": S},
        "DeepMath, with named columns", reads=(Q, S, A), unread=["difficulty"], columns={"solution": "r1_solution_1"},
    ),
    "s1K": Case(
        "a.parquet", {"question": Q, "solution": "x", "cot_type": "math", "trajectory": "add them", "attempt": S},
        "question-answer, with named columns", unread=["solution", "cot_type"],
        columns={"solution": "attempt", "reasoning_content": "trajectory"},
    ),
    "AIME": Case(
        "a.csv", {"ID": "2024-I-1", "Problem": Q, "Solution": S, "Answer": "3"}, "AIME", reads=(Q, S, A)
    ),
    "verl": Case(
        "a.parquet", {"data_source": "x", "prompt": [USER], "ability": "math", "extra_info": {"index": 0},
                      "reward_model": {"style": "rule", "ground_truth": A}},
        "verl", reads=(Q, "", A), unread=["data_source", "ability", "extra_info"],
    ),
    "verl with demonstrations (LUFFY)": Case(
        "a.parquet", {"data_source": "x", "prompt": [SYSTEM, USER], "target": [REPLY],
                      "reward_model": {"style": "rule", "ground_truth": A}},
        "verl", reads=("Be brief." + Q, S, A), unread=["data_source"],
    ),
    "a spreadsheet": Case(
        "a.csv", {"question": Q, "label": A, "worked": S, "note": "easy, 1"}, "named columns", reads=(Q, S, A),
        unread=["note"], columns={"problem": "question", "answer": "label", "solution": "worked"},
    ),
    "columns inside others": Case(
        "a.jsonl.gz", {"input": {"text": Q}, "info": {"gold": 3, "worked": S}}, "named columns", reads=(Q, S, A),
        columns={"problem": "input.text", "answer": "info.gold", "solution": "info.worked"},
    ),
    "a corpus": Case("a.json.gz", {"content": S, "url": "x"}, "named columns", reads=("", S, ""), unread=["url"],
                     columns={"text": "content"}),
}  # fmt: skip


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as the suffixes of the path say."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    if kind == "json":
        text = json.dumps(list(rows), indent=2)
    elif kind == "csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue()
    else:
        text = "\n".join(map(json.dumps, rows))
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def several(row: dict[str, Any], num: int = 3) -> list[dict[str, Any]]:
    """The row, and others with other ids."""
    ids = {"id", "ID", "conversation_id", "prompt_id"} & row.keys()
    return [{**row, **{key: f"{row[key]}-{i}" for key in ids}} for i in range(num)]


def load(path: Path, needs: tuple[str, ...], **settings: Any) -> list[Problem]:
    return load_problems(
        "d", DataSettings(source=str(path), **settings), seed=0, base_dir=Path(), needs=needs
    )


def spoken(problem: Problem) -> str:
    return "".join(m.content for m in problem.messages)


TEMPLATE = (
    "{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}{% for m in messages %}"
    "{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>' }}{% if m.reasoning_content %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

RECIPE = """
name = "d"
model.path = "{model}"
compute.threads = 1
[data.d]
source = "{source}"
columns = {columns}
[[stages]]
kind = "sft"
data = "d"
steps = 3
sequences_per_step = 2
tokens_per_microbatch = 2000
optimizer.lr = 0.01
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of a few thousand parameters, whose template writes tools and thoughts."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), tiny_tokenizer()
    small = TinySettings(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny_model(small, len(tokenizer), 512, 0).save_pretrained(folder)
    return folder


def recipe(folder: Path, model: Path, source: str, columns: dict[str, str]) -> Path:
    table = "{" + ", ".join(f'{ours} = "{theirs}"' for ours, theirs in columns.items()) + "}"
    path = folder / "run.toml"
    path.write_text(RECIPE.format(model=model, source=source, columns=table))
    return path


class Silent:
    say = begin = advance = staticmethod(lambda *given: None)


def document(*words: Any) -> Any:
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output or result.exception
    return json.loads(result.stdout)


def test_there_are_thirty() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_checked_shown_and_trained_on_as_it_is(name: str, model: Path, tmp_path: Path) -> None:
    case = CASES[name]
    path = write(tmp_path / case.file, several(case.row))
    prompt, solution, _ = case.reads
    needs = ("solution",) if solution else ("answer",)
    for problem in load(path, needs, columns=case.columns):
        assert problem.layout == case.layout
        assert (spoken(problem), problem.solution or problem.text, problem.answer) == case.reads
        assert set(problem.columns) == set(case.row)
    named = [word for item in case.columns.items() for word in ("--column", "=".join(item))]
    found = document("check", path, *named)["data"]["a"]
    assert found["layouts"] == {case.layout: 3}
    assert {unread.partition("[")[0] for unread in found["unused_columns"]} == case.unread
    if not solution:
        return
    made = recipe(tmp_path, model, path.name, case.columns)
    shown = document("show", made, "--num", 1)["examples"]
    trained = "".join(span["text"] for one in shown for span in one["spans"] if span["trained"])
    assert (solution if prompt else solution[1:]) in trained  # the first token of a bare text has no context
    assert prompt[-5:] not in trained or prompt == ""
    assert document("check", made)["data"]["d"]["bad_rows"]["count"] == 0
    prepared = prepare(load_settings(made), base_dir=tmp_path)
    open_run_folder(prepared, tmp_path / "run", resume=False, rank=0)
    done = run_pipeline(prepared, tmp_path / "run", ranks=Ranks(), reporter=Silent())
    assert done["stages"][0]["steps"] == 3
    assert done["stages"][0]["tokens"]["demonstration_tokens"] >= 6 * (len(solution) - 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_is_converted_is_read_again(target: str, suffix: str, tmp_path: Path) -> None:
    """Everything that the target has a place for; ``lost`` names the rest."""
    for name, case in CASES.items():
        prompt, solution, answer = case.reads
        path, out = write(tmp_path / case.file, several(case.row)), tmp_path / f"out.{suffix}"
        named = [word for item in case.columns.items() for word in ("--column", "=".join(item))]
        command = ["convert", str(path), "--to", target, "--out", str(out), *named]
        if (target == "verl" and not answer) or (not prompt and target == "openai"):
            with pytest.raises(UserError, match=rf"{path.name}:1: (answer|text): "):
                CliRunner().invoke(app, command, catch_exceptions=False)
            continue
        dry = document(*command, "--dry-run")
        assert not out.exists()
        told = document(*command)
        assert told["first"] == dry["first"]
        needs = ("solution",) if solution else ("problem",)
        before, after = load(path, needs, columns=case.columns), load(out, needs)
        out.unlink()
        path.unlink()
        for a, b in zip(before, after, strict=True):
            assert (spoken(a), a.solution, a.text) == (spoken(b), b.solution, b.text), name
            assert b.answer == ("" if "answer" in told["lost"] else a.answer), name
            if target != "verl":
                assert turns(a) == turns(b), name
                assert a.tools == b.tools, name


def turns(problem: Problem) -> list[Any]:
    """Which turns of a dialogue are trained on, and what else they have."""
    return [[m.role, m.content, m.is_trained, dict(m.more)] for m in problem.dialogue]


# -------------------------------------------------------------------------------------------- files of every kind


KINDS: dict[str, Callable[[str], bytes]] = {
    "a.jsonl": str.encode,
    "a.ndjson": str.encode,
    "a.json": lambda text: f"[{text.strip()}]".replace("}\n{", "},\n {").encode(),
    "lines.json": str.encode,
    "a.jsonl.gz": lambda text: gzip.compress(text.encode()),
}


def lines(num: int, start: int = 0) -> str:
    return "".join(json.dumps({"problem": f"{i}+0=?", "answer": i}) + "\n" for i in range(start, start + num))


@pytest.mark.parametrize("name", KINDS)
def test_the_same_rows_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(KINDS[name](lines(3)))
    problems = load(path, ("answer",))
    assert [p.answer for p in problems] == ["0", "1", "2"]
    assert [p.row for p in problems] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert problems[0].id == f"{name.partition('.')[0]}-1"
    path.write_bytes(KINDS[name](lines(1) + '{"problem": "x"}\n' + lines(1)))
    with pytest.raises(UserError, match=rf"{name}:2: answer: the row has problem, but no answer"):
        load(path, ("answer",))


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.json", b'[{"problem": "x", "answer": 1}, {"problem": "y" "answer": 2}]', r"a\.json:2: JSON: expected"),
        ("a.json", b'[{"problem": "x", "answer": 1} {"problem": "y"}]', r"a\.json:1: JSON: expected a comma or \]"),
        ("a.json", b'[{"problem": "x", "answer": 1}', r"a\.json:1: JSON: expected a comma or \] .*, got the end"),
        ("a.json", b'[{"problem": "x", "answer": 1, "answer": 2}]', r"a\.json:1: answer: expected the key once"),
        ("a.json", b"[3]", r"a\.json:1: JSON: expected an object"),
        ("a.json", b'{"data": [1,\n2]}', r"a\.json:1: JSON: "),
        ("a.json", b"[]", r"a\.json: expected at least one row"),
        ("a.json", b'["\xff"]', r"a\.json: expected UTF-8 text, got byte 0xff"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: expected a gzip file, got one that is damaged"),
        ("a.jsonl.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], r"a\.jsonl\.gz: expected a gzip file"),
        ("a.csv", b"problem,answer\nx,1\ny,2,3\n", r"a\.csv:2: row: expected 2 values, as in the header, got 3"),
        ("a.csv", b"problem,problem\nx,1\n", r'a\.csv: .* different names, got "problem" twice'),
        ("a.csv", b'problem,answer\n"x"y,1\n', r"a\.csv: not valid CSV after row 0"),
        ("a.csv", b"problem,answer\ncaf\xe9,1\n", r"a\.csv: expected UTF-8 text, got byte 0xe9"),
        ("a.csv", b"problem,answer\nx,\n", r"a\.csv:1: answer: expected an answer, got none"),
        ("a.csv", b"problem,answer\n", r"a\.csv: expected at least one row"),
        ("a.tsv", b"problem\tanswer\nx\ty\tz\n", r"a\.tsv:1: row: expected 2 values"),
    ],
)  # fmt: skip
def test_a_damaged_file_names_the_row(name: str, raw: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=said) as caught:
        load(tmp_path / name, ("answer",))
    assert "\n" not in str(caught.value)


def test_csv_keeps_quotes_line_breaks_and_leading_zeros(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffproblem,answer,checker\r\n"1, ""2""\n3",007,exact\r\n'.encode())
    (problem,) = load(path, ("answer",))
    assert (problem.messages[0].content, problem.answer, problem.checker) == ('1, "2"\n3', "007", "exact")
    path = tmp_path / "turns.csv"
    write(path, [{"messages": json.dumps(TURNS)}])
    assert load(path, ("solution",))[0].solution == S


def test_patterns_lists_and_folders(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"part-{i}.jsonl").write_text(lines(1, i))
    (tmp_path / "other.csv").write_text("problem,answer\nx,9\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "part-0.jsonl").write_text(lines(1, 7))

    def answers(source: Any) -> list[str]:
        data = DataSettings(source=source)
        return [p.answer for p in load_problems("d", data, seed=0, base_dir=tmp_path)]

    assert answers("part-*.jsonl") == ["0", "1", "2"]
    assert answers("part-[12].jsonl") == ["1", "2"]
    assert answers("**/part-0.jsonl") == ["0", "7"]
    assert answers(["part-2.jsonl", "other.csv", "sub"]) == ["2", "9", "7"]
    assert answers(str(tmp_path)) == [
        "0",
        "1",
        "2",
    ]  # JSON lines are there, so a CSV file is not guessed to be rows
    for path in tmp_path.glob("part-*"):
        path.unlink()
    assert answers(str(tmp_path)) == ["9"]
    named = DataSettings(source=["other.csv", "no-*"])
    assert absolute_source(named, tmp_path) == (str(tmp_path / "other.csv"), "no-*")
    assert answers(absolute_source(DataSettings(source="*.csv"), tmp_path)) == ["9"]
    with pytest.raises(UserError, match=r'd\.source = "no-\*": no file matches'):
        answers("no-*")
    with pytest.raises(UserError, match=r"other\.csv is read twice"):
        answers(["other.csv", "*.csv"])
    with pytest.raises(UserError, match=r"a list can have only files, got .procedural:addition."):
        answers(["procedural:addition", "other.csv"])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt matches data\.d\.source, but is not a \.jsonl"):
        answers("*")


# -------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("row", "columns", "needs", "said"),
    [
        ({"problem": "x", "answer": "1"}, {"answer": "lable"}, "answer",
         r'a\.jsonl:1: lable: .*columns\.answer = "lable".*only problem, answer'),
        ({"problem": "x", "label": "1"}, {"answer": "lable"}, "answer", r'lable: .*did you mean "label"'),
        ({"problem": "x", "label": None}, {"answer": "label"}, "answer", r"a\.jsonl:1: label: expected an answer, got none"),
        ({"problem": "x", "label": ["1"]}, {"answer": "label"}, "answer", r"a\.jsonl:1: label: expected text or a number"),
        ({"q": 5, "answer": "1"}, {"problem": "q"}, "answer", r"a\.jsonl:1: q: expected text, got 5"),
        ({"conversations": [{"from": "human", "value": ""}]}, {}, "solution", r"a\.jsonl:1: conversations\[0\]\.value: .*empty"),
        ({"instruction": "x", "output": ""}, {}, "solution", r"a\.jsonl:1: output: expected text, got an empty string"),
        ({"problem": "x", "gold": "1"}, {}, "answer", r'has "gold"; did you mean "answer"\? Set columns = \{ answer = "gold" \}'),
        ({"problem": "x", "z": "1"}, {}, "answer", r'answer: .*the row also has z: set columns = \{ answer = "\.\.\." \}'),
        ({"a": "x", "b": "1"}, {}, "answer", r'problem: .*the row also has a, b: set columns = \{ problem = '),
        ({"text": "x"}, {}, "answer", r"text: expected a problem, got text, which only SFT can train on"),
        ({"info": {"gold": 1}, "problem": "x"}, {"answer": "info.glod"}, "answer", r"a\.jsonl:1: info: expected an answer"),
    ],
)  # fmt: skip
def test_a_wrong_column_is_named_with_the_remedy(
    row: dict[str, Any], columns: dict[str, str], needs: str, said: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=said) as caught:
        load(path, (needs,), columns=columns)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_of_a_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"problem": "x", "answer": "1"}])
    for columns, said in (
        ("anwser=x", r"columns\.anwser: .*did you mean.*answer"),
        ("answer", "OURS=THEIRS"),
    ):
        result = CliRunner().invoke(app, ["check", str(path), "--column", columns])
        assert isinstance(result.exception, UserError)
        with pytest.raises(UserError, match=said):
            raise result.exception


def test_a_named_column_wins_over_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"problem": "old", "question": "new", "answer": "1", "label": "2"}])
    (problem,) = load(path, ("answer",), columns={"problem": "question", "answer": "label"})
    assert (spoken(problem), problem.answer) == ("new", "2")
    found = document("check", path, "--column", "problem=question", "--column", "answer=label")["data"]["a"]
    assert set(found["unused_columns"]) == {"problem", "answer"}


def test_rows_of_two_layouts_are_both_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"problem": Q, "solution": S}, {"conversations": SHAREGPT}])
    assert document("check", path)["data"]["a"]["layouts"] == {"truestep": 1, "ShareGPT": 1}
    text = CliRunner().invoke(app, ["check", str(path)]).stdout
    assert "a: 1 row is read as ShareGPT: messages = conversations" in text


def test_convert_says_what_is_lost_and_does_not_overwrite(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"problem": Q, "answer": A, "solution": S, "checker": "exact"}])
    command = ["convert", str(path), "--to", "openai", "--out", str(tmp_path / "b.jsonl")]
    told = CliRunner().invoke(app, command).stdout
    assert "openai has no place for: checker (1 row)" in told
    assert "openai has no place for: answer (1 row)" in told
    for out, to, said in (
        ("b.jsonl", "openai", "exists"),
        ("c.csv", "trl", "expected a .jsonl"),
        ("c.jsonl", "x", "one of trl"),
    ):
        result = CliRunner().invoke(app, ["convert", str(path), "--to", to, "--out", str(tmp_path / out)])
        assert said in str(result.exception)
