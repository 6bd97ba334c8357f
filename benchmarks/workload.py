"""The data that all contestants share, as token ids: rows for SFT, and prompts to sample from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from truestep import seeding
from truestep.data.chat import encode_demonstration, encode_prompt, stop_token_ids
from truestep.data.problems import load_problems
from truestep.model.load import load_tokenizer
from truestep.records import Message, Problem
from truestep.settings import ChatSettings, DataSettings, ModelSettings
from truestep.train.order import window

# Most tokenizers make one token of each word, so that a length in words is a length in tokens.
WORDS = """
the a of to and in is for on with as by at from or an be this that it are was has have had will can more than one two
three four five six seven eight nine ten time day week year man woman child home school work water food money price
cost buy sell give take make find left right many much how what when where each other total number
"""
# GSM8K with SmolLM2's chat template: tokens of prompt and solution (mean, standard deviation), and their
# correlation.
LENGTHS = ((95.0, 22.0), (93.0, 42.0), 0.49)
SMALLEST = 20  # smallest number of tokens of a solution, and of a prompt without its template


def load_rows(data: str, count: int, seed: int) -> list[Problem]:
    """Return ``count`` problems with solutions, chosen by seed from a file or generated with similar
    lengths."""
    if not data:
        return _made_up(count, seed)
    found = load_problems(
        "bench", DataSettings(source=data), seed=seed, base_dir=Path.cwd(), needs=("solution",)
    )
    order = seeding.permutation(seed, 0, len(found))
    return [found[int(i)] for i in order[:count]]


def _made_up(count: int, seed: int) -> list[Problem]:
    draw = seeding.generator(seed, seeding.Purpose.PROCEDURAL, 0, "bench")
    (prompt, prompt_sd), (solution, solution_sd), correlation = LENGTHS
    covariance = correlation * prompt_sd * solution_sd
    sizes = draw.multivariate_normal(
        [prompt, solution], [[prompt_sd**2, covariance], [covariance, solution_sd**2]], count
    )
    template = 31  # tokens of the chat template around a prompt
    problems = []
    for i, (p, s) in enumerate(sizes):
        question = draw.choice(WORDS.split(), max(SMALLEST, round(p) - template))
        answer = draw.choice(WORDS.split(), max(SMALLEST, round(s)))
        message = Message(role="user", content=" ".join(question))
        problems.append(Problem(id=f"made-{i}", messages=(message,), answer="1", solution=" ".join(answer)))
    return problems


def sft_workload(model: str, data: str, count: int, seed: int) -> dict[str, Any]:
    """Return demonstrations as token ids, with the number of ids that are context."""
    tokenizer = load_tokenizer(ModelSettings(path=model))
    made = [encode_demonstration(tokenizer, p, ChatSettings()) for p in load_rows(data, count, seed)]
    return {"rows": [{"ids": list(d.token_ids), "num_prompt": d.num_prompt_tokens} for d in made]}


def prompt_workload(model: str, data: str, count: int, per_step: int, seed: int) -> dict[str, Any]:
    """Return different prompts, in data order and in the order in which truestep's steps use them."""
    tokenizer = load_tokenizer(ModelSettings(path=model))
    problems = load_rows(data, count, seed)
    prompts = [
        {"id": p.id, "ids": list(encode_prompt(tokenizer, p, ChatSettings()).token_ids)} for p in problems
    ]
    in_order = [p for step in range(count // per_step) for p in window(prompts, step, per_step, seed)]
    return {
        "prompts": prompts,
        "prompts_in_order": in_order,
        "stop_token_ids": list(stop_token_ids(tokenizer)),
    }


def longest(workload: dict[str, Any], max_new_tokens: int) -> int:
    """Return the token length of the longest possible sequence: a row, or a prompt with its completion."""
    return max(
        [len(row["ids"]) for row in workload.get("rows", ())]
        + [len(prompt["ids"]) + max_new_tokens for prompt in workload.get("prompts", ())]
    )


def describe(workload: dict[str, Any]) -> str:
    """Return the number of sequences and their lengths, in one line."""
    key = "rows" if "rows" in workload else "prompts"
    lengths = np.array([len(row["ids"]) for row in workload[key]])
    return f"{len(lengths)} {key}, {lengths.mean():.0f} ± {lengths.std():.0f} tokens ({lengths.min()} to {lengths.max()})"
