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


def fsdp2(
    run: Run, blocks: bool, policy: Any = None, accumulates: bool = False, compiles: bool = False
) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (run.world,))
    model = llama()
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for block in model.model.layers if blocks else ():
        fully_shard(block, **options)
    fully_shard(model, **options)
    for block in model.model.layers if compiles else ():
        block.compile(backend="aot_eager")

    @contextlib.contextmanager
    def sync(last: bool) -> Any:
        model.set_requires_gradient_sync(last or not accumulates)
        yield

    return train(run, model, sync=sync)


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


@loop()
def trainer_compiled(run: Run) -> Any:
    return hf(run, torch_compile=True, torch_compile_backend="aot_eager")


class Own(nn.Module):
    """A user's own model: blocks with a residual, one linear module used twice, tied or own output head."""

    def __init__(self, *, checkpoint: bool | None = None, tied: bool = False, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        self.ups = nn.ModuleList(nn.Linear(32, 48) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(48, 32) for _ in range(3))
        self.head = nn.Linear(32, 64, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.checkpoint, self.twice = checkpoint, twice

    def block(self, number: int, x: torch.Tensor) -> torch.Tensor:
        x = x + self.downs[number](torch.tanh(self.ups[number](x)))
        return x + self.downs[number](torch.tanh(self.ups[number](x))) if self.twice else x

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        x = self.embed(ids)
        x = x + x.cumsum(1) / 8
        for number in range(3):
            if self.checkpoint is None:
                x = self.block(number, x)
            else:
                x = checkpoint(self.block, number, x, use_reentrant=self.checkpoint)
        return x

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(input_ids))


def own(model: Any, m: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(m["input_ids"])


@loop()
def own_model(run: Run) -> Any:
    return train(run, Own(), forward=own)


@loop()
def own_checkpointing(run: Run) -> Any:
    return train(run, Own(checkpoint=False), forward=own)


@loop()
def own_checkpointing_reentrant(run: Run) -> Any:
    return train(run, Own(checkpoint=True), forward=own)


@loop()
def module_used_twice(run: Run) -> Any:
    return train(run, Own(twice=True), forward=own)


@loop()
def module_used_twice_checkpointing(run: Run) -> Any:
    return train(run, Own(twice=True, checkpoint=False), forward=own)


@loop()
def tied_embeddings(run: Run) -> Any:
    return train(run, llama(tie_word_embeddings=True))


@loop()
def several_optimizers(run: Run) -> Any:
    model = llama()
    parts = [p for p in model.parameters() if p.dim() < 2], [p for p in model.parameters() if p.dim() == 2]
    return train(
        run, model, [torch.optim.AdamW(parts[0], 1e-3), torch.optim.SGD(parts[1], 1e-1, momentum=0.9)]
    )


@loop()
def several_optimizers_reversed(run: Run) -> Any:
    """The optimizers step in another order than the guard was told."""
    model = llama()
    parts = [p for p in model.parameters() if p.dim() < 2], [p for p in model.parameters() if p.dim() == 2]
    first, second = torch.optim.AdamW(parts[0], 1e-3), torch.optim.AdamW(parts[1], 1e-3)
    guarded = run.watch
    run.watch = lambda model, optimizer: guarded(model, optimizer[::-1])  # type: ignore[method-assign]
    return train(run, model, [first, second])


@loop()
def clipped(run: Run) -> Any:
    return train(run, llama(), clip=0.1)


@loop()
def compiled(run: Run) -> Any:
    return train(run, torch.compile(llama(), backend="aot_eager"))


@loop()
def compiled_in_place(run: Run) -> Any:
    model = llama()
    model.compile(backend="aot_eager")
    return train(run, model)


@loop()
def compiled_inductor(run: Run) -> Any:
    return train(run, torch.compile(Own()), forward=own)


@loop()
def compiled_blocks(run: Run) -> Any:
    model = llama()
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    return train(run, model)


@loop(verdict="FAULT", code="kept")
def compiled_drops(run: Run) -> Any:
    return train(run, torch.compile(llama(), backend="aot_eager"), drops=True)


@loop(ranks=2)
def compiled_ddp(run: Run) -> Any:
    return train(
        run, torch.compile(nn.parallel.DistributedDataParallel(Own()), backend="aot_eager"), forward=own
    )


@loop(ranks=2)
def compiled_fsdp2(run: Run) -> Any:
    return fsdp2(run, True, compiles=True)


@loop()
def compiled_fullgraph(run: Run) -> Any:
    return train(run, torch.compile(Own(), backend="aot_eager", fullgraph=True), forward=own)


class _HeadLoss(torch.autograd.Function):
    """−Σ log p from hidden states and the head's weight; no logits reach autograd."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        kept = labels != -100
        logits = hidden[kept] @ weight.T
        target = labels[kept]
        slope = logits.softmax(-1)
        slope[torch.arange(len(target)), target] -= 1
        ctx.save_for_backward(hidden, weight, kept, slope)
        return nn.functional.cross_entropy(logits, target, reduction="sum")

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> Any:
        hidden, weight, kept, slope = ctx.saved_tensors
        to_hidden = torch.zeros_like(hidden)
        to_hidden[kept] = given[0] * slope @ weight
        return to_hidden, given[0] * slope.T @ hidden[kept], None


@loop(notes="no_logits")
def fused_head(run: Run) -> Any:
    def loss(model: Any, m: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model.model(input_ids=m["input_ids"], attention_mask=m["attention_mask"], use_cache=False)[0]
        return _HeadLoss.apply(hidden[:, :-1], model.lm_head.weight, m["labels"][:, 1:])

    return train(run, llama(), loss=loss)


@loop(verdict="unread", dtype="bfloat16")
def master_copies(run: Run, keeps: bool = False) -> Any:
    """The optimizer has float32 copies; the gradients are copied to them, and the values back."""
    model = llama().to(torch.bfloat16)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3)
    with run.watch(model, optimizer) as guard:
        for micro in steps_of(run, STEPS, ACCUMULATION):
            count = trained(run, micro)
            for m in micro:
                (token_sum(logits_of(model, m), m["labels"]) / count).backward()
            for master, p in zip(masters, model.parameters(), strict=True):
                master.grad, p.grad = p.grad.float(), p.grad if keeps else None
            optimizer.step()
            guard.step()
            with torch.no_grad():
                for master, p in zip(masters, model.parameters(), strict=True):
                    p.copy_(master)
            model.zero_grad()
    return list(model.parameters())


@loop(verdict="unread", dtype="bfloat16")
def master_copies_kept(run: Run) -> Any:
    return master_copies(run, keeps=True)


@loop()
def scaler_skips(run: Run) -> Any:
    """Step 2 has an infinite loss scale, so it is skipped."""
    model, scaler = llama(), torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    optimizer = adam(model)
    with run.watch(model, optimizer) as guard:
        for number, micro in enumerate(steps_of(run, STEPS + 1, ACCUMULATION)):
            count = trained(run, micro)
            for m in micro:
                scaler.scale(token_sum(logits_of(model, m), m["labels"]) / count).backward()
            if number == 1:
                model.lm_head.weight.grad[0, 0] = float("inf")
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            guard.step()
            optimizer.zero_grad()
    return list(model.parameters())


@loop()
def scaler_skips_scaled(run: Run) -> Any:
    """As above, but the scaler unscales within its step."""
    model, scaler = llama(), torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with run.watch(model, optimizer) as guard:
        for number, micro in enumerate(steps_of(run, STEPS + 1, ACCUMULATION)):
            count = trained(run, micro)
            for m in micro:
                scaler.scale(token_sum(logits_of(model, m), m["labels"]) / count).backward()
            if number == 1:
                model.lm_head.weight.grad[0, 0] = float("nan")
            scaler.step(optimizer)
            scaler.update()
            guard.step()
            optimizer.zero_grad()
    return list(model.parameters())
