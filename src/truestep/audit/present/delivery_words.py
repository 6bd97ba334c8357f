"""The sentences about the weights that a sampler has, as in ``words.SENTENCES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

NAMES_SHOWN = 3


def _tensors(v: Mapping[str, Any]) -> str:
    names = v["names"]
    return ", ".join(names[:NAMES_SHOWN]) + (
        f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    )


DELIVERY: dict[str, str | Callable[[Mapping[str, Any]], str]] = {
    "delivery_start": "the sampler still has the weights from before the first step: no update was sent",
    "delivery_behind": "the sampler's weights are those of one step before",
    "delivery_first": "only the first update was sent",
    "delivery_dropped": "the sampler has the base model without the adapter",
    "delivery_twice": "the adapter is merged twice",
    "delivery_part": lambda v: f"the sampler has old values of {_tensors(v)}, and new ones of all others",
    "delivery_cache": "the sampler has the new weights, but keys and values of the prompts are from old ones: the prefix "
    "cache was not reset",
    "delivery_parts_close": lambda v: f"old values of {_tensors(v)} would be within the noise",
    "delivery_nothing": "the sampler sampled nothing",
}  # fmt: skip
