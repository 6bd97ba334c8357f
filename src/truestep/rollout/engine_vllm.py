"""An engine that sends token ids over HTTP to vLLM servers, which run in separate environments and processes.

The seed of a request depends on its problem, sample number and step, but vLLM uses different random numbers. So
the samples differ from those of the torch engine, but their distribution is the same. Greedy tokens agree.

For training, weights are published to the servers (``vllm_weights``), and every token must come with the version
of the weights that sampled it. A request that is lost because its server died is asked again after the server
was started again.
"""

from __future__ import annotations

import copy
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from truestep.errors import UserError
from truestep.flops import Ledger
from truestep.http_client import BadAnswer, Client, Rejected
from truestep.records import Rollout
from truestep.rollout.engine import (
    Receipt,
    SampleRequest,
    SamplingParameters,
    StaleWeightsError,
    sampled_rollout,
)
from truestep.rollout.engine_endpoint import each, text_seed
from truestep.rollout.vllm_broadcast import Broadcast
from truestep.rollout.vllm_server import SERVED, START_SECONDS, Servers, VllmServer
from truestep.rollout.vllm_weights import FileDelivery, Gather, num_cached, write_weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

Answer = TypeVar("Answer")
ANSWER_SECONDS = 3600.0
PUBLISH_SECONDS = 900.0
MAX_BYTES = 256 << 20  # an answer has the log-probability of every token
RETRIES = 3  # of one request, or of publishing, if the server was lost
POLL_SECONDS = 0.5


@contextmanager
def serve(server: VllmServer) -> Iterator[VllmEngine]:
    """Start vLLM for evaluation and wait until it answers. Finally, stop it and all its child processes.

    Raises UserError with vLLM's last error message if it does not start."""
    with Servers(server) as servers:
        yield VllmEngine(servers.urls, server.max_running)


class Publisher:
    """Publishes to all servers. Only ``is_first`` of the ranks writes and sends; ``gather`` tells the others.

    ``servers`` are those that truestep has started; without them, all were running before. If ``sleeps``, the
    servers give their memory back from the end of a rollout to the next weights. ``copies`` are tensors that the
    servers hold twice (see ``write_weights``). With ``broadcast``, weights are sent from memory; then they are written
    only if a server may be started again (``keeps``)."""

    def __init__(
        self, delivery: FileDelivery, folder: Path, *, servers: Servers | None = None, is_first: bool = True,
        gather: Gather = lambda value: [value], sleeps: bool = False, copies: Mapping[str, str] | None = None,
        broadcast: Broadcast | None = None,
    ) -> None:  # fmt: skip
        self.copies, self.broadcast = copies or {}, broadcast
        self.keeps = broadcast is None or (servers is not None and servers.restarts > 0)
        self.delivery, self.folder, self.servers = delivery, folder, servers
        self.is_first, self.gather, self.sleeps = is_first, gather, sleeps
        self.lock = servers.lock if servers is not None else threading.Lock()
        if servers is not None:
            servers.restore = lambda url: self._restore(client_of(url))

    @property
    def failure(self) -> str:
        return "" if self.servers is None else self.servers.failure

    def publish(self, weights: Mapping[str, Tensor], version: int, clients: Sequence[Client]) -> Receipt:
        """Write the weights and make every server load them (a collective)."""
        with self.lock:
            self.gather(None)  # the first rank may have waited for the lock
            self.delivery.version, self.delivery.told = version, {}
            found: dict[str, Any] = {}
            if self.broadcast is None or not self.is_first:
                self._write(weights)
            else:
                write = partial(self._write, weights)
                found = self.broadcast.send(clients, PUBLISH_SECONDS, write, wakes=self.sleeps)
        told = [self._received(client, found.get(client.base)) for client in clients] if self.is_first else []
        self.delivery.told = _merged(self.gather(told)[0])
        held = dict(self.delivery.told)
        for name, second in self.copies.items():
            if held.pop(second, None) != held.get(name):
                held[name] = -1  # the copy is not the same
        tells = all(one.tells_bits for one in self.delivery.abilities.values())
        why = "" if tells else "a server without truestep's worker extension cannot tell which bits it loaded"
        return Receipt(version=version, fingerprints=held, is_received=True, unread=why)

    def _write(self, weights: Mapping[str, Tensor], send: Callable[[Tensor], None] | None = None) -> None:
        write_weights(self.folder, weights, self.copies, writes=self.is_first and self.keeps, send=send)

    def _received(self, client: Client, found: dict[str, int] | Exception | None) -> dict[str, int]:
        """Return what a server told of the weights. If it was not sent any, or was lost, it loads them."""
        if isinstance(found, dict):
            return found
        if isinstance(found, Exception) and not self.keeps:
            raise UserError(
                f"the vLLM server {client.base} did not take the weights: {client.words(found)}"
            ) from None
        if isinstance(found, Exception) and self.servers is not None:
            self.servers.say(f"{client.base} was lost while weights were sent; it loads them as files")
        return self._sent(client)

    def rest(self, clients: Sequence[Client]) -> None:
        """Let the servers sleep after every rank has its samples (a collective)."""
        if not self.sleeps:
            return
        self.gather(None)
        for client in clients if self.is_first else ():
            self._told(client, partial(self.delivery.sleep, client))

    def _sent(self, client: Client) -> dict[str, int]:
        return self._told(client, partial(self.delivery.load, client, PUBLISH_SECONDS, wakes=self.sleeps))

    def _told(self, client: Client, work: Callable[[], Answer]) -> Answer:
        for attempt in range(RETRIES + 1):
            try:
                with self.lock:
                    return work()
            except (OSError, BadAnswer) as error:
                if attempt == RETRIES or not is_lost(error):
                    said = client.words(error)
                    raise UserError(
                        f"the vLLM server {client.base} did not take the weights: {said}"
                    ) from None
                wait_for(client, lambda: self.failure, None)
        raise AssertionError

    def _restore(self, client: Client) -> None:
        """Give the newest weights to a server that was started again. Called with the lock held."""
        told = self.delivery.load(client, PUBLISH_SECONDS)
        if self.delivery.told and told != self.delivery.told:
            raise UserError("it did not load the weights that were published last")


class VllmEngine:
    """Samples through running servers. With a ``publisher``, it can be trained."""

    runs_beside_training, has_adapters = True, False

    def __init__(self, urls: Sequence[str], concurrent: int, publisher: Publisher | None = None) -> None:
        self.clients = [client_of(url) for url in urls]
        self.concurrent, self.publisher = concurrent, publisher
        self.policy_version = 0
        self._cost = Ledger()
        self._running: set[str] = set()  # requests in progress; adding and removing are atomic

    @property
    def parts(self) -> list[VllmEngine]:
        """An engine for each server, for tests of every one of them."""
        found = []
        for client in self.clients:
            one = copy.copy(self)
            one.clients, one._cost, one._running = [client], Ledger(), set()
            found.append(one)
        return found

    @property
    def url(self) -> str:
        return self.clients[0].base

    def close(self) -> None:
        """End all requests that are in progress in other threads."""
        for client in self.clients:
            client.close()

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: SamplingParameters,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[Rollout]:
        """Yield one Rollout per request, in the order in which they finish. If ``check_stop`` raises, the
        requests in progress are dropped, also by the servers."""
        limit = self.concurrent * len(self.clients)
        finished = False
        try:
            for rollout, cost in each(lambda r: self._sample(r, sampling), requests, limit, check_stop):
                self._cost += cost
                yield rollout
            finished = True
        finally:
            if not finished and self.publisher is not None:
                self._drop()

    def _drop(self) -> None:
        running = sorted(self._running)  # only of this rank
        for client in self.clients if running else ():
            with suppress(OSError, BadAnswer):
                replace(client, seconds=5.0).ask("/abort_requests", {"request_ids": running})

    def publish(self, weights: Mapping[str, Tensor], version: int) -> Receipt:
        """Give the weights to all servers. Raises UserError if this engine was started for evaluation."""
        if self.publisher is None:
            raise UserError("this vLLM engine can only evaluate; open it for training to publish weights")
        receipt = self.publisher.publish(weights, version, self.clients)
        self.policy_version = version
        return receipt

    def rest(self) -> None:
        if self.publisher is not None:
            self.publisher.rest(self.clients)

    def score(self, token_ids: Sequence[int], num_prompt_tokens: int, temperature: float) -> list[float]:
        """Return the log-probabilities of the completion. Raises UserError if temperature ≠ 1."""
        if temperature != 1.0:
            raise UserError('engine = "vllm" scores at temperature 1 only')
        body = {"prompt": list(token_ids), "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0.0}
        entries = self.clients[0].ask("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        places = range(num_prompt_tokens, len(token_ids))
        return [float(entries[i][str(token_ids[i])]["logprob"]) for i in places]

    def take_cost(self) -> Ledger:
        cost, self._cost = self._cost, Ledger()
        return cost

    def _sample(self, request: SampleRequest, sampling: SamplingParameters) -> tuple[Rollout, Ledger]:
        """Return the sample and its work. Runs in a thread."""
        # All samples of a problem go to one server, whose prefix cache then has their prompt.
        client = self.clients[zlib.crc32(request.problem_id.encode()) % len(self.clients)]
        error = ""
        for attempt in range(RETRIES + 1):
            try:
                return self._ask(client, request, sampling)
            except (OSError, ValueError, KeyError, TypeError, IndexError) as failure:
                error = client.words(failure)
                publisher = self.publisher
                if publisher is None or attempt == RETRIES or not is_lost(failure):
                    break
                wait_for(client, partial(getattr, publisher, "failure"), self.policy_version)
        return sampled_rollout(request, sampling, self.policy_version, (), (), f"vllm: {error}"), Ledger()

    def _ask(
        self, client: Client, request: SampleRequest, sampling: SamplingParameters
    ) -> tuple[Rollout, Ledger]:
        body = {
            "max_tokens": sampling.max_new_tokens - request.num_given,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": True,  # only the request's stop tokens end a completion
            "seed": text_seed(request),
            "logprobs": 0,
            "skip_special_tokens": False,
        }
        ids, named = list(request.prompt_ids), f"truestep-{uuid.uuid4().hex}"
        if self.publisher is None:
            path = "/v1/completions"
            body = {"model": SERVED, "prompt": ids, "return_token_ids": True, **body}
        else:
            path = "/inference/v1/generate"
            asked = {**body, "detokenize": False}
            body = {"request_id": named, "token_ids": ids, "sampling_params": asked}
        self._running.add(named)
        try:
            answer = client.ask(path, body)
        finally:
            self._running.discard(named)
        choice = answer["choices"][0]
        if choice.get("finish_reason") not in ("stop", "length"):
            raise ConnectionError(
                f"the server ended the request for the reason {choice.get('finish_reason')}"
            )
        tokens = [int(t) for t in choice["token_ids"]]
        if self.publisher is None:
            logprobs, version = [float(v) for v in choice["logprobs"]["token_logprobs"]], self.policy_version
        else:
            logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
            version = _version(choice["weight_versions"], len(tokens), self.policy_version)
        tokens = _stopped(tokens, sampling)
        logprobs = logprobs[: len(tokens)]
        if sampling.temperature == 0:
            logprobs = [0.0] * len(tokens)  # the distribution is a point
        error = "" if tokens else "vllm: the server sent no token"
        made = sampled_rollout(request, sampling, version, tokens, logprobs, error)
        return made, _work(len(ids), num_cached(answer), len(choice["token_ids"]))


def is_lost(error: Exception) -> bool:
    """Return whether a request may succeed later. After 5xx, what computes may be dead, and the server soon."""
    return isinstance(error, OSError) or (isinstance(error, Rejected) and error.status >= 500)


def client_of(url: str) -> Client:
    return Client(base=url, seconds=ANSWER_SECONDS, max_bytes=MAX_BYTES)


def wait_for(client: Client, failure: Callable[[], str], version: int | None) -> None:
    """Wait until a lost server answers again and, if ``version`` is given, has that version of the weights.

    Raises UserError if it does not, or with the reason for which it will not be started again."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if reason := failure():
            raise UserError(reason)
        with suppress(OSError, BadAnswer, LookupError, TypeError):
            said = replace(client, seconds=5.0).ask("/weight_info")["weight_version"]
            if version is None or said == str(version):
                return
        if client.waits(POLL_SECONDS):
            raise UserError("the engine was closed")
    raise UserError(
        f"the vLLM server {client.base} was lost, and did not answer again within {START_SECONDS:.0f} s"
    )


def _version(spans: Sequence[Mapping[str, Any]], count: int, wanted: int) -> int:
    """Return the version that sampled all ``count`` tokens. Raises StaleWeightsError if any is not ``wanted``."""
    others = [span for span in spans if span["version"] != str(wanted)]
    if others or not spans or (spans[0]["start"], spans[-1]["end"]) != (0, count):
        said = (
            f"tokens {others[0]['start']} to {others[0]['end']} by {others[0]['version']!r}"
            if others
            else "nothing"
        )
        raise StaleWeightsError(
            f"version {wanted} of the weights was to sample {count} tokens, but vLLM says: {said}"
        )
    return wanted


def _stopped(tokens: list[int], sampling: SamplingParameters) -> list[int]:
    """Return the tokens up to the first stop. vLLM knows stop tokens, but no stop sequences of tokens."""
    longest = max(map(len, sampling.stop_sequences), default=0)
    ends = (i for i in range(1, len(tokens) + 1) if sampling.ends(tokens[max(0, i - longest) : i]))
    return tokens[: next(ends, len(tokens))] if longest else tokens


def _work(prompt: int, cached: int, sampled: int) -> Ledger:
    """Return the work of a request. The last sampled token is not passed through the model."""
    prefilled, last = prompt - cached, prompt + max(0, sampled - 1)
    return Ledger(
        prompt_tokens=prefilled, generated_pass_tokens=last - cached,
        generated_pairs=(last * (last + 1) - cached * (cached + 1)) // 2,
    )  # fmt: skip


def _merged(told: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return what all servers told; −1, which is no fingerprint, where they differ."""
    first = dict(told[0]) if told else {}
    return {
        name: value if all(one.get(name) == value for one in told) else -1 for name, value in first.items()
    }
