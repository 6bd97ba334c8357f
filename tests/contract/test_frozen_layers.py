"""Layers that a stage freezes: their bits do not move, they have no optimizer state, and everything that proves a step
still works. No-decay groups and schedules continue a stage as if it had never been stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_jobs import Job
from tiny_runs import assert_continues, go, interrupted_at, prepared, write_recipe
from transformers import LlamaConfig, LlamaForCausalLM

from truestep import rundir
from truestep.checkpoint.layout import Checkpoint, every_row
from truestep.checkpoint.manifest import list_checkpoints
from truestep.checkpoint.reader import read_checkpoint
from truestep.errors import UserError
from truestep.guard import guard
from truestep.model.select import freeze
from truestep.model.tiny import tiny_model, tiny_tokenizer
from truestep.pipeline.models import stage_identity
from truestep.settings import TinySettings, load_settings

torch.set_num_threads(1)
FREEZE = 'freeze=["lm_head.weight", "model.layers.0.self_attn.[qk]_proj.*", "model.norm.weight"]'  # the head is tied
EVERY = (
    "evaluate.data=[]",
    f"stages.sft.{FREEZE}",
    f"stages.rl.{FREEZE}",
    'stages.sft.optimizer={ lr = 2e-2, schedule = "wsd", warmup_fraction = 0.2, decay_fraction = 0.5, no_decay = ["norms"] }',
    'stages.rl.optimizer={ lr = 5e-3, schedule = "linear", no_decay = ["*.mlp.*"] }',
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def newest(run: Path, stage: str) -> Checkpoint:
    return read_checkpoint(list_checkpoints(run / "stages" / stage / "checkpoints")[-1], every_row)


def start(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    settings = TinySettings(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
    model = tiny_model(settings, len(tiny_tokenizer()), 512, seed=0).to(dtype)
    return {f"model.{name}": p.detach() for name, p in model.named_parameters()}


def is_frozen(name: str) -> bool:
    named = name.removeprefix("model.")
    return (
        named.startswith("model.embed_tokens")
        or named == "model.norm.weight"
        or ".q_proj" in named
        or ".k_proj" in named
    )


def assert_frozen(run: Path, *stages: str) -> None:
    """The bits of the start, and neither masters nor moments; everything else has moved and has them."""
    before = start()
    assert sum(map(is_frozen, before)) == 4
    for stage in stages:
        tensors = newest(run, stage).tensors
        for name, parameter in tensors["parameters"].items():
            assert torch.equal(parameter, before[name]) == is_frozen(name), name
        held = {name.partition("/")[2] for name in tensors["optimizer"]}
        assert held == {name for name in before if not is_frozen(name)}


def test_frozen_layers_keep_their_bits_and_a_stopped_stage_continues(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The RL stage publishes its weights to an engine that proves them, frozen ones, too."""
    made = prepared(recipe, *EVERY)
    with monkeypatch.context() as patch:
        looks = interrupted_at(patch, 10**9).looks
        go(made, tmp_path / "whole")
    assert_frozen(tmp_path / "whole", "01-sft", "02-rl")
    rates = [
        r["sft/learning_rate"] for r in rundir.read_jsonl(tmp_path / "whole/stages/01-sft/metrics.jsonl")
    ]
    assert rates[2:8] == [2e-2] * 6
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[9] < 2e-2
    rl = looks.index("decode")
    places = (*range(2, rl, rl // 4), *range(rl, len(looks), (len(looks) - rl) // 3))
    assert_continues(made, tmp_path / "whole", places, monkeypatch)


def test_in_bfloat16_a_frozen_layer_has_no_master(recipe: Path, tmp_path: Path) -> None:
    go(prepared(recipe, *EVERY, "compute.dtype=bfloat16", "stages.rl.steps=2"), tmp_path / "run")
    before, tensors = start(torch.bfloat16), newest(tmp_path / "run", "01-sft").tensors
    assert {n.removeprefix("master/") for n in tensors["optimizer"] if n.startswith("master/")} == {
        name for name in before if not is_frozen(name)
    }
    for name in filter(is_frozen, before):
        assert torch.equal(tensors["parameters"][name], before[name])
    assert 0 < rundir.read_json(tmp_path / "run/stages/01-sft/done.json")["shape"]["backward_share"] < 1
    assert "backward_share" not in rundir.read_json(tmp_path / "run/summary.json")["model"]


def test_shards_of_a_frozen_layer(recipe: Path, tmp_path: Path) -> None:
    """On two ranks with fsdp2, the frozen bits are the same, and the others are those of one rank up to rounding."""
    short = (*EVERY, "stages.sft.steps=5", "stages.rl.steps=1")
    words = [word for key in short for word in ("--set", key)]
    with Job(
        ["run", str(recipe), *words, "--set", "compute.parallel=fsdp2", "--out", str(tmp_path / "run")],
        tmp_path,
    ) as job:
        ended = job.end(120)
    assert ended.codes == [0, 0], ended.outputs
    assert_frozen(tmp_path / "run", "01-sft")
    go(prepared(recipe, *short), tmp_path / "one")
    one, two = (newest(tmp_path / run, "01-sft").tensors["parameters"] for run in ("one", "run"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_without_new_keys_a_recipe_is_what_it_was(recipe: Path) -> None:
    """Its identity is that of a table without the keys, and with them it is another one."""
    made = prepared(recipe)
    assert [stage_identity(made, 0), stage_identity(made, 1)] == ["3814be4f5f30", "28914a058e20"]
    for key in (
        f"stages.sft.{FREEZE}",
        'stages.sft.optimizer.no_decay=["norms"]',
        "stages.sft.optimizer.decay_fraction=0.2",
    ):
        assert stage_identity(prepared(recipe, key), 0) != "3814be4f5f30"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            'stages.rl.freeze=["model.layers.0.self_attn.q_prj.weight"]',
            r"stages.rl.freeze: .* did you mean .*q_proj.weight",
        ),
        ('stages.sft.freeze=["layers.*"]', r"stages.sft.freeze: 'layers.\*' matches no parameter"),
        ('stages.sft.freeze=["*"]', "nothing is trained"),
        (
            'stages.sft.optimizer.no_decay=["norm"]',
            "stages.sft.optimizer.no_decay: 'norm' matches no parameter",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(recipe: Path, change: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepared(recipe, change)


def test_wsd_needs_room_for_both_ends(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"warmup_fraction \+ decay_fraction"):
        load_settings(
            recipe,
            [
                'stages.sft.optimizer={ lr = 1e-3, schedule = "wsd", warmup_fraction = 0.6, decay_fraction = 0.5 }'
            ],
        )


@pytest.mark.parametrize("fault", ["", "dropped"])
def test_the_guard_judges_a_model_with_frozen_layers(fault: str) -> None:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=64))
    freeze(model, ["model.embed_tokens.*", "model.layers.0.*"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rows = [torch.randint(3, 64, (1, 4 + length)) for length in (2, 27, 3, 17)]
    with guard(model, optimizer, accumulation=4, every=1) as watch:
        for _ in range(2):
            for k, row in enumerate(rows):
                labels = torch.cat([torch.full((1, 4), -100), row[:, 4:]], dim=1)
                logits = model(input_ids=row).logits
                loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
                (loss / sum(r.shape[1] - 4 for r in rows)).backward()
                if fault and k == 1:
                    optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            watch.step()
    records = [record for record in watch.records if "verdict" in record]
    assert {record["verdict"] for record in records} == {"FAULT" if fault else "RIGHT"}
