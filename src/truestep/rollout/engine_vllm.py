"""An engine that sends token ids over local HTTP to vLLM, which runs in a separate environment and process.

This engine is only for evaluation, because weights cannot be published to vLLM. The seed of a request depends
on its problem, sample number and step, but vLLM uses different random numbers. So the samples differ from
those of the torch engine, but their distribution is the same. Greedy tokens agree.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.errors import UserError
from truestep.flops import Ledger
from truestep.http_client import Client
from truestep.records import Rollout
from truestep.redaction import redact
from truestep.rollout.engine import SampleRequest, SamplingParameters, sampled_rollout
from truestep.rollout.engine_endpoint import each, text_seed

if TYPE_CHECKING:
    from torch import Tensor

ENVIRONMENT = "TRUESTEP_VLLM_PYTHON"  # the Python of an environment that has vLLM
START_SECONDS = 900.0
ANSWER_SECONDS = 3600.0
MAX_BYTES = 256 << 20  # an answer has the log-probability of every token
SERVED = "model"


@dataclass(frozen=True, kw_only=True)
class VllmServer:
    """The model to serve. ``options`` are further arguments for vLLM's command line."""

    model: str
    dtype: str
    context_length: int
    max_running: int
    options: tuple[str, ...] = ()


def python_with_vllm() -> str:
    """Return the Python interpreter that can import vLLM. Raises UserError if there is none."""
    named = os.environ.get(ENVIRONMENT, "")
    if named:
        if not os.access(named, os.X_OK):
            remedy = "set it to the interpreter of vLLM's environment"
            raise UserError(f"{ENVIRONMENT} = {named} is not a Python interpreter; {remedy}")
        return named
    if importlib.util.find_spec("vllm") is None:
        remedy = f"make an environment with vLLM and set {ENVIRONMENT} to its Python interpreter"
        raise UserError(f'vLLM (engine = "vllm") is not installed; {remedy}')
    return sys.executable


@contextmanager
def serve(server: VllmServer) -> Iterator[VllmEngine]:
    """Start vLLM and wait until it answers. Finally, stop it and all its child processes.

    Raises UserError with vLLM's last error message if it does not start."""
    python, port = python_with_vllm(), _free_port()
    words = [python, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", server.model, "--served-model-name", SERVED]
    words += ["--dtype", server.dtype, "--max-model-len", str(server.context_length)]
    words += ["--max-num-seqs", str(server.max_running), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", *server.options]
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+b") as log:
        options: dict[str, Any] = {"env": environment, "cwd": folder, "start_new_session": True}
        process = subprocess.Popen(words, stdout=log, stderr=log, **options)
        try:
            _wait(process, port, Path(folder, "log"))
            yield VllmEngine(f"http://127.0.0.1:{port}", server.max_running)
        finally:
            _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            telling = [line for line in lines if "Error" in line] or lines or ["its log is empty"]
            raise UserError(
                f'engine = "vllm": the server did not start: {redact(telling[-1].strip())[-300:]}'
            )
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise UserError(f'engine = "vllm": the server did not answer within {START_SECONDS:.0f} s')


def _end(process: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, how)
            process.wait(15)


class VllmEngine:
    """Samples through a server that ``serve`` has started."""

    def __init__(self, url: str, concurrent: int) -> None:
        self.url, self.concurrent = url, concurrent
        self.policy_version = 0
        self._decoded = 0

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: SamplingParameters,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[Rollout]:
        """Yield one Rollout per request, in the order in which they finish."""
        for rollout in each(lambda r: self._sample(r, sampling), requests, self.concurrent, check_stop):
            self._decoded += len(rollout.completion_ids)
            yield rollout

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Raise UserError, because weights cannot be published to vLLM."""
        raise UserError('engine = "vllm" can only evaluate; train with the torch engine')

    def score(self, token_ids: Sequence[int], num_prompt_tokens: int, temperature: float) -> list[float]:
        """Return the log-probabilities of the completion. Raises UserError if temperature ≠ 1."""
        if temperature != 1.0:
            raise UserError('engine = "vllm" scores at temperature 1 only')
        body = {"prompt": list(token_ids), "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0.0}
        entries = self._post(body)["choices"][0]["prompt_logprobs"]
        places = range(num_prompt_tokens, len(token_ids))
        return [float(entries[i][str(token_ids[i])]["logprob"]) for i in places]

    def take_cost(self) -> Ledger:
        cost, self._decoded = Ledger(generated_pass_tokens=self._decoded), 0
        return cost

    def _sample(self, request: SampleRequest, sampling: SamplingParameters) -> Rollout:
        body: dict[str, Any] = {
            "prompt": list(request.prompt_ids),
            "max_tokens": sampling.max_new_tokens - request.num_given,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": True,  # only the request's stop tokens end a completion
            "seed": text_seed(request),
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        answered = partial(sampled_rollout, request, sampling, self.policy_version)
        try:
            choice = self._post(body)["choices"][0]
            tokens = [int(t) for t in choice["token_ids"]]
            logprobs = [float(v) for v in choice["logprobs"]["token_logprobs"]]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as failure:
            return answered((), (), f"vllm: {failure or type(failure).__name__}")
        if sampling.temperature == 0:
            logprobs = [0.0] * len(tokens)  # the distribution is a point
        return answered(tokens, logprobs, "" if tokens else "vllm: the server sent no token")

    def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        client = Client(base=self.url, seconds=ANSWER_SECONDS, max_bytes=MAX_BYTES)
        found: dict[str, Any] = client.ask("/v1/completions", {"model": SERVED, **body})
        return found
