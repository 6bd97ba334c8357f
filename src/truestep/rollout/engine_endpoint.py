"""Sampling through an OpenAI-compatible endpoint. A server runs the model, so the model cannot be trained.

The openai client retries with backoff and obeys Retry-After. If all retries of a request fail, its sample has
an error and not an empty answer. The API key comes only from the environment and is never written.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from truestep.errors import UserError
from truestep.records import Message, RecordError, Stop
from truestep.rollout.engine import SampleRequest, SamplingParameters
from truestep.rundir import redact
from truestep.seeding import integer

if TYPE_CHECKING:
    from openai import OpenAI

Request = TypeVar("Request")
Answer = TypeVar("Answer")
KEY_NAMES = ("TRUESTEP_API_KEY", "OPENAI_API_KEY")
CONCURRENT = 16  # requests in progress at once
TIMEOUT_SECONDS = 1800.0  # for one answer; 8192 tokens on a slow server take a while
RETRIES = 6


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """A request for one answer: a reply to chat turns, or a continuation of ``text`` if that is given."""

    problem_id: str
    sample_index: int
    seed: int
    messages: tuple[Message, ...] = ()
    text: str = ""
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """The answer to a request. ``num_tokens`` is the server's count, or 0 if unknown. After a failure,
    ``stop`` is ERROR, ``error`` has the reason and ``text`` is "". Only truestep's engines set token_ids."""

    problem_id: str
    sample_index: int
    text: str
    stop: Stop
    num_tokens: int
    error: str = ""
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.stop is Stop.ERROR) != bool(self.error):
            raise RecordError("a sample must have an error message if, and only if, its stop is ERROR")


def text_seed(request: SampleRequest) -> int:
    """Derive a 31-bit seed from the fields of the request, for servers that take an integer."""
    item = f"{request.problem_id}/{request.sample_index}"
    return integer(request.seed, request.purpose, request.step, item) % 2**31


@contextmanager
def connect(url: str, timeout: float = TIMEOUT_SECONDS, retries: int = RETRIES) -> Iterator[OpenAI]:
    """Connect a client to the endpoint. Raises UserError if no server answers or the key is rejected."""
    try:
        import openai
    except ModuleNotFoundError:
        remedy = 'run pip install "truestep[endpoint]"'
        raise UserError(f'engine = "{url}" needs the openai package; {remedy}') from None
    base = url.rstrip("/")
    base = base if "/" in base.partition("://")[2] else f"{base}/v1"
    key, where = _key() or "none", f"engine = {redact(url)!r}"
    with openai.OpenAI(base_url=base, api_key=key, timeout=timeout, max_retries=retries) as client:
        try:
            client.with_options(timeout=min(timeout, 30.0), max_retries=1).models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise UserError(f"{where}: the key was rejected; set {' or '.join(KEY_NAMES)}") from None
        except openai.APIConnectionError as error:
            reason = f"no server answers ({_reason(error)})"
            raise UserError(f"{where}: {reason}; start the server, or correct the URL") from None
        except openai.APIError:
            pass  # not every server lists its models
        yield client


def _key() -> str:
    return next((os.environ[name] for name in KEY_NAMES if os.environ.get(name)), "")


def each(
    function: Callable[[Request], Answer],
    requests: Sequence[Request],
    limit: int,
    check_stop: Callable[[], None],
) -> Iterator[Answer]:
    """Yield ``function(request)`` for every request as it finishes. At most ``limit`` calls run at once, in
    threads. ``check_stop`` is called while they run; if it raises, requests in progress are dropped."""
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=limit)
    waiting = iter(requests)
    running: set[concurrent.futures.Future[Answer]] = set()
    try:
        while True:
            check_stop()
            running |= {pool.submit(function, request) for request in islice(waiting, limit - len(running))}
            if not running:
                return
            done, running = concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class EndpointEngine:
    """Answers text requests through a connected client; ``model`` is the model's name on the server."""

    def __init__(self, client: OpenAI, model: str, concurrent: int = CONCURRENT) -> None:
        self.client, self.model, self.concurrent = client, model, concurrent

    def answer(
        self,
        requests: Sequence[TextRequest],
        sampling: SamplingParameters,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[TextSample]:
        """Yield one sample per request, in the order in which they finish."""
        yield from each(lambda r: self._answer(r, sampling), requests, self.concurrent, check_stop)

    def _answer(self, request: TextRequest, sampling: SamplingParameters) -> TextSample:
        import openai

        try:
            return self._chat(request, sampling) if request.messages else self._completion(request, sampling)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise UserError(f"model {self.model!r} was rejected by the endpoint: {_reason(error)}") from None
        except (openai.APIError, ValueError, TypeError, AttributeError, LookupError) as error:
            return _failed(request, _reason(error))  # the last four exceptions: a malformed answer

    def _options(self, request: TextRequest, sampling: SamplingParameters) -> dict[str, Any]:
        options: dict[str, Any] = {"model": self.model, "seed": request.seed}
        options |= {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        if sampling.top_p < 1:
            options["top_p"] = sampling.top_p
        if sampling.top_k:
            options["extra_body"] = {"top_k": sampling.top_k}
        if request.stop:
            options["stop"] = list(request.stop)
        return options

    def _chat(self, request: TextRequest, sampling: SamplingParameters) -> TextSample:
        turns: Any = [{"role": m.role, "content": m.content} for m in request.messages]
        found: Any = self.client.chat.completions.create(messages=turns, **self._options(request, sampling))
        choice = found.choices[0]
        message, text = choice.message, choice.message.content
        thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
        if thought:
            text = f"<think>\n{thought}\n</think>\n{text or ''}" if text else f"<think>\n{thought}"
        return _sample(request, text, choice.finish_reason, found.usage)

    def _completion(self, request: TextRequest, sampling: SamplingParameters) -> TextSample:
        found: Any = self.client.completions.create(prompt=request.text, **self._options(request, sampling))
        return _sample(request, found.choices[0].text, found.choices[0].finish_reason, found.usage)


def _sample(request: TextRequest, text: Any, finish: Any, usage: Any) -> TextSample:
    if not isinstance(text, str):
        return _failed(request, "the endpoint sent no text")
    if finish not in ("stop", "length"):
        return _failed(request, f"the endpoint ended the answer for the reason {finish!s:.40}")
    return TextSample(
        problem_id=request.problem_id,
        sample_index=request.sample_index,
        text=text,
        stop=Stop.LENGTH if finish == "length" else Stop.STOP_TOKEN,
        num_tokens=int(getattr(usage, "completion_tokens", 0) or 0),
    )


def _failed(request: TextRequest, reason: str) -> TextSample:
    return TextSample(
        problem_id=request.problem_id, sample_index=request.sample_index, text="", stop=Stop.ERROR, num_tokens=0,
        error=reason or "no reason given",
    )  # fmt: skip


def _reason(error: Exception) -> str:
    """Say in one line what went wrong, without anything that looks like a key."""
    text, key = " ".join(str(error).split())[:300] or type(error).__name__, _key()
    return redact(text.replace(key, "[redacted]") if key else text)
