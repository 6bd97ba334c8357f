"""The nouns that flow through truestep, as frozen keyword-only records whose lengths are checked at
construction.

No torch here: the audit and the report read these records in environments that have none. Where a record
holds tensors (``TokenBatch``), they are typed by name only.

One file: whoever reads one of them needs the others, and every room imports several.
"""

from __future__ import annotations

import enum
import math
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


class Origin(enum.IntEnum):
    """Where a token comes from. Terms select their tokens by it, and metrics and ledgers count by it."""

    CONTEXT = 0  # conditioned on, never trained
    POLICY = 1  # sampled in this rollout batch
    STORED = 2  # sampled in an earlier rollout batch and stored (replay)
    EXPERT = 3  # a demonstration, or its beginning that a sample continues


SAMPLED = (Origin.POLICY, Origin.STORED)  # the origins that have a behavior log-probability
NOT_SAMPLED = -1  # policy_version of a token that no policy has sampled


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How the policy's distribution was changed before sampling: whose log-probabilities are the behavior
    ones."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0  # 0: no truncation


class Stop(enum.StrEnum):
    STOP_TOKEN = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a plan asks for: ``num_samples`` completions that start alike.

    ``prefix`` is the share of the demonstration's tokens that the completion begins with (1: all of them, and
    nothing is generated), ``prefix_origin`` whether they are trained (EXPERT) or not (CONTEXT). ``hint`` is
    the share of the solution's text that the prompt shows. ``stored``: a stored sample joins, nothing is
    generated.
    """

    num_samples: int
    prefix: float = 0.0
    prefix_origin: Origin = Origin.EXPERT
    hint: float = 0.0
    stored: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether everything is sampled by the policy, under the problem's own prompt."""
        return not (self.prefix or self.hint or self.stored)


PLAIN = Round(num_samples=1)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion. ``origin``, ``policy_version`` and ``behavior_logprobs`` have one value per completion
    token. Behavior log-probabilities are those of ``distribution``; they are 0 where ``origin`` is not one of
    ``SAMPLED``, and None if nobody recorded any. A failed sample has stop ERROR and a reason, and no tokens.

    ``prompt_ids`` is the augmented prompt that it is trained under (empty: the prompt's own); ``round`` is
    what the plan asked for.
    """

    problem_id: str
    sample_index: int
    completion_ids: tuple[int, ...]
    origin: tuple[Origin, ...]
    policy_version: tuple[int, ...]
    behavior_logprobs: tuple[float, ...] | None
    distribution: Distribution
    stop: Stop
    error: str = ""
    prompt_ids: tuple[int, ...] = ()
    round: Round = PLAIN

    def __post_init__(self) -> None:
        name, num = f"rollout {self.problem_id}/{self.sample_index}", len(self.completion_ids)
        _require(len(self.origin) == num, f"{name}: {num} tokens, {len(self.origin)} origins")
        _require(len(self.policy_version) == num, f"{name}: one policy version per token")
        _require(
            self.behavior_logprobs is None or len(self.behavior_logprobs) == num,
            f"{name}: {num} tokens, {len(self.behavior_logprobs or ())} log-probabilities",
        )
        _require(
            (self.stop is Stop.ERROR) == bool(self.error),
            f"{name}: an error, and only an error, has a reason",
        )

    @property
    def member(self) -> Origin:
        """What it is to its group, by its last token: sampled (also if it failed), stored, or a whole
        demonstration."""
        return self.origin[-1] if self.origin else Origin.POLICY

    def count(self, origin: Origin) -> int:
        """How many of its tokens have this origin."""
        return self.origin.count(origin)


class Verdict(enum.StrEnum):
    CORRECT = "correct"
    INCORRECT = "incorrect"
    UNSCORED = "unscored"


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a completion is worth. ``verdict`` is about truth (None if no checker was asked); ``reward`` is
    what RL climbs (None: unscored). ``parts`` are the reward's parts by name, ``extracted`` the answer that was
    found ("" if none was). ``reason`` says how the verdict was reached; an unscored sample needs one.
    ``failed`` marks a sample that a reward function could not score (it raised, hung, or returned nonsense).
    """

    reward: float | None
    verdict: Verdict | None
    parts: Mapping[str, float] = field(default_factory=dict)
    extracted: str = ""
    reason: str = ""
    failed: bool = False

    def __post_init__(self) -> None:
        unscored = self.verdict is Verdict.UNSCORED or self.reward is None
        _require(not unscored or bool(self.reason), "an unscored sample needs a reason")
        _require(self.reward is None or math.isfinite(self.reward), "a reward is a finite number or None")

    @property
    def label(self) -> str:
        """The verdict in words; "scored" or "unscored" if no checker was asked."""
        if self.verdict is not None:
            return self.verdict.value
        return "unscored" if self.reward is None else "scored"

    def solved(self, threshold: float = 1.0) -> bool | None:
        """Whether the sample solves its problem: its verdict if a checker was asked, else a reward of at least
        ``threshold``; None if it is unscored."""
        if self.verdict is not None:
            return {Verdict.CORRECT: True, Verdict.INCORRECT: False, Verdict.UNSCORED: None}[self.verdict]
        return None if self.reward is None else self.reward >= threshold


def judged(verdict: Verdict, *, extracted: str = "", reason: str = "") -> Score:
    """A checker's score: reward 1 for correct, 0 for incorrect, None for unscored (a failure is never a zero)."""
    reward = {Verdict.CORRECT: 1.0, Verdict.INCORRECT: 0.0, Verdict.UNSCORED: None}[verdict]
    return Score(reward=reward, verdict=verdict, extracted=extracted, reason=reason)


@dataclass(frozen=True, kw_only=True)
class RewardInput:
    """What a reward function gets for one sample. ``problem`` holds all columns of its row (``meta``);
    ``messages`` is the prompt that was sampled from. ``seed``, ``step`` and ``sample`` identify the sample,
    whatever rank sampled it and in whatever order; ``limit`` is the length limit in tokens. ``verdict`` is the
    checker's, if one is among the rewards.
    """

    problem: Problem
    messages: tuple[Message, ...]
    completion: str
    completion_ids: tuple[int, ...]
    stop: Stop
    seed: int
    step: int
    sample: int
    limit: int
    verdict: Verdict | None = None


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
    """One sequence of an optimizer step, before packing. ``origin`` is aligned with ``token_ids``: every token
    that is not CONTEXT is trained. ``advantage``, ``behavior_logprobs`` and ``policy_version`` are aligned with
    the trained tokens; a single number holds for all of them. The first ``num_prefix_tokens`` tokens are shared
    with other sequences of the same ``group`` and may be computed once for all of them.
    """

    token_ids: tuple[int, ...]
    origin: tuple[Origin, ...]
    num_prefix_tokens: int
    group: int
    advantage: tuple[float, ...] | float = 0.0
    behavior_logprobs: tuple[float, ...] | None = None
    policy_version: tuple[int, ...] | int = NOT_SAMPLED
    weight: float = 1.0  # the gate's weight of this sequence in the loss
    solved: bool = False
    reward: float = 0.0

    def __post_init__(self) -> None:
        _require(len(self.token_ids) == len(self.origin), "token_ids and origin differ in length")
        _require(
            0 <= self.num_prefix_tokens < len(self.token_ids), "the shared prefix leaves nothing to train"
        )
        prefix = self.origin[: max(1, self.num_prefix_tokens)]
        _require(all(o is Origin.CONTEXT for o in prefix), "a shared prefix is context, not trained")
        for name in ("advantage", "behavior_logprobs", "policy_version"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                _require(len(value) == self.num_trained, f"one {name} per trained token")

    @property
    def num_trained(self) -> int:
        return len(self.origin) - self.origin.count(Origin.CONTEXT)

    def count(self, origin: Origin) -> int:
        """How many of its tokens have this origin."""
        return self.origin.count(origin)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of tokens in a packed micro-batch that sees itself causally and, before that, the tokens
    ``prefix_start:prefix_stop`` (empty for a sequence of its own). All bounds are flat indices."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


# The fields of a TokenBatch that hold one value per trained token: always, and once known.
TARGET_FIELDS = (
    "target_ids", "source_index", "sequence_index", "sequence_length", "origin", "policy_version",
    "advantage", "weight", "solved",
)  # fmt: skip
OPTIONAL_FIELDS = ("behavior_logprobs", "proximal_logprobs", "proximal_entropy", "reference_logprobs")


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One packed micro-batch without padding: N forwarded tokens, M trained (target) tokens of S sequences.

    ``source_index`` says which forwarded token's hidden state predicts each target: with a shared prompt its
    last token predicts the first token of every completion. ``sequence_index`` numbers the sequences of the
    whole step on this rank, so that a coefficient may look at its own sequence. The optional columns are None
    until a scoring pass fills them; ``behavior_logprobs`` is None if no token of the batch was sampled, and
    otherwise 0 at the tokens that were not (see ``origin``).
    """

    input_ids: Tensor  # N int64
    position_ids: Tensor  # N int64
    segments: tuple[Segment, ...]
    target_ids: Tensor  # M int64
    source_index: Tensor  # M int64, into N
    sequence_index: Tensor  # M int64
    sequence_length: Tensor  # M int64: trained tokens of the token's sequence
    origin: Tensor  # M int8 (Origin)
    policy_version: Tensor  # M int32, -1 if no policy sampled the token
    advantage: Tensor  # M float
    weight: Tensor  # M float
    solved: Tensor  # M bool, True if the token's sequence solves its problem
    behavior_logprobs: Tensor | None = None  # M float
    proximal_logprobs: Tensor | None = None  # M float
    proximal_entropy: Tensor | None = None  # M float, filled with them
    reference_logprobs: Tensor | None = None  # M float, of the frozen reference policy

    def __post_init__(self) -> None:
        num_targets = self.target_ids.shape[0]
        columns = {name: getattr(self, name) for name in (*TARGET_FIELDS, *OPTIONAL_FIELDS)}
        for name, column in columns.items():
            absent = column is None and name in OPTIONAL_FIELDS
            _require(
                absent or tuple(column.shape) == (num_targets,), f"{name} is not aligned with target_ids"
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

    def of(self, term: str) -> float:
        if term not in self.terms:
            raise RecordError(f"no total was counted for term {term!r}; counted: {sorted(self.terms)}")
        return self.terms[term]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    metrics: Mapping[str, float]


def conserve(scores: Sequence[Score]) -> dict[str, int]:
    """Counts of a list of scores: n = correct + incorrect + unscored, always."""
    counts = {v.value: sum(s.verdict is v for s in scores) for v in Verdict}
    _require(sum(counts.values()) == len(scores), "scores were lost")
    return {"n": len(scores), **counts}
