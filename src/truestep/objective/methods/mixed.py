"""Rows that train on own samples and demonstrations in one run.

Most papers of this family release code with LUFFY's normaliser: Σ_t/L per micro-batch, micro-batches summed, ranks
averaged. Here every term is divided by a global count. ``legacy_scale`` = W, the GPUs of the official run, gives the
official gradient's size back: terms over N·L are multiplied by N/W; token means, which that code adds up over
the micro-batches of a rank, by ``legacy_microbatches``. That last number depends on packing and is no constant of
any method; 8 is [U]. With AdamW the scale matters to gradient clipping, to the entropy bonus and to the balance of
RL and imitation.

Evidence of a constant that a paper does not give in plain words: [C] read in the official code, [P] in the paper,
[S] in a secondary source, [U] not verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from truestep.objective import coefficients, plan, schedule
from truestep.objective.coefficients import Coefficient
from truestep.objective.methods.row import ALL, DEMO, OWN, Method, Select, Term
from truestep.objective.normalise import Normaliser

CANONICAL_ENTROPY = 1e-4  # the official 0.001 of LUFFY and its family on the scale of a global mean


def _part(name: str, select: Select, coefficient: Coefficient) -> Term:
    """One part of a surrogate whose parts share N·L, all sequences counted."""
    return Term(name=name, select=select, counted=ALL, coefficient=coefficient, normaliser=Normaliser.MAX_LENGTH)


def imitation_term(coefficient: Coefficient = coefficients.ones, weight: float = 1.0) -> Term:
    return Term(
        name="sft",
        select=DEMO,
        coefficient=coefficient,
        normaliser=Normaliser.TOKENS,
        weight=schedule.constant(weight),
    )


def _scaled(terms: Sequence[Term], ranks: int, microbatches: int) -> tuple[Term, ...]:
    """The terms at the official code's scale, or as they are (``ranks`` 0)."""
    if ranks == 0:
        return tuple(terms)
    return tuple(
        replace(
            t,
            scale=(lambda totals: totals.num_sequences / ranks)
            if t.normaliser is Normaliser.MAX_LENGTH
            else (lambda totals: float(microbatches)),
        )
        for t in terms
    )


def _family_entropy(ranks: int, microbatches: int) -> float:
    return CANONICAL_ENTROPY if ranks == 0 else 1e-3 * microbatches


def luffy(*, gamma: float = 0.1, legacy_scale: int = 0, legacy_microbatches: int = 8) -> Method:
    """n−1 samples and the demonstration in one group, no std, no clip [C]; the demonstration's importance ratio, with
    behavior probability 1, is shaped by p/(p+γ). A demonstration that the checker rejects has a negative advantage."""
    terms = (
        _part("policy", OWN, coefficients.importance),
        _part("demonstration", DEMO, coefficients.shaped_demonstration(gamma)),
    )
    return Method(
        name="luffy",
        terms=_scaled(terms, legacy_scale, legacy_microbatches),
        plan=plan.with_demonstration,
        needs_demonstrations=True,
        entropy_bonus=_family_entropy(legacy_scale, legacy_microbatches),
        source="arXiv:2504.14945",
    )
