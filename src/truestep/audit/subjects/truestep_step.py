"""truestep's own optimizer step, with packing, global totals, summed gradients and plain SGD.

Options: arch; if ``parallel`` is fsdp2, the model is sharded over the ranks.
"""

from __future__ import annotations

import harness
import torch
from fsdp2 import whole

from truestep import __version__
from truestep.model import attention
from truestep.model.forward import decoder_layers
from truestep.model.load import LoadedModel, model_shape
from truestep.objective.methods import build
from truestep.records import Origin, TrainSequence
from truestep.settings import OptimizerSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import dummy_batch, last_needed, pack
from truestep.train.parallel import Ranks, shard
from truestep.train.policy import Policy
from truestep.train.step import StepPlan, train_step

SUBJECTS = [{
    "name": "truestep", "needs": ["truestep", "transformers", "torch"], "cases": ["CASES", "clipped"],
    "without": {"scheduled": "its step is given the learning rate", "resumed": "its own tests cover resuming"},
    "configurations": [
        {"arch": "llama", "processes": [1, 2]},
        {"arch": "llama", "parallel": "fsdp2", "processes": 2},
        {"arch": "llama", "offload": True, "processes": [1, 2]},
        {"arch": "llama", "offload": True, "parallel": "fsdp2", "processes": 2},
    ],
}]  # fmt: skip


def sequences(spec: harness.Spec, rows: list[int]) -> list[TrainSequence]:
    """Return the rows that have a trained token; the others are not part of a step."""
    made = []
    for row in rows:
        trained = tuple(bool(t) and i > 0 for i, t in enumerate(spec.rows[row]["trained"]))
        if any(trained):
            ids = tuple(spec.rows[row]["ids"])
            origin = tuple(Origin.EXPERT if t else Origin.CONTEXT for t in trained)
            made.append(TrainSequence(token_ids=ids, origin=origin, num_prefix_tokens=0, group=row))
    return made


def run(spec: harness.Spec) -> None:
    harness.join_ranks(spec)
    attention.register()
    ranks = Ranks(rank=spec.rank, world_size=spec.world_size)
    model = harness.tiny_model(spec).to(spec.dtype)
    loaded = LoadedModel(model=model, tokenizer=None, shape=model_shape(model), context_length=256)
    sharded = spec.options.get("parallel") == "fsdp2"
    # Tokens after the last trained one predict nothing that is trained, so the model does not see them.
    made = [sequences(spec, [index]) for index in range(len(spec.rows))]
    ends = [last_needed(found[0]) if found else None for found in made]
    needles = [bytes(row["ids"][:end]) for row, end in zip(spec.rows, ends, strict=True)]
    policy = Policy(loaded)
    own = harness.parameters_of(model)
    recorder = harness.Recorder(spec, model, lambda: harness.flat([whole(p) for p in own]))
    ignored = bytes(dummy_batch(torch.float32, "cpu").input_ids.tolist())
    recorder.watch(model.base_model, needles, ignored=ignored)
    if sharded:
        shard(policy, decoder_layers(model))
        own = harness.parameters_of(model)
    settings = OptimizerSettings(lr=spec.lr, kind="sgd", weight_decay=0.0, max_grad_norm=spec.max_grad_norm)
    optimizer = MasterOptimizer(policy, settings, offload=spec.options.get("offload", False))
    policy.train()
    # A row without a trained token is refused when data is read, before batches are made.
    used = [row for row, found in enumerate(made) if found]
    for step, window in enumerate(spec.windows(used)):
        batches = []
        for rows in window:
            batches += pack(sequences(spec, rows), tokens_per_microbatch=1024, first_sequence=rows[0])
        how = {"terms": build("sft", {}).terms, "learning_rate": spec.lr, "temperature": 1.0}
        plan = StepPlan(step=step, ranks=ranks, **how)
        recorder.logged["loss"].append(train_step(policy, optimizer, batches, plan).loss)
    recorder.finish(truestep=__version__, **harness.versions("transformers"))
