"""verl's FSDPSFTTrainer, with its own configuration, data sets, sampler, data loader, ``fit``, loss and clip.

Only three of its methods are replaced. The model is tiny and in float32 on FSDP2's CPU mesh, with torch's SGD;
no checkpoint is written; its tracker passes the loss to the recorder. The forward pass stays under the trainer's
bfloat16 autocast. The last token of every answer is the end-of-sequence token, which verl's data sets append.
Options: arch; ``dataset`` is single-turn (SFTDataset, up to 0.7.0) or multi-turn (MultiTurnSFTDataset).
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import chats
import harness
import torch
from fsdp2 import whole

SUBJECTS = [{
    "name": "verl FSDPSFTTrainer", "needs": ["verl", "transformers", "torch"],
    "without": {"masked": "its data sets cannot read a row without an answer",
                "window": "its data loader leaves out an incomplete last batch",
                "resumed": "its checkpoints are made for GPUs"},
    "configurations": [
        {"arch": "llama", "dataset": "single-turn", "processes": [1, 2], "cases": ["ragged", "unsplit"]},
        {"arch": "llama", "dataset": "multi-turn", "cases": ["ragged", "unsplit", "clipped", "scheduled"]},
    ],
}]  # fmt: skip
NO_LIMIT = 1e9  # as the norm to clip to


def on_cpu() -> None:
    """Let verl ask for GPU memory on a CPU, and import a package for images that it does not use here."""
    for name in (
        "memory_allocated",
        "memory_reserved",
        "max_memory_allocated",
        "max_memory_reserved",
        "empty_cache",
    ):
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, lambda *options: 0)
    torch.cpu.mem_get_info = lambda *options: (0, 0)  # type: ignore[attr-defined]
    if "qwen_vl_utils" not in sys.modules and importlib.util.find_spec("qwen_vl_utils") is None:
        images = types.ModuleType("qwen_vl_utils")
        vars(images).update(fetch_image=None, fetch_video=None)
        sys.modules["qwen_vl_utils"] = images


def need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise SystemExit(f"SystemExit: this release has no {module}")


def configuration(name: str, own: dict[str, Any]) -> Any:
    """Return verl's configuration file of that name with our own values, given as dotted keys."""
    import hydra
    import verl
    from omegaconf import OmegaConf, open_dict

    folder = Path(verl.__file__).parent / "trainer" / "config"
    with hydra.initialize_config_dir(str(folder), version_base=None):
        config = hydra.compose(name)
    with open_dict(config):
        for key, value in own.items():
            OmegaConf.update(config, key, value)
    return config


def settings(spec: harness.Spec, data: Path) -> dict[str, Any]:
    """Return what both of verl's SFT trainers are configured with."""
    batch = spec.rows_per_microbatch * spec.accumulation * spec.world_size
    return {
        "data.train_batch_size": batch,
        "data.micro_batch_size_per_gpu": spec.rows_per_microbatch,
        "data.train_files": str(data),
        "data.max_length": 128,
        "optim.clip_grad": spec.max_grad_norm or NO_LIMIT,
        "trainer.default_local_dir": str(spec.folder / "out"),
        "trainer.total_epochs": spec.epochs,
        "trainer.device": "cpu",
        "trainer.resume_mode": "disable",
        "trainer.logger": ["console"],
    }


def tracker(spec: harness.Spec, recorder: harness.Recorder) -> Any:
    """Return a class in place of verl's Tracking. On a CPU, verl does not average the loss over ranks."""

    class Tracker:
        def __init__(self, **options: Any) -> None: ...

        def log(self, data: dict[str, Any], step: int) -> None:
            if "train/loss" in data and spec.world_size == 1:
                recorder.logged["loss"].append(float(data["train/loss"]))

    return Tracker


def sharded(spec: harness.Spec, model: torch.nn.Module) -> harness.Recorder:
    """Shard the model in place with verl's own ``apply_fsdp2``, and return its recorder."""
    from torch.distributed.device_mesh import init_device_mesh
    from verl.utils.fsdp_utils import apply_fsdp2

    names = sorted(name for name, _ in model.named_parameters())

    def snapshot() -> torch.Tensor:
        now = dict(model.named_parameters())
        return harness.flat([whole(now[name]) for name in names])

    recorder = harness.Recorder(spec, model, snapshot)
    mesh = init_device_mesh("cpu", (spec.world_size,), mesh_dim_names=("fsdp",))
    apply_fsdp2(model, {"mesh": mesh, "reshard_after_forward": True}, {"wrap_policy": {}})
    return recorder


def write_rows(spec: harness.Spec, place: Path) -> None:
    """Write the rows as verl's parquet file, with the columns of both data sets."""
    import pandas

    chat = [chats.messages(row) for row in spec.rows]
    first = [chats.words([i for on, part in chats.turns(row) if not on for i in part]) for row in spec.rows]
    last = [c[-1]["content"] for c in chat]
    pandas.DataFrame({"messages": chat, "question": first, "answer": last}).to_parquet(place)


def run(spec: harness.Spec) -> None:
    harness.join_ranks(spec)
    on_cpu()
    need("verl.trainer.fsdp_sft_trainer")
    from torch.distributed.device_mesh import init_device_mesh
    from verl.trainer import fsdp_sft_trainer as verl_trainer

    spec.rows = [chats.ended(row) for row in spec.rows]
    data = spec.folder / "rows.parquet"
    write_rows(spec, data)
    several = spec.options["dataset"] == "multi-turn"
    own = {"data.val_files": str(data), "data.multiturn.enable": several, "model.strategy": "fsdp2"}
    config = configuration("sft_trainer", settings(spec, data) | own)
    tokenizer = chats.tokenizer(spec.vocabulary, chats.ENDED)
    model = harness.tiny_model(spec)
    recorder = sharded(spec, model)

    class Trainer(verl_trainer.FSDPSFTTrainer):
        def _build_model_optimizer(self) -> None:
            self.model = self.fsdp_model = model
            self.optimizer = spec.optimizer(model.parameters())
            self.lr_scheduler = spec.scheduler(self.optimizer)
            self.steps_per_epoch = len(self.train_dataloader)

        def _init_checkpoint_manager(self) -> None: ...

        def save_checkpoint(self, step: int) -> None: ...

    verl_trainer.Tracking = tracker(spec, recorder)
    dataset = verl_trainer.create_sft_dataset(config.data.train_files, config.data, tokenizer)
    meshes = [
        init_device_mesh("cpu", (spec.world_size, *sizes), mesh_dim_names=names)
        for sizes, names in (((), ("fsdp",)), ((1,), ("dp", "sp")))
    ]
    trainer = Trainer(
        config=config, device_mesh=meshes[0], ulysses_device_mesh=meshes[1], tokenizer=tokenizer,
        train_dataset=dataset, val_dataset=dataset,
    )  # fmt: skip
    trainer.fit()
    recorder.finish(**harness.versions("verl", "transformers", "tensordict"))
