"""Finds evaluation problems that have the same text as a training problem, or share 13 words in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from truestep.records import Problem

NGRAM_WORDS = 13


def problem_text(problem: Problem) -> str:
    """Return the text of the user's turns, case-folded and with single spaces."""
    return " ".join(" ".join(m.content for m in problem.messages if m.role == "user").casefold().split())


def ngram_hashes(text: str) -> set[bytes]:
    """Return 8-byte hashes of all runs of 13 words; there are none in shorter texts."""
    words = text.split(" ")
    runs = (" ".join(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1))
    return {blake2b(run.encode(), digest_size=8).digest() for run in runs}


def overlap_report(
    train: Mapping[str, Sequence[Problem]], evaluation: Mapping[str, Sequence[Problem]]
) -> dict[str, Any]:
    """Return counts and example ids for every pair of a training set and an evaluation set, ready for JSON.

    ``exact`` counts evaluation problems with the same text as a training problem. ``ngram`` counts those that
    share a run of 13 words with a training problem or have the same text. ``num_short`` counts those with
    fewer than 13 words, to which only ``exact`` applies."""
    texts = {name: [problem_text(p) for p in problems] for name, problems in evaluation.items()}
    grams = {name: [ngram_hashes(text) for text in of_set] for name, of_set in texts.items()}
    pairs = []
    for train_name, problems in train.items():
        first_text: dict[str, str] = {}
        first_gram: dict[bytes, str] = {}
        train_grams = []
        for problem in problems:
            text = problem_text(problem)
            first_text.setdefault(text, problem.id)
            train_grams.append(ngram_hashes(text))
            for gram in train_grams[-1]:
                first_gram.setdefault(gram, problem.id)
        for name, judged in evaluation.items():
            pairs_of_text = zip(judged, texts[name], strict=True)
            exact = [(p.id, first_text[text]) for p, text in pairs_of_text if text in first_text]
            holders = [{first_gram[gram] for gram in own if gram in first_gram} for own in grams[name]]
            shared = [(p.id, min(ids)) for p, ids in zip(judged, holders, strict=True) if ids]
            wanted = set().union(*grams[name])
            pairs.append(
                {
                    "train": train_name,
                    "evaluation": name,
                    "num_train": len(problems),
                    "num_evaluation": len(judged),
                    "exact": {"num_evaluation": len(exact), "examples": _examples(exact)},
                    "ngram": {
                        "num_evaluation": len(shared),
                        "num_train": sum(not own.isdisjoint(wanted) for own in train_grams),
                        "num_short": sum(not own for own in grams[name]),
                        "examples": _examples(shared),
                    },
                }
            )
    return {"ngram_words": NGRAM_WORDS, "pairs": pairs}


def _examples(found: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"evaluation": e, "train": t} for e, t in found[:5]]
