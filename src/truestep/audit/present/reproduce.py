"""A short script of its own for a fault: the framework and torch alone, one step, the weights that it had.

It shares no code with the audit: whoever doubts a finding, or reports it upstream, reads one page.
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

PLAIN = """class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = torch.nn.Embedding(64, 32), torch.nn.Linear(32, 32)
        self.head = torch.nn.Linear(32, 64)
    def forward(self, input_ids):
        return self.head(torch.tanh(self.inner(self.embed(input_ids))))
def make_model():
    torch.manual_seed(0)
    return Model()
def logits_of(output):
    return output"""
LLAMA = """import transformers
def make_model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, attn_implementation="eager"))
def logits_of(output):
    return output.logits"""
GPT2 = """import transformers
def make_model():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
def logits_of(output):
    return output.logits"""
TORCHTUNE = """from torchtune.models.llama3 import llama3
def make_model():
    torch.manual_seed(0)
    return llama3(vocab_size=64, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=256,
                  intermediate_dim=64)
def logits_of(output):
    return output"""
MODELS = {"plain": PLAIN, "llama": LLAMA, "gpt2": GPT2}
ONE_STEP = """One SGD step over {} micro-batches; prints the weight that each one's tokens had in it. Right is 1 each."""
TWO_EPOCHS = """Two epochs of six micro-batches, four to a step; prints the weights in the second epoch's first step.
Right is 1 for its own four and 0 for the two that the first epoch left over."""
OF_TORCHTUNE = {"says": TWO_EPOCHS, "rows": "6", "model": TORCHTUNE}
WITHOUT_COMPILER = """import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs no compiler then"""
TRAINER_CONFIG = (
    "{'zero_optimization': ZERO, 'zero_force_ds_cpu_optimizer': False, 'zero_allow_untested_optimizer': True, "
    "'train_micro_batch_size_per_gpu': 'auto', 'gradient_accumulation_steps': 'auto'}"
)


def script(finding: Finding, which: str) -> str:
    """The text; ``which`` names the subject's script. "" where there is no template for it.

    It reproduces the pattern of weights over one step of four micro-batches a rank, under SGD.
    """
    template = TEMPLATES / f"reproduce_{which}.txt"
    if not template.is_file():
        return ""
    options, ranks = finding.configuration, int(finding.configuration.get("processes", 1))
    found = ", ".join(f"{k} {v}" for k, v in finding.versions.items())
    title = re.sub(r'["\\\n]', " ", f"{finding.subject} ({found}): {row_of(finding)['fault']}.")
    words = {
        "title": title[:118],
        "run": f"torchrun --nproc-per-node {ranks} FILE" if ranks > 1 else "python FILE",
        "says": ONE_STEP.format(4 * ranks),
        "rows": "4",
        "model": MODELS.get(str(options.get("arch", "plain")), LLAMA),
        **(OF_TORCHTUNE if which == "torchtune_sft" else {}),
        **_of_deepspeed(options),
        **_of_trainer(options),
    }
    common = (TEMPLATES / "reproduce_common.txt").read_text(encoding="utf-8")
    text = Template(common + template.read_text(encoding="utf-8")).substitute(words)
    return "\n".join(line for line in text.split("\n") if line.strip()) + "\n"


def _of_deepspeed(options: Mapping[str, Any]) -> dict[str, str]:
    manual = bool(options.get("manual"))
    zero: dict[str, Any] = {"stage": options.get("stage", options.get("zero_stage", 2))}
    if options.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if manual:
        boundary = "engine.set_gradient_accumulation_boundary(index == 3)"
        return {"zero": repr(zero), "accumulation": "1", "boundary": boundary, "step": "index == 3"}
    return {"zero": repr(zero), "accumulation": "4", "boundary": "", "step": "True"}


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
