"""The evaluation runner: nothing lost, nothing asked twice, the same bytes after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from truestep.errors import UserError
from truestep.evaluate.files import read_samples
from truestep.evaluate.run import EvaluationPlan, engine_answers, run_evaluation
from truestep.flops import Ledger
from truestep.grade.extract import NOTHING
from truestep.grade.policy import Judgment
from truestep.records import Message, Origin, Problem, Prompt, RecordError, Rollout, Stop, Verdict, judged
from truestep.rollout.engine import SampleRequest, SamplingParameters

SAMPLING = SamplingParameters(temperature=0.6, max_new_tokens=4, stop_token_ids=(0,))


class FakeEngine:
    """Answers in reverse order with tokens drawn from the request's own generator; notes what it was
    asked."""

    policy_version = 0

    def __init__(self, broken: frozenset[str] = frozenset()) -> None:
        self.asked: list[tuple[str, int]] = []
        self.broken = broken

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: SamplingParameters,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[Rollout]:
        for request in reversed(requests):
            check_stop()
            self.asked.append((request.problem_id, request.sample_index))
            broken = request.problem_id in self.broken
            ids = (
                () if broken else tuple((request.uniforms(sampling.max_new_tokens) * 3).astype(int).tolist())
            )
            yield Rollout(
                problem_id=request.problem_id,
                sample_index=request.sample_index,
                completion_ids=ids,
                origin=(Origin.POLICY,) * len(ids),
                policy_version=(0,) * len(ids),
                behavior_logprobs=None,
                distribution=sampling.distribution,
                stop=Stop.ERROR if broken else Stop.LENGTH if 0 not in ids else Stop.STOP_TOKEN,
                error="out of memory" if broken else "",
            )

    def publish(self, weights: Mapping[str, object], version: int) -> None:
        raise AssertionError("an evaluation publishes nothing")

    def score(self, token_ids: Sequence[int], num_prompt_tokens: int, temperature: float) -> list[float]:
        raise AssertionError("an evaluation scores nothing")

    def take_cost(self) -> Ledger:
        return Ledger()


def decode(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def judge(problem: Problem, text: str) -> Judgment:
    last = text.split()[-1]
    verdict = Verdict.CORRECT if last == problem.answer else Verdict.INCORRECT
    score = judged(verdict, extracted=last)
    return Judgment(score=score, strict=verdict, lenient=verdict, answer=NOTHING, reason="")


def prompt_of(name: str, row: str = "") -> Prompt:
    problem = Problem(
        id=name, messages=(Message(role="user", content=f"what is {name}?"),), answer="1", row=row
    )
    return Prompt(problem=problem, token_ids=(1, 2, 3))


def plan_in(folder: Path, identity: str = "abc", num_problems: int = 6) -> EvaluationPlan:
    return EvaluationPlan(
        name="test",
        prompts=[prompt_of(f"p{i}") for i in range(num_problems)],
        sampling=SAMPLING,
        samples_per_problem=3,
        pass_at=(1, 3),
        seed=7,
        folder=folder,
        identity=identity,
    )


def rows_in(plan: EvaluationPlan) -> list[dict]:
    return [json.loads(line) for line in plan.samples_path.read_text().splitlines()]


class Progress:
    def __init__(self) -> None:
        self.begun: list[tuple[str, int, int]] = []
        self.done: list[int] = []

    def say(self, text: str) -> None:
        raise AssertionError(text)

    def begin(self, what: str, total: int, done: int = 0, head: str = "") -> None:
        self.begun.append((what, total, done))

    def advance(self, done: int, note: str = "") -> None:
        assert note.startswith("score ")
        self.done.append(done)


def run(
    plan: EvaluationPlan,
    engine: FakeEngine,
    reporter: Progress | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> dict:
    answer = engine_answers(plan, lambda: engine, decode, check_stop)
    return run_evaluation(plan, answer=answer, judge=judge, reporter=reporter)


class Killed(BaseException):
    pass


def stop_after(count: int) -> Callable[[], None]:
    calls = iter(range(count))

    def check() -> None:
        if next(calls, None) is None:
            raise Killed

    return check


def test_every_sample_is_written_and_counted(tmp_path: Path) -> None:
    plan, engine, progress = plan_in(tmp_path), FakeEngine(), Progress()
    results = run(plan, engine, progress)
    header, *rows = rows_in(plan)
    assert header == {"header": True, "schema_version": 2, "name": "test", "identity": "abc"}
    assert [(r["problem_id"], r["sample_index"]) for r in rows] == plan.sample_keys()
    assert sorted(engine.asked) == sorted(plan.sample_keys())
    assert rows[0]["prompt"] == "what is p0?"
    assert all(r["extracted"] == r["completion"].split()[-1] and r["num_tokens"] == 4 for r in rows)
    found = results["estimate"]
    assert found["n"] == found["correct"] + found["incorrect"] + found["unscored"] == 18
    assert found["correct"] == sum(r["verdict"] == "correct" for r in rows) > 0
    assert results["results"]["test"]["exact_match,none"] == found["score"]
    assert results["results"]["test"]["pass@3,none"] == found["pass_at"]["3"]["value"] >= found["score"]
    assert results == json.loads(plan.results_path.read_text())
    assert progress.begun == [("test", 18, 0)]
    assert progress.done == list(range(1, 19))


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("killed_after", [0, 1, 11, 17])
def test_a_killed_evaluation_resumes_to_the_same_files_and_repeats_nothing(
    tmp_path: Path, killed_after: int, torn: bool
) -> None:
    whole = plan_in(tmp_path / "whole")
    run(whole, FakeEngine())
    plan, first, second = plan_in(tmp_path / "resumed"), FakeEngine(), FakeEngine()
    with pytest.raises(Killed):
        run(plan, first, check_stop=stop_after(killed_after))
    assert len(rows_in(plan)) == 1 + killed_after
    if torn:  # the kill came in the middle of a write: the last row is not whole, and is done again
        plan.samples_path.write_bytes(plan.samples_path.read_bytes()[:-9])
    run(plan, second)
    repeated = set(first.asked) & set(second.asked)
    assert len(repeated) == int(torn and killed_after > 0)
    assert set(first.asked) | set(second.asked) == set(plan.sample_keys())
    assert plan.results_path.read_bytes() == whole.results_path.read_bytes()
    assert plan.samples_path.read_bytes() == whole.samples_path.read_bytes()


def test_a_finished_evaluation_asks_for_nothing(tmp_path: Path) -> None:
    first = run(plan_in(tmp_path), FakeEngine())
    engine = FakeEngine()
    assert run(plan_in(tmp_path), engine) == first
    assert engine.asked == []


def test_samples_of_another_identity_are_not_mixed_in(tmp_path: Path) -> None:
    run(plan_in(tmp_path), FakeEngine())
    engine, plan = FakeEngine(), plan_in(tmp_path, identity="def")
    results = run(plan, engine)
    assert len(engine.asked) == 18
    assert results["identity"] == rows_in(plan)[0]["identity"] == "def"


def test_results_are_never_next_to_samples_of_another_identity(tmp_path: Path) -> None:
    run(plan_in(tmp_path), FakeEngine())
    with pytest.raises(Killed):
        run(plan_in(tmp_path, identity="def"), FakeEngine(), check_stop=stop_after(3))
    assert not plan_in(tmp_path).results_path.exists()
    assert len(read_samples(plan_in(tmp_path).samples_path)) == 3


def test_more_problems_under_the_same_identity_ask_only_for_the_new(tmp_path: Path) -> None:
    run(plan_in(tmp_path, num_problems=4), FakeEngine())
    engine = FakeEngine()
    run(plan_in(tmp_path), engine)
    assert {problem for problem, _ in engine.asked} == {"p4", "p5"}


def test_a_sample_the_engine_could_not_make_is_unscored_not_wrong(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    found = run(plan, FakeEngine(broken=frozenset({"p2"})))["estimate"]
    assert found["unscored"] == 3
    assert found["score_if_unscored_correct"] == pytest.approx(found["score"] + 1 / 6)
    failed = [r for r in rows_in(plan)[1:] if r["verdict"] == "unscored"]
    assert {(r["problem_id"], r["reason"], r["stop"]) for r in failed} == {
        ("p2", "engine: out of memory", "error")
    }


def test_a_sample_the_engine_could_not_make_is_asked_for_again(tmp_path: Path) -> None:
    run(plan_in(tmp_path), FakeEngine(broken=frozenset({"p2"})))
    engine, progress = FakeEngine(), Progress()
    resumed = run(plan_in(tmp_path), engine, progress)
    assert sorted(engine.asked) == [("p2", index) for index in range(3)]
    assert progress.begun == [("test", 18, 15)]
    assert resumed == run(plan_in(tmp_path / "whole"), FakeEngine())
    assert (tmp_path / "test.samples.jsonl").read_bytes() == (
        tmp_path / "whole/test.samples.jsonl"
    ).read_bytes()


class Liar(FakeEngine):
    def __init__(self, change: Callable[[list[Rollout]], list[Rollout]]) -> None:
        super().__init__()
        self.change = change

    def generate(self, *args: object, **more: object) -> Iterator[Rollout]:
        return iter(self.change(list(super().generate(*args, **more))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[:-1], "left 1 of 18 samples unanswered"),
        (lambda found: [*found, found[0]], "p5/2 without a request, or twice"),
        (
            lambda found: [replace(found[0], problem_id="other"), *found[1:]],
            "other/2 without a request, or twice",
        ),
    ],
)
def test_an_engine_that_answers_something_else_is_caught(
    tmp_path: Path, change: Callable, message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        run(plan_in(tmp_path), Liar(change))
    assert not plan_in(tmp_path).results_path.exists()


def test_plans_that_cannot_be_run_are_refused(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    twins = [prompt_of("a", "x.jsonl:1"), prompt_of("b", "x.jsonl:2"), prompt_of("a", "x.jsonl:3")]
    with pytest.raises(UserError, match=r"^x.jsonl:3: id: 'a' is also the id of x.jsonl:1"):
        replace(plan, prompts=twins)
    with pytest.raises(UserError, match="no problems"):
        replace(plan, prompts=[])
    with pytest.raises(UserError, match="pass_at = 4 needs samples_per_problem >= 4, got 3"):
        replace(plan, pass_at=(1, 4))
    with pytest.raises(UserError, match="the name is used as a file name"):
        replace(plan, name="../test")
