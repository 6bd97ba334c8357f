"""The engine that samples: fresh, frozen, late and partly updated ones, in float32 and bfloat16."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from truestep.audit.present.words import sentence
from truestep.guard import Guard, GuardFault, guard
from truestep.guard.engine import FEWEST, EngineCheck, EngineSeen, slope
from truestep.guard.engine_read import Rounding, logprobs, probes
from truestep.guard.tokens import Batch

CPU = torch.device("cpu")
ALWAYS = lambda step: True  # noqa: E731
torch.set_num_threads(1)


def llama(seed: int = 0, **options: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


ROWS = torch.randint(3, 64, (4, 40), generator=torch.Generator().manual_seed(5))


def loss_of(model: Any) -> torch.Tensor:
    logits = model(input_ids=ROWS).logits
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ROWS[:, 1:])


class Copy:
    """An engine with its own copy of the model, in its own precision."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.model = copy.deepcopy(model).to(dtype)
        self.calls = 0

    def update(self, model: nn.Module, leave_out: str = "") -> None:
        with torch.no_grad():
            for (name, own), new in zip(self.model.named_parameters(), model.parameters(), strict=True):
                if name != leave_out:
                    own.copy_(new)

    def __call__(self, ids: list[list[int]]) -> list[list[float]]:
        self.calls += 1
        values = iter(logprobs(self.model, ids, CPU)[0].tolist())
        return [[next(values) for _ in one[1:]] for one in ids]


Deliver = Callable[[Copy, nn.Module, int], None]


def run(
    deliver: Deliver, *, steps: int = 12, dtype: torch.dtype = torch.float32, lag: int = 1, rate: float = 1e-3
) -> list[EngineSeen]:
    """Train; before each step, ``deliver`` updates the engine. Return what each check saw, from version 0 on."""
    model = llama()
    return watched(model, Copy(model, dtype), deliver, steps=steps, lag=lag, rate=rate)


def watched(
    model: nn.Module, engine: Copy, deliver: Deliver, *, steps: int, lag: int = 1, rate: float
) -> list[EngineSeen]:
    """As ``run``, of a model whose trainable parameters are trained, and an engine."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate)
    check, found = EngineCheck(engine, model, lag=lag), []
    for version in range(steps):
        if version:
            deliver(engine, model, version)
        seen = check.before_step(version, ALWAYS, [Batch(ids=ROWS)])
        assert seen is not None
        found.append(seen)
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return found


def stale(found: list[EngineSeen]) -> list[int]:
    return [
        version for version, seen in enumerate(found) if any(c.code == "stale_engine" for c in seen.causes)
    ]


def fresh(engine: Copy, model: nn.Module, version: int) -> None:
    engine.update(model)


def frozen(engine: Copy, model: nn.Module, version: int) -> None:
    pass


class Late:
    """Delivers the weights of ``by`` versions ago."""

    def __init__(self, by: int) -> None:
        self.by, self.past = by, [llama()]

    def __call__(self, engine: Copy, model: nn.Module, version: int) -> None:
        self.past.append(copy.deepcopy(model))
        engine.update(self.past[max(0, version - self.by)])


BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@BOTH
def test_a_fresh_engine_is_right(dtype: torch.dtype) -> None:
    found = run(fresh, dtype=dtype)
    assert stale(found) == []
    last = found[-1]
    assert (last.causes, last.notes) == ((), ())
    assert last.numbers["lag"] == 0
    assert abs(last.numbers["slope"] - 1) < 0.1


@BOTH
def test_a_frozen_engine_is_stale(dtype: torch.dtype) -> None:
    """Version 1 is not judged: with a lag of 1, the engine may still have version 0."""
    found = run(frozen, dtype=dtype)
    assert stale(found) == list(range(2, 12))
    assert all(c.kinds == ("engine_frozen",) and c.values["share"] == 0 for c in found[5].causes)
    assert "0% of the trainer's change" in sentence(found[5].causes[0])
    assert stale(run(frozen, dtype=dtype, lag=0))[0] == 1


@BOTH
def test_late_by_as_many_steps_as_are_allowed(dtype: torch.dtype) -> None:
    assert stale(run(Late(1), dtype=dtype)) == []
    assert stale(run(Late(1), dtype=dtype, lag=0)) != []
    assert stale(run(Late(3), dtype=dtype, lag=3)) == []
    assert stale(run(Late(3), dtype=dtype, lag=2)) != []


def test_the_version_of_a_late_engine_is_told() -> None:
    assert run(Late(1))[-1].numbers["lag"] == 1
    assert run(Late(0))[-1].numbers["lag"] == 0


@BOTH
@pytest.mark.parametrize("last", [3, 8])
def test_an_engine_that_is_no_longer_updated(dtype: torch.dtype, last: int) -> None:
    """It is found from the change since then, which is small compared with that since the start."""
    found = run(lambda e, m, v: fresh(e, m, v) if v <= last else None, dtype=dtype, steps=16)
    assert last + 1 < stale(found)[0] <= last + 4


def test_the_share_that_the_engine_can_show_lowers_the_limit() -> None:
    groups, change = np.repeat(np.arange(4), 64), np.random.default_rng(0).normal(size=256)
    for share, kept, is_stale in (
        (0.87, 1.0, True),
        (0.87, 0.95, False),
        (0.3, 0.5, False),
        (0.1, 0.5, True),
    ):
        seen = slope(change, share * change, groups, noise=1e-3, is_narrow=False, kept=kept)
        assert seen.is_stale == is_stale


def test_a_right_reading_becomes_the_next_one_to_compare_with() -> None:
    """So a change is compared with the one before it, not with all changes since the start."""
    moved = [seen.numbers["change"] for seen in run(fresh, lag=0, steps=6)[1:]]
    still = [seen.numbers["change"] for seen in run(frozen, lag=0, steps=6)[1:]]
    assert moved[-1] < still[-1] / 2


def test_an_engine_that_is_updated_again_is_right_again() -> None:
    found = run(lambda e, m, v: fresh(e, m, v) if v > 5 else None)
    assert stale(found) == [2, 3, 4, 5]


@BOTH
def test_one_matrix_is_left_out(dtype: torch.dtype) -> None:
    """The embedding carries a large share of the change; one small matrix carries too little to be seen."""
    leave = "model.embed_tokens.weight"
    found = run(lambda e, m, v: e.update(m, leave), dtype=dtype)
    assert stale(found)
    share = found[stale(found)[0]].causes[0].values["share"]
    assert 0.1 < share < 0.9
    assert stale(run(lambda e, m, v: e.update(m, "model.norm.weight"), dtype=dtype)) == []


def test_no_change_is_not_judged() -> None:
    found = run(frozen, rate=0.0)
    assert stale(found) == []
    assert all(n.kinds == ("engine_change_small",) for seen in found[1:] for n in seen.notes)
    assert all(seen.notes for seen in found[1:])


def test_a_change_below_the_rounding_of_a_bfloat16_engine_is_not_judged() -> None:
    """Weights from a bfloat16 file: the newest weights of a bfloat16 engine are the same as the first ones."""
    model = llama().to(torch.bfloat16).float()
    engine, check = (
        Copy(model, torch.bfloat16),
        EngineCheck(engine := Copy(model, torch.bfloat16), model, lag=0),
    )
    check.before_step(0, ALWAYS, [Batch(ids=ROWS)])
    for version, size in ((1, 1e-7), (2, 1e-3)):
        with torch.no_grad():
            for p in model.parameters():
                p += size * torch.sign(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        if size < 1e-6:
            engine.update(model)
        seen = check.before_step(version, ALWAYS, [])
        assert seen is not None
        assert bool(seen.causes) == (version == 2)


def test_the_share_that_bfloat16_keeps() -> None:
    model = nn.Linear(64, 64, bias=False)
    rounding = Rounding(model)
    for on_grid, low, high in ((True, 0.0, 0.2), (False, 0.7, 1.0)):
        with torch.no_grad():
            if on_grid:
                model.weight.copy_(model.weight.bfloat16().float())
            else:
                model.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.1)
            before = rounding.read()
            model.weight += 2e-5
        assert low <= rounding.kept(before, rounding.read()) <= high


def test_another_model_is_found_at_the_start() -> None:
    def first(other: nn.Module) -> EngineSeen:
        seen = EngineCheck(Copy(other), model).before_step(0, ALWAYS, [Batch(ids=ROWS)])
        assert seen is not None
        return seen

    model, near, far = llama(), llama(), llama(1)
    with torch.no_grad():
        for one in (model, near, far):
            one.lm_head.weight *= 20  # so that log-probabilities differ as in a trained model
        near.lm_head.weight *= 1.002
    assert first(model).causes == first(near).causes == ()
    assert [c.kinds for c in first(far).causes] == [("engine_other",)]
    assert "nats per token" in sentence(first(far).causes[0])


@pytest.mark.parametrize("is_narrow", [False, True])
def test_the_slope_and_its_error(is_narrow: bool) -> None:
    """5 standard errors cover the truth, for a trainer without noise; 16-bit noise of the trainer only lowers
    what is asked for."""
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(8), 64)
    for share in (0.0, 0.5, 1.0):
        for size in (1e-3, 1e-2, 1e-1):
            change = rng.normal(size=512) * size
            own = rng.normal(size=512) * 0.005 * 2**0.5 * is_narrow
            engine = share * change + rng.normal(size=512) * 0.005 * 2**0.5
            seen = slope(change + own, engine, groups, noise=0.008, is_narrow=is_narrow, kept=1.0)
            assert not (share == 1.0 and seen.is_stale)
            assert not (share < 1.0 and seen.is_right)
            if not is_narrow:
                assert abs(seen.value - share) < 5 * seen.error
            if size == 1e-1:
                assert seen.is_stale == (share < 1.0)
                assert seen.is_right == (share == 1.0)
            if size == 1e-3:
                assert not seen.is_stale


def test_an_unchanged_answer_below_the_noise_is_not_stale() -> None:
    """An engine whose logits are rounded answers with the same numbers to a small change."""
    groups, change = np.repeat(np.arange(4), 64), np.full(256, 1e-4)
    nothing = np.zeros(256)
    assert not slope(change, nothing, groups, noise=0.01, is_narrow=False, kept=1.0).is_stale
    assert slope(change * 1000, nothing, groups, noise=0.01, is_narrow=False, kept=1.0).is_stale


class Adapted(nn.Module):
    """A linear module with a low-rank adapter."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.scaling = base_layer, {"default": 2.0}
        down, up = (
            nn.Linear(base_layer.in_features, 4, bias=False),
            nn.Linear(4, base_layer.out_features, bias=False),
        )
        nn.init.zeros_(up.weight)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("delivered", [True, False])
def test_an_adapter_is_never_delivered(delivered: bool) -> None:
    base = llama()
    base.requires_grad_(False)
    model = copy.deepcopy(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for layer in model.model.layers:
            layer.mlp.down_proj, layer.self_attn.q_proj = (
                Adapted(layer.mlp.down_proj),
                Adapted(layer.self_attn.q_proj),
            )
    engine = Copy(model if delivered else base, torch.bfloat16)

    def deliver(engine: Copy, model: nn.Module, version: int) -> None:
        if delivered:
            engine.update(model)

    found = watched(model, engine, deliver, steps=8, rate=1e-2)
    assert bool(stale(found)) == (not delivered)


def test_a_merged_adapter_is_rounded_with_the_weights() -> None:
    model = nn.Sequential(Adapted(nn.Linear(64, 64, bias=False)))
    model[0].base_layer.requires_grad_(False).to(torch.bfloat16)
    rounding = Rounding(model)
    before = rounding.read()
    with torch.no_grad():
        model[0].lora_B["default"].weight += 1e-5
    assert rounding.kept(before, rounding.read()) < 0.2
    with torch.no_grad():
        model[0].lora_B["default"].weight += torch.randn(64, 4)
    assert rounding.kept(before, rounding.read()) > 0.9


# the guard


def hashes(model: nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def guarded(
    deliver: Deliver | None, *, steps: int = 6, dropout: float = 0.0, **options: Any
) -> tuple[Any, Any]:
    """Train with a guard (without, if there is nothing to deliver). Return (guard, model)."""
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    model = llama(attention_dropout=dropout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = Copy(model, torch.bfloat16)
    told = None if deliver is None else Guard(model, optimizer, engine=engine, every=1, **options)
    for version in range(steps):
        if version and deliver is not None:
            deliver(engine, model, version)
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return told, model


def test_the_guard_names_a_frozen_engine_and_no_fresh_one(tmp_path: Path) -> None:
    told, _ = guarded(fresh, log=tmp_path / "log.jsonl")
    assert [r["verdict"] for r in told.records] == ["RIGHT"] * 6
    told.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "engine" in row]
    assert abs(rows[-1]["engine"]["slope"] - 1) < 0.1
    told, _ = guarded(frozen)
    assert [r["codes"] for r in told.records] == [[], [], *[["stale_engine"]] * 4]
    with pytest.raises(GuardFault, match="old weights"):
        guarded(frozen, on_fault="stop")


def test_the_training_is_the_same_to_the_bit() -> None:
    """With dropout, a changed random state would change it; so would an engine that draws random numbers."""
    plain = (guarded(None, dropout=0.5)[1], torch.rand(1), np.random.rand())
    told, model = guarded(fresh, dropout=0.5)
    assert told.failure == ""
    assert hashes(model) == hashes(plain[0])
    assert (torch.rand(1), np.random.rand()) == plain[1:]


def test_modes_and_random_states_are_restored() -> None:
    model = llama().train()
    model.model.layers[1].eval()
    flags = [m.training for m in model.modules()]

    def engine(ids: list[list[int]]) -> list[list[float]]:
        random.random(), np.random.rand(), torch.rand(1)
        return [[-1.0] * (len(one) - 1) for one in ids]

    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    EngineCheck(engine, model).before_step(0, ALWAYS, [Batch(ids=ROWS)])
    assert [m.training for m in model.modules()] == flags
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(p.grad is None for p in model.parameters())


def bad(kind: str) -> Callable[[list[list[int]]], Any]:
    def ask(ids: list[list[int]]) -> Any:
        right = [[-1.0] * (len(one) - 1) for one in ids]
        if kind == "raises":
            raise RuntimeError("asleep; token=hf_AbCdEf0123456789abcd")
        return {
            "nan": [[float("nan"), *one[1:]] for one in right], "long": [[-1.0, *one] for one in right],
            "rows": right[1:], "none": None, "text": [["x"] * len(one) for one in right],
        }[kind]  # fmt: skip

    return ask


@pytest.mark.parametrize("kind", ["raises", "nan", "long", "rows", "none", "text"])
def test_an_engine_that_fails_becomes_a_note(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    told = guard(model, optimizer, engine=bad(kind), every=1)
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert [r["verdict"] for r in told.records] == ["RIGHT"] * 6
    notes = [[n for n in r["notes"] if "engine not reachable" in n] for r in told.records]
    assert [len(n) for n in notes] == [1, 1, 1, 0, 0, 0]  # after three failures, it is not asked again
    shown = capsys.readouterr().err
    assert shown.count("engine not reachable") == 1
    assert "hf_AbC" not in shown + json.dumps(told.records)


def test_a_model_that_is_called_without_token_ids_is_not_checked() -> None:
    seen = EngineCheck(bad("none"), llama()).before_step(0, ALWAYS, [Batch()])
    assert seen is not None
    assert [n.kinds for n in seen.notes] == [("engine_not_checked",)]
    few = [Batch(ids=ROWS[:1, :FEWEST])]
    check = EngineCheck(bad("none"), llama())
    assert [n.kinds for n in check.before_step(0, ALWAYS, few).notes] == [("engine_not_checked",)]  # type: ignore[union-attr]
    assert check.before_step(1, ALWAYS, few) is None
    enough = EngineCheck(Copy(llama()), llama()).before_step(0, ALWAYS, [Batch(ids=ROWS[:1, : FEWEST + 1])])
    assert enough is not None
    assert enough.notes == ()


def test_only_watched_steps_and_those_before_them_are_read() -> None:
    model = llama()
    engine = Copy(model)
    check = EngineCheck(engine, model, lag=2)
    due = (1, 10).__contains__
    seen = [check.before_step(v, due, [Batch(ids=ROWS)]) is not None for v in range(10)]
    assert seen == [True, *[False] * 8, True]
    assert [one.number for one in check.history] == [7, 8, 9]
    assert engine.calls == 2


def test_probes_have_no_padding_and_a_limit() -> None:
    mask = torch.ones_like(ROWS)
    mask[0, :10] = mask[1, 30:] = 0
    found = probes([Batch(ids=ROWS, attention=mask)], 1024)
    assert found[0] == ROWS[0, 10:].tolist()
    assert found[1] == ROWS[1, :30].tolist()
    assert [len(one) for one in probes([Batch(ids=ROWS)], 50)] == [40, 12]
    assert len(probes([Batch(ids=ROWS), Batch(ids=ROWS)], 1024)) == 4


@pytest.mark.parametrize("options", [{"lag": -1}, {"tokens": FEWEST - 1}])
def test_wrong_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="use at least"):
        EngineCheck(bad("none"), llama(), **options)
