"""What the guard reads from the model and the optimizer that it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from truestep.guard.update import Moved
from truestep.guard.used import is_deepspeed


def unwrapped_models(model: Any) -> list[nn.Module]:
    """Return the model's wrappers, the outermost first, and then the model."""
    chain = [model]
    while True:
        last = chain[-1]
        is_wrapper = is_deepspeed(last) or isinstance(last, torch.nn.parallel.DistributedDataParallel)
        inner = last.module if is_wrapper else last._modules.get("_orig_mod")
        if not isinstance(inner, nn.Module):
            return chain
        chain.append(inner)


def has_copies(moved: Moved) -> bool:
    """Return whether the optimizer has copies in float32 in place of parameters in 16 bits."""
    mine, given = {id(p) for _, p in moved.named}, [p for group in moved.groups for p in group["params"]]
    lacks = {id(p) for _, p in moved.named if p.element_size() == 2} - {id(p) for p in given}
    return bool(lacks) and any(id(p) not in mine and p.element_size() > 2 for p in given)


def stop_ids(model: nn.Module) -> tuple[int, ...]:
    """Return the tokens that end an answer, from the model's own settings."""
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()


def rounds_products() -> bool:
    """Return whether float32 products are rounded to a shorter format."""
    return bool(torch.get_float32_matmul_precision() != "highest")
