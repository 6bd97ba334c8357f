"""The guard's engine check against a real vLLM server (CPU build): one that gets every update, and one that gets none.

    python benchmarks/guard_vllm.py [--python VLLM_PYTHON] [--steps 6] [--dtypes bfloat16] [--out results/guard_vllm.json]

A tiny Llama is trained in float32 with AdamW; vLLM runs in a separate process in bfloat16 or float32, and gets the weights by
its development route reload_weights. Without ``--python``, vLLM's environment is made under .bench/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import torch
import transformers

from truestep.guard import guard
from truestep.rundir import provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def tiny(folder: Path) -> Any:
    """Return a random Llama of 2,048 tokens, saved with a tokenizer, which the server needs to start."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=256, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(2048)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="t2", bos_token="t1"
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return model


def post(address: str, path: str, body: dict[str, Any] | None = None) -> None:
    data, kind = json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address + path, data, kind), timeout=60) as answer:
        answer.read()


def train(folder: Path, dtype: str, rate: float, steps: int, is_updated: bool) -> dict[str, Any]:
    from truestep.rollout.engine_vllm import serve
    from truestep.rollout.vllm_server import VllmServer

    model = tiny(folder)
    options = ("--enforce-eager", "--block-size", "32")
    with serve(
        VllmServer(model=str(folder), dtype=dtype, context_length=512, max_running=8, options=options)
    ) as engine:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        random = torch.Generator().manual_seed(1)
        with guard(
            model, optimizer, every=1, engine=engine.url, engine_lag=0, on_fault=lambda record: None
        ) as watch:
            for _ in range(steps):
                for _ in range(2):
                    ids = torch.randint(4, 2048, (4, 128), generator=random)
                    (model(input_ids=ids, labels=ids).loss / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
                if is_updated:
                    model.save_pretrained(folder / "now")
                    post(
                        engine.url,
                        "/collective_rpc",
                        {"method": "reload_weights", "kwargs": {"weights_path": str(folder / "now")}},
                    )
                    post(engine.url, "/reset_prefix_cache")
    stale = [r["step"] for r in watch.records if "stale_engine" in r["codes"]]
    notes = sorted({n for r in watch.records for n in r["notes"] if "engine" in n})
    about = {"dtype": dtype, "rate": rate, "updated": is_updated, "failure": watch.failure, "notes": notes}
    return {
        **about,
        "first_stale": stale[0] if stale else None,
        "engine": [r["engine"] for r in watch.records],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, help="the Python of an environment with vLLM")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="of the engine: float32, bfloat16")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "guard_vllm.json")
    asked = parser.parse_args()
    if asked.python is None:
        import environments

        asked.python = environments.interpreter("vllm", print)
    os.environ.update(SETTINGS, TRUESTEP_VLLM_PYTHON=str(asked.python))
    torch.set_num_threads(1)
    rows = []
    for dtype in asked.dtypes:
        for rate in (1e-5, 1e-3):
            for is_updated in (True, False):
                with tempfile.TemporaryDirectory() as folder:
                    rows.append(train(Path(folder), dtype, rate, asked.steps, is_updated))
                row = rows[-1]
                print(f"{dtype} rate {rate:g} {'updated' if is_updated else 'frozen'}: stale at step {row['first_stale']}; "
                      f"slopes {[round(e.get('slope', float('nan')), 3) for e in row['engine']]} {row['failure']} {row['notes']}",
                      flush=True)  # fmt: skip
    write_json(
        asked.out,
        {"commit": provenance(0)["commit"], "command": "python benchmarks/guard_vllm.py", "rows": rows},
    )
    return int(any((row["first_stale"] is None) != row["updated"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
