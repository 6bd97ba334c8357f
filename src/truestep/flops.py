"""The FLOPs ledger, which turns token counts into FLOPs by the paper's formula and by a fuller count.

Source: arXiv:2604.23747, appendix B. With N parameters and D response tokens, a forward pass costs 2ND and a
backward pass 4ND. So an SFT token costs 6N, and an on-policy rollout token 8N (2N to generate it, 6N to train
on it). The paper counts only response tokens. The fuller count adds prompt tokens, scoring passes (proximal
log-probabilities) and attention (4 FLOPs per query-key pair, channel and layer, forward), and leaves out the
input embedding, which is a table look-up. N is what a token uses: of a mixture of experts, the experts that it
passes through.

A frozen matrix needs no gradient of its weights, and a matrix below all trained parameters needs none of its input
either. So of the 4N of a backward pass, ``backward_share`` remains, and attention has a backward pass only from the
lowest layer with a trained parameter on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    num_parameters: int
    num_matmul_parameters: int  # of all matrix products of a token: the head included, but not the embedding
    num_layers: int
    attention_width: int  # query channels: heads x head size
    num_unused_parameters: int = 0  # of the experts that a token does not pass through
    backward_share: float = (
        1.0  # of the backward pass's products with matrices; less than 1 if some are frozen
    )
    num_backward_layers: int | None = None  # those whose attention has a backward pass; None: all

    def to_json(self) -> dict[str, float]:
        """Return the fields, without those that only models with experts or frozen layers have."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The work of a stage, as counts. Units: tokens (``*_pairs``: query-key pairs of one layer and head)."""

    demonstration_tokens: int = 0  # trained tokens of demonstrations
    rollout_tokens: int = 0  # generated tokens
    rollout_trained_tokens: int = 0  # generated tokens that were then trained on
    prompt_tokens: int = 0  # context tokens in any forward pass
    trained_pass_tokens: int = 0  # tokens through forward + backward, context included
    generated_pass_tokens: int = 0  # tokens through prefill and decoding
    scored_pass_tokens: int = 0  # tokens through forward-only scoring passes
    trained_pairs: int = 0
    generated_pairs: int = 0
    scored_pairs: int = 0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Ledger)})

    def times(self, count: float) -> Ledger:
        """Return this work multiplied by ``count``."""
        return Ledger(**{f.name: round(getattr(self, f.name) * count) for f in fields(Ledger)})

    def paper_flops(self, shape: ModelShape) -> float:
        """Return 6N per demonstration token, 2N per generated token and 6N more if that is trained on (less than 6N
        if matrices are frozen)."""
        n, trained = float(shape.num_parameters - shape.num_unused_parameters), 2 + 4 * shape.backward_share
        tokens = self.demonstration_tokens + self.rollout_trained_tokens
        return n * (trained * tokens + 2 * self.rollout_tokens)

    def full_flops(self, shape: ModelShape) -> float:
        """Return the FLOPs with prompt tokens, scoring passes and attention, but no embedding look-ups."""
        n, layers = float(shape.num_matmul_parameters - shape.num_unused_parameters), shape.num_layers
        backward = layers if shape.num_backward_layers is None else shape.num_backward_layers
        tokens = self.trained_pass_tokens + self.generated_pass_tokens + self.scored_pass_tokens
        pairs = self.trained_pairs + self.generated_pairs + self.scored_pairs
        matmul = n * (2 * tokens + 4 * shape.backward_share * self.trained_pass_tokens)
        return matmul + 4.0 * shape.attention_width * (layers * pairs + 2 * backward * self.trained_pairs)


def sequence_work(prompt: int, completion: int) -> Ledger:
    """Return the work of training on one demonstration. Its last token predicts nothing and is left out.

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
    """Return the work of one prompt in a rollout batch. The prompt is prefilled once, and every sample of the
    policy (``own`` has the lengths) is decoded. All sequences are trained on in one tree, in which the prompt
    is computed once. ``scored`` adds the pass for the proximal log-probabilities.

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
