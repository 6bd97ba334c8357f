"""Compare an injected fault with the framework that really had it, step by step.

    python benchmarks/fault_arms.py [--out results/audit-injected/injected.json] [--limit 5e-5]

The framework's real step runs in its audit environment (built on first use) with plain SGD in float32. Then
truestep starts from the framework's parameters before each step, takes a step with the same micro-batches and
the named fault, and the two updates are compared: ‖injected − real‖ / ‖real‖. The step without a fault is
also compared, which shows how far the fault itself moves the update. Clean releases are compared with the
step that has no fault.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from truestep.audit import subjects as registry
from truestep.audit.environments import launch
from truestep.audit.environments import virtual as environment
from truestep.audit.environments.in_process import subject_module
from truestep.audit.environments.launch import LEARNING_RATE, Job
from truestep.audit.measure import cases
from truestep.audit.measure.observations import Observation, Step
from truestep.audit.subjects import Configuration
from truestep.model import attention
from truestep.model.load import LoadedModel, model_shape, prepare
from truestep.objective.methods import build
from truestep.records import Origin, TrainSequence
from truestep.rundir import provenance, write_json
from truestep.settings import FaultSettings, OptimizerSettings
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import pack
from truestep.train.policy import Policy
from truestep.train.step import StepPlan, train_step
from truestep.train.update import fault_of

ROOT = Path(__file__).resolve().parent.parent
harness = subject_module("harness")  # for the audit's tiny models, with the same names

OFFLOAD, MEAN = FaultSettings(offload_drop="first_last"), FaultSettings(micro_mean=True)
BOTH, NONE = FaultSettings(offload_drop="first_last", micro_mean=True), FaultSettings()
ZERO2 = {"arch": "llama", "stage": 2, "offload": True}


class Pair(NamedTuple):
    """A release, the subject that runs its step, the configuration, and the fault that it should have."""

    requirement: str
    subject: str
    options: dict[str, Any]
    world_size: int
    fault: FaultSettings


HF = {"stage": 2, "offload": True, "arch": "llama"}
PAIRS = (
    Pair("transformers==5.23.0+deepspeed==0.18.9", "DeepSpeed", ZERO2, 1, OFFLOAD),
    Pair("transformers==5.23.0+deepspeed==0.18.9", "DeepSpeed", ZERO2, 2, OFFLOAD),
    Pair("transformers==5.23.0+deepspeed==0.18.9", "transformers Trainer + DeepSpeed", {}, 1, OFFLOAD),
    Pair("openrlhf==0.10.2", "OpenRLHF SFTTrainer", {"arch": "llama", "offload": False}, 1, MEAN),
    Pair("openrlhf==0.10.2", "OpenRLHF SFTTrainer", {"arch": "llama", "offload": False}, 2, MEAN),
    Pair(
        "openrlhf==0.10.2+deepspeed==0.18.9",
        "OpenRLHF SFTTrainer",
        {"arch": "llama", "offload": True},
        1,
        BOTH,
    ),
    Pair("transformers==5.23.0", "transformers Trainer", {"arch": "llama"}, 1, NONE),
    Pair("transformers==5.23.0", "transformers Trainer", {"arch": "llama"}, 2, NONE),
    Pair("transformers==5.23.0+deepspeed==0.19.8", "DeepSpeed", ZERO2, 2, NONE),
    Pair("transformers==5.23.0+deepspeed==0.19.8", "transformers Trainer + DeepSpeed", {}, 1, NONE),
    Pair("openrlhf==0.11.2", "OpenRLHF SFTTrainer", {"arch": "llama", "offload": True}, 1, NONE),
)


def observe(pair: Pair) -> tuple[cases.Case, Observation]:
    """Run the framework's own steps in its environment."""
    subject = next(s for s in registry.TABLE if s.name == pair.subject)
    like = next(c for c in subject.configurations if c.world_size in (1, pair.world_size))
    configuration = replace(like, options={**like.options, **pair.options}, world_size=pair.world_size)
    assert isinstance(configuration, Configuration)
    name = "chat" if "chat" in configuration.only and "ragged" not in configuration.only else "ragged"
    case = cases.build(name, world_size=pair.world_size, accumulation=4, seed=0)
    job = Job(
        script=subject.script,
        python=environment.build(pair.requirement, say=lambda line: print(line, file=sys.stderr)),
        cases=[case],
        options=configuration.options,
        learning_rate=LEARNING_RATE["sgd"],
        world_size=pair.world_size,
    )
    return case, launch.run(job)[case.name]


def policy_like(case: cases.Case, arch: str) -> Policy:
    raw = {"options": {"arch": arch, "dtype": "float32"}, "learning_rate": LEARNING_RATE["sgd"]}
    model = harness.tiny_model(harness.Spec(Path(), case.to_json(), raw))
    prepare(model, torch.device("cpu"))
    return Policy(LoadedModel(model=model, tokenizer=None, shape=model_shape(model), context_length=256))  # type: ignore[arg-type]


def place(policy: Policy, parameters: tuple[tuple[str, tuple[int, ...]], ...], vector: np.ndarray) -> None:
    """Copy the framework's parameters into the model, by name."""
    own, start = dict(policy.model.named_parameters()), 0
    with torch.no_grad():
        for name, shape in parameters:
            size = int(np.prod(shape))
            own[name].copy_(torch.from_numpy(vector[start : start + size].reshape(shape).copy()))
            start += size


def read(policy: Policy, parameters: tuple[tuple[str, tuple[int, ...]], ...]) -> np.ndarray:
    own = dict(policy.model.named_parameters())
    return np.concatenate([own[name].detach().double().numpy().ravel() for name, _ in parameters])


def update_of(
    policy: Policy, case: cases.Case, seen: Observation, step: Step, fault: FaultSettings
) -> np.ndarray:
    """Return truestep's update from the framework's parameters, with the framework's micro-batches (rank
    after rank) and the fault."""
    place(policy, seen.parameters, step.before)
    before = read(policy, seen.parameters)
    batches, first = [], 0
    for microbatch in step.microbatches:
        rows = [case.rows[row] for row in microbatch.rows]
        demos = [
            TrainSequence(
                token_ids=r.ids,
                origin=tuple(
                    Origin.EXPERT if t and i > 0 else Origin.CONTEXT for i, t in enumerate(r.trained)
                ),
                num_prefix_tokens=0,
                group=i,
            )
            for i, r in enumerate(rows)
        ]
        batches += pack(demos, tokens_per_microbatch=4096, first_sequence=first)
        first += len(demos)
    wrong = fault_of(fault)
    weights = None if wrong is None else [float(w) for w in wrong(step.counts)]
    settings = OptimizerSettings(lr=step.learning_rate, kind="sgd", weight_decay=0.0, max_grad_norm=0.0)
    plan = StepPlan(
        step=0,
        terms=build("sft", {}).terms,
        learning_rate=step.learning_rate,
        temperature=1.0,
        microbatch_weights=weights,
    )
    train_step(policy, MasterOptimizer(policy, settings), batches, plan)
    return read(policy, seen.parameters) - before


def compare(pair: Pair) -> dict[str, Any]:
    case, seen = observe(pair)
    policy = policy_like(case, "llama")
    rows = []
    for step in seen.steps:
        real = step.after - step.before
        found = {
            name: float(
                np.linalg.norm(update_of(policy, case, seen, step, fault) - real) / np.linalg.norm(real)
            )
            for name, fault in (("injected", pair.fault), ("no_fault", NONE))
        }
        rows.append({**found, "trained_tokens": step.counts})
    return {
        "requirement": pair.requirement,
        "subject": pair.subject,
        "options": pair.options,
        "world_size": pair.world_size,
        "versions": seen.versions,
        "fault": pair.fault.model_dump(mode="json", exclude_defaults=True),
        "steps": rows,
        "worst": max(r["injected"] for r in rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare injected faults with the frameworks that had them.")
    parser.add_argument("--out", type=Path, default=ROOT / "results/audit-injected/injected.json")
    parser.add_argument("--limit", type=float, default=5e-5)
    parser.add_argument(
        "--only", default="", help="only pairs whose requirement or subject contains this text"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    attention.register()
    found = []
    for pair in PAIRS:
        if options.only not in f"{pair.requirement} {pair.subject}":
            continue
        found.append(compare(pair))
        last = found[-1]
        away = max(r["no_fault"] for r in last["steps"])
        print(
            f"{last['worst']:.1e} in {len(last['steps'])} steps (without the fault {away:.1e})  {pair.subject}, "
            f"{pair.requirement}, {pair.world_size} process(es), {last['fault'] or 'no fault'}",
            flush=True,
        )
    if not options.only:
        write_json(options.out, {"provenance": provenance(0), "limit": options.limit, "pairs": found})
    return int(any(f["worst"] > options.limit for f in found))


if __name__ == "__main__":
    sys.exit(main())
