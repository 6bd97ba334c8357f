"""vLLM in a process of its own agrees with the torch engine. Starting it takes minutes on a processor."""

from __future__ import annotations

import os

import pytest

from truestep.errors import UserError
from truestep.rollout.engine import SampleRequest, SamplingParameters
from truestep.rollout.engine_vllm import ENVIRONMENT, VllmServer, python_with_vllm, serve
from truestep.seeding import Purpose
from truestep.settings import ModelSettings


def test_without_vllm_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "/nowhere/python")
    with pytest.raises(UserError, match=f"{ENVIRONMENT} = /nowhere/python is not a Python"):
        python_with_vllm()


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
