"""The interface of engines that sample tokens. They take and return token ids, never text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from truestep.flops import Ledger
from truestep.records import Distribution, Origin, Rollout, Stop
from truestep.seeding import Purpose, generator

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """A request for one completion. Its random numbers depend only on the fields below, not on the batch or
    the rank that decodes it. The last ``num_given`` tokens of ``prompt_ids`` are the beginning of the
    completion, so they count toward its length limit."""

    problem_id: str
    sample_index: int
    prompt_ids: tuple[int, ...]
    seed: int
    purpose: Purpose
    step: int
    num_given: int = 0

    def uniforms(self, count: int) -> np.ndarray:
        """Draw ``count`` float64 uniforms in [0, 1), one per token."""
        item = f"{self.problem_id}/{self.sample_index}"
        return generator(self.seed, self.purpose, self.step, item).random(count)


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """The distribution to sample from, and when to stop. Temperature 0 is greedy.

    A completion ends at the first of ``stop_token_ids`` or ``stop_sequences``. An engine may ignore
    ``stop_sequences``, which only save tokens that would be cut off later."""

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0
    top_k: int = 0
    stop_sequences: tuple[tuple[int, ...], ...] = ()

    def ends(self, tokens: Sequence[int]) -> bool:
        """Return whether these tokens (at least one) are a completion that stopped by itself."""
        ended = any(tuple(tokens[-len(s) :]) == s for s in self.stop_sequences)
        return ended or tokens[-1] in self.stop_token_ids

    @property
    def distribution(self) -> Distribution:
        """The distribution to which the behavior log-probabilities of the samples refer."""
        return Distribution(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)


def sampled_rollout(
    request: SampleRequest,
    sampling: SamplingParameters,
    policy_version: int,
    tokens: Sequence[int],
    logprobs: Sequence[float] | None,
    error: str = "",
) -> Rollout:
    """Return the rollout for a request whose tokens were all sampled by the same version of the policy."""
    num, stopped = len(tokens), bool(tokens) and sampling.ends(tokens)
    return Rollout(
        problem_id=request.problem_id,
        sample_index=request.sample_index,
        completion_ids=tuple(tokens),
        origin=(Origin.POLICY,) * num,
        policy_version=(policy_version,) * num,
        behavior_logprobs=None if logprobs is None else tuple(logprobs),
        distribution=sampling.distribution,
        stop=Stop.ERROR if error else Stop.STOP_TOKEN if stopped else Stop.LENGTH,
        error=error,
    )


class StaleWeightsError(RuntimeError):
    """Raised if an engine does not have the weights, or the version, that it was given."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What an engine says it has after weights were published to it, as evidence for every tensor.

    ``addresses`` are of the tensors that lie in the trainer's own memory. ``fingerprints`` are of the others: of
    what the engine holds, or, if ``is_received``, of what it got and loaded. ``unread`` is empty, or says why the
    engine cannot tell what it holds; then its tensors are in neither. ``adapters`` are the scales of the adapters with which
    it computes, by layer."""

    version: int
    addresses: Mapping[str, int] = field(default_factory=dict)
    fingerprints: Mapping[str, int] = field(default_factory=dict)
    is_received: bool = False
    unread: str = ""
    adapters: Mapping[str, float] = field(default_factory=dict)

    @property
    def proof(self) -> str:
        """How this receipt proves that the engine has the weights, in words."""
        if self.unread:
            return f"by the version that the engine reports and the reset of its cache ({self.unread})"
        if not self.fingerprints:
            return "engine and trainer have the same weights; none is copied"
        held = "received and loaded" if self.is_received else "holds"
        return f"every bit that the engine {held} is compared"


class Engine(Protocol):
    """An engine samples completions from published weights. There are two implementations, torch and vLLM.

    ``runs_beside_training`` is True if it samples in other processes, from its own copy of the weights. Then
    ``generate`` may run in a thread while the trainer updates the weights. ``has_adapters`` says whether its model has
    the adapters of LoRA; if not, it is given merged matrices."""

    policy_version: int
    runs_beside_training: bool
    has_adapters: bool

    @property
    def parts(self) -> Sequence[Engine]:
        """The engine itself, or one engine for each of its servers."""

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: SamplingParameters,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[Rollout]:
        """Yield one Rollout per request, in the order in which they finish. ``check_stop`` is called between
        decoding steps and may raise. A failed request yields a Rollout whose ``stop`` is ERROR."""

    def publish(self, weights: Mapping[str, Tensor], version: int) -> Receipt:
        """Set the weights from which the next ``generate`` samples. Return what the engine has now."""

    def rest(self) -> None:
        """Give memory back until the next ``publish``, if the engine was set up to. Called after each rollout."""

    def score(self, token_ids: Sequence[int], num_prompt_tokens: int, temperature: float) -> list[float]:
        """Return the log-probabilities of ``token_ids[num_prompt_tokens:]``, for checks."""

    def take_cost(self) -> Ledger:
        """Return the work since the last call: prompt, prefill and decoding tokens, and query-key pairs."""
