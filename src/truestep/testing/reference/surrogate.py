"""The papers' surrogates, which are what each trained token contributes to a loss, as the papers write it.

Each is differentiated as written, never as a detached coefficient times a log-probability, so that it can
disagree with code that uses coefficients. The log-probabilities are ``policy`` (current weights, with
gradient), ``proximal`` (frozen at the start of the update), ``behavior`` (sampler) and ``reference``
(anchor).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truestep.records import Origin, TrainSequence


@dataclass(frozen=True, kw_only=True)
class ScoredSequence:
    """A sequence with its log-probabilities and, if a method uses them, the entropies of their distributions.
    All are aligned with the trained tokens."""

    sequence: TrainSequence
    policy: Sequence[Tensor]
    proximal: Sequence[float]
    reference: Sequence[float] = ()
    entropies: Sequence[Tensor] = ()
    proximal_entropies: Sequence[float] = ()

    def __post_init__(self) -> None:
        for name in ("policy", "proximal", "reference", "entropies", "proximal_entropies"):
            length = len(getattr(self, name))
            if length != self.sequence.num_trained and (length or name in ("policy", "proximal")):
                what = name.replace("_", " ") if "entropies" in name else f"{name} log-probabilities"
                raise ValueError(f"{length} {what} for {self.sequence.num_trained} trained tokens")

    @property
    def advantages(self) -> list[float]:
        given = self.sequence.advantage
        return list(given) if isinstance(given, tuple) else [given] * self.sequence.num_trained

    @property
    def origins(self) -> list[Origin]:
        """Where each trained token comes from."""
        return [origin for origin in self.sequence.origin if origin is not Origin.CONTEXT]

    @property
    def ratios(self) -> list[Tensor]:
        """π / π_proximal of every trained token."""
        return [torch.exp(logprob - old) for logprob, old in zip(self.policy, self.proximal, strict=True)]


def nll(scored: ScoredSequence) -> list[Tensor]:
    """Equation: −log π."""
    return [-logprob for logprob in scored.policy]


def dft(scored: ScoredSequence) -> list[Tensor]:
    """Equation: −sg(π) log π. Source: arXiv 2508.05629."""
    return [-torch.exp(logprob).detach() * logprob for logprob in scored.policy]


def chord_phi(scored: ScoredSequence) -> list[Tensor]:
    """Equation: −sg(π(1−π)) log π. Source: arXiv 2508.11408, the demonstrations' part."""
    pairs = [(torch.exp(logprob).detach(), logprob) for logprob in scored.policy]
    return [-p * (1 - p) * logprob for p, logprob in pairs]


def power(scored: ScoredSequence, *, alpha: float) -> list[Tensor]:
    """Equation: (1 − π^α)/α."""
    return [(1 - torch.exp(alpha * logprob)) / alpha for logprob in scored.policy]


def trsft(scored: ScoredSequence, *, alpha: float) -> list[Tensor]:
    """Equation: −π / sg(max(π, α)). Source: arXiv 2512.17636."""
    return [-p / max(p.item(), alpha) for p in map(torch.exp, scored.policy)]


def _clipped_gain(ratio: Tensor, advantage: float, eps_low: float, eps_high: float) -> Tensor:
    return torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - eps_low, 1 + eps_high) * advantage)


def ppo_clip(
    scored: ScoredSequence, *, eps_low: float, eps_high: float, dual_clip: float | None = None
) -> list[Tensor]:
    """Equation: −min(rA, clip(r, 1−ε_low, 1+ε_high)A); with ``dual_clip`` c at most −cA where A < 0.
    Source: arXiv 1707.06347; 1912.09729 for the second clip."""
    losses = []
    for ratio, advantage in zip(scored.ratios, scored.advantages, strict=True):
        loss = -_clipped_gain(ratio, advantage, eps_low, eps_high)
        if dual_clip is not None and advantage < 0:
            loss = torch.minimum(loss, torch.full_like(loss, -dual_clip * advantage))
        losses.append(loss)
    return losses


def psft(scored: ScoredSequence, *, eps_low: float, eps_high: float) -> list[Tensor]:
    """Equation: −min(r, clip(r, 1−ε_low, 1+ε_high)). Source: arXiv 2508.17784."""
    return [-_clipped_gain(ratio, 1.0, eps_low, eps_high) for ratio in scored.ratios]


def gspo(scored: ScoredSequence, *, eps_low: float, eps_high: float) -> list[Tensor]:
    """Equation: −min(sA, clip(s)A), s = exp(mean_t(log π − log π_proximal)), the gradient flowing through s.
    Source: arXiv 2507.18071."""
    if not scored.policy:
        return []
    log_ratios = [logprob - old for logprob, old in zip(scored.policy, scored.proximal, strict=True)]
    ratio = torch.exp(torch.stack(log_ratios).sum() / len(scored.policy))
    return [-_clipped_gain(ratio, advantage, eps_low, eps_high) for advantage in scored.advantages]


def cispo(scored: ScoredSequence, *, eps_low: float, eps_high: float) -> list[Tensor]:
    """Equation: −sg(clip(r, 1−ε_low, 1+ε_high)) A log π. Source: arXiv 2506.13585."""
    weights = [min(max(ratio.item(), 1 - eps_low), 1 + eps_high) for ratio in scored.ratios]
    triples = zip(weights, scored.advantages, scored.policy, strict=True)
    return [-weight * advantage * logprob for weight, advantage, logprob in triples]


def sapo(scored: ScoredSequence, *, tau_positive: float, tau_negative: float) -> list[Tensor]:
    """Equation: −(4/τ) σ(τ(r−1)) A, τ by the sign of A. Source: arXiv 2511.20347."""
    taus = [tau_positive if advantage > 0 else tau_negative for advantage in scored.advantages]
    triples = zip(scored.ratios, scored.advantages, taus, strict=True)
    return [-4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage for ratio, advantage, tau in triples]


def nft(scored: ScoredSequence, *, low: float, high: float) -> list[Tensor]:
    """Equation: −(1−q) log r on a correct sample; −(1−q) log max((1−qr)/(1−q), 1) on a wrong one, where the
    maximum replaces the value and lets the gradient through; q = the group's share of correct samples.
    Source: arXiv 2505.18116."""
    losses = []
    for ratio, advantage in zip(scored.ratios, scored.advantages, strict=True):
        q = min(max(1 - advantage if scored.sequence.solved else -advantage, low), high)
        if scored.sequence.solved:
            likelihood = ratio
        else:
            likelihood = (1 - q * ratio) / (1 - q)
            likelihood = likelihood + max(1.0 - likelihood.item(), 0.0)
        losses.append(-(1 - q) * torch.log(likelihood))
    return losses


def reinforce(scored: ScoredSequence) -> list[Tensor]:
    """Equation: −A log π."""
    return [-advantage * logprob for logprob, advantage in zip(scored.policy, scored.advantages, strict=True)]


def importance(scored: ScoredSequence) -> list[Tensor]:
    """Return the losses of the policy's samples in mixed-policy methods. Equation: −rA, without a clip."""
    return [-ratio * advantage for ratio, advantage in zip(scored.ratios, scored.advantages, strict=True)]


def luffy(scored: ScoredSequence, *, gamma: float) -> list[Tensor]:
    """Equation: −A π/(π+γ) on the expert's tokens, −rA elsewhere. Source: arXiv 2504.14945."""
    losses = importance(scored)
    for i, origin in enumerate(scored.origins):
        if origin is Origin.EXPERT:
            p = torch.exp(scored.policy[i])
            losses[i] = -scored.advantages[i] * p / (p + gamma)
    return losses


def exgrpo(scored: ScoredSequence, *, beta: float) -> list[Tensor]:
    """Equation: −A w/(w+β), w = π/π_behavior, on replayed samples; else −rA. Source: arXiv 2510.02245."""
    losses = importance(scored)
    for i, origin in enumerate(scored.origins):
        if origin is Origin.STORED:
            assert scored.sequence.behavior_logprobs is not None
            w = torch.exp(scored.policy[i] - scored.sequence.behavior_logprobs[i])
            losses[i] = -scored.advantages[i] * w / (w + beta)
    return losses


def rl_plus(scored: ScoredSequence, *, gamma: float) -> list[Tensor]:
    """Equation: −A sg(1−π)^γ · 2π/(π_proximal + ½(π_proximal+1)) on the expert's tokens, −rA elsewhere.
    Source: arXiv 2508.00222."""
    losses = importance(scored)
    for i, origin in enumerate(scored.origins):
        if origin is Origin.EXPERT:
            p, p_old = torch.exp(scored.policy[i]), math.exp(scored.proximal[i])
            gain = scored.advantages[i] * (1 - p.item()) ** gamma
            losses[i] = -gain * 2 * p / (p_old + 0.5 * (p_old + 1))
    return losses


def unshaped(scored: ScoredSequence) -> list[Tensor]:
    """Equation: −A π: importance sampling, behavior probability 1. Source: arXiv 2506.19767,
    demonstrations."""
    return [-advantage * torch.exp(x) for x, advantage in zip(scored.policy, scored.advantages, strict=True)]


def iw_sft(
    scored: ScoredSequence, *, level: str, low: float, high: float, temperature: float = 1.0
) -> list[Tensor]:
    """Equation: −sg(w) log π, w = clamp(exp(τ·mean(log π − log π_reference)), low, high) of the sequence, or
    clamp(π/π_reference, low, high) of the token. Source: arXiv 2507.12856."""
    gains = [logprob.item() - anchor for logprob, anchor in zip(scored.policy, scored.reference, strict=True)]
    if level == "sequence":
        gains = [temperature * sum(gains) / len(gains)] * len(gains)
    weights = [min(max(math.exp(gain), low), high) for gain in gains]
    return [-weight * logprob for weight, logprob in zip(weights, scored.policy, strict=True)]


def _mean_entropy(scored: ScoredSequence) -> float:
    return sum(entropy.item() for entropy in scored.entropies) / len(scored.entropies)


def srft_imitation(scored: ScoredSequence, *, scale: float, sign: float) -> list[Tensor]:
    """Equation: −scale·sg(e^(sign·H)) log π, H the mean entropy of the sequence. Source: arXiv 2506.19767."""
    weight = scale * math.exp(sign * _mean_entropy(scored))
    return [-weight * logprob for logprob in scored.policy]


def srft_samples(scored: ScoredSequence, *, scale: float) -> list[Tensor]:
    """Equation: −scale·sg(e^H) log π on a correct sample, +log π on a wrong one. Source: arXiv 2506.19767."""
    if scored.sequence.solved:
        weight = scale * math.exp(_mean_entropy(scored))
        return [-weight * logprob for logprob in scored.policy]
    return list(scored.policy)


def uncertain_only(scored: ScoredSequence, losses: Sequence[Tensor], threshold: float) -> list[Tensor]:
    """Return each token's loss, or 0 if its entropy under the proximal policy is below the threshold."""
    pairs = zip(losses, scored.proximal_entropies, strict=True)
    return [loss if entropy >= threshold else loss * 0 for loss, entropy in pairs]


def kl_terms(scored: ScoredSequence, kind: str) -> list[Tensor]:
    """With d = log π − log π_reference: k1 = d; k2 = d²/2; k3 = e^(−d) + d − 1. Source: Schulman 2020."""
    gaps = [logprob - anchor for logprob, anchor in zip(scored.policy, scored.reference, strict=True)]
    return [{"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) + d - 1}[kind] for d in gaps]
