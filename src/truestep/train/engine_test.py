"""Proves on samples that an engine uses the weights that it is given, and watches that it goes on doing so.

``self_test``, at the start of a stage, is for engines that cannot show the bits they compute with. It publishes
weights in which tensors are grossly changed, while the caches are full, and compares the log-probabilities of
sampled tokens with the trainer's. A tensor that does not reach the engine, or a cache that is not reset, is seen
at once. Then the weights of the run are published again.

``GapTest`` compares the tokens of every update with what was measured at the start.

Of the gaps g = log π_trainer − log π_engine at sampled tokens, two numbers are judged. Rounding changes a
log-probability in proportion to 1 − π, so the size Σ |g| ÷ Σ (1 − π) stays nearly the same while a policy
becomes certain. The slope of g against log π is 0 for rounding; another temperature T in the engine makes it
1 − 1/T.
Held by: tests/contract/test_engine_test.py, tests/rollout/test_vllm_rl.py
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from truestep.records import Origin, TrainSequence
from truestep.rollout.engine import Engine, SampleRequest, SamplingParameters, StaleWeightsError
from truestep.seeding import Purpose, generator
from truestep.train.parallel import Ranks, local
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.weight_sync import publish

NUM_PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 4, 2, 288, 24


# Sizes of the gap in nats. FIRST: from which the first samples are not the trainer's. Measured sizes of right
# engines: 1e-7 to 2e-5 (float32), 8e-4 to 6e-2 (bfloat16).
FIRST = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
TINY = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
# Times the size at the start, from which later samples are not the trainer's (measured: up to 1.9). Single tokens
# are off by 30 times the mean in bfloat16, so with little mass Σ (1 − π) the limit is larger; and what a right
# engine's size is, is pooled until the mass is ENOUGH.
TIMES, OUTLIERS, ENOUGH = 5.0, 8.0, 64.0
# Times the size at the start, from which a disturbed tensor did not arrive. In float32 a right engine was at most
# 14 times as noisy with disturbed weights, and one without one of the tensors at least 40,000 times.
DISTURBED = {torch.float64: 1e4, torch.float32: 1000.0, torch.bfloat16: 8.0, torch.float16: 30.0}
PARTS = 8  # into which the layers are cut if 16 bits would be too coarse to disturb all of them at once
# Of another temperature: least slope, significance and explained share of the variance. Fewest tokens of a test.
TILT, STANDARD_ERRORS, EXPLAINED, FEWEST = 0.02, 5.0, 0.3, 64


@dataclass(frozen=True)
class Gap:
    """Sums over sampled tokens, of gaps g and l = log π: 1, |g|, 1 − π, g, l, gl, l², g², g²l, g²l²."""

    sums: tuple[float, ...] = (0.0,) * 10

    @staticmethod
    def of(trainer: Tensor, engine: Tensor) -> Gap:
        own = trainer.double()
        g, one = own - engine.double(), torch.ones_like(own)
        squares = (own * own, g * g, g * g * own, (g * own) ** 2)
        columns = (one, g.abs(), -engine.double().expm1(), g, own, g * own, *squares)
        return Gap(tuple(torch.stack(columns).sum(1).tolist()))

    def __add__(self, other: Gap) -> Gap:
        return Gap(tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)))

    def over(self, ranks: Ranks) -> Gap:
        return Gap(tuple(ranks.sum(self.sums)))

    @property
    def count(self) -> int:
        return int(self.sums[0])

    @property
    def mass(self) -> float:
        return self.sums[2]

    @property
    def size(self) -> float:
        return self.sums[1] / max(self.mass, 1e-9)

    @property
    def tilt(self) -> tuple[float, float, float]:
        """Return the slope of g on l, its standard error if the true slope is 0, and the share of the variance of g
        that it explains. The error takes every g as noise, so that one token far off, with a low probability, is
        not significant."""
        n, _, _, g, own, both, squares, gg, ggl, ggll = self.sums
        spread = squares - own * own / n if n else 0.0
        if n < FEWEST or spread <= 0:
            return 0.0, math.inf, 0.0
        mean, middle = own / n, g / n
        noise = ggll - 2 * mean * ggl + mean * mean * gg
        slope = (both - middle * own) / spread
        share = slope * slope * spread / max(gg - middle * g, 1e-300)
        return slope, math.sqrt(max(0.0, noise)) / spread, share

    def fault(self, limit: float, where: str) -> str:
        """Return "" or what is wrong with the engine."""
        slope, error, share = self.tilt
        if share > EXPLAINED and abs(slope) > max(TILT, STANDARD_ERRORS * error):
            times = 1 / max(1e-9, 1 - slope)
            return f"{where}, the engine sampled at {times:.3f} times the temperature that was asked for"
        limit *= 1 + OUTLIERS / max(self.mass, 1e-9)
        if not self.size <= limit:  # NaN is wrong
            return (
                f"{where}, the log-probabilities of engine and trainer differ by {self.size:.2g} nats for each unit of "
                f"1 − π, and rounding by {limit:.2g} at most: the engine does not use the trainer's weights"
            )
        return ""


@dataclass
class GapTest:
    """Judges the sampled tokens of every update. ``right`` is the gap of a right engine, as far as it is known."""

    dtype: torch.dtype
    right: Gap = Gap()
    found: Gap = Gap()

    def add(self, trainer: Tensor, engine: Tensor) -> None:
        self.found += Gap.of(trainer, engine)

    def judge(self, step: int, ranks: Ranks) -> None:
        """Judge what was added, and forget it (a collective). Raises StaleWeightsError."""
        gap, self.found = self.found.over(ranks), Gap()
        if gap.count < FEWEST:
            return
        limit = FIRST[self.dtype]
        if self.right.count:
            known = TIMES * max(self.right.size, TINY[self.dtype]) * (1 + OUTLIERS / self.right.mass)
            limit = min(limit, known)
        if fault := gap.fault(limit, f"step {step}"):
            raise StaleWeightsError(f"{fault}; no update was made")
        if self.right.mass < ENOUGH:
            self.right += gap


@contextmanager
def disturbed(module: nn.Module, names: Collection[str] | None = None) -> Iterator[None]:
    """Change the named parameters (by default all) grossly, and finally restore every bit. On all ranks of a
    sharded module."""
    parameters = [(n, local(p.detach())) for n, p in module.named_parameters() if names is None or n in names]
    zeros = {name for name, p in parameters if not p.any()}

    @torch.no_grad()
    def change(*, back: bool) -> None:
        for name, p in parameters:
            if name in zeros:
                p.copy_(torch.zeros_like(p) if back else torch.full_like(p, 0.5))
                continue
            p.mul_(0.5 if back else 2.0)  # exact
            if p.dim() > 1 and p.numel() > 1:
                shift = 1 + zlib.crc32(name.encode()) % (p.numel() - 1)
                p.copy_(p.flatten().roll(-shift if back else shift).view_as(p))

    kept = [p.clone() if name in zeros else None for name, p in parameters]  # a zero may be −0
    change(back=False)
    try:
        yield
    finally:
        change(back=True)
        with torch.no_grad():
            for (_, p), was in zip(parameters, kept, strict=True):
                if was is not None:
                    p.copy_(was)


def self_test(
    policy: Policy, engine: Engine, scorer: Scorer, version: int, say: Callable[[str], None]
) -> Gap:
    """Prove that every tensor that is published reaches the engine's samples, and that its caches are reset.

    Publishes changed weights and then ``version`` again (a collective). Returns the gap of the right weights, for
    ``GapTest``. Raises StaleWeightsError, which names a tensor that did not arrive."""
    dtype, ranks, model = next(policy.parameters()).dtype, scorer.ranks, policy.model
    vocabulary, length = int(model.config.vocab_size), policy.context_length
    updates = 0

    def gap() -> Gap:
        return sampled_gap(engine, scorer, vocabulary, length).over(ranks)

    def send() -> None:
        nonlocal updates
        updates += 1
        publish(policy, engine, version, ranks)

    def missing(names: list[str]) -> str:
        """Return "" or the fault of an engine that gets changed weights with these names."""
        with disturbed(model, names):
            send()
            return gap().fault(DISTURBED[dtype] * max(right.size, TINY[dtype]), "with changed weights")

    right = gap()
    if fault := right.fault(FIRST[dtype], "with the weights of the run"):
        raise StaleWeightsError(f"the engine's self-test failed: {fault}")
    everything = [name for name, _ in model.named_parameters()]
    parts = min(1 + max(map(_layer, everything)), 1 if dtype in (torch.float32, torch.float64) else PARTS)
    for part in range(parts):
        names = [name for name in everything if _layer(name) % parts == part]
        if fault := missing(names):
            while len(names) > 1:  # find one of them
                half = names[: len(names) // 2]
                names = half if missing(half) else names[len(half) :]
            raise StaleWeightsError(
                f"the engine's self-test failed: {fault}. A tensor that does not arrive is {names[0]}; otherwise "
                "the engine keeps cached prompts when its weights change"
            )
    send()
    again = gap()
    if fault := again.fault(TIMES * max(right.size, TINY[dtype]), "with the weights of the run again"):
        raise StaleWeightsError(f"the engine's self-test failed: {fault}")
    right += again
    say(
        f"the engine's self-test passed: changes of all tensors reached its samples, also those with a cached prompt "
        f"(gap {right.size:.1e} nats; {updates} test updates)"
    )
    return right


def _layer(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


def sampled_gap(engine: Engine, scorer: Scorer, vocabulary: int, context_length: int) -> Gap:
    """Return the gap between engine and trainer on this rank's new samples (a collective).

    The prompts are random tokens, the same in every call, so that an engine with a prefix cache uses it. Raises
    StaleWeightsError if the engine returns no sample."""
    num = min(PROMPT_TOKENS, max(1, context_length - NEW_TOKENS))
    draw = generator(0, Purpose.PROBE, 0, "engine test")
    prompts = [tuple(int(i) for i in draw.integers(0, vocabulary, num)) for _ in range(NUM_PROMPTS)]
    requests = [
        SampleRequest(
            problem_id=str(i), sample_index=k, prompt_ids=ids, seed=0, purpose=Purpose.PROBE, step=0
        )
        for i, ids in enumerate(prompts)
        for k in range(SAMPLES)
    ]
    asked = SamplingParameters(temperature=scorer.temperature, max_new_tokens=NEW_TOKENS, stop_token_ids=())
    sequences: list[TrainSequence] = []
    for made in engine.generate(requests, asked):
        if made.error or made.behavior_logprobs is None:
            raise StaleWeightsError(f"the engine could not be tested: it returned no sample ({made.error})")
        prompt = prompts[int(made.problem_id)]
        one = TrainSequence(
            token_ids=prompt + made.completion_ids, num_prefix_tokens=0, group=len(sequences),
            origin=(Origin.CONTEXT,) * num + (Origin.POLICY,) * len(made.completion_ids),
            behavior_logprobs=made.behavior_logprobs, policy_version=made.policy_version,
        )  # fmt: skip
        sequences.append(one)
    engine.take_cost()
    longest = max(len(s.token_ids) for s in sequences)
    found, limit = Gap(), max(longest, scorer.tokens_per_microbatch)
    for batch in scorer.with_proximal(scorer.pack(sequences, limit=limit), 0):
        assert batch.behavior_logprobs is not None
        assert batch.proximal_logprobs is not None
        found += Gap.of(batch.proximal_logprobs, batch.behavior_logprobs)
    return found
