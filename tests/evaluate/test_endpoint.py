"""The endpoint engine against servers: a flaky one made here, and llama.cpp's real one where it is
installed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from truestep.errors import UserError
from truestep.records import Message, Stop
from truestep.rollout.engine import SamplingParameters
from truestep.rollout.engine_endpoint import EndpointEngine, TextRequest, connect

SAMPLING = SamplingParameters(temperature=0.0, max_new_tokens=8, stop_token_ids=())
SECRET = "sk-verysecretkey12345"


def request(name: str, index: int = 0) -> TextRequest:
    return TextRequest(
        problem_id=name, sample_index=index, seed=1, messages=(Message(role="user", content=name),)
    )


class Flaky(BaseHTTPRequestHandler):
    """What it does is in the user's words: "fail2" fails twice, "never" always, "long" is cut off …"""

    seen: dict[str, int] = {}  # noqa: RUF012
    bodies: list[dict[str, Any]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        word = body["messages"][-1]["content"]
        self.seen[word] = self.seen.get(word, 0) + 1
        if word == "never" or (word == "fail2" and self.seen[word] <= 2):
            return self.reply(503, {"error": {"message": f"busy, your key is {SECRET}"}})
        if word == "toolong":
            return self.reply(400, {"error": {"message": "context length exceeded"}})
        if word == "garbage":
            return self.reply(200, {"choices": []})
        message: dict[str, Any] = {"role": "assistant", "content": f"answer to {word}"}
        if word == "thinker":
            message["reasoning_content"] = "hm"
        if word == "silent":
            message["content"] = None
        choice = {"index": 0, "message": message, "finish_reason": "length" if word == "long" else "stop"}
        return self.reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
                                "usage": {"completion_tokens": 3, "prompt_tokens": 1, "total_tokens": 4}})  # fmt: skip

    def reply(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Flaky.seen.clear()
    Flaky.bodies.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_retries_errors_and_texts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUESTEP_API_KEY", SECRET)
    names = ["plain", "fail2", "never", "toolong", "garbage", "long", "thinker", "silent"]
    with connect(url, retries=2) as client:
        found = {
            s.problem_id: s for s in EndpointEngine(client, "m").answer([request(n) for n in names], SAMPLING)
        }
    assert set(found) == set(names)
    assert {n for n, s in found.items() if s.stop is Stop.ERROR} == {"never", "toolong", "garbage", "silent"}
    assert found["fail2"].text == "answer to fail2"
    assert Flaky.seen["fail2"] == Flaky.seen["never"] == 3
    assert Flaky.seen["toolong"] == 1, "what the server refuses is not asked again"
    assert found["long"].stop is Stop.LENGTH
    assert found["thinker"].text == "<think>\nhm\n</think>\nanswer to thinker"
    assert found["plain"].num_tokens == 3
    assert "context length" in found["toolong"].error
    assert not any(SECRET in s.error for s in found.values())
    assert {(b["max_tokens"], b["temperature"], b["seed"]) for b in Flaky.bodies} == {(8, 0.0, 1)}


def test_a_stop_between_two_answers_keeps_what_came(url: str) -> None:
    class Enough(Exception):
        pass

    found: list[str] = []

    def check() -> None:
        if len(found) >= 3:
            raise Enough

    def ask_all() -> None:
        with connect(url) as client:
            engine = EndpointEngine(client, "m", concurrent=1)
            for sample in engine.answer([request(f"n{i}") for i in range(9)], SAMPLING, check):
                found.append(sample.problem_id)

    with pytest.raises(Enough):
        ask_all()
    assert 3 <= len(found) < 9


def test_nobody_there_is_one_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UserError, match="no server answers"), connect(f"http://127.0.0.1:{port}"):
        pass


@pytest.mark.slow
def test_llama_cpp_server() -> None:
    """TRUESTEP_LLAMA_PYTHON: a Python with llama-cpp-python[server]. Greedy answers are the same twice, and
    are cut off where they should be."""
    python = os.environ.get("TRUESTEP_LLAMA_PYTHON")
    if not python:
        pytest.skip("needs TRUESTEP_LLAMA_PYTHON, a Python with llama-cpp-python[server]")
    from truestep.model.packaged import packaged_file

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        python,
        "-m",
        "llama_cpp.server",
        "--model",
        str(packaged_file("smollm2-135m-instruct")),
        "--port",
        str(port),
    ]
    process = subprocess.Popen(
        [*words, "--n_threads", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        with connect(f"http://127.0.0.1:{port}/v1") as client:
            engine = EndpointEngine(client, "any", concurrent=1)
            asked = [request("Say hello.", 0), request("Count to one hundred.", 1)]
            runs = [{s.sample_index: s for s in engine.answer(asked, SAMPLING)} for _ in range(2)]
            text = TextRequest(
                problem_id="t", sample_index=0, seed=1, text="Question: 1+1?\nAnswer:", stop=("\n",)
            )
            (continued,) = engine.answer([text], SAMPLING)
    finally:
        process.terminate()
        process.wait(30)
    assert runs[0] == runs[1]
    assert runs[0][1].stop is Stop.LENGTH
    assert runs[0][1].num_tokens == 8
    assert continued.stop is not Stop.ERROR
    assert "\n" not in continued.text
