"""Loops of torch, accelerate and transformers for ``framework_run``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from framework_run import Run, collate, llama, loop, rows, steps_of, token_sum, trained
from torch import nn

STEPS, ACCUMULATION = 4, 3


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def logits_of(model: Any, m: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=m["input_ids"], attention_mask=m["attention_mask"], use_cache=False).logits


def train(
    run: Run, model: Any, optimizer: Any = None, *, precision: Any = None, sync: Any = None, clip: float = 0.0,
    size: int = 1, loss: Any = None, forward: Any = None, drops: bool = False,
) -> Any:  # fmt: skip
    """Train with accumulation; ``sync(is_last)`` returns a context for the forward and backward pass. With
    ``drops``, only the last micro-batch counts."""
    optimizer = optimizer or adam(model)
    several = optimizer if isinstance(optimizer, list) else [optimizer]
    with run.watch(model, optimizer) as guard:
        for micro in steps_of(run, STEPS, ACCUMULATION, size):
            count = trained(run, micro)
            for number, m in enumerate(micro):
                if drops:
                    several[0].zero_grad()
                with sync(number == len(micro) - 1) if sync else contextlib.nullcontext():
                    with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
                        total = (
                            loss(model, m)
                            if loss
                            else token_sum((forward or logits_of)(model, m), m["labels"])
                        )
                    (total / count).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            for one in several:
                one.step()
            guard.step()
            for one in several:
                one.zero_grad()
    return list(model.parameters())


@loop()
def plain(run: Run) -> Any:
    return train(run, llama())


@loop(verdict="FAULT", code="kept")
def plain_drops(run: Run) -> Any:
    return train(run, llama(), drops=True)


@loop(verdict="FAULT", code="kept", ranks=2)
def ddp_drops(run: Run) -> Any:
    return train(run, nn.parallel.DistributedDataParallel(llama()), drops=True)


@loop(verdict="FAULT", code="kept", ranks=2)
def fsdp2_drops(run: Run) -> Any:
    return fsdp2(run, True, drops=True)


@loop()
def step_called_often(run: Run) -> Any:
    """The guard's ``step`` is called after each micro-batch."""
    model = llama()
    optimizer = adam(model)
    with run.watch(model, optimizer) as guard:
        for micro in steps_of(run, STEPS, ACCUMULATION):
            count = trained(run, micro)
            for number, m in enumerate(micro):
                (token_sum(logits_of(model, m), m["labels"]) / count).backward()
                if number == len(micro) - 1:
                    optimizer.step()
                    optimizer.zero_grad()
                guard.step()
    return list(model.parameters())


@loop(dtype="bfloat16")
def autocast(run: Run) -> Any:
    return train(run, llama(), precision=torch.bfloat16, size=2)


@loop(dtype="bfloat16")
def pure_bf16(run: Run) -> Any:
    model = llama().to(torch.bfloat16)
    return train(run, model, adam(model, 3e-2))


@loop(ranks=2)
def ddp_no_sync(run: Run) -> Any:
    model = nn.parallel.DistributedDataParallel(llama())
    return train(run, model, sync=lambda last: contextlib.nullcontext() if last else model.no_sync())


@loop(ranks=2)
def ddp_plain(run: Run) -> Any:
    return train(run, nn.parallel.DistributedDataParallel(llama(), gradient_as_bucket_view=True), clip=0.5)


def fsdp2(run: Run, blocks: bool, policy: Any = None, accumulates: bool = False, **more: Any) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (run.world,))
    model = llama()
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for block in model.model.layers if blocks else ():
        fully_shard(block, **options)
    fully_shard(model, **options)
    for block in model.model.layers if more.pop("compiles", False) else ():
        block.compile(backend="aot_eager")

    @contextlib.contextmanager
    def sync(last: bool) -> Any:
        model.set_requires_gradient_sync(last or not accumulates)
        yield

    return train(run, model, sync=sync, **more)


@loop(ranks=2)
def fsdp2_root(run: Run) -> Any:
    return fsdp2(run, False)


@loop(ranks=2)
def fsdp2_blocks(run: Run) -> Any:
    return fsdp2(run, True)


@loop(ranks=2)
def fsdp2_accumulates(run: Run) -> Any:
    return fsdp2(run, True, accumulates=True)


@loop(ranks=2, dtype="bfloat16")
def fsdp2_bf16(run: Run) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp2(run, True, policy, accumulates=True)


def accelerated(run: Run, precision: str, size: int = 1) -> Any:
    import accelerate
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=ACCUMULATION
    )
    model = llama()
    model, optimizer = accelerator.prepare(model, adam(model))
    with run.watch(model, optimizer) as guard:
        for micro in steps_of(run, STEPS, ACCUMULATION, size):
            count = trained(run, micro)
            for m in micro:
                with accelerator.accumulate(model):
                    # Accelerate divides by the number of micro-batches.
                    accelerator.backward(token_sum(logits_of(model, m), m["labels"]) / count * ACCUMULATION)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            guard.step()
    return list(model.parameters())


@loop()
def accelerate_own(run: Run) -> Any:
    return accelerated(run, "no")


@loop(dtype="bfloat16")
def accelerate_bf16(run: Run) -> Any:
    return accelerated(run, "bf16", 2)


@loop(ranks=2)
def accelerate_own_2(run: Run) -> Any:
    return accelerated(run, "no")


@loop(ranks=2, dtype="bfloat16")
def accelerate_bf16_2(run: Run) -> Any:
    return accelerated(run, "bf16")


def hf(run: Run, model: Any = None, **more: Any) -> Any:
    import transformers

    model = llama() if model is None else model
    given = {"output_dir": str(run.folder), "per_device_train_batch_size": 1, "max_steps": STEPS, "seed": 3,
             "gradient_accumulation_steps": ACCUMULATION, "learning_rate": 1e-3, "weight_decay": 0.0, "report_to": [],
             "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False,
             "use_cpu": True}  # fmt: skip
    if run.world > 1:
        given["ddp_backend"] = "gloo"
    settings = transformers.TrainingArguments(**{**given, **more})
    trainer = transformers.Trainer(
        model=model, args=settings, train_dataset=rows(72), data_collator=collate, callbacks=run.callbacks()
    )
    trainer.train()
    return list(model.parameters())


@loop()
def trainer(run: Run) -> Any:
    return hf(run)


@loop(ranks=2)
def trainer_ddp(run: Run) -> Any:
    return hf(run)


@loop()
def trainer_checkpointing(run: Run) -> Any:
    return hf(run, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})


@loop()
def trainer_checkpointing_reentrant(run: Run) -> Any:
    return hf(run, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@loop(dtype="bfloat16")
def trainer_checkpointing_bf16(run: Run) -> Any:
    return hf(run, gradient_checkpointing=True, bf16=True)


@loop(sees_tokens=False, slow=True)
def trainer_compiled(run: Run) -> Any:
    return hf(run, torch_compile=True, torch_compile_backend="aot_eager")
