"""One step off: while step s trains, the groups of step s + 1 are sampled by version s of the weights.

An engine in the trainer's own module samples before the training. An engine in other processes samples beside it,
in a thread that takes part in no collective. In both cases the samples are complete before version s + 1 is
published, so every token of step s ≥ 1 was sampled by version s − 1.

When step s trains, its samples were made by other weights than the trainer's. So engine and trainer are compared
under the version that sampled: on some of the sampled tokens, before the training, or, if the engine samples beside
it, on the beginnings of other completions, which are sampled first and compared before the first optimizer update.
Held by: tests/contract/test_rollout_ahead.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from truestep.flops import Ledger
from truestep.records import Origin, TrainSequence
from truestep.rollout.engine import SampleRequest, StaleWeightsError
from truestep.seeding import Purpose
from truestep.signals import Interrupted
from truestep.train import metrics
from truestep.train.metrics import Meter
from truestep.train.scoring import work
from truestep.train.sequences import first_sequences, sampled_sequence
from truestep.train.waiting import Sampled

if TYPE_CHECKING:
    from torch import Tensor

    from truestep.train.checkpoints import TrainState
    from truestep.train.engine_test import GapTest
    from truestep.train.loop import StageSpec
    from truestep.train.parallel import Ranks
    from truestep.train.source import RolloutSource, StepData

COMPARED_TOKENS = 2048  # of a step's samples on a rank; more would only cost time
# Completions that are sampled only to be compared, and their tokens.
PROBES, PROBE_TOKENS = 32, 8


def begin(spec: StageSpec, source: RolloutSource, state: TrainState) -> StepData:
    """Return the step's data from the waiting groups, and submit those of the next step (a collective).

    If no groups wait (in the first step), they are sampled now."""
    now = state.waiting
    if now is None:
        now = compared(spec, source, source.sampled(state.step, state.memory), state.step)
    data = source.data(now, state.memory)
    if state.step + 1 < spec.num_steps:
        submit(spec, source, state)
    return data


def submit(spec: StageSpec, source: RolloutSource, state: TrainState) -> None:
    """Submit the groups of the next step: to a thread, or to the engine now if it is in the trainer's module."""
    step = state.step + 1
    if source.runs_beside:
        source.submit(step, state.memory, partial(probes, source, step))
    else:
        sampled = source.sampled(step, state.memory)
        source.submitted = compared(spec, source, sampled, state.step)


@dataclass
class Comparison:
    """Compares engine and trainer on what the thread has sampled, before the first update of a step."""

    source: RolloutSource
    gaps: GapTest | None
    step: int = -1  # of the last comparison
    found: tuple[Mapping[str, float], Ledger] = field(default_factory=lambda: ({}, Ledger()))

    def add(self, trainer: Tensor, engine: Tensor) -> None:
        """Nothing: the samples of an update are of older weights, and their distance is the change of the policy."""

    def judge(self, step: int, ranks: Ranks) -> None:
        """Compare, if that was not done yet in this step (a collective). Raises StaleWeightsError."""
        if self.step == step or (probed := self.source.probed()) is None:
            return
        sequences, cost = probed
        found, scored = measure(self.source, self.gaps, sequences, step)
        self.step, self.found = step, (found, cost + scored)

    def added(self, sampled: Sampled) -> Sampled:
        """Return the groups of the next step with what the comparison has found."""
        found, cost = self.found
        return replace(sampled, compared=found, work=sampled.work + cost)


def compared(spec: StageSpec, source: RolloutSource, sampled: Sampled, version: int) -> Sampled:
    """Return the groups with the gap between engine and trainer on their first tokens. The trainer must still
    have the version of the weights that sampled them (a collective)."""
    groups = [g.group for g in sampled.everything]
    sequences = first_sequences(groups, COMPARED_TOKENS)
    found, cost = measure(source, spec.gaps, sequences, version)
    return replace(sampled, compared=found, work=sampled.work + cost)


def probes(
    source: RolloutSource, step: int, check_stop: Callable[[], None]
) -> tuple[list[TrainSequence], Ledger]:
    """Return the beginnings of some completions of the step's prompts, sampled by the engine now (no collective)."""
    sampler, prompts = source.sampler, source.own_prompts(step)
    asked = replace(sampler.sampling, max_new_tokens=min(PROBE_TOKENS, sampler.sampling.max_new_tokens))
    requests = [
        SampleRequest(
            problem_id=prompts[n % len(prompts)].problem.id, sample_index=n, seed=sampler.seed, step=step,
            prompt_ids=prompts[n % len(prompts)].token_ids, purpose=Purpose.PROBE,
        )
        for n in range(PROBES if prompts else 0)
    ]  # fmt: skip
    made = list(sampler.engine.generate(requests, asked, check_stop)) if requests else []
    if requests and not any(r.completion_ids for r in made):
        raise StaleWeightsError(f"the engine could not be compared with the trainer: {made[0].error}")
    rollouts = sorted((r for r in made if r.completion_ids), key=lambda r: r.sample_index)
    found = [
        sampled_sequence(prompts[r.sample_index % len(prompts)], r, group=i) for i, r in enumerate(rollouts)
    ]
    return found, sampler.engine.take_cost()


def measure(
    source: RolloutSource, gaps: GapTest | None, sequences: Sequence[TrainSequence], step: int
) -> tuple[dict[str, float], Ledger]:
    """Compare the sequences' behavior log-probabilities with the trainer's (a collective). Raises
    StaleWeightsError if the engine does not use the trainer's weights."""
    scorer, meter = source.scorer, Meter()
    batches = scorer.with_proximal(scorer.pack(sequences), step)
    for batch in batches:
        own = batch.origin == int(Origin.POLICY)
        if batch.behavior_logprobs is None or not bool(own.any()):
            continue
        assert batch.proximal_logprobs is not None
        pair = batch.proximal_logprobs[own], batch.behavior_logprobs[own]
        metrics.of_gap(meter, *pair)
        if gaps is not None:
            gaps.add(*pair)
    if gaps is not None:
        gaps.judge(step, scorer.ranks)
    return meter.reduce(scorer.ranks), work("scored", batches)


def collected(spec: StageSpec, source: RolloutSource, step: int) -> Sampled | None:
    """Wait for the groups of the next step. Return None if there is none, or if a stop was asked for before they
    were complete, on any rank (a collective): then the weights of the next version will sample them."""
    observe = spec.updater.observe
    assert isinstance(observe, Comparison)
    try:
        observe.judge(step, spec.ranks)  # no update did if there was no token to train
        found = source.collect()
        if found is not None and source.runs_beside:
            found = observe.added(found)
    except Interrupted:
        found = None
    source.drop()
    missing = spec.ranks.max([float(found is None)])[0]
    return None if missing else found


# What an update measures between its proximal policy and the engine is not rounding if the samples are older.
CHANGE = {
    "sampling/logprob_difference_mean": "sampling/policy_change_mean",
    "sampling/logprob_difference_max": "sampling/policy_change_max",
    "sampling/kl": "sampling/policy_change_kl",
}


def as_change(found: Mapping[str, float]) -> dict[str, float]:
    """Return an update's metrics, with the distance from the sampling policy under the names of a change of the
    policy, not of a gap between engine and trainer."""
    return {CHANGE.get(key, key): value for key, value in found.items()}
