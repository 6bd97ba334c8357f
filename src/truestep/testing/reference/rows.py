"""The papers' objectives as whole optimizer steps over sequences of several kinds.

Each part follows the papers' formulas and uses the surrogates of ``reference.surrogate``. Each
part is differentiated exactly as written, and divided by counts taken over the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from truestep.records import Origin, TrainSequence
from truestep.testing.reference import surrogate
from truestep.testing.reference.surrogate import ScoredSequence

# (sequence, number of its trained token) → whether a part is about this token
About = Callable[[TrainSequence, int], bool]


def _of(origin: Origin) -> About:
    def about(sequence: TrainSequence, i: int) -> bool:
        return [o for o in sequence.origin if o is not Origin.CONTEXT][i] is origin

    return about


expert, own, replayed = _of(Origin.EXPERT), _of(Origin.POLICY), _of(Origin.STORED)


def anything(sequence: TrainSequence, i: int) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Part:
    """A sum over the tokens that ``about`` selects, divided by a count. The count is N_tok for tok, |y|·N_seq
    for seq, N_seq for sum, and N_seq·L for drg. N_tok counts the ``counted`` tokens, and N_seq the sequences
    with such a token. ``top_share`` keeps only that share of tokens, with the highest entropy."""

    about: About
    losses: partial[list[Tensor]]
    normaliser: str
    counted: About | None = None
    weight: float = 1.0
    top_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method's parts. ``whiten`` replaces advantages by (A − mean)/(std + 1e-8) over policy tokens."""

    parts: tuple[Part, ...]
    whiten: bool = False
    drop_equal_groups: bool = False  # done by the gate; ``row_loss`` gets what the gate keeps


def _entropy_bonus(scored: ScoredSequence) -> list[Tensor]:
    return [-entropy for entropy in scored.entropies]


def _part(about: About, losses: Callable[..., list[Tensor]], normaliser: str, **options: Any) -> Part:
    own_fields = {k: options.pop(k) for k in ("counted", "weight", "top_share") if k in options}
    return Part(about=about, losses=partial(losses, **options), normaliser=normaliser, **own_fields)


def _clipped(low: float, high: float, normaliser: str, about: About = own, **options: Any) -> Part:
    return _part(about, surrogate.ppo_clip, normaliser, eps_low=low, eps_high=high, **options)


_BONUS = _part(own, _entropy_bonus, "tok", weight=1e-4)
_SHARED: dict[str, Any] = {"normaliser": "drg", "counted": anything}
_ON = _part(own, surrogate.importance, **_SHARED)
_ON_ALONE = _part(own, surrogate.importance, "drg")
_IMITATE = _part(expert, surrogate.nll, "tok")
_PHI = _part(expert, surrogate.chord_phi, "tok", weight=0.1)
_PREFIX = _clipped(0.2, 0.2, about=expert, top_share=0.2, **_SHARED)
_SRFT = (
    _part(expert, surrogate.srft_imitation, "tok", scale=0.5, sign=-1.0),
    _part(expert, surrogate.unshaped, **_SHARED),
    _part(own, surrogate.srft_samples, scale=0.1, **_SHARED),
)
_ANCHOR = _part(own, surrogate.kl_terms, "tok", weight=1e-3, kind="k3")
_UFT = (_part(expert, surrogate.nll, "tok", weight=1e-3), _ANCHOR)

ROWS: dict[str, Row] = {
    "sft": Row(parts=(_IMITATE,)),
    "dft": Row(parts=(_part(expert, surrogate.dft, "tok"),)),
    "psft": Row(parts=(_part(expert, surrogate.psft, "tok", eps_low=0.2, eps_high=0.28),)),
    "iw_sft": Row(parts=(_part(expert, surrogate.iw_sft, "tok", level="sequence", low=0.0, high=16.0),)),
    "trsft": Row(parts=(_part(expert, surrogate.trsft, "tok", alpha=0.1),)),
    "power_sft": Row(parts=(_part(expert, surrogate.power, "tok", alpha=0.5),)),
    "entropy_sft": Row(parts=(_part(expert, surrogate.nll, "tok", top_share=0.2, weight=5.0),)),
    "grpo_token_mean": Row(parts=(_clipped(0.2, 0.28, "tok"),)),
    "grpo": Row(parts=(_clipped(0.2, 0.2, "seq"),)),
    "dr_grpo": Row(parts=(_clipped(0.2, 0.2, "drg"),)),
    "dapo": Row(parts=(_clipped(0.2, 0.28, "tok"),), drop_equal_groups=True),
    "ppo": Row(parts=(_clipped(0.2, 0.2, "tok", dual_clip=3.0),)),
    "rloo": Row(parts=(_part(own, surrogate.importance, "sum"),)),
    "reinforce_pp": Row(parts=(_clipped(0.2, 0.2, "tok"),), whiten=True),
    "reinforce_pp_baseline": Row(parts=(_clipped(0.2, 0.2, "tok"),), whiten=True),
    "gspo": Row(parts=(_part(own, surrogate.gspo, "seq", eps_low=3e-4, eps_high=4e-4),)),
    "cispo": Row(parts=(_part(own, surrogate.cispo, "tok", eps_low=0.2, eps_high=0.28),)),
    "nft": Row(parts=(_part(own, surrogate.nft, "drg", low=0.02, high=0.98),)),
    "sapo": Row(parts=(_part(own, surrogate.sapo, "seq", tau_positive=1.0, tau_negative=1.05),)),
    "luffy": Row(parts=(_ON, _part(expert, surrogate.luffy, gamma=0.1, **_SHARED), _BONUS)),
    "multi_task": Row(parts=(_ON_ALONE, _IMITATE, _BONUS)),
    "relift": Row(parts=(_ON_ALONE, _IMITATE, _BONUS)),
    "srft": Row(parts=(*_SRFT, _BONUS)),
    "prefix_rft": Row(parts=(_clipped(0.2, 0.2, **_SHARED), _PREFIX)),
    "hpt": Row(parts=(_ON_ALONE, _IMITATE, _BONUS)),
    "trapo": Row(parts=(_ON, _part(expert, surrogate.trsft, alpha=0.1, **_SHARED), _BONUS)),
    "exgrpo": Row(parts=(_ON, _part(replayed, surrogate.exgrpo, beta=0.1, **_SHARED), _BONUS)),
    "rl_plus": Row(parts=(_ON, _part(expert, surrogate.rl_plus, gamma=0.5, **_SHARED), _BONUS)),
    "chord_mu": Row(parts=(_clipped(0.2, 0.2, "tok", weight=1 - 0.9), replace(_IMITATE, weight=0.9))),
    "chord_phi": Row(parts=(_clipped(0.2, 0.2, "tok", weight=0.9), _PHI)),
    "uft": Row(parts=(_clipped(0.2, 0.2, "tok"), *_UFT)),
    "super_rl": Row(parts=(_clipped(0.2, 0.2, "tok"), _IMITATE)),
    "sasr": Row(parts=(_clipped(0.2, 0.2, "tok"), _IMITATE)),
    "bread": Row(parts=(_clipped(0.2, 0.2, "seq"),)),
    "ghpo": Row(parts=(_clipped(0.2, 0.2, "tok"),)),
}


def named_part(name: str) -> Part:
    """Return the part with the method's name, or its first part. ``loss.reference_loss`` uses this part."""
    parts = ROWS[name].parts
    return next((part for part in parts if part.losses.func.__name__ == name), parts[0])


def row_loss(row: Row, scored: Sequence[ScoredSequence], max_length: int) -> Tensor:
    """Return the loss of one optimizer step. Equation: Σ_parts weight · Σ_tokens (w·surrogate / count)."""
    if row.whiten:
        scored = _whitened(scored)
    total = torch.zeros((), dtype=torch.float64)
    for part in row.parts:
        counted = part.counted or part.about
        marks = [[counted(s.sequence, i) for i in range(s.sequence.num_trained)] for s in scored]
        num_tokens, num_sequences = sum(map(sum, marks)), sum(map(any, marks))
        threshold = _threshold(part, scored)
        for item in scored:
            sequence = item.sequence
            meant = [part.about(sequence, i) for i in range(sequence.num_trained)]
            if not any(meant):
                continue
            losses = part.losses(item)
            if part.top_share:
                losses = surrogate.uncertain_only(item, losses, threshold)
            count = {"tok": num_tokens, "seq": sequence.num_trained * num_sequences}
            count |= {"sum": num_sequences, "drg": num_sequences * max_length}
            for loss, is_meant in zip(losses, meant, strict=True):
                if is_meant:
                    total = total + part.weight * sequence.weight * loss / count[part.normaliser]
    return total


def _threshold(part: Part, scored: Sequence[ScoredSequence]) -> float:
    """Return the entropy that the top share of the part's tokens reaches."""
    places = [(item, i) for item in scored for i in range(len(item.proximal_entropies))]
    entropies = sorted(s.proximal_entropies[i] for s, i in places if part.about(s.sequence, i))
    at = math.floor((1 - part.top_share) * len(entropies))
    return entropies[at] if part.top_share and entropies else 0.0


def _whitened(scored: Sequence[ScoredSequence]) -> list[ScoredSequence]:
    tokens = [a for item in scored for i, a in enumerate(item.advantages) if own(item.sequence, i)]
    mean = sum(tokens) / len(tokens)
    std = math.sqrt(sum((a - mean) ** 2 for a in tokens) / (len(tokens) - 1))
    white = [tuple((a - mean) / (std + 1e-8) for a in item.advantages) for item in scored]
    pairs = zip(scored, white, strict=True)
    return [replace(s, sequence=replace(s.sequence, advantage=advantage)) for s, advantage in pairs]
