"""accelerate's documented loop: ``accumulate``, ``backward``, and the summed loss divided by the window's tokens.

Accelerate divides by the accumulation steps itself and DDP averages over ranks; its guide multiplies both back.
Options: arch, optimizer; ``naive`` leaves the model's mean per micro-batch to accelerate (what the first example of the
documentation does: a mean of means).
"""

from __future__ import annotations

import kit
import torch
from accelerate import Accelerator
from hf_trainer import fresh_state


def run(spec: kit.Spec) -> None:
    fresh_state()
    model = kit.tiny_model(spec)
    recorder = kit.Recorder(spec, model)
    accelerator = Accelerator(gradient_accumulation_steps=spec.accumulation, cpu=True)
    wrapped, optimizer = accelerator.prepare(model, spec.optimizer(model.parameters()))
    wrapped.train()
    for window in spec.windows():
        counts = [float(sum(sum(spec.rows[row]["trained"][1:]) for row in batch)) for batch in window]
        total = accelerator.reduce(torch.tensor(sum(counts)), "sum").item()
        for index, batch in enumerate(window):
            with accelerator.accumulate(wrapped):
                loss = kit.summed_loss(spec, wrapped, batch)
                if spec.options.get("naive"):
                    accelerator.backward(loss / max(1.0, counts[index]))
                else:
                    accelerator.backward(loss * spec.world_size * spec.accumulation / total)
                optimizer.step()
                optimizer.zero_grad()
    recorder.finish(**kit.versions("accelerate"))


if __name__ == "__main__":
    kit.main(run)
