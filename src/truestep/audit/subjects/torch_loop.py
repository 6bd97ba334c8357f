"""A plain torch loop as every tutorial writes it, with the loss summed and divided once: the control."""

from __future__ import annotations

import kit
import torch
from torch.nn.functional import cross_entropy


def run(spec: kit.Spec) -> None:
    model = kit.tiny_model(spec).to(spec.dtype)
    recorder = kit.Recorder(spec, model)
    optimizer = spec.optimizer(model.parameters())
    model.train()
    micro = spec.batches() * spec.epochs
    for first in range(0, len(micro), spec.accumulation):
        window = micro[first : first + spec.accumulation]
        total = sum(sum(spec.rows[row]["trained"][1:]) for batch in window for row in batch)
        logged = 0.0
        for batch in window:
            loss = torch.zeros(())
            for row in batch:
                logits = kit.logits_of(model(input_ids=torch.tensor([spec.rows[row]["ids"]])))[0, :-1].float()
                labels = torch.tensor(spec.labels(row)[1:])
                loss = loss + cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / total
            loss.backward()
            logged += float(loss)
        optimizer.step()
        optimizer.zero_grad()
        recorder.logged["loss"].append(logged)
    recorder.finish()


if __name__ == "__main__":
    kit.main(run)
