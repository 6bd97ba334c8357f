"""The memory of one training step of a model of any size, measured without data: all tensors are fake, so they have
shapes and are freed as in a real step, but take no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from truestep.doctor.allocations import Watched
from truestep.model import attention
from truestep.model.load import LoadedModel, model_shape
from truestep.model.lora import install
from truestep.model.tiny import tiny_tokenizer
from truestep.records import Origin, TrainSequence
from truestep.settings import OptimizerSettings
from truestep.stage_settings import LoraSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import pack
from truestep.train.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and how. ``lengths`` are those of the sequences of one micro-batch, in tokens of the forward pass."""

    config: Mapping[str, Any]
    lengths: Sequence[int]
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool | Literal["selective"] = True
    lora: LoraSettings | None = None
    offload: bool = False


def rows(lengths: Sequence[int]) -> list[TrainSequence]:
    return [
        TrainSequence(
            token_ids=(7,) * (n + 1), origin=(Origin.CONTEXT, *(Origin.EXPERT,) * n), num_prefix_tokens=0, group=i
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip


def step_memory(case: Case) -> dict[str, float]:
    """Return the bytes of weights, of the optimizer's tensors on the device and on the host, and at the peak of a second
    micro-batch, whose gradients are added to those of the first."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**case.config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(made, dtype=case.dtype, trust_remote_code=False)
        attention.register()  # the rest of ``prepare`` moves the model, which fake tensors cannot
        model.train()
        if case.lora is not None:
            install(model, case.lora, 0)
        loaded = LoadedModel(
            model=model, tokenizer=tiny_tokenizer(), shape=model_shape(model), context_length=1 << 20
        )
        policy = Policy(loaded, gradient_checkpointing=case.checkpointing, is_empty=True)
        optimizer = MasterOptimizer(policy, OptimizerSettings(lr=1e-6), offload=case.offload)
        masters = list(optimizer.masters.values())
        moments = [torch.zeros_like(master) for master in masters for _ in range(2)]
        weights = {id(p): p for p in policy.parameters()}
        own = [t for t in (*masters, *moments) if id(t) not in weights]
        on_host = own if case.offload else []
        resident = [*weights.values(), *policy.buffers(), *([] if case.offload else own)]
        wide = torch.promote_types(case.dtype, torch.float32)
        (batch,) = pack(rows(case.lengths), tokens_per_microbatch=sum(case.lengths), dtype=wide)
        with Watched(tuple(resident)) as watched:
            for _ in range(2):
                logprobs, _ = policy(batch, 1.0)
                logprobs.sum().backward()
                del logprobs
    return {
        "weights": float(sum(p.nbytes for p in weights.values())),
        "optimizer": float(0 if case.offload else sum(t.nbytes for t in own)),
        "host": float(sum(t.nbytes for t in on_host)),
        "peak": float(watched.peak),
    }
