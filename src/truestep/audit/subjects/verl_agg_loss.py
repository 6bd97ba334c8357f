"""verl's own ``agg_loss``, audited as a function. verl's trainers need a cluster of GPUs; its loss does not.

The loop around it uses the value as verl's actor does. If a release's function does not take counts of the
whole batch, each micro-batch's mean is divided by the number of micro-batches. Otherwise, the counts are
passed. Gradients are averaged over ranks, as FSDP does.
"""

from __future__ import annotations

import inspect

import harness
from verl.trainer.ppo.core_algos import agg_loss

SUBJECTS = [{
    "name": "verl agg_loss (function level)", "needs": ["verl", "torch"], "processes": [1, 2], "cases": ["CASES"],
    "without": {"clipped, scheduled, resumed": "only the loss is verl's; the clip, schedule and checkpoint are not"},
}]  # fmt: skip


def run(spec: harness.Spec) -> None:
    harness.join_ranks(spec)
    model = harness.tiny_model(spec)
    recorder = harness.Recorder(spec, model)
    optimizer = spec.optimizer(model.parameters())
    counted = "batch_num_tokens" in inspect.signature(agg_loss).parameters
    model.train()
    for window in spec.windows():
        total = harness.everywhere(spec.count(window))
        logged = 0.0
        for rows in window:
            loss_mat, mask = harness.token_losses(spec, model, rows)
            if counted:
                extra = {"dp_size": spec.world_size, "batch_num_tokens": total}
                loss = agg_loss(loss_mat, mask, "token-mean", **extra)
            else:
                loss = agg_loss(loss_mat, mask, "token-mean") / len(window)
            loss.backward()
            logged += float(loss.detach()) / spec.world_size
        harness.average_gradients(spec, model)
        optimizer.step()
        optimizer.zero_grad()
        recorder.logged["loss"].append(harness.everywhere(logged))
    recorder.finish(**harness.versions("verl"))
