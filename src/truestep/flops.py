"""The FLOPs ledger: tokens by kind → FLOPs, by the paper's formula and by a fuller count.

Source: arXiv:2604.23747, appendix B. With N parameters and D response tokens, a forward pass costs 2ND and a
backward pass 4ND. So an SFT token costs 6N, and an on-policy rollout token 8N (2N to generate it, 6N to train
on it). The paper counts only response tokens. The fuller count adds prompt tokens, scoring passes (proximal
log-probabilities) and attention (4 FLOPs per query-key pair, channel and layer, forward), and leaves out the
input embedding, which is a table look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    num_parameters: int
    num_matmul_parameters: int  # those that a token is multiplied with: the head too, but not the embedding
    num_layers: int
    attention_width: int  # query channels: heads x head size


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Work of a stage, as counts. Units: tokens; ``*_pairs``: query-key pairs (of one layer and head)."""

    demonstration_tokens: int = 0  # trained tokens of demonstrations
    rollout_tokens: int = 0  # generated tokens
    rollout_trained_tokens: int = 0  # generated tokens that were then trained on
    prompt_tokens: int = 0  # context tokens forwarded, in any pass
    trained_pass_tokens: int = 0  # tokens through forward + backward, context included
    generated_pass_tokens: int = 0  # tokens through prefill and decoding
    scored_pass_tokens: int = 0  # tokens through forward-only scoring passes
    trained_pairs: int = 0
    generated_pairs: int = 0
    scored_pairs: int = 0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Ledger)})

    def times(self, count: float) -> Ledger:
        """This work done ``count`` times."""
        return Ledger(**{f.name: round(getattr(self, f.name) * count) for f in fields(Ledger)})

    def paper_flops(self, shape: ModelShape) -> float:
        """6N per demonstration token, 2N per generated token, 6N per generated token that is trained on."""
        n = float(shape.num_parameters)
        return n * (6 * self.demonstration_tokens + 2 * self.rollout_tokens + 6 * self.rollout_trained_tokens)

    def full_flops(self, shape: ModelShape) -> float:
        """FLOPs including prompt tokens, scoring passes and attention, without embedding look-ups."""
        n, attention = float(shape.num_matmul_parameters), 4.0 * shape.num_layers * shape.attention_width
        forward_only = self.generated_pass_tokens + self.scored_pass_tokens
        matmul = n * (6 * self.trained_pass_tokens + 2 * forward_only)
        return matmul + attention * (3 * self.trained_pairs + self.generated_pairs + self.scored_pairs)


def sequence_work(prompt: int, completion: int) -> Ledger:
    """The work of training on one demonstration: the last token predicts nothing and is not forwarded.

    Units: tokens; ``completion`` includes the stop token. Held by: tests/study/test_flops_plan.py"""
    length = prompt + completion - 1
    return Ledger(
        demonstration_tokens=completion,
        prompt_tokens=prompt,
        trained_pass_tokens=length,
        trained_pairs=length * (length + 1) // 2,
    )


def group_work(
    prompt: int, own: Sequence[int], demonstrations: Sequence[int] = (), *, scored: bool
) -> Ledger:
    """The work of one prompt in a rollout batch: it is prefilled once, every own sample is decoded, and all
    are trained on in one tree that forwards the prompt once. ``scored`` adds the pass for the proximal
    log-probabilities.

    Units: tokens; lengths include the stop token. Held by: tests/study/test_flops_plan.py"""
    members = [n - 1 for n in (*own, *demonstrations)]
    tree = prompt + sum(members)
    context = prompt * (prompt + 1) // 2
    pairs = context + sum(n * (n + 1) // 2 + n * prompt for n in members)
    return Ledger(
        demonstration_tokens=sum(demonstrations),
        rollout_tokens=sum(own),
        rollout_trained_tokens=sum(own),
        prompt_tokens=prompt,
        trained_pass_tokens=tree,
        generated_pass_tokens=prompt + sum(own) - len(own),
        scored_pass_tokens=tree if scored else 0,
        trained_pairs=pairs,
        generated_pairs=context + sum((n - 1) * n // 2 + (n - 1) * prompt for n in own),
        scored_pairs=pairs if scored else 0,
    )
