"""Adapters that pass problems to a model: as tokens to one of truestep's engines, or as turns to an endpoint.

Both adapters turn a job into prompts, a length limit for completions, and notes for the user."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from truestep.data.chat import completion_text, encode_prompt, has_chat_template, stop_token_ids
from truestep.errors import UserError, quoted
from truestep.evaluate.jobs import Job
from truestep.evaluate.prompts import Template, cut, messages_of, plain_text
from truestep.evaluate.run import Answer, EvaluationPlan, Key, TextPrompt, engine_answers, request_of
from truestep.records import Message, Problem, Prompt, Stop
from truestep.rollout.engine import Engine
from truestep.rollout.engine_endpoint import EndpointEngine, TextRequest, TextSample, text_seed
from truestep.settings import ChatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_ROOM = 8  # tokens that must remain for a completion after the longest prompt


@dataclass(frozen=True, kw_only=True)
class ReadyJob:
    """A job with its prompts. ``fingerprint`` is a hash of the prompts that is the same for every engine."""

    prompts: Sequence[Prompt] | Sequence[TextPrompt]
    stop_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    max_new_tokens: int
    num_prompt_tokens: int
    fingerprint: str
    opening: str = ""
    notes: tuple[str, ...] = ()


def fingerprint(prompts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(prompts, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(kw_only=True)
class TokenAdapter:
    """Adapter that uses the model's tokenizer and one of truestep's engines, opened for the first sample."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int
    model_eos: Any
    open_engine: Callable[[], Engine]  # called for every job; it opens an engine once and keeps it
    pinned_limit: bool  # the length limit is from a benchmark, and may be reduced to fit the model's context
    special_tokens: tuple[str, ...] = ()  # those that texts may contain
    trained_system: str = ""  # the system prompt that the model was trained with, if its export names one

    def ready(self, job: Job, few_shot: int) -> ReadyJob:
        template, kind = job.template, job.benchmark.kind
        prompts = [self._prompt(p, messages_of(template, p, kind, few_shot), template) for p in job.problems]
        longest = max(prompts, key=lambda p: len(p.token_ids))
        room = self.context_length - len(longest.token_ids)
        limit = job.sampling.max_new_tokens
        if room < (LEAST_ROOM if self.pinned_limit else limit):
            used = f"takes {len(longest.token_ids)} of {self.context_length} tokens"
            raise UserError(
                f"{job.benchmark.id}: the longest prompt ({longest.problem.id}) {used} and leaves only "
                f"{max(0, room)} for max_new_tokens = {limit}; set a smaller one, or a larger model.context_length"
            )
        notes = []
        if room < limit:
            reason = f"the model's context is {self.context_length}"
            notes.append(f"{job.title}: max_new_tokens is {room}, not {limit}, because {reason}")
        if template.chat and not has_chat_template(self.tokenizer):
            notes.append(f"{job.title}: the tokenizer has no chat template, so turns are sent as plain text")
        system = template.choice_system if kind == "choice" else template.system
        if self.trained_system and not system and not any(p.system for p in job.problems):
            asked = f"the model was trained with the system prompt {quoted(self.trained_system)}"
            notes.append(
                f"{job.title}: {asked}, which the template does not have; pass --prompts FILE with it"
            )
        ids = [list(p.token_ids) for p in prompts]
        tail = str(self.tokenizer.decode(ids[0][-12:])).rstrip()
        return ReadyJob(
            prompts=prompts, stop_token_ids=self._stops(template), max_new_tokens=min(limit, room),
            stop_sequences=self._stop_sequences(template), num_prompt_tokens=sum(map(len, ids)),
            fingerprint=fingerprint(ids), opening="<think>\n" if tail.endswith("<think>") else "",
            notes=tuple(notes),
        )  # fmt: skip

    def _prompt(self, problem: Problem, messages: tuple[Message, ...], template: Template) -> Prompt:
        if not template.chat:
            return Prompt(problem=problem, token_ids=tuple(self.tokenizer(plain_text(messages))["input_ids"]))
        turns = replace(problem, messages=messages, meta={**problem.meta, "turns_given": True})
        chat = ChatSettings(generation_suffix=template.suffix, special_tokens=self.special_tokens)
        made = encode_prompt(self.tokenizer, turns, chat)
        return Prompt(problem=problem, token_ids=made.token_ids)

    def _stops(self, template: Template) -> tuple[int, ...]:
        """Return the tokens that end a turn. If a line break or an empty line ends the turn, these include
        every token that contains one. The text is cut there in any case. Stopping at these tokens only avoids
        sampling what would follow."""
        stops = stop_token_ids(self.tokenizer, self.model_eos)
        ends = [text for text in template.stop if not text.strip()]
        if not ends:
            return stops
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return (*stops, *(i for i, t in enumerate(texts) if i not in stops and any(end in t for end in ends)))

    def _stop_sequences(self, template: Template) -> tuple[tuple[int, ...], ...]:
        """Return the template's stops as token sequences, for tokenizers without an empty-line token."""
        tokenizer = self.tokenizer
        made = ((stop, tokenizer(stop, add_special_tokens=False)["input_ids"]) for stop in template.stop)
        return tuple(tuple(ids) for stop, ids in made if len(ids) > 1 and stop in tokenizer.decode(ids))

    def answers(self, plan: EvaluationPlan, template: Template, check_stop: Callable[[], None]) -> Answer:
        decode = partial(completion_text, self.tokenizer, kept=self.special_tokens)
        sampled = engine_answers(plan, self.open_engine, decode, check_stop)

        def answer(keys: Sequence[Key]) -> Iterator[TextSample]:
            for sample in sampled(keys):
                text = cut(sample.text, template.stop)
                was_cut = len(text) < len(sample.text) and sample.stop is Stop.LENGTH
                yield replace(sample, text=text, stop=Stop.STOP_TOKEN if was_cut else sample.stop)

        return answer


@dataclass(kw_only=True)
class EndpointAdapter:
    """Adapter that uses an endpoint, which has its own tokenizer and chat template."""

    engine: EndpointEngine

    def ready(self, job: Job, few_shot: int) -> ReadyJob:
        template = job.template
        prompts = []
        for problem in job.problems:
            messages = messages_of(template, problem, job.benchmark.kind, few_shot)
            asked: Any = {"messages": messages} if template.chat else {"text": plain_text(messages)}
            prompts.append(TextPrompt(problem=problem, **asked))
        opening = template.suffix.strip()
        note = f"{job.title}: an endpoint opens the model's turn itself, so the turn does not begin with {opening}"
        sent = [p.text or [[m.role, m.content] for m in p.messages] for p in prompts]
        characters = sum(len(p.text) + sum(len(m.content) for m in p.messages) for p in prompts)
        return ReadyJob(
            prompts=prompts, max_new_tokens=job.sampling.max_new_tokens,
            num_prompt_tokens=characters // 4,  # only the server can count the tokens
            fingerprint=fingerprint(sent), notes=(note,) if template.suffix else (),
        )  # fmt: skip

    def answers(self, plan: EvaluationPlan, template: Template, check_stop: Callable[[], None]) -> Answer:
        prompts: dict[str, Any] = {p.problem.id: p for p in plan.prompts}

        def request(key: Key) -> TextRequest:
            asked, seed = prompts[key[0]], text_seed(request_of(plan, key))
            named: Any = {"problem_id": key[0], "sample_index": key[1], "stop": template.stop[:4]}
            return TextRequest(seed=seed, messages=asked.messages, text=asked.text, **named)

        def answer(keys: Sequence[Key]) -> Iterator[TextSample]:
            requests = [request(key) for key in keys]
            for sample in self.engine.answer(requests, plan.sampling, check_stop):
                yield replace(sample, text=cut(sample.text, template.stop))

        return answer


ModelAdapter = TokenAdapter | EndpointAdapter
