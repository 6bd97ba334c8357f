"""Train a small model of each architecture, untouched, by SFT and RL, and write what ran into docs/reference/architectures.md.

    python benchmarks/architectures.py [--only NAME …] [--out results/architectures.json]
    python benchmarks/architectures.py --page        # write the page again from the file

For each architecture a random model of transformers' own class is saved as a folder, and trained with one recipe:

* *step*: log-probabilities of packed rows with shared prompts, and their gradient, against a separate forward pass of
  transformers for each sequence, in float64;
* *run*: SFT and then RL in float32, by ``truestep run``; the gap is that of engine and trainer at sampled tokens;
* *ranks*: the same run on two ranks, as replicas and as shards; the largest difference of a log-probability at the end;
* *export*: the exported folder has the tensors of the first one, and transformers gives its logits to 0 difference from ours.

Held by: tests/e2e/test_architectures.py
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from truestep.model.load import LoadedModel, load_model, model_shape, prepare
from truestep.model.tiny import tiny_tokenizer
from truestep.records import Origin, TrainSequence
from truestep.rundir import provenance, read_json, write_atomic, write_json
from truestep.settings import ModelSettings
from truestep.testing.reference.loss import exact_float64
from truestep.train.packing import pack
from truestep.train.policy import Policy

ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE = ROOT / "results/architectures.json", ROOT / "docs/reference/architectures.md"
CONTEXT = 128
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
# Name, the kind of model in transformers, and the sizes. Windows are shorter than the rows.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", SIZES),
    "Qwen2": ("qwen2", SIZES),
    "Qwen3": ("qwen3", {**SIZES, "head_dim": 8}),
    "Qwen3 MoE": ("qwen3_moe", {**SIZES, **MOE, "head_dim": 8}),
    "Mixtral (MoE)": ("mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "OLMoE": ("olmoe", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "Gemma 2": ("gemma2", {**SIZES, **TWO_KINDS, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("gemma3_text", {**SIZES, **TWO_KINDS, "query_pre_attn_scalar": 8}),
    "Phi-3": ("phi3", {**SIZES, "sliding_window": 8}),
    "Mistral": ("mistral", {**SIZES, "sliding_window": 8}),
    "OLMo 2": ("olmo2", SIZES),
    "SmolLM3": ("smollm3", {**SIZES, "no_rope_layers": [1, 0]}),
    "Granite": ("granite", {**SIZES, "logits_scaling": 2.0}),
    "gpt-oss (MoE)": ("gpt_oss", {**SIZES, **TWO_KINDS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "GPT-2": ("gpt2", {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "GPT-NeoX (Pythia)": ("gpt_neox", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}  # fmt: skip
RECIPE = """
name = "architecture"
[model]
path = "model"
[compute]
threads = 1
dtype = "float32"
[data.train]
source = "train.jsonl"
[data.test]
source = "train.jsonl"
limit = 4
[[stages]]
kind = "sft"
data = "train"
steps = 8
sequences_per_step = 8
tokens_per_microbatch = 96
optimizer = { lr = 1e-2 }
[[stages]]
kind = "rl"
data = "train"
steps = 4
prompts_per_step = 4
samples_per_prompt = 4
tokens_per_microbatch = 96
optimizer = { lr = 1e-3 }
sampling = { max_new_tokens = 4, max_running = 8 }
[evaluate]
data = ["test"]
sampling = { max_new_tokens = 4 }
"""

HEAD = """<!-- Written by benchmarks/architectures.py. -->
# Architectures

Small random models of these classes were trained, without a change, by one recipe: 8 steps of SFT, then 4 of RL, on one process and
on two ranks ({commit}, transformers {transformers}, float32, on a CPU; `python benchmarks/architectures.py`). Windows are shorter
than the rows, and mixtures have four experts, of which a token uses two. What is not in the table may run as well: at the start of
every run, packing and the output layer are checked on the model itself, and a model that fails a check takes a slower path with
the same result. Weights from the hub were not used.

* **packed**: the sequences of a micro-batch run as one row without padding, and samples of one prompt share its tokens. "no": they
  run one by one, which is slower.
* **head**: the logits are computed in chunks, so that they never need memory for all tokens at once.
* **gradient**: relative difference of the gradient from that of a separate forward pass of transformers for each sequence, in
  float64.
* **engine**: largest difference in nats between the engine's and the trainer's log-probability of a sampled token in RL.
* **ranks**: largest difference in nats of a log-probability after SFT and RL between one process and two ranks, as replicas and
  as shards (by FSDP2).
* **export**: the exported folder has the tensors of the folder that it began with, and transformers computes the same logits from
  it, bit for bit.

No auxiliary loss that balances experts is added in training. Routers are trained like other weights; freeze them by
`freeze = ["*.gate.*"]` (gpt-oss: `"*.router.*"`).

| Architecture | Class | packed | head | gradient | engine | ranks | export |
|---|---|---|---|---|---|---|---|
"""


def model_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return a random model that transformers made, with the built-in tokenizer of characters."""
    kind, sizes = ARCHITECTURES[name]
    tokenizer = tiny_tokenizer()
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **ids, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model, tokenizer


def rows_of() -> list[TrainSequence]:
    """Two prompts, three completions each."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for group, (prompt, lengths) in enumerate([(9, (12, 3, 7)), (5, (4, 15, 1))]):
        start = tuple(torch.randint(6, 90, (prompt,), generator=draw).tolist())
        for length in lengths:
            own = tuple(torch.randint(6, 90, (length,), generator=draw).tolist())
            origin = (Origin.CONTEXT,) * prompt + (Origin.EXPERT,) * length
            made.append(
                TrainSequence(token_ids=start + own, origin=origin, num_prefix_tokens=prompt, group=group)
            )
    return made


def step(name: str) -> dict[str, Any]:
    """Compare packed rows with transformers' own forward passes, in float64."""
    with exact_float64():
        return _step(*model_of(name, torch.float64))


def _step(own: Any, tokenizer: Any) -> dict[str, Any]:
    plain = copy.deepcopy(own)
    prepare(plain, torch.device("cpu"))  # no dropout, float64 norms; attention as transformers has it
    plain.set_attn_implementation("eager")
    prepare(own, torch.device("cpu"))
    policy = Policy(
        LoadedModel(model=own, tokenizer=tokenizer, shape=model_shape(own), context_length=CONTEXT)
    )
    sequences = rows_of()
    expected, got, tokens = [], {}, 0
    for sequence in sequences:
        ids = torch.tensor(sequence.token_ids)
        logits = plain(input_ids=ids[None, :-1], use_cache=False).logits[0].double()
        chosen = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        expected.append(chosen[sequence.num_prefix_tokens - 1 :])
    batches = pack(sequences, tokens_per_microbatch=512, dtype=torch.float64)
    for batch in batches:
        logprobs, _ = policy(batch, 1.0)
        (logprobs * torch.arange(1, len(logprobs) + 1)).sum().backward()
        tokens += batch.num_tokens
        for i in batch.sequence_index.unique().tolist():
            got[i] = logprobs[batch.sequence_index == i]
    order = torch.cat([batch.sequence_index for batch in batches])
    weights = torch.arange(1, len(order) + 1, dtype=torch.float64)
    sum((values * weights[order == i]).sum() for i, values in enumerate(expected)).backward()
    of_own, of_plain = (
        torch.cat(
            [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in m.parameters()]
        )
        for m in (own, plain)
    )
    separate = sum(len(s.token_ids) - 1 for s in sequences)
    return {
        "packs": policy.packs,
        "chunked_head": policy.plain_head,
        "shares_prompts": policy.packs and tokens < separate,
        "notes": policy.notes,
        "logprob_difference": max(float((got[i] - e).detach().abs().max()) for i, e in enumerate(expected)),
        "gradient_difference": float((of_own - of_plain).norm() / of_plain.norm()),
    }


def write_inputs(name: str, folder: Path) -> None:
    model, tokenizer = model_of(name)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"id": f"q{i}", "problem": f"{i}+{i % 3}", "answer": str(i % 2), "checker": "exact", "solution": str((i // 2) % 2)}
        for i in range(12)
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(RECIPE)


def run(folder: Path, out: str, parallel: str = "") -> str:
    """Run the recipe on one process, or on two ranks. Returns "" or the last line of what failed."""
    words = [sys.executable, "-m", "truestep", "run", "recipe.toml", "--out", out]
    words += ["--set", f"compute.parallel={parallel}"] if parallel else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = 2 if parallel else 1
    ranks = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    started = []
    for rank in range(count):
        of_rank = (
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} if parallel else {}
        )
        started.append(
            subprocess.Popen(
                words, cwd=folder, env={**os.environ, **(ranks if parallel else {}), **of_rank},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=600)[0] for process in started]
    for process, text in zip(started, said, strict=True):
        if process.returncode:
            return next((line for line in text.splitlines() if line.startswith("error")), text[-400:])
    return ""


def exported(folder: Path, out: str = "one") -> Path:
    return folder / out / "stages/02-rl/export"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def names(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    return found


def export(folder: Path) -> dict[str, Any]:
    ids = torch.arange(6, 30)[None]
    target = exported(folder)
    ours = load_model(
        ModelSettings(path=str(target)), dtype=torch.float32, device=torch.device("cpu"), seed=0
    ).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, trust_remote_code=False
    )
    theirs.set_attn_implementation(ours.config._attn_implementation)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        difference = float((ours(input_ids=ids).logits - theirs(input_ids=ids).logits).abs().max())
    return {"same_tensors": names(target) == names(folder / "model"), "logit_difference": difference}


def apart(one: Path, two: Path) -> float:
    """Return the largest difference of a log-probability. (Parameters can differ although the models do not: a bias of keys
    has no gradient, and AdamW moves it by its rounding.)"""
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        first, second = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
            .eval()(input_ids=ids).logits.log_softmax(-1)
            for folder in (one, two)
        )  # fmt: skip
    return float((first - second).abs().max())


def gap(folder: Path) -> float:
    lines = (folder / "one/stages/02-rl/metrics.jsonl").read_text().splitlines()
    return max(json.loads(line).get("rl/sampling/logprob_difference_max", 0.0) for line in lines)


def of_architecture(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"class": type(model_of(name)[0]).__name__, **step(name)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(name, folder)
        found["run"] = run(folder, "one") or "ran"
        if found["run"] != "ran":
            return found
        found["engine_gap"] = gap(folder)
        one, first = tensors(exported(folder)), tensors(folder / "model")
        found["moved"] = max(float((one[key] - first[key]).abs().max()) for key in one if key in first)
        found["export"] = export(folder)
        for parallel in ("ddp", "fsdp2"):
            fault = run(folder, parallel, parallel)
            found[parallel] = fault or apart(exported(folder), exported(folder, parallel))
    return found


def page(result: Mapping[str, Any]) -> str:
    """Return the page of a result file."""
    lines = [HEAD.format(commit=result["provenance"]["commit"][:7], transformers=result["transformers"])]
    for name, row in result["architectures"].items():
        cells = [name, row["class"], yes(row["shares_prompts"]), yes(row["chunked_head"])]
        cells += [f"{row['gradient_difference']:.0e}", f"{row['engine_gap']:.0e}"]
        cells += [f"{row['ddp']:.0e}, {row['fsdp2']:.0e}"]
        cells += ["yes" if row["export"] == {"same_tensors": True, "logit_difference": 0.0} else "no"]
        lines.append(f"| {' | '.join(cells)} |\n")
    slow = [(name, note) for name, row in result["architectures"].items() for note in row["notes"]]
    lines.append("\nWhat a run says at its start for those that take a slower path:\n\n")
    lines += [f"* {name}: {note}\n" for name, note in slow]
    return "".join(lines)


def yes(value: bool) -> str:
    return "yes" if value else "no"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=[])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    if not arguments.page:
        found, made_by = {}, provenance(0)
        for name in arguments.only or ARCHITECTURES:
            found[name] = of_architecture(name)
            print(json.dumps({name: found[name]}), flush=True)
        result = write_json(
            arguments.out,
            {"provenance": made_by, "transformers": transformers.__version__, "architectures": found},
        )
    else:
        result = read_json(arguments.out)
    if arguments.out == RESULT and not arguments.only:
        write_atomic(PAGE, page(result))


if __name__ == "__main__":
    main()
