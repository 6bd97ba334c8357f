"""OpenRLHF's own ActorPPOTrainer: replay buffer, policy loss, KL and entropy terms, and its actor step on a DeepSpeed
engine. Old and reference log-probabilities are computed by its Actor.

The samples and their advantages (GRPO's, with the group's standard deviation) are given, since its experience maker
needs Ray and vLLM. Ray and vLLM are replaced by empty modules: they start processes and sample, and the trainer runs in this one.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its entropy is compiled, which takes a C++ compiler

import deepspeed
import harness
import openrlhf_sft
import rl_harness
import rl_recorder
import torch

SUBJECTS = [{
    "name": "OpenRLHF ActorPPOTrainer", "needs": ["openrlhf", "transformers", "torch"], "brings": ["deepspeed"],
    "cases": ["RL"],
    "configurations": [
        {"arch": "llama", "processes": [1, 2]},
        {"arch": "llama", "kl_estimator": "k3", "kl_coef": 0.1},
        {"arch": "llama", "kl_estimator": "k2", "kl_coef": 0.1},
        {"arch": "llama", "policy_loss_type": "gspo"},
        {"arch": "llama", "loss_agg_mode": "seq-mean-token-mean"},
        {"arch": "llama", "entropy_coef": 0.05},
        {"arch": "llama", "is_correction_mode": "clip", "cases": ["whole", "split", "mismatch"]},
        {"arch": "llama", "is_correction_mode": "mask", "cases": ["whole", "split", "mismatch"]},
    ],
}]  # fmt: skip
EPSILON = 1e-9
UNUSED = (
    "ray",
    "vllm",
    "aiohttp",
    "fastapi",
    "uvicorn",
    "httpx",
    "datasets",
)  # imported, but not called here


class Anything:
    """A stand-in for any object of Ray: a decorator that changes nothing."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return given[0] if len(given) == 1 and not named and callable(given[0]) else self

    def __getattr__(self, name: str) -> Any:
        return self


def attribute(name: str) -> Anything:
    """Return an attribute of an empty module, except those that Python and torch look for in every module."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything()


class Empty:
    """Finds all modules of packages that are not installed, as empty ones."""

    def __init__(self, *names: str) -> None:
        self.names = [name for name in names if importlib.util.find_spec(name) is None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        mine = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mine else None  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> Any:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: Any) -> None:
        pass


def settings(spec: harness.Spec, strategy: Any) -> Any:
    """Add what the PPO trainer reads to the strategy's arguments, with OpenRLHF's defaults."""
    options, args = spec.options, strategy.args
    mode = options.get("is_correction_mode")
    args.actor = SimpleNamespace(
        eps_clip_low_high=(0.2, 0.2), dual_clip=None, loss_agg_mode=options.get("loss_agg_mode", "token-mean"),
        policy_loss_type=options.get("policy_loss_type", "ppo"), aux_loss_coef=0.0,
        entropy_coef=options.get("entropy_coef"),
    )  # fmt: skip
    correction = {"is_correction_level": "token" if mode else "off", "is_correction_mode": mode or "mask"}
    correction |= {"is_correction_gating": "ratio", "is_correction_threshold": [0.5, 2.0]}
    kl = SimpleNamespace(use_loss="kl_coef" in options, init_coef=options.get("kl_coef", 0.0), unbiased_gradient=False,
                         estimator=options.get("kl_estimator", "k3"))  # fmt: skip
    args.algo = SimpleNamespace(advantage=SimpleNamespace(**correction), kl=kl)
    args.train.max_epochs, args.train.colocate_all, args.train.async_enable = spec.case["passes"], True, False
    args.vllm = SimpleNamespace(sync_backend="nccl")
    args.ds.tensor_parallel_size = args.ds.ring_attn_size = 1
    return args


def asked(args: Any) -> dict[str, Any]:
    """Return the objective that these arguments describe."""
    gspo = args.actor.policy_loss_type == "gspo"
    by_token = args.actor.loss_agg_mode == "token-mean" and not gspo
    low, high = args.actor.eps_clip_low_high
    found = {
        "normaliser": "tokens" if by_token else "sequences", "level": "sequence" if gspo else "token",
        "epsilon": EPSILON, "clip_low": low, "clip_high": high, "entropy": args.actor.entropy_coef or 0.0,
    }  # fmt: skip
    if args.algo.kl.use_loss:
        found |= {"kl": args.algo.kl.estimator, "beta": args.algo.kl.init_coef}
    if args.algo.advantage.is_correction_level == "token":
        low, high = args.algo.advantage.is_correction_threshold
        kind = {"clip": "truncate", "mask": "mask"}[args.algo.advantage.is_correction_mode]
        found |= {"correction": kind, "correction_low": low, "correction_high": high}
    return found


def experiences(spec: harness.Spec, actor: Any, anchor: Any, lines: list[list[float]]) -> Any:
    """Yield this rank's samples, one by one."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    rows = spec.case["rows"]
    part = len(rows) // spec.case["parts"]
    mine = [i for i in range(len(rows)) if (i % part) * spec.world_size // part == spec.rank]
    for number in mine:
        row = rows[number]
        group = torch.tensor([r["reward"] for r in rows if r["group"] == row["group"]])
        advantage = (row["reward"] - group.mean()) / (group.std() + EPSILON)
        ids, mask = torch.tensor([row["ids"]]), torch.tensor([row["trained"][1:]])
        with torch.no_grad():
            how = {"attention_mask": torch.ones_like(ids)}
            old, base = actor(ids, mask.bool(), **how), anchor(ids, mask.bool(), **how)
        engine = torch.zeros_like(old)
        engine[mask.bool()] = torch.tensor(lines[number], dtype=old.dtype)
        one = torch.tensor([1.0])
        yield Experience(
            sequences=ids, attention_mask=torch.ones_like(ids), action_mask=mask.bool(), action_log_probs=old,
            base_action_log_probs=base, rollout_log_probs=engine, advantages=advantage * mask.float(),
            returns=advantage * mask.float(), rewards=one, scores=one, response_length=mask.sum(1).float(),
            total_length=torch.tensor([float(ids.shape[1])]), truncated=one * 0, index=[0], prompts=[""], labels=[""],
            info={"reward": one},
        )  # fmt: skip


def run_case(spec: harness.Spec) -> None:
    openrlhf_sft.without_flash_attention()
    sys.meta_path.append(Empty(*UNUSED))
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: 0
        torch.cuda.synchronize = torch.cuda.empty_cache = lambda *given: None  # type: ignore[assignment]
    from openrlhf.models import Actor
    from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

    strategy = openrlhf_sft.strategy_of(spec)
    args = settings(spec, strategy)
    model, reference = rl_harness.policy_and_reference(spec)
    recorder = rl_recorder.RLRecorder(spec, model, reference)
    recorder.asked = asked(args)
    engine, optimizer = openrlhf_sft.engine_of(spec, model)
    actors = [Actor(engine), Actor(reference)]
    for actor in actors:
        actor.packing_samples, actor.temperature = False, spec.case["temperature"]
    schedule = SimpleNamespace(get_last_lr=lambda: [spec.lr])
    trainer = ActorPPOTrainer(
        strategy, actors[0], None, optimizer, schedule, micro_train_batch_size=spec.rows_per_microbatch,
        buffer_cpu_offload=False, dataloader_pin_memory=False,
    )  # fmt: skip
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    engine.step = torch.no_grad()(engine.step)
    for _ in range(spec.case["rollouts"]):
        trainer.replay_buffer.clear()
        lines = recorder.rollout()
        for sample in experiences(spec, actors[0], actors[1], lines):
            trainer.replay_buffer.append(sample)
        trainer.ppo_train(args.algo.kl.init_coef)
    recorder.finish(**harness.versions("openrlhf", "deepspeed", "transformers"))
    engine.destroy()


run = rl_harness.by_case(run_case)
