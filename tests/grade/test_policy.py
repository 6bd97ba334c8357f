"""Strict and lenient mean one thing: ``truestep eval grade`` and ``truestep eval MODEL`` agree on every text."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from truestep.cli.main import _app
from truestep.evaluate import benchmarks
from truestep.evaluate.benchmarks import Benchmark
from truestep.evaluate.sources import content_hash, file_items
from truestep.grade.extract import extract_answer
from truestep.grade.policy import judgment
from truestep.records import Message, Problem, Score, Verdict

pytest.importorskip("math_verify")
# gold answer, completion, and the verdicts: default, strict, lenient
CASES = {
    "same everywhere": ("1/2", r"\boxed{0.5}", "correct", "correct", "correct"),
    "bare answer": ("1/2", "1/2", "correct", "correct", "correct"),
    "last number": ("8", "It was 7 and now it is 8", "correct", "incorrect", "correct"),
    "unreduced": ("1/2", r"\boxed{\frac{2}{4}}", "correct", "incorrect", "correct"),
    "no unit": ("5 cm", "The answer is 5", "correct", "incorrect", "correct"),
    "other order": ("1, 2", r"\boxed{2, 1}", "correct", "incorrect", "correct"),
    "rounded": ("8/3", r"\boxed{2.67}", "incorrect", "incorrect", "correct"),
    "rounded too far": ("8/3", r"\boxed{2.7}", "incorrect", "incorrect", "incorrect"),
    "wrong": ("8", "The answer is 9", "incorrect", "incorrect", "incorrect"),
    "no answer": ("8", "Hm.", "incorrect", "incorrect", "incorrect"),
}


class Server(BaseHTTPRequestHandler):
    """Answers the problem NAME with the completion of that case."""

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": []})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        message = {"role": "assistant", "content": CASES[asked.splitlines()[0]][1]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.reply({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    def reply(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def command(*words: str) -> Any:
    result = CliRunner().invoke(_app(), ["eval", *words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_both_commands_give_the_same_three_verdicts(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"id": name, "gold": gold, "pred": text} for name, (gold, text, *_) in CASES.items()]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    graded = {s["id"]: s for s in command("grade", str(pairs), "--workers", "1")["samples"]}
    data = tmp_path / "forms.jsonl"
    rows = [{"id": name, "problem": name, "answer": gold} for name, (gold, *_) in CASES.items()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Benchmark(
        id="forms",
        title="",
        num_rows=len(rows),
        content=content_hash(file_items(data)),
        hub="",
        prompt="plain",
    )
    monkeypatch.setitem(benchmarks.BY_ID, "forms", replace(made, max_new_tokens=16))
    out = tmp_path / "out"
    (score,) = command(
        "model",
        "served",
        "--benchmarks",
        "forms",
        "--data",
        str(tmp_path),
        "--engine",
        url,
        "--out",
        str(out),
    )["scores"]
    read = (out / "evaluations/plain/forms.samples.jsonl").read_text().splitlines()[1:]
    evaluated = {row["problem_id"]: row for row in map(json.loads, read)}
    modes = ("verdict", "strict", "lenient")
    expected = {name: verdicts for name, (_, _, *verdicts) in CASES.items()}
    assert {name: [graded[name][m] for m in modes] for name in CASES} == expected
    assert {name: [evaluated[name][m] for m in modes] for name in CASES} == expected
    shares = [sum(v[i] == "correct" for v in expected.values()) / len(CASES) for i in range(3)]
    assert [score["score"], score["strict_score"], score["lenient_score"]] == pytest.approx(shares)


@pytest.mark.parametrize("checker", ["exact", "integer", "countdown"])
def test_other_checkers_leave_only_the_marking_to_a_strict_reader(checker: str) -> None:
    problem = Problem(id="p", messages=(Message(role="user", content="?"),), answer="8/3", checker=checker)
    for text, strict in ((r"\boxed{4/6}", Verdict.CORRECT), ("so perhaps it is 4/6", Verdict.INCORRECT)):
        found = judgment(
            problem, extract_answer(text), Score(reward=1.0, verdict=Verdict.CORRECT, extracted="4/6")
        )
        assert (found.strict, found.lenient) == (strict, Verdict.CORRECT)
    wrong = judgment(
        problem,
        extract_answer(r"\boxed{2.67}"),
        Score(reward=0.0, verdict=Verdict.INCORRECT, extracted="2.67"),
    )
    assert wrong.lenient is Verdict.INCORRECT
