"""What proves that the engine of RL has the trainer's weights: false alarms, and how soon a frozen engine is seen.

    python benchmarks/engine_proof.py [--publishes 600] [--updates 200] [--out results/engine_proof.json]

*fresh*: an engine with a separate copy of the weights gets every update. Small random models of six families, in float32
and bfloat16, at three learning rates; after every update the fingerprints and the gap of newly sampled tokens are judged.
Any accusation is a false alarm.

*frozen*: an engine that says it took the update, and tells no bits, so that only its samples can show it. For each
learning rate, dtype and number of tokens, the update at which the gap test refuses the step. ``stale`` is whether
fingerprints, where the engine tells them, show the first update.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from truestep.model.load import LoadedModel, model_shape, prepare
from truestep.model.tiny import tiny_tokenizer
from truestep.records import Origin, TrainSequence
from truestep.rollout.engine import SampleRequest, SamplingParameters, StaleWeightsError
from truestep.rollout.engine_torch import TorchEngine
from truestep.rundir import provenance, write_json
from truestep.seeding import Purpose
from truestep.settings import OptimizerSettings
from truestep.train.engine_test import Gap, GapTest
from truestep.train.optim import MasterOptimizer
from truestep.train.parallel import Ranks
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.weight_sync import fingerprints, publish

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
RATES, TOKENS = (1e-6, 5e-5, 1e-3), (256, 2048)
DTYPES = (torch.float32, torch.bfloat16)
VOCABULARY, LENGTH = 512, 32


def policy_of(family: str, dtype: torch.dtype, seed: int) -> Policy:
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 256, "head_dim": 16,
        "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "tie_word_embeddings": seed % 2 == 1,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).to(dtype)
    prepare(model, torch.device("cpu"))
    return Policy(
        LoadedModel(model=model, tokenizer=tiny_tokenizer(), shape=model_shape(model), context_length=256)
    )


class Rollouts:
    """Samples of an engine, and their gap to the trainer."""

    def __init__(self, policy: Policy, num_tokens: int) -> None:
        self.scorer = Scorer(policy=policy, temperature=1.0, tokens_per_microbatch=4096)
        self.count, self.step = num_tokens // LENGTH, 0

    def gap(self, engine: TorchEngine) -> Gap:
        self.step += 1
        prompts = torch.randint(
            0, VOCABULARY, (self.count, 8), generator=torch.Generator().manual_seed(self.step)
        ).tolist()
        asked = [
            SampleRequest(problem_id=str(i), sample_index=0, prompt_ids=tuple(ids), seed=0, purpose=Purpose.SAMPLE,
                          step=self.step)
            for i, ids in enumerate(prompts)
        ]  # fmt: skip
        sampling = SamplingParameters(temperature=1.0, max_new_tokens=LENGTH, stop_token_ids=())
        made = [
            TrainSequence(
                token_ids=(*prompts[int(r.problem_id)], *r.completion_ids), num_prefix_tokens=0, group=i,
                origin=(Origin.CONTEXT,) * 8 + (Origin.POLICY,) * LENGTH,
                behavior_logprobs=r.behavior_logprobs, policy_version=r.policy_version,
            )
            for i, r in enumerate(engine.generate(asked, sampling))
        ]  # fmt: skip
        found = Gap()
        for batch in self.scorer.with_proximal(self.scorer.pack(made), self.step):
            assert batch.proximal_logprobs is not None
            assert batch.behavior_logprobs is not None
            found += Gap.of(batch.proximal_logprobs, batch.behavior_logprobs)
        return found


def updates(policy: Policy, rate: float, seed: int) -> Iterator[int]:
    """Take AdamW steps with a gradient that has a constant part and as much noise, as training has."""
    optimizer = MasterOptimizer(policy, OptimizerSettings(lr=rate))
    draw = torch.Generator().manual_seed(seed)
    shapes = {n: p.shape for n, p in policy.named_parameters()}
    constant = {n: torch.randn(s, generator=draw) for n, s in shapes.items()}
    number = 0
    while True:
        optimizer.step({n: constant[n] + torch.randn(s, generator=draw) for n, s in shapes.items()}, rate)
        number += 1
        yield number


def judged(test: GapTest, gap: Gap) -> str:
    test.found += gap
    try:
        test.judge(0, Ranks())
    except StaleWeightsError as error:
        return str(error)
    return ""


def fresh(family: str, dtype: torch.dtype, rate: float, seed: int, count: int) -> dict[str, Any]:
    policy = policy_of(family, dtype, seed)
    engine, test, rollouts = (
        TorchEngine(copy.deepcopy(policy.model), packs=policy.packs),
        GapTest(dtype),
        Rollouts(policy, 512),
    )
    alarms, sizes = [], []
    for number in updates(policy, rate, seed):
        try:
            publish(policy, engine, number)
        except StaleWeightsError as error:
            alarms.append(str(error))
        gap = rollouts.gap(engine)
        sizes.append(gap.size)
        if said := judged(test, gap):
            alarms.append(said)
        if number == count:
            break
    row = {"family": family, "dtype": str(dtype)[6:], "rate": rate, "seed": seed, "publishes": count}
    return row | {"alarms": alarms, "first": sizes[0], "largest": max(sizes)}


def frozen(dtype: torch.dtype, rate: float, tokens: int, seed: int, most: int) -> dict[str, Any]:
    policy = policy_of("llama", dtype, seed)
    engine, test, rollouts = (
        TorchEngine(copy.deepcopy(policy.model)),
        GapTest(dtype),
        Rollouts(policy, tokens),
    )
    assert not judged(test, rollouts.gap(engine))
    own = fingerprints(dict(policy.model.named_parameters()), Ranks())
    seen, stale = None, False
    for number in updates(policy, rate, seed):
        if number == 1:
            stale = fingerprints(dict(policy.model.named_parameters()), Ranks()) != own
        if (number in (1, 2, 3, 5, 8) or number % 10 == 0) and judged(test, rollouts.gap(engine)):
            seen = number
            break
        if number == most:
            break
    row = {"dtype": str(dtype)[6:], "rate": rate, "tokens": tokens, "seed": seed}
    return row | {"found_after": seen, "fingerprints_differ_after_1": stale}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--publishes", type=int, default=600, help="updates of fresh engines, in all")
    parser.add_argument(
        "--updates", type=int, default=200, help="after which a frozen engine counts as not seen"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "engine_proof.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began, cells = time.perf_counter(), [(f, d, r) for f in FAMILIES for d in DTYPES for r in RATES]
    each = -(-asked.publishes // len(cells))
    right = []
    for i, (family, dtype, rate) in enumerate(cells):
        right.append(fresh(family, dtype, rate, i % 4, each))
        print(f"{time.perf_counter() - began:5.0f} s  fresh {right[-1]}", flush=True)
    lost = []
    for dtype in DTYPES:
        for rate in RATES:
            for tokens in TOKENS:
                rows = [frozen(dtype, rate, tokens, seed, asked.updates) for seed in asked.seeds]
                lost += rows
                print(f"{time.perf_counter() - began:5.0f} s  frozen {str(dtype)[6:]} rate {rate:g} {tokens} tokens: seen after "
                      f"{[row['found_after'] for row in rows]}", flush=True)  # fmt: skip
    alarms = sum(len(row["alarms"]) for row in right)
    total = sum(row["publishes"] for row in right)
    print(f"fresh: {alarms} false alarms in {total} publishes")
    found = {
        "fresh": right,
        "frozen": lost,
        "publishes": total,
        "false_alarms": alarms,
        "updates": asked.updates,
    }
    stamp = {
        "commit": provenance(0)["commit"],
        "command": "python benchmarks/engine_proof.py",
        "seeds": asked.seeds,
    }
    write_json(asked.out, stamp | found)
    missed = [row for row in lost if not row["fingerprints_differ_after_1"]]
    return int(alarms > 0 or bool(missed))


if __name__ == "__main__":
    sys.exit(main())
