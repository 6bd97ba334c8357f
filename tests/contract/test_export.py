"""An export opens in transformers with the same weights and logits, and is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import go, prepared, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from truestep import rundir
from truestep.checkpoint.export import export_hf, model_card
from truestep.checkpoint.store import OutOfSpace
from truestep.cli.main import _app
from truestep.errors import UserError
from truestep.model.load import load_model
from truestep.settings import ModelSettings, TinySettings

torch.set_num_threads(1)
TINY = TinySettings(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)


@pytest.fixture(autouse=True)
def _no_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: waiting for the disk would only be slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tiny(dtype: torch.dtype = torch.float32, seed: int = 1):
    settings = ModelSettings(path="tiny", tiny=TINY)
    return load_model(settings, dtype=dtype, device=torch.device("cpu"), seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_opens_with_the_same_weights_and_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = tiny(dtype)
    model, tokenizer = loaded.model, loaded.tokenizer
    model.config.dtype = (
        "float16"  # what a config says of another time must not decide how the weights are read
    )
    export_hf(tmp_path / "export", model, tokenizer, card="# card\n")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor), name
    ids = torch.tensor([tokenizer.encode("3 + 4 = 7")])
    plain = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    plain.load_state_dict(ours)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, plain.eval()(ids).logits)
        assert torch.allclose(again(ids).logits.float(), model(ids).logits.float(), atol=2e-2)
    words = AutoTokenizer.from_pretrained(tmp_path / "export")
    chat = [{"role": "user", "content": "3 + 4 = ?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    assert words.apply_chat_template(chat, **options) == tokenizer.apply_chat_template(chat, **options)
    assert (tmp_path / "export" / "README.md").read_text() == "# card\n"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    assert not [p for p in (tmp_path / "export").iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


def test_generation_stops_at_the_models_and_the_tokenizers_end(tmp_path: Path) -> None:
    loaded = tiny()
    loaded.model.generation_config.eos_token_id = 9
    loaded.model.generation_config.temperature = 0.6  # without do_sample, as some published models have it
    export_hf(tmp_path / "export", loaded.model, loaded.tokenizer, card="")
    written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert written["eos_token_id"] == sorted([9, loaded.tokenizer.eos_token_id])
    assert (written["do_sample"], written["temperature"]) == (True, 0.6)
    assert written["pad_token_id"] not in written["eos_token_id"]
    assert loaded.model.generation_config.eos_token_id == 9, "the model in training was changed"


def weight_of(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight


def test_an_older_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    first, second = tiny(seed=1), tiny(seed=2)
    target = tmp_path / "deep" / "export"
    for loaded in (first, second):
        export_hf(target, loaded.model, loaded.tokenizer, card="")
        assert torch.equal(weight_of(target), loaded.model.get_input_embeddings().weight)
    foreign = tmp_path / "mine"
    first.model.save_pretrained(foreign)
    (tmp_path / "file").write_text("precious")
    for path in (foreign, tmp_path / "file"):
        with pytest.raises(UserError, match="not a truestep export"):
            export_hf(path, second.model, second.tokenizer, card="")
    assert torch.equal(weight_of(foreign), first.model.get_input_embeddings().weight)
    (tmp_path / "empty").mkdir()
    export_hf(tmp_path / "empty", first.model, first.tokenizer, card="")


@pytest.mark.parametrize("before", [False, True])
def test_a_kill_while_exporting_leaves_the_old_export_or_the_new(tmp_path: Path, before: bool) -> None:
    class Killed(BaseException):
        pass

    first, second = tiny(seed=1), tiny(seed=2)
    for fatal in range(1, 60):
        target = tmp_path / str(fatal)
        if before:
            export_hf(target, first.model, first.tokenizer, card="")
        done = [0]

        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "fsync", "mkdir", "unlink", "rmdir"):

                def act(*args, real=getattr(os, name), fatal=fatal, done=done, **options):
                    done[0] += 1
                    if done[0] >= fatal:
                        raise Killed
                    return real(*args, **options)

                patch.setattr(os, name, act)
            try:
                export_hf(target, second.model, second.tokenizer, card="")
                finished = True
            except Killed:
                finished = False
        aside = target.with_name(f"{target.name}.aside")
        survivor = target if target.exists() else aside if before else None
        if survivor is not None:
            old, new = (loaded.model.get_input_embeddings().weight for loaded in (first, second))
            weight = weight_of(survivor)
            assert torch.equal(weight, new) or (before and not finished and torch.equal(weight, old))
        export_hf(target, first.model, first.tokenizer, card="")
        assert torch.equal(weight_of(target), first.model.get_input_embeddings().weight)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(f"{fatal}.")] == []
        if finished:
            break
    assert finished
    assert fatal > 8


def test_a_full_disk_keeps_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tiny(seed=1), tiny(seed=2)
    export_hf(tmp_path / "export", first.model, first.tokenizer, card="")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(second.tokenizer), "save_pretrained", full)
    with pytest.raises(OutOfSpace, match="free disk space"):
        export_hf(tmp_path / "export", second.model, second.tokenizer, card="")
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    assert torch.equal(weight_of(tmp_path / "export"), first.model.get_input_embeddings().weight)


# ------------------------------------------------------------------------------------------------------- card

PROVENANCE = {
    "commit": "abc123",
    "uncommitted_changes": True,
    "command": ["truestep", "run", "r.toml"],
    "seed": 7,
    "python": "3.11.7",
    "versions": {"torch": "2.13.0"},
    "hardware": {"cpu": "x", "cores": 2},
}
STAGES = [
    {"name": "warm", "kind": "sft", "data": "sums", "steps": 200, "flops": 1.25e15},
    {"name": "rl", "kind": "rl", "method": "grpo_token_mean", "data": "sums", "steps": 50, "seed": 9},
]
SCORES = [{"data": "test", "metric": "avg@8", "score": 0.5, "low": 0.4, "high": 0.6123, "num_problems": 30}]


def table_rows(card: str, first: str) -> list[list[str]]:
    rows = [
        [c.strip() for c in line.strip("|").split(" | ")]
        for line in card.splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if row[0] == first]


def test_the_card_says_data_seeds_work_and_scores_with_intervals() -> None:
    card = model_card("tiny-sums", "org/base-1.5B", STAGES, SCORES, PROVENANCE)
    assert table_rows(card, "warm") == [["warm", "sft", "–", "sums", "7", "200", "1.25e+15"]]
    assert table_rows(card, "rl") == [["rl", "rl", r"grpo\_token\_mean", "sums", "9", "50", "–"]]
    assert table_rows(card, "test") == [["test", "avg@8", "0.500", "0.400 to 0.612", "30", "–"]]
    for fact in ("abc123, changed", "truestep run r.toml", "torch 2.13.0"):
        assert fact in card
    assert "Not evaluated" in model_card("n", "b", STAGES, [], PROVENANCE)


def test_the_front_matter_is_what_the_hub_reads() -> None:
    yaml = pytest.importorskip("yaml")
    front = yaml.safe_load(model_card("n", "org/base-1.5B", STAGES, SCORES, PROVENANCE).split("---\n")[1])
    assert (front["library_name"], front["base_model"]) == ("transformers", "org/base-1.5B")
    assert front["tags"] == ["truestep", "reasoning", "sft", "rl"]
    for local in ("/home/me/model", "tiny", "./a/b", "../b", "a/b\nlicense: mit"):
        assert "base_model" not in yaml.safe_load(model_card("n", local, [], [], {}).split("---\n")[1])


def test_nothing_in_a_card_is_taken_for_markup() -> None:
    evil = "<script>alert(1)</script> | x\n# y ![a](http://b) `c` --- *d*"
    card = model_card(
        evil, evil, [{"name": evil, "kind": evil}], [{"data": evil}], {"commit": evil, "command": [evil]}
    )
    body = card.split("---\n", 2)[2]
    assert "<script" not in body
    assert "![" not in body
    assert len([line for line in body.splitlines() if line.startswith("# ")]) == 1
    import yaml

    assert yaml.safe_load(card.split("\n---\n")[0])["tags"][2] == evil


def thinking_export(folder: Path) -> Path:
    """The export of a run that allowed a special token. The model is nearly random, so it samples every token."""
    recipe = write_recipe(folder / "recipe")
    short = ("stages.sft.steps=1", "stages.rl.steps=1", "stages.sft.optimizer.lr=1e-9", "evaluate.data=[]")
    go(prepared(recipe, *short, 'chat.special_tokens=["<|user|>"]'), folder / "run")
    return folder / "run/stages/01-sft/export"


def texts(folder: Path, model: Path) -> list[str]:
    """What the model writes, as ``truestep eval`` has it."""
    (folder / "own.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    words = ["--benchmarks", str(folder / "own.jsonl"), "--samples", "30", "--set", "max_new_tokens=16"]
    out = folder / f"out{len(list(folder.iterdir()))}"
    command = ["eval", "model", str(model), *words, "--set", "temperature=1", "--out", str(out), "--json"]
    assert CliRunner().invoke(_app(), command, catch_exceptions=False).exit_code == 0
    (path,) = out.rglob("*.samples.jsonl")
    return [row["completion"] for row in rundir.read_jsonl(path) if "completion" in row]


@pytest.mark.slow
def test_a_lost_system_prompt_is_said_by_the_next_run_and_by_eval(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe")
    short = ("stages.sft.steps=1", "stages.rl.steps=1", "evaluate.data=[]", "chat.system=be brief")
    go(prepared(recipe, *short), tmp_path / "run")
    for stage in ("01-sft", "02-rl"):
        export = tmp_path / "run/stages" / stage / "export"
        said = 'was trained with the system prompt "be brief"'
        assert any(said in note for note in prepared(recipe, f"model.path={export}").notes)
        (tmp_path / "own.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
        words = ["eval", "model", str(export), "--benchmarks", str(tmp_path / "own.jsonl"), "--dry-run"]
        assert said in " ".join(CliRunner().invoke(_app(), words).output.split())
        row = '{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "1"}], "answer": "2"}'
        (tmp_path / "own.jsonl").write_text(row + "\n")
        assert said not in " ".join(CliRunner().invoke(_app(), words).output.split())


@pytest.mark.slow
def test_eval_keeps_the_special_tokens_that_the_export_names(tmp_path: Path) -> None:
    export = thinking_export(tmp_path)
    assert rundir.read_json(export / rundir.EXPORT_MARK)["special_tokens"] == ["<|user|>"]
    kept = texts(tmp_path, export)
    assert any("<|user|>" in text for text in kept)
    assert not any("<|system|>" in text or "<|end|>" in text for text in kept)


@pytest.mark.slow
def test_special_tokens_of_other_models_are_those_of_the_recipe(tmp_path: Path) -> None:
    export, plain, recipe = thinking_export(tmp_path), tmp_path / "plain", tmp_path / "eval.toml"
    kept = texts(tmp_path, export)
    shutil.copytree(export, plain)
    (plain / rundir.EXPORT_MARK).unlink()
    assert texts(tmp_path, plain) == [text.replace("<|user|>", "") for text in kept]
    recipe.write_text(f'[model]\npath = "{plain}"\n[chat]\nspecial_tokens = ["<|user|>"]\n')
    assert texts(tmp_path, recipe) == kept
    recipe.write_text(f'[model]\npath = "{plain}"\n[chat]\nspecial_tokens = ["<|end|>"]\n')
    with pytest.raises(UserError, match=r'"<\|end\|>" ends a completion'):
        texts(tmp_path, recipe)
