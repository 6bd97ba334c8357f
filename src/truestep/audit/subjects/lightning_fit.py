"""Lightning's ``Trainer.fit`` on a LightningModule with ``accumulate_grad_batches``, its clip and its checkpoints.

Lightning divides the loss of ``training_step`` by ``accumulate_grad_batches``, and DDP averages over ranks, so the
module's loss is the sum over the trained tokens, divided by their number in the window and multiplied by both.
Options: arch; ``naive`` returns each micro-batch's mean, as in the first example of the documentation; ``stateful``
uses a data loader that has ``state_dict``, without which Lightning starts a resumed epoch from its first row.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import harness
import lightning
import torch

SUBJECTS = [{
    "name": "Lightning Trainer.fit", "needs": ["lightning", "torch"], "cases": ["CASES", "RELATED"],
    "configurations": [{"stateful": True, "processes": [1, 2]}, {"stateful": False}],
}]  # fmt: skip
Window = list[list[int]]
RANKS = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if key in os.environ}


class Stateful(torch.utils.data.DataLoader):
    """A data loader that says where it is, and can start there."""

    place = start = 0

    def __iter__(self) -> Any:
        first, self.start = self.start, 0
        for place in range(first, len(self.dataset)):  # type: ignore[arg-type]
            self.place = place + 1
            yield self.dataset[place]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["place"]


class Module(lightning.LightningModule):
    def __init__(self, spec: harness.Spec, model: torch.nn.Module) -> None:
        super().__init__()
        self.spec, self.model = spec, model
        self.total = 0.0

    def training_step(self, batch: tuple[int, Window], index: int) -> torch.Tensor:
        place, window = batch
        spec, rows = self.spec, window[place]
        if place == 0:
            self.total = harness.everywhere(spec.count(window))
        loss = harness.summed_loss(spec, self.model, rows)
        if spec.options.get("naive"):
            return loss / max(1.0, spec.count([rows]))
        return loss * spec.accumulation * spec.world_size / self.total

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.spec.optimizer(self.model.parameters())
        schedule = {"scheduler": self.spec.scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def run(spec: harness.Spec) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    harness.join_ranks(spec)
    windows = spec.windows()
    one_epoch = [(i, w) for w in windows[: len(windows) // spec.epochs] for i in range(len(w))]
    kind: Any = Stateful if spec.options.get("stateful") else torch.utils.data.DataLoader
    recorder: harness.Recorder | None = None
    at, place = spec.case["resume_after"], spec.folder / "state"
    for last in [at, -1] if at else [-1]:
        module = Module(spec, harness.tiny_model(spec).to(spec.dtype))
        if recorder is None:
            recorder = harness.Recorder(spec, module.model)
        else:
            recorder.resume(module.model)
        saves = lightning.pytorch.callbacks.ModelCheckpoint(place, "state", every_n_train_steps=at or 1)
        trainer = lightning.Trainer(
            accelerator="cpu", devices=spec.world_size, strategy="ddp" if spec.world_size > 1 else "auto",
            max_epochs=spec.epochs, max_steps=last, accumulate_grad_batches=spec.accumulation,
            gradient_clip_val=spec.max_grad_norm or None, use_distributed_sampler=False, logger=False,
            enable_checkpointing=last > 0, callbacks=[saves] if last > 0 else [], enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=str(spec.folder),
        )  # fmt: skip
        loader: Any = kind(one_epoch, batch_size=None, collate_fn=lambda batch: batch)
        trainer.fit(module, loader, ckpt_path=str(place / "state.ckpt") if at and last < 0 else None)
        os.environ.update(RANKS)  # Lightning removes them
    assert recorder is not None
    recorder.finish(**harness.versions("lightning"))
