"""Which of the audit's mutants are ported to ``faulty_loops``, by their texts, and which cannot be seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from faulty_loops import (
    RATE, SCHEDULE, Loop, add_noise, back_to_before, beside, both, clear_before, clear_own, clip_by, each,
    feed_copies, from_second_step, in_bfloat16, keep, keep_values, last, limited, lose_small, micro_mean, nll,
    no_start, nothing, own_optimizer, reduce_mean, round_parameters, row_mean, running_average, share_of,
    start_apart, unsynced, without_one,
)  # fmt: skip
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Ported:
    """A faulty loop, the codes that may name it, and the first step that contains the fault."""

    text: str  # of the audit's mutant
    loop: Loop
    codes: str
    ranks: int = 1
    first: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


BOTH = (torch.float32, torch.bfloat16)
WIDE = (torch.float32,)
P = Ported
PORTED = (
    P("only the first and the last micro-batch count", Loop(**keep(lambda run, k: k in (0, last(run)))), "kept"),
    P("only the first and the last micro-batch count", Loop(**keep(lambda run, k: k in (0, last(run)))), "kept", 2),
    P("micro-batch {index} is dropped", Loop(**keep(lambda run, k: k != 1)), "kept"),
    P("intermediate micro-batches are dropped, the rest averaged as a mean of means",
      Loop(**keep(lambda run, k: k in (0, last(run))), share=micro_mean), "kept micro_mean"),
    P("every backward overwrites the previous one", Loop(**clear_before(lambda run, k: True)), "kept"),
    P("every backward overwrites the previous one, on rank {rank} only",
      Loop(**clear_before(lambda run, k: run.rank == 1)), "kept", 2),
    P("mean of the micro-batches' means", Loop(share=micro_mean), "micro_mean"),
    P("mean of the micro-batches' means", Loop(share=micro_mean), "micro_mean", 2),
    P("sum of the micro-batches' means: 1/K is missing",
      Loop(share=lambda w, r, k, row: 1 / w.of_micro(r, k)), "micro_mean"),
    P("mean over the tokens of all ranks, at every micro-step",
      Loop(share=lambda w, r, k, row: len(w.micro) / (len(w.micro[r]) * sum(
          w.of_micro(d, k) for d in range(len(w.micro))))), "dp_token_mean", 2),
    P("every rank divides by its own tokens", Loop(share=lambda w, r, k, row: 1 / w.of_rank(r)), "rank_mean", 2),
    P("every rank divides by its own tokens, and ranks are summed",
      Loop(share=lambda w, r, k, row: len(w.micro) / w.of_rank(r)), "rank_mean", 2),
    P("K times too large", Loop(share=lambda w, r, k, row: len(w.micro) * len(w.micro[r]) / w.total),
      "accumulation_factor"),
    P("K times too small", Loop(share=lambda w, r, k, row: len(w.micro) / len(w.micro[r]) / w.total),
      "accumulation_factor"),
    P("the model ignores the number of tokens it is given and returns its own mean",
      Loop(share=lambda w, r, k, row: 1 / w.of_micro(r, k)), "micro_mean", 2),
    P("the model's loss is a mean over all positions, including masked ones",
      Loop(share=lambda w, r, k, row: 1 / w.slots(r, k)), "padding"),
    P("mean of micro-batch sums, each divided by rows times padded width",
      Loop(share=lambda w, r, k, row: 1 / (len(w.micro[r]) * w.slots(r, k))), "padding", 2),
    P("the last micro-batch of a window is not reduced over ranks",
      Loop(**unsynced(lambda k, num: k < num - 1)), "ranks_diverge", 2),
    P("only the last micro-batch of a window is reduced over ranks",
      Loop(**unsynced(lambda k, num: k == num - 1)), "ranks_diverge", 2),
    P("the last micro-batch of a window does not reach any rank's optimizer",
      Loop(**keep(lambda run, k: k < last(run))), "kept"),
    P("gradients are cleared before micro-batch {index}", Loop(**clear_before(lambda run, k: k == 2)), "kept"),
    P("gradients are cleared before micro-batch {index} on rank {rank} only",
      Loop(**clear_before(lambda run, k: k == 2 and run.rank == 1)), "kept", 2),
    P("summed over ranks instead of averaged", Loop(share=lambda w, r, k, row: len(w.micro) ** 2 / w.total),
      "rank_factor", 2),
    P("averaged over ranks twice", Loop(share=lambda w, r, k, row: 1 / w.total), "rank_factor", 2),
    P("an empty micro-batch's mean is 0/0", Loop(share=lambda w, r, k, row: math.nan), "not_finite"),
    P("every micro-batch's gradient is clipped", Loop(**each(limited(0.05))), "unknown_weights"),
    P("every micro-batch is clipped, not the step", Loop(**each(limited(0.05))), "unknown_weights"),
    P("every rank's gradient is clipped by its own norm before ranks are summed",
      Loop(reduce=both(clip_by(limited(0.05)), reduce_mean)), "unknown_weights", 2),
    P("every rank clips by its own norm, not the step's", Loop(reduce=both(clip_by(limited(0.05)), reduce_mean)),
      "unknown_weights", 2),
    P("every entry of the gradient is clipped",
      Loop(clip=clip_by(lambda gradients: [g.clamp(-0.001, 0.001) for g in gradients])), "unexplained clip"),
    P("clipped after every backward", Loop(after=lambda run, k: clip_by(limited(0.05))(run)), "unknown_weights"),
    P("a clip is configured, but nothing is clipped", Loop(declared={"max_grad_norm": 0.01}), "clip"),
    P("clipped to twice the configured norm",
      Loop(clip=clip_by(limited(0.02)), declared={"max_grad_norm": 0.01}), "clip"),
    P("the gradient is clipped while it is K times too large",
      Loop(clip=clip_by(limited(0.01 / 4)), declared={"max_grad_norm": 0.01}), "clip"),
    P("a warm-up over the first three steps that is not configured",
      Loop(begin=SCHEDULE["begin"], tick=lambda step, k, d: 40 * (1 - min(1.0, (step + 1) / 3)),
           declared={"rate": lambda step: RATE}), "schedule"),
    P("parameters are stored in bfloat16", Loop(stepped=round_parameters), "rounding stale_parameters",
      first=2),
    P("updates below 2^-9 of their parameter are lost", Loop(clip=keep_values, stepped=lose_small),
      "stale_parameters", first=2),
    P("gradients are added up in bfloat16", Loop(after=in_bfloat16), "unexplained rounding", dtypes=WIDE),
    P("prompts are trained as well", Loop(targets=lambda m: torch.where(m.attention > 0, m.ids, -100)),
      "prompt_trained"),
    P("masks begin one token early", Loop(targets=lambda m: beside(m.labels, m.ids, True)), "prompt_trained"),
    P("the last token of every answer is not trained", Loop(targets=lambda m: beside(m.labels, m.ids, False)),
      "stop_untrained"),
    P("the first token of every answer is not trained", Loop(targets=lambda m: no_start(m.labels)), "unexplained"),
    P("one row of a step has an empty mask",
      Loop(targets=lambda m: torch.where(torch.arange(len(m.ids))[:, None] == 1, -100, m.labels)), "unexplained"),
    P("labels are not shifted", Loop(shift=0), "shift_0"),
    P("labels are shifted twice", Loop(shift=2), "shift_2"),
    P("mean of the rows' means", Loop(share=row_mean, rows=1), "sequence_mean micro_mean"),
    P("one row of a step is trained twice",
      Loop(share=lambda w, r, k, row: (2.0 if k == 1 else 1.0) * len(w.micro) / w.total), "unknown_weights"),
    P("every rank is given the rows of rank 0", Loop(data=lambda rank, step: 0), "data_lost", 2),
    P("gradients are never reduced over ranks", Loop(reduce=nothing), "ranks_diverge", 2),
    P("every rank trains separately, on the mean of its own tokens",
      Loop(share=lambda w, r, k, row: 1 / w.of_rank(r), reduce=nothing), "ranks_diverge", 2),
    P("from the second step on, no gradient is reduced", Loop(reduce=from_second_step), "ranks_diverge", 2, 2),
    P("ranks start from different parameters", Loop(begin=start_apart), "ranks_diverge", 2),
    P("the optimizer moves parameters that the model no longer uses",
      Loop(begin=own_optimizer(False), clip=feed_copies), "stale_parameters"),
    P("every step starts from the parameters of the step before", Loop(stepped=back_to_before),
      "stale_parameters", first=3),
    P("one tensor of the model is not the one that the optimizer has", Loop(begin=without_one),
      "stale_parameters"),
    P("gradients are not cleared after a step", Loop(clear=False), "momentum", first=2),
    P("a step after every micro-batch", Loop(micro_of_step=lambda step, k: 1), "grouping", first=3),
    P("windows one micro-batch too long", Loop(micro_of_step=lambda step, k: k + 1), "grouping"),
    P("micro-batches are added up as a running average", Loop(after=running_average), "unknown_weights"),
    P("noise is added to the gradient", Loop(clip=add_noise), "unexplained"),
    P("a tick at every micro-batch", Loop(**SCHEDULE, tick=lambda step, k, d: step * k), "schedule", first=2),
    P("one tick per process", Loop(**SCHEDULE, tick=lambda step, k, d: step * d), "schedule", 2, 2),
    P("the schedule counts micro-batches", Loop(**SCHEDULE, tick=lambda step, k, d: step / k), "schedule", first=2),
    P("the schedule counts all ranks' steps", Loop(**SCHEDULE, tick=lambda step, k, d: step / d), "schedule", 2, 2),
    P("no tick at all", Loop(**SCHEDULE, tick=lambda step, k, d: 0), "schedule", first=2),
    P("one tick ahead", Loop(**SCHEDULE, tick=lambda step, k, d: step + 1), "schedule"),
)  # fmt: skip

# The audit's other mutants, and why a guard of one live run does not see them.
SAME = "a constant factor of all tokens; the guard names it, but a user may have asked for it"
INPUT = "the model's input is the user's; the guard has no right copy of it"
ASKED = "an option of the user's own optimizer or model, which the guard takes as asked"
WHOLE_RUN = "seen only from the whole data of a run, which the guard does not have"
UNSEEN = {
    "the rest of an epoch is never loaded": WHOLE_RUN,
    "the rest of an epoch is run, but its gradients are discarded": "the same as a skipped step",
    "windows run across the end of an epoch": WHOLE_RUN,
    "the rest of an epoch waits for the next epoch's first step": "found only if a step has too many micro-batches",
    "a short last window is divided as if it were full": SAME,
    "the step comes one micro-batch after the start of every window": WHOLE_RUN,
    "a loss scale of 8 that is never removed": SAME,
    "divided by rows times padded width of the whole window": SAME,
    "an empty micro-batch counts as one token": SAME,
    "an empty row counts as one token": SAME,
    "no step is taken for a window with an empty micro-batch": "a step that is not taken has no gradient",
    "the whole gradient is clipped without being configured": SAME,
    "the gradient is clipped while it is K times too large, and not divided afterwards": SAME,
    "prompts are trained with a tenth of the weight": "the weights of rows differ, so only the prompt is named",
    "two begin tokens before every row": INPUT,
    "rows packed into one line see each other": INPUT,
    "packed rows see each other, although positions restart": INPUT,
    "padding on the left is counted in the positions": INPUT,
    "padding on the left is attended to": INPUT,
    "labels are smoothed by 0.1": "another loss, which may be asked for; the guard says that it is one",
    "a z-loss is added": "another loss, which may be asked for; the guard says that it is one",
    "logits are divided by a temperature of 0.7": "another loss, which may be asked for; the guard says that it is one",
    "every token is weighted by its own probability": "weights of tokens that may be asked for",
    "one row of a step is unlearned instead": "a negative weight, as RL has",
    "an epoch ends with rows from its start": WHOLE_RUN,
    "dropout of 0.1 is on": ASKED,
    "the optimizer starts from a copy made before the weights were loaded":
        "the optimizer has other tensors than the model, as with float32 master weights",
    "momentum of 0.9": ASKED,
    "Nesterov momentum of 0.5": ASKED,
    "weight decay of 0.01": ASKED,
    "weight decay of 0.1 on matrices only": ASKED,
    "the momentum is lost": "before the guard begins",
    "the schedule restarts": "found if the rate of each step is declared, as the callback does",
    "momentum and schedule are lost": "found if the rate of each step is declared, as the callback does",
    "the parameters are lost": "before the guard begins",
    "the data restarts": WHOLE_RUN,
}  # fmt: skip
