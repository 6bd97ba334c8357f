"""Prompts → graded groups, through an engine and a method's plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from truestep.records import Group, Problem, Prompt, Rollout, Score, Stop, Verdict
from truestep.rollout.engine import Engine, SampleRequest, SamplingParameters
from truestep.rollout.plan import Plan
from truestep.seeding import Purpose

MAX_SAMPLES = 1 << 20  # of one prompt in one step; numbers of a prompt's second group start here
GradeMany = Callable[[Sequence[tuple[Problem, str]]], list[Score]]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Everything that turns prompts into groups; a function of (seed, step, prompt, sample) given the weights."""

    engine: Engine
    plan: Plan
    sampling: SamplingParameters
    samples_per_prompt: int
    decode: Callable[[Sequence[int]], str]
    grade: GradeMany
    seed: int
    check_stop: Callable[[], None] = lambda: None

    def groups(self, prompts: Sequence[Prompt], step: int, repeats: Sequence[int] = ()) -> list[Group]:
        """One graded group per prompt, in order; rounds are batched over prompts.

        ``repeats`` says of each prompt how often the whole batch, over all ranks, has held it before (none by default):
        its second group has sample numbers, and so random numbers, of its own.
        """
        first = [count * MAX_SAMPLES for count in repeats or [0] * len(prompts)]
        history: list[list[Group]] = [[] for _ in prompts]
        while True:
            requests: list[SampleRequest] = []
            owner: dict[tuple[str, int], int] = {}
            for place, prompt in enumerate(prompts):
                following = self.plan(prompt, history[place], self.samples_per_prompt)
                if following is None:
                    continue
                start = first[place] + sum(len(g.rollouts) for g in history[place])
                for index in range(start, start + following.num_samples):
                    owner[prompt.problem.id, index] = place
                    requests.append(self._request(prompt, index, step))
            if not requests:
                return [_merge(groups) for groups in history]
            for place, group in self._round(prompts, requests, owner).items():
                history[place].append(group)

    def _request(self, prompt: Prompt, index: int, step: int) -> SampleRequest:
        return SampleRequest(
            problem_id=prompt.problem.id,
            sample_index=index,
            prompt_ids=prompt.token_ids,
            seed=self.seed,
            purpose=Purpose.SAMPLE,
            step=step,
        )

    def _round(
        self, prompts: Sequence[Prompt], requests: Sequence[SampleRequest], owner: Mapping[tuple[str, int], int]
    ) -> dict[int, Group]:
        """Sample the requests and grade them: place in ``prompts`` → this round's group."""
        found: dict[int, list[Rollout]] = {place: [] for place in owner.values()}
        for rollout in self.engine.generate(requests, self.sampling, self.check_stop):
            found[owner[rollout.problem_id, rollout.sample_index]].append(rollout)
        for rollouts in found.values():
            rollouts.sort(key=lambda r: r.sample_index)
        pairs = [(prompts[place].problem, self.decode(r.completion_ids)) for place, rs in found.items() for r in rs]
        scores = iter(self.grade(pairs))
        return {
            place: Group(prompt=prompts[place], rollouts=tuple(rs), scores=tuple(_score(r, next(scores)) for r in rs))
            for place, rs in found.items()
        }


def _score(rollout: Rollout, score: Score) -> Score:
    """A sample that the engine could not finish is unscored, whatever its empty text looks like."""
    if rollout.stop is Stop.ERROR:
        return Score(verdict=Verdict.UNSCORED, reason=f"engine: {rollout.error}")
    return score


def _merge(groups: Sequence[Group]) -> Group:
    return (
        groups[0]
        if len(groups) == 1
        else Group(
            prompt=groups[0].prompt,
            rollouts=tuple(r for g in groups for r in g.rollouts),
            scores=tuple(s for g in groups for s in g.scores),
        )
    )
