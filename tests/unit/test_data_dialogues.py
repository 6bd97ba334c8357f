"""Dialogues, thoughts, tool calls and bare texts as tokens: what is trained on is what would have been sampled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_data_chat import MARKED, byte_level, characters, decoded
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from truestep.data.chat import check_special_tokens, completion_text, stop_token_ids
from truestep.data.demonstrations import encode_demonstrations, encode_row
from truestep.data.problems import load_problems
from truestep.errors import UserError
from truestep.pipeline.prepare import _content_hash as content_hash
from truestep.pipeline.prepare import prepare
from truestep.pipeline.run import open_run_folder
from truestep.pipeline.run import run as run_pipeline
from truestep.records import Demonstration, Origin, Problem
from truestep.settings import ChatSettings, DataSettings, load_settings
from truestep.train.parallel import Ranks

STRIPS = MARKED.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
LINE = MARKED.replace("'<|assistant|>'", "'<|assistant|>\\n'").replace(
    "m['role'] + '|>'", "m['role'] + ('|>\\n' if m['role'] == 'assistant' else '|>')"
)
DIALOGUE = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "2+3=?"},
    {"role": "assistant", "content": "<think>2, 3</think>5"},
    {"role": "user", "content": "and 5+1?"},
    {"role": "assistant", "content": "<think>5, 6</think>6"},
    {"role": "user", "content": "done"},
    {"role": "assistant", "content": "yes"},
]


def problem(folder: Path, row: dict[str, Any], needs: str = "solution", **settings: Any) -> Problem:
    path = folder / "d.jsonl"
    path.write_text(json.dumps(row))
    data = DataSettings(source=str(path), **settings)
    return load_problems("d", data, seed=0, base_dir=folder, needs=(needs,))[0]


def trained(made: Demonstration) -> list[tuple[int, int]]:
    """The bounds of the runs of trained tokens."""
    marks = [0, *(o is Origin.EXPERT for o in made.origin), 0]
    edges = [i for i in range(len(marks) - 1) if marks[i] != marks[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def sampled(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, Any]], at: int
) -> tuple[list[int], list[int]]:
    """The tokens of the prompt before turn ``at``, by transformers, and those that would have been sampled."""
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template(turns[:at], **options)
    own = tokenizer(turns[at]["content"], add_special_tokens=False)["input_ids"]
    return list(prompt), [*own, tokenizer.convert_tokens_to_ids("<|end|>")]


@pytest.mark.parametrize("make", [byte_level, characters])
@pytest.mark.parametrize(
    ("template", "chosen", "sequences"),
    [(MARKED, (2, 4, 6), 1), (STRIPS, (2, 4, 6), 3), (LINE, (2, 4, 6), 1)],
)
def test_every_trained_turn_has_the_tokens_that_would_have_been_sampled(
    make: Any, template: str, chosen: tuple[int, ...], sequences: int, tmp_path: Path
) -> None:
    tokenizer = make(template)
    made = encode_row(tokenizer, problem(tmp_path, {"messages": DIALOGUE}), ChatSettings(), 999)
    assert len(made) == sequences
    assert made[-1].problem_id == "d-1"
    assert len({d.problem_id for d in made}) == len(made)
    found = [
        (list(d.token_ids[:start]), list(d.token_ids[start:stop])) for d in made for start, stop in trained(d)
    ]
    assert found == [sampled(tokenizer, DIALOGUE, at) for at in chosen]


def test_tokens_that_merge_with_the_template_make_their_own_sequence(tmp_path: Path) -> None:
    """The second prompt has one token for two line breaks, of which the template writes one and the model the other."""
    tokenizer = byte_level(LINE)
    tokenizer.add_tokens([AddedToken("\n\n", special=False)])
    turns = [*DIALOGUE[1:2], {"role": "assistant", "content": "\n5"}, *DIALOGUE[3:5]]
    made = encode_row(tokenizer, problem(tmp_path, {"messages": turns}), ChatSettings(), 999)
    assert len(made) == 2
    for one, at in zip(made, (1, 3), strict=True):
        prompt, own = sampled(tokenizer, turns, at)
        assert list(one.token_ids) == prompt + own
        assert trained(one) == [(len(prompt), len(prompt) + len(own))]
    assert made[0].token_ids != made[1].token_ids[: len(made[0].token_ids)]


@pytest.mark.parametrize(
    ("weights", "settings", "chosen"),
    [
        ({}, {"train_turns": "last"}, (6,)),
        ({2: 0}, {}, (4, 6)),
        ({6: 0}, {}, (2, 4)),
        ({4: 0, 6: 0}, {}, (2,)),
        ({2: 1, 4: 1.0, 6: 0.0}, {}, (2, 4)),
        ({1: 0, 3: 0}, {}, (2, 4, 6)),  # the user's turns are never trained on
    ],
)
def test_weights_and_train_turns_choose_the_turns(
    weights: dict[int, float], settings: dict[str, Any], chosen: tuple[int, ...], tmp_path: Path
) -> None:
    tokenizer = characters()
    turns = [{**turn, **({"weight": weights[i]} if i in weights else {})} for i, turn in enumerate(DIALOGUE)]
    (made,) = encode_row(tokenizer, problem(tmp_path, {"messages": turns}, **settings), ChatSettings(), 999)
    texts = [decoded(tokenizer, made.token_ids[start:stop]) for start, stop in trained(made)]
    assert texts == [DIALOGUE[i]["content"] + "<|end|>" for i in chosen]
    assert trained(made)[-1][1] == len(made.token_ids)  # nothing comes after the last trained turn


def test_a_row_without_a_trained_turn_is_refused(tmp_path: Path) -> None:
    turns = [*DIALOGUE[:2], {**DIALOGUE[2], "weight": 0}]
    with pytest.raises(UserError, match=r"d\.jsonl:1: messages: .*all have the weight 0"):
        problem(tmp_path, {"messages": turns})
    with pytest.raises(UserError, match=r"d\.jsonl:1: messages: .*all have the weight 0"):
        problem(tmp_path, {"messages": [*DIALOGUE[:6], {**DIALOGUE[6], "weight": 0}]}, train_turns="last")


def test_a_dialogue_is_a_prompt_for_methods_that_sample(tmp_path: Path) -> None:
    asked = problem(tmp_path, {"messages": DIALOGUE, "answer": "6"}, needs="answer")
    assert [m.content for m in asked.messages] == [turn["content"] for turn in DIALOGUE[:6]]
    open_end = problem(tmp_path, {"messages": DIALOGUE[:4], "answer": "6"}, needs="answer")
    assert open_end.messages[-1].content == "and 5+1?"
    assert problem(tmp_path, {"messages": DIALOGUE[:4]}).solution == DIALOGUE[2]["content"]


def test_a_greeting_at_the_start_is_context(tmp_path: Path) -> None:
    turns = [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "2?"}, {"from": "gpt", "value": "3"}]
    tokenizer = characters()
    (made,) = encode_row(tokenizer, problem(tmp_path, {"conversations": turns}), ChatSettings(), 99)
    assert [decoded(tokenizer, made.token_ids[a:b]) for a, b in trained(made)] == ["3<|end|>"]


def test_one_sequence_of_two_turns_makes_the_update_of_two_sequences(tmp_path: Path) -> None:
    """Two rows that train one turn each, with the same tokens before it, have the same tokens in the loss."""
    (first, second), turns = ({**DIALOGUE[i], "content": str(i)} for i in (2, 4)), DIALOGUE[1:2]
    rows = {
        "one": [{"messages": [*turns, first, DIALOGUE[3], second]}],
        "two": [{"messages": [*turns, first]}, {"messages": [*turns, {**first, "weight": 0}, DIALOGUE[3], second]}],
    }  # fmt: skip
    weights = {}
    for name, of in rows.items():
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, of)))
        (tmp_path / "run.toml").write_text(
            'name = "d"\ncompute = { threads = 1, dtype = "float64" }\ndata.d.source = "d.jsonl"\n'
            'model = { path = "tiny", tiny = { hidden_size = 16, num_layers = 1, num_heads = 2 } }\n'
            '[[stages]]\nkind = "sft"\ndata = "d"\nsteps = 2\ntokens_per_microbatch = 200\noptimizer.lr = 0.1\n'
            f'optimizer.kind = "sgd"\noptimizer.weight_decay = 0\nsequences_per_step = {len(of)}\n'
        )
        prepared = prepare(load_settings(tmp_path / "run.toml"), base_dir=tmp_path)
        assert sum(d.origin.count(Origin.EXPERT) for d in prepared.demonstrations["d"]) == 4
        open_run_folder(prepared, tmp_path / name, resume=False, rank=0)
        run_pipeline(prepared, tmp_path / name, ranks=Ranks(), reporter=Silent())
        weights[name] = load_file(tmp_path / name / "stages/01-sft/export/model.safetensors")
    for key, value in weights["one"].items():
        torch.testing.assert_close(value, weights["two"][key], rtol=1e-9, atol=1e-12)


def test_what_is_trained_on_is_part_of_the_identity(tmp_path: Path) -> None:
    """A run of other turns, thoughts or tools is refused on resuming."""
    turns = DIALOGUE[1:5]
    found = [
        content_hash([problem(tmp_path, row, **settings)])
        for row, settings in (
            ({"messages": turns}, {}),
            ({"messages": turns}, {"train_turns": "last"}),
            ({"messages": [*turns[:3], {**turns[3], "reasoning_content": "x"}]}, {}),
            ({"messages": turns, "tools": [{"name": "f"}]}, {}),
            ({"text": "2+3=5"}, {}),
            ({"text": "2+3=6"}, {}),
        )
    ]
    assert len(set(found)) == len(found)


class Silent:
    say = begin = advance = staticmethod(lambda *given: None)


# -------------------------------------------------------------------------------------------- thoughts and tools

THINKS = MARKED.replace(
    "m['content']",
    "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m['content']",
)
OPENS = THINKS.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>' }}")
CALLS = "{% if tools %}{{ '<|system|>' + tools | tojson + '<|end|>' }}{% endif %}" + MARKED.replace(
    "m['content']", "m['content'] + ('(' + (m.tool_calls | tojson) + ')' if m.tool_calls else '')"
).replace("m['role'] + '|>'", "m['role'].replace('tool', 'user') + '|>'")


def with_thought(**more: Any) -> list[dict[str, Any]]:
    return [DIALOGUE[1], {"role": "assistant", "content": "5", **more}]


@pytest.mark.parametrize("template", [THINKS, OPENS])
def test_a_thought_is_written_by_the_template(template: str, tmp_path: Path) -> None:
    tokenizer = byte_level(template)
    beside = problem(tmp_path, {"messages": with_thought(reasoning_content="2, 3")})
    inside = problem(
        tmp_path, {"messages": [DIALOGUE[1], {"role": "assistant", "content": "<think>2, 3</think>5"}]}
    )
    (a,), (b,) = (encode_row(tokenizer, p, ChatSettings(), 99) for p in (beside, inside))
    assert (a.token_ids, a.num_prompt_tokens) == (b.token_ids, b.num_prompt_tokens)
    column = problem(
        tmp_path,
        {"problem": "2+3=?", "solution": "5", "thoughts": "2, 3"},
        columns={"reasoning_content": "thoughts"},
    )
    (c,) = encode_row(tokenizer, column, ChatSettings(), 99)
    assert (c.token_ids, c.num_prompt_tokens) == (a.token_ids, a.num_prompt_tokens)


def test_the_plain_template_writes_a_thought(tmp_path: Path) -> None:
    tokenizer = byte_level(None)
    (made,) = encode_row(
        tokenizer, problem(tmp_path, {"messages": with_thought(reasoning_content="2, 3")}), ChatSettings(), 99
    )
    assert (
        decoded(tokenizer, made.token_ids[made.num_prompt_tokens :]) == "<think>\n2, 3\n</think>\n\n5<|end|>"
    )


CALL_TURN = with_thought(tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])
SAYS_NO = THINKS.replace("'<|assistant|>'", "'<|assistant|><think>no</think>'")


@pytest.mark.parametrize(
    ("template", "row", "said"),
    [
        (MARKED, {"messages": with_thought(reasoning_content="2")}, "messages: .*template does not write reasoning_content"),
        (MARKED, {"messages": CALL_TURN}, "messages: the chat template does not write tool_calls"),
        (None, {"messages": CALL_TURN}, "messages: the chat template does not write tool_calls"),
        (MARKED, {"messages": with_thought(), "tools": [{"function": {"name": "f"}}]}, 'tools: .*not write the tool "f"'),
        (SAYS_NO, {"messages": with_thought(thinking="2")}, "messages: with thinking, .* does not continue the prompt"),
        (THINKS, {"messages": with_thought(reasoning_content="2 <|end|> 3")}, r'messages: turn 2 .*control token "<\|end\|>"'),
    ],
)  # fmt: skip
def test_what_the_template_cannot_write_is_refused(
    template: str | None, row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"d\.jsonl:1: {said}"):
        encode_row(byte_level(template), problem(tmp_path, row), ChatSettings(), 99)


def test_tool_calls_are_trained_on_and_results_are_context(tmp_path: Path) -> None:
    tokenizer = byte_level(CALLS)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [
        DIALOGUE[1], {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "five", "tool_call_id": "1"}, {"role": "assistant", "content": "5"},
    ]  # fmt: skip
    row = {"messages": turns, "tools": [{"type": "function", "function": {"name": "add"}}]}
    asked = problem(tmp_path, row)
    (made,) = encode_row(tokenizer, asked, ChatSettings(), 999)
    texts = [decoded(tokenizer, made.token_ids[a:b]) for a, b in trained(made)]
    as_object = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    assert [json.loads(texts[0].removeprefix("(").removesuffix(")<|end|>"))] == [[as_object]]
    assert texts[1:] == ["5<|end|>"]
    whole = decoded(tokenizer, made.token_ids)
    assert whole.startswith('<|system|>[{"type": "function", "function": {"name": "add"}}]<|end|>')
    assert "<|user|>five<|end|>" in whole


# -------------------------------------------------------------------------------------------- bare texts


@pytest.mark.parametrize("special", [{}, {"bos_token": "<|bos|>"}])
@pytest.mark.parametrize("limit", [999, 12, 2])
def test_every_token_of_a_text_but_the_first_is_trained_on_once(
    special: dict[str, str], limit: int, tmp_path: Path
) -> None:
    tokenizer, text = byte_level(None, **special), "First 2+3=5,\fthen we are done.\t"
    made = encode_row(tokenizer, problem(tmp_path, {"text": text}), ChatSettings(), limit)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    tokens = [t for d in made for a, b in trained(d) for t in d.token_ids[a:b]]
    assert tokens == ids[1:]
    assert all(len(d.token_ids) <= limit for d in made)
    assert made[-1].problem_id == "d-1"
    kept = encode_demonstrations(tokenizer, [problem(tmp_path, {"text": text})], ChatSettings(), limit)
    assert (kept.num_cut, kept.num_long, kept.num_split) == (limit < 999, 0, 0)


def test_a_text_with_a_special_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'd\.jsonl:1: text: .*control token "<\|end\|>"'):
        encode_row(byte_level(), problem(tmp_path, {"text": "a <|end|> b"}), ChatSettings(), 99)
    with pytest.raises(UserError, match=r"d\.jsonl:1: text: .*NUL"):
        problem(tmp_path, {"text": "a\0b"})


# -------------------------------------------------------------------------------------------- special tokens


def thinking_tokenizer() -> PreTrainedTokenizerFast:
    """As tutorials do it: the marks of a thought are added as special tokens."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<thought>", "</thought>"]}, replace_extra_special_tokens=False
    )
    return tokenizer


def test_special_tokens_are_allowed_if_the_recipe_names_them(tmp_path: Path) -> None:
    tokenizer, text = thinking_tokenizer(), "<thought>2, 3</thought>5"
    asked = problem(tmp_path, {"problem": "2+3=?", "solution": text})
    with pytest.raises(
        UserError,
        match=r'd\.jsonl:1: solution: .*"<thought>"; remove it, or allow it with chat.special_tokens',
    ):
        encode_row(tokenizer, asked, ChatSettings(), 99)
    with pytest.raises(UserError, match=r'control token "</thought>"'):
        encode_row(tokenizer, asked, ChatSettings(special_tokens=("<thought>",)), 99)
    chat = ChatSettings(special_tokens=("<thought>", "</thought>"))
    (made,) = encode_row(tokenizer, asked, chat, 99)
    own = made.token_ids[made.num_prompt_tokens :]
    assert own[0] == tokenizer.convert_tokens_to_ids("<thought>")  # one token
    assert completion_text(tokenizer, own, chat.special_tokens) == text
    assert completion_text(tokenizer, own) == "2, 35"
    check_special_tokens(tokenizer, chat, stop_token_ids(tokenizer))
    for tokens, said in (
        (("<|end|>",), '"<|end|>" ends a completion'),
        (("<no>",), '"<no>" is not an added token'),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            check_special_tokens(tokenizer, ChatSettings(special_tokens=tokens), stop_token_ids(tokenizer))
