"""Every check of ``truestep doctor gpu`` passes on a processor, and fails if what it checks is broken."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep.doctor import training
from truestep.doctor.checks import Bench, Check, Number, Outcome, Skip, made, run
from truestep.doctor.gpu import CHECKS
from truestep.doctor.models import QWEN_7B
from truestep.model import attention
from truestep.objective import logprobs
from truestep.rollout import engine_torch
from truestep.rollout.tensor_group import TensorGroup
from truestep.train import parallel, step, weight_sync
from truestep.train.optim import MasterOptimizer

Patch = pytest.MonkeyPatch
NAMED = {check.name: check for check in CHECKS}
MADE_HERE = ("repeatable", "exact", "attention", "precision", "memory", "head", "waits", "sharding", "offload",
             "sampling", "checkpoint")  # fmt: skip


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.set_num_threads(1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(device=torch.device("cpu"), config=QWEN_7B, folder=tmp_path, is_small=True)


@pytest.mark.parametrize("name", MADE_HERE)
def test_a_check_passes_on_a_processor(bench: Bench, name: str) -> None:
    found = made(NAMED[name], bench)
    assert (found.verdict, found.reason) == ("PASS", "")
    assert any(n.at_most is not None or n.at_least is not None for n in found.numbers), "it cannot fail"


def test_all_others_say_why_they_are_not_made(bench: Bench) -> None:
    left = [check for check in CHECKS if check.name not in MADE_HERE]
    found = {o.check: (o.verdict, o.reason) for o in run(left, bench, 60.0)}
    assert found.keys() == {"speed", "vllm", "ranks"}
    assert {verdict for verdict, _ in found.values()} == {"SKIP"}
    assert found["speed"][1] == "needs a GPU"
    assert "--vllm" in found["vllm"][1]
    assert "--only ranks" in found["ranks"][1]


def noisy(patch: Patch) -> None:
    """Every attention differs from the one before, as with a sum in random order."""
    right, count = attention.PackedLayout.attend, iter(range(10**9))

    def attend(self: Any, *args: Any) -> Any:
        return right(self, *args) * (1 + 1e-6 * next(count))

    patch.setattr(attention.PackedLayout, "attend", attend)


def other_draws(patch: Patch) -> None:
    right, count = engine_torch.sample_tokens, iter(range(10**9))

    def sample(logits: Any, uniforms: Any, *args: Any) -> Any:
        shift = next(count) * 0.37
        return right(logits, [(u + shift) % 1 for u in uniforms], *args)

    patch.setattr(engine_torch, "sample_tokens", sample)


def other_denominator(patch: Patch) -> None:
    right = step.normalise
    patch.setattr(step, "normalise", lambda values, **more: right(values, **more) * (1 + 1e-5))


def open_mask(patch: Patch) -> None:
    """A sample sees its own future."""
    right = attention.visible
    patch.setattr(attention, "visible", lambda *args: torch.ones_like(right(*args)))


def plain_attention(patch: Patch) -> None:
    def attend(q: Any, k: Any, v: Any, mask: Any, *, is_causal: bool, scale: float) -> Any:
        scores = q @ k.transpose(-1, -2) * scale
        seen = torch.ones_like(scores, dtype=torch.bool).tril() if mask is None else mask
        return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v

    patch.setattr(attention, "scaled_dot_product_attention", attend)


def masked_plain_rows(patch: Patch) -> None:
    """Plain rows get a mask, with which a GPU has no flash attention. Here, names of kernels are changed."""
    from truestep.doctor import speed

    right = speed.Kernels.__torch_dispatch__

    def dispatch(self: Any, func: Any, *args: Any) -> Any:
        found = right(self, func, *args)
        self.names[:] = ["efficient_attention"] * len(self.names)
        return found

    patch.setattr(speed.Kernels, "__torch_dispatch__", dispatch)


def narrow_reduction(patch: Patch) -> None:
    """Shards whose gradients lose bits on the way."""
    right = MasterOptimizer.gradients

    def gradients(self: Any) -> Any:
        found = right(self)
        is_sharded = any(parallel.local(g) is not g for g in found.values())
        return {n: g.to(torch.bfloat16).to(g.dtype) for n, g in found.items()} if is_sharded else found

    patch.setattr(MasterOptimizer, "gradients", gradients)


def larger_gradients(patch: Patch) -> None:
    right = MasterOptimizer._accumulate

    def accumulate(self: Any, name: str, parameter: Any) -> None:
        parameter.grad *= 1.1
        right(self, name, parameter)

    patch.setattr(MasterOptimizer, "_accumulate", accumulate)


def nothing_recomputed(patch: Patch) -> None:
    right = training.random_policy
    patch.setattr(training, "random_policy", lambda *a, **k: right(*a, **{**k, "checkpointing": False}))


def lost_tokens(patch: Patch) -> None:
    """The last token of every chunk but the first is left out."""
    right = logprobs._chunks
    patch.setattr(logprobs, "_chunks", lambda *a: [(i, j - (i > 0)) for i, j in right(*a)])


def all_logits(patch: Patch) -> None:
    patch.setattr(logprobs, "_chunks", lambda num_tokens, vocabulary: [(0, num_tokens)])


def looks_at_results(patch: Patch) -> None:
    right = attention.PackedLayout.attend

    def attend(self: Any, *args: Any) -> Any:
        float(args[1].detach().sum())
        return right(self, *args)

    patch.setattr(attention.PackedLayout, "attend", attend)


def divided_gradients(patch: Patch) -> None:
    right = parallel.FSDPModule.set_gradient_divide_factor
    patch.setattr(parallel.FSDPModule, "set_gradient_divide_factor", lambda self, factor: right(self, 2.0))


def dropped_micro_batches(patch: Patch) -> None:
    right = training.plan_of
    patch.setattr(training, "plan_of", lambda: replace(right(), microbatch_weights=(1.0, 0.0, 0.0, 1.0)))


def late_copy(patch: Patch) -> None:
    """A step uses what the host had before, in every other repeat."""
    right, count = MasterOptimizer.step, iter(range(10**9))

    def stepped(self: Any, gradients: Any, rate: float) -> None:
        right(self, gradients, rate * (1 + 1e-4 * next(count)))

    patch.setattr(MasterOptimizer, "step", stepped)


def no_proof(patch: Patch) -> None:
    patch.setattr(weight_sync, "different", lambda *args: [])


def wrong_fingerprints(patch: Patch) -> None:
    patch.setattr(engine_torch, "fingerprint", lambda tensor: 1)


def other_temperature(patch: Patch) -> None:
    right = engine_torch.sample_tokens
    patch.setattr(engine_torch, "sample_tokens", lambda logits, *a: right(logits * 1.05, *a))


def lost_moments(patch: Patch) -> None:
    right = MasterOptimizer.load_state_tensors

    def load(self: Any, tensors: Any) -> None:
        right(self, {k: torch.zeros_like(v) if k.startswith("exp_avg/") else v for k, v in tensors.items()})

    patch.setattr(MasterOptimizer, "load_state_tensors", load)


FAULTS: list[tuple[str, Callable[[Patch], None], str]] = [
    ("repeatable", noisy, "whose gradient differs"),
    ("repeatable", other_draws, "samples that differ at top-p 0.9"),
    ("exact", other_denominator, "relative error"),
    ("exact", open_mask, "packing refused"),
    ("attention", plain_attention, "prompt trees: groups without a fused kernel"),
    ("attention", masked_plain_rows, "plain rows: groups not in flash attention"),
    ("precision", narrow_reduction, "error of float32 shards ÷"),
    ("precision", larger_gradients, "relative error with bfloat16 weights"),
    ("memory", nothing_recomputed, "all weights: predicted ÷ measured"),
    ("head", lost_tokens, "change of the gradient"),
    ("head", all_logits, "memory beside inputs and gradients"),
    ("waits", looks_at_results, "further waits for a second layer"),
    ("sharding", divided_gradients, "relative error of the gradient"),
    ("offload", dropped_micro_batches, "error of a recovered weight"),
    ("offload", late_copy, "repeats with other bits"),
    ("sampling", no_proof, "stale engine found 0"),
    ("sampling", wrong_fingerprints, "StaleWeightsError: version 0 was published"),
    ("sampling", other_temperature, "gap of engine and trainer"),
    ("checkpoint", lost_moments, "relative difference after resuming"),
]


@pytest.mark.parametrize(("name", "fault", "said"), FAULTS, ids=lambda x: getattr(x, "__name__", None))
def test_a_check_fails_if_what_it_checks_is_broken(
    bench: Bench, monkeypatch: Patch, name: str, fault: Callable[[Patch], None], said: str
) -> None:
    fault(monkeypatch)
    found = made(NAMED[name], bench)
    assert found.verdict == "FAIL"
    assert said in found.reason


def test_every_check_that_is_made_here_has_a_fault() -> None:
    assert {name for name, *_ in FAULTS} == set(MADE_HERE)


def test_speed_is_judged_on_an_accelerator(bench: Bench, monkeypatch: Patch) -> None:
    """On a processor the same code runs, and is far below the yardstick of large products."""
    found = made(NAMED["speed"], bench)
    assert found.verdict == "PASS"
    monkeypatch.setattr(Bench, "judges_speed", property(lambda self: True))
    monkeypatch.setattr("truestep.doctor.speed.matmul_rate", lambda *args: 1e15)
    for name, said in (("speed", "share of the rate"), ("head", "as set")):
        found = made(NAMED[name], bench)
        assert found.verdict == "FAIL"
        assert said in found.reason


def test_a_collective_that_never_ends_is_seen(monkeypatch: Patch) -> None:
    monkeypatch.setattr(TensorGroup, "broadcast", lambda self, tensor: time.sleep(60))
    assert training.seconds_until_error(0.05) == math.inf


# ------------------------------------------------------------------------------------------------------- the runner


def check(name: str, measure: Callable[[Bench], Iterator[Number]], **more: Any) -> Check:
    return Check(name=name, what="", seconds=1, measure=measure, **more)


def numbers(*values: float) -> Callable[[Bench], Iterator[Number]]:
    return lambda bench: (Number(name="n", value=v, at_most=1.0) for v in values)


def raising(error: Exception, before: float | None = None) -> Callable[[Bench], Iterator[Number]]:
    def measure(bench: Bench) -> Iterator[Number]:
        if before is not None:
            yield Number(name="n", value=before, at_most=1.0)
        raise error

    return measure


@pytest.mark.parametrize(
    ("measure", "verdict", "said"),
    [
        (numbers(0.0, 1.0), "PASS", ""),
        (numbers(0.0, 2.0), "FAIL", "n 2 (at most 1)"),
        (numbers(math.nan), "FAIL", "n nan"),
        (raising(Skip("no card")), "SKIP", "no card"),
        (raising(Skip("no card"), before=2.0), "FAIL", "n 2"),
        (raising(RuntimeError("an illegal memory access\nmore")), "FAIL", "RuntimeError: an illegal memory access"),
        (raising(torch.OutOfMemoryError("too much")), "FAIL", "OutOfMemoryError: too much"),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_numbers(bench: Bench, measure: Any, verdict: str, said: str) -> None:
    found = made(check("one", measure), bench)
    assert found.verdict == verdict
    assert found.reason.startswith(said)
    assert bool(found.reason) == bool(said)


def test_the_rest_is_left_out_when_the_time_is_over(bench: Bench) -> None:
    clock = iter((0.0, 1.0, 2.0, 3.0, 11.0))
    found = list(run([check("a", numbers(0.0)), check("b", numbers(0.0))], bench, 10.0, lambda: next(clock)))
    assert [(o.check, o.verdict) for o in found] == [("a", "PASS"), ("b", "SKIP")]
    assert "--only b" in found[1].reason


def test_nothing_is_asked_of_a_broken_device(bench: Bench, monkeypatch: Patch) -> None:
    monkeypatch.setattr("truestep.doctor.checks.answers", lambda device: False)
    found = list(run([check("a", raising(RuntimeError("x"))), check("b", numbers(0.0))], bench, 10.0))
    assert [o.verdict for o in found] == ["FAIL", "SKIP"]
    assert "since the check a" in found[1].reason


def test_what_is_not_a_number_can_be_written() -> None:
    one = Outcome(check="a", verdict="FAIL", numbers=(Number(name="n", value=math.inf, at_most=1.0),))
    assert one.to_json()["numbers"][0] | {} == {
        "name": "n", "value": "inf", "unit": "", "at_most": 1.0, "at_least": None, "holds": False,
    }  # fmt: skip


@pytest.mark.slow
def test_two_ranks(bench: Bench, monkeypatch: Patch) -> None:
    found = made(NAMED["ranks"], bench)
    assert found.verdict == "PASS", found.reason
    assert len(found.numbers) == 3


def test_a_run_on_ranks_that_fails_is_a_failure(bench: Bench, monkeypatch: Patch) -> None:
    monkeypatch.setattr(training, "_command", lambda *args: ["false"])
    found = made(NAMED["ranks"], bench)
    assert (found.verdict, found.reason[:40]) == ("FAIL", "RuntimeError: a run on 2 ranks ended wit")


@functools.cache
def recipe_config() -> Any:
    import json

    path = Path(__file__).resolve().parents[2] / "recipes/paper/models/qwen2.5-math-7b.json"
    return json.loads(path.read_text())


def test_the_shape_is_that_of_the_recipes() -> None:
    assert dict(QWEN_7B) == recipe_config()
