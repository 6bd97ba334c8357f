"""Asks a server of vLLM or SGLang for the log-probabilities of given tokens.

Held by: tests/guard/test_engine_http.py"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urldefrag

from truestep.http_client import BadAnswer, Client, check_address, key_from

KEY_NAMES = ("TRUESTEP_API_KEY", "OPENAI_API_KEY")
SECONDS = 30.0  # for all answers of one check
Engine = Callable[[list[list[int]]], list[list[float]]]


class Server:
    """An engine behind HTTP. Calling it returns the log-probabilities of all tokens but the first of each
    sequence, in nats.

    ``address`` is "http://HOST:PORT", with "#NAME" after it if the server has several models or adapters and
    the sampler does not use the first. A key comes from the environment (TRUESTEP_API_KEY, OPENAI_API_KEY).
    ``seconds`` is the time for all sequences of one call. Raises ValueError for an address that cannot be used.
    """

    def __init__(self, address: str, seconds: float = SECONDS) -> None:
        base, self.model = urldefrag(address)
        base = base.rstrip("/").removesuffix("/v1")
        if "?" in base:
            raise ValueError("engine: the address has a query; put a key into the environment")
        try:
            check_address(base)
        except ValueError as error:
            raise ValueError(f"engine: the address cannot be used: {error}") from None
        self.client = Client(base=base, key=key_from(*KEY_NAMES), seconds=seconds)
        self.is_sglang: bool | None = None  # not known before the first answer

    def __call__(self, sequences: list[list[int]]) -> list[list[float]]:
        """Raises OSError or ValueError if no usable answer came. The messages contain no secrets."""
        until = time.monotonic() + self.client.seconds
        try:
            if self.is_sglang is None:
                self._look(until)
            ask = self._sglang if self.is_sglang else self._openai
            return [ask(ids, until) for ids in sequences]
        except BadAnswer as error:
            raise ValueError(self.client.words(error)) from None
        except OSError as error:
            raise OSError(self.client.words(error)) from None
        except (TypeError, AttributeError, LookupError, RecursionError, ValueError):
            raise ValueError("the answer does not have the log-probabilities that were asked for") from None

    def _ask(self, path: str, until: float, body: Any = None) -> Any:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answers were not complete in time")
        return replace(self.client, seconds=left).ask(path, body)

    def _look(self, until: float) -> None:
        models = self._ask("/v1/models", until)["data"]
        self.model = self.model or str(models[0]["id"])
        self.is_sglang = any(str(one.get("owned_by")).lower() == "sglang" for one in models)

    def _openai(self, ids: Sequence[int], until: float) -> list[float]:
        body = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0}
        answer = self._ask("/v1/completions", until, {**body, "prompt_logprobs": 0})
        entries = answer["choices"][0]["prompt_logprobs"]
        if len(entries) != len(ids):
            raise BadAnswer(f"{len(entries)} prompt log-probabilities for {len(ids)} tokens")
        pairs = zip(entries[1:], ids[1:], strict=True)
        return [float(entry[str(token)]["logprob"]) for entry, token in pairs]

    def _sglang(self, ids: Sequence[int], until: float) -> list[float]:
        sampling = {"max_new_tokens": 1, "temperature": 0.0}
        body = {"input_ids": list(ids), "sampling_params": sampling, "return_logprob": True}
        answer = self._ask("/generate", until, {**body, "logprob_start_len": 0})
        entries = answer["meta_info"]["input_token_logprobs"]
        if [entry[1] for entry in entries] != list(ids):
            raise BadAnswer(f"{len(entries)} log-probabilities of other tokens, for {len(ids)} tokens")
        return [float(entry[0]) for entry in entries[1:]]
