"""Faults with random parameters for the reference trainer. An audit must find and name them.

Each fault has the class of the framework faults that it resembles (A: how micro-batches and ranks are added
up, B: what is trained, C: what the model does in training, D: what the optimizer does), or X if it resembles
none. ``CLEAN`` has configurations without a fault. No part of the audit imports this module; it needs torch.

Shapes: K micro-batches of a rank, D ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import cross_entropy

from truestep.audit.measure.cases import RELATIONS
from truestep.audit.subjects import CASES
from truestep.seeding import Purpose, generator
from truestep.testing import mutant_parts as p
from truestep.testing.mutant_trainer import Mutant, Trainer, add_all, aligned, clip, nll, observe, trained

__all__ = ["CLEAN", "MUTANTS", "Mutant", "observe"]


@dataclass(frozen=True)
class Draw:
    """The random parameters of one mutant."""

    seed: int
    accumulation: int
    world_size: int
    index: int  # a micro-batch, neither the first nor the last
    rank: int
    size: float  # 0 … 1

    @property
    def stride(self) -> int:
        """The number of rows of a step if each micro-batch has one row."""
        return self.accumulation * self.world_size


def draw(name: str, ranks: tuple[int, int]) -> Draw:
    """Draw 3 … 6 micro-batches, and as many ranks as the fault needs. K and D always differ, because equal
    numbers would give equal factors. The name is the key, so a new mutant does not change the others."""
    random = generator(0, Purpose.PROBE, 0, name)
    world_size = int(random.integers(ranks[0], ranks[1] + 1))
    # More ranks have more rows, which take longer.
    accumulation = int(random.integers(*{1: (3, 7), 2: (3, 5), 3: (4, 5)}[world_size]))
    seed, index = int(random.integers(1000)), int(random.integers(1, accumulation - 1))
    return Draw(seed, accumulation, world_size, index, int(random.integers(world_size)), random.random())


@dataclass(frozen=True)
class Fault:
    """A fault for ``copies`` mutants with different parameters; ``text`` may quote {index} and {rank}."""

    code: str
    names: str
    text: str
    trainer: Trainer | Callable[[Draw], Trainer]
    ranks: tuple[int, int] = (1, 2)
    copies: int = 1
    arch: str = "plain"
    cases: tuple[str, ...] = CASES


T, BOTH = Trainer, (2, 3)

SUMS = (
    Fault("A1", "kept", "only the first and the last micro-batch count", T(combine=p.offload)),
    Fault("A1", "kept", "micro-batch {index} is dropped",
          lambda d: T(combine=p.kept(lambda rank, k, num: k != d.index)), (1, 2), 2),
    Fault("A1", "kept micro_mean", "intermediate micro-batches are dropped, the rest averaged as a mean of means",
          T(combine=p.offload, share=p.micro_mean)),
    Fault("A2", "kept", "every backward overwrites the previous one",
          T(combine=p.kept(lambda rank, k, num: k == num - 1))),
    Fault("A2", "kept", "every backward overwrites the previous one, on rank {rank} only",
          lambda d: T(combine=p.kept(lambda rank, k, num: rank != d.rank or k == num - 1)), BOTH),
    Fault("A3", "micro_mean", "mean of the micro-batches' means", T(share=p.micro_mean), (1, 3), 2),
    Fault("A3", "micro_mean", "sum of the micro-batches' means: 1/K is missing", T(share=p.sum_of_means), copies=2),
    Fault("A3", "dp_token_mean", "mean over the tokens of all ranks, at every micro-step",
          T(share=p.over(lambda w, r, k, i: w.num_micro * sum(w.of_micro(d, k) for d in range(w.num_ranks)))),
          BOTH),
    Fault("A4", "rank_mean", "every rank divides by its own tokens",
          T(share=p.over(lambda w, r, k, i: w.num_ranks * w.of_rank(r))), BOTH),
    Fault("A4", "rank_mean rank_factor", "every rank divides by its own tokens, and ranks are summed",
          T(share=p.own_mean), BOTH),
    Fault("A5", "accumulation_factor", "K times too large", T(share=p.scaled(lambda w: w.num_micro))),
    Fault("A5", "accumulation_factor", "K times too small", T(share=p.scaled(lambda w: 1 / w.num_micro))),
    Fault("A6", "micro_mean", "the model ignores the number of tokens it is given and returns its own mean",
          T(share=p.sum_of_means), (2, 2)),
    Fault("A6", "unknown_weights padding", "the model's loss is a mean over all positions, including masked ones",
          T(share=p.over(lambda w, r, k, i: w.num_ranks * w.slots(r, k)))),
    Fault("A7", "data_lost", "the rest of an epoch is never loaded",
          T(plan=lambda num, size, epochs: [(w, True) for w, _ in aligned(num, size, epochs) if len(w) == size])),
    Fault("A7", "data_lost kept grouping", "the rest of an epoch is run, but its gradients are discarded",
          T(plan=lambda num, size, epochs: [(w, len(w) == size) for w, _ in aligned(num, size, epochs)])),
    Fault("A7", "grouping", "windows run across the end of an epoch",
          T(plan=lambda num, size, epochs: aligned(num * epochs, size, 1))),
    Fault("A7", "grouping data_lost", "the rest of an epoch waits for the next epoch's first step",
          T(plan=p.tail_carried)),
    Fault("A7", "accumulation_factor scale", "a short last window is divided as if it were full",
          T(share=p.scaled(lambda w: w.num_micro / w.asked))),
    Fault("A7", "grouping data_lost", "the step comes one micro-batch after the start of every window",
          T(plan=p.counter_off_by_one)),
    Fault("A8", "ranks_diverge", "the last micro-batch of a window is not reduced over ranks",
          T(combine=p.unsynced(lambda k, num: k < num - 1)), BOTH),
    Fault("A8", "ranks_diverge", "only the last micro-batch of a window is reduced over ranks",
          T(combine=p.unsynced(lambda k, num: k == num - 1)), BOTH),
    Fault("A8", "kept", "the last micro-batch of a window does not reach any rank's optimizer",
          T(combine=p.kept(lambda rank, k, num: num == 1 or k < num - 1))),
    Fault("A9", "kept", "gradients are cleared before micro-batch {index}",
          lambda d: T(combine=p.kept(lambda rank, k, num: num <= d.index or k >= d.index))),
    Fault("A9", "kept", "gradients are cleared before micro-batch {index} on rank {rank} only",
          lambda d: T(combine=p.kept(lambda r, k, num: r != d.rank or num <= d.index or k >= d.index)), BOTH),
    Fault("A10", "unknown_weights padding", "mean of micro-batch sums, each divided by rows times padded width",
          T(share=p.over(lambda w, r, k, i: w.num_ranks * w.num_micro * w.slots(r, k))), BOTH),
    Fault("A10", "scale padding", "divided by rows times padded width of the whole window",
          T(share=p.over(lambda w, r, k, i: sum(w.slots(d, j) for d, j in w.places)))),
    Fault("A10", "rank_factor", "summed over ranks instead of averaged",
          T(share=p.scaled(lambda w: w.num_ranks)), BOTH),
    Fault("A10", "rank_factor", "averaged over ranks twice", T(share=p.scaled(lambda w: 1 / w.num_ranks)), BOTH),
    Fault("A10", "scale", "a loss scale of 8 that is never removed", T(share=p.scaled(lambda w: 8))),
    Fault("A11", "empty_counted", "an empty micro-batch counts as one token",
          T(share=p.over(lambda w, r, k, i: sum(max(1.0, w.of_micro(d, j)) for d, j in w.places))), (1, 1)),
    Fault("A11", "empty_counted", "an empty row counts as one token",
          T(share=p.over(lambda w, r, k, i: sum(max(1.0, w.tokens[j]) for j in w.all_rows))), (2, 2)),
    Fault("A11", "not_finite", "an empty micro-batch's mean is 0/0",
          T(share=lambda w, r, k, i: 1 / w.total if w.of_micro(r, k) else math.nan)),
    Fault("A11", "data_lost grouping kept", "no step is taken for a window with an empty micro-batch",
          T(combine=p.skip_if_empty)),
    Fault("A12", "clip unknown_weights", "every micro-batch's gradient is clipped",
          lambda d: T(combine=p.clip_unasked(p.clip_micro, 0.04 + 0.04 * d.size)), copies=2),
    Fault("A12", "clip unknown_weights", "every rank's gradient is clipped by its own norm before ranks are summed",
          lambda d: T(combine=p.clip_unasked(p.clip_rank, 0.05 + 0.05 * d.size)), BOTH),
    Fault("A12", "clip scale", "the whole gradient is clipped without being configured",
          lambda d: T(update=p.moved(lambda g, index: clip(g, 0.1 + 0.05 * d.size)))),
    Fault("A12", "clip unexplained", "every entry of the gradient is clipped",
          T(update=p.moved(lambda g, index: g.clamp(-0.001, 0.001)))),
    Fault("A12", "clip scale", "the gradient is clipped while it is K times too large, and not divided afterwards",
          T(share=p.scaled(lambda w: w.num_micro), update=p.moved(lambda g, index: clip(g, 0.15)))),
    Fault("A13", "scale", "a warm-up over the first three steps that is not configured",
          T(update=p.moved(lambda g, index: g * min(1.0, (index + 1) / 3)))),
    Fault("A14", "rounding", "parameters are stored in bfloat16",
          T(prepare=p.start_in_bfloat16, update=p.stored_in_bfloat16), copies=2),
    Fault("A14", "rounding unexplained", "updates below 2^-9 of their parameter are lost",
          T(update=p.small_updates_lost)),
    Fault("A14", "rounding unexplained", "gradients are added up in bfloat16", T(combine=p.in_bfloat16)),
)  # fmt: skip

MASKS = (
    Fault("B1", "prompt_trained", "prompts are trained as well", T(targets=p.prompt_too(1.0))),
    Fault("B1", "prompt_trained", "prompts are trained with a tenth of the weight", T(targets=p.prompt_too(0.1))),
    Fault("B1", "prompt_trained", "masks begin one token early", T(targets=p.one_token_early)),
    Fault("B1", "mask_shifted", "masks are one token early", T(targets=p.early)),
    Fault("B1", "mask_shifted micro_mean", "masks are one token early, and micro-batches' means are averaged",
          T(targets=p.early, share=p.micro_mean), copies=2),
    Fault("B1", "mask_shifted", "masks are one token late", T(targets=p.late, layout=p.followed)),
    Fault("B2", "stop_untrained", "the last token of every answer is not trained", T(targets=p.no_stop), copies=2),
    Fault("B2", "start_untrained", "the first token of every answer is not trained", T(targets=p.no_start)),
    Fault("B3", "kept unknown_weights", "one row of a step has an empty mask",
          lambda d: T(targets=lambda spec, row: [on * (row % d.stride != d.index) for on in trained(spec, row)]),
          copies=2),
    Fault("B4", "shift_0", "labels are not shifted", T(shift=0)),
    Fault("B4", "shift_2", "labels are shifted twice", T(shift=2)),
    Fault("B5", "unexplained", "two begin tokens before every row", T(layout=p.begun_twice), arch="gpt2"),
    Fault("B6", "packing", "rows packed into one line see each other",
          T(layout=p.packed(restart=False, isolated=False)), arch="llama"),
    Fault("B6", "packing", "packed rows see each other, although positions restart",
          T(layout=p.packed(restart=True, isolated=False)), arch="gpt2"),
    Fault("B7", "padding", "padding on the left is counted in the positions", T(layout=p.pad_left(masked=True)),
          arch="gpt2"),
    Fault("B7", "padding", "padding on the left is attended to", T(layout=p.pad_left(masked=False)),
          arch="llama"),
    Fault("X", "label_smoothing", "labels are smoothed by 0.1",
          T(nll=lambda logits, ids: cross_entropy(logits, ids, reduction="none", label_smoothing=0.1))),
    Fault("X", "z_loss", "a z-loss is added",
          T(nll=lambda logits, ids: nll(logits, ids) + 0.01 * logits.logsumexp(-1) ** 2)),
    Fault("X", "unexplained", "logits are divided by a temperature of 0.7",
          T(nll=lambda logits, ids: nll(logits / 0.7, ids))),
    Fault("X", "dft", "every token is weighted by its own probability",
          T(nll=lambda logits, ids: (loss := nll(logits, ids)) * torch.exp(-loss.detach()))),
    Fault("X", "sequence_mean", "mean of the rows' means",
          T(share=p.over(lambda w, r, k, i: len(w.all_rows) * max(1.0, w.tokens[i]))), copies=2),
    Fault("X", "unknown_weights", "one row of a step is trained twice", lambda d: T(share=p.one_row(2.0, d))),
    Fault("X", "unknown_weights", "one row of a step is unlearned instead",
          lambda d: T(share=p.one_row(-1.0, d))),
    Fault("X", "data_lost", "every rank is given the rows of rank 0",
          T(order=lambda batches: [batches[0]] * len(batches)), BOTH),
    Fault("X", "data_lost grouping", "an epoch ends with rows from its start",
          T(order=lambda batches: [[*rank[:-1], rank[0]] for rank in batches])),
)  # fmt: skip

OPTIMIZERS = (
    Fault("C7", "dropout unexplained", "dropout of 0.1 is on", T(prepare=p.dropping(0.1)), copies=2),
    Fault("C8", "ranks_diverge", "gradients are never reduced over ranks", T(combine=p.local), BOTH),
    Fault("C8", "ranks_diverge", "every rank trains separately, on the mean of its own tokens",
          T(share=p.own_mean, combine=p.local), BOTH),
    Fault("C8", "ranks_diverge", "from the second step on, no gradient is reduced",
          T(combine=lambda gradients, index: (p.local if index >= 1 else add_all)(gradients, index)), BOTH),
    Fault("C8", "ranks_diverge", "ranks start from different parameters",
          T(prepare=p.shifted_start(0.01, ranks=True, published=True)), BOTH),
    Fault("D2", "stale_parameters", "the optimizer moves parameters that the model no longer uses",
          T(update=p.never_published)),
    Fault("D2", "stale_parameters unexplained", "the optimizer starts from a copy made before the weights were loaded",
          T(prepare=p.shifted_start(0.01, ranks=False, published=False))),
    Fault("D2", "stale_parameters momentum", "every step starts from the parameters of the step before",
          T(update=p.from_the_step_before)),
    Fault("D2", "stale_parameters", "one tensor of the model is not the one that the optimizer has",
          lambda d: T(update=p.frozen(d.seed))),
    Fault("X", "momentum", "momentum of 0.9", T(update=p.momentum(0.9))),
    Fault("X", "momentum", "Nesterov momentum of 0.5", T(update=p.momentum(0.5, nesterov=True))),
    Fault("X", "not_cleared", "gradients are not cleared after a step", T(update=p.momentum(1.0))),
    Fault("X", "weight_decay", "weight decay of 0.01", T(update=p.decay(0.01))),
    Fault("X", "weight_decay", "weight decay of 0.1 on matrices only", T(update=p.decay(0.1, matrices=True))),
    Fault("X", "grouping", "a step after every micro-batch",
          T(plan=lambda num, size, epochs: aligned(num, 1, epochs))),
    Fault("X", "grouping", "windows one micro-batch too long",
          T(plan=lambda num, size, epochs: aligned(num, size + 1, epochs))),
    Fault("X", "unknown_weights decaying_weights", "micro-batches are added up as a running average", T(combine=p.running_average)),
    Fault("X", "unexplained", "noise is added to the gradient", lambda d: T(combine=p.noisy(d.seed))),
)  # fmt: skip

CLIPS = (
    Fault("clip", "clip", "a clip is configured, but nothing is clipped", T(limit=p.clip_to(math.inf))),
    Fault("clip", "clip", "clipped to twice the configured norm", T(limit=p.clip_to(2))),
    Fault("clip", "clip", "every micro-batch is clipped, not the step", T(limit=p.clip_micro), copies=2),
    Fault("clip", "clip", "clipped after every backward", T(limit=p.clip_running), copies=2),
    Fault("clip", "clip", "every rank clips by its own norm, not the step's", T(limit=p.clip_rank), BOTH, 2),
    Fault("clip", "clip", "the gradient is clipped while it is K times too large", T(limit=p.clip_too_long)),
)
RATES = (
    Fault("rate", "schedule", "a tick at every micro-batch", T(ticks=lambda i, k, d: i * k), copies=2),
    Fault("rate", "schedule", "one tick per process", T(ticks=lambda i, k, d: i * d), BOTH, 2),
    Fault("rate", "schedule", "the schedule counts micro-batches", T(ticks=lambda i, k, d: i * (1 / k))),
    Fault(
        "rate", "schedule", "the schedule counts all ranks' steps", T(ticks=lambda i, k, d: i * (1 / d)), BOTH
    ),
    Fault("rate", "schedule", "no tick at all", T(ticks=lambda i, k, d: 0)),
    Fault("rate", "schedule", "one tick ahead", T(ticks=lambda i, k, d: i + 1)),
)
RESUMES = (
    Fault("resume", "momentum_lost", "the momentum is lost", T(resume=p.momentum_lost), copies=2),
    Fault("resume", "schedule", "the schedule restarts", T(resume=lambda replica, at: 0), copies=2),
    Fault("resume", "momentum_lost", "momentum and schedule are lost", T(resume=p.both_lost)),
    Fault("resume", "stale_parameters", "the parameters are lost", T(resume=p.parameters_lost)),
    Fault("resume", "data_lost", "the data restarts", T(plan=p.from_the_first_row)),
)
BESIDE = {"clipped": CLIPS, "scheduled": RATES, "resumed": RESUMES}
ASKED = [replace(fault, cases=("ragged", case)) for case, faults in BESIDE.items() for fault in faults]


def _mutants() -> tuple[Mutant, ...]:
    made: list[Mutant] = []
    seen = Counter[str]()
    for fault in [f for f in (*SUMS, *MASKS, *OPTIMIZERS, *ASKED) for _ in range(f.copies)]:
        seen[fault.code] += 1
        name, plain = f"{fault.code}-{seen[fault.code]}", fault.arch == "plain"
        drawn = draw(name, fault.ranks if plain else (1, 1))
        text = fault.text.format(index=drawn.index, rank=drawn.rank)
        trainer = fault.trainer if isinstance(fault.trainer, Trainer) else fault.trainer(drawn)
        size, ranks = drawn.accumulation if plain else 3, drawn.world_size
        about = (name, fault.code, text, frozenset(fault.names.split()), trainer, size, ranks, drawn.seed)
        made.append(Mutant(*about, arch=fault.arch, cases=fault.cases))
    return tuple(made)


def _clean() -> tuple[Mutant, ...]:
    """Return a correct mutant for each (model, dtype, K, D, seed). The last mutant of each attention model
    packs its rows and isolates them from each other."""
    table = [
        *(("plain", "float32", k, ranks, 10 * k + ranks) for k in (3, 4, 5, 6) for ranks in (1, 2)),
        *(("plain", "float32", k, 3, k) for k in (3, 4, 5)),
        *(("plain", "float64", k, ranks, k) for k, ranks in ((3, 1), (4, 2), (6, 1))),
        *(("plain", "bfloat16", k, ranks, k) for k, ranks in ((3, 1), (4, 1), (3, 2))),
        *((arch, "float32", 3, 1, seed) for arch in ("llama", "gpt2", "qwen2") for seed in (0, 1)),
    ]
    made, cases, packed = [], CASES + tuple(RELATIONS), T(layout=p.packed(restart=True, isolated=True))
    for number, (arch, dtype, k, ranks, seed) in enumerate(table):
        text = f"{arch}, {dtype}, {k} micro-batches on each of {ranks} rank(s)"
        about = (f"clean-{number}", "", text, frozenset[str](), packed if arch != "plain" and seed else T())
        made.append(Mutant(*about, k, ranks, seed, arch=arch, dtype=dtype, cases=cases))
    return tuple(made)


MUTANTS = _mutants()
CLEAN = _clean()
