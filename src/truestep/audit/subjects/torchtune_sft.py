"""torchtune's full fine-tuning recipe for one device, with its own ``train``, loss and data loader.

What its ``setup`` would read from files (weights, tokenizer, logger) is set directly, for a tiny version of
torchtune's own Llama 3. No checkpoint is written, as the recipe's checkpoints are weights of whole epochs.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import torch
import torchtune
from omegaconf import DictConfig
from torch import nn
from torchtune.models.llama3 import llama3
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.training import DummyProfiler

SUBJECTS = [{
    "name": "torchtune SFT recipe", "needs": ["torchtune", "torch"], "cases": ["CASES", "clipped", "scheduled"],
    "without": {"resumed": "its checkpoints cover whole epochs and contain its own weight files"},
}]  # fmt: skip


class Rows(torch.utils.data.Dataset):
    """The dataset that the recipe's data loader is configured to make."""

    def __init__(self, tokenizer: Any, ids: Any, labels: Any) -> None:
        self.pairs = [{"tokens": list(i), "labels": list(k)} for i, k in zip(ids, labels, strict=True)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return dict(self.pairs[index])


class ByIds(nn.Module):
    """The decoder with the input name that the recorder expects. ``ByTokens`` has the name in the recipe."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.inner(input_ids)


class ByTokens(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.inner(input_ids=tokens)


def recipe_class() -> Any:
    """Load the recipe from its file; recipes are scripts next to the package, not modules in it."""
    path = Path(torchtune.__file__).parent.parent / "recipes" / "full_finetune_single_device.py"
    found = importlib.util.spec_from_file_location("full_finetune_single_device", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.FullFinetuneRecipeSingleDevice


def run(spec: harness.Spec) -> None:
    torch.manual_seed(0)
    decoder = llama3(
        vocab_size=spec.vocabulary, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=256,
        intermediate_dim=64,
    )  # fmt: skip
    model = ByIds(decoder)
    recorder = harness.Recorder(spec, model)
    loss = CEWithChunkedOutputLoss()  # as in torchtune's own configurations
    decoder.set_num_output_chunks(loss.num_output_chunks)
    recipe = recipe_class()
    made = recipe.__new__(recipe)
    optimizer = spec.optimizer(decoder.parameters())

    def log(told: dict[str, float], step: int) -> None:
        recorder.logged["loss"].append(float(told["loss"]))

    vars(made).update(
        **dict.fromkeys(("_compile", "_optimizer_in_bwd", "_log_peak_memory_stats"), False),
        profiler_profile_memory=False,
        max_steps_per_epoch=None,
        _log_every_n_steps=1,
        epochs_run=0,
        total_epochs=spec.epochs,
        global_step=0,
        _device=torch.device("cpu"),
        _gradient_accumulation_steps=spec.accumulation,
        _clip_grad_norm=spec.max_grad_norm or None,
        _model=ByTokens(model),
        _tokenizer=SimpleNamespace(pad_id=0),
        _optimizer=optimizer,
        _loss_fn=loss,
        _lr_scheduler=spec.scheduler(optimizer) if spec.decays else None,
        _profiler=DummyProfiler(),
        _metric_logger=SimpleNamespace(log_dict=log),
        activations_handling_ctx=contextlib.nullcontext(),
        ignore_labels_cache=torch.full((spec.rows_per_microbatch, 1), loss.ignore_index),
        save_checkpoint=lambda epoch: None,
    )
    ids, labels = [r["ids"] for r in spec.rows], [spec.labels(i) for i in range(len(spec.rows))]
    dataset = DictConfig({"_component_": "torchtune_sft.Rows", "ids": ids, "labels": labels})
    collate = "torchtune.data.padded_collate_sft"
    made._dataloader = made._setup_data(dataset, True, spec.rows_per_microbatch, collate)
    made._steps_per_epoch = len(made._dataloader) // spec.accumulation
    made.train()
    recorder.finish(**harness.versions("torchtune", "torchao"))
