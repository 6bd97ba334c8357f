"""verl's own ``agg_loss``, at function level: its trainers need a cluster of GPUs, its loss does not.

The loop around it is what verl's actor does with the value: a release whose function takes no counts of the
whole batch averages every micro-batch and divides by their number; one that takes them is given them.
Gradients are averaged over ranks, as FSDP does.
"""

from __future__ import annotations

import inspect

import kit
import torch
from verl.trainer.ppo.core_algos import agg_loss


def run(spec: kit.Spec) -> None:
    kit.join_ranks(spec)
    model = kit.tiny_model(spec)
    recorder = kit.Recorder(spec, model)
    recorder.notes.append("function level: the loss is verl's own, the loop around it is not")
    optimizer = spec.optimizer(model.parameters())
    counted = "batch_num_tokens" in inspect.signature(agg_loss).parameters
    model.train()
    for window in spec.windows():
        mine = sum(sum(spec.rows[row]["trained"][1:]) for rows in window for row in rows)
        total = torch.tensor(float(mine))
        torch.distributed.all_reduce(total)
        logged = 0.0
        for rows in window:
            loss_mat, mask = kit.token_losses(spec, model, rows)
            if counted:
                extra = {"dp_size": spec.world_size, "batch_num_tokens": float(total)}
                loss = agg_loss(loss_mat, mask, "token-mean", **extra)
            else:
                loss = agg_loss(loss_mat, mask, "token-mean") / len(window)
            loss.backward()
            logged += float(loss.detach()) / spec.world_size
        for parameter in model.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= spec.world_size
        optimizer.step()
        optimizer.zero_grad()
        everywhere = torch.tensor(logged, dtype=torch.float64)
        torch.distributed.all_reduce(everywhere)
        recorder.logged["loss"].append(float(everywhere))
    recorder.finish(**kit.versions("verl"))


if __name__ == "__main__":
    kit.main(run)
