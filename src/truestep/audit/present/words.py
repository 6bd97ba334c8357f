"""Findings as text. A ``Row`` is a finding as in the JSON document. All other formats are made from rows.

Names of subjects, faults and reasons come from audited programs and must not break a format or a terminal.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from truestep.audit.measure.findings import Cause, Differences, Finding, Verdict
from truestep.audit.present.delivery_words import DELIVERY
from truestep.audit.present.objective_words import OBJECTIVES
from truestep.audit.present.rl_words import RL_SENTENCES
from truestep.faults import FAULTS
from truestep.pages import visible
from truestep.rundir import redact

NONE = "–"
Row = Mapping[str, Any]


def line(text: object, limit: int = 400) -> str:
    """Return one visible line of at most ``limit`` characters."""
    shown = " ".join(visible(redact(str(text))).split())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def number(value: Any) -> str:
    """Return a number with three significant digits; a value very close to 0 or 1 becomes 0 or 1."""
    if not isinstance(value, int | float):
        return NONE
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 5e-4:
        return "0"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def small(value: Any) -> str:
    """Return a relative error or other small number as text, such as 0.69 or 2e-06."""
    if not isinstance(value, int | float):
        return NONE
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-2 or not math.isfinite(value) else f"{value:.0e}"


def _some(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:6])) + (" …" if len(values) > 6 else "")


def _few(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _by_rank(values: Mapping[str, Any]) -> str:
    ranks = (f"rank {rank}: {', '.join(map(str, gone))}" for rank, gone in values["dropped"].items())
    return f"micro-batches are dropped ({'; '.join(ranks)})"


Form = str | Callable[[Mapping[str, Any]], str]
_COEFFICIENT = " (coefficient {coefficient:.3g})"
# kind of a cause → its sentence: a format string for its values, or a function of them
SENTENCES: dict[str, Form] = {
    # one step: weights
    "kept_first_and_last": "the intermediate micro-batches are dropped",
    "kept_last": "every backward pass overwrites the previous one: only the last micro-batch counts",
    "kept_first": "only the first micro-batch counts",
    "dropped": lambda v: f"micro-batches are dropped ({', '.join(map(str, v['dropped']))} of {v['of']})",
    "dropped_by_rank": _by_rank,
    "rank_mean": "rank-wise mean",
    "micro_mean": "mean of micro-batch means",
    "dp_token_mean": "mean over the tokens of each micro-step",
    "sequence_mean": "mean of the rows' means",
    "scale": "everything is multiplied by {scale:.4g}",
    "token_mean": "mean over all trained tokens",
    "sum": "the sum over all trained tokens: the division by their number is missing",
    "scale_of_every_split": "everything is multiplied by {scale:.4g}, however a batch is split",
    "constant_divisor": "the sum over all trained tokens, divided by a constant ({divisor:.4g})",
    "divisor_per_row": "the sum over all trained tokens, divided by {divisor:.4g} for every row",
    "rows_weighted": lambda v: f"rows have weights that do not depend on the split [{_few(v['weights'])}]",
    "divided_by_rows": "the sum over all trained tokens, divided by the number of rows",
    "first_counted": "the first token of a row is counted, although nothing predicts it",
    "weighted_with_first": "micro-batches are weighted by a number of tokens that includes the first token of a "
    "row, although nothing predicts it",
    "masked_counted": "tokens that are not trained on are counted in the denominator",
    "decaying_weights": "each micro-batch is multiplied by {ratio:.3g} for every one that follows",
    "stepped_twice": "the optimizer steps twice on the same gradient",
    "accumulation_missing": "the division by the accumulation steps is missing",
    "accumulation_twice": "divided by the accumulation steps twice",
    "ranks_summed": "summed over ranks instead of averaged",
    "ranks_twice": "divided by the number of ranks twice",
    "both_missing": "multiplied by the number of ranks and by the number of accumulation steps",
    "both_twice": "divided twice by the number of ranks and by the number of accumulation steps",
    "divided_by_kept": "divided by the number of tokens in the kept micro-batches",
    "empty_is_one_token": "each micro-batch without trained tokens counts as one token",
    "empty_is_zero_mean": "micro-batches without trained tokens count as a mean of zero",
    "unknown_weights": lambda v: f"an unknown pattern of weights [{_few(v['weights'])}]",
    "unknown_row_weights": lambda v: f"rows of one micro-batch have different weights [{_few(v['weights'])}]",
    # one step: what the weights do not explain
    "unexplained": "no choice of micro-batch weights explains {share:.1%} of the gradient",
    "no_trained_token": "a step was taken without any trained token",
    "not_finite": "the parameters are no longer finite",
    "not_finite_after_empty": "the parameters are no longer finite after a micro-batch without trained tokens",
    "tensor_does_not_move": "{name} does not move: the optimizer does not have the parameter that the model uses",
    "rounded_parameters": "parameters are rounded to bfloat16 at every step",
    "small_updates_lost": "small updates are lost ({share:.0%} of the entries)",
    "clip_of_entries": "every entry of the gradient is clipped to {limit:.3g}",
    "prompt_trained": "tokens outside the mask are trained on" + _COEFFICIENT,
    "shift_0": "labels are not shifted" + _COEFFICIENT,
    "shift_2": "labels are shifted twice" + _COEFFICIENT,
    "stop_overweighted": "the last token of each answer has {weight:.3g} times the weight of the others",
    "not_cleared": "gradients are not cleared after a step: each step also applies those before",
    "no_gradient": "the optimizer stepped, but its parameters had no gradient",
    **OBJECTIVES,
    "stop_untrained": "the last token of each answer is not trained on" + _COEFFICIENT,
    "mask_early": "the mask is one token early: the token before each answer is trained on, and the last token of "
    "each answer is not",
    "mask_late": "the mask is one token late: the first token of each answer is not trained on, and the token after "
    "it is",
    "mask_all": "all tokens are trained on",
    "mask_begun": "the token before each answer is trained on as well",
    "mask_around": "if the first token of a row is in the loss, the last token is trained to predict it",
    "mask_headless": "the first token of each answer is not trained on",
    "mask_endless": "the last token of each answer is not trained on",
    "weight_decay": "weight decay" + _COEFFICIENT,
    "weight_decay_of_matrices": "weight decay of matrices" + _COEFFICIENT,
    "momentum": "part of the previous step is applied again" + _COEFFICIENT,
    "auxiliary_loss": lambda v: f"the auxiliary loss has {1 + v['coefficient']:.3g} times its configured weight",
    "catalogued": lambda v: FAULTS[v["fault"]][1],
    "unknown_adamw": "no known weights explain AdamW's update",
    # one step of a live run
    "gradient_not_finite": "a gradient is not finite",
    "targets_shift_0": "labels are not shifted",
    "targets_shift_2": "labels are shifted twice",
    "without_backward": lambda v: f"the model was run on micro-batches without a backward pass "
    f"({', '.join(map(str, v['lost']))} of {v['of']})",
    "carried": "the gradient of the step before is used again" + _COEFFICIENT,
    "modules_differ": lambda v: f"parts of the model have different weights [{_few(v['weights'])}]",
    "padding_counted": "padding is counted in the denominator of the loss",
    "outside_trained": "{tokens} tokens outside the mask are trained on",
    "tokens_untrained": "{tokens} tokens inside the mask are not trained on",
    "stop_never_trained": "the stop token is never trained on ({stops} times it follows a trained token)",
    "tensors_do_not_move": lambda v: f"{v['count']} of {v['of']} trainable tensors do not move, such as "
    f"{', '.join(v['names'])}",
    "update_formula": "the update of {name} is not {optimizer}'s: it is {ratio:.3g} times as large",
    "ranks_have_same_rows": "all ranks train on the same rows",
    "ranks_use_other_gradients": "the ranks use different gradients (by up to {difference:.1e})",
    "ranks_have_other_parameters": "the ranks have different parameters",
    "too_many_micro_batches": "a step has {found} micro-batches; expected {asked}",
    "given_up_often": "{count} micro-batches before each step are thrown away",
    "too_few_micro_batches": "all steps have {found} micro-batches; expected {asked}",
    "changed_between_steps": "the parameters changed between two steps of the optimizer",
    "back_to_before": "the parameters were set back to those before the step",
    "rate_not_declared": "the learning rate is {rate:.3g}; expected {asked:.3g}",
    "engine_frozen": "the engine samples from old weights: it followed {share:.0%} of the trainer's change",
    "engine_other": "the engine and the trainer disagree from the start (by {gap:.2g} nats per token)",
    # clip, schedule, resume
    "clip_of_micro_batches": "every micro-batch's gradient is clipped by its own norm",
    "clip_after_every_micro_batch": "the gradient is clipped after every micro-batch",
    "clip_of_ranks": "every rank's gradient is clipped by its own norm",
    "clip_missing": "the gradient is not clipped; the configured norm is {asked:.3g}",
    "clip_to": "the gradient is clipped to a norm of {norm:.3g}",
    "clip_to_other": "the gradient is clipped to a norm of {norm:.3g}; the configured norm is {asked:.3g}",
    "schedule_ahead": "the schedule is one step ahead",
    "schedule_rates": lambda v: "relative to the first configured learning rate, the learning rates are "
    f"{_few(v['rates'])}; expected {_few(v['asked'])}",
    "schedule_still": "the learning rate does not change: the schedule is never stepped",
    "schedule_by_micro_batch": "the schedule is stepped at every micro-batch",
    "schedule_by_process": "the schedule is stepped once per process",
    "schedule_by_both": "the schedule is stepped at every micro-batch of every process",
    "schedule_too_long": "the schedule is too long: its length counts every micro-batch as a step",
    "schedule_of_process": "the schedule is too long: its length is the sum of the steps of all processes",
    "schedule_speed": "the schedule advances by {speed:.3g} steps at each step",
    "resume_parameters": "the parameters after resuming differ from those that were saved",
    "resume_momentum": "after resuming, the optimizer's momentum is lost",
    "resume_schedule": "after resuming, the schedule starts over",
    "resume_rate": "after resuming, the learning rate is {rate:.3g} times the configured one",
    "resume_momentum_schedule": "after resuming, the optimizer's momentum is lost and the schedule starts over",
    "resume_momentum_rate": "after resuming, the optimizer's momentum is lost and the learning rate is {rate:.3g} "
    "times the configured one",
    # the whole run
    "step_sizes": lambda v: f"steps were taken after {_some(v['rows'])} rows; expected {_some(v['asked'])}",
    "rows_cut": "data is lost: {rows} rows are cut in two by the ends of input lines",
    "rows_lost": "data is lost: {rows} rows never reached an optimizer step",
    "window_over_end": "a step continues over the end of an epoch: steps were taken after "
    "{rows} rows; expected {asked}",
    "ends_early": "the run ends early, after {steps} of {asked} steps: {rows} rows never reached an optimizer step",
    "never_stepped": "the optimizer never stepped",
    "rows_repeated": "{rows} rows were trained on more often than configured",
    "no_step": "no optimizer step was taken: {microbatches} micro-batches are lost",
    "nothing_moved": "no parameter moved: the optimizer does not have the parameters that the model uses",
    "ranks_diverge": "the ranks have different parameters (by up to {difference:.1e})",
    # what was not seen
    "other_loss": "the loss is not a weighted negative log-likelihood, so the weights of tokens were not read",
    "no_logits": "no logits or no tokens were seen (a compiled model, a fused loss, or a model that is called "
    "without input_ids), so the weights of tokens were not read",
    "gradient_unread": "the gradient that the optimizer used could not be read, so nothing is known of its weights",
    "other_targets": "the targets are not the next tokens, so the weights of tokens were not read",
    "weights_by_token": "the tokens of a row have different weights",
    "forward_only": "the model was run {found} times without a backward pass",
    "gradient_not_judged": "the gradient may be changed, so its sum is not judged ({share:.1%} is not explained)",
    "weights_by_row": "the rows of a micro-batch have different weights",
    "signed_weights": "some tokens are pushed up and some down, so the weights of tokens are not judged",
    "common_factor": "everything is multiplied by {scale:.4g} (a clip, a loss scale or another constant)",
    "engine_change_small": "the trainer has not changed enough to see whether the engine follows",
    "engine_not_reachable": "engine not reachable: {reason}",
    "engine_not_checked": "the engine is not checked: {reason}",
    "engine_ahead": "the engine changed {share:.0%} as much as the trainer",
    "zero_gradient": "the gradients of all micro-batches are zero, so there is nothing to compare",
    "begun_again": "{count} micro-batches were thrown away and run again",
    "given_up": "{count} micro-batches before this step were thrown away (a step that was left out)",
    "no_micro_batch": "no backward pass reached the watched modules, or torch.compile hides those of a sharded model",
    "no_case": "no case was run",
    "settings_unused": lambda v: f"the file sets {', '.join(v['settings'])}, which the audited step does not use",
    "case_not_run": "not run ({why})",
    "case_left_out": "{why}",
    "never_trained": "the model was never run in training mode",
    "unknown_lines": "{lines} sequences of the model's input contain none of the case's rows",
    "ill_conditioned": "the micro-batches' gradients are nearly parallel (condition number {condition:.0e})",
    "hidden_by_rounding": "rounding in {dtype} hides the weights of single micro-batches",
    "no_observation": "the subject ended early without writing an observation; does its code call exit?",
    "unreadable": "what the subject wrote cannot be read: {error}",
    "ranks_missing": (
        "{ranks} of {of} ranks wrote an observation; every rank must write one that has schema {schema}"
    ),
    "ranks_disagree": lambda v: f"ranks saw different numbers of optimizer steps: {v['steps']}",
    "no_row_found": "none of the case's rows was found in the model's input",
    "said": "{text}",
    "interrupted": "interrupted before it was run",
    "not_installed": lambda v: f"not installed: {', '.join(v['packages'])}",
    **RL_SENTENCES,
    **DELIVERY,
    "delivery_close": lambda v: f"the samples would be the same within the noise if {sentence(v['what'])}",
    "delivery_unknown": lambda v: f"the sampler does not have the new weights, and no known fault explains its samples: the "
    f"nearest weights are {number(v['distance'])} times the noise away (allowed: {number(v['limit'])})"
    + (f", if {sentence(v['nearest'])}" if "nearest" in v else ""),
}  # fmt: skip


def sentence(cause: Cause, forms: Mapping[str, Form] = SENTENCES) -> str:
    """Return a cause as text, with the name of its case. Several possible readings are joined by "or"."""
    found, values = [forms[kind] for kind in cause.kinds], cause.values
    readings = [form.format(**values) if isinstance(form, str) else form(values) for form in found]
    readings += [sentence(other, forms) for other in values.get("others", ())]
    case = f"{values['case']}: " if values.get("case") else ""
    return case + " or ".join(readings)


def differences_in_words(found: Differences) -> str:
    steps = dict.fromkeys(", and ".join(map(sentence, step)) for step in found.steps)
    some = "" if found.in_every_step else " (not in every step)"
    return "; ".join([*map(sentence, found.data), *steps]) + some


def row_of(finding: Finding) -> Row:
    """Return a finding as a row with texts. The row also has the causes as records."""
    words = differences_in_words(finding.found)
    if finding.verdict is Verdict.DOCUMENTED_CHOICE:
        words += f" ({finding.documented})"
    hidden = ("found", "reasons", "documented")
    row = {key: value for key, value in asdict(finding).items() if key not in hidden}
    row |= {"verdict": finding.verdict.value, "fault": words}
    row["reason"] = "; ".join(map(sentence, finding.reasons))
    row["cases"] = {name: differences_in_words(case) for name, case in finding.cases.items()}
    row["causes"] = [asdict(c) for c in (*finding.found.data, *(c for s in finding.found.steps for c in s))]
    return row


def configuration_in_words(configuration: Row) -> str:
    """Return text such as "ZeRO-2, offload cpu, 2 processes, float32"; unknown keys are shown unchanged."""
    parts = []
    for key, value in configuration.items():
        name = line(key, 60).replace("_", " ")
        if value is None or value == "":
            continue
        if key == "zero_stage":
            parts.append(f"ZeRO-{line(value, 20)}")
        elif key in ("world_size", "processes"):
            parts.append("1 process" if value == 1 else f"{line(value, 20)} processes")
        elif key in ("dtype", "arch", "optimizer"):
            parts.append({"sgd": "SGD", "adamw": "AdamW"}.get(str(value), line(value, 60)))
        elif isinstance(value, bool):
            parts.append(name if value else f"no {name}")
        elif isinstance(value, list | tuple):
            parts.append(f"{name} {' '.join(line(v, 60) for v in value)}")
        else:
            parts.append(f"{name} {number(value) if isinstance(value, float) else line(value, 120)}")
    return ", ".join(parts) or "defaults"


def versions_in_words(row: Row) -> str:
    """Return the versions. Packages that the subject names come first, and torch comes last."""
    versions, subject = row.get("versions") or {}, str(row.get("subject")).lower()
    order = sorted(versions, key=lambda name: (name == "torch", name.lower() not in subject))
    return ", ".join(f"{line(n, 40)} {line(versions[n], 40)}" for n in order)


def found_in_words(row: Row) -> str:
    """Return what was found, or why nothing was found."""
    if is_right(row):
        unseen = f"; not observed: {row['reason']}" if row.get("reason") else ""
        return line(f"{_right(row)}{unseen}", 600)
    return line(row.get("fault") or row.get("reason") or "", 600)


def _right(row: Row) -> str:
    if found := row.get("delivery"):
        return (
            f"{found['tokens']} sampled tokens have the probabilities of the new weights ({distance_in_words(found)}; the "
            f"nearest other weights that were told apart: {number(nearest(found))})"
        )
    return (
        "the coefficients are those of the configured objective"
        if row.get("asked")
        else "every token counts once"
    )


def distance_in_words(found: Mapping[str, Any]) -> str:
    """Return how far the samples are from the new weights."""
    return f"{number(found['distance'])} {'times the noise' if found['evidence'] == 'reported' else 'standard errors'}"


def nearest(found: Mapping[str, Any]) -> float:
    """Return how far the nearest weights are that the samples tell apart from the new ones; 0 if there are none."""
    apart = [one["separation"] for one in found["candidates"]]
    return min((s for s in apart if s > 2 * found["limit"]), default=0.0)


def loss_in_words(row: Row) -> str:
    """Return a sentence that says whether the logged loss could have shown the fault."""
    could = row.get("logged_loss_could_show_it")
    if could is None:
        return "no loss was logged for this step, so the loss could not have shown the fault"
    losses = (row.get("logged_loss"), row.get("true_loss"))
    logged, true = (f"{v:.4f}" if isinstance(v, int | float) else NONE for v in losses)
    verb = "could" if could else "could not"
    return f"the logged loss is {logged} (correct: {true}), so it {verb} have shown the fault"


def is_right(row: Row) -> bool:
    return row.get("verdict") == Verdict.RIGHT


def by_rank(row: Row, key: str) -> list[list[Any]]:
    """Return the ``weights`` or ``tokens`` of each rank; [] if there are none."""
    return [list(rank) for rank in row.get(key) or []]


def as_text(row: Row) -> str:
    """Return a finding as a few lines of plain text."""
    lines = [found_in_words(row)]
    for key in ("tokens", "weights"):
        ranks = [", ".join(map(number, rank)) for rank in by_rank(row, key)]
        if ranks:
            lines.append(f"{key} per micro-batch: {' | '.join(ranks)}")
    if row.get("relative_error") is not None:
        lines.append(f"relative error {small(row['relative_error'])}, residual {small(row.get('residual'))}")
        if not is_right(row):
            lines.append(loss_in_words(row))
    lines += [f"{key}: {line(row[key])}" for key in ("remedy", "reproducer") if row.get(key)]
    return "\n".join(lines)


def wrong_models(document: Row) -> list[Row]:
    """Return the classes whose loss is not the shifted cross-entropy of their logits, or ignores
    num_items_in_batch."""
    ran = [row for row in document["models"] if "not_run" not in row]
    return [row for row in ran if row["shift"] != 1 or row["count"] == "ignored"]


def models_in_words(document: Row) -> str:
    """Return the sweep over model classes as text: the unusual classes, then the count of each answer."""
    ran, wrong = [row for row in document["models"] if "not_run" not in row], wrong_models(document)
    count = f"{len(ran)} of {len(document['models'])} classes were run"
    lines = [f"transformers {document['transformers']}: {count}"]
    lines += [f"  {r['class']}: labels at shift {r['shift']}, num_items_in_batch {r['count']}" for r in wrong]
    for question in ("shift", "count", "padding", "packed, restarted positions", "packed, a mask of ones"):
        counted = Counter(str(row[question]) for row in ran)
        lines.append(f"{question}: " + ", ".join(f"{answer} {n}" for answer, n in counted.most_common()))
    lines += [f"NOT RUN {row['class']}: {row['not_run']}" for row in document["models"] if "not_run" in row]
    return "\n".join(lines)
