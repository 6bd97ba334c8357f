"""The default engine, which samples from any causal model in batches, with a KV cache that is refilled.

Every forward pass takes one flat row of tokens: several prompts in a prefill, or one token of every running
sample in a decoding step. A prompt that several waiting samples share is prefilled once. So is the common
beginning of all prompts in a prefill (worked examples). Running samples use the first slots of the cache, so
that a decoding step reads a view of it. When a sample finishes, the last one moves into its slot.

Shapes: R running samples, H query heads, K key-value heads, D head size, T cached tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from truestep.device import linear
from truestep.flops import Ledger
from truestep.model.attention import PackedLayout, count_pairs, visible
from truestep.model.forward import hidden_states
from truestep.model.lora import head_adapter, layers_of
from truestep.records import Rollout, Segment
from truestep.rollout.engine import Receipt, SampleRequest, SamplingParameters, sampled_rollout
from truestep.rollout.fingerprints import fingerprint
from truestep.rollout.sampling import sample_tokens
from truestep.seeding import Purpose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_TOKENS = 2048  # prompt tokens in one forward pass; affects only memory
SHARED_TOKENS = 64  # a common beginning of all prompts gets a separate segment from this length on
ROUND_UP = 32  # cached lengths are read in multiples of this, so that kernels see few shapes


@dataclass
class _Row:
    """A running sample. ``length`` counts cached tokens; ``forced`` tokens are scored instead of sampled."""

    request: SampleRequest
    uniforms: Sequence[float] | np.ndarray
    length: int
    forced: Sequence[int] = ()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class KvCache:
    """The keys and values of all slots. Each layer has a pair of tensors [slots, K, T, D], created on the
    first write."""

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots, self.capacity = num_slots, capacity
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            shape = (self.num_slots, like.shape[0], self.capacity, like.shape[2])
            self.layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[layer]

    def move(self, source: int, target: int, length: int) -> None:
        for keys, values in self.layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]


class _PrefillLayout(PackedLayout):
    """The layout of packed prompts. It writes a prompt's keys and values to the cache slots of all its
    samples, after those of the shared beginning, which does not have slots itself."""

    def __init__(
        self, segments: Sequence[Segment], positions: Tensor, cache: KvCache, slots: Sequence[range]
    ) -> None:
        super().__init__(segments, positions)
        self.cache, self.slots = cache, slots

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        keys, values = self.cache.of(layer, key)
        for segment, slots in zip(self.segments, self.slots, strict=True):
            to = 0
            for a, b in ((segment.prefix_start, segment.prefix_stop), (segment.start, segment.stop)):
                keys[slots.start : slots.stop, :, to : to + b - a] = key[None, :, a:b]
                values[slots.start : slots.stop, :, to : to + b - a] = value[None, :, a:b]
                to += b - a
        return super().attend(layer, query, key, value, scaling, window)


class _DecodeLayout:
    """The layout of one new token per running sample, which attends to its slot's cache and to itself."""

    def __init__(self, cache: KvCache, lengths: Sequence[int], device: torch.device) -> None:
        self.cache = cache
        self.position = torch.tensor(lengths, device=device)
        self.rows = torch.arange(len(lengths), device=device)
        self.read = min(cache.capacity, -(-(max(lengths) + 1) // ROUND_UP) * ROUND_UP)
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        num_rows, kv_heads = query.shape[1], key.shape[0]
        keys, values = self.cache.of(layer, key)
        keys[self.rows, :, self.position] = key.transpose(0, 1)
        values[self.rows, :, self.position] = value.transpose(0, 1)
        # The query heads that share a key-value head become rows of one product, so keys are not repeated.
        # Two plain products are faster here than a fused kernel, which is made for many queries per row. Here
        # each row has one query.
        heads = num_rows * kv_heads
        grouped = (query.transpose(0, 1) * scaling).reshape(heads, -1, query.shape[2])
        # Views of the cache of the running rows, as one batch of their heads: [R K, T read, D].
        keys, values = (slots.flatten(0, 1)[:heads, : self.read] for slots in (keys, values))
        scores = torch.bmm(grouped, keys.transpose(1, 2))
        scores = scores.view(num_rows, kv_heads, -1, self.read) + self._mask(window)
        weights = scores.softmax(-1).to(values.dtype).view(heads, -1, self.read)
        out = torch.bmm(weights, values)
        return out.reshape(num_rows, query.shape[0], query.shape[2])

    def _mask(self, window: int | None) -> Tensor:
        if window not in self._masks:
            seen = visible(self.position, torch.arange(self.read, device=self.position.device), window)
            additive = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))
            self._masks[window] = additive[:, None, None, :]
        return self._masks[window]


class TorchEngine:
    """Samples from a model, or, if ``packs`` is False, one sample at a time with the model's own cache."""

    runs_beside_training, has_adapters = False, True

    def __init__(self, model: PreTrainedModel, *, max_running: int = 64, packs: bool = True) -> None:
        self.model, self.max_running, self.packs = model, max_running, packs
        self.policy_version = 0
        self._prefilled = self._decoded = self._pairs = 0

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: SamplingParameters,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[Rollout]:
        """Yield one Rollout per request, in the order in which they finish.

        A sample's random numbers do not depend on the batch. Its tokens may, if a kernel's rounding depends
        on the shape of its inputs."""
        count = sampling.max_new_tokens
        rows = deque(_Row(request=r, uniforms=r.uniforms(count), length=0) for r in requests)
        yield from self._sampled(rows, sampling, check_stop)

    def _sampled(
        self, rows: deque[_Row], sampling: SamplingParameters, check_stop: Callable[[], None]
    ) -> Iterator[Rollout]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield from (self._run if self.packs else self._run_alone)(rows, sampling, check_stop)
        finally:
            self.model.train(was_training)

    def publish(self, weights: Mapping[str, Tensor], version: int) -> Receipt:
        """Copy the weights into the model, unless they are the model's own tensors."""
        own = dict(self.model.named_parameters())
        if set(own) != set(weights):
            different = sorted(set(own) ^ set(weights))[:3]
            raise KeyError(f"published weights do not match the engine's: {different}")
        addresses = self.load(own, weights)
        self.policy_version = version
        held = {name: fingerprint(p) for name, p in own.items() if name not in addresses}
        adapters = {name: layer.scale for name, layer in layers_of(self.model).items() if layer.is_on}
        return Receipt(version=version, addresses=addresses, fingerprints=held, adapters=adapters)

    @torch.no_grad()
    def load(self, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Copy the weights. Return the addresses of those that are the engine's own tensors."""
        addresses = {}
        for name, parameter in own.items():
            given = weights[name]  # gathers it if it is sharded
            if parameter.data_ptr() == given.data_ptr():
                addresses[name] = given.data_ptr()
            else:
                parameter.copy_(given)
        return addresses

    @property
    def parts(self) -> list[TorchEngine]:
        return [self]

    def rest(self) -> None:
        """Nothing: the cache lives only while samples are drawn."""

    @torch.no_grad()
    def score(self, token_ids: Sequence[int], num_prompt_tokens: int, temperature: float) -> list[float]:
        """Return the log-probabilities of ``token_ids[num_prompt_tokens:]``, by prefill and decoding."""
        forced = tuple(token_ids[num_prompt_tokens:])
        sampling = SamplingParameters(temperature=temperature, max_new_tokens=len(forced), stop_token_ids=())
        request = SampleRequest(
            problem_id="probe",
            sample_index=0,
            prompt_ids=tuple(token_ids[:num_prompt_tokens]),
            seed=0,
            purpose=Purpose.PROBE,
            step=0,
        )
        row = _Row(request=request, uniforms=[0.0] * len(forced), length=0, forced=forced)
        cost = self._prefilled, self._decoded, self._pairs
        try:
            list(self._sampled(deque([row]), sampling, lambda: None))
        finally:
            self._prefilled, self._decoded, self._pairs = cost  # a probe is not part of the run's work
        return row.logprobs

    def take_cost(self) -> Ledger:
        work = {"prompt_tokens": self._prefilled, "generated_pass_tokens": self._prefilled + self._decoded}
        cost = Ledger(**work, generated_pairs=self._pairs)
        self._prefilled = self._decoded = self._pairs = 0
        return cost

    def _run(
        self, waiting: deque[_Row], sampling: SamplingParameters, check_stop: Callable[[], None]
    ) -> Iterator[Rollout]:
        longest = max((len(r.request.prompt_ids) - r.request.num_given for r in waiting), default=0)
        num_slots = min(self.max_running, len(waiting))
        cache = KvCache(num_slots, longest + sampling.max_new_tokens)
        running: list[_Row] = []
        refill_at = max(1, num_slots // 4)  # a prefill for a single free slot would take a whole pass
        while waiting or running:
            check_stop()
            free = num_slots - len(running)
            if waiting and (free >= min(refill_at, len(waiting)) or not running):
                self._admit(waiting, running, cache, sampling)
            else:
                self._decode(running, cache, sampling)
            for index in reversed(range(len(running))):
                if self._finished(running[index], sampling):
                    yield self._rollout(running[index], sampling)
                    last = running.pop()
                    if index != len(running):
                        cache.move(len(running), index, last.length)
                        running[index] = last

    def _admit(
        self, waiting: deque[_Row], running: list[_Row], cache: KvCache, sampling: SamplingParameters
    ) -> None:
        """Prefill waiting samples into the free slots. Neighbors with the same prompt share one prefill."""
        shares: list[list[_Row]] = []
        free = cache.num_slots - len(running)
        shared = _num_shared([row.request.prompt_ids for row in islice(waiting, free)])
        tokens = shared
        while waiting and free:
            prompt = waiting[0].request.prompt_ids
            if shares and shares[-1][0].request.prompt_ids == prompt:
                shares[-1].append(waiting.popleft())
            elif shares and tokens + len(prompt) - shared > PREFILL_TOKENS:
                break
            else:
                shares.append([waiting.popleft()])
                tokens += len(prompt) - shared
            free -= 1
        slots = [range(0)] * bool(shared)
        segments = [Segment(start=0, stop=shared)] * bool(shared)
        ids = list(shares[0][0].request.prompt_ids[:shared])
        for share in shares:
            own = share[0].request.prompt_ids[shared:]
            segments.append(Segment(start=len(ids), stop=len(ids) + len(own), prefix_stop=shared))
            slots.append(range(len(running), len(running) + len(share)))
            ids.extend(own)
            running.extend(share)
        device = self.model.device
        runs = [torch.arange(s.stop - s.start, device=device) + s.prefix_stop for s in segments]
        positions = torch.cat(runs)
        layout = _PrefillLayout(segments, positions, cache, slots)
        hidden = hidden_states(self.model, torch.tensor(ids, device=device), positions, layout)
        self._prefilled += len(ids)
        self._pairs += count_pairs(segments)
        ends = [segment.stop - 1 for segment, rows in zip(segments, slots, strict=True) for _ in rows]
        fresh = [row for share in shares for row in share]
        for row in fresh:
            row.length = len(row.request.prompt_ids)
        self._sample(hidden[torch.tensor(ends, device=device)], fresh, sampling)

    def _decode(self, running: list[_Row], cache: KvCache, sampling: SamplingParameters) -> None:
        device, lengths = self.model.device, [row.length for row in running]
        ids = torch.tensor([row.tokens[-1] for row in running], device=device)
        layout = _DecodeLayout(cache, lengths, device)
        hidden = hidden_states(self.model, ids, layout.position, layout)
        self._decoded += len(running)
        self._pairs += sum(lengths) + len(lengths)
        for row in running:
            row.length += 1
        self._sample(hidden, running, sampling)

    def _sample(self, hidden: Tensor, rows: Sequence[_Row], sampling: SamplingParameters) -> None:
        """Append the next token and its log-probability to each sample. Shapes: hidden [R, D]."""
        head: Any = self.model.get_output_embeddings()
        logits = linear(hidden, head.weight, head.bias)
        if adapter := head_adapter(head, hidden):
            logits = logits + linear(*adapter, None)
        self._take(logits, rows, sampling)

    def _take(self, logits: Tensor, rows: Sequence[_Row], sampling: SamplingParameters) -> None:
        forced = [row.forced[len(row.tokens)] if row.forced else -1 for row in rows]
        uniforms = [float(row.uniforms[len(row.tokens)]) for row in rows]
        samples = sample_tokens(logits, uniforms, sampling, forced)
        for row, token, logprob in zip(rows, *samples, strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)

    def _finished(self, row: _Row, sampling: SamplingParameters) -> bool:
        full = len(row.tokens) + row.request.num_given >= sampling.max_new_tokens
        return full or sampling.ends(row.tokens)

    def _run_alone(
        self, rows: deque[_Row], sampling: SamplingParameters, check_stop: Callable[[], None]
    ) -> Iterator[Rollout]:
        """Sample the rows one at a time with the cache of a model whose attention cannot be packed."""
        for row in rows:
            ids, past = torch.tensor([row.request.prompt_ids], device=self.model.device), None
            while not row.tokens or not self._finished(row, sampling):
                check_stop()
                out = self.model(input_ids=ids, past_key_values=past, use_cache=True)
                past = out.past_key_values
                self._prefilled += 0 if row.tokens else ids.shape[1]
                self._decoded += 1 if row.tokens else 0
                row.length += ids.shape[1]
                self._pairs += row.length
                self._take(out.logits[:, -1], [row], sampling)
                ids = torch.tensor([[row.tokens[-1]]], device=ids.device)
            yield self._rollout(row, sampling)

    def _rollout(self, row: _Row, sampling: SamplingParameters) -> Rollout:
        return sampled_rollout(row.request, sampling, self.policy_version, row.tokens, row.logprobs)


def _num_shared(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return how many leading tokens all prompts share, or 0 if too few. No prompt's last token is shared."""
    first, last = min(prompts), max(prompts)  # what these two share, all prompts between them share too
    most = min(map(len, prompts)) - 1
    same = next((i for i in range(most) if first[i] != last[i]), most)
    return same if first != last and same >= SHARED_TOKENS else 0
