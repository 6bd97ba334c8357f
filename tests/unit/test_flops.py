"""The ledger reproduces the paper's totals and scales as it should. Frozen layers and experts are counted as torch's own
counter counts the products of a forward and a backward pass."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from truestep.flops import Ledger, ModelShape
from truestep.model.load import model_shape
from truestep.model.lora import install
from truestep.model.select import freeze, without_frozen
from truestep.stage_settings import LoraSettings

PAPER = ModelShape(
    num_parameters=7_000_000_000, num_matmul_parameters=7_000_000_000, num_layers=28, attention_width=3584
)
DEMONSTRATION = 4_200


def rollouts(num_prompts: int, per_prompt: int, length: int) -> Ledger:
    tokens = num_prompts * per_prompt * length
    return Ledger(rollout_tokens=tokens, rollout_trained_tokens=tokens)


def demonstrations(count: int) -> Ledger:
    return Ledger(demonstration_tokens=count * DEMONSTRATION)


@pytest.mark.parametrize(
    ("ledger", "expected"),
    [
        (rollouts(500 * 128, 7, 2_200) + demonstrations(500 * 128), 6.65e19),  # LUFFY
        (rollouts(500 * 128, 8, 3_000) + demonstrations(138 * 64), 8.76e19),  # ReLIFT
        (demonstrations(3 * 46_000) + rollouts(50 * 128, 8, 4_200), 3.63e19),  # SFT, then 50 steps of RL
    ],
)
def test_totals_of_the_paper(ledger: Ledger, expected: float) -> None:
    assert ledger.paper_flops(PAPER) == pytest.approx(expected, rel=0.01)


def test_doubling() -> None:
    ledger = rollouts(10, 8, 100) + demonstrations(5)
    double = replace(PAPER, num_parameters=14_000_000_000)
    assert (ledger + ledger).paper_flops(PAPER) == 2 * ledger.paper_flops(PAPER)
    assert ledger.paper_flops(double) == 2 * ledger.paper_flops(PAPER)


def test_fuller_count_adds_prompts_scoring_and_attention() -> None:
    shape = ModelShape(num_parameters=100, num_matmul_parameters=80, num_layers=3, attention_width=16)
    ledger = Ledger(trained_pass_tokens=10, generated_pass_tokens=5, scored_pass_tokens=2, trained_pairs=7,
                    generated_pairs=4, scored_pairs=1)  # fmt: skip
    assert ledger.full_flops(shape) == 80 * (60 + 10 + 4) + 4 * 3 * 16 * (21 + 4 + 1)


def test_json_round_trip() -> None:
    assert PAPER.to_json().keys() == {
        "num_parameters",
        "num_matmul_parameters",
        "num_layers",
        "attention_width",
    }
    frozen = replace(PAPER, backward_share=0.5, num_backward_layers=0)
    assert ModelShape(**frozen.to_json()) == frozen  # type: ignore[arg-type]
    ledger = rollouts(3, 2, 5) + demonstrations(1)
    assert Ledger(**json.loads(json.dumps(asdict(ledger)))) == ledger


SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "attn_implementation": "eager",
}  # fmt: skip
TOKENS = 16


def model_of(kind: str, **more: int) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(kind, **SIZES, **more)
    return transformers.AutoModelForCausalLM.from_config(config)


def products(model: torch.nn.Module) -> tuple[int, int]:
    """Return the FLOPs of the products with matrices, and those of attention, of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(TOKENS)[None], use_cache=False).logits.sum().backward()
    found = {str(key): value for key, value in counter.get_flop_counts()["Global"].items()}
    attention = found.pop("aten.bmm")
    return sum(found.values()), attention


@pytest.mark.parametrize(
    ("frozen", "layers"),
    [
        ([], 3),
        (["model.embed_tokens.*"], 3),
        (["model.embed_tokens.*", "model.layers.0.*", "model.layers.1.*"], 1),
        (["model.embed_tokens.*", "model.layers.0.*", "*.mlp.*"], 2),
        (["model.layers.[12].*", "lm_head.weight"], 3),
        (["model.*"], 0),
    ],
)
def test_the_backward_pass_of_frozen_layers(frozen: list[str], layers: int) -> None:
    model = model_of("llama")
    freeze(model, frozen)
    shape = without_frozen(model, model_shape(model))
    matrices = shape.num_matmul_parameters - 7 * 32  # the scales of the norms are no matrices
    work = Ledger(trained_pass_tokens=TOKENS, trained_pairs=TOKENS * TOKENS)  # eager computes every pair
    exact = replace(shape, num_matmul_parameters=matrices)
    matmul, attention = products(model)
    only_matrices = replace(exact, attention_width=0)
    assert work.full_flops(only_matrices) == matmul
    assert work.full_flops(exact) - work.full_flops(only_matrices) == attention
    assert shape.num_backward_layers in ({None, layers} if not frozen else {layers})
    demonstration = Ledger(demonstration_tokens=TOKENS).paper_flops(shape) / TOKENS / shape.num_parameters
    assert demonstration == (6 if not frozen else pytest.approx(2 + 4 * shape.backward_share))


@pytest.mark.parametrize(
    "targets", [("all-linear", "lm_head"), ("all-linear",), ("model.layers.1.self_attn.v_proj",)]
)
def test_the_products_of_adapters(targets: tuple[str, ...]) -> None:
    model = model_of("llama")
    install(model, LoraSettings(rank=3, targets=targets), seed=0)
    shape = without_frozen(model, model_shape(model))
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    matrices = replace(shape, num_matmul_parameters=shape.num_matmul_parameters - vectors, attention_width=0)
    work = Ledger(trained_pass_tokens=TOKENS)
    assert work.full_flops(matrices) == pytest.approx(products(model)[0], rel=1e-12)


EXPERTS: list[tuple[str, dict[str, int]]] = [
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}),
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 1}),
    ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
]


@pytest.mark.parametrize(("kind", "more"), EXPERTS)
def test_of_experts_only_those_that_a_token_uses(kind: str, more: dict[str, int]) -> None:
    model = model_of(kind, **more)
    shape = model_shape(model)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    vectors = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 1)
    biases = sum(
        p.numel() // 4 * 2 for name, p in model.named_parameters() if name.endswith("proj_bias")
    )  # of gpt-oss: rows of 4 experts
    matrices = replace(
        shape, num_matmul_parameters=shape.num_matmul_parameters - vectors - biases, attention_width=0
    )
    work = Ledger(trained_pass_tokens=TOKENS)
    model.set_experts_implementation("eager")
    assert work.full_flops(matrices) == products(model)[0]
    paper = Ledger(demonstration_tokens=1).paper_flops(shape)
    assert paper == 6 * (shape.num_parameters - shape.num_unused_parameters)
    assert Ledger(rollout_tokens=1).paper_flops(shape) == paper / 3


@pytest.mark.parametrize(("kind", "more"), EXPERTS[:3])
@pytest.mark.parametrize(
    "frozen",
    [
        ["*.experts.*"],
        ["*self_attn*"],
        ["model.embed_tokens.*", "model.layers.[01].*"],
        # Below the experts of the first layer nothing is trained, and their second product still has an input with one.
        [
            "model.embed_tokens.*",
            "model.layers.0.self_attn.*",
            "model.layers.0.mlp.gate.*",
            "model.layers.0.*norm*",
        ],
    ],
)
def test_frozen_experts(kind: str, more: dict[str, int], frozen: list[str]) -> None:
    model = model_of(kind, **more)
    freeze(model, frozen)
    model.set_experts_implementation("eager")
    shape = without_frozen(model, model_shape(model))
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    matrices = replace(shape, num_matmul_parameters=shape.num_matmul_parameters - vectors, attention_width=0)
    assert Ledger(trained_pass_tokens=TOKENS).full_flops(matrices) == pytest.approx(
        products(model)[0], rel=1e-12
    )
