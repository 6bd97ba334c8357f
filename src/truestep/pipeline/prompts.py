"""The prompts that a stage samples from: what they show of a solution, and which of them are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from truestep.data.chat import encode_prompt
from truestep.errors import UserError, count, verb
from truestep.records import Message, Prompt
from truestep.settings import RejectionSettings, RlSettings

if TYPE_CHECKING:
    from truestep.pipeline.prepare import Prepared

HINT = "The beginning of a solution:"


def hinted_prompt(
    prepared: Prepared, prompt: Prompt, fraction: float
) -> tuple[tuple[Message, ...], tuple[int, ...]]:
    """Return the turns and tokens of the prompt if its last turn shows a fraction of the solution's text."""
    *before, last = prompt.problem.messages
    shown = prompt.problem.solution[: int(fraction * len(prompt.problem.solution))]
    turn = replace(last, content=f"{last.content}\n\n{HINT}\n{shown}")
    problem = replace(prompt.problem, messages=(*before, turn))
    return problem.messages, encode_prompt(prepared.tokenizer, problem, prepared.settings.chat).token_ids


def prompts_of_stage(prepared: Prepared, stage: RlSettings | RejectionSettings) -> list[list[Prompt]]:
    """Return the prompts of every data set of a stage: without those that are too long, up to a declared share, and
    those whose whole demonstration cannot be trained on. Of several data sets, ids begin with the set's name."""
    limit, plan = stage.sampling.max_new_tokens, prepared.methods[stage.name].plan
    shown, found = plan.most_shown if plan else 0.0, []
    for name in stage.data_names:
        is_guided = isinstance(stage, RlSettings) and name in stage.guided
        prompts = _short_prompts(prepared, stage, name, shown if is_guided else 0.0)
        if is_guided and prepared.methods[stage.name].needs_demonstrations:
            whole = prepared.demonstrations[name]
            fit = {d.problem_id for d in whole if len(d.token_ids) - d.num_prompt_tokens <= limit}
            kept = [p for p in prompts if p.problem.id in fit]
            if len(kept) < len(prompts):
                prepared.notes.append(
                    f"stages.{stage.name}: {len(prompts) - len(kept)} of {len(prompts)} problems have a demonstration of "
                    f"more than sampling.max_new_tokens = {limit} tokens and are left out"
                )
            prompts = kept
        if len(stage.shares) > 1:
            named = [replace(p.problem, id=f"{name}/{p.problem.id}") for p in prompts]
            prompts = [replace(p, problem=of, data=name) for p, of in zip(prompts, named, strict=True)]
        found.append(prompts)
    return found


def _short_prompts(
    prepared: Prepared, stage: RlSettings | RejectionSettings, name: str, shown: float
) -> list[Prompt]:
    """Return the prompts that fit into the context with their completions, if few do not. If there are more, return
    all, so that the longest is reported."""
    prompts, share = prepared.prompts[name], prepared.settings.data[name].overlong_share
    room = prepared.context_length - stage.sampling.max_new_tokens
    kept = [p for p in prompts if _num_shown(prepared, p, shown) <= room]
    num = len(prompts) - len(kept)
    if not 0 < num <= share * len(prompts):
        return prompts
    prepared.notes.append(
        f"stages.{stage.name}: {count(num, 'prompt', len(prompts))} of data.{name} {verb(num, 'are')} longer than {room} tokens "
        f"(the context without sampling.max_new_tokens) and {verb(num, 'are')} left out (data.{name}.overlong_share = {share:g})"
    )
    return kept


def _num_shown(prepared: Prepared, prompt: Prompt, shown: float) -> int:
    """Return the number of tokens of a prompt that shows a fraction of the solution."""
    ids = hinted_prompt(prepared, prompt, shown)[1] if shown else prompt.token_ids
    return len(ids)


def longest_of_stage(prepared: Prepared, stage: RlSettings | RejectionSettings) -> int:
    """Return the largest length of prompt, hint and completion of a stage. Raises UserError if it is too large."""
    plan, limit = prepared.methods[stage.name].plan, stage.sampling.max_new_tokens
    shown, where = plan.most_shown if plan else 0.0, f"stages.{stage.name}.sampling"
    sets = zip(stage.data_names, prepared.stage_prompts[stage.name], strict=True)
    lengths = [
        longest_sample(prepared, prompts, name, limit, where, shown) for name, prompts in sets if prompts
    ]
    return max(lengths, default=0)  # that no prompt is left is said where prompts are counted


def longest_sample(
    prepared: Prepared, prompts: Sequence[Prompt], name: str, limit: int, where: str, shown: float = 0.0
) -> int:
    """Return the largest length of prompt, hint and completion. Raises UserError if it is too large."""
    longest = max(prompts, key=lambda p: _num_shown(prepared, p, shown))
    num, context = _num_shown(prepared, longest, shown), prepared.context_length
    if num + limit > context:
        many = sum(_num_shown(prepared, p, shown) + limit > context for p in prompts)
        share = f", or data.{name}.overlong_share, to leave out the {many} of {len(prompts)} prompts that are too long"
        raise UserError(
            f"{where}.max_new_tokens = {limit} does not fit: the longest prompt of data.{name} "
            f"({longest.problem.row or longest.problem.id}) takes {num} of {context} tokens; "
            f"set max_new_tokens = {max(1, context - num)} or less, or a larger model.context_length"
            + (share if where.startswith("stages.") else "")
        )
    return num + limit
