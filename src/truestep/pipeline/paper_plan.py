"""A dry run of a recipe without its weights and data. The facts that it needs are declared in ``[declared]``.

The recipe's author declares these facts (numbers of rows, observed mean lengths); a real run does not read
them. Shapes come from a ``config.json`` next to the recipe, by making its model on the meta device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from truestep.errors import UserError
from truestep.flops import Ledger, ModelShape, group_work, sequence_work
from truestep.frozen import Frozen
from truestep.pipeline import memory
from truestep.pipeline.memory import Sizes
from truestep.settings import RejectionSettings, RlSettings, Settings, SftSettings, StageSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DeclaredStage(Frozen):
    """A stage's mean lengths and counts, which only a run could observe. Units: tokens."""

    rollout_tokens: int = Field(0, ge=0)
    """Mean tokens of a sample. 0: sampling.max_new_tokens. Example: ``rollout_tokens = 3000``"""
    own_samples: int = Field(0, ge=0)
    """Samples of each prompt that the policy makes. 0: samples_per_prompt. Example: ``own_samples = 7``"""
    demonstrations_per_prompt: float = Field(0.0, ge=0)
    """Demonstrations of each prompt that are trained on; a fraction if only some prompts get one.
    Example: ``demonstrations_per_prompt = 0.3``"""
    demonstration_share: float = Field(1.0, gt=0, le=1)
    """The trained share of a demonstration, for methods that use prefixes.
    Example: ``demonstration_share = 0.5``"""
    sft_updates: int = Field(0, ge=0)
    """Updates on only demonstrations, between the others. Example: ``sft_updates = 138``"""
    sft_sequences_per_update: int = Field(0, ge=0)
    """Sequences of each of these updates. Example: ``sft_sequences_per_update = 64``"""


class Declared(Frozen):
    """Facts about a recipe's model and data, for ``truestep run --dry-run`` without weights and data."""

    config: str
    """A config.json of the model, relative to the recipe. Example: ``config = "models/llama-3.1-8b.json"``"""
    formula_parameters: float = Field(gt=0)
    """The number of parameters N in the paper's formula for FLOPs. Example: ``formula_parameters = 8e9``"""
    num_gpus: int = Field(1, ge=1)
    """GPUs over which fsdp2 splits the weights. Example: ``num_gpus = 16``"""
    rows: dict[str, int]
    """The number of rows of every data set. Example: ``rows = { train = 46000, test = 500, held = 500 }``"""
    prompt_tokens: int = Field(ge=1)
    """Mean tokens of a prompt. Example: ``prompt_tokens = 300``"""
    max_prompt_tokens: int = Field(ge=1)
    """Tokens of the longest prompt. Example: ``max_prompt_tokens = 1024``"""
    demonstration_tokens: int = Field(ge=1)
    """Mean tokens of a demonstration. Example: ``demonstration_tokens = 4200``"""
    max_demonstration_tokens: int = Field(ge=1)
    """Tokens of the longest demonstration. Example: ``max_demonstration_tokens = 8192``"""
    stages: dict[str, DeclaredStage] = Field(default_factory=dict)
    """The mean lengths and counts of a stage, by its name.
    Example: ``stages.rl = { rollout_tokens = 3000 }``"""


def read_declared(settings: Settings, where: str) -> Declared:
    try:
        return Declared.model_validate(settings.declared)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(p) for p in first["loc"])
        raise UserError(f"{where}: declared.{key}: {first['msg']}") from None


def read_config(declared: Declared, base_dir: Path) -> dict[str, Any]:
    path = base_dir / declared.config
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: declared.config cannot be read as a config.json: {error}") from None


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Compute the shape of a Llama or Qwen2 model from its config.

    Held by: tests/study/test_paper_recipes.py (compared with the model's class on the meta device)"""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys, queries = config["num_key_value_heads"] * head, heads * head
    bias = queries + 2 * keys if config["model_type"] == "qwen2" else 0
    layer = hidden * (2 * queries + 2 * keys + 3 * config["intermediate_size"] + 2) + bias
    table = config["vocab_size"] * hidden
    tied = bool(config.get("tie_word_embeddings"))
    total = layers * layer + hidden + table * (1 if tied else 2)
    return ModelShape(
        num_parameters=total, num_matmul_parameters=total - (0 if tied else table), num_layers=layers,
        attention_width=queries,
    )  # fmt: skip


def meta_model(settings: Settings, config: Mapping[str, Any]) -> PreTrainedModel:
    """Make the model on the meta device, with the recipe's overrides as in a real run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from truestep.model.rope import override

    made = AutoConfig.for_model(**config)
    override(made, settings.model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made, trust_remote_code=False)


def rows_of(stage: StageSettings, declared: Declared) -> list[int]:
    """Return the declared numbers of rows of the stage's data sets. Raises UserError if one is not declared."""
    for name in stage.data_names:
        if name not in declared.rows:
            raise UserError(
                f"stages.{stage.name}.data: declared.rows has no entry {name!r}; set its number of rows"
            )
    return [declared.rows[name] for name in stage.data_names]


def stage_work(stage: StageSettings, declared: Declared) -> Ledger:
    """Return a stage's work at the declared mean lengths, which slightly underestimates attention."""
    prompt, demonstration = declared.prompt_tokens, declared.demonstration_tokens
    if isinstance(stage, SftSettings):
        from truestep.pipeline.sizes import num_sequences

        rows = rows_of(stage, declared)
        exact = stage.epochs * rows[0] if stage.epochs and len(rows) == 1 else num_sequences(stage, rows)
        return sequence_work(prompt, demonstration).times(exact)
    if isinstance(stage, RejectionSettings):
        raise UserError(
            f"stages.{stage.name}: a rejection stage cannot be estimated, as the number of kept samples is unknown"
        )
    assert isinstance(stage, RlSettings)
    known = declared.stages.get(stage.name, DeclaredStage())
    length = known.rollout_tokens or stage.sampling.max_new_tokens
    own = [length] * (known.own_samples or stage.samples_per_prompt)
    trained = max(1, round(known.demonstration_share * demonstration))
    between = sequence_work(prompt, demonstration).times(known.sft_updates * known.sft_sequences_per_update)
    return between + rl_work(stage, prompt, own, trained, known.demonstrations_per_prompt)


def rl_work(
    stage: RlSettings, prompt: int, own: list[int], demonstration: int = 0, per_prompt: float = 0.0
) -> Ledger:
    """Return the work of an RL stage with rollouts of lengths ``own`` and demonstrations in their groups."""
    everywhere, some = divmod(per_prompt, 1)
    unscored = 1 / stage.updates_per_rollout  # the first update of a rollout batch needs no scoring pass
    total = Ledger()
    for share, extra in ((1 - some, int(everywhere)), (some, int(everywhere) + 1)):
        for scored, part in ((False, unscored), (True, 1 - unscored)):
            work = group_work(prompt, own, [demonstration] * extra, scored=scored)
            total = total + work.times(stage.steps * stage.prompts_per_step * share * part)
    return total


def flops_of(settings: Settings, base_dir: Path, where: str) -> dict[str, float]:
    """Return the FLOPs of a whole recipe by the paper's formula (with the paper's N) and by the fuller
    count."""
    declared = read_declared(settings, where)
    shape = shape_of(read_config(declared, base_dir))
    rounded = replace(shape, num_parameters=int(declared.formula_parameters))
    work = sum((stage_work(s, declared) for s in settings.stages), Ledger())
    return {"flops_paper_formula": work.paper_flops(rounded), "flops_full": work.full_flops(rounded)}


def sizes_of(settings: Settings, config: Mapping[str, Any], stage: StageSettings) -> tuple[Sizes, ModelShape]:
    """Return the sizes for the stage's memory, and the shape for its FLOPs. Frozen matrices and adapters are counted on
    the meta device. Raises UserError if a pattern of the stage matches nothing."""
    shape = shape_of(config)
    sizes = Sizes.of(config, shape.num_parameters)
    if not (stage.freeze or stage.lora.rank):
        return sizes, shape
    from truestep.model.lora import choose_trained

    model = meta_model(settings, config)
    choose_trained(model, stage, settings.seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = replace(
        sizes, parameters=sum(p.numel() for p in model.parameters()), trained=trained, is_adapted=stage.lora.rank > 0,
        trains_head=model.get_output_embeddings().weight.requires_grad,
    )  # fmt: skip
    matrices = shape.num_matmul_parameters + sizes.parameters - shape.num_parameters
    # The gradients of all inputs, and of the trained weights. If the lowest layers are frozen, it is less.
    share = min(1.0, (matrices + trained) / (2 * matrices))
    return sizes, replace(
        shape, num_parameters=sizes.parameters, num_matmul_parameters=matrices, backward_share=share
    )


def stage_needs(
    settings: Settings, declared: Declared, stage: StageSettings, sizes: Sizes, shape: ModelShape
) -> dict[str, Any]:
    """Return what a rank needs at most, by kind and in total (GiB: device, host, and a server of vLLM), and the assumed
    tokens a second of a rank. While it samples, a rank has no gradients and activations."""
    compute = settings.compute
    how = memory.Training(
        dtype=compute.dtype, tokens=stage.tokens_per_microbatch, checkpointing=compute.gradient_checkpointing,
        shards=declared.num_gpus if compute.parallel == "fsdp2" else 1, offload=compute.offload == "optimizer",
        offload_activations=compute.offload_activations,
    )  # fmt: skip
    is_served = isinstance(stage, RlSettings) and stage.engine == "vllm"
    device, host = memory.training_bytes(sizes, how)
    peak = sum(device.values())
    work = stage_work(stage, declared)
    per_token = replace(
        work, generated_pass_tokens=0, scored_pass_tokens=0, generated_pairs=0, scored_pairs=0
    )
    flops = per_token.full_flops(shape) / work.trained_pass_tokens
    rates = {"training": memory.training_rate(flops, how)}
    server: dict[str, float] = {}
    if isinstance(stage, RlSettings | RejectionSettings):
        running, prompt = stage.sampling.max_running, declared.prompt_tokens
        known = declared.stages.get(stage.name, DeclaredStage())
        mean = prompt + (known.rollout_tokens or stage.sampling.max_new_tokens)
        engine = "vllm" if is_served else "torch"
        rates["sampling"] = memory.decoding_rate(sizes, how, engine, prompt + mean // 2, running)
        if is_served:
            server = memory.server_bytes(sizes, how, mean, running)
        else:
            longest = declared.max_prompt_tokens + stage.sampling.max_new_tokens
            added = memory.sampling_bytes(sizes, how, longest, running)
            state = sum(device.get(kind, 0.0) for kind in ("weights", "masters and moments"))
            peak = max(peak + added["sampling engine"], state + sum(added.values()))
            device |= added
    host |= memory.host_bytes(sizes, how, serves=is_served)
    return {
        "gib": _gib(device), "gib_per_gpu": round(peak / memory.GIB, 1), "host_gib": _gib(host),
        "host_gib_per_rank": round(sum(host.values()) / memory.GIB, 1), "server_gib": _gib(server),
        "server_gib_per_gpu": round(sum(server.values()) / memory.GIB, 1),
        "assumed tokens/s": {name: round(rate) for name, rate in rates.items()},
        "assumed seconds of offload": round(memory.update_seconds(sizes, how), 1),
    }  # fmt: skip


def _gib(found: Mapping[str, float]) -> dict[str, float]:
    return {name: round(size / memory.GIB, 2) for name, size in found.items()}


def declared_plan(settings: Settings, base_dir: Path, where: str) -> dict[str, Any]:
    """Return the dry run's plan. Raises UserError if the declared facts contradict the settings."""
    from truestep.model.load import model_shape
    from truestep.pipeline.prepare import check_methods

    declared = read_declared(settings, where)
    check_methods(settings, base_dir)
    config = read_config(declared, base_dir)
    model = meta_model(settings, config)
    context = int(model.config.max_position_embeddings)
    rope = getattr(model.config, "rope_parameters", None) or {}
    rows = [_stage_row(settings, declared, config, stage, context) for stage in settings.stages]
    if lost := [name for name in settings.evaluate.data if name not in declared.rows]:
        raise UserError(
            f"{where}: declared.rows has no entry {lost[0]!r}, which is in evaluate.data; set its number of rows"
        )
    return {
        "name": settings.name,
        "model": {"path": settings.model.path, **model_shape(model).to_json(), "context_length": context,
                  "rope_theta": rope.get("rope_theta")},
        "template": f"{settings.chat.system}\n{settings.chat.user}\n{settings.chat.generation_suffix}",
        "rows": declared.rows, "num_gpus": declared.num_gpus, "stages": rows,
        **flops_of(settings, base_dir, where),
    }  # fmt: skip


def _stage_row(
    settings: Settings, declared: Declared, config: Mapping[str, Any], stage: StageSettings, context: int
) -> dict[str, Any]:
    from truestep.pipeline.sizes import shares_of

    where = f"stages.{stage.name}"
    by_set, longest = rows_of(stage, declared), declared.max_prompt_tokens
    rows = sum(by_set)
    sampled = stage.sampling.max_new_tokens if isinstance(stage, RlSettings | RejectionSettings) else 0
    longest += max(sampled, declared.max_demonstration_tokens)
    limits = {"model.context_length": context, "tokens_per_microbatch": stage.tokens_per_microbatch}
    for key, limit in limits.items():
        if longest > limit:
            fault = f"{key} = {limit} is less than the longest sequence, which has {longest} tokens"
            raise UserError(f"{where}: {fault}; set {longest} or more")
    for which, num_rows in enumerate(by_set if isinstance(stage, RlSettings) else ()):
        asked = shares_of(stage).most(which)
        if asked > num_rows:
            size = stage.prompts_per_step if isinstance(stage, RlSettings) else 0
            raise UserError(
                f"{where}.prompts_per_step = {size} takes {asked} prompts of data.{stage.data_names[which]} in a step, "
                f"which is more than its {num_rows} rows; set a smaller number"
            )
    work, (sizes, shape) = stage_work(stage, declared), sizes_of(settings, config, stage)
    steps, per_update, updates, epochs = _arithmetic(stage, by_set)
    return {
        "stage": stage.name, "kind": stage.kind, "method": getattr(stage, "method", ""), "rows": rows,
        "steps": steps, "optimizer updates": updates, "sequences per update": per_update,
        "epochs": round(epochs, 2), "tokens per micro-batch": stage.tokens_per_microbatch,
        "lr": f"{stage.optimizer.lr:g} {stage.optimizer.schedule}", "longest sequence": longest,
        "flops_full": work.full_flops(shape), **stage_needs(settings, declared, stage, sizes, shape),
    }  # fmt: skip


def _arithmetic(stage: StageSettings, rows: Sequence[int]) -> tuple[int, int, int, float]:
    """Return steps, sequences per update, updates and epochs."""
    from truestep.pipeline.sizes import num_steps

    if isinstance(stage, RlSettings):
        u = stage.updates_per_rollout
        per_update = stage.prompts_per_step // u * stage.samples_per_prompt
        return stage.steps, per_update, stage.steps * u, stage.steps * stage.prompts_per_step / sum(rows)
    assert isinstance(stage, SftSettings | RejectionSettings)
    size = stage.sequences_per_step
    steps = num_steps(stage, rows)
    return steps, size, steps, steps * size / sum(rows)
