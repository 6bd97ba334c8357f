"""Checks the loss of every causal language model class of the installed transformers, on tiny models.

Four questions per class are answered only from logits and losses: at which shift the loss is a cross-entropy
of the model's logits; whether ``num_items_in_batch`` is honored if it is accepted; whether padding changes the
logits of real tokens; whether packed rows see each other, with restarted positions and with a mask of ones.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, MOST_PARAMETERS, SECONDS = 64, 20_000_000, 20
CLOSE = 1e-3  # relative; float32 noise of a two-layer model is 1e-6
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 8, "n_embd": 32,
    "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 64, "d_model": 32, "d_ff": 64, "ffn_dim": 64,
    "num_layers": 2, "n_layers": 2, "n_heads": 4, "num_heads": 4, "rotary_dim": 8,
    "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "d_inner": 64,
    "state_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "word_embed_proj_dim": 32, "d_head": 8,
    "embedding_size": 32, "ffn_hidden_size": 64, "hidden_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout_prob": 0.0, "is_decoder": True,
    "attention_probs_dropout_prob": 0.0, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "use_cache": False,
}  # fmt: skip


class TookTooLong(Exception):
    pass


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TookTooLong(f"no answer within {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def keep(row: dict[str, Any], error: BaseException | None) -> bool:
    """Note an error of any class, since a model class may raise anything. Return whether it was one."""
    if isinstance(error, Exception | SystemExit):
        words = str(error).splitlines() or [""]
        row["not_run"] = f"{type(error).__name__}: {words[0][:160]}"
        return True
    return False


def build(kind: str, name: str) -> torch.nn.Module:
    """Make a tiny model of this class, or raise an error that says why that is not possible."""
    known = CONFIG_MAPPING[kind]
    accepted = {**getattr(known(), "__dict__", {}), **inspect.signature(known.__init__).parameters}
    mapped = getattr(known, "attribute_map", {})
    config = known(**{k: v for k, v in SMALL.items() if k in accepted or k in mapped})
    config._attn_implementation = "eager"
    made = getattr(transformers, name)
    with torch.device("meta"):
        size = sum(p.numel() for p in made(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"too large: {size / 1e6:.0f} M parameters even at the smallest known settings")
    torch.manual_seed(0)
    return made(config).eval()


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def ask(model: torch.nn.Module) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    first, second, other = (torch.randint(3, VOCABULARY, (n,), generator=draw) for n in (9, 12, 9))
    ids = second[None]
    out = model(input_ids=ids, labels=ids)
    logits = out.logits[0].float()
    # The label of position t is the token at t + shift.
    own = {s: float(cross_entropy(logits[: len(second) - s], second[s:])) for s in (0, 1, 2)}
    loss = float(out.loss)
    shift = next((s for s in (1, 0, 2) if abs(own[s] - loss) <= CLOSE * abs(loss)), None)
    answer: dict[str, Any] = {"shift": "none of 0, 1, 2" if shift is None else shift}
    takes = inspect.signature(model.forward).parameters
    answer["count"] = "not taken"
    if "num_items_in_batch" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        num_labels = ids.shape[1] - (1 if shift is None else shift)
        doubled = float(model(input_ids=ids, labels=ids, num_items_in_batch=2 * num_labels).loss)
        answer["count"] = "honoured" if abs(doubled / loss - 0.5) < 0.01 else "ignored"
    padded = torch.cat([second, torch.zeros(5, dtype=torch.int64)])[None]
    real = model(input_ids=padded, attention_mask=torch.tensor([[1] * 12 + [0] * 5])).logits[0, :12]
    answer["padding"] = "neutral" if differ(real, out.logits[0]) <= CLOSE else "changes real tokens"
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
    layouts = {"packed, restarted positions": {"position_ids": positions}}
    layouts["packed, a mask of ones"] = {"attention_mask": torch.ones(1, 21, dtype=torch.int64)}
    for key, extra in layouts.items():
        lines = [torch.cat([row, second])[None] for row in (first, other)]
        try:
            seen = [model(input_ids=line, **extra).logits[0, 9:] for line in lines]
            answer[key] = "isolated" if differ(seen[0], seen[1]) <= CLOSE else "rows see each other"
        except TypeError:
            answer[key] = "not taken"
    return answer


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    folder, began = Path(sys.argv[1]), time.perf_counter()
    rows = []
    for kind, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        row: dict[str, Any] = {"model": kind, "class": name}
        with contextlib.ExitStack() as attempt:
            attempt.push(lambda kind, error, trace, row=row: keep(row, error))
            with limited(SECONDS), contextlib.redirect_stdout(io.StringIO()):
                row |= ask(build(kind, name))
        rows.append(row)
    found = {"transformers": transformers.__version__, "seconds": time.perf_counter() - began, "models": rows}
    (folder / "models.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
