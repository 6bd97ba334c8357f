"""vLLM in a process of its own agrees with the torch engine. Starting it takes minutes on a processor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from truestep.errors import UserError
from truestep.rollout.engine import SampleRequest, SamplingParameters
from truestep.rollout.engine_endpoint import text_seed
from truestep.rollout.engine_vllm import VllmEngine, serve
from truestep.rollout.vllm_server import ENVIRONMENT, VllmServer, python_with_vllm
from truestep.seeding import Purpose
from truestep.settings import ModelSettings


def test_without_vllm_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "/nowhere/python")
    with pytest.raises(UserError, match=f"{ENVIRONMENT} = /nowhere/python is not a Python"):
        python_with_vllm()


def test_a_key_across_the_cut_of_vllms_last_words_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "plain-key-of-mine")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "ValueError: plain-key-of-mine{"z" * 290}"\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setenv(ENVIRONMENT, str(python))
    server = VllmServer(model="m", dtype="float32", context_length=9, max_running=1)
    with pytest.raises(UserError, match=r"the server did not start: .*z{290}$") as caught, serve(server):
        pass
    assert "of-mine" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not os.environ.get(ENVIRONMENT), reason=f"needs {ENVIRONMENT}, the Python of vLLM's environment"
)
def test_greedy_tokens_and_logprobs_agree_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from truestep.model.load import load_model, resolve
    from truestep.rollout.engine_torch import TorchEngine
    from truestep.train.policy import Policy

    for name, value in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "0")):
        monkeypatch.setenv(name, value)
    settings = ModelSettings(path="smollm2-135m-instruct")
    loaded = load_model(settings, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    own = TorchEngine(Policy(loaded).model)
    asked = [
        SampleRequest(problem_id=f"p{i}", sample_index=0, prompt_ids=(1, 2000 + i, 300, 28), seed=0,
                      purpose=Purpose.EVALUATE, step=0)
        for i in range(4)
    ]  # fmt: skip
    greedy = SamplingParameters(temperature=0, max_new_tokens=16, stop_token_ids=(2,))
    server = VllmServer(model=resolve(settings), dtype="float32", context_length=256, max_running=4,
                        options=("--enforce-eager",))  # fmt: skip
    with serve(server) as engine:
        theirs = {r.problem_id: r for r in engine.generate(asked, greedy)}
        (sampled,) = engine.generate(
            asked[:1], SamplingParameters(temperature=1.0, max_new_tokens=8, stop_token_ids=(2,))
        )
    ours = {r.problem_id: r for r in own.generate(asked, greedy)}
    assert {n: r.completion_ids for n, r in theirs.items()} == {n: r.completion_ids for n, r in ours.items()}
    scored = own.score((*asked[0].prompt_ids, *sampled.completion_ids), 4, 1.0)
    assert sampled.behavior_logprobs == pytest.approx(scored, abs=1e-3)


class Completions(BaseHTTPRequestHandler):
    """Answers as vLLM's /v1/completions does, and keeps what it was asked."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        scores = [None, *({str(t): {"logprob": -t / 8}} for t in body["prompt"][1:])]
        choice = {
            "token_ids": [7, 2],
            "finish_reason": "stop",
            "logprobs": {"token_logprobs": [-0.5, -0.25]},
            "prompt_logprobs": scores,
        }
        data = json.dumps({"choices": [choice]} if body["prompt"] != [9] else {"choices": []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def request(*prompt: int) -> SampleRequest:
    return SampleRequest(
        problem_id="p", sample_index=0, prompt_ids=prompt, seed=0, purpose=Purpose.EVALUATE, step=0
    )


@pytest.fixture
def engine() -> Iterator[VllmEngine]:
    Completions.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    Thread(target=server.serve_forever, daemon=True).start()
    yield VllmEngine([f"http://127.0.0.1:{server.server_port}"], 2)
    server.shutdown()
    server.server_close()


def test_a_request_and_its_answer_in_vllms_protocol(engine: VllmEngine) -> None:
    sampling = SamplingParameters(temperature=0.5, max_new_tokens=5, stop_token_ids=(2,), top_p=0.9, top_k=0)
    (rollout,) = engine.generate([request(3, 4)], sampling)
    assert (rollout.completion_ids, rollout.behavior_logprobs) == ((7, 2), (-0.5, -0.25))
    (body,) = Completions.asked
    assert body.pop("seed") == text_seed(request(3, 4))
    assert body == {
        "model": "model", "prompt": [3, 4], "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": -1,
        "stop_token_ids": [2], "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
        "skip_special_tokens": False,
    }  # fmt: skip
    # The prompt's two tokens, and the first sampled one. The last one is not passed through the model.
    cost = engine.take_cost()
    assert (cost.prompt_tokens, cost.generated_pass_tokens, cost.generated_pairs) == (2, 3, 1 + 2 + 3)
    assert engine.take_cost().generated_pass_tokens == 0
    (greedy,) = engine.generate([request(3, 4)], replace(sampling, temperature=0))
    assert greedy.behavior_logprobs == (0.0, 0.0)


def test_an_answer_without_a_choice_is_a_failed_sample(engine: VllmEngine) -> None:
    sampling = SamplingParameters(temperature=1.0, max_new_tokens=5, stop_token_ids=(2,))
    made = engine.generate([request(9), request(3)], sampling)
    failed, fine = sorted(made, key=lambda r: len(r.completion_ids))
    assert failed.error.startswith("vllm: ")
    assert fine.error == ""


def test_scores_are_those_of_the_completion(engine: VllmEngine) -> None:
    assert engine.score([3, 4, 7, 2], 2, 1.0) == [-7 / 8, -2 / 8]
    (body,) = Completions.asked
    assert body == {"prompt": [3, 4, 7, 2], "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0.0}
    with pytest.raises(UserError, match="temperature 1 only"):
        engine.score([3, 4], 1, 0.5)
    with pytest.raises(UserError, match="can only evaluate"):
        engine.publish({}, 1)
