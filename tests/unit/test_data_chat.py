"""Prompts and demonstrations as tokens: one prefix, the right roles, a stop token that is trained, nothing
doubled."""

from __future__ import annotations

import functools
import json
import signal
import types
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from truestep.data import template as rendering
from truestep.data.chat import (
    completion_text,
    encode_demonstration,
    encode_prompt,
    has_chat_template,
    prompt_roles,
    stop_token_ids,
)
from truestep.data.demonstrations import encode_demonstrations
from truestep.data.problems import load_problems
from truestep.data.procedural import make_problem
from truestep.errors import UserError
from truestep.records import Message, Problem, Role
from truestep.settings import ChatSettings, DataSettings, settings_hash

MARKED = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKING = MARKED.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>\\n' }}")
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|bos|>", "<|unk|>"]
TEXT = "Work out 2+3 step by step. First 2+3=5, then we are done.\n#### 5\nPut the answer after four signs. é日 <think>"


@functools.cache
def trained_backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    return str(backend.to_str())


def byte_level(template: str | None = MARKED, **special: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(trained_backend())
    return wrapped(backend, template, **{"eos_token": "<|end|>", "pad_token": "<|pad|>", **special})


def characters(template: str | None = MARKED) -> PreTrainedTokenizerFast:
    names = [*SPECIAL, *sorted(set("0123456789+-*/=?(), >#\nabcdefghijklmnopqrstuvwxyz <"))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return wrapped(backend, template, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unk|>")


def wrapped(backend: Tokenizer, template: str | None, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=SPECIAL[2:5], chat_template=template, **special
    )


def problem(*, text: str = "2+3=?", solution: str = "2+3=5\n#### 5", **fields: Any) -> Problem:
    fields = {"messages": (Message(role="user", content=text),), "row": "data.jsonl:7", **fields}
    return Problem(id="p", answer="5", solution=solution, **fields)


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


CHATS = [
    ChatSettings(),
    ChatSettings(system="be brief"),
    ChatSettings(user="do {problem} now", generation_suffix="<think>\n"),
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [MARKED, THINKING, None])
@pytest.mark.parametrize("make", [byte_level, characters])
def test_demonstration_is_the_prompt_then_solution_then_stop(
    make: Any, template: str | None, chat: ChatSettings
) -> None:
    tokenizer = make(template)
    prompt = encode_prompt(tokenizer, problem(), chat)
    opens = decoded(tokenizer, prompt.token_ids).endswith("<think>\n")
    solution = "2+3=5</think>\n#### 5" if opens else "2+3=5\n#### 5"
    demonstration = encode_demonstration(tokenizer, problem(solution=solution), chat)
    n = demonstration.num_prompt_tokens
    assert demonstration.token_ids[:n] == prompt.token_ids
    assert decoded(tokenizer, demonstration.token_ids[n:]) == f"{solution}<|end|>"
    assert demonstration.token_ids[-1] == tokenizer.eos_token_id
    assert demonstration.token_ids[-1] in stop_token_ids(tokenizer)
    roles = prompt_roles(tokenizer, problem(), chat)
    assert len(roles) == n
    assert Role.ASSISTANT not in roles


@pytest.mark.parametrize("make", [byte_level, characters])
def test_prompt_is_what_the_template_writes(make: Any) -> None:
    tokenizer = make()
    chat = ChatSettings(system="be brief", user="work out {problem}")
    expected = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "work out 2+3=?"}]
    ids = tokenizer.apply_chat_template(
        expected, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(encode_prompt(tokenizer, problem(), chat).token_ids) == ids


def test_generation_suffix_ends_the_prompt_and_is_not_doubled() -> None:
    chat = ChatSettings(generation_suffix="<think>\n")
    tokenizer = byte_level()
    plain = encode_demonstration(tokenizer, problem(solution="2+3=5</think>5"), chat)
    thought = "<think>\n2+3=5</think>5"
    assert encode_demonstration(tokenizer, problem(solution=thought), chat) == plain
    assert decoded(tokenizer, plain.token_ids[: plain.num_prompt_tokens]).endswith("<|assistant|><think>\n")
    by_template = encode_demonstration(byte_level(THINKING), problem(solution=thought), ChatSettings())
    assert decoded(tokenizer, by_template.token_ids) == decoded(tokenizer, plain.token_ids)
    kept = encode_demonstration(tokenizer, problem(solution=thought), ChatSettings())
    assert decoded(tokenizer, kept.token_ids).endswith(f"<|assistant|>{thought}<|end|>")


ANSWERED = "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
OWN_BLOCK = THINKING.replace("{{ '<|' + m", ANSWERED.join(["{{ '<|' + m['role'] + '|>' }}", "{{ m"])).replace(
    "m['role'] + '|>' + m['content']", "m['content']"
)


@pytest.mark.parametrize(
    "template", [THINKING, OWN_BLOCK], ids=["opens a thought", "and writes an empty one"]
)
@pytest.mark.parametrize("start", ["", "<think>", "<think>\n", "\n<think>\n", " <think>"])
def test_a_thought_is_opened_once(template: str, start: str) -> None:
    tokenizer = byte_level(template)
    made = encode_demonstration(tokenizer, problem(solution=f"{start}2+3=5</think>5"), ChatSettings())
    assert decoded(tokenizer, made.token_ids).endswith("<|assistant|><think>\n2+3=5</think>5<|end|>")


def test_a_tag_that_the_problem_ends_with_is_not_an_opened_thought() -> None:
    for template in (None, MARKED):
        asked = problem(text="Begin with <answer>", solution="<answer>5</answer>")
        made = encode_demonstration(byte_level(template), asked, ChatSettings())
        assert decoded(byte_level(), made.token_ids).endswith("<answer>5</answer><|end|>")


@pytest.mark.parametrize(
    ("template", "suffix", "solution"),
    [
        (THINKING, "", "2+3=5\n#### 5"),
        (MARKED, "<think>\n", "2+3=5\n#### 5"),
        (None, "<think>", "<think>5"),
        (MARKED, "", "<think>2+3=5\n#### 5"),
        (MARKED, "", "<think>2</think> 3 <think> 5"),
    ],
)
def test_a_thought_that_is_never_closed_is_refused(template: str | None, suffix: str, solution: str) -> None:
    chat = ChatSettings(generation_suffix=suffix)
    with pytest.raises(
        UserError, match=r"data\.jsonl:7: solution: the thought .* never closed.*write </think>"
    ):
        encode_demonstration(byte_level(template), problem(solution=solution), chat)
    encode_demonstration(byte_level(template), problem(solution=solution + "</think>5"), chat)


def test_a_template_without_a_generation_prompt_keeps_the_assistants_header() -> None:
    deaf = MARKED.partition("{% if add_gen")[0]
    with_block = deaf.replace(
        "m['content']", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']"
    )
    for template in (deaf, with_block):
        tokenizer = byte_level(template)
        assert encode_prompt(tokenizer, problem(), ChatSettings()) == encode_prompt(
            byte_level(), problem(), ChatSettings()
        )
        made = encode_demonstration(tokenizer, problem(), ChatSettings())
        assert made == encode_demonstration(byte_level(), problem(), ChatSettings())
        roles = prompt_roles(tokenizer, problem(), ChatSettings())
        assert roles == prompt_roles(byte_level(), problem(), ChatSettings())


def test_a_header_that_only_answers_have_is_refused() -> None:
    channel = MARKED.replace("'|>' + m", "'|>' + ('<|final|>' if m['role'] == 'assistant' else '') + m")
    with pytest.raises(UserError, match=r"data\.jsonl:7: messages: .*writes '<\|final\|>' before an answer"):
        encode_demonstration(byte_level(channel), problem(), ChatSettings())
    assert encode_prompt(byte_level(channel), problem(), ChatSettings())
    made = encode_demonstration(byte_level(channel), problem(), ChatSettings(generation_suffix="<|final|>"))
    assert decoded(byte_level(), made.token_ids).endswith("<|assistant|><|final|>2+3=5\n#### 5<|end|>")


def test_the_date_is_the_recipes_and_not_todays() -> None:
    tokenizer = byte_level("{{ strftime_now('%d %b %Y') }}" + MARKED)
    for chat, words in ((ChatSettings(), "26 Jul 2024"), (ChatSettings(date="2023-02-01"), "01 Feb 2023")):
        assert decoded(tokenizer, encode_prompt(tokenizer, problem(), chat).token_ids).startswith(
            words + "<|user|>"
        )
    assert settings_hash(ChatSettings(date="2023-02-01")) != settings_hash(ChatSettings())
    for date in ("today", "2024-13-01", "26 Jul 2024"):
        with pytest.raises(ValueError, match="YYYY-MM-DD"):
            ChatSettings(date=date)


@pytest.mark.parametrize(
    ("loop", "match"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "too large to render"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "does not end within",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too large to render"),
        ("{{ 1 // 0 }}", "refuses these turns"),
        ("{{ messages[99]['role'] + 1 }}", "refuses these turns"),
        ("{{ [].pop() }}", "refuses these turns"),
    ],
)
def test_templates_without_an_end(loop: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError, match=f"data.jsonl:7: messages: .*{match}"):
        encode_prompt(byte_level(loop + MARKED), problem(), ChatSettings())
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_control_tokens_are_more_than_the_special_ones() -> None:
    tokenizer = byte_level(MARKED.replace("'|>' + m", "'|>' + ('[TURN]' if m['role'] == 'user' else '') + m"))
    tokenizer.add_tokens([AddedToken("<eot>", special=True), AddedToken("<tool>", special=False)])
    assert "<eot>" not in tokenizer.all_special_tokens
    for text in ("<eot>", "[TURN]", "<|user|>"):
        with pytest.raises(UserError, match=r"data\.jsonl:7: (problem|solution): .*control token"):
            encode_demonstration(tokenizer, problem(solution=f"5 {text}"), ChatSettings())
        with pytest.raises(UserError, match=r"data\.jsonl:7: problem: .*control token"):
            encode_prompt(tokenizer, problem(text=f"5 {text}"), ChatSettings())
    for text in (
        "<tool>",
        "[OTHER]",
        "<think></think>",
        "<answer>",
        "<|other|>",
    ):  # the template writes none of them
        encode_demonstration(tokenizer, problem(text=text, solution=f"5 {text}"), ChatSettings())


def test_roles_say_who_wrote_each_token() -> None:
    tokenizer = characters()
    turns = (
        Message(role="system", content="sys"), Message(role="user", content="aa"),
        Message(role="assistant", content="bb"), Message(role="user", content="cc"),
    )  # fmt: skip
    given = problem(messages=turns, solution="dd", meta={"turns_given": True})
    chat = ChatSettings(system="other", user="not used: {problem}")
    demonstration = encode_demonstration(tokenizer, given, chat)
    written: dict[Role, str] = dict.fromkeys(Role, "")
    n = demonstration.num_prompt_tokens
    for token, role in zip(demonstration.token_ids[:n], prompt_roles(tokenizer, given, chat), strict=True):
        written[role] += decoded(tokenizer, [token])
    assert written[Role.SYSTEM] == "sys"
    assert written[Role.USER] == "aacc"
    assert written[Role.ASSISTANT] == "bb"
    marks = [
        "<|system|>",
        "<|end|>\n<|user|>",
        "<|end|>\n<|assistant|>",
        "<|end|>\n<|user|>",
        "<|end|>\n<|assistant|>",
    ]
    assert written[Role.TEMPLATE] == "".join(marks)
    assert (
        decoded(tokenizer, demonstration.token_ids[n:]) == "dd<|end|>"
    )  # the earlier assistant turn is context


def test_roles_cover_bytes_that_share_a_character_and_the_suffix() -> None:
    tokenizer, chat = byte_level(), ChatSettings(generation_suffix="<think>\n")
    asked = problem(text="日本 2+3")
    prompt, roles = encode_prompt(tokenizer, asked, chat), prompt_roles(tokenizer, asked, chat)
    assert len(roles) == len(prompt.token_ids)
    users = [t for t, role in zip(prompt.token_ids, roles, strict=True) if role is Role.USER]
    assert decoded(tokenizer, users) == "日本 2+3"


def test_roles_where_the_template_strips_or_leaves_out() -> None:
    chat = ChatSettings(system="sys")
    stripping = byte_level(MARKED.replace("m['content']", "m['content']|trim"))
    asked = problem(text=" system\n")
    prompt = encode_prompt(stripping, asked, chat)
    pairs = list(zip(prompt.token_ids, prompt_roles(stripping, asked, chat), strict=True))
    assert decoded(stripping, [t for t, role in pairs if role is Role.USER]) == "system"
    deaf = byte_level(MARKED.replace("for m in messages", "for m in messages if m['role'] != 'system'"))
    assert set(prompt_roles(deaf, asked, chat)) == {Role.TEMPLATE}


SYSTEM_LAST = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ '<|' + m['role'] + '|>' }}{% if loop.last %}"
    "{{ messages[0]['content'] + '\\n\\n' }}{% endif %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)
WITHOUT_THOUGHTS = MARKED.replace("m['content']", "m['content'].split('</think>')[-1].strip()")
TURNS = (
    Message(role="system", content="be brief and careful"), Message(role="user", content="What is\n1+1?"),
    Message(role="assistant", content="<think>so</think>\n\nIt is 2."), Message(role="user", content="And 2+3?"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        (MARKED.replace("for m in messages", "for m in messages if m['role'] != 'system'"), "1 .system"),
        (MARKED.replace("for m in messages", "for m in messages[-1:]"), "1 .system"),
        (MARKED.replace("for m in messages", "for m in messages[:3]"), "4 .user"),
        (MARKED.replace("m['content']", "m['content'][:10]"), "1 .system"),
        (MARKED.replace("m['content']", "m['content']|upper"), "1 .system"),
        (MARKED.replace("m['content']", "m['content'].split('\\n')|join(' ')"), "2 .user"),
        (MARKED.replace("m['content']", "m['content']|tojson"), "2 .user"),
        (MARKED.replace("m['content']", "m['content']|replace('so', '')"), None),
        (MARKED.replace("m['content']", "m['content']|replace('It', '')"), "3 .assistant"),
        ("be brief and careful What is\n1+1? It is 2. And 2+3?", "1 .system"),
        ("Hello", "1 .system"),
        ("", "1 .system"),
        (MARKED, None),
        (SYSTEM_LAST, None),
        (WITHOUT_THOUGHTS, None),
        (MARKED.replace("m['content']", "m['content']|trim"), None),
    ],
)
def test_a_template_writes_the_text_of_every_turn(template: str, turn: str | None) -> None:
    asked = problem(messages=TURNS, meta={"turns_given": True})
    if turn is None:
        assert encode_prompt(byte_level(template), asked, ChatSettings())
        return
    for encode in (encode_prompt, encode_demonstration):
        with pytest.raises(UserError, match=rf"data\.jsonl:7: messages: .* text of turn {turn}"):
            encode(byte_level(template), asked, ChatSettings())


def test_a_system_turn_of_the_recipe_is_one_of_the_turns() -> None:
    deaf = byte_level(MARKED.replace("for m in messages", "for m in messages if m['role'] != 'system'"))
    assert encode_prompt(deaf, problem(), ChatSettings())
    with pytest.raises(UserError, match=r"data\.jsonl:7: messages: .* text of turn 1 .system"):
        encode_prompt(deaf, problem(), ChatSettings(system="user"))  # which the template also writes


def test_a_template_with_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.jsonl:7: messages: .*surrogates not allowed"):
        encode_prompt(byte_level("\ud800" + MARKED), problem(), ChatSettings())


def test_a_template_that_needs_a_system_turn_has_stop_tokens_and_a_header() -> None:
    needs = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + MARKED
    chat = ChatSettings(system="be brief")
    for template in (needs, needs.partition("{% if add_gen")[0]):
        tokenizer = byte_level(template, eos_token="<|bos|>")
        assert stop_token_ids(tokenizer) == stop_token_ids(byte_level(eos_token="<|bos|>"))
        assert encode_prompt(tokenizer, problem(), chat) == encode_prompt(byte_level(), problem(), chat)
    with pytest.raises(UserError, match="never"):
        stop_token_ids(byte_level("{{ raise_exception('never') }}"))


def test_an_unclosed_thought_names_who_opened_it() -> None:
    with pytest.raises(UserError, match=r"the thought that the end of the prompt \(<think>\) opens"):
        encode_demonstration(byte_level(THINKING), problem(solution="It is 5."), ChatSettings())
    with pytest.raises(UserError, match="the thought that <think> opens"):
        encode_demonstration(byte_level(), problem(solution="<think>It is 5."), ChatSettings())


def test_chat_user_is_for_bare_problems_only() -> None:
    tokenizer, chat = byte_level(), ChatSettings(user="solve {problem} now")
    for given, written in (
        (False, "solve {problem} {0} now"),
        (True, "{problem} {0}"),
    ):  # braces are text like any other
        asked = problem(text="{problem} {0}", meta={"turns_given": True} if given else {})
        ids = encode_prompt(tokenizer, asked, chat).token_ids
        assert decoded(tokenizer, ids) == f"<|user|>{written}<|end|>\n<|assistant|>"


def test_bos_comes_once() -> None:
    tokenizer = byte_level(bos_token="<|bos|>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    assert tokenizer("x").input_ids[0] == bos
    with_template = encode_demonstration(tokenizer, problem(), ChatSettings())
    assert with_template.token_ids.count(bos) == 1
    assert with_template.token_ids[0] == bos
    tokenizer.chat_template = None
    without = encode_demonstration(tokenizer, problem(), ChatSettings(system="sys"))
    assert without.token_ids.count(bos) == 1
    assert without.token_ids[0] == bos
    roles = prompt_roles(tokenizer, problem(), ChatSettings(system="sys"))
    assert len(roles) == without.num_prompt_tokens


def test_plain_template_where_there_is_none() -> None:
    tokenizer = byte_level(None)
    assert not has_chat_template(tokenizer)
    assert has_chat_template(byte_level())
    prompt = encode_prompt(tokenizer, problem(), ChatSettings(system="be brief"))
    assert decoded(tokenizer, prompt.token_ids) == "be brief\n\n2+3=?\n"
    assert stop_token_ids(tokenizer, 3) == (tokenizer.eos_token_id, 3)


def test_stop_tokens_are_the_templates_then_the_tokenizers_then_the_models() -> None:
    tokenizer = byte_level(eos_token="<|bos|>")  # a base model whose eos is not what ends a turn
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<|bos|>"])
    assert stop_token_ids(tokenizer, [eos, 9, end]) == (end, eos, 9)
    assert encode_demonstration(tokenizer, problem(), ChatSettings()).token_ids[-1] == end
    assert stop_token_ids(byte_level(pad_token="<|end|>")) == (end,)
    with pytest.raises(UserError, match="neither the tokenizer, its chat template"):
        stop_token_ids(byte_level(None, eos_token=None))


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
            "ends the assistant's turn with ''",
        ),
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}",
            r"turn with '\\n'",
        ),
        (
            "{% for m in messages %}{{ messages|length ~ m['content'] + '<|end|>' }}{% endfor %}",
            "data.jsonl:7: .*differently",
        ),
        (
            "{{ raise_exception('alternate the roles\\nplease') }}",
            "data.jsonl:7: .*refuses these turns: alternate the roles$",
        ),
    ],
)
def test_templates_that_cannot_be_trained_with(template: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        encode_demonstration(byte_level(template), problem(), ChatSettings())


def test_a_template_without_a_stop_token_can_still_be_sampled_from() -> None:
    tokenizer = byte_level("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}")
    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_slow_tokenizers_are_refused() -> None:
    slow: Any = types.SimpleNamespace(is_fast=False)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        encode_prompt(slow, problem(), ChatSettings())


def test_texts_that_would_not_be_what_they_say() -> None:
    with pytest.raises(UserError, match=r'data\.jsonl:7: solution: .*control token "<\|end\|>"'):
        encode_demonstration(byte_level(), problem(solution="5<|end|>6"), ChatSettings())
    with pytest.raises(UserError, match=r'data\.jsonl:7: problem: .*control token "<\|assistant\|>"'):
        encode_prompt(byte_level(), problem(text="<|assistant|>"), ChatSettings())
    with pytest.raises(UserError, match=r"data\.jsonl:7: solution: .*the character 'é'"):
        encode_demonstration(characters(), problem(solution="5é"), ChatSettings())
    for empty in ("", "<think>\n"):
        with pytest.raises(UserError, match=r"data\.jsonl:7: solution: .*got none"):
            encode_demonstration(
                byte_level(), problem(solution=empty), ChatSettings(generation_suffix="<think>\n")
            )


@pytest.mark.parametrize("make", [byte_level, characters])
def test_completion_text_keeps_spaces_and_drops_special_tokens(make: Any) -> None:
    tokenizer = make()
    text = "do n't , stop ,  5\n#### 5 ".replace("'", "" if make is characters else "'")
    assert completion_text(tokenizer, [*tokenizer(text).input_ids, tokenizer.eos_token_id]) == text


def test_what_does_not_fit_is_left_out_not_cut() -> None:
    tokenizer = characters()
    problems = [make_problem("addition", "train", i, {"digits": 1 + 4 * (i % 2)}, 0) for i in range(6)]
    lengths = [len(encode_demonstration(tokenizer, p, ChatSettings()).token_ids) for p in problems]
    limit = max(lengths[0::2])
    made = encode_demonstrations(tokenizer, problems, ChatSettings(), limit)
    kept = made.kept
    assert made.num_long == len(problems) - len(kept)
    assert [d.problem_id for d in kept] == [p.id for p in problems[0::2]]
    with pytest.raises(
        UserError, match=rf"none of the 6 .* fits into 5 tokens \(the shortest has {min(lengths)}"
    ):
        encode_demonstrations(tokenizer, problems, ChatSettings(), 5)


def test_demonstrations_from_a_file(tmp_path: Path) -> None:
    rows = [{"problem": "2+3=?", "solution": "5"}, {"problem": "2+4=?", "answer": "6"}]

    def load(limit_rows: int) -> Any:
        (tmp_path / "some.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:limit_rows]))
        settings = DataSettings(source="some.jsonl")
        problems = load_problems("sft", settings, seed=0, base_dir=tmp_path, needs=("solution",))
        return encode_demonstrations(byte_level(), problems, ChatSettings(), 99).kept

    assert [d.problem_id for d in load(1)] == ["some-1"]
    with pytest.raises(UserError, match=r"some\.jsonl:2: solution: expected a worked solution, got none"):
        load(2)
