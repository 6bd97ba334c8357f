"""The data that flows through truestep, as frozen keyword-only records, checked at construction.

torch is not imported, because the audit and the report read these records in environments without torch. The
tensors of a ``TokenBatch`` are typed only by name. One file: the records refer to each other, and every package
imports several of them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class RecordError(ValueError):
    """Raised if the parts of a record contradict each other. This is a bug, never a user's mistake."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecordError(message)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat. ``role`` is system, user, assistant or tool. ``more`` is given to the chat template as it
    is: a thought (``reasoning_content``), ``tool_calls``, a tool's ``name`` and ``tool_call_id``."""

    role: str
    content: str
    is_trained: bool = True  # whether SFT trains on the turn, if it is the assistant's
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A task with an answer that a program can check; or a demonstration, or a ``text``, that SFT trains on."""

    id: str
    messages: tuple[Message, ...]  # the prompt as chat turns; the last one is the user's or a tool's
    answer: str  # gold
    checker: str = "math"  # the function of grade.score that compares a completion with the answer
    solution: str = ""  # a demonstration's text, if there is one
    row: str = ""  # where it came from, "file:line"
    meta: Mapping[str, Any] = field(default_factory=dict)  # further data for the checker
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row as it was read
    # The prompt and its answer, if the assistant has several turns or a turn is more than text; otherwise empty.
    dialogue: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()  # descriptions of tools, for the chat template
    text: str = ""  # trained on as it is, without a template; there are no messages
    layout: str = "truestep"  # the name of the row's layout, and the row's columns by our names
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    num_left_turns: int = (
        0  # turns at the end of a demonstration's dialogue that no trained turn follows, left out
    )

    def __post_init__(self) -> None:
        _require(bool(self.id), "a problem needs an id")
        _require(bool(self.messages) != bool(self.text), f"problem {self.id} needs messages or a text")

    @property
    def question(self) -> str:
        """The texts of the prompt's turns."""
        return "\n\n".join(turn.content for turn in self.messages)

    @property
    def system(self) -> str:
        """The text of the prompt's system turn, or "" if it has none."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else ""


class Role(enum.IntEnum):
    """The author of a token. Only ASSISTANT tokens of a demonstration are trained on."""

    SYSTEM = 0
    USER = 1
    ASSISTANT = 2
    TEMPLATE = 3  # what the chat template adds around the turns
    TOOL = 4


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The prompt of a problem as token ids, which the problem's samples continue."""

    problem: Problem
    token_ids: tuple[int, ...]
    data: str = ""  # the name of the data set, if the stage has several

    def __post_init__(self) -> None:
        _require(len(self.token_ids) > 0, f"prompt of {self.problem.id} is empty")


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A worked solution as tokens: a prompt, and the solution with its stop token, which are in the loss. In a
    dialogue, turns in the prompt may be in the loss, too: ``earlier`` are their bounds, in order."""

    problem_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    earlier: tuple[tuple[int, int], ...] = ()
    data: str = ""  # the name of the data set, if the stage has several

    def __post_init__(self) -> None:
        name, num = f"demonstration of {self.problem_id}", self.num_prompt_tokens
        _require(num < len(self.token_ids), f"{name} has no trained token")
        _require(num > 0, f"{name} trains its first token, which has no context")
        bounds = [0, *(at for span in self.earlier for at in span), num]
        _require(all(a < b for a, b in pairwise(bounds)), f"{name}: its earlier turns are not in order")

    @property
    def origin(self) -> tuple[Origin, ...]:
        """The origin of every token."""
        found = [Origin.CONTEXT] * self.num_prompt_tokens
        for start, stop in self.earlier:
            found[start:stop] = [Origin.EXPERT] * (stop - start)
        return (*found, *[Origin.EXPERT] * (len(self.token_ids) - self.num_prompt_tokens))


class Origin(enum.IntEnum):
    """The origin of a token. Terms select tokens by their origin, and metrics and ledgers count by origin."""

    CONTEXT = 0  # conditioned on, never trained on
    POLICY = 1  # sampled in this rollout batch
    STORED = 2  # sampled in an earlier rollout batch and stored (replay)
    EXPERT = 3  # part of a demonstration, or of a demonstration's beginning that a sample continues


SAMPLED = (Origin.POLICY, Origin.STORED)  # the origins that have a behavior log-probability
NOT_SAMPLED = -1  # policy_version of a token that no policy has sampled


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """The changes to the policy's distribution before sampling. Behavior log-probabilities include them."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0  # 0: no truncation


class Stop(enum.StrEnum):
    STOP_TOKEN = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Round:
    """A plan's request for ``num_samples`` completions that start the same way."""

    num_samples: int
    prefix: float = 0.0  # share of the demonstration's tokens that the completion begins with; 1: all of it
    prefix_origin: Origin = Origin.EXPERT  # EXPERT: the prefix is trained on, CONTEXT: it is not
    hint: float = 0.0  # share of the solution's text that the prompt shows
    stored: bool = False  # a stored sample joins the group, and nothing is generated

    @property
    def is_plain(self) -> bool:
        """Whether the policy samples every token, from the problem's unchanged prompt."""
        return not (self.prefix or self.hint or self.stored)


PLAIN = Round(num_samples=1)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion. Shapes: ``origin``, ``policy_version`` and ``behavior_logprobs`` have one value per
    completion token. If it failed, ``stop`` is ERROR, ``error`` says why, and there are no tokens."""

    problem_id: str
    sample_index: int
    completion_ids: tuple[int, ...]
    origin: tuple[Origin, ...]
    policy_version: tuple[int, ...]
    behavior_logprobs: tuple[float, ...] | None  # of distribution; 0 for tokens not in SAMPLED; None: unknown
    distribution: Distribution
    stop: Stop
    error: str = ""
    prompt_ids: tuple[int, ...] = ()  # the hinted prompt, also used in training; empty: the problem's prompt
    round: Round = PLAIN

    def __post_init__(self) -> None:
        name, num = f"rollout {self.problem_id}/{self.sample_index}", len(self.completion_ids)
        _require(len(self.origin) == num, f"{name}: {num} tokens, {len(self.origin)} origins")
        _require(len(self.policy_version) == num, f"{name}: expected one policy version per token")
        known = num if self.behavior_logprobs is None else len(self.behavior_logprobs)
        _require(known == num, f"{name}: {num} tokens, {known} log-probabilities")
        _require((self.stop is Stop.ERROR) == bool(self.error), f"{name}: only an error has a reason")

    @property
    def member(self) -> Origin:
        """The rollout's role in its group: the origin of its last token, or POLICY if the sample failed."""
        return self.origin[-1] if self.origin else Origin.POLICY


class Verdict(enum.StrEnum):
    CORRECT = "correct"
    INCORRECT = "incorrect"
    UNSCORED = "unscored"


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a completion. ``verdict`` says whether it is correct (None if no checker was used).
    ``reward`` is what RL maximizes (None: unscored). ``parts`` are the reward's parts by name, and
    ``extracted`` is the answer that was found ("" if there is none). ``reason`` says how the verdict was
    reached; an unscored sample must have a reason. ``unreadable`` marks an answer that is incorrect because it
    could not be read. ``failed`` marks a sample that a reward function could not
    score: the function raised, hung or returned an invalid value."""

    reward: float | None
    verdict: Verdict | None
    parts: Mapping[str, float] = field(default_factory=dict)
    extracted: str = ""
    reason: str = ""
    unreadable: bool = False
    failed: bool = False

    def __post_init__(self) -> None:
        unscored = self.verdict is Verdict.UNSCORED or self.reward is None
        _require(not unscored or bool(self.reason), "an unscored sample needs a reason")
        _require(self.reward is None or math.isfinite(self.reward), "a reward is a finite number or None")

    @property
    def label(self) -> str:
        """The verdict as a word. If no checker was used, the word is "scored" or "unscored"."""
        if self.verdict is not None:
            return self.verdict.value
        return "unscored" if self.reward is None else "scored"

    def solved(self, threshold: float = 1.0) -> bool | None:
        """Return whether the sample solves its problem: by its verdict if a checker was used, otherwise by a
        reward of at least ``threshold``. Return None if the sample is unscored."""
        if self.verdict is not None:
            return {Verdict.CORRECT: True, Verdict.INCORRECT: False, Verdict.UNSCORED: None}[self.verdict]
        return None if self.reward is None else self.reward >= threshold


def judged(verdict: Verdict, *, extracted: str = "", reason: str = "", unreadable: bool = False) -> Score:
    """Return a checker's score, with reward 1 for correct, 0 for incorrect and None (not 0) for unscored."""
    reward = {Verdict.CORRECT: 1.0, Verdict.INCORRECT: 0.0, Verdict.UNSCORED: None}[verdict]
    return Score(reward=reward, verdict=verdict, extracted=extracted, reason=reason, unreadable=unreadable)


@dataclass(frozen=True, kw_only=True)
class RewardInput:
    """The input of a reward function for one sample, which ``seed``, ``step`` and ``sample`` identify."""

    problem: Problem  # ``columns`` are those of the data row
    messages: tuple[Message, ...]  # the prompt that was sampled from
    completion: str
    completion_ids: tuple[int, ...]
    stop: Stop
    seed: int
    step: int
    sample: int
    limit: int  # the length limit in tokens
    verdict: Verdict | None = None  # the checker's verdict, if a checker is among the rewards


@dataclass(frozen=True, kw_only=True)
class Group:
    """All samples of one prompt in one rollout batch, with their scores."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]
    num_discarded_tokens: int = 0  # sampled, then replaced by a later round, so not trained on

    def __post_init__(self) -> None:
        _require(len(self.rollouts) == len(self.scores), "expected one score per rollout")
        same = all(r.problem_id == self.prompt.problem.id for r in self.rollouts)
        _require(same, "a group must have samples of only one prompt")


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One sequence of an optimizer step, before packing. Shapes: ``origin`` is aligned with ``token_ids``;
    ``advantage``, ``behavior_logprobs`` and ``policy_version`` are aligned with the trained tokens, or are
    one number for all of them."""

    token_ids: tuple[int, ...]
    origin: tuple[Origin, ...]  # every token that is not CONTEXT is trained
    num_prefix_tokens: int  # shared with other sequences of the group; may be computed once for all of these
    group: int
    advantage: tuple[float, ...] | float = 0.0
    behavior_logprobs: tuple[float, ...] | None = None
    policy_version: tuple[int, ...] | int = NOT_SAMPLED
    weight: float = 1.0  # the gate's weight of this sequence in the loss
    solved: bool = False
    reward: float = 0.0
    data: str = ""  # the name of the data set, if the stage has several

    def __post_init__(self) -> None:
        _require(len(self.token_ids) == len(self.origin), "token_ids and origin differ in length")
        has_rest = 0 <= self.num_prefix_tokens < len(self.token_ids)
        _require(has_rest, "the shared prefix leaves nothing to train")
        prefix = self.origin[: max(1, self.num_prefix_tokens)]
        _require(all(o is Origin.CONTEXT for o in prefix), "a shared prefix is context, not trained")
        for name in ("advantage", "behavior_logprobs", "policy_version"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                _require(len(value) == self.num_trained, f"expected one {name} per trained token")

    @property
    def num_trained(self) -> int:
        return len(self.origin) - self.origin.count(Origin.CONTEXT)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Adjacent tokens of a packed micro-batch, which attend causally to each other and to all tokens of
    ``prefix_start:prefix_stop`` (empty if there is no shared prefix). All bounds are flat indices."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


# The fields of a TokenBatch with one value per trained token: first those always set, then the optional ones.
TARGET_FIELDS = (
    "target_ids", "source_index", "sequence_index", "sequence_length", "origin", "policy_version",
    "advantage", "weight", "solved",
)  # fmt: skip
OPTIONAL_FIELDS = ("behavior_logprobs", "proximal_logprobs", "proximal_entropy", "reference_logprobs")


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One packed micro-batch without padding: N tokens in the forward pass, and M target (trained) tokens.

    ``source_index`` gives for each target the token whose hidden state predicts it. For example, the last
    token of a shared prompt predicts the first of every completion. ``sequence_index`` numbers the sequences
    of the whole step on this rank. The optional columns are None until a scoring pass fills them.
    ``behavior_logprobs`` is None if no token of the batch was sampled, and 0 at tokens that were not sampled
    (see ``origin``)."""

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
    proximal_entropy: Tensor | None = None  # M float, filled together with proximal_logprobs
    reference_logprobs: Tensor | None = None  # M float, of the frozen reference policy
    num_passes: int = 0  # of a sharded model that cannot be packed: the most segments that a rank has

    def __post_init__(self) -> None:
        for name in (*TARGET_FIELDS, *OPTIONAL_FIELDS):
            column = getattr(self, name)
            absent = column is None and name in OPTIONAL_FIELDS
            aligned = absent or tuple(column.shape) == (self.num_targets,)
            _require(aligned, f"{name} is not aligned with target_ids")
        equal = self.input_ids.shape == self.position_ids.shape
        _require(equal, "input_ids and position_ids differ in length")
        covered = sum(s.stop - s.start for s in self.segments)
        _require(bool(self.segments) and covered == self.num_tokens, "segments do not cover the tokens")

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_targets(self) -> int:
        return int(self.target_ids.shape[0])


@dataclass(frozen=True, kw_only=True)
class BatchTotals:
    """The denominators of one optimizer step: each term's total over ALL micro-batches and ALL ranks, counted
    before the first forward pass. No field has a default, so that no loss can skip the counting."""

    terms: Mapping[str, float]  # by name; a term whose total is 0 is absent from the step on every rank
    num_tokens: int
    num_sequences: int

    def of(self, term: str) -> float:
        if term not in self.terms:
            raise RecordError(f"no total was counted for term {term!r}; counted: {sorted(self.terms)}")
        return self.terms[term]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A report of what one optimizer step did."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    metrics: Mapping[str, float]


def conserve(scores: Sequence[Score]) -> dict[str, int]:
    """Count the correct, incorrect and unscored samples, and check that the counts add up to all scores."""
    counts = {v.value: sum(s.verdict is v for s in scores) for v in Verdict}
    _require(sum(counts.values()) == len(scores), "scores were lost")
    return {"n": len(scores), **counts}
