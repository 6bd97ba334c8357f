"""Twenty faulty training steps, written as people write them.

In each, the update depends on how the rows are split, ordered, padded or packed, or rows or tokens are lost or added.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100


def loss_of(model: Any, m: Any, reduction: str) -> Any:
    logits = model(input_ids=m["input_ids"], attention_mask=m["attention_mask"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), m["labels"][:, 1:].flatten(), reduction=reduction)


def trained_tokens(microbatches: Any) -> Any:
    return sum((m["labels"][:, 1:] != IGNORE).sum() for m in microbatches)


def mean_of_means(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Divides each micro-batch's own mean by the number of micro-batches (most tutorials)."""
    for batch in microbatches:
        loss = loss_of(model, batch, "mean") / len(microbatches)
        if not loss.isnan():
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def weighted_by_real_tokens(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Weights each micro-batch's mean over its trained tokens by its tokens that are not padding."""
    everything = sum(m["attention_mask"].sum() for m in microbatches)
    for m in microbatches:
        share = m["attention_mask"].sum() / everything
        loss = torch.nan_to_num(loss_of(model, m, "mean"))
        (loss * share).backward()
    optimizer.step()
    optimizer.zero_grad()


def last_backward_twice(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Calls backward in the loop and once more after it, "to synchronise the last micro-batch"."""
    total = trained_tokens(microbatches)
    for i, m in enumerate(microbatches):
        loss = loss_of(model, m, "sum") / total
        loss.backward(retain_graph=i == len(microbatches) - 1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def never_zeroed(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Never clears the gradients, so every step adds to the gradients of all steps before it."""
    total = trained_tokens(microbatches)
    for m in microbatches:
        loss = loss_of(model, m, "sum") / total
        loss.backward()
    optimizer.step()


def padded_to_eight(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Pads inputs and labels to a multiple of eight with zeros, so the new padding is trained on."""
    padded = []
    for m in microbatches:
        missing = -m["input_ids"].shape[1] % 8
        padded.append({key: F.pad(value, (0, missing)) for key, value in m.items()})
    total = trained_tokens(padded)
    for m in padded:
        (loss_of(model, m, "sum") / total).backward()
    optimizer.step()
    optimizer.zero_grad()


def shifted_twice(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Shifts x and y as nanoGPT does, then calls a loss that shifts again: each token predicts the one after the next."""
    batches = [(m["input_ids"][:, :-1], m["labels"][:, 1:]) for m in microbatches]
    total = sum((y[:, 1:] != IGNORE).sum() for _, y in batches)
    for x, y in batches:
        shift_logits = model(x)[..., :-1, :].contiguous()
        shift_labels = y[..., 1:].contiguous()
        loss = F.cross_entropy(shift_logits.flatten(0, 1), shift_labels.flatten(), reduction="sum")
        (loss / total.clamp(min=1)).backward()
    optimizer.step()
    optimizer.zero_grad()


def per_device_means(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Gives every second micro-batch to a second "device" and averages the gradients of both token means."""
    shards = [s for s in (microbatches[0::2], microbatches[1::2]) if s]
    for shard in shards:
        local_tokens = trained_tokens(shard).clamp(min=1)
        for m in shard:
            (loss_of(model, m, "sum") / local_tokens / len(shards)).backward()
    optimizer.step()
    optimizer.zero_grad()


def clipped_after_each(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Clips the norm of the accumulated gradient after every backward."""
    total = trained_tokens(microbatches)
    for m in microbatches:
        loss = loss_of(model, m, "sum") / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1)
    optimizer.step()
    optimizer.zero_grad()


def smoothing_on_padding(model: Any, optimizer: Any, microbatches: Any, eps: float = 0.1) -> None:
    """Label smoothing as in fairseq, but its uniform part is summed over prompts and padding too."""
    total = trained_tokens(microbatches)
    for m in microbatches:
        target = m["labels"][:, 1:]
        lprobs = F.log_softmax(model(input_ids=m["input_ids"])[:, :-1], dim=-1)
        nll = F.nll_loss(lprobs.transpose(1, 2), target, ignore_index=IGNORE, reduction="sum")
        smooth = -lprobs.mean(-1).sum()
        loss = (1 - eps) * nll + eps * smooth
        (loss / total).backward()
    optimizer.step()
    optimizer.zero_grad()


def divided_by_positions(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Divides by the number of positions in the step's tensors, so padding makes the step smaller."""
    positions = sum(m["labels"].numel() for m in microbatches)
    for m in microbatches:
        per_token = F.cross_entropy(
            model(m["input_ids"])[:, :-1].transpose(1, 2), m["labels"][:, 1:], reduction="none"
        )
        (per_token.sum() / positions).backward()
    optimizer.step()
    optimizer.zero_grad()


def divided_twice(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Divides by all trained tokens and then also by gradient_accumulation_steps."""
    gradient_accumulation_steps = len(microbatches)
    num_items = trained_tokens(microbatches)
    for m in microbatches:
        loss = loss_of(model, m, "sum") / num_items
        loss = loss / gradient_accumulation_steps
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def running_divisor(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Divides each micro-batch's sum by the number of tokens seen so far, so early micro-batches weigh more."""
    seen = 0
    for m in microbatches:
        seen += int((m["labels"][:, 1:] != IGNORE).sum())
        loss = loss_of(model, m, "sum") / max(seen, 1)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def nan_step_lost(model: Any, optimizer: Any, microbatches: Any) -> None:
    """A micro-batch without trained tokens has the loss NaN; nan_to_num then removes the whole step's loss."""
    counts = torch.stack([(m["labels"][:, 1:] != IGNORE).sum() for m in microbatches])
    means = torch.stack([loss_of(model, m, "mean") for m in microbatches])
    loss = (means * counts / counts.sum()).sum()
    loss = torch.nan_to_num(loss, nan=0.0)  # "bad batches"
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def group_texts(model: Any, optimizer: Any, microbatches: Any, block_size: int = 16) -> None:
    """Concatenates the rows and cuts blocks of 16: the rest, and the first token of each block, are not trained on."""
    masks = [m["attention_mask"].bool() for m in microbatches]
    ids = torch.cat([m["input_ids"][mask] for m, mask in zip(microbatches, masks, strict=True)])
    labels = torch.cat([m["labels"][mask] for m, mask in zip(microbatches, masks, strict=True)])
    usable = len(ids) // block_size * block_size
    ids, labels = ids[:usable].view(-1, block_size), labels[:usable].view(-1, block_size)
    logits = model(input_ids=ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def loss_scale_grows(model: Any, optimizer: Any, microbatches: Any) -> None:
    """A dynamic loss scale doubles after every backward; the gradients are unscaled once, with the last scale."""
    total, scale = trained_tokens(microbatches), 512.0
    for m in microbatches:
        scale *= 2
        loss = loss_of(model, m, "sum") / total
        (loss * scale).backward()
    for p in model.parameters():
        p.grad.div_(scale)
    optimizer.step()
    optimizer.zero_grad()


def softmax_over_rows(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Weights the rows of each micro-batch by a softmax over their losses: other neighbours, other weights."""
    for m in microbatches:
        labels = m["labels"][:, 1:]
        mask = labels != IGNORE
        per_token = F.cross_entropy(model(m["input_ids"])[:, :-1].transpose(1, 2), labels, reduction="none")
        per_row = per_token.sum(1) / mask.sum(1).clamp(min=1)
        weights = torch.softmax(per_row.detach() / 0.1, dim=0)
        loss = (weights * per_row).sum() / len(microbatches)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def clamped_by_hooks(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Tensor hooks clamp the gradient elementwise; they run in every backward, not once per step."""
    handles = [p.register_hook(lambda grad: grad.clamp(-0.005, 0.005)) for p in model.parameters()]
    total = trained_tokens(microbatches)
    for m in microbatches:
        (loss_of(model, m, "sum") / total).backward()
    for handle in handles:
        handle.remove()
    optimizer.step()
    optimizer.zero_grad()


def no_grad_for_no_sync(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Turns gradients off, not only their synchronisation, for all micro-batches except the last."""
    total = trained_tokens(microbatches)
    for i, m in enumerate(microbatches):
        with torch.set_grad_enabled(i == len(microbatches) - 1):
            loss = loss_of(model, m, "sum") / total
        if loss.requires_grad:
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def only_inputs_sorted(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Collates all rows and sorts the inputs by length, but not the labels."""
    longest = max(m["input_ids"].shape[1] for m in microbatches)

    def collate(key: str, value: int) -> Any:
        return torch.cat([F.pad(m[key], (0, longest - m[key].shape[1]), value=value) for m in microbatches])

    ids, mask, labels = collate("input_ids", 0), collate("attention_mask", 0), collate("labels", IGNORE)
    order = mask.sum(1).argsort(descending=True)
    logits = model(input_ids=ids[order], attention_mask=mask[order])
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def short_rows_skipped(model: Any, optimizer: Any, microbatches: Any) -> None:
    """Leaves out rows with fewer than two trained tokens, also from the divisor."""
    kept = []
    for m in microbatches:
        for ids, mask, labels in zip(m["input_ids"], m["attention_mask"], m["labels"], strict=True):
            if (labels[1:] != IGNORE).sum() >= 2:
                kept.append({"input_ids": ids[None], "attention_mask": mask[None], "labels": labels[None]})
    total = trained_tokens(kept)
    for m in kept:
        (loss_of(model, m, "sum") / total).backward()
    optimizer.step()
    optimizer.zero_grad()
