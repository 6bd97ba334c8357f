"""Prompts → graded groups, through an engine and a method's plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from truestep.objective.plan import Asked, Keep, Outcome, Plan, Round
from truestep.records import (
    Distribution,
    Group,
    Kind,
    Problem,
    Prompt,
    RecordError,
    Rollout,
    Score,
    Stop,
    Verdict,
)
from truestep.rollout.engine import Engine, SampleRequest, SamplingParameters
from truestep.seeding import Purpose, generator

MAX_SAMPLES = 1 << 20  # of one prompt in one step; numbers of a prompt's second group start here
GradeMany = Callable[[Sequence[tuple[Problem, str]]], list[Score]]
NOT_SAMPLED = float("nan")


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Everything that turns prompts into groups; a function of (seed, step, prompt, sample) given the
    weights.

    ``demonstrations`` holds the expert's completion (with its stop token) by problem id; ``hinted`` makes a
    prompt that shows the first part of the problem's solution.
    """

    engine: Engine
    plan: Plan
    sampling: SamplingParameters
    samples_per_prompt: int
    decode: Callable[[Sequence[int]], str]
    grade: GradeMany
    seed: int
    check_stop: Callable[[], None] = lambda: None
    demonstrations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    hinted: Callable[[Prompt, float], tuple[int, ...]] | None = None

    def groups(
        self,
        prompts: Sequence[Prompt],
        step: int,
        repeats: Sequence[int] = (),
        *,
        controls: Mapping[str, float] | None = None,
        replays: Mapping[int, Rollout] | None = None,
    ) -> list[Group]:
        """One graded group per prompt, in order; rounds are batched over prompts.

        ``repeats`` says of each prompt how often the whole batch, over all ranks, has held it before (none by
        default): its second group has sample numbers, and so random numbers, of its own. ``replays`` are
        stored traces by place in ``prompts``.
        """
        places = [
            _Place(
                prompt=prompt,
                first=count * MAX_SAMPLES,
                draw=float(generator(self.seed, Purpose.PLAN, step, f"{prompt.problem.id}/{count}").random()),
                replay=(replays or {}).get(index),
            )
            for index, (prompt, count) in enumerate(zip(prompts, repeats or [0] * len(prompts), strict=True))
        ]
        while True:
            asking = [
                place for place in places if place.kept is None and self._ask(place, step, controls or {})
            ]
            if not asking:
                return [_merge(place) for place in places]
            self._sample(asking, step)

    def _ask(self, place: _Place, step: int, controls: Mapping[str, float]) -> bool:
        """Whether the plan wants more of this prompt; what it wants is left in the place."""
        outcomes = [
            Outcome(round=r, rewards=tuple(s.reward for s in scores))
            for r, (_, scores) in zip(place.rounds, place.done, strict=True)
        ]
        answer = self.plan(
            Asked(
                step=step,
                num_samples=self.samples_per_prompt,
                history=tuple(outcomes),
                draw=place.draw,
                controls=controls,
                has_replay=place.replay is not None,
            )
        )
        if isinstance(answer, Keep):
            place.kept = answer.rounds or tuple(range(len(place.done)))
            return False
        place.rounds += answer
        return True

    def _sample(self, asking: Sequence[_Place], step: int) -> None:
        """Sample and grade what the places ask for, all in one batch."""
        found: list[dict[int, Rollout]] = [{} for _ in asking]  # by sample number
        requests: list[SampleRequest] = []
        owner: dict[tuple[str, int], tuple[int, Rollout]] = {}
        numbers: list[list[range]] = []
        for index, place in enumerate(asking):
            numbers.append([])
            for asked in place.rounds[len(place.done) :]:
                span = range(place.next, place.next + asked.num_samples)
                numbers[-1].append(span)
                place.next = span.stop
                for number in span:
                    given = self._given(place, asked, number)
                    if given.stop is not Stop.ERROR:
                        found[index][number] = given  # nothing is left to be generated
                        continue
                    owner[place.prompt.problem.id, number] = (index, given)
                    requests.append(self._request(place.prompt, given, step))
        for rollout in self.engine.generate(requests, self.sampling, self.check_stop) if requests else ():
            index, given = owner[rollout.problem_id, rollout.sample_index]
            found[index][rollout.sample_index] = _continued(given, rollout)
        every = [
            (place, number, r)
            for place, rs in zip(asking, found, strict=True)
            for number, r in sorted(rs.items())
        ]
        scores = self.grade([(place.prompt.problem, self.decode(r.completion_ids)) for place, _, r in every])
        graded = {
            (id(place), number): _score(r, score)
            for (place, number, r), score in zip(every, scores, strict=True)
        }
        for place, rollouts, spans in zip(asking, found, numbers, strict=True):
            for span in spans:
                place.done.append(([rollouts[n] for n in span], [graded[id(place), n] for n in span]))

    def _given(self, place: _Place, asked: Round, number: int) -> Rollout:
        """The sample as it is before anything is generated; stop ERROR says that something has to be."""
        prompt = place.prompt
        blank = Rollout(
            problem_id=prompt.problem.id,
            sample_index=number,
            completion_ids=(),
            behavior_logprobs=(),
            distribution=Distribution(policy_version=-1, temperature=self.sampling.temperature),
            stop=Stop.ERROR,
            error="not sampled",
            kind=asked.kind,
        )
        if asked.kind is Kind.ON:
            return blank
        if asked.kind is Kind.REPLAY:
            if place.replay is None:
                raise RecordError(f"the plan asks for a stored trace of {prompt.problem.id}, which has none")
            return replace(place.replay, sample_index=number, kind=Kind.REPLAY)
        if asked.kind is Kind.HINT:
            if self.hinted is None:
                raise RecordError("the plan asks for hints, and nobody makes them")
            return replace(blank, prompt_ids=self.hinted(prompt, asked.fraction))
        trace = self.demonstrations[prompt.problem.id]
        whole = asked.kind is Kind.DEMO or asked.fraction >= 1
        # A prefix is unfinished: at least the last token is the policy's own.
        num = len(trace) if whole else min(int(asked.fraction * len(trace)), len(trace) - 1)
        num = num if whole else max(0, min(num, self.sampling.max_new_tokens - 1))
        found = replace(
            blank,
            completion_ids=trace[:num],
            behavior_logprobs=(NOT_SAMPLED,) * num,
            num_expert_tokens=num,
            expert_is_context=asked.expert_is_context,
        )
        return replace(found, stop=Stop.STOP_TOKEN, error="") if whole else found

    def _request(self, prompt: Prompt, given: Rollout, step: int) -> SampleRequest:
        return SampleRequest(
            problem_id=prompt.problem.id,
            sample_index=given.sample_index,
            prompt_ids=(given.prompt_ids or prompt.token_ids) + given.completion_ids,
            seed=self.seed,
            purpose=Purpose.SAMPLE,
            step=step,
            num_given=len(given.completion_ids),
        )


@dataclass(kw_only=True)
class _Place:
    """A prompt on its way through the rounds. ``done`` is aligned with ``rounds``."""

    prompt: Prompt
    first: int
    draw: float
    replay: Rollout | None
    kept: tuple[int, ...] | None = None
    rounds: list[Round] = field(default_factory=list)
    done: list[tuple[list[Rollout], list[Score]]] = field(default_factory=list)
    next: int = -1

    def __post_init__(self) -> None:
        self.next = self.first


def _continued(given: Rollout, sampled: Rollout) -> Rollout:
    """What was given and what the engine made of it, as one completion."""
    if sampled.stop is Stop.ERROR:
        return replace(sampled, kind=given.kind)
    return replace(
        sampled,
        completion_ids=given.completion_ids + sampled.completion_ids,
        behavior_logprobs=given.behavior_logprobs + sampled.behavior_logprobs,
        kind=given.kind,
        num_expert_tokens=given.num_expert_tokens,
        expert_is_context=given.expert_is_context,
        prompt_ids=given.prompt_ids,
    )


def _score(rollout: Rollout, score: Score) -> Score:
    """A sample that the engine could not finish is unscored, whatever its empty text looks like."""
    if rollout.stop is Stop.ERROR:
        return Score(verdict=Verdict.UNSCORED, reason=f"engine: {rollout.error}")
    return score


def num_own_tokens(rollouts: Sequence[Rollout]) -> int:
    """Tokens that the current policy has generated."""
    own = [r for r in rollouts if r.kind not in (Kind.DEMO, Kind.REPLAY)]
    return sum(len(r.completion_ids) - r.num_expert_tokens for r in own)


def _merge(place: _Place) -> Group:
    """The kept rounds as one group; a plan that asked for nothing has an empty one."""
    kept = place.kept or ()
    parts = [place.done[n] for n in kept]
    discarded = [rollouts for n, (rollouts, _) in enumerate(place.done) if n not in kept]
    return Group(
        prompt=place.prompt,
        rollouts=tuple(r for rollouts, _ in parts for r in rollouts),
        scores=tuple(s for _, scores in parts for s in scores),
        num_discarded_tokens=sum(num_own_tokens(rollouts) for rollouts in discarded),
    )
