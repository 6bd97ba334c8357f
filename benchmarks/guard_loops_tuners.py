"""Loops of LLaMA-Factory, axolotl and Liger kernels, for ``tests/guard/framework_run.py``."""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from typing import Any

import torch
from framework_run import Run, digest, llama, loop, rows, steps_of, trained
from guard_loops import ACCUMULATION, STEPS, hf, tokenizer, words


def saved_values(run: Run) -> str:
    """Return the digest of the weights that a tuner wrote at its end."""
    from safetensors.torch import load_file

    files = sorted((run.folder / "out").glob("*.safetensors"))
    assert files, "the tuner saved no weights"
    return digest(tensor for file in files for _, tensor in sorted(load_file(file).items()))


def inputs(run: Run, pictures: bool = False) -> None:
    """Write a model, its tokenizer and questions with answers of different lengths to the run's folder. With
    ``pictures``, the model also takes pictures, but the questions have none."""
    (llava() if pictures else llama()).save_pretrained(run.folder / "model")
    (processor() if pictures else tokenizer()).save_pretrained(run.folder / "model")
    asked = [{"question": words(r["input_ids"][:4]), "answer": words(r["input_ids"][4:-1])} for r in rows(72)]
    (run.folder / "rows.json").write_text(json.dumps(asked))


def llava() -> Any:
    import transformers

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    seen = transformers.CLIPVisionConfig(**small, image_size=8, patch_size=4, projection_dim=16)
    config = transformers.LlavaConfig(
        text_config=llama().config, vision_config=seen, image_token_index=63, image_seq_length=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config)


def processor() -> Any:
    import transformers

    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    pictures = transformers.CLIPImageProcessorPil(**sizes)
    return transformers.LlavaProcessor(image_processor=pictures, tokenizer=tokenizer(), image_token="w63")


# LLaMA-Factory


def without_sound() -> None:
    """Replace torchaudio, which LLaMA-Factory imports for sound files, by an empty module."""
    module = types.ModuleType("torchaudio")
    module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = module


def llamafactory(run: Run, pictures: bool = False, **more: Any) -> str:
    without_sound()
    from llamafactory.train.tuner import run_exp

    inputs(run, pictures)
    columns = {"prompt": "question", "response": "answer"}
    described = {"own": {"file_name": "rows.json", "columns": columns}}
    (run.folder / "dataset_info.json").write_text(json.dumps(described))
    args = {
        "stage": "sft", "do_train": True, "finetuning_type": "full", "model_name_or_path": str(run.folder / "model"),
        "dataset_dir": str(run.folder), "dataset": "own", "template": "default", "cutoff_len": 128,
        "cache_dir": str(run.folder / "cache"), "output_dir": str(run.folder / "out"), "overwrite_cache": True,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": ACCUMULATION, "max_steps": STEPS,
        "learning_rate": 1e-3, "seed": 3, "report_to": "none", "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "plot_loss": False, "disable_gradient_checkpointing": True,
        "dataloader_num_workers": 0, "preprocessing_num_workers": None,
    }  # fmt: skip
    run_exp({**args, **more}, callbacks=run.callbacks())
    return saved_values(run)


@loop()
def llamafactory_full(run: Run) -> Any:
    return llamafactory(run)


@loop()
def llamafactory_lora(run: Run) -> Any:
    return llamafactory(run, finetuning_type="lora", lora_rank=4, lora_target="q_proj,v_proj,down_proj")


@loop(verdict="FAULT", code="kept")
def llamafactory_drops(run: Run) -> Any:
    """Every micro-batch overwrites the gradient of the previous one."""
    without_sound()
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    right = CustomSeq2SeqTrainer.training_step

    def training_step(self: Any, model: Any, *given: Any, **more: Any) -> Any:
        model.zero_grad()
        return right(self, model, *given, **more)

    CustomSeq2SeqTrainer.training_step = training_step
    try:
        return llamafactory(run)
    finally:
        CustomSeq2SeqTrainer.training_step = right


@loop(verdict="FAULT", code="micro_mean")
def llamafactory_processor(run: Run) -> Any:
    """Nothing is patched: with a model that has a processor, as those for pictures do, LLaMA-Factory 0.9.5 turns off
    the Trainer's mean over all tokens."""
    return llamafactory(run, pictures=True)


# axolotl


def axolotl(run: Run, all_tokens: bool = False, **more: Any) -> str:
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import BasePlugin, PluginManager
    from axolotl.train import train

    inputs(run)

    def created(plugin: Any, cfg: Any, trainer: Any) -> None:
        if all_tokens:
            trainer.model_accepts_loss_kwargs = True

    methods = {"add_callbacks_pre_trainer": lambda plugin, cfg, model: run.callbacks()}
    methods["post_trainer_create"] = created
    module = types.ModuleType("watching")
    module.Plugin = type("Plugin", (BasePlugin,), methods)  # type: ignore[attr-defined]
    sys.modules["watching"] = module
    PluginManager.get_instance().plugins.clear()
    args = {
        "base_model": str(run.folder / "model"), "plugins": ["watching.Plugin"], "sequence_len": 128,
        "datasets": [{"path": str(run.folder / "rows.json"), "ds_type": "json", "split": "train", "type": {
            "field_instruction": "question", "field_output": "answer", "format": "{instruction}",
            "no_input_format": "{instruction}"}}],
        "dataset_prepared_path": str(run.folder / "prepared"), "output_dir": str(run.folder / "out"),
        "micro_batch_size": 1, "gradient_accumulation_steps": ACCUMULATION, "max_steps": STEPS, "num_epochs": 1,
        "learning_rate": 1e-3, "optimizer": "adamw_torch", "lr_scheduler": "constant", "seed": 3, "bf16": False,
        "fp16": False, "tf32": False, "attn_implementation": "eager", "train_on_inputs": False, "logging_steps": 1,
        "save_strategy": "no", "use_tensorboard": False, "dataset_num_proc": 1, "save_first_step": False,
    }  # fmt: skip
    file = run.folder / "axolotl.yaml"
    file.write_text(yaml.safe_dump({**args, **more}))
    config = load_cfg(str(file))
    train(cfg=config, dataset_meta=load_datasets(cfg=config))
    return saved_values(run)


LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
}


@loop(verdict="FAULT", code="micro_mean")
def axolotl_full(run: Run) -> Any:
    """Nothing is patched: axolotl 0.19.0 turns off the Trainer's mean over all tokens for each model whose ``forward``
    takes ``num_items_in_batch`` as one of its ``**kwargs``, as the models of transformers do."""
    return axolotl(run)


@loop(verdict="FAULT", code="micro_mean")
def axolotl_lora(run: Run) -> Any:
    return axolotl(run, **LORA)


@loop()
def axolotl_all_tokens(run: Run) -> Any:
    """The plugin turns the mean over all tokens on again."""
    return axolotl(run, all_tokens=True)


@loop()
def axolotl_lora_all_tokens(run: Run) -> Any:
    return axolotl(run, all_tokens=True, **LORA)


# Liger kernels, which triton's interpreter runs on the CPU

FUSED = {"rope": False, "swiglu": False, "rms_norm": False, "cross_entropy": False}
FUSED["fused_linear_cross_entropy"] = True


def liger_own(run: Run, reduction: str = "sum", **ignored: Any) -> Any:
    """The backbone, and the head inside the loss: the logits never exist."""
    os.environ["TRITON_INTERPRET"] = "1"
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused, model = LigerFusedLinearCrossEntropyLoss(reduction=reduction), llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    with run.watch(model, optimizer, accumulation=ACCUMULATION) as guard:
        for micro in steps_of(run, STEPS, ACCUMULATION):
            count = trained(run, micro) if reduction == "sum" else ACCUMULATION
            for m in micro:
                hidden = model.model(input_ids=m["input_ids"], attention_mask=m["attention_mask"])[0]
                loss = fused(model.lm_head.weight, hidden[:, :-1].flatten(0, 1), m["labels"][:, 1:].flatten())
                (loss / count).backward()
            optimizer.step()
            guard.step()
            optimizer.zero_grad()
    return list(model.parameters())


loop(name="liger_own")(liger_own)
loop(name="liger_own_mean", verdict="FAULT", code="micro_mean", reduction="mean")(liger_own)


@loop()
def liger_trainer(run: Run) -> Any:
    os.environ["TRITON_INTERPRET"] = "1"
    return hf(run, llama(), use_liger_kernel=True, liger_kernel_config=FUSED)
