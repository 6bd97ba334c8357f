"""Methods that train on the policy's samples and on demonstrations in one run.

The code of most papers of this family has LUFFY's normaliser: it divides by L per micro-batch, sums over
micro-batches and averages over ranks. Here every term is divided by a global count. ``legacy_scale`` = W, the
number of GPUs in the official run, restores the size of the official gradient. Terms over N·L are then
multiplied by N/W. Token means, which that code sums over the micro-batches of a rank, are multiplied by
``legacy_microbatches``, which depends on packing and is not a constant of any method; 8 is not verified
[U]. With AdamW, the scale matters for clipping, the entropy bonus and the balance of RL and imitation.

The letters in brackets are explained in ``methods/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from truestep.objective import coefficients, plan, schedule
from truestep.objective.advantage import group_mean_std, own_mean
from truestep.objective.coefficients import Coefficient
from truestep.objective.gate import imitate_where_unsolved, push_unsolved
from truestep.objective.methods import row
from truestep.objective.methods.rl import policy_term
from truestep.objective.methods.row import EXPERT, POLICY, DemonstrationBuffer, Extras, Method, Replay, Term
from truestep.objective.methods.sft import highest_entropy, imitation_term
from truestep.objective.normalise import Normaliser
from truestep.records import BatchTotals

CANONICAL_ENTROPY = 1e-4  # the official 0.001 of LUFFY and its family, on the scale of a global mean


def _part(name: str, select: row.Select, coefficient: Coefficient, **given: Any) -> Term:
    """Return one part of a surrogate whose parts share the denominator N·L, which counts all sequences."""
    given |= {"counted": row.ALL, "normaliser": Normaliser.MAX_LENGTH}
    return Term(name=name, select=select, coefficient=coefficient, **given)


OWN_PART = _part("policy", POLICY, coefficients.importance)
OWN_TERM = policy_term(coefficients.importance, Normaliser.MAX_LENGTH)  # the total counts only own sequences


def _family(name: str, terms: Sequence[Term], legacy: tuple[int, int], source: str, **given: Any) -> Method:
    """Return a method of LUFFY's family, with an entropy bonus. ``legacy``: ranks (0: off), micro-batches."""
    ranks, microbatches = legacy
    made = partial(Method, name=name, source=source, **given)
    if ranks == 0:
        return made(terms=tuple(terms), extras=Extras(entropy_bonus=CANONICAL_ENTROPY))

    def scale(term: Term) -> Callable[[BatchTotals], float]:
        if term.normaliser is Normaliser.MAX_LENGTH:
            return lambda totals: totals.num_sequences / ranks
        return lambda totals: float(microbatches)

    scaled = tuple(replace(t, scale=scale(t)) for t in terms)
    return made(terms=scaled, extras=Extras(entropy_bonus=1e-3 * microbatches))


def luffy(*, gamma: float = 0.1, legacy_scale: int = 0, legacy_microbatches: int = 8) -> Method:
    """LUFFY: n−1 samples and the demonstration form one group; rewards are not divided by their std, and ratios are
    not clipped [C]. The demonstration's importance ratio, with behavior probability 1, is shaped by p/(p+γ). A
    demonstration that the checker rejects has a negative advantage."""
    terms = (OWN_PART, _part("demonstration", EXPERT, coefficients.shaped_demonstration(gamma)))
    legacy = (legacy_scale, legacy_microbatches)
    return _family("luffy", terms, legacy, "arXiv:2504.14945", plan=plan.with_demonstration)


def multi_task(*, weight: float = 1.0, legacy_scale: int = 0, legacy_microbatches: int = 8) -> Method:
    """RL on the policy's samples plus ``weight`` times the log-likelihood of the demonstration (1.0 [C]). The
    group is LUFFY's, but the baseline is over only the samples, and the demonstration has no advantage."""
    terms = (OWN_TERM, imitation_term(weight=weight))
    legacy = (legacy_scale, legacy_microbatches)
    source = "arXiv:2504.14945, RL with SFT loss"
    return _family("multi_task", terms, legacy, source, plan=plan.with_demonstration, advantage=own_mean)


def relift(
    *,
    buffer_size: int = 128,
    buffer_lr: float = 1e-6,
    buffer_max_grad_norm: float = 1.0,
    legacy_scale: int = 0,
    legacy_microbatches: int = 8,
) -> Method:
    """ReLIFT: Dr. GRPO without a clip. If no sample solves a problem, its demonstration goes into a buffer.
    As soon as ``buffer_size`` demonstrations wait, one update imitates the newest, with a separate AdamW [C].
    In the official code, that update is too small by a factor of 8, which AdamW hides. Here it is correct."""
    terms = (OWN_TERM, imitation_term())
    legacy = (legacy_scale, legacy_microbatches)
    buffer = DemonstrationBuffer(size=buffer_size, lr=buffer_lr, max_grad_norm=buffer_max_grad_norm)
    return _family("relift", terms, legacy, "arXiv:2506.07527", gate=push_unsolved, parts=(buffer,))


def srft(
    *,
    imitation_weight: float = 0.5,
    entropy_sign: float = -1.0,
    correct_weight: float = 0.1,
    legacy_scale: int = 0,
    legacy_microbatches: int = 8,
) -> Method:
    """SRFT adds three terms: imitation of the demonstration with weight ½·exp(sign·H), the demonstration with
    its advantage times p, and the policy's samples with a weight that depends only on the verdict (0.1·exp(H)
    or −1). H is a sequence's mean entropy, as in HPT's re-implementation [C]. The sign is the paper's −1 [P];
    the official code is reported to use +1 [S]."""
    terms = (
        imitation_term(coefficients.entropy_weighted(imitation_weight, entropy_sign)),
        _part("demonstration", EXPERT, coefficients.unshaped_demonstration),
        _part("policy", POLICY, coefficients.signed_by_verdict(correct_weight)),
    )
    legacy = (legacy_scale, legacy_microbatches)
    rounds = plan.beside_demonstration
    return _family("srft", terms, legacy, "arXiv:2506.19767", plan=rounds, advantage=group_mean_std)


def prefix_rft(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    entropy_share: float = 0.2,
    prefix_start: float = 0.95,
    prefix_end: float = 0.05,
    prefix_high: float = 0.95,
    prefix_steps: int = 500,
) -> Method:
    """Prefix-RFT: n−1 samples, and one sample that continues an expert prefix. The prefix length is uniform
    between 0.95 and a lower bound that falls as a cosine. The clipped surrogate, with the group's advantage,
    leaves out prefix tokens that are not in the ``entropy_share`` with the highest entropy in the whole step
    (per micro-batch in the official code [C]). These tokens still count in the total."""
    clipped = coefficients.clipped_ratio(clip_low, clip_high)
    masked = coefficients.where_uncertain(clipped, "prefix_entropy")
    return Method(
        name="prefix_rft",
        terms=(_part("policy", POLICY, clipped, clips=True), _part("prefix", EXPERT, masked)),
        plan=plan.one_prefix(schedule.cosine(prefix_start, prefix_end, prefix_steps), prefix_high),
        statistics=(highest_entropy("prefix_entropy", entropy_share),),
        source="arXiv:2507.01679",
    )


def hpt(
    *,
    most_correct: int = 0,
    imitation_weight: float = 1.0,
    legacy_scale: int = 0,
    legacy_microbatches: int = 8,
) -> Method:
    """HPT decides per problem. If at most ``most_correct`` samples are correct (0 for Qwen, 2 for Llama [C]),
    the demonstration is imitated and the samples are dropped. Otherwise, the method is Dr. GRPO without a
    clip. Totals count only what is kept."""
    terms = (OWN_TERM, imitation_term(weight=imitation_weight))
    legacy = (legacy_scale, legacy_microbatches)
    rounds, gate = plan.beside_demonstration, imitate_where_unsolved(most_correct)
    return _family("hpt", terms, legacy, "arXiv:2509.04419", plan=rounds, gate=gate, advantage=own_mean)


def trapo(*, alpha: float = 0.1, legacy_scale: int = 0, legacy_microbatches: int = 8) -> Method:
    """TRAPO samples micro-groups one after another. If too few samples have been correct so far, the next
    group continues an expert prefix, of length 0.25, 0.5 or 1 if the share is below 1/2, 2/3 or 1 [C] (in the
    paper 0.2, 0.5 or 1 if below 0.5, 0.7 or 0.9). TrSFT imitates expert tokens with advantage 1. The official
    code also leaves out one of two guided samples and ends prefixes at clauses; this method does neither."""
    terms = (OWN_PART, _part("prefix", EXPERT, coefficients.trusted(alpha)))
    legacy = (legacy_scale, legacy_microbatches)
    guided = plan.guided((0.25, 0.5, 1.0), (1 / 2, 2 / 3, 1.0))
    return _family("trapo", terms, legacy, "arXiv:2512.17636", plan=guided)


def exgrpo(
    *,
    beta: float = 0.1,
    replay_share: float = 0.5,
    replay_start: float = 0.35,
    replay_sigma: float = 1.0,
    most_stored: int = 8,
    legacy_scale: int = 0,
    legacy_microbatches: int = 8,
) -> Method:
    """ExGRPO: half of the prompts come from a store of partly solved problems. Each of their groups has one
    stored sample, weighted by its shaped ratio to the policy that sampled it [C]. ``most_stored`` is the most
    samples stored per problem (not verified [U]: the official code keeps all samples)."""
    shaped, needs = coefficients.shaped_replay(beta), ("behavior_logprobs",)
    terms = (OWN_PART, _part("replay", row.STORED, shaped, needs=needs))
    legacy = (legacy_scale, legacy_microbatches)
    store = Replay(share=replay_share, start=replay_start, sigma=replay_sigma, most_stored=most_stored)
    return _family("exgrpo", terms, legacy, "arXiv:2510.02245", plan=plan.with_replay, parts=(store,))


def rl_plus(*, exponent: float = 0.5, legacy_scale: int = 0, legacy_microbatches: int = 8) -> Method:
    """RL-PLUS: LUFFY's group with a different off-policy part, which uses multiple importance sampling and
    gives improbable tokens a larger advantage. There is no std and no clip, as in the official code [C]; the
    paper divides by a std."""
    terms = (OWN_PART, _part("demonstration", EXPERT, coefficients.mixed_importance(exponent)))
    legacy = (legacy_scale, legacy_microbatches)
    return _family("rl_plus", terms, legacy, "arXiv:2508.00222", plan=plan.with_demonstration)
