"""Sampling through an OpenAI-compatible endpoint. A server runs the model, so the model cannot be trained.

If all retries of a request fail, or the answer is not usable, its sample has an error and not an empty answer.
The API key comes only from the environment and is never written.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from truestep.errors import UserError
from truestep.http_client import BadAnswer, Client, Rejected, check_address, key_from
from truestep.records import Message, RecordError, Stop
from truestep.redaction import redact
from truestep.rollout.engine import SampleRequest, SamplingParameters
from truestep.seeding import integer

Request = TypeVar("Request")
Answer = TypeVar("Answer")
KEY_NAMES = ("TRUESTEP_API_KEY", "OPENAI_API_KEY")
CONCURRENT = 16  # requests in progress at once
ANSWER_SECONDS = 1800.0  # for one answer with its retries; 8192 tokens on a slow server take a while
RETRIES = 6
MOST_TOKENS = 10**9  # a larger count of an answer's tokens is not true


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
def connect(url: str, seconds: float = ANSWER_SECONDS, retries: int = RETRIES) -> Iterator[Client]:
    """Connect a client to the endpoint. Raises UserError if the address or the key cannot be used, no server
    answers, or the key is rejected."""
    base = url.rstrip("/")
    base = base if "/" in base.partition("://")[2] else f"{base}/v1"
    where = f"engine = {redact(url)!r}"
    try:
        check_address(base)
    except ValueError as error:
        raise UserError(f"{where} is not the address of a server: {error}") from None
    client = Client(base=base, key=key_from(*KEY_NAMES), seconds=seconds, retries=retries)
    try:
        replace(client, seconds=min(seconds, 30.0), retries=min(retries, 1)).ask("/models")
    except Rejected as error:  # not every server lists its models
        if error.status in (401, 403):
            raise UserError(f"{where}: the key was rejected; set {' or '.join(KEY_NAMES)}") from None
    except OSError as error:
        reason = f"no server answers ({client.words(error)})"
        raise UserError(f"{where}: {reason}; start the server, or correct the URL") from None
    except BadAnswer:
        pass
    try:
        yield client
    finally:
        client.close()


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

    def __init__(self, client: Client, model: str, concurrent: int = CONCURRENT) -> None:
        self.client, self.model, self.concurrent = client, model, concurrent
        self._has_answered = False

    def answer(
        self,
        requests: Sequence[TextRequest],
        sampling: SamplingParameters,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[TextSample]:
        """Yield one sample per request, in the order in which they finish. Raises UserError if the server
        rejects the key or the model before it has answered any request."""
        yield from each(lambda r: self._answer(r, sampling), requests, self.concurrent, check_stop)

    def _answer(self, request: TextRequest, sampling: SamplingParameters) -> TextSample:
        path = "/chat/completions" if request.messages else "/completions"
        try:
            found = self.client.ask(path, self._body(request, sampling))
            sample = _sample(request, found["choices"][0], found.get("usage"))
        except Rejected as error:
            if error.status in (401, 403, 404) and not self._has_answered:
                rejected = f"model {self.model!r} was rejected by the endpoint"
                raise UserError(f"{rejected}: {self.client.words(error)}") from None
            return self._failed(request, error)
        except (OSError, BadAnswer) as error:
            return self._failed(request, error)
        except (TypeError, AttributeError, LookupError, RecursionError):
            return self._failed(request, "the endpoint's answer is not a completion")
        self._has_answered = True
        return sample

    def _failed(self, request: TextRequest, reason: object) -> TextSample:
        return TextSample(
            problem_id=request.problem_id, sample_index=request.sample_index, text="", stop=Stop.ERROR,
            num_tokens=0, error=self.client.words(reason),
        )  # fmt: skip

    def _body(self, request: TextRequest, sampling: SamplingParameters) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "seed": request.seed}
        body |= {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if request.stop:
            body["stop"] = list(request.stop)
        turns = [{"role": m.role, "content": m.content} for m in request.messages]
        return body | ({"messages": turns} if turns else {"prompt": request.text})


def _sample(request: TextRequest, choice: dict[str, Any], usage: Any) -> TextSample:
    """Return a completion as a sample. Raises BadAnswer if it has no text or did not end by itself."""
    message = choice["message"] if request.messages else {"content": choice["text"]}
    text, finish = message.get("content"), choice.get("finish_reason")
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str) and (text is None or isinstance(text, str)):
        text = f"<think>\n{thought}\n</think>\n{text}" if text else f"<think>\n{thought}"
    if not isinstance(text, str):
        raise BadAnswer("the endpoint sent no text")
    if finish not in ("stop", "length"):
        raise BadAnswer(f"the endpoint ended the answer for the reason {finish}")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return TextSample(
        problem_id=request.problem_id,
        sample_index=request.sample_index,
        text=text,
        stop=Stop.LENGTH if finish == "length" else Stop.STOP_TOKEN,
        num_tokens=int(count) if isinstance(count, int | float) and 0 < count <= MOST_TOKENS else 0,
    )
