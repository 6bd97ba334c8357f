"""A tokenizer without a chat template: an error that offers templates by name, and what each of them writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from truestep.cli.main import main
from truestep.data.chat import encode_demonstration, encode_prompt, stop_token_ids
from truestep.data.templates import TEMPLATES, choose_template
from truestep.errors import UserError
from truestep.model.tiny import tiny_tokenizer
from truestep.pipeline.models import stage_identity
from truestep.pipeline.prepare import prepare
from truestep.records import Message, Problem
from truestep.settings import ChatSettings, load_settings, settings_hash

TURNS = (Message(role="system", content="be brief"), Message(role="user", content="2+3=?"))
LONG = (*TURNS, Message(role="assistant", content="5"), Message(role="user", content="and 1?"))
WRITTEN = {  # the prompt of TURNS, and what follows an answer
    "plain": ("be brief\n\n2+3=?\n", "<|end|>"),
    "alpaca": ("be brief\n\n### Instruction:\n2+3=?\n\n### Response:\n", "<|end|>"),
    "user-assistant": ("be brief\n\nUser: 2+3=?\n\nAssistant:\n", "<|end|>"),
    "chatml": ("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n2+3=?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "2+3=?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}  # fmt: skip
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def bare(*, marks: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    if marks:
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS}, replace_extra_special_tokens=False)
    return tokenizer


def problem(messages: tuple[Message, ...] = TURNS) -> Problem:
    return Problem(id="p", messages=messages, answer="5", solution="it is 5", meta={"turns_given": True})


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_its_name_says(name: str) -> None:
    tokenizer = bare()
    choose_template(tokenizer, name, "base")
    prompt, end = WRITTEN[name]
    made = encode_prompt(tokenizer, problem(), ChatSettings())
    assert tokenizer.decode(made.token_ids) == prompt
    demonstration = encode_demonstration(tokenizer, problem(), ChatSettings())
    assert demonstration.token_ids[: len(made.token_ids)] == made.token_ids
    assert tokenizer.decode(demonstration.token_ids[demonstration.num_prompt_tokens :]) == f"it is 5{end}"
    assert tokenizer.convert_tokens_to_ids(end) in stop_token_ids(tokenizer)
    several = tokenizer.decode(encode_prompt(tokenizer, problem(LONG), ChatSettings()).token_ids)
    assert all(several.count(m.content) >= 1 for m in LONG)


def test_the_names_in_the_settings_are_those_of_the_templates() -> None:
    named = get_args(ChatSettings.model_fields["template"].annotation)
    assert {"model", *TEMPLATES} == set(named) == {"model", *WRITTEN}


@pytest.mark.parametrize("turns", [TURNS[1:], TURNS])
@pytest.mark.parametrize("bos", [False, True])
def test_plain_has_the_tokens_of_an_evaluation_without_a_template(
    turns: tuple[Message, ...], bos: bool
) -> None:
    """It is what a run with such a tokenizer was once trained on without asking."""
    from tokenizers import processors

    found = []
    for name in ("", "plain"):
        tokenizer = bare()
        if bos:
            tokenizer.bos_token = "<|im_start|>"
            pair = [("<|im_start|>", tokenizer.bos_token_id)]
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<|im_start|> $A", special_tokens=pair
            )
        if name:
            choose_template(tokenizer, name, "base")
        found.append(encode_demonstration(tokenizer, problem(turns), ChatSettings()))
    assert found[0].token_ids == found[1].token_ids
    assert found[0].num_prompt_tokens == found[1].num_prompt_tokens
    assert found[0].token_ids.count(bare().convert_tokens_to_ids("<|im_start|>")) == bos


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model", "set chat.template to one of plain, alpaca, user-assistant$"),
        (
            "chatml",
            r'"chatml" needs <\|im_start\|>, <\|im_end\|>, which .* set one of plain, alpaca, user-assistant$',
        ),
    ],
)
def test_the_error_offers_what_fits(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_template(bare(marks=False), name, "base")
    choose_template(tiny_tokenizer(), "model", "tiny")


# ------------------------------------------------------------------------------------------------------ a run

RECIPE = """
name = "based"
model = {{ path = "{model}" }}
compute = {{ threads = 1 }}
{chat}
[data.train]
source = "train.jsonl"
[[stages]]
kind = "sft"
data = "train"
steps = 2
sequences_per_step = 2
tokens_per_microbatch = 90
optimizer = {{ lr = 1e-3 }}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = bare()
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer), **shape, max_position_embeddings=128)
        ).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"problem": f"{i}+1=?", "answer": str(i + 1), "solution": f"{i + 1}"} for i in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(base: Path, chat: str) -> Path:
    path = base / f"{chat.count('t')}-{len(chat)}.toml"
    path.write_text(RECIPE.format(model=base / "model", chat=chat))
    return path


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["truestep", *words])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_run_asks_for_a_template_and_exports_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asking = str(recipe(base, ""))
    for words in (["run", asking, "--dry-run"], ["data", "show", asking]):
        assert command(monkeypatch, *words) == 2
        assert "has no chat template" in capsys.readouterr().err.splitlines()[-1]
    out = tmp_path / "run"
    assert (
        command(monkeypatch, "run", str(recipe(base, 'chat = { template = "alpaca" }')), "--out", str(out))
        == 0
    )
    tokenizer = AutoTokenizer.from_pretrained(out / "stages/01-sft/export")
    turns = [{"role": m.role, "content": m.content} for m in TURNS]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == WRITTEN["alpaca"][0]
    # The exported model has a template of its own, so nothing is asked.
    again = recipe(base, "# again")
    again.write_text(again.read_text().replace(str(base / "model"), str(out / "stages/01-sft/export")))
    assert command(monkeypatch, "run", str(again), "--dry-run") == 0


def test_plain_continues_what_was_begun_without_asking(base: Path) -> None:
    made = prepare(load_settings(recipe(base, 'chat = { template = "plain" }')), base_dir=base)
    other = prepare(load_settings(recipe(base, 'chat = { template = "user-assistant" }')), base_dir=base)
    chat = {k: v for k, v in ChatSettings().model_dump(mode="json").items() if k != "template"}
    assert settings_hash(chat) == settings_hash(ChatSettings())
    assert made.is_plain
    assert not other.is_plain
    assert stage_identity(made, 0) != stage_identity(other, 0)
