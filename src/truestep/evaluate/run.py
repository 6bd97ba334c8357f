"""Evaluate a model on a set of problems: sampled once, graded once, written as it comes, resumable per
sample."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from truestep.errors import UserError
from truestep.evaluate.estimate import Estimate, estimate
from truestep.records import Problem, Prompt, RecordError, Rollout, Score, Stop, Verdict, judged
from truestep.rollout.engine import Engine, SampleRequest, SamplingParameters
from truestep.rollout.engine_endpoint import TextSample
from truestep.rundir import append_jsonl, read_jsonl, write_atomic, write_json
from truestep.seeding import Purpose

SCHEMA_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

Key = tuple[str, int]  # problem id, sample index
Row = dict[str, Any]
Grade = Callable[[Problem, str], Score]


class Asked(Protocol):
    """A prompt of any kind: tokens for an engine of ours, turns for an endpoint."""

    @property
    def problem(self) -> Problem: ...


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is evaluated and where it is written. ``identity`` is a hash of all that a sample depends on
    (model, data, chat, sampling, seed): samples of another identity are never mixed with these."""

    name: str  # the data set's
    prompts: Sequence[Asked]
    sampling: SamplingParameters
    samples_per_problem: int
    seed: int
    folder: Path
    identity: str
    pass_at: Sequence[int] = (1,)
    private: bool = False  # write ids, verdicts and counts, and no text
    opening: str = ""  # what the prompt has begun of the model's own text; read with every completion
    facts: Mapping[str, Any] = field(default_factory=dict)  # what the results file says besides

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"data.{self.name}: it names a file: write letters, digits, '.', '_' and '-' only"
            )
        ids = Counter(prompt.problem.id for prompt in self.prompts)
        if not ids:
            raise UserError(
                f"{self.name}: no problems: expected at least one, write a data set with limit >= 1"
            )
        problem_id, times = ids.most_common(1)[0]
        if times > 1:
            rows = [p.problem.row or "?" for p in self.prompts if p.problem.id == problem_id]
            raise UserError(
                f"{rows[1]}: id: {problem_id!r} is also the id of {rows[0]}: expected an id of its own for each problem"
            )
        bad = [k for k in self.pass_at if not 1 <= k <= self.samples_per_problem]
        if bad:
            raise UserError(
                f"pass_at = {bad[0]} needs samples_per_problem >= {bad[0]}, got {self.samples_per_problem}"
            )

    @property
    def samples_path(self) -> Path:
        return self.folder / f"{self.name}.samples.jsonl"

    @property
    def results_path(self) -> Path:
        return self.folder / f"{self.name}.results.json"

    def sample_keys(self) -> list[Key]:
        """Every sample that is asked for, in the order of the finished file."""
        return [(p.problem.id, index) for p in self.prompts for index in range(self.samples_per_problem)]


def _no_progress(done: int, total: int, running: Mapping[str, int]) -> None:
    del done, total, running


def _never_stop() -> None:
    pass


def run_evaluation(
    plan: EvaluationPlan,
    *,
    engine: Engine,
    grade: Grade,
    decode: Callable[[Sequence[int]], str],
    progress: Callable[[int, int, Mapping[str, int]], None] = _no_progress,
    check_stop: Callable[[], None] = _never_stop,
) -> dict[str, Any]:
    """``run_samples`` with an engine of tokens; the plan's prompts have them."""
    return run_samples(
        plan,
        answer=lambda keys: token_samples(plan, keys, engine=engine, decode=decode, check_stop=check_stop),
        grade=grade,
        progress=progress,
    )


def run_samples(
    plan: EvaluationPlan,
    *,
    answer: Callable[[Sequence[Key]], Iterator[TextSample]],
    grade: Grade,
    grade_strictly: Grade | None = None,
    progress: Callable[[int, int, Mapping[str, int]], None] = _no_progress,
    on_row: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Sample, grade and record what is not yet recorded; write and return the results.

    ``answer`` yields one sample of each key that it is asked for, in any order. ``progress`` gets the samples
    done, all of them, and the counts by verdict so far; ``on_row`` every sample, those recorded earlier
    included. What raises between two samples leaves the finished ones, which the next call does not repeat. A
    sample that could not be made is unscored, and is asked for again by the next call.

    Raises RecordError where the answers are not those asked for, or one comes twice, or not at all.
    """
    problems = {prompt.problem.id: prompt.problem for prompt in plan.prompts}
    rows = _resume(plan)
    total, counts = len(plan.sample_keys()), Counter(row["verdict"] for row in rows.values())
    for row in rows.values():
        on_row(row)
    progress(len(rows), total, _running(counts))
    asked = [key for key in plan.sample_keys() if key not in rows]
    open_keys = set(asked)
    for sample in answer(asked) if asked else ():
        key = (sample.problem_id, sample.sample_index)
        if key not in open_keys:
            raise RecordError(f"the engine answered {key[0]}/{key[1]}, which is not open")
        open_keys.remove(key)
        rows[key] = _row(plan, problems[key[0]], sample, grade, grade_strictly)
        append_jsonl(plan.samples_path, [rows[key]])
        on_row(rows[key])
        counts[rows[key]["verdict"]] += 1
        progress(len(rows), total, _running(counts))
    if open_keys:
        raise RecordError(f"the engine left {len(open_keys)} of {len(asked)} samples unanswered")
    ordered = [rows[key] for key in plan.sample_keys()]
    _write_samples(plan, ordered)  # in the order asked for, so that a resumed run leaves the same bytes
    results = _results(plan, estimate(ordered, plan.pass_at))
    write_json(plan.results_path, results)
    return results


def token_samples(
    plan: EvaluationPlan,
    keys: Sequence[Key],
    *,
    engine: Engine,
    decode: Callable[[Sequence[int]], str],
    check_stop: Callable[[], None],
) -> Iterator[TextSample]:
    """What an engine of tokens makes of the plan's prompts, as text."""
    prompts: dict[str, Any] = {prompt.problem.id: prompt for prompt in plan.prompts}
    requests = [_request(plan, prompts[problem_id], index) for problem_id, index in keys]
    for rollout in engine.generate(requests, plan.sampling, check_stop):
        yield _text_of(rollout, decode)


def _text_of(rollout: Rollout, decode: Callable[[Sequence[int]], str]) -> TextSample:
    return TextSample(
        problem_id=rollout.problem_id,
        sample_index=rollout.sample_index,
        text="" if rollout.stop is Stop.ERROR else decode(rollout.completion_ids),
        stop=rollout.stop,
        num_tokens=len(rollout.completion_ids),
        error=rollout.error,
        token_ids=rollout.completion_ids,
    )


def _running(counts: Mapping[str, int]) -> dict[str, int]:
    return {verdict.value: counts.get(verdict.value, 0) for verdict in Verdict}


def _request(plan: EvaluationPlan, prompt: Prompt, index: int) -> SampleRequest:
    return SampleRequest(
        problem_id=prompt.problem.id,
        sample_index=index,
        prompt_ids=prompt.token_ids,
        seed=plan.seed,
        purpose=Purpose.EVALUATE,
        step=0,  # the same draws for every checkpoint: comparisons are paired
    )


def _row(
    plan: EvaluationPlan, problem: Problem, sample: TextSample, grade: Grade, strictly: Grade | None
) -> Row:
    failed = sample.stop is Stop.ERROR
    text = plan.opening + sample.text
    unscored = judged(Verdict.UNSCORED, reason=f"engine: {sample.error}")
    score = unscored if failed else grade(problem, text)
    row: Row = {"problem_id": sample.problem_id, "sample_index": sample.sample_index}
    if not plan.private:
        row |= {
            "prompt": problem.messages[-1].content,
            "completion": sample.text,
            "extracted": score.extracted,
            "gold": problem.answer,
        }
    row["verdict"] = score.label
    if strictly is not None:
        row["strict"] = (unscored if failed else strictly(problem, text)).label
    if plan.private:
        return row | {
            "extracted": bool(score.extracted),
            "stop": sample.stop.value,
            "num_tokens": sample.num_tokens,
        }
    return row | {"reason": score.reason, "stop": sample.stop.value, "num_tokens": sample.num_tokens}


def _header(plan: EvaluationPlan) -> Row:
    return {"header": True, "schema_version": SCHEMA_VERSION, "name": plan.name, "identity": plan.identity}


def check_kept(plan: EvaluationPlan) -> None:
    """Raises UserError where going on would lose samples: made with other settings, or more than are
    asked for."""
    first, *rows = read_jsonl(plan.samples_path) or [_header(plan)]
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{plan.samples_path}: holds a line that is no sample: write --out for another place")
    if rows and first != _header(plan):
        raise UserError(
            f"{plan.samples_path}: its {len(rows)} samples were made with another model, other data or other settings: "
            "write --out for another place"
        )
    wanted = set(plan.sample_keys())
    if extra := [row for row in rows if (row.get("problem_id"), row.get("sample_index")) not in wanted]:
        raise UserError(
            f"{plan.samples_path}: holds {len(rows)} samples, {len(extra)} more than are asked for: a run can grow and "
            "not shrink, write the greater --limit and --samples, or --out for another place"
        )


def _resume(plan: EvaluationPlan) -> dict[Key, Row]:
    """The samples already made under the same identity; the file is left whole, ready to be appended to."""
    first, *rows = read_jsonl(plan.samples_path) or [{}]
    wanted = set(plan.sample_keys()) if first == _header(plan) else set()
    done = {
        key: row
        for row in rows
        if (key := (row["problem_id"], row["sample_index"])) in wanted and row["stop"] != Stop.ERROR
    }
    _write_samples(plan, done.values())
    return done


def _write_samples(plan: EvaluationPlan, rows: Iterable[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in (_header(plan), *rows)]
    write_atomic(plan.samples_path, "".join(lines))


def _results(plan: EvaluationPlan, found: Estimate) -> dict[str, Any]:
    """The results file; ``results`` and ``n-samples`` are keyed by task as lm-evaluation-harness has them."""
    task: Row = {
        "alias": plan.name,
        "exact_match,none": found.score,
        "exact_match_stderr,none": "N/A" if found.stderr is None else found.stderr,
    }
    task |= {f"pass@{k},none": interval.value for k, interval in found.pass_at.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "results": {plan.name: task},
        "n-samples": {plan.name: {"original": found.num_problems, "effective": found.num_problems}},
        "estimate": found.to_json(),
        "samples_per_problem": plan.samples_per_problem,
        "sampling": {
            **asdict(plan.sampling),
            "stop_token_ids": list(plan.sampling.stop_token_ids),
            "stop_sequences": [list(ids) for ids in plan.sampling.stop_sequences],
        },
        "seed": plan.seed,
        "identity": plan.identity,
        **plan.facts,
    }
