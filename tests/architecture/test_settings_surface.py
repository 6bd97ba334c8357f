"""The settings that exist, as a list: to add one is a decision, and is made here as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from truestep.settings import RejectionSettings, RlSettings, Settings, SftSettings, StageSettings

SURFACE = """
name seed trackers group declared
model.path model.context_length model.rope_theta model.rope_scaling
model.tiny.hidden_size model.tiny.num_layers model.tiny.num_heads model.tiny.intermediate_size
compute.threads compute.dtype compute.parallel compute.gradient_checkpointing compute.compile compute.offload
compute.offload_activations
chat.system chat.user chat.generation_suffix chat.date chat.special_tokens chat.template
data.*.source data.*.split data.*.seed data.*.skip data.*.limit data.*.checker data.*.options
data.*.columns data.*.train_turns data.*.overlong_share
evaluate.data evaluate.benchmark_checker evaluate.benchmark_columns evaluate.samples_per_problem evaluate.pass_at evaluate.before
evaluate.benchmarks evaluate.folder evaluate.engine evaluate.prompts evaluate.few_shot evaluate.limit evaluate.limits
evaluate.sampling.temperature evaluate.sampling.top_p evaluate.sampling.top_k
evaluate.sampling.max_new_tokens evaluate.sampling.max_running
evaluate.scorers.function evaluate.scorers.weight evaluate.scorers.name evaluate.scorers.options
evaluate.scorers.timeout_seconds evaluate.scorers.memory_mb evaluate.scorers.workers evaluate.scorers.batch_size
evaluate.scorers.max_failure_share
vllm.attach vllm.servers vllm.devices vllm.options vllm.transfer vllm.folder vllm.sleep vllm.restarts

stage.kind stage.name stage.data stage.tokens_per_microbatch stage.save_every stage.save_every_minutes
stage.keep_checkpoints
stage.optimizer.lr stage.optimizer.kind stage.optimizer.schedule stage.optimizer.warmup_fraction
stage.optimizer.min_lr_ratio stage.optimizer.betas stage.optimizer.eps stage.optimizer.weight_decay
stage.optimizer.max_grad_norm stage.optimizer.decay_fraction stage.optimizer.no_decay stage.freeze
stage.lora.rank stage.lora.alpha stage.lora.rslora stage.lora.targets stage.lora.train_also
stage.dev.data stage.dev.every_steps stage.dev.select_best stage.dev.temperature stage.dev.samples_per_problem
stage.validation.data stage.validation.every_steps stage.validation.select_best
stage.early_stopping.patience stage.early_stopping.watch stage.early_stopping.min_change
stage.faults.offload_drop stage.faults.micro_mean stage.faults.dp_token_mean stage.faults.others
stage.faults.sequences_per_microbatch

sft.sequences_per_step sft.epochs sft.epochs_of sft.steps sft.method sft.method_options

rl.steps rl.prompts_per_step rl.samples_per_prompt rl.updates_per_rollout rl.method rl.method_options rl.reward
rl.engine rl.rollout_ahead rl.demonstrations
rl.solved_at rl.rewards.function rl.rewards.weight rl.rewards.name rl.rewards.options rl.rewards.timeout_seconds
rl.rewards.memory_mb rl.rewards.workers rl.rewards.batch_size rl.rewards.max_failure_share
rl.sampling.temperature rl.sampling.top_p rl.sampling.top_k rl.sampling.max_new_tokens rl.sampling.max_running

rejection.samples_per_prompt rejection.keep_per_prompt rejection.sequences_per_step rejection.epochs rejection.steps
rejection.sampling.temperature rejection.sampling.top_p rejection.sampling.top_k rejection.sampling.max_new_tokens
rejection.sampling.max_running
"""

STAGES: dict[str, type[StageSettings]] = {
    "sft": SftSettings,
    "rl": RlSettings,
    "rejection": RejectionSettings,
}


def leaves(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _model(field)
        if name == "stages":
            continue
        if inner is None:
            yield prefix + name
        else:
            yield from leaves(
                inner, f"{prefix}{name}." + ("*." if str(field.annotation).startswith("dict[") else "")
            )


def _model(field: FieldInfo) -> type[BaseModel] | None:
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def surface() -> set[str]:
    shared = {*leaves(StageSettings, "stage."), "stage.kind"}
    found = {*leaves(Settings, ""), *shared}
    for kind, model in STAGES.items():
        own = {key.removeprefix("stage.") for key in leaves(model, "stage.")}
        found |= {f"{kind}.{key}" for key in own - {key.removeprefix("stage.") for key in shared}}
    return found


def test_the_settings_are_those_that_are_written_here() -> None:
    assert len(SURFACE.split()) == len(set(SURFACE.split()))
    assert surface() - set(SURFACE.split()) == set(), "new settings: is each of them worth its place?"
    assert set(SURFACE.split()) - surface() == set(), "settings that are gone: old recipes will be refused"


def test_all_kinds_of_stages_are_looked_at() -> None:
    assert {get_args(s.model_fields["kind"].annotation)[0] for s in STAGES.values()} == set(STAGES)
    kinds, found = list(StageSettings.__subclasses__()), set()
    for kind in kinds:  # a common base is not a kind
        kinds += kind.__subclasses__()
        found |= set() if kind.__subclasses__() else {kind}
    assert set(STAGES.values()) == found


def test_only_what_a_run_must_decide_has_no_default() -> None:
    required = {
        f"{kind}.{name}"
        for kind, model in STAGES.items()
        for name, f in model.model_fields.items()
        if f.is_required()
    }
    assert required == {
        "sft.data", "sft.tokens_per_microbatch", "sft.optimizer", "sft.kind", "sft.sequences_per_step",
        "rl.data", "rl.tokens_per_microbatch", "rl.optimizer", "rl.kind", "rl.steps", "rl.prompts_per_step",
        "rl.sampling",
        "rejection.data", "rejection.tokens_per_microbatch", "rejection.optimizer", "rejection.kind",
        "rejection.sequences_per_step", "rejection.sampling",
    }  # fmt: skip
    assert {n for n, f in Settings.model_fields.items() if f.is_required()} == {"name", "model", "data"}
