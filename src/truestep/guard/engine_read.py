"""What the engine check reads from the trainer: log-probabilities of the probe sequences, and how much of the
change of its weights a 16-bit copy of them can show.

Shapes: N tokens of all probe sequences, without the first of each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from truestep.guard.modules import rounds_products
from truestep.guard.ranks import current_device
from truestep.guard.tokens import Batch, in_pieces, logits_in
from truestep.guard.update import local
from truestep.guard.used import whole

LONGEST, MOST = 512, 16  # tokens of a probe sequence, and sequences
TENSORS, ENTRIES = 64, 512  # sampled parameters and entries of each
SEED = 20260423
NARROW = (torch.bfloat16, torch.float16)


def probes(batches: Sequence[Batch], tokens: int) -> list[list[int]]:
    """Return the first sequences of the batches, without padding, with about ``tokens`` tokens in all."""
    found: list[list[int]] = []
    for batch in batches:
        if batch.ids is None:
            continue
        mask = batch.attention
        for number, row in enumerate(batch.ids):
            ids = row if mask is None else row[mask[number] != 0]
            kept = [int(i) for i in ids[: min(LONGEST, tokens + 1)].tolist()]
            if len(kept) > 1 and kept not in found:
                found.append(kept)
                tokens -= len(kept) - 1
            if tokens < 1 or len(found) == MOST:
                return found
    return found


@contextmanager
def undisturbed(model: nn.Module | None = None) -> Iterator[None]:
    """Put every module into evaluation mode, and restore the flags and the random states after it."""
    device = torch.device(current_device())
    more = torch.get_device_module(device) if device.type != "cpu" else None
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    on_device = None if more is None else more.get_rng_state()
    # The flags are set directly, because some adapters merge their weights in ``eval()``.
    flags = [] if model is None else [(m, m.training) for m in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if more is not None:
            more.set_rng_state(on_device)


def logprobs(
    model: nn.Module, sequences: Sequence[Sequence[int]], device: torch.device
) -> tuple[np.ndarray, bool]:
    """Return the model's log-probabilities [N] in nats, and whether it computes in 16 bits.

    The model is run once for each sequence, so no padding is needed. Under sharding, all ranks must call it.
    Raises ValueError if the model returns no logits for the tokens."""
    kinds: set[torch.dtype] = set()
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        # Its root keeps whole weights after a pass without gradients, and would train with them after the step.
        raise ValueError("the model is sharded by FSDP1; use FSDP2 (fully_shard)")

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            kinds.add(output.dtype)

    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    parts = []
    try:
        with undisturbed(model):
            for sequence in sequences:
                ids = torch.tensor([list(sequence)], device=device)
                logits = logits_in(model(ids, **options))
                if logits is None:
                    raise ValueError("the model returns no logits")
                parts.append(_of_next(whole(logits), ids[0]))
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            # FSDP2 keeps the root's whole weights until a backward pass. The next forward pass would use them,
            # although the optimizer has changed the shards.
            reshard: Any = getattr(module, "reshard", None)
            if callable(reshard) and hasattr(module, "unshard"):
                reshard()
    is_narrow = bool(kinds & set(NARROW)) or rounds_products()
    return np.concatenate(parts), is_narrow


def _of_next(logits: Tensor, ids: Tensor) -> np.ndarray:
    """Return log p of ids [T], without the first, for logits [1, T, V] or [T, V]."""
    lines = logits.reshape(-1, logits.shape[-1])
    if len(lines) != len(ids):
        raise ValueError(f"the model returns {len(lines)} logits for {len(ids)} tokens")
    parts = [
        part.float().log_softmax(-1).gather(1, want[:, None])[:, 0].double().cpu()
        for part, want in in_pieces(lines[:-1], ids[1:])
    ]
    return torch.cat(parts).numpy()


class Rounding:
    """Samples entries of the trainable float32 parameters, to see how much of a change survives bfloat16.

    A model that was loaded from a bfloat16 file has weights that are exactly on bfloat16's grid. A change of
    less than half a unit then does not reach a bfloat16 engine at all, although its weights are the newest.
    An adapter may be merged into the weights before they are sent, so merged entries are sampled as well."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(SEED)
        mine = [
            p for p in model.parameters() if p.requires_grad and p.is_floating_point() and local(p).numel()
        ]
        self.is_narrow = bool(mine) and all(p.dtype in NARROW for p in mine)
        stride = -(-len(mine) // TENSORS) or 1
        self.chosen = [
            (p, torch.randint(local(p).numel(), (ENTRIES,), generator=generator)) for p in mine[::stride]
        ]
        layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
        self.merged = []
        for layer in layers[:: -(-len(layers) // TENSORS) or 1]:
            weight = getattr(layer.base_layer, "weight", None)
            if type(weight) is nn.Parameter and weight.dim() == 2 and weight.is_floating_point():
                places = [torch.randint(n, (ENTRIES,), generator=generator) for n in weight.shape]
                self.merged.append((layer, weight, places))

        sizes = [local(p).numel() / ENTRIES for p, _ in self.chosen]
        self.weights = torch.tensor(sizes).double().repeat_interleave(ENTRIES)

    @torch.no_grad()
    def read(self) -> tuple[Tensor, Tensor]:
        """Return the sampled entries of the parameters, and of merged weights, in float64 on the CPU."""
        own = [local(p).flatten()[at.to(p.device)].double().cpu() for p, at in self.chosen]
        merged = [part for one in self.merged if (part := _merged(*one)) is not None]
        return tuple(torch.cat(x) if x else torch.zeros(0).double() for x in (own, merged))  # type: ignore[return-value]

    def kept(
        self, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], *, is_narrow: bool = False
    ) -> float:
        """Return the share (0 to 1) of the change that is left after rounding to bfloat16.

        If ``is_narrow``, the trainer rounds its weights as well. Its change may then be larger than the true
        one, which an engine in float32 shows, and the share is at most true change / rounded change. At 0.5 it
        ends, because errors of single weights mostly cancel in a log-probability."""
        shares = [1.0]
        for (old, new), is_own in zip(zip(before, after, strict=True), (True, False), strict=True):
            change = new - old
            if not bool(change.any()) or (is_own and self.is_narrow):
                continue
            left = new.to(torch.bfloat16).double() - old.to(torch.bfloat16).double()
            counted = change * self.weights if is_own else change
            shares.append(float(left @ counted / (change @ counted)))
            if is_narrow and bool(left.any()):
                rounded = left * self.weights if is_own else left
                shares.append(max(0.5, float(change @ rounded / (left @ rounded))))
        return max(0.0, min(shares))


def _merged(layer: Any, weight: Tensor, places: Sequence[Tensor]) -> Tensor | None:
    """Return entries of W + s·BA, or None if this is not how the layer works."""
    total = weight[places[0].to(weight.device), places[1].to(weight.device)].double().cpu()
    for name, down in layer.lora_A.items():
        first, second = getattr(down, "weight", None), getattr(layer.lora_B[name], "weight", None)
        if type(first) is not nn.Parameter or type(second) is not nn.Parameter:
            return None
        if (second.shape[0], first.shape[1]) != tuple(weight.shape):
            return None
        rows, columns = second[places[0].to(second.device)], first[:, places[1].to(first.device)]
        total += float(layer.scaling[name]) * (rows.double() * columns.T.double()).sum(1).cpu()
    return total
