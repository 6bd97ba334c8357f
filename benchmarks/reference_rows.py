"""The page docs/reference/rows.md: the rows that are read, and the files that a run writes.

The layouts and columns come from the code, the fields of files from tests/contract/documents.json. Every example of a
row is read here; every example of a file (tests/contract/examples.json) is compared with the recorded fields.
"""

from __future__ import annotations

import json
import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from truestep.data import turns
from truestep.data.layouts import _LAYOUTS
from truestep.data.row_schema import problem_of
from truestep.data.rows import READ
from truestep.data_settings import COLUMN_MEANINGS
from truestep.evaluate.own import load_own
from truestep.evaluate.pair_rows import read_pairs
from truestep.flops import Ledger
from truestep.records import Problem
from truestep.settings import DataSettings

MADE = "`python benchmarks/reference.py` writes this page from the code, and a test compares them.\n"
CONTRACT = Path(__file__).resolve().parent.parent / "tests/contract"


class Incomplete(ValueError):
    """Raised if something has no meaning or no valid example."""


def page(title: str, *parts: str) -> str:
    return "\n".join([f"# {title}\n", MADE, *(part.rstrip("\n") + "\n" for part in parts)])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def prose(text: str | None) -> str:
    """Return a docstring as one paragraph of Markdown, with links to papers."""
    plain = " ".join((text or "").replace("``", "`").split())
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", plain)


# ------------------------------------------------------------------------------------------------------ rows of data

ASKED, SAID = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
# By the layout that an example must be recognized as.
LAYOUTS: dict[str, dict[str, Any]] = {
    "truestep": {"problem": "2+2?", "answer": 4, "solution": "2+2 = 4", "id": "sum-1", "checker": "integer"},
    "prompt-completion (TRL)": {"prompt": [ASKED], "completion": [SAID]},
    "messages (OpenAI, TRL)": {"messages": [ASKED, SAID]},
    "prompt and messages (UltraChat)": {"prompt": "2+2?", "messages": [ASKED, SAID]},
    "problem and messages (NuminaMath, OpenR1)": {
        "problem": "2+2?",
        "messages": [ASKED, SAID],
        "answer": "4",
    },
    "conversation (LMSYS)": {"conversation": [ASKED, SAID]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "verl": {"prompt": [ASKED], "reward_model": {"style": "rule", "ground_truth": "4"}, "target": [SAID]},
    "Alpaca": {"instruction": "Add.", "input": "2 and 2", "output": "4", "history": [["1+1?", "2"]]},
    "Dolly": {"instruction": "Add the numbers.", "context": "2 and 2", "response": "4"},
    "question-answer": {"question": "2+2?", "answer": "4", "solution": "2+2 = 4"},
    "GSM8K": {"question": "2+2?", "answer": "2+2 = 4\n#### 4"},
    "MetaMathQA": {"query": "2+2?", "response": "4"},
    "OpenOrca": {"system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
    "OpenMathInstruct": {"problem": "2+2?", "generated_solution": "2+2 = 4", "expected_answer": "4"},
    "DeepMath": {"question": "2+2?", "final_answer": "4"},
    "AIME": {"ID": "2024-I-1", "Problem": "2+2?", "Answer": 4, "Solution": "2+2 = 4"},
    "text (TRL)": {"text": "Two and two are four."},
}
# Further rows, with what they show and, for named columns, with the key of the recipe.
FURTHER: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    (
        "a thought before the solution",
        {"problem": "2+2?", "reasoning_content": "Add them.", "solution": "4"},
        {},
    ),
    ("multiple choice", {"problem": "2+2?", "choices": ["3", "4"], "answer": "B", "checker": "choice"}, {}),
    (
        "countdown",
        {"problem": "Make 6.", "numbers": [1, 2, 3], "target": 6, "answer": "6", "checker": "countdown"},
        {},
    ),
    (
        "turns with weights: the first answer is context",
        {
            "messages": [
                ASKED,
                {**SAID, "weight": 0},
                {"role": "user", "content": "Sure?"},
                {**SAID, "train": True},
            ]
        },
        {},
    ),
    (
        "a tool",
        {
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "thinking": "I add.",
                    "tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}],
                },
                {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "4"},
                {"role": "assistant", "reasoning": "That is it.", "content": "4"},
            ],
            "tools": [{"type": "function", "function": {"name": "add"}}],
        },
        {},
    ),
    (
        "a thought in a turn",
        {"system": "Be brief.", "messages": [ASKED, {**SAID, "reasoning_content": "Add them."}]},
        {},
    ),
    (
        "named columns",
        {"q": "2+2?", "extra_info": {"gold": "4"}},
        {"columns": {"problem": "q", "answer": "extra_info.gold"}},
    ),
)
TURN_KEYS = {
    "role": "system, user, assistant or tool",
    "content": "the text, or a list of text parts",
    "from": "ShareGPT's role: system, human, gpt, function_call or observation",
    "value": "ShareGPT's content",
    "weight": "0: the assistant's turn is context and not trained on; 1 or absent: it is trained on",
    "train": "the same as truth values",
    "reasoning_content": "the thought before an assistant's turn; the template writes it",
    "reasoning": "another name of reasoning_content",
    "thinking": "another name of reasoning_content",
    "tool_calls": "calls of tools, in OpenAI's form; the arguments are an object or its JSON text",
    "tool_call_id": "which call a tool's turn answers",
    "name": "the tool, in a tool's turn",
}
KINDS = {
    ".jsonl": "one JSON object per line", ".ndjson": "the same", ".json": "a JSON array of objects, or one object per line",
    ".csv": "a header, then one row per record; all values are text, and an empty value is absent",
    ".tsv": "the same, with tabs", ".parquet": "one row per record", ".gz": "a text file of these kinds, compressed with gzip",
}  # fmt: skip
BENCHMARK_ROWS: dict[str, dict[str, Any]] = {
    "question and answer": {"question": "2+2?", "answer": "4"},
    "with a checker": {"problem": "Spell 4.", "answer": "four", "checker": "exact", "id": "spell-4"},
    "with choices": {"question": "2+2?", "choices": ["3", "4"], "answer": "B"},
    "with options": {"question": "2+2?", "options": ["A) 3", "B) 4"], "answer": "B"},
}
PAIR_ROWS: tuple[dict[str, Any], ...] = (
    {"gold": "1/2", "pred": "\\boxed{0.5}", "id": "half"},
    {"gold": "B", "pred": "(B)", "kind": "choice", "choices": ["3", "4"]},
)


def shown(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def read(row: Mapping[str, Any], **settings: Any) -> Problem:
    data = DataSettings.model_validate({"source": "rows.jsonl", **settings})
    return problem_of(dict(row), data, id="rows-1", where="rows.jsonl:1", needs=())


def reading(name: str, row: Mapping[str, Any]) -> str:
    """Return from which columns an example was read. Raises Incomplete if it has a different layout."""
    problem = read(row)
    if problem.layout != name:
        raise Incomplete(f"the example of {name} is read as {problem.layout}")
    found = {ours: theirs for ours, theirs in problem.sources.items() if theirs != (ours,)}
    other = [f"`{ours}` from {' and '.join(f'`{t}`' for t in theirs)}" for ours, theirs in found.items()]
    own = [f"`{ours}`" for ours, theirs in problem.sources.items() if theirs == (ours,)]
    return ", ".join([*own, *other])


def data_parts() -> Iterator[str]:
    known = {layout.name for layout in _LAYOUTS} | {"GSM8K"}
    if known != LAYOUTS.keys():
        raise Incomplete(f"layouts without an example, or not in the code: {sorted(known ^ LAYOUTS.keys())}")
    used = {key for row in [*LAYOUTS.values(), *(row for _, row, _ in FURTHER)] for key in row}
    if lacking := COLUMN_MEANINGS.keys() - used:
        raise Incomplete(f"columns without an example: {sorted(lacking)}")
    if TURN_KEYS.keys() != {*turns.READ_KEYS, "name"}:
        raise Incomplete(f"keys of turns: {sorted(TURN_KEYS.keys() ^ {*turns.READ_KEYS, 'name'})}")
    kinds = {suffix for name in READ for suffix in re.findall(r"\.\w+", name)}
    if kinds != KINDS.keys():
        raise Incomplete(f"kinds of files: {sorted(kinds ^ KINDS.keys())}")
    yield "## Rows of data (`[data.NAME]`)"
    yield "The columns of a row say which layout it has. [own-data.md](../how-to/own-data.md) explains how to use your own data."
    yield table(("file", "rows"), [(f"`{suffix}`", text) for suffix, text in KINDS.items()])
    yield "### Columns"
    yield 'These are our names. `columns = { OURS = "THEIRS" }` names the columns of a data set that has others.'
    yield table(("column", "meaning"), [(f"`{name}`", text) for name, text in COLUMN_MEANINGS.items()])
    yield "### Layouts"
    yield "Each with a row that is read as this layout."
    for name, row in LAYOUTS.items():
        needed = [" and ".join(f"`{c}`" for c in one.has) for one in _LAYOUTS if one.name == name]
        needs = " or ".join(needed) or "`question` and `answer`, which contains `#### ANSWER`"
        yield f"**{name}** has {needs}. Read: {reading(name, row)}.\n\n```json\n{shown(row)}\n```"
    yield "### Turns"
    yield "The keys of a turn in `messages`, `prompt` and the other columns that have turns:"
    yield table(("key", "meaning"), [(f"`{name}`", text) for name, text in TURN_KEYS.items()])
    yield "### Further rows"
    for text, row, settings in FURTHER:
        read(row, **settings)
        said = ", ".join(f'{k} = "{v}"' for k, v in settings.get("columns", {}).items())
        note = f" (`columns = {{ {said} }}`)" if said else ""
        yield f"{text[0].upper()}{text[1:]}{note}:\n\n```json\n{shown(row)}\n```"


def benchmark_parts() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "my.jsonl"
        for row in BENCHMARK_ROWS.values():
            path.write_text(shown(row) + "\n", encoding="utf-8")
            load_own(str(path), path.parent, "auto")
        path.write_text("".join(shown(row) + "\n" for row in PAIR_ROWS), encoding="utf-8")
        read_pairs(path)
    yield "## Rows of your own benchmarks"
    yield ("Every layout above with an answer can be a benchmark, and so can rows with a question, choices and an answer "
           "([own-benchmark.md](../how-to/own-benchmark.md)).")  # fmt: skip
    for text, row in BENCHMARK_ROWS.items():
        yield f"{text[0].upper()}{text[1:]}:\n\n```json\n{shown(row)}\n```"
    yield "## Rows of `truestep eval grade`"
    yield ("`gold` and `pred` are needed; a `pred` of null means that there is none. `id` (by default the number of the row), "
           '`kind` ("choice" for multiple choice) and `choices` are optional.')  # fmt: skip
    yield "```json\n" + "\n".join(shown(row) for row in PAIR_ROWS) + "\n```"


# --------------------------------------------------------------------------------------------------- files of a run

SHAPES, EXAMPLES = (
    json.loads((CONTRACT / f"{name}.json").read_text(encoding="utf-8")) for name in ("documents", "examples")
)
NAMED = tomllib.loads(Path(__file__).with_name("reference_fields.toml").read_text(encoding="utf-8"))
_KINDS = "|".join(Ledger.__dataclass_fields__)
# Names that depend on the run, and what stands for them.
COLLAPSED = (
    (r"^(sft|rl)/.+", "STAGE/KEY"), (r"(files|logs)\..+\.(bytes|sha256)$", r"\1.FILE.\2"),
    (r"^tensors\.\w+\..+\.(dtype|shape)$", r"tensors.PART.TENSOR.\1"),
    (rf"(tokens|ledger|ledger_after)\.({_KINDS})$", r"\1.KIND"), (r"^content\..+", "content.NAME"),
    (r"^versions\..+", "versions.PACKAGE"), (r"pass_at\.\d+\.", "pass_at.K."), (r"^(results|n-samples)\.test\.", r"\1.DATA."),
    (r"^parts\..+", "parts.NAME"), (r"^state\.memory\..+", "state.memory"), (r"^overlap\..+", "overlap"),
    (r"^code\..*", "code.STAGE"),
)  # fmt: skip


def fields(shape: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the type of every field in a recorded shape (tests/contract/documents.py)."""
    if isinstance(shape, dict):
        for key, value in shape.items():
            yield from fields(value, f"{path}.{key}" if path else key)
    elif isinstance(shape, list) and shape and isinstance(shape[0], dict | list):
        yield from fields(shape[0], f"{path}[]")
    else:
        yield path, _type(shape)


def _type(shape: Any) -> str:
    if isinstance(shape, list):
        return " or ".join(shape) if len(shape) > 1 else f"list of {shape[0]}s" if shape else "list"
    return {"bool": "true or false"}.get(shape, str(shape))


def collapsed(path: str) -> str:
    for pattern, name in COLLAPSED:
        path = re.sub(pattern, name, path)
    return path


def paths(value: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every field of an example, as ``fields`` does."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        yield from paths(value[0], f"{path}[]")
    else:
        yield path


def file_part(name: str, recorded: str, about: str) -> str:
    """Return the section of a file. Raises Incomplete if a field has no meaning or is not in the example."""
    shape, example = SHAPES[recorded], EXAMPLES[recorded]
    known: dict[str, tuple[str, str]] = {}
    for path, kind in fields(shape):
        path = collapsed(path)
        plain = path.removesuffix("?").replace("?.", ".")
        ends = re.split(r"\.(?![^.]*\]\.)", plain)
        text = next((t for n in range(len(ends)) if (t := NAMED["fields"].get(".".join(ends[n:])))), None)
        if text is None:
            raise Incomplete(f"{recorded}: {plain}: write its meaning in benchmarks/reference_fields.toml")
        kind = kind if known.get(plain, (kind,))[0] == kind else "table"
        known[plain] = (kind, text)
    found = {collapsed(path) for row in example for path in paths(row)}
    if found != known.keys():
        raise Incomplete(
            f"{recorded}: the example and the fields differ in {sorted(found ^ known.keys())}; run tests/contract/documents.py"
        )
    rows = [(f"`{path}`", kind, text) for path, (kind, text) in known.items()]
    lines = "\n".join(_compact(row) for row in example)
    return f"### `{name}`\n\n{about}\n\n{table(('field', 'type', 'meaning'), rows)}\n\n```json\n{lines}\n```"


def _compact(row: Mapping[str, Any]) -> str:
    """Return a row in one line if it is short, otherwise with one line per key."""
    text = shown(row)
    if len(text) <= 400:
        return text
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {shown(value)}" for key, value in row.items()) + "\n}"


def parts() -> list[str]:
    written = [file_part(**one) for one in NAMED["files"]]
    about = (
        "A run directory also has `resolved.toml` (every setting), `report.html` and, for judges, `judge.jsonl`. "
        "[guard.md](../guard.md) explains the log of the guard, [study.md](../study.md) the files of a study."
    )
    return [*data_parts(), *benchmark_parts(), "## Files of a run", about, *written]
