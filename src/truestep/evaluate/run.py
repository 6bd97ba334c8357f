"""Evaluates a model on a set of problems. Every sample is recorded, so that an evaluation can be resumed.

All evaluations of truestep (dev scores, a run's checkpoints, ``truestep eval``) call ``run_evaluation``."""

from __future__ import annotations

import glob
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from truestep.errors import UserError
from truestep.evaluate.estimate import Estimate, estimate, mean_rewards
from truestep.evaluate.files import (
    SCHEMA_VERSION,
    Row,
    header_of,
    opened,
    read_results,
    results_file,
    samples_file,
    samples_in,
    sealed,
)  # fmt: skip
from truestep.evaluate.interval import mean_interval
from truestep.grade.policy import Judgment
from truestep.progress import Reporter
from truestep.records import Message, Problem, Prompt, RecordError, RewardInput, Stop, Verdict
from truestep.rewards.record import Answer as Scored
from truestep.rollout.engine import Engine, SampleRequest, SamplingParameters
from truestep.rollout.engine_endpoint import TextSample
from truestep.rundir import append_jsonl, jsonl, jsonl_lines, write_atomic, write_json
from truestep.seeding import Purpose

REFRESH_SECONDS = 1.0  # interval at which the running score is computed again
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

Key = tuple[str, int]  # problem id, sample index
Judge = Callable[[Problem, str], Judgment]
Answer = Callable[[Sequence[Key]], Iterator[TextSample]]
Reward = Callable[[Sequence[RewardInput]], Sequence[Mapping[str, Scored]]]
HIDDEN = "(not shown, because the benchmark is private)"


@dataclass(frozen=True, kw_only=True)
class TextPrompt:
    """A problem as turns, or as text to continue."""

    problem: Problem
    messages: tuple[Message, ...] = ()
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is evaluated, and where it is written. ``identity`` is a hash of everything that a sample depends
    on (model, data, chat, sampling, seed). Samples with different identities are never mixed."""

    name: str  # the data set's name
    prompts: Sequence[Prompt] | Sequence[TextPrompt]
    sampling: SamplingParameters
    samples_per_problem: int
    seed: int
    folder: Path
    identity: str
    pass_at: Sequence[int] = (1,)
    private: bool = False  # if True, only ids, verdicts and counts are written, and no text
    opening: str = ""  # the part of the model's own text that is in the prompt; graded with every completion
    facts: Mapping[str, Any] = field(default_factory=dict)  # further entries of the results file
    reward: Reward | None = None  # scores every sample with each scorer, next to its verdict

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"data.{self.name}: the name is used as a file name; use only letters, digits, . _ -"
            )
        ids = Counter(prompt.problem.id for prompt in self.prompts)
        if not ids:
            raise UserError(f"{self.name} has no problems; set limit >= 1")
        problem_id, times = ids.most_common(1)[0]
        if times > 1:
            rows = [p.problem.row or "?" for p in self.prompts if p.problem.id == problem_id]
            raise UserError(f"{rows[1]}: id: {problem_id!r} is also the id of {rows[0]}; ids must be unique")
        num = self.samples_per_problem
        if bad := [k for k in self.pass_at if not 1 <= k <= num]:
            raise UserError(f"pass_at = {bad[0]} needs samples_per_problem >= {bad[0]}, got {num}")

    @property
    def samples_path(self) -> Path:
        return samples_file(self.folder, self.name)

    def rank_path(self, rank: int) -> Path:
        """Return the file to which a rank appends its samples until they are put in one file."""
        ending = f".rank{rank:05d}.unfinished.jsonl" if rank else ".samples.jsonl"
        return self.folder / f"{self.name}{ending}"

    @property
    def results_path(self) -> Path:
        return results_file(self.folder, self.name)

    def sample_keys(self) -> list[Key]:
        """Return the key of every requested sample, in the order of the finished file."""
        return [(p.problem.id, index) for p in self.prompts for index in range(self.samples_per_problem)]


def run_evaluation(
    plan: EvaluationPlan, *, answer: Answer, judge: Judge, reporter: Reporter | None = None, title: str = ""
) -> dict[str, Any]:
    """Make, grade and record the missing samples, then write and return the results. ``answer`` yields one
    sample for each requested key, in any order. It is not called if all samples exist. After an exception
    between two samples, the finished samples are kept, and the next call does not repeat them. A sample that
    could not be made is unscored, and the next call requests it again. Raises RecordError if an answer was
    not requested, is repeated, or is missing.

    Several ranks call the three parts: rank 0 ``missing``, every rank ``record`` for its share of the keys,
    and rank 0 ``conclude``."""
    record(plan, missing(plan), answer=answer, judge=judge, reporter=reporter, title=title)
    return conclude(plan)


def missing(plan: EvaluationPlan) -> list[Key]:
    """Return the keys of the samples to make. The intact ones, of any number of ranks, are put in one file."""
    done = _resume(plan)
    return [key for key in plan.sample_keys() if key not in done]


def record(
    plan: EvaluationPlan,
    asked: Sequence[Key],
    *,
    answer: Answer,
    judge: Judge,
    rank: int = 0,
    reporter: Reporter | None = None,
    title: str = "",
) -> None:
    """Make, grade and record the samples with these keys, each as soon as it is made, in the rank's file."""
    problems = {prompt.problem.id: prompt.problem for prompt in plan.prompts}
    path, rows = plan.rank_path(rank), {} if rank else _kept(plan)
    if rank and asked:
        append_jsonl(path, [header_of(plan.name, plan.identity)])
    num_all = len(rows) + len(asked)
    running = RunningScore(rows.values())
    if reporter:
        reporter.begin(title or plan.name, num_all, len(rows))
    open_keys = set(asked)
    for sample in answer(asked) if asked else ():
        key = (sample.problem_id, sample.sample_index)
        if key not in open_keys:
            raise RecordError(f"the engine answered {key[0]}/{key[1]} without a request, or twice")
        open_keys.remove(key)
        rows[key] = _row(plan, problems[key[0]], sample, judge)
        append_jsonl(path, [sealed(rows[key], plan.identity)])
        running.add(rows[key])
        if reporter:
            reporter.advance(len(rows), running.text(last=len(rows) == num_all))
    if open_keys:
        raise RecordError(f"the engine left {len(open_keys)} of {len(asked)} samples unanswered")


def conclude(plan: EvaluationPlan) -> dict[str, Any]:
    """Write all samples to one file, in the requested order, and return the results, which are written too.
    The bytes do not depend on interruptions or on the number of ranks."""
    rows, keys = _kept(plan), plan.sample_keys()
    if lost := [key for key in keys if key not in rows]:
        raise RecordError(
            f"{plan.samples_path}: {len(lost)} of {len(keys)} samples are not in the ranks' files"
        )
    ordered = [rows[key] for key in keys]
    _write_all(plan, ordered)
    rewards = {} if plan.reward is None else {"rewards": mean_rewards(ordered)}
    return write_json(plan.results_path, {**_results(plan, estimate(ordered, plan.pass_at)), **rewards})


class RunningScore:
    """The score so far with its interval, computed at most once per second and after the last sample."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._problems: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # correct, samples
        self._text, self._computed_at = "", 0.0
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        counts = self._problems[row["problem_id"]]
        counts[0] += row["verdict"] == Verdict.CORRECT
        counts[1] += 1

    def text(self, *, last: bool) -> str:
        now = time.monotonic()
        if last or now - self._computed_at >= REFRESH_SECONDS:
            self._computed_at = now
            correct, samples = np.array(list(self._problems.values()), dtype=float).T
            found = mean_interval(correct / samples, num_trials=float(samples.sum()))
            self._text = f"score {100 * found.value:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"
        return self._text


def engine_answers(
    plan: EvaluationPlan,
    open_engine: Callable[[], Engine],
    decode: Callable[[Sequence[int]], str],
    check_stop: Callable[[], None] = lambda: None,
) -> Answer:
    """Return a function that yields an engine's samples and opens the engine for the first sample."""

    def answer(keys: Sequence[Key]) -> Iterator[TextSample]:
        prompts: dict[str, Any] = {prompt.problem.id: prompt for prompt in plan.prompts}
        requests = [request_of(plan, key, prompts[key[0]].token_ids) for key in keys]
        for rollout in open_engine().generate(requests, plan.sampling, check_stop):
            yield TextSample(
                problem_id=rollout.problem_id, sample_index=rollout.sample_index,
                text="" if rollout.stop is Stop.ERROR else decode(rollout.completion_ids), stop=rollout.stop,
                num_tokens=len(rollout.completion_ids), error=rollout.error, token_ids=rollout.completion_ids,
            )  # fmt: skip

    return answer


def request_of(plan: EvaluationPlan, key: Key, prompt_ids: tuple[int, ...] = ()) -> SampleRequest:
    """Return the request for a sample. The step is always the same, so that all checkpoints have the same
    random draws and can be compared in pairs."""
    named: dict[str, Any] = {"problem_id": key[0], "sample_index": key[1], "prompt_ids": prompt_ids}
    return SampleRequest(seed=plan.seed, purpose=Purpose.EVALUATE, step=0, **named)


def _row(plan: EvaluationPlan, problem: Problem, sample: TextSample, judge: Judge) -> Row:
    row: Row = {"problem_id": sample.problem_id, "sample_index": sample.sample_index}
    judged = None if sample.stop is Stop.ERROR else judge(problem, plan.opening + sample.text)
    extracted = judged.score.extracted if judged else ""
    if plan.private:
        row["extracted"] = bool(extracted)
    else:
        row |= {
            "prompt": problem.question, "completion": sample.text, "extracted": extracted,
            "gold": problem.answer, "reason": judged.reason if judged else f"engine: {sample.error}",
        }  # fmt: skip
    if plan.reward is not None:
        row |= _rewarded(plan, plan.reward, problem, sample) if judged else {"rewards": {}}
    if judged:
        row |= {"verdict": judged.score.label, "strict": judged.strict.value, "lenient": judged.lenient.value,
                "unreadable": judged.score.unreadable}  # fmt: skip
    else:
        row |= {
            "unreadable": False,
            **dict.fromkeys(("verdict", "strict", "lenient"), Verdict.UNSCORED.value),
        }
    return row | {"stop": sample.stop.value, "num_tokens": sample.num_tokens}


def _rewarded(plan: EvaluationPlan, reward: Reward, problem: Problem, sample: TextSample) -> Row:
    """Return the values of the scorers, and why the others have none (an exception can quote the sample)."""
    given = RewardInput(
        problem=problem, messages=problem.messages, completion=plan.opening + sample.text,
        completion_ids=sample.token_ids, stop=sample.stop, seed=plan.seed, step=0, sample=sample.sample_index,
        limit=plan.sampling.max_new_tokens,
    )  # fmt: skip
    scored = reward([given])[0]
    lost = {k: HIDDEN if plan.private else a.reason for k, a in scored.items() if a.value is None}
    values = {key: value for name, a in scored.items() for key, value in a.named(name).items()}
    return {"rewards": values} | ({"unrewarded": lost} if lost else {})


def check_kept(plan: EvaluationPlan) -> None:
    """Raise UserError if resuming would lose samples that were made with different settings or are no
    longer requested."""
    path = plan.samples_path
    rows = _kept(plan)
    if not rows and (num := sum(row is not None for _, row in samples_in(path))):
        made = f"its {num} samples were made with a different model, data, settings or version of truestep"
        raise UserError(f"{path}: {made}; pass --out with a different path")
    wanted = set(plan.sample_keys())
    if extra := [key for key in rows if key not in wanted]:
        more = f"has {len(rows)} samples, {len(extra)} more than requested, and a run can only grow"
        raise UserError(f"{path} {more}; pass a larger --limit or --samples, or a different --out")


def _kept(plan: EvaluationPlan) -> dict[Key, Row]:
    """Return the intact samples with the same identity, also those of ranks that were interrupted."""
    rows = [row for path in (plan.samples_path, *_of_ranks(plan)) for row in _intact(plan, path)]
    return {(row["problem_id"], row["sample_index"]): row for row in rows}


def _of_ranks(plan: EvaluationPlan) -> list[Path]:
    number = "[0-9]" * 5
    return sorted(plan.folder.glob(f"{glob.escape(plan.name)}.rank{number}.unfinished.jsonl"))


def _intact(plan: EvaluationPlan, path: Path) -> Iterator[Row]:
    """Yield a file's intact samples. The checksum shows whose they are, whatever the header says."""
    header, *read = [row or {} for _, row in jsonl_lines(path)] or [{}]
    has_header = header == header_of(plan.name, plan.identity)
    rows = (opened(row, plan.identity) for row in read if has_header or "checksum" in row)
    return (row for row in rows if row)


def _write_all(plan: EvaluationPlan, rows: Iterable[Row]) -> None:
    """Put all samples in one file, and remove the files of single ranks."""
    write_samples(plan.samples_path, plan.name, plan.identity, rows)
    for path in _of_ranks(plan):
        path.unlink()


def _resume(plan: EvaluationPlan) -> dict[Key, Row]:
    """Return the samples already made with the same identity. Samples that the engine failed to make or whose
    line is damaged are left out, so that they are requested again. The file is left ready for appending."""
    wanted = set(plan.sample_keys())
    done = {key: row for key, row in _kept(plan).items() if key in wanted and row["stop"] != Stop.ERROR}
    if plan.results_path.is_file() and not _is_of(plan):
        plan.results_path.unlink()  # first, because results must never be next to samples of another model
    _write_all(plan, done.values())
    return done


def _is_of(plan: EvaluationPlan) -> bool:
    """Return whether the results file was written for this plan's samples."""
    try:
        return bool(read_results(plan.results_path).get("identity") == plan.identity)
    except UserError:  # damaged: it is written again
        return False


def write_samples(path: Path, name: str, identity: str, rows: Iterable[Row]) -> None:
    """Write a samples file: its header, then one row per sample."""
    write_atomic(path, jsonl([header_of(name, identity), *(sealed(row, identity) for row in rows)]))


def _results(plan: EvaluationPlan, found: Estimate) -> dict[str, Any]:
    """Return the results file's content; ``results`` and ``n-samples`` are keyed by task, as in lm-eval."""
    score, sampling = found.to_json(), asdict(plan.sampling)
    sampling |= {key: list(sampling[key]) for key in ("stop_token_ids", "stop_sequences")}
    return {
        "schema_version": SCHEMA_VERSION, **task_results(plan.name, score), "estimate": score,
        "samples_per_problem": plan.samples_per_problem, "sampling": sampling, "seed": plan.seed,
        "identity": plan.identity, "private": plan.private, **plan.facts,
    }  # fmt: skip


def task_results(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return an estimate with the keys of lm-evaluation-harness."""
    error = "N/A" if found["stderr"] is None else found["stderr"]
    task: Row = {"alias": name, "exact_match,none": found["score"], "exact_match_stderr,none": error}
    task |= {f"pass@{k},none": interval["value"] for k, interval in found["pass_at"].items()}
    num = dict.fromkeys(("original", "effective"), found["num_problems"])
    return {"results": {name: task}, "n-samples": {name: num}}
