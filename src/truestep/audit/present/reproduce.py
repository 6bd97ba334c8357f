"""Writes a short script that reproduces a fault with only the framework and torch.

The script takes one step and prints the weights in it. It does not share code with the audit, so one page is
enough to check a finding or to report it upstream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from truestep.audit.measure.findings import Finding
from truestep.audit.present.words import row_of

TEMPLATES = Path(__file__).parent / "templates"
ONE_STEP = """Takes one SGD step over {} micro-batches and prints their weights. The correct weight is 1."""
TWO_EPOCHS = """Trains for two epochs of six micro-batches, with four micro-batches per step.
Prints the weight of each micro-batch in the first step of the second epoch. The correct weight is 1 for the
four micro-batches of this step, and 0 for the two left over from the first epoch."""
LLAMA = "intermediate_size=64, num_key_value_heads=2"
MODELS = {  # as in subjects/tiny.py: class, configuration, sizes
    "llama": ("Llama", "LlamaConfig", LLAMA),
    "qwen2": ("Qwen2", "Qwen2Config", LLAMA),
    "gemma3": ("Gemma3", "Gemma3TextConfig", LLAMA + ", head_dim=8"),
    "neox": ("GPTNeoX", "GPTNeoXConfig", "intermediate_size=64"),
    "opt": ("OPT", "OPTConfig", "ffn_dim=64, word_embed_proj_dim=32, dropout=0.0"),
}
WITHOUT_COMPILER = """import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # then no compiler is needed"""
TRAINER_CONFIG = (
    "{'zero_optimization': ZERO, 'zero_force_ds_cpu_optimizer': False, 'zero_allow_untested_optimizer': True, "
    "'train_micro_batch_size_per_gpu': 'auto', 'gradient_accumulation_steps': 'auto'}"
)


def script(finding: Finding, which: str) -> str:
    """Return the script as text, or "" if the subject's adapter ``which`` has no template.

    The script reproduces the pattern of weights over one step with four micro-batches per rank, under SGD.
    """
    if not (TEMPLATES / f"reproduce_{which}.txt").is_file():
        return ""
    options, ranks = finding.configuration, int(finding.configuration.get("processes", 1))
    found = ", ".join(f"{k} {v}" for k, v in finding.versions.items())
    torchtune, arch = which == "torchtune_sft", str(options.get("arch", "plain"))
    title = re.sub(r'["\\\n]', " ", f"{finding.subject} ({found}): {row_of(finding)['fault']}.")
    words = {
        "title": title[:118],
        "run": f"torchrun --nproc-per-node {ranks} FILE" if ranks > 1 else "python FILE",
        "says": TWO_EPOCHS if torchtune else ONE_STEP.format(4 * ranks),
        "rows": "6" if torchtune else "4",
        "model": _template("model_torchtune") if torchtune else _model(arch),
        **_of_deepspeed(options),
        **_of_trainer(options),
    }
    text = Template(_template("common") + _template(which)).substitute(words)
    return "\n".join(line for line in text.split("\n") if line.strip()) + "\n"


def _model(arch: str) -> str:
    """Return the code that makes the audited model class."""
    if arch in ("plain", "gpt2"):
        return _template(f"model_{arch}")
    name, config, sizes = MODELS.get(arch, MODELS["llama"])
    words = {"model_class": f"{name}ForCausalLM", "config_class": config, "sizes": sizes}
    return Template(_template("model_llama")).substitute(words)


def _template(name: str) -> str:
    return (TEMPLATES / f"reproduce_{name}.txt").read_text(encoding="utf-8")


def _of_deepspeed(options: Mapping[str, Any]) -> dict[str, str]:
    manual = options.get("manual")
    step = "index == 3" if manual else "True"
    zero: dict[str, Any] = {"stage": options.get("stage", options.get("zero_stage", 2))}
    if options.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    boundary = f"engine.set_gradient_accumulation_boundary({step})" if manual else ""
    return {"zero": repr(zero), "accumulation": "1" if manual else "4", "boundary": boundary, "step": step}


def _of_trainer(options: Mapping[str, Any]) -> dict[str, str]:
    extra = []
    if "average_tokens_across_devices" in options:
        extra.append(f"average_tokens_across_devices={bool(options['average_tokens_across_devices'])}")
    if options.get("processes", 1) > 1:
        extra.append('ddp_backend="gloo"')
    if options.get("zero_stage") is None:
        return {"extra": ", ".join(extra), "prepare": ""}
    extra.append("\n    deepspeed=" + TRAINER_CONFIG.replace("ZERO", _of_deepspeed(options)["zero"]))
    return {"extra": ", ".join(extra), "prepare": WITHOUT_COMPILER}
