"""The settings of a stage that say how it is optimized, and how it is measured while it trains."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from truestep.frozen import Frozen


class OptimizerSettings(Frozen):
    lr: float = Field(gt=0, le=1)
    kind: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["cosine", "constant", "linear", "wsd"] = "constant"
    warmup_fraction: float = Field(0.0, ge=0, lt=1)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)  # where cosine, linear and wsd end
    decay_fraction: float = Field(0.1, gt=0, le=1)  # of the steps, at the end of wsd
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    no_decay: tuple[str, ...] = ()  # "norms", "biases", or patterns of parameters without weight decay
    max_grad_norm: float = Field(1.0, ge=0)  # 0: no clipping

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
    every_steps: int = Field(0, ge=0)
    select_best: bool = False  # export the best dev checkpoint instead of the last
    temperature: float = Field(1.0, ge=0)
    samples_per_problem: int = Field(1, ge=1)

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
    every_steps: int = Field(0, ge=0)
    select_best: bool = False  # export the checkpoint with the lowest loss instead of the last

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.data) != bool(self.every_steps):
            raise ValueError("validation.data and validation.every_steps go together; set both or neither")
        if self.select_best and not self.data:
            raise ValueError("validation.select_best needs validation.data and validation.every_steps")
        return self


class EarlyStoppingSettings(Frozen):
    """Ends a stage after ``patience`` measurements in a row without a new best value."""

    patience: int = Field(0, ge=0)  # 0: the stage never ends early
    watch: Literal["validation/loss", "dev/score"] = "validation/loss"
    min_change: float = Field(0.0, ge=0)  # a new best value must be better by more than this
