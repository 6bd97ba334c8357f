"""What each rank of test_shards.py runs: policies that are built from slices of files, and gradients in bfloat16.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python shards_worker.py FOLDER cases|errors

FOLDER has models by name. The findings of a rank are written into it."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from step_cases import demonstrations, one_each
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from truestep.device import compute_device
from truestep.model.load import load_model
from truestep.model.lora import install
from truestep.model.select import freeze
from truestep.settings import ModelSettings, OptimizerSettings, TinySettings
from truestep.stage_settings import LoraSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.parallel import Ranks, build, full, join, leave, local
from truestep.train.policy import Policy
from truestep.train.weight_sync import Gathered

TINY = TinySettings(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
LORA = LoraSettings(rank=3, alpha=4, targets=("all-linear", "lm_head"), train_also=("*norm.weight",))
# Name of a case → model, dtype, what is trained.
CASES: dict[str, tuple[str, torch.dtype, str]] = {
    "tied": ("tied", torch.float32, ""),
    "untied": ("untied", torch.bfloat16, ""),
    "experts": ("experts", torch.float32, "frozen"),
    "lora": ("tied", torch.bfloat16, "lora"),
    "one by one": ("gemma2", torch.float32, ""),
    "built in": ("tiny", torch.bfloat16, ""),
}
REPETITIONS, MICROBATCHES = 8, 6


def policy_of(folder: Path, case: str, *, ranks: Ranks | None = None) -> Policy:
    """The whole model, or this rank's part of it."""
    name, dtype, trained = CASES.get(case, ("smooth", torch.bfloat16, ""))
    path = name if name == "tiny" else str(folder / name)
    settings = ModelSettings(path=path, tiny=TINY)
    found = load_model(settings, dtype=dtype, device=compute_device(), seed=3, empty=ranks is not None)
    if trained == "lora":
        install(found.model, LORA, seed=5)
    elif trained:
        freeze(found.model, ["model.layers.0.*"])
    policy = Policy(found)
    if ranks is not None:
        assert found.weights is not None
        assert all(p.is_meta for p in policy.parameters())
        build(policy, policy.model.base_model.layers, found.weights, ranks)
    return policy


def facts(policy: Policy) -> dict[str, Any]:
    """Everything that a policy has found out, and which parameters are trained, and what is one tensor."""
    head, table = policy.model.get_output_embeddings().weight, policy.model.get_input_embeddings().weight
    return {
        "packs": policy.packs, "plain_head": policy.plain_head, "notes": policy.notes, "shape": policy.shape.to_json(),
        "trained": [name for name, p in policy.named_parameters() if p.requires_grad], "tied": head is table,
        "generation": policy.model.generation_config.to_dict(),
    }  # fmt: skip


def compared(folder: Path, case: str, ranks: Ranks) -> dict[str, Any]:
    """What differs between the whole policy and the one that was built from slices."""
    whole, part = policy_of(folder, case), policy_of(folder, case, ranks=ranks)
    ours, theirs = dict(part.named_parameters()), dict(whole.named_parameters())
    gathered = Gathered(part)
    differing = [n for n in theirs if not torch.equal(gathered[n.removeprefix("model.")], theirs[n])]
    differing += sorted(ours.keys() ^ theirs.keys())
    buffers = dict(part.named_buffers())
    differing += [n for n, b in whole.named_buffers() if not torch.equal(buffers[n], b)]
    (batch,) = one_each(demonstrations((9,), seed=1), torch.float32)
    with torch.no_grad():
        outputs = [policy(batch, 0.9) for policy in (whole, part)]
    differing += [
        n for n, a, b in zip(("logprobs", "entropies"), *outputs, strict=True) if not torch.equal(a, b)
    ]
    return {
        "differing": differing, "whole": facts(whole), "part": facts(part),
        "dtypes": {n: str(p.dtype) for n, p in ours.items()}, "rows": {n: len(local(p)) for n, p in ours.items()},
    }  # fmt: skip


def narrow_shards(policy: Policy) -> None:
    """Shard as before: in bfloat16, to which FSDP rounds each micro-batch's sum over the ranks."""
    mixed = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in policy.model.base_model.layers:
        fully_shard(layer, mp_policy=mixed)
    fully_shard(policy, mp_policy=mixed)
    for part in policy.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


@functools.cache
def optimizer_of(policy: Policy) -> MasterOptimizer:
    return MasterOptimizer(policy, OptimizerSettings(kind="sgd", lr=1.0, weight_decay=0.0))


def gradient(policy: Policy, ranks: Ranks, seed: int) -> dict[str, Tensor]:
    """The whole gradient of a sum over this rank's micro-batches, as the optimizer gets it, in float64."""
    optimizer = optimizer_of(policy)
    optimizer.zero_grad()
    dtype = torch.float64 if next(policy.parameters()).dtype == torch.float64 else torch.float32
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 25, (2 * MICROBATCHES,), generator=draw).tolist()
    for batch in ranks.mine(one_each(demonstrations(lengths, seed=seed), dtype)):
        logprobs, _ = policy(batch, 1.0)
        (-logprobs.sum() / sum(lengths)).backward()
    return {name: full(grad).double() for name, grad in optimizer.gradients().items()}


def errors(folder: Path, ranks: Ranks) -> list[dict[str, float]]:
    """Relative errors of the gradient with narrow and with wide shards, against float64, for other data each."""
    wide, narrow = policy_of(folder, "smooth", ranks=ranks), policy_of(folder, "smooth")
    narrow_shards(narrow)
    plain, exact = policy_of(folder, "smooth"), policy_of(folder, "smooth")
    exact.model.double()
    found = []
    for seed in range(REPETITIONS):
        right = gradient(exact, Ranks(), seed)
        norm = torch.cat([g.flatten() for g in right.values()]).norm()
        rounded: dict[
            str, Tensor
        ] = {}  # the sum of what bfloat16 gives for each micro-batch, without an error of its own
        for index in range(2 * MICROBATCHES):
            one = gradient(plain, Ranks(rank=index, world_size=2 * MICROBATCHES), seed)
            rounded = {name: rounded.get(name, 0.0) + g for name, g in one.items()}
        row = {}
        for name, policy in (("wide", wide), ("narrow", narrow)):
            got = gradient(policy, ranks, seed)
            for against, expected in (("float64", right), ("sum", rounded)):
                gap = torch.cat([(got[n] - expected[n]).flatten() for n in expected]).norm()
                row[f"{name} {against}"] = float(gap / norm)
        found.append(row)
    return found


def main(folder: Path, part: str) -> None:
    torch.set_num_threads(1)
    ranks = join()
    found: Any = errors(folder, ranks)
    if part == "cases":
        found = {case: compared(folder, case, ranks) for case in CASES}
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
    ranks.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
