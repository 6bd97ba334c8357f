"""Predicts what a rank's device and host must hold, and how fast it is if it is a card of the assumed kind.

The terms are counted from what a Llama-like layer saves for its backward pass. They are compared with steps of fake
tensors and with a real step on a processor in tests/study/test_memory.py; a kernel's own memory and fragmentation come
on top. Letters: D hidden size, I inner size of the MLP, V vocabulary, N tokens of a micro-batch, L layers, Q and K
channels of queries and of keys, c bytes of the compute dtype, w bytes of gradient sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

GIB = 2.0**30
DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
CHUNK = (
    1 << 23
)  # logits in a chunk of the output layer (objective/logprobs.py), each of which takes up to CHUNK_BYTES
CHUNK_BYTES = 12
PROCESS_BYTES = 1.5 * GIB  # of the libraries

# The assumed card, and what of it is assumed to be reached. Data sheet of an H100 SXM: 989 TFLOP/s (bfloat16, dense),
# 3.35 TB/s. Nothing of this was measured by us, except the processor's time for a decoding step.
CARD_FLOPS, CARD_BYTES_PER_SECOND, TRAINING_SHARE, READING_SHARE = 989e12, 3.35e12, 0.4, 0.7
DECODE_SECONDS = {"torch": 0.016, "vllm": 0.002}  # of the processor, for each decoding step of 28 layers
HOST_BYTES_PER_SECOND, HOST_PARAMETERS_PER_SECOND = (
    20e9,
    1e9,
)  # between host and device; AdamW on the host's processor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A Llama-like model, from its config.json. ``parameters`` and ``trained`` count numbers, ``trained`` also those of
    adapters."""

    parameters: int
    trained: int
    trains_head: bool
    is_adapted: bool
    hidden: int
    inner: int
    vocabulary: int
    layers: int
    queries: int
    keys: int
    tied: bool

    @staticmethod
    def of(config: Mapping[str, Any], parameters: int) -> Sizes:
        """Return the sizes of a model that is trained as a whole."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head = int(config.get("head_dim") or hidden // heads)
        return Sizes(
            parameters=parameters, trained=parameters, trains_head=True, is_adapted=False, hidden=hidden,
            inner=int(config["intermediate_size"]), vocabulary=int(config["vocab_size"]),
            layers=int(config["num_hidden_layers"]), queries=heads * head,
            keys=int(config["num_key_value_heads"]) * head, tied=bool(config.get("tie_word_embeddings")),
        )  # fmt: skip

    @property
    def table(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> float:
        """The parameters of one layer."""
        return (self.parameters - self.table * (1 if self.tied else 2)) / self.layers


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a stage is trained. ``shards``: the ranks over which fsdp2 splits the model, or 1."""

    dtype: str
    tokens: int
    checkpointing: bool | Literal["selective"] = False
    shards: int = 1
    offload: bool = False
    offload_activations: bool = False

    @property
    def compute(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def wide(self) -> int:
        return max(4, self.compute)


def saved_bytes(model: Sizes, dtype_bytes: int) -> int:
    """Return what a layer saves for its backward pass, for each token. Two norms save the float32 input, its normalized
    form (for the gradient of the norm's weight) and their output; attention its three inputs, and its output before and
    after it is put in order; the MLP four tensors."""
    c = dtype_bytes
    norms = 2 * (max(4, c) + (c if model.is_adapted else 2 * c)) * model.hidden
    return norms + c * (3 * model.queries + 2 * model.keys + 4 * model.inner)


def products_bytes(model: Sizes, dtype_bytes: int) -> int:
    """Return what selective checkpointing keeps of a layer, for each token: its input, the results of its matrix products
    (those of adapters too) and of attention."""
    products = model.queries + 2 * model.keys + 2 * model.hidden + 2 * model.inner
    return dtype_bytes * (model.hidden + model.queries + products * (2 if model.is_adapted else 1))


def training_bytes(model: Sizes, how: Training) -> tuple[dict[str, float], dict[str, float]]:
    """Return the bytes at the peak of a training step, by kind: on the device, and on the host."""
    c, w, n = how.compute, how.wide, how.tokens
    low = c < 4
    own_masters = low and how.shards > 1  # trained shards are float32, and only what is gathered is bfloat16
    optimizer = model.trained * (2 * w + (w if (low and not own_masters) or how.offload else 0)) / how.shards
    weights = model.parameters * c + (model.trained * (w - c) if own_masters else 0)
    device = {"weights": weights / how.shards, "gradients": model.trained * w / how.shards}
    host = {}
    if how.offload:
        host = {"masters and moments": optimizer, "gradients": model.trained * w / how.shards}
    else:
        device["masters and moments"] = optimizer
    kept = {False: saved_bytes(model, c), True: c * model.hidden, "selective": products_bytes(model, c)}
    activations = float(n * model.layers * kept[how.checkpointing])
    (host if how.offload_activations else device)["activations"] = activations
    # The peak is in the backward pass of the output layer, or in that of a layer that is computed again.
    logits = n * ((max(4, c) + 3 * c) * model.hidden) + CHUNK_BYTES * min(CHUNK, n * model.vocabulary)
    table = model.table * (w + c if low else w) if model.trains_head else 0
    inside: float
    again = 0 if how.checkpointing is False else saved_bytes(model, c) - kept[how.checkpointing]
    inside = n * (max(0, again) + c * (2 * model.inner + model.hidden))
    if how.shards > 1:
        # FSDP gathers two layers, and the root's tables for the whole step, and reduces a layer's gradients in float32.
        device["gathered weights"] = c * (2 * model.layer + model.table * (1 if model.tied else 2))
        inside += (model.layer if model.trained == model.parameters else 0) * (c + w)
    if model.tied and model.trains_head:
        inside += model.table * c  # the output layer's part waits for that of the input table
    device["backward pass"] = float(max(logits + table, inside))
    return device, host


def sampling_bytes(model: Sizes, how: Training, tokens: int, running: int) -> dict[str, float]:
    """Return what the torch engine adds while it samples: a second model, if the policy is sharded, and the cache of
    ``running`` samples of up to ``tokens`` tokens."""
    second = model.parameters * how.compute if how.shards > 1 else 0
    return {"sampling engine": float(second), "cache": float(cache_bytes(model, how) * tokens * running)}


def cache_bytes(model: Sizes, how: Training) -> int:
    """Return the keys and values of one token."""
    return model.layers * 2 * model.keys * how.compute


def server_bytes(model: Sizes, how: Training, tokens: int, running: int) -> dict[str, float]:
    """Return what a vLLM server needs at least for ``running`` samples of ``tokens`` tokens at once. A tied output layer is
    sent as a second table. A server takes the share of its card that it is told to."""
    second = model.table if model.tied else 0
    cache = cache_bytes(model, how) * tokens * running
    return {"weights": float((model.parameters + second) * how.compute), "cache": float(cache)}


def host_bytes(model: Sizes, how: Training, *, serves: bool) -> dict[str, float]:
    """Return what a rank holds in host memory besides what is offloaded: the whole model, when it is loaded or exported,
    and, for vLLM, its weights as files in shared memory (only the first rank)."""
    found = {"process": PROCESS_BYTES, "loading and exporting": float(model.parameters * how.compute)}
    return found | ({"files for vLLM": float(model.parameters * how.compute)} if serves else {})


def decoding_rate(model: Sizes, how: Training, engine: str, tokens: int, running: int) -> float:
    """Return the assumed tokens a second of one engine: every step reads all weights and the caches of its samples."""
    read = model.parameters * how.compute + running * tokens * cache_bytes(model, how)
    step = DECODE_SECONDS[engine] * model.layers / 28 + read / (READING_SHARE * CARD_BYTES_PER_SECOND)
    return running / step


def training_rate(flops_per_token: float, how: Training) -> float:
    """Return the assumed tokens a second of one rank. A whole recomputation is a third more work."""
    more = 4 / 3 if how.checkpointing is True else 1.0
    return TRAINING_SHARE * CARD_FLOPS / (flops_per_token * more)


def update_seconds(model: Sizes, how: Training) -> float:
    """Return the assumed seconds that an offloaded optimizer adds to an update."""
    if not how.offload:
        return 0.0
    mine = model.trained / how.shards
    return mine * (how.wide + how.wide) / HOST_BYTES_PER_SECOND + mine / HOST_PARAMETERS_PER_SECOND
