"""truestep's own optimizer step for every method of its table, each from the same parameters, under plain SGD.

The expected coefficients come from the float64 reference (testing/reference), which does not share code with the
objective: the papers' losses are differentiated by the log-probabilities of the tokens. The advantages are its own,
too. Only the gate (which samples of a group are kept) is the method's in both. The proximal policy has slightly
different parameters, so ratios and clips count. Option: methods (sft, rl or mixed).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import harness
import rl_harness
import rl_recorder
import torch
from torch import Tensor

from truestep import __version__
from truestep.model import attention
from truestep.model.load import LoadedModel, model_shape
from truestep.objective.advantage import GroupView
from truestep.objective.methods import METHODS, build
from truestep.records import NOT_SAMPLED, Origin, TrainSequence
from truestep.settings import OptimizerSettings
from truestep.testing.reference.loss import drop_equal_groups, group_advantages, trained_tokens
from truestep.testing.reference.rows import ROWS, row_loss
from truestep.testing.reference.surrogate import ScoredSequence
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import dummy_batch, last_needed, pack
from truestep.train.parallel import Ranks
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.statistics import measure
from truestep.train.step import StepPlan, train_step

SUBJECTS = [{
    "name": "truestep RL", "needs": ["truestep", "transformers", "torch"], "cases": ["whole", "split"],
    "configurations": [
        {"arch": "llama", "methods": "sft"},
        {"arch": "llama", "methods": "rl", "processes": [1, 2]},
        {"arch": "llama", "methods": "mixed", "processes": [1, 2]},
    ],
}]  # fmt: skip
# method → the kind of advantage, and whether it is taken over all members of a group: the table of docs/objective.md
ADVANTAGES = {
    "grpo_token_mean": ("mean", False), "grpo": ("mean_std", False), "dr_grpo": ("mean", False),
    "dapo": ("mean_std", False), "ppo": ("mean", False), "rloo": ("rloo", False), "reinforce_pp": ("raw", False),
    "reinforce_pp_baseline": ("mean", False), "gspo": ("mean_std", False), "cispo": ("mean_std", False),
    "sapo": ("mean_std", False), "nft": ("mean", False), "luffy": ("mean", True), "multi_task": ("mean", False),
    "relift": ("mean", False), "srft": ("mean_std", True), "prefix_rft": ("mean", True), "hpt": ("mean", False),
    "trapo": ("mean", True), "exgrpo": ("mean", True), "rl_plus": ("mean", True), "chord_mu": ("mean_std", False),
    "chord_phi": ("mean_std", False), "uft": ("mean_std", True), "super_rl": ("mean_std", False),
    "sasr": ("mean_std", False), "bread": ("mean_std", False), "ghpo": ("mean_std", False),
}  # fmt: skip
RL = ("grpo_token_mean", "grpo", "dr_grpo", "dapo", "ppo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gspo",
      "cispo", "sapo", "nft")  # fmt: skip
MIXED = (
    "own",
    "own",
    "demonstration",
    "own",
    "own",
    "demonstration",
    "own",
    "prefix",
    "own",
    "own",
    "stored",
    "own",
)
# Methods whose groups have only samples; the demonstrations of the first two are a stream beside the groups.
OWN_GROUPS = ("chord_mu", "chord_phi", "relift", "bread", "ghpo")
SOLVED = 0.6  # a reward of at least this is a solved problem


def kind_of(name: str) -> str:
    if build(name, {}).plan is None:
        return "sft"
    return "rl" if name in RL else "mixed"


def kinds(spec: harness.Spec) -> tuple[str, ...]:
    pure = {"sft": "demonstration", "rl": "own"}.get(spec.options["methods"])
    return (pure,) * len(spec.rows) if pure else MIXED


def sequence(spec: harness.Spec, row: int, behavior: list[float]) -> TrainSequence:
    """Return a row as a training sequence without an advantage."""
    found, kind = spec.case["rows"][row], kinds(spec)[row]
    start, num = found["trained"].index(1), sum(found["trained"])
    num_expert = {"demonstration": num, "prefix": num // 2}.get(kind, 0)
    sampled = Origin.STORED if kind == "stored" else Origin.POLICY
    origin = (Origin.CONTEXT,) * start + (Origin.EXPERT,) * num_expert + (sampled,) * (num - num_expert)
    return TrainSequence(
        token_ids=tuple(found["ids"]),
        origin=origin,
        num_prefix_tokens=start,
        group=found["group"],
        behavior_logprobs=(0.0,) * num_expert + tuple(behavior[num_expert:]) if num_expert < num else None,
        policy_version=(NOT_SAMPLED,) * num_expert + (1,) * (num - num_expert),
        solved=found["reward"] >= SOLVED,
        reward=found["reward"],
    )


def with_advantages(
    spec: harness.Spec, name: str, lines: list[list[float]]
) -> tuple[dict[int, TrainSequence], dict[int, TrainSequence]]:
    """Return the rows that the gate keeps, with truestep's advantages, and with those of the reference."""
    method = build(name, {})
    ours: dict[int, TrainSequence] = {}
    theirs: dict[int, TrainSequence] = {}
    for group in sorted({row["group"] for row in spec.case["rows"]}):
        members = [i for i, row in enumerate(spec.case["rows"]) if row["group"] == group]
        if name in OWN_GROUPS:
            beside = [i for i in members if kinds(spec)[i] == "demonstration"]
            members = [i for i in members if kinds(spec)[i] not in ("demonstration", "stored")]
            if name in OWN_GROUPS[:2]:
                ours |= {i: sequence(spec, i, lines[i]) for i in beside}
                theirs |= {i: sequence(spec, i, lines[i]) for i in beside}
        plain = [sequence(spec, i, lines[i]) for i in members]
        rewards = [s.reward for s in plain]
        own = [next(o for o in reversed(s.origin) if o is not Origin.CONTEXT) for s in plain]
        view = GroupView(rewards=tuple(rewards), solved=tuple(s.solved for s in plain), origins=tuple(own))
        decision = method.gate(view)
        kind, over_all = ADVANTAGES.get(name, ("raw", True))
        counted = [j for j, o in enumerate(own) if over_all or o is Origin.POLICY]
        chosen = [rewards[j] for j in counted]
        found = dict(zip(counted, chosen if kind == "raw" else group_advantages(chosen, kind), strict=True))
        for j, (number, advantage) in enumerate(zip(members, method.advantage(view), strict=True)):
            if decision.keep[j] and advantage is not None:
                weight = decision.weights[j]
                ours[number] = replace(plain[j], advantage=advantage, weight=weight)
                theirs[number] = replace(plain[j], advantage=found.get(j, 0.0), weight=weight)
    return ours, theirs


def expected(
    spec: harness.Spec, name: str, rows: dict[int, TrainSequence], models: tuple[Any, ...]
) -> list[float]:
    """Return the coefficients of all columns that the reference gives. ``models`` are the policy, the proximal policy
    and the frozen reference, in float64."""
    scored, leaves = [], {}
    for number, item in rows.items():
        with torch.no_grad():
            (now, spread), (old, old_spread), (anchor, _) = (
                trained_tokens(m, item, spec.case["temperature"]) for m in models
            )
        logps = [x.clone().requires_grad_() for x in now]
        entropies = [x.clone().requires_grad_() for x in spread]
        leaves[number] = (logps, entropies)
        numbers = {"proximal": old, "reference": anchor, "proximal_entropies": old_spread}
        plain = {key: [float(x) for x in values] for key, values in numbers.items()}
        scored.append(ScoredSequence(sequence=item, policy=logps, entropies=entropies, **plain))
    if ROWS[name].drop_equal_groups:
        scored = drop_equal_groups(scored)
    row_loss(ROWS[name], scored, spec.case["max_tokens"]).backward()
    tokens, bonus = [], []
    for number, row in enumerate(spec.case["rows"]):
        logps, entropies = leaves.get(number, ([], []))
        found = [0.0 if x.grad is None else -float(x.grad) for x in logps]
        tokens += found or [0.0] * sum(row["trained"])
        bonus.append(max((0.0 if x.grad is None else -float(x.grad) for x in entropies), default=0.0))
    first = {row["group"]: row["trained"].index(1) - 1 for row in reversed(spec.case["rows"])}
    return [*tokens, *[0.0] * sum(first.values()), *bonus]


def policy_of(model: Any) -> Policy:
    return Policy(LoadedModel(model=model, tokenizer=None, shape=model_shape(model), context_length=256))


def copy_into(model: Any, vector: Tensor) -> Any:
    """Copy one flat vector, in the order of the recorder, into the parameters of a model."""
    own = harness.parameters_of(model)
    with torch.no_grad():
        for parameter, part in zip(own, vector.split([p.numel() for p in own]), strict=True):
            parameter.copy_(part.view_as(parameter))
    return model


def run_case(spec: harness.Spec) -> None:
    harness.join_ranks(spec)
    attention.register()
    ranks = Ranks(rank=spec.rank, world_size=spec.world_size)
    model, anchor = rl_harness.policy_and_reference(spec)
    for row, kind in zip(spec.case["rows"], kinds(spec), strict=True):
        num = sum(row["trained"])
        foreign = {"demonstration": num, "stored": num, "prefix": num // 2}.get(kind, 0)
        row["entropy_of"] = [0] * foreign + [1] * (num - foreign)  # the bonus is over the policy's tokens
    wide = copy.deepcopy(anchor).double().eval()
    start = harness.flat(harness.parameters_of(model))
    spread = rl_harness.SPREAD * torch.randn(
        start.shape, generator=torch.Generator().manual_seed(8), dtype=start.dtype
    )
    behind = copy_into(copy.deepcopy(model), start + spread / 2)
    exact = tuple(
        copy_into(copy.deepcopy(wide), harness.flat(harness.parameters_of(m)))
        for m in (model, behind, anchor)
    )
    policy, proximal, reference = policy_of(model), policy_of(behind), policy_of(anchor)
    recorder = rl_recorder.RLRecorder(spec, model)
    whole = [sequence(spec, i, [0.0] * sum(row["trained"])) for i, row in enumerate(spec.case["rows"])]
    needles = [bytes(s.token_ids[: last_needed(s)]) for s in whole]
    recorder.watch(
        model.base_model, needles, ignored=bytes(dummy_batch(torch.float32, "cpu").input_ids.tolist())
    )
    lines = recorder.rollout()
    settings = OptimizerSettings(lr=spec.lr, kind="sgd", weight_decay=0.0, max_grad_norm=0.0)
    optimizer = MasterOptimizer(policy, settings)
    temperature, limit = float(spec.case["temperature"]), 1024 if spec.case["name"] == "whole" else 48
    for name in [m for m in METHODS if kind_of(m) == spec.options["methods"]]:
        ours, theirs = with_advantages(spec, name, lines)
        method = build(name, {})
        scorer = Scorer(
            policy=proximal,
            reference=reference,
            temperature=temperature,
            tokens_per_microbatch=limit,
            ranks=ranks,
        )
        mine = [s for i, s in ours.items() if i % spec.world_size == spec.rank]
        # Without shared prompts, every row is in one piece in the model's input.
        apart: dict[str, Any] = {"share_prefix": False, "first_sequence": spec.rank * len(spec.rows)}
        packed = pack(mine, tokens_per_microbatch=limit, **apart)
        batches = scorer.with_proximal(scorer.with_reference(packed, 0), 0)
        statistics = measure(method.statistics, batches, 0, ranks)
        how: dict[str, Any] = {
            "max_length": spec.case["max_tokens"],
            "statistics": statistics,
            "temperature": temperature,
        }
        how["controls"] = {term.control: 1.0 for term in method.terms if term.control}
        if spec.rank == 0:
            recorder.expected.append(expected(spec, name, theirs, exact))
            recorder.labels.append(name)
        policy.train()
        train_step(
            policy,
            optimizer,
            batches,
            StepPlan(step=0, terms=method.terms, learning_rate=spec.lr, ranks=ranks, **how),
        )
        recorder.begin_again()
        copy_into(model, start)
        optimizer = MasterOptimizer(policy, settings)
    recorder.finish(truestep=__version__, **harness.versions("transformers"))


run = rl_harness.by_case(run_case)
