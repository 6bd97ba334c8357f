"""Twenty training steps that are not faulty: ten means over all trained tokens, ten other objectives.

Each is written as people write it. None depends on how the rows are split, ordered, padded or packed.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

IGNORE = -100
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
averages: Any = weakref.WeakKeyDictionary()
references: Any = weakref.WeakKeyDictionary()


def trained_tokens(microbatches: Any) -> Any:
    return sum((m["labels"][:, 1:] != IGNORE).sum() for m in microbatches)


def hf_num_items_in_batch(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Pads the labels by one instead of cutting the logits, and divides by num_items_in_batch."""
    shifted = [F.pad(m["labels"], (0, 1), value=IGNORE)[..., 1:].contiguous() for m in microbatches]
    num_items_in_batch = torch.stack([s.ne(IGNORE).sum() for s in shifted]).sum()
    for inputs, shift_labels in zip(microbatches, shifted, strict=True):
        model.train()
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).float()
        logits, shift_labels = logits.view(-1, logits.size(-1)), shift_labels.view(-1)
        loss = F.cross_entropy(logits, shift_labels, ignore_index=IGNORE, reduction="sum")
        loss = loss / num_items_in_batch
        loss.backward()
    optimizer.step()
    model.zero_grad()


def scaled_autocast(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Trains under bfloat16 autocast with a GradScaler that is kept over the calls."""
    optimizer.zero_grad(set_to_none=True)
    ntokens = trained_tokens(microbatches)
    for batch in microbatches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch["input_ids"])
        loss = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], reduction="sum"
        )
        scaler.scale(loss / ntokens).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def closure_step(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Passes a closure to optimizer.step(), as one does for LBFGS; the closure computes all gradients."""
    n = trained_tokens(microbatches).item()

    def closure() -> float:
        optimizer.zero_grad()
        running = 0.0
        for m in microbatches:
            out = model(m["input_ids"])
            loss = F.nll_loss(
                out[:, :-1].log_softmax(-1).flatten(0, 1), m["labels"][:, 1:].flatten(), reduction="sum"
            )
            (loss / n).backward()
            running += loss.item() / n
        return running

    optimizer.step(closure)
    optimizer.zero_grad()


def vmap_rows(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Computes one gradient per row with vmap(grad(functional_call)) and adds them up."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def row_loss(params: Any, ids: Any, labels: Any) -> Any:
        logits = functional_call(model, params, (ids.unsqueeze(0),)).squeeze(0)
        keep = labels[1:] != IGNORE
        logp = logits[:-1].log_softmax(-1).gather(-1, labels[1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return -(logp * keep).sum()

    total = trained_tokens(microbatches)
    summed = {name: torch.zeros_like(p) for name, p in params.items()}
    for m in microbatches:
        per_row = vmap(grad(row_loss), in_dims=(None, 0, 0))(params, m["input_ids"], m["labels"])
        for name, g in per_row.items():
            summed[name] += g.sum(0)
    for name, p in model.named_parameters():
        p.grad = summed[name] / total
    optimizer.step()
    optimizer.zero_grad()


def packed_positions(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Packs all rows, without padding, into one sequence whose positions restart; no label crosses rows."""
    ids, labels, positions = [], [], []
    for m in microbatches:
        for row, target, mask in zip(m["input_ids"], m["labels"], m["attention_mask"].bool(), strict=True):
            ids.append(row[mask])
            target = target[mask].clone()
            target[0] = IGNORE  # the last token of the row before would predict it
            labels.append(target)
            positions.append(torch.arange(len(ids[-1])))
    logits = model(input_ids=torch.cat(ids)[None], position_ids=torch.cat(positions)[None])
    loss = F.cross_entropy(logits[0, :-1], torch.cat(labels)[1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def left_padded_by_length(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Sorts the rows by length and trains them in pairs that are padded on the left."""
    rows = []
    for m in microbatches:
        for ids, labels, mask in zip(m["input_ids"], m["labels"], m["attention_mask"].bool(), strict=True):
            labels = labels[mask].clone()
            labels[0] = IGNORE
            rows.append((ids[mask], labels))
    rows.sort(key=lambda row: len(row[0]), reverse=True)
    denominator = sum(int((labels != IGNORE).sum()) for _, labels in rows)
    for i in range(0, len(rows), 2):
        longest = max(len(ids) for ids, _ in rows[i : i + 2])
        ids = torch.stack([F.pad(x, (longest - len(x), 0)) for x, _ in rows[i : i + 2]])
        labels = torch.stack([F.pad(y, (longest - len(y), 0), value=IGNORE) for _, y in rows[i : i + 2]])
        logits = model(input_ids=ids, attention_mask=(ids != 0).long())[:, :-1]
        loss = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
        )
        loss.div(denominator).backward()
    optimizer.step()
    optimizer.zero_grad()


def checkpointed_with_ema(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Recomputes the model in the backward pass, and updates an average of the weights after the step."""
    if model not in averages:
        averages[model] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    ntok = trained_tokens(microbatches)
    for m in microbatches:
        logits = checkpoint(lambda ids: model(input_ids=ids), m["input_ids"], use_reentrant=False)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), m["labels"][:, 1:].flatten(), reduction="sum")
        (loss / ntok).backward()
    optimizer.step()
    averages[model].update_parameters(model)
    optimizer.zero_grad()


def main_grads_by_hooks(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Moves every gradient into a float64 buffer as soon as it is there (Megatron's main_grad)."""
    main_grads = {p: torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()}

    def collect(p: Any) -> None:
        main_grads[p] += p.grad
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(collect) for p in main_grads]
    num_tokens = 0
    for m in microbatches:
        targets = m["labels"][:, 1:]
        logits = model(m["input_ids"])[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        num_tokens += int((targets != IGNORE).sum())
    for handle in handles:
        handle.remove()
    for p, buffer in main_grads.items():
        p.grad = (buffer / num_tokens).to(p.dtype)
    optimizer.step()
    optimizer.zero_grad()


def chunked_logits(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Computes the loss in chunks of eight positions on detached logits, then continues with their gradient."""
    total = trained_tokens(microbatches)
    for m in microbatches:
        logits = model(input_ids=m["input_ids"], attention_mask=m["attention_mask"])
        cut = logits.detach().requires_grad_()
        labels = F.pad(m["labels"][:, 1:], (0, 1), value=IGNORE)
        for piece, target in zip(cut.split(8, dim=1), labels.split(8, dim=1), strict=True):
            loss = F.cross_entropy(piece.flatten(0, 1), target.flatten(), reduction="sum") / total
            loss.backward()
        logits.backward(cut.grad)
    optimizer.step()
    optimizer.zero_grad()


def labels_in_place(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Gathers log-probabilities; the labels are clamped in place, after the mask has been taken."""
    count, summed = 0, 0.0
    for m in microbatches:
        labels = m["labels"][:, 1:]
        mask = labels != IGNORE
        labels.clamp_(min=0)  # gather does not take -100
        logp = torch.log_softmax(model(input_ids=m["input_ids"])[:, :-1], dim=-1)
        chosen = torch.gather(logp, 2, labels.unsqueeze(2)).squeeze(2)
        summed = summed - (chosen * mask).sum()
        count += mask.sum()
    loss = summed / count
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# Other objectives, which do not depend on how the rows are split either.


def z_loss(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Adds PaLM's z-loss of the trained positions to the mean over all trained tokens."""
    total = trained_tokens(microbatches)
    for m in microbatches:
        logits, labels = model(m["input_ids"])[:, :-1].flatten(0, 1), m["labels"][:, 1:].flatten()
        kept = labels != IGNORE
        ce = F.cross_entropy(logits, labels, reduction="sum")
        z = torch.logsumexp(logits[kept], dim=-1).pow(2).sum()
        ((ce + 1e-3 * z) / total).backward()
    optimizer.step()
    optimizer.zero_grad()


def dft(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Dynamic fine-tuning: every token's loss is multiplied by its detached probability."""
    total = trained_tokens(microbatches)
    for m in microbatches:
        logits = model(input_ids=m["input_ids"])[:, :-1]
        ce = F.cross_entropy(logits.transpose(1, 2), m["labels"][:, 1:], reduction="none")
        ce = ce * torch.exp(-ce.detach())  # zero at ignored positions, as ce is
        (ce.sum() / total).backward()
    optimizer.step()
    optimizer.zero_grad()


def sequence_mean(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Takes the mean of each row first, then the mean over the step's rows that have trained tokens."""
    rows = sum((m["labels"][:, 1:] != IGNORE).any(1).sum() for m in microbatches)
    for m in microbatches:
        labels = m["labels"][:, 1:]
        mask = (labels != IGNORE).float()
        logits = model(m["input_ids"], attention_mask=m["attention_mask"])[:, :-1]
        per_token = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        per_row = (per_token * mask).sum(1) / mask.sum(1).clamp(min=1)
        (per_row.sum() / rows).backward()
    optimizer.step()
    optimizer.zero_grad()


def per_real_token(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Divides by all tokens that are not padding, prompts too: the same factor however the rows are split."""
    tokens = sum(m["attention_mask"].sum() for m in microbatches)
    for m in microbatches:
        logits = model(input_ids=m["input_ids"], attention_mask=m["attention_mask"])
        loss = F.cross_entropy(
            logits[:, :-1].reshape(-1, logits.size(-1)), m["labels"][:, 1:].reshape(-1), reduction="sum"
        )
        (loss / tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def class_weights(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Weights every token by its id and divides once by the sum of the step's weights."""
    losses, norm = [], 0.0
    for m in microbatches:
        logits, labels = model(m["input_ids"])[:, :-1].flatten(0, 1), m["labels"][:, 1:].flatten()
        weight = torch.linspace(0.5, 1.5, logits.shape[-1])
        losses.append(F.cross_entropy(logits, labels, weight=weight, reduction="sum"))
        norm += weight[labels[labels != IGNORE]].sum()
    (torch.stack(losses).sum() / norm).backward()
    optimizer.step()
    optimizer.zero_grad()


def kl_to_reference(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Adds the KL divergence to a frozen copy of the model, which is made at the first call and kept."""
    if model not in references:
        references[model] = copy.deepcopy(model).eval().requires_grad_(False)
    total = trained_tokens(microbatches)
    for m in microbatches:
        kept = m["labels"][:, 1:] != IGNORE
        with torch.no_grad():
            ref = references[model](m["input_ids"])[:, :-1][kept].log_softmax(-1)
        logp = model(m["input_ids"])[:, :-1][kept].log_softmax(-1)
        nll = -logp.gather(1, m["labels"][:, 1:][kept][:, None]).sum()
        kl = (logp.exp() * (logp - ref)).sum()
        ((nll + 0.5 * kl) / total).backward()
    optimizer.step()
    optimizer.zero_grad()


def frozen_groups_warmup_clip(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Freezes the embedding, doubles the rate of the biases, warms the rate up, clips once by the global norm."""
    if len(optimizer.param_groups) == 1:
        named, group = dict(model.named_parameters()), optimizer.param_groups[0]
        for name, p in named.items():
            p.requires_grad_("embed" not in name)
        group["params"] = [p for name, p in named.items() if not name.endswith("bias")]
        biases = [p for name, p in named.items() if name.endswith("bias")]
        optimizer.add_param_group({"params": biases, "lr": 2 * group["lr"]})
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["calls"] = group.get("calls", 0) + 1
        group["lr"] = group["initial_lr"] * min(1.0, group["calls"] / 3)
    total = trained_tokens(microbatches)
    for m in microbatches:
        logits, labels = model(m["input_ids"])[:, :-1].flatten(0, 1), m["labels"][:, 1:].flatten()
        (F.cross_entropy(logits, labels, reduction="sum") / total).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
    optimizer.step()
    optimizer.zero_grad()


def low_rank_adapter(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Adds a low-rank term, zero at first, to the logits; its parameters are a second group of the optimizer."""
    if len(optimizer.param_groups) == 1:
        with torch.no_grad():
            vocabulary = model(microbatches[0]["input_ids"][:1]).shape[-1]
        with torch.random.fork_rng():
            down = torch.nn.Parameter(torch.randn(vocabulary, 4) / 4)
        up = torch.nn.Parameter(torch.zeros(4, vocabulary))
        optimizer.add_param_group({"params": [down, up], "lr": 0.1})
    down, up = optimizer.param_groups[1]["params"]
    total = trained_tokens(microbatches)
    for m in microbatches:
        logits = model(m["input_ids"]) + down[m["input_ids"]] @ up
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), m["labels"][:, 1:].flatten(), reduction="sum")
        (loss / total).backward()
    optimizer.step()
    optimizer.zero_grad()


def bfloat16_by_hand(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Computes with bfloat16 copies of the float32 weights; the gradients reach the float32 weights."""
    total = trained_tokens(microbatches)
    half = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
    summed = 0.0
    for m in microbatches:
        logits = functional_call(model, half, (), {"input_ids": m["input_ids"]}).float()
        summed += F.cross_entropy(logits[:, :-1].transpose(1, 2), m["labels"][:, 1:], reduction="sum")
    (summed / total).backward()
    optimizer.step()
    optimizer.zero_grad()


def sharpness_aware(model: Any, optimizer: Any, microbatches: Any) -> None:
    """SAM: the whole step's gradient moves the weights uphill, the gradient there is applied to the old weights."""

    def backward() -> None:
        total = trained_tokens(microbatches)
        for m in microbatches:
            logits, labels = model(m["input_ids"])[:, :-1].flatten(0, 1), m["labels"][:, 1:].flatten()
            (F.cross_entropy(logits, labels, reduction="sum") / total).backward()

    backward()
    params = [p for p in model.parameters() if p.grad is not None]
    old = [p.detach().clone() for p in params]
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    with torch.no_grad():
        for p in params:
            p += 0.05 * p.grad / norm
    optimizer.zero_grad()
    backward()
    with torch.no_grad():
        for p, before in zip(params, old, strict=True):
            p.copy_(before)
    optimizer.step()
    optimizer.zero_grad()
