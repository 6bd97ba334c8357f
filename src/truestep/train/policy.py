"""The trained model as one module, which maps a micro-batch to per-token log-probabilities and entropies.

FSDP wraps this module as the root, so that no hook is bypassed.
Shapes: N tokens in the forward pass, M trained tokens, D hidden size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from truestep.model import forward
from truestep.model.attention import PackedLayout
from truestep.model.host_copies import HostCopies
from truestep.model.load import LoadedModel
from truestep.model.lora import head_adapter
from truestep.model.select import without_frozen
from truestep.objective.logprobs import chunked_logprobs, logprobs_from_logits
from truestep.records import Segment, TokenBatch

# Selective checkpointing keeps these results for the backward pass: they take long to compute. The rest of a
# layer (norms, rotations, activations) is more than half of its memory and quick to recompute.
_ATTENTION = [f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")]
_SLOW = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu", *_ATTENTION)
)


def _keep_products() -> tuple[Any, Any]:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in _SLOW else CheckpointPolicy.PREFER_RECOMPUTE

    pair: tuple[Any, Any] = create_selective_checkpoint_contexts(policy)
    return pair


class Policy(nn.Module):
    """A policy whose ``forward(batch, temperature)`` returns differentiable logprobs [M] and entropies [M].

    ``notes`` says which fast paths were refused when the model was loaded, and why. A model without data (of fake
    tensors, whose memory is measured) cannot be tested for that; it ``is_empty``, and all are taken."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        gradient_checkpointing: bool | Literal["selective"] = False,
        offload_activations: bool = False,
        compile: bool = False,
        is_empty: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.shape, self.context_length = loaded.shape, loaded.context_length
        self.notes: list[str] = []
        self.packs = self.plain_head = is_empty
        if is_empty:
            self.model.set_attn_implementation(forward.IMPLEMENTATION)
        elif loaded.weights is None:
            self.prove()
        self.saves_memory = bool(gradient_checkpointing)
        self.offloads = offload_activations
        if gradient_checkpointing is True:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        elif gradient_checkpointing and not compile:  # selective; compiled layers keep these results anyway
            self.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": _keep_products})
        if compile:
            for layer in forward.decoder_layers(self.model):
                layer.compile(dynamic=True)

    def prove(self) -> None:
        """Find the fast paths that do not change the result, and the work that frozen parameters save. For a model that was
        on the meta device, this is called after it has been filled (a collective if it is sharded)."""
        if any(p.requires_grad for p in self.parameters()):
            self.shape = without_frozen(self.model, self.shape)
        differs = self._head_differs()
        self.plain_head = not differs
        if reason := forward.install_packing(self.model, whole_logits=not self.plain_head):
            self.notes.append(f"sequences are run one by one, not packed: {reason}")
        self.packs = not reason
        if differs:
            self.notes.append(f"all logits are computed at once, not in chunks: {differs}")

    def forward(self, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor]:
        if not self.plain_head:
            return self._from_whole_logits(batch, temperature)
        rows = (self.model, batch.input_ids, batch.position_ids)
        with self._saving():
            if self.packs:
                hidden = forward.hidden_states(*rows, PackedLayout(batch.segments, batch.position_ids))
            else:
                hidden = forward.hidden_states_by_segment(*rows, _passes(batch))
        hidden, head = hidden.index_select(0, batch.source_index), self.model.get_output_embeddings()
        adapter = head_adapter(head, hidden)
        return chunked_logprobs(hidden, head.weight, head.bias, batch.target_ids, temperature, adapter)

    def _from_whole_logits(self, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor]:
        rows = (self.model, batch.input_ids, batch.position_ids)
        with self._saving():
            if self.packs:
                layout = PackedLayout(batch.segments, batch.position_ids)
                logits = forward.whole_logits_of(*rows, layout, batch.source_index)
            else:
                logits = forward.whole_logits_by_segment(*rows, _passes(batch))[batch.source_index]
        return logprobs_from_logits(logits, batch.target_ids, temperature)

    def _saving(self) -> AbstractContextManager[object]:
        return HostCopies(self.parameters()) if self.offloads else nullcontext()

    @torch.no_grad()
    def _head_differs(self) -> str:
        """Return "" if the logits are hidden states times output matrix, or why not (soft cap, scale)."""
        table = self.model.get_input_embeddings().weight
        ids, positions = torch.arange(3, 12, device=table.device), torch.arange(9, device=table.device)
        ids = ids % table.shape[0]
        hidden = forward.hidden_states_by_segment(self.model, ids, positions, (Segment(start=0, stop=9),))
        head = self.model.get_output_embeddings()
        if head is None or not isinstance(head, nn.Linear):
            return "the model has no linear output layer"
        got = torch.nn.functional.linear(hidden, head.weight, head.bias)
        expected = self.model(input_ids=ids[None], use_cache=False).logits[0].to(got.dtype)
        difference = float((got - expected).norm() / expected.norm())
        is_equal = difference <= forward.PACKING_TOLERANCE[got.dtype]
        return "" if is_equal else f"the logits are not hidden·Wᵀ ({difference:.1e})"


def _passes(batch: TokenBatch) -> tuple[Segment, ...]:
    """Return the segments that a model which cannot be packed runs one by one, and after them some that nothing reads, as
    long as other ranks have more: the collectives in sharded layers must match, forward and backward."""
    return (*batch.segments, *[Segment(start=0, stop=1)] * (batch.num_passes - len(batch.segments)))
