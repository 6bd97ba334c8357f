"""How problems reach a model: as tokens through an engine of ours, or as turns through an endpoint.

Both make of a job the same thing: prompts, the longest completion that fits, and what must be said about it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from truestep.data.chat import completion_text, encode_prompt, has_chat_template, stop_token_ids
from truestep.errors import UserError
from truestep.evaluate.plan import Job
from truestep.evaluate.prompts import Template, cut, messages_of, plain_text
from truestep.evaluate.run import Asked, EvaluationPlan, Key, token_samples
from truestep.records import Message, Problem, Prompt, Stop
from truestep.rollout.engine import Engine, SampleRequest
from truestep.rollout.engine_endpoint import EndpointEngine, TextRequest, TextSample, text_seed
from truestep.seeding import Purpose
from truestep.settings import ChatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_ROOM = 8  # tokens that a completion must have beside the longest prompt


@dataclass(frozen=True, kw_only=True)
class Asking:
    """A job made ready. ``fingerprint`` hashes what is sent, prompt by prompt, so that two engines can be
    told to have been asked the same."""

    prompts: Sequence[Asked]
    stop_token_ids: tuple[int, ...]
    stop_sequences: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    num_prompt_tokens: int
    fingerprint: str
    opening: str = ""
    notes: tuple[str, ...] = ()


class Asker(Protocol):
    """Turns jobs into samples."""

    def ready(self, job: Job, few_shot: int) -> Asking:
        """The job's prompts. Raises UserError where they do not fit the model."""
        ...

    def answer(
        self, plan: EvaluationPlan, template: Template, keys: Sequence[Key], check_stop: Callable[[], None]
    ) -> Iterator[TextSample]:
        """One sample of each key, in any order."""
        ...


def fingerprint(prompts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(prompts, ensure_ascii=False).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------- tokens


@dataclass(kw_only=True)
class TokenAsker:
    """Through the model's tokenizer and an engine of ours, which ``open_engine`` makes when the first sample
    is asked for."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int
    model_eos: Any
    open_engine: Callable[[], Engine]
    pinned_limit: bool  # the length limit is a benchmark's, and may be lowered to what the model can hold
    engine: Engine | None = None

    def ready(self, job: Job, few_shot: int) -> Asking:
        template, kind = job.template, job.benchmark.kind
        prompts = [self._prompt(p, messages_of(template, p, kind, few_shot), template) for p in job.problems]
        longest = max(prompts, key=lambda p: len(p.token_ids))
        room = self.context_length - len(longest.token_ids)
        limit = job.max_new_tokens
        if room < (LEAST_ROOM if self.pinned_limit else limit):
            raise UserError(
                f"{job.benchmark.id}: the longest prompt ({longest.problem.id}) has {len(longest.token_ids)} of "
                f"{self.context_length} tokens, which leaves {max(0, room)} of max_new_tokens = {limit}: "
                "write fewer, a shorter prompt, or a greater model.context_length"
            )
        notes = []
        if room < limit:
            notes.append(
                f"{job.benchmark.id} · {template.id}: the model holds {self.context_length} tokens: completions end at "
                f"{room}, not at {limit}"
            )
        if template.chat and not has_chat_template(self.tokenizer):
            notes.append(
                f"{job.benchmark.id} · {template.id}: the tokenizer has no chat template: turns are plain text"
            )
        ids = [list(p.token_ids) for p in prompts]
        tail = str(self.tokenizer.decode(ids[0][-12:])).rstrip()
        return Asking(
            prompts=prompts,
            stop_token_ids=self._stops(template),
            stop_sequences=self._stop_sequences(template),
            max_new_tokens=min(limit, room),
            num_prompt_tokens=sum(map(len, ids)),
            fingerprint=fingerprint(ids),
            opening="<think>\n" if tail.endswith("<think>") else "",
            notes=tuple(notes),
        )

    def _prompt(self, problem: Problem, messages: tuple[Message, ...], template: Template) -> Prompt:
        if not template.chat:
            ids: Any = self.tokenizer(plain_text(messages))["input_ids"]
            return Prompt(problem=problem, token_ids=tuple(ids))
        turns = replace(problem, messages=messages, meta={**problem.meta, "turns_given": True})
        made = encode_prompt(self.tokenizer, turns, ChatSettings(generation_suffix=template.suffix))
        return Prompt(problem=problem, token_ids=made.token_ids)

    def _stops(self, template: Template) -> tuple[int, ...]:
        """The tokens that end a turn; where a line's end or an empty line ends it, also every token that
        holds it (the text is cut where it should be in any case: this only saves what would follow)."""
        stops = stop_token_ids(self.tokenizer, self.model_eos)
        ends = [text for text in template.stop if not text.strip()]
        if not ends:
            return stops
        tokenizer: Any = self.tokenizer
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        return (*stops, *(i for i, t in enumerate(texts) if i not in stops and any(end in t for end in ends)))

    def _stop_sequences(self, template: Template) -> tuple[tuple[int, ...], ...]:
        """The stops as tokens, for a tokenizer that has no token for an empty line."""
        tokenizer: Any = self.tokenizer
        made = ((stop, tokenizer(stop, add_special_tokens=False)["input_ids"]) for stop in template.stop)
        return tuple(tuple(ids) for stop, ids in made if len(ids) > 1 and stop in tokenizer.decode(ids))

    def answer(
        self, plan: EvaluationPlan, template: Template, keys: Sequence[Key], check_stop: Callable[[], None]
    ) -> Iterator[TextSample]:
        if self.engine is None:
            self.engine = self.open_engine()

        def decode(ids: Sequence[int]) -> str:
            return completion_text(self.tokenizer, ids)

        for sample in token_samples(plan, keys, engine=self.engine, decode=decode, check_stop=check_stop):
            text = cut(sample.text, template.stop)
            was_cut = len(text) < len(sample.text) and sample.stop is Stop.LENGTH
            yield replace(sample, text=text, stop=Stop.STOP_TOKEN if was_cut else sample.stop)


# --------------------------------------------------------------------------------------------------- endpoint


@dataclass(frozen=True, kw_only=True)
class TextPrompt:
    """A problem as turns, or as text to go on with."""

    problem: Problem
    messages: tuple[Message, ...]
    text: str


@dataclass(kw_only=True)
class EndpointAsker:
    """Through an endpoint, which knows its own tokenizer and chat template."""

    engine: EndpointEngine

    def ready(self, job: Job, few_shot: int) -> Asking:
        template = job.template
        prompts = []
        for problem in job.problems:
            messages = messages_of(template, problem, job.benchmark.kind, few_shot)
            text = "" if template.chat else plain_text(messages)
            prompts.append(TextPrompt(problem=problem, messages=messages if template.chat else (), text=text))
        notes = []
        if template.suffix:
            notes.append(
                f"{job.benchmark.id} · {template.id}: an endpoint opens the model's turn itself: it was not begun with "
                f"{template.suffix.strip()}"
            )
        sent = [p.text or [[m.role, m.content] for m in p.messages] for p in prompts]
        characters = sum(len(p.text) + sum(len(m.content) for m in p.messages) for p in prompts)
        return Asking(
            prompts=prompts,
            stop_token_ids=(),
            stop_sequences=(),
            max_new_tokens=job.max_new_tokens,
            num_prompt_tokens=characters // 4,  # the server alone can count them
            fingerprint=fingerprint(sent),
            notes=tuple(notes),
        )

    def answer(
        self, plan: EvaluationPlan, template: Template, keys: Sequence[Key], check_stop: Callable[[], None]
    ) -> Iterator[TextSample]:
        prompts: dict[str, Any] = {p.problem.id: p for p in plan.prompts}
        requests = [self._request(plan, prompts[id], index, template) for id, index in keys]
        for sample in self.engine.answer(requests, plan.sampling, check_stop):
            yield replace(sample, text=cut(sample.text, template.stop))

    def _request(
        self, plan: EvaluationPlan, prompt: TextPrompt, index: int, template: Template
    ) -> TextRequest:
        seed = text_seed(
            SampleRequest(
                problem_id=prompt.problem.id, sample_index=index, prompt_ids=(), seed=plan.seed,
                purpose=Purpose.EVALUATE, step=0,
            )
        )  # fmt: skip
        return TextRequest(
            problem_id=prompt.problem.id, sample_index=index, seed=seed, messages=prompt.messages, text=prompt.text,
            stop=template.stop[:4],
        )  # fmt: skip
