"""Loops of FSDP1 (``FullyShardedDataParallel``) for ``framework_run``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from framework_loops import train
from framework_run import Run, digest, llama, loop


def fsdp1(run: Run, original: bool, blocks: bool = True, accumulates: bool = False, options: Any = None,
          **more: Any) -> Any:  # fmt: skip
    """With ``original``, each module keeps views of its own weights (``use_orig_params``)."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    how = {"device_id": torch.device("cpu"), "use_orig_params": original, **(options or {})}
    how["auto_wrap_policy"] = ModuleWrapPolicy({LlamaDecoderLayer}) if blocks else None
    model = FullyShardedDataParallel(llama(), **how)

    def sync(last: bool) -> Any:
        return model.no_sync() if accumulates and not last else contextlib.nullcontext()

    train(run, model, sync=sync, **more)
    with FullyShardedDataParallel.summon_full_params(model):
        return digest([p.detach().clone() for p in model.parameters()])


@loop(ranks=2)
def fsdp1_original(run: Run) -> Any:
    return fsdp1(run, True)


@loop(ranks=2)
def fsdp1_flat(run: Run) -> Any:
    return fsdp1(run, False)


@loop(ranks=2)
def fsdp1_root(run: Run) -> Any:
    return fsdp1(run, False, blocks=False)


@loop(ranks=2)
def fsdp1_accumulates(run: Run) -> Any:
    return fsdp1(run, True, accumulates=True)


@loop(ranks=2)
def fsdp1_gradients_only(run: Run) -> Any:
    from torch.distributed.fsdp import ShardingStrategy

    return fsdp1(run, True, options={"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP})


@loop(ranks=2)
def fsdp1_unsharded(run: Run) -> Any:
    from torch.distributed.fsdp import ShardingStrategy

    return fsdp1(run, True, options={"sharding_strategy": ShardingStrategy.NO_SHARD})


@loop(ranks=2, dtype="bfloat16")
def fsdp1_bf16(run: Run) -> Any:
    from torch.distributed.fsdp import MixedPrecision

    narrow = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp1(run, True, accumulates=True, options={"mixed_precision": narrow})


@loop(ranks=2, verdict="FAULT", code="kept")
def fsdp1_drops(run: Run) -> Any:
    return fsdp1(run, True, drops=True)


@loop(ranks=2, verdict="FAULT", code="kept")
def fsdp1_flat_drops(run: Run) -> Any:
    return fsdp1(run, False, drops=True)
