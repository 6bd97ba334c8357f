"""The forward pass over one flat row of tokens, and the check that packing does not change its result.

Shapes: N flat tokens, D hidden size, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from truestep.errors import UserError
from truestep.model.attention import IMPLEMENTATION, Layout, PackedLayout
from truestep.records import Segment
from truestep.seeding import Purpose, generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest relative difference between packed and separate hidden states: ten times the measured noise.
PACKING_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def decoder_layers(model: PreTrainedModel) -> Sequence[torch.nn.Module]:
    """Return the model's decoder layers. Raises UserError if no known attribute contains them."""
    for name in ("layers", "h", "blocks"):
        if isinstance(found := getattr(model.base_model, name, None), torch.nn.ModuleList):
            return list(found)
    remedy = 'set compute.compile = false and compute.parallel = "ddp"'
    raise UserError(f"{type(model).__name__} has no list of layers; {remedy}")


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """Return the last hidden states [N, D] of a packed row. Raises RuntimeError if packed attention is off,
    because the layout would be ignored, and the sequences in the row would see each other."""
    if model.config._attn_implementation != IMPLEMENTATION:
        raise RuntimeError(
            f"packed attention is not installed; the model uses {model.config._attn_implementation!r}"
        )
    rows = {"input_ids": input_ids[None], "position_ids": position_ids[None]}
    return model.base_model(**rows, use_cache=False, layout=layout).last_hidden_state[0]


def whole_logits_of(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: Layout, wanted: Tensor
) -> Tensor:
    """Return the logits [M, V] at the M ``wanted`` places of a packed row, as the model's own head makes them."""
    rows = {"input_ids": input_ids[None], "position_ids": position_ids[None], "logits_to_keep": wanted}
    logits: Tensor = model(**rows, use_cache=False, layout=layout).logits[0]
    return logits


def hidden_states_by_segment(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, segments: Sequence[Segment]
) -> Tensor:
    """Return the same as ``hidden_states`` for a model that cannot be packed. Each segment runs separately,
    after its prefix, which is slow."""

    def run(ids: Tensor, positions: Tensor) -> Tensor:
        out = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden

    return _by_segment(run, input_ids, position_ids, segments)


def whole_logits_by_segment(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, segments: Sequence[Segment]
) -> Tensor:
    """Return the logits [N, V] of a model that cannot be packed."""

    def run(ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits

    return _by_segment(run, input_ids, position_ids, segments)


def _by_segment(
    run: Callable[[Tensor, Tensor], Tensor],
    input_ids: Tensor,
    position_ids: Tensor,
    segments: Sequence[Segment],
) -> Tensor:
    pieces = []
    for s in segments:
        prefix, own = slice(s.prefix_start, s.prefix_stop), slice(s.start, s.stop)
        ids, positions = (torch.cat([row[prefix], row[own]])[None] for row in (input_ids, position_ids))
        pieces.append(run(ids, positions)[0, s.prefix_stop - s.prefix_start :])
    return torch.cat(pieces)


def install_packing(model: PreTrainedModel, *, whole_logits: bool = False) -> str:
    """Switch on packed attention if it does not change the hidden states (or the logits). Returns "" or why it stays
    off.

    To check this, three random sequences, two of them with a shared prefix, are run packed and one by one."""
    plain = model.config._attn_implementation
    table = model.get_input_embeddings().weight
    device = table.device
    ids = torch.from_numpy(generator(0, Purpose.PROBE).integers(0, table.shape[0], 17)).to(device)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4], device=device)
    segments = (
        Segment(start=0, stop=4),
        Segment(start=4, stop=7, prefix_stop=4),
        Segment(start=7, stop=12, prefix_stop=4),
        Segment(start=12, stop=17),
    )
    rows, one_by_one = (
        (model, ids, positions),
        whole_logits_by_segment if whole_logits else hidden_states_by_segment,
    )
    with torch.no_grad():
        expected = one_by_one(*rows, segments)
        try:
            model.set_attn_implementation(IMPLEMENTATION)
            layout = PackedLayout(segments, positions)
            got = hidden_states(*rows, layout)
            if whole_logits:
                got = whole_logits_of(*rows, layout, torch.arange(len(ids), device=device))
        except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            difference = float((got - expected).norm() / expected.norm())
            limit = PACKING_TOLERANCE[expected.dtype]
            fault = f"packed sequences differ by {difference:.1e} (limit {limit:.0e})"
            reason = "" if difference <= limit else fault
    if reason:
        model.set_attn_implementation(plain)
    return reason
