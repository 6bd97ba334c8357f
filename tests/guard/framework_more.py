"""Loops with a user's own model, compiled models, gradient scalers and other optimizers for ``framework_run``."""

from __future__ import annotations

from typing import Any

import torch
from framework_loops import ACCUMULATION, STEPS, adam, fsdp2, logits_of, train
from framework_run import Run, llama, loop, steps_of, token_sum, trained
from torch import nn


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


@loop(verdict="FAULT", code="kept")
def checkpointing_drops(run: Run) -> Any:
    return train(run, Own(checkpoint=True), forward=own, drops=True)


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


@loop(slow=True)
def compiled(run: Run) -> Any:
    return train(run, torch.compile(llama(), backend="aot_eager"))


@loop(sees_tokens=False)
def compiled_in_place(run: Run) -> Any:
    model = Own()
    model.compile(backend="aot_eager")
    return train(run, model, forward=own)


@loop(slow=True)
def compiled_inductor(run: Run) -> Any:
    return train(run, torch.compile(Own()), forward=own)


@loop(slow=True)
def compiled_blocks(run: Run) -> Any:
    model = llama()
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    return train(run, model)


@loop(verdict="FAULT", code="kept")
def compiled_drops(run: Run) -> Any:
    return train(run, torch.compile(Own(), backend="aot_eager"), forward=own, drops=True)


@loop(ranks=2, slow=True)
def compiled_ddp(run: Run) -> Any:
    return train(
        run, torch.compile(nn.parallel.DistributedDataParallel(Own()), backend="aot_eager"), forward=own
    )


@loop(ranks=2, verdict="NOT OBSERVABLE", slow=True)
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


@loop()
def fused_head(run: Run, is_mean: bool = False) -> Any:
    def loss(model: Any, m: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model.model(input_ids=m["input_ids"], attention_mask=m["attention_mask"], use_cache=False)[0]
        labels = m["labels"][:, 1:]
        total = _HeadLoss.apply(hidden[:, :-1], model.lm_head.weight, labels)
        return total / (labels != -100).sum() if is_mean else total

    return train(run, llama(), loss=loss)


@loop(verdict="FAULT", code="micro_mean")
def fused_head_mean(run: Run) -> Any:
    """The mean of each micro-batch, as if all had as many tokens."""
    return fused_head(run, is_mean=True)


@loop(verdict="NOT OBSERVABLE", dtype="bfloat16")
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


@loop(verdict="NOT OBSERVABLE", dtype="bfloat16")
def master_copies_kept(run: Run) -> Any:
    return master_copies(run, keeps=True)


@loop(verdict="FAULT", code="stale_parameters momentum")
def stale_copies(run: Run, dtype: torch.dtype = torch.float32) -> Any:
    """The optimizer has copies whose values never come back, and the model's gradients are not cleared."""
    model = llama().to(dtype)
    copies = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    return train(run, model, torch.optim.AdamW(copies, lr=1e-3))


@loop(verdict="FAULT", code="stale_parameters", at=2)
def stale_copies_bf16(run: Run) -> Any:
    """As above; in the first step, the values could still come back."""
    return stale_copies(run, torch.bfloat16)


def _skipped(run: Run, optimizer_of: Any, bad: float, unscales: bool) -> Any:
    """Train with a gradient scaler; the second step has a gradient that is not finite, so it is skipped."""
    model, scaler = llama(), torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    optimizer = optimizer_of(model)
    with run.watch(model, optimizer) as guard:
        for number, micro in enumerate(steps_of(run, STEPS + 1, ACCUMULATION)):
            count = trained(run, micro)
            for m in micro:
                scaler.scale(token_sum(logits_of(model, m), m["labels"]) / count).backward()
            if number == 1:
                run.notes["tokens"].pop()
                model.lm_head.weight.grad[0, 0] = bad
            if unscales:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            guard.step()
            optimizer.zero_grad()
    return list(model.parameters())


@loop(scale=[256, 128, 128, 128])
def scaler_skips(run: Run) -> Any:
    return _skipped(run, adam, float("inf"), unscales=True)


@loop(scale=[256, 128, 128, 128])
def scaler_skips_scaled(run: Run) -> Any:
    """The scaler unscales within its step."""
    return _skipped(run, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), float("nan"), unscales=False)
