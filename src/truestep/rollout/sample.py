"""Turns prompts into graded groups of samples, with an engine and a method's plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from truestep import records
from truestep.objective import plan as plans
from truestep.objective.plan import Done, Plan, PlanState, RoundResult
from truestep.records import Group, Message, Origin, Prompt, RewardInput, Rollout, Round, Score, Stop
from truestep.rollout.engine import Engine, SampleRequest, SamplingParameters, StaleWeightsError
from truestep.seeding import Purpose, generator

MAX_SAMPLES = 1 << 20  # per prompt and step; the sample numbers of a prompt's second group start here
Decode = Callable[[Sequence[int]], str]
ScoreMany = Callable[[Sequence[RewardInput]], list[Score]]
# From a prompt and a share of its solution's text to the turns and token ids of the prompt that shows it.
Hint = Callable[[Prompt, float], tuple[tuple[Message, ...], tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Samples graded groups. With given weights, a sample depends only on (seed, step, prompt, number).

    ``demonstrations`` has the expert's completions (with stop token) by problem id. ``hinted`` makes a prompt
    that shows the first part of the problem's solution. Problems of the data sets ``unguided`` have no
    demonstration: a plan that needs one is replaced by ordinary samples. A sample without a verdict solves its problem if its
    reward is at least ``solved_at``."""

    engine: Engine
    plan: Plan
    sampling: SamplingParameters
    samples_per_prompt: int
    decode: Decode
    score: ScoreMany
    seed: int
    solved_at: float = 1.0
    check_stop: Callable[[], None] = lambda: None
    demonstrations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    hinted: Hint | None = None
    unguided: frozenset[str] = frozenset()

    def groups(
        self,
        prompts: Sequence[Prompt],
        step: int,
        repeats: Sequence[int] = (),
        *,
        controls: Mapping[str, float] | None = None,
        stored: Mapping[int, Rollout] | None = None,
    ) -> list[Group]:
        """Return one graded group per prompt, in order. Rounds are batched over prompts.

        ``repeats`` says how often each prompt occurs earlier in the batch over all ranks (0 by default). The
        second group of a prompt has different sample numbers, and therefore different random numbers.
        ``stored`` maps places in ``prompts`` to stored samples."""
        places = []
        for index, (prompt, count) in enumerate(zip(prompts, repeats or [0] * len(prompts), strict=True)):
            draw = float(generator(self.seed, Purpose.PLAN, step, f"{prompt.problem.id}/{count}").random())
            sample = (stored or {}).get(index)
            places.append(_Place(prompt=prompt, next=count * MAX_SAMPLES, draw=draw, stored=sample))
        while True:
            asking = [p for p in places if p.kept is None and self._wants_more(p, step, controls or {})]
            if not asking:
                return [_merge(place) for place in places]
            self._sample(asking, step)

    def is_guided(self, prompt: Prompt) -> bool:
        """Return whether the method may use a demonstration of this prompt."""
        return prompt.data not in self.unguided

    def _wants_more(self, place: _Place, step: int, controls: Mapping[str, float]) -> bool:
        """Return whether the plan has further rounds for this prompt, which are then added to the place."""
        state = PlanState(
            step=step,
            num_samples=self.samples_per_prompt,
            history=tuple(
                RoundResult(round=r, solved=tuple(s.solved(self.solved_at) for s in scores))
                for r, (_, scores) in zip(place.rounds, place.done, strict=True)
            ),
            draw=place.draw,
            controls=controls,
            has_stored=place.stored is not None,
        )
        plan = plans.own if self.plan.needs_demonstrations and not self.is_guided(place.prompt) else self.plan
        answer = plan(state)
        if isinstance(answer, Done):
            place.kept = answer.rounds or tuple(range(len(place.done)))
            return False
        place.rounds += answer
        return True

    def _sample(self, asking: Sequence[_Place], step: int) -> None:
        """Sample and score the new rounds of all places, in one batch."""
        rollouts: dict[tuple[int, int], Rollout] = {}  # by place and sample number
        pending: dict[tuple[str, int], tuple[int, _Start]] = {}  # by problem and sample number
        requests: list[SampleRequest] = []
        spans: list[tuple[int, range]] = []  # a place and its sample numbers, by round
        for index, place in enumerate(asking):
            for round_ in place.rounds[len(place.done) :]:
                span = range(place.next, place.next + round_.num_samples)
                spans.append((index, span))
                place.next = span.stop
                for number in span:
                    start = self._start(place, round_)
                    if start.is_whole:
                        rollouts[index, number] = start.rollout(place.prompt, number, self.sampling)
                    else:
                        pending[place.prompt.problem.id, number] = (index, start)
                        requests.append(self._request(place.prompt, number, start, step))
        for sampled in self.engine.generate(requests, self.sampling, self.check_stop) if requests else ():
            require_version(sampled, self.engine.policy_version)
            index, start = pending[sampled.problem_id, sampled.sample_index]
            rollouts[index, sampled.sample_index] = start.continued(sampled)
        keys = sorted(rollouts)
        scores = self.score([self._input(asking[i].prompt, rollouts[i, n], step) for i, n in keys])
        graded = {key: _of(rollouts[key], score) for key, score in zip(keys, scores, strict=True)}
        for index, span in spans:
            asking[index].done.append(([rollouts[index, n] for n in span], [graded[index, n] for n in span]))

    def _start(self, place: _Place, round_: Round) -> _Start:
        """Return the beginning of a sample of this round."""
        name = place.prompt.problem.id
        if round_.stored:
            if place.stored is None:
                raise records.RecordError(f"the plan needs a stored sample of {name}, which has none")
            return _Start(round=round_, stored=place.stored, is_whole=True)
        if round_.hint:
            if self.hinted is None:
                fault = "the plan needs hints, but this sampler cannot make them (hinted is None)"
                raise records.RecordError(fault)
            return _Start(round=round_, prompt_ids=self.hinted(place.prompt, round_.hint)[1])
        if not round_.prefix:
            return _Start(round=round_)
        trace = self.demonstrations[name]
        if round_.prefix >= 1:
            return _Start(round=round_, tokens=trace, is_whole=True)
        # The policy samples at least the last token.
        num = min(int(round_.prefix * len(trace)), len(trace) - 1, self.sampling.max_new_tokens - 1)
        return _Start(round=round_, tokens=trace[: max(0, num)])

    def _request(self, prompt: Prompt, number: int, start: _Start, step: int) -> SampleRequest:
        return SampleRequest(
            problem_id=prompt.problem.id,
            sample_index=number,
            prompt_ids=(start.prompt_ids or prompt.token_ids) + start.tokens,
            seed=self.seed,
            purpose=Purpose.SAMPLE,
            step=step,
            num_given=len(start.tokens),
        )

    def _input(self, prompt: Prompt, rollout: Rollout, step: int) -> RewardInput:
        hint, messages = rollout.round.hint, prompt.problem.messages
        if hint and self.hinted is not None:
            messages, _ = self.hinted(prompt, hint)
        return RewardInput(
            problem=prompt.problem,
            messages=messages,
            completion=self.decode(rollout.completion_ids),
            completion_ids=rollout.completion_ids,
            stop=rollout.stop,
            seed=self.seed,
            step=step,
            sample=rollout.sample_index,
            limit=self.sampling.max_new_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class _Start:
    """The beginning of a sample: demonstration tokens, a hinted prompt, or a whole stored sample."""

    round: Round
    tokens: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    stored: Rollout | None = None
    is_whole: bool = False

    def rollout(self, prompt: Prompt, number: int, sampling: SamplingParameters) -> Rollout:
        """Return the sample if nothing has to be generated."""
        if self.stored is not None:
            return replace(self.stored, sample_index=number, round=self.round)
        num = len(self.tokens)
        return Rollout(
            problem_id=prompt.problem.id,
            sample_index=number,
            completion_ids=self.tokens,
            origin=(self.round.prefix_origin,) * num,
            policy_version=(records.NOT_SAMPLED,) * num,
            behavior_logprobs=None,
            distribution=records.Distribution(temperature=sampling.temperature),
            stop=Stop.STOP_TOKEN,
            round=self.round,
        )

    def continued(self, sampled: Rollout) -> Rollout:
        """Join the start and the engine's continuation into one completion."""
        num, behavior = len(self.tokens), sampled.behavior_logprobs
        if sampled.stop is Stop.ERROR or num == 0:
            return replace(sampled, round=self.round, prompt_ids=self.prompt_ids)
        return replace(
            sampled,
            completion_ids=self.tokens + sampled.completion_ids,
            origin=(self.round.prefix_origin,) * num + sampled.origin,
            policy_version=(records.NOT_SAMPLED,) * num + sampled.policy_version,
            behavior_logprobs=None if behavior is None else (0.0,) * num + behavior,
            round=self.round,
        )


@dataclass(kw_only=True)
class _Place:
    """A prompt and its rounds so far. ``done`` is aligned with ``rounds``; ``next`` is the number of the next
    sample."""

    prompt: Prompt
    next: int
    draw: float
    stored: Rollout | None
    kept: tuple[int, ...] | None = None
    rounds: list[Round] = field(default_factory=list)
    done: list[tuple[list[Rollout], list[Score]]] = field(default_factory=list)


def require_version(rollout: Rollout, version: int) -> None:
    """Raise StaleWeightsError if the engine says that another version of the policy sampled a token."""
    if others := [v for v in rollout.policy_version if v != version]:
        raise StaleWeightsError(
            f"{len(others)} of {len(rollout.policy_version)} tokens of sample {rollout.sample_index} of "
            f"{rollout.problem_id} were sampled by version {others[0]} of the weights, not by version {version}"
        )


def _of(rollout: Rollout, score: Score) -> Score:
    """Return the sample's score. A sample that the engine could not finish is unscored."""
    if rollout.stop is Stop.ERROR:
        return Score(reward=None, verdict=records.Verdict.UNSCORED, reason=f"engine: {rollout.error}")
    return score


def num_sampled_tokens(rollouts: Sequence[Rollout]) -> int:
    """Count the tokens that the current policy generated."""
    return sum(r.origin.count(Origin.POLICY) for r in rollouts)


def _merge(place: _Place) -> Group:
    """Merge the kept rounds into one group, which is empty if the plan requested no round."""
    kept = place.kept or ()
    rollouts = tuple(r for n in kept for r in place.done[n][0])
    scores = tuple(s for n in kept for s in place.done[n][1])
    discarded = sum(num_sampled_tokens(done[0]) for n, done in enumerate(place.done) if n not in kept)
    return Group(prompt=place.prompt, rollouts=rollouts, scores=scores, num_discarded_tokens=discarded)
