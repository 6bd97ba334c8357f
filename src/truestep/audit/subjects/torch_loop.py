"""A plain torch loop as every tutorial writes it, with the loss summed and divided once: the control."""

from __future__ import annotations

import kit


def run(spec: kit.Spec) -> None:
    model = kit.tiny_model(spec).to(spec.dtype)
    recorder = kit.Recorder(spec, model)
    optimizer = spec.optimizer(model.parameters())
    model.train()
    for window in spec.windows():
        total = sum(sum(spec.rows[row]["trained"][1:]) for batch in window for row in batch)
        logged = 0.0
        for batch in window:
            loss = kit.summed_loss(spec, model, batch) / total
            loss.backward()
            logged += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        recorder.logged["loss"].append(logged)
    recorder.finish()


if __name__ == "__main__":
    kit.main(run)
