"""Proves on samples that an engine uses the weights that it is given, and watches that it goes on doing so.

``SelfTest``, at the start of a stage, is for engines that cannot show the bits they compute with. It publishes
weights in which all tensors are changed, while the caches are full, and compares log-probabilities with the
trainer's. A tensor that does not reach the engine, or a cache that is not reset, is seen at once. Then the weights
of the run are published again.

``GapTest`` compares the tokens of every update with what was measured at the start.

Of the gaps g = log π_trainer − log π_engine at sampled tokens, two numbers are judged. Rounding changes a
log-probability in proportion to 1 − π, so the size Σ |g| ÷ Σ (1 − π) stays nearly the same while a policy
becomes certain. The slope of g against log π is 0 for rounding; another temperature T in the engine makes it
1 − 1/T.
Held by: tests/contract/test_engine_test.py, tests/rollout/test_vllm_rl.py
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from truestep.records import Origin, TrainSequence
from truestep.rollout.engine import Engine, SampleRequest, SamplingParameters, StaleWeightsError
from truestep.seeding import Purpose, generator
from truestep.train.layout import compute_dtype
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
# Of the self-test: times the size at the start that is allowed with changed weights; change of the trainer's
# log-probabilities (nats); relative noise to start with, and at most; how many times the noise an effect must be,
# and the standard error of its slope, to prove anything; the slope below which a tensor did not arrive; tries.
DISTURBED = {torch.float64: 1e3, torch.float32: 100.0, torch.bfloat16: 6.0, torch.float16: 10.0}
CHANGE, SIZE, LARGEST, CLEAR, SURE, ARRIVED, TRIES = 2.0, 0.1, 16.0, 3.0, 0.08, -0.5, 3
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
        """Judge what was added, and forget it, if it is enough (a collective). Raises StaleWeightsError."""
        gap = self.found.over(ranks)
        if gap.count < FEWEST:
            return  # they are judged with those of the next update
        self.found, limit = Gap(), FIRST[self.dtype]
        if self.right.count:
            known = (
                TIMES * max(self.right.size, TINY[self.dtype]) * (1 + OUTLIERS / max(self.right.mass, 1e-9))
            )
            limit = min(limit, known)
        if fault := gap.fault(limit, f"step {step + 1}"):
            raise StaleWeightsError(f"{fault}; no update was made")
        if self.right.mass < ENOUGH:
            self.right += gap


class Disturbance:
    """Random changes of a module's parameters, each of which can be made and undone alone, to the bit. On all ranks
    of a sharded module. Holds a copy of the parameters in host memory."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {name: local(p.detach()) for name, p in module.named_parameters()}
        self.kept = {name: p.to("cpu", copy=True) for name, p in self.parameters.items()}
        self.sizes = dict.fromkeys(self.parameters, 0.0)

    @torch.no_grad()
    def make(self, name: str) -> None:
        """Add noise of ``sizes[name]`` times the parameter's root mean square (or 1, if it is all zeros)."""
        whole = self.kept[name].float()
        scale = float(whole.norm()) / math.sqrt(max(1, whole.numel())) or 1.0
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(whole.shape, generator=draw) * self.sizes[name] * scale
        self.parameters[name].copy_((whole + noise).to(self.kept[name].dtype))

    @torch.no_grad()
    def undo(self, name: str) -> None:
        self.parameters[name].copy_(self.kept[name])

    def set(self, names: Collection[str]) -> None:
        """Disturb these parameters and no others."""
        for name in self.parameters:
            self.make(name) if name in names else self.undo(name)


class SelfTest:
    """Proves that every tensor that is published reaches the engine's samples, and that its caches are reset.

    All tensors are disturbed so much that the trainer's log-probabilities of fixed tokens change by about CHANGE
    nats, and are published. Let r be the engine's log-probabilities minus the trainer's, and d_i what the change
    of tensor i alone contributes to the trainer's. The slope Σ r·d_i ÷ Σ d_i² is 0 if tensor i has arrived, and −1
    if the engine still has the old one. Shapes: N tokens."""

    def __init__(self, policy: Policy, engine: Engine, scorer: Scorer, version: int) -> None:
        self.policy, self.engine, self.version = policy, engine, version
        self.scorer, self.plain = scorer, replace(scorer, temperature=1.0)  # engines score at temperature 1
        self.dtype, self.ranks = compute_dtype(policy, next(policy.parameters())), scorer.ranks
        self.vocabulary = int(policy.model.config.vocab_size)
        self.prompts = probe_prompts(self.vocabulary, policy.context_length)
        self.updates = 0

    def run(self, say: Callable[[str], None]) -> Gap:
        """Run the test, and publish the weights again (a collective). Returns the gap of the right weights, for
        ``GapTest``. Raises StaleWeightsError, which names a tensor that did not arrive."""
        right = self._gap()
        self._refuse(right.fault(FIRST[self.dtype], "with the weights of the run"))
        change = Disturbance(self.policy.model)
        try:
            unproven = self._disturbed(change, list(change.parameters), right)
        finally:
            change.set(())
        self._publish()
        again = self._gap()
        limit = TIMES * max(right.size, TINY[self.dtype])
        self._refuse(again.fault(limit, "with the weights of the run again"))
        right += again
        proven = len(change.parameters) - len(unproven)
        rest = (
            f" (not proven, because their effect is too small: {', '.join(unproven[:3])})" if unproven else ""
        )
        say(
            f"the engine's self-test passed: changes of {proven} of {len(change.parameters)} tensors{rest} reached "
            f"the engine, and its cache was reset (gap {right.size:.1e} nats; {self.updates} test updates)"
        )
        return right

    def _disturbed(self, change: Disturbance, names: list[str], right: Gap) -> list[str]:
        """Test the named tensors, in as few updates as the noise of the engine allows. Return those whose effect was
        too small to prove anything."""
        before, queue, tries = self._trainer(), list(names), dict.fromkeys(names, 0)
        noise = max(math.sqrt(self._mean((one - before) ** 2)) for one in self._engines())
        # Each of n tensors contributes about CHANGE ÷ √n, of which CLEAR times the noise is needed, and some more.
        count = max(1, min(len(names), int((CHANGE / (1.5 * CLEAR * max(noise, 1e-6))) ** 2)))
        unproven: list[str] = []
        while queue:
            group, queue = queue[:count], queue[count:]
            self._choose_sizes(change, group, before)
            now = self._trainer()
            self._publish()
            # Prompts are in the cache since the weights of the run.
            cached = "" if self.updates > 1 else self._cached(right)
            rests = [one - now for one in self._engines()]
            rest = self._unproven(change, group, rests, now, noise)
            self._refuse(cached)
            for name in rest:
                tries[name] += 1
            unproven += [name for name in rest if tries[name] == TRIES]
            queue += [name for name in rest if tries[name] < TRIES]
            if 2 * len(rest) > len(group):
                count = max(1, count // 4)
        return unproven

    def _cached(self, right: Gap) -> str:
        limit = DISTURBED[self.dtype] * max(right.size, TINY[self.dtype])
        return self._gap().fault(limit, "with changed weights")

    def _unproven(
        self, change: Disturbance, group: list[str], rests: list[Tensor], now: Tensor, noise: float
    ) -> list[str]:
        """Return those whose effect is too small. Raises StaleWeightsError if one did not arrive."""
        found = []
        for name in group:
            change.undo(name)
            effect = now - self._trainer()
            change.make(name)
            size = math.sqrt(self._mean(effect * effect))
            slopes = [self._slope(rest, effect) for rest in rests]
            if size < CLEAR * noise or any(error > SURE for _, error in slopes):
                found.append(name)
                continue
            for number, (slope, error) in enumerate(slopes):
                if slope < ARRIVED:
                    raise StaleWeightsError(
                        f"the engine's self-test failed: {name} was changed and published, but server {number + 1} of "
                        f"{len(slopes)} still computes with the old one (slope {slope:.2f} ± {error:.2f}; 0 is right)"
                    )
        return found

    def _choose_sizes(self, change: Disturbance, names: Collection[str], before: Tensor) -> None:
        """Choose the noise so that the trainer's log-probabilities change by about CHANGE nats (a collective)."""
        size = SIZE
        for _ in range(16):
            change.sizes.update(dict.fromkeys(names, size))
            change.set(names)
            found = math.sqrt(self._mean((self._trainer() - before) ** 2))
            if found > 2 * CHANGE or not math.isfinite(found):
                size /= 2
            elif found < CHANGE / 2 and size < LARGEST:
                size *= 2
            else:
                return

    def _slope(self, rest: Tensor, effect: Tensor) -> tuple[float, float]:
        """Return Σ r·d ÷ Σ d² over the tokens of all ranks, and its standard error, from what the slope leaves."""
        both, squares = self.ranks.sum([float((rest * effect).sum()), float((effect * effect).sum())])
        slope = both / squares if squares else 0.0
        (left,) = self.ranks.sum([float((((rest - slope * effect) * effect) ** 2).sum())])
        return slope, math.sqrt(left) / squares if squares else math.inf

    def _mean(self, values: Tensor) -> float:
        total, count = self.ranks.sum([float(values.sum()), float(len(values))])
        return total / max(1.0, count)

    def _trainer(self) -> Tensor:
        """Return the trainer's log-probabilities of the fixed tokens, without the first of each prompt [N]."""
        sequences = [
            TrainSequence(
                token_ids=ids, num_prefix_tokens=0, group=i,
                origin=(Origin.CONTEXT, *(Origin.POLICY,) * (len(ids) - 1)),
            )
            for i, ids in enumerate(self.prompts)
        ]  # fmt: skip
        limit = max(self.plain.tokens_per_microbatch, *map(len, self.prompts))
        batches = self.plain.with_proximal(self.plain.pack(sequences, limit=limit), 0)
        by_prompt: dict[int, Tensor] = {}
        for batch in batches:
            assert batch.proximal_logprobs is not None
            for i in batch.sequence_index.unique().tolist():
                by_prompt[i] = batch.proximal_logprobs[batch.sequence_index == i].double().cpu()
        return torch.cat([by_prompt[i] for i in sorted(by_prompt)])

    def _engines(self) -> list[Tensor]:
        """Return the log-probabilities of each server of the engine."""
        found = [[v for ids in self.prompts for v in one.score(ids, 1, 1.0)] for one in self.engine.parts]
        return [torch.tensor(values, dtype=torch.float64) for values in found]

    def _gap(self) -> Gap:
        """Return the gap of the server with the largest one."""
        gaps = [sampled_gap(one, self.scorer, self.prompts).over(self.ranks) for one in self.engine.parts]
        return max(gaps, key=lambda gap: math.inf if math.isnan(gap.size) else gap.size)

    def _publish(self) -> None:
        self.updates += 1
        publish(self.policy, self.engine, self.version, self.ranks)

    def _refuse(self, fault: str) -> None:
        if fault:
            raise StaleWeightsError(f"the engine's self-test failed: {fault}")


def probe_prompts(vocabulary: int, context_length: int) -> list[tuple[int, ...]]:
    """Return the self-test's prompts of random tokens."""
    num = min(PROMPT_TOKENS, max(2, context_length - NEW_TOKENS))
    draw = generator(0, Purpose.PROBE, 0, "engine test")
    return [tuple(int(i) for i in draw.integers(0, vocabulary, num)) for _ in range(NUM_PROMPTS)]


def sampled_gap(engine: Engine, scorer: Scorer, prompts: Sequence[tuple[int, ...]]) -> Gap:
    """Return the gap between engine and trainer on this rank's new samples (a collective).

    The prompts are the same in every call, so that an engine with a prefix cache uses it. Raises StaleWeightsError
    if the engine returns no sample."""
    num = len(prompts[0])
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
