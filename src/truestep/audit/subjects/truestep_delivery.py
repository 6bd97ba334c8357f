"""truestep's torch engine between its own optimizer steps: publishing, sampling, scoring and training.

Options: arch; dtype; ``tied``; ``lora`` trains adapters that are not zero at the start; with ``copy``, the engine has separate
weights, otherwise it shares the trainer's memory; ``fault`` replaces it by one with wrong weights (delivery_faults).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import delivery_faults
import delivery_recorder
import harness
import torch

from truestep import __version__
from truestep.model import attention, forward, lora
from truestep.model.load import LoadedModel, model_shape
from truestep.objective.methods import build
from truestep.records import Origin, Rollout, TrainSequence
from truestep.rollout.engine import Engine, SampleRequest, SamplingParameters
from truestep.rollout.engine_torch import TorchEngine
from truestep.seeding import Purpose
from truestep.settings import OptimizerSettings
from truestep.stage_settings import LoraSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.step import StepPlan, train_step
from truestep.train.weight_sync import publish

SUBJECTS = [{
    "name": "truestep weight delivery", "needs": ["truestep", "transformers", "torch"], "cases": ["delivery"],
    "configurations": [
        {"arch": "llama", "optimizer": "adamw"},
        {"arch": "llama", "copy": True, "optimizer": "adamw"},
        {"arch": "llama", "copy": True, "tied": True, "optimizer": "adamw"},
        {"arch": "llama", "lora": True, "optimizer": "adamw"},
        {"arch": "llama", "copy": True, "lora": True, "optimizer": "adamw"},
    ],
}]  # fmt: skip
LORA = LoraSettings(rank=3, alpha=7, targets=("q_proj", "v_proj", "up_proj", "down_proj"))


def requests(spec: harness.Spec, step: int) -> list[SampleRequest]:
    """Return the requests of a round; the samples of a prompt follow each other."""
    how: dict[str, Any] = {"seed": 0, "purpose": Purpose.SAMPLE, "step": step}
    return [
        SampleRequest(problem_id=str(number), sample_index=index, prompt_ids=tuple(row["ids"]), **how)
        for number, row in enumerate(spec.rows)
        for index in range(spec.case["samples"])
    ]


def sample_of(spec: harness.Spec, rollout: Rollout) -> delivery_recorder.Sample:
    if rollout.error or rollout.behavior_logprobs is None:
        raise RuntimeError(f"the engine sampled nothing: {rollout.error}")
    prompt = list(spec.rows[int(rollout.problem_id)]["ids"])
    return prompt, list(rollout.completion_ids), list(rollout.behavior_logprobs)


def sequences(spec: harness.Spec, rollouts: list[Rollout], draw: torch.Generator) -> list[TrainSequence]:
    """Return the samples as training sequences with random advantages."""
    made = []
    for rollout, advantage in zip(rollouts, torch.randn(len(rollouts), generator=draw).tolist(), strict=True):
        group = int(rollout.problem_id)
        prompt = tuple(spec.rows[group]["ids"])
        made.append(
            TrainSequence(
                token_ids=(*prompt, *rollout.completion_ids),
                origin=(Origin.CONTEXT,) * len(prompt) + (Origin.POLICY,) * len(rollout.completion_ids),
                num_prefix_tokens=len(prompt),
                group=group,
                behavior_logprobs=rollout.behavior_logprobs,
                policy_version=rollout.policy_version,
                advantage=advantage,
            )
        )
    return made


Deliver = Callable[
    [int], Engine
]  # delivers a version of the weights, and returns the engine that samples next


def torch_engine(
    spec: harness.Spec, policy: Policy, recorder: delivery_recorder.Delivery, stack: ExitStack
) -> Deliver:
    if fault := spec.options.get("fault"):
        broken = delivery_faults.Wrong(fault, recorder.plain)
        # The model's own cache is used if it has wrong contents, otherwise truestep's.
        packs = fault != "cache" and not forward.install_packing(broken.model, whole_logits=False)

        def wrong(version: int) -> Engine:
            broken.deliver(recorder.states)
            return TorchEngine(broken.model if packs else broken, packs=packs)

        return wrong
    engine = TorchEngine(copy.deepcopy(policy.model) if spec.options.get("copy") else policy.model)

    def right(version: int) -> Engine:
        publish(policy, engine, version)
        return engine

    return right


def run(
    spec: harness.Spec,
    deliverer: Callable[
        [harness.Spec, Policy, delivery_recorder.Delivery, ExitStack], Deliver
    ] = torch_engine,
) -> None:
    attention.register()
    model, plain = delivery_recorder.tiny_models(spec)
    model.to(spec.dtype)
    if spec.options.get("lora"):
        lora.install(model, LORA, seed=0)
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for layer in lora.layers_of(model).values():
                layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=draw))
    shape = model_shape(model)
    policy = Policy(LoadedModel(model=model, tokenizer=None, shape=shape, context_length=256))
    recorder = delivery_recorder.Delivery(spec, plain)
    optimizer = MasterOptimizer(policy, OptimizerSettings(lr=spec.lr, weight_decay=0.0))
    temperature, method = spec.case["temperature"], build("grpo", {})
    scorer = Scorer(policy=policy, temperature=temperature, tokens_per_microbatch=1024)
    stops = (spec.case["stop"],)
    sampling = SamplingParameters(
        temperature=temperature, max_new_tokens=spec.case["new_tokens"], stop_token_ids=stops
    )
    draw = torch.Generator().manual_seed(3)
    with ExitStack() as stack:
        deliver = deliverer(spec, policy, recorder, stack)
        for step in range(spec.case["rounds"]):
            recorder.weights(delivery_recorder.state_of(model.state_dict(), LORA.scale))
            rollouts = list(deliver(step).generate(requests(spec, step), sampling))
            recorder.sampled([sample_of(spec, rollout) for rollout in rollouts])
            made = scorer.with_proximal(scorer.pack(sequences(spec, rollouts, draw)), step)
            policy.train()
            how = {"temperature": temperature, "max_length": spec.case["new_tokens"]}
            plan = StepPlan(step=step, terms=method.terms, learning_rate=spec.lr, **how)
            train_step(policy, optimizer, made, plan)
    recorder.finish(truestep=__version__, **recorder.versions, **harness.versions("transformers"))
