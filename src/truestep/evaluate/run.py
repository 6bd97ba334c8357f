"""Evaluate a model on a set of problems: sampled once, graded once, written as it comes, resumable per sample."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from truestep.evaluate.estimate import Estimate, estimate
from truestep.records import Problem, Prompt, RecordError, Rollout, Score, Stop, Verdict
from truestep.rollout.engine import Engine, SampleRequest, SamplingParameters
from truestep.rundir import append_jsonl, read_jsonl, write_atomic, write_json
from truestep.seeding import Purpose
from truestep.settings import SettingsError

SCHEMA_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

Key = tuple[str, int]  # problem id, sample index
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is evaluated and where it is written. ``identity`` is a hash of all that a sample depends on (model, data,
    chat, sampling, seed): samples of another identity are never mixed with these."""

    name: str  # the data set's
    prompts: Sequence[Prompt]
    sampling: SamplingParameters
    samples_per_problem: int
    seed: int
    folder: Path
    identity: str
    pass_at: Sequence[int] = (1,)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise SettingsError(f"data.{self.name}: it names a file: write letters, digits, '.', '_' and '-' only")
        ids = Counter(prompt.problem.id for prompt in self.prompts)
        if not ids:
            raise SettingsError(f"{self.name}: no problems: expected at least one, write a data set with limit >= 1")
        problem_id, times = ids.most_common(1)[0]
        if times > 1:
            rows = [p.problem.row or "?" for p in self.prompts if p.problem.id == problem_id]
            raise SettingsError(
                f"{rows[1]}: id: {problem_id!r} is also the id of {rows[0]}: expected an id of its own for each problem"
            )
        bad = [k for k in self.pass_at if not 1 <= k <= self.samples_per_problem]
        if bad:
            raise SettingsError(
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
    grade: Callable[[Problem, str], Score],
    decode: Callable[[Sequence[int]], str],
    progress: Callable[[int, int, Mapping[str, int]], None] = _no_progress,
    check_stop: Callable[[], None] = _never_stop,
) -> dict[str, Any]:
    """Sample, grade and record what is not yet recorded; write and return the results.

    ``progress`` gets the samples done, all of them, and the counts by verdict so far. ``check_stop`` may raise between
    decoding steps; the samples finished by then are not repeated by the next call. A sample that the engine could not
    make is unscored.

    Raises RecordError where the engine answers what it was not asked, twice, or not at all.
    """
    problems = {prompt.problem.id: prompt.problem for prompt in plan.prompts}
    rows = _resume(plan)
    total, counts = len(plan.sample_keys()), Counter(row["verdict"] for row in rows.values())
    progress(len(rows), total, _running(counts))
    open_keys = {key for key in plan.sample_keys() if key not in rows}
    requests = _requests(plan, open_keys)
    for rollout in engine.generate(requests, plan.sampling, check_stop) if requests else ():
        key = (rollout.problem_id, rollout.sample_index)
        if key not in open_keys:
            raise RecordError(f"the engine answered {key[0]}/{key[1]}, which is not open")
        open_keys.remove(key)
        rows[key] = _row(problems[key[0]], rollout, grade, decode)
        append_jsonl(plan.samples_path, [rows[key]])
        counts[rows[key]["verdict"]] += 1
        progress(len(rows), total, _running(counts))
    if open_keys:
        raise RecordError(f"the engine left {len(open_keys)} of {len(requests)} samples unanswered")
    ordered = [rows[key] for key in plan.sample_keys()]
    _write_samples(plan, ordered)  # in the order asked for, so that a resumed run leaves the same bytes
    results = _results(plan, estimate(ordered, plan.pass_at))
    write_json(plan.results_path, results)
    return results


def _running(counts: Mapping[str, int]) -> dict[str, int]:
    return {verdict.value: counts.get(verdict.value, 0) for verdict in Verdict}


def _requests(plan: EvaluationPlan, open_keys: set[Key]) -> list[SampleRequest]:
    return [
        SampleRequest(
            problem_id=prompt.problem.id,
            sample_index=index,
            prompt_ids=prompt.token_ids,
            seed=plan.seed,
            purpose=Purpose.EVALUATE,
            step=0,  # the same draws for every checkpoint: comparisons are paired
        )
        for prompt in plan.prompts
        for index in range(plan.samples_per_problem)
        if (prompt.problem.id, index) in open_keys
    ]


def _row(
    problem: Problem, rollout: Rollout, grade: Callable[[Problem, str], Score], decode: Callable[[Sequence[int]], str]
) -> Row:
    failed = rollout.stop is Stop.ERROR
    text = "" if failed else decode(rollout.completion_ids)
    score = Score(verdict=Verdict.UNSCORED, reason=f"engine: {rollout.error}") if failed else grade(problem, text)
    return {
        "problem_id": rollout.problem_id,
        "sample_index": rollout.sample_index,
        "prompt": problem.messages[-1].content,
        "completion": text,
        "extracted": score.extracted,
        "gold": problem.answer,
        "verdict": score.verdict.value,
        "reason": score.reason,
        "stop": rollout.stop.value,
        "num_tokens": len(rollout.completion_ids),
    }


def _header(plan: EvaluationPlan) -> Row:
    return {"header": True, "schema_version": SCHEMA_VERSION, "name": plan.name, "identity": plan.identity}


def _resume(plan: EvaluationPlan) -> dict[Key, Row]:
    """The samples already recorded under the same identity; the file is left whole, ready to be appended to."""
    first, *rows = read_jsonl(plan.samples_path) or [{}]
    wanted = set(plan.sample_keys()) if first == _header(plan) else set()
    done = {key: row for row in rows if (key := (row["problem_id"], row["sample_index"])) in wanted}
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
        "sampling": {**asdict(plan.sampling), "stop_token_ids": list(plan.sampling.stop_token_ids)},
        "seed": plan.seed,
        "identity": plan.identity,
    }
