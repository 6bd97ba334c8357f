"""The nouns that flow through truestep, as frozen keyword-only records whose lengths are checked at
construction.

No torch here: the audit and the report read these records in environments that have none. Where a record
holds tensors (``TokenBatch``), they are typed by name only.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class RecordError(ValueError):
    """A record whose parts contradict each other: a programming error, never a user's."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecordError(message)


# ------------------------------------------------------------------------------------ problems and their text


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat. ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A task with an answer that a program can check.

    ``messages`` is the prompt as chat turns (the last one is the user's); ``answer`` the gold answer;
    ``checker`` the name of the function in ``grade.score`` that compares a completion with it ("math", or a
    procedural task's own); ``solution`` a demonstration's text, empty where there is none; ``row`` where it
    came from ("file:line").
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    checker: str = "math"
    solution: str = ""
    row: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(bool(self.id), "a problem needs an id")
        _require(bool(self.messages), f"problem {self.id} has no messages")


class Role(enum.IntEnum):
    """Who wrote a token. Only ASSISTANT tokens of a demonstration are trained."""

    SYSTEM = 0
    USER = 1
    ASSISTANT = 2
    TEMPLATE = 3  # what the chat template adds around the turns


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A problem as the token ids that every sample of it starts from."""

    problem: Problem
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(len(self.token_ids) > 0, f"prompt of {self.problem.id} is empty")


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A worked solution as tokens. ``trained`` is True where the token enters the loss (assistant text and
    its stop token), False on everything that is context. ``num_prompt_tokens`` counts the tokens shared with
    ``Prompt``."""

    problem_id: str
    token_ids: tuple[int, ...]
    roles: tuple[Role, ...]
    trained: tuple[bool, ...]
    num_prompt_tokens: int

    def __post_init__(self) -> None:
        _require(
            len(self.token_ids) == len(self.roles) == len(self.trained),
            f"demonstration of {self.problem_id}: token_ids, roles and trained differ in length",
        )
        _require(any(self.trained), f"demonstration of {self.problem_id} trains no token")
        _require(
            not self.trained[0],
            f"demonstration of {self.problem_id} trains its first token, which has no context",
        )


# -------------------------------------------------------------------------------------------- what is sampled


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """The distribution that behavior log-probabilities belong to: whose weights, and how they were bent."""

    policy_version: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0  # 0: no truncation


class Stop(enum.StrEnum):
    STOP_TOKEN = "stop"
    LENGTH = "length"
    ERROR = "error"


class Kind(enum.IntEnum):
    """How a training sequence came to be; objectives select their tokens by it."""

    ON = 0  # sampled from the current policy for the original prompt
    DEMO = 1  # an expert's trace
    PREFIX = 2  # expert prefix plus own continuation
    HINT = 3  # own sample under an augmented prompt
    REPLAY = 4  # own sample of an older policy


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion. ``behavior_logprobs`` are those of ``distribution`` (the sampled one, after temperature
    and truncation), one per completion token, NaN where an expert wrote it. A failed sample has stop ERROR, a
    reason, and no tokens of its own.

    The first ``num_expert_tokens`` of the completion were given, not sampled; ``expert_is_context`` leaves
    them untrained. ``prompt_ids`` is the augmented prompt that it is trained under (empty: the prompt's
    own)."""

    problem_id: str
    sample_index: int
    completion_ids: tuple[int, ...]
    behavior_logprobs: tuple[float, ...]
    distribution: Distribution
    stop: Stop
    error: str = ""
    kind: Kind = Kind.ON
    num_expert_tokens: int = 0
    expert_is_context: bool = False
    prompt_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(
            0 <= self.num_expert_tokens <= len(self.completion_ids),
            "more expert tokens than there are tokens",
        )
        _require(
            len(self.completion_ids) == len(self.behavior_logprobs),
            f"rollout {self.problem_id}/{self.sample_index}: {len(self.completion_ids)} tokens, "
            f"{len(self.behavior_logprobs)} log-probabilities",
        )
        _require(
            (self.stop is Stop.ERROR) == bool(self.error), "an error has a reason, and only an error has one"
        )


class Verdict(enum.StrEnum):
    CORRECT = "correct"
    INCORRECT = "incorrect"
    UNSCORED = "unscored"


@dataclass(frozen=True, kw_only=True)
class Score:
    """The verdict on one completion. ``extracted`` is the answer that was found in it ("" if none was);
    ``reason`` says how the verdict was reached, and is required where there is none (UNSCORED)."""

    verdict: Verdict
    extracted: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        _require(
            self.verdict is not Verdict.UNSCORED or bool(self.reason), "an unscored sample needs a reason"
        )

    @property
    def reward(self) -> float | None:
        """1 for correct, 0 for incorrect, None for unscored: a failure is never a zero."""
        return {Verdict.CORRECT: 1.0, Verdict.INCORRECT: 0.0, Verdict.UNSCORED: None}[self.verdict]


@dataclass(frozen=True, kw_only=True)
class Group:
    """All samples of one prompt in one rollout batch, with their scores. ``num_discarded_tokens`` were
    sampled for it and then replaced by a later round: they cost work and teach nothing."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]
    num_discarded_tokens: int = 0

    def __post_init__(self) -> None:
        _require(len(self.rollouts) == len(self.scores), "one score per rollout")
        _require(
            all(r.problem_id == self.prompt.problem.id for r in self.rollouts),
            "a group holds the samples of one prompt",
        )


# -------------------------------------------------------------------------------------------- what is trained


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One sequence of an optimizer step, before packing. Per-token fields are aligned with ``token_ids``;
    they are read only where ``trained`` is True. ``num_prefix_tokens`` leading tokens are shared with the
    other sequences of the same ``group`` and may be computed once for all of them. The first
    ``num_expert_tokens`` trained tokens of a PREFIX sequence are the expert's; a DEMO sequence is the
    expert's whole."""

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    num_prefix_tokens: int
    group: int
    kind: Kind
    advantage: tuple[float, ...] | float = 0.0
    behavior_logprobs: tuple[
        float, ...
    ] = ()  # aligned with the trained tokens; empty where nobody sampled them
    weight: float = 1.0  # the gate's weight of this sequence in the loss
    correct: bool = False
    reward: float = 0.0
    num_expert_tokens: int = 0

    def __post_init__(self) -> None:
        _require(len(self.token_ids) == len(self.trained), "token_ids and trained differ in length")
        _require(
            0 <= self.num_prefix_tokens < len(self.token_ids), "the shared prefix leaves nothing to train"
        )
        _require(
            not any(self.trained[: max(1, self.num_prefix_tokens)]), "a shared prefix is context, not trained"
        )
        if self.behavior_logprobs:
            _require(
                len(self.behavior_logprobs) == sum(self.trained),
                "one behavior log-probability per trained token",
            )
        if isinstance(self.advantage, tuple):
            _require(len(self.advantage) == sum(self.trained), "one advantage per trained token")

    @property
    def num_trained(self) -> int:
        return sum(self.trained)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of tokens in a packed micro-batch that sees itself causally and, before that, the tokens
    ``prefix_start:prefix_stop`` (empty for a sequence of its own). All bounds are flat indices."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


# The fields of a TokenBatch that hold one value per trained token, and those of them that count or name
# something.
TARGET_INDICES = (
    "target_ids", "source_index", "sequence_index", "group_index", "kind", "sequence_length", "group_length",
)  # fmt: skip
TARGET_FLAGS = ("correct", "is_expert")
# What scoring passes fill in, NaN until then.
SCORED_FIELDS = ("proximal_logprobs", "proximal_entropy", "reference_logprobs")
TARGET_FIELDS = (*TARGET_INDICES, *TARGET_FLAGS, *SCORED_FIELDS, "advantage", "behavior_logprobs", "weight")


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One packed micro-batch without padding: N forwarded tokens, M trained (target) tokens of S sequences.

    ``source_index`` says which forwarded token's hidden state predicts each target: with a shared prompt its
    last token predicts the first token of every completion. ``sequence_index`` and ``group_index`` number
    sequences and groups over the whole step on this rank, so that a coefficient may look at its own sequence.
    """

    input_ids: Tensor  # N int64
    position_ids: Tensor  # N int64
    segments: tuple[Segment, ...]
    target_ids: Tensor  # M int64
    source_index: Tensor  # M int64, into N
    sequence_index: Tensor  # M int64
    group_index: Tensor  # M int64
    kind: Tensor  # M int64 (Kind)
    advantage: Tensor  # M float
    behavior_logprobs: Tensor  # M float, NaN where nobody sampled the token
    proximal_logprobs: Tensor  # M float, NaN until the proximal pass has filled them
    proximal_entropy: Tensor  # M float, filled with them
    reference_logprobs: (
        Tensor  # M float, NaN unless the method asks for a pass of the frozen reference policy
    )
    weight: Tensor  # M float
    correct: Tensor  # M bool, True where the token's sequence was judged correct
    is_expert: (
        Tensor  # M bool, True where an expert wrote the token: all of a demonstration, the start of a PREFIX
    )
    sequence_length: Tensor  # M int64: trained tokens of the token's sequence
    group_length: Tensor  # M int64: trained tokens of the token's group over all ranks

    def __post_init__(self) -> None:
        num_targets = self.target_ids.shape[0]
        for name in TARGET_FIELDS:
            _require(
                tuple(getattr(self, name).shape) == (num_targets,), f"{name} is not aligned with target_ids"
            )
        _require(
            self.input_ids.shape == self.position_ids.shape, "input_ids and position_ids differ in length"
        )
        _require(
            bool(self.segments) and sum(s.stop - s.start for s in self.segments) == self.input_ids.shape[0],
            "segments do not cover the tokens",
        )

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_targets(self) -> int:
        return int(self.target_ids.shape[0])


@dataclass(frozen=True, kw_only=True)
class BatchTotals:
    """The denominators of one optimizer step: for each term, its total over ALL micro-batches and ALL ranks,
    counted before the first forward pass. No field has a default: whoever computes a loss must have counted
    first.

    ``terms`` maps a term's name to its denominator; a term whose total is 0 is absent from the step on every
    rank.
    """

    terms: Mapping[str, float]
    num_tokens: int
    num_sequences: int
    num_groups: int

    def of(self, term: str) -> float:
        if term not in self.terms:
            raise RecordError(f"no total was counted for term {term!r}; counted: {sorted(self.terms)}")
        return self.terms[term]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step did. ``metrics`` is deterministic at a fixed thread count; times are kept
    apart."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    metrics: Mapping[str, float]
    timings: Mapping[str, float]


def conserve(scores: Sequence[Score]) -> dict[str, int]:
    """Counts of a list of scores: n = correct + incorrect + unscored, always."""
    counts = {v.value: sum(s.verdict is v for s in scores) for v in Verdict}
    _require(sum(counts.values()) == len(scores), "scores were lost")
    return {"n": len(scores), **counts}
