"""Prompts → graded groups, through an engine and a method's plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from truestep.records import Group, Problem, Prompt, Rollout, Score, Stop, Verdict
from truestep.rollout.engine import Engine, SampleRequest, SamplingParameters
from truestep.rollout.plan import Plan
from truestep.seeding import Purpose

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
    on_rollout: Callable[[int, int], None] = lambda done, total: None

    def groups(self, prompts: Sequence[Prompt], step: int) -> list[Group]:
        """Sample and grade all prompts; rounds are batched over prompts."""
        history: dict[str, list[Group]] = {p.problem.id: [] for p in prompts}
        while True:
            requests: list[SampleRequest] = []
            asked: list[Prompt] = []
            for prompt in prompts:
                earlier = history[prompt.problem.id]
                following = self.plan(prompt, earlier, self.samples_per_prompt)
                if following is None:
                    continue
                asked.append(prompt)
                first = sum(len(g.rollouts) for g in earlier)
                requests += [
                    SampleRequest(
                        problem_id=prompt.problem.id,
                        sample_index=first + i,
                        prompt_ids=prompt.token_ids,
                        seed=self.seed,
                        purpose=Purpose.SAMPLE,
                        step=step,
                    )
                    for i in range(following.num_samples)
                ]
            if not requests:
                return [_merge(history[p.problem.id]) for p in prompts if history[p.problem.id]]
            for group in self._round(asked, requests):
                history[group.prompt.problem.id].append(group)

    def _round(self, prompts: Sequence[Prompt], requests: Sequence[SampleRequest]) -> list[Group]:
        found: dict[str, list[Rollout]] = {p.problem.id: [] for p in prompts}
        for done, rollout in enumerate(self.engine.generate(requests, self.sampling, self.check_stop), start=1):
            found[rollout.problem_id].append(rollout)
            self.on_rollout(done, len(requests))
        for rollouts in found.values():
            rollouts.sort(key=lambda r: r.sample_index)
        pairs = [(p.problem, self.decode(r.completion_ids)) for p in prompts for r in found[p.problem.id]]
        scores = iter(self.grade(pairs))
        return [
            Group(
                prompt=p,
                rollouts=tuple(found[p.problem.id]),
                scores=tuple(_score(r, next(scores)) for r in found[p.problem.id]),
            )
            for p in prompts
        ]


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
