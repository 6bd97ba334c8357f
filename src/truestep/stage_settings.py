"""The settings of a stage: its data, how it samples, how it is optimized, and how it is measured while it trains.

The text below a key is its meaning and an example, for docs/reference/settings.md and ``truestep settings``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from truestep.data_settings import DataShare, OneOrSeveral
from truestep.frozen import Frozen
from truestep.reward_settings import RewardSettings, reward_entries


class OptimizerSettings(Frozen):
    lr: float = Field(gt=0, le=1)
    """The highest learning rate, which the schedule reaches after the warm-up. Example: ``lr = 1e-5``"""
    kind: Literal["adamw", "sgd"] = "adamw"
    """The optimizer. "sgd" needs weight_decay = 0. Example: ``kind = "sgd"``"""
    schedule: Literal["cosine", "constant", "linear", "wsd"] = "constant"
    """The learning rate after the warm-up: constant, half a cosine, a line, or wsd (stable, then a line).
    Example: ``schedule = "cosine"``"""
    warmup_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the updates in which the rate rises in a line. Example: ``warmup_fraction = 0.1``"""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """The rate at the end of cosine, linear and wsd, as a share of lr. Example: ``min_lr_ratio = 0``"""
    decay_fraction: float = Field(0.1, gt=0, le=1)
    """Share of the updates, at the end, in which wsd falls. Example: ``decay_fraction = 0.2``"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment. Example: ``betas = [0.9, 0.95]``"""
    eps: float = Field(1e-8, gt=0)
    """AdamW's ε, which is added to the square root of the second moment. Example: ``eps = 1e-6``"""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled weight decay. The rate multiplies it. Example: ``weight_decay = 0.1``"""
    no_decay: tuple[str, ...] = ()
    """Parameters without weight decay: "norms", "biases", or patterns of names.
    Example: ``no_decay = ["norms", "biases"]``"""
    max_grad_norm: float = Field(1.0, ge=0)
    """A gradient with a larger global norm is scaled down to this norm. 0: no clipping.
    Example: ``max_grad_norm = 0.5``"""

    @model_validator(mode="after")
    def _sgd_is_plain(self) -> Self:
        if self.kind == "sgd" and self.weight_decay:
            raise ValueError('kind = "sgd" does not support weight decay; set weight_decay = 0')
        return self

    @model_validator(mode="after")
    def _fractions(self) -> Self:
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction + decay_fraction is more than 1; set smaller ones")
        return self


class DevSettings(Frozen):
    """Evaluation during a stage, on a set that is used neither for training nor for testing."""

    data: str = ""
    """The data set on which the model is scored while it trains. It must not be used for training or testing.
    Example: ``data = "held"``"""
    every_steps: int = Field(0, ge=0)
    """Measure after every so many steps, and after the last. Example: ``every_steps = 50``"""
    select_best: bool = False
    """Export the weights with the best score instead of the last. Example: ``select_best = true``"""
    temperature: float = Field(1.0, ge=0)
    """The temperature of the dev samples. Their length limit is evaluate.sampling.max_new_tokens.
    Example: ``temperature = 0.6``"""
    samples_per_problem: int = Field(1, ge=1)
    """Samples of each dev problem. Example: ``samples_per_problem = 4``"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.data) != bool(self.every_steps):
            raise ValueError("dev.data and dev.every_steps go together; set both or neither")
        if self.select_best and not self.data:
            raise ValueError("dev.select_best needs dev.data and dev.every_steps")
        return self


class ValidationSettings(Frozen):
    """The loss on a set with solutions during a stage: the mean of −log π over all of its trained tokens."""

    data: str = ""
    """A data set with solutions, on which the loss is measured. It must not be used for training or testing.
    Example: ``data = "held"``"""
    every_steps: int = Field(0, ge=0)
    """Measure after every so many steps, and after the last. Example: ``every_steps = 50``"""
    select_best: bool = False
    """Export the weights with the lowest loss instead of the last. Example: ``select_best = true``"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.data) != bool(self.every_steps):
            raise ValueError("validation.data and validation.every_steps go together; set both or neither")
        if self.select_best and not self.data:
            raise ValueError("validation.select_best needs validation.data and validation.every_steps")
        return self


class EarlyStoppingSettings(Frozen):
    """Ends a stage after ``patience`` measurements in a row without a new best value."""

    patience: int = Field(0, ge=0)
    """End the stage after so many measurements in a row without a new best value. 0: never.
    Example: ``patience = 3``"""
    watch: Literal["validation/loss", "dev/score"] = "validation/loss"
    """What is measured: validation/loss (lower is better) or dev/score (higher is better).
    Example: ``watch = "dev/score"``"""
    min_change: float = Field(0.0, ge=0)
    """A value is a new best one only if it is better by more than this. Example: ``min_change = 0.01``"""


class FaultSettings(Frozen):
    """Known faults of other frameworks, which an arm of a study can inject as wrong micro-batch weights. With
    any fault, a micro-batch contains ``sequences_per_microbatch`` sequences, in data order."""

    offload_drop: Literal["none", "first_last", "first_only"] = "none"
    """Drop micro-batches as DeepSpeed's offload fault did: all but the first and last ("first_last", as
    measured), or all but the first ("first_only", as the paper says). Example: ``offload_drop = "first_last"``"""
    micro_mean: bool = False
    """Use the mean of micro-batch means instead of one mean over all tokens.
    Example: ``micro_mean = true``"""
    dp_token_mean: bool = False
    """Count tokens over all ranks, but for each micro-step (the paper's algorithm 2).
    Example: ``dp_token_mean = true``"""
    others: tuple[str, ...] = ()
    """Further faults, by their names in faults.FAULTS. Example: ``others = ["rank_mean"]``"""
    sequences_per_microbatch: int = Field(1, ge=1)
    """Sequences of a micro-batch, in data order, if any fault is set.
    Example: ``sequences_per_microbatch = 2``"""

    @model_validator(mode="after")
    def _one_mean(self) -> Self:
        if self.micro_mean and self.dp_token_mean:
            both = "micro_mean and dp_token_mean"
            raise ValueError(f"{both} are two versions of the same mean; set only one of them")
        return self


class LoraSettings(Frozen):
    """Trains small matrices beside the frozen ones (LoRA). The stage exports the merged model, and the adapter in PEFT's
    format."""

    rank: int = Field(0, ge=0)
    """The rank r of the trained product B·A. 0: no adapters. Example: ``rank = 16``"""
    alpha: float = Field(32.0, gt=0)
    """The product is scaled by alpha / rank. Example: ``alpha = 16``"""
    rslora: bool = False
    """Scale by alpha / √rank instead. Example: ``rslora = true``"""
    targets: tuple[str, ...] = ("all-linear",)
    """The linear layers with an adapter: "all-linear" (all but the output layer), last parts of names, or patterns of
    names. Example: ``targets = ["q_proj", "v_proj", "model.layers.[0-3].mlp.*"]``"""
    train_also: tuple[str, ...] = ()
    """Patterns of parameters that are trained whole, beside the adapters.
    Example: ``train_also = ["model.embed_tokens.*"]``"""

    @property
    def scale(self) -> float:
        """The factor s of the product B·A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @model_validator(mode="after")
    def _some_targets(self) -> Self:
        if not self.targets:
            raise ValueError('targets = [] trains no adapter; set targets = ["all-linear"], or remove lora')
        if not self.rank and self != LoraSettings.model_construct():
            raise ValueError("rank is not set, so there are no adapters; set for example rank = 16")
        return self


class StageSettings(Frozen):
    kind: Literal["sft", "rl", "rejection"]
    """What the stage does: train on demonstrations, sample and train by the reward, or train on accepted samples.
    Example: ``kind = "sft"``"""
    name: str = ""
    """The name in folders, metrics and --set. "": the same as kind. Example: ``name = "warmup"``"""
    data: OneOrSeveral[DataShare]
    """The data set that the stage trains on, or several with weights. Example: ``data = "train"``"""
    tokens_per_microbatch: int = Field(ge=1)
    """Most tokens of a micro-batch, which is in memory at once. It never changes the update.
    Example: ``tokens_per_microbatch = 8192``"""
    optimizer: OptimizerSettings
    """How the weights are updated. Example: ``optimizer = { lr = 1e-5 }``"""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained. Example: ``freeze = ["model.layers.[0-3].*"]``"""
    lora: LoraSettings = LoraSettings()
    """Train adapters instead of the whole model. Example: ``lora = { rank = 16, alpha = 32 }``"""
    save_every: int = Field(50, ge=1)
    """Save a checkpoint after every so many steps. Example: ``save_every = 20``"""
    save_every_minutes: float = Field(0, ge=0)
    """Also save if the last checkpoint is older than this. 0: only by steps.
    Example: ``save_every_minutes = 15``"""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints are kept. Older ones are deleted. Example: ``keep_checkpoints = 1``"""
    dev: DevSettings = DevSettings()
    """A score on a separate data set while the stage trains.
    Example: ``dev = { data = "held", every_steps = 50 }``"""
    validation: ValidationSettings = ValidationSettings()
    """The loss on a separate data set while the stage trains.
    Example: ``validation = { data = "held", every_steps = 50 }``"""
    early_stopping: EarlyStoppingSettings = EarlyStoppingSettings()
    """When the stage ends before its last step. Example: ``early_stopping = { patience = 3 }``"""
    faults: FaultSettings = FaultSettings()
    """Known faults of other frameworks, injected on purpose. For studies.
    Example: ``faults = { micro_mean = true }``"""

    @model_validator(mode="after")
    def _frozen_once(self) -> Self:
        if self.lora.rank and self.freeze:
            raise ValueError(
                "freeze and lora exclude each other: with lora, only adapters and train_also are trained"
            )
        return self

    @property
    def shares(self) -> tuple[DataShare, ...]:
        """The data sets of the stage, of which most have one."""
        return (DataShare(name=self.data),) if isinstance(self.data, str) else self.data

    @property
    def data_names(self) -> tuple[str, ...]:
        return tuple(share.name for share in self.shares)

    @model_validator(mode="after")
    def _sets_once(self) -> Self:
        names = self.data_names
        if not isinstance(self.data, str) and len(names) < 2:
            raise ValueError('data is a list of one; set data = "NAME"')
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f'data has "{twice}" twice; add the weights')
        return self

    @property
    def watched_data(self) -> dict[str, str]:
        """The data sets on which the stage is measured while it trains, by the table that names them."""
        named = {"dev": self.dev.data, "validation": self.validation.data}
        return {key: data for key, data in named.items() if data}

    @model_validator(mode="after")
    def _watched(self) -> Self:
        if self.dev.select_best and self.validation.select_best:
            raise ValueError("dev.select_best and validation.select_best exclude each other; set only one")
        on = "validation" if self.early_stopping.watch == "validation/loss" else "dev"
        if self.early_stopping.patience and not getattr(self, on).data:
            raise ValueError(
                f"early_stopping.patience needs {on}.data and {on}.every_steps, or a different early_stopping.watch"
            )
        return self


def _has_one_length(stage: Any) -> Any:
    if (stage.epochs > 0) == (stage.steps > 0):
        raise ValueError("exactly one of epochs and steps must be greater than 0")
    named = getattr(stage, "epochs_of", "")
    if len(stage.shares) > 1 and stage.epochs and named not in stage.data_names:
        known = ", ".join(stage.data_names)
        raise ValueError(f"epochs of which data set? Set epochs_of to one of {known}, or set steps")
    if named and (len(stage.shares) == 1 or not stage.epochs):
        raise ValueError("epochs_of is for epochs of one of several data sets; remove it")
    return stage


class SftSettings(StageSettings):
    """A stage that trains on demonstrations."""

    kind: Literal["sft"]
    sequences_per_step: int = Field(ge=1)
    """Sequences of one step, over all ranks. Example: ``sequences_per_step = 32``"""
    epochs: float = Field(0, ge=0)
    """Length of the stage in passes over the data. Set either epochs or steps. Example: ``epochs = 3``"""
    epochs_of: str = ""
    """With several data sets, the one whose epochs are counted. Example: ``epochs_of = "train"``"""
    steps: int = Field(0, ge=0)
    """Length of the stage in steps. Set either epochs or steps. Example: ``steps = 200``"""
    method: str = "sft"
    """A built-in SFT method (truestep method list), or FILE.py:ROW. Example: ``method = "dft"``"""
    method_options: dict[str, float | str | bool] = Field(default_factory=dict)
    """Options of the method. Example: ``method_options = { normaliser = "sequences" }``"""

    _one_length = model_validator(mode="after")(_has_one_length)


class SamplingSettings(Frozen):
    temperature: float = Field(1.0, ge=0)
    """The temperature. In RL, it must be greater than 0; elsewhere, 0 takes the most probable token.
    Example: ``temperature = 1.0``"""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample only from the most probable tokens that together have this probability. RL needs 1: from all.
    Example: ``top_p = 1.0``"""
    top_k: int = Field(0, ge=0)
    """Sample only from this many most probable tokens. RL needs 0: from all. Example: ``top_k = 0``"""
    max_new_tokens: int = Field(ge=1)
    """The length limit of a completion in tokens. Example: ``max_new_tokens = 512``"""
    max_running: int = Field(64, ge=1)
    """How many samples are decoded at once. It changes only memory and speed.
    Example: ``max_running = 128``"""


class RejectionSettings(StageSettings):
    """A stage that samples from its initial model and does SFT on the samples that the checker accepts."""

    kind: Literal["rejection"]
    data: str
    """The data set whose problems are sampled. It must have answers. Example: ``data = "train"``"""
    sampling: SamplingSettings
    """How completions are sampled. Example: ``sampling = { max_new_tokens = 512 }``"""
    samples_per_prompt: int = Field(8, ge=1)
    """Samples of each problem. Example: ``samples_per_prompt = 16``"""
    keep_per_prompt: int = Field(4, ge=1)
    """Most correct and different samples that are kept of each problem. Example: ``keep_per_prompt = 2``"""
    sequences_per_step: int = Field(ge=1)
    """Sequences of one SFT step, over all ranks. Example: ``sequences_per_step = 32``"""
    epochs: float = Field(0, ge=0)
    """Length of the SFT in passes over the kept samples. Set either epochs or steps.
    Example: ``epochs = 2``"""
    steps: int = Field(0, ge=0)
    """Length of the SFT in steps. Set either epochs or steps. Example: ``steps = 100``"""

    @field_validator("data", mode="before")
    @classmethod
    def _one_set(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            raise ValueError('a rejection stage has one data set; set data = "NAME"')
        return value

    _one_length = model_validator(mode="after")(_has_one_length)


class RlSettings(StageSettings):
    """A stage of reinforcement learning: it samples, scores the samples, and trains on them."""

    kind: Literal["rl"]
    steps: int = Field(ge=1)
    """Length of the stage in steps. Each step samples one rollout batch. Example: ``steps = 500``"""
    prompts_per_step: int = Field(ge=1)
    """Prompts of one rollout batch, over all ranks. Example: ``prompts_per_step = 64``"""
    samples_per_prompt: int = Field(8, ge=2)
    """Samples of each prompt: the size of a group. Example: ``samples_per_prompt = 16``"""
    updates_per_rollout: int = Field(2, ge=1)
    """Optimizer updates of one rollout batch, which is split by prompt into as many mini-batches.
    Example: ``updates_per_rollout = 1``"""
    rollout_ahead: Literal[0, 1] = 0
    """1: the groups of a step are sampled while the step before it trains, by weights that are one step
    older. Example: ``rollout_ahead = 1``"""
    sampling: SamplingSettings
    """How completions are sampled. Example: ``sampling = { max_new_tokens = 512 }``"""
    engine: Literal["torch", "vllm"] = "torch"
    """What samples: truestep's own engine in the training process, or vLLM servers (see vllm).
    Example: ``engine = "vllm"``"""
    reward: str = "checker"
    """The reward: "checker", "random" (a coin flip, as a control), "format", "length", "overlong", "judge",
    or a function FILE.py:FUNCTION. Example: ``reward = "reward.py:steps"``"""
    rewards: tuple[RewardSettings, ...] = ()
    """Several rewards, whose weighted sum is trained on, instead of reward.
    Example: ``rewards = [{ function = "checker" }, { function = "overlong" }]``"""
    solved_at: float = 1.0
    """Without a checker, a sample with at least this reward solves its problem.
    Example: ``solved_at = 0.5``"""
    method: str = "grpo_token_mean"
    """A built-in RL method (truestep method list), or FILE.py:ROW. Example: ``method = "dapo"``"""
    method_options: dict[str, float | str | bool] = Field(default_factory=dict)
    """Options of the method. Example: ``method_options = { clip_high = 0.3 }``"""
    demonstrations: tuple[str, ...] = ()
    """The data sets of the stage whose demonstrations the method uses; all, if empty. The prompts of the others
    have samples of the policy only. Example: ``demonstrations = ["train"]``"""

    @property
    def reward_entries(self) -> tuple[RewardSettings, ...]:
        """The rewards in force."""
        return reward_entries(self.reward, self.rewards)

    @property
    def guided(self) -> tuple[str, ...]:
        """The data sets whose demonstrations a method uses that needs them."""
        return self.demonstrations or self.data_names

    @model_validator(mode="after")
    def _arithmetic(self) -> Self:
        if unknown := [name for name in self.demonstrations if name not in self.data_names]:
            known = ", ".join(self.data_names)
            raise ValueError(f"demonstrations: {unknown[0]} is not a data set of the stage; use {known}")
        _ = self.reward_entries  # raises for a reward that does not exist
        p, u = self.prompts_per_step, self.updates_per_rollout
        if p % u:
            raise ValueError(
                f"prompts_per_step = {p} cannot be split into updates_per_rollout = {u} equal mini-batches "
                f"({p} / {u} = {p / u:g}); set prompts_per_step = {(p // u + 1) * u} or updates_per_rollout = 1"
            )
        if self.sampling.temperature == 0:
            raise ValueError(
                "rl at temperature 0 makes all samples of a group identical; set temperature = 1.0"
            )
        if self.sampling.top_p < 1 or self.sampling.top_k:
            raise ValueError(
                "with top_p < 1 or top_k > 0, rl samples from a truncated distribution, whose "
                "log-probabilities are not the policy's; set top_p = 1.0 and top_k = 0"
            )
        return self
