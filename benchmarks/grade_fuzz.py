"""Fuzz the grader: it must not crash or be slow, and edits that keep the meaning must keep the verdict.

    python benchmarks/grade_fuzz.py --engine hypothesis --cases 100000
    python benchmarks/grade_fuzz.py --engine atheris --cases 100000      # if atheris is installed

The answers are random sequences of tokens that occur in answers. Everything that runs in the caller's process
is fuzzed: reading, normalization, comparison, policies. Algebra is not: it runs in child processes, whose
death is a valid outcome, and has separate tests.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import time
from collections.abc import Callable

from truestep.grade.choices import choice_letter, extract_choice
from truestep.grade.equivalent import decide, questions
from truestep.grade.extract import extract_answer, gold_answer
from truestep.grade.formula import symbolic_form
from truestep.grade.policy import nearly, objection
from truestep.grade.rational import same_formula

LIMIT = 1.0  # seconds of processor time for one case
NUMBERS = "0 1 2 3 5 7 10 12 100 1000 007 1.5 .5 0.333333 1,000 1.000,5 2e3"
SIGNS = "+ - * / ^ = < > | ! _ % $ & ~ : ; , . ' ( ) [ ] { } x y n A B C D i e"
MATHEMATICS = (
    r"\frac{ \frac12 \dfrac \sqrt{ \sqrt2 \pi \infty \pm \cup \cap \in \leq \geq \neq \le \ge \cdot \times \left( "
    r"\right) \{ \} \\ \text{ \mathrm{ \mathbb{R} ^\circ ^{\circ} \% \$ \, \! \quad \overline{ \dot{ \ldots \emptyset "
    r"\begin{pmatrix} \end{pmatrix} \begin{cases} \binom{ \sin \log_ \approx \equiv"
)
MARKS = (
    r"\boxed{ \fbox{ #### <answer> </answer> </think> <think> The answer is final réponse 答案是 不是 ** (B)"
)
WORDS = "option wrong and or not cm m km cents dollars percent million PM a.m. degrees yes no twelve hundred"
STRANGE = "− – × ² ½ ∞ ° ７ \u200b \u202e \ud800 \x00 ∪ ٧ É 🙂"
TOKENS = (
    *(token for text in (NUMBERS, SIGNS, MATHEMATICS, MARKS, WORDS, STRANGE) for token in text.split(" ")),
    *(" ", "  ", "\n"),
)
GOLDS = (
    "7", "1/2", r"\frac{1}{2}", "x+1",
    "(1,2)", r"\{1,2\}", "[0,1)", r"x \in [0,1]", "10%", "5 cm", "C", "yes", r"\pm 3",
    r"(-\infty,1)\cup(2,\infty)",
    "12_5", "3:30 PM", r"\begin{pmatrix}1\\2\end{pmatrix}", "x=1,y=2", "1,22", "$5", "0<x<1",
)  # fmt: skip
EDITS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("space around", lambda t: f"  {t} "),
    ("spaces doubled", lambda t: t.replace(" ", "  ")),
    ("no-break spaces", lambda t: t.replace(" ", "\u00a0")),
    ("invisible characters", lambda t: t.replace("+", "\u200b+")),
    ("minus signs", lambda t: t.replace("-", "−")),
    ("display fractions", lambda t: re.sub(r"\\frac(?![A-Za-z])", r"\\dfrac", t)),
    ("sized brackets", lambda t: re.sub(r"(?<![\\A-Za-z])\(([^()\\]*)\)", r"\\left(\1\\right)", t)),
    ("relations", lambda t: re.sub(r"\\leq(?![A-Za-z])", r"\\le ", t)),
)


def verdict(gold: str, answer: str) -> bool | None:
    truth, found = gold_answer(gold), extract_answer("\\boxed{" + answer + "}").answer
    if not truth:
        return None  # an empty gold answer is never graded
    decision = decide(truth, found)
    if decision.equal is not None or decision.reason or not found:
        return decision.equal
    parts = [same_formula(symbolic_form(a), symbolic_form(b)) for a, b in questions(truth, found)]
    return False if False in parts else True if parts and all(parts) else None


def examine(gold: str, answer: str) -> None:
    """Raise if the grader crashes, is slow, contradicts itself, or changes its verdict after an edit."""
    begin = time.process_time()
    for text in (answer, "\\boxed{" + answer + "}", "The answer is " + answer):
        found = extract_answer(text)
        json.dumps([found.answer, extract_choice(text).answer]).encode("ascii")
        decision = decide(gold_answer(gold), found.answer)
        symbolic_form(found.answer), choice_letter(found.answer), nearly(gold, found.answer)
        objection(gold, found.answer, found.how)
        if decision.equal is None and not decision.reason:
            for part in questions(gold_answer(gold), found.answer):
                same = same_formula(symbolic_form(part[0]), symbolic_form(part[1]))
                assert same_formula(symbolic_form(part[1]), symbolic_form(part[0])) is same, (
                    f"not symmetric: {part!r}"
                )
    found = extract_answer("\\boxed{" + answer + "}")
    if found.answer:
        assert decide(found.answer, found.answer).equal, f"not equal to itself: {found.answer!r}"
    assert time.process_time() - begin < LIMIT, f"slow: {gold!r} {answer!r}"
    if (
        answer.count("{") != answer.count("}")
        or "$" in answer
        or "boxed" in answer
        or "fbox" in answer
        or "think>" in answer  # the mark would cut the box in two
        or re.search(r"\\[\u200b-\u202e]*$", answer)  # the text after it would be escaped
    ):
        return  # an edit may then change the content of the box
    before, edited = verdict(gold, answer), answer
    for _, edit in EDITS:
        edited = edit(edited)
    if verdict(gold, edited) is before:
        return
    for name, edit in EDITS:  # find the edit that did it
        after = verdict(gold, edit(answer))
        assert before is after, f"{name} turns {before} into {after}: gold {gold!r}, answer {answer!r}"
    raise AssertionError(f"all edits together change {before}: gold {gold!r}, answer {answer!r}")


CHUNK = 2_000


def with_hypothesis(cases: int, seed: int) -> None:
    """Run in chunks, each with a separate seed, so that a stopped run has still shown its progress."""
    begin, done = time.monotonic(), 0
    while done < cases:
        done += one_chunk(min(CHUNK, cases - done), seed + done)
        print(f"{done:,} cases, no failure, {time.monotonic() - begin:.0f} s", flush=True)


def one_chunk(cases: int, seed: int) -> int:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    count = [0]
    tokens = st.lists(st.one_of(st.sampled_from(TOKENS), st.text(max_size=3)), max_size=12).map("".join)

    @seeded(seed)
    @settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(st.one_of(st.sampled_from(GOLDS), tokens), tokens)
    def run(gold: str, answer: str) -> None:
        count[0] += 1
        examine(gold, answer)

    run()
    return count[0]


def with_atheris(cases: int, seed: int) -> None:
    import atheris

    for name, module in list(sys.modules.items()):
        if name.startswith("truestep.grade"):
            for function in map(inspect.unwrap, filter(callable, vars(module).values())):
                if inspect.isfunction(function) and function.__module__ == name:
                    atheris.instrument_func(function)  # in place

    def run(data: bytes) -> None:
        source = atheris.FuzzedDataProvider(data)
        gold = GOLDS[source.ConsumeIntInRange(0, len(GOLDS) - 1)]
        parts = []
        for _ in range(source.ConsumeIntInRange(0, 14)):
            use = source.ConsumeIntInRange(0, 7)
            parts.append(
                source.ConsumeUnicode(3) if use == 0 else TOKENS[source.ConsumeIntInRange(0, len(TOKENS) - 1)]
            )
        examine(gold, "".join(parts))

    atheris.Setup([sys.argv[0], f"-runs={cases}", f"-seed={seed}", "-max_len=96", "-len_control=0"], run)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    {"atheris": with_atheris, "hypothesis": with_hypothesis}[options.engine](options.cases, options.seed)


if __name__ == "__main__":
    main()
