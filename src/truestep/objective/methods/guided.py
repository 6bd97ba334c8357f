"""Methods that mix clipped RL with imitation by a schedule, a switch or a hint.

The letters in brackets are explained in ``methods/__init__.py``.
"""

from __future__ import annotations

from dataclasses import replace

from truestep.objective import coefficients, controller, plan, schedule
from truestep.objective.advantage import group_mean_std, own_mean_std
from truestep.objective.coefficients import Coefficient
from truestep.objective.gate import imitate_where_unsolved
from truestep.objective.methods.rl import clipped_term
from truestep.objective.methods.row import EXPERT, POLICY, Extras, Method, Statistic, Stream
from truestep.objective.methods.sft import imitation_term
from truestep.objective.normalise import Normaliser
from truestep.objective.schedule import Schedule


def _chord(name: str, imitated: Coefficient, mu: Schedule, stream_share: float, clip: float) -> Method:
    """Return (1−μ)·GRPO + μ·imitation of a stream of demonstrations. The two parts have separate totals."""
    return Method(
        name=name,
        terms=(
            replace(clipped_term(clip, clip, Normaliser.TOKENS), weight=lambda step: 1 - mu(step)),
            replace(imitation_term(imitated), weight=mu),
        ),
        advantage=group_mean_std,
        parts=(Stream(share=stream_share),),
        source="arXiv:2508.11408",
    )


def chord_mu(
    *,
    mu_peak: float = 0.9,
    mu_valley: float = 0.05,
    warmup_steps: int = 0,
    decay_steps: int = 200,
    stream_share: float = 0.2,
    clip: float = 0.2,
) -> Method:
    """CHORD-μ: the weight μ of imitation falls from 0.9 to 0.05 over 200 steps, and a fifth of the sequences
    are demonstrations [C]."""
    steps = {"warmup_steps": warmup_steps, "decay_steps": decay_steps}
    mu = schedule.warmed_cosine(valley=mu_valley, peak=mu_peak, **steps)
    return _chord("chord_mu", coefficients.ones, mu, stream_share, clip)


def chord_phi(*, mu: float = 0.1, stream_share: float = 0.2, clip: float = 0.2) -> Method:
    """CHORD-φ: the weight μ of imitation is constant, and the likelihood is weighted by p(1−p) [C]."""
    return _chord("chord_phi", coefficients.uncertainty, schedule.constant(mu), stream_share, clip)


def uft(
    *,
    imitation_weight: float = 1e-3,
    num_segments: int = 5,
    prefix_start: float = 0.95,
    prefix_end: float = 0.05,
    prefix_steps: int = 300,
    clip: float = 0.2,
) -> Method:
    """UFT: all samples of a problem continue the first k of 5 parts of its demonstration, where k is binomial
    with a probability that falls as a cosine. The parts are imitated with weight 0.001. The continuations are
    trained by GRPO with a KL term (k3, weight 0.001) to the policy at the stage's start [C]. All parts have
    the same number of tokens; they are not whole sentences."""
    falling = schedule.cosine(prefix_start, prefix_end, prefix_steps)
    return Method(
        name="uft",
        terms=(clipped_term(clip, clip, Normaliser.TOKENS), imitation_term(weight=imitation_weight)),
        plan=plan.shared_prefix(falling, num_segments, prefix_steps),
        advantage=group_mean_std,
        extras=Extras(kl="k3", kl_coef=1e-3),
        source="arXiv:2505.16984",
    )


def super_rl(
    *, clip: float = 0.2, learned_weights: bool = False, sigma_rate: float = 1e-2, sigma_least: float = -2.0
) -> Method:
    """SuperRL: if no sample is correct, the demonstration is imitated; otherwise the method is GRPO. With
    ``learned_weights``, the two losses are weighted by e^(−2σ). The σ of RL starts at 0, that of imitation at
    1, and neither falls below −2 [S]; the learning rate is not verified [U]. Both σ are trained on the losses
    computed under the proximal policy, for which the ratio is 1."""
    policy = clipped_term(clip, clip, Normaliser.TOKENS)
    row = Method(
        name="super_rl",
        terms=(policy, imitation_term()),
        plan=plan.beside_demonstration,
        gate=imitate_where_unsolved(0),
        advantage=own_mean_std,
        source="arXiv:2506.01096",
    )
    if not learned_weights:
        return row
    losses = (
        Statistic(name="policy_loss", select=POLICY, values=lambda c: -c.advantage, reduce="mean"),
        Statistic(name="imitation_loss", select=EXPERT, values=lambda c: -c.policy_logprobs, reduce="mean"),
    )
    names = {"policy": "policy_loss", "imitation": "imitation_loss"}
    learning = controller.learned_weights(**names, rate=sigma_rate, least=sigma_least)
    terms = (replace(policy, control="policy"), replace(imitation_term(), control="imitation"))
    return replace(row, terms=terms, statistics=losses, parts=(learning,))


def sasr(*, gamma: float = 1.0, warmup_steps: int = 20, clip: float = 0.2) -> Method:
    """SASR: a random draw decides whether a step is imitation or GRPO. The probability of imitation follows
    its gradient norm [S]; γ and the length of the warm-up are not verified [U]. For the KL (k3) to the policy
    after the warm-up, make the warm-up a separate stage and set ``kl``."""
    return Method(
        name="sasr",
        terms=(clipped_term(clip, clip, Normaliser.TOKENS), imitation_term()),
        plan=plan.one_or_the_other("imitate"),
        advantage=own_mean_std,
        parts=(controller.phases(gamma=gamma, warmup_steps=warmup_steps),),
        source="arXiv:2505.13026",
    )


def bread(
    *, num_episodes: int = 10, share_low: float = 0.01, share_high: float = 0.99, clip: float = 0.2
) -> Method:
    """BREAD: GRPO, but if no sample is correct, all samples branch from the shortest expert prefix after
    which some but not all are correct. A binary search over 10 parts finds it [S], and it is not trained on.
    The limits ``share_low`` and ``share_high`` are not verified [U]. The option ``kl`` sets the KL term."""
    terms = (clipped_term(clip, clip, Normaliser.SEQUENCES),)
    rounds, source = plan.anchored(num_episodes, share_low, share_high), "arXiv:2506.17211"
    return Method(name="bread", terms=terms, plan=rounds, advantage=group_mean_std, source=source)


def ghpo(*, clip: float = 0.2) -> Method:
    """GHPO: GRPO, but if no sample is correct, all are replaced by samples from a prompt that also shows the
    first 25 % of the solution's characters, then 50 % and 75 %. They are trained with that prompt [C]. The
    official code averages per micro-batch; this method divides by all tokens."""
    terms = (clipped_term(clip, clip, Normaliser.TOKENS),)
    rounds, source = plan.hinted((0.25, 0.5, 0.75)), "arXiv:2507.10628"
    return Method(name="ghpo", terms=terms, plan=rounds, advantage=group_mean_std, source=source)
