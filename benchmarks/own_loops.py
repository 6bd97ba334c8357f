"""Audits forty training steps in the styles that people write. Are right ones accused, or wrong ones missed?

    python benchmarks/own_loops.py [--json FILE] [NAME ...]

The steps are in own_loops_right.py and own_loops_wrong.py. They were written from docs/audit.md, by someone who had
not read the code that judges them. Exit code 1: a right step is accused or a wrong one is not found.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import own_loops_right
import own_loops_wrong

from truestep.audit.environments.in_process import audit_function

RIGHT, DEFAULT, FAULT = {"RIGHT"}, {"DEFAULT"}, {"FAULT"}
EITHER = RIGHT | DEFAULT
RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

LOOPS: dict[str, tuple[set[str], str]] = {
    "hf_num_items_in_batch": (RIGHT, "the mean over all trained tokens"),
    "scaled_autocast": (RIGHT, "the mean, with autocast's rounding; the loss scale is a power of two"),
    "closure_step": (RIGHT, "the mean; one optimizer step, whose closure computes it"),
    "vmap_rows": (RIGHT, "the mean, from one gradient per row"),
    "packed_positions": (RIGHT, "the mean; packing changes nothing without attention"),
    "left_padded_by_length": (RIGHT, "the mean; padding and order have no effect"),
    "checkpointed_with_ema": (RIGHT, "the mean; the second forward pass recomputes the first"),
    "main_grads_by_hooks": (RIGHT, "the mean, accumulated in float64"),
    "chunked_logits": (RIGHT, "the mean; the gradient continues through the detached logits"),
    "labels_in_place": (RIGHT, "the mean; the mask is taken before the labels are changed"),
    "z_loss": (DEFAULT, "auxiliary term on the trained tokens (z-loss)"),
    "dft": (DEFAULT, "token weights (dynamic fine-tuning)"),
    "sequence_mean": (DEFAULT, "mean of the rows' means over all rows of the step"),
    "per_real_token": (DEFAULT, "one factor per step, which does not depend on the split or the padding"),
    "class_weights": (DEFAULT, "token weights by token id, divided once by their sum"),
    "kl_to_reference": (DEFAULT, "auxiliary term on the trained tokens (KL to a frozen copy)"),
    "frozen_groups_warmup_clip": (EITHER, "the clipped mean; rates and frozen parameters are choices"),
    "low_rank_adapter": (EITHER, "the mean, with extra parameters that the step itself brings"),
    "bfloat16_by_hand": (EITHER, "the mean, rounded by casts"),
    "sharpness_aware": (DEFAULT, "the mean's gradient at perturbed parameters (SAM)"),
    "mean_of_means": (FAULT, "a token's weight depends on its micro-batch's number of tokens"),
    "weighted_by_real_tokens": (FAULT, "weights from tokens that are not the averaged ones"),
    "last_backward_twice": (FAULT, "the last micro-batch counts twice"),
    "never_zeroed": (FAULT, "earlier steps' data are added to every step"),
    "padded_to_eight": (FAULT, "tokens are added: padding is trained on"),
    "shifted_twice": (FAULT, "labels are shifted twice; the first trained token is lost"),
    "per_device_means": (FAULT, "mean of per-device means"),
    "clipped_after_each": (FAULT, "clipped after every micro-batch"),
    "smoothing_on_padding": (FAULT, "the smoothing's uniform part trains on prompts and padding"),
    "divided_by_positions": (FAULT, "the divisor depends on padding"),
    "divided_twice": (FAULT, "the divisor depends on the number of micro-batches"),
    "running_divisor": (FAULT, "the divisor depends on the order"),
    "nan_step_lost": (FAULT, "all data of a step with an empty micro-batch are lost"),
    "group_texts": (FAULT, "tokens at block boundaries and in the last block are lost"),
    "loss_scale_grows": (FAULT, "later micro-batches weigh more"),
    "softmax_over_rows": (FAULT, "a row's weight depends on the other rows of its micro-batch"),
    "clamped_by_hooks": (FAULT, "clamped in every micro-batch"),
    "no_grad_for_no_sync": (FAULT, "all micro-batches except the last are dropped"),
    "only_inputs_sorted": (FAULT, "rows are trained with other rows' labels"),
    "short_rows_skipped": (FAULT, "rows with one trained token are lost"),
}

# The same steps with a declared objective: (function, objective) -> expected verdicts.
DECLARED: dict[tuple[str, str], set[str]] = {
    ("sequence_mean", "sequence_mean"): RIGHT,
    ("per_real_token", "other"): EITHER,
    ("z_loss", "other"): EITHER,
    ("mean_of_means", "sequence_mean"): FAULT,  # with several rows in a micro-batch, it is another mean
    ("softmax_over_rows", "other"): FAULT,
}


def step_of(name: str) -> Any:
    return getattr(own_loops_right, name, None) or getattr(own_loops_wrong, name)


def audit(name: str, objective: str | None) -> dict[str, Any]:
    """One row of the table: what is expected of the step and what the audit found."""
    expected = LOOPS[name][0] if objective is None else DECLARED[name, objective]
    started = time.monotonic()
    row: dict[str, Any] = {"step": name, "objective": objective, "expected": sorted(expected)}
    try:
        finding = audit_function(step_of(name), **({} if objective is None else {"objective": objective}))
    except RAISED as error:
        row |= {"found": "NOT RUN", "codes": [], "reasons": [repr(error)], "weights": []}
    else:
        row |= {"found": str(finding.verdict.value), "codes": list(finding.codes), "reasons": [str(r) for r in finding.reasons],
                "weights": finding.weights, "causes": str(finding.found)}  # fmt: skip
    row["as_expected"] = row["found"] in expected
    row["accused"] = row["found"] == "FAULT" and "FAULT" not in expected
    row["missed"] = row["found"] != "FAULT" and expected == FAULT
    return row | {"seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="steps to audit (all if none is given)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(LOOPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    jobs: list[tuple[str, str | None]] = [(name, None) for name in LOOPS]
    if "objective" in inspect.signature(audit_function).parameters:
        jobs += DECLARED
    rows = []
    for name, objective in jobs:
        if asked.names and name not in asked.names:
            continue
        row = audit(name, objective)
        rows.append(row)
        mark = (
            ""
            if row["as_expected"]
            else "ACCUSED"
            if row["accused"]
            else "MISSED"
            if row["missed"]
            else "differs"
        )
        title = name if objective is None else f"{name} as {objective}"
        said = " ".join(row["codes"]) or " ".join(row["reasons"])
        print(f"{title:34} {'/'.join(row['expected']):14} {row['found']:15} {mark:8} {said}", flush=True)
    wrong = sum(row["accused"] or row["missed"] for row in rows)
    print(
        f"{len(rows)} audits: {sum(r['accused'] for r in rows)} wrongly accused, {sum(r['missed'] for r in rows)} missed"
    )
    if asked.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        command = " ".join(["python", *sys.argv])
        document = {"commit": commit.stdout.strip(), "command": command, "audits": rows}
        asked.json.write_text(json.dumps(document, indent=1, default=str) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
