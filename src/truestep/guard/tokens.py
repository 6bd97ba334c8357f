"""Reads the weight of every trained token from the gradient of the logits.

The negative log-likelihood of token y with weight w has the gradient w·(p − e_y) at its logits. So a position
is trained if its row is not zero, y is the entry of the largest size, w > 0 if this entry is negative, and
|w| = |Σ of the others| / (1 − p_y). Only sums leave this module. Shapes: B rows of T tokens, V entries of the
vocabulary, S positions with logits (the last S of each row).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from truestep.guard.survive import Survive

ENTRIES = 2**24  # of logits that are copied to float32 at a time
ENTRIES_ON_CPU = 2**19  # stay in the processor's cache: 3 to 7 times faster
SHIFTS = (1, 0, 2)  # a logit's target is this many positions later; 0 and 2 are faults
MOST = 0.95  # share of the targets that have the wrong shift, if it is a fault; a denoising model has fewer
FAINT = 0.02  # relative; a smaller gradient is no training of a token, but of a regularizer, if its weight is so small
CLEAR = 1e-3  # a trained position with a smaller 1 − p may have a gradient that rounds to zero


@dataclass(frozen=True)
class Batch:
    """What the model was called with, as far as it is known. All [B, T]."""

    ids: Tensor | None = None
    labels: Tensor | None = None
    attention: Tensor | None = None
    source: Tensor | None = None  # what an encoder reads
    is_inner: bool = False  # the tokens were seen within the model's call

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any], *, is_pair: bool = False) -> Batch:
        """Return the batch of a model that is called so; ``is_pair``: of an encoder and a decoder."""
        if is_pair:
            return cls.of_decoder(args, kwargs)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() not in (1, 2):
            return cls()
        ids = ids.detach().reshape(-1, ids.shape[-1])
        others = (kwargs.get("labels"), kwargs.get("attention_mask"))
        same = [o.detach() if isinstance(o, Tensor) and o.shape == ids.shape else None for o in others]
        return cls(ids, labels=same[0], attention=same[1])

    @classmethod
    def of_decoder(cls, args: Sequence[Any], kwargs: dict[str, Any]) -> Batch:
        """Return what the decoder reads and is asked for. It makes its inputs from the labels, if it has none: a
        first token, and then all labels but the last."""
        ids, labels = kwargs.get("decoder_input_ids"), kwargs.get("labels")
        if ids is None and isinstance(labels, Tensor) and labels.dim() == 2:
            ids = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1].clamp(min=0)], 1)
        named = {"labels": labels, "attention_mask": kwargs.get("decoder_attention_mask")}
        source = cls.of(args, kwargs).ids
        return replace(cls.of((), {"input_ids": ids, **named}), source=source)

    @property
    def is_untrained(self) -> bool:
        """Whether the labels say that nothing is trained."""
        return self.labels is not None and not bool((self.labels != -100).any())

    def mark(self) -> int:
        """Return 48 bits of a hash of the tokens; 0 if there are none."""
        given = [part for part in (self.source, self.ids) if part is not None]
        if not given:
            return 0
        data = b"".join(part.cpu().contiguous().numpy().tobytes() for part in given)
        return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big")


@dataclass(frozen=True)
class Tokens:
    """The trained tokens of one micro-batch; counts of positions unless said otherwise."""

    trained: int
    negative: int  # with a negative weight
    weight: float  # mean weight of a trained token, signed sizes apart
    token_spread: float  # root mean square of the relative differences of the tokens' weights
    spread: float  # (largest − smallest) / mean weight, of the rows
    sequence_spread: float  # the same for weight × trained tokens of the row
    form: float  # relative distance from a weighted negative log-likelihood
    shift: int  # the offset of the targets, or -1 if it is none of SHIFTS
    outside: int  # trained, but masked in the labels or the attention mask
    missing: int  # in the labels, but not trained
    missing_ends: int  # of these, those at the end of a trained part
    slots: int  # rows × width
    stops: int  # stop tokens that follow a trained token
    stops_trained: int


class TokenHooks:
    """Hooks on the logits. ``stop_ids`` are the tokens that end an answer."""

    def __init__(self, survive: Survive) -> None:
        self.survive = survive
        self.stop_ids: tuple[int, ...] = ()
        self.from_head: Tensor | None = None  # during a forward pass of the model

    def head_ran(self, micro: Any, output: Any, is_inside: bool) -> None:
        """Take the output of the head. Some trainers call it themselves, after the model."""
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        if is_inside:
            self.from_head = output
        else:
            self.attach(micro, output)

    def model_ran(self, micro: Any, output: Any) -> None:
        """Watch the logits of the model. If they are only a copy of the head's output, watch that: the loss
        may be computed from it."""
        logits, head, self.from_head = logits_in(output), self.from_head, None
        if head is not None and (logits is None or _is_copy(logits, head)):
            logits = head
        if logits is not None and logits.requires_grad:
            self.attach(micro, logits)

    def attach(self, micro: Any, logits: Tensor) -> None:
        ids = micro.batch.ids
        if micro.has_logits:
            micro.is_split = True  # a head that is called for one part after the other
            return
        if ids is None or (logits.dim() == 2 and len(logits) != ids.numel()):
            return  # two dimensions: all rows as one list
        lines = (
            logits.detach()
            if logits.dim() == 3
            else logits.detach().reshape(ids.shape[0], -1, logits.shape[-1])
        )
        seen = Forward.of(lines, micro.batch)
        if seen is not None:
            micro.has_logits = True
            logits.register_hook(partial(self._backward, micro, seen))

    def _backward(self, micro: Any, seen: Forward, delta: Tensor | None) -> None:
        backward = torch._C._current_graph_task_id()
        if delta is None or backward in micro.told or micro.is_split:
            return
        with self.survive:
            micro.told[backward] = seen.judge(delta, self.stop_ids)


def _is_copy(logits: Tensor, head: Tensor) -> bool:
    if logits is head or logits.shape != head.shape:
        return logits is head
    some = (0,) * (logits.dim() - 1)
    return bool(torch.equal(logits.detach()[some].to(head.dtype), head.detach()[some]))


def logits_in(output: Any) -> Tensor | None:
    """Return the logits [.., V] in a model's output, or None."""
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if found is None:
        found = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(found, Tensor) or found.dim() not in (2, 3) or not found.is_floating_point():
        return None
    return found


@dataclass(frozen=True)
class Forward:
    """What is kept of the logits: log-probabilities [B, S] of the possible targets and of the top entry."""

    batch: Batch
    shape: tuple[int, int]
    targets: Tensor  # 3, B, S; -1 where there is no target
    logp: Tensor  # 3, B, S
    top: Tensor  # B, S
    top_logp: Tensor  # B, S

    @classmethod
    @torch.no_grad()
    def of(cls, logits: Tensor, batch: Batch) -> Forward | None:
        ids = batch.ids
        if ids is None or logits.shape[0] != ids.shape[0] or logits.shape[1] > ids.shape[1]:
            return None
        if not ids.numel() or int(ids.max()) >= logits.shape[2]:
            return None  # classes or a score, not tokens
        rows, size, _ = logits.shape
        targets = targets_of(ids, size)
        flat, wanted = logits.reshape(rows * size, -1), targets.reshape(len(SHIFTS), -1).T
        pieces = [logp_of(part, want) for part, want in in_pieces(flat, wanted)]
        logp, top, top_logp = (torch.cat(one) for one in zip(*pieces, strict=True))
        shape = (rows, size)
        return cls(
            batch, shape, targets, logp.T.reshape(-1, *shape), top.reshape(shape), top_logp.reshape(shape)
        )

    @torch.no_grad()
    def judge(self, delta: Tensor, stop_ids: tuple[int, ...]) -> Tokens:
        """Return what the gradient [.., V] of the logits says."""
        lines = delta.reshape(self.shape[0] * self.shape[1], -1)
        pieces = [_row_sums(part, top) for part, top in in_pieces(lines, self.top.flatten())]
        return self.tokens(
            [torch.cat(one).reshape(self.shape) for one in zip(*pieces, strict=True)], stop_ids
        )

    def tokens(self, parts: Sequence[Tensor], stop_ids: tuple[int, ...]) -> Tokens:
        """Return what the gradient of the logits says, from four ``parts`` [B, S]: the target of each position,
        the gradient there, the sum of the other entries, and the gradient at the top entry."""
        target, own, others, at_top = parts
        touched = own != 0
        trained = touched & ~self._faint(target, own, others)
        count = int(trained.sum())
        hits = [int(((target == self.targets[i]) & trained).sum()) for i in range(len(SHIFTS))]
        best = max(range(len(SHIFTS)), key=lambda i: (hits[i], -i))
        # Random tokens repeat by chance, so most, not all, decide.
        enough = count / 2 if SHIFTS[best] == 1 else MOST * count
        shift = SHIFTS[best] if hits[best] > enough else -1
        logp = torch.where(target == self.targets[best], self.logp[best], torch.nan)
        known = trained & logp.isfinite()
        rest = torch.where(known, -torch.expm1(logp), 0.0).double()
        size = torch.where(known, others.abs(), 0.0).double()
        own_size = torch.where(known, own.abs(), 0.0).double()
        weight = float(size.sum() / rest.sum()) if bool(rest.sum() > 0) else 0.0
        token_weight = size / rest.clamp(min=1e-12)
        # The weight of a token that is nearly certain is mostly noise.
        clear = known & (rest > 0.1)
        relative = token_weight[clear] / weight - 1 if weight else token_weight[clear] * 0
        token_spread = float(relative.square().mean().sqrt()) if bool(clear.any()) else 0.0
        apart = known & (self.top != target)
        predicted = torch.where(apart, token_weight * self.top_logp.exp(), 0.0)
        observed = torch.where(apart, at_top.abs().double(), 0.0)
        lost = float((predicted - observed).abs().sum() + (size - own_size).abs().sum())
        whole = float(predicted.sum() + size.sum())
        per_row, row_rest, row_count = size.sum(1), rest.sum(1), known.sum(1)
        used = row_count > 0
        row_weight = (per_row / row_rest.clamp(min=1e-12))[used]
        negative = int((known & (own > 0)).sum())
        form = lost / whole if whole else 0.0
        sums = Tokens(
            trained=count, negative=negative, weight=weight, token_spread=token_spread, spread=_spread(row_weight),
            sequence_spread=_spread(row_weight * row_count[used]), form=form, shift=shift,
            outside=0, missing=0, missing_ends=0, slots=self.shape[0] * self.shape[1], stops=0, stops_trained=0,
        )  # fmt: skip
        return self._against_masks(sums, trained, touched, stop_ids)

    def _faint(self, target: Tensor, own: Tensor, others: Tensor) -> Tensor:
        """Return where [B, S] the gradient is far smaller than that of the others and not because the target is
        nearly certain. So are an entropy and a z-loss of tokens that are not trained."""
        least = FAINT * own.abs().max() if own.numel() else own.new_zeros(())
        is_target = target == self.targets
        logp = torch.where(is_target, self.logp, -torch.inf).max(0).values
        rest = torch.where(is_target.any(0), -torch.expm1(logp), 1.0)
        return (own.abs() < least) & (rest > CLEAR) & (others.abs() / rest < least)

    def _against_masks(
        self, sums: Tokens, trained: Tensor, touched: Tensor, stop_ids: tuple[int, ...]
    ) -> Tokens:
        size, batch = self.shape[1], self.batch
        following = self.targets[0]
        exists = following >= 0
        outside = torch.zeros_like(trained)
        missing = missing_ends = 0
        if batch.attention is not None:
            outside |= trained & exists & (next_values(batch.attention, size, 1) == 0)
        if batch.labels is not None and sums.shift == 1:
            mask = batch.labels[:, -size:] if _is_shifted(batch) else next_values(batch.labels, size, -100)
            asked = (mask != -100) & exists
            outside |= trained & exists & ~asked
            gone = asked & ~touched & (-torch.expm1(self.logp[0]) > CLEAR)
            ends = asked & ~_next_mask(asked)
            missing, missing_ends = int(gone.sum()), int((gone & ends).sum())
        stops = stops_trained = 0
        if stop_ids:
            stop = torch.isin(following, torch.tensor(stop_ids, device=following.device)) & exists
            if batch.attention is not None:
                stop &= next_values(batch.attention, size, 0) != 0
            after = torch.cat([torch.zeros_like(trained[:, :1]), trained[:, :-1]], 1)
            stops, stops_trained = int((stop & (after | trained)).sum()), int((stop & trained).sum())
        return replace(
            sums, outside=int(outside.sum()), missing=missing, missing_ends=missing_ends, stops=stops,
            stops_trained=stops_trained,
        )  # fmt: skip


def _is_shifted(batch: Batch) -> bool:
    """Return whether each label stands at the position that predicts it, not at its own token."""
    ids, labels = batch.ids, batch.labels
    if ids is None or labels is None:
        return False
    asked = labels != -100
    own = int(((labels == ids) & asked).sum())
    return int(((labels[:, :-1] == ids[:, 1:]) & asked[:, :-1]).sum()) > own


def targets_of(ids: Tensor, size: int) -> Tensor:
    """Return the possible targets [3, B, S] of the last ``size`` positions; -1 where there is none."""
    targets = torch.full((len(SHIFTS), ids.shape[0], size), -1, dtype=torch.int64, device=ids.device)
    for number, shift in enumerate(SHIFTS):
        part = ids[:, ids.shape[1] - size + shift :]
        targets[number, :, : part.shape[1]] = part
    return targets


def next_values(values: Tensor, size: int, filler: int) -> Tensor:
    """Return, for each of the last ``size`` positions, the value at the next one."""
    padded = torch.cat([values, torch.full_like(values[:, :1], filler)], 1)
    return padded[:, -size:]


def _next_mask(mask: Tensor) -> Tensor:
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)


def in_pieces(lines: Tensor, others: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a few rows at a time of the lines [R, V], with the same rows of ``others`` [R, ..]."""
    most = ENTRIES_ON_CPU if lines.device.type == "cpu" else ENTRIES
    rows = max(1, most // lines.shape[-1])
    return zip(lines.split(rows), others.split(rows), strict=True)


def _spread(values: Tensor) -> float:
    if len(values) < 2:
        return 0.0
    return float((values.max() - values.min()) / values.mean().clamp(min=1e-300))


def logp_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p [R, 3] of the targets, the top entry [R] and its log p, for logits [R, V]."""
    wide = logits.float()
    total = wide.logsumexp(-1)
    best, top = wide.max(-1)
    return wide.gather(1, targets.clamp(min=0)) - total[:, None], top, best - total


def _row_sums(delta: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the entry [R] of the largest size, its value, the sum of the others and the value at ``top``."""
    wide = delta.float()
    target = wide.abs().argmax(-1)
    own = wide.gather(1, target[:, None])[:, 0]
    return target, own, wide.sum(-1, dtype=torch.float64) - own, wide.gather(1, top[:, None])[:, 0]
