"""Any OpenAI-compatible endpoint: text in, text out. For models that somebody else serves; it cannot be
trained from.

The openai client does the waiting, the retries with backoff and what Retry-After says. A request that fails
for good is a sample with an error, never an empty answer. The key comes from the environment alone and is
written nowhere.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from truestep.errors import UserError
from truestep.records import Message, RecordError, Stop
from truestep.rollout.engine import SampleRequest, SamplingParameters
from truestep.rundir import redact
from truestep.seeding import integer

if TYPE_CHECKING:
    from openai import OpenAI

KEY_NAMES = ("TRUESTEP_API_KEY", "OPENAI_API_KEY")
CONCURRENT = 16  # requests under way at once
TIMEOUT_SECONDS = 1800.0  # for one answer; 8192 tokens on a slow server take a while
RETRIES = 6


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """One answer to be written: to chat turns, or where ``text`` is given, as a continuation of it."""

    problem_id: str
    sample_index: int
    seed: int
    messages: tuple[Message, ...] = ()
    text: str = ""
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """What came of a request. ``num_tokens`` is what the server counted (0 where it does not say); a failed
    one has stop ERROR, a reason, and no text. ``token_ids`` are known where an engine of ours made them."""

    problem_id: str
    sample_index: int
    text: str
    stop: Stop
    num_tokens: int
    error: str = ""
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.stop is Stop.ERROR) != bool(self.error):
            raise RecordError("an error has a reason, and only an error has one")


def text_seed(request: SampleRequest) -> int:
    """A 31-bit seed of the request's own coordinates, for servers that take an integer."""
    item = f"{request.problem_id}/{request.sample_index}"
    return integer(request.seed, request.purpose, request.step, item) % 2**31


@contextmanager
def connect(url: str, timeout: float = TIMEOUT_SECONDS, retries: int = RETRIES) -> Iterator[OpenAI]:
    """A client of the endpoint. Raises UserError where nothing answers there or the key is refused."""
    try:
        import openai
    except ModuleNotFoundError:
        raise UserError(
            f'engine = "{url}" needs the package openai: pip install "truestep[endpoint]"'
        ) from None
    base = url.rstrip("/")
    base = base if "/" in base.partition("://")[2] else f"{base}/v1"
    with openai.OpenAI(
        base_url=base, api_key=_key() or "none", timeout=timeout, max_retries=retries
    ) as client:
        try:
            client.with_options(timeout=min(timeout, 30.0), max_retries=1).models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise UserError(
                f"engine = {redact(url)!r}: refuses the key: set {' or '.join(KEY_NAMES)}"
            ) from None
        except openai.APIConnectionError as error:
            raise UserError(
                f"engine = {redact(url)!r}: nothing answers there ({_reason(error)}): start it, or correct the URL"
            ) from None
        except openai.APIError:
            pass  # not every server lists its models
        yield client


def _key() -> str:
    return next((os.environ[name] for name in KEY_NAMES if os.environ.get(name)), "")


class EndpointEngine:
    """Answers text requests through a connected client; ``model`` is the name that the server knows."""

    def __init__(self, client: OpenAI, model: str, concurrent: int = CONCURRENT) -> None:
        self.client, self.model, self.concurrent = client, model, concurrent

    def answer(
        self,
        requests: Sequence[TextRequest],
        sampling: SamplingParameters,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[TextSample]:
        """Yield one sample per request as they come (any order). ``check_stop`` is called between them and
        may raise: what is under way is then dropped."""
        pool = concurrent.futures.ThreadPoolExecutor(max_workers=self.concurrent)
        waiting = iter(requests)
        running: set[concurrent.futures.Future[TextSample]] = set()
        try:
            while True:
                check_stop()
                while len(running) < self.concurrent and (request := next(waiting, None)) is not None:
                    running.add(pool.submit(self._answer, request, sampling))
                if not running:
                    return
                done, running = concurrent.futures.wait(
                    running, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, request: TextRequest, sampling: SamplingParameters) -> TextSample:
        import openai

        try:
            return self._chat(request, sampling) if request.messages else self._completion(request, sampling)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise UserError(f"model {self.model!r}: the endpoint refuses it: {_reason(error)}") from None
        except (openai.APIError, ValueError, TypeError, AttributeError, LookupError) as error:
            return _failed(request, _reason(error))  # the last four: an answer that is none

    def _options(self, request: TextRequest, sampling: SamplingParameters) -> dict[str, Any]:
        options: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": request.seed,
        }
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
        text = choice.message.content
        thought = getattr(choice.message, "reasoning_content", None) or getattr(
            choice.message, "reasoning", None
        )
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
        return _failed(request, f"the endpoint ended the answer with {finish!s:.40}")
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
    """One line of what went wrong, without anything that looks like a key."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    key = _key()
    return redact(text.replace(key, "[redacted]") if key else text)
