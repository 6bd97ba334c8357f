"""verl's SFTTrainer of releases 0.6.0 and later, with its own configuration, data set, loader, FSDP2 engine and loss.

verl registers this engine only for GPUs; here the same class is registered for the CPU, in float32 and with torch's
SGD. torch.cpu gets functions that say how much GPU memory is used. No checkpoint is written. The last token of
every answer is the end-of-sequence token. Options: arch; ``remove_padding`` is verl's ``use_remove_padding``.
"""

from __future__ import annotations

import contextlib
from typing import Any

import chats
import harness
import torch
import verl_sft
from fsdp2 import whole

SUBJECTS = [{
    "name": "verl SFTTrainer", "needs": ["verl", "transformers", "torch"],
    "cases": ["ENGINE", "chat", "clipped", "scheduled"],
    "without": {"window": "its data loader leaves out an incomplete last batch",
                "resumed": "its checkpoints are made for GPUs"},
    "configurations": [
        {"arch": "llama", "remove_padding": True, "processes": [1, 2]},
        {"arch": "llama", "remove_padding": False},
    ],
}]  # fmt: skip


def register(spec: harness.Spec, recorders: list[harness.Recorder]) -> None:
    """Register verl's engine for the CPU, with our optimizer, and with a recorder on the model that it builds."""
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    class Engine(FSDPEngineWithLMHead):
        def _build_module(self) -> Any:
            module = super()._build_module()
            names = sorted(name for name, _ in module.named_parameters())

            def snapshot() -> torch.Tensor:
                now = dict(module.named_parameters())
                return harness.flat([whole(now[name]) for name in names])

            recorders.append(harness.Recorder(spec, harness.tiny_model(spec)))
            recorders[0].resume(module, snapshot)
            return module

        def _build_optimizer(self, module: Any) -> Any:
            return spec.optimizer(module.parameters())

        def _build_lr_scheduler(self, optimizer: Any) -> Any:
            return spec.scheduler(optimizer)

    EngineRegistry._engines["language_model"]["fsdp2"]["cpu"] = Engine


def on_cpu() -> None:
    """Let verl work on the CPU. Releases from 0.9 on ask a platform, which others may add, for everything."""
    verl_sft.on_cpu()
    with contextlib.suppress(ModuleNotFoundError):
        from verl.plugin.platform import platform_manager

        class Cpu(platform_manager.PlatformCUDA):
            device_name, device_module = "cpu", torch.cpu

            def current_device(self) -> str:
                return "cpu"

            def communication_backend_name(self) -> str:
                return "gloo"

            def synchronize(self, *options: Any) -> None: ...

            set_device = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = synchronize

        platform_manager.set_platform(Cpu())


def run(spec: harness.Spec) -> None:
    harness.join_ranks(spec)
    on_cpu()
    verl_sft.need("verl.trainer.sft_trainer")
    from verl.trainer import sft_trainer as verl_trainer

    spec.rows = [chats.ended(row) for row in spec.rows]
    data = spec.folder / f"rows-{spec.rank}.parquet"
    own = spec.folder / f"model-{spec.rank}"
    harness.tiny_model(spec).save_pretrained(own)
    chats.tokenizer(spec.vocabulary, chats.ENDED).save_pretrained(own)
    verl_sft.write_rows(spec, data)
    config = verl_sft.configuration("sft_trainer_engine", verl_sft.settings(spec, data) | {
        "data.use_dynamic_bsz": False,
        "data.num_workers": 0,
        "model.path": str(own),
        "model.use_remove_padding": spec.options["remove_padding"],
        "model.enable_gradient_checkpointing": False,
        "model.override_config": {"attn_implementation": "eager"},
        "engine.strategy": "fsdp2",
        "engine.mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        "engine.use_torch_compile": False,
    })  # fmt: skip
    recorders: list[harness.Recorder] = []
    register(spec, recorders)

    class Trainer(verl_trainer.SFTTrainer):
        def _build_ckpt_handler(self) -> None:
            nothing = lambda *args, **options: 0  # noqa: E731
            self.ckpt_handler = type(
                "Nothing", (), {"load_checkpoint": nothing, "save_checkpoint": nothing}
            )()

    trainer = Trainer(config=config)
    verl_trainer.Tracking = verl_sft.tracker(spec, recorders[0])
    trainer.fit()
    recorders[0].finish(**harness.versions("verl", "transformers", "tensordict"))
