"""Finds evaluation problems that have the same text as a training problem, or share 13 words in a row."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from truestep.errors import count, verb
from truestep.records import Problem

NGRAM_WORDS = 13
_TYPOGRAPHY = str.maketrans(
    {**dict(zip("‘’′“”„‐‑–—−…", ["'"] * 3 + ['"'] * 3 + ["-"] * 5 + ["..."], strict=True)),
     **{0xFF01 + i: 0x21 + i for i in range(94)}, **dict.fromkeys([0xAD, *range(0x200B, 0x2010), 0x2060, 0xFEFF])}
)  # fmt: skip
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[()]|(?<!\$)\$(?!\$)|\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\[][,;:! ]|~|\$\$|\\q?quad(?![A-Za-z])", " "),
        (r"\\[dtc](?=frac)", r"\\"),
        (r"\\([lgn]e)q(?![A-Za-z])", r"\\\1"),
        (r"(\\[A-Za-z]+)\s+(?![A-Za-z\s])", r"\1"),  # \times 4 is \times4
        (r"([_^])\{(\w)\}", r"\1\2"),
    )
)
_BESIDE_A_SIGN = re.compile(r" (?:\B|(?<=\B ))")  # a space with a sign before or after it


def problem_text(problem: Problem) -> str:
    r"""Return the text of the user's turns in one spelling: case-folded, with single spaces, ASCII quotation
    marks and dashes, and without the delimiters of formulas, so that \(x\) is $x$ and x_{1} is x_1."""
    if len(problem.messages) == 1:
        text = problem.messages[0].content
    else:
        text = problem.text or " ".join(m.content for m in problem.messages if m.role == "user")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_TYPOGRAPHY)
    if "$" in text or "\\" in text or "~" in text or "{" in text:
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
    return " ".join(text.casefold().split())


def text_key(text: str) -> str:
    """Return the key of a ``problem_text``. Two texts with the same key differ only in spaces next to signs."""
    return _BESIDE_A_SIGN.sub("", text)


def same_problems(
    evaluation: Iterable[Problem], train: Iterable[Problem]
) -> Iterator[tuple[Problem, Problem]]:
    """Yield every evaluation problem that has the text of a training problem, with the first such problem."""
    first: dict[str, Problem] = {}
    for problem in train:
        first.setdefault(text_key(problem_text(problem)), problem)
    for problem in evaluation:
        if (key := text_key(problem_text(problem))) and key in first:
            yield problem, first[key]


def trained_on_too(
    train: Mapping[str, Sequence[Problem]], evaluation: Mapping[str, Sequence[Problem]]
) -> list[str]:
    """Return a warning for each pair of different sets that share problems, with the first one's rows."""
    found = []
    for name, judged in evaluation.items():
        for other in (other for other in train if other != name):
            if pairs := list(same_problems(judged, train[other])):
                mine, theirs = pairs[0]
                found.append(
                    f"warning: data.{name}: {count(len(pairs), 'problem', len(judged))} {verb(len(pairs), 'are')} also in "
                    f"data.{other}, which is trained on, so what they measure is too good (the first: {mine.row or mine.id} "
                    f"is {theirs.row or theirs.id}); remove them from one of the two"
                )
    return found


def ngram_hashes(text: str) -> set[bytes]:
    """Return 8-byte hashes of all runs of 13 words; there are none in shorter texts."""
    words = text.split(" ")
    runs = (" ".join(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1))
    return {blake2b(run.encode(), digest_size=8).digest() for run in runs}


def overlap_report(
    train: Mapping[str, Iterable[Problem]], evaluation: Mapping[str, Sequence[Problem]]
) -> dict[str, Any]:
    """Return counts and example ids for every pair of a training set and an evaluation set, ready for JSON.
    A training set is read only once and not kept, so it may be an iterator.

    ``exact`` counts evaluation problems with the same text as a training problem. ``ngram`` counts those that
    share a run of 13 words with a training problem or have the same text. ``num_short`` counts those with
    fewer than 13 words, to which only ``exact`` applies."""
    spelled = {name: [problem_text(p) for p in problems] for name, problems in evaluation.items()}
    texts = {name: [text_key(text) for text in of_set] for name, of_set in spelled.items()}
    grams = {name: [ngram_hashes(text) for text in of_set] for name, of_set in spelled.items()}
    wanted = {name: set().union(*of_set) for name, of_set in grams.items()}
    all_texts: set[str] = set().union(*texts.values())
    all_grams: set[bytes] = set().union(*wanted.values())
    pairs = []
    for train_name, problems in train.items():
        first_text: dict[str, str] = {}
        first_gram: dict[bytes, str] = {}
        num_train, num_sharing = 0, dict.fromkeys(evaluation, 0)
        for num_train, problem in enumerate(problems, start=1):  # noqa: B007 (the last value is the number)
            if not evaluation:
                continue
            text = problem_text(problem)
            if (key := text_key(text)) in all_texts:
                first_text.setdefault(key, problem.id)
            own = ngram_hashes(text) & all_grams
            for gram in own:
                first_gram.setdefault(gram, problem.id)
            for name in evaluation if own else ():
                num_sharing[name] += not own.isdisjoint(wanted[name])
        for name, judged in evaluation.items():
            pairs_of_text = zip(judged, texts[name], strict=True)
            exact = [(p.id, first_text[text]) for p, text in pairs_of_text if text in first_text]
            holders = [{first_gram[gram] for gram in own if gram in first_gram} for own in grams[name]]
            shared = [(p.id, min(ids)) for p, ids in zip(judged, holders, strict=True) if ids]
            pairs.append(
                {
                    "train": train_name,
                    "evaluation": name,
                    "num_train": num_train,
                    "num_evaluation": len(judged),
                    "exact": {"num_evaluation": len(exact), "examples": _examples(exact)},
                    "ngram": {
                        "num_evaluation": len(shared),
                        "num_train": num_sharing[name],
                        "num_short": sum(not own for own in grams[name]),
                        "examples": _examples(shared),
                    },
                }
            )
    return {"ngram_words": NGRAM_WORDS, "pairs": pairs}


def overlap_lines(report: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each pair of sets in a report."""
    return [
        f"overlap of {pair['train']} with {pair['evaluation']}: {pair['exact']['num_evaluation']} of "
        f"{pair['num_evaluation']} {verb(pair['exact']['num_evaluation'], 'have')} the same text, "
        f"{pair['ngram']['num_evaluation']} {verb(pair['ngram']['num_evaluation'], 'share')} "
        f"{report.get('ngram_words', NGRAM_WORDS)} words"
        for pair in report.get("pairs", ())
    ]


def _examples(found: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"evaluation": e, "train": t} for e, t in found[:5]]
